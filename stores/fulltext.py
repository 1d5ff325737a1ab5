"""The lexical index: one entry a segment, and BM25 over the postings of its terms. Functions on an open connection.

How entries are kept is the database's: see ``fts5`` and ``postings``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from types import ModuleType
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy import select

from memory_os.lexical import bm25, idf, query_terms, terms_of
from memory_os.stores import fts5, postings
from memory_os.stores.rows import own, parts
from memory_os.stores.schema import namespaces, segments

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "add", "compact", "holding", "lengths", "places", "read", "recount", "remove", "rewrite", "search", "unheard",
]  # fmt: skip

MAX_POSTINGS = 1000
"""A term's matches are read newest first up to this many: in namespaces where more segments hold the term, it can
still lift the newest ones, while rarer terms decide. It bounds the time of a search."""
NO_BOUND = 2**62
FEW = 400
"""The terms of fewer rows are read sooner than some hundred terms are looked up."""
SHORTLIST = 2  # exact BM25 is computed for this many times k segments, chosen by the sum of their terms' idf


def _entries(connection: sa.Connection) -> ModuleType:
    return postings if connection.dialect.name == "postgresql" else fts5


def add(connection: sa.Connection, entries: Iterable[tuple[int, int, Sequence[str]]]) -> None:
    """Add entries, given as ``(segment's row, namespace's number, terms)``."""
    _entries(connection).add(connection, entries)


def remove(connection: sa.Connection, ns: int, pks: Sequence[int]) -> list[int]:
    """Remove entries; gives back how many terms each of those that existed had."""
    lengths: list[int] = _entries(connection).remove(connection, ns, pks)
    return lengths


def compact(connection: sa.Connection) -> None:
    """Leave nothing in the index of entries that were removed."""
    _entries(connection).compact(connection)


def unheard(connection: sa.Connection, ns: int, terms: Iterable[str]) -> list[str]:
    """Those of the terms that stand in no entry of the namespace."""
    newest = _entries(connection).newest
    return [term for term in dict.fromkeys(terms) if not newest(connection, ns, term, NO_BOUND, 1)]


def read(connection: sa.Connection, ns: int, pks: Sequence[int]) -> dict[int, list[str]]:
    """The terms of these entries, by row."""
    terms: dict[int, list[str]] = _entries(connection).read(connection, ns, pks)
    return terms


def lengths(connection: sa.Connection, ns: int, pks: Sequence[int]) -> dict[int, int]:
    """How many terms these entries have, by row."""
    found: dict[int, int] = _entries(connection).lengths(connection, ns, pks)
    return found


def holding(connection: sa.Connection, ns: int, wanted: Set[str], pks: Sequence[int]) -> set[int]:
    """Those of the rows, and maybe later ones, that hold any of these terms.

    :param pks: rising; all of the namespace after the first.
    """
    if len(pks) < FEW:
        return {pk for pk, terms in read(connection, ns, pks).items() if not wanted.isdisjoint(terms)}
    rows: set[int] = _entries(connection).holding(connection, ns, wanted, pks[0])
    return rows


def places(connection: sa.Connection, ns: int, term: str) -> NDArray[np.int64]:
    """Rows that hold the term, rising, each as often as it stands there."""
    rows: NDArray[np.int64] = _entries(connection).places(connection, ns, term)
    return rows


def search(connection: sa.Connection, ns: int, text: str, k: int, bound: int) -> list[tuple[str, float]]:
    """The ``k`` best ``(segment id, BM25)`` among the rows up to ``bound``, ties by the smaller ``seq``."""
    wanted = query_terms(text)
    statistics = connection.execute(
        select(namespaces.c.n_segments, namespaces.c.n_terms).where(namespaces.c.id == ns)
    ).one_or_none()
    if not wanted or k < 1 or statistics is None or not statistics.n_segments:
        return []
    weights: dict[str, float] = {}
    rows: list[list[int]] = []
    for term in wanted:
        rows.append(_entries(connection).newest(connection, ns, term, bound, MAX_POSTINGS))
        n_matching = _estimate_matches(connection, ns, rows[-1], statistics.n_segments)
        weights[term] = idf(statistics.n_segments, n_matching)
    shortlist = _heaviest(rows, list(weights.values()), SHORTLIST * k)
    mean_length = statistics.n_terms / statistics.n_segments
    scored: list[tuple[float, int, str]] = []
    for part in parts(shortlist):
        found = connection.execute(
            select(segments.c.pk, segments.c.seq, segments.c.id).where(own(segments, ns), segments.c.pk.in_(part))
        ).all()
        # not one joined query: SQLite would then look into the full-text table in the order of segments
        terms = read(connection, ns, part)
        scored.extend((-bm25(terms[pk], weights, mean_length), seq, id_) for pk, seq, id_ in found)
    return [(id_, -negative) for negative, _, id_ in sorted(scored)[:k]]


def _estimate_matches(connection: sa.Connection, ns: int, pks: list[int], n_segments: int) -> int:
    """How many segments hold a term: all of its postings, or where they were cut off, in proportion."""
    if len(pks) < MAX_POSTINGS:
        return min(len(pks), n_segments)
    these = own(segments, ns), segments.c.pk.in_([pks[0], pks[-1]])
    ends = select(segments.c.seq).where(*these).order_by(segments.c.seq)
    oldest, newest = connection.execute(ends).scalars().all()
    estimate: int = round(len(pks) * newest / (newest - oldest + 1))
    return min(n_segments, estimate)


def _heaviest(matches: Sequence[Sequence[int]], weights: Sequence[float], n: int) -> list[int]:
    """The ``n`` rows whose terms weigh most together, ties by the smaller row."""
    import numpy as np

    rows = np.concatenate([np.asarray(pks, dtype=np.int64) for pks in matches])
    each = np.repeat(np.asarray(weights), [len(pks) for pks in matches])
    distinct, where = np.unique(rows, return_inverse=True)
    totals = np.bincount(where, weights=each, minlength=len(distinct))
    best: list[int] = distinct[np.lexsort((distinct, -totals))[:n]].tolist()
    return best


def rewrite(connection: sa.Connection) -> None:
    """Make every entry anew from its segment."""
    _entries(connection).clear(connection)
    pks = connection.execute(select(segments.c.pk).order_by(segments.c.pk)).scalars().all()
    for part in parts(pks):
        rows = connection.execute(select(segments).where(segments.c.pk.in_(part))).all()
        add(connection, [(row.pk, row.namespace_id, terms_of(row.text)) for row in rows])


def recount(connection: sa.Connection) -> None:
    """Compute the statistics of BM25 anew from the entries."""
    for ns in connection.execute(select(namespaces.c.id)).scalars().all():
        pks = connection.execute(select(segments.c.pk).where(segments.c.namespace_id == ns)).scalars().all()
        lengths = [len(terms) for terms in read(connection, ns, pks).values()]
        connection.execute(
            namespaces.update().where(namespaces.c.id == ns).values(n_segments=len(lengths), n_terms=sum(lengths))
        )
