"""Files to segments: plain text, Markdown and chats in JSON or JSONL. Parsing only; storing is the facade's.

Every segment gets a key made of the source, its own content, and how often that content came before in the source.
So ingesting again, or on from where an interrupted run stopped, adds nothing twice; a line added to the file adds one
segment; and two equal turns of one chat are both kept.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, TypeVar

from memory_os.derive import BATCH
from memory_os.errors import InvalidInputError
from memory_os.limits import (
    MAX_FILE_BYTES,
    MAX_LINE_CHARS,
    MAX_TEXT_CHARS,
    RESERVED,
    archive_kind,
    checked_segment,
    parse_json,
)
from memory_os.types import NewSegment, Role

__all__ = [
    "FORMATS",
    "batched",
    "check_text",
    "check_utf8",
    "parse_time",
    "read_segments",
    "up_to_the_fault",
    "with_keys",
]

T = TypeVar("T")

FORMATS = ("text", "markdown", "chat")
MAX_PASSAGE_CHARS = 800
"""About 180 tokens: several passages fit a context of 512, and none is cut off by a small embedder."""
MAX_PASSAGE_SIGNS = 200
"""The same where the text is Chinese, Japanese, Korean or Thai, whose characters cost a token and more each."""
"""Documents are cut at paragraphs, then sentences, into passages of at most so many characters (about 300 tokens)."""
ARCHIVE = "it is an archive ({}), and those are not opened; unpack it, and name the files that are in it"

_SIGN = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
_HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*\s*$")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SESSION = re.compile(r"^session_([0-9]{1,9})$")
READ = frozenset({"text", "content", "role", "speaker", "name", "created_at", "timestamp", "date", "session"})
"""Fields of a message that become parts of the segment; the others become its metadata."""
_ROLES: dict[str, Role] = {
    "user": "user", "human": "user",
    "assistant": "assistant", "ai": "assistant", "bot": "assistant", "model": "assistant",
    "system": "system", "developer": "system", "tool": "tool", "function": "tool",
}  # fmt: skip


def check_text(text: object, *, source: str | None = None, line: int | None = None) -> str:
    """Give the text back if it can be stored.

    :raises InvalidInputError: for anything but a string, for blank text, for characters that no UTF-8 file can hold,
        and for more than a million characters.
    """
    if not isinstance(text, str):
        raise InvalidInputError(f"the text must be a string, not {type(text).__name__}", source=source, line=line)
    if not text.strip():
        raise InvalidInputError("the text is empty; there is nothing to remember", source=source, line=line)
    if len(text) > MAX_TEXT_CHARS:
        raise InvalidInputError(
            f"the text has {len(text)} characters, a segment at most {MAX_TEXT_CHARS}; "
            "store it as a file: memos ingest",
            source=source,
            line=line,
        )
    if "\x00" in text or (not text.isascii() and _SURROGATE.search(text)):
        raise InvalidInputError(
            "the text holds a NUL or a lone surrogate, which cannot be stored; remove it", source=source, line=line
        )
    return text


def parse_time(value: object, *, source: str | None = None, line: int | None = None) -> datetime:
    """Give back a time in UTC from ISO 8601, seconds since 1970, or a form like ``1:56 pm on 8 May, 2023``.

    A time without a zone is taken as UTC.

    >>> parse_time("1:56 pm on 8 May, 2023").isoformat()
    '2023-05-08T13:56:00+00:00'

    :raises InvalidInputError: for anything else.
    """
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return datetime.fromtimestamp(value, UTC)
        if isinstance(value, datetime):
            time = value
        else:
            text = str(value).strip()
            try:
                time = datetime.fromisoformat(text)
            except ValueError:
                time = datetime.strptime(text, "%I:%M %p on %d %B, %Y")
        return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise InvalidInputError(
            f"cannot read the time {value!r}; write it as ISO 8601, such as 2023-05-08T13:56:00Z",
            source=source,
            line=line,
        ) from error


def with_keys(segments: Iterable[NewSegment], source: str) -> Iterator[NewSegment]:
    """Name the source in each segment and give it the key that makes storing it again a no-op."""
    seen: Counter[str] = Counter()
    for segment in segments:
        when = segment.created_at.isoformat() if segment.created_at else ""
        content = [source, segment.session, segment.role, segment.speaker or "", when, segment.text]
        digest = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
        seen[digest] += 1
        yield replace(segment, source=source, key=f"{digest[:40]}.{seen[digest]}")


def batched(items: Iterable[T]) -> Iterator[list[T]]:
    """Batches of ``BATCH``; when ``items`` raises, what came before is still yielded first."""
    batch: list[T] = []
    iterator = iter(items)
    failure: InvalidInputError | None = None
    while True:
        try:
            batch.append(next(iterator))
        except StopIteration:
            break
        except InvalidInputError as error:
            failure = error
            break
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
    if failure:
        raise failure


def up_to_the_fault(items: Iterable[T]) -> Iterator[list[T]]:
    """The batches of ``items`` without the error that ends them; whoever reads them for good meets it again."""
    try:
        yield from batched(items)
    except InvalidInputError:
        return


def read_segments(
    stream: IO[bytes],
    *,
    name: str,
    format: str | None,
    session: str,
    pick: str | None = None,
    redact: Callable[[str], str] = str,
) -> Iterator[NewSegment]:
    """The segments of a file, in order, without keys.

    :param stream: seekable; it is read twice, first to make sure that all of it is UTF-8.
    :param name: the file's name, for errors and to guess the format from its ending.
    :param format: ``text``, ``markdown`` or ``chat``; ``None`` to guess.
    :param session: the session of what names none itself.
    :param pick: of a file with several conversations, the one with this id.
    :param redact: takes secrets out of a document before it is cut into passages, for no part of a secret looks like
        one. Offsets are those of the redacted document.
    :raises InvalidInputError: with the line where there is one. What was yielded before it is good.
    """
    n_bytes = check_utf8(stream, name)
    text = codecs.getreader("utf-8-sig")(stream)
    chosen = format or _guess(stream, name)
    if chosen not in FORMATS:
        raise InvalidInputError(f"unknown format {chosen!r}; known: {', '.join(FORMATS)}", source=name)
    whole = chosen != "chat" or Path(name).suffix.lower() == ".json"
    if whole and n_bytes > MAX_FILE_BYTES:
        raise InvalidInputError(
            f"it has {n_bytes} bytes, and a file that is read as a whole may have {MAX_FILE_BYTES}; cut it, or make a "
            "chat JSONL",
            source=name,
        )
    if chosen == "chat":
        segments = _chat(text, name, session, pick)
    else:
        segments = _document(redact(text.read()), session, markdown=chosen == "markdown")
    empty = True
    for segment in segments:
        empty = False
        yield segment
    if empty:
        raise InvalidInputError("there is nothing in it to remember", source=name)


def check_utf8(stream: IO[bytes], name: str) -> int:
    """Read a stream to its end and go back to its beginning; gives back how many bytes there are.

    :raises InvalidInputError: if it is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    try:
        while block := stream.read(1 << 20):
            if not position and (kind := archive_kind(block)):
                raise InvalidInputError(ARCHIVE.format(kind), source=name)
            if b"\x00" in block:
                raise InvalidInputError("it holds NUL characters, so it is not text", source=name)
            decoder.decode(block)
            position += len(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"not UTF-8 (near byte {position + error.start}); convert it first, for example with iconv", source=name
        ) from error
    stream.seek(0)
    return position


