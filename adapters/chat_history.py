"""A session as LangChain's chat history, for chains that still use ``RunnableWithMessageHistory``.

``BaseChatMessageHistory`` is deprecated since langchain-core 1.6.4: for new code there are ``MemoryMiddleware`` and
``MemoryChatModel``, which recall, and do not only replay.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from langchain_core.chat_history import BaseChatMessageHistory
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, message_to_dict, messages_from_dict

from memory_os.adapters.configurable import labels_of, memory_of
from memory_os.adapters.langchain_messages import as_segments
from memory_os.errors import ConfigError

if TYPE_CHECKING:
    from memory_os.aio import AsyncMemory
    from memory_os.memory import Memory
    from memory_os.types import Segment

__all__ = ["MemoryChatHistory"]

WHOLE = "langchain_message"
"""Under this name in a segment's metadata stands a message that its text alone does not give back."""
ROLES_OF_TYPES = {"human": "user", "ai": "assistant", "tool": "tool", "function": "tool"}


class MemoryChatHistory(BaseChatMessageHistory):
    """The latest turns of one session, as messages.

    :param memory: what ``Memory.open`` or ``AsyncMemory.open`` gives.
    :param n: how many of them at most.
    """

    def __init__(self, memory: Memory | AsyncMemory, *, namespace: Sequence[str], session: str, n: int = 50) -> None:
        if n < 1:
            raise ConfigError(f"n must be at least 1, not {n}")
        self._scope = memory_of(memory).namespace(*labels_of(namespace)).session(session)
        self._session, self._n = session, n

    @property
    def messages(self) -> list[BaseMessage]:  # type: ignore[override]  # an attribute there, for which there is no setter
        """The turns, oldest first."""
        turns = [segment for segment in self._scope.history(self._n) if segment.kind == "turn"]
        while turns and turns[0].role == "tool":  # cut off from the call that it answers, which providers refuse
            turns.pop(0)
        return [_as_message(segment) for segment in turns]

    def add_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Store messages, in order."""
        new = []
        for message in messages:
            whole = {} if _is_plain(message) else {WHOLE: json.loads(json.dumps(message_to_dict(message), default=str))}
            for _, segment in as_segments([message], self._session):
                new.append(replace(segment, metadata={**segment.metadata, **whole}))
        self._scope.add_many(new)

    def clear(self) -> None:
        """Forget the session."""
        if self._scope.history(1):
            self._scope.whole().forget(session=self._session)


def _is_plain(message: BaseMessage) -> bool:
    told = isinstance(message.content, str) and not message.additional_kwargs and not getattr(message, "tool_calls", ())
    return told and message.type in ("human", "ai")


def _as_message(segment: Segment) -> BaseMessage:
    if whole := _whole(segment):
        return whole
    kind = AIMessage if segment.role == "assistant" else HumanMessage
    return kind(content=segment.text, name=segment.speaker)


def _whole(segment: Segment) -> BaseMessage | None:
    """The message that the metadata gives back, if it is what was said: an import, or a caller, may put anything there.

    It says what the segment says, by the same role, and never is a system prompt.
    """
    try:
        [message] = messages_from_dict([segment.metadata[WHOLE]])
        [(_, said)] = as_segments([message], segment.session)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    role = ROLES_OF_TYPES.get(message.type.removesuffix("MessageChunk").lower())
    return message if (role, said.text) == (segment.role, segment.text) else None
