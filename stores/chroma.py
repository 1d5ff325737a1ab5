"""Nearest segments by an embedded Chroma index in a folder beside the database, opened under an owner lock.

Approximate (HNSW). One collection holds one namespace under one embedder; how far it has read the vector rows is kept
in the collection's metadata, so it catches up after whatever stopped it. All of it can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
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
from memory_os.types import Namespace

if TYPE_CHECKING:
    from chromadb.api.models.Collection import Collection as Table

    from memory_os.protocols import Vector, VectorSource

__all__ = ["ChromaIndex", "discard", "folder_of"]

BATCH = 2000  # below Chroma's own limit
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
        self._client = self._connected()

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

    def _connected(self) -> Any:
        import chromadb
        from chromadb.config import Settings

        return chromadb.PersistentClient(str(self._folder), settings=Settings(anonymized_telemetry=False))

    def search(
        self, namespace: Namespace, vector: Vector, k: int, *, upto: int | None = None
    ) -> list[tuple[str, float]]:
        """The ``k`` best ``(segment id, cosine)`` that HNSW finds among segments with ``seq <= upto``."""
        with self._owned():
            collection = self._synced(namespace)
            if k < 1 or not collection.count():
                return []
            where: Any = None if upto is None else {"seq": {"$lte": upto}}
            found: Any = collection.query(
                query_embeddings=vector.reshape(1, -1),
                n_results=min(k, collection.count()),
                where=where,
                include=["distances", "metadatas"],
            )
        rows = zip(found["ids"][0], found["distances"][0], found["metadatas"][0], strict=True)
        ranked = sorted((distance, meta["seq"], id_) for id_, distance, meta in rows)
        return [(id_, 1.0 - float(distance)) for distance, _, id_ in ranked]

    def similarities(self, namespace: Namespace, vector: Vector, ids: Sequence[str]) -> Vector:
        """The cosines of these segments, in their order, as of the last search; 0 for one that has no vector."""
        import numpy as np

        cosines: dict[str, float] = {}
        with self._owned():
            collection = self._collection(namespace)
            for start in range(0, len(ids), BATCH):
                found: Any = collection.get(ids=list(ids[start : start + BATCH]), include=["embeddings"])
                if found["ids"]:
                    cosines.update(zip(found["ids"], np.asarray(found["embeddings"]) @ vector, strict=True))
        return np.array([cosines.get(id_, 0.0) for id_ in ids], dtype=np.float32)

    def ids(self, namespace: Namespace) -> set[str]:
        """What the collection holds now."""
        with self._owned():
            return set(self._collection(namespace).get(include=[])["ids"])

    def sync(self, namespace: Namespace) -> None:
        """Add the rows that are new; where rows went away, take out what the rows no longer hold."""
        with self._owned():
            self._synced(namespace)

    def _synced(self, namespace: Namespace) -> Table:
        collection = self._collection(namespace)
        state = collection.metadata or {}
        epoch, last = self._source.vector_epoch(namespace, self._fingerprint)
        if state.get("epoch") == epoch and state.get("last") == last:
            return collection
        whole = state.get("epoch") != epoch
        ids, seqs, rows, last = self._source.read_vectors(
            namespace, self._fingerprint, 0 if whole else int(state["last"])
        )
        if whole:
            held = set(collection.get(include=[])["ids"])
            self._drop_former(namespace, collection.name)
            gone = sorted(held - set(ids))
            for start in range(0, len(gone), BATCH):
                collection.delete(ids=gone[start : start + BATCH])
        for start in range(0, len(ids), BATCH):
            part = slice(start, start + BATCH)
            collection.upsert(ids=ids[part], embeddings=rows[part], metadatas=[{"seq": seq} for seq in seqs[part]])
        # last of all: an interrupted catch-up is simply repeated
        collection.modify(metadata={"epoch": epoch, "last": last, "of": _digest(namespace)})
        return collection

    def _drop_former(self, namespace: Namespace, name: str) -> None:
        """Delete what was indexed of the namespace under another embedder: nothing keeps it in step any more."""
        for other in self._client.list_collections():
            if other.name != name and (other.metadata or {}).get("of") == _digest(namespace):
                self._client.delete_collection(other.name)

    def _collection(self, namespace: Namespace) -> Table:
        collection: Table = self._client.get_or_create_collection(
            self._name(namespace), embedding_function=None, configuration={"hnsw": {"space": "cosine"}}
        )
        return collection

    def _name(self, namespace: Namespace) -> str:
        return "memos-" + _digest([namespace, self._fingerprint])

    def drop(self, namespace: Namespace) -> None:
        """Delete the collection; the next search rebuilds it."""
        from chromadb.errors import NotFoundError

        with self._owned():
            try:
                self._client.delete_collection(self._name(namespace))
            except NotFoundError:
                return

    def purge(self, namespaces: Collection[Namespace] | None) -> bool:
        """Drop their collections, which the next search rebuilds, and what Chroma leaves of them in its files.

        Chroma keeps what was added in a queue, and folders of collections that are gone.
        """
        from chromadb.errors import ChromaError

        with self._owned():
            try:
                # one without metadata was never filled to its end: it may be anyone's
                theirs = None if namespaces is None else {None, *map(_digest, namespaces)}
                for each in self._client.list_collections():
                    if theirs is None or (each.metadata or {}).get("of") in theirs:
                        self._client.delete_collection(each.name)
                self._client.close()
                try:
                    self._clean()
                finally:
                    self._client = self._connected()
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


def _digest(identity: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(identity, ensure_ascii=False).encode()).hexdigest()[:40]
