"""Forgetting: what is chosen goes from every place and every byte, stays gone, and nothing else changes."""

import io
import json
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
import typer
import uuid_utils
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from memory_os import Memory
from memory_os.adapters.scripted import ScriptedLLM
from memory_os.cli.main import run
from memory_os.errors import ConfigError, InvalidInputError, StoreError, UnknownNameError
from memory_os.stores import fulltext, residue
from memory_os.trace import FORGOTTEN
from memory_os.types import Confirmation, LLMCall, NewSegment

SECRET = "The Zanzibarian password is früh-Ω-4711, and nobody else knows it."
WORD = "zanzibarian"  # stands in no other segment
DAY = timedelta(days=1)
NOON = datetime(2024, 3, 5, 12, tzinfo=UTC)


def opened(path, llm=None, **options) -> Memory:
    return Memory.open(path, llm=llm or ScriptedLLM(lambda messages: "Noted."), embedder="hash", **options)


@pytest.fixture
def memory(place):
    with opened(place) as memory:
        yield memory


@pytest.fixture
def in_a_file(tmp_path):
    with opened(tmp_path / "m.db") as memory:
        yield memory


def rows(memory: Memory) -> dict[str, list[dict]]:
    """All that the database holds, but for the terms' index, scores and numbers that a deletion has to change."""
    skipped = ("namespaces", "scores", "tombstones", "lexical", "lexical_data", "lexical_idx", "lexical_docsize")
    with memory.parts.store.database.read() as connection:
        names = sa.inspect(connection).get_table_names()
        return {
            name: sorted(map(dict, connection.exec_driver_sql(f"SELECT * FROM {name}").mappings()), key=repr)
            for name in names
            if name not in skipped and not re.search(r"_p\d+$", name)
        }


def held(memory: Memory, *texts: str) -> bool:
    """Whether any of these texts is in a file of the store; in a server, whose files are its own, in a row."""
    if memory.parts.store.database.place.startswith("postgresql"):
        assert memory.scan_for(*texts) == {}
        return bool(memory.parts.store.still_held(texts))
    return bool(memory.scan_for(*texts))


OF_SEGMENT = {
    "segments": ("pk",), "vectors": ("segment_pk",), "activations": ("segment_pk",), "lexical_content": ("id",),
    "postings": ("segment_pk",),
}  # fmt: skip

# -- what is chosen goes, and nothing else -----------------------------------------------------------------------------


@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])
@given(st.data())
def test_what_is_chosen_goes_and_its_siblings_stay_byte_for_byte(new_place, data):
    with opened(new_place(shared=True)) as memory:
        for labels in memory.namespaces():
            memory.namespace(*labels).forget(everything=True)
        told = data.draw(
            st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 9), st.booleans()), min_size=2, max_size=12)
        )
        for name in ("mine", "other"):
            for number, (session, day, asks) in enumerate(told):
                at = memory.namespace(name).session(session)
                if asks:
                    at.chat(f"What of {number} in {name}?")
                else:
                    at.add(f"{name} said {number}", created_at=NOON + day * DAY, metadata={"n": number})
        scope = memory.namespace("mine")
        stored = scope.history(99)
        one = data.draw(st.sampled_from(stored))
        bound = NOON + data.draw(st.integers(0, 9)) * DAY
        chosen, goes = data.draw(
            st.sampled_from(
                [
                    ({"refs": (one.id,)}, lambda s: s.id == one.id),
                    ({"session": one.session}, lambda s: s.session == one.session),
                    ({"before": bound}, lambda s: s.created_at < bound),
                    ({"after": bound}, lambda s: s.created_at >= bound),
                    (
                        {"session": one.session, "after": bound, "before": bound + 2 * DAY},
                        lambda s: s.session == one.session and bound <= s.created_at < bound + 2 * DAY,
                    ),
                    ({"everything": True}, lambda s: True),
                ]
            )
        )
        refs = chosen.pop("refs", ())
        gone = {s.id for s in stored if goes(s)}
        assert {s.id for s in scope.would_forget(*refs, **chosen)} == gone
        before = rows(memory)
        preview = scope.forget(*refs, **chosen, preview=True)
        assert rows(memory) == before
        counts = scope.forget(*refs, **chosen, verify=True)
        assert preview == {name: counts[name] for name in preview}
        assert counts["segments"] == counts["vectors"] == counts["lexical"] == len(gone)
        assert (counts["unfinished"], counts["residue"]) == (0, 0)
        assert scope.history(99) == [s for s in stored if s.id not in gone]
        after = rows(memory)
        pks = {row["pk"] for row in before["segments"] if row["id"] in gone}
        for table, was in before.items():  # the rest of every table, this and the other namespace's, is as it was

            def goes_too(row, table=table):
                if table == "traces":
                    return bool(gone & {row["query_id"], row["reply_id"]})
                return any(row.get(name) in pks for name in OF_SEGMENT.get(table, ()))

            assert after[table] == [row for row in was if not goes_too(row)], table
        assert not any(memory.check().values())


