"""How long, and of what kind, what is stored may be: one number for each, one error that names it and the fix."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from memory_os.errors import InvalidInputError, UnknownNameError
from memory_os.trace import trace_to_dict
from memory_os.types import NewSegment, Trace

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = [
    "MAX_DEPTH",
    "MAX_FILE_BYTES",
    "MAX_ITEM_CHARS",
    "MAX_LABEL_CHARS",
    "MAX_LINE_CHARS",
    "MAX_METADATA_CHARS",
    "MAX_NAME_CHARS",
    "MAX_PATH_LABELS",
    "MAX_SEGMENTS_PER_CALL",
    "MAX_SEQ",
    "MAX_SOURCE_CHARS",
    "MAX_TEXT_CHARS",
    "RESERVED",
    "archive_kind",
    "as_ref",
    "check_count",
    "check_depth",
    "check_name",
    "checked_metadata",
    "checked_segment",
    "checked_trace",
    "is_storable",
    "open_file",
    "parse_json",
]

MAX_TEXT_CHARS = 1_000_000
"""Of a segment, a query, or a text by which an item is found."""
MAX_NAME_CHARS = 1_024
"""Of a session, a speaker, a key or an id."""
MAX_SOURCE_CHARS = 8_192
MAX_METADATA_CHARS = 100_000
"""Of a segment's metadata as JSON."""
MAX_SEGMENTS_PER_CALL = 100_000
MAX_SEQ = 2**53
"""An imported number; those that follow need room above it."""
MAX_ITEM_CHARS = 1_000_000
"""Of an item's value as JSON."""
MAX_PATH_LABELS = 64
MAX_LABEL_CHARS = 1_024
"""Of a label of an item's path, and of its key."""
MAX_DEPTH = 64
"""Of lists and objects in one another, in metadata or in an item's value; the outermost counts."""
MAX_LINE_CHARS = 16_000_000
"""Of a line of an export, or of a chat in JSONL."""
MAX_FILE_BYTES = 1_000_000_000
"""Of a text, a Markdown file or a chat in JSON, which are read as a whole."""

ROLES = ("user", "assistant", "system", "tool")
KINDS = ("turn", "document", "note", "summary")
RESERVED = frozenset({"langchain_message", "derived", "outcome"})
"""Names in a segment's metadata under which the parts of memory_os tell one another something."""
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
FROM_ONE = f"numbers go from 1 to {MAX_SEQ}"
_ARCHIVES = {
    b"PK\x03\x04": "zip", b"PK\x05\x06": "zip", b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz",
    b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!\x1a\x07": "rar", b"\x28\xb5\x2f\xfd": "zstd",
}  # fmt: skip


def is_storable(text: str) -> bool:
    """Whether every database and file can hold the text: it has no NUL and no lone surrogate."""
    return not _UNSTORABLE.search(text)


def as_ref(ref: object, what: str) -> str | int:
    """A reference to something stored: a number as it is, anything else as text.

    :param what: it is to be of, such as ``"segment"``.
    :raises UnknownNameError: for one that nothing can have.
    """
    if isinstance(ref, int):
        if not 0 < ref <= MAX_SEQ:
            raise UnknownNameError(what, f"{ref:d}" if abs(ref) < 10**30 else "of so many digits", hint=FROM_ONE)
        return int(ref)
    text = str(ref)
    if not is_storable(text):
        raise UnknownNameError(what, text, hint="it holds what cannot be stored")
    return text


def check_name(
    name: object, what: str, *, most: int = MAX_NAME_CHARS, source: str | None = None, line: int | None = None
) -> None:
    """Make sure that something is a text that can be stored as a name.

    :param what: it is, such as ``"session"``.
    :raises InvalidInputError: if it is none, too long, or holds what no UTF-8 file can hold.
    """
    problem = None
    if not isinstance(name, str):
        problem = f"the {what} must be a string, not {type(name).__name__}"
    elif len(name) > most:
        problem = f"the {what} has {len(name)} characters, and may have {most}; use a shorter one"
    elif not is_storable(name):
        problem = f"the {what} holds a NUL or a lone surrogate, which cannot be stored; remove it"
    if problem:
        raise InvalidInputError(problem, source=source, line=line)


def check_count(n: int) -> None:
    """Make sure that a call does not bring more segments than one transaction takes.

    :raises InvalidInputError: if it does; nothing was stored.
    """
    if n > MAX_SEGMENTS_PER_CALL:
        raise InvalidInputError(
            f"{n} segments at once, and a call takes at most {MAX_SEGMENTS_PER_CALL}; give them in several calls"
        )


def check_depth(value: object) -> None:
    """Make sure that lists and objects stand in one another no deeper than ``MAX_DEPTH``.

    :raises ValueError: if they do, also for one that holds itself.
    """
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, Mapping | list | tuple)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"lists and objects in it stand in one another more than {MAX_DEPTH} deep; flatten it")
        level = [inner for each in level for inner in (each.values() if isinstance(each, Mapping) else each)]


