"""Asking the wrapped LLM for something other than the reply: a verdict, or a summary."""

from __future__ import annotations

from memory_os.errors import LLMError, MemoryOSError
from memory_os.protocols import LLM
from memory_os.types import Message

__all__ = ["reply_to"]


def reply_to(llm: LLM, prompt: str, *, max_tokens: int) -> str:
    """The whole reply to one message, without white space around it.

    :raises LLMError: if the model fails, or the prompt with ``max_tokens`` exceeds its context window.
    """
    messages: list[Message] = [{"role": "user", "content": prompt}]
    try:
        return "".join(llm.generate(messages, max_tokens=max_tokens)).strip()
    except MemoryOSError:
        raise
    except Exception as error:  # whatever a foreign LLM raises becomes one typed error
        raise LLMError(llm.name, f"{type(error).__name__}: {error}") from error
