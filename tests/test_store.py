"""The record store: the contract of ``RecordStore`` and its lexical search, on real databases of both kinds."""

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_os import lexical
from memory_os.adapters.tokenizers import TiktokenCounter
from memory_os.build import open_database
from memory_os.errors import SchemaError, StoreError
from memory_os.lexical import TIME_TERMS, query_terms, stem, terms_of
from memory_os.stores import fulltext
from memory_os.stores import records as records_module
from memory_os.stores.backend import Opening
from memory_os.stores.database import Database, _on_connect
from memory_os.stores.records import Records
from memory_os.stores.schema import metadata
from memory_os.types import NewSegment

ALICE, BOB = ("acme", "alice"), ("acme", "bob")


def count(text: str) -> int:
    return len(text.split())


@pytest.fixture
def store(place):
    opened = Records(open_database(place), count_tokens=count)
    yield opened
    opened.close()


@pytest.fixture
def in_a_file(tmp_path):
    opened = Records(Database(tmp_path / "memory.db"), count_tokens=count)
    yield opened
    opened.close()


def turns(*texts: str, **fields) -> list[NewSegment]:
    return [NewSegment(text, "s", **fields) for text in texts]


def test_what_goes_in_comes_out(store):
    when = datetime(2023, 5, 8, 13, 56, tzinfo=UTC)
    new = NewSegment(
        "héllo\n世界", "s", role="tool", speaker="Ana", kind="document", created_at=when, source="f.md", offset=(3, 9),
        metadata={"dia_id": "D1:3"}, key="k",
    )  # fmt: skip
    [segment] = store.append(ALICE, [new])
    assert store.get(ALICE, [segment.id]) == {segment.id: segment}
    assert store.find(ALICE, str(segment.seq)) == store.find(ALICE, f"#{segment.seq}") == segment
    assert (segment.text, segment.created_at, segment.offset, segment.metadata) == (
        new.text, when, (3, 9), {"dia_id": "D1:3"},
    )  # fmt: skip
    assert segment.n_tokens == 2


def test_seq_is_gapless_per_namespace_and_ids_sort_by_time(store):
    for _ in range(3):
        store.append(ALICE, turns("a", "b"))
        store.append(BOB, turns("c"))
    assert [s.seq for s in store.scan(ALICE)] == [1, 2, 3, 4, 5, 6]
    assert [s.seq for s in store.scan(BOB)] == [1, 2, 3]
    ids = [s.id for s in store.scan(ALICE)]
    assert ids == sorted(ids)
    assert all(id_[14] == "7" for id_ in ids)


def test_a_key_is_stored_once_per_namespace(store):
    assert len(store.append(ALICE, turns("a", key="k") + turns("b", key="k"))) == 1
    assert store.append(ALICE, turns("c", key="k")) == []
    assert len(store.append(BOB, turns("a", key="k"))) == 1