def checked_metadata(metadata: object, *, source: str | None = None, line: int | None = None) -> dict[str, Any]:
    """Metadata as plain JSON.

    :raises InvalidInputError: for anything that JSON does not hold, and for more than ``MAX_METADATA_CHARS`` or
        ``MAX_DEPTH``.
    """
    try:
        if not isinstance(metadata, Mapping):
            raise TypeError(f"it is no mapping, but {type(metadata).__name__}")
        check_depth(metadata)
        text = json.dumps(dict(metadata), allow_nan=False, ensure_ascii=False)
        text.encode("utf-8")
    except (TypeError, ValueError) as error:
        problem = f"the metadata cannot be written as JSON: {error}"
        raise InvalidInputError(problem, source=source, line=line) from error
    if len(text) > MAX_METADATA_CHARS:
        raise InvalidInputError(
            f"the metadata has {len(text)} characters as JSON, and may have {MAX_METADATA_CHARS}; "
            "store what is long as the text, or as an item",
            source=source,
            line=line,
        )
    return dict(json.loads(text))


def checked_segment(new: NewSegment, *, source: str | None = None, line: int | None = None) -> NewSegment:
    """The segment as it can be stored.

    :raises InvalidInputError: if it cannot, with what is wrong; nothing was stored.
    """
    from memory_os.ingest import check_text

    where: dict[str, Any] = {"source": source, "line": line}
    check_text(new.text, **where)
    check_name(new.session, "session", **where)
    if not new.session.strip():
        raise InvalidInputError("the session has no name; give it one", **where)
    for what in ("speaker", "key", "id"):
        if (name := getattr(new, what)) is not None:
            check_name(name, what, **where)
    if new.source is not None:
        check_name(new.source, "source", most=MAX_SOURCE_CHARS, **where)
    for what, known in (("role", ROLES), ("kind", KINDS)):
        if (value := getattr(new, what)) not in known:
            raise InvalidInputError(f"unknown {what} {str(value)[:80]!r}; known: {', '.join(known)}", **where)
    if new.seq is not None and not (_is_int(new.seq) and 0 < new.seq <= MAX_SEQ):
        raise InvalidInputError(f"seq is a number from 1 to {MAX_SEQ}", **where)
    if new.offset is not None and not _is_span(new.offset):
        raise InvalidInputError("the offset is two numbers of characters, the start first", **where)
    if new.created_at is not None and not isinstance(new.created_at, datetime):
        raise InvalidInputError("created_at is a datetime", **where)
    if type(new.metadata) is dict and not new.metadata:
        return new
    return replace(new, metadata=checked_metadata(new.metadata, **where))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_span(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(_is_int(each) for each in value)
        and 0 <= value[0] <= value[1] <= MAX_SEQ
    )


def checked_trace(trace: Trace) -> Trace:
    """The trace, if everything in it is of the type that the store and the reader of a trace rely on.

    :raises ValueError: if not.
    """
    from pydantic import ValidationError

    try:
        _traces().validate_json(json.dumps(trace_to_dict(trace), allow_nan=False), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise ValueError(f"a trace's {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    numbers: list[float] = [trace.upto, trace.account.limit, trace.account.total]
    for entry in trace.ledger:
        numbers += [entry.seq, entry.rank, entry.n_tokens, entry.score]
        numbers += [*entry.signals.values(), *entry.contributions.values()]
    numbers += trace.timings_ms.values()
    if not all(abs(n) <= MAX_SEQ for n in numbers):
        raise ValueError(f"a trace's numbers are at most {MAX_SEQ}")
    if len(trace.id) > MAX_NAME_CHARS:
        raise ValueError("a trace's id is too long")
    return trace


@cache
def _traces() -> TypeAdapter[Trace]:
    from pydantic import TypeAdapter

    return TypeAdapter(Trace)


def parse_json(text: str) -> Any:
    """What a JSON text says.

    :raises ValueError: for anything else, nested too deeply or with a number too long among it.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def archive_kind(start: bytes) -> str | None:
    """What sort of archive a file that begins so is; ``None`` for none."""
    if start[257:262] == b"ustar":
        return "tar"
    return next((kind for magic, kind in _ARCHIVES.items() if start.startswith(magic)), None)


@contextmanager
def open_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A regular file, opened to be read.

    A link is followed to what it names; a folder, a device, a pipe or a socket is refused, and what the kernel makes up
    as it is read, as under ``/proc``: it may never end.

    :raises InvalidInputError: if it cannot be, or fails while it is read.
    """
    try:
        with _opened(path) as stream:
            yield stream
    except OSError as error:
        raise InvalidInputError(f"cannot read it: {error.strerror or error}", source=str(path)) from error


def _opened(path: str | Path) -> IO[bytes]:
    try:
        place = Path(path).expanduser()
        told = place.stat()  # before it is opened: to open a pipe waits for its other end
    except (ValueError, RuntimeError) as error:  # a NUL in the name; a home that is nobody's
        raise InvalidInputError(f"no file has such a name: {error}", source=str(path)) from error
    if not stat.S_ISREG(told.st_mode) or (not told.st_size and _is_made_up(place)):
        raise InvalidInputError(
            "it is no regular file; name a file, or pipe it in where the command takes - for standard input",
            source=str(path),
        )
    return place.open("rb")


def _is_made_up(place: Path) -> bool:
    """Whether it is on a file system that has no room of its own, as ``/proc`` has none."""
    return hasattr(os, "statvfs") and os.statvfs(place).f_blocks == 0
