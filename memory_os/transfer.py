"""Export and import as JSONL: one header line, then a line per segment, trace and item. Lossless for what is recorded.

What is derived (vectors, lexical entries) is left out and made anew by the import.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

from memory_os.errors import InvalidInputError
from memory_os.ingest import ARCHIVE, parse_time
from memory_os.items import checked_change
from memory_os.limits import MAX_LINE_CHARS, archive_kind, checked_segment, checked_trace, open_file, parse_json
from memory_os.protocols import ItemChange
from memory_os.trace import trace_from_dict, trace_to_dict
from memory_os.types import NewSegment, Segment, Trace

__all__ = ["HEADER", "export_lines", "parse_lines", "read_records", "replace_file", "segment_to_dict"]

HEADER = {"memory_os_export": 1}
TIMES = ("created_at", "updated_at", "expires_at")


def segment_to_dict(segment: Segment) -> dict[str, Any]:
    """Give back the segment as JSON-ready data."""
    return {
        **{field.name: getattr(segment, field.name) for field in fields(segment)},
        "metadata": dict(segment.metadata),
        "namespace": list(segment.namespace),
        "created_at": segment.created_at.isoformat(),
        "offset": list(segment.offset) if segment.offset else None,
    }


def export_lines(
    segments: Iterable[Segment], traces: Iterable[Trace], items: Iterable[ItemChange] = ()
) -> Iterator[str]:
    """The lines of an export, without line ends."""
    yield json.dumps(HEADER)
    for segment in segments:
        yield json.dumps({"segment": segment_to_dict(segment)}, ensure_ascii=False)
    for trace in traces:
        yield json.dumps({"trace": trace_to_dict(trace)}, ensure_ascii=False)
    for item in items:
        yield json.dumps({"item": _item_to_dict(item)}, ensure_ascii=False)


def _item_to_dict(item: ItemChange) -> dict[str, Any]:
    times = {name: getattr(item, name) for name in TIMES}
    return {
        "path": item.path,
        "key": item.key,
        "value": item.value,
        "texts": item.texts,
        "ttl": item.ttl,
        **{name: time.isoformat() if time else None for name, time in times.items()},
    }


def parse_lines(lines: Iterable[str], name: str) -> Iterator[NewSegment | Trace | ItemChange]:
    """What the lines of an export hold.

    :raises InvalidInputError: with the number of the line that is broken or of another kind.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            if len(line) > MAX_LINE_CHARS:
                raise InvalidInputError(
                    f"the line has more than {MAX_LINE_CHARS} characters, so no export wrote it",
                    source=name,
                    line=number,
                )
            record = parse_json(line)
            if number == 1:
                if record != HEADER:
                    raise InvalidInputError(
                        "not an export of memory_os; to store a chat or a document use: memos ingest",
                        source=name,
                        line=1,
                    )
                continue
            if "segment" in record:
                yield _segment(record["segment"], name, number)
            elif "item" in record:
                yield _item(record["item"], name, number)
            else:
                yield checked_trace(trace_from_dict(record["trace"]))
        except (ValueError, OverflowError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInputError(
                f"not a whole record ({error}); what came before it is stored; mend the line and run again",
                source=name,
                line=number,
            ) from error


def _segment(data: Mapping[str, Any], name: str, line: int) -> NewSegment:
    created_at: datetime = parse_time(data["created_at"], source=name, line=line)
    new = NewSegment(
        data["text"],
        data["session"],
        role=data["role"],
        speaker=data["speaker"],
        kind=data["kind"],
        created_at=created_at,
        source=data["source"],
        offset=tuple(data["offset"]) if data["offset"] else None,
        metadata=data["metadata"],
        key=data["key"],
        id=data["id"],
        seq=data["seq"],
    )
    return checked_segment(new, source=name, line=line)


def _item(data: Mapping[str, Any], name: str, line: int) -> ItemChange:
    item = ItemChange(
        data["path"],
        data["key"],
        dict(data["value"]),
        tuple((field, text) for field, text in data["texts"]),
        data["ttl"],
        **{each: parse_time(data[each], source=name, line=line) if data[each] else None for each in TIMES},
    )
    try:
        return checked_change(item)
    except InvalidInputError as error:
        raise InvalidInputError(error.problem, source=name, line=line) from error


def read_records(file: str | Path | Iterable[str]) -> Iterator[NewSegment | Trace | ItemChange]:
    """What an export holds, from a file or from its lines."""
    name = str(file) if isinstance(file, str | Path) else "-"
    try:
        if not isinstance(file, str | Path):
            yield from parse_lines(file, name)
            return
        with open_file(file) as binary:
            if kind := archive_kind(binary.read(512)):
                raise InvalidInputError(ARCHIVE.format(kind), source=name)
            binary.seek(0)
            lines = io.TextIOWrapper(binary, encoding="utf-8")
            yield from parse_lines(iter(lambda: lines.readline(MAX_LINE_CHARS + 1), ""), name)
    except UnicodeDecodeError as error:
        raise InvalidInputError("not UTF-8; an export of memory_os always is", source=name) from error


def replace_file(path: Path, lines: Iterable[str]) -> None:
    """Write a file whole or not at all: what was there stays until the last line is on the disk.

    :raises InvalidInputError: if it cannot be written, or what is there is a folder or a device, which stays.
    """
    try:
        if path.exists() and not path.is_file():
            problem = "it is no regular file, and stays as it is; name a file, or - for standard output"
            raise InvalidInputError(problem, source=str(path))
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", newline="\n", dir=path.parent, prefix=path.name, delete=False
        ) as file:
            try:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except ValueError as error:  # a NUL in the name
        raise InvalidInputError(f"no file has such a name: {error}", source=str(path)) from error
    except OSError as error:
        raise InvalidInputError(
            f"cannot write it: {error.strerror}; what was there before is untouched. Free some space, or check the "
            "permissions of its folder",
            source=str(path),
        ) from error
