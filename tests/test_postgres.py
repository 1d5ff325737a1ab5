"""What is PostgreSQL's own: policies, lost connections, clear errors, migrations, VACUUM, pgvector's graph.

What it has in common with SQLite is held by the suites of the store, the indexes, items, concurrency, isolation and
forgetting, which run on both.
"""

import json
import logging
import os
import re
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np
import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from memory_os import Memory
from memory_os.adapters.scripted import HashEmbedder, ScriptedLLM
from memory_os.address import DatabaseUrl, without_password
from memory_os.cli.main import app
from memory_os.errors import ConfigError, InvalidInputError, SchemaError, StoreError
from memory_os.stores import backend, pgvector
from memory_os.stores import postgres as postgres_module
from memory_os.stores.namespaces import claim
from memory_os.stores.partitions import PARTITIONS, part_of
from memory_os.stores.pgvector import PgVectorIndex
from memory_os.stores.postgres import Postgres
from memory_os.stores.records import Records
from memory_os.stores.schema import metadata
from memory_os.types import NewSegment

ALICE, BOB = ("acme", "alice"), ("acme", "bob")
PASSWORD = "p%25w"
COMMIT = b"COMMIT\0"  # the statement, and not the COMMITTED of another


@pytest.fixture
def url(postgres_server):
    return postgres_server.url(postgres_server.new())


@pytest.fixture
def store(url):
    opened = Records(Postgres(url), count_tokens=len)
    yield opened
    opened.close()


@pytest.fixture
def far(url, postgres_server, network):
    """A store at the other end of a network that can be cut."""
    opened = Records(Postgres(url.replace(str(postgres_server.port), str(network.port))), count_tokens=len)
    yield opened
    opened.close()


def name_of(url: str) -> str:
    return url.rpartition("/")[2]


def texts(store: Records, namespace) -> list[str]:
    return [segment.text for segment in store.scan(namespace)]


def add(store: Records, namespace, *said: str) -> list[str]:
    return [segment.id for segment in store.append(namespace, [NewSegment(text, "s") for text in said])]


# -- row-level security ------------------------------------------------------------------------------------------------


def test_a_query_without_where_sees_nothing_of_another_namespace(postgres_server, url):
    """As an ordinary role that may read and write every table, with SQL of its own."""
    with Memory.open(url, embedder="hash", llm=ScriptedLLM(lambda _: "Noted."), vectors="pgvector") as memory:
        for labels in (ALICE, BOB):
            scope = memory.namespace(*labels)
            scope.chat(f"The kite of {labels[-1]}.")
            scope.session("later").chat("Where is the kite?")
            scope.items.put(("p",), "k", {"of": labels[-1]}, texts=[("of", labels[-1])])
            scope.forget(scope.add("gone").id)
            scope.nearest("kite")
            store = memory.parts.store
            store.put_summary(labels, scope.history()[0].id, "m", labels[-1])
            store.put_scores(labels, {"k": labels[-1]}, epoch=store.state(labels, "f").epoch)
    name = name_of(url)
    reader = f"reader_{name}"
    postgres_server.admin(
        f"CREATE ROLE {reader} LOGIN PASSWORD 'r'",
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {reader}",
        database=name,
    )
    engine = sa.create_engine(postgres_server.url(name, reader, "r"))
    try:
        with engine.connect() as connection:
            tables = [
                table
                for table in sa.inspect(connection).get_table_names()
                if "namespace_id" in tuple(connection.exec_driver_sql(f"SELECT * FROM {table} LIMIT 0").keys())
            ]

            def seen(table: str) -> list:
                return connection.exec_driver_sql(f"SELECT namespace_id FROM {table}").scalars().all()

            def told(labels) -> None:
                connection.exec_driver_sql(f"SET memos.namespace = '{labels}'")

            assert {table: seen(table) for table in tables if seen(table)} == {}  # who names none, sees none
            assert connection.exec_driver_sql("SELECT * FROM namespaces").all() == []
            told(json.dumps(ALICE))
            [(mine, labels)] = connection.exec_driver_sql("SELECT id, labels FROM namespaces").all()
            assert json.loads(labels) == list(ALICE)
            assert all(set(seen(table)) <= {mine} for table in tables)
            held = {table for table in tables if seen(table)}
            nothing_there, of_all = {"bank", "claims", "pending"}, {"namespaces", "store", "workers"}
            assert {table.name for table in metadata.sorted_tables} - nothing_there - of_all <= held
            assert {"lexical", "postings", "near"} <= held
            assert any(table.startswith("near_") and "_p" in table for table in held)  # a partition by its own name
            assert connection.exec_driver_sql("SELECT text FROM segments WHERE text LIKE '%%bob%%'").all() == []
            assert connection.exec_driver_sql("UPDATE segments SET speaker = 'me'").rowcount == 4
            told("*")
            [other] = set(seen("segments")) - {mine}
            told(json.dumps(ALICE))
            with pytest.raises(sa.exc.ProgrammingError, match="row-level security"):
                connection.exec_driver_sql(
                    f"INSERT INTO scores (namespace_id, key, value) VALUES ({other}, 'mine', '1')"
                )
    finally:
        engine.dispose()


def test_the_stores_own_connection_sees_one_namespace_too(store):
    """With a statement in which the condition was forgotten, through the store's own doors."""
    for labels in (ALICE, BOB):
        add(store, labels, f"kite of {labels}")
    everything = sa.text("SELECT text FROM segments")
    for labels in (ALICE, BOB):
        for door in (store.database.read, store.database.write):
            with door(labels) as connection:
                assert connection.execute(everything).scalars().all() == [f"kite of {labels}"]
    with store.database.read() as connection:
        assert len(connection.execute(everything).all()) == 2
    assert add(store, ("new",), "first")  # a namespace that nobody has named before


