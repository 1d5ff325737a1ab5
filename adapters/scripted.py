"""Test doubles for the model seams: no weights, no network, the same answer every time.

They are public: use them to test what you build on memory_os.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from memory_os.adapters.tokenizers import end_before, end_within
from memory_os.errors import LLMError
from memory_os.types import Message

if TYPE_CHECKING:
    from memory_os.protocols import Matrix, TokenCounter, Vector

__all__ = ["Call", "HashEmbedder", "ScriptedLLM", "WordCounter"]


class WordCounter:
    """Counts words and punctuation marks, and four for each message: easy to do by hand.

    >>> WordCounter().count_tokens([{"role": "user", "content": "Hello, world"}])
    7
    """

    name = "words"
    exact = True

    def count_text(self, text: str) -> int:
        """Words and punctuation marks of ``text``."""
        return len(re.findall(r"\w+|[^\w\s]", text))

    def count_tokens(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> int:
        """Words and punctuation marks of all contents, four more for each message, and those of the tools' JSON."""
        schemas = sum(self.count_text(json.dumps(tool, default=str)) for tool in tools)
        return schemas + sum(4 + self.count_text(message["content"]) for message in messages)


class Call(NamedTuple):
    """What a ``ScriptedLLM`` was asked."""

    messages: tuple[Message, ...]
    max_tokens: int


class ScriptedLLM:
    """An LLM that answers from a queue or a function, word by word, and remembers what it was asked.

    >>> llm = ScriptedLLM(["Hello there."])
    >>> list(llm.generate([{"role": "user", "content": "Hi"}], max_tokens=9)), llm.calls[0].max_tokens
    (['Hello', ' there.'], 9)

    :param replies: the replies in order, or a function from the messages to the reply; what it raises is the LLM's
        failure. With no reply left the LLM fails as well.
    """

    name = "scripted"

    def __init__(
        self,
        replies: Sequence[str] | Callable[[Sequence[Message]], str],
        *,
        context_window: int = 8192,
        tokenizer: TokenCounter | None = None,
    ) -> None:
        self.context_window = context_window
        self.calls: list[Call] = []
        self._counter: TokenCounter = tokenizer or WordCounter()
        self._replies = replies if callable(replies) else deque([replies] if isinstance(replies, str) else replies)

    @property
    def exact(self) -> bool:
        """As the tokenizer's."""
        return self._counter.exact

    def count_text(self, text: str) -> int:
        """Tokens of ``text`` by the tokenizer."""
        return self._counter.count_text(text)

    def count_tokens(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> int:
        """Tokens of the chat by the tokenizer."""
        return self._counter.count_tokens(messages, tools)

    def generate(self, messages: Sequence[Message], *, max_tokens: int, stop: Sequence[str] = ()) -> Iterator[str]:
        """Yield the next reply word by word.

        :raises LLMError: for an exhausted queue, a prompt over the context window, or a function that raises.
        """
        self.calls.append(Call(tuple(messages), max_tokens))
        n_prompt = self.count_tokens(messages)
        if n_prompt + max_tokens > self.context_window:
            problem = f"a prompt of {n_prompt} tokens and a reply of {max_tokens} exceed its {self.context_window}"
            raise LLMError(self.name, problem)
        words = re.findall(r"\s*\S+|\s+$", self._reply(messages))
        yield from end_before(end_within(words, max_tokens, self._counter), stop)

    def _reply(self, messages: Sequence[Message]) -> str:
        if isinstance(self._replies, deque):
            if not self._replies:
                raise LLMError(self.name, f"no reply is left for call {len(self.calls)}; script one more")
            return self._replies.popleft()
        try:
            return self._replies(messages)
        except LLMError:
            raise
        except Exception as error:
            raise LLMError(self.name, f"{type(error).__name__}: {error}") from error


class HashEmbedder:
    """Vectors of hashed words: texts that share words are near, in every process and on every machine.

    :param dimension: length of a vector.
    """

    def __init__(self, dimension: int = 64) -> None:
        self.dimension = dimension
        self.fingerprint = f"hash-{dimension}-v1"

    def embed_documents(self, texts: Sequence[str]) -> Matrix:
        """Unit vectors, shape ``[len(texts), dimension]``."""
        import numpy as np

        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for row, text in zip(vectors, texts, strict=True):
            # ASCII words, and every other letter by itself: Chinese and Japanese put no spaces
            for word in re.findall(r"[a-z0-9]+|\w", text.lower()):
                digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
                # all one sign: in so few dimensions, words that meet in one must not cancel out
                row[int.from_bytes(digest, "big") % self.dimension] += 1.0
            length = math.sqrt(float(row @ row))
            if length:
                row /= length
            else:
                row[0] = 1.0
        return vectors

    def embed_query(self, text: str) -> Vector:
        """The unit vector of ``text``, as a document would have it."""
        vector: Vector = self.embed_documents([text])[0]
        return vector
