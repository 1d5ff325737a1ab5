"""A store brought to another database: whole, compared, resumed wherever it was stopped, and not used before.

How it is killed: this file, run as a script, migrates and kills itself at its n-th commit.
"""

import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from memory_os import Memory, NewSegment, migrate
from memory_os.adapters.scripted import HashEmbedder, ScriptedLLM
from memory_os.build import VECTORS, open_database
from memory_os.cli.main import app
from memory_os.errors import ConfigError, SchemaError, StoreError, UnknownNameError
from memory_os.stores import copying, fulltext, tablerows
from memory_os.stores.backend import Opening
from memory_os.stores.numbers import NUMBERED, last_numbers
from memory_os.stores.schema import metadata
from memory_os.stores.tablerows import LEFT, TABLES
from memory_os.stores.unfinished import is_unfinished

ALICE, XIAO, EMPTIED = ("acme", "alice"), ("小明", "a/b"), ("gone",)
QUESTIONS = ("Where is the kite?", "风筝", "bird 3", "forgotten words")
F = HashEmbedder().fingerprint
WAYS = ["sqlite to sqlite", "sqlite to postgres", "postgres to sqlite", "postgres to postgres"]
OLD = Path(__file__).parent / "fixtures" / "revision-0008.sql"

Place = Path | str


@pytest.fixture(scope="module")
def new_store(request, tmp_path_factory) -> Callable[[str], Place]:
    """Makes the address of an empty database of a kind."""

    def make(kind: str) -> Place:
        if kind == "sqlite":
            return tmp_path_factory.mktemp("store") / "memory.db"
        server = request.getfixturevalue("postgres_server")
        return server.url(server.new())

    return make


@pytest.fixture(scope="module")
def filled(new_store) -> Callable[[str], Place]:
    """A filled store of a kind, which tests only read."""
    made: dict[str, Place] = {}

    def source(kind: str) -> Place:
        if kind not in made:
            made[kind] = new_store(kind)
            fill(made[kind])
        return made[kind]

    return source


@pytest.fixture
def source(new_store) -> Place:
    """A filled store that the test may write to."""
    place = new_store("sqlite")
    fill(place)
    return place


def opened(place: Place, **options) -> Memory:
    return Memory.open(place, embedder="hash", llm=ScriptedLLM(lambda _: "Noted."), **options)


def fill(place: Place) -> None:
    """Something of everything, and of what was deleted."""
    with opened(place) as memory:
        store = memory.parts.store
        for labels in (ALICE, XIAO):
            scope = memory.namespace(*labels)
            scope.chat("The kite of Miso is red.")
            scope.session("later \n x").chat("Where is the kite? 风筝在哪里？")
            scope.add_many([NewSegment(f"Day {n}: a bird {n}", "s", key=f"k{n}", metadata={"ü": n}) for n in range(9)])
            scope.add("Naïve \u2028 text\twith \x01.", speaker="Zoë", created_at="2020-02-29T12:00:00.000001+02:00")
            scope.items.put(("p", "ä"), "k", {"of": labels[0], "n": 0.1}, texts=[("of", "a kite")], ttl=9e6)
            scope.items.put(("p",), "gone", {"x": 1})
            scope.items.delete(("p",), "gone")
            scope.add_many([NewSegment("forgotten words", "s", key="secret")])
            scope.forget(scope.history(1)[0].id)
            first, second = scope.history(2)
            store.put_summary(labels, first.id, "m", "a summary")
            scores = {
                "k": {"a": 0.1},
                "f": 0.12345678901234567,
                "w": 1.0,
                "n": None,
                "t": "5",
                "e": -9.297494192001171e-302,
            }
            store.put_scores(labels, scores, epoch=store.state(labels, F).epoch)
            store.list_for_summary(labels, [second.id])
        memory.namespace(*EMPTIED).add("away")
        memory.namespace(*EMPTIED).forget(everything=True)
        store.append(ALICE, [NewSegment("without a vector yet", "s")])
    run(place, "UPDATE vectors SET tokens = :tokens", {"tokens": bytes(range(256))})


def run(place: Place, statement: str, told=None) -> None:
    with closing(open_database(place)) as database, database.write() as connection:
        connection.execute(sa.text(statement), told or {})


