"""Entries of the lexical index in SQLite: an FTS5 table. Functions on an open connection.

The namespace's number is part of every term, so that a search cannot reach another namespace's entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from memory_os.stores.rows import parts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "PLACES", "add", "check", "clear", "compact", "holding", "lengths", "newest", "places", "read", "remove", "wipe",
]  # fmt: skip

PLACES = "temp.lexical_places"
"""Where each term of the index stands: a view of FTS5's, made for each connection."""

MAX_TERM_BYTES = 32768
"""FTS5 cuts what is longer, in a search too."""

MAX_LEVEL_BYTES = 2000
"""A level takes two bytes."""


def add(connection: sa.Connection, entries: Iterable[tuple[int, int, Sequence[str]]]) -> None:
    """Add entries, given as ``(segment's row, namespace's number, terms)``."""
    rows = [(pk, f"{ns}_" + f" {ns}_".join(terms) if terms else "") for pk, ns, terms in entries]
    if rows:
        connection.exec_driver_sql("INSERT INTO lexical(rowid, terms) VALUES (?, ?)", rows)


def remove(connection: sa.Connection, ns: int, pks: Sequence[int]) -> list[int]:
    """Remove entries; gives back how many terms each of those that existed had."""
    lengths: list[int] = []
    for part in parts(pks):
        marks = ",".join("?" * len(part))
        rows = connection.exec_driver_sql(f"SELECT terms FROM lexical WHERE rowid IN ({marks})", tuple(part))
        lengths += (len(terms.split()) for (terms,) in rows)
        connection.exec_driver_sql(f"DELETE FROM lexical WHERE rowid IN ({marks})", tuple(part))
    return lengths


def read(connection: sa.Connection, ns: int, pks: Sequence[int]) -> dict[int, list[str]]:
    """The terms of these entries, by row."""
    prefix = f" {ns}_"
    found: dict[int, list[str]] = {}
    for part in parts(pks):
        marks = ",".join("?" * len(part))
        rows = _fetched(connection, f"SELECT rowid, terms FROM lexical WHERE rowid IN ({marks})", tuple(part))
        # no term has an underscore in it, so that this finds the prefixes and nothing else
        found.update((pk, f" {terms}".replace(prefix, " ").split()) for pk, terms in rows)
    return found


def newest(connection: sa.Connection, ns: int, term: str, bound: int, limit: int) -> list[int]:
    """Rows up to ``bound`` that hold the term, newest first."""
    query = "SELECT rowid FROM lexical WHERE lexical MATCH ? AND rowid <= ? ORDER BY rowid DESC LIMIT ?"
    return [pk for (pk,) in _fetched(connection, query, (f'"{ns}_{term}"', bound, limit))]


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


def lengths(connection: sa.Connection, ns: int, pks: Sequence[int]) -> dict[int, int]:
    """How many terms these entries have, by row."""
    found: dict[int, int] = {}
    for part in parts(pks):
        marks = ",".join("?" * len(part))
        rows = _fetched(connection, f"SELECT id, sz FROM lexical_docsize WHERE id IN ({marks})", tuple(part))
        found.update((pk, size[0] if len(size) == 1 else _read_number(size)) for pk, size in rows)
    return found


def _read_number(size: bytes) -> int:
    """A number as FTS5 writes it: seven bits a byte, the highest first."""
    return reduce(lambda number, byte: number << 7 | byte & 0x7F, size, 0)


def holding(connection: sa.Connection, ns: int, terms: Iterable[str], first: int) -> set[int]:
    """Rows from row ``first`` on that hold any of the terms."""
    any_of = " OR ".join(f'"{ns}_{term}"' for term in sorted(terms))
    query = "SELECT rowid FROM lexical WHERE lexical MATCH ? AND rowid >= ?"
    return {pk for (pk,) in _fetched(connection, query, (any_of, first))}


def places(connection: sa.Connection, ns: int, term: str) -> NDArray[np.int64]:
    """Rows that hold the term, rising, each as often as it stands there."""
    import numpy as np

    stored = f"{ns}_{term}".encode()[:MAX_TERM_BYTES]
    rows = _fetched(connection, f"SELECT doc FROM {PLACES} WHERE term = CAST(? AS TEXT)", (stored,))
    return np.array([pk for (pk,) in rows], dtype=np.int64)


def compact(connection: sa.Connection) -> None:
    """Write the whole index anew, without what removed entries left in it: 2 ms for 1,000 segments.

    Until then their terms stand in its older parts, marked as deleted.
    """
    # each "optimize" adds two levels to FTS5's record of the index, which takes one of 2,000 for damage
    levels = connection.exec_driver_sql("SELECT length(block) FROM lexical_data WHERE id = 10").scalar_one()
    how = "rebuild" if levels > MAX_LEVEL_BYTES else "optimize"
    connection.exec_driver_sql(f"INSERT INTO lexical(lexical) VALUES ('{how}')")


def clear(connection: sa.Connection) -> None:
    """Remove every entry, also from an index that does not match them."""
    connection.exec_driver_sql("INSERT INTO lexical(lexical) VALUES ('rebuild')")  # so that the deletion finds its way
    connection.exec_driver_sql("DELETE FROM lexical")


def wipe(connection: sa.Connection) -> None:
    """Empty the index by the tables that it consists of, as FTS5 does nothing for one that it takes for damaged."""
    for part in ("data", "idx", "content", "docsize"):
        connection.exec_driver_sql(f"DELETE FROM lexical_{part}")
    # its averages and its structure, as of an index without entries
    connection.exec_driver_sql("INSERT INTO lexical_data(id, block) VALUES (1, x''), (10, x'00000000000000')")


def check(connection: sa.Connection) -> None:
    """Have FTS5 compare its index with the entries; it raises where they differ."""
    connection.exec_driver_sql("INSERT INTO lexical(lexical) VALUES ('integrity-check')")
