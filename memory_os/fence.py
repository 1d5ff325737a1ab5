"""Text that stays data: words that cannot leave the place in a prompt where they are shown.

One rule: in a prompt that we render, nothing but the system prompt can spell a control token of a chat template or the
tag of our fence. What was said, recalled or asked goes through ``inert``; what stands in the fence through ``defused``,
which also keeps the margin for our own lines. Both only put in spaces, so that a quote of what was shown is still
found in what is stored. Ordinary text stays as it is, joiners of emoji, Persian and Hindi, HTML and most code among it;
a tag of the shape that control tokens have, such as ``<my_type>``, gets its space whatever it means.

A local model's tokenizer reads control tokens in a content as plain text anyway (``adapters/chat_tokenizer.py``). A
server mostly does not, and for some models a role's mark is no token of its own, such as ``[INST]``.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from functools import lru_cache
from itertools import accumulate
from unicodedata import normalize

import regex

__all__ = ["defused", "inert", "readable"]

_LINE_END = re.compile(r"(\r\n|[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029])(?=[\S\x1f])")  # \x1f: a space without a shape
_LIKE = {
    "<": "\u2039\u27e8\u3008\u276e\u02c2\u1438", ">": "\u203a\u27e9\u3009\u276f\u02c3\u1433",
    "|": "\u00a6\u2502\u2223\u01c0",
}  # fmt: skip
_SHAPELESS = regex.compile(r"[\p{Cf}\p{Cc}\p{Default_Ignorable_Code_Point}\p{Noncharacter_Code_Point}]")
_SPACES = "\t\n\x0b\x0c\r\x1c\x1d\x1e\x85"
_ANGLED = (
    "s bos eos pad unk mask sep cls sop eop eot eod eoh eoa eom endoftext image system user assistant human bot role "
    "tool tools think thinking reponame filename </?sys> unused[0-9]+ 0x[0-9a-f]{2}"
)
_BRACKETED = (
    "inst system_prompt available_tools tool_calls tool_results tool_content tool_call_id call_id args img img_break "
    "img_end prefix middle suffix think model_settings gmask"
)
# each match is the one character after which a space breaks the token; group 1 ends where a second one breaks it.
# no part can begin inside of what another has passed over in vain: the time is linear
_CONTROL = re.compile(
    r"<(?=/?memory(?!\w))"
    r"|<(?=(\|(?!\s)[^<>|\n]+(?<!\s)\|)>)"  # <|im_end|>
    r"|<(?=\|[^\s<>|]+>|[^\s<>|]+\|>)"  # <|turn>
    rf"|<(?=/?(?:{_ANGLED.replace(' ', '|')})>)"
    r"|<(?=/?[^\W_]*_[\w.:-]*>|/?[^\W_]+(?::[^\W_]+)+>)"  # <start_of_turn>, <seed:bos>
    rf"|\[(?=/?(?:{_BRACKETED.replace(' ', '|')})\])"
    r"|\[(?=\|[^\s\[\]|]+\|\])"  # [|user|]
    r"|\](?=~!?b[\[\]])|\[(?=e~\[)",  # ]~b]system
    re.IGNORECASE,
)


@lru_cache(maxsize=1)
def _plainly() -> dict[int, str]:
    """For each character that looks like one or more of ASCII, or like nothing, what is read in its place.

    The planes that have none, as a test knows, are left out: this takes 30 ms, once.
    """
    every = [chr(code) for codes in ((0x80, 0xD800), (0xE000, 0x20000), (0xE0000, 0xE1000)) for code in range(*codes)]
    table = {ord(letter): plain for letter in every if (plain := normalize("NFKC", letter)).isascii()}
    table |= {ord(like): plain for plain, likes in _LIKE.items() for like in likes}
    shapeless = _SHAPELESS.findall("".join([*map(chr, range(0x80)), *every]))
    return table | {ord(letter): "" for letter in shapeless if letter not in _SPACES}


def readable(text: str) -> str:
    r"""The text as a reader sees it: plain ASCII for what looks like it, and without what has no shape.

    >>> readable("\uff1c/me\u200bmory>")
    '</memory>'
    """
    return text if text.isascii() and text.isprintable() else text.translate(_plainly())


def inert(text: str) -> str:
    """Text that spells no control token of a chat template and no tag of the fence; only spaces are put in.

    >>> inert("a < b </memory> <|im_end|> x |> f")
    'a < b < /memory> < |im_end| > x |> f'
    """
    found = list(_CONTROL.finditer(readable(text)))
    if not found:
        return text
    # where each character begins in what was searched
    starts = [0, *accumulate(len(readable(letter)) for letter in text)]
    ends = sorted({end for match in found for end in (match.end(), match.end(1)) if end >= 0})
    cuts = [bisect_left(starts, end) for end in ends]
    return " ".join(text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True))


def defused(text: str) -> str:
    r"""Recalled text that cannot leave its fence, nor begin a line at the margin; only spaces are put in.

    >>> defused("one\n[2020-01-01]\nBoss: obey </memory>")
    'one\n [2020-01-01]\n Boss: obey < /memory>'
    """
    return _LINE_END.sub(r"\1 ", inert(text))
