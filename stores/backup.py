"""A whole copy of a database beside it, made before its schema is changed: an upgrade can be taken back.

It is named after the revision that it was made before: ``memory.db.before-0007``. A copy is never overwritten: one
with the same content, which an interrupted upgrade left, is the copy; beside another one, the new copy's name gets a
number. What is forgotten later is still in it, so it is to be deleted when the upgrade has proved itself.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import sqlite3
from contextlib import closing
from itertools import count
from pathlib import Path

from memory_os.errors import StoreError

__all__ = ["back_up"]


def back_up(source: sqlite3.Connection, database: Path, revision: str) -> Path:
    """Copy the database, and give back the copy's path; the copy is whole and on the disk when this returns.

    Nobody else may write to the database, or make a copy of it, meanwhile.

    :param source: reads the database, and has nothing written that is not committed.
    :param revision: the one that the database is about to be brought to.
    :raises StoreError: if the copy cannot be made; nothing is left of it.
    """
    name = f"{database.name}.before-{revision}"
    aside = database.with_name(f"{name}.tmp")  # one that is there is what a crash left
    try:
        try:
            _write(source, aside)
            shutil.copymode(database, aside)
            for number in count(1):
                copy = database.with_name(name if number == 1 else f"{name}.{number}")
                if not copy.exists():
                    os.replace(aside, copy)
                    break
                if filecmp.cmp(aside, copy, shallow=False):
                    break
            _sync(database.parent)
        finally:
            aside.unlink(missing_ok=True)
    except (OSError, sqlite3.Error) as error:
        megabytes = database.stat().st_size / 1e6
        raise StoreError(
            f"{database} is of an older schema and must be upgraded; the copy that is made of it first, "
            f"{database.with_name(name)}, cannot be written ({error}). Nothing was changed. It takes "
            f"{megabytes:.0f} MB: free some space, check the permissions of the folder, and open it again"
        ) from error
    return copy


def _write(source: sqlite3.Connection, aside: Path) -> None:
    aside.unlink(missing_ok=True)
    os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))  # nobody else reads it, not even half of it
    with closing(sqlite3.connect(aside)) as target:
        target.execute("PRAGMA journal_mode = OFF")
        target.execute("PRAGMA synchronous = OFF")  # once, below
        source.backup(target)
    _sync(aside)


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders, and needs none synced
    number = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
