"""One SQLite file: opened, brought to the newest schema, and read and written in transactions.

Every write is one ``BEGIN IMMEDIATE`` transaction in WAL mode under ``synchronous=FULL``. A file of an older schema is
copied before it is upgraded (see ``backup``), and the upgrade is one transaction: whatever happens, the file is whole.
"""

from __future__ import annotations

import glob
import logging
import os
import sqlite3
import stat
import threading
import weakref
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import event

from memory_os.errors import StoreError
from memory_os.stores import chroma, files, fts5, residue, scrub, vectorfile
from memory_os.stores.backend import CLOSED, Opening
from memory_os.stores.backup import back_up
from memory_os.stores.manifest import bank_folder
from memory_os.stores.schema import HEAD
from memory_os.stores.unfinished import may_be_opened
from memory_os.stores.upgrade import Upgrade
from memory_os.types import Namespace

__all__ = ["Database"]

BUSY_TIMEOUT_S = 60

FORKED = (
    "{} was at work in another thread when this process was forked, and SQLite's locks do not live through that: fork "
    'before threads use a memory, or start processes by "spawn" (multiprocessing.set_start_method)'
)

log = logging.getLogger(__name__)
_open: weakref.WeakSet[Database] = weakref.WeakSet()
_inherited: set[Path] = set()
"""Files that this process has connections to which its parent opened: whatever it wrote could be lost."""


