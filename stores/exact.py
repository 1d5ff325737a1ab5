"""Exact nearest segments: a plain matrix of the newest rows in memory, and files for every full run of older ones.

A namespace of fewer than ``RUN`` rows is one matrix. Beyond that each ``RUN`` rows become a file beside the database
(``vectorfile``), mapped when it is needed: memory holds what the system has room for, and a process that opens the
database reads the newest rows only. Either way the result is that of comparing every row.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from memory_os.errors import StoreError
from memory_os.stores.rows import check_dimension
from memory_os.stores.vectorfile import Filed, Unreadable, VectorFile, owned
from memory_os.types import Namespace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from memory_os.protocols import Matrix, Vector, VectorRows, VectorSource

    Ints = NDArray[np.int64]

__all__ = ["RUN", "ExactIndex"]

RUN = 16_384
"""So many rows make a file; at 384 dimensions 28 MB."""
MAX_BYTES = 256 * 2**20
"""So much of the matrices of all namespaces is kept in memory; the least recently used ones are let go."""
ROW_BYTES = 300  # of ids and numbers, beside the vector
PATIENCE_S = 10.0

log = logging.getLogger(__name__)


@dataclass
class _Table:
    """What is known of a namespace: files of the oldest rows, and a matrix of those after them."""

    epoch: int
    files: tuple[VectorFile, ...] = ()
    last: int = 0  # the last row that was read
    last_seq: int = 0
    ids: list[str] = field(default_factory=list)  # of the matrix; the numbers and the seqs too
    row_of: dict[str, int] = field(default_factory=dict)
    rows: Ints | None = None  # with spare room at the end, as are the two below
    seqs: Ints | None = None
    matrix: Matrix | None = None
    filed: dict[str, int] | None = None  # of the ids in the files, file (from 1) << 32 | place; made when asked for

    @property
    def base(self) -> int:
        """The last row of the files."""
        return self.files[-1].last if self.files else 0

    @property
    def n_bytes(self) -> int:
        """About what it holds in memory."""
        matrix = 0 if self.matrix is None else self.matrix.nbytes
        return matrix + ROW_BYTES * (len(self.ids) + len(self.filed or ()))


class ExactIndex:
    """``VectorIndex`` that misses nothing: recall is 1.0 by construction.

    :param source: where the rows are.
    :param fingerprint: the embedder whose vectors are indexed.
    :param folder: for the files of large namespaces; made when it is needed. Without one all is kept in memory.
    """

    def __init__(self, source: VectorSource, *, fingerprint: str, folder: Path | None = None) -> None:
        self._source = source
        self._fingerprint = fingerprint
        self._folder = folder
        self._files_fail = folder is None
        self._tables: OrderedDict[Namespace, _Table] = OrderedDict()
        self._lock = Lock()

    def search(
        self, namespace: Namespace, vector: Vector, k: int, *, upto: int | None = None
    ) -> list[tuple[str, float]]:
        """The ``k`` best ``(segment id, cosine)`` among segments with ``seq <= upto``."""
        import numpy as np

        with self._lock:
            table = self._synced(namespace)
            files, ids, n = table.files, table.ids, len(table.ids)
            seqs = None if table.seqs is None else table.seqs[:n]
            matrix = None if table.matrix is None else table.matrix[:n]
        if k < 1:
            return []
        for dimension in {each.shape[1] for each in (matrix, *(file.vectors for file in files)) if each is not None}:
            check_dimension(self._fingerprint, dimension, len(vector))
        places = np.empty(0, dtype=np.int64)
        cosines, their_seqs, floor = places.astype(np.float32), places, -np.inf
        if matrix is not None and seqs is not None and n:
            # not "@": its last bit depends on where a row stands, and its threads wait for each other
            scores = np.einsum("ij,j->i", matrix, vector)
            places, cosines = _near(scores, seqs, k, upto)
            their_seqs = seqs[places]
            floor = float(cosines.min()) if len(places) >= k else floor
        filed = Filed(files)
        rows, their_cosines = filed.near(vector, k, floor, upto)
        order = np.lexsort((np.append(their_seqs, filed.seqs(rows)), -np.append(cosines, their_cosines)))[:k]
        found = [*zip(map(ids.__getitem__, places.tolist()), cosines.tolist(), strict=True)]
        found += zip(filed.ids(rows), their_cosines.tolist(), strict=True)
        return [found[at] for at in order.tolist() if found[at][0]]  # without one that was forgotten a moment ago

    def similarities(self, namespace: Namespace, vector: Vector, ids: Sequence[str]) -> Vector:
        """The cosines of these segments, in their order, as of the last search; 0 for one that has no vector."""
        import numpy as np

        cosines = np.zeros(len(ids), dtype=np.float32)
        with self._lock:
            table = self._tables.get(namespace) or self._synced(namespace)
            files, matrix = table.files, table.matrix
            if files and table.filed is None:
                table.filed = {}
                for number, file in enumerate(files, start=1):
                    _enter(table.filed, number, file)
            # the numbers of files begin at 1, so that a place in a file is greater than any in the matrix
            at = np.maximum(*(_looked_up(where, ids) for where in (table.filed or {}, table.row_of)))
        having = np.flatnonzero(at >= 0)
        if not len(having):
            return cosines
        gathered = np.empty((len(having), len(vector)), dtype=np.float32)
        numbers, places = at[having] >> 32, at[having] & 0xFFFFFFFF
        for number in np.flatnonzero(np.bincount(numbers)).tolist():
            here = np.flatnonzero(numbers == number)
            source = files[number - 1].vectors if number else matrix
            assert source is not None
            gathered[here] = source[places[here]]
        cosines[having] = np.einsum("ij,j->i", gathered, vector)
        return cosines

    def ids(self, namespace: Namespace) -> set[str]:
        """What the index holds now; what another process forgot since is no part of it."""
        import numpy as np

        with self._lock:
            if namespace not in self._tables:
                return set()
            table = self._synced(namespace)
            return {*table.ids, *(id_ for file in table.files for id_ in file.ids(np.flatnonzero(file.rows)))}

    def sync(self, namespace: Namespace) -> None:
        """Read the rows that are new, and let go of those that went away."""
        with self._lock:
            self._synced(namespace)

    def drop(self, namespace: Namespace) -> None:
        """Forget the matrix and delete the files; the next search rebuilds them."""
        with self._lock:
            self._tables.pop(namespace, None)
            self._unlink(namespace)

    def purge(self, namespaces: Collection[Namespace] | None) -> bool:
        """Let go of what is in memory.

        ``False``: the files, whoever wrote them, are the store's to weed (``RecordStore.scrub``), and it knows nothing
        of another index's.
        """
        with self._lock:
            for namespace in list(self._tables) if namespaces is None else namespaces:
                self._tables.pop(namespace, None)
        return False

    def close(self) -> None:
        """Let go of everything; the files stay."""
        with self._lock:
            self._tables.clear()

    # -- in step with the rows -------------------------------------------------------------------------------------

    def _synced(self, namespace: Namespace) -> _Table:
        epoch, last = self._source.vector_epoch(namespace, self._fingerprint)
        table = self._tables.get(namespace)
        if table is None:
            table = self._tables[namespace] = self._opened(namespace, epoch)
        self._tables.move_to_end(namespace)
        if table.epoch != epoch:
            table = self._weeded(namespace, epoch)
        while last > table.last:
            found = self._source.read_vector_rows(namespace, self._fingerprint, table.last, RUN)
            if not len(found.rows):
                table.last = last
                break
            if min(found.seqs) <= table.last_seq and self._gone(namespace, table):
                # made anew, after another embedder's had taken their place
                table = self._weeded(namespace, epoch)
                continue
            _extend(table, found)
            if len(table.ids) >= RUN:
                self._file(namespace, table)
                epoch, _ = self._source.vector_epoch(namespace, self._fingerprint)
                if table.epoch != epoch:  # something was forgotten while it was written
                    table = self._weeded(namespace, epoch)
        self._make_room()
        return table

    def _make_room(self) -> None:
        held = sum(table.n_bytes for table in self._tables.values())
        while held > MAX_BYTES and len(self._tables) > 1:
            held -= self._tables.popitem(last=False)[1].n_bytes

    def _opened(self, namespace: Namespace, epoch: int) -> _Table:
        """What the files hold; rows that went away since they were written are taken out of them."""
        table = _Table(epoch)
        self._adopt(namespace, table)
        if any(file.epoch != epoch for file in table.files):
            table = self._weeded(namespace, epoch)
        if table.files and not self._is_ours(namespace, table.files[-1]):
            log.warning("%s is made anew: it is of another store that was here", self._place(namespace))
            self._unlink(namespace)
            return _Table(epoch)
        return table

    def _is_ours(self, namespace: Namespace, file: VectorFile) -> bool:
        """Whether the last row of a file is the store's: another may have been here, or a later state of this one."""
        import numpy as np

        last = np.flatnonzero(file.rows)[-1:]
        found = self._source.read_vector_rows(namespace, self._fingerprint, int(file.rows[last].sum()) - 1, 1)
        return not len(last) or (
            found.rows.tolist() == file.rows[last].tolist()
            and list(found.ids) == file.ids(last)
            and np.array_equal(found.vectors, file.vectors[last])
        )

    def _weeded(self, namespace: Namespace, epoch: int) -> _Table:
        """A table without rows that are no longer there, in its files as well; those after the files are read anew."""
        import numpy as np

        table, files = _Table(epoch), list[VectorFile]()
        if self._has_files(namespace):
            with self._writable(namespace), owned(self._place(namespace), PATIENCE_S):
                self._adopt(namespace, table)  # anew: another process may have deleted some
                files += table.files
                there = self._source.vector_rows(namespace, self._fingerprint)
                for file in files:
                    dead = (file.rows > 0) & ~np.isin(file.rows, there)
                    if file.epoch != epoch or dead.any():
                        file.bury(dead, epoch)
                while files and not files[-1].rows.any():
                    files.pop().path.unlink(missing_ok=True)
        last_seq = max((file.last_seq for file in files), default=0)
        fresh = _Table(epoch, tuple(files), last=files[-1].last if files else 0, last_seq=last_seq)
        self._tables[namespace] = fresh
        return fresh

    def _gone(self, namespace: Namespace, table: _Table) -> bool:
        """Whether some of what the table holds is no longer there."""
        import numpy as np

        there = self._source.vector_rows(namespace, self._fingerprint)
        held = [file.rows[file.rows > 0] for file in table.files]
        if table.rows is not None:
            held.append(table.rows[: len(table.ids)])
        return any(not np.isin(rows, there).all() for rows in held)

    # -- files -----------------------------------------------------------------------------------------------------

    def _place(self, namespace: Namespace) -> Path:
        """The namespace's folder; its name tells nothing."""
        assert self._folder is not None
        return self._folder / _digest(json.dumps(namespace, ensure_ascii=False))

    def _file_after(self, namespace: Namespace, row: int) -> Path:
        return self._place(namespace) / f"{_digest(self._fingerprint)[:16]}-{row}.vectors"

    def _has_files(self, namespace: Namespace) -> bool:
        return self._folder is not None and self._place(namespace).is_dir()

    def _adopt(self, namespace: Namespace, table: _Table) -> None:
        """Open the files that follow the table's own, whoever wrote them."""
        if not self._has_files(namespace):
            return
        files = list(table.files)
        while (path := self._file_after(namespace, files[-1].last if files else 0)).exists():
            try:
                files.append(VectorFile(path))
            except (Unreadable, OSError) as error:
                log.warning("%s is made anew: %s", path, type(error).__name__)
                break
        table.files = tuple(files)
        if files:
            table.last = max(table.last, files[-1].last)
            table.last_seq = max(table.last_seq, *(file.last_seq for file in files))

    def _file(self, namespace: Namespace, table: _Table) -> None:
        """Move the matrix into a file, unless another process is at it: then it stays in memory for now."""
        if self._files_fail or table.rows is None or table.seqs is None or table.matrix is None:
            return
        from memory_os.protocols import VectorRows

        base, n = table.base, len(table.ids)
        try:
            with owned(self._place(namespace), 0):
                path = self._file_after(namespace, base)
                if self._source.vector_epoch(namespace, self._fingerprint)[0] != table.epoch:
                    return  # some of the rows were forgotten, and who did that may have weeded the files already
                if not path.exists():
                    rows = VectorRows(table.rows[:n], table.ids, table.seqs[:n].tolist(), table.matrix[:n])
                    VectorFile.write(path, rows, after=base, epoch=table.epoch)
        except TimeoutError:  # another process is at it
            return
        except OSError as error:
            self._files_fail = True
            log.warning("vectors stay in memory: %s cannot be written: %s", self._folder, error)
            return
        self._adopt(namespace, table)
        kept = table.rows[:n] > table.base  # none, unless another process has written a shorter file
        if table.base == base:
            return
        rows = VectorRows(
            table.rows[:n][kept], [id_ for id_, keep in zip(table.ids, kept, strict=True) if keep],
            table.seqs[:n][kept].tolist(), table.matrix[:n][kept],
        )  # fmt: skip
        if table.filed is not None:
            for number, file in enumerate(table.files, start=1):
                if file.after >= base:
                    _enter(table.filed, number, file)
        table.ids, table.row_of, table.rows, table.seqs, table.matrix = [], {}, None, None, None
        _extend(table, rows)

    def _unlink(self, namespace: Namespace) -> None:
        if not self._has_files(namespace):
            return
        with self._writable(namespace), owned(self._place(namespace), PATIENCE_S):
            for path in self._place(namespace).glob("*.vectors*"):
                path.unlink(missing_ok=True)

    @contextmanager
    def _writable(self, namespace: Namespace) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"{self._place(namespace)} holds vectors of what is gone and cannot be written "
                f"({error.strerror or error}); let it be written, or delete the folder"
            ) from error