def test_time_ranges_are_half_open_read_as_utc_and_of_the_session_that_is_asked(memory):
    scope = memory.namespace("a")
    for session in ("one", "two"):
        for offset in (-1, 0, 1):
            scope.session(session).add(f"{session} {offset}", created_at=NOON + timedelta(microseconds=offset))

    def would(at=scope, **chosen):
        return [s.text for s in at.would_forget(**chosen)]

    assert would(before=NOON) == ["one -1", "two -1"]
    assert would(after="2024-03-05T12:00") == would(after="2024-03-05T13:00:00+01:00")
    assert would(after=NOON) == ["one 0", "one 1", "two 0", "two 1"]
    assert would(after=NOON, before=NOON + timedelta(microseconds=1)) == ["one 0", "two 0"]
    assert would(after=NOON, session="two") == would(scope.session("two"), after=NOON) == ["two 0", "two 1"]
    assert scope.forget(before="2000-01-01")["segments"] == 0
    assert scope.session("two").forget(after=NOON)["segments"] == 2
    assert [s.text for s in scope.history()] == ["one -1", "one 0", "one 1", "two -1"]


@pytest.mark.parametrize(
    ("refs", "chosen", "error"),
    [
        ((), {}, ConfigError),
        ((1,), {"session": "s"}, ConfigError),
        ((1,), {"before": NOON}, ConfigError),
        ((), {"everything": True, "before": NOON}, ConfigError),
        ((), {"query": "x", "k": 1, "session": "s"}, ConfigError),
        ((), {"query": "x"}, ConfigError),
        ((1,), {"k": 1}, ConfigError),
        ((), {"query": "x", "k": 0}, ConfigError),
        ((), {"after": NOON, "before": NOON}, ConfigError),
        ((), {"after": "yesterday"}, InvalidInputError),
        ((), {"session": "nope", "before": NOON}, UnknownNameError),
        ((1, 99), {}, UnknownNameError),
    ],
)
def test_a_wrong_choice_is_one_clear_error_and_changes_nothing(memory, refs, chosen, error):
    scope = memory.namespace("a").session("s")
    scope.add("hello")
    before = rows(memory)
    for verb in (scope.would_forget, scope.forget):
        with pytest.raises(error):
            verb(*refs, **chosen)
    assert rows(memory) == before


def test_a_query_chooses_what_search_finds_best(memory):
    scope = memory.namespace("a")
    for text in ("The kite is red.", "The boat is blue.", "The kite flew away."):
        scope.add(text)
    best = {hit.segment.id for hit in scope.search("kite", k=2)}
    assert {s.id for s in scope.would_forget(query="kite", k=2)} == best
    assert scope.forget(query="kite", k=2)["segments"] == 2
    assert [s.text for s in scope.history()] == ["The boat is blue."]


# -- every place -------------------------------------------------------------------------------------------------------


def test_traces_of_other_turns_lose_the_words_and_keep_the_numbers(memory):
    scope = memory.namespace("a")
    secret = scope.add(SECRET)
    other = scope.add("The boat is blue.")
    scope.session("later").chat("What is the Zanzibarian password?")
    trace, _ = scope.why()
    assert secret.id in {entry.segment_id for entry in trace.ledger}
    call = LLMCall("evidence", "1 accepted: früh-Ω-4711", "früh-Ω-4711", 90, 5)
    told = Confirmation("user", "früh-Ω-4711", NOON, (secret.id,))
    noted = "the LLM was asked for evidence and failed: früh-Ω-4711"
    memory.parts.store.save_trace(
        replace(trace, calls=(call,), confirmation=told, error="früh-Ω-4711", notes=("kept", noted))
    )
    counts = scope.forget(secret.id)
    assert (counts["traces"], counts["traces_blanked"]) == (0, 1)
    after, _ = scope.why()
    assert after == replace(
        trace,
        calls=(replace(call, answer="", verdict=FORGOTTEN),),
        confirmation=replace(told, answer=FORGOTTEN),
        error=FORGOTTEN,
        notes=("kept",),
    )
    assert not held(memory, "früh-Ω-4711")
    # saved again, as a turn that goes on would, it stays without them; of a forgotten turn nothing is stored
    memory.parts.store.save_trace(replace(trace, calls=(call,)))
    assert scope.why()[0].calls[0].answer == ""
    scope.forget(trace.query_id)
    memory.parts.store.save_trace(trace)
    with pytest.raises(UnknownNameError):
        scope.why(trace.id)
    assert other in scope.history()


def test_summaries_scores_and_activations_of_it_go(memory):
    scope = memory.namespace("a")
    secret, kept = scope.add(SECRET), scope.add("The boat is blue.")
    store = memory.parts.store
    scope.session("later").chat("Zanzibarian?")
    for segment in (secret, kept):
        store.put_summary(("a",), segment.id, "m", f"In short: {segment.text[:30]}")
    store.put_scores(("a",), {"key": "früh-Ω-4711"}, epoch=store.state(("a",), "f").epoch)
    made = store.append(("a",), [NewSegment("It is all about a Zanzibarian.", "s", kind="summary",
                                            metadata={"of": [secret.id]}, key="summary")])  # fmt: skip
    assert secret.seq in store.last_activations(("a",))
    counts = scope.forget(secret.id)
    assert (counts["segments"], counts["summaries"], counts["scores"]) == (2, 1, 1)
    assert store.get(("a",), [secret.id, made[0].id]) == {}
    assert set(store.read_summaries(("a",), [secret.id, kept.id], "m")) == {kept.id}
    assert secret.seq not in store.last_activations(("a",))
    assert not held(memory, "früh-Ω-4711", "In short: The Zanz")
    # a summary that is asked for again is made again; one that comes back from elsewhere does not
    again = NewSegment("about nothing", "s", kind="summary", metadata={"of": []}, key="summary")
    assert len(store.append(("a",), [again])) == 1


