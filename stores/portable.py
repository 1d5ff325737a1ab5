"""What is in a store that a copy of it could not hold, found before anything is written."""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa

from memory_os.errors import StoreError
from memory_os.stores.backend import Backend
from memory_os.stores.partitions import is_postgres
from memory_os.stores.schema import metadata
from memory_os.stores.tablerows import LEFT

__all__ = ["check_portable"]

COPIED = [table for table in metadata.sorted_tables if table.name not in LEFT]
MOST_IN_INDEX = 2500
"""Bytes of the texts of one entry of an index of PostgreSQL: of its 2,704 numbers take some."""


def check_portable(source: Backend, *, to_server: bool) -> None:
    """Make sure that a copy can hold all that there is.

    :param to_server: it is to be one in PostgreSQL, which takes less than a file.
    :raises StoreError: if it cannot; every sort of obstacle is named, each with a row.
    """
    with source.read() as connection:
        if is_postgres(connection):
            return  # it keeps its keys whole, and a file takes all that it does
        queries = dict(_broken_references())
        if to_server:
            queries |= {**dict(_nul()), **dict(_too_long()), **dict(_no_json())}
        found = [(what, *connection.execute(sa.text(query)).one()) for what, query in queries.items()]
    obstacles = "; ".join(f"{what}: {n} rows, such as {first}" for what, n, first in found if n)
    if obstacles:
        raise StoreError(
            f"{source.place} cannot be copied, and nothing was written: {obstacles}. Change or forget these"
        )


def _asked(table: sa.Table, condition: str) -> str:
    key = [column.name for column in table.primary_key][-1]
    shown = f"hex({key})" if isinstance(table.c[key].type, sa.LargeBinary) else key
    return f"SELECT count(*), min({shown}) FROM {table.name} t WHERE {condition}"


def _broken_references() -> Iterator[tuple[str, str]]:
    for table in COPIED:
        for column in table.columns:
            for key in column.foreign_keys:
                parent = key.column.table
                also = " AND p.namespace_id = t.namespace_id" if "namespace_id" in parent.c else ""
                there = f"SELECT 1 FROM {parent.name} p WHERE p.{key.column.name} = t.{column.name}{also}"
                what = f"{table.name} of {parent.name} that are not there (memos doctor --repair --deep)"
                yield what, _asked(table, f"NOT EXISTS ({there})")


def _nul() -> Iterator[tuple[str, str]]:
    for table in COPIED:
        for column in table.columns:
            if isinstance(column.type, sa.Text | sa.String):
                what = f"a NUL character in {table.name}.{column.name}, which PostgreSQL does not store"
                yield what, _asked(table, f"instr(CAST({column.name} AS BLOB), x'00') > 0")


def _too_long() -> Iterator[tuple[str, str]]:
    for table in COPIED:
        unique = [each.columns for each in table.constraints if isinstance(each, sa.UniqueConstraint)]
        for columns in (table.primary_key.columns, *unique, *(index.columns for index in table.indexes)):
            texts = [column.name for column in columns if isinstance(column.type, sa.Text | sa.String)]
            if texts:
                length = " + ".join(f"coalesce(length(CAST({name} AS BLOB)), 0)" for name in texts)
                what = f"more than {MOST_IN_INDEX:,} bytes in {table.name}.{' and '.join(texts)}, which PostgreSQL's "
                yield f"{what}indexes do not hold", _asked(table, f"{length} > {MOST_IN_INDEX}")


def _no_json() -> Iterator[tuple[str, str]]:
    for table in COPIED:
        for column in table.columns:
            if isinstance(column.type, sa.JSON):
                what = f"what is no JSON in {table.name}.{column.name} (memos doctor)"
                yield what, _asked(table, f"NOT json_valid({column.name})")