# -- keys and partitions -----------------------------------------------------------------------------------------------


def test_every_unique_key_holds_the_namespace_and_a_namespace_lies_in_one_partition(url):
    with Memory.open(url, embedder="hash", vectors="pgvector") as memory:
        for n in range(40):
            memory.namespace(str(n)).add("kite")
            memory.namespace(str(n)).nearest("kite")
        with memory.parts.store.database.read() as connection:
            keys = connection.exec_driver_sql(
                "SELECT c.relname, pg_get_indexdef(i.indexrelid) FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid "
                "WHERE i.indisunique AND c.relnamespace = 'public'::regnamespace"
            ).all()
            assert len(keys) > 100
            others = {table for table, made in keys if "(namespace_id" not in made}
            # of which every machine has a copy
            assert others == {"namespaces", "alembic_version", "store", "workers"}
            for table in ("segments", "vectors", "lexical", "postings"):
                where = connection.exec_driver_sql(f"SELECT namespace_id, tableoid::regclass::text FROM {table}").all()
                assert len({ns for ns, _ in where}) == 40
                assert len({place for _, place in where}) > PARTITIONS // 2
                assert all(place == f"{table}_p{part_of(connection, ns)}" for ns, place in where)


def test_a_statement_reads_one_partition(store):
    """What is asked by row is asked by namespace too: the plan names no other partition."""
    ids = add(store, ALICE, *["the kite is red"] * 3)
    store.put_vectors(ALICE, "f", ids, np.eye(3, 4, dtype=np.float32))
    asked = []

    @sa.event.listens_for(store.database._reader, "before_cursor_execute")
    def listen(connection, cursor, statement, parameters, *_):
        if re.search(r"(FROM|JOIN) (segments|vectors|lexical|postings)", statement):
            asked.append((statement, parameters))

    store.search(ALICE, "red kite", 2)
    store.read_vectors(ALICE, "f")
    store.get(ALICE, ids)
    store.state(ALICE, "f")
    store.tail(ALICE, 2)
    store.read_profiles(ALICE)
    store.pending(ALICE, "g", 5)
    store.listed_for_summary(ALICE, 5)
    assert len(asked) > 10
    sa.event.remove(store.database._reader, "before_cursor_execute", listen)
    with store.database.read(ALICE) as connection:
        for statement, parameters in asked:
            plan = "\n".join(
                row[0].decode() if isinstance(row[0], bytes) else row[0]
                for row in connection.exec_driver_sql(f"EXPLAIN {statement}", parameters)
            )
            parts = {word.partition("_p")[2] for word in plan.replace("(", " ").split() if "_p" in word and
                     word.startswith(("segments_p", "vectors_p", "lexical_p", "postings_p"))}  # fmt: skip
            assert len({part.partition("_")[0] for part in parts}) == 1, plan
            assert "Bitmap" not in plan  # a namespace's last row is found without all the others


def test_the_migrations_make_the_tables_that_the_code_uses(url):
    with sa.create_engine(url, poolclass=sa.NullPool).connect() as connection:
        inspector = sa.inspect(connection)
        for table in metadata.sorted_tables:
            made = {column["name"]: column for column in inspector.get_columns(table.name)}
            assert {c.name: c.nullable for c in table.columns} == {n: c["nullable"] for n, c in made.items()}, table
            for column in table.columns:
                assert made[column.name]["type"].python_type in (column.type.python_type, dict), column
            indexes = {index["name"] for index in inspector.get_indexes(table.name) if not index["unique"]}
            # the one that is not made is the primary key here
            assert {index.name for index in table.indexes} - {"ix_activations_namespace"} == indexes, table


# -- writers -----------------------------------------------------------------------------------------------------------


def test_a_writer_keeps_only_its_own_namespace_waiting(store):
    add(store, ALICE, "first")
    with store.database.write(ALICE) as connection:
        claim(connection, ALICE)
        waiting = threading.Thread(target=add, args=(store, ALICE, "second"))
        waiting.start()
        add(store, BOB, "at once")
        waiting.join(0.3)
        assert waiting.is_alive()
        assert texts(store, BOB) == ["at once"]
        assert texts(store, ALICE) == ["first"]  # who reads waits for nobody
    waiting.join()
    assert texts(store, ALICE) == ["first", "second"]


def test_rows_become_visible_in_the_order_of_their_numbers(store):
    """On this rests whoever reads what was added since: vectors of two writers, the first of whom is slow."""
    ids = add(store, ALICE, "a", "b")
    begun, go_on = threading.Event(), threading.Event()
    inner = store.database.write

    @contextmanager
    def slow(namespace=None):
        with inner(namespace) as connection:
            yield connection
            begun.set()
            go_on.wait(10)

    store.database.write = slow
    first = threading.Thread(target=store.put_vectors, args=(ALICE, "f", ids[:1], np.eye(1, 4, dtype=np.float32)))
    first.start()
    assert begun.wait(10)
    store.database.write = inner
    second = threading.Thread(target=store.put_vectors, args=(ALICE, "f", ids[1:], np.eye(1, 4, dtype=np.float32)))
    second.start()
    time.sleep(0.2)
    assert store.vector_epoch(ALICE, "f")[1] == 0  # not the second's alone: its number is higher
    go_on.set()
    first.join()
    second.join()
    assert store.read_vectors(ALICE, "f")[0] == ids


