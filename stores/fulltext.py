"""The lexical index: terms in an FTS5 table, one entry a segment, and BM25 over its postings.

The namespace's number is part of every term, so that a search cannot reach another namespace's entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from functools import reduce
from typing import Any

import sqlalchemy as sa
from sqlalchemy import select

from memory_os.lexical import bm25, idf, query_terms, terms_of
from memory_os.stores.rows import parts
from memory_os.stores.schema import PLACES, namespaces, segments

__all__ = [
    "add", "clear", "compact", "holding", "lengths", "postings", "read", "recount", "remove", "rewrite", "search",
    "unheard",
]  # fmt: skip

MAX_POSTINGS = 1000
"""A term's matches are read newest first up to this many: in namespaces where more segments hold the term, it can
still lift the newest ones, while rarer terms decide. It bounds the time of a search."""
MAX_LEVEL_BYTES = 2000
"""A level takes two bytes."""
FEW = 400
"""The terms of fewer rows are read sooner than some hundred terms are looked up."""
SHORTLIST = 2  # exact BM25 is computed for this many times k segments, chosen by the sum of their terms' idf


def add(connection: sa.Connection, entries: Iterable[tuple[int, int, Sequence[str]]]) -> None:
    """Add entries, given as ``(segment's row, namespace's number, terms)``."""
    rows = [(pk, f"{ns}_" + f" {ns}_".join(terms) if terms else "") for pk, ns, terms in entries]
    if rows:
        connection.exec_driver_sql("INSERT INTO lexical(rowid, terms) VALUES (?, ?)", rows)


def remove(connection: sa.Connection, pks: Sequence[int]) -> list[int]:
    """Remove entries; gives back how many terms each of those that existed had."""
    lengths: list[int] = []
    for part in parts(pks):
        marks = ",".join("?" * len(part))
        rows = connection.exec_driver_sql(f"SELECT terms FROM lexical WHERE rowid IN ({marks})", tuple(part))
        lengths += (len(terms.split()) for (terms,) in rows)
        connection.exec_driver_sql(f"DELETE FROM lexical WHERE rowid IN ({marks})", tuple(part))
    return lengths


def compact(connection: sa.Connection) -> None:
    """Write the whole index anew, without what removed entries left in it: 2 ms for 1,000 segments.

    Until then their terms stand in its older parts, marked as deleted.
    """
    # each "optimize" adds two levels to FTS5's record of the index, which takes one of 2,000 for damage
    levels = connection.exec_driver_sql("SELECT length(block) FROM lexical_data WHERE id = 10").scalar_one()
    how = "rebuild" if levels > MAX_LEVEL_BYTES else "optimize"
    connection.exec_driver_sql(f"INSERT INTO lexical(lexical) VALUES ('{how}')")


def unheard(connection: sa.Connection, ns: int, terms: Iterable[str]) -> list[str]:
    """Those of the terms that stand in no entry of the namespace."""
    query = "SELECT 1 FROM lexical WHERE lexical MATCH ? LIMIT 1"
    wanted = dict.fromkeys(terms)
    return [term for term in wanted if not connection.exec_driver_sql(query, (f'"{ns}_{term}"',)).first()]


def read(connection: sa.Connection, ns: int, pks: Sequence[int]) -> dict[int, list[str]]:
    """The terms of these entries, by row."""
    if not pks:
        return {}
    prefix = f" {ns}_"
    found: dict[int, list[str]] = {}
    for part in parts(pks):
        marks = ",".join("?" * len(part))
        rows = _fetched(connection, f"SELECT rowid, terms FROM lexical WHERE rowid IN ({marks})", tuple(part))
        # no term has an underscore in it, so that this finds the prefixes and nothing else
        found.update((pk, f" {terms}".replace(prefix, " ").split()) for pk, terms in rows)
    return found


def lengths(connection: sa.Connection, pks: Sequence[int]) -> dict[int, int]:
    """How many terms these entries have, by row."""
    found: dict[int, int] = {}
    for part in parts(pks):
        marks = ",".join("?" * len(part))
        rows = _fetched(connection, f"SELECT id, sz FROM lexical_docsize WHERE id IN ({marks})", tuple(part))
        found.update((pk, size[0] if len(size) == 1 else _number(size)) for pk, size in rows)
    return found


def _number(size: bytes) -> int:
    """A number as FTS5 writes it: seven bits a byte, the highest first."""
    return reduce(lambda number, byte: number << 7 | byte & 0x7F, size, 0)


def holding(connection: sa.Connection, ns: int, wanted: Set[str], pks: Sequence[int]) -> set[int]:
    """Those of the rows, and maybe later ones, that hold any of these terms.

    :param pks: rising; all of the namespace after the first.
    """
    if len(pks) < FEW:
        return {pk for pk, terms in read(connection, ns, pks).items() if not wanted.isdisjoint(terms)}
    any_of = " OR ".join(f'"{ns}_{term}"' for term in sorted(wanted))
    query = "SELECT rowid FROM lexical WHERE lexical MATCH ? AND rowid >= ?"
    return {pk for (pk,) in _fetched(connection, query, (any_of, pks[0]))}


def postings(connection: sa.Connection, ns: int, term: str) -> list[int]:
    """Rows that hold the term, rising, each as often as it stands there."""
    return [pk for (pk,) in _fetched(connection, f"SELECT doc FROM {PLACES} WHERE term = ?", (f"{ns}_{term}",))]


def search(connection: sa.Connection, ns: int, text: str, k: int, bound: int) -> list[tuple[str, float]]:
    """The ``k`` best ``(segment id, BM25)`` among the rows up to ``bound``, ties by the smaller ``seq``."""
    wanted = query_terms(text)
    statistics = connection.execute(
        select(namespaces.c.n_segments, namespaces.c.n_terms).where(namespaces.c.id == ns)
    ).one_or_none()
    if not wanted or k < 1 or statistics is None or not statistics.n_segments:
        return []
    weights: dict[str, float] = {}
    postings: list[list[int]] = []
    for term in wanted:
        postings.append(_postings(connection, f"{ns}_{term}", bound))
        n_matching = _estimate_matches(connection, postings[-1], statistics.n_segments)
        weights[f"{ns}_{term}"] = idf(statistics.n_segments, n_matching)
    shortlist = _heaviest(postings, list(weights.values()), SHORTLIST * k)
    mean_length = statistics.n_terms / statistics.n_segments
    scored: list[tuple[float, int, str]] = []
    for part in parts(shortlist):
        found = connection.execute(
            select(segments.c.pk, segments.c.seq, segments.c.id).where(segments.c.pk.in_(part))
        ).all()
        # not one joined query: SQLite would then look into the full-text table in the order of segments
        marks = ",".join("?" * len(part))
        entries = connection.exec_driver_sql(f"SELECT rowid, terms FROM lexical WHERE rowid IN ({marks})", tuple(part))
        terms = {pk: entry.split() for pk, entry in entries}
        scored.extend((-bm25(terms[pk], weights, mean_length), seq, id_) for pk, seq, id_ in found)
    return [(id_, -negative) for negative, _, id_ in sorted(scored)[:k]]


def _postings(connection: sa.Connection, term: str, bound: int) -> list[int]:
    """Rows that hold the term, newest first."""
    query = "SELECT rowid FROM lexical WHERE lexical MATCH ? AND rowid <= ? ORDER BY rowid DESC LIMIT ?"
    return [pk for (pk,) in _fetched(connection, query, (f'"{term}"', bound, MAX_POSTINGS))]


def _fetched(connection: sa.Connection, query: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Straight from the driver, as thousands of result objects take time."""
    cursor = connection.connection.cursor()
    try:
        cursor.execute(query, values)
        return list(cursor.fetchall())
    except connection.dialect.loaded_dbapi.Error as error:
        raise sa.exc.DBAPIError(query, None, error) from error
    finally:
        cursor.close()


