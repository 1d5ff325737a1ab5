"""Entries of the lexical index in PostgreSQL: a row for each segment's terms, and one for each term of it.

The second table is the inverted index: in its key, rows of one term stand newest first by a walk backwards, so that a
search reads no more than it asked for, however common the term. A term stands there as a number made of it and of its
namespace: it fits an index whatever its length, and a search cannot reach another namespace's entries. (A GIN index
would be smaller; but it gives rows in no order, and under row-level security PostgreSQL does not use it.) Two terms of
one number, of which there are hardly any, cost a look at an entry: BM25 is computed from the terms themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from itertools import groupby
from operator import itemgetter, xor
from typing import Any

import sqlalchemy as sa

from memory_os.stores.rows import parts

__all__ = ["add", "clear", "compact", "faults", "newest", "read", "remove"]

PAIRS = "unnest(CAST(:terms AS bigint[]), CAST(:pks AS bigint[])) AS p(term, pk)"
ADD_ENTRIES = sa.text(
    "INSERT INTO lexical (namespace_id, segment_pk, terms) "
    "SELECT :ns, e.pk, e.terms FROM unnest(CAST(:pks AS bigint[]), CAST(:terms AS text[])) AS e(pk, terms)"
)
ADD_TERMS = sa.text(
    f"INSERT INTO postings (namespace_id, term, segment_pk) SELECT :ns, p.term, p.pk FROM {PAIRS} "
    "ON CONFLICT DO NOTHING"  # what is there of an entry that was lost
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
SUMS = sa.text("SELECT segment_pk, bit_xor(term) FROM postings WHERE namespace_id = :ns GROUP BY segment_pk")
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


def compact(connection: sa.Connection) -> None:
    """Nothing: VACUUM does it, after the transaction."""


def clear(connection: sa.Connection) -> None:
    """Remove every entry."""
    connection.execute(sa.text("DELETE FROM postings"))
    connection.execute(sa.text("DELETE FROM lexical"))


def faults(connection: sa.Connection, ns: int) -> list[int]:
    """Rows of the namespace whose terms in the inverted index are not those of their entry."""
    there: dict[int, int] = {pk: int(total) for pk, total in connection.execute(SUMS, {"ns": ns})}
    meant = {pk: reduce(xor, _numbers(ns, terms.split()), 0) for pk, terms in connection.execute(ENTRIES, {"ns": ns})}
    return sorted(pk for pk in there.keys() | meant.keys() if there.get(pk, 0) != meant.get(pk, 0))


def _pairs(ns: int, entries: Iterable[tuple[int, Sequence[str]]]) -> dict[str, Any]:
    # in the order of the index; and written as the server reads them, as the driver takes longer over a list
    pairs = sorted((number, pk) for pk, terms in entries for number in _numbers(ns, terms))
    terms, pks = (",".join(str(pair[side]) for pair in pairs) for side in (0, 1))
    return {"ns": ns, "terms": f"{{{terms}}}", "pks": f"{{{pks}}}"}


def _numbers(ns: int, terms: Iterable[str]) -> Iterator[int]:
    """The numbers of the terms, each once."""
    yield from {_number(ns, term) for term in terms}


def _number(ns: int, term: str) -> int:
    digest = hashlib.blake2b(f"{ns}_{term}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