# -- what is tried again -----------------------------------------------------------------------------------------------


class Cut:
    """A network between client and server that breaks when the client has said a word."""

    def __init__(self, port: int) -> None:
        self.to = port
        self.word: bytes | None = None
        self.heard = False  # whether the server gets the word, and only its answer is lost
        self.n_cut = 0
        self.then_refuses = False
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.open: list[socket.socket] = []
        self.deaf: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.socket.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.to))
            self.open += [client, server]
            threading.Thread(target=self._carry, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._carry, args=(server, client, False), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, from_client: bool) -> None:
        try:
            while said := source.recv(65536):
                if from_client and self.word and self.word in said:
                    self.word = None
                    self.n_cut += 1
                    if self.heard:
                        self.deaf.add(target)
                        target.sendall(said)
                        time.sleep(0.3)
                    break
                if source not in self.deaf:  # the client hears no more
                    target.sendall(said)
        except OSError:
            pass
        if self.n_cut and self.then_refuses:
            self.close()
        _cut(source, target)

    def close(self) -> None:
        _cut(self.socket, *self.open)


def _cut(*sockets: socket.socket) -> None:
    for each in sockets:
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)  # closing alone waits for who reads from it
        each.close()


@pytest.fixture
def network(postgres_server):
    cut = Cut(postgres_server.port)
    yield cut
    cut.close()


@pytest.mark.parametrize("heard", [True, False], ids=["the answer is lost", "the word is lost"])
@pytest.mark.parametrize("word", [COMMIT, b"INSERT INTO segments", b"pending", b"memos.namespace"])
def test_a_connection_that_is_lost_stores_nothing_twice_and_loses_nothing(far, network, word, heard):
    add(far, ALICE, "before")
    network.word, network.heard = word, heard
    [id_] = add(far, ALICE, "said once")
    assert network.n_cut == 1
    assert texts(far, ALICE) == ["before", "said once"]
    assert [segment.seq for segment in far.scan(ALICE)] == [1, 2]
    assert far.find(ALICE, "2").id == id_
    network.word = b"SELECT"
    assert list(far.get(ALICE, [id_])) == [id_]  # a reader's too
    assert network.n_cut == 2


def test_what_the_server_undid_is_tried_again_and_no_more_than_that(store):
    add(store, ALICE, "before")
    fail = """CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF nextval('tries') % 3 > 0 THEN RAISE EXCEPTION 'no luck' USING ERRCODE = '{}'; END IF; RETURN NEW; END $$"""
    with store.database.write() as connection:
        connection.exec_driver_sql("CREATE SEQUENCE tries")  # which counts on, whatever is undone
        connection.execute(sa.text(fail.format("40P01")))
        connection.exec_driver_sql("CREATE TRIGGER f BEFORE INSERT ON segments FOR EACH ROW EXECUTE FUNCTION fail()")
    add(store, ALICE, "at the third time")
    assert texts(store, ALICE) == ["before", "at the third time"]
    with store.database.write() as connection:
        connection.execute(sa.text(fail.format("P0001").replace("CREATE", "CREATE OR REPLACE")))
    with pytest.raises(StoreError, match="no luck; nothing was changed"):
        add(store, ALICE, "never")
    assert texts(store, ALICE) == ["before", "at the third time"]


def test_who_was_thrown_out_while_idle_does_not_notice(postgres_server, url, store):
    add(store, ALICE, "before")
    gone = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name_of(url)}'"
    assert len(postgres_server.admin(gone)) >= 2
    time.sleep(0.2)
    assert texts(store, ALICE) == ["before"]
    add(store, ALICE, "after")
    assert texts(store, ALICE) == ["before", "after"]


def test_a_server_that_stays_away_is_one_clear_error(far, network, monkeypatch):
    monkeypatch.setattr(backend, "PATIENCE_S", 0.5)
    monkeypatch.setattr(postgres_module, "PATIENCE_S", 0.5)
    add(far, ALICE, "before")
    network.close()
    with pytest.raises(StoreError, match=r"does not answer.*see that it runs.*nothing was changed"):
        add(far, ALICE, "never")


def test_nobody_says_stored_or_not_stored_where_nobody_knows(far, network, monkeypatch):
    monkeypatch.setattr(postgres_module, "PATIENCE_S", 0.5)
    add(far, ALICE, "before")
    network.word, network.then_refuses = COMMIT, True
    with pytest.raises(StoreError, match="cannot be asked whether it was; look for it"):
        add(far, ALICE, "perhaps")


@pytest.mark.slow
@pytest.mark.parametrize("other", ["meanwhile", "never"])
def test_a_crashed_server_that_gives_a_number_twice_does_not_pass_for_one_that_stored(own_postgres, other):
    """Of the first transaction nothing had reached the disk, so that another one gets its number, and commits."""
    own_postgres.admin("ALTER SYSTEM SET wal_writer_delay = '10s'", "SELECT pg_reload_conf()")
    url = own_postgres.url(own_postgres.new())
    one, two = (Records(Postgres(url), count_tokens=len) for _ in range(2))
    add(one, ALICE, "before")
    add(two, BOB, "before")
    inner = one.database.write
    numbers: list[str] = []
    number = "SELECT CAST(pg_current_xact_id() AS text)"

    @contextmanager
    def crashing(namespace):
        with two.database._reader.connect() as watch, inner(namespace) as connection:
            yield connection
            one.database.write = inner
            numbers[:] = [connection.exec_driver_sql(number).scalar_one()]
            os.kill(connection.connection.driver_connection.info.backend_pid, signal.SIGKILL)
            with suppress(sa.exc.DBAPIError):
                while True:  # until the server has noticed, and thrown everybody out
                    watch.exec_driver_sql("SELECT 1")
            while other == "meanwhile" and len(numbers) == 1:
                with suppress(StoreError), two.database.write(BOB) as next_one:
                    claim(next_one, BOB)
                    numbers.append(next_one.exec_driver_sql(number).scalar_one())

    stored, n_given_twice = ["before"], 0
    while n_given_twice == 0:  # or something had reached the disk all the same, and there is nothing to be seen
        one.database.write = crashing
        said = f"after {len(stored)}"
        told = ""
        try:
            add(one, ALICE, said)
            stored.append(said)
        except StoreError as error:
            told = str(error)
        assert ("cannot be asked whether it was; look for it" in told) == (numbers[0] in numbers[1:]), told
        assert texts(one, ALICE) == stored
        n_given_twice += other == "never" or numbers[0] in numbers[1:]
        assert len(stored) < 9
    one.close()
    two.close()


