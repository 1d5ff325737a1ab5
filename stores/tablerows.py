"""Rows as they are stored, read and written alike on both databases: for copying and comparing whole stores.

A row is a tuple of its columns: numbers, texts, bytes and ``None``; JSON is its text as it was written. A key is the
namespace's number and then what tells the rows of a namespace apart. Functions on an open connection.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import sqlalchemy as sa

from memory_os.stores.partitions import is_postgres
from memory_os.stores.rows import insert as insert_of
from memory_os.stores.rows import insert_many, parts
from memory_os.stores.schema import metadata

__all__ = ["LEFT", "TABLES", "Key", "Row", "Table", "Total", "delete", "insert", "keys", "read", "totals"]

LEFT = {
    "store": "a copy is a store of its own, with an id of its own",
    "bank": "keys and values lie in files; they are made anew as segments are used",
    "workers": "they work on one store",
    "claims": "they are of workers",
}
"""Tables whose rows are not another store's, and why."""

FETCH = 5000  # rows that a streaming query has in memory
WHOLE = 2**256
MOST = 2**63  # of SQLite's numbers

Key = tuple[Any, ...]
Row = tuple[Any, ...]


class Table(NamedTuple):
    """What is needed of a table to read and write its rows."""

    name: str
    columns: tuple[str, ...]
    key: tuple[str, ...]
    json: tuple[int, ...]  # the places of columns of JSON
    places: tuple[int, ...]  # of the key's columns
    found_by_number: bool  # SQLite would take an index by namespace for better than the rows' own numbers

    def key_of(self, row: Row) -> Key:
        """The row's key."""
        return tuple(row[place] for place in self.places)


def _table(table: sa.Table) -> Table:
    columns = tuple(column.name for column in table.columns)
    own = [column.name for column in table.primary_key]
    key = tuple(dict.fromkeys(["namespace_id", *own])) if "namespace_id" in columns else tuple(own)
    return Table(
        table.name,
        columns,
        key,
        tuple(n for n, column in enumerate(table.columns) if isinstance(column.type, sa.JSON)),
        tuple(columns.index(name) for name in key),
        "namespace_id" not in own,
    )


TABLES = tuple(_table(table) for table in metadata.sorted_tables if table.name not in LEFT)
"""Every table that is copied, each after those that it refers to."""


def keys(connection: sa.Connection, table: Table) -> Iterator[Key]:
    """The keys of all rows, in order: the same order on both databases, and Python's."""
    named = ", ".join(table.key)
    for row in _stream(connection, f"SELECT {named} FROM {table.name} ORDER BY {named}"):
        yield tuple(row)


def read(connection: sa.Connection, table: Table, wanted: Sequence[Key]) -> dict[Key, Row]:
    """The rows with these keys, which are in order."""
    found: dict[Key, Row] = {}
    query = f"SELECT {_columns(connection, table)} FROM {table.name} WHERE "
    if len(table.key) == 1:
        groups: Iterable[tuple[Any, Iterable[Key]]] = [(None, wanted)]
        query += f"{table.key[0]} IN :these"
    else:
        groups = groupby(wanted, key=itemgetter(0))
        plus = "+" if table.found_by_number and not is_postgres(connection) else ""
        query += f"{plus}{table.key[0]} = :ns AND {table.key[1]} IN :these"
    statement = sa.text(query).bindparams(sa.bindparam("these", expanding=True))
    asked = set(wanted)
    for ns, group in groups:
        for part in parts(list(dict.fromkeys(key[1 if len(key) > 1 else 0] for key in group))):
            told = {"these": list(part)} | ({} if ns is None else {"ns": ns})
            for each in connection.execute(statement, told):
                row = _plain(table, each)
                if (key := table.key_of(row)) in asked:
                    found[key] = row
    return found