def rows_of(place: Place) -> dict[str, dict]:
    """Every row of every table that is copied, by key."""
    with closing(open_database(place)) as database, database.read() as connection:
        return {t.name: tablerows.read(connection, t, list(tablerows.keys(connection, t))) for t in TABLES}


def numbers_of(place: Place) -> dict[str, int]:
    with closing(open_database(place)) as database, database.read() as connection:
        return last_numbers(connection)


def marked(place: Place) -> bool:
    """Whether it was begun to be made a copy."""
    with closing(open_database(place, Opening.FILL)) as database, database.read() as connection:
        return is_unfinished(connection)


def contexts(memory: Memory, question: str) -> list:
    """What a memory answers in all namespaces: messages, order, and the account of every candidate."""
    found = [(labels, memory.namespace(*labels).context(question)) for labels in memory.namespaces()]
    return [(labels, context.messages, context.segments, context.ledger, context.account) for labels, context in found]


def files_in(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


# -- whole -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_everything_goes_over_and_the_same_question_gets_the_same_context(way, filled, new_store):
    start, end = way.split(" to ")
    source, dest = filled(start), new_store(end)
    before = rows_of(source)
    done = migrate(source, dest)
    assert rows_of(dest) == before == rows_of(source)
    assert {each.table: each.rows for each in done.tables} == {name: len(rows) for name, rows in before.items()}
    assert all(each.rows for each in done.tables)  # there was something of everything
    assert not done.differences
    assert done.index is None
    assert numbers_of(dest) == numbers_of(source)
    with opened(source) as old, opened(dest) as new:
        assert new.namespaces() == old.namespaces()
        for question in QUESTIONS:
            assert contexts(new, question) == contexts(old, question)
        assert not any(found for kind, found in new.check().items() if "pending" not in kind)
        assert old.parts.store.id != new.parts.store.id  # their collections on a shared server are two


@pytest.mark.parametrize("way", WAYS)
def test_what_was_forgotten_stays_so_and_numbers_go_on(way, filled, new_store):
    start, end = way.split(" to ")
    source, dest = filled(start), new_store(end)
    migrate(source, dest)
    before = numbers_of(source)
    with opened(dest) as memory:
        scope = memory.namespace(*ALICE)
        last = scope.history(1)[0].seq
        assert scope.add_many([NewSegment("forgotten words", "s", key="secret")]) == []
        scope.items.put(("p",), "new", {"x": 1}, texts=[("x", "1")])
        assert scope.add("new").seq == last + 1
        assert memory.namespace("new one").add("first").seq == 1
    after = numbers_of(dest)
    assert {name for name in NUMBERED if after[name] > before[name]} == NUMBERED.keys() - {"scores"}


def test_every_table_is_copied_or_left_for_a_reason():
    assert {table.name for table in TABLES} | LEFT.keys() == metadata.tables.keys()
    assert LEFT.keys() == {"store", "bank", "workers", "claims"}


names = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    str.strip
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
stores = st.lists(
    st.tuples(
        st.lists(names, min_size=1, max_size=3),
        st.lists(
            st.tuples(names, names, st.none() | names, st.dictionaries(names, json_values, max_size=2)), max_size=4
        ),
        st.lists(st.tuples(names, json_values), max_size=2),
    ),
    max_size=3,
)


@pytest.mark.parametrize("end", ["sqlite", "postgres"])
@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(content=stores, seed=st.integers(0, 99))
def test_any_store_goes_over(end, content, seed, new_store):
    source, dest = new_store("sqlite"), new_store(end)
    chance = random.Random(seed)
    with opened(source) as memory:
        for labels, said, scores in content:
            scope = memory.namespace(*labels)
            for text, session, speaker, about in said:
                added = scope.session(session).add(text, speaker=speaker, metadata=about)
                scope.items.put((session,), text, {"about": about}, texts=[("t", text)])
                if chance.random() < 0.2:
                    scope.forget(added.id)
            store = memory.parts.store
            store.put_scores(scope.labels, dict(scores), epoch=store.state(scope.labels, F).epoch)
    migrate(source, dest)
    assert rows_of(dest) == rows_of(source)
    with opened(source) as old, opened(dest) as new:
        question = content[0][1][0][0] if content and content[0][1] else "anything"
        assert contexts(new, question) == contexts(old, question)


def test_the_source_is_read_as_of_one_moment(source, new_store, monkeypatch):
    """Whatever is written to it meanwhile."""
    dest = new_store("sqlite")
    before = rows_of(source)
    put = copying.Copy.put

    def and_write(self, table, rows):
        put(self, table, rows)
        if table.name != "namespaces":
            return
        with opened(source) as memory:
            memory.namespace(*ALICE).add("meanwhile")
            memory.namespace("new").add("meanwhile")
            memory.namespace(*XIAO).forget(memory.namespace(*XIAO).history(1)[0].id)

    monkeypatch.setattr(copying.Copy, "put", and_write)
    migrate(source, dest)
    assert rows_of(dest) == before != rows_of(source)


# -- refused, and nothing was changed ----------------------------------------------------------------------------------


UNPORTABLE = {
    "a NUL character in items.key": "UPDATE items SET key = 'a' || char(0) WHERE pk = 1",
    "a NUL character in item_texts.text": "UPDATE item_texts SET text = char(0) WHERE pk = 1",
    "more than 2,500 bytes in segments.session": "UPDATE segments SET session = printf('%.*c', 2501, 'x') WHERE pk = 1",
    "more than 2,500 bytes in items.path and key": (
        "UPDATE items SET path = printf('[\"%.*c\"]', 1300, 'x'), key = printf('%.*c', 1300, 'x') WHERE pk = 1"
    ),
    "what is no JSON in segments.metadata": "UPDATE segments SET metadata = 'NaN' WHERE pk = 1",
    "vectors of segments that are not there": "UPDATE vectors SET namespace_id = 2 WHERE pk = 1",
}


@pytest.mark.parametrize("obstacle", UNPORTABLE)
def test_what_the_copy_cannot_hold_is_told_before_anything_is_written(obstacle, source, new_store):
    run(source, UNPORTABLE[obstacle])
    dest = new_store("postgres")
    with pytest.raises(StoreError, match=f"nothing was written: {obstacle}.*: 1 rows, such as 1"):
        migrate(source, dest)
    with opened(dest) as memory:  # empty, and no copy of anything
        assert memory.namespaces() == []
    if "vectors" not in obstacle:
        file = new_store("sqlite")
        migrate(source, file)  # which holds all of it
        assert rows_of(file) == rows_of(source)


def test_a_store_with_memories_is_no_place_for_others(filled, new_store):
    for kind in ("sqlite", "postgres"):
        dest = new_store(kind)
        with opened(dest) as memory:
            memory.namespace("mine").add("mine")
        before = rows_of(dest)
        with pytest.raises(StoreError, match="holds memories already"):
            migrate(filled("sqlite"), dest)
        assert rows_of(dest) == before


def test_a_source_that_is_not_there_or_holds_nothing_is_told_and_not_made(tmp_path, new_store):
    (tmp_path / "empty.db").touch()
    with closing(sqlite3.connect(tmp_path / "other.db")) as raw:
        raw.execute("CREATE TABLE t (x)")
    before = files_in(tmp_path)
    for name, said in (("away.db", "no such memory"), ("empty.db", "no such memory"), ("other.db", "holds no memory")):
        with pytest.raises(StoreError, match=said):
            migrate(tmp_path / name, tmp_path / "dest.db")
    assert files_in(tmp_path).keys() == before.keys()


def test_an_empty_server_is_no_source_and_gets_no_tables(postgres_server, tmp_path):
    name = postgres_server.new("template0")
    with pytest.raises(StoreError, match="holds no memory"):
        migrate(postgres_server.url(name), tmp_path / "dest.db")
    assert postgres_server.admin("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'", database=name) == [(0,)]
    assert list(tmp_path.iterdir()) == []


def test_a_source_of_an_older_schema_is_not_upgraded(tmp_path):
    source = tmp_path / "old.db"
    with closing(sqlite3.connect(source)) as raw:
        raw.executescript(OLD.read_text())
        raw.execute("PRAGMA journal_mode = WAL")
    before = hashlib.sha256(source.read_bytes()).hexdigest()
    with pytest.raises(StoreError, match=f"revision 0008, and is only to be read.*memos stats --store {source}"):
        migrate(source, tmp_path / "new.db")
    assert hashlib.sha256(source.read_bytes()).hexdigest() == before
    with closing(sqlite3.connect(source)) as raw, raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SchemaError, match="newer"):
        migrate(source, tmp_path / "new.db")
    assert not (tmp_path / "new.db").exists()
    with closing(sqlite3.connect(source)) as raw, raw:
        raw.execute("UPDATE alembic_version SET version_num = '0008'")
    opened(source).close()
    migrate(source, tmp_path / "new.db")
    assert rows_of(tmp_path / "new.db") == rows_of(source)


