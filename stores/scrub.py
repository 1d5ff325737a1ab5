"""Nothing in the files of what was deleted: the write-ahead log emptied, and the database written anew where needed.

That the work is due stands in the database's own header (``user_version``), in the transaction that deletes: what a
crash, another process's long read or a full disk kept from being done is done when the database is next opened.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

from memory_os.stores.residue import still_there

if TYPE_CHECKING:
    import sqlalchemy as sa

__all__ = ["is_due", "mark", "scrub"]

PATIENCE_S = 5
"""So long others may read what was before: then the log cannot be emptied now."""
LARGEST = 2**30


def mark(connection: sa.Connection) -> None:
    """Note, in the transaction that deletes, that the files are to be scrubbed."""
    due = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
    connection.exec_driver_sql(f"PRAGMA user_version = {due % LARGEST + 1}")


def is_due(connection: sa.Connection) -> bool:
    """Whether something was deleted that the files may still hold."""
    return bool(connection.exec_driver_sql("PRAGMA user_version").scalar_one())


def scrub(engine: sa.Engine, path: Path, gone: set[bytes] | None, patience_s: float = PATIENCE_S) -> bool:
    """Leave nothing in the database's files of what was deleted; whether that is so now.

    :param gone: pieces of it (see ``residue``); ``None`` where there is too much to look for, or it is not known.
    """
    pooled = engine.raw_connection()
    connection = pooled.driver_connection
    assert isinstance(connection, sqlite3.Connection)
    try:
        [(timeout,)] = connection.execute("PRAGMA busy_timeout").fetchall()
        connection.execute(f"PRAGMA busy_timeout = {int(patience_s * 1000)}")
        try:
            return _scrubbed(connection, path, gone)
        except sqlite3.OperationalError:  # locked, read-only, no room for the copy: it stays due
            return False
        finally:
            if connection.in_transaction:
                connection.rollback()
            connection.execute(f"PRAGMA busy_timeout = {timeout}")
    finally:
        pooled.close()


def _scrubbed(connection: sqlite3.Connection, path: Path, gone: set[bytes] | None) -> bool:
    [(due,)] = connection.execute("PRAGMA user_version").fetchall()
    if not _log_emptied(connection):
        return False
    if gone is None or still_there(path, gone):
        connection.execute("VACUUM")
        if not _log_emptied(connection):
            return False
    connection.execute("BEGIN IMMEDIATE")
    [(now,)] = connection.execute("PRAGMA user_version").fetchall()
    if now == due:  # else another process has deleted something meanwhile, and its work is due
        connection.execute("PRAGMA user_version = 0")
    connection.commit()
    return True


def _log_emptied(connection: sqlite3.Connection) -> bool:
    [(busy, _, _)] = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return not busy
