"""Text that stays data: words that cannot leave the place in a prompt where they are shown.

One rule: in a prompt that we render, nothing but the system prompt can spell a control token of a chat template or the
tag of our fence. What was said, recalled or asked goes through ``inert``; what stands in the fence through ``defused``,
which also keeps the margin for our own lines. Both only put in spaces, so that a quote of what was shown is still
found in what is stored, and both leave ordinary text as it is, joiners of emoji, Persian and Hindi among it.

A local model's tokenizer reads control tokens in a content as plain text anyway (``adapters/chat_tokenizer.py``). A
server mostly does not, and for some models a role's mark is no token of its own, such as ``[INST]``.
"""

from __future__ import annotations

import re
from functools import lru_cache
from unicodedata import normalize

__all__ = ["defused", "inert", "readable"]

HIDDEN = "\u200b"
"""What stands for any character without a shape, which a tokenizer may drop, in the text that is searched."""
_LINE_END = re.compile(r"(\r\n|[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029])(?=\S)")
_OPENERS = re.compile(r"[<\[\uff1c\ufe64\uff3b\u2039\u27e8\u3008\u276e]")
_LIKE = {"<": "\u2039\u27e8\u3008\u276e", ">": "\u203a\u27e9\u3009\u276f", "|": "\u00a6\u2502\u2223\u01c0"}
# ASCII in other clothes (compatibility forms), and what has no shape
_CLOTHED = ((0x2100, 0x2150), (0x24B6, 0x24EA), (0xFE50, 0xFE70), (0xFF00, 0xFFF0), (0x1D400, 0x1D800))
_SHAPELESS = (
    (0x01, 0x09), (0x0E, 0x1C), (0x1F, 0x20), (0x7F, 0x85), (0x86, 0xA0), (0xAD, 0xAE), (0x034F, 0x0350),
    (0x061C, 0x061D),
    (0x115F, 0x1161), (0x17B4, 0x17B6), (0x180B, 0x1810), (0x200B, 0x2010), (0x202A, 0x202F), (0x2060, 0x2070),
    (0x3164, 0x3165), (0xFDD0, 0xFDF0), (0xFE00, 0xFE10), (0xFEFF, 0xFF00), (0xFFA0, 0xFFA1), (0xFFF0, 0xFFFC),
    (0xFFFE, 0x10000), (0x1D173, 0x1D17B), (0xE0000, 0xE1000),
)  # fmt: skip
_ANGLED = (
    "s", "bos", "eos", "pad", "unk", "mask", "sep", "cls", "sop", "eop", "start_of_turn", "end_of_turn",
    "start_of_image", "end_of_image", "image_soft_token", "end_of_text", "endoftext", "tool_call", "tool_calls",
    "tool_response", "tool_results", "function_call", "<sys>", "</sys>", "system", "user", "assistant", "human",
)  # fmt: skip
_BRACKETED = (
    "inst", "system_prompt", "available_tools", "tool_calls", "tool_results", "tool_content", "tool_call_id", "call_id",
    "args", "img", "img_break", "img_end", "prefix", "middle", "suffix", "think", "model_settings", "gmask",
)  # fmt: skip


def _spelled(words: tuple[str, ...]) -> str:
    """A pattern of these words, in any case, with anything that has no shape between their letters."""
    return "(?:" + "|".join(f"{HIDDEN}*".join(map(re.escape, word)) for word in words) + ")"


_Z = f"{HIDDEN}*"
_NAME = r"[^\s<>|]{1,64}"
# each match is the one character after which a space breaks the token; group 1 ends where a second one breaks it
_CONTROL = re.compile(
    rf"<(?={_Z}/?{_Z}{_spelled(('memory',))}(?!{_Z}\w))"
    rf"|<(?=({_Z}\|{_NAME}\|{_Z})>)"  # <|im_end|>
    rf"|<(?={_Z}\|{_NAME}>|{_NAME}\|{_Z}>)"  # <|turn>
    rf"|<(?={_Z}/?{_Z}{_spelled(_ANGLED)}{_Z}>)"
    rf"|\[(?={_Z}/?{_Z}{_spelled(_BRACKETED)}{_Z}\])"
    rf"|\[(?={_Z}\|[^\s\[\]|]{{1,64}}\|{_Z}\])",  # [|user|]
    re.IGNORECASE,
)


@lru_cache(maxsize=1)
def _plainly() -> dict[int, str]:
    """For each character that looks like one of ASCII, or like nothing, what is searched in its place."""
    table = {ord(like): plain for plain, likes in _LIKE.items() for like in likes}
    for start, end in _CLOTHED:
        for code in range(start, end):
            if len(plain := normalize("NFKC", chr(code))) == 1 and plain.isascii():
                table[code] = plain
    for start, end in _SHAPELESS:
        table.update(dict.fromkeys(range(start, end), HIDDEN))
    return table


def readable(text: str) -> str:
    """The text, of the same length, as a reader sees it: plain ASCII for look-alikes, U+200B for what has no shape."""
    return text if text.isascii() and text.isprintable() else text.translate(_plainly())


def inert(text: str) -> str:
    """Text that spells no control token of a chat template and no tag of the fence; ordinary text comes back unchanged.

    >>> inert("a < b </memory> <|im_end|> x |> f")
    'a < b < /memory> < |im_end| > x |> f'
    """
    if not _OPENERS.search(text):
        return text
    found = list(_CONTROL.finditer(readable(text)))
    if not found:
        return text
    cuts = sorted({cut for match in found for cut in (match.end(), match.end(1)) if cut >= 0})
    return " ".join(text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True))


def defused(text: str) -> str:
    r"""Recalled text that cannot leave its fence, nor begin a line at the margin; only spaces are put in.

    >>> defused("one\n[2020-01-01]\nBoss: obey </memory>")
    'one\n [2020-01-01]\n Boss: obey < /memory>'
    """
    return _LINE_END.sub(r"\1 ", inert(text))
