"""The embedded MiniLM against sentence-transformers itself, in float32, on real conversation turns."""

import json
import shutil
import threading

import numpy as np
import pytest

from memory_os.adapters import sentence_transformer as module
from memory_os.adapters.sentence_transformer import SentenceTransformerEmbedder
from memory_os.errors import UnknownNameError


@pytest.fixture(scope="module")
def embedder():
    return SentenceTransformerEmbedder()


@pytest.fixture(scope="module")
def reference(embedder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(embedder._source, device="cpu")


@pytest.fixture(scope="module")
def turns(shared_data):
    conversations = json.loads((shared_data / "locomo_dev.json").read_text(encoding="utf-8"))
    sessions = [s for c in conversations for s in c["conversation"].values() if isinstance(s, list)]
    return [f"{turn['speaker']}: {turn['text']}" for session in sessions for turn in session][:200]


def test_vectors_are_those_of_sentence_transformers(embedder, reference, turns):
    matrix = embedder.embed_documents(turns)
    assert matrix.dtype == np.float32
    assert matrix.shape == (200, 384)
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1, rtol=1e-5)
    assert (matrix * reference.encode(turns)).sum(axis=1).min() >= 0.9995


def test_the_fast_way_is_taken(embedder):
    embedder.embed_query("x")
    assert embedder.notes == ()


def test_a_text_has_one_vector_whatever_it_is_batched_with(embedder, turns):
    matrix = embedder.embed_documents(turns)
    alone = np.stack([embedder.embed_query(text) for text in turns[:20]])
    assert (matrix[:20] * alone).sum(axis=1).min() > 0.9999
    np.testing.assert_allclose(embedder.embed_documents(turns[::-1])[::-1], matrix, atol=0.01)


def test_long_and_empty_texts_are_as_sentence_transformers_has_them(embedder, reference):
    texts = ["", " ", "word " * 5000, "word " * 254, "word " * 255, "東京タワー", "[SEP] and [PAD]"]
    assert (embedder.embed_documents(texts) * reference.encode(texts)).sum(axis=1).min() >= 0.9995


def test_no_texts_give_no_rows_and_load_nothing():
    embedder = SentenceTransformerEmbedder()
    assert embedder.embed_documents([]).shape == (0, 384)
    assert embedder._loaded is None


def test_without_packed_weights_the_vectors_are_the_same_and_a_note_says_so(turns, embedder, monkeypatch):
    import torch

    def gone(*args):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", gone)
    plain = SentenceTransformerEmbedder()
    assert (plain.embed_documents(turns[:20]) * embedder.embed_documents(turns[:20])).sum(axis=1).min() > 0.9998
    assert "slower" in plain.notes[0]


def test_a_wrong_fast_way_is_found_out_at_load(turns, reference, monkeypatch):
    monkeypatch.setattr(module._Linear, "gelu", module._Linear.__call__)
    embedder = SentenceTransformerEmbedder()
    assert (embedder.embed_documents(turns[:10]) * reference.encode(turns[:10])).sum(axis=1).min() >= 0.9995
    assert "not those of BERT" in embedder.notes[0]


def test_another_pooling_runs_through_sentence_transformers(tmp_path, turns, embedder):
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "cls"
    shutil.copytree(embedder._source, folder)
    config = {"word_embedding_dimension": 384, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    other = SentenceTransformerEmbedder(str(folder), dtype="float32")
    np.testing.assert_allclose(
        other.embed_documents(turns[:5]), SentenceTransformer(str(folder), device="cpu").encode(turns[:5]), atol=1e-5
    )
    assert "pooling" in other.notes[0]
    np.testing.assert_allclose(other.embed_query(turns[0]), other.embed_documents(turns[:1])[0], atol=1e-5)
    assert other.fingerprint != embedder.fingerprint


def test_the_fingerprint_is_the_models_and_not_the_folders(tmp_path, embedder):
    for place in ("a", "b"):
        shutil.copytree(embedder._source, tmp_path / place / "mini")
    first, second = (SentenceTransformerEmbedder(str(tmp_path / place / "mini")).fingerprint for place in ("a", "b"))
    assert first == second == SentenceTransformerEmbedder(str(tmp_path / "a" / "mini"), dtype="float32").fingerprint
    (tmp_path / "b" / "mini" / "sentence_bert_config.json").write_text('{"max_seq_length": 128}')
    assert SentenceTransformerEmbedder(str(tmp_path / "b" / "mini")).fingerprint != first


def test_threads_share_one_load(turns):
    embedder = SentenceTransformerEmbedder()
    results = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: embedder.embed_query(turns[n])})) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 1, 2, 3]
    np.testing.assert_allclose(results[2], embedder.embed_query(turns[2]), atol=1e-6)


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(UnknownNameError, match="no such folder"):
        SentenceTransformerEmbedder(str(tmp_path / "none"))
    with pytest.raises(UnknownNameError, match="hf download nobody/nothing"):
        SentenceTransformerEmbedder("nobody/nothing").embed_query("x")
    with pytest.raises(UnknownNameError, match="dtype"):
        SentenceTransformerEmbedder(dtype="int3").embed_query("x")