def test_wrong_choices_are_one_error_and_make_nothing(filled, tmp_path):
    source, dest = filled("sqlite"), tmp_path / "dest.db"
    for wrong, options in (
        (ConfigError, {"vectors": "pgvector"}),
        (UnknownNameError, {"vectors": "faiss"}),
        (StoreError, {"verify_only": True}),
    ):
        with pytest.raises(wrong):
            migrate(source, dest, **options)
    with pytest.raises(ConfigError, match="SOURCE and DEST"):
        migrate(source, source)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_not_there_is_not_made_for_an_index_of_it(tmp_path):
    with pytest.raises(StoreError, match="no such memory"):
        migrate(tmp_path / "no.db", tmp_path / "no.db", vectors="exact")
    assert list(tmp_path.iterdir()) == []


def test_one_file_by_two_names_is_one_store(source, tmp_path):
    link, empty, other = tmp_path / "link.db", tmp_path / "empty.db", tmp_path / "other.db"
    link.symlink_to(source)
    opened(empty).close()
    other.symlink_to(empty)
    spelled = source.parent / ".." / source.parent.name / source.name
    for here, there in ((source, link), (link, source), (source, spelled), (empty, other)):
        with pytest.raises(ConfigError, match="SOURCE and DEST"):
            migrate(here, there)
        with pytest.raises(ConfigError, match="SOURCE and DEST"):
            migrate(here, there, verify_only=True)
    done = migrate(source, link, vectors="exact")
    assert done.index
    assert done.tables == ()


