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
    "as_counted",
    "as_segments",
    "key_of",
    "n_media",
    "query_at",
    "schemas_of",
    "text_of",
    "turn_of",
    "with_memory",
]

ROLES: Mapping[str, Role] = {"human": "user", "ai": "assistant", "tool": "tool", "function": "tool"}
# blocks that are text, or that are told by other means
SPOKEN = {"text", "text-plain", "reasoning", "thinking", "redacted_thinking", "refusal"}
CALLS = {"tool_call", "tool_call_chunk", "invalid_tool_call", "tool_use", "input_json_delta", "function_call"}


def text_of(message: BaseMessage) -> str:
    """The words of a message; what is no text stands as ``[image]``, what cannot be stored as U+FFFD."""
    words = str(message.text)
    media = [f"[{kind}]" for kind in _media(message)]
    told = "\n".join([words, *media] if words.strip() else media or [words])
    return told.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()


def n_media(messages: Iterable[BaseMessage]) -> int:
    """How many images, files and the like there are in messages."""
    return sum(len(_media(message)) for message in messages)


def _media(message: BaseMessage) -> list[str]:
    if isinstance(message.content, str):
        return []
    kinds = [block.get("type", "") for block in message.content if isinstance(block, dict)]
    return [kind.removesuffix("_url") for kind in kinds if kind not in SPOKEN | CALLS]


def as_counted(message: BaseMessage) -> Message:
    """A message as its tokens are counted: tool calls as their JSON, as it is nearly what a model is shown."""
    text = text_of(message)
    calls = getattr(message, "tool_calls", None)
    if calls:
        text += "\n" + json.dumps([{**call} for call in calls], ensure_ascii=False, default=str)
    role = "system" if message.type == "system" else ROLES.get(message.type, "user")
    return {"role": role, "content": text}


def schemas_of(tools: Iterable[Any]) -> list[dict[str, Any]]:
    """Tools as the schemas that are sent along; what a provider brings itself stays as it is."""
    from langchain_core.utils.function_calling import convert_to_openai_tool

    return [dict(tool) if isinstance(tool, dict) else convert_to_openai_tool(tool) for tool in tools]


def query_at(messages: Sequence[BaseMessage]) -> int | None:
    """Where the last message stands that the user wrote; a summary of the conversation is none."""
    asked = [n for n, message in enumerate(messages) if message.type == "human" and not _is_summary(message)]
    return asked[-1] if asked else None


def turn_of(messages: Sequence[BaseMessage]) -> list[BaseMessage]:
    """The messages of the turn that is going on: from what the user wrote last.

    Where that was summarised away with the turns before it, everything that is left is of this turn.
    """
    start = query_at(messages)
    if start is None:
        return list(messages)
    while start and messages[start - 1].type == "human":  # several at once, or asked again after a failure
        start -= 1
    return list(messages[start:])


def _is_summary(message: BaseMessage) -> bool:
    return message.additional_kwargs.get("lc_source") == "summarization"


def key_of(message: BaseMessage, session: str) -> str | None:
    """What a message is stored under once; ``None`` for one without an id.

    Ids that callers give are unique only in their thread, and a message that was edited keeps its id.
    """
    if not message.id:
        return None
    digest = hashlib.sha256(_told(message, ()).encode()).hexdigest()[:16]
    return f"message:{session}:{message.id}:{digest}"


def as_segments(messages: Iterable[BaseMessage], session: str, *, unrecorded: Collection[str] = ()) -> list[NewSegment]:
    """Messages as turns to store: what was said, tool calls and their results.

    System prompts, summaries and empty messages are left out.

    :param unrecorded: names of tools whose calls and results are left out: what they say comes from memory.
    """
    new = []
    for message in messages:
        role = ROLES.get(message.type)
        if role is None or _is_summary(message) or (role == "tool" and message.name in unrecorded):
            continue
        text = _told(message, unrecorded)
        if not text.strip():
            continue
        new.append(
            NewSegment(
                text,
                session,
                role=role,
                speaker=message.name or None,
                metadata=_metadata(message, unrecorded),
                key=key_of(message, session),
            )
        )
    return new


def _told(message: BaseMessage, unrecorded: Collection[str]) -> str:
    calls = [f"{call['name']}({_arguments(call)})" for call in _calls(message, unrecorded)]
    text = text_of(message)
    return "\n".join([text, *calls] if text.strip() else calls)


def _calls(message: BaseMessage, unrecorded: Collection[str]) -> list[Any]:
    return [call for call in getattr(message, "tool_calls", None) or [] if call["name"] not in unrecorded]


def _arguments(call: Mapping[str, Any]) -> str:
    told = json.dumps(call["args"], ensure_ascii=False, default=str)
    return told.replace("\\u0000", "\ufffd").encode("utf-8", "replace").decode()


def _metadata(message: BaseMessage, unrecorded: Collection[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if calls := _calls(message, unrecorded):
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
