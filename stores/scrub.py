"""Nothing in the files of what was deleted: the write-ahead log emptied, and the database written anew where needed.

That the work is due stands in the database's own header (``user_version``), in the transaction that deletes: what a
crash, another process's long read or a full disk kept from being done is done when the database is next opened. Each
deletion's mark is a number of its own, and is struck off by no other's work.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from memory_os.stores.residue import still_there

if TYPE_CHECKING:
    import sqlalchemy as sa

__all__ = ["due", "mark", "scrub"]

PATIENCE_S = 5
"""So long others may read what was before: then the log cannot be emptied now."""
LARGEST = 2**30


def mark(connection: sa.Connection) -> int:
    """Note, in the transaction that deletes, that the files are to be scrubbed; gives back the mark."""
    new = secrets.randbelow(LARGEST) + 1
    connection.exec_driver_sql(f"PRAGMA user_version = {new}")
    return new


def due(connection: sa.Connection) -> int:
    """The mark of the last deletion that the files may still hold some of; 0 if there is none."""
    mark: int = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
    return mark


def scrub(
    engine: sa.Engine, path: Path, gone: Collection[bytes] | None, mark: int | None, patience_s: float = PATIENCE_S
) -> bool:
    """Leave nothing in the database's files of what was deleted; whether that is so now.

    :param gone: pieces of it (see ``residue``); ``None`` where there is too much to look for, or it is not known.
    :param mark: struck off then; ``None`` to leave it.
    """
    pooled = engine.raw_connection()
    connection = pooled.driver_connection
    assert isinstance(connection, sqlite3.Connection)
    try:
        [(timeout,)] = connection.execute("PRAGMA busy_timeout").fetchall()
        connection.execute(f"PRAGMA busy_timeout = {int(patience_s * 1000)}")
        try:
            return _scrubbed(connection, path, gone, mark)
        except sqlite3.OperationalError:  # locked, read-only, no room for the copy: it stays due
            return False
        finally:
            if connection.in_transaction:
                connection.rollback()
            connection.execute(f"PRAGMA busy_timeout = {timeout}")
    finally:
        pooled.close()


def _scrubbed(connection: sqlite3.Connection, path: Path, gone: Collection[bytes] | None, mark: int | None) -> bool:
    if not _log_emptied(connection):
        return False
    if gone is None or still_there(path, gone):
        connection.execute("VACUUM")
        if not _log_emptied(connection):
            return False
    connection.execute("BEGIN IMMEDIATE")
    [(now,)] = connection.execute("PRAGMA user_version").fetchall()
    if now == mark:  # else something was deleted meanwhile, and that work is due
        connection.execute("PRAGMA user_version = 0")
    connection.commit()
    return True


def _log_emptied(connection: sqlite3.Connection) -> bool:
    [(busy, _, _)] = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return not busy
