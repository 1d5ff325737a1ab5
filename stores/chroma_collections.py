"""Chroma's collections, kept equal to the vector rows: one a namespace and embedder, embedded or on a server.

The rows are the outbox. A collection's metadata says up to where they are delivered: ``epoch``, which changes when rows
went away, ``last``, the last row, and ``store``, whose they are. Any number of processes may deliver at once, and any
of them may be late:

- A vector never changes under its id, so delivering twice, or in any order, comes to the same.
- What is held is listed *before* the rows are read. So what is held and is no row was deleted: nobody takes out what
  another has just delivered.
- ``epoch`` and ``last`` are written last of all, and claim only what was there before. An older claim over a newer one
  has some rows delivered again.
- A claim is not trusted alone: each search compares the number of vectors with the number of rows. A vector that a slow
  process delivers after its row was deleted, or what the server lost, shows there, and all is compared anew.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from memory_os.errors import StoreError
from memory_os.types import Namespace

if TYPE_CHECKING:
    from memory_os.protocols import Matrix, Vector, VectorSource

__all__ = ["Collections", "TooMuch", "cosines_of"]

BATCH_NUMBERS = 100_000
"""Of a batch's vectors: 260 of MiniLM's, less than half a second for a slow server."""
PAGE = 1000
ATTEMPTS = 5
SPARE = 32
"""So many more are asked for than wanted: to leave out what is after ``upto``, and for ties."""
SAME = 0.999
"""The cosine of a row and what the server holds of it, which may be rounded."""


class TooMuch(Exception):
    """More is to be delivered than one waits for."""


class Standing(NamedTuple):
    """The rows of a namespace: see ``VectorSource``."""

    epoch: int
    last: int
    n: int


class Collections:
    """The collections of one embedder.

    :param client: Chroma's; what it raises is passed on.
    :param owner: of the collections, where several stores share a server.
    """

    def __init__(self, source: VectorSource, fingerprint: str, client: Any, *, owner: str = "") -> None:
        self._source = source
        self._fingerprint = fingerprint
        self._client = client
        self._owner = [owner] if owner else []
        self._known: dict[Namespace, tuple[Any, Standing]] = {}

    # -- reading ---------------------------------------------------------------------------------------------------

    def nearest(
        self, namespace: Namespace, vector: Vector, k: int, upto: int | None = None, *, most: int | None = None
    ) -> list[tuple[str, float]]:
        """The ``k`` best ``(segment id, cosine)`` that HNSW finds, by the cosines of the rows, ties by ``seq``.

        :param most: see ``synced``.
        """
        collection = self.synced(namespace, most=most)
        n = collection.count() if k > 0 else 0
        if not n:
            return []
        found = self._found(collection, namespace, vector, min(n, k + SPARE), upto)
        if upto is not None and len(found) < k and k + SPARE < n:
            # what comes after upto took their places: a filter is slow, and sure
            found = self._found(collection, namespace, vector, min(n, k + SPARE), upto, {"seq": {"$lte": upto}})
        return found[:k]

    def _found(
        self, collection: Any, namespace: Namespace, vector: Vector, n: int, upto: int | None, where: Any = None
    ) -> list[tuple[str, float]]:
        import numpy as np

        asked = vector.reshape(1, -1)
        [ids] = collection.query(query_embeddings=asked, n_results=n, where=where, include=[])["ids"]
        known, seqs, rows = self._source.vectors_of(namespace, self._fingerprint, ids)
        if not known:
            return []
        cosines = rows @ vector
        best = [i for i in np.lexsort((np.array(seqs), -cosines)) if upto is None or seqs[i] <= upto]
        return [(known[i], float(cosines[i])) for i in best]

    def held(self, namespace: Namespace) -> dict[str, int | None]:
        """``{segment id: checksum of its vector}`` of what the collection holds now."""
        collection = self._existing(namespace)
        return _held(collection) if collection else {}

    def differences(self, namespace: Namespace, *, deep: bool = False) -> dict[str, list[str]]:
        """How the collection differs from the rows; see ``KeptIndex``."""
        collection = self._existing(namespace)
        held = _held(collection) if collection else {}
        state = (collection and collection.metadata) or {}
        ids, _, rows, last = self._source.read_vectors(namespace, self._fingerprint)
        epoch, _ = self._source.vector_epoch(namespace, self._fingerprint)
        claimed = self._is_claimed(state, epoch, last)
        later = self._source.read_vectors(namespace, self._fingerprint, state["last"])[0] if claimed else ids
        undelivered = set(later) - held.keys()
        wrong = [id_ for id_, row in zip(ids, rows, strict=True) if held.get(id_) not in (None, _sum(row))]
        if deep and collection:
            wrong = sorted({*wrong, *self._unlike(collection, ids, rows)})
        return {
            "missing": [id_ for id_ in ids if id_ not in held and id_ not in undelivered],
            "extra": sorted(held.keys() - set(ids)),
            "wrong": wrong,
            "undelivered": sorted(undelivered),
        }

    def _unlike(self, collection: Any, ids: Sequence[str], rows: Matrix) -> Iterator[str]:
        """Those whose vector is not the row's."""
        import numpy as np

        for part in _batches(rows):
            found = collection.get(ids=list(ids[part]), include=["embeddings"])
            row_of = dict(zip(ids[part], rows[part], strict=True))
            for id_, vector in zip(found["ids"], found["embeddings"], strict=True):
                own = np.asarray(vector, dtype=np.float32)
                if own.shape != row_of[id_].shape or not own @ row_of[id_] >= SAME * np.linalg.norm(own) > 0:
                    yield id_

    # -- delivering ------------------------------------------------------------------------------------------------

    def synced(self, namespace: Namespace, *, whole: bool = False, most: int | None = None) -> Any:
        """The collection, equal to the rows.

        :param whole: compare everything, whatever the collection's metadata say.
        :param most: so many rows are delivered, or compared, at most.
        :raises TooMuch: if there are more; nothing was done.
        :raises StoreError: if something else keeps changing the collection.
        """
        from chromadb.errors import NotFoundError

        collection: Any
        collection, standing = self._known.get(namespace, (None, None))
        if standing and not whole and standing[:2] == self._source.vector_epoch(namespace, self._fingerprint):
            try:
                if collection.count() == standing.n:
                    return collection
            except NotFoundError:  # dropped by another process
                pass
        for _ in range(ATTEMPTS):
            try:
                collection = self._collection(namespace)
                standing = self._standing(namespace)
                self._deliver(namespace, collection, standing, whole=whole, most=most)
                n, now = collection.count(), self._standing(namespace)
            except NotFoundError:
                continue
            if n == now.n and now == standing:
                self._known[namespace] = collection, standing
                return collection
            if now != standing and now.epoch == standing.epoch:
                return collection  # rows were added meanwhile; what was there is delivered
            whole = whole or now == standing  # else rows went away, which the next round sees by itself
        raise StoreError(f"something else keeps changing the Chroma collection {self._name(namespace)}; leave it to us")

    def _standing(self, namespace: Namespace) -> Standing:
        epoch, last = self._source.vector_epoch(namespace, self._fingerprint)
        return Standing(epoch, last, self._source.count_vectors(namespace, self._fingerprint))

    def _deliver(
        self, namespace: Namespace, collection: Any, standing: Standing, *, whole: bool, most: int | None
    ) -> None:
        state = collection.metadata or {}
        whole = whole or not self._is_claimed(state, standing.epoch, standing.last)
        if not whole and state["last"] == standing.last:
            return
        if most is not None and (standing.n if whole else standing.n - collection.count()) > most:
            raise TooMuch
        held = _held(collection) if whole else {}  # before the rows are read
        after = 0 if whole else state["last"]
        ids, seqs, rows, last = self._source.read_vectors(namespace, self._fingerprint, after)
        if whole:
            self._drop_former(namespace, collection.name)
            gone = sorted(held.keys() - set(ids))
            for start in range(0, len(gone), PAGE):
                collection.delete(ids=gone[start : start + PAGE])
        sums = [_sum(row) for row in rows]
        new = [i for i, id_ in enumerate(ids) if id_ not in held or held[id_] != sums[i]]
        self._send(collection, [ids[i] for i in new], [seqs[i] for i in new], rows[new])
        # last of all: an interrupted delivery is simply repeated
        about = {"epoch": standing.epoch, "last": last, "of": self._of(namespace), "store": self._source.id}
        collection.modify(metadata=about)

    def _is_claimed(self, state: Mapping[str, Any], epoch: int, last: int) -> bool:
        """Whether a collection says that it holds this store's rows up to one of those that there are."""
        # in a folder another store may have been; on a server the names are the store's own
        own = self._owner or state.get("store") == self._source.id
        return bool(own and state.get("epoch") == epoch and 0 <= state.get("last", -1) <= last)

    @staticmethod
    def _send(collection: Any, ids: Sequence[str], seqs: Sequence[int], rows: Matrix) -> None:
        for part in _batches(rows):
            about = [{"seq": seq, "sum": _sum(row)} for seq, row in zip(seqs[part], rows[part], strict=True)]
            collection.upsert(ids=list(ids[part]), embeddings=rows[part], metadatas=about)

    def mend(self, namespace: Namespace, *, deep: bool = False) -> None:
        """Make the collection equal to the rows; without rows it is not made."""
        collection = self._existing(namespace)
        if collection is None and not self._source.count_vectors(namespace, self._fingerprint):
            return
        if deep and collection:
            ids, seqs, rows, _ = self._source.read_vectors(namespace, self._fingerprint)
            unlike = set(self._unlike(collection, ids, rows))
            wrong = [i for i, id_ in enumerate(ids) if id_ in unlike]
            self._send(collection, [ids[i] for i in wrong], [seqs[i] for i in wrong], rows[wrong])
        self.synced(namespace, whole=True)

    def owed(self) -> list[Namespace]:
        """The namespaces in whose collections there may be what was forgotten.

        Collections of another embedder that nobody keeps in step any more are deleted.
        """
        names = {self._of(namespace): namespace for namespace in self._source.namespaces(emptied=True)}
        found: list[Namespace] = []
        for collection in self._all():
            state = collection.metadata or {}
            namespace = names.get(state.get("of", ""))
            if namespace and state.get("epoch") != self._source.vector_epoch(namespace, self._fingerprint)[0]:
                if collection.name == self._name(namespace):
                    found.append(namespace)
                else:
                    self._client.delete_collection(collection.name)
        return found

    def drop_all(self, namespaces: Iterable[Namespace] | None) -> None:
        """Delete the collections of these namespaces, or of all, under any embedder; for one who owns them all."""
        # one without metadata, of an earlier version, was never filled to its end: it may be anyone's
        theirs = None if namespaces is None else {None, *map(self._of, namespaces)}
        for each in self._all():
            if theirs is None or (each.metadata or {}).get("of") in theirs:
                self._client.delete_collection(each.name)
        self._known.clear()

    def purge(self, namespaces: Iterable[Namespace] | None) -> None:
        """Take out of the collections of these namespaces, or of all, what is no row any more, under any embedder."""
        owed = self.owed()
        for namespace in owed if namespaces is None else set(namespaces).intersection(owed):
            self.synced(namespace)

    def _drop_former(self, namespace: Namespace, name: str) -> None:
        """Delete what was indexed of the namespace under another embedder: nothing keeps it in step any more."""
        for other in self._all():
            if other.name != name and (other.metadata or {}).get("of") == self._of(namespace):
                self._client.delete_collection(other.name)

    def drop(self, namespace: Namespace) -> None:
        """Delete the collection; the next search rebuilds it."""
        from chromadb.errors import NotFoundError

        self._known.pop(namespace, None)
        try:
            self._client.delete_collection(self._name(namespace))
        except NotFoundError:
            return

    # -- names -----------------------------------------------------------------------------------------------------

    def _all(self) -> list[Any]:
        found: list[Any] = []
        while len(page := self._client.list_collections(limit=PAGE, offset=len(found))) == PAGE:
            found += page
        return [*found, *page]

    def _collection(self, namespace: Namespace) -> Any:
        return self._client.get_or_create_collection(
            self._name(namespace),
            embedding_function=None,
            configuration={"hnsw": {"space": "cosine"}},
            metadata={"of": self._of(namespace)},  # of one that is there its own are kept
        )

    def _existing(self, namespace: Namespace) -> Any | None:
        from chromadb.errors import NotFoundError

        try:
            return self._client.get_collection(self._name(namespace), embedding_function=None)
        except NotFoundError:
            return None

    def _name(self, namespace: Namespace) -> str:
        return "memos-" + _digest([*self._owner, namespace, self._fingerprint])

    def _of(self, namespace: Namespace) -> str:
        return _digest([*self._owner, *namespace] if self._owner else namespace)


def cosines_of(
    source: VectorSource, fingerprint: str, namespace: Namespace, vector: Vector, ids: Sequence[str]
) -> Vector:
    """The cosines of these segments' rows, in their order; 0 for one that has none."""
    import numpy as np

    known, _, rows = source.vectors_of(namespace, fingerprint, list(dict.fromkeys(ids)))
    cosines = dict(zip(known, (rows @ vector).tolist(), strict=True)) if known else {}
    return np.array([cosines.get(id_, 0.0) for id_ in ids], dtype=np.float32)


def _held(collection: Any) -> dict[str, int | None]:
    found = collection.get(include=["metadatas"])
    return {id_: (about or {}).get("sum") for id_, about in zip(found["ids"], found["metadatas"], strict=True)}


def _batches(rows: Matrix) -> Iterator[slice]:
    size = max(1, BATCH_NUMBERS // max(1, rows.shape[1]))
    for start in range(0, len(rows), size):
        yield slice(start, start + size)


def _sum(row: Vector) -> int:
    return zlib.crc32(row.tobytes())


def _digest(identity: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(identity, ensure_ascii=False).encode()).hexdigest()[:40]
