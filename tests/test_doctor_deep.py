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
from memory_os.stores import checkup
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
    "foreign_rows, summaries": [
        "INSERT INTO summaries(segment_pk, method, namespace_id, text) VALUES (3, 'm', 2, 'x')"
    ],
    "foreign_rows, bank": [
        "INSERT INTO bank(segment_pk, fingerprint, namespace_id, seq, file, n_tokens, n_bytes, sha256, used, chunks) "
        "VALUES (3, 'f', 2, 3, 'x', 1, 1, 'x', 1, x'')"
    ],
    "orphan_item_texts": ["PRAGMA foreign_keys = OFF", "UPDATE item_texts SET namespace_id = 9 WHERE pk = 1"],
    "wrong_vectors, a little": [vector("(SELECT vector FROM vectors WHERE segment_pk = 4)")],
    "wrong_vectors, far behind": [vector(OTHER).replace("segment_pk = 3", "segment_pk = 7").replace("= 7)", "= 3)")],
    "wrong_vectors, of the second namespace": [
        "UPDATE vectors SET vector = (SELECT vector FROM vectors WHERE segment_pk = 3) "
        "WHERE segment_pk = (SELECT max(pk) FROM segments WHERE namespace_id = 2)"
    ],
    "wrong_item_vectors": ["UPDATE item_texts SET vector = zeroblob(length(vector)) WHERE pk = 2"],
    "wrong_item_vectors, too short": ["UPDATE item_texts SET vector = x'0000803f' WHERE pk = 1"],
    "wrong_item_vectors, odd": ["UPDATE item_texts SET vector = x'0000803f00' WHERE pk = 1"],
    "trace_columns": ["UPDATE traces SET query_id = 'x', reply_id = 'y'"],
    "foreign_keys": ["INSERT INTO summaries(segment_pk, method, namespace_id, text) VALUES (999, 'm', 1, 'x')"],
}
BY_HAND = {
    "wrong_seq": ["UPDATE segments SET seq = -1 WHERE pk = 5"],
    "traces": ["UPDATE traces SET body = '{}' WHERE namespace_id = 1"],
    "traces, under another id": ["UPDATE traces SET id = 'other' WHERE namespace_id = 1"],
    "traces, of another namespace": ["UPDATE traces SET body = json_set(body, '$.namespace', json('[\"b\"]'))"],
}
NOTED = {
    "lost_sources": ["""UPDATE segments SET metadata = '{"of": ["gone"]}' WHERE kind = 'summary'"""],
    "lost_sources, which are in another namespace": [
        """UPDATE segments
        SET metadata = json_object('of', json_array((SELECT id FROM segments WHERE namespace_id = 2)))
        WHERE kind = 'summary' AND namespace_id = 1"""
    ],
}
RECORDS = {
    "segments 3: metadata is no JSON": "UPDATE segments SET metadata = '{oops' WHERE pk = 3",
    "segments 3: created_at is no time": "UPDATE segments SET created_at = 'soon' WHERE pk = 3",
    "segments 3: unknown role": "UPDATE segments SET role = 'wizard' WHERE pk = 3",
    "segments 3: unknown kind": "UPDATE segments SET kind = 'song' WHERE pk = 3",
    "namespaces 2: labels are no JSON list": """UPDATE namespaces SET labels = '["b' WHERE id = 2""",
    "items 1: value is no JSON": "UPDATE items SET value = '{oops' WHERE pk = 1",
    "items 1: updated_at is no time": "UPDATE items SET updated_at = 'soon' WHERE pk = 1",
    "items 1: its namespace is not there": "DELETE FROM namespaces WHERE id = 1",
}


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


@pytest.mark.parametrize("told", RECORDS)
def test_records_that_cannot_be_read_are_named_with_their_row(path, told):
    break_(path, RECORDS[told])
    with Memory.open(path, embedder="hash") as memory:
        for deep in (False, True):
            assert told in memory.check(deep=deep)["records"]
        assert memory.repair(deep=True)["records"]
        assert told in memory.check()["records"]
    assert "records" in FIXES
    assert "records" not in NO_FAULT


def test_a_segment_that_was_moved_to_another_namespace_is_whole_after_one_repair(path):
    break_(path, "UPDATE segments SET namespace_id = 2, seq = 99 WHERE pk = 3")
    with Memory.open(path, embedder="hash") as memory:
        assert faults(memory) >= {"orphan_vectors", "counters"}
        memory.repair(deep=True)
        assert faults(memory) == {"wrong_seq", "lost_sources"}  # its place in the order, which is no derived data