def insert(connection: sa.Connection, table: Table, rows: Iterable[Row], *, replace: bool = False) -> None:
    """Store rows.

    :param replace: also in the place of those with their keys.
    """
    written = [_stored(connection, table, row) for row in rows]
    if not written:
        return
    into = metadata.tables[table.name]
    if not replace:
        insert_many(connection, into, table.columns, written)
        return
    new = insert_of(connection, into)
    changed = {name: new.excluded[name] for name in table.columns if name not in table.key}
    told = [dict(zip(table.columns, row, strict=True)) for row in written]
    connection.execute(new.on_conflict_do_update(index_elements=list(table.key), set_=changed), told)


def delete(connection: sa.Connection, table: Table, gone: Iterable[Key]) -> None:
    """Delete the rows with these keys, and with them what refers to them."""
    told = [{f"k{n}": value for n, value in enumerate(key)} for key in gone]
    if told:
        where = " AND ".join(f"{name} = :k{n}" for n, name in enumerate(table.key))
        connection.execute(sa.text(f"DELETE FROM {table.name} WHERE {where}"), told)


class Total(NamedTuple):
    """All rows of a namespace in a table: how many, and the sum of their digests, in whatever order."""

    rows: int
    digest: int

    def __add__(self, other: object) -> Total:
        if not isinstance(other, Total):
            return NotImplemented
        return Total(self.rows + other.rows, (self.digest + other.digest) % WHOLE)


def totals(connection: sa.Connection, table: Table) -> dict[int, Total]:
    """What every namespace has in the table, by its number."""
    n_rows: dict[int, int] = {}
    digests: dict[int, int] = {}
    place = table.places[0]
    for each in _stream(connection, f"SELECT {_columns(connection, table)} FROM {table.name}"):
        row = _plain(table, each)
        ns = row[place]
        n_rows[ns] = n_rows.get(ns, 0) + 1
        digests[ns] = (digests.get(ns, 0) + _digest(row)) % WHOLE
    return {ns: Total(n, digests[ns]) for ns, n in n_rows.items()}


def _digest(row: Row) -> int:
    """The SHA-256 of a row, every value written with its kind and its length."""
    pieces: list[bytes] = []
    for value in row:
        if value is None:
            pieces.append(b"n")
        elif isinstance(value, str):
            said = value.encode()
            pieces += (b"s%d:" % len(said), said)
        elif isinstance(value, bytes):
            pieces += (b"b%d:" % len(value), value)
        else:
            pieces.append(f"{type(value).__name__[0]}{value!r};".encode())
    return int.from_bytes(hashlib.sha256(b"".join(pieces)).digest(), "big")


def _stream(connection: sa.Connection, query: str) -> Iterator[sa.Row[Any]]:
    return iter(connection.execute(sa.text(query), execution_options={"yield_per": FETCH}))


@cache
def _columns_of(table: Table, postgres: bool) -> str:
    # as text, or the driver would parse it
    as_text = {table.columns[n] for n in table.json} if postgres else set()
    return ", ".join(f"CAST({name} AS text) AS {name}" if name in as_text else name for name in table.columns)


def _columns(connection: sa.Connection, table: Table) -> str:
    return _columns_of(table, is_postgres(connection))


def _plain(table: Table, row: sa.Row[Any]) -> Row:
    if not table.json:
        return tuple(row)
    values = list(row)
    for place in table.json:
        values[place] = _json_text(values[place])
    return tuple(values)


def _json_text(value: Any) -> str:
    """JSON as it was written, but for a bare number: SQLite keeps that as its own, a whole one without a fraction."""
    if isinstance(value, str) and value[:1] not in "-0123456789":
        return value
    number = json.loads(value) if isinstance(value, str) else value
    return json.dumps(int(number) if isinstance(number, float) and number.is_integer() else number)


def _stored(connection: sa.Connection, table: Table, row: Row) -> Row:
    """The row as the database takes it: to SQLite a bare number goes as such, as it reads digits less exactly."""
    if not table.json or is_postgres(connection):
        return row
    values = list(row)
    for place in table.json:
        text = values[place]
        if text[:1] in "-0123456789":
            number = json.loads(text)
            values[place] = number if isinstance(number, float) or abs(number) < MOST else text
    return tuple(values)
