"""Forgetting where it is hard: an index that nobody opened, kills in between, names that mislead, what comes back."""

import io
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_os import Memory
from memory_os.adapters.scripted import HashEmbedder, ScriptedLLM
from memory_os.errors import InvalidInputError
from memory_os.stores import residue, scrub
from memory_os.stores.matching import Matcher
from memory_os.trace import FORGOTTEN
from memory_os.types import NewSegment

SECRET = "The Zanzibarian password is früh-Ω-4711, and nobody else knows it."


def opened(path, llm=None, embedder="hash", **options) -> Memory:
    return Memory.open(path, llm=llm or ScriptedLLM(lambda messages: "Noted."), embedder=embedder, **options)


@pytest.fixture
def memory(place):
    with opened(place) as memory:
        yield memory


@pytest.fixture
def in_a_file(tmp_path):
    with opened(tmp_path / "m.db") as memory:
        yield memory


def held(memory, text) -> bool:
    """Whether it stands in a file of the store, or of a server in a row."""
    return bool(memory.scan_for(text) or memory.parts.store.still_held([text]))


def exported(scope) -> list[str]:
    file = io.StringIO()
    scope.export(file)
    return file.getvalue().splitlines()


def due(path) -> bool:
    """Whether the database says that its files are still to be scrubbed."""
    with closing(sqlite3.connect(path)) as raw:
        return raw.execute("PRAGMA user_version").fetchone() != (0,)


# -- Chroma's copy -----------------------------------------------------------------------------------------------------


def indexed(path, embedder="hash") -> tuple[str, bytes]:
    """A store with a Chroma index; the secret's id and vector."""
    with opened(path, vectors="chroma", embedder=embedder) as memory:
        scope = memory.namespace("a")
        scope.add_many([NewSegment(f"The boat number {n} is blue.", "s") for n in range(20)])
        secret = scope.add(SECRET)
        scope.search("boat")
        ids, _, rows, _ = memory.parts.store.read_vectors(("a",), memory.parts.embedder.fingerprint)
        return secret.id, rows[ids.index(secret.id)].tobytes()


