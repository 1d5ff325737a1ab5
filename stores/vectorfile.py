"""One file of vectors: what the exact index keeps on disk of a run of vector rows, mapped into memory to be read.

Beside the vectors themselves stand short codes: the coordinates along the directions in which these vectors differ
most, in int8. From a code follows a bound that the cosine cannot exceed (Cauchy-Schwarz for what the code leaves out),
so a search reads the codes of all rows and the vectors of the few whose bound reaches the k-th best: the result is
that of reading them all.

A file is derived from the rows, written aside and renamed, never grown. A row that is forgotten is overwritten with
zeros where it stands, so that nothing is left of it, also for a process that has the file mapped. One process at a time
writes in a namespace's folder, and looks there first whether something was forgotten meanwhile.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from memory_os.errors import StoreError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from memory_os.protocols import Matrix, Vector, VectorRows

    Ints = NDArray[np.int64]

__all__ = ["Rows", "Unreadable", "VectorFile", "folder_of", "owned", "weed"]

MAGIC = b"memosv01"
FIXED = struct.Struct("<8sqII")  # magic, epoch, length and CRC-32 of the description that follows
HEADER = 4096
ENERGY = 0.9
"""The codes keep so much of the vectors' squared length: 128 of MiniLM's 384 directions keep 0.92."""
STEP = 32  # codes have a multiple of so many numbers
SLACK = 2e-5
"""More than float32 loses in a dot product of unit vectors."""

log = logging.getLogger(__name__)


class Unreadable(Exception):
    """The file is not whole, or of another version: to be made anew."""


@dataclass(frozen=True, slots=True)
class _Section:
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def n_bytes(self) -> int:
        import numpy as np

        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


class VectorFile:
    """A file of vector rows, open to be read.

    :raises Unreadable: if it is not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < HEADER:
                raise Unreadable(path)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        magic, self.epoch, length, checksum = FIXED.unpack_from(self._map)
        written = self._map[FIXED.size : FIXED.size + length]
        if magic != MAGIC or zlib.crc32(written) != checksum:
            raise Unreadable(path)
        told = json.loads(written)
        self.after: int = told["after"]
        self.last: int = told["last"]
        self.last_seq: int = told["last_seq"]
        self._rest: float = told["rest"]
        self._sections = [_Section(name, dtype, tuple(shape), at) for name, dtype, shape, at in told["sections"]]
        if size != told["size"]:
            raise Unreadable(path)
        views = self._views(self._map)
        self._basis, self._codes, self._scales, self._tails = (
            views[name] for name in ("basis", "codes", "scales", "tails")
        )
        self.rows: Ints = views["rows"]
        """The numbers of the rows, rising; 0 for one that was forgotten."""
        self.seqs: Ints = views["seqs"]
        self._ids: NDArray[np.bytes_] = views["ids"]
        self.vectors: Matrix = views["vectors"]

    def _views(self, memory: mmap.mmap) -> dict[str, NDArray[Any]]:
        import numpy as np

        return {
            s.name: np.frombuffer(memory, s.dtype, count=int(np.prod(s.shape, dtype=np.int64)), offset=s.start).reshape(
                s.shape
            )
            for s in self._sections
        }

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def write(cls, path: Path, found: VectorRows, *, after: int, epoch: int) -> VectorFile:
        """Write these rows, durably, in the place of what may be there, and open the file.

        :param after: the row that comes before the first.
        :param epoch: of the namespace, when they were all there.
        :raises OSError: if it cannot be written; then nothing is changed.
        """
        import numpy as np

        n, dimension = found.vectors.shape
        basis, codes, scales, tails, rest = _coded(found.vectors)
        ids = np.array([id_.encode() for id_ in found.ids] or [b"-"], dtype=np.bytes_)[:n]
        columns: dict[str, NDArray[Any]] = {
            "basis": basis, "codes": codes, "scales": scales, "tails": tails,
            "rows": found.rows.astype("<i8"), "seqs": np.asarray(found.seqs, dtype="<i8"),
            "ids": ids, "vectors": found.vectors.astype("<f4", copy=False).reshape(n, dimension),
        }  # fmt: skip
        sections, at = [], HEADER
        for name, column in columns.items():
            sections.append((name, column.dtype.str, column.shape, at))
            at += -(-column.nbytes // 64) * 64
        told = json.dumps(
            {"after": after, "last": int(found.rows[-1]), "last_seq": int(max(found.seqs)), "rest": rest,
             "size": at, "sections": sections}
        ).encode()  # fmt: skip
        aside = path.with_name(f"{path.name}.new")
        with os.fdopen(os.open(aside, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
            file.write(FIXED.pack(MAGIC, epoch, len(told), zlib.crc32(told)) + told)
            for (_, _, _, start), column in zip(sections, columns.values(), strict=True):
                file.seek(start)
                file.write(np.ascontiguousarray(column).data)
            file.truncate(at)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        return cls(path)

    def ids(self, places: Ints) -> list[str]:
        """The segments' ids at these places; empty for what was forgotten."""
        return [id_.decode() for id_ in self._ids[places].tolist()]

    def bury(self, dead: NDArray[np.bool_], epoch: int | None = None) -> None:
        """Leave nothing of these rows.

        :param epoch: at which what is left is all that there is of these rows; the file's own, if it is not known.
        :raises OSError: if the file cannot be written.
        """
        with self.path.open("r+b") as file:
            with mmap.mmap(file.fileno(), 0) as memory:
                if dead.any():
                    for name, column in self._views(memory).items():
                        if name != "basis":
                            column[dead] = b"" if name == "ids" else 0
                    del column  # the map cannot be closed while an array looks into it
                memory.flush()
            if epoch is not None:
                file.seek(8)  # last of all: what was not finished is done again
                file.write(struct.pack("<q", epoch))
                file.flush()
                self.epoch = epoch
            os.fsync(file.fileno())

    def near(self, vector: Vector, k: int, floor: float, upto: int | None) -> tuple[Ints, Vector]:
        """``(places, cosines)`` of every row that can be among the ``k`` best and reaches ``floor``, and of some more.

        :param floor: as high as the k-th best found elsewhere.
        """
        import numpy as np

        bounds = self._bounds(vector)
        if upto is not None and upto < self.last_seq:
            bounds[self.seqs > upto] = -np.inf
        if floor == -np.inf and k < len(bounds):
            # any k rows give a floor; those with the highest bounds give a high one
            first = np.argpartition(bounds, len(bounds) - k)[len(bounds) - k :]
            first = first[(self.rows[first] > 0) & (bounds[first] > -np.inf)]
            if len(first) == k:
                floor = float(self._cosines(first, vector).min())
        places = np.flatnonzero((bounds >= floor) & (bounds > -np.inf))
        places = places[self.rows[places] > 0]
        return places, self._cosines(places, vector)

    def _cosines(self, places: Ints, vector: Vector) -> Vector:
        import numpy as np

        # not a matrix product: its last bit depends on where a row stands, and equal rows must be equal
        cosines: Vector = np.einsum("ij,j->i", self.vectors[places], vector)
        return cosines

    def _bounds(self, vector: Vector) -> Vector:
        """What the cosine of each row cannot exceed."""
        import numpy as np
        import simsimd

        along = self._basis.T @ vector
        across = float(np.linalg.norm(vector - self._basis @ along))
        scale = max(float(np.abs(along).max(initial=0.0)), 1e-9) / 127.0
        code = np.rint(along / scale).astype(np.int8)
        lost = float(np.linalg.norm(along - scale * code))
        length = float(np.linalg.norm(along))
        products = np.asarray(simsimd.dot(code, self._codes)).astype(np.float32).reshape(-1)
        products *= self._scales
        products *= scale
        products += across * self._tails
        products += lost * (1.0 + self._rest) + length * self._rest + SLACK
        return products


class Rows(NamedTuple):
    """The rows of vectors that there are at one moment.

    :param numbers: of all of them, in no order.
    :param last: the last number that was ever given.
    """

    numbers: Ints
    last: int


def folder_of(database: Path) -> Path:
    """Where the files of this database are, in a folder for each namespace."""
    return database.with_name(database.name + ".vectors")


@contextmanager
def owned(place: Path, patience_s: float) -> Iterator[None]:
    """Write in a namespace's folder, which is made if it is missing; of several processes one does, the others read.

    :raises OSError: if it cannot be written, or another process does for longer than one waits (``TimeoutError``).
    """
    from filelock import FileLock

    for folder in (place.parent, place):
        folder.mkdir(mode=0o700, exist_ok=True)
    with FileLock(place / "lock", mode=0o600, timeout=patience_s):
        yield


def weed(folder: Path, read: Callable[[], Rows], patience_s: float) -> bool:
    """Leave nothing in the files of rows that are gone, whoever wrote them and by whatever embedder.

    :param folder: of the database.
    :param read: gives the rows that there are.
    :param patience_s: so long, at most, one who writes in a namespace's folder is waited for.
    :return: whether that is so now.
    """
    if not folder.is_dir():
        return True
    try:
        places = [place for place in folder.iterdir() if place.is_dir()]
        there = read()
        for place in places:
            with owned(place, patience_s):
                _weed(place, there)
    except (OSError, StoreError) as error:
        log.warning("%s may still hold vectors of what was forgotten, until it is next opened: %s", folder, error)
        return False
    return True


def _weed(place: Path, there: Rows) -> None:
    import numpy as np

    for path in place.glob("*.new"):  # of one who was killed: who writes has the lock
        path.unlink()
    followed: set[str] = set()  # chains of files of which a later one stays: each is found by the one before it
    for path in sorted(place.glob("*.vectors"), key=lambda path: int(path.stem.rpartition("-")[2]), reverse=True):
        chain = path.stem.rpartition("-")[0]
        try:
            file = VectorFile(path)
        except Unreadable:
            path.unlink()
            continue
        # later rows were added since the rows were read
        dead = (file.rows > 0) & (file.rows <= there.last) & ~np.isin(file.rows, there.numbers)
        if dead.any():
            file.bury(dead)
        if file.rows.any() or chain in followed:
            followed.add(chain)
        else:
            path.unlink()


def _coded(vectors: Matrix) -> tuple[Matrix, NDArray[np.int8], Vector, Vector, float]:
    """``(basis, codes, scales, tails, rest)``.

    A vector is ``basis @ (scale * code + e) + z`` with ``|e| <= rest`` and ``|z| = tail``.
    """
    import numpy as np

    dimension = vectors.shape[1]
    energy, directions = np.linalg.eigh((vectors.T @ vectors).astype(np.float64))
    energy, directions = energy[::-1].clip(0), directions[:, ::-1]
    share = np.cumsum(energy) / max(float(energy.sum()), 1e-9)
    width = min(dimension, -(-(int(np.searchsorted(share, ENERGY)) + 1) // STEP) * STEP)
    # turned at random, so that no number of a code is much larger than the others and int8 loses least
    turned, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))
    basis = np.ascontiguousarray(directions[:, :width] @ turned, dtype=np.float32)
    along = vectors @ basis
    scales = (np.abs(along).max(axis=1, initial=0.0) / 127.0).astype(np.float32)
    codes = np.rint(along / np.maximum(scales, 1e-12)[:, None]).astype(np.int8)
    rest = float(np.linalg.norm(along - scales[:, None] * codes, axis=1).max(initial=0.0))
    tails = np.linalg.norm(vectors - along @ basis.T, axis=1).astype(np.float32)
    return basis, codes, scales, tails, rest
