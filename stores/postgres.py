"""One PostgreSQL database: connected to, brought to the newest schema, and read and written in transactions.

A transaction names its namespace to the server (``partitions.SETTING``), whose policies then show no other's rows. The
namespace's own row is its writers' lock; there is no global one. What a lost connection, a deadlock or a failed
serialisation undid is tried again (``backend.again``); where the connection was lost at COMMIT, the server is asked
whether that transaction was committed: nothing is stored twice.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from memory_os.address import without_password
from memory_os.errors import MissingExtraError, StoreError
from memory_os.stores import postings
from memory_os.stores.backend import CLOSED, PATIENCE_S, Opening, TryAgain
from memory_os.stores.partitions import SETTING, part_of
from memory_os.stores.pgconnect import MORE, POOL, address_of, engine_of
from memory_os.stores.pgerrors import LOCK_TIMEOUT_S, UNDONE, bare, is_lost, problem
from memory_os.stores.rows import as_labels
from memory_os.stores.schema import HEAD
from memory_os.stores.unfinished import may_be_opened
from memory_os.stores.upgrade import Upgrade
from memory_os.stores.vacuum import vacuumed
from memory_os.types import Namespace

if TYPE_CHECKING:
    pass

__all__ = ["Postgres"]

OLDEST = 14
# A client that is gone, or stands still, does not keep its namespace locked for hours. Set with the transaction's first
# statement, and not as the connection begins, which a pooler would refuse.
LIMITS = "".join(
    f", set_config('{name}', '{LOCK_TIMEOUT_S}s', true)"
    for name in ("lock_timeout", "idle_in_transaction_session_timeout")
)
COUNTING_SINCE = "pg_stat_get_bgwriter_stat_reset_time()"
"""Begins anew when, and hardly ever but when, the server has crashed: statistics outlive an orderly restart."""
ALONE_S = 5.0
BY_INDEX = ", set_config('enable_bitmapscan', 'off', true)"
"""All that is asked stands in an index, in the order in which it is wanted. The planner, which knows nothing of a table
that was just filled, would collect a whole namespace for its last row."""
KNOWN_BY = f"CAST(pg_current_xact_id() AS text), {COUNTING_SINCE}"
"""By which a transaction is known afterwards."""
MIGRATING = 0x6D656D6F73  # the advisory lock's number: "memos"
# a queue's table is never as large as its statistics say: a few rows by the index, and not all of them sorted
IN_ORDER = ", set_config('enable_sort', 'off', true)"
WORKING = 0x6D656D77  # as MIGRATING, of workers
SHIFT = sa.text(
    "SELECT n FROM generate_series(1, 9999) n WHERE pg_try_advisory_xact_lock(:class, CAST(n AS integer)) LIMIT 1"
)
# those that are nobody's stay so until the transaction has ended: what is struck off is not a new worker's by then
ON_SHIFT = sa.text("SELECT n FROM unnest(CAST(:numbers AS integer[])) n WHERE NOT pg_try_advisory_xact_lock(:class, n)")
PARTITIONED = ("segments", "vectors", "lexical", "postings", "traces")
WHOLE = ("pending", "summaries", "activations", "scores", "items", "item_texts")
log = logging.getLogger(__name__)
_open: weakref.WeakSet[Postgres] = weakref.WeakSet()
_inherited: list[sa.Pool] = []


class Postgres:
    """``Backend`` over a PostgreSQL database.

    :param url: ``postgresql+psycopg://user:password@host:port/database``, which is made if it holds no tables yet.
    :param opening: what for; see ``Opening``.
    :raises MissingExtraError: without the package psycopg.
    :raises StoreError: if it cannot be connected to, or its tables cannot be made.
    :raises SchemaError: if it was written by a newer version.
    """

    bank_folder: Path | None = None  # its files would stand on one machine, and its manifest be everybody's

    def __init__(self, url: str, opening: Opening = Opening.USE) -> None:
        try:
            import psycopg  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("PostgreSQL", "psycopg", "postgres") from error
        self.place = without_password(url)
        address = address_of(url, self.place)
        # who sets something, sets the limits
        self._habits = BY_INDEX if "options" in address.query else BY_INDEX + LIMITS
        # two pools: writers that wait for a lock hold a connection each, and must not keep readers out
        self._writer = engine_of(address, "READ COMMITTED", read_only=False)
        self._reader = engine_of(address, "REPEATABLE READ", read_only=True)
        self._opened = self._closed = False
        self._snapshot = threading.local()
        self._deleted_in: set[int] = set()
        try:
            self._check()
            self._migrate(opening)
        except BaseException:
            self.close()
            raise
        self._opened = True
        _open.add(self)

    # -- transactions ----------------------------------------------------------------------------------------------

    @contextmanager
    def _translated(self) -> Iterator[None]:
        if self._closed:
            raise StoreError(CLOSED.format(self.place))
        try:
            yield
        except sa.exc.TimeoutError as error:  # of the pool
            raise StoreError(
                f"{self.place}: {POOL + MORE} calls at a time are all that it takes; make fewer"
            ) from error
        except sa.exc.DBAPIError as error:
            raise self._error(error) from bare(error)

    @contextmanager
    def write(self, namespace: Namespace | None = None) -> Iterator[sa.Connection]:
        """One transaction; without a namespace no other one writes meanwhile."""
        with self._translated(), self._writer.connect() as connection, connection.begin() as transaction:
            _, number, counting_since, *_ = _name(connection, namespace, f", {KNOWN_BY}{self._habits}")
            if namespace is None and self._opened:
                connection.exec_driver_sql("LOCK TABLE namespaces IN EXCLUSIVE MODE")
            yield connection
            if not transaction.is_active:
                return
            try:
                transaction.commit()
            except sa.exc.DBAPIError as error:
                if not (is_lost(error) and self._was_committed(number, counting_since)):
                    raise

    @contextmanager
    def claiming(self) -> Iterator[sa.Connection]:
        """One transaction of the queue, over all namespaces, that takes no namespace's lock."""
        with self._translated(), self._writer.begin() as connection:
            _name(connection, None, self._habits + IN_ORDER)
            yield connection

    @contextmanager
    def shift(self) -> Iterator[int]:
        """A number that is this caller's until it leaves or its connection ends.

        A transaction that holds an advisory lock and nothing else: it has no id and no snapshot, so that VACUUM does
        not wait for it, and a pooler of transactions leaves it its connection.
        """
        with self._translated(), self._reader.connect() as connection:
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
            number = connection.execute(SHIFT, {"class": WORKING}).scalar_one()
            # last, as a statement without a snapshot: the server keeps that of the latest until the next one
            connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
            yield number

    def on_shift(self, connection: sa.Connection, numbers: Collection[int]) -> set[int]:
        """Those of the numbers whose lock is held."""
        return set(connection.execute(ON_SHIFT, {"class": WORKING, "numbers": list(numbers)}).scalars())

    @contextmanager
    def read(self, namespace: Namespace | None = None) -> Iterator[sa.Connection]:
        """One snapshot; nothing can be written in it."""
        held: tuple[sa.Connection, Namespace | None] | None = getattr(self._snapshot, "held", None)
        if held is not None:
            with self._held(held, namespace):
                yield held[0]
            return
        with self._translated(), self._reader.connect() as connection:
            _name(connection, namespace, self._habits)
            yield connection

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """One consistent view for all that this thread reads meanwhile; writers go on."""
        with self.read() as connection:
            before = getattr(self._snapshot, "held", None)
            if before is None:  # whoever reads may take their time, and locks nobody out
                connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
            self._snapshot.held = connection, None
            try:
                yield
            finally:
                self._snapshot.held = before

    @contextmanager
    def _held(self, held: tuple[sa.Connection, Namespace | None], namespace: Namespace | None) -> Iterator[None]:
        """A read within a snapshot, and one within it, each of its own namespace."""
        connection, around = held
        try:
            with self._translated():
                _name(connection, namespace)
                self._snapshot.held = connection, namespace
                try:
                    yield
                finally:
                    self._snapshot.held = held
                _name(connection, around)
        except TryAgain as error:  # what was seen cannot be seen again
            raise StoreError(str(error)) from error

    def _was_committed(self, number: str, counting_since: datetime | None) -> bool:
        """What became of a transaction whose COMMIT was not answered.

        :param number: the transaction's.
        :param counting_since: the server's, when it had that number.
        :raises StoreError: if the server cannot tell, so that nobody knows.
        """
        import tenacity

        query = sa.text(f"SELECT pg_xact_status(CAST(:number AS xid8)), {COUNTING_SINCE}")

        def ask() -> str | None:
            with self._reader.connect() as connection:
                try:
                    status, since = connection.execute(query, {"number": number}).one()
                except sa.exc.DataError:  # "is in the future": the server crashed and has lost all of it
                    return "aborted"
            if since == counting_since:
                return str(status) if status else None
            # A server that crashed gives the numbers again of which nothing had reached its disk: what was committed
            # may be another transaction. What was not is neither that nor this one.
            return None if status in ("committed", None) else "aborted"

        asking = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(sa.exc.DBAPIError)
            | tenacity.retry_if_result(lambda status: status == "in progress"),
            stop=tenacity.stop_after_delay(PATIENCE_S),
            wait=tenacity.wait_random_exponential(multiplier=0.05, max=1),
        )
        try:
            status = asking(ask)
        except tenacity.RetryError:
            status = None
        if status is None:
            raise StoreError(
                f"{self.place}: the connection was lost while something was being stored, and the server cannot be "
                "asked whether it was; look for it when the server is back, before you store it again"
            )
        return status == "committed"

    def _error(self, error: sa.exc.DBAPIError) -> Exception:
        told = problem(error)
        code = getattr(error.orig, "sqlstate", None)
        if isinstance(told, Exception):
            return told
        if code in UNDONE or (self._opened and is_lost(error)):
            return TryAgain(f"{self.place}: {told}; nothing was changed")
        return StoreError(f"{self.place}: {told}; nothing was changed")

    def run_alone(self, statement: str, *, patience_s: float = ALONE_S) -> None:
        """Run a statement that wants no transaction around it.

        :param patience_s: so long, at most, it waits for others, who may read for hours.
        :raises StoreError: if they go on for longer, or it may not be done.
        """
        engine = self._writer.execution_options(isolation_level="AUTOCOMMIT")
        with self._translated(), engine.connect() as connection:
            connection.exec_driver_sql(f"SET lock_timeout = '{patience_s}s'")
            try:
                connection.exec_driver_sql(statement)
            finally:
                connection.exec_driver_sql("RESET lock_timeout")

    # -- opening ---------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        with self._translated(), self._reader.connect() as connection:
            version, encoding = connection.exec_driver_sql(
                "SELECT current_setting('server_version_num')::int / 10000, current_setting('server_encoding')"
            ).one()
        if version < OLDEST:
            raise StoreError(f"{self.place}: PostgreSQL {version} is too old; use {OLDEST} or newer")
        if encoding != "UTF8":
            raise StoreError(
                f"{self.place}: the database's encoding is {encoding}; make one that holds every script: "
                "createdb --encoding=UTF8 --template=template0 NAME"
            )

    def _migrate(self, opening: Opening) -> None:
        with self._translated(), self._reader.connect() as connection:
            if may_be_opened(connection, self.place, _revision_of(connection), HEAD, opening):
                return
        steps = Upgrade(self.place, HEAD)
        with self.write() as connection:  # all steps are one transaction
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({MIGRATING})")  # of two that open it, one
            found = _revision_of(connection)
            if may_be_opened(connection, self.place, found, HEAD, opening):
                return
            steps.run(connection, found)
        if found:
            log.warning("%s was upgraded from schema revision %s to %s", self.place, found, HEAD)

    # -- forgetting ------------------------------------------------------------------------------------------------

    def mark(self, connection: sa.Connection, numbers: Collection[int]) -> int:
        """Note in which partitions something was deleted."""
        self._deleted_in |= {part_of(connection, ns) for ns in numbers if ns >= 0}
        return self.due(connection)

    def due(self, connection: sa.Connection) -> int:
        """The number of partitions that are to be cleaned, of what this process deleted."""
        return len(self._deleted_in)

    def scrub_what_is_due(self, index_purged: bool = False, *, patience_s: float) -> bool:
        """Try again to clean what could not be cleaned; whether nothing is left of it."""
        return not self._deleted_in or self.scrub(None, 0, index_purged=index_purged, patience_s=patience_s)

    def scrub(self, gone: Collection[bytes] | None, mark: int, *, index_purged: bool, patience_s: float) -> bool:
        """VACUUM the tables in which something was deleted; whether nothing of it is left there.

        Not so where somebody still looks at what was there before, or where the tables are another role's.
        """
        parts, self._deleted_in = self._deleted_in, set()
        try:
            clean = vacuumed(self._writer, self._tables(parts), patience_s)
        except sa.exc.DBAPIError:
            clean = False
        if not clean:
            self._deleted_in |= parts
        return clean

    def _tables(self, parts: Iterable[int]) -> list[str]:
        """Those that hold anything of segments or items, of the partitions these; pgvector's tables too."""
        query = sa.text("SELECT relname FROM pg_class WHERE relkind = 'r' AND relname ~ '^near_[0-9a-f]{12}_p[0-9]+$'")
        with self._reader.connect() as connection:
            near = connection.execute(query).scalars().all()
        ends = tuple(f"_p{part}" for part in parts)
        own = [f"{table}{end}" for table in PARTITIONED for end in ends]
        return [*WHOLE, *own, *(table for table in near if table.endswith(ends))]

    def files_with(self, texts: Iterable[str]) -> dict[str, list[str]]:
        """None: the server's files are its administrator's, and are not looked at."""
        log.warning("%s: the files of a database server are not looked at", self.place)
        return {}

    # -- care ------------------------------------------------------------------------------------------------------

    def size_bytes(self) -> int:
        """Bytes of the whole database on the server's disk."""
        with self.read() as connection:
            return int(connection.exec_driver_sql("SELECT pg_database_size(current_database())").scalar_one())

    def damage(self, *, deep: bool) -> list[str]:
        """Indexes that are not valid, and pages whose checksum was found wrong."""
        with self.read() as connection:
            broken = connection.exec_driver_sql(
                "SELECT i.indexrelid::regclass::text FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
                "WHERE c.relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = 'segments'::regclass) "
                "AND NOT (i.indisvalid AND i.indisready) "
                "AND c.relname !~ '^near_[0-9a-f]{12}_ns[0-9]+$'"  # which are made meanwhile, or anew
            ).scalars()
            found = [f"the index {name} is not valid; REINDEX it" for name in broken]
            failed = connection.exec_driver_sql(
                "SELECT checksum_failures FROM pg_stat_database WHERE datname = current_database()"
            ).scalar_one()
        return [*found, *([f"{failed} pages have a wrong checksum"] if failed else [])]

    def reads_lexical(self) -> bool:
        """Yes: an index that is not valid is named by ``damage``."""
        return True

    def lexical_damage(self) -> list[str]:
        """Entries that the inverted index does not match."""
        with self.read() as connection:
            numbers = connection.exec_driver_sql("SELECT id FROM namespaces ORDER BY id").scalars().all()
            wrong = [str(pk) for ns in numbers for pk in postings.faults(connection, ns)]
        return [f"the terms of rows {', '.join(wrong[:20])} are not those of their entries"] if wrong else []

    def broken_keys(self, connection: sa.Connection) -> list[str]:
        """None: PostgreSQL keeps its keys."""
        return []

    def settings(self, connection: sa.Connection) -> list[str]:
        """What puts data at risk on this server, and tables that row-level security does not guard."""
        found = [
            f"{name} is off"
            for name in ("fsync", "full_page_writes", "synchronous_commit")
            if connection.exec_driver_sql(f"SHOW {name}").scalar_one() == "off"
        ]
        open_ones = connection.exec_driver_sql(
            "SELECT c.relname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid "
            "WHERE a.attname = 'namespace_id' AND c.relkind IN ('r', 'p') AND c.relnamespace = "
            "(SELECT relnamespace FROM pg_class WHERE oid = 'segments'::regclass) "
            "AND NOT (c.relrowsecurity AND c.relforcerowsecurity) ORDER BY 1"
        ).scalars()
        found += [f"row-level security is off on {name}" for name in open_ones]
        free = connection.exec_driver_sql(
            "SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = current_user"
        ).scalar_one()
        return [*found, *(["row-level security does not bind this user; connect as an ordinary one"] if free else [])]

    def file_faults(self) -> tuple[list[str], list[str]]:
        """None: the files are the server's."""
        return [], []

    def close(self) -> None:
        """Close every connection; whatever is asked of it from now on raises ``StoreError``."""
        self._closed = True
        _open.discard(self)
        self._writer.dispose()
        self._reader.dispose()


def _in_child() -> None:
    """A connection is its parent's: two processes that talk over it would hear each other's answers."""
    for database in list(_open):
        database._snapshot = threading.local()
        for engine in (database._writer, database._reader):
            _inherited.append(engine.pool)  # never collected: that would say goodbye to the server
            engine.dispose(close=False)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def _name(connection: sa.Connection, namespace: Namespace | None, also: str = "") -> tuple[Any, ...]:
    """Tell the server, for this transaction, whose rows it is about.

    :param also: what else is asked, with a comma before it; it stands after the first column of what is given back.
    """
    told = "*" if namespace is None else as_labels(namespace)
    query = sa.text(f"SELECT set_config('{SETTING}', :told, true){also}")
    return tuple(connection.execute(query, {"told": told}).one())


def _revision_of(connection: sa.Connection) -> str | None:
    if connection.exec_driver_sql("SELECT to_regclass('alembic_version')::text").scalar_one() is None:
        return None
    found: str | None = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one_or_none()
    return found