def _estimate_matches(connection: sa.Connection, pks: list[int], n_segments: int) -> int:
    """How many segments hold a term: all of its postings, or where they were cut off, in proportion."""
    if len(pks) < MAX_POSTINGS:
        return min(len(pks), n_segments)
    ends = select(segments.c.seq).where(segments.c.pk.in_([pks[0], pks[-1]])).order_by(segments.c.seq)
    oldest, newest = connection.execute(ends).scalars().all()
    estimate: int = round(len(pks) * newest / (newest - oldest + 1))
    return min(n_segments, estimate)


def _heaviest(postings: Sequence[Sequence[int]], weights: Sequence[float], n: int) -> list[int]:
    """The ``n`` rows whose terms weigh most together, ties by the smaller row."""
    import numpy as np

    rows = np.concatenate([np.asarray(pks, dtype=np.int64) for pks in postings])
    each = np.repeat(np.asarray(weights), [len(pks) for pks in postings])
    distinct, where = np.unique(rows, return_inverse=True)
    totals = np.bincount(where, weights=each, minlength=len(distinct))
    best: list[int] = distinct[np.lexsort((distinct, -totals))[:n]].tolist()
    return best


def clear(connection: sa.Connection) -> None:
    """Empty the index by the tables that it consists of, as FTS5 does nothing for one that it takes for damaged."""
    for part in ("data", "idx", "content", "docsize"):
        connection.exec_driver_sql(f"DELETE FROM lexical_{part}")
    # its averages and its structure, as of an index without entries
    connection.exec_driver_sql("INSERT INTO lexical_data(id, block) VALUES (1, x''), (10, x'00000000000000')")


def rewrite(connection: sa.Connection) -> None:
    """Make every entry anew from its segment."""
    connection.exec_driver_sql("INSERT INTO lexical(lexical) VALUES ('rebuild')")  # so that the deletion finds its way
    connection.exec_driver_sql("DELETE FROM lexical")
    pks = connection.execute(select(segments.c.pk).order_by(segments.c.pk)).scalars().all()
    for part in parts(pks):
        rows = connection.execute(select(segments).where(segments.c.pk.in_(part))).all()
        add(connection, [(row.pk, row.namespace_id, terms_of(row.text)) for row in rows])


def recount(connection: sa.Connection) -> None:
    """Compute the statistics of BM25 anew from the entries."""
    for ns in connection.execute(select(namespaces.c.id)).scalars().all():
        rows = connection.exec_driver_sql(
            "SELECT l.terms FROM lexical l JOIN segments s ON s.pk = l.rowid WHERE s.namespace_id = ?", (ns,)
        )
        lengths = [len(terms.split()) for (terms,) in rows]
        connection.execute(
            namespaces.update().where(namespaces.c.id == ns).values(n_segments=len(lengths), n_terms=sum(lengths))
        )
