"""Reading files that SQLite has open in this process, without taking its locks away.

When a process closes any descriptor of a file, POSIX drops all locks that the process has on that file, SQLite's too:
another process then takes the database for unused, and deletes the log that this one writes to
(https://sqlite.org/howtocorrupt.html, 2.2). So the descriptor by which a database is read is closed only when no
``Database`` of this process has the file open any more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Protocol

__all__ = ["Inode", "Readable", "hold", "reading", "release"]


class Inode(NamedTuple):
    """A file, whatever its name."""

    device: int
    number: int


class Readable(Protocol):
    """A file open for reading."""

    def seek(self, offset: int, /) -> int:
        """Go to this byte."""

    def read(self, n: int, /) -> bytes:
        """The next ``n`` bytes; fewer at the end."""


@dataclass
class _Held:
    n_users: int = 0
    descriptor: int | None = None


_held: dict[Inode, _Held] = {}
_lock = Lock()


def hold(path: Path) -> Inode:
    """Note that SQLite has a file open; to be released once all its connections are closed."""
    inode = _inode(path)
    with _lock:
        _held.setdefault(inode, _Held()).n_users += 1
    return inode


def release(inode: Inode) -> None:
    """Note that one who held the file has closed it."""
    with _lock:
        held = _held[inode]
        held.n_users -= 1
        if not held.n_users:
            del _held[inode]
            if held.descriptor is not None:
                os.close(held.descriptor)


@contextmanager
def reading(path: Path) -> Iterator[Readable]:
    """The file, to be read from its beginning."""
    with _lock:
        held = _held.get(_inode(path)) if os.name != "nt" else None  # Windows keeps locks by descriptor
        if held is not None and held.descriptor is None:
            held.descriptor = os.open(path, os.O_RDONLY)
    if held is None or held.descriptor is None:
        with path.open("rb") as file:
            yield file
    else:
        yield _Shared(held.descriptor)


class _Shared:
    """A descriptor that others read by too: each keeps its own place in the file, and none closes it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._at = 0

    def seek(self, offset: int) -> int:
        self._at = offset
        return offset

    def read(self, n: int) -> bytes:
        found = os.pread(self._descriptor, n, self._at)
        self._at += len(found)
        return found


def _inode(path: Path) -> Inode:
    found = path.stat()
    return Inode(found.st_dev, found.st_ino)
