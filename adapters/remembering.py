"""A chat model's request with memory in it, and the turn recorded: what the middleware and the chat model share.

Memory stands before the words that the user wrote last, in a copy: nothing that is put in is ever part of the
conversation, nor stored again. What is before it in the prompt stays as it is, so that prefix caches survive, and
within one turn the same memory is shown however often the model is called, unless some of it is forgotten meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from memory_os.adapters.configurable import labels_of, memory_of, pinned, session_of
from memory_os.adapters.langchain_messages import (
    as_counted,
    as_segments,
    key_of,
    n_media,
    query_at,
    role_of,
    text_of,
    with_memory,
    words_since,
)
from memory_os.adapters.langchain_models import LIMITS, LangChainLLM
from memory_os.adapters.tokenizers import counter_for
from memory_os.echo import derived
from memory_os.errors import BudgetError, ConfigError, UnknownNameError
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
MAX_THREADS = 256
"""Of so many conversations at once one process knows what it has stored; of others it looks into the records."""


class Chosen(NamedTuple):
    """What memory holds for a turn.

    :param instruction: what the controller adds to the system prompt.
    """

    context: Context
    instruction: str


class Recalled(NamedTuple):
    """A request's messages with memory in them.

    :param instruction: what the controller adds to the system prompt.
    """

    messages: list[BaseMessage]
    instruction: str


@dataclass
class Thread:
    """What one process knows of a conversation.

    :param seen: keys of the messages that were dealt with: stored, or not to be stored.
    :param asked: the stored segment of what the user wrote last.
    """

    seen: set[str] = field(default_factory=set)
    asked: Segment | None = None
    chosen: Chosen | None = None


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
        self.memory = memory_of(memory)
        controller = self.memory.parts.controller
        if CachingLLM in controller.needs:
            raise ConfigError(
                f"controller {controller.name!r} gives a local model keys and values, and a chat model reads text; "
                'open the memory with another, such as controller="auto"'
            )
        limits = {"memory_tokens": memory_tokens, "reply_tokens": reply_tokens, "context_window": context_window}
        for name, value in limits.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        self._namespace, self._session = pinned(namespace), session
        self._memory_tokens = memory_tokens or self.memory.parts.options.budget
        self._context_window, self._reply_tokens = context_window, reply_tokens
        self._counter = counter_for(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self._unrecorded = frozenset(unrecorded)
        self._counting: dict[str, Memory] = {}
        self._threads: OrderedDict[tuple[Namespace, str], Thread] = OrderedDict()

    def scope(self, where: tuple[Namespace, str] | None = None) -> Scope:
        """The namespace and session of the run that this is called from, or those that the call has named.

        :raises NamespaceError: if neither the constructor nor the run's configuration names a namespace.
        """
        labels, session = where or (labels_of(self._namespace), session_of(self._session) or DEFAULT_SESSION)
        return self.memory.namespace(*labels).session(session)

    # -- record ----------------------------------------------------------------------------------------------------

    def begin(self, scope: Scope, messages: Sequence[BaseMessage]) -> None:
        """A run begins with these messages: what the user wrote last is new, and what came before it is not.

        But for what this process has not dealt with yet, as the run before was interrupted.
        """
        start = words_since(messages)
        seen = _keys(messages[:start], scope)
        known = self._threads.get(_where(scope))
        if known and known.seen & seen:
            told = set(self._recent(scope, messages))
            left = [m for m, item in self._new(messages[:start], scope) if (item.role, item.text) not in told]
            seen -= _keys(left, scope) - known.seen
        if known:  # asked again after a failure: what was asked first is stored, or forgotten
            seen |= known.seen & _keys(messages[start:-1], scope)
        self._keep(scope, Thread(seen))

    def record(self, scope: Scope, messages: Sequence[BaseMessage]) -> None:
        """Store the messages of a state that are not dealt with yet; durable when it returns.

        Vectors are left for the next recall: an embedder that fails must not take the reply from who waits for it.
        """
        thread = self._threads.get(_where(scope))
        if thread is None:  # another process began this run
            thread = Thread(_keys(messages[: words_since(messages)], scope))
        new = [(message, item) for message, item in self._new(messages, scope) if item.key not in thread.seen]
        stored = self._store(scope, new)
        thread.seen |= _keys(messages, scope)
        asked = next((segment for segment in reversed(stored) if segment.role == "user"), None)
        if asked:
            thread.asked, thread.chosen = asked, None
        self._keep(scope, thread)

    def record_call(self, scope: Scope, messages: Sequence[BaseMessage]) -> None:
        """Store what is new in a call of a model that is sent the whole conversation: what follows its last reply.

        A reply that the model is to go on with is not its last. What stands at the session's end already, without a
        reply, was asked before and failed.
        """
        end = len(messages)
        while end and role_of(messages[end - 1]) == "assistant":
            end -= 1
        replies = [n for n, message in enumerate(messages[:end]) if role_of(message) == "assistant"]
        new = self._new(messages[replies[-1] + 1 if replies else 0 : end], scope)
        last = scope.history(len(new)) if new else []
        again = bool(new) and [(s.role, s.text) for s in last] == [(item.role, item.text) for _, item in new]
        stored = last if again else self._store(scope, new)
        asked = next((segment for segment in reversed(stored) if segment.role == "user"), None)
        at = query_at(messages)
        if asked is None and at is not None:  # asked in an earlier call of this turn
            asked = next(iter(self._recent(scope, messages[at : at + 1]).values()), None)
        thread = self._threads.get(_where(scope)) or Thread()
        if asked is None or thread.asked is None or asked.id != thread.asked.id:
            thread = Thread(asked=asked)
        self._keep(scope, thread)

    def record_reply(self, scope: Scope, reply: BaseMessage, outcome: str | None = None) -> None:
        """Store a reply.

        :param outcome: what is to be known of it, such as that it was interrupted.
        """
        new = self._new([reply], scope)
        if outcome:
            new = [(m, replace(item, metadata={**item.metadata, "outcome": outcome})) for m, item in new]
        self._store(scope, new)
        self.answered(scope)

    def _new(self, messages: Sequence[BaseMessage], scope: Scope) -> list[tuple[BaseMessage, NewSegment]]:
        return as_segments(messages, scope.session_name or DEFAULT_SESSION, unrecorded=self._unrecorded)

    def _store(self, scope: Scope, new: Sequence[tuple[BaseMessage, NewSegment]]) -> list[Segment]:
        known = scope.lookup(item.key for _, item in new if item.key)
        items = []
        answered = False
        for message, item in reversed(new):
            there = known.get(item.key or "")
            if there and role_of(message) == "user" and not answered and self._was_answered(scope, there):
                item = replace(item, key=f"{item.key}:{scope.history(1)[0].seq}")  # an id that is used again
            answered = answered or item.role == "assistant"
            items.append(item)
        items = self._marked(scope, items[::-1])
        stored = scope.add_many(items, embed=False)
        by_key = known | {segment.key: segment for segment in stored if segment.key}
        without = iter([segment for segment in stored if not segment.key])
        found = [by_key.get(item.key) if item.key else next(without) for item in items]
        return [segment for segment in found if segment]  # one may have been forgotten a moment ago

    def _marked(self, scope: Scope, new: Sequence[NewSegment]) -> list[NewSegment]:
        """The segments, replies with what they repeat of the memory that was put into the turn."""
        thread = self._threads.get(_where(scope))
        if thread is None or thread.chosen is None or all(item.role != "assistant" for item in new):
            return list(new)
        context, asked = thread.chosen.context, thread.asked
        shown = [*zip(context.segments, context.shown, strict=True)]
        recent = scope.history(LOOKS_BACK)
        shown += [(segment, segment.text) for segment in recent if asked is None or segment.id != asked.id]
        stored = self.memory.parts.store.redacted  # the marks are of the text as it is stored
        return [
            replace(item, metadata={**item.metadata, **derived(stored(item.text), shown)})
            if item.role == "assistant"
            else item
            for item in new
        ]

    @staticmethod
    def _was_answered(scope: Scope, segment: Segment) -> bool:
        """Whether the session goes on after it: then it belongs to another turn."""
        return any(later.seq > segment.seq and later.role == "assistant" for later in scope.history(8))

    def answered(self, scope: Scope) -> None:
        """Note in the turn's trace which segment was the reply."""
        thread = self._threads.get(_where(scope))
        if thread is None or thread.asked is None or thread.chosen is None:
            return
        asked = thread.asked
        said = [s for s in scope.history(64) if s.seq > asked.seq and s.role == "assistant"]
        if said:
            try:
                scope.answered(thread.chosen.context.trace.id, said[-1].id)
            except UnknownNameError:  # forgotten a moment ago
                return

    def _keep(self, scope: Scope, thread: Thread) -> None:
        self._threads[_where(scope)] = thread
        self._threads.move_to_end(_where(scope))
        while len(self._threads) > MAX_THREADS:
            self._threads.popitem(last=False)

    def _recent(self, scope: Scope, messages: Sequence[BaseMessage]) -> dict[tuple[str, str], Segment]:
        """The session's segments that these messages are, as far as their words tell: callers hardly ever give ids."""
        said = {(item.role, item.text) for _, item in self._new(messages, scope)}
        recent = scope.history(2 * len(messages) + 2)
        return {told: segment for segment in recent if (told := (segment.role, segment.text)) in said}

    # -- recall ----------------------------------------------------------------------------------------------------

    def recall(
        self,
        scope: Scope,
        model: BaseChatModel,
        system: str,
        messages: Sequence[BaseMessage],
        schemas: Sequence[dict[str, Any]],
        settings: Mapping[str, Any],
    ) -> Recalled | None:
        """The request with what memory holds for it; ``None`` where it stays as it is.

        The whole of it, system prompt, schemas and reply reserve included, is within the model's context window.

        :param messages: without the system prompt.
        :param schemas: of tools and of the reply.
        :param settings: of this call, among which may be a limit of the reply.
        """
        at = query_at(messages)
        if at is None or not (query := text_of(messages[at])).strip():
            return None
        counting, window, assumed = self._counted(model)
        reserve = self._reply_tokens or _own_limit(settings) or _own_limit(vars(model))
        reserve = reserve or self.memory.parts.options.reply_tokens
        if assumed:  # a model whose replies may be that long has a larger window
            reserve = min(reserve, window // 2)
        limit = window - reserve - MEDIA_TOKENS * n_media(messages)
        if limit < 1:
            return None
        shown = [as_counted(message) for message in messages]
        thread = self._threads.get(_where(scope)) or Thread()
        chosen = thread.chosen
        if chosen and not (_is_there(scope, chosen) and _tokens(counting, chosen, system, shown, at, schemas) <= limit):
            chosen = None
        if chosen is None:
            stored = _keys(messages, scope) | {segment.id for segment in self._recent(scope, messages).values()}
            around = Conversation(system, tuple(shown[:at]), tuple(shown[at + 1 :]), frozenset(stored))
            try:
                chosen = self._chosen(counting, scope, query, limit, schemas, around, thread.asked)
            except BudgetError:  # the request alone fills the window: there is no room for memory
                return None
            thread.chosen = chosen
        if not chosen.context.text and not chosen.instruction:
            return None
        with_it = with_memory(messages[at], chosen.context.text) if chosen.context.text else messages[at]
        return Recalled([*messages[:at], with_it, *messages[at + 1 :]], chosen.instruction)

    def _chosen(
        self,
        counting: Memory,
        scope: Scope,
        query: str,
        limit: int,
        schemas: Sequence[dict[str, Any]],
        around: Conversation,
        asked: Segment | None,
    ) -> Chosen:
        """What memory holds for the query."""
        asking = counting.namespace(*scope.labels).session(scope.session_name or DEFAULT_SESSION)
        context = asking.context(
            query, budget=limit, memory_tokens=self._memory_tokens, tools=schemas, conversation=around, asked=asked
        )
        n_others = len(around.before) + 1 + len(around.after)
        whole = context.messages[0]["content"] if len(context.messages) > n_others else ""
        return Chosen(context, whole.removeprefix(around.system).strip())

    def counter_of(self, model: BaseChatModel) -> TokenCounter:
        """What counts for the model."""
        return LangChainLLM(model, tokenizer=self._counter).counter

    def _counted(self, model: BaseChatModel) -> tuple[Memory, int, bool]:
        """The memory with budgets in the model's own tokens, its context window, and whether that is assumed."""
        llm = LangChainLLM(model, context_window=self._context_window, tokenizer=self._counter)
        name = llm.counter.name if llm.counts_by_name else f"{llm.counter.name} {id(llm.counter)}"
        if name not in self._counting:
            self._counting[name] = Memory(replace(self.memory.parts, counter=llm.counter, prices={}))
        return self._counting[name], llm.context_window, llm.window_is_assumed


def _where(scope: Scope) -> tuple[Namespace, str]:
    return scope.labels, scope.session_name or DEFAULT_SESSION


def _keys(messages: Sequence[BaseMessage], scope: Scope) -> set[str]:
    return {key for message in messages if (key := key_of(message, scope.session_name or DEFAULT_SESSION))}


def _is_there(scope: Scope, chosen: Chosen) -> bool:
    """Whether all that was chosen is still remembered."""
    ids = [segment.id for segment in chosen.context.segments]
    return len(scope.lookup(ids)) == len(ids)


def _tokens(
    counting: Memory,
    chosen: Chosen,
    system: str,
    shown: list[Message],
    at: int,
    schemas: Sequence[dict[str, Any]],
) -> int:
    """Tokens of the request with the memory of an earlier call of the same turn."""
    whole = f"{system}\n\n{chosen.instruction}".strip() if chosen.instruction else system
    before: list[Message] = [{"role": "system", "content": whole}] if whole else []
    query: Message = {"role": "user", "content": f"{chosen.context.text}\n\n{shown[at]['content']}"}
    return counting.parts.counter.count_tokens([*before, *shown[:at], query, *shown[at + 1 :]], schemas)


def _own_limit(settings: Mapping[str, Any]) -> int | None:
    """The limit of a reply among settings; ``-1`` and the like are none."""
    given = (settings.get(name) for name in LIMITS)
    return next((value for value in given if type(value) is int and value > 0), None)
