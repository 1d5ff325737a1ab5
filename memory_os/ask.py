"""Asking the wrapped LLM for something other than the reply: a verdict, or a summary."""

from __future__ import annotations

import re
from typing import Literal

from memory_os.protocols import LLM
from memory_os.types import Message

__all__ = ["Language", "language_of", "reply_to"]

Language = Literal["en", "zh"]

_HAN = re.compile(r"[\u3400-\u9fff]")
_LETTER = re.compile(r"[^\W\d_]")


def language_of(text: str) -> Language:
    """In which language to ask about a text: Chinese where its letters are mostly Han, else English.

    >>> language_of("话说天下大势，分久必合"), language_of("Call me Ishmael.")
    ('zh', 'en')
    """
    return "zh" if 2 * len(_HAN.findall(text)) > len(_LETTER.findall(text)) else "en"


def reply_to(llm: LLM, prompt: str, *, max_tokens: int) -> str:
    """The whole reply to one message, without white space around it.

    :raises LLMError: if the model fails, or the prompt with ``max_tokens`` exceeds its context window.
    """
    messages: list[Message] = [{"role": "user", "content": prompt}]
    return "".join(llm.generate(messages, max_tokens=max_tokens)).strip()