def test_threads_and_processes_share_one_sequence(store, place):
    script = (
        "import sys; from memory_os.build import open_database; from memory_os.stores.records import Records\n"
        "from memory_os.types import NewSegment\n"
        "s = Records(open_database(sys.argv[1]), count_tokens=len)\n"
        "for i in range(40): s.append(('acme', 'alice'), [NewSegment(f'p {i}', 's')])"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, str(place)]) for _ in range(2)]
    threads = [
        threading.Thread(target=lambda: [store.append(ALICE, turns(f"t {i}")) for i in range(40)]) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert [s.seq for s in store.scan(ALICE)] == list(range(1, 161))


def test_nothing_crosses_a_namespace(store):
    hostile = [("a",), ("a", "b"), ("a%",), ("a_",), ("a/b",), ('a","b',), ("A",), ("ａ",)]
    for labels in hostile:
        store.append(labels, turns(f"secret of {labels!r} painting"))
    for labels in hostile:
        [mine] = store.scan(labels)
        assert [id_ for id_, _ in store.search(labels, "secret painting", 10)] == [mine.id]
        others = [s.id for other in hostile if other != labels for s in store.scan(other)]
        assert store.get(labels, others) == {}
        assert store.delete({labels: others}).counts["segments"] == 0
    assert store.find(("nobody",), "1") is None
    assert store.search(("nobody",), "secret", 5) == []


def test_another_namespace_does_not_move_the_scores(store):
    store.append(ALICE, turns("a red kite", "a blue boat", "the kite flew"))
    before = store.search(ALICE, "red kite", 5)
    store.append(BOB, turns(*["red kite"] * 50))
    assert store.search(ALICE, "red kite", 5) == before


def test_tail_and_scan_follow_session_and_bounds(store, monkeypatch):
    monkeypatch.setattr(records_module, "SCAN_PAGE", 2)
    for i in range(6):
        store.append(ALICE, [NewSegment(f"t{i}", "even" if i % 2 == 0 else "odd")])
    assert [s.text for s in store.tail(ALICE, 2)] == ["t4", "t5"]
    assert [s.text for s in store.tail(ALICE, 2, session="even", upto=4)] == ["t0", "t2"]
    assert [s.text for s in store.scan(ALICE, session="odd", after=2)] == ["t3", "t5"]


def test_delete_takes_everything_derived_with_it_and_leaves_the_rest(store):
    kept, gone = store.append(ALICE, turns("keep the boat", "drop the kite"))
    store.put_vectors(ALICE, "f", [kept.id, gone.id], np.eye(2, 4, dtype=np.float32))
    deleted = store.delete({ALICE: [gone.id]})
    assert store.scrub(deleted, index_purged=True)
    assert deleted.counts == {
        "segments": 1, "vectors": 1, "lexical": 1, "summaries": 0, "pending": 0, "scores": 0, "bank": 0, "traces": 0,
        "traces_blanked": 0, "tombstones": 1, "items": 0,
    }  # fmt: skip
    assert store.search(ALICE, "kite", 5) == []
    assert [id_ for id_, _ in store.search(ALICE, "boat", 5)] == [kept.id]
    assert store.read_vectors(ALICE, "f")[0] == [kept.id]
    assert not any(store.check("f").values())
    [new] = store.append(ALICE, turns("later"))
    assert new.seq == 3


def test_vectors_are_pending_until_stored_and_again_when_the_embedder_changes(store):
    segments = store.append(ALICE, turns("a", "b"))
    assert store.count_pending(ALICE, "f") == 2
    store.put_vectors(ALICE, "f", [s.id for s in segments], np.eye(2, 4, dtype=np.float32))
    assert store.pending(ALICE, "f", 9) == []
    assert [s.id for s in store.pending(ALICE, "g", 9)] == [s.id for s in segments]
    store.put_vectors(ALICE, "g", [segments[0].id], np.eye(1, 8, dtype=np.float32))
    assert store.count_pending(ALICE, "g") == 1
    assert store.read_vectors(ALICE, "f")[0] == [segments[1].id]
    store.put_vectors(ALICE, "g", [segments[0].id], np.eye(2, 8, dtype=np.float32)[1:])  # another process came later
    assert store.read_vectors(ALICE, "g")[2].tolist() == np.eye(1, 8).tolist()


# -- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("She was painting the sunrises", "Who painted a sunrise?"),
        ("我昨天去了北京大学看朋友", "北京大学"),
        ("我家有一只猫", "猫"),
        ("昨日、東京タワーに行きました", "東京タワー"),
        ("어제 서울에서 김치를 먹었다", "김치"),
        ("ฉันมีแมวสีดำชื่อมะลิ", "แมวสีดำ"),
        ("Le café était très bon", "cafe"),
        ("मुझे हिन्दी पसंद है", "हिन्दी"),
        ("我用iPhone手机", "iPhone"),
        ("我用iPhone手机", "手机"),
        ("iPhone을 샀다", "iPhone"),
    ],
    ids=[
        "english",
        "chinese",
        "chinese-1",
        "japanese",
        "korean",
        "thai",
        "accents",
        "hindi",
        "letters between",
        "after letters",
        "before a particle",
    ],
)
def test_words_of_every_script_are_found(store, text, query):
    store.append(ALICE, turns("something else entirely", text, "別の話です 다른 이야기 另外的事 อื่น"))
    assert store.search(ALICE, query, 3)[0][0] == store.find(ALICE, "2").id


def test_stop_words_count_only_when_there_is_nothing_else():
    assert query_terms("what did the cat do") == ["cat"]
    assert query_terms("what did you do") == ["what", "did", "you", "do"]


@given(st.text(max_size=80))
def test_terms_never_hold_what_would_split_or_escape_an_entry(text):
    for term in terms_of(text):
        assert term
        assert not any(c.isspace() or c in "\"'()*:^{}+-." for c in term)


def test_bm25_equals_a_hand_computed_value(store):
    """N = 2, avgdl = 2; "kite": df = 1, tf = 1, dl = 2; idf = ln(1 + 1.5 / 1.5) = ln 2; ln 2 * 2.2 / (1 + 1.2)."""
    store.append(ALICE, turns("red kite", "blue boat"))
    [(_, score)] = store.search(ALICE, "kite", 5)
    assert score == pytest.approx(np.log(2.0))