# -- a pooler between client and server ------------------------------------------------------------------------------


def test_nothing_is_kept_in_a_connection_that_a_pooler_may_give_to_another(url, store):
    """What is set is set for a transaction, nothing is prepared, and nothing is asked for as a connection begins."""
    add(store, ALICE, "kite")
    asked = "SELECT current_setting('lock_timeout'), current_setting('idle_in_transaction_session_timeout')"
    for door in (store.database.read, store.database.write):
        for _ in range(20):
            with door(ALICE) as connection:
                limits = connection.exec_driver_sql(asked).one()
        assert tuple(limits) == ("1min", "1min")
    for engine in (store.database._reader, store.database._writer):
        with engine.connect() as connection:
            assert tuple(connection.exec_driver_sql(asked).one()) == ("0", "0")
            assert connection.exec_driver_sql("SELECT current_setting('memos.namespace', true)").scalar() in (None, "")
            assert connection.exec_driver_sql("SELECT count(*) FROM pg_prepared_statements").scalar() == 0
            assert not connection.connection.driver_connection.info.get_parameters().get("options")


@pytest.mark.parametrize("vectors", ["exact", "pgvector"])
def test_behind_a_pooler_of_transactions_all_goes_as_without(postgres_server, pooler, url, vectors):
    failed: list[BaseException] = []
    with Memory.open(url.replace(str(postgres_server.port), str(pooler)), embedder="hash", vectors=vectors) as memory:

        def work(n: int) -> None:
            try:
                scope = memory.namespace(str(n % 3))
                for i in range(8):
                    added = scope.add(f"kite {n} of {i}")
                    assert added in [hit.segment for hit in scope.nearest(added.text, k=50)]
                    assert added in [hit.segment for hit in scope.search(added.text, k=50)]
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        assert [segment.seq for segment in memory.namespace("1").history(99)] == list(range(1, 25))
        assert memory.namespace("1").forget(everything=True)["unfinished"] == 0


# -- clear errors ------------------------------------------------------------------------------------------------------


def test_what_keeps_from_connecting_is_one_clear_error_without_the_password(postgres_server, url, caplog):
    name = name_of(url)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"postgresql+psycopg://memos:secret-pw@127.0.0.1:{taken.getsockname()[1]}/{name}"
        cases = [
            (nobody, "does not answer.*see that it runs, and that host and port are right"),
            (postgres_server.url(name, password="secret-pw"), "user or password is wrong; correct the URL"),
            (postgres_server.url(name, user="nobody", password="secret-pw"), "user or password is wrong"),
            (postgres_server.url("nowhere"), "no such database; make it: createdb"),
            (f"postgresql+psycopg://memos@127.0.0.1:{postgres_server.port}/{name}", "wants a password"),
        ]
        for address, problem in cases:
            with caplog.at_level(logging.DEBUG), pytest.raises(StoreError, match=problem) as caught:
                Memory.open(address, embedder="hash")
            shown = repr(caught.value) + str(caught.value.__cause__) + caplog.text
            assert "secret-pw" not in shown
            assert "p%25w" not in shown
    with pytest.raises(StoreError, match=r"give a file's path.*postgresql") as caught:
        Memory.open("mysql://me:secret-pw@host/db")
    assert "secret-pw" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (lambda url: re.sub(r":\d+/", ":port/", url), "cannot open .*the port in digits"),
        (lambda url: re.sub(r":\d+/", ":/", url), "cannot open .*the port in digits"),
        (lambda url: f"{url}?autocommit=true", "has no setting 'autocommit'; leave it out"),
        (lambda url: f"{url}?row_factory=x&sslmode=prefer", "has no setting 'row_factory'"),
        (lambda url: f"{url}?nonsense=1", "has no setting 'nonsense'"),
    ],
)
def test_a_url_that_cannot_be_used_is_one_clear_error(url, changed, problem):
    with pytest.raises(StoreError, match=problem) as caught:
        Memory.open(changed(url), embedder="hash")
    assert PASSWORD not in str(caught.value) + repr(caught.value.__cause__) + repr(caught.value.__context__)


def test_what_the_url_and_the_environment_set_is_heeded_where_it_does_no_harm(url, monkeypatch):
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    opened = Records(Postgres(f"{url}?client_encoding=latin1&application_name=mine&sslmode=prefer"), count_tokens=len)
    add(opened, ALICE, "\u98ce\u7b5d \U0001fa81")
    assert texts(opened, ALICE) == ["\u98ce\u7b5d \U0001fa81"]
    with opened.database.read() as connection:
        assert connection.exec_driver_sql("SHOW application_name").scalar_one() == "mine"
    opened.close()


