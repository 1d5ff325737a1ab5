"""Entries of the lexical index in PostgreSQL: a row for each segment's terms, and one for each term of it.

The second table is the inverted index, with how often the term stands there: in its key, rows of one term stand newest
first by a walk backwards, so that a search reads no more than it asked for, however common the term. A term stands
there as a number made of it and of its namespace: it fits an index whatever its length, and a search cannot reach
another namespace's entries. (A GIN index would be smaller; but it gives rows in no order, and under row-level security
PostgreSQL does not use it.) Two terms of one number, of which there are hardly any, cost a look at an entry: BM25 is
computed from the terms themselves.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import groupby
from operator import itemgetter, xor
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from memory_os.stores.rows import parts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["add", "clear", "compact", "faults", "holding", "lengths", "newest", "places", "read", "remove"]

PAIRS = "unnest(CAST(:terms AS bigint[]), CAST(:pks AS bigint[]), CAST(:often AS integer[])) AS p(term, pk, n)"
ADD_ENTRIES = sa.text(
    "INSERT INTO lexical (namespace_id, segment_pk, terms) "
    "SELECT :ns, e.pk, e.terms FROM unnest(CAST(:pks AS bigint[]), CAST(:terms AS text[])) AS e(pk, terms)"
)
ADD_TERMS = sa.text(
    f"INSERT INTO postings (namespace_id, term, segment_pk, n) SELECT :ns, p.term, p.pk, p.n FROM {PAIRS} "
    # what is there of an entry that was lost
    "ON CONFLICT (namespace_id, term, segment_pk) DO UPDATE SET n = excluded.n"
)
REMOVE_ENTRIES = sa.text(
    "DELETE FROM lexical WHERE namespace_id = :ns AND segment_pk = ANY(CAST(:pks AS bigint[])) "
    "RETURNING segment_pk, terms"
)
REMOVE_TERMS = sa.text(
    f"DELETE FROM postings USING {PAIRS} "
    "WHERE namespace_id = :ns AND postings.term = p.term AND postings.segment_pk = p.pk"
)
READ = sa.text(
    "SELECT segment_pk, terms FROM lexical WHERE namespace_id = :ns AND segment_pk = ANY(CAST(:pks AS bigint[]))"
)
NEWEST = sa.text(
    "SELECT segment_pk FROM postings WHERE namespace_id = :ns AND term = :term AND segment_pk <= :bound "
    "ORDER BY segment_pk DESC LIMIT :n"
)
LENGTHS = sa.text(
    "SELECT segment_pk, cardinality(string_to_array(terms, ' ')) FROM lexical "
    "WHERE namespace_id = :ns AND segment_pk = ANY(CAST(:pks AS bigint[]))"
)
HOLDING = sa.text(
    "SELECT segment_pk FROM postings WHERE namespace_id = :ns AND term = ANY(CAST(:terms AS bigint[])) "
    "AND segment_pk >= :first"
)
# as the bytes of an array: a row and a value for each would take ten times as long
PLACES = sa.text(
    "SELECT string_agg(int8send(segment_pk), '' ORDER BY segment_pk), string_agg(int4send(n), '' ORDER BY segment_pk) "
    "FROM postings WHERE namespace_id = :ns AND term = :term"
)
SUMS = sa.text("SELECT segment_pk, bit_xor(term), sum(n) FROM postings WHERE namespace_id = :ns GROUP BY segment_pk")
ENTRIES = sa.text("SELECT segment_pk, terms FROM lexical WHERE namespace_id = :ns")


def add(connection: sa.Connection, entries: Iterable[tuple[int, int, Sequence[str]]]) -> None:
    """Add entries, given as ``(segment's row, namespace's number, terms)``."""
    for ns, group in groupby(sorted(entries, key=itemgetter(1)), key=itemgetter(1)):
        theirs = [(pk, terms) for pk, _, terms in group]
        for part in parts(theirs):
            lines = {"pks": [pk for pk, _ in part], "terms": [" ".join(terms) for _, terms in part]}
            connection.execute(ADD_ENTRIES, {"ns": ns, **lines})
            connection.execute(ADD_TERMS, _pairs(ns, part))


def remove(connection: sa.Connection, ns: int, pks: Sequence[int]) -> list[int]:
    """Remove entries; gives back how many terms each of those that existed had."""
    if not pks:
        return []
    gone = [(pk, terms.split()) for pk, terms in connection.execute(REMOVE_ENTRIES, {"ns": ns, "pks": list(pks)})]
    connection.execute(REMOVE_TERMS, _pairs(ns, gone))
    return [len(terms) for _, terms in gone]


def read(connection: sa.Connection, ns: int, pks: Sequence[int]) -> dict[int, list[str]]:
    """The terms of these entries, by row."""
    found: dict[int, list[str]] = {}
    for part in parts(pks):
        rows = connection.execute(READ, {"ns": ns, "pks": list(part)})
        found.update((pk, terms.split()) for pk, terms in rows)
    return found


def newest(connection: sa.Connection, ns: int, term: str, bound: int, limit: int) -> list[int]:
    """Rows up to ``bound`` that hold the term, newest first."""
    told = {"ns": ns, "term": _number(ns, term), "bound": bound, "n": limit}
    return list(connection.execute(NEWEST, told).scalars())


def lengths(connection: sa.Connection, ns: int, pks: Sequence[int]) -> dict[int, int]:
    """How many terms these entries have, by row."""
    found: dict[int, int] = {}
    for part in parts(pks):
        found.update((pk, n) for pk, n in connection.execute(LENGTHS, {"ns": ns, "pks": list(part)}))
    return found


def holding(connection: sa.Connection, ns: int, terms: Iterable[str], first: int) -> set[int]:
    """Rows from row ``first`` on that hold any of the terms."""
    told = {"ns": ns, "terms": list(_numbers(ns, terms)), "first": first}
    return set(connection.execute(HOLDING, told).scalars())


def places(connection: sa.Connection, ns: int, term: str) -> NDArray[np.int64]:
    """Rows that hold the term, rising, each as often as it stands there."""
    import numpy as np

    pks, often = connection.execute(PLACES, {"ns": ns, "term": _number(ns, term)}).one()
    rows = np.frombuffer(pks or b"", dtype=">i8").astype(np.int64)
    return np.repeat(rows, np.frombuffer(often or b"", dtype=">i4"))


def compact(connection: sa.Connection) -> None:
    """Nothing: VACUUM does it, after the transaction."""


def clear(connection: sa.Connection) -> None:
    """Remove every entry."""
    connection.execute(sa.text("DELETE FROM postings"))
    connection.execute(sa.text("DELETE FROM lexical"))


def faults(connection: sa.Connection, ns: int) -> list[int]:
    """Rows of the namespace whose terms in the inverted index are not those of their entry."""
    there = {pk: (int(total), int(n)) for pk, total, n in connection.execute(SUMS, {"ns": ns})}
    entries = ((pk, terms.split()) for pk, terms in connection.execute(ENTRIES, {"ns": ns}))
    meant = {pk: (reduce(xor, _numbers(ns, terms), 0), len(terms)) for pk, terms in entries}
    nothing = (0, 0)
    return sorted(pk for pk in there.keys() | meant.keys() if there.get(pk, nothing) != meant.get(pk, nothing))


def _pairs(ns: int, entries: Iterable[tuple[int, Sequence[str]]]) -> dict[str, Any]:
    # in the order of the index; and written as the server reads them, as the driver takes longer over a list
    pairs = sorted((number, pk, n) for pk, terms in entries for number, n in _numbers(ns, terms).items())
    terms, pks, often = (",".join(str(pair[side]) for pair in pairs) for side in (0, 1, 2))
    return {"ns": ns, "terms": f"{{{terms}}}", "pks": f"{{{pks}}}", "often": f"{{{often}}}"}


def _numbers(ns: int, terms: Iterable[str]) -> Counter[int]:
    """The numbers of the terms, each with how often it is there."""
    return Counter(_number(ns, term) for term in terms)


def _number(ns: int, term: str) -> int:
    digest = hashlib.blake2b(f"{ns}_{term}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
