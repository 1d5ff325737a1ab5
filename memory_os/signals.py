"""The signals of recall, each a number per segment: array operations over a corpus, without store or model.

``late`` and its kin are late interaction (ColBERT, Khattab and Zaharia 2020) over token vectors of the same encoder:
for each token of the question the best cosine among the tokens of a segment, weighted by the idf of the token's word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from memory_os.lexical import K1, B, idf, terms_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from memory_os.corpus import Corpus
    from memory_os.protocols import Matrix, Vector
    from memory_os.question import Question

    Ints = NDArray[np.int64]

__all__ = [
    "REACH", "Neighbours", "best_cosines", "contributions", "late_signals", "plain_signals", "token_weights",
]  # fmt: skip

REACH = 3
"""How many turns of the session to either side belong to a segment's surroundings."""
SHARPNESS = 6.0  # of late_exact: exp(6 (cosine - 1)) is 1 for the same word, 0.05 at a cosine of 0.5
SHORT_TOKENS = 80.0  # a text up to so long leans on its surroundings wholly
DATE_DAYS = 20.0  # a session so many days from a named date counts 1/e


class Neighbours:
    """Where the turns before and after each row stand among the rows: positions, ``-1`` where there is none."""

    def __init__(self, corpus: Corpus, rows: Ints, n: int) -> None:
        import numpy as np

        self.n = len(rows)
        place = np.full(n + 1, -1)  # row -1 is the spare last one
        place[rows] = np.arange(len(rows))
        self.rows_before, self.rows_after = [], []
        before = after = rows
        for _ in range(REACH):
            before = np.where(before >= 0, corpus.rows["before"][before], -1)
            after = np.where(after >= 0, corpus.rows["after"][after], -1)
            after = np.where(after < n, after, -1)
            self.rows_before.append(before)
            self.rows_after.append(after)
        self.before = [place[row] for row in self.rows_before]
        self.after = [place[row] for row in self.rows_after]
        self._reliance = np.minimum(1.0, SHORT_TOKENS / np.maximum(corpus.rows["n_tokens"][rows], 1.0))
        sessions, self.session = np.unique(corpus.rows["session"][rows], return_inverse=True)
        self.n_sessions = len(sessions)

    def shifted(self, values: Vector, places: Ints, missing: float = 0.0) -> Vector:
        """The values of the neighbours at ``places``; over the last axis."""
        import numpy as np

        return np.where(places >= 0, values[..., places], np.float32(missing))

    def leant(self, own: Vector, around: Vector) -> Vector:
        """Each row's own value where its text is long, the value of its surroundings where it is short.

        "Yes, last week!" means nothing without the turn before it; a page does not need its neighbours, and must not
        be found for what they say.
        """
        blended: Vector = own + self._reliance * (around - own)
        return blended

    def session_best(self, values: Vector, k: int = 3) -> Vector:
        """For each row the mean of the ``k`` highest values in its session."""
        import numpy as np

        order = np.lexsort((-values, self.session))
        sorted_sessions = self.session[order]
        starts = np.searchsorted(sorted_sessions, np.arange(self.n_sessions))
        top = np.arange(self.n) - starts[sorted_sessions] < k
        sums = np.bincount(sorted_sessions[top], weights=values[order][top], minlength=self.n_sessions)
        counts = np.bincount(sorted_sessions[top], minlength=self.n_sessions)
        return (sums / np.maximum(counts, 1))[self.session].astype(np.float32)


def plain_signals(
    corpus: Corpus, rows: Ints, near: Neighbours, question: Question, dense: Vector, lexical: Vector
) -> dict[str, Vector]:
    """The signals that need no token vectors.

    :param rows: rows of the corpus.
    :param dense: cosine of each of these rows.
    :param lexical: BM25 of every visible row, as ``Corpus.bm25`` gives it.
    """
    import numpy as np

    n = len(lexical)
    zeros = np.zeros(len(rows), dtype=np.float32)
    own = lexical[rows]
    signals = {
        "dense": dense,
        "dense_before": near.leant(dense, near.shifted(dense, near.before[0])),
        "dense_after": near.leant(dense, near.shifted(dense, near.after[0])),
        "dense_session": near.session_best(dense),
        "lexical": own,
        "lexical_before": near.leant(own, near.shifted(own, near.before[0])),
        "lexical_after": near.leant(own, near.shifted(own, near.after[0])),
        "lexical_window": near.leant(own, _window_bm25(corpus, rows, near, question.terms, n)),
        "lexical_session": near.session_best(own),
        "lexical_rest": own if question.rest == question.terms else corpus.bm25(question.rest, n)[rows],
        "speaker": zeros,
        "time": corpus.rows["timed"][rows],
        "date": _closeness(corpus.rows["day"][rows], question.days) if question.days else zeros,
        "asks": corpus.rows["asks"][rows],
        "length": np.log(corpus.rows["n_tokens"][rows] + 4.0),
    }
    if question.speaker is not None:
        mine = corpus.rows["who"][rows] == corpus.speakers[question.speaker]
        signals["speaker"] = np.where(mine, np.float32(1), np.float32(-1))
    return signals


