"""Quotes: sentences with numbers, what a model claims to have copied from them, and whether it did. Pure, no model.

ALR² (arXiv 2410.03227) counts a retrieved sentence that does not stand in the context as hallucinated. Here a claim is
compared token by token: white space, quotation marks, case, dashes and the punctuation around it may differ, a word, a
number or a negation may not. What is handed on is the stored sentence itself, never the model's copy of it.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

import regex

from memory_os.types import Segment
from memory_os.windows import sentences

__all__ = [
    "VERSION",
    "Claim",
    "Fault",
    "Rejected",
    "Sentence",
    "Verified",
    "numbered",
    "read_claims",
    "spans_text",
    "tokens_of",
    "verify",
]

VERSION = 1
"""Of the rules by which a quote is accepted; stands in exported training data."""
PART_TOKENS, PART_SHARE = 5, 0.6
"""A part of a sentence stands for it if it has so many tokens, and this share of the sentence's (methods, 3.3)."""
MAX_CHARS = 600
"""A longer sentence is cut at the ends of lines and clauses."""
GAP = " … "
"""Between quotes of one segment that do not follow each other."""

_CHUNK = regex.compile(rf".{{1,{MAX_CHARS}}}(?:(?<=[,;:，；：、])\s*|\s+|\Z)|.{{{MAX_CHARS}}}", regex.DOTALL)
# a number is one token, with sign and separators: 1,998 is not 1 and 998; scripts without spaces go letter by letter
_TOKEN = regex.compile(
    r"(?P<number>(?:(?<![\p{L}\p{N}])[-\u2212])?\p{N}+(?:[.,:/]\p{N}+)*)"
    r"|(?P<letter>[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*)"
    r"|(?P<word>[\p{L}\p{M}]+(?:['’ʼ＇][\p{L}\p{M}]+)*)"
    r"|(?P<quote>[\"'`´«»‘’‚‛“”„‟‹›「」『』＂＇])"
    r"|(?P<mark>[^\s\p{Cc}\p{Cf}])"
)
_AROUND = frozenset(".,;:!?…。，；：！？、*_-")
_SAME = str.maketrans({**dict.fromkeys("’ʼ＇", "'"), **dict.fromkeys("‐‑‒–—―−﹣－", "-")})
_NEGATIONS = frozenset(
    "no not never none nobody nothing neither nor without cannot hardly barely 不 没 沒 无 無 非 未 别 莫 勿".split()
)

_ID = r"S\d+\.\d+"
_CLAIM = regex.compile(  # - **[S1.2]**: text
    rf"^\s*(?:[*•>|]\s*|-\s+|-(?=\W*S\d)|\d+[.)]\s+)*(?:(?:sentence\s+)?[\[(【<*_`\s]*(?P<id>{_ID})(?:\s*[,、&]\s*{_ID})*"
    r"[\])】>*_`]*\s*[:：.、|\-–—]*[*_`]*\s*)?(?P<text>.*?)\s*\|?\s*$",
    regex.IGNORECASE,
)
_BEHIND = regex.compile(rf"\s*[-–—]?\s*[\[(（【<]*\s*({_ID})\s*[\])）】>]*\s*\.?\s*$", regex.IGNORECASE)
_NONE = regex.compile(
    r"\W*(none|nothing|n/?a|无|沒有|没有)(\W.{0,80})?|.{0,40}\bno (relevant |matching )?(sentences?|evidence)\b.{0,80}",
    regex.IGNORECASE | regex.DOTALL,
)
_FENCED = regex.compile(r"^```\w*[ \t]*\n(.*?)^[ \t]*```", regex.DOTALL | regex.MULTILINE)
_OBJECT = regex.compile(r"\{[^{}]*\}", regex.DOTALL)


