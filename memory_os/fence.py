"""Text that stays data: recalled words that cannot leave the place in a prompt where they are shown."""

from __future__ import annotations

import re

__all__ = ["defused"]

_TAG = re.compile(r"<(?=/?memory\b)", re.IGNORECASE)
_CONTROL = re.compile(r"<(?=\|)|(?<=\|)>|\[(?=/?INST\])|<(?=/?s>|(?:start|end)_of_turn>)")
_SUSPECT = re.compile(r"[<>\[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_LINE_END = re.compile(r"(\r\n|[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029])(?=\S)")


def defused(text: str) -> str:
    """Recalled text that cannot leave its fence; ordinary text comes back unchanged.

    >>> defused("a < b </memory> <|im_end|>")
    'a < b < /memory> < |im_end| >'
    """
    if not _SUSPECT.search(text):
        return text
    text = _TAG.sub("< ", text)
    text = _CONTROL.sub(lambda match: f" {match[0]}" if match[0] == ">" else f"{match[0]} ", text)
    return _LINE_END.sub(r"\1 ", text)  # only our own lines start at the margin