TOKENS = {
    "garbage": "UPDATE vectors SET tokens = x'010203' WHERE segment_pk = 3",
    "none": "UPDATE vectors SET tokens = NULL WHERE segment_pk = 3",
    "of another text": "UPDATE vectors SET tokens = (SELECT tokens FROM vectors WHERE segment_pk = 2) "
    "WHERE segment_pk = 3",
}


def test_token_vectors_are_named_and_mended(tmp_path):
    path = tmp_path / "memory.db"
    with Memory.open(path) as memory:
        scope = memory.namespace("a")
        for text in ("Miso is a cat.", "Omar steers the ferry.", "Ines keeps a lighthouse."):
            scope.add(text)
        before = [hit.score for hit in scope.search("Who keeps the lighthouse?")]
    for statement in TOKENS.values():
        break_(path, statement)
        with Memory.open(path) as memory:
            assert faults(memory) == {"wrong_vectors"}
            memory.repair(deep=True)
            assert faults(memory) == set()
            assert [hit.score for hit in memory.namespace("a").search("Who keeps the lighthouse?")] == before


def test_what_another_process_forgot_is_no_fault_of_the_index(path):
    with Memory.open(path, embedder="hash") as one, Memory.open(path, embedder="hash") as other:
        one.namespace("a").search("kite")
        other.namespace("a").forget(3)
        assert faults(one) == set()


def test_files_are_scrubbed_where_that_is_due(path):
    with Memory.open(path, embedder="hash") as memory:
        break_(path, "PRAGMA user_version = 5")
        assert faults(memory) == {"unfinished"}
        memory.repair()
        assert faults(memory) == set()


def test_permissions_are_read_of_every_file_whatever_its_name(path):
    strange = path.rename(path.with_name("mem[1].db"))
    with Memory.open(strange, embedder="hash") as memory:
        strange.with_name("mem[1].db-wal").chmod(0o666)
        assert memory.check(deep=True)["permissions"] == ["mem[1].db-wal"]


def test_a_journal_of_another_mode_is_named(path, monkeypatch):
    import memory_os.stores.database as database

    def rollback_journal(connection, _):
        connection.isolation_level = None
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA journal_mode = DELETE")

    monkeypatch.setattr(database, "_on_connect", rollback_journal)
    with Memory.open(path, embedder="hash") as memory:
        assert memory.check(deep=True)["settings"] == ["journal_mode is delete, not wal"]


def test_two_repairs_at_once(tmp_path):
    path = tmp_path / "memory.db"
    with Memory.open(path, embedder="hash") as memory:
        memory.namespace("a").add_many([NewSegment(f"kite {n}", "s") for n in range(300)])
    break_(path, "DELETE FROM lexical WHERE rowid < 200", "DELETE FROM vectors WHERE segment_pk < 200")
    with Memory.open(path, embedder="hash") as one, Memory.open(path, embedder="hash") as other:
        store = one.parts.store
        found = store.check(one.parts.embedder.fingerprint)  # and before the lock is taken, another mends all of it
        other.repair()
        checkup.mend(store.database, found, one.parts.embedder.fingerprint)
        assert faults(one) == set()


@pytest.mark.parametrize("pragma", ["quick_check", "integrity_check"])
def test_what_sqlite_finds_damaged_is_named(path, pragma):
    """An index that lacks a row: a copy of the table under the index's own root page would do the same."""
    break_(
        path,
        "PRAGMA writable_schema = ON",
        "CREATE TABLE spare (a)",
        "CREATE INDEX ix_spare ON spare (a)",
        "INSERT INTO spare VALUES (1)",
        "UPDATE sqlite_master SET sql = 'CREATE INDEX ix_spare ON spare (a) WHERE a > 5' WHERE name = 'ix_spare'"
        if pragma == "integrity_check"
        else "UPDATE sqlite_master SET sql = 'CREATE TABLE spare (a NOT NULL CHECK (a > 5))' WHERE name = 'spare'",
    )
    with Memory.open(path, embedder="hash") as memory:
        kind = "damage" if pragma == "quick_check" else "integrity"
        assert memory.check(deep=True)[kind]