def late_signals(near: Neighbours, best: Matrix, weights: Vector) -> dict[str, Vector]:
    """Late interaction of each row, alone and with its surroundings.

    :param best: the highest cosine for each token of the question, ``[tokens, rows]``.
    :param weights: of the tokens, adding up to 1.
    """
    import numpy as np

    late: Vector = weights @ best
    pair = np.maximum(best, near.shifted(best, near.before[0], -1.0))
    three = np.maximum(pair, near.shifted(best, near.after[0], -1.0))
    wide = three
    for step in range(1, REACH):
        wide = np.maximum(wide, near.shifted(best, near.before[step], -1.0))
        wide = np.maximum(wide, near.shifted(best, near.after[step], -1.0))
    order = np.argsort(near.session, kind="stable")
    starts = np.searchsorted(near.session[order], np.arange(near.n_sessions))
    whole = np.maximum.reduceat(best[:, order], starts, axis=1)
    return {
        "late": late,
        "late_mean": best.mean(axis=0),
        "late_exact": weights @ np.exp(SHARPNESS * (best - 1.0)),
        "late_before": near.leant(late, near.shifted(late, near.before[0])),
        "late_after": near.leant(late, near.shifted(late, near.after[0])),
        "late_pair": near.leant(late, weights @ pair),
        "late_three": near.leant(late, weights @ three),
        "late_wide": near.leant(late, weights @ wide),
        "late_session": near.session_best(late),
        "late_session_whole": (weights @ whole)[near.session],
    }


def best_cosines(corpus: Corpus, rows: Ints, tokens: Matrix) -> Matrix:
    """The highest cosine of each token of the question among each row's tokens, ``[tokens, rows]``; 0 without any."""
    import numpy as np

    best = np.zeros((len(tokens), len(rows)), dtype=np.float32)
    vectors, starts, having = corpus.token_vectors(rows)
    if len(having):
        best[:, having] = np.maximum.reduceat(tokens @ vectors.T, starts, axis=1)
    return best


def token_weights(corpus: Corpus, text: str, spans: Sequence[tuple[int, int]], n: int) -> Vector:
    """The idf of each token's word among the first ``n`` rows, shared by the tokens of one word; adding up to 1."""
    import numpy as np

    words = [(match.start(), match.end(), match[0]) for match in re.finditer(r"\w+", text)]
    weights, of_word = [], []
    for start, end in spans:
        at = next((i for i, (low, high, _) in enumerate(words) if low <= start and end <= high), None)
        of_word.append(at)
        terms = terms_of(text[start:end] if at is None else words[at][2])
        weights.append(max((corpus.idf(term, n) for term in terms[:4]), default=0.1))
    shared = [of_word.count(at) if at is not None else 1 for at in of_word]
    each: Vector = (np.array(weights) / np.array(shared)).astype(np.float32)
    return np.asarray(each / max(float(each.sum()), 1e-9), dtype=np.float32)


def _window_bm25(corpus: Corpus, rows: Ints, near: Neighbours, terms: Sequence[str], n: int) -> Vector:
    """BM25 of a row read together with the two before it, as a share of the highest possible."""
    import numpy as np

    window = [rows, *near.rows_before[:2]]
    lengths, per_row = corpus.lengths(n)  # row -1 is the empty one
    mean = 3.0 * max(per_row, 1e-9) if n else 1.0
    norm = K1 * (1.0 - B + B * np.sum([lengths[each] for each in window], axis=0) / mean)
    scores, most = np.zeros(len(rows), dtype=np.float32), 0.0
    for term in terms:
        found, occurrences = corpus.postings(term, n)
        if len(found):
            often = np.zeros(n + 1, dtype=np.float32)
            often[found] = occurrences
            count: Vector = np.sum([often[each] for each in window], axis=0)
            weight = idf(n, len(found))
            scores = scores + weight * count * (K1 + 1.0) / (count + norm)
            most += weight * (K1 + 1.0)
    return scores / max(most, 1e-9)


def _closeness(days: Ints, meant: Sequence[tuple[int, bool]]) -> Vector:
    """How near each row's day is to one that is meant; things are told after they happen, rarely before."""
    import numpy as np

    apart = np.full(len(days), np.inf)
    for day, exact in meant:
        late = days - day
        apart = np.minimum(apart, np.where(late >= (0 if exact else -15), np.abs(late), 2.0 * np.abs(late)))
    return np.exp(-apart / DATE_DAYS).astype(np.float32)


def contributions(
    signals: Mapping[str, Vector], kinds: frozenset[str], weights: Mapping[str, float]
) -> dict[str, Vector]:
    """What each signal adds to the score: its value times its weight, which a question's kind may raise or lower.

    :param weights: by ``signal`` and by ``signal@kind``.
    """
    return {
        name: values * (weights.get(name, 0.0) + sum(weights.get(f"{name}@{kind}", 0.0) for kind in kinds))
        for name, values in signals.items()
    }
