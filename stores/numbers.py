"""The numbers that rows are given: the last that ever was, also where its row is gone. Functions on a connection."""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa

from memory_os.stores.partitions import is_postgres
from memory_os.stores.schema import metadata

__all__ = ["last_numbers", "set_last_numbers"]

NUMBERED = {
    table.name: table.primary_key.columns[0].name
    for table in metadata.sorted_tables
    if [isinstance(c.type, sa.Integer) and bool(c.autoincrement) and not c.foreign_keys for c in table.primary_key]
    == [True]
}
"""Tables whose rows are numbered, and the column."""


def last_numbers(connection: sa.Connection) -> dict[str, int]:
    """The last number that was given in each table; 0 where none was."""
    query = " UNION ALL ".join(f"SELECT '{name}', max({key}) FROM {name}" for name, key in NUMBERED.items())
    last: dict[str, int] = {name: number or 0 for name, number in connection.execute(sa.text(query))}
    if is_postgres(connection):
        given = {name: _given(connection, sequence) for name, sequence in _sequences(connection).items()}
    else:
        given = {row.name: row.seq for row in connection.execute(sa.text("SELECT name, seq FROM sqlite_sequence"))}
    return {name: max(number, given.get(name, 0)) for name, number in last.items()}


def set_last_numbers(connection: sa.Connection, last: Mapping[str, int]) -> None:
    """Have the next numbers be greater than these."""
    if is_postgres(connection):
        sequences = _sequences(connection)
        told = [{"sequence": sequences[name], "number": number} for name, number in last.items() if number]
        for each in told:
            connection.execute(sa.text("SELECT setval(CAST(:sequence AS regclass), :number)"), each)
        return
    for name, number in last.items():
        if metadata.tables[name].dialect_options["sqlite"]["autoincrement"]:
            connection.execute(sa.text("DELETE FROM sqlite_sequence WHERE name = :name"), {"name": name})
            told_one = {"name": name, "number": number}
            connection.execute(sa.text("INSERT INTO sqlite_sequence (name, seq) VALUES (:name, :number)"), told_one)


def _sequences(connection: sa.Connection) -> dict[str, str]:
    """The sequence of each table: its own, where it is an identity, or the one of the table's and column's name."""
    query = sa.text("SELECT coalesce(pg_get_serial_sequence(:table, :key), to_regclass(:own)::text)")
    return {
        name: connection.execute(query, {"table": name, "key": key, "own": f"{name}_{key}"}).scalar_one()
        for name, key in NUMBERED.items()
    }


def _given(connection: sa.Connection, sequence: str) -> int:
    value, called = connection.execute(sa.text(f"SELECT last_value, is_called FROM {sequence}")).one()
    return int(value) if called else 0
