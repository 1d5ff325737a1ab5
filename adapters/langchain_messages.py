"""LangChain messages as what memory keeps and counts, and back: a message with memory before its words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memory_os.types import Message, NewSegment, Role

if TYPE_CHECKING:
    from langchain_core.messages import BaseMessage

__all__ = [
    "MARK",
    "as_counted",
    "as_segments",
    "key_of",
    "n_media",
    "query_at",
    "role_of",
    "schemas_of",
    "text_of",
    "with_memory",
    "words_since",
]

MARK = {"memory_os": True}
"""The artifact of what memory's own tools answer: it comes from memory, and is not stored again."""

ROLES: Mapping[str, Role] = {
    "human": "user", "user": "user", "ai": "assistant", "assistant": "assistant", "tool": "tool", "function": "tool",
    "system": "system", "developer": "system",
}  # fmt: skip
TEXTS = {"text": "text", "text-plain": "text", "refusal": "refusal"}
THOUGHTS = {"reasoning", "thinking", "redacted_thinking"}
CALLS = {"tool_call", "tool_call_chunk", "invalid_tool_call", "tool_use", "input_json_delta", "function_call"}
MEDIA = {
    "image", "image_url", "input_image", "audio", "input_audio", "video", "file", "input_file", "document", "media",
}  # fmt: skip


def role_of(message: BaseMessage) -> Role:
    """Who speaks; a kind that is not known is the user's."""
    told = getattr(message, "role", None) or message.type.removesuffix("MessageChunk").lower()
    return ROLES.get(str(told), "user")


def text_of(message: BaseMessage) -> str:
    """The words of a message; an image or the like stands as ``[image]``, a tool's other results as their JSON.

    What cannot be stored stands as U+FFFD.
    """
    if isinstance(message.content, str):
        return _mended(message.content)
    told = []
    for block in message.content:
        kind = _kind(block)
        if isinstance(block, str):
            told.append(block)
        elif kind in TEXTS or (not kind and "text" in block):
            told.append(str(block.get(TEXTS.get(kind, "text"), "")))
        elif kind in MEDIA:
            told.append(f"[{kind.removeprefix('input_').removesuffix('_url')}]")
        elif kind and kind not in THOUGHTS | CALLS and role_of(message) == "tool":
            told.append(_json(block))
    return _mended("\n".join(told))


def n_media(messages: Iterable[BaseMessage]) -> int:
    """How many images, files and the like there are in messages."""
    return sum(_kind(block) in MEDIA for message in messages for block in _blocks(message))


def as_counted(message: BaseMessage) -> Message:
    """A message as its tokens are counted: what is no text, but for images and the like, as its JSON.

    That is nearly what a model is shown, and rather more than less.
    """
    text = text_of(message)
    others = [
        block
        for block in _blocks(message)
        if not isinstance(block, str) and _kind(block) not in TEXTS.keys() | MEDIA | CALLS and "text" not in block
    ]
    calls = [{**call} for call in (*_calls(message), *getattr(message, "invalid_tool_calls", ()))]
    if others or calls:
        text += "\n" + _json([*others, *calls])
    return {"role": role_of(message), "content": text}


def schemas_of(tools: Iterable[Any]) -> list[dict[str, Any]]:
    """Tools as the schemas that are sent along; what a provider brings itself stays as it is."""
    from langchain_core.utils.function_calling import convert_to_openai_tool

    return [dict(tool) if isinstance(tool, dict) else convert_to_openai_tool(tool) for tool in tools]


def query_at(messages: Sequence[BaseMessage]) -> int | None:
    """Where the last message stands that the user wrote; a summary of the conversation is none."""
    asked = [n for n, message in enumerate(messages) if role_of(message) == "user" and not _is_summary(message)]
    return asked[-1] if asked else None


def words_since(messages: Sequence[BaseMessage]) -> int:
    """Where the turn begins that is going on: with what the user wrote last, all of it.

    Where that was summarised away with the turns before it, everything that is left is of this turn.
    """
    start = query_at(messages) or 0
    while start and role_of(messages[start - 1]) == "user" and not _is_summary(messages[start - 1]):
        start -= 1  # several at once, or asked again after a failure
    return start


def _is_summary(message: BaseMessage) -> bool:
    return message.additional_kwargs.get("lc_source") == "summarization"


def key_of(message: BaseMessage, session: str) -> str | None:
    """What a message is stored under once; ``None`` for one without an id.

    Ids that callers give are unique only in their thread, and a message that was edited keeps its id.
    """
    if not message.id:
        return None
    digest = hashlib.sha256(_said(message, ()).encode()).hexdigest()[:16]
    return _mended(f"message:{session}:{message.id}:{digest}")


def as_segments(
    messages: Sequence[BaseMessage], session: str, *, unrecorded: Collection[str] = ()
) -> list[tuple[BaseMessage, NewSegment]]:
    """Messages that are to be stored, as turns: what was said, tool calls and their results.

    System prompts, summaries and empty messages are left out, and so is what memory's own tools answered.

    :param unrecorded: names of other tools whose calls and results are left out.
    """
    ours = {
        getattr(message, "tool_call_id", None) for message in messages if getattr(message, "artifact", None) == MARK
    }
    ours |= {call["id"] for message in messages for call in _calls(message) if call["name"] in unrecorded}
    new = []
    for message in messages:
        role = role_of(message)
        if role == "system" or _is_summary(message):
            continue
        if role == "tool" and (getattr(message, "tool_call_id", None) in ours or message.name in unrecorded):
            continue
        text = _said(message, ours)
        if text.strip():
            speaker = _mended(message.name) if message.name else None
            metadata = _metadata(message, ours)
            segment = NewSegment(
                text, session, role=role, speaker=speaker, metadata=metadata, key=key_of(message, session)
            )
            new.append((message, segment))
    return new


def _said(message: BaseMessage, ours: Collection[str | None]) -> str:
    """What is stored of a message: its words, and its tool calls but for those with these ids."""
    calls = [f"{call['name']}({_json(call['args'])})" for call in _calls(message) if call["id"] not in ours]
    calls += [f"{call['name']}({call['args']})" for call in getattr(message, "invalid_tool_calls", ())]
    text = text_of(message)
    return _mended("\n".join([text, *calls] if text.strip() else calls or [text]))


def _metadata(message: BaseMessage, ours: Collection[str | None]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if calls := [call for call in _calls(message) if call["id"] not in ours]:
        found["tool_calls"] = [{"name": call["name"], "id": call["id"]} for call in calls]
    for name in ("tool_call_id", "status"):
        if value := getattr(message, name, None):
            found[name] = value
    return found


def with_memory(message: BaseMessage, memory: str) -> BaseMessage:
    """A copy of the message with memory before its words."""
    content: Any = message.content
    if isinstance(content, str):
        return message.model_copy(update={"content": f"{memory}\n\n{content}"})
    return message.model_copy(update={"content": [{"type": "text", "text": f"{memory}\n\n"}, *content]})


def _blocks(message: BaseMessage) -> list[Any]:
    return [] if isinstance(message.content, str) else list(message.content)


def _kind(block: Any) -> str:
    return "" if isinstance(block, str) else str(block.get("type") or "")


def _calls(message: BaseMessage) -> list[Any]:
    return list(getattr(message, "tool_calls", None) or ())


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str).replace("\\u0000", "\ufffd")


def _mended(text: str) -> str:
    """Text that can be stored."""
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()