def test_comparing_makes_no_index_and_says_so(filled, tmp_path):
    with pytest.raises(ConfigError, match="leave out --vectors"):
        migrate(filled("sqlite"), tmp_path / "copy.db", vectors="exact", verify_only=True)


def test_a_source_that_is_no_memory_stays_as_it_is(tmp_path):
    foreign = tmp_path / "bookmarks.db"
    with closing(sqlite3.connect(foreign)) as raw, raw:
        raw.execute("CREATE TABLE bookmarks (url TEXT)")
    before = files_in(tmp_path)
    with pytest.raises(StoreError, match="holds no memory"):
        migrate(foreign, tmp_path / "copy.db")
    assert files_in(tmp_path) == before


def test_a_memory_of_an_older_schema_is_no_place_for_others_and_not_upgraded(filled, tmp_path):
    old = tmp_path / "old.db"
    with closing(sqlite3.connect(old)) as raw, raw:
        raw.executescript(OLD.read_text())
        raw.execute("PRAGMA journal_mode = WAL")  # as every memory is
    before = files_in(tmp_path)
    with pytest.raises(StoreError, match=r"schema revision 0008.*empty or not there yet"):
        migrate(filled("sqlite"), old)
    assert files_in(tmp_path) == before


# -- stopped, and gone on with -----------------------------------------------------------------------------------------


class Stop(BaseException):
    """Ends a migration as Ctrl-C does."""


def stopped_after(monkeypatch, n: int) -> None:
    """Have the next migration stop after ``n`` batches."""
    left = [n]
    put = copying.Copy.put

    def counted(self, table, rows):
        if not left[0]:
            raise Stop
        left[0] -= 1
        put(self, table, rows)

    monkeypatch.setattr(copying.Copy, "put", counted)


@pytest.mark.parametrize("end", ["sqlite", "postgres"])
def test_a_migration_that_was_stopped_is_no_memory_and_goes_on(end, filled, new_store, monkeypatch):
    source, dest = filled("sqlite"), new_store(end)
    monkeypatch.setattr(copying, "BATCH", 5)
    with monkeypatch.context() as patch:
        stopped_after(patch, 9)
        with pytest.raises(Stop):
            migrate(source, dest)
    for use in (
        opened,
        lambda place: migrate(place, new_store("sqlite")),
        lambda p: migrate(source, p, verify_only=True),
    ):
        with pytest.raises(StoreError, match=f"the unfinished copy of {source}; finish it: memos migrate"):
            use(dest)
    stored: list[tuple] = []
    put = copying.Copy.put
    monkeypatch.setattr(copying.Copy, "put", lambda self, table, rows: (stored.extend(rows), put(self, table, rows))[1])
    migrate(source, dest)
    there = rows_of(source)
    kept = sum(map(len, there.values())) - len(stored)
    assert kept > 20  # nine batches of five, but for namespaces, whose counters change: they are always brought
    assert rows_of(dest) == there


