"""Messages as the token ids of a local model's prompt, in which no content can end its own turn.

A special token that is spelled out in a content is read as plain text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from memory_os.errors import ConfigError, LLMError
from memory_os.types import CachedPrompt, Message

__all__ = ["ChatTokenizer"]


class ChatTokenizer:
    """Turns messages into the token ids of a prompt that no content can break out of."""

    # around a special token that a content spells out, and where the memory stands; noncharacters, which no text in
    # any language has
    START, END, MEMORY = "\ufdd0", "\ufdd1", "\ufdd2"

    def __init__(self, name: str, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(f"the model {name!r} has no chat template; use its instruct or chat version")
        self.name = name
        self.tokenizer = tokenizer
        template = tokenizer.get_chat_template()
        added = tokenizer.added_tokens_decoder
        special = {i: str(t) for i, t in added.items() if t.special or str(t) in template}
        self._special_ids = frozenset(special)
        # the longest first, as one may begin another; (?!) matches nothing
        spelled = "|".join(re.escape(text) for text in sorted(special.values(), key=len, reverse=True)) or "(?!)"
        self._special = re.compile(spelled)
        self._marked = re.compile(f"{self.START}({spelled}){self.END}|[{self.START}{self.END}]")
        self._takes_system = self._probe_system()

    def text(self, text: str) -> list[int]:
        """Ids of ``text`` alone."""
        return self._encode_marked(self._mark(text)) if self._special.search(text) else self._encode(text)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Ids of the whole prompt: for ordinary contents exactly those of ``apply_chat_template``."""
        chat: list[dict[str, Any]] = [{**message} for message in messages]
        if not self._takes_system:
            chat = _fold_system(chat)
        ordinary = not any(self._special.search(message["content"]) for message in chat)
        if not ordinary:
            chat = [{**message, "content": self._mark(message["content"])} for message in chat]
        import jinja2

        try:
            rendered = self._render(chat, tools)
        except jinja2.TemplateError as error:
            raise LLMError(self.name, f"its chat template refuses the messages: {error}") from error
        return self._encode(rendered) if ordinary else self._encode_marked(rendered)

    def around(self, question: str, stem: str) -> tuple[list[int], list[int], list[int]]:
        """What stands before a segment, the question after it, and the beginning of the answer."""
        from memory_os.adapters.scoring import after_segment

        asked, cue = after_segment(question, stem)
        return self.beginning, self.text(asked), self.text(cue)

    @property
    def beginning(self) -> list[int]:
        """What plain text begins with: something that all else can attend to."""
        first = self.tokenizer.bos_token_id
        return self._encode("\n") if first is None else [first]

    def around_memory(self, prompt: CachedPrompt) -> tuple[list[int], list[list[int]], list[int]]:
        """Ids of what stands before the memory, of each of its lines by itself, and of what follows."""
        lines = [self.text(line) for line in prompt.lines]
        if prompt.plain:
            before = self.text(f"{prompt.system}{prompt.opening}")
            return self.beginning + before, lines, self.text("".join(each["content"] for each in prompt.messages))
        import jinja2

        system: list[Message] = [{"role": "system", "content": prompt.system}] if prompt.system else []
        chat: list[dict[str, Any]] = [
            {**message, "content": self._mark(message["content"].replace(self.MEMORY, ""))}
            for message in (*system, *prompt.messages)
        ]
        first = chat[len(system)]
        first["content"] = f"{prompt.opening}{self.MEMORY}{first['content']}"
        try:
            rendered = self._render(chat if self._takes_system else _fold_system(chat))
        except jinja2.TemplateError as error:
            raise LLMError(self.name, f"its chat template refuses the messages: {error}") from error
        head, _, tail = rendered.partition(self.MEMORY)
        return self._encode_marked(head), lines, self._encode_marked(tail)

    def fingerprint(self) -> str:
        """Changes with the tokenizer and with its chat template."""
        content = f"{self.tokenizer.backend_tokenizer.to_str()}{self.tokenizer.get_chat_template()}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def _render(self, chat: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        rendered: str = self.tokenizer.apply_chat_template(
            chat, tools=[dict(tool) for tool in tools] or None, add_generation_prompt=True, tokenize=False
        )
        return rendered

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def _mark(self, text: str) -> str:
        for mark in (self.START, self.END):  # a content cannot bring marks of its own
            text = text.replace(mark, "")
        return self._special.sub(lambda found: f"{self.START}{found[0]}{self.END}", text)

    def _encode_marked(self, text: str) -> list[int]:
        ids: list[int] = []
        # split() gives text, marked, text, ...; a mark torn from its token by the template gives None for "marked"
        for n, piece in enumerate(self._marked.split(text)):
            if n % 2 == 0:
                ids += self._encode(piece)
            elif piece:  # letter by letter, no tokenizer sees the special token
                ids += [i for letter in piece for i in self._encode(letter) if i not in self._special_ids]
        return ids

    def _probe_system(self) -> bool:
        import jinja2

        try:
            probe = "system prompt probe"
            return probe in self._render([{"role": "system", "content": probe}, {"role": "user", "content": "Hi"}])
        except jinja2.TemplateError:
            return False


def _fold_system(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chat for a template that knows no system role: what it says opens the first user message."""
    system = "\n\n".join(message["content"] for message in chat if message["role"] == "system")
    rest = [message for message in chat if message["role"] != "system"]
    if not system:
        return rest
    if not rest or rest[0]["role"] != "user":
        return [{"role": "user", "content": system}, *rest]
    return [{**rest[0], "content": f"{system}\n\n{rest[0]['content']}"}, *rest[1:]]