def test_a_user_who_may_not_make_tables_is_told_so(postgres_server):
    name = postgres_server.new("template0")
    postgres_server.admin("CREATE ROLE stranger LOGIN PASSWORD 's'")
    with pytest.raises(StoreError, match=r"may not do this.*let it own the database"):
        Postgres(postgres_server.url(name, "stranger", "s"))


def test_a_database_that_can_only_be_read_is_read_and_says_so(postgres_server, url, store):
    add(store, ALICE, "kite")
    postgres_server.admin(f"ALTER DATABASE {name_of(url)} SET default_transaction_read_only = on")
    again = Records(Postgres(url), count_tokens=len)
    assert texts(again, ALICE) == ["kite"]
    with pytest.raises(StoreError, match=r"can only be read; connect to the primary.*nothing was changed"):
        add(again, ALICE, "boat")
    again.close()


def test_the_doctor_names_a_user_whom_row_level_security_does_not_bind(postgres_server, url):
    name = name_of(url)
    postgres_server.admin(
        f"CREATE ROLE free_{name} LOGIN BYPASSRLS PASSWORD 'f'",
        f"GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO free_{name}",
        database=name,
    )
    for address, warned in ((url, False), (postgres_server.url(name, f"free_{name}", "f"), True)):
        with Memory.open(address, embedder="hash") as memory:
            found = memory.check(deep=True)["settings"]
            assert ("row-level security does not bind this user; connect as an ordinary one" in found) == warned


def test_another_encoding_is_refused(postgres_server):
    postgres_server.admin("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0 OWNER memos")
    with pytest.raises(StoreError, match=r"encoding is LATIN1; make one.*--encoding=UTF8"):
        Postgres(postgres_server.url("latin"))


def test_without_the_extension_pgvector_says_what_to_do_and_exact_works(postgres_server):
    url = postgres_server.url(postgres_server.new("template0"))
    with pytest.raises(StoreError, match="CREATE EXTENSION vector -- or use vectors='exact'"):
        Memory.open(url, embedder="hash", vectors="pgvector")
    with Memory.open(url, embedder="hash") as memory:
        memory.namespace("a").add("kite")
        assert memory.namespace("a").nearest("kite")
    postgres_server.admin("CREATE EXTENSION vector", database=name_of(url))
    with Memory.open(url, embedder="hash", vectors="pgvector") as memory:
        assert memory.namespace("a").nearest("kite")


def test_what_needs_a_file_is_refused(url, tmp_path):
    with pytest.raises(ConfigError, match="'exact', 'pgvector' or a Chroma server"):
        Memory.open(url, embedder="hash", vectors="chroma")
    with pytest.raises(ConfigError, match="needs a PostgreSQL database"):
        Memory.open(tmp_path / "memory.db", embedder="hash", vectors="pgvector")
    with pytest.raises(ConfigError, match="keeps keys and values in files beside the database"):
        Memory.open(url, embedder="hash", controller="longmem-free", llm="smollm2")
    assert list(tmp_path.iterdir()) == []


def test_what_an_index_or_a_text_of_postgres_cannot_hold_is_one_clear_error(store):
    long = "".join(chr(0x4E00 + n) for n in range(1000))
    with pytest.raises(StoreError, match=r"longer than the 2,500 bytes.*use a shorter one; nothing was changed"):
        store.append(ALICE, [NewSegment("x", "s", key=long)])
    with pytest.raises(InvalidInputError, match="NUL"):
        store.append(ALICE, [NewSegment("a\x00b", "s")])
    assert texts(store, ALICE) == []
    add(store, ALICE, f"{'w' * 9000} {long}")  # terms are of any length
    assert store.search(ALICE, "w" * 9000, 1)
    assert store.search(ALICE, long[:10], 1)


# -- the password ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://u:pw@h:1/d", "postgresql+psycopg://u:***@h:1/d"),
        ("postgresql://u:p@w@h/d", "postgresql://u:***@h/d"),
        ("postgresql://u@h/d", "postgresql://u@h/d"),
        ("postgresql://h/d?user=u&password=pw&connect_timeout=3", "postgresql://h/d?user=u&password=***&connect_timeout=3"),
        ("postgres:///d?sslpassword=pw", "postgres:///d?sslpassword=***"),
    ],
)  # fmt: skip
def test_a_url_is_shown_without_its_password(url, shown):
    assert without_password(url) == str(DatabaseUrl(url)) == repr(DatabaseUrl(url)) == shown


def test_no_command_and_no_trace_shows_the_password(postgres_server, url, monkeypatch, caplog):
    monkeypatch.setenv("MEMOS_STORE", url)
    monkeypatch.setenv("MEMOS_EMBEDDER", "hash")
    with caplog.at_level(logging.DEBUG), Memory.open(url, embedder="hash", llm=ScriptedLLM(["Hm."])) as memory:
        trace = memory.namespace("default").chat("Where is the kite?").trace
        shown = repr(memory.namespace("default").stats()) + repr(trace) + repr(memory.parts.store.database.place)
    runner = CliRunner()
    for words in (["config"], ["config", "--json"], ["stats"], ["stats", "--json"], ["search", "kite"], ["doctor"],
                  ["doctor", "--deep", "--json"], ["history"], ["forget", "1", "--yes"], ["export", "-"]):  # fmt: skip
        done = runner.invoke(app, words)
        assert done.exit_code in (0, 1), done.output  # doctor: the tests' server does not sync
        shown += done.output + done.stderr
    shown += caplog.text
    assert "***" in shown
    for secret in ("p%25w", "p%w:d"):
        assert secret not in shown
    for address in (url.replace("p%25w%3Ad", "secret-pw"), "mysql://me:secret-pw@host/db"):
        for words in (["stats"], ["config"]):
            wrong = runner.invoke(app, [*words, "--store", address])
            assert (wrong.exit_code != 0) == (words == ["stats"])
            assert "secret-pw" not in wrong.output + wrong.stderr + str(wrong.exception)