def test_what_changed_in_the_source_between_two_runs_is_brought_over_too(source, new_store, monkeypatch):
    dest = new_store("sqlite")
    monkeypatch.setattr(copying, "BATCH", 4)
    for n in (3, 9, 8, 7):
        with monkeypatch.context() as patch:
            stopped_after(patch, n)
            with pytest.raises(Stop):
                migrate(source, dest)
        with opened(source) as memory:
            scope = memory.namespace(*ALICE)
            scope.forget(scope.history(n)[0].id)
            scope.add_many([NewSegment(f"later {n}", "s", key=f"k{n}")])
            scope.replace_many([NewSegment(f"in its place {n}", "s", key="k1")])
            scope.items.put(("p", "ä"), "k", {"of": n}, texts=[("of", f"number {n}")])
            scope.items.put(("p",), "gone", {"x": n})
            scope.chat("And now?")
            scores = {"f": n, "new": n}
            memory.parts.store.put_scores(ALICE, scores, epoch=memory.parts.store.state(ALICE, F).epoch)
            memory.namespace("new", str(n)).add("hello")
    migrate(source, dest)
    assert rows_of(dest) == rows_of(source)
    with opened(source) as old, opened(dest) as new:
        for question in QUESTIONS:
            assert contexts(new, question) == contexts(old, question)
        assert not any(found for kind, found in new.check(deep=True).items() if "pending" not in kind)


def test_a_copy_of_one_store_is_not_finished_from_another(filled, source, new_store, monkeypatch):
    dest = new_store("sqlite")
    with monkeypatch.context() as patch:
        stopped_after(patch, 2)
        with pytest.raises(Stop):
            migrate(filled("sqlite"), dest)
    with pytest.raises(StoreError, match="unfinished copy of another store"):
        migrate(source, dest)
    migrate(filled("sqlite"), dest)
    assert rows_of(dest) == rows_of(filled("sqlite"))


def test_of_two_at_once_the_later_goes_on(filled, new_store, monkeypatch):
    source, dest = filled("sqlite"), new_store("sqlite")
    put = copying.Copy.put

    def overtaken(self, table, rows):
        monkeypatch.setattr(copying.Copy, "put", put)
        migrate(source, dest)
        put(self, table, rows)

    monkeypatch.setattr(copying.Copy, "put", overtaken)
    with pytest.raises(StoreError, match="another memos migrate goes on"):
        migrate(source, dest)
    assert rows_of(dest) == rows_of(source)


@pytest.mark.parametrize("end", ["sqlite", "postgres"])
def test_what_somebody_writes_who_had_the_empty_place_open_is_taken_out(end, filled, new_store, monkeypatch):
    source, dest = filled("sqlite"), new_store(end)
    with opened(dest) as stranger:
        with monkeypatch.context() as patch:
            stopped_after(patch, 1)
            with pytest.raises(Stop):
                migrate(source, dest)
        with suppress(StoreError):  # a server has given the number of a new namespace already
            stranger.namespace("stranger").add("mine")
        stranger.namespace(*ALICE).items.put(("p", "ä"), "k", {"of": "a stranger"})
    migrate(source, dest)
    assert rows_of(dest) == rows_of(source)


def test_a_copy_begun_by_another_version_says_so(filled, new_store, monkeypatch):
    dest = new_store("sqlite")
    stopped_after(monkeypatch, 2)
    with pytest.raises(Stop):
        migrate(filled("sqlite"), dest)
    with closing(sqlite3.connect(dest)) as raw, raw:
        raw.execute("UPDATE alembic_version SET version_num = '0042 unfinished'")
    with pytest.raises(StoreError, match="of schema 0042"):
        migrate(filled("sqlite"), dest)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_killed_at_random_commits_every_run_goes_on_and_the_last_is_whole(way, filled, new_store):
    start, end = way.split(" to ")
    source, dest = filled(start), new_store(end)
    chance = random.Random(way)
    runs = 0
    while True:
        told = {"source": str(source), "dest": str(dest), "n": chance.randint(2, 16), "before": chance.random() < 0.5}
        done = subprocess.run([sys.executable, "-P", __file__], input=json.dumps(told), text=True, capture_output=True)
        if done.returncode == 0:
            break
        runs += 1
        assert done.returncode == -signal.SIGKILL, done.stderr
        if marked(dest):
            with pytest.raises(StoreError, match="unfinished copy"):
                opened(dest)
    assert runs > 3
    assert rows_of(dest) == rows_of(source)
    with opened(source) as old, opened(dest) as new:
        assert contexts(new, QUESTIONS[0]) == contexts(old, QUESTIONS[0])


