"""Asking the wrapped LLM for something other than the reply: a verdict, or a summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memory_os.errors import CapabilityError, LLMError, MemoryOSError
from memory_os.fence import inert
from memory_os.protocols import LLM, StructuredLLM
from memory_os.types import Message

__all__ = ["reply_to"]


def reply_to(llm: LLM, prompt: str, *, max_tokens: int, schema: Mapping[str, Any] | None = None) -> str:
    """The whole reply to one message, without white space around it.

    :param schema: what an LLM that offers it is held to; one that does not is asked without.
    :raises LLMError: if the model fails, or the prompt with ``max_tokens`` exceeds its context window.
    """
    messages: list[Message] = [{"role": "user", "content": inert(prompt)}]
    try:
        if schema is not None and isinstance(llm, StructuredLLM):
            try:
                return llm.generate_structured(messages, schema, max_tokens=max_tokens).strip()
            except CapabilityError:
                pass  # its server or model turned out not to; the reader takes plain lines as well
        return "".join(llm.generate(messages, max_tokens=max_tokens)).strip()
    except MemoryOSError:
        raise
    except Exception as error:  # whatever a foreign LLM raises becomes one typed error
        raise LLMError(llm.name, f"{type(error).__name__}: {error}") from error