# -- every byte --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectors", ["exact", "chroma"])
def test_no_file_holds_it_when_forget_returns(tmp_path, vectors):
    """With the store still open: the log, free pages, and the index's own segments too; and what is kept is found."""
    path = tmp_path / "m.db"
    with opened(path, vectors=vectors) as memory:
        scope = memory.namespace("a")
        scope.add_many([NewSegment(f"The boat number {n} is blue.", "s") for n in range(300)])
        secret = scope.add(SECRET, metadata={"raw": SECRET}, speaker="Zanzi")
        scope.add_many([NewSegment(f"The kite number {n} is red.", "s") for n in range(300)])
        scope.search("boat")
        id_ = secret.id
        row = memory.parts.store.read_vectors(("a",), memory.parts.embedder.fingerprint)[2][300]
        assert {Path(file).name for file in memory.scan_for(SECRET)} <= {"m.db", "m.db-wal"}
        assert memory.scan_for(SECRET)
        assert memory.scan_for(WORD)  # the positive control, of the terms too
        counts = scope.forget(id_, verify=True)
        assert (counts["segments"], counts["unfinished"], counts["residue"]) == (1, 0, 0)
        assert memory.scan_for(SECRET, SECRET[:20], SECRET[-20:], "früh-Ω-4711", WORD, id_) == {}
        files = [file for file in tmp_path.rglob("*") if file.is_file()]
        assert (tmp_path / "m.db").stat().st_size > 50_000
        assert not [file for file in files if row.tobytes() in file.read_bytes()]
        assert memory.scan_for("The boat number 7 is blue.")
        assert scope.search("boat", k=1)
        assert WORD not in json.dumps([s.text for s in scope.history(999)]).lower()


def test_the_banks_files_go_with_it(tmp_path):
    import torch

    from memory_os.protocols import KV
    from memory_os.stores import manifest

    with opened(tmp_path / "m.db") as memory:
        scope = memory.namespace("a")
        secret, kept = scope.add(SECRET), scope.add("The boat is blue.")
        kv = KV((1, 2, 3), torch.ones(2, 2, 3, 8), torch.ones(2, 2, 3, 8))
        memory.parts.bank.put(("a",), "f", {secret.id: kv, kept.id: kv}, 1)
        folder = manifest.bank_folder(tmp_path / "m.db")
        before = {file.name: file.read_bytes() for file in folder.rglob("*.safetensors")}
        assert scope.forget(secret.id, preview=True)["bank"] == 1
        assert len(list(folder.rglob("*.safetensors"))) == 2
        assert scope.forget(secret.id, verify=True)["bank"] == 1
        [left] = folder.rglob("*.safetensors")
        assert left.read_bytes() == before[left.name]
        assert list(memory.parts.bank.get(("a",), "f", [secret.id, kept.id])) == [kept.id]


def test_verify_finds_what_is_left_and_passes_over_what_is_stored(in_a_file, tmp_path, caplog):
    memory = in_a_file
    scope = memory.namespace("a")
    scope.add("Yes.")
    first, _ = scope.add(SECRET), scope.add(f"He said: {SECRET}")
    assert scope.forget(first.id, verify=True)["residue"] == 0  # another says it, and stays
    copy = tmp_path / "m.db.before-0001"
    copy.write_bytes(b"x" * 5000 + f"He said: {SECRET}".encode())
    counts = scope.forget(scope.history(1)[0].id, verify=True)
    assert counts["residue"] == 1
    assert copy.name in caplog.text
    assert memory.scan_for(SECRET) == {str(copy): [SECRET]}


@pytest.mark.slow
def test_after_a_thousand_forgettings_the_word_index_still_takes_one(tmp_path):
    """Each one compacts FTS5's index, whose record of itself grows by that until it is taken for damaged."""
    path = tmp_path / "m.db"
    with Memory.open(path, embedder="hash") as memory:
        scope = memory.namespace("a")
        scope.add_many([NewSegment(f"boat number{n}", "s") for n in range(600)])
        for n in range(1050):
            with memory.parts.store.database.write() as connection:
                fulltext.add(connection, [(10**9 + n, 1, ["passing"])])
                fulltext.remove(connection, 1, [10**9 + n])
                fulltext.compact(connection)
        scope.add("a red boat")
        assert scope.forget(1)["segments"] == 1
        assert scope.forget(*[segment.id for segment in scope.history(550)])["segments"] == 550
        scope.add("a green boat")
    with Memory.open(path, embedder="hash") as memory:
        assert memory.parts.store.search(("a",), "green", 5)
        assert memory.namespace("a").forget(everything=True)["lexical"] == 51
        assert not any(memory.check(deep=True).values())