def holders(folder, *wanted: bytes) -> list[str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return sorted(file.name for file in files if any(each in file.read_bytes() for each in wanted))


def test_an_index_that_this_process_has_not_opened_goes(tmp_path):
    path = tmp_path / "m.db"
    id_, vector = indexed(path)
    assert "chroma.sqlite3" in holders(tmp_path, vector)
    with opened(path) as memory:
        assert memory.namespace("a").forget(id_)["unfinished"] == 0
        assert holders(tmp_path, vector, id_.encode()) == []
    with opened(path, vectors="chroma") as memory:
        assert memory.namespace("a").search("boat", k=1)


OWNER = """
import sys
from memory_os import Memory
with Memory.open(sys.argv[1], embedder="hash", vectors="chroma"):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_an_index_that_another_process_owns_is_named_and_goes_later(tmp_path):
    path = tmp_path / "m.db"
    id_, vector = indexed(path)
    told = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-P", "-c", OWNER, str(path)], **told) as owner:
        assert owner.stdout.readline() == "open\n"
        with opened(path) as memory:
            assert memory.namespace("a").forget(id_)["unfinished"] == 1
        assert due(path)
        owner.stdin.close()
        assert owner.wait(timeout=60) == 0
    with opened(path):
        assert not due(path)
    assert holders(tmp_path, vector, id_.encode()) == []


def test_killed_before_the_index_is_purged_it_is_done_at_the_next_open(tmp_path):
    path = tmp_path / "m.db"
    id_, vector = indexed(path)
    if not (pid := os.fork()):
        memory = opened(path, vectors="chroma")
        memory.parts.index.purge = lambda namespaces: os._exit(9)
        memory.namespace("a").forget(id_)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    with opened(path, vectors="chroma") as memory:
        assert holders(tmp_path, vector, id_.encode()) == []
        assert memory.namespace("a").search("boat", k=1)


def test_an_index_that_cannot_be_purged_costs_no_receipt(tmp_path, monkeypatch, caplog):
    path = tmp_path / "m.db"
    id_, vector = indexed(path)
    from memory_os.stores.chroma import ChromaIndex

    def broken(self):
        raise sqlite3.OperationalError("database is locked")

    with opened(path, vectors="chroma") as memory:
        monkeypatch.setattr(ChromaIndex, "_clean", broken)
        assert memory.namespace("a").forget(id_)["unfinished"] == 1
        assert "database is locked" in caplog.text
        monkeypatch.undo()
        assert memory.namespace("a").search("boat", k=1)
    assert holders(tmp_path, vector, id_.encode()) == []  # done at close
    assert not due(path)


def test_what_another_embedder_indexed_goes_too(tmp_path):
    path = tmp_path / "m.db"
    other = HashEmbedder()
    other.fingerprint = "another"
    id_, vector = indexed(path, other)
    with opened(path, vectors="chroma") as memory:
        assert memory.namespace("a").forget(id_)["unfinished"] == 0
        assert holders(tmp_path, vector, id_.encode()) == []


def test_what_an_earlier_deletion_left_is_looked_for_by_the_next(tmp_path, monkeypatch):
    """Else the second would strike off the first one's mark, having looked for its own text only."""
    path = tmp_path / "m.db"
    with opened(path, vectors="chroma") as memory:
        scope, other = memory.namespace("a"), memory.namespace("b")
        first, second = scope.add(SECRET), other.add("The boat is blue, and nobody cares.")
        scope.search("boat")
        asked, purged = [], []
        monkeypatch.setattr(scrub, "still_there", lambda *told: asked.append(told))
        real = memory.parts.index.purge
        monkeypatch.setattr(memory.parts.index, "purge", lambda which: purged.append(which) or real(which))
        with monkeypatch.context() as patch:
            patch.setattr(scrub, "_log_emptied", lambda connection: False)  # as where another process reads
            assert scope.forget(first.id)["unfinished"] == 1
        assert other.forget(second.id)["unfinished"] == 0
        assert asked == []  # written anew instead: of the first nothing is known any more
        assert purged[1] is None
        assert not due(path)


def test_a_deletion_strikes_off_no_mark_but_its_own(in_a_file, tmp_path, monkeypatch):
    scope = in_a_file.namespace("a")
    first, second = scope.add(SECRET), scope.add("The boat is blue, and nobody cares.")
    store = in_a_file.parts.store
    one = store.delete({("a",): [first.id]})
    two = store.delete({("a",): [second.id]})
    assert (one.alone, two.alone, two.gone) == (True, False, None)
    assert store.scrub(one, index_purged=True)
    assert due(tmp_path / "m.db")
    assert store.scrub(two, index_purged=True)
    assert not due(tmp_path / "m.db")


# -- receipts ----------------------------------------------------------------------------------------------------------


def test_a_receipt_says_what_was_deleted_and_nothing_else(memory):
    scope, store = memory.namespace("a"), memory.parts.store
    scope.add("x")
    store.put_scores(("a",), {"k": "The Zanzibarian answer"}, epoch=store.state(("a",), "f").epoch)
    assert not any(scope.forget(before="2000-01-01").values())
    assert store.read_scores(("a",), ["k"])
    assert scope.forget(everything=True)["scores"] == 1


def test_everything_is_also_what_belongs_to_no_segment(memory):
    scope, store = memory.namespace("a"), memory.parts.store
    scope.session("q").chat("The Zanzibarian PIN?")
    trace = scope.why()[0]
    alone = [line for line in exported(scope) if "segment" not in json.loads(line)]
    other = memory.namespace("b")
    other.import_(alone)
    store.put_scores(("b",), {"k": "The Zanzibarian answer"}, epoch=store.state(("b",), "f").epoch)
    store.save_trace(replace(trace, id="t2", namespace=("b",), query_id=None, reply_id=None))
    lines = exported(other)
    counts = other.forget(everything=True)
    assert (counts["segments"], counts["traces"], counts["scores"], counts["unfinished"]) == (0, 2, 1, 0)
    scope.forget(everything=True)
    assert not held(memory, "Zanzibarian")
    other.import_(lines)
    assert list(store.traces(("b",))) == []
    other.import_(lines, restore=True)
    assert len(list(store.traces(("b",)))) == 2


def test_expire_scrubs_and_verifies_once_for_all_namespaces(in_a_file, tmp_path, monkeypatch):
    for name in "abc":
        in_a_file.namespace(name).add(f"An old Zanzibarian text of {name}", created_at="2020-01-01")
    (tmp_path / "m.db.before-0001").write_bytes(b"".join(f"An old Zanzibarian text of {n}".encode() for n in "abc"))
    assert in_a_file.expire(90, preview=True)["segments"] == 3
    counts = in_a_file.expire(90, verify=True)
    assert (counts["segments"], counts["residue"], counts["unfinished"]) == (3, 1, 0)


# -- it does not come back ---------------------------------------------------------------------------------------------


def test_items_stay_gone_after_an_import_until_they_are_put_or_restored(memory):
    scope = memory.namespace("a")
    scope.items.put(("f",), "k", {"secret": "PIN 4711"}, texts=[("t", "PIN 4711")])
    scope.items.put(("f", "g"), "l", {"v": 1})
    lines = exported(scope)
    counts = scope.forget(everything=True)
    assert (counts["items"], counts["tombstones"]) == (2, 2)
    assert not held(memory, "PIN 4711")
    assert (scope.import_(lines), scope.import_(lines).forgotten, scope.items.count()) == ((0, 0), 2, 0)
    assert memory.namespace("b").import_(lines).forgotten == 0
    scope.items.delete(("f",), "k")
    assert scope.import_(lines).forgotten == 2
    scope.items.put(("f",), "k", {"secret": "another"})
    assert scope.import_(lines).forgotten == 1
    assert scope.items.get(("f",), "k").value == {"secret": "another"}
    assert scope.import_(lines, restore=True).forgotten == 0
    assert scope.items.count() == 2


@pytest.mark.parametrize("field", ["of", "background"])
def test_a_summary_of_what_was_forgotten_is_not_stored(memory, field):
    scope = memory.namespace("a")
    secret = scope.add(SECRET)
    told = {"of": [], "background": [], field: [secret.id]}
    other = memory.namespace("b")
    other.import_(exported(scope))
    memory.parts.store.append(("b",), [NewSegment("In short", "s", kind="summary", metadata=told, key="summary.1")])
    lines = exported(other)
    scope.forget(secret.id)
    done = scope.import_(lines)
    assert (done, done.forgotten, scope.history()) == ((0, 0), 2, [])
    assert scope.import_(lines, restore=True) == (2, 0)


def test_a_source_forgotten_while_its_summary_is_made_leaves_none(place, tmp_path):
    file = tmp_path / "doc.txt"
    file.write_text(SECRET)

    def forgets(messages):
        scope = memory.namespace("a")
        scope.forget(*[segment.id for segment in scope.history()])
        return "In short: früh-Ω-4711"

    with opened(place, llm=ScriptedLLM(forgets)) as memory:
        with pytest.raises(InvalidInputError, match="forgotten meanwhile"):
            memory.namespace("a").summarize(file)
        assert memory.namespace("a").history() == []
        assert not held(memory, "In short")


# -- names that mislead ------------------------------------------------------------------------------------------------


def test_an_id_that_is_a_number_is_an_id_first(memory):
    scope = memory.namespace("a")
    victim, target = scope.add_many([NewSegment("victim", "s"), NewSegment("target", "s", id="1")])
    assert scope.segment("1") == target
    assert scope.segment(1) == scope.segment("#1") == victim
    assert scope.forget(target.id)["segments"] == 1
    assert scope.history() == [victim]
    assert scope.segment("1") == victim  # by its number, now that no id says so


def test_a_trace_is_found_by_its_own_id_first(memory):
    scope = memory.namespace("a")
    scope.session("q").chat("one")
    scope.session("q").chat("two")
    first, second = memory.parts.store.traces(("a",))
    memory.parts.store.save_trace(replace(second, id="1"))
    assert {trace.id for trace in memory.parts.store.traces(("a",))} == {first.id, second.id, "1"}
    assert scope.why("1")[0].id == "1"
    assert scope.why(1)[0].id == first.id


# -- answers that were told --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["ledger", "flash"])
def test_an_answer_without_evidence_rests_on_what_stood_before_the_llm(memory, where):
    scope = memory.namespace("a")
    secret, other = scope.session("q").add(SECRET), scope.session("q").add("The boat is blue.")
    scope.session("q" if where == "flash" else "later").chat("What is the Zanzibarian password?")
    scope.confirm(answer="It is früh-Ω-4711")
    trace = scope.why()[0]
    assert trace.cited == ()
    assert secret.id in (trace.flash if where == "flash" else [e.segment_id for e in trace.ledger])
    memory.parts.store.save_trace(replace(trace, cited=(other.id,)))  # then it rests on what is cited
    assert scope.forget(scope.add("Something else.").id)["traces_blanked"] == 0
    memory.parts.store.save_trace(trace)
    scope.forget(secret.id)
    assert scope.why()[0].confirmation.answer == FORGOTTEN
    assert not held(memory, "früh-Ω-4711")
    memory.parts.store.save_trace(trace)
    assert scope.why()[0].confirmation.answer == FORGOTTEN


@pytest.mark.parametrize("by", ["evidence", "cited"])
def test_an_answer_stays_blank_when_its_trace_comes_back(memory, by):
    """Also where it rests on what was no candidate of its turn."""
    scope = memory.namespace("a")
    secret = scope.add(SECRET)
    scope.session("q").chat("Tell me about boats")
    scope.confirm(answer="It is früh-Ω-4711", evidence=[secret.id] if by == "evidence" else None)
    trace = scope.why()[0]
    trace = replace(trace, ledger=(), flash=(), cited=(secret.id,) if by == "cited" else ())
    memory.parts.store.save_trace(trace)
    lines = exported(scope)
    scope.forget(secret.id)
    scope.import_(lines)
    assert scope.why()[0].confirmation.answer == FORGOTTEN
    assert not held(memory, "früh-Ω-4711")


# -- what verify looks for ---------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(st.data())
def test_patterns_are_found_exactly(data):
    """Of few letters, so that words repeat and overlap, at every alignment."""
    letters = st.lists(st.sampled_from([b"a", b"b", "ü".encode()]), max_size=40).map(b"".join)
    block = data.draw(letters) + data.draw(letters)
    cuts = st.tuples(st.integers(0, len(block)), st.integers(0, len(block)))
    parts = data.draw(st.lists(cuts.map(lambda ends: block[min(ends) : max(ends)]), max_size=8))
    patterns = {each for each in [*parts, *data.draw(st.lists(letters, max_size=8))] if each}
    there = {each for each in patterns if each in block}
    assert Matcher(patterns).found(block) == Matcher(patterns, few=0).found(block) == there


def test_a_text_across_two_blocks_is_found(in_a_file, tmp_path):
    size = 1 << 24
    copy = tmp_path / "m.db.before-0001"
    for before in (size - 1, size - 20, size - len(SECRET.encode()) + 1):
        copy.write_bytes(b"x" * before + SECRET.encode() + b"x")
        assert in_a_file.scan_for(SECRET) == {str(copy): [SECRET]}


def test_verify_says_where_the_text_is_still_stored(in_a_file):
    scope = in_a_file.namespace("a")
    first = scope.add(SECRET)
    in_a_file.namespace("b").add("meta", metadata={"said": SECRET})
    counts = scope.forget(first.id, verify=True)
    assert (counts["residue"], counts["still_held"]) == (0, 1)
    in_a_file.namespace("b").forget(everything=True)
    in_a_file.namespace("b").items.put(("f",), "k", {"said": SECRET})
    counts = scope.forget(scope.add(SECRET).id, verify=True)
    assert (counts["residue"], counts["still_held"]) == (0, 1)
    in_a_file.namespace("b").forget(everything=True)
    counts = scope.forget(scope.add(SECRET).id, verify=True)
    assert (counts["residue"], counts["still_held"]) == (0, 0)


# -- the bank ----------------------------------------------------------------------------------------------------------


def kept(memory, *ids):
    import torch

    from memory_os.protocols import KV

    kv = KV((1, 2, 3), torch.ones(2, 2, 3, 8), torch.ones(2, 2, 3, 8))
    return memory.parts.bank.put(("a",), "f", dict.fromkeys(ids, kv), 1)


def test_forgotten_before_it_is_written_nothing_of_it_is(tmp_path):
    from memory_os.stores.bank import SegmentBank

    path = tmp_path / "m.db"
    with opened(path) as memory:
        secret = memory.namespace("a").add(SECRET)
    if not (pid := os.fork()):
        memory = opened(path)
        write = SegmentBank._write_aside

        def late(self, *told):
            with opened(path) as other:
                other.namespace("a").forget(secret.id)
            write(self, *told)
            os._exit(9)

        SegmentBank._write_aside = late
        kept(memory, secret.id)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert [file.stat().st_size for file in tmp_path.rglob("*.tmp")] in ([], [0])


def test_what_the_bank_has_in_memory_of_it_is_let_go(in_a_file):
    scope, bank = in_a_file.namespace("a"), in_a_file.parts.bank
    secret, other = scope.add(SECRET), scope.add("The boat is blue.")
    assert kept(in_a_file, secret.id, other.id) == []
    assert len(bank.get(("a",), "f", [secret.id, other.id])) == 2
    scope.forget(secret.id)
    assert [key[2] for key in bank._resident] == [key[2] for key in bank._verified] == [other.id]
    assert bank._tables == {}


# -- to the last byte --------------------------------------------------------------------------------------------------


def test_what_is_too_much_to_look_for_is_written_anew_and_the_log_is_empty(in_a_file, tmp_path):
    scope = in_a_file.namespace("a")
    scope.add_many([NewSegment(f"The boat number {n} is blue.", "s") for n in range(600)])
    in_a_file.namespace("b").add("The kite is red.")
    assert scope.forget(everything=True)["unfinished"] == 0
    assert (tmp_path / "m.db-wal").stat().st_size < 10_000  # the mark that is struck off, and not the file's copy
    with closing(sqlite3.connect(tmp_path / "m.db")) as raw:
        assert raw.execute("PRAGMA freelist_count").fetchone() == (0,)
    scope.items.put(("f",), "k", {"v": 1})
    assert in_a_file.parts.store.delete({("a",): []}, everything=True).gone is None


def test_a_short_text_is_looked_for_with_what_stands_behind_it():
    assert residue.pieces("PIN 4711", "2024-03-05T12:00") == {b"PIN 47112024-03-"}


def test_the_told_words_of_other_turns_are_looked_for_too(memory):
    scope = memory.namespace("a")
    secret = scope.add(SECRET)
    scope.session("q").chat("Tell me about boats")
    scope.confirm(answer="It is the one that is blue", evidence=[secret.id])
    deleted = memory.parts.store.delete({("a",): [secret.id]})
    assert deleted.counts["traces_blanked"] == 1
    assert b"It is the one th" in deleted.gone


def test_folders_of_collections_that_are_gone_go(tmp_path):
    path = tmp_path / "m.db"
    id_, _ = indexed(path)
    with opened(path, vectors="chroma") as memory:
        memory.namespace("b").add("The kite is red.")
        for name in "ab":
            memory.namespace(name).search("boat")
        assert len([each for each in (tmp_path / "m.db.chroma").iterdir() if each.is_dir()]) == 2
        memory.namespace("a").forget(id_)
        assert len([each for each in (tmp_path / "m.db.chroma").iterdir() if each.is_dir()]) == 1


def test_a_tombstone_is_another_one_in_every_namespace(memory):
    for name in "ab":
        scope = memory.namespace(name)
        [segment] = scope.add_many([NewSegment("one", "s", id="same")])
        scope.forget(segment.id)
    with memory.parts.store.database.read() as connection:
        [one, two] = connection.exec_driver_sql("SELECT digest FROM tombstones").scalars()
    assert one != two
