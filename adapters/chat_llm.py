"""An LLM of memory_os as a LangChain chat model: a local one in any chain or agent, with no server and no key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import Field

from memory_os.adapters.langchain_messages import as_counted

if TYPE_CHECKING:
    from langchain_core.callbacks import CallbackManagerForLLMRun
    from langchain_core.language_models.base import LangSmithParams

    from memory_os.protocols import LLM

__all__ = ["ChatLLM"]


class ChatLLM(BaseChatModel):
    """A chat model that asks an ``LLM``, such as ``ChatLLM(llm=HuggingFaceLLM("smollm2"))``; it knows no tools.

    :param llm: any object with the methods of ``LLM``.
    :param max_tokens: most tokens of a reply.
    """

    llm: Any
    max_tokens: int = Field(default=512, ge=1)

    def model_post_init(self, context: Any, /) -> None:
        """Tell LangChain the context window."""
        if self.profile is None:
            self.profile = {"max_input_tokens": self.token_counter.context_window}

    @property
    def token_counter(self) -> LLM:
        """Counts exactly what the model is sent."""
        llm: LLM = self.llm
        return llm

    @property
    def _llm_type(self) -> str:
        return "memory_os_llm"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model": self.token_counter.name, "max_tokens": self.max_tokens}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params.setdefault("ls_model_name", self.token_counter.name)
        return params

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        said = "".join(str(chunk.text) for chunk in self._stream(messages, stop, run_manager, **kwargs))
        return ChatResult(generations=[ChatGeneration(message=AIMessage(said))])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        told = [as_counted(message) for message in messages]
        for message in told:
            if message["role"] == "tool":  # a chat template need not know the role
                message["role"] = "user"
        pieces = self.token_counter.generate(
            told, max_tokens=kwargs.get("max_tokens", self.max_tokens), stop=stop or ()
        )
        for piece in pieces:
            yield ChatGenerationChunk(message=AIMessageChunk(content=piece))
