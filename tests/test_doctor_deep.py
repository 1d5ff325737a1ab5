"""``memos doctor --deep``: each fault is planted in the file, named, and mended where it is derived."""

import json
import os
import sqlite3
import subprocess
import sys

import pytest

from memory_os import Memory
from memory_os.adapters.scripted import ScriptedLLM
from memory_os.doctor import FIXES, NO_FAULT
from memory_os.types import NewSegment


@pytest.fixture
def path(tmp_path):
    with Memory.open(tmp_path / "memory.db", llm=ScriptedLLM(lambda messages: "Noted."), embedder="hash") as memory:
        for labels in ("a", "b"):
            scope = memory.namespace(labels)
            for i in range(6):
                scope.add(f"kite number {i}")
            scope.chat("Where is the kite?")
            scope.forget(2)  # a gap, which is no fault
            told = [segment.id for segment in scope.history()[:2]]
            scope.add_many([NewSegment("kites", "s", kind="summary", metadata={"of": told})])
            scope.items.put(("p",), "k", {"n": 1}, texts=[("n", "a boat")])
        memory.parts.store.list_for_summary(("a",), [memory.namespace("a").segment(3).id])
    return tmp_path / "memory.db"


def break_(path, *statements):
    raw = sqlite3.connect(path)
    with raw:
        for statement in statements:
            raw.execute(statement)
    raw.close()


def vector(value: str) -> str:
    """The vector of row 3 as another one of the same length, or of any."""
    return f"UPDATE vectors SET vector = {value} WHERE segment_pk = 3"


OTHER = "(SELECT vector FROM vectors WHERE segment_pk = 7)"
MENDED = {
    "wrong_vectors": [vector(OTHER)],
    "wrong_vectors, too short": [vector("x'0000803f'")],
    "wrong_vectors, no number": [vector("(SELECT zeroblob(length(vector)) FROM vectors WHERE segment_pk = 7)")],
    "wrong_lexical": ["UPDATE lexical SET terms = '1_boat' WHERE rowid = 3"],
    "wrong_lexical, of another namespace": ["UPDATE lexical SET terms = replace(terms, '1_', '2_') WHERE rowid = 3"],
    "counters": ["UPDATE namespaces SET n_terms = n_terms + 1 WHERE id = 1"],
    "counters, of segments": ["UPDATE namespaces SET n_segments = 99 WHERE id = 2"],
    "wrong_seq, above the last": ["UPDATE namespaces SET last_seq = 3 WHERE id = 1"],
    "foreign_rows": ["UPDATE pending SET namespace_id = 2 WHERE namespace_id = 1"],
    "foreign_rows, activations": ["INSERT INTO activations(segment_pk, namespace_id, seq) VALUES (3, 2, 1)"],
    "foreign_keys": ["INSERT INTO summaries(segment_pk, method, namespace_id, text) VALUES (999, 'm', 1, 'x')"],
}
BY_HAND = {
    "wrong_seq": ["UPDATE segments SET seq = -1 WHERE pk = 5"],
    "traces": ["UPDATE traces SET body = '{}' WHERE namespace_id = 1"],
    "traces, of another namespace": ["UPDATE traces SET body = json_set(body, '$.namespace', json('[\"b\"]'))"],
}
NOTED = {"lost_sources": ["""UPDATE segments SET metadata = '{"of": ["gone"]}' WHERE kind = 'summary'"""]}


def faults(memory: Memory) -> set[str]:
    return {kind for kind, rows in memory.check(deep=True).items() if rows}


def test_a_store_in_use_has_no_fault_and_a_deep_check_changes_nothing(path):
    with Memory.open(path, embedder="hash") as memory:
        before = dump(path)
        told: list[tuple[str, int, int]] = []
        found = memory.check(deep=True, progress=lambda *args: told.append(args))
        assert {kind: rows for kind, rows in found.items() if rows} == {}
        assert {"wrong_vectors", "wrong_lexical", "integrity", "settings", "bank"} <= found.keys()
        assert {what for what, *_ in told} >= {"lexical entries", "vectors of namespaces"}
        assert dump(path) == before


def dump(path) -> list[str]:
    raw = sqlite3.connect(path)
    lines = list(raw.iterdump())
    raw.close()
    return lines


@pytest.mark.parametrize("name", MENDED)
def test_what_is_derived_is_named_and_mended(path, name):
    kind = name.split(",")[0]
    with Memory.open(path, embedder="hash") as memory:
        before = [(hit.segment.id, hit.score) for hit in memory.namespace("a").search("kite 3", k=9)]
    break_(path, *MENDED[name])
    with Memory.open(path, embedder="hash") as memory:
        assert kind in faults(memory)
        assert kind not in NO_FAULT
        memory.repair(deep=True)
        assert faults(memory) == set()
        assert [(hit.segment.id, hit.score) for hit in memory.namespace("a").search("kite 3", k=9)] == before


@pytest.mark.parametrize("name", [*BY_HAND, *NOTED])
def test_what_cannot_be_made_again_is_named_with_what_to_do(path, name):
    kind = name.split(",")[0]
    break_(path, *(BY_HAND | NOTED)[name])
    with Memory.open(path, embedder="hash") as memory:
        assert faults(memory) == {kind}
        memory.repair(deep=True)
        assert faults(memory) == {kind}
        assert kind in FIXES
        assert (kind in NO_FAULT) == (name in NOTED)


def test_files_that_anybody_may_write_and_copies_are_named(path):
    path.chmod(0o666)
    (path.parent / "memory.db.before-0008").touch(0o600)
    with Memory.open(path, embedder="hash") as memory:
        found = memory.check(deep=True)
        assert "memory.db" in found["permissions"]
        assert found["copies"] == ["memory.db.before-0008"]


def test_a_journal_that_is_no_write_ahead_log_is_named(path, monkeypatch):
    with Memory.open(path, embedder="hash") as memory:
        connection = memory.parts.store.database.engine.raw_connection()
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.close()  # back into the pool, and the next to use it finds it so
        assert memory.check(deep=True)["settings"] == ["synchronous is 1, not 2 (FULL)"]


def memos(path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", "from memory_os.cli.main import run; run()", "doctor", *words],
        env={**os.environ, "MEMOS_STORE": str(path), "MEMOS_EMBEDDER": "hash"}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_names_faults_with_a_fix_and_ends_with_1(path):
    assert memos(path, "--deep").returncode == 0
    break_(path, *MENDED["wrong_lexical"], *BY_HAND["traces"])
    assert memos(path).returncode == 0  # not seen without --deep
    done = memos(path, "--deep")
    assert done.returncode == 1
    assert "wrong lexical (3): memos doctor --repair --deep" in done.stderr
    assert "traces (" in done.stderr
    assert FIXES["traces"] in done.stderr
    mended = memos(path, "--deep", "--repair", "--json")
    assert mended.returncode == 1  # the trace is still none
    told = json.loads(mended.stdout)
    assert (told["found"]["wrong_lexical"], told["remaining"]["wrong_lexical"]) == (1, 0)
    assert list(told["rows"]) == ["traces"]
