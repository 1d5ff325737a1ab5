"""Nearest segments by an embedded Chroma index in a folder beside the database, opened under an owner lock."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory_os.errors import StoreError, StoreLockedError
from memory_os.stores.chroma_collections import Collections, cosines_of
from memory_os.types import Namespace

if TYPE_CHECKING:
    from memory_os.protocols import Vector, VectorSource

__all__ = ["ChromaIndex", "discard", "folder_of"]

LOCK = "owner.lock"

log = logging.getLogger(__name__)


def folder_of(database: Path) -> Path:
    """Where the index of this database is."""
    return database.with_name(database.name + ".chroma")


def discard(folder: Path) -> bool:
    """Delete an index that nobody uses now; whether none is there any more."""
    from filelock import FileLock, Timeout

    if not folder.is_dir():
        return True
    try:
        with FileLock(folder / LOCK, timeout=0, thread_local=False):
            for place in folder.iterdir():
                if place.is_dir():
                    shutil.rmtree(place)
                elif place.name != LOCK:
                    place.unlink()
    except Timeout:
        return False
    except OSError as error:
        log.warning("cannot delete the Chroma index %s: %s; check its permissions", folder, error.strerror)
        return False
    return True


class ChromaIndex:
    """``VectorIndex`` over embedded Chroma.

    :param source: where the rows are.
    :param fingerprint: the embedder whose vectors are indexed.
    :param folder: made if missing; owned until ``close``.
    :raises StoreLockedError: if another process owns the folder.
    """

    def __init__(self, source: VectorSource, *, fingerprint: str, folder: Path) -> None:
        import chromadb  # noqa: F401  # before the folder is made: it may be missing
        from filelock import FileLock, Timeout

        self._source = source
        self._fingerprint = fingerprint
        try:
            folder.mkdir(exist_ok=True)
            self._owner = FileLock(folder / LOCK, thread_local=False)
            self._owner.acquire(timeout=0)
        except Timeout as error:
            raise StoreLockedError(str(folder)) from error
        except OSError as error:
            raise StoreError(
                f"cannot make the Chroma index {folder}: {error.strerror}; check its permissions"
            ) from error
        self._lock = threading.Lock()
        self._pid: int | None = os.getpid()
        self._folder = folder
        self._connect()

    @contextmanager
    def _owned(self) -> Iterator[None]:
        """One thread at a time, of the process that opened it, until it is closed."""
        if self._pid is None:
            raise StoreError(f"the Chroma index {self._folder} was closed; open the memory again: Memory.open")
        if self._pid != os.getpid():
            raise StoreError(
                f"the Chroma index {self._folder} belongs to the process that opened it, and this one was forked from "
                "it; close the memory before the fork and open it in one of the two, or use vectors='exact'"
            )
        with self._lock:
            yield

    def _connect(self) -> None:
        import chromadb
        from chromadb.config import Settings

        settings = Settings(anonymized_telemetry=False)
        self._client: Any = chromadb.PersistentClient(str(self._folder), settings=settings)
        self._collections = Collections(self._source, self._fingerprint, self._client)

    def search(
        self, namespace: Namespace, vector: Vector, k: int, *, upto: int | None = None
    ) -> list[tuple[str, float]]:
        """The ``k`` best ``(segment id, cosine)`` that HNSW finds among segments with ``seq <= upto``."""
        with self._owned():
            return self._collections.nearest(namespace, vector, k, upto)

    def similarities(self, namespace: Namespace, vector: Vector, ids: Sequence[str]) -> Vector:
        """The cosines of these segments, in their order; 0 for one that has no vector."""
        with self._owned():
            return cosines_of(self._source, self._fingerprint, namespace, vector, ids)

    def ids(self, namespace: Namespace) -> set[str]:
        """What the collection holds now."""
        with self._owned():
            return set(self._collections.held(namespace))

    @property
    def owing(self) -> bool:
        """Nothing: what ``purge`` leaves goes with the folder."""
        return False

    def differences(self, namespace: Namespace, *, deep: bool = False) -> dict[str, list[str]]:
        """How the collection differs from the rows; see ``KeptIndex``."""
        with self._owned():
            found = self._collections.differences(namespace, deep=deep)
        return {**found, "undelivered": []}  # nobody else reads the folder, and each search delivers first

    def mend(self, namespace: Namespace, *, deep: bool = False) -> None:
        """Make the collection equal to the rows."""
        with self._owned():
            self._collections.mend(namespace, deep=deep)

    def sync(self, namespace: Namespace) -> None:
        """Add the rows that are new; where rows went away, take out what the rows no longer hold."""
        with self._owned():
            self._collections.synced(namespace)

    def drop(self, namespace: Namespace) -> None:
        """Delete the collection; the next search rebuilds it."""
        with self._owned():
            self._collections.drop(namespace)

    def purge(self, namespaces: Collection[Namespace] | None) -> bool:
        """Drop their collections, which the next search rebuilds, and what Chroma leaves of them in its files.

        Chroma keeps what was added in a queue, and folders of collections that are gone.
        """
        from chromadb.errors import ChromaError

        with self._owned():
            try:
                self._collections.drop_all(namespaces)
                self._client.close()
                try:
                    self._clean()
                finally:
                    self._connect()
            except (ChromaError, OSError, sqlite3.Error) as error:
                log.warning("%s may still hold what was forgotten, until it is next opened: %s", self._folder, error)
                return False
        return True

    def _clean(self) -> None:
        with closing(sqlite3.connect(self._folder / "chroma.sqlite3", isolation_level=None)) as database:
            used = {id_ for (id_,) in database.execute("SELECT id FROM segments")}
            database.execute("VACUUM")
        for place in self._folder.iterdir():
            if place.is_dir() and place.name not in used:
                shutil.rmtree(place)

    def close(self) -> None:
        """Close Chroma and give the folder back, unless that was done, or is another process's to do."""
        if self._pid != os.getpid():
            return
        with self._owned():
            self._pid = None
            self._client.close()
            self._owner.release()