# -- opening -----------------------------------------------------------------------------------------------------------


def test_of_several_that_open_an_empty_database_one_makes_the_tables(postgres_server):
    url = postgres_server.url(postgres_server.new("template0"))
    opened, failed = [], []

    def work() -> None:
        try:
            opened.append(Postgres(url))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    add(Records(opened[0], count_tokens=len), ALICE, "kite")
    assert texts(Records(opened[1], count_tokens=len), ALICE) == ["kite"]
    for each in opened:
        each.close()


def test_a_newer_schema_is_refused_and_left_alone(url, store):
    add(store, ALICE, "kite")
    with store.database.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SchemaError, match="upgrade memory-os") as caught:
        Postgres(url)
    assert "p%25w" not in str(caught.value)
    assert texts(store, ALICE) == ["kite"]


@pytest.mark.parametrize("found", ["0007", "0005"])
def test_a_process_whose_package_was_upgraded_on_the_disk_keeps_off_what_is_newer(postgres_server, monkeypatch, found):
    """Its own HEAD is an older one, and the steps beyond it lie in the same folder."""
    url = postgres_server.url(postgres_server.new("template0"))
    monkeypatch.setattr(postgres_module, "HEAD", found)
    Postgres(url).close()
    assert postgres_server.admin("SELECT version_num FROM alembic_version", database=name_of(url)) == [(found,)]
    monkeypatch.setattr(postgres_module, "HEAD", "0004")
    with pytest.raises(SchemaError, match="upgrade memory-os"):
        Postgres(url)


# -- one moment --------------------------------------------------------------------------------------------------------


def test_within_a_snapshot_each_read_is_of_its_own_namespace_and_of_that_moment(store):
    for labels in (ALICE, BOB):
        add(store, labels, f"kite of {labels[-1]}")
    with store.snapshot():
        thread = threading.Thread(target=add, args=(store, ALICE, "later"))
        thread.start()
        thread.join()
        with store.database.read(BOB) as connection:
            assert texts(store, ALICE) == ["kite of alice"]
            # the outer one is of its own again
            seen = connection.exec_driver_sql("SELECT text FROM segments").scalars().all()
            assert seen == ["kite of bob"]
        with store.snapshot():
            assert texts(store, ALICE) == ["kite of alice"]
        assert texts(store, BOB) == ["kite of bob"]
        add(store, BOB, "written within")
        assert texts(store, BOB) == ["kite of bob"]
    assert (texts(store, ALICE), texts(store, BOB)) == (["kite of alice", "later"], ["kite of bob", "written within"])


def test_a_snapshot_outlives_the_patience_with_idle_clients_and_no_lost_connection(postgres_server, url):
    idle = Records(Postgres(f"{url}?options=-c%20idle_in_transaction_session_timeout%3D200ms"), count_tokens=len)
    add(idle, ALICE, "kite")
    with idle.snapshot():
        assert texts(idle, ALICE) == ["kite"]
        time.sleep(0.6)
        assert texts(idle, ALICE) == ["kite"]
        postgres_server.admin(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name_of(url)}'"
        )
        begun = time.monotonic()
        with pytest.raises(StoreError) as caught:  # at once: what was seen cannot be seen again
            texts(idle, ALICE)
        assert not isinstance(caught.value, backend.TryAgain)
        assert time.monotonic() - begun < backend.PATIENCE_S
    assert texts(idle, ALICE) == ["kite"]
    idle.close()


# -- forgetting --------------------------------------------------------------------------------------------------------


def test_what_is_forgotten_is_vacuumed_or_said_to_be_unfinished(url):
    def size(memory) -> int:
        with memory.parts.store.database.read() as connection:
            ns = connection.exec_driver_sql("SELECT id FROM namespaces").scalar_one()
            table = f"segments_p{part_of(connection, ns)}"
            return connection.exec_driver_sql(f"SELECT pg_relation_size('{table}')").scalar_one()

    with Memory.open(url, embedder="hash", vectors="pgvector") as memory:
        scope = memory.namespace("a")
        scope.add_many([NewSegment(f"kite {n} " * 50, "s") for n in range(200)])
        scope.nearest("kite")
        full = size(memory)
        with memory.parts.store.database.read() as reader:  # looks at what was there
            reader.exec_driver_sql("SELECT count(*) FROM segments")
            counts = scope.forget(everything=True)
            assert (counts["segments"], counts["unfinished"]) == (200, 1)
            assert scope.history() == []  # the rows are gone all the same
            assert size(memory) == full
            with memory.parts.store.database.read() as connection:
                for table in ("segments", "vectors", "lexical", "postings", "near"):
                    n = connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one()
                    assert n == (1 if table == "near" else 0), table
        assert memory.check()["unfinished"]
        memory.repair()
        assert not any(memory.check().values())
        assert size(memory) == 0
        scope.add("one more")
        assert scope.forget(everything=True)["unfinished"] == 0
        assert size(memory) == 0  # VACUUM gives back what is empty at the end of a table


