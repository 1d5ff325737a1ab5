"""A chat model's request with memory in it, and the turn recorded: what the middleware and the chat model share.

Memory stands before the words that the user wrote last, in a copy: nothing that is put in is ever part of the
conversation, nor stored again. What is before it in the prompt stays as it is, so that prefix caches survive, and
within one turn the same memory is shown however often the model is called.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from memory_os.adapters.configurable import labels_of, opened, session_of
from memory_os.adapters.langchain_messages import (
    as_counted,
    as_segments,
    key_of,
    n_media,
    query_at,
    text_of,
    with_memory,
)
from memory_os.adapters.langchain_models import LIMITS, LangChainLLM
from memory_os.adapters.tokenizers import counter_for
from memory_os.echo import derived
from memory_os.errors import BudgetError, ConfigError
from memory_os.memory import DEFAULT_SESSION, Memory, Scope
from memory_os.protocols import CachingLLM, TokenCounter
from memory_os.types import Context, Conversation, Message, Namespace, NewSegment, Segment

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import BaseMessage

    from memory_os.aio import AsyncMemory

__all__ = ["Recalled", "Remembering"]

MEDIA_TOKENS = 1600
"""What an image or a file in a request is taken to cost: about the most that providers count for an image."""
LOOKS_BACK = 12
"""So many of the session's latest segments may be what a reply repeats, besides what was recalled."""
MAX_TURNS = 256
"""So many turns may be going on at once, in one process, before the memory of the oldest is chosen anew."""


class Chosen(NamedTuple):
    """What memory holds for a turn.

    :param system: the system prompt, with what the controller adds to it.
    """

    context: Context
    system: str


class Recalled(NamedTuple):
    """A request's messages with memory in them.

    :param system: the system prompt, with what the controller adds to it.
    """

    messages: list[BaseMessage]
    system: str


