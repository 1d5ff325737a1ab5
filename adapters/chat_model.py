"""Any LangChain chat model with memory, in place of the model itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

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
from pydantic import BeforeValidator, PrivateAttr, model_validator

from memory_os.adapters.configurable import labels_of, opened, session_of
from memory_os.adapters.langchain_messages import as_segments, query_at, text_of
from memory_os.adapters.langchain_models import LangChainLLM
from memory_os.adapters.remembering import Remembering
from memory_os.errors import ConfigError
from memory_os.memory import DEFAULT_SESSION, Memory, Scope
from memory_os.types import Segment, as_namespace

if TYPE_CHECKING:
    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
    from langchain_core.language_models import LanguageModelInput
    from langchain_core.language_models.base import LangSmithParams
    from langchain_core.messages import AIMessage
    from langchain_core.runnables import Runnable
    from langchain_core.tools import BaseTool

__all__ = ["MemoryChatModel"]

QUIET: RunnableConfig = {"callbacks": []}
"""The inner call tells nobody: whoever listens hears of each token, and of the tokens used, from the outer one."""


class Request(NamedTuple):
    """A call on its way.

    :param asked: the stored segment of what the user wrote last.
    """

    scope: Scope
    messages: list[BaseMessage]
    asked: Segment | None


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
    """

    model: BaseChatModel
    memory: Annotated[Memory, BeforeValidator(opened)]
    namespace: Annotated[tuple[str, ...] | None, BeforeValidator(lambda v: None if v is None else as_namespace(v))] = (
        None
    )
    session: str | None = None
    memory_tokens: int | None = None
    context_window: int | None = None
    tokenizer: Any = None
    reply_tokens: int | None = None
    cache: BaseCache | bool | None = False
    """Off: what memory holds is not part of what LangChain's cache looks at. The model's own cache sees the request."""

    _remembering: Remembering = PrivateAttr()

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
            ours["model"] = model.model_copy(update=known) if known else model
        if isinstance(ours.get("model"), BaseChatModel):
            ours.setdefault("profile", ours["model"].profile)
        return ours

    def model_post_init(self, context: Any, /) -> None:
        """Check the settings.

        :raises ConfigError: for one that cannot be used.
        """
        self._remembering = Remembering(
            self.memory,
            namespace=self.namespace,
            session=self.session,
            memory_tokens=self.memory_tokens,
            context_window=self.context_window,
            tokenizer=self.tokenizer,
            reply_tokens=self.reply_tokens,
        )

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
        where = (labels_of(self.namespace, config), session_of(self.session, config) or DEFAULT_SESSION)
        return {"remembers_in": where, **kwargs}

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
        """The reply, piece by piece."""
        yield from super().stream(input, config, stop=stop, **self._named(config, kwargs))

    async def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """The reply, piece by piece."""
        async for chunk in super().astream(input, config, stop=stop, **self._named(config, kwargs)):
            yield chunk

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
        self._end(request, reply)
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
        await asyncio.to_thread(self._end, request, reply)
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
        try:
            for chunk in self.model.stream(request.messages, QUIET, stop=stop, **kwargs):
                said = chunk if said is None else said + chunk
                yield ChatGenerationChunk(message=chunk)
            outcome = None
        finally:
            if said is not None:
                self._end(request, message_chunk_to_message(said), outcome)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        request = await asyncio.to_thread(self._begin, messages, kwargs)
        said: BaseMessageChunk | None = None
        outcome: str | None = "interrupted"
        try:
            async for chunk in self.model.astream(request.messages, QUIET, stop=stop, **kwargs):
                said = chunk if said is None else said + chunk
                yield ChatGenerationChunk(message=chunk)
            outcome = None
        finally:
            if said is not None:
                await asyncio.to_thread(self._end, request, message_chunk_to_message(said), outcome)

    def _begin(self, messages: list[BaseMessage], kwargs: dict[str, Any]) -> Request:
        """Store what is new, and put what memory holds into the request; ``kwargs`` keeps what is the model's."""
        scope = self._scope(kwargs.pop("remembers_in", None))
        before = self._recorded(scope, messages)
        replies = [n for n, message in enumerate(messages) if message.type == "ai"]
        new = self._remembering.record(scope, messages[replies[-1] + 1 if replies else 0 :])
        at = query_at(messages)
        asked = next((segment for segment in reversed(new) if segment.role == "user"), None)
        if asked is None and at is not None:  # asked in an earlier call of this turn
            asked = before.get(("user", text_of(messages[at])))
        head = messages[0] if messages and messages[0].type == "system" else None
        recalled = self._remembering.recall(
            scope,
            self.model,
            "" if head is None else str(head.text),
            messages if head is None else messages[1:],
            kwargs.get("tools") or (),
            asked,
            [segment.id for segment in before.values()],
        )
        if recalled is None:
            return Request(scope, messages, asked)
        if head is not None and recalled.system == str(head.text):
            return Request(scope, [head, *recalled.messages], asked)
        system = [SystemMessage(content=recalled.system)] if recalled.system else []
        return Request(scope, [*system, *recalled.messages], asked)

    def _scope(self, where: tuple[tuple[str, ...], str] | None) -> Scope:
        if where is None:  # called by ``generate``, which knows no configuration
            return self._remembering.scope()
        labels, session = where
        return self.memory.namespace(*labels).session(session)

    @staticmethod
    def _recorded(scope: Scope, messages: list[BaseMessage]) -> dict[tuple[str, str], Segment]:
        """The session's segments that these messages are, as far as their texts tell: callers hardly ever give ids."""
        said = {(new.role, new.text) for new in as_segments(messages, scope.session_name or DEFAULT_SESSION)}
        recent = scope.history(2 * len(messages) + 2)
        return {told: s for s in recent if (told := (s.role, s.text)) in said}

    def _end(self, request: Request, reply: BaseMessage, outcome: str | None = None) -> None:
        """Store the reply."""
        stored = self._remembering.record(request.scope, [reply], outcome)
        if request.asked and not getattr(reply, "tool_calls", None):
            self._remembering.answered(request.scope, [request.asked, *stored])
