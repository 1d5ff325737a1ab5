"""Any LangChain chat model with memory, in place of the model itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from langchain_core.caches import BaseCache
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import (
    AIMessageChunk,
    BaseMessage,
    BaseMessageChunk,
    SystemMessage,
    message_chunk_to_message,
)
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableBinding, RunnableConfig
from pydantic import PrivateAttr, model_validator

from memory_os.adapters.configurable import AMemory, Labels, labels_of, session_of
from memory_os.adapters.langchain_models import QUIET, LangChainLLM
from memory_os.adapters.remembering import Remembering
from memory_os.errors import ConfigError
from memory_os.memory import DEFAULT_SESSION, Scope
from memory_os.types import Namespace

if TYPE_CHECKING:
    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
    from langchain_core.language_models import LanguageModelInput
    from langchain_core.language_models.base import LangSmithParams
    from langchain_core.messages import AIMessage
    from langchain_core.runnables import Runnable
    from langchain_core.tools import BaseTool

__all__ = ["MemoryChatModel"]

STANDARD = {"temperature", "max_tokens", "timeout", "stop", "max_retries", "api_key", "base_url", "streaming"}
"""Settings that LangChain's models take or leave."""
OURS = (
    "memory", "namespace", "session", "memory_tokens", "context_window", "tokenizer", "reply_tokens", "unrecorded",
)  # fmt: skip


@dataclass(repr=False)
class Call:
    """What LangChain does not hand on to a model: where a call's memory is, and how to end a stream that was closed.

    An async generator that another one reads is not closed with it, but some time later.
    """

    labels: Namespace
    session: str
    finish: Callable[[], Awaitable[None]] | None = None

    def __repr__(self) -> str:
        return f"{'/'.join(self.labels)}, {self.session}"  # as it stands in LangChain's traces


class Request(NamedTuple):
    """A call on its way."""

    scope: Scope
    messages: list[BaseMessage]


