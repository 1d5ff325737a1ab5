"""Databases of every earlier schema, as the code of that time wrote them, open with this version; newer ones do not.

``fixtures/revision-0001.sql`` and so on are dumps of databases that were filled by the last commit of each revision.
"""

import hashlib
import logging
import resource
import shutil
import sqlite3
import threading
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from memory_os import Memory
from memory_os.adapters.scripted import HashEmbedder, ScriptedLLM
from memory_os.errors import SchemaError, StoreError
from memory_os.stores.database import Database
from memory_os.stores.schema import HEAD

FIXTURES = {path.stem.removeprefix("revision-"): path for path in (Path(__file__).parent / "fixtures").glob("*.sql")}
OLDER = sorted(revision for revision in FIXTURES if revision != HEAD)
ALICE, XIAO = ("acme", "alice"), ("小明", "a%_b")
CONTENT = {
    "namespaces": "labels, last_seq", "segments": "*", "vectors": "*", "traces": "*", "lexical": "rowid, terms",
    "summaries": "*", "activations": "*", "scores": "*", "bank": "*", "items": "*", "item_texts": "*",
    "tombstones": "*", "sqlite_sequence": "*",
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "memory.db"


def build(path: Path, revision: str) -> None:
    with closing(sqlite3.connect(path)) as raw:
        raw.executescript(FIXTURES[revision].read_text("utf-8"))
        raw.execute("PRAGMA journal_mode = WAL")


def opened(path: Path, **options) -> Memory:
    return Memory.open(path, **{"embedder": HashEmbedder(8), "llm": ScriptedLLM(["Under the red stone."]), **options})


def revision_of(path: Path) -> str:
    with closing(sqlite3.connect(path)) as raw:
        return raw.execute("SELECT version_num FROM alembic_version").fetchone()[0]


def content(path: Path) -> dict[str, list[dict]]:
    """Every row of every table that there is."""
    with closing(sqlite3.connect(path)) as raw:
        raw.row_factory = sqlite3.Row
        assert [*map(tuple, raw.execute("PRAGMA integrity_check"))] == [("ok",)]
        tables = {name for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        return {
            table: [dict(row) for row in raw.execute(f"SELECT {columns} FROM {table} ORDER BY 1, 2")]
            for table, columns in CONTENT.items()
            if table in tables
        }


def keeps(after: dict[str, list[dict]], before: dict[str, list[dict]]) -> None:
    """Whatever stood there stands there still; tables and columns may have been added, and terms mended."""
    now_apart = ("2_iphone手机", "2_iphon 2_手机 2_手 2_机")
    mended = [{**row, "terms": row["terms"].replace(*now_apart)} for row in before["lexical"]]
    for table, rows in {**before, "lexical": mended}.items():
        assert [{name: row[name] for name in old} for row, old in zip(after[table], rows, strict=True)] == rows, table


def copies(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir() if ".before-" in file.name)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def no_file_beyond(n_bytes: int):
    """A disk on which no file can be written beyond this size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# -- the history -------------------------------------------------------------------------------------------------------


def test_every_earlier_revision_has_a_fixture_and_its_step_was_never_edited(tmp_path):
    """The tables in the dumps are as the code of that time made them, and as the steps make them today."""
    import sqlalchemy as sa
    from alembic.command import upgrade
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", "memory_os.stores:migrations")
    history = {step.revision for step in ScriptDirectory.from_config(config).walk_revisions()}
    assert history - {HEAD} <= set(FIXTURES) <= history

    def schema(file: Path) -> dict[str, str]:
        with closing(sqlite3.connect(file)) as raw:
            return dict(raw.execute("SELECT name, trim(sql) FROM sqlite_master WHERE sql IS NOT NULL"))

    for revision in FIXTURES:
        then, now = tmp_path / f"then-{revision}.db", tmp_path / f"now-{revision}.db"
        build(then, revision)
        engine = sa.create_engine(f"sqlite:///{now}")
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            upgrade(config, revision)
        engine.dispose()
        assert schema(now) == schema(then), f"the steps up to {revision} make other tables than they did"


# -- upgrading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", sorted(FIXTURES))
def test_an_old_database_is_copied_and_upgraded_and_everything_in_it_works(path, revision, caplog):
    build(path, revision)
    before = content(path)
    with caplog.at_level(logging.WARNING, "memory_os"), opened(path) as memory:
        assert revision_of(path) == HEAD
        keeps(content(path), before)
        copy = path.with_name(f"{path.name}.before-{HEAD}")
        assert copies(path) == ([copy.name] if revision in OLDER else [])
        if revision in OLDER:
            assert (revision_of(copy), content(copy)) == (revision, before)
            assert f"upgraded from schema revision {revision} to {HEAD}; delete {copy.name}" in caplog.text

        alice, xiao = memory.namespace(*ALICE), memory.namespace(*XIAO)
        assert memory.namespaces() == [ALICE, XIAO]
        assert [s.seq for s in alice.history()] == [1, 2, 4, 5, 6, 7]
        assert alice.segment(1).metadata == {"dia_id": "D1:1"}
        assert (alice.segment(4).source, alice.segment(4).offset) == ("notes.md", (0, 52))
        for scope, query, text in (
            (alice, "北京大学", "我昨天去了北京大学看朋友。"),
            (alice, "harbour museum", "The harbour museum opens at nine."),
            (xiao, "東京タワー", "昨日、東京タワーに行きました。"),
            (xiao, "김치", "서울에서 김치를 먹었다"),
        ):
            assert scope.search(query, k=1)[0].segment.text == text
        if revision >= "0007":
            for query in ("iPhone", "手机"):
                assert [id_ for id_, _ in memory.parts.store.search(XIAO, query, 1)] == [xiao.segment(3).id]
        trace, _ = alice.why(5)
        assert (trace.query, alice.segment(trace.reply_id).text) == ("What is my cat called?", "Miso is your cat.")
        assert {entry.seq for entry in trace.ledger} == {1, 2, 3, 4}
        assert "red stone" in alice.context("Where is the key to the boat?").text
        if revision >= "0003":
            ids = [alice.segment(4).id]
            assert memory.parts.store.read_summaries(ALICE, ids, "scripted v1") == {ids[0]: "Where the key lies."}
        if revision >= "0006":
            assert alice.items.get(("profile", "pets"), "猫").value == {"name": "Miso", "年": 3}

        memory.repair()
        assert not any(memory.check().values())
        assert (
            alice.session("now").chat("Where is the key?").segment.seq == 9
        )  # the numbers of the forgotten stay taken
        assert alice.ingest(_notes(), format="markdown", name="notes.md") == (0, 1)
    opened(path).close()
    assert copies(path) == ([copy.name] if revision in OLDER else [])


def _notes():
    import io

    return io.BytesIO(b"# Keys\n\nThe key to the boat is under the red stone.\n")


@pytest.mark.parametrize("revision", sorted(FIXTURES))
def test_another_embedder_makes_all_vectors_of_an_old_database_anew(path, revision):
    build(path, revision)
    with opened(path, embedder=HashEmbedder(16)) as memory:
        memory.repair()
        assert not any(memory.check().values())
        assert memory.namespace(*ALICE).nearest("The key to the boat is under the red stone.", k=1)[0].segment.seq == 4
        assert memory.namespace(*ALICE).stats()["vectors"] == 6


def test_the_copy_can_be_put_back_and_a_second_upgrade_keeps_the_first_copy(path):
    build(path, "0001")
    with opened(path) as memory:
        memory.namespace(*ALICE).add("said after the first upgrade")
    first = path.with_name(f"{path.name}.before-{HEAD}")
    untouched = digest(first)
    shutil.copy(first, path)
    opened(path).close()
    assert revision_of(path) == HEAD
    assert copies(path) == [first.name]  # the same content: it is its own copy
    shutil.copy(first, path)
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("UPDATE segments SET speaker = 'Ana' WHERE pk = 1")
        raw.commit()
    opened(path).close()
    assert copies(path) == [first.name, f"{first.name}.2"]
    assert digest(first) == untouched
    assert content(path.with_name(f"{first.name}.2"))["segments"][0]["speaker"] == "Ana"


def test_the_copy_is_as_private_as_the_database(path):
    build(path, "0002")
    path.chmod(0o600)
    opened(path).close()
    assert path.with_name(f"{path.name}.before-{HEAD}").stat().st_mode & 0o777 == 0o600


def test_what_stands_in_the_log_only_is_in_the_copy(path):
    build(path, "0003")
    with closing(sqlite3.connect(path)) as other:  # as long as it is open, nothing moves from the log to the file
        other.execute("UPDATE segments SET speaker = 'Ana' WHERE pk = 1")
        other.commit()
        assert Path(f"{path}-wal").stat().st_size
        opened(path).close()
    assert content(path.with_name(f"{path.name}.before-{HEAD}"))["segments"][0]["speaker"] == "Ana"


def test_a_database_without_content_is_upgraded_without_a_copy(path):
    build(path, "0001")
    with closing(sqlite3.connect(path)) as raw:
        for table in ("vectors", "pending", "traces", "lexical", "segments", "namespaces"):
            raw.execute(f"DELETE FROM {table}")
        raw.commit()
    opened(path).close()
    assert (revision_of(path), copies(path)) == (HEAD, [])


def test_without_a_copy_there_is_no_upgrade(path):
    build(path, "0001")
    before = content(path)
    whole = path.stat().st_size
    for limit in (0, whole // 2):
        # below half: not even the database's own log can be written, above: the copy ends in the middle
        with no_file_beyond(limit), pytest.raises(StoreError, match=r"full|free some space") as caught:
            opened(path)
        assert (revision_of(path), content(path)) == ("0001", before)
        assert copies(path) == []
    assert f"{path.name}.before-{HEAD}, cannot be written" in str(caught.value)
    assert "free some space, check the permissions of the folder, and open it again" in str(caught.value)
    path.with_name(f"{path.name}.before-{HEAD}.tmp").write_text("left by a kill")
    opened(path).close()
    assert revision_of(path) == HEAD
    assert copies(path) == [f"{path.name}.before-{HEAD}"]


def test_of_several_that_open_an_old_database_at_once_one_upgrades_it(path):
    build(path, "0001")
    errors: list[Exception] = []
    together = threading.Barrier(4)

    def work():
        together.wait()
        try:
            Database(path).close()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert (revision_of(path), copies(path)) == (HEAD, [f"{path.name}.before-{HEAD}"])


# -- refusing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newer", ["9999", "0008-of-somebody-else"])
def test_a_newer_database_is_refused_and_not_touched(path, newer):
    build(path, "0007")
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("UPDATE alembic_version SET version_num = ?", (newer,))
        raw.execute("ALTER TABLE segments ADD COLUMN added_later TEXT DEFAULT 'later'")
        raw.commit()
    untouched = digest(path)
    with pytest.raises(SchemaError, match="upgrade memory-os") as caught:
        opened(path)
    assert (caught.value.found, caught.value.newest) == (newer, HEAD)
    assert digest(path) == untouched
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("mine", ["0005", OLDER[-1]])
def test_a_process_whose_package_was_upgraded_on_the_disk_keeps_off_what_is_newer_than_itself(path, monkeypatch, mine):
    """The steps on the disk know the database's revision then; the code that runs does not."""
    with opened(path) as memory:
        memory.namespace(*ALICE).add("The key is under the red stone.")
    before = digest(path)
    monkeypatch.setattr("memory_os.stores.database.HEAD", mine)
    with pytest.raises(SchemaError, match="upgrade memory-os") as caught:
        Database(path)
    assert (caught.value.found, caught.value.newest) == (HEAD, mine)
    assert digest(path) == before
    assert copies(path) == []
    # and what is older it brings up to its own revision, and no further
    older = path.with_name("older.db")
    build(older, "0001")
    Database(older).close()
    assert revision_of(older) == mine
