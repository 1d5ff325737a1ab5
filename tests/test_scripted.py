"""The test doubles keep the seams' promises."""

import subprocess
import sys

import numpy as np
import pytest

from memory_os.adapters.scripted import HashEmbedder, ScriptedLLM, WordCounter
from memory_os.errors import LLMError

ASK = [{"role": "user", "content": "Hello, world"}]


def test_words_are_counted_as_by_hand():
    assert WordCounter().count_text("Don't stop, now!") == 7  # Don ' t stop , now !
    assert WordCounter().count_tokens(ASK * 2) == 14
    assert WordCounter().count_tokens([]) == 0


def test_replies_come_in_order_word_by_word_and_calls_are_kept():
    llm = ScriptedLLM(["First one.", " second\n\nreply "])
    assert list(llm.generate(ASK, max_tokens=50)) == ["First", " one."]
    assert list(llm.generate(ASK, max_tokens=60)) == [" second", "\n\nreply", " "]
    assert llm.calls == [(tuple(ASK), 50), (tuple(ASK), 60)]
    assert llm.calls[1].max_tokens == 60


def test_an_exhausted_queue_is_an_llm_error():
    llm = ScriptedLLM(["only"])
    list(llm.generate(ASK, max_tokens=9))
    with pytest.raises(LLMError, match="no reply is left for call 2"):
        list(llm.generate(ASK, max_tokens=9))


def test_a_function_answers_and_its_errors_are_the_llms():
    assert "".join(ScriptedLLM(lambda m: m[-1]["content"].upper()).generate(ASK, max_tokens=9)) == "HELLO, WORLD"

    def broken(messages):
        raise ValueError("no service")

    with pytest.raises(LLMError, match="no service") as caught:
        list(ScriptedLLM(broken).generate(ASK, max_tokens=9))
    assert isinstance(caught.value.__cause__, ValueError)


def test_max_tokens_stop_and_window_hold():
    llm = ScriptedLLM(lambda _: "one two three four", context_window=20)
    assert "".join(llm.generate(ASK, max_tokens=2)).split() == ["one", "two"]
    assert "".join(llm.generate(ASK, max_tokens=9, stop=["o th", "four"])) == "one tw"
    assert "".join(llm.generate(ASK, max_tokens=13)) == "one two three four"
    with pytest.raises(LLMError, match="exceed"):
        list(llm.generate(ASK, max_tokens=14))


def test_hashed_vectors_are_unit_length_and_near_for_shared_words():
    embedder = HashEmbedder()
    texts = ["the cat sat on the mat", "a cat on a mat", "quarterly revenue grew", "猫が好き", ""]
    matrix = embedder.embed_documents(texts)
    assert matrix.dtype == np.float32
    assert matrix.shape == (5, 64)
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1, rtol=1e-6)
    assert matrix[0] @ matrix[1] > matrix[0] @ matrix[2]
    assert embedder.embed_query("猫が好きです") @ matrix[3] > 0.5 > abs(matrix[3] @ matrix[2])
    np.testing.assert_array_equal(embedder.embed_query(texts[0]), matrix[0])
    assert embedder.embed_documents([]).shape == (0, 64)
    assert (HashEmbedder(8).fingerprint, HashEmbedder(8).dimension) == ("hash-8-v1", 8)


def test_hashed_vectors_are_the_same_in_another_process():
    code = "from memory_os.adapters.scripted import HashEmbedder as H; print(H().embed_query('a cat').tobytes().hex())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert out.stdout.strip() == HashEmbedder().embed_query("a cat").tobytes().hex()