def test_a_table_that_another_one_cleans_is_waited_for_as_long_as_is_said(url, store):
    add(store, ALICE, "kite")
    deleted = store.delete({ALICE: []}, everything=True)
    with store.database.write(ALICE) as other:
        other.exec_driver_sql("LOCK TABLE summaries IN SHARE UPDATE EXCLUSIVE MODE")  # as VACUUM does
        assert not store.scrub(deleted, index_purged=True, patience_s=0)
        assert store.check("f")["unfinished"]
        thread = threading.Timer(0.5, other.commit)
        thread.start()
        assert store.scrub(None, index_purged=True, patience_s=60)
        thread.join()
    assert not any(store.check("f").values())


# -- care --------------------------------------------------------------------------------------------------------------


def test_the_doctor_finds_and_mends_what_sql_can_break(url):
    with Memory.open(url, embedder=HashEmbedder(), vectors="pgvector") as memory:
        scope = memory.namespace("a")
        for n in range(5):
            scope.add(f"kite {n}")
        scope.nearest("kite")

        def found() -> dict[str, list[str]]:
            every = memory.check(deep=True)
            assert every.pop("settings") == ["fsync is off"]  # the tests' server
            return {kind: rows for kind, rows in every.items() if rows}

        assert found() == {}
        for broken, kinds in (
            ("DELETE FROM postings WHERE segment_pk = (SELECT min(pk) FROM segments)", {"lexical_index"}),
            (
                "DELETE FROM lexical WHERE segment_pk = (SELECT min(pk) FROM segments)",
                {"missing_lexical", "lexical_index", "counters"},
            ),
            ("UPDATE lexical SET terms = 'boat'", {"wrong_lexical", "lexical_index", "counters"}),
            ("DELETE FROM vectors WHERE segment_pk = (SELECT max(pk) FROM segments)", {"missing_vectors"}),
            ("UPDATE namespaces SET n_terms = 99", {"counters"}),
            ("UPDATE namespaces SET last_seq = 1", {"wrong_seq"}),
        ):  # fmt: skip
            with memory.parts.store.database.write() as connection:
                connection.exec_driver_sql(broken)
            assert kinds <= found().keys() | {"counters"}, broken
            memory.repair(deep=True)
            assert found() == {}, broken
            assert {hit.segment.seq for hit in scope.search("kite", k=9)} == {1, 2, 3, 4, 5}
            assert {hit.segment.seq for hit in scope.nearest("kite", k=9)} == {1, 2, 3, 4, 5}
        with memory.parts.store.database.write() as connection:
            connection.exec_driver_sql("ALTER TABLE segments_p3 DISABLE ROW LEVEL SECURITY")
        assert "row-level security is off on segments_p3" in memory.check(deep=True)["settings"]


@pytest.mark.parametrize(
    ("kind", "row", "broken", "is_mended"),
    [
        ("records", "created_at is no time", "UPDATE segments SET created_at = 'soon'", False),
        ("records", "unknown role", "UPDATE segments SET role = 'wizard'", False),
        ("records", "unknown kind", "UPDATE segments SET kind = 'song'", False),
        ("records", "labels are no JSON list", "UPDATE namespaces SET labels = '{oops'", False),
        ("records", "updated_at is no time", "UPDATE items SET updated_at = 'soon'", False),
        ("records", "path is no JSON", "UPDATE items SET path = 'p'", False),
        ("trace_columns", "", "UPDATE traces SET query_id = 'x', reply_id = NULL", True),
        ("wrong_item_vectors", "", "UPDATE item_texts SET vector = '\\x0000803f'", True),
        ("wrong_vectors", "", "UPDATE vectors SET vector = '\\x0000803f'", True),
    ],
)
def test_what_cannot_be_read_and_what_is_derived_is_named(url, kind, row, broken, is_mended):
    with Memory.open(url, embedder=HashEmbedder(), llm=ScriptedLLM(lambda _: "Noted.")) as memory:
        scope = memory.namespace("a")
        scope.chat("Where is the kite?")
        scope.items.put(("p",), "k", {"n": 1}, texts=[("n", "a boat")])
        with memory.parts.store.database.write() as connection:
            connection.exec_driver_sql(broken)
    with Memory.open(url, embedder=HashEmbedder()) as memory:
        [first, *_] = memory.check(deep=True)[kind]
        assert row in first
        memory.repair(deep=True)
        assert bool(memory.check(deep=True)[kind]) is not is_mended


# -- pgvector ----------------------------------------------------------------------------------------------------------