def test_verify_is_not_deceived_by_short_texts_and_names(memory):
    scope = memory.namespace("integer primary").session("morning walk")
    for text in ("text", "ok", "morning walk", "integer primary"):  # words of the schema, and names that stay
        scope.add("Stays.")
        assert scope.forget(scope.add(text).id, verify=True)["residue"] == 0, text


def test_verify_looks_for_items_too(in_a_file, tmp_path):
    scope = in_a_file.namespace("a")
    scope.items.put(
        ("profile",), "pet", {"called": [{"name": SECRET}], "n": 1}, texts=[("by", f"{WORD} in the garden")]
    )
    copy = tmp_path / "m.db.before-0001"
    copy.write_bytes(SECRET.encode())
    assert scope.forget(everything=True, verify=True)["residue"] == 1
    copy.write_bytes(f"{WORD} in the garden".encode())
    scope.items.put(("profile",), "pet", {"n": 1}, texts=[("by", f"{WORD} in the garden")])
    assert scope.forget(everything=True, verify=True)["residue"] == 1
    copy.unlink()
    scope.items.put(("profile",), "pet", {"name": SECRET})
    assert scope.forget(everything=True, verify=True)["residue"] == 0


def test_a_row_that_has_moved_leaves_nothing_behind(tmp_path):
    """Where pages were split and joined, one may keep a copy of a deleted row, despite secure_delete: it is found."""
    path = tmp_path / "moved.db"
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("PRAGMA secure_delete = ON")
        raw.execute("CREATE TABLE t (pk INTEGER PRIMARY KEY, text TEXT)")
        raw.executemany("INSERT INTO t VALUES (?, ?)", [(n, f"row {n} " * 20) for n in range(100)])
        raw.commit()
    assert not any(f"row {n} ".encode() in residue.leftovers(path) for n in range(100))
    stale = residue.pieces("the text of a row that is gone")
    assert not residue.still_there(path, stale)
    content = bytearray(path.read_bytes())
    page = 4096 * 2
    assert content[page] in residue.PAGE_TYPES
    n_cells, start = (int.from_bytes(content[page + at : page + at + 2], "big") for at in (3, 5))
    low = page + 8 + 2 * n_cells
    assert page + start - low > 40
    content[low + 2 : low + 2 + 30] = b"the text of a row that is gone"
    path.write_bytes(content)
    assert residue.still_there(path, stale)
    assert residue.still_there(path, residue.pieces("prefix and more of the text of a row that is gone"))


def test_what_a_page_kept_of_it_is_written_over(in_a_file, tmp_path, monkeypatch):
    """The same through forget: pages that are said to keep some of it are written anew."""
    memory = in_a_file
    scope = memory.namespace("a")
    secret = scope.add(SECRET)
    scope.add_many([NewSegment(f"The boat number {n} is blue. " * 3, "s") for n in range(200)])
    asked = []

    def kept(path, gone):
        asked.append(gone)
        return True

    from memory_os.stores import scrub

    monkeypatch.setattr(scrub, "still_there", kept)
    pages = tmp_path / "m.db"
    size = pages.stat().st_size
    assert scope.forget(secret.id)["unfinished"] == 0
    [gone] = asked
    assert {SECRET.encode()[:16], WORD.encode()} <= gone
    with closing(sqlite3.connect(pages)) as raw:
        assert raw.execute("PRAGMA freelist_count").fetchone() == (0,)
        assert raw.execute("PRAGMA user_version").fetchone() == (0,)
    assert size < pages.stat().st_size  # all of it is in the file now, and the log is empty
    assert (tmp_path / "m.db-wal").stat().st_size < 10_000
    assert not any(memory.check().values())


READER = """
import sqlite3, sys
raw = sqlite3.connect(sys.argv[1], isolation_level=None)
raw.execute("BEGIN")
raw.execute("SELECT count(*) FROM segments").fetchone()
print("reading", flush=True)
sys.stdin.read()
"""


def due(path) -> bool:
    """Whether the database says that its files are still to be scrubbed."""
    with closing(sqlite3.connect(path)) as raw:
        return raw.execute("PRAGMA user_version").fetchone() != (0,)


