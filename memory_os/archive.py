"""Archived memory, turn by turn: everything but flash memory, with what SCM ranks it by.

A turn is what the user said with the assistant's replies to it, in one session; anything else (a speaker's segment in a
conversation without an assistant, a passage of a document) is a turn of its own. Time is counted in turns.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memory_os.corpus import MAX_SEGMENTS, Corpus
from memory_os.errors import ConfigError
from memory_os.protocols import State, TokenEmbedder
from memory_os.recall import Recall, asked_of
from memory_os.types import Namespace, Segment

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from memory_os.protocols import Vector

    Ints = NDArray[np.int64]

__all__ = ["Archive", "read_archive"]


@dataclass(frozen=True, slots=True)
class Archive:
    """The turns outside flash memory, in the order in which they began.

    :param cosine: of the query with the turn's best segment, ``[turns]``.
    :param age: turns since each was last activated, or said, ``[turns]``; 1 is the latest.
    :param note: why every cosine is 0, where the embedder failed.
    """

    cosine: Vector
    age: Vector
    _recall: Recall
    _namespace: Namespace
    _corpus: Corpus
    _turns: Ints
    _turn_of: Ints
    _left_out: frozenset[int]
    note: str = ""

    def segments(self, turn: int) -> list[Segment]:
        """The segments of a turn, in the order of ``seq``, but for flash memory, echoes, and those that are gone."""
        import numpy as np

        rows = [row for row in np.flatnonzero(self._turn_of == self._turns[turn]) if row not in self._left_out]
        with self._recall.corpora.lock:
            found = self._corpus.segments(self._recall.store, self._namespace, np.array(rows, dtype=np.int64))
        return [segment for segment in found if segment]


def read_archive(
    recall: Recall, namespace: Namespace, query: str, *, upto: int, flash: Collection[str], state: State
) -> Archive:
    """The archive as of ``upto``, seen from a query.

    :param flash: ids of the segments that are in context anyway.
    :raises ConfigError: for a namespace that is too large to be kept in memory.
    """
    import numpy as np

    if state.n_segments > MAX_SEGMENTS:
        raise ConfigError(
            f"this controller weighs every turn, and {state.n_segments} segments are more than the {MAX_SEGMENTS} "
            "that can be weighed; use controller='auto'"
        )
    store, index, embedder = recall.store, recall.index, recall.embedder
    width = embedder.token_dimension if isinstance(embedder, TokenEmbedder) else 0
    asked, note = asked_of(embedder, query)
    index.sync(namespace)
    used = store.last_activations(namespace)
    with recall.corpora.lock:
        corpus = recall.corpora.of(store, namespace, embedder.fingerprint, width, state)
        n = corpus.visible(upto)
        rows = corpus.rows[:n]
        seqs = rows["seq"].copy()
        first = _first_rows(rows)
        ids = corpus.ids[:n]
        echoes = rows["echo"].copy()
        in_flash = [corpus.row_of[id_] for id_ in flash if id_ in corpus.row_of]
        left_out = frozenset([*in_flash, *np.flatnonzero(echoes).tolist()])
    begins = first == np.arange(n)
    turn_of = (np.cumsum(begins) - 1)[first] if n else first
    n_turns = int(begins.sum())
    cosine = np.full(n_turns, -1.0, dtype=np.float32)
    near = index.similarities(namespace, asked.vector, ids) if asked else np.zeros(n, dtype=np.float32)
    np.maximum.at(cosine, turn_of, np.where(echoes, np.float32(-1.0), near))
    last = np.arange(n_turns)
    for seq, by in used.items():
        row, query_row = np.searchsorted(seqs, [seq, by])
        if row < n and seqs[row] == seq and by <= upto:
            last[turn_of[row]] = max(last[turn_of[row]], turn_of[min(query_row, n - 1)])
    inside = np.ones(n, dtype=bool)
    inside[list(left_out)] = False
    turns = np.unique(turn_of[inside])
    age = (n_turns - last[turns]).astype(np.float32)
    return Archive(cosine[turns], age, recall, namespace, corpus, turns, turn_of, left_out, note)


def _first_rows(rows: NDArray[np.void]) -> Ints:
    """For each row the row with which its turn begins: a reply belongs to what came before it in the session."""
    import numpy as np

    n = len(rows)
    own = np.arange(n)
    first = np.where(rows["replies"] & (rows["before"] >= 0), rows["before"], own).astype(np.int64)
    while True:  # each round doubles how far back a run of replies is followed
        further = first[first]
        if np.array_equal(further, first):
            return first
        first = further