def unit(rng: np.random.Generator, n: int, d: int = 24) -> np.ndarray:
    rows = rng.standard_normal((n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def put(store: Records, namespace, rows: np.ndarray) -> list[str]:
    ids = add(store, namespace, *["t"] * len(rows))
    store.put_vectors(namespace, "f", ids, rows)
    return ids


def graphs(store: Records) -> list[str]:
    """Those that are whole."""
    with store.database.read() as connection:
        found = connection.exec_driver_sql("SELECT indexrelid::regclass::text FROM pg_index WHERE indisvalid").scalars()
        return [name for name in found if re.search("_ns[0-9]+$", name)]


@pytest.mark.slow
def test_a_namespace_is_found_by_a_graph_of_its_own_whatever_lies_beside_it(store, monkeypatch):
    """By one graph for all, the nearest of a small namespace would be among those of a large one, many missed."""
    monkeypatch.setattr(pgvector, "EXACT_UP_TO", 100)
    rng = np.random.default_rng(11)
    large, small = ("large",), None
    add(store, large, "x")
    for n in range(200):
        add(store, (str(n),), "x")
        with store.database.read() as connection:
            numbers = dict(connection.exec_driver_sql("SELECT labels, id FROM namespaces").all())
            if part_of(connection, numbers[json.dumps([str(n)])]) == part_of(connection, numbers['["large"]']):
                small = (str(n),)
                break
    assert small
    rows = {namespace: unit(rng, n) for namespace, n in {large: 6000, small: 150}.items()}
    ids = {namespace: put(store, namespace, theirs) for namespace, theirs in rows.items()}
    index = PgVectorIndex(store.database, fingerprint="f")
    plans = []
    sa.event.listen(store.database._reader, "before_cursor_execute", lambda *told: plans.append(told[2:4]))
    for namespace, theirs in rows.items():
        index.sync(namespace)
        hits = 0
        for query in unit(rng, 20):
            best = {ids[namespace][i] for i in np.argsort(-(theirs @ query))[:10]}
            found = index.search(namespace, query, 10)
            assert len(found) == 10
            hits += len(best & {id_ for id_, _ in found})
        assert hits >= 0.97 * 200, namespace
        statement, told = plans[-1]
        with store.database.read(namespace) as connection:
            wanted = ", ".join(f"set_config('{name}', '{value}', true)" for name, value in pgvector.WALKING.items())
            connection.exec_driver_sql(f"SELECT {wanted}")
            plan = " ".join(map(str, connection.exec_driver_sql(f"EXPLAIN {statement}", told).scalars()))
        assert f"Index Scan using {index._table}_ns{numbers[json.dumps(namespace)]} on" in plan


def test_a_graph_is_made_when_a_namespace_has_grown_and_again_where_its_maker_was_killed(
    postgres_server, url, store, monkeypatch
):
    monkeypatch.setattr(pgvector, "EXACT_UP_TO", 20)
    rng = np.random.default_rng(3)

    def check(expected: int) -> None:
        index = PgVectorIndex(store.database, fingerprint="f")
        index.sync(ALICE)
        assert len(graphs(store)) == expected
        query = unit(rng, 1)[0]
        found = index.search(ALICE, query, 5)
        everything = store.read_vectors(ALICE, "f")
        best = np.argsort(-(everything[2] @ query))[:5]
        assert [id_ for id_, _ in found] == [everything[0][i] for i in best]
        upto = everything[1][9]
        assert {id_ for id_, _ in index.search(ALICE, query, 99, upto=upto)} == set(everything[0][:10])
        assert store.database.damage(deep=True) == []

    put(store, ALICE, unit(rng, 20))
    check(0)
    put(store, ALICE, unit(rng, 1))
    check(1)
    killed = "UPDATE pg_index SET indisvalid = false WHERE indexrelid::regclass::text ~ '_ns[0-9]+$'"
    postgres_server.admin(killed, database=name_of(url))
    assert graphs(store) == []
    check(0)
    put(store, ALICE, unit(rng, 1))
    check(1)
    PgVectorIndex(store.database, fingerprint="f").drop(ALICE)
    assert graphs(store) == []
    check(1)


def test_where_a_graph_cannot_be_made_nothing_waits_for_it_and_searches_are_exact(url, store, monkeypatch, caplog):
    monkeypatch.setattr(pgvector, "EXACT_UP_TO", 20)
    monkeypatch.setattr(Postgres.run_alone, "__kwdefaults__", {"patience_s": 0.2})
    rows = unit(np.random.default_rng(3), 30)
    ids = put(store, ALICE, rows[:10])
    index = PgVectorIndex(store.database, fingerprint="f")
    index.sync(ALICE)
    with store.database.write(BOB) as reader:  # somebody who is at it for long
        reader.exec_driver_sql(f"SELECT count(*) FROM {index._table}")
        ids += put(store, ALICE, rows[10:])
        index.sync(ALICE)
        assert "searched without a graph, exactly" in caplog.text
        assert graphs(store) == []
        best = np.argsort(-(rows @ rows[4]))[:9]
        assert [id_ for id_, _ in index.search(ALICE, rows[4], 9)] == [ids[i] for i in best]
    another = PgVectorIndex(Postgres(url), fingerprint="f")
    put(store, ALICE, rows[:1])
    another.sync(ALICE)
    assert len(graphs(store)) == 1
    another._database.close()


def test_another_process_that_forgets_is_followed(url):
    with Memory.open(url, embedder="hash", vectors="pgvector") as one, Memory.open(
        url, embedder="hash", vectors="pgvector"
    ) as other:  # fmt: skip
        first, second = (one.namespace("a").add(text) for text in ("red kite", "blue boat"))
        assert other.namespace("a").nearest("red kite", k=1)[0].segment == first
        one.namespace("a").forget(first.id)
        assert [hit.segment for hit in other.namespace("a").nearest("red kite", k=5)] == [second]
        third = other.namespace("a").add("green kite")
        assert {hit.segment.id for hit in one.namespace("a").nearest("kite", k=5)} == {second.id, third.id}


def test_traces_and_metadata_come_back_as_they_were(url):
    told = {"z": 1.1, "a": [1e300, -0.0, 2**80], "m": {"y": None, "x": "\u0000 \U0001f600"}}
    with Memory.open(url, embedder="hash", llm=ScriptedLLM(["Hm."])) as memory:
        scope = memory.namespace("a")
        segment = scope.add("kite", metadata=told)
        assert json.dumps(scope.segment(segment.id).metadata) == json.dumps(told)
        reply = scope.chat("kite?")
        assert scope.why()[0] == reply.trace
        memory.parts.store.save_trace(replace(reply.trace, error="a\x00b"))
        assert scope.why()[0].error == "a\x00b"