def test_a_term_in_more_segments_than_are_read_still_gets_its_true_weight(store, monkeypatch):
    store.append(ALICE, turns(*["kite common"] * 30, *["boat common"] * 30))
    whole = dict(store.search(ALICE, "kite common", 60))
    monkeypatch.setattr(fulltext, "MAX_POSTINGS", 20)
    capped = dict(store.search(ALICE, "common", 60))
    assert len(capped) == 20
    newest = store.find(ALICE, "60").id
    assert capped[newest] == pytest.approx(whole[newest], rel=0.2)


# -- files -------------------------------------------------------------------------------------------------------------


def test_the_migrations_make_the_tables_that_the_code_uses(in_a_file):
    import sqlalchemy as sa
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with sa.create_engine(f"sqlite:///{in_a_file.database.path}").connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={"include_name": lambda name, kind, _: not (kind == "table" and name.startswith("lexical"))},
        )
        assert compare_metadata(context, metadata) == []


def test_a_newer_schema_is_refused_and_left_alone(in_a_file):
    in_a_file.append(ALICE, turns("a"))
    in_a_file.close()
    with sqlite3.connect(in_a_file.database.path) as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SchemaError, match="upgrade memory-os") as caught:
        Records(Database(in_a_file.database.path), count_tokens=count)
    assert caught.value.found == "9999"
    with sqlite3.connect(in_a_file.database.path) as raw:
        assert raw.execute("SELECT count(*) FROM segments").fetchone() == (1,)


def test_not_a_database_and_no_folder_are_clear_errors(tmp_path):
    (tmp_path / "notes.txt").write_text("this is no database, but long enough to look like a header " * 5)
    with pytest.raises(StoreError, match="not a memory_os database"):
        Records(Database(tmp_path / "notes.txt"), count_tokens=count)
    with pytest.raises(StoreError, match="does not exist; create it first"):
        Records(Database(tmp_path / "no" / "m.db"), count_tokens=count)
    with pytest.raises(StoreError, match="it is a folder"):
        Records(Database(tmp_path), count_tokens=count)


def test_a_full_disk_changes_nothing(in_a_file):
    in_a_file.append(ALICE, turns("before"))
    with in_a_file.database.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    in_a_file.database.engine.dispose()

    def no_room(connection, _):
        connection.execute(f"PRAGMA max_page_count = {pages + 2}")

    import sqlalchemy as sa

    sa.event.listen(in_a_file.database.engine, "connect", no_room)
    with pytest.raises(StoreError, match="disk is full; nothing was changed"):
        in_a_file.append(ALICE, turns(*["x" * 3000] * 40))
    assert [s.text for s in in_a_file.scan(ALICE)] == ["before"]
    [after] = in_a_file.append(ALICE, turns("after"))
    assert after.seq == 2