def test_another_process_that_reads_is_named_and_the_rest_is_done_later(tmp_path, monkeypatch):
    from memory_os.stores.database import Database

    monkeypatch.setattr(Database.scrub, "__kwdefaults__", {"patience_s": 0.2})
    path = tmp_path / "m.db"
    memory = opened(path)
    scope = memory.namespace("a")
    secret = scope.add(SECRET)
    scope.add("The boat is blue.")
    with subprocess.Popen(
        [sys.executable, "-c", READER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout.readline() == "reading\n"
        counts = scope.forget(secret.id, verify=True)
        assert (counts["segments"], counts["unfinished"]) == (1, 1)
        assert counts["residue"] > 0  # and it is seen that it is not done
        assert scope.lookup([secret.id]) == {}
        scope.add("Nobody waits for it.")
        reader.stdin.close()
        assert reader.wait(timeout=30) == 0
    memory.parts.store.database._unclean = False  # a crash: close does not come to it
    memory.close()
    assert due(path)
    with opened(path) as memory:
        assert not due(path)
        assert memory.scan_for(SECRET, "früh-Ω-4711", WORD) == {}
        assert [s.text for s in memory.namespace("a").history()] == ["The boat is blue.", "Nobody waits for it."]


# -- it stays gone -----------------------------------------------------------------------------------------------------


def exported(scope) -> list[str]:
    file = io.StringIO()
    scope.export(file)
    return file.getvalue().splitlines()


@pytest.mark.parametrize("everything", [False, True])
def test_it_stays_gone_after_reopening_repair_and_import_until_it_is_restored(place, everything):
    path = place
    with opened(path) as memory:
        scope = memory.namespace("a")
        kept = scope.add("The boat is blue.")
        reply = scope.chat(SECRET)
        lines = exported(scope)
        trace = reply.trace
        counts = scope.forget(everything=True) if everything else scope.forget(trace.query_id, trace.reply_id)
        assert counts["tombstones"] == counts["segments"] == (3 if everything else 2)
    with opened(path) as memory:
        scope = memory.namespace("a")
        memory.repair()
        for _ in range(2):
            done = scope.import_(lines)
            assert (done, done.forgotten) == ((0, 0), 3) if everything else ((0, 1), 2)
        assert [s.id for s in scope.history()] == ([] if everything else [kept.id])
        with pytest.raises(UnknownNameError):
            scope.why(trace.id)
        assert not held(memory, SECRET, WORD)
        other = memory.namespace("b").import_(lines)  # another namespace's own affair
        assert (other, other.forgotten) == ((3, 0), 0)
        memory.namespace("b").forget(everything=True)
        assert "tombstones" not in "".join(exported(scope))
        back = scope.import_(lines, restore=True)
        assert (back, back.forgotten) == ((3, 0) if everything else (2, 1), 0)
        assert scope.why()[0] == trace
        assert held(memory, SECRET)
        assert scope.import_(lines) == (0, 3)


def test_a_forgotten_passage_is_not_ingested_again_but_new_ones_are(memory, tmp_path):
    file = tmp_path / "notes.md"
    file.write_text(f"# One\n\n{SECRET}\n\n# Two\n\nThe boat is blue.\n", "utf-8")
    scope = memory.namespace("a")
    assert scope.ingest(file) == (2, 0)
    [secret] = [s for s in scope.history() if SECRET in s.text]
    scope.forget(secret.id)
    file.write_text(file.read_text("utf-8") + "\n# Three\n\nThe kite is red.\n", "utf-8")
    done = scope.ingest(file)
    assert (sum(done), done.forgotten) == (2, 1)
    assert SECRET not in "".join(s.text for s in scope.history())
    assert scope.ingest(file, restore=True) == (1, 2)
    assert scope.ingest(file).forgotten == 0
    assert SECRET in "".join(s.text for s in scope.history())


def test_the_tombstone_cannot_be_read_and_what_is_replaced_leaves_none(memory):
    def kinds():
        with memory.parts.store.database.read() as connection:
            return {kind for (kind,) in connection.exec_driver_sql("SELECT kind FROM tombstones")}

    scope = memory.namespace("a")
    [first] = scope.replace_many([NewSegment("one", "s", key="passport of Alice")])
    [second] = scope.replace_many([NewSegment("two", "s", key="passport of Alice")])
    assert kinds() == set()
    scope.forget(second.id)
    assert kinds() == {"id", "key"}
    assert not held(memory, "passport of Alice", second.id)
    assert scope.add_many([NewSegment("two", "s", key="passport of Alice")]) == []
    assert memory.namespace("b").add_many([NewSegment("two", "s", key="passport of Alice")])
    [third] = scope.replace_many([NewSegment("three", "s", key="passport of Alice")])  # whoever says so, means it
    assert scope.history() == [third]
    assert scope.add_many([NewSegment("four", "s", key="passport of Alice")]) == []
    assert first.id != third.id


# -- by age ------------------------------------------------------------------------------------------------------------


def fill(memory):
    now = datetime.now(UTC)
    for name in ("a", "b"):
        for days in (200, 91, 89, 1):
            memory.namespace(name).add(f"{name} {days}", created_at=now - days * DAY)
        memory.namespace(name).items.put(("facts",), "k", {"v": 1})


def texts(memory, name="a"):
    return [s.text for s in memory.namespace(name).history()]


def test_what_is_older_goes_from_one_namespace_or_from_all_and_items_stay(memory):
    fill(memory)
    scope = memory.namespace("a")
    assert scope.expire(90, preview=True)["segments"] == 2
    assert scope.expire(90)["segments"] == 2
    assert (texts(memory), len(texts(memory, "b"))) == (["a 89", "a 1"], 4)
    assert memory.expire(150, preview=True)["segments"] == 1
    assert memory.expire(90, verify=True)["segments"] == 2
    assert texts(memory, "b") == ["b 89", "b 1"]
    assert scope.expire(0.5)["segments"] == 2
    assert scope.items.count() == 1
    for wrong in (0, -1, float("nan"), float("inf"), 1e9, "90", True):
        with pytest.raises(ConfigError, match="days"):
            memory.expire(wrong)


def test_a_memory_keeps_to_its_own_retention_when_it_is_opened_and_as_it_goes_on(place, monkeypatch):
    path = place
    with opened(path) as memory:
        fill(memory)
    with pytest.raises(ConfigError, match="days to keep"):
        opened(path, retention_days=0)
    with opened(path, retention_days=90) as memory:
        assert (texts(memory), texts(memory, "b")) == (["a 89", "a 1"], ["b 89", "b 1"])
        memory.parts.retention.days = 50
        memory.namespace("a").add("not every time")
        assert len(texts(memory)) == 3
        from memory_os import forget

        later = forget.time.monotonic() + forget.EVERY_S
        monkeypatch.setattr(forget.time, "monotonic", lambda: later)
        memory.namespace("b").add("an hour later")
        assert texts(memory) == ["a 1", "not every time"]


OLD = "2020-01-01T00:00:00+00:00"


def test_what_is_too_old_already_is_not_taken_in_and_can_be_stored_without_the_policy(tmp_path):
    old = datetime.fromisoformat(OLD)
    chat = [{"content": "an old message", "created_at": OLD}, {"content": "a new message"}]
    (tmp_path / "chat.json").write_text(json.dumps(chat))
    exported = io.StringIO()
    with opened(tmp_path / "other.db") as other:
        other.namespace("a").ingest(tmp_path / "chat.json")
        other.namespace("a").chat("What of it?")
        trace = other.namespace("a").why()[0]
        other.parts.store.save_trace(replace(trace, id="old", query="asked long ago", created_at=old))
        other.namespace("a").export(exported)
    lines = exported.getvalue().splitlines()
    with opened(tmp_path / "m.db", retention_days=90) as memory:
        scope = memory.namespace("a")
        done = scope.ingest(tmp_path / "chat.json")
        assert (done, done.forgotten, done.too_old) == ((1, 0), 0, 1)
        done = scope.ingest(tmp_path / "chat.json")
        assert (done, done.forgotten, done.too_old) == ((0, 1), 0, 1)
        done = memory.namespace("b").import_(lines)
        assert (done, done.forgotten, done.too_old) == ((3, 0), 0, 1)
        with pytest.raises(InvalidInputError, match="nothing older than 90 days"):
            scope.add("old", created_at=OLD)
        with pytest.raises(InvalidInputError, match="nothing older than 90 days"):
            scope.replace_many([NewSegment("one", "s", key="1"), NewSegment("two", "s", key="2", created_at=old)])
        assert [s.text for s in scope.add_many([NewSegment("x", "s", created_at=old), NewSegment("y", "s")])] == ["y"]
        assert (texts(memory), len(texts(memory, "b"))) == (["a new message", "y"], 3)
        assert memory.scan_for("an old message", "asked long ago") == {}
    with opened(tmp_path / "m.db") as memory:
        assert memory.namespace("a").ingest(tmp_path / "chat.json") == (1, 1)


def test_what_went_by_age_leaves_no_tombstone(memory):
    fill(memory)
    exported = io.StringIO()
    memory.namespace("a").export(exported)
    assert memory.expire(90)["tombstones"] == 0
    assert memory.namespace("a").import_(exported.getvalue().splitlines()) == (2, 2)


@pytest.fixture
def later(monkeypatch):
    """So many seconds pass, for those who wait for the time to look again."""
    from memory_os import forget

    def wait(seconds=forget.EVERY_S):
        now = forget.time.monotonic() + seconds
        monkeypatch.setattr(forget.time, "monotonic", lambda: now)

    return wait


ITEM = '{"item": {"path": ["p"], "key": "k", "value": {}, "texts": [], "ttl": null, "created_at": null, %s}}'
ITEM %= '"updated_at": null, "expires_at": null'
WRITES = {
    "add": lambda scope: scope.add("new"),
    "add_many": lambda scope: scope.add_many([NewSegment("new", "s")]),
    "replace_many": lambda scope: scope.replace_many([NewSegment("new", "s", key="k")]),
    "ingest": lambda scope: scope.ingest(io.BytesIO(b"new"), name="x.txt"),
    "import": lambda scope: scope.import_(['{"memory_os_export": 1}', ITEM]),
    "chat": lambda scope: scope.chat("new?"),
    "stream": lambda scope: list(scope.stream("new?")),
}


@pytest.mark.parametrize("write", WRITES)
def test_every_write_looks_for_what_has_become_too_old(tmp_path, later, write):
    with opened(tmp_path / "m.db", retention_days=300) as memory:
        fill(memory)
        memory.parts.retention.days = 90
        WRITES[write](memory.namespace("b"))
        assert "a 91" in texts(memory)
        later()
        WRITES[write](memory.namespace("b"))
        assert texts(memory) == ["a 89", "a 1"]


def test_a_memory_that_only_reads_looks_when_it_is_closed(tmp_path):
    with opened(tmp_path / "m.db", retention_days=300) as memory:
        fill(memory)
        memory.parts.retention.days = 90
        memory.namespace("a").search("a")
    with opened(tmp_path / "m.db") as memory:
        assert texts(memory) == ["a 89", "a 1"]


def test_what_is_said_is_stored_also_where_forgetting_fails_and_it_is_tried_again(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    with opened(tmp_path / "m.db", retention_days=300) as memory:
        fill(memory)
        memory.parts.retention.days = 90

        def fails(*_, **__):
            raise StoreError("cannot delete the bank's file x")

        memory.parts.retention._due = 0
        with monkeypatch.context() as patch:
            patch.setattr(memory.parts.store, "delete", fails)
            memory.namespace("a").add("said now")
        assert "could not be forgotten: cannot delete the bank's file x" in caplog.text
        memory.namespace("b").add("and now")
        assert texts(memory) == ["a 89", "a 1", "said now"]
        assert "Forgot what is older than 90 days: {'segments': 4," in caplog.text
        assert "a 91" not in caplog.text


def test_a_turn_does_not_wait_for_another_process_that_reads(tmp_path, caplog, monkeypatch):
    with opened(tmp_path / "m.db", retention_days=300) as memory, closing(sqlite3.connect(tmp_path / "m.db")) as reader:
        fill(memory)
        memory.parts.retention.days, memory.parts.retention._due = 90, 0
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM segments").fetchone()
        waited, scrub = [], memory.parts.store.database.scrub
        monkeypatch.setattr(
            memory.parts.store.database,
            "scrub",
            lambda *a, patience_s, **k: waited.append(patience_s) or scrub(*a, patience_s=patience_s, **k),
        )
        memory.namespace("a").add("said now")
        assert texts(memory) == ["a 89", "a 1", "said now"]
        assert set(waited) == {0}
        assert "'unfinished': " in caplog.text  # a warning
        reader.rollback()
        memory.namespace("a").forget(1 + 3, verify=True)


@pytest.mark.parametrize(("ahead", "held"), [(300, False), (12 * 365, True)])
def test_a_clock_that_jumps_ahead_forgets_nothing_until_it_has_run_for_a_day(
    tmp_path, caplog, monkeypatch, ahead, held
):
    from memory_os import forget

    real, days = datetime, ahead

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return real.now(tz) + timedelta(days=days)

    keep = {"retention_days": 90}
    with opened(tmp_path / "m.db") as memory:
        for number in range(3):
            memory.namespace("a").add(f"today {number}")
    monkeypatch.setattr(forget, "datetime", Clock)
    for _ in range(2):  # a wrong clock dates what is stored, too
        with opened(tmp_path / "m.db", **keep) as memory:
            made = uuid_utils.uuid7(timestamp=int(Clock.now(UTC).timestamp()))
            memory.namespace("b").add_many([NewSegment("now", "s", id=str(made), created_at=Clock.now(UTC))])
            assert len(texts(memory)) == (3 if held else 0)
    assert ("the clock says" in caplog.text) is held
    days += 2
    with opened(tmp_path / "m.db", **keep) as memory:
        assert (len(texts(memory)), len(texts(memory, "b"))) == (0, 2)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def memos(place, monkeypatch, capfd):
    """Run a command in this process: ``(exit code, stdout, stderr)``."""
    monkeypatch.setenv("MEMOS_STORE", str(place))
    monkeypatch.setenv("MEMOS_EMBEDDER", "hash")
    monkeypatch.setenv("MEMOS_TOKENIZER", "cl100k_base")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["memos", *map(str, arguments)])
        try:
            run()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    return call


def test_the_command_shows_what_would_go_and_forgets_exactly_that(memos, place, tmp_path):
    chat = [
        {"role": "user", "content": SECRET, "created_at": "2024-03-05T12:00:00Z"},
        {"role": "user", "content": "The kite is red.", "created_at": "2024-03-06T12:00:00Z"},
        {"role": "user", "content": "The boat is blue.", "created_at": "2024-03-07T12:00:00Z"},
    ]
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(chat))
    memos("ingest", file)
    code, out, err = memos("forget", "--query", "Zanzibarian password", "-k", 1, "--preview")
    assert (code, out) == (0, "Would forget 1 segment.\n")
    assert "Zanzibarian" in err
    assert "kite" not in err
    going = json.loads(memos("forget", "--before", "2024-03-07", "--preview", "--json")[1])
    assert [each["seq"] for each in going["going"]] == [1, 2]
    assert going["segments"] == 2
    for wrong in (("--query", "x"), ("1", "-k", "2"), ("--after", "2024", "--everything"), ("--query", "x", "-k", 0)):
        assert memos("forget", *wrong)[0] == 2
    code, _, err = memos("forget", "--query", "Zanzibarian password", "-k", 1)
    assert (code, "--yes" in err) == (2, True)
    code, out, err = memos("forget", "--query", "Zanzibarian password", "-k", 1, "--yes", "--verify")
    assert (code, out) == (0, "Forgot 1 segment.\n")
    if isinstance(place, Path):
        assert "Verified: no file of the store holds the text." in err
    else:
        assert "The files of a database server are not looked at" in err
        assert "Verified" not in err
    code, out, err = memos("ingest", file)
    assert out == "Stored 0 segments; 2 were already there.\n"
    assert "1 were forgotten here and stay so; --restore brings them back." in err
    assert json.loads(memos("ingest", file, "--json")[1]) == {"stored": 0, "already_there": 2, "forgotten": 1}
    memos("export", tmp_path / "out.jsonl")
    memos("forget", "--after", "2024-03-07", "--yes")
    assert json.loads(memos("import", tmp_path / "out.jsonl", "--json")[1])["forgotten"] == 1
    assert json.loads(memos("import", tmp_path / "out.jsonl", "--restore", "--json")[1])["stored"] == 1
    assert json.loads(memos("ingest", file, "--restore", "--json")[1])["stored"] == 1
    assert memos("forget", "--query", "nothing", "-k", 1, "--yes", "-n", "empty")[1] == "Forgot 0 segments.\n"


WAYS = [
    (["1"], 1),
    (["--whole-session", "home"], 2),
    (["--before", "2100-01-01"], 2),
    (["--query", "boat", "-k", "2"], 2),
    (["--everything"], 3),
]


@pytest.mark.parametrize(("way", "n_gone"), WAYS)
def test_what_comes_while_the_command_asks_is_not_forgotten_but_with_everything(memos, place, monkeypatch, way, n_gone):
    with opened(place) as memory:
        for text in ("The boat is blue.", "A boat sails."):
            memory.namespace("default").session("home").add(text)

    def answer(*_, **__):  # another process meanwhile
        with opened(place) as memory:
            memory.namespace("default").session("home").add("boat boat boat")
        return True

    monkeypatch.setattr(typer, "confirm", answer)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert memos("forget", *way)[:2] == (0, f"Forgot {n_gone} segment{'s' if n_gone > 1 else ''}.\n")
    with opened(place) as memory:
        left = texts(memory, "default")
    assert len(left) == 3 - n_gone
    assert ("boat boat boat" in left) is (n_gone < 3)


def test_what_another_forgets_meanwhile_is_no_error(memos, place, monkeypatch):
    with opened(place) as memory:
        memory.namespace("default").add_many([NewSegment("one", "s"), NewSegment("two", "s")])

    def answer(*_, **__):
        with opened(place) as memory:
            memory.namespace("default").forget(1)

    monkeypatch.setattr(typer, "confirm", answer)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert memos("forget", "--whole-session", "s")[:2] == (0, "Forgot 1 segment.\n")


def test_by_time_is_of_the_namespace_whatever_session_is_set(memos, place, monkeypatch):
    with opened(place) as memory:
        for session in ("work", "home"):
            memory.namespace("default").session(session).add(session, created_at="2020-01-01")
    monkeypatch.setenv("MEMOS_SESSION", "work")
    assert memos("forget", "--before", "2021-01-01", "--preview")[1] == "Would forget 2 segments.\n"
    assert memos("forget", "--before", "2021-01-01", "--whole-session", "home", "--yes")[1] == "Forgot 1 segment.\n"
    assert memos("forget", "--before", "2021-01-01", "--yes")[1] == "Forgot 1 segment.\n"


def test_retention_by_command_and_by_setting(memos, place, tmp_path, monkeypatch):
    path = place
    with opened(path) as memory:
        fill(memory)
    assert memos("retain")[0] == 2
    assert memos("retain", "--days", 0)[0] == 1
    assert memos("retain", "--days", 90, "-n", "a", "--preview")[1] == "Would forget 2 segments.\n"
    assert memos("retain", "--days", 90, "-n", "a")[1] == "Forgot 2 segments.\n"
    assert json.loads(memos("retain", "--days", 90, "--all", "--json")[1])["segments"] == 2
    monkeypatch.setenv("MEMOS_RETENTION_DAYS", "50")
    assert len(json.loads(memos("history", "-n", "a", "--json")[1])) == 2  # reading deletes nothing
    file = tmp_path / "x.txt"
    file.write_text("The boat is blue.")
    assert memos("ingest", file, "-n", "a")[0] == 0
    with opened(path) as memory:
        assert (texts(memory), texts(memory, "b")) == (["a 1", "The boat is blue."], ["b 1"])
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps([{"content": "old", "created_at": OLD}]))
    code, out, err = memos("ingest", chat, "-n", "a")
    assert (code, out) == (0, "Stored 0 segments.\n")
    assert "1 are older than retention_days, and are not kept." in err
    assert json.loads(memos("ingest", chat, "-n", "a", "--json")[1]) == {"stored": 0, "already_there": 0, "too_old": 1}
    assert memos("retain", "-n", "b", "--days", 0.5)[1] == "Forgot 1 segment.\n"
    monkeypatch.setenv("MEMOS_RETENTION_DAYS", "-3")
    code, _, err = memos("ingest", file, "-n", "a")
    assert (code, "days to keep must be a number above 0" in err) == (1, True)