class Database:
    """``Backend`` over one file; whose rows a transaction is about makes no difference to it.

    :param opening: what for; see ``Opening``.
    :raises StoreError: if it cannot be opened, created or migrated.
    :raises SchemaError: if it was written by a newer version.
    """

    def __init__(self, path: Path, opening: Opening = Opening.USE) -> None:
        self.path = path
        self._opening = opening
        if path in _inherited:
            raise StoreError(FORKED.format(path))
        if not path.parent.is_dir():
            raise StoreError(f"cannot open {path}: the folder {path.parent} does not exist; create it first")
        if opening is Opening.READ and not (path.exists() and path.stat().st_size):
            raise StoreError(f"cannot read {path}: there is no such memory; name the store that is to be read")
        if path.is_dir():
            raise StoreError(f"cannot open {path}: it is a folder; name a file in it, such as {path / 'memory.db'}")
        # no bound on connections: writers that wait for the lock hold one each, and must not keep readers out
        # parameters are texts: neither SQLAlchemy's log nor its errors are to show them
        self.engine = sa.create_engine(
            f"sqlite:///{path}", connect_args={"timeout": BUSY_TIMEOUT_S}, max_overflow=-1, hide_parameters=True
        )
        # what is only read may be anything, and stays as it is
        event.listen(self.engine, "connect", _set_up if opening is Opening.READ else _on_connect)
        event.listen(self.engine, "begin", _on_begin)
        self._connections: set[int] = set()
        event.listen(self.engine, "connect", lambda connection, _: self._connections.add(id(connection)))
        event.listen(self.engine, "close", lambda connection, _: self._connections.discard(id(connection)))
        self._snapshot = threading.local()
        self._closed = False
        _open.add(self)
        self._writer = self.engine.execution_options(memos_write=True)
        self._unclean = False
        self._inode: files.Inode | None = None
        try:
            self._migrate()
            self._inode = files.hold(path)
            if opening is Opening.USE:
                self.scrub_what_is_due(patience_s=1)
        except BaseException:
            self._disconnect()
            raise

    @property
    def place(self) -> str:
        """The file's path."""
        return str(self.path)

    @property
    def bank_folder(self) -> Path:
        """A folder beside the file."""
        return bank_folder(self.path)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        if self._closed:
            raise StoreError(CLOSED.format(self.path))
        if self.path in _inherited:
            raise StoreError(FORKED.format(self.path))
        try:
            yield
        except sa.exc.DBAPIError as error:
            if self._opening is Opening.READ and _is_denied(str(error.orig)):
                raise StoreError(
                    f"{self.path} cannot be read where it is ({error.orig}), as SQLite keeps files beside what it "
                    "reads; copy it, with its -wal if it has one, into a folder that can be written, and name the copy"
                ) from error
            raise StoreError(_problem(self.path, error.orig)) from error

    @contextmanager
    def write(self, namespace: Namespace | None = None) -> Iterator[sa.Connection]:
        """One transaction under the write lock: durable when it ends, undone when it raises."""
        with self._translated(), self._writer.begin() as connection:
            yield connection

    @contextmanager
    def read(self, namespace: Namespace | None = None) -> Iterator[sa.Connection]:
        """One consistent view of the data."""
        held: sa.Connection | None = getattr(self._snapshot, "connection", None)
        if held is not None:
            with self._translated():
                yield held
            return
        with self._translated(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def claiming(self) -> Iterator[sa.Connection]:
        """One transaction under the write lock."""
        with self.write() as connection:
            yield connection

    @contextmanager
    def shift(self) -> Iterator[int]:
        """A number that is this caller's until it leaves or its process ends: that of a file that it has locked."""
        with self._translated(), ExitStack() as held:
            yield next(n for n in count(1) if self._locks(held, n))

    def on_shift(self, connection: sa.Connection, numbers: Collection[int]) -> set[int]:
        """Those of the numbers whose file is locked."""
        with ExitStack() as held:
            return {n for n in numbers if not self._locks(held, n)}

    def _locks(self, held: ExitStack, number: int) -> bool:
        """Lock a worker's file until ``held`` is left; whether nobody had it."""
        from filelock import FileLock, Timeout

        try:
            held.enter_context(FileLock(f"{self.path}-worker-{number}", timeout=0, mode=0o600))
        except Timeout:
            return False
        return True

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """One consistent view for all that this thread reads meanwhile; writers go on."""
        with self.read() as connection:
            connection.exec_driver_sql("SELECT 1 FROM sqlite_master").first()  # the moment is now
            before = getattr(self._snapshot, "connection", None)
            self._snapshot.connection = connection
            try:
                yield
            finally:
                self._snapshot.connection = before

    def _migrate(self) -> None:
        with self.read() as connection:
            found = _revision_of(connection)
            if may_be_opened(connection, self.place, found, HEAD, self._opening):
                return
        steps = Upgrade(self.place, HEAD)
        steps.check(found)
        with self.write() as connection:  # the write lock: of two processes that open a file, one migrates
            found = _revision_of(connection)
            if may_be_opened(connection, self.place, found, HEAD, self._opening):
                return
            steps.check(found)
            copy = self._back_up() if found and _has_content(connection) else None
            steps.run(connection, found)
        if copy:
            log.warning(
                "%s was upgraded from schema revision %s to %s; delete %s, the copy of what it was, when all is well",
                self.path, found, HEAD, copy.name,
            )  # fmt: skip

    def _back_up(self) -> Path:
        """A copy of the file as it is now; to be called under the write lock, so that nothing comes in between."""
        with self.read() as connection:
            _revision_of(connection)  # the transaction begins
            source = connection.connection.driver_connection
            assert isinstance(source, sqlite3.Connection)
            return back_up(source, self.path, HEAD)

    def size_bytes(self) -> int:
        """Bytes on disk, the write-ahead log included."""
        every = [Path(f"{self.path}{suffix}") for suffix in ("", "-wal", "-shm")]
        return sum(file.stat().st_size for file in every if file.exists())

    def damage(self, *, deep: bool) -> list[str]:
        """What SQLite finds wrong with the file."""
        with self.read() as connection:
            check = "PRAGMA integrity_check" if deep else "PRAGMA quick_check"
            lines = connection.exec_driver_sql(check).scalars().all()
        return [] if lines == ["ok"] else [str(line) for line in lines]

    def reads_lexical(self) -> bool:
        """Whether FTS5 takes its index for one."""
        try:
            with self.read() as connection:
                connection.exec_driver_sql("SELECT rowid FROM lexical LIMIT 1").first()
        except StoreError as error:
            if "constructor failed" not in str(error):
                raise
            return False
        return True

    def lexical_damage(self) -> list[str]:
        """What FTS5 finds wrong with its index."""
        try:
            with self.write() as connection:
                fts5.check(connection)
        except StoreError as error:
            if "damaged" not in str(error):
                raise
            return ["the lexical index does not match its entries"]
        return []

    def broken_keys(self, connection: sa.Connection) -> list[str]:
        """``table row`` of rows that refer to nothing."""
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
        return [f"{table} {row}" for table, row, *_ in broken]

    def settings(self, connection: sa.Connection) -> list[str]:
        """Where a connection is not as ``_on_connect`` wants it."""
        journal = connection.exec_driver_sql("PRAGMA journal_mode").scalar_one()
        synchronous = connection.exec_driver_sql("PRAGMA synchronous").scalar_one()
        return [
            *([] if journal == "wal" else [f"journal_mode is {journal}, not wal"]),
            *([] if synchronous == 2 else [f"synchronous is {synchronous}, not 2 (FULL)"]),
        ]

    def file_faults(self) -> tuple[list[str], list[str]]:
        """``(files that anybody may write, copies of before an upgrade)``, by name."""
        every = sorted(self.path.parent.glob(glob.escape(self.path.name) + "*"))
        open_to_all = [file.name for file in every if file.stat().st_mode & stat.S_IWOTH]
        return open_to_all, [file.name for file in every if ".before-" in file.name]

    def files_with(self, texts: Iterable[str]) -> dict[str, list[str]]:
        """Of the database, its log and its copies, the bank, the files of vectors, and the Chroma index."""
        return residue.files_with(self.path, texts)

    def mark(self, connection: sa.Connection, numbers: Collection[int]) -> int:
        """Note that the files are to be scrubbed; what a crash leaves of it is done when the file is next opened."""
        return scrub.mark(connection)

    def due(self, connection: sa.Connection) -> int:
        """The mark of the last deletion that the files may still hold some of."""
        return scrub.due(connection)

    def scrub(
        self,
        gone: Collection[bytes] | None,
        mark: int,
        index_purged: bool = False,
        *,
        patience_s: float = scrub.PATIENCE_S,
    ) -> bool:
        """Leave nothing in the files of what was deleted, files of vectors included.

        What cannot be done now is done at close or at the next open.

        :param gone: as in ``scrub.scrub``.
        :param mark: struck off then.
        :param index_purged: that a Chroma index beside the database holds nothing of it either; otherwise the index,
            which is rebuilt when it is next used, is deleted.
        """
        index_purged = index_purged or chroma.discard(chroma.folder_of(self.path))
        derived = vectorfile.weed(vectorfile.folder_of(self.path), self._vector_rows, patience_s) and index_purged
        clean = scrub.scrub(self.engine, self.path, gone, mark if derived else None, patience_s)
        self._unclean = not (clean and derived)
        return not self._unclean

    def _vector_rows(self) -> vectorfile.Rows:
        import numpy as np

        with self.read() as connection:
            last = connection.exec_driver_sql("SELECT seq FROM sqlite_sequence WHERE name = 'vectors'").scalar()
            rows = connection.exec_driver_sql("SELECT pk FROM vectors").scalars()
            return vectorfile.Rows(np.fromiter(rows, dtype=np.int64), last or 0)

    def scrub_what_is_due(self, index_purged: bool = False, *, patience_s: float) -> bool:
        """Do what earlier deletions could not; whether nothing is left to be done."""
        with self.read() as connection:
            mark = scrub.due(connection)
        return not mark or self.scrub(None, mark, index_purged, patience_s=patience_s)

    def close(self) -> None:
        """Close every connection; whatever is asked of it from now on raises ``StoreError``."""
        if self._closed:
            return
        try:
            if self._unclean:
                self.engine.dispose()  # the log cannot be emptied while a connection of our own reads what was before
                self.scrub_what_is_due(patience_s=0)
        finally:
            self._closed = True
            self._disconnect()

    def _disconnect(self) -> None:
        _open.discard(self)
        self.engine.dispose(close=self.path not in _inherited)
        if self._inode is not None:
            files.release(self._inode)
            self._inode = None


def _before_fork() -> None:
    """Locks are a process's: a child would take those of what it inherits for its own, and lose what it writes."""
    for database in list(_open):
        database.engine.dispose()  # what is idle; opened again when it is next used


def _in_child() -> None:
    for database in list(_open):
        if database._connections:  # another thread's: not to be used, nor to be closed
            _inherited.add(database.path)
            database._unclean = False
        database._snapshot = threading.local()
        database.engine.dispose(close=False)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_in_child)


