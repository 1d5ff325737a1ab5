"""What the doctor checks is broken here on purpose, found, and mended."""

import json
import sqlite3
from contextlib import closing

import pytest

from memory_os import Memory
from memory_os.derive import BATCH


@pytest.fixture(params=["exact", "chroma"])
def memory(request, tmp_path):
    with Memory.open(tmp_path / "memory.db", embedder="hash", vectors=request.param) as opened:
        for i in range(6):
            opened.namespace("a").add(f"kite number {i}")
        opened.namespace("b").add("a boat")
        yield opened


def break_(memory, *statements):
    memory.parts.index.sync(("a",))
    with sqlite3.connect(memory.parts.store.database.path) as raw:
        for statement in statements:
            raw.execute(statement)
    raw.close()


BREAKAGES = {
    "missing_vectors": ["DELETE FROM vectors WHERE segment_pk = 3"],
    "pending_vectors": [
        "DELETE FROM vectors WHERE segment_pk = 2",
        "INSERT INTO pending(segment_pk, task, namespace_id) "
        "SELECT pk, 'vector', namespace_id FROM segments WHERE pk = 2",
    ],
    "orphan_vectors": [
        "INSERT INTO vectors(segment_pk, namespace_id, fingerprint, vector) SELECT 999, 1, fingerprint, vector "
        "FROM vectors LIMIT 1"
    ],
    "missing_lexical": ["DELETE FROM lexical WHERE rowid = 4"],
    "orphan_lexical": ["INSERT INTO lexical(rowid, terms) VALUES (999, '1_kite')"],
    "lexical_index": ["UPDATE lexical_content SET c0 = '1_changed' WHERE id = 5"],
}


@pytest.mark.parametrize("kind", BREAKAGES)
def test_each_fault_is_found_and_mended(memory, kind):
    scope = memory.namespace("a")
    before = [(h.segment.id, h.score) for h in scope.search("kite 3", k=6)]
    assert not any(memory.check().values())
    break_(memory, *BREAKAGES[kind])
    found = {name for name, rows in memory.check().items() if rows}
    assert kind in found
    assert memory.repair()[kind] == 1
    assert not any(memory.check().values())
    assert [(h.segment.id, h.score) for h in scope.search("kite 3", k=6)] == before


@pytest.mark.parametrize("kind", [kind for kind in BREAKAGES if "lexical" in kind])
def test_what_was_read_of_broken_words_is_read_anew_once_they_are_mended(tmp_path, kind):
    with Memory.open(tmp_path / "memory.db", embedder="hash") as memory:
        for i in range(6):
            memory.namespace("a").add(f"kite number {i}")
        whole = memory.namespace("a").search("kite 3", k=6)
        break_(memory, *BREAKAGES[kind])
        with Memory.open(tmp_path / "memory.db", embedder="hash") as other:  # as another process
            other.namespace("a").search("kite 3", k=6)
            memory.repair()
            assert other.namespace("a").search("kite 3", k=6) == whole


def test_an_index_of_words_that_cannot_be_read_is_made_anew(memory):
    path = memory.parts.store.database.path
    memory.close()
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("UPDATE lexical_data SET block = x'0000000100FFFFFF7F' WHERE id = 10")
        raw.commit()
    with Memory.open(path, embedder="hash") as memory:
        assert memory.check()["lexical_index"] == memory.check(deep=True)["lexical_index"] != []
        memory.repair(deep=True)
        assert not any(memory.check(deep=True).values())
        assert memory.parts.store.search(("a",), "kite 3", 1)
        memory.namespace("a").forget(everything=True)
        assert not any(memory.check(deep=True).values())


def test_a_stray_in_the_index_is_found_and_mended(tmp_path):
    with Memory.open(tmp_path / "memory.db", embedder="hash", vectors="chroma") as memory:
        segment = memory.namespace("a").add("kite")
        memory.namespace("a").add("boat")
        memory.parts.index.sync(("a",))
        memory.parts.store.delete({("a",): [segment.id]})  # without the facade's sync of the index
        assert memory.check()["index"] == [segment.id]
        assert memory.repair()["index"] == 1
        assert not any(memory.check().values())


def test_a_stray_of_an_emptied_namespace_is_found_and_mended(tmp_path):
    with Memory.open(tmp_path / "memory.db", embedder="hash", vectors="chroma") as memory:
        segment = memory.namespace("a").add("kite")
        memory.parts.index.sync(("a",))
        deleted = memory.parts.store.delete({("a",): [segment.id]})
        memory.parts.store.scrub(deleted, index_purged=True)  # which was not
    with Memory.open(tmp_path / "memory.db", embedder="hash", vectors="chroma") as memory:
        assert memory.check()["index"] == [segment.id]
        memory.repair()
        assert not any(memory.check().values())


def test_an_interrupted_ingest_is_finished(tmp_path):
    lines = [json.dumps({"role": "user", "content": f"kite {i}"}) for i in range(BATCH + 44)]
    file = tmp_path / "c.jsonl"
    file.write_text("\n".join(lines))

    def stop(stored, known, total):
        assert total == BATCH + 44
        if stored or known:
            raise KeyboardInterrupt

    class Failing:
        fingerprint, dimension = "hash-64-v1", 64

        def embed_documents(self, texts):
            raise KeyboardInterrupt

    with Memory.open(tmp_path / "memory.db", embedder=Failing()) as memory, pytest.raises(KeyboardInterrupt):
        memory.namespace("a").ingest(file)
    with Memory.open(tmp_path / "memory.db", embedder="hash") as memory:
        assert len(memory.check()["pending_vectors"]) == BATCH
        with pytest.raises(KeyboardInterrupt):
            memory.namespace("a").ingest(file, progress=stop)
        memory.repair()
        assert not any(memory.check().values())
        assert memory.namespace("a").ingest(file) == (44, BATCH)
        assert memory.namespace("a").stats()["segments"] == BATCH + 44