def _guess(stream: IO[bytes], name: str) -> str:
    ending = Path(name).suffix.lower()
    if ending in (".json", ".jsonl", ".ndjson"):
        return "chat"
    if ending in (".md", ".markdown"):
        return "markdown"
    if ending:
        return "text"
    start = stream.read(4096).lstrip()
    stream.seek(0)
    return "chat" if start.startswith((b"{", b"[{", b"[\n", b"[ ")) else "text"


# -- documents ---------------------------------------------------------------------------------------------------------


def _document(text: str, session: str, *, markdown: bool) -> Iterator[NewSegment]:
    headings: list[str] = []
    for start, end in _passages(text, markdown=markdown):
        passage = text[start:end]
        metadata: dict[str, Any] = {}
        if markdown:
            _follow_headings(passage, headings)
            metadata = {"headings": list(headings)} if headings else {}
        yield NewSegment(passage, session, kind="document", offset=(start, end), metadata=metadata)


def _follow_headings(passage: str, headings: list[str]) -> None:
    first = passage.split("\n", 1)[0]
    if match := _HEADING.match(first):
        level = len(first) - len(first.lstrip("#"))
        del headings[level - 1 :]
        headings.append(match[1])


def _passages(text: str, *, markdown: bool) -> Iterator[tuple[int, int]]:
    """Spans of neighbouring paragraphs, together at most ``longest_passage``; a Markdown heading starts a new one."""
    longest = longest_passage(text)
    open_start = open_end = -1
    for start, end in _pieces(text, longest):
        heading = markdown and _HEADING.match(text[start:end].split("\n", 1)[0])
        if open_start >= 0 and (heading or end - open_start > longest):
            yield open_start, open_end
            open_start = -1
        if open_start < 0:
            open_start = start
        open_end = end
    if open_start >= 0:
        yield open_start, open_end


def longest_passage(text: str) -> int:
    """Most characters of a passage of this text.

    >>> longest_passage("Call me Ishmael."), longest_passage("话说天下大势，分久必合")
    (800, 200)
    """
    signs = len(_SIGN.findall(text))
    return MAX_PASSAGE_SIGNS if signs > len(text) / 5 else MAX_PASSAGE_CHARS


def _pieces(text: str, longest: int) -> Iterator[tuple[int, int]]:
    """Spans of paragraphs; one that is too long is cut at sentences, and a sentence that is too long at the limit."""
    for start, end in _spans(text, 0, len(text), _PARAGRAPH):
        if end - start <= longest:
            yield start, end
            continue
        for low, high in _spans(text, start, end, _SENTENCE):
            for cut in range(low, high, longest):
                yield cut, min(cut + longest, high)


