"""Rows to values and back, and the small forms in which values stand in a column."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from memory_os.errors import ConfigError
from memory_os.types import Namespace, Segment

__all__ = [
    "SEGMENT_COLUMNS", "VECTOR_COLUMNS", "among", "as_labels", "as_seq", "as_time", "check_dimension", "check_lengths",
    "holds", "insert", "insert_many", "own", "parts", "to_row", "to_segment", "upsert",
]  # fmt: skip

T = TypeVar("T")

IN_LIMIT = 900  # SQLite's limit on bound variables is 999 in old builds


def check_dimension(fingerprint: str, stored: int | None, given: int) -> None:
    """Make sure that a vector can be compared with those that were made under its embedder's name.

    :raises ConfigError: if it has another length.
    """
    if stored != given:
        raise ConfigError(
            f"the embedder gives {given} numbers, and the vectors made under its name {fingerprint!r} have {stored}: "
            "another model has this name; give it one of its own, such as LangChainEmbedder(..., name=...), and open "
            "the memory again"
        )


def check_lengths(fingerprint: str, lengths: Collection[int | None]) -> None:
    """Make sure that stored vectors are of one length.

    :param lengths: those that there are, each once.
    :raises ConfigError: if they are not.
    """
    if len(lengths) > 1:
        raise ConfigError(
            f"the vectors made under the embedder's name {fingerprint!r} are of several lengths: it is the name of "
            "several models; give each a name of its own, such as LangChainEmbedder(..., name=...), and open the "
            "memory again"
        )


def as_labels(namespace: Namespace) -> str:
    """A namespace as it stands in its column: compared whole, never by pattern."""
    return json.dumps(namespace, ensure_ascii=False)


def parts(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """The values in runs that fit one query."""
    for start in range(0, len(values), IN_LIMIT):
        yield values[start : start + IN_LIMIT]


def among(column: sa.Column[Any], pks: Sequence[int]) -> sa.ColumnElement[bool]:
    """As ``column IN pks``; a run without gaps is named by its ends, as each value takes SQLAlchemy two microseconds.

    :param pks: rising; at least one.
    """
    return column.between(pks[0], pks[-1]) if pks[-1] - pks[0] == len(pks) - 1 else column.in_(pks)


class _Namespace(FunctionElement[int]):
    type = sa.BigInteger()
    inherit_cache = True


@compiles(_Namespace)
def _as_column(element: _Namespace, compiler: Any, **options: Any) -> str:
    return str(compiler.process(element.clauses, **options))


@compiles(_Namespace, "sqlite")
def _as_value(element: _Namespace, compiler: Any, **options: Any) -> str:
    return f"+{compiler.process(element.clauses, **options)}"


def own(table: sa.Table, ns: int) -> sa.ColumnElement[bool]:
    """The condition for a row of the namespace, beside another that names the rows.

    PostgreSQL finds the partition by it. SQLite only checks it: without statistics it would take an index by namespace
    for better than the list of rows, and read the whole namespace.
    """
    return _Namespace(table.c.namespace_id) == ns


class _Position(FunctionElement[int]):
    type = sa.Integer()
    inherit_cache = True


@compiles(_Position)
def _instr(element: _Position, compiler: Any, **options: Any) -> str:
    return f"instr({compiler.process(element.clauses, **options)})"


@compiles(_Position, "postgresql")
def _strpos(element: _Position, compiler: Any, **options: Any) -> str:
    return f"strpos({compiler.process(element.clauses, **options)})"


def holds(column: sa.Column[Any], text: str) -> sa.ColumnElement[bool]:
    """The condition for a text, or JSON as it is written, with this text in it, letter by letter."""
    return _Position(sa.cast(column, sa.Text), sa.cast(text, sa.Text)) > 0


def insert(connection: sa.Connection, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
    """An INSERT that knows ON CONFLICT."""
    return postgresql.insert(table) if connection.dialect.name == "postgresql" else sqlite.insert(table)


def upsert(connection: sa.Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]], key: Sequence[str]) -> None:
    """Store rows, each in place of the one with its key.

    :param key: that of the table; PostgreSQL's begins with the namespace.
    """
    if not rows:
        return
    if connection.dialect.name == "postgresql" and "namespace_id" not in key:
        key = ("namespace_id", *key)
    new = insert(connection, table)
    values = {name: new.excluded[name] for name in rows[0] if name not in key}
    connection.execute(new.on_conflict_do_update(index_elements=list(key), set_=values), list(rows))


def as_seq(ref: str) -> int | None:
    """The number in ``12`` or ``#12``; ``None`` for anything else."""
    digits = ref.removeprefix("#")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else None


def as_time(time: datetime) -> str:
    """ISO 8601 in UTC with microseconds: as text it sorts as time does."""
    return time.astimezone(UTC).isoformat(timespec="microseconds")


@lru_cache(maxsize=64)  # the segments of one call that name no time have the same
def _utc(time: datetime) -> str:
    return as_time(time)


def insert_many(
    connection: sa.Connection, table: sa.Table, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]
) -> None:
    """Insert rows by the driver alone: for thousands SQLAlchemy takes longer than the database.

    :param rows: in the order of the columns, each value as it stands in the file: JSON as text.
    """
    into = f"INSERT INTO {table.name} ({', '.join(columns)})"
    if connection.dialect.name != "postgresql":
        connection.exec_driver_sql(f"{into} VALUES ({', '.join('?' * len(columns))})", list(rows))
        return
    # a column at a time, by one statement: COPY is not for tables with row-level security
    kinds = (table.c[name].type.compile(connection.dialect) for name in columns)
    arrays = ", ".join(f"CAST(%s AS {kind}[])" for kind in kinds)
    for part in parts(rows):
        values = tuple(list(column) for column in zip(*part, strict=True))
        connection.exec_driver_sql(f"{into} SELECT * FROM unnest({arrays})", values)


SEGMENT_COLUMNS = (
    "id", "namespace_id", "seq", "session", "role", "speaker", "kind", "text", "created_at", "n_tokens", "source",
    "offset_start", "offset_end", "metadata", "key",
)  # fmt: skip

VECTOR_COLUMNS = ("namespace_id", "segment_pk", "fingerprint", "vector", "tokens")


def to_row(segment: Segment, ns: int) -> tuple[Any, ...]:
    """A segment as a row of ``segments``, in the order of ``SEGMENT_COLUMNS``."""
    start, end = segment.offset or (None, None)
    metadata = json.dumps(segment.metadata) if segment.metadata else "{}"
    return (
        segment.id, ns, segment.seq, segment.session, segment.role, segment.speaker, segment.kind, segment.text,
        _utc(segment.created_at), segment.n_tokens, segment.source, start, end, metadata, segment.key,
    )  # fmt: skip


def to_segment(row: sa.Row[Any], namespace: Namespace) -> Segment:
    """A row of ``segments`` as a segment."""
    return Segment(
        id=row.id,
        seq=row.seq,
        namespace=namespace,
        session=row.session,
        role=row.role,
        speaker=row.speaker,
        kind=row.kind,
        text=row.text,
        created_at=datetime.fromisoformat(row.created_at),
        n_tokens=row.n_tokens,
        source=row.source,
        offset=None if row.offset_start is None else (row.offset_start, row.offset_end),
        metadata=row.metadata,
        key=row.key,
    )
