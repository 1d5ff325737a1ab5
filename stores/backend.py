"""What the stores ask of a database: transactions, and what only the database itself can say or do.

``Database`` (one SQLite file) and ``Postgres`` are the two there are. SQL that both understand stands with the stores;
what differs is here, in ``rows`` and in ``fts5`` and ``postings``, and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa

from memory_os.errors import StoreError
from memory_os.types import Namespace

__all__ = ["CLOSED", "Backend", "Opening", "TryAgain", "again"]

CLOSED = "{} was closed; open the memory again: Memory.open"

T = TypeVar("T")

PATIENCE_S = 10
"""So long a call is repeated while the database says that it changed nothing and that it may go better next time."""


class Opening(Enum):
    """What a database is opened for, and so what may be done to it on the way."""

    USE = "use"
    """A memory: it is made where there is none, and brought to the newest schema."""
    READ = "read"
    """To be read as it is: nothing is made, upgraded or finished."""
    FILL = "fill"
    """To be made a copy of another, also where that was begun before."""


class Backend(Protocol):
    """A database. ``namespace`` is whose rows a transaction is about; ``None`` is all of them."""

    @property
    def place(self) -> str:
        """What it is called in messages and statistics: a path, or a URL without its password."""

    @property
    def bank_folder(self) -> Path | None:
        """Where the files of the bank lie; ``None`` where there is no place for them."""

    def write(self, namespace: Namespace | None = None) -> AbstractContextManager[sa.Connection]:
        """One transaction: durable when it ends, undone when it raises."""

    def read(self, namespace: Namespace | None = None) -> AbstractContextManager[sa.Connection]:
        """One consistent view of the data."""

    def claiming(self) -> AbstractContextManager[sa.Connection]:
        """One transaction of the queue, over all namespaces, without their locks: it writes claims and workers only."""

    def shift(self) -> AbstractContextManager[int]:
        """A number that is this caller's alone until it leaves, or its process ends, however it ends."""

    def on_shift(self, connection: sa.Connection, numbers: Collection[int]) -> set[int]:
        """Those of the numbers that are somebody's now; what is the others' may be struck off in this transaction."""

    def snapshot(self) -> AbstractContextManager[None]:
        """One consistent view for all that this thread reads meanwhile; writers go on."""

    def mark(self, connection: sa.Connection, numbers: Collection[int]) -> int:
        """Note, in the transaction that deletes for good from the namespaces of these numbers, that ``scrub`` is due.

        Gives back the mark by which it is told from others; never 0.
        """

    def due(self, connection: sa.Connection) -> int:
        """The mark of the last deletion for which ``scrub`` was not done, or not to its end; 0 if there is none."""

    def scrub(self, gone: Collection[bytes] | None, mark: int, *, index_purged: bool, patience_s: float) -> bool:
        """Leave nothing of what was deleted, as far as this database can; whether that is so now.

        :param gone: pieces of it (see ``residue``); ``None`` where there is too much to look for.
        :param mark: struck off then.
        :param index_purged: that the index of vectors, where it has files, holds nothing of it either.
        :param patience_s: so long, at most, others are waited for.
        """

    def scrub_what_is_due(self, index_purged: bool = False, *, patience_s: float) -> bool:
        """Do what earlier deletions could not; whether nothing is left to be done."""

    def files_with(self, texts: Iterable[str]) -> dict[str, list[str]]:
        """The files in which any of these texts stands; see ``RecordStore.files_with``."""

    def size_bytes(self) -> int:
        """Bytes on disk."""

    def damage(self, *, deep: bool) -> list[str]:
        """What only a backup mends, line by line.

        :param deep: also what takes as long as reading everything.
        """

    def reads_lexical(self) -> bool:
        """Whether the lexical index can be read at all."""

    def lexical_damage(self) -> list[str]:
        """Whether the entries of the lexical index and what finds them differ.

        :raises StoreError: if the store cannot be written, which this check may need.
        """

    def broken_keys(self, connection: sa.Connection) -> list[str]:
        """``table row`` of rows that refer to nothing."""

    def settings(self, connection: sa.Connection) -> list[str]:
        """What is set in a way that puts stored data at risk."""

    def file_faults(self) -> tuple[list[str], list[str]]:
        """``(files that anybody may write, copies of before an upgrade)``, by name."""

    def close(self) -> None:
        """Close every connection; whatever is asked of it from now on raises ``StoreError``."""


class TryAgain(StoreError):
    """The transaction was undone through no fault of its own; nothing was changed."""


def again(store: type[T]) -> type[T]:
    """Have the public methods of a store repeated when ``TryAgain`` says so: each is a transaction or a view.

    Generators are left out: what they have given back they cannot take back.
    """
    for name, method in list(vars(store).items()):
        if inspect.isfunction(method) and not name.startswith("_") and not inspect.isgeneratorfunction(method):
            setattr(store, name, _repeated(method))
    return store


def _repeated(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)  # no cost where all goes well
        except TryAgain:
            import tenacity

            retrying = tenacity.Retrying(
                retry=tenacity.retry_if_exception_type(TryAgain),
                stop=tenacity.stop_after_delay(PATIENCE_S),
                wait=tenacity.wait_random_exponential(multiplier=0.05, max=1),
                reraise=True,
            )
            return retrying(method, *args, **kwargs)

    return call