def killed() -> None:
    told = json.load(sys.stdin)
    copying.BATCH = 6
    left = [told["n"]]

    def count(_: object) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    # a commit is announced before it is made; that it was made shows when the next transaction begins
    sa.event.listen(sa.Engine, "commit" if told["before"] else "begin", count)
    migrate(told["source"], told["dest"])


# -- compared ----------------------------------------------------------------------------------------------------------


def skip_batch(patch) -> None:
    put = copying.Copy.put
    patch.setattr(
        copying.Copy, "put", lambda self, table, rows: put(self, table, [] if table.name == "traces" else rows)
    )


def change_rows(table: str, column: str, value) -> Callable:
    def change(patch) -> None:
        put = copying.Copy.put

        def changed(self, which, rows):
            if which.name == table:
                place = which.columns.index(column)
                rows = [(*row[:place], value(row[place]), *row[place + 1 :]) for row in rows]
            put(self, which, rows)

        patch.setattr(copying.Copy, "put", changed)

    return change


FAULTS = {
    "traces of acme/alice: 2 rows, and 0": skip_batch,
    "vectors of acme/alice: [0-9]+ rows on both sides, with another checksum": change_rows(
        "vectors", "tokens", lambda _: None
    ),
    "segments of .*with another checksum": change_rows("segments", "text", lambda text: text.replace("kite", "kits")),
    "tombstones of .*: [1-9] rows on both sides": change_rows("tombstones", "digest", lambda old: old[::-1]),
    "items of .*checksum": change_rows("items", "value", lambda old: old.replace("0.1", "0.2")),
    "the lexical index of": lambda patch: patch.setattr(fulltext, "add", lambda *_: None),
}


@pytest.mark.parametrize("end", ["sqlite", "postgres"])
@pytest.mark.parametrize("said", FAULTS)
def test_what_went_wrong_is_found_and_the_copy_stays_unfinished(said, end, filled, new_store, monkeypatch):
    source, dest = filled("sqlite"), new_store(end)
    with monkeypatch.context() as patch:
        FAULTS[said](patch)
        with pytest.raises(StoreError, match=said):
            migrate(source, dest)
    with pytest.raises(StoreError, match="unfinished copy"):
        opened(dest)
    if "lexical" not in said:
        migrate(source, dest)  # which mends it
        assert rows_of(dest) == rows_of(source)


CHANGES = {
    "segments": "UPDATE segments SET text = 'another' WHERE seq = 2",
    "vectors": "UPDATE vectors SET vector = tokens WHERE segment_pk = (SELECT min(segment_pk) FROM vectors)",
    "tombstones": "DELETE FROM tombstones",
    "traces": "UPDATE traces SET created_at = '2026'",
    "item_texts": "DELETE FROM item_texts",
    "namespaces": "UPDATE namespaces SET last_seq = last_seq + 1",
}


@pytest.mark.parametrize("end", ["sqlite", "postgres"])
def test_verify_only_names_what_differs_and_writes_nothing(end, filled, new_store):
    source, dest = filled("sqlite"), new_store(end)
    migrate(source, dest)
    assert not migrate(source, dest, verify_only=True).differences
    expected = set()
    for table, change in CHANGES.items():
        run(dest, change)
        expected.add(table)
        before = rows_of(dest)
        done = migrate(source, dest, verify_only=True)
        assert {each.table for each in done.differences} == expected
        assert rows_of(dest) == before
    labels = {each.namespace for each in done.differences}
    assert {ALICE, XIAO} <= labels <= {ALICE, XIAO, EMPTIED}