class MemoryChatModel(BaseChatModel):
    """A chat model that remembers: ``MemoryChatModel(model=..., memory=..., namespace=("acme", "alice"))``.

    What the user writes is stored before the model is called, the reply after it; what memory holds for it stands in
    the request, and nowhere else. Only what follows the last reply in a call is new, so a caller may send the whole
    conversation each time.

    :param model: a chat model, or its name, ``"provider:model"``; other settings are the model's, such as
        ``temperature``.
    :param memory: what ``Memory.open`` or ``AsyncMemory.open`` gives.
    :param namespace: labels; without it each call names its own: ``config={"configurable": {"namespace": (...)}}``.
    :param session: by default the call's ``session`` or ``thread_id``.
    :param memory_tokens: most tokens that memory may take of a request; by default the memory's budget.
    :param context_window: of the model; by default what its LangChain profile says, else 8192.
    :param tokenizer: counts for the model: a name or an object; by default by the model's name.
    :param reply_tokens: kept free for the reply; by default the model's own limit, else the memory's.
    :param unrecorded: names of tools whose calls and results are not to be stored, such as those that look into this
        memory.
    """

    model: BaseChatModel
    memory: AMemory
    namespace: Labels = None
    session: str | None = None
    memory_tokens: int | None = None
    context_window: int | None = None
    tokenizer: Any = None
    reply_tokens: int | None = None
    unrecorded: tuple[str, ...] = ()
    cache: BaseCache | bool | None = False
    """Off: what memory holds is not part of what LangChain's cache looks at. The model's own cache sees the request."""

    _made: tuple[dict[str, Any], Remembering] | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _with_settings(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The model made from its name, or a copy of it, with the settings that are not the memory's."""
        settings = {name: value for name, value in values.items() if name not in cls.model_fields}
        ours = {name: value for name, value in values.items() if name in cls.model_fields}
        model = ours.get("model")
        if isinstance(model, str):
            ours["model"] = LangChainLLM.from_string(model, **settings).model
        elif isinstance(model, BaseChatModel):
            known = {name: value for name, value in settings.items() if name in type(model).model_fields}
            if unknown := sorted(set(settings) - set(known) - STANDARD):
                raise ConfigError(f"{unknown[0]!r} is a setting neither of memory nor of {type(model).__name__}")
            ours["model"] = model.model_copy(update=known) if known else model
        if isinstance(ours.get("model"), BaseChatModel):
            ours.setdefault("profile", ours["model"].profile)
        return ours

    def model_post_init(self, context: Any, /) -> None:
        """Check the settings.

        :raises ConfigError: for one that cannot be used.
        """
        _ = self._remembering

    @property
    def _remembering(self) -> Remembering:
        """Made anew for a copy with other settings."""
        settings = {name: getattr(self, name) for name in OURS}
        if self._made is None or any(settings[name] is not self._made[0][name] for name in OURS):
            self._made = settings, Remembering(**settings)
        return self._made[1]

    @property
    def _llm_type(self) -> str:
        return "memory_os"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        return {"model": LangChainLLM(self.model).name, "namespace": self.namespace, "session": self.session}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = self.model._get_ls_params(stop=stop, **kwargs)
        override = kwargs.get("model")
        if isinstance(override, str):
            params["ls_model_name"] = override
        params.setdefault("ls_model_name", LangChainLLM(self.model).name)
        return params

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """This model with tools, in the form that the model itself gives them.

        :raises ConfigError: if the model binds tools in a way of its own.
        """
        bound = self.model.bind_tools(tools, tool_choice=tool_choice, **kwargs)
        if not isinstance(bound, RunnableBinding):
            raise ConfigError(f"{type(self.model).__name__} binds tools in a way that cannot be passed on to it")
        return self.bind(**bound.kwargs)

    # -- calls: the namespace is the call's, and LangChain does not tell a model of it ---------------------------------

    def _named(self, config: RunnableConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        call = Call(labels_of(self.namespace, config), session_of(self.session, config) or DEFAULT_SESSION)
        return {"remembers_in": call, **kwargs}

    def invoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        """The reply.

        :raises NamespaceError: if neither the model nor the call names a namespace.
        """
        return super().invoke(input, config, stop=stop, **self._named(config, kwargs))

    async def ainvoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        """The reply.

        :raises NamespaceError: if neither the model nor the call names a namespace.
        """
        return await super().ainvoke(input, config, stop=stop, **self._named(config, kwargs))

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        """The reply, piece by piece; closing it stops the model, and what it said is stored."""
        chunks = super().stream(input, config, stop=stop, **self._named(config, kwargs))
        try:
            yield from chunks
        finally:
            _close(chunks)

    async def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """The reply, piece by piece; closing it stops the model, and what it said is stored."""
        named = self._named(config, kwargs)
        chunks = super().astream(input, config, stop=stop, **named)
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await _aclose(chunks)
            if named["remembers_in"].finish:
                await named["remembers_in"].finish()

    def stream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """As LangChain's; version 3 asks the model itself."""
        named = self._named(config, kwargs) if kwargs.get("version") == "v3" else kwargs
        return super().stream_events(input, config, **named)

    def astream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """As LangChain's; version 3 asks the model itself."""
        named = self._named(config, kwargs) if kwargs.get("version") == "v3" else kwargs
        return super().astream_events(input, config, **named)

    def get_num_tokens(self, text: str) -> int:
        """Tokens of a text, as the budget counts them."""
        return self._remembering.counter_of(self.model).count_text(text)

    # -- one call --------------------------------------------------------------------------------------------------

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        request = self._begin(messages, kwargs)
        reply = self.model.invoke(request.messages, QUIET, stop=stop, **kwargs)
        self._remembering.record_reply(request.scope, reply)
        return ChatResult(generations=[ChatGeneration(message=reply)])

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        request = await asyncio.to_thread(self._begin, messages, kwargs)
        reply = await self.model.ainvoke(request.messages, QUIET, stop=stop, **kwargs)
        await asyncio.to_thread(self._remembering.record_reply, request.scope, reply)
        return ChatResult(generations=[ChatGeneration(message=reply)])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        request = self._begin(messages, kwargs)
        said: BaseMessageChunk | None = None
        outcome: str | None = "interrupted"
        chunks = self.model.stream(request.messages, QUIET, stop=stop, **kwargs)
        try:
            for message in chunks:
                chunk = _as_chunk(message)
                said = chunk if said is None else said + chunk
                yield ChatGenerationChunk(message=chunk)
            outcome = None
        finally:
            _close(chunks)
            if said is not None:
                self._remembering.record_reply(request.scope, message_chunk_to_message(said), outcome)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        call: Call | None = kwargs.get("remembers_in")
        request = await asyncio.to_thread(self._begin, messages, kwargs)
        said: BaseMessageChunk | None = None
        outcome: str | None = "interrupted"
        chunks = self.model.astream(request.messages, QUIET, stop=stop, **kwargs)
        ending: asyncio.Task[None] | None = None

        async def end() -> None:
            await _aclose(chunks)
            if said is not None:
                whole = message_chunk_to_message(said)
                await asyncio.to_thread(self._remembering.record_reply, request.scope, whole, outcome)

        async def finish() -> None:
            nonlocal ending
            if ending is None:
                ending = asyncio.ensure_future(end())
            await asyncio.shield(ending)

        if call:
            call.finish = finish
        try:
            async for message in chunks:
                chunk = _as_chunk(message)
                said = chunk if said is None else said + chunk
                yield ChatGenerationChunk(message=chunk)
            outcome = None
        finally:
            await finish()

    def _begin(self, messages: list[BaseMessage], kwargs: dict[str, Any]) -> Request:
        """Store what is new, and put what memory holds into the request; ``kwargs`` keeps what is the model's."""
        call: Call | None = kwargs.pop("remembers_in", None)
        scope = self._remembering.scope((call.labels, call.session) if call else None)
        self._remembering.record_call(scope, messages)
        head = messages[0] if messages and messages[0].type == "system" else None
        schemas = [*(kwargs.get("tools") or ())]
        if response_format := kwargs.get("response_format"):
            schemas.append({"response_format": response_format})
        recalled = self._remembering.recall(
            scope,
            self.model,
            "" if head is None else str(head.text),
            messages if head is None else messages[1:],
            schemas,
            kwargs,
        )
        if recalled is None:
            return Request(scope, messages)
        return Request(scope, [*_systems(head, recalled.instruction), *recalled.messages])


def _systems(head: BaseMessage | None, instruction: str) -> list[BaseMessage]:
    """The caller's system prompt with what the controller adds to it."""
    if not instruction:
        return [] if head is None else [head]
    if head is None:
        return [SystemMessage(content=instruction)]
    if isinstance(head.content, str):
        return [head.model_copy(update={"content": f"{head.content}\n\n{instruction}".strip()})]
    added = {"type": "text", "text": f"\n\n{instruction}"}
    return [head.model_copy(update={"content": [*head.content, added]})]


def _as_chunk(message: BaseMessage) -> BaseMessageChunk:
    """A piece of a stream; a model that does not stream gives its reply whole."""
    if isinstance(message, BaseMessageChunk):
        return message
    told = message.model_dump(exclude={"type", "chunk_position"})
    return AIMessageChunk(**{name: value for name, value in told.items() if name in AIMessageChunk.model_fields})


def _close(chunks: Iterator[Any]) -> None:
    if isinstance(chunks, Generator):
        chunks.close()  # an interrupted model stops now, not when it is garbage


async def _aclose(chunks: AsyncIterator[Any]) -> None:
    if isinstance(chunks, AsyncGenerator):
        await chunks.aclose()
