"""One SQLite file: opened, brought to the newest schema, and read and written in transactions.

Every write is one ``BEGIN IMMEDIATE`` transaction in WAL mode under ``synchronous=FULL``. A file of an older schema is
copied before it is upgraded (see ``backup``), and the upgrade is one transaction: whatever happens, the file is whole.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import event

from memory_os.errors import SchemaError, StoreError
from memory_os.stores import scrub
from memory_os.stores.backup import back_up
from memory_os.stores.schema import HEAD

__all__ = ["Database"]

BUSY_TIMEOUT_S = 60

log = logging.getLogger(__name__)


class Database:
    """The connections to one file.

    :raises StoreError: if it cannot be opened, created or migrated.
    :raises SchemaError: if it was written by a newer version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.parent.is_dir():
            raise StoreError(f"cannot open {path}: the folder {path.parent} does not exist; create it first")
        if path.is_dir():
            raise StoreError(f"cannot open {path}: it is a folder; name a file in it, such as {path / 'memory.db'}")
        # no bound on connections: writers that wait for the lock hold one each, and must not keep readers out
        # parameters are texts: neither SQLAlchemy's log nor its errors are to show them
        self.engine = sa.create_engine(
            f"sqlite:///{path}", connect_args={"timeout": BUSY_TIMEOUT_S}, max_overflow=-1, hide_parameters=True
        )
        event.listen(self.engine, "connect", _on_connect)
        event.listen(self.engine, "begin", _on_begin)
        self._writer = self.engine.execution_options(memos_write=True)
        self._unclean = False
        try:
            self._migrate()
            with self.read() as connection:
                due = scrub.is_due(connection)
            if due:  # what was forgotten before
                self.scrub(None, patience_s=1)
        except BaseException:
            self.engine.dispose()
            raise

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.DBAPIError as error:
            raise StoreError(_problem(self.path, error.orig)) from error

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One transaction under the write lock: durable when it ends, undone when it raises."""
        with self._translated(), self._writer.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One consistent view of the data."""
        with self._translated(), self.engine.connect() as connection:
            yield connection

    def _migrate(self) -> None:
        found = self._revision()
        if found == HEAD:
            return
        from alembic.command import upgrade
        from alembic.config import Config
        from alembic.script import ScriptDirectory
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", "memory_os.stores:migrations")
        try:
            ScriptDirectory.from_config(config).get_revision(found or "base")  # before anything is written
            with self.write() as connection:  # the write lock: of two processes that open a file, one migrates
                found = _revision_of(connection)
                if found == HEAD:
                    return
                copy = self._back_up() if found and _has_content(connection) else None
                config.attributes["connection"] = connection
                upgrade(config, "head")
        except CommandError as error:
            raise SchemaError(str(self.path), str(found), HEAD) from error
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

    def _revision(self) -> str | None:
        with self.read() as connection:
            return _revision_of(connection)

    def size_bytes(self) -> int:
        """Bytes on disk, the write-ahead log included."""
        files = [Path(f"{self.path}{suffix}") for suffix in ("", "-wal", "-shm")]
        return sum(file.stat().st_size for file in files if file.exists())

    def scrub(self, gone: set[bytes] | None, *, patience_s: float = scrub.PATIENCE_S) -> bool:
        """Leave nothing in the files of what was deleted; what cannot be done now is done at close or at the next open.

        :param gone: as in ``scrub.scrub``.
        """
        clean = scrub.scrub(self.engine, self.path, gone, patience_s)
        self._unclean = not clean
        return clean

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()
        if self._unclean:
            scrub.scrub(self.engine, self.path, None, patience_s=0)
            self.engine.dispose()


def _on_connect(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself; _on_begin does
    for pragma in ("foreign_keys = ON", "synchronous = FULL", "secure_delete = ON"):
        connection.execute(f"PRAGMA {pragma}")
    try:
        connection.execute("PRAGMA journal_mode = WAL")
    except sqlite3.OperationalError as error:
        if "readonly" not in str(error):
            raise  # a read-only medium can still be read; the first write says what is wrong


def _on_begin(connection: sa.Connection) -> None:
    write = connection.get_execution_options().get("memos_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _problem(path: Path, error: BaseException | None) -> str:
    text = str(error)
    if "disk is full" in text or "disk full" in text:
        return f"{path}: the disk is full; nothing was changed. Free some space and try again"
    if "readonly" in text or "unable to open" in text:
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
