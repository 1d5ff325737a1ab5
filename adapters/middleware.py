"""Memory for LangChain's agents: ``create_agent(model, tools, middleware=[MemoryMiddleware(memory, ...)])``.

Before every call of the model the turn so far is stored, and what memory holds for it enters the request, and only the
request: the agent's state never sees it. After the agent has answered, the rest of the turn is stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, cast

from langchain_core.messages import SystemMessage

from memory_os.adapters.langchain_messages import schemas_of
from memory_os.adapters.remembering import Remembering
from memory_os.adapters.tools import memory_tools
from memory_os.errors import MissingExtraError
from memory_os.protocols import TokenCounter

try:
    from langchain.agents.middleware import AgentMiddleware
    from langchain.agents.structured_output import AutoStrategy, ProviderStrategy, ToolStrategy
except ImportError as error:
    raise MissingExtraError("MemoryMiddleware", "langchain", "langchain") from error

if TYPE_CHECKING:
    from langchain.agents.middleware import AgentState, ModelRequest, ModelResponse
    from langchain_core.messages import AnyMessage
    from langgraph.runtime import Runtime

    from memory_os.aio import AsyncMemory
    from memory_os.memory import Memory

__all__ = ["MemoryMiddleware"]


class MemoryMiddleware(AgentMiddleware):
    """What an agent was told in one thread is there in every other of the same namespace.

    What the user wrote is stored before the model is called, and the whole turn, with tool calls and their results, in
    ``after_agent``: from the agent's state, so as other middleware has redacted it there. What the model was shown,
    and why, ``memory.namespace(...).why()`` tells. Put it last, so that it sees the request as it will be sent: after
    ``dynamic_prompt``, and after middleware that falls back to a model with a smaller window.

    :param memory: what ``Memory.open`` or ``AsyncMemory.open`` gives.
    :param namespace: labels; without it each run names its own: ``config={"configurable": {"namespace": (...)}}``.
    :param session: by default the run's ``session`` or ``thread_id``.
    :param memory_tokens: most tokens that memory may take of a request; by default the memory's budget. With system
        prompt, tools, messages and the reply it always stays within the model's context window.
    :param context_window: of the model; by default what its LangChain profile says, else 8192.
    :param tokenizer: counts for the model: a name or an object; by default by the model's name.
    :param reply_tokens: kept free for the reply; by default the model's own limit, else the memory's.
    :param tools: of ``"remember"``, ``"recall"`` and ``"forget"`` those that the agent gets for itself.
    :param unrecorded: names of other tools whose calls and results are not to be stored, such as those that look into
        this memory.
    :raises ConfigError: for a setting that cannot be used.
    """

    def __init__(
        self,
        memory: Memory | AsyncMemory,
        *,
        namespace: Sequence[str] | None = None,
        session: str | None = None,
        memory_tokens: int | None = None,
        context_window: int | None = None,
        tokenizer: str | TokenCounter | None = None,
        reply_tokens: int | None = None,
        tools: Collection[str] = (),
        unrecorded: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.tools = memory_tools(memory, namespace=namespace, session=session, names=tools)
        self._remembering = Remembering(
            memory,
            namespace=namespace,
            session=session,
            memory_tokens=memory_tokens,
            context_window=context_window,
            tokenizer=tokenizer,
            reply_tokens=reply_tokens,
            unrecorded={*unrecorded, *tools},
        )

    def before_agent(self, state: AgentState[Any], runtime: Runtime[Any]) -> None:
        """Tell what is new of the state's messages."""
        self._remembering.begin(self._remembering.scope(), state["messages"])

    async def abefore_agent(self, state: AgentState[Any], runtime: Runtime[Any]) -> None:
        """Tell what is new of the state's messages."""
        await asyncio.to_thread(self.before_agent, state, runtime)

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Call the model with memory in its request."""
        return handler(self._with_memory(request))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """Call the model with memory in its request."""
        return await handler(await asyncio.to_thread(self._with_memory, request))

    def after_agent(self, state: AgentState[Any], runtime: Runtime[Any]) -> None:
        """Store the turn."""
        scope = self._remembering.scope()
        self._remembering.record(scope, state["messages"])
        self._remembering.answered(scope)

    async def aafter_agent(self, state: AgentState[Any], runtime: Runtime[Any]) -> None:
        """Store the turn."""
        await asyncio.to_thread(self.after_agent, state, runtime)

    def _with_memory(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        scope = self._remembering.scope()
        # the state, and not the request: what other middleware put in there for this call was not said
        self._remembering.record(scope, request.state["messages"])
        schemas = [*schemas_of(request.tools), *_schemas_of_reply(request.response_format)]
        recalled = self._remembering.recall(
            scope, request.model, request.system_prompt or "", request.messages, schemas, request.model_settings
        )
        if recalled is None:
            return request
        messages = cast("list[AnyMessage]", recalled.messages)
        if not recalled.instruction:
            return request.override(messages=messages)
        system = _extended(request.system_message, recalled.instruction)
        return request.override(messages=messages, system_message=system)


def _schemas_of_reply(response_format: Any) -> list[dict[str, Any]]:
    """The schemas that a structured reply is held to; they are sent along as tools are."""
    if response_format is None:
        return []
    if isinstance(response_format, ProviderStrategy):
        return [response_format.schema_spec.json_schema]
    if not isinstance(response_format, ToolStrategy):
        schema = response_format.schema if isinstance(response_format, AutoStrategy) else response_format
        response_format = ToolStrategy(schema)
    return [spec.json_schema for spec in response_format.schema_specs]


def _extended(message: SystemMessage | None, instruction: str) -> SystemMessage:
    """The system prompt with what the controller adds to it; the blocks of the caller's own stay as they are."""
    if message is None:
        return SystemMessage(content=instruction)
    if isinstance(message.content, str):
        return message.model_copy(update={"content": f"{message.content}\n\n{instruction}".strip()})
    added = {"type": "text", "text": f"\n\n{instruction}"}
    return message.model_copy(update={"content": [*message.content, added]})