# -- indexes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "vectors"),
    [("sqlite", "exact"), ("sqlite", "chroma"), ("sqlite", "server"), ("postgres", "exact"), ("postgres", "server"),
     ("postgres", "pgvector")],
)  # fmt: skip
def test_the_index_is_made_at_once_and_holds_every_vector(end, vectors, filled, new_store, request):
    source, dest = filled("sqlite"), new_store(end)
    vectors = request.getfixturevalue("chroma_server").url if vectors == "server" else vectors
    n = len(rows_of(source)["vectors"])
    assert migrate(source, dest, vectors=vectors).index == n
    with opened(dest, vectors=vectors) as memory:
        if vectors != "exact":  # which is of a process
            assert sum(len(memory.parts.index.ids(labels)) for labels in memory.namespaces()) == n
        found = [hit.segment.id for hit in memory.namespace(*ALICE).nearest("kite", k=3)]
    with opened(source) as memory:
        assert [hit.segment.id for hit in memory.namespace(*ALICE).nearest("kite", k=3)] == found
    n = len(rows_of(dest)["vectors"])  # what waited for its vector may have it by now
    assert migrate(dest, dest, vectors=vectors).index == n  # only the index: of the store itself
    assert rows_of(dest) == rows_of(source)


def test_an_index_that_lacks_a_vector_leaves_the_copy_unfinished(filled, new_store, monkeypatch):
    source, dest = filled("sqlite"), new_store("postgres")

    class Forgetful:
        def __init__(self, index):
            self.index = index

        def __getattr__(self, name):
            return getattr(self.index, name)

        def ids(self, namespace):
            return set(sorted(self.index.ids(namespace))[1:])

    with monkeypatch.context() as patch:
        make = VECTORS["pgvector"]
        patch.setitem(VECTORS, "pgvector", lambda *told: Forgetful(make(*told)))
        with pytest.raises(StoreError, match="does not hold the 15 vectors of acme/alice"):
            migrate(source, dest, vectors="pgvector")
    with pytest.raises(StoreError, match="unfinished copy"):
        opened(dest)
    migrate(source, dest, vectors="pgvector")


def test_a_chroma_server_that_is_away_is_one_error_and_the_next_run_goes_on(filled, new_store):
    source, dest = filled("sqlite"), new_store("sqlite")
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:9"):
        migrate(source, dest, vectors="chroma+http://127.0.0.1:9")
    migrate(source, dest)
    assert rows_of(dest) == rows_of(source)


# -- the command -------------------------------------------------------------------------------------------------------


def memos(*words: object):
    return CliRunner().invoke(app, list(map(str, words)))


def test_the_command_says_what_there_is_and_never_the_password(source, new_store, monkeypatch):
    dest = new_store("postgres")
    password = dest.partition("://")[2].partition("@")[0].partition(":")[2]
    run(source, "INSERT INTO bank VALUES (1, 'f', 1, 1, 'x', 1, 1, 's', 1, NULL, x'00')")
    with monkeypatch.context() as patch:
        stopped_after(patch, 3)
        with pytest.raises(Stop):
            migrate(source, dest)
    outputs = [str(memos("migrate", dest, new_store("sqlite")).exception)]
    assert f"memos migrate {source} postgresql+psycopg://memos:***@" in outputs[0]
    told = memos("migrate", source, dest)
    assert told.exit_code == 0
    assert "segments" in told.output
    assert "the same" in told.output
    assert "Left, 1 of bank: keys and values" in told.output.replace("\n", " ")
    compared = memos("migrate", source, dest, "--verify-only", "--json")
    data = json.loads(compared.stdout)
    assert (compared.exit_code, data["differences"], data["left"]) == (0, [], {"bank": 1})
    assert data["tables"]["segments"]["rows"] == len(rows_of(source)["segments"])
    run(dest, CHANGES["segments"])
    differing = memos("migrate", source, dest, "--verify-only", "--json")
    assert differing.exit_code == 1
    assert {each["table"] for each in json.loads(differing.stdout)["differences"]} == {"segments"}
    shown = memos("migrate", source, dest, "--verify-only")
    assert shown.exit_code == 1
    assert "DIFFERS" in shown.output
    again = memos("migrate", source, dest)
    assert "holds memories already" in str(again.exception)
    outputs += [each.output + str(each.exception) for each in (told, compared, differing, shown, again)]
    assert not any(password in output for output in outputs)


if __name__ == "__main__":
    killed()
