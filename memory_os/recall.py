"""Recall: candidates for a query, without any LLM. Dense and lexical ranks, fused.

Fusion is reciprocal rank fusion (Cormack, Clarke and Buettcher 2009): the sum over the signals of ``1 / (60 + rank)``.
Ranks and not scores are added, because cosines and BM25 share no scale.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from memory_os.protocols import Embedder, RecordStore, VectorIndex
from memory_os.types import Hit, Namespace

__all__ = ["fuse", "recall"]

RRF_K = 60


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


def recall(
    store: RecordStore,
    index: VectorIndex,
    embedder: Embedder,
    namespace: Namespace,
    query: str,
    *,
    k: int,
    upto: int | None = None,
) -> list[Hit]:
    """The segments that either signal ranks among its ``k`` best, best fused score first, ties by ``seq``.

    :param upto: only segments with ``seq <= upto`` take part.
    """
    rankings = {
        "dense": index.search(namespace, embedder.embed_query(query), k, upto=upto),
        "lexical": store.search(namespace, query, k, upto=upto),
    }
    fused = fuse(rankings)
    segments = store.get(namespace, fused)  # a segment deleted a moment ago is simply not there
    hits = [Hit(segment, *fused[id_]) for id_, segment in segments.items()]
    return sorted(hits, key=lambda hit: (-hit.score, hit.segment.seq))