def _spans(text: str, start: int, end: int, separator: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    low = start
    for match in separator.finditer(text, start, end):
        if text[low : match.start()].strip():
            yield low, match.start()
        low = match.end()
    if text[low:end].strip():
        yield low, end


# -- chats -------------------------------------------------------------------------------------------------------------


def _chat(text: codecs.StreamReader, name: str, session: str, pick: str | None) -> Iterator[NewSegment]:
    first = text.readline()
    try:
        record = parse_json(first)
    except ValueError:
        record = None
    rest_is_lines = isinstance(record, Mapping) and not _is_conversation(record)
    if rest_is_lines or (record is None and Path(name).suffix.lower() in (".jsonl", ".ndjson")):
        yield from _chat_lines(first, text, name, session)
        return
    whole = first + text.read()
    try:
        data = parse_json(whole)
    except ValueError as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else None
        raise InvalidInputError(f"not JSON: {getattr(error, 'msg', error)}", source=name, line=line) from error
    yield from _chat_data(data, name, session, pick)


def _chat_lines(first: str, rest: Iterable[str], name: str, session: str) -> Iterator[NewSegment]:
    number = 0
    for lines in ([first], rest):
        for line in lines:
            number += 1
            if not line.strip():
                continue
            try:
                if len(line) > MAX_LINE_CHARS:
                    raise ValueError(f"longer than {MAX_LINE_CHARS} characters")
                record = parse_json(line)
            except ValueError as error:
                raise InvalidInputError(
                    f"not a whole JSON record ({getattr(error, 'msg', error)}); "
                    "what came before it is stored: mend it and run again",
                    source=name,
                    line=number,
                ) from error
            yield _message(record, name, session, number)


def _is_conversation(record: Mapping[str, Any]) -> bool:
    return any(field in record for field in ("messages", "conversation", "dialogue")) or any(
        _SESSION.match(field) for field in record
    )


def _chat_data(data: Any, name: str, session: str, pick: str | None) -> Iterator[NewSegment]:
    if isinstance(data, Mapping):
        data = [data]
    if not isinstance(data, list):
        raise InvalidInputError("a chat is a JSON list of messages, or an object with 'messages'", source=name)
    conversations = [item for item in data if isinstance(item, Mapping) and _is_conversation(item)]
    if not conversations:
        for item in data:
            yield _message(item, name, session, None)
        return
    ids = [str(c.get("sample_id", c.get("id", i))) for i, c in enumerate(conversations, start=1)]
    if pick is not None and pick not in ids:
        raise InvalidInputError(f"no conversation {pick!r} in it; there are: {', '.join(ids)}", source=name)
    for id_, conversation in zip(ids, conversations, strict=True):
        if pick in (None, id_):
            prefix = session if len(ids) == 1 or pick else f"{session}/{id_}"
            yield from _conversation(conversation, name, prefix)


def _conversation(conversation: Mapping[str, Any], name: str, session: str) -> Iterator[NewSegment]:
    inner = conversation.get("conversation", conversation)
    if not isinstance(inner, list | Mapping):
        raise InvalidInputError("a conversation is a list of messages, or an object with 'messages'", source=name)
    if isinstance(inner, list) or "messages" in inner:
        for item in _listed(inner if isinstance(inner, list) else inner["messages"], name):
            yield _message(item, name, session, None)
        return
    sessions = sorted((int(match[1]), field) for field in inner if (match := _SESSION.match(field)))
    for number, field in sessions:
        when = inner.get(f"{field}_date_time")
        time = parse_time(when, source=name) if when else None
        for item in _listed(inner[field], name):
            yield _message(item, name, f"{session}/session_{number}", None, time)


def _listed(messages: object, name: str) -> list[Any]:
    if not isinstance(messages, list):
        raise InvalidInputError(f"the messages of a chat are a list, not {type(messages).__name__}", source=name)
    return messages


def _message(record: Any, name: str, session: str, line: int | None, time: datetime | None = None) -> NewSegment:
    if not isinstance(record, Mapping):
        raise InvalidInputError(f"a message is a JSON object, not {type(record).__name__}", source=name, line=line)
    text = record.get("text", record.get("content"))
    if isinstance(text, list):  # OpenAI's content parts
        text = "\n".join(str(part["text"]) for part in text if isinstance(part, Mapping) and "text" in part)
    if text is None:
        raise InvalidInputError("a message has 'content' or 'text'; this one has neither", source=name, line=line)
    role = _ROLES.get(str(record.get("role", "user")).lower())
    if role is None:
        raise InvalidInputError(f"unknown role {record['role']!r}; known: {', '.join(_ROLES)}", source=name, line=line)
    when = record.get("created_at", record.get("timestamp", record.get("date")))
    speaker = record.get("speaker", record.get("name"))
    extra = {field: value for field, value in record.items() if field not in READ and field not in RESERVED}
    new = NewSegment(
        check_text(text, source=name, line=line),
        str(record.get("session", session)),
        role=role,
        speaker=str(speaker) if speaker else None,
        created_at=parse_time(when, source=name, line=line) if when is not None else time,
        metadata=extra,
    )
    return checked_segment(new, source=name, line=line)