class Remembering:
    """Records and recalls for the conversations of one application.

    :param memory_tokens: most tokens that memory may take of a request; the memory's budget if not given.
    :param context_window: of the model; by default what its LangChain profile says, else 8192.
    :param tokenizer: counts for the model; a name or an object; by default by the model's name.
    :param reply_tokens: kept free for the reply; by default the model's own limit, else the memory's.
    :param unrecorded: names of tools whose calls and results are not stored.
    :raises ConfigError: for a controller whose memory enters as keys and values.
    """

    def __init__(
        self,
        memory: Memory | AsyncMemory,
        *,
        namespace: Sequence[str] | None,
        session: str | None,
        memory_tokens: int | None,
        context_window: int | None,
        tokenizer: str | TokenCounter | None,
        reply_tokens: int | None,
        unrecorded: Collection[str] = (),
    ) -> None:
        self.memory = opened(memory)
        controller = self.memory.parts.controller
        if CachingLLM in controller.needs:
            raise ConfigError(
                f"controller {controller.name!r} gives a local model keys and values, and a chat model reads text; "
                'open the memory with another, such as controller="auto"'
            )
        for name, value in (("memory_tokens", memory_tokens), ("reply_tokens", reply_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if namespace is not None:
            labels_of(namespace)  # a wrong one is refused here, and not in the first turn
        self._namespace, self._session = namespace, session
        self._memory_tokens = memory_tokens or self.memory.parts.options.budget
        self._context_window, self._reply_tokens = context_window, reply_tokens
        self._counter = counter_for(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self._unrecorded = frozenset(unrecorded)
        self._counting: dict[str, Memory] = {}
        self._turns: OrderedDict[tuple[Namespace, str | None, str], Chosen] = OrderedDict()

    def scope(self) -> Scope:
        """Namespace and session of the run that this is called from.

        :raises NamespaceError: if neither the constructor nor the run's configuration names a namespace.
        """
        scope = self.memory.namespace(*labels_of(self._namespace))
        return scope.session(session_of(self._session) or DEFAULT_SESSION)

    # -- record ----------------------------------------------------------------------------------------------------

    def record(self, scope: Scope, messages: Sequence[BaseMessage], outcome: str | None = None) -> list[Segment]:
        """Store the messages that are not stored yet; durable when it returns. Gives back the segments of all.

        :param outcome: what is to be known of them, such as that they were interrupted.
        """
        new = as_segments(messages, scope.session_name or DEFAULT_SESSION, unrecorded=self._unrecorded)
        new = self._marked(scope, new)
        if outcome:
            new = [replace(item, metadata={**item.metadata, "outcome": outcome}) for item in new]
        stored = scope.add_many(new)
        by_key = {segment.key: segment for segment in stored if segment.key}
        by_key |= scope.lookup(item.key for item in new if item.key and item.key not in by_key)
        without = iter([segment for segment in stored if not segment.key])
        found = [by_key.get(item.key) if item.key else next(without) for item in new]
        return [segment for segment in found if segment]  # one may have been forgotten a moment ago

    def _marked(self, scope: Scope, new: Sequence[NewSegment]) -> list[NewSegment]:
        """The segments, replies with what they repeat of the memory that was put into the turns going on."""
        going_on = {where: chosen for where, chosen in self._turns.items() if where[:2] == _place(scope)}
        if not going_on or all(item.role != "assistant" for item in new):
            return list(new)
        asked = {query for _, _, query in going_on}
        shown = [
            each
            for chosen in going_on.values()
            for each in zip(chosen.context.segments, chosen.context.shown, strict=True)
        ]
        shown += [(segment, segment.text) for segment in scope.history(LOOKS_BACK) if segment.id not in asked]
        stored = self.memory.parts.store.redacted  # the marks are of the text as it is stored
        return [
            replace(item, metadata={**item.metadata, **derived(stored(item.text), shown)})
            if item.role == "assistant"
            else item
            for item in new
        ]

    def answered(self, scope: Scope, turn: Sequence[Segment]) -> None:
        """Note in the turn's trace which segment was the reply."""
        query = next((segment for segment in reversed(turn) if segment.role == "user"), None)
        if query is None:
            return
        chosen = self._turns.pop((*_place(scope), query.id), None)
        if chosen and turn[-1].role == "assistant":
            scope.answered(chosen.context.trace.id, turn[-1].id)

    # -- recall ----------------------------------------------------------------------------------------------------

    def recall(
        self,
        scope: Scope,
        model: BaseChatModel,
        system: str,
        messages: Sequence[BaseMessage],
        tools: Sequence[dict[str, Any]],
        asked: Segment | None,
        stored: Collection[str] = (),
    ) -> Recalled | None:
        """The request with what memory holds for it; ``None`` where it stays as it is.

        The whole of it, system prompt, tools and reply reserve included, is within the model's context window.

        :param messages: without the system prompt.
        :param tools: their schemas.
        :param asked: the stored segment of what the user wrote last.
        :param stored: ids or keys of segments that the messages show, besides those under the messages' own keys.
        """
        at = query_at(messages)
        if at is None or not (query := text_of(messages[at])).strip():
            return None
        counting, window = self._counted(model)
        reserve = self._reply_tokens or _own_limit(model) or self.memory.parts.options.reply_tokens
        limit = window - reserve - MEDIA_TOKENS * n_media(messages)
        shown = [as_counted(message) for message in messages]
        if limit < 1:
            return None
        where = (*_place(scope), asked.id if asked else "")
        chosen = self._turns.get(where) if asked else None
        if chosen is None or self._tokens(counting, chosen, shown, at, tools) > limit:
            keys = {key for message in messages if (key := key_of(message, scope.session_name or ""))}
            around = Conversation(system, tuple(shown[:at]), tuple(shown[at + 1 :]), frozenset(keys | set(stored)))
            try:
                chosen = self._chosen(counting, scope, query, limit, tools, around, asked)
            except BudgetError:  # the request alone fills the window: there is no room for memory
                return None
            if asked:
                self._turns[where] = chosen
                while len(self._turns) > MAX_TURNS:
                    self._turns.popitem(last=False)
        if not chosen.context.text and chosen.system == system:
            return None
        with_it = with_memory(messages[at], chosen.context.text) if chosen.context.text else messages[at]
        return Recalled([*messages[:at], with_it, *messages[at + 1 :]], chosen.system)

    def _chosen(
        self,
        counting: Memory,
        scope: Scope,
        query: str,
        limit: int,
        tools: Sequence[dict[str, Any]],
        around: Conversation,
        asked: Segment | None,
    ) -> Chosen:
        """What memory holds for the query."""
        asking = counting.namespace(*scope.labels).session(scope.session_name or DEFAULT_SESSION)
        context = asking.context(
            query, budget=limit, memory_tokens=self._memory_tokens, tools=tools, conversation=around, asked=asked
        )
        n_others = len(around.before) + 1 + len(around.after)
        return Chosen(context, context.messages[0]["content"] if len(context.messages) > n_others else "")

    def _counted(self, model: BaseChatModel) -> tuple[Memory, int]:
        """The memory with budgets in the model's own tokens, and its context window."""
        llm = LangChainLLM(model, context_window=self._context_window, tokenizer=self._counter)
        if llm.counter.name not in self._counting:
            self._counting[llm.counter.name] = Memory(replace(self.memory.parts, counter=llm.counter, prices={}))
        return self._counting[llm.counter.name], llm.context_window

    @staticmethod
    def _tokens(
        counting: Memory, chosen: Chosen, shown: list[Message], at: int, tools: Sequence[dict[str, Any]]
    ) -> int:
        """Tokens of the request with the memory of an earlier call of the same turn."""
        before: list[Message] = [{"role": "system", "content": chosen.system}] if chosen.system else []
        query: Message = {"role": "user", "content": f"{chosen.context.text}\n\n{shown[at]['content']}"}
        return counting.parts.counter.count_tokens([*before, *shown[:at], query, *shown[at + 1 :]], tools)


def _place(scope: Scope) -> tuple[Namespace, str | None]:
    return scope.labels, scope.session_name


def _own_limit(model: BaseChatModel) -> int | None:
    return next((value for name in LIMITS if isinstance(value := getattr(model, name, None), int)), None)