def _set_up(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself; _on_begin does
    for pragma in ("foreign_keys = ON", "synchronous = FULL", "secure_delete = ON"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute(f"CREATE VIRTUAL TABLE {fts5.PLACES} USING fts5vocab(main, lexical, instance)")


def _on_connect(connection: sqlite3.Connection, record: object) -> None:
    _set_up(connection, record)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
    except sqlite3.OperationalError as error:
        if _is_locked(error):
            _turn_to_log(connection)
        elif "readonly" not in str(error):
            raise  # a read-only medium can still be read; the first write says what is wrong


def _turn_to_log(connection: sqlite3.Connection) -> None:
    """Where several open a file of another journal at once, SQLite does not wait by itself."""
    from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random

    patiently = Retrying(
        retry=retry_if_exception(_is_locked),
        stop=stop_after_delay(BUSY_TIMEOUT_S),
        wait=wait_random(0.01, 0.1),
        reraise=True,
    )
    patiently(connection.execute, "PRAGMA journal_mode = WAL")


def _is_locked(error: BaseException) -> bool:
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)


def _on_begin(connection: sa.Connection) -> None:
    write = connection.get_execution_options().get("memos_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _is_denied(problem: str) -> bool:
    return "readonly" in problem or "unable to open" in problem


def _problem(path: Path, error: BaseException | None) -> str:
    text = str(error)
    if "disk is full" in text or "disk full" in text:
        return f"{path}: the disk is full; nothing was changed. Free some space and try again"
    if _is_denied(text):
        return f"{path} cannot be written ({text}); check the permissions of the file and of its folder"
    if "disk I/O" in text:
        return f"{path}: the disk failed ({text}); nothing was changed. See whether it is full or broken, and try again"
    if "locked" in text:
        return f"{path} was locked by another process for {BUSY_TIMEOUT_S} s; nothing was changed. Try again"
    if "not a database" in text or "malformed" in text:
        return f"{path} is not a memory_os database, or is damaged ({text}); name another file or restore a backup"
    return f"{path}: {text}; nothing was changed"


def _revision_of(connection: sa.Connection) -> str | None:
    if not connection.exec_driver_sql("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").first():
        return None
    return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one_or_none()


def _has_content(connection: sa.Connection) -> bool:
    """Whether anything was ever stored: all that is belongs to a namespace."""
    return connection.exec_driver_sql("SELECT 1 FROM namespaces LIMIT 1").first() is not None
