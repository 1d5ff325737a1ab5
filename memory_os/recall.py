"""Recall: candidates for a query, without any LLM.

Candidates are what dense and lexical search find, with the turns around them. Each gets its signals (``signals.py``)
and a score, the sum of what the signals contribute; the weights are learned on conversations with known evidence
(``weights.json``, made by benchmarks/train_recall.py).

For a namespace too large to be kept in memory the two rankings are fused instead, by reciprocal rank fusion (Cormack,
Clarke and Buettcher 2009): the sum over the rankings of ``1 / (60 + rank)``.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from memory_os import signals as s
from memory_os.corpus import MAX_SEGMENTS, Corpora, Corpus
from memory_os.derive import failure_of, told
from memory_os.echo import is_echo, repeated_by
from memory_os.errors import ConfigError
from memory_os.protocols import Embedder, RecordStore, State, TokenEmbedder, TokenQuery, VectorIndex
from memory_os.question import Question, read_question
from memory_os.types import Hit, Namespace
from memory_os.weights import learned

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from memory_os.protocols import Vector

    Ints = NDArray[np.int64]

__all__ = ["FAILED", "Recall", "Recalled", "Scored", "asked_of", "fuse"]

log = logging.getLogger(__name__)

RRF_K = 60
SEARCH = 128
"""Either search offers so many at least."""
UNREAD = "{} does not know the script of the query: recall went by words alone"
FAILED = "the embedder failed ({}): recall went by words alone"
MAX_ECHOES = 64
"""So many echoes at most are told of."""
SURROUNDINGS = 2
"""So many turns to either side of what was found are candidates too."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Signals and scores of the candidates, as arrays over ``rows`` of the corpus.

    :param note: why recall went by words alone, where it did so for an embedder that failed.
    """

    corpus: Corpus
    ids: list[str]
    rows: Ints
    signals: Mapping[str, Vector]
    contributions: Mapping[str, Vector]
    scores: Vector
    question: Question
    note: str = ""


@dataclass(frozen=True, slots=True)
class Recalled:
    """What recall found.

    :param notes: what it did less well than its name says.
    :param echoes: what would have been among the hits, and repeats segments that are stored.
    """

    hits: list[Hit]
    notes: tuple[str, ...] = ()
    echoes: tuple[Hit, ...] = ()


@dataclass(frozen=True)
class Recall:
    """The parts of recall, and what it keeps in memory of the namespaces."""

    store: RecordStore
    index: VectorIndex
    embedder: Embedder
    corpora: Corpora = field(default_factory=Corpora)

    def __call__(
        self,
        namespace: Namespace,
        query: str,
        *,
        k: int,
        upto: int | None = None,
        now: datetime | None = None,
        per_token: bool = False,
        state: State | None = None,
    ) -> Recalled:
        """The ``k`` best segments, best first, ties by ``seq``.

        :param upto: only segments with ``seq <= upto`` take part.
        :param now: what "last week" in the query counts from.
        :param state: of the namespace, where the caller has just asked for it.
        :param per_token: best by value per token, for a budget, and not by score alone; see ``worth``.
        """
        import numpy as np

        state = state or self.store.state(namespace, self.embedder.fingerprint)
        if state.n_segments > MAX_SEGMENTS:
            hits, echoes, *notes = self._fused(namespace, query, k, upto)
            many = f"{state.n_segments} segments are too many to weigh each; dense and lexical ranks were fused"
            return Recalled(hits, (many, *filter(None, notes)), echoes)
        scored = self.score(namespace, query, k=k, upto=upto, now=now, state=state)
        if scored is None:
            return Recalled([])
        order = worth(scored.scores, np.exp(scored.signals["length"])) if per_token else scored.scores
        ranked = np.lexsort((scored.rows, -order))
        repeats = scored.corpus.rows["echo"][scored.rows[ranked]]
        end = int(np.searchsorted(np.cumsum(~repeats), k)) + 1  # behind the last hit
        unread = "" if scored.note or _reads(self.embedder, query) else UNREAD.format(self.embedder.fingerprint)
        hits = self._hits(namespace, scored, ranked[~repeats][:k])
        echoes = tuple(self._hits(namespace, scored, ranked[:end][repeats[:end]][:MAX_ECHOES]))
        return Recalled(hits, tuple(filter(None, (scored.note, unread))), echoes)

    def _hits(self, namespace: Namespace, scored: Scored, which: Ints) -> list[Hit]:
        """The candidates at these places, in this order."""
        if not len(which):
            return []
        with self.corpora.lock:
            segments = scored.corpus.segments(self.store, namespace, scored.rows[which])
        signals, contributions = (_by_candidate(each, which) for each in (scored.signals, scored.contributions))
        found = zip(segments, scored.scores[which].tolist(), signals, contributions, strict=True)
        # a segment deleted a moment ago is simply not there
        return [Hit(segment, *rest) for segment, *rest in found if segment]

    def score(
        self,
        namespace: Namespace,
        query: str,
        *,
        k: int,
        upto: int | None = None,
        now: datetime | None = None,
        state: State | None = None,
    ) -> Scored | None:
        """Signals and scores of everything near what either search finds among its ``k`` best; ``None`` for nothing."""
        import numpy as np

        asked, note = asked_of(self.embedder, query)
        width = self.embedder.token_dimension if isinstance(self.embedder, TokenEmbedder) else 0
        state = state or self.store.state(namespace, self.embedder.fingerprint)
        with self.corpora.lock:  # echoes are near to what their originals are near to, and must not crowd them out
            n_echoes = self.corpora.of(self.store, namespace, self.embedder.fingerprint, width, state).n_echoes
        k = max(k, SEARCH) + n_echoes
        found = self.index.search(namespace, asked.vector, k, upto=upto) if asked else []
        with self.corpora.lock:
            corpus = self.corpora.of(self.store, namespace, self.embedder.fingerprint, width, state)
            n = corpus.visible(upto)
            if not n:
                return None
            question = read_question(query, corpus.speakers, corpus.years(n), (now or datetime.now(UTC)).date())
            lexical = corpus.bm25(question.terms, n)
            rows = self._candidates(corpus, n, [id_ for id_, _ in found], lexical, k)
            ids = [corpus.ids[row] for row in rows]
            unknown = np.zeros(len(ids), dtype=np.float32)
            dense = self.index.similarities(namespace, asked.vector, ids) if asked else unknown
            near = s.Neighbours(corpus, rows, n)
            signals = s.plain_signals(corpus, rows, near, question, dense, lexical)
            if asked and len(asked.tokens):
                best = s.best_cosines(corpus, rows, asked.tokens)
                signals |= s.late_signals(near, best, s.token_weights(corpus, query, asked.spans, n))
        weights = learned()[_kind_of_weights(self.embedder, query, asked)]
        parts = s.contributions(signals, question.kinds, weights)
        scores = np.sum(list(parts.values()), axis=0)
        return Scored(corpus, ids, rows, signals, parts, scores, question, note)

    def frequencies(
        self, namespace: Namespace, terms: Iterable[str], *, upto: int | None, state: State
    ) -> dict[str, int]:
        """In how many segments each term of the lexical index stands.

        Of a namespace too large to be kept in memory a count stops at ``SEARCH``.
        """
        if state.n_segments > MAX_SEGMENTS:
            return {term: len(self.store.search(namespace, term, SEARCH, upto=upto)) for term in terms}
        width = self.embedder.token_dimension if isinstance(self.embedder, TokenEmbedder) else 0
        with self.corpora.lock:
            corpus = self.corpora.of(self.store, namespace, self.embedder.fingerprint, width, state)
            n = corpus.visible(upto)
            return {term: len(corpus.postings(term, n)[0]) for term in terms}

    @staticmethod
    def _candidates(corpus: Corpus, n: int, dense: Sequence[str], lexical: Vector, k: int) -> Ints:
        """Rows that either search found, and the turns around them, rising."""
        import numpy as np

        by_words = np.flatnonzero(lexical > 0)
        if len(by_words) > k:
            by_words = by_words[np.lexsort((by_words, -lexical[by_words]))[:k]]
        by_meaning = np.array([corpus.row_of[id_] for id_ in dense if id_ in corpus.row_of], dtype=np.int64)
        core = np.union1d(by_words, by_meaning)
        wanted = [core]
        before = after = core
        for _ in range(SURROUNDINGS):
            before = corpus.rows["before"][before]
            before = before[before >= 0]
            after = corpus.rows["after"][after]
            after = after[(after >= 0) & (after < n)]
            wanted += [before, after]
        rows = np.unique(np.concatenate(wanted))
        return rows[rows < n].astype(np.int64)

    def _fused(
        self, namespace: Namespace, query: str, k: int, upto: int | None
    ) -> tuple[list[Hit], tuple[Hit, ...], str]:
        """``(hits, echoes, note)``."""
        asked, note = asked_of(self.embedder, query)
        fused = fuse(
            {
                "dense": self.index.search(namespace, asked.vector, k + MAX_ECHOES, upto=upto) if asked else [],
                "lexical": self.store.search(namespace, query, k + MAX_ECHOES, upto=upto),
            }
        )
        segments = self.store.get(namespace, fused)
        hits = [Hit(segment, *fused[id_]) for id_, segment in segments.items()]
        hits.sort(key=lambda hit: (-hit.score, hit.segment.seq))
        there = self.store.get(namespace, {id_ for hit in hits for id_ in repeated_by(hit.segment.metadata)})
        echoes = {hit.segment.id for hit in hits if is_echo(hit.segment, there)}
        own = [hit for hit in hits if hit.segment.id not in echoes]
        return own[:k], tuple(hit for hit in hits if hit.segment.id in echoes)[:MAX_ECHOES], note


def asked_of(embedder: Embedder, query: str) -> tuple[TokenQuery | None, str]:
    """The query embedded, or ``None`` and what is to be said of it where the embedder fails.

    :raises ConfigError: if the embedder cannot be used at all, as when its package is missing.
    """
    try:
        if isinstance(embedder, TokenEmbedder):
            return embedder.embed_query_by_token(query), ""
        vector = embedder.embed_query(query)
        return TokenQuery(vector, vector[:0].reshape(0, 1), ()), ""
    except ConfigError:
        raise
    except Exception as error:  # whatever a foreign model raises: words still find
        log.warning(FAILED.format(told(error)))
        return None, FAILED.format(failure_of(error))


def _reads(embedder: Embedder, query: str) -> bool:
    return not isinstance(embedder, TokenEmbedder) or embedder.reads(query)


def _kind_of_weights(embedder: Embedder, query: str, asked: TokenQuery | None) -> str:
    if asked is None or not _reads(embedder, query):
        return "lexical_only"
    return "with_tokens" if len(asked.tokens) else "without_tokens"


def _by_candidate(columns: Mapping[str, Vector], which: Ints) -> list[dict[str, float]]:
    import numpy as np

    table = np.round(np.stack(list(columns.values()), axis=1)[which].astype(float), 4)
    return [dict(zip(columns, row, strict=True)) for row in table.tolist()]


def worth(scores: Vector, n_tokens: Vector) -> Vector:
    """Relevance for its price. A score is a log-odds, so dividing by a power of the cost is taking away its log."""
    import numpy as np

    value: Vector = scores - learned()["price"] * np.log(n_tokens)
    return value


def fuse(rankings: Mapping[str, Sequence[tuple[str, float]]]) -> dict[str, tuple[float, dict[str, float]]]:
    """Fuse rankings into ``{segment id: (fused score, {signal: its own score})}``.

    >>> fused = fuse({"dense": [("a", 0.9), ("b", 0.5)], "lexical": [("b", 7.0)]})
    >>> max(fused, key=lambda id_: fused[id_][0]), fused["b"][1]
    ('b', {'dense': 0.5, 'lexical': 7.0})
    """
    scores: defaultdict[str, float] = defaultdict(float)
    signals: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for signal, ranking in rankings.items():
        for rank, (id_, score) in enumerate(ranking, start=1):
            scores[id_] += 1.0 / (RRF_K + rank)
            signals[id_][signal] = score
    return {id_: (scores[id_], signals[id_]) for id_ in scores}