@contextmanager
def as_an_ordinary_user():
    """Root may write everywhere, so it steps back to nobody."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)


@pytest.mark.parametrize("exists", [False, True], ids=["new", "existing"])
def test_a_read_only_folder_is_one_clear_error(in_a_file, exists):
    folder = Path(tempfile.mkdtemp())  # not below tmp_path, which only its owner may enter
    path = folder / "memory.db"
    if exists:
        Records(Database(path), count_tokens=count).close()
        path.chmod(0o444)
    before = sorted(file.name for file in folder.iterdir())
    folder.chmod(0o555)
    with as_an_ordinary_user(), pytest.raises(StoreError, match=r"cannot be written.*check the permissions"):
        Records(Database(path), count_tokens=count).append(ALICE, turns("more"))
    assert sorted(file.name for file in folder.iterdir()) == before
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_what_sqlite_cannot_read_where_it_lies_is_told_to_be_copied():
    folder = Path(tempfile.mkdtemp())
    path = folder / "memory.db"
    Records(Database(path), count_tokens=count).close()
    folder.chmod(0o555)
    with as_an_ordinary_user(), pytest.raises(StoreError, match=r"cannot be read where it is.*name the copy"):
        Database(path, Opening.READ)
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_of_several_that_turn_to_the_log_at_once_none_fails():
    """SQLite refuses at once where two would wait for each other."""
    answers = iter(["database is locked"] * 4)

    class Connection:
        def execute(self, sql: str) -> None:
            if sql.endswith("WAL") and (problem := next(answers, None)):
                raise sqlite3.OperationalError(problem)

    _on_connect(Connection(), None)
    assert next(answers, None) is None


def test_durability_settings_hold_on_every_connection(in_a_file):
    with in_a_file.database.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one() == 60_000


@given(st.text(alphabet=st.characters(max_codepoint=127), max_size=60))
def test_terms_of_plain_text_are_those_of_any_text(text):
    anything = [stem(run) for _, run in lexical._words(text)]
    assert terms_of(text) == anything


def test_a_long_list_is_stored_as_its_segments_one_by_one(tmp_path):
    texts = [f"Text {i} of Zoë, 東京 or {'<|endoftext|>' if i % 50 == 0 else 'plain'} words." for i in range(600)]
    new = [NewSegment(text, f"s{i % 3}", metadata={"i": i} if i % 2 else {}) for i, text in enumerate(texts)]
    counter = TiktokenCounter("cl100k_base")
    stores = [
        Records(open_database(tmp_path / f"{n}.db"), count_tokens=counter.count_text, count_many=counter.count_texts)
        for n in range(2)
    ]
    stores[0].append(ALICE, new)
    for each in new:
        stores[1].append(ALICE, [each])
    (one, other) = ([(s.seq, s.text, s.n_tokens, s.metadata) for s in store.scan(ALICE)] for store in stores)
    assert one == other
    profiles = [store.read_profiles(ALICE)._replace(rows=0, ids=(), days=()) for store in stores]
    assert profiles[0] == profiles[1]
    assert [store.count_pending(ALICE, "f") for store in stores] == [600, 600]
    assert [store.search(ALICE, "Zoe 7", 5)[0][1] for store in stores] == [
        stores[0].search(ALICE, "Zoe 7", 5)[0][1]
    ] * 2
    for store in stores:
        store.close()


@pytest.mark.parametrize("few", [1, 400])
def test_what_recall_is_told_of_segments_is_what_their_terms_say(store, monkeypatch, few):
    monkeypatch.setattr(fulltext, "FEW", few)
    texts = ["a kite, a boat and a kite", "", "We met in 1999", "yesterday? ", "今天 北京", "word " * 20_000, "2100?"]
    texts.append("f" * 40_000)  # FTS5 cuts it
    store.append(("other",), [NewSegment(text, "s") for text in texts])
    stored = store.append(ALICE, [NewSegment(text, "s") for text in texts])
    store.delete({ALICE: [stored[0].id]})
    store.append(ALICE, [NewSegment("the kite " * 70, "s")])
    terms = {segment.seq: terms_of(segment.text) for segment in store.scan(ALICE)}
    for after in (0, 4, 7):
        told = store.read_profiles(ALICE, int(store.read_profiles(ALICE).rows[after - 1]) if after else 0)
        assert list(told.seqs) == list(terms)[after:]
        assert told.n_terms == [len(terms[seq]) for seq in told.seqs]
        assert told.timed == [not TIME_TERMS.isdisjoint(terms[seq]) for seq in told.seqs]
        assert list(told.asks) == [store.find(ALICE, seq).text.rstrip().endswith("?") for seq in told.seqs]
    seq_of = dict(zip(store.read_profiles(ALICE).rows.tolist(), terms, strict=True))
    wanted = ["kite", "word", "京", "unheard", "f" * 40_000]
    found = store.postings(ALICE, wanted)
    assert {term: [seq_of[row] for row in rows.tolist()] for term, rows in found.items()} == {
        term: [seq for seq, those in terms.items() for each in those if each == term] for term in wanted
    }


@pytest.mark.parametrize("which", [(0, 2), (3, 1), (1, 2, 3), (4,)])
def test_vectors_strike_off_their_own_work_and_no_other(store, which):
    stored = store.append(ALICE, turns("a", "b", "c", "d", "e"))
    store.put_vectors(ALICE, "old", [segment.id for segment in stored], np.eye(5, dtype=np.float32))
    chosen = [stored[i].id for i in which]
    assert store.put_vectors(ALICE, "new", chosen, np.eye(5, dtype=np.float32)[list(which)]) == len(which)
    assert store.put_vectors(ALICE, "new", chosen, np.eye(5, dtype=np.float32)[list(which)]) == 0
    for name, ids in ("new", chosen), ("old", [segment.id for segment in stored if segment.id not in chosen]):
        assert sorted(store.read_vectors(ALICE, name)[0]) == sorted(ids)
    for segment, vector in zip(*store.vectors_of(ALICE, "new", chosen)[::2], strict=True):
        assert vector[[each.id for each in stored].index(segment)] == 1.0
    more = store.append(ALICE, turns("f", "g", "h"))
    store.put_vectors(ALICE, "new", [more[0].id, more[2].id], np.eye(5, dtype=np.float32)[:2])
    assert [segment.id for segment in store.pending(ALICE, "new", 9, stale=False)] == [more[1].id]