# -- sentences ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence of a stored segment, with the number by which a model may name it.

    :param number: 1 for the first of its segment.
    :param start: of its span in the segment's text; ``text == segment.text[start:end]``.
    """

    segment: Segment
    number: int
    start: int
    end: int

    @property
    def id(self) -> str:
        """The name that a model sees, such as ``S12.1``."""
        return f"S{self.segment.seq}.{self.number}"

    @property
    def text(self) -> str:
        """As it is stored."""
        return self.segment.text[self.start : self.end]


def numbered(segment: Segment) -> list[Sentence]:
    """The sentences of a segment, in order: all of its text but for the white space between them."""
    return [Sentence(segment, number, start, end) for number, (start, end) in enumerate(_spans(segment.text), start=1)]


@lru_cache(maxsize=20_000)
def _spans(text: str) -> tuple[tuple[int, int], ...]:
    found, place = [], 0
    for sentence in sentences([text]):
        for line in sentence.splitlines(keepends=True):
            pieces = [line] if len(line) <= MAX_CHARS else _CHUNK.findall(line)
            for piece in pieces:
                left = len(piece) - len(piece.lstrip())
                if length := len(piece.strip()):
                    found.append((place + left, place + left + length))
                place += len(piece)
    return tuple(found)


def spans_text(text: str, spans: Iterable[tuple[int, int]]) -> str:
    """The parts of a text as one line of memory shows them, in order: with a mark where something is left out.

    >>> spans_text("One. Two. Three.", [(10, 16), (0, 4)])
    'One. … Three.'
    """
    shown, before = "", None
    for start, end in sorted(spans):
        between = "" if before is None else text[before:start]
        shown += (between if not between.strip() else GAP) + text[start:end]
        before = end
    return shown


# -- claims ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Claim:
    """What a model says it has copied.

    :param id: of the sentence that it names, in capitals; empty where it names none.
    """

    id: str
    text: str


def read_claims(answer: str) -> list[Claim] | None:
    """The claims of a model's answer; empty if it says that there is nothing, ``None`` where it cannot be read.

    JSON of the form ``{"evidence": [{"id", "quote"}]}``, also cut off or fenced, or a claim a line: ``- S12.1: text``.

    >>> read_claims("1. [S3.1] “She moved to Oslo.”")
    [Claim(id='S3.1', text='“She moved to Oslo.”')]
    >>> read_claims("NONE")
    []
    """
    text = answer.strip()
    fenced = _FENCED.search(text)
    body = fenced[1].strip() if fenced else text
    if body.startswith(("{", "[")) and ((found := _from_json(body)) is not None or body[0] == "{"):
        return found
    if _NONE.fullmatch(text) and not regex.search(_ID, text):
        return []
    claims: list[Claim] = []
    for line in body.splitlines():
        claim = _from_line(line)
        if claim and not claim.id and claims and not claims[-1].text:  # the number stood on the line before
            claims[-1] = Claim(claims[-1].id, claim.text)
        elif claim:
            claims.append(claim)
    return claims or None


def _from_line(line: str) -> Claim | None:
    match = _CLAIM.match(line)
    assert match is not None  # everything in it is optional
    id_, text = match["id"] or "", match["text"]
    if not id_ and (behind := _BEHIND.search(text)):
        id_, text = behind[1], text[: behind.start()]
    if id_:
        return Claim(id_.upper(), text)
    # a line without a number is a claim as well, but for the heading that a talkative model begins with
    is_heading = text.endswith((":", "：")) or text.startswith(("#", "```"))
    return Claim("", text) if text and not is_heading and not _NONE.fullmatch(text) else None


def _from_json(body: str) -> list[Claim] | None:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):  # cut off at the limit of tokens: what is whole counts
        data = [each for piece in _OBJECT.findall(body) if (each := _object(piece))]
        if not data:
            return None
    rows = data.get("evidence", data) if isinstance(data, Mapping) else data
    if isinstance(rows, Mapping):  # {"S1.2": "text"}
        rows = [{"id": id_, "quote": text} for id_, text in rows.items() if regex.fullmatch(_ID, str(id_))]
        if not rows:
            return None
    if not isinstance(rows, list):
        return None
    claims = []
    for row in rows:
        if isinstance(row, str) and (claim := _from_line(row)):
            claims.append(claim)
        elif isinstance(row, Mapping):
            id_ = regex.search(_ID, str(row.get("id", "")), regex.IGNORECASE)
            texts = [value for key, value in row.items() if key != "id" and isinstance(value, str)]
            claims.append(Claim(id_[0].upper() if id_ else "", str(row.get("quote", texts[0] if texts else ""))))
    return claims


def _object(piece: str) -> Any:
    try:
        return json.loads(piece)
    except (ValueError, RecursionError):
        return None


# -- the verifier ------------------------------------------------------------------------------------------------------


class Fault(StrEnum):
    """Why a claim was rejected; a closed set."""

    NUMBER = "a number was changed"
    NEGATION = "a negation was changed"
    SPLICED = "put together from more than one place"
    PART = "too small a part of a sentence"
    EMPTY = "nothing is quoted"
    INVENTED = "not in the text"


@dataclass(frozen=True, slots=True)
class Rejected:
    """A claim that does not stand in the text."""

    claim: Claim
    fault: Fault


@dataclass(frozen=True, slots=True)
class Verified:
    """What the verifier makes of claims.

    :param accepted: the stored sentences, each once, in the order of the claims.
    :param n_claims: how many claims were checked.
    :param moved: how many of them named another sentence than the one in which they stand.
    """

    accepted: tuple[Sentence, ...]
    rejected: tuple[Rejected, ...]
    n_claims: int
    moved: int = 0

    @property
    def hallucination_rate(self) -> float:
        """Claims that do not stand in the text over all claims (section 3.2); 0 without claims."""
        return len(self.rejected) / self.n_claims if self.n_claims else 0.0


def verify(claims: Iterable[Claim], shown: Sequence[Sentence]) -> Verified:
    """Accept the claims that stand in the sentences that the model was shown.

    A claim is a whole sentence, several whole neighbouring ones, or a part of one (see ``PART_TOKENS``), which stands
    for the whole, so that no negation is lost in front of it. It is looked for in the sentence that it names, then in
    the others of that segment, then in all, the newest first.
    """
    accepted: dict[str, Sentence] = {}
    rejected: list[Rejected] = []
    moved = n_claims = 0
    by_id = {sentence.id: sentence for sentence in shown}
    for claim in claims:
        n_claims += 1
        found = _find(claim, shown, by_id)
        if isinstance(found, Fault):
            rejected.append(Rejected(claim, found))
            continue
        moved += bool(claim.id) and claim.id not in {sentence.id for sentence in found}
        accepted.update((sentence.id, sentence) for sentence in found)
    return Verified(tuple(accepted.values()), tuple(rejected), n_claims, moved)


def tokens_of(text: str) -> tuple[str, ...]:
    """The tokens by which quotes are compared; quotation marks and the punctuation around the text are left out.

    >>> tokens_of('- He said: “It’s −5°, NOT 1,998.”') == tokens_of("he said: it's -5°, not 1,998")
    False
    >>> tokens_of('He said: “It’s −5°, NOT 1,998.”') == tokens_of("he said: it's -5°, not 1,998")
    True
    """
    tokens = list(_tokens(text))
    while tokens and tokens[-1] in _AROUND:
        tokens.pop()
    while tokens and tokens[0] in _AROUND - {"-"}:
        tokens.pop(0)
    return tuple(tokens)


def _tokens(text: str) -> Iterator[str]:
    for match in _TOKEN.finditer(text):
        if match.lastgroup != "quote":
            yield unicodedata.normalize("NFC", match[0].translate(_SAME).casefold())


@lru_cache(maxsize=20_000)
def _kept(text: str) -> tuple[str, ...]:
    return tokens_of(text)


def _find(claim: Claim, shown: Sequence[Sentence], by_id: Mapping[str, Sentence]) -> tuple[Sentence, ...] | Fault:
    tokens = tokens_of(claim.text)
    if not tokens:
        return Fault.EMPTY
    named = by_id.get(claim.id)
    places = sorted(shown, key=lambda s: (s is not named, s.segment.seq != _seq(claim.id), -s.segment.seq, s.number))
    for sentence in places:
        if _kept(sentence.text) == tokens:
            return (sentence,)
    for sentence in places:
        if run := _run(tokens, sentence, by_id):
            return run
    too_small = False
    for sentence in places:
        whole = _kept(sentence.text)
        if _within(tokens, whole):
            if len(tokens) >= PART_TOKENS and len(tokens) >= PART_SHARE * len(whole):
                return (sentence,)
            too_small = True
    return Fault.PART if too_small else _fault(tokens, named, shown)


def _seq(id_: str) -> int:
    return int(id_[1:].partition(".")[0]) if id_ else -1


def _run(tokens: tuple[str, ...], first: Sentence, by_id: Mapping[str, Sentence]) -> tuple[Sentence, ...]:
    """Whole neighbouring sentences from ``first`` on that the tokens are; empty if they are not."""
    own = _kept(first.text)
    if tokens[: len(own)] != own:
        return ()
    run = [first]
    while following := by_id.get(f"S{first.segment.seq}.{first.number + len(run)}"):
        run.append(following)
        together = tokens_of(first.segment.text[first.start : following.end])
        if len(together) >= len(tokens):
            return tuple(run) if together == tokens else ()
    return ()


def _within(part: tuple[str, ...], whole: tuple[str, ...]) -> bool:
    n = len(part)
    return any(whole[i : i + n] == part for i in range(len(whole) - n + 1))


def _fault(tokens: tuple[str, ...], named: Sentence | None, shown: Sequence[Sentence]) -> Fault:
    """The likeliest reason why tokens are in no sentence: how they differ from the most similar one."""
    wanted = set(tokens)
    everyone = [named] if named else list(shown)
    if not everyone:
        return Fault.INVENTED
    nearest = max(everyone, key=lambda s: len(wanted & set(_kept(s.text))) / max(len(wanted | set(_kept(s.text))), 1))
    own = set(_kept(nearest.text))
    odd = wanted ^ own
    if 2 * len(wanted & own) >= len(wanted | own):
        if any(any(c.isnumeric() for c in token) for token in odd):
            return Fault.NUMBER
        if any(token in _NEGATIONS or token.endswith("n't") for token in odd):
            return Fault.NEGATION
    words, texts = _words(tokens), [_words(_kept(sentence.text)) for sentence in shown]
    for cut in range(2, len(words) - 1):
        if all(any(_within(part, text) for text in texts) for part in (words[:cut], words[cut:])):
            return Fault.SPLICED
    return Fault.INVENTED


def _words(tokens: Sequence[str]) -> tuple[str, ...]:
    return tuple(token for token in tokens if token not in _AROUND)
