"""Rows to values and back, and the small forms in which values stand in a column."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import sqlalchemy as sa

from memory_os.types import Namespace, Segment

__all__ = ["as_labels", "as_seq", "as_time", "parts", "to_row", "to_segment"]

T = TypeVar("T")

IN_LIMIT = 900  # SQLite's limit on bound variables is 999 in old builds


def as_labels(namespace: Namespace) -> str:
    """A namespace as it stands in its column: compared whole, never by pattern."""
    return json.dumps(namespace, ensure_ascii=False)


def parts(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """The values in runs that fit one query."""
    for start in range(0, len(values), IN_LIMIT):
        yield values[start : start + IN_LIMIT]


def as_seq(ref: str) -> int | None:
    """The number in ``12`` or ``#12``; ``None`` for anything else."""
    digits = ref.removeprefix("#")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else None


def as_time(time: datetime) -> str:
    """ISO 8601 in UTC with microseconds: as text it sorts as time does."""
    return time.astimezone(UTC).isoformat(timespec="microseconds")


def to_row(segment: Segment, ns: int) -> dict[str, Any]:
    """A segment as a row of ``segments``."""
    start, end = segment.offset or (None, None)
    return {
        "id": segment.id,
        "namespace_id": ns,
        "seq": segment.seq,
        "session": segment.session,
        "role": segment.role,
        "speaker": segment.speaker,
        "kind": segment.kind,
        "text": segment.text,
        "created_at": as_time(segment.created_at),
        "n_tokens": segment.n_tokens,
        "source": segment.source,
        "offset_start": start,
        "offset_end": end,
        "metadata": dict(segment.metadata),
        "key": segment.key,
    }


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
