"""Memory for LangChain's agents: ``create_agent(model, tools, middleware=[MemoryMiddleware(memory, ...)])``.

Before every call of the model the turn so far is stored, and what memory holds for it enters the request, and only the
request: the agent's state never sees it. After the agent has answered, the rest of the turn is stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, cast

from memory_os.adapters.langchain_messages import schemas_of, turn_of
from memory_os.adapters.remembering import Remembering
from memory_os.adapters.tools import TOOLS, memory_tools
from memory_os.errors import MissingExtraError
from memory_os.protocols import TokenCounter

try:
    from langchain.agents.middleware import AgentMiddleware
except ImportError as error:
    raise MissingExtraError("MemoryMiddleware", "langchain", "langchain") from error

if TYPE_CHECKING:
    from langchain.agents.middleware import AgentState, ModelRequest, ModelResponse
    from langchain_core.messages import AnyMessage, SystemMessage
    from langgraph.runtime import Runtime

    from memory_os.aio import AsyncMemory
    from memory_os.memory import Memory

__all__ = ["MemoryMiddleware"]


class MemoryMiddleware(AgentMiddleware):
    """What an agent was told in one thread is there in every other of the same namespace.

    Turns are stored before the model is called, and whole, with tool calls and their results, in ``after_agent``.
    ``memory.namespace(...).why()`` tells what the last one was shown and why. Put it after middleware that redacts what
    is said, so that it stores what they leave.

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
            unrecorded={*unrecorded, *(TOOLS if tools else ())},
        )

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
        self._remembering.answered(scope, self._remembering.record(scope, turn_of(state["messages"])))

    async def aafter_agent(self, state: AgentState[Any], runtime: Runtime[Any]) -> None:
        """Store the turn."""
        await asyncio.to_thread(self.after_agent, state, runtime)

    def _with_memory(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        scope = self._remembering.scope()
        # the state, and not the request: what other middleware put in there for this call was not said
        turn = self._remembering.record(scope, turn_of(request.state["messages"]))
        asked = next((segment for segment in reversed(turn) if segment.role == "user"), None)
        recalled = self._remembering.recall(
            scope,
            request.model,
            request.system_prompt or "",
            request.messages,
            [*schemas_of(request.tools), *_schemas_of_reply(request.response_format)],
            asked,
        )
        if recalled is None:
            return request
        messages = cast("list[AnyMessage]", recalled.messages)
        if recalled.system == (request.system_prompt or ""):
            return request.override(messages=messages)
        return request.override(messages=messages, system_message=_extended(request.system_message, recalled.system))


def _schemas_of_reply(response_format: Any) -> list[dict[str, Any]]:
    """The schemas that a structured reply is held to; they are sent along as tools are."""
    if response_format is None:
        return []
    specs = getattr(response_format, "schema_specs", None) or [getattr(response_format, "schema_spec", None)]
    if told := [{"schema": spec.json_schema} for spec in specs if spec is not None]:
        return told
    return schemas_of([getattr(response_format, "schema", response_format)])


def _extended(message: SystemMessage | None, whole: str) -> SystemMessage:
    """The system prompt with what the controller adds to it; the blocks of the caller's own stay as they are."""
    from langchain_core.messages import SystemMessage

    if message is None or isinstance(message.content, str):
        return SystemMessage(content=whole)
    added = whole.removeprefix(str(message.text))
    return message.model_copy(update={"content": [*message.content, {"type": "text", "text": added}]})
