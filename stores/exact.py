"""Exact nearest segments: one matrix per namespace, built from the vector rows and extended as rows are added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

from memory_os.errors import ConfigError
from memory_os.types import Namespace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from memory_os.protocols import Matrix, Vector, VectorSource

__all__ = ["ExactIndex"]


@dataclass
class _Table:
    epoch: int
    last: int = 0
    ids: list[str] = field(default_factory=list)
    row_of: dict[str, int] = field(default_factory=dict)
    seqs: NDArray[np.int64] | None = None  # with spare room at the end, as is the matrix
    matrix: Matrix | None = None


class ExactIndex:
    """``VectorIndex`` by a matrix product; recall is 1.0 by construction.

    :param source: where the rows are.
    :param fingerprint: the embedder whose vectors are indexed.
    """

    def __init__(self, source: VectorSource, *, fingerprint: str) -> None:
        self._source = source
        self._fingerprint = fingerprint
        self._tables: dict[Namespace, _Table] = {}
        self._lock = Lock()

    def search(
        self, namespace: Namespace, vector: Vector, k: int, *, upto: int | None = None
    ) -> list[tuple[str, float]]:
        """The ``k`` best ``(segment id, cosine)`` among segments with ``seq <= upto``."""
        import numpy as np

        with self._lock:
            table = self._synced(namespace)
            n = len(table.ids)
            if not n or k < 1 or table.matrix is None or table.seqs is None:
                return []
            ids, seqs, matrix = table.ids, table.seqs[:n], table.matrix[:n]
        if matrix.shape[1] != len(vector):
            raise ConfigError(
                f"the embedder gives {len(vector)} numbers, and the vectors made under its name {self._fingerprint!r} "
                f"have {matrix.shape[1]}: another model has this name; give it one of its own, such as "
                "LangChainEmbedder(..., name=...), and open the memory again"
            )
        scores = matrix @ vector
        if upto is not None and upto < seqs.max():
            scores = np.where(seqs <= upto, scores, -np.inf)
        # every row that ties with the k-th best takes part, so that the smaller seq wins whatever the partition does
        kth = np.partition(scores, n - k)[n - k] if k < n else -np.inf
        best = np.flatnonzero((scores >= kth) & (scores > -np.inf))
        best = best[np.lexsort((seqs[best], -scores[best]))][:k]
        return [(ids[i], float(scores[i])) for i in best]

    def similarities(self, namespace: Namespace, vector: Vector, ids: Sequence[str]) -> Vector:
        """The cosines of these segments, in their order, as of the last search; 0 for one that has no vector."""
        import numpy as np

        with self._lock:
            table = self._tables.get(namespace) or self._synced(namespace)
            rows = np.fromiter((table.row_of.get(id_, -1) for id_ in ids), dtype=np.int64, count=len(ids))
            matrix = table.matrix
        cosines = np.zeros(len(ids), dtype=np.float32)
        if matrix is not None:
            cosines[rows >= 0] = matrix[rows[rows >= 0]] @ vector
        return cosines

    def ids(self, namespace: Namespace) -> set[str]:
        """What the matrix holds now."""
        with self._lock:
            table = self._tables.get(namespace)
            return set(table.ids) if table else set()

    def sync(self, namespace: Namespace) -> None:
        """Read the rows that are new, or all of them where rows went away."""
        with self._lock:
            self._synced(namespace)

    def _synced(self, namespace: Namespace) -> _Table:
        epoch, last = self._source.vector_epoch(namespace, self._fingerprint)
        table = self._tables.get(namespace)
        if table is None or table.epoch != epoch:
            table = self._tables[namespace] = _Table(epoch)
        if last > table.last:
            ids, seqs, rows, after = self._source.read_vectors(namespace, self._fingerprint, table.last)
            if not table.row_of.keys().isdisjoint(ids):  # made anew, after another embedder's had taken their place
                table = self._tables[namespace] = _Table(epoch)
                ids, seqs, rows, after = self._source.read_vectors(namespace, self._fingerprint, 0)
            table.last = after
            _extend(table, ids, seqs, rows)
        return table

    def drop(self, namespace: Namespace) -> None:
        """Forget the matrix; the next search rebuilds it."""
        with self._lock:
            self._tables.pop(namespace, None)

    def purge(self, namespace: Namespace) -> bool:
        """As ``sync``: it has no files."""
        self.sync(namespace)
        return True

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._tables.clear()


def _extend(table: _Table, ids: list[str], seqs: list[int], rows: Matrix) -> None:
    import numpy as np

    if not ids:
        return
    n, total = len(table.ids), len(table.ids) + len(ids)
    if table.matrix is None or table.seqs is None or len(table.matrix) < total:
        # doubling keeps the cost of adding one row at a time constant; readers keep the old arrays
        room = total if table.matrix is None else max(total, 2 * len(table.matrix))
        matrix = np.empty((room, rows.shape[1]), dtype=np.float32)
        numbers = np.empty(room, dtype=np.int64)
        if table.matrix is not None and table.seqs is not None:
            matrix[:n], numbers[:n] = table.matrix[:n], table.seqs[:n]
        table.matrix, table.seqs = matrix, numbers
    table.matrix[n:total], table.seqs[n:total] = rows, seqs
    table.row_of.update(zip(ids, range(n, total), strict=True))
    table.ids.extend(ids)  # a reader that holds the list looks only below its own n