def _near(scores: Vector, seqs: Ints, k: int, upto: int | None) -> tuple[Ints, Vector]:
    """``(places, cosines)`` of the ``k`` best rows of a matrix, and of every row that ties with the last of them."""
    import numpy as np

    n = len(scores)
    if upto is not None and upto < seqs.max():
        scores = np.where(seqs <= upto, scores, -np.inf)
    kth = np.partition(scores, n - k)[n - k] if k < n else -np.inf
    best = np.flatnonzero((scores >= kth) & (scores > -np.inf))
    return best, scores[best]


def _looked_up(places: dict[str, int], ids: Sequence[str]) -> Ints:
    """Where the ids stand; -1 where they do not."""
    import numpy as np

    return np.fromiter(map(places.get, ids, repeat(-1)), dtype=np.int64, count=len(ids))


def _enter(filed: dict[str, int], number: int, file: VectorFile) -> None:
    """Note where the ids of a file are."""
    import numpy as np

    places = np.flatnonzero(file.rows)
    filed.update(zip(file.ids(places), (places + (number << 32)).tolist(), strict=True))


def _extend(table: _Table, found: VectorRows) -> None:
    """Add rows to the matrix."""
    import numpy as np

    if not len(found.rows):
        return
    n, total = len(table.ids), len(table.ids) + len(found.rows)
    if table.matrix is None or table.seqs is None or table.rows is None or len(table.matrix) < total:
        # doubling keeps the cost of adding one row at a time constant; readers keep the old arrays
        room = total if table.matrix is None else max(total, 2 * len(table.matrix))
        matrix = np.empty((room, found.vectors.shape[1]), dtype=np.float32)
        seqs, rows = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int64)
        if table.matrix is not None and table.seqs is not None and table.rows is not None:
            matrix[:n], seqs[:n], rows[:n] = table.matrix[:n], table.seqs[:n], table.rows[:n]
        table.matrix, table.seqs, table.rows = matrix, seqs, rows
    table.matrix[n:total], table.seqs[n:total], table.rows[n:total] = found.vectors, found.seqs, found.rows
    table.row_of.update(zip(found.ids, range(n, total), strict=True))
    table.ids.extend(found.ids)  # a reader that holds the list looks only below its own n
    table.last = int(found.rows[-1])
    table.last_seq = max(table.last_seq, max(found.seqs))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:40]
