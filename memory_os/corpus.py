"""What recall keeps in memory of a namespace: one column a property, one row a segment, in the order of ``seq``.

A projection of the records, brought up to date before each use: new rows are added, and where rows went away all is
read anew. So recall computes its signals by array operations, and asks the database for where the question's terms
stand and for the answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from functools import partial
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar, cast

from memory_os.lexical import K1, B, idf
from memory_os.types import Namespace, Segment

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from memory_os.protocols import Matrix, Profiles, RecordStore, State, Vector

    Ints = NDArray[np.int64]

T = TypeVar("T")

__all__ = ["MAX_SEGMENTS", "Corpora", "Corpus"]

MAX_SEGMENTS = 300_000
"""Namespaces of more segments are not kept in memory (about 2 KB a segment); recall then fuses ranks only."""
MAX_NAMESPACES = 64
MAX_ROWS = 400_000
"""So many segments of all namespaces together: under a gigabyte. The namespace in use is kept whatever its size."""
MAX_SEGMENTS_HELD = 20_000
MAX_PLACES = 1_000_000
"""So many places of terms are kept at most, and those of one more question."""


COLUMNS = [
    ("seq", "int64"),
    ("session", "int64"),  # numbered in the order of appearance, as is "who"
    ("who", "int64"),
    ("day", "int64"),
    ("before", "int64"),  # the row of the session's segment before this one, and after it; -1 if there is none
    ("after", "int64"),
    ("n_terms", "float32"),
    ("n_tokens", "float32"),
    ("asks", "float32"),  # 1 for a text that ends with a question mark
    ("replies", "bool"),  # said by the assistant
    ("timed", "float32"),  # 1 for a text that says when
    ("echo", "bool"),  # repeats segments that are all there
    ("first", "int64"),  # where its token vectors begin, and how many there are
    ("count", "int64"),
]


class Column:
    """An array that grows at its end; readers of ``values`` keep what they have."""

    def __init__(self, dtype: Any, *shape: int) -> None:
        import numpy as np

        self.n = 0
        self._room = np.zeros((0, *shape), dtype=dtype)

    @property
    def values(self) -> NDArray[Any]:
        """All rows, ``[n]`` or ``[n, width]``."""
        return self._room[: self.n]

    def extend(self, rows: NDArray[Any]) -> None:
        """Add rows at the end."""
        import numpy as np

        total = self.n + len(rows)
        if total > len(self._room):
            room = np.empty((max(total, 2 * self.n), *self._room.shape[1:]), dtype=self._room.dtype)
            room[: self.n] = self._room[: self.n]
            self._room = room
        self._room[self.n : total] = rows
        self.n = total


class Corpus:
    """The columns of one namespace.

    :param width: bytes of a token vector; 0 where the embedder gives none.
    :param read: gives postings of terms, as ``RecordStore.postings``.
    """

    def __init__(self, epoch: int, width: int, read: Callable[[Iterable[str]], Mapping[str, Ints]]) -> None:
        self.epoch = epoch
        self.width = width
        self.last_segment = self.last_vector = 0
        self.n_echoes = 0
        self.ids: list[str] = []
        self.row_of: dict[str, int] = {}
        self.speakers: dict[str, int] = {}
        self._sessions: dict[str, int] = {}
        self._latest: dict[int, int] = {}  # the last row of each session
        self._read = read
        self._postings: dict[str, tuple[Ints, Vector]] = {}  # of the latest questions' terms
        self._segments: dict[int, Segment | None] = {}
        self._made: dict[str, tuple[int, Any]] = {}
        self._n_places = 0  # in them, about
        self._rows = Column(COLUMNS)
        self._numbers = Column("int64")  # the store's, by row
        self._tokens = Column("int8", width)

    @property
    def rows(self) -> NDArray[np.void]:
        """One record a segment; see ``COLUMNS``."""
        return self._rows.values

    def visible(self, upto: int | None) -> int:
        """How many rows have ``seq <= upto``."""
        import numpy as np

        return len(self.ids) if upto is None else int(np.searchsorted(self.rows["seq"], upto, side="right"))

    # growth ------------------------------------------------------------------------------------------------------

    def catch_up(self, store: RecordStore, namespace: Namespace, fingerprint: str, state: State) -> None:
        """Read what was added."""
        if state.last_segment > self.last_segment:
            self._add(store.read_profiles(namespace, self.last_segment))
        if self.width and state.last_vector > self.last_vector:
            self._add_tokens(store.read_tokens(namespace, fingerprint, self.last_vector))
        self.last_vector = max(self.last_vector, state.last_vector)

    def _add(self, profiles: Profiles) -> None:
        import numpy as np

        n = len(self.ids)
        new = np.zeros(len(profiles.ids), dtype=COLUMNS)
        if not len(new):
            return
        self.last_segment = int(profiles.rows[-1])
        self._postings.clear()
        for name, values in {
            "seq": profiles.seqs, "day": profiles.days, "n_terms": profiles.n_terms,
            "n_tokens": profiles.n_tokens, "asks": profiles.asks, "replies": profiles.replies, "timed": profiles.timed,
            "session": _numbered(profiles.sessions, self._sessions), "who": _numbered(profiles.who, self.speakers),
        }.items():  # fmt: skip
            new[name] = values
        self._join(new, n)
        self._rows.extend(new)
        self._numbers.extend(profiles.rows)
        self.row_of.update(zip(profiles.ids, range(n, n + len(new)), strict=True))
        self.ids.extend(profiles.ids)
        for row, repeated in ((n + place, ids) for place, ids in profiles.repeats.items()):
            if repeated and all(self.row_of.get(id_, row) < row for id_ in repeated):
                self.rows["echo"][row] = True
                self.n_echoes += 1

    def _join(self, new: NDArray[np.void], n: int) -> None:
        """Enter what comes before and after each of the new rows in its session; the first of them is row ``n``."""
        import numpy as np

        order = np.argsort(new["session"], kind="stable")
        sessions = new["session"][order]
        begins = np.append(True, sessions[1:] != sessions[:-1])
        before, after = order[:-1][~begins[1:]], order[1:][~begins[1:]]
        new["before"] = new["after"] = -1
        new["before"][after], new["after"][before] = n + before, n + after
        firsts, lasts = order[begins], order[np.append(begins[1:], True)]
        for session, first, last in zip(sessions[begins].tolist(), firsts.tolist(), lasts.tolist(), strict=True):
            earlier = self._latest.get(session, -1)
            self._latest[session] = n + last
            if earlier >= 0:
                new["before"][first] = earlier
                self.rows["after"][earlier] = n + first

    def _add_tokens(self, found: Sequence[tuple[int, bytes]]) -> None:
        import numpy as np

        # without those of segments that another process has added since the rows were read
        last = int(self.rows["seq"][-1]) if self.ids else 0
        found = [(seq, blob) for seq, blob in found if seq <= last]
        if not found:
            return
        rows = np.searchsorted(self.rows["seq"], [seq for seq, _ in found])
        codes = np.frombuffer(b"".join(blob for _, blob in found), dtype=np.int8).reshape(-1, self.width)
        counts = np.array([len(blob) // self.width for _, blob in found])
        self.rows["first"][rows] = self._tokens.n + np.cumsum(counts) - counts
        self.rows["count"][rows] = counts
        self._tokens.extend(codes)

    # use ---------------------------------------------------------------------------------------------------------

    def segments(self, store: RecordStore, namespace: Namespace, rows: Ints) -> list[Segment | None]:
        """The segments of these rows, in their order; ``None`` for one that is gone. What was read is kept."""
        wanted = rows.tolist()
        missing = [row for row in wanted if row not in self._segments]
        if missing:
            if len(self._segments) > MAX_SEGMENTS_HELD:
                self._segments.clear()
                missing = wanted
            found = store.get(namespace, [self.ids[row] for row in missing])
            self._segments.update((row, found.get(self.ids[row])) for row in missing)
        return [self._segments[row] for row in wanted]

    def look_up(self, terms: Iterable[str]) -> None:
        """Read where these terms stand, all at once."""
        missing = [term for term in dict.fromkeys(terms) if term not in self._postings]
        if not missing:
            return
        if self._n_places > MAX_PLACES:
            self._postings.clear()
            self._n_places = 0
        for term, places in self._read(missing).items():
            self._postings[term] = self._counted(places)
            self._n_places += len(places)

    def _counted(self, found: Ints) -> tuple[Ints, Vector]:
        import numpy as np

        starts = np.flatnonzero(np.diff(found, prepend=-1))
        occurrences = np.diff(starts, append=len(found)).astype(np.float32)
        numbers = self._numbers.values
        rows = np.searchsorted(numbers, found[starts])
        # another process may have added some that are not read yet
        there = rows < len(numbers)
        there[there] = numbers[rows[there]] == found[starts][there]
        return rows[there], occurrences[there]

    def postings(self, term: str, n: int) -> tuple[Ints, Vector]:
        """``(rows, occurrences)`` of a term among the first ``n`` rows."""
        import numpy as np

        self.look_up([term])
        rows, occurrences = self._postings[term]
        end = np.searchsorted(rows, n)
        return rows[:end], occurrences[:end]

    def idf(self, term: str, n: int) -> float:
        """Inverse document frequency of a term among the first ``n`` rows."""
        return idf(n, len(self.postings(term, n)[0]))

    def bm25(self, terms: Sequence[str], n: int) -> Vector:
        """BM25 of the first ``n`` rows, as a share of what a text of these terms alone could reach; in 0 to 1."""
        import numpy as np

        self.look_up(terms)
        norm = self._kept("norm", n, self._norm)
        scores, most = np.zeros(n, dtype=np.float32), 0.0
        for term in terms:
            rows, occurrences = self.postings(term, n)
            if len(rows):
                weight = idf(n, len(rows))
                scores[rows] += weight * occurrences * (K1 + 1.0) / (occurrences + norm[rows])
                most += weight * (K1 + 1.0)
        return scores / max(most, 1e-9)

    def _norm(self, n: int) -> Vector:
        lengths = self.rows["n_terms"][:n]
        norm: NDArray[Any] = K1 * (1.0 - B + B * lengths / max(float(lengths.mean()), 1e-9)) if n else lengths
        return norm

    def lengths(self, n: int) -> tuple[NDArray[np.float64], float]:
        """Terms of each of the first ``n`` rows, with a zero behind them, and their mean."""
        import numpy as np

        def made(n: int) -> tuple[NDArray[np.float64], float]:
            lengths = np.append(self.rows["n_terms"][:n], 0.0)
            return lengths, float(lengths[:n].mean()) if n else 0.0

        return self._kept("lengths", n, made)

    def years(self, n: int) -> list[int]:
        """The years in which the first ``n`` rows lie, rising."""
        import numpy as np

        def made(n: int) -> list[int]:
            return sorted({date.fromordinal(int(day)).year for day in np.unique(self.rows["day"][:n])})

        return self._kept("years", n, made)

    def _kept(self, name: str, n: int, make: Callable[[int], T]) -> T:
        """What was made of the first ``n`` rows when this was last asked for; rows never change but for ``after``."""
        kept = self._made.get(name)
        if kept is None or kept[0] != n:
            kept = self._made[name] = (n, make(n))
        return cast("T", kept[1])

    def token_vectors(self, rows: Ints) -> tuple[Matrix, Ints, Ints]:
        """``(unit vectors, starts, having)``: the token vectors of those ``rows[having]`` that have any, row by row."""
        import numpy as np

        counts = self.rows["count"][rows]
        having = np.flatnonzero(counts)
        counts = counts[having]
        starts = np.cumsum(counts) - counts
        where = np.repeat(self.rows["first"][rows[having]] - starts, counts) + np.arange(counts.sum())
        vectors = self._tokens.values[where].astype(np.float32)
        vectors *= 1.0 / np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None]
        return vectors, starts, having


def _numbered(names: Sequence[str], numbers: dict[str, int]) -> list[int]:
    """The number of each name: how many others came before it."""
    return [numbers.setdefault(name, len(numbers)) for name in names]


class Corpora:
    """The corpora of the namespaces in use, the least recently used ones forgotten."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[Namespace, str], Corpus] = OrderedDict()
        self.lock = RLock()

    def of(self, store: RecordStore, namespace: Namespace, fingerprint: str, width: int, state: State) -> Corpus:
        """The namespace's corpus as of ``state``. Hold ``lock`` while it is used."""
        key = (namespace, fingerprint)
        corpus = self._held.get(key)
        if corpus is None or corpus.epoch != state.epoch:
            corpus = self._held[key] = Corpus(state.epoch, width, partial(store.postings, namespace))
        self._held.move_to_end(key)
        corpus.catch_up(store, namespace, fingerprint, state)
        n_rows = sum(len(each.ids) for each in self._held.values())
        while len(self._held) > 1 and (len(self._held) > MAX_NAMESPACES or n_rows > MAX_ROWS):
            n_rows -= len(self._held.popitem(last=False)[1].ids)
        return corpus
