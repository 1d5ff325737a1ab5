"""Nearest segments by an embedded Chroma index in a folder beside the database, opened under an owner lock."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory_os.errors import StoreError, StoreLockedError
from memory_os.stores.chroma_collections import Collections, cosines_of
from memory_os.types import Namespace

if TYPE_CHECKING:
    from memory_os.protocols import Vector, VectorSource

__all__ = ["ChromaIndex"]


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
            self._owner = FileLock(folder / "owner.lock", thread_local=False)
            self._owner.acquire(timeout=0)
        except Timeout as error:
            raise StoreLockedError(str(folder)) from error
        except OSError as error:
            raise StoreError(
                f"cannot make the Chroma index {folder}: {error.strerror}; check its permissions"
            ) from error
        self._lock = threading.Lock()
        self._folder = folder
        self._connect()

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
        with self._lock:
            return self._collections.nearest(namespace, vector, k, upto)

    def similarities(self, namespace: Namespace, vector: Vector, ids: Sequence[str]) -> Vector:
        """The cosines of these segments, in their order; 0 for one that has no vector."""
        return cosines_of(self._source, self._fingerprint, namespace, vector, ids)

    def ids(self, namespace: Namespace) -> set[str]:
        """What the collection holds now."""
        with self._lock:
            return set(self._collections.held(namespace))

    def differences(self, namespace: Namespace, *, deep: bool = False) -> dict[str, list[str]]:
        """How the collection differs from the rows; see ``KeptIndex``."""
        with self._lock:
            found = self._collections.differences(namespace, deep=deep)
        return {**found, "undelivered": []}  # nobody else reads the folder, and each search delivers first

    def mend(self, namespace: Namespace, *, deep: bool = False) -> None:
        """Make the collection equal to the rows."""
        with self._lock:
            self._collections.mend(namespace, deep=deep)

    def sync(self, namespace: Namespace) -> None:
        """Add the rows that are new; where rows went away, take out what the rows no longer hold."""
        with self._lock:
            self._collections.synced(namespace)

    def drop(self, namespace: Namespace) -> None:
        """Delete the collection; the next search rebuilds it."""
        with self._lock:
            self._collections.drop(namespace)

    def purge(self, namespace: Namespace) -> bool:
        """Drop the collection, which the next search rebuilds, and what Chroma leaves of one in its files.

        Chroma keeps what was added in a queue, and folders of collections that are gone.
        """
        self.drop(namespace)
        with self._lock:
            self._client.close()
            try:
                self._clean()
            finally:
                self._connect()
        return True

    def _clean(self) -> None:
        import shutil
        import sqlite3
        from contextlib import closing

        with closing(sqlite3.connect(self._folder / "chroma.sqlite3", isolation_level=None)) as database:
            used = {id_ for (id_,) in database.execute("SELECT id FROM segments")}
            database.execute("VACUUM")
        for place in self._folder.iterdir():
            if place.is_dir() and place.name not in used:
                shutil.rmtree(place)

    def close(self) -> None:
        """Close Chroma and give the folder back."""
        with self._lock:
            self._client.close()
            self._owner.release()
