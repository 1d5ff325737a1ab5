"""Echoes: what of a reply repeats what the model was shown from memory, so that memory does not fill up with itself.

A reply is stored as it was said; its metadata then tells which parts of it stood in the context, and in which segments:
``{"derived": {"share": 0.9, "parts": [{"span": [start, end], "of": [ids]}]}}``. A part is

- a run of at least 8 words (or 12 characters of a script without spaces, or a mixture) of one shown text,
- a whole sentence of one, of at least 4 words (or 6 such characters),
- a whole shown text of at least 2 words (or 3), where it is a sentence of the reply or has 4, or
- a copy of the fenced block itself, each line of which comes from a shown text.

Case, punctuation and white space do not count. A reply of which ``MOSTLY`` is derived is an echo: recall offers what it
repeats in its place, as long as all of that is stored. One that adds a statement of its own is none, and is marked
``"adds": true``: 4 words or more on end that are not derived, with one that is new and no phrase of quoting.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import regex

from memory_os.lexical import STOP_WORDS
from memory_os.types import Segment
from memory_os.windows import sentences

__all__ = ["FIELD", "derived", "is_echo", "repeated_by"]

FIELD = "derived"
"""The name in a segment's metadata."""
RUN = 8.0
SENTENCE = 4.0
WHOLE = 2.0
SIGN = RUN / 12
"""What a character of a script without spaces counts, in words."""
MOSTLY = 0.6
"""The share of an echo."""
SEED = 4
MAX_PLACES = 100
"""Of the places where the same four words stand, so many are looked at: a text may be one word a thousand times."""
MAX_PARTS = 500
"""Where there are more, one part stands for all, from the first to the last: metadata has a limit."""

_TOKEN = regex.compile(
    r"(?P<sign>[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*)"
    r"|(?:(?![\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}])[\p{L}\p{M}\p{N}\p{Cf}])+"
)
_BLOCK = regex.compile(
    r"<\s*+memory\b[^<>]*+>(?P<lines>.*?)(?:(?P<close><\s*+/\s*+memory\s*+>)|\Z)", regex.DOTALL | regex.IGNORECASE
)
_HEAD = regex.compile(r"\[[^\[\]\n]{0,30}\]\s*+\Z|(?:\[[^\[\]\n]{0,30}\]\s)?[^:\n]{1,200}:\s")
"""A date, or who said it."""
_SHAPELESS = regex.compile(r"\p{Cf}+")
_QUOTING = frozenset(
    "told tell tells said say says saying mentioned mention know known remember remembered recall recalled memory "
    "noted once earlier before previously conversation wrote written let else anything need help question isn doesn "
    "don didn wasn aren ll ve re t sure yes ok okay well course great "
    "我 你 您 的 是 了 在 记 得 说 过 告 诉 以 前 曾 经 根 据 忆 这 那 吗 呢".split()
)
"""Of the words around a quotation, those that say nothing of their own; stop words do not either."""
_DENYING = frozenset("not no never longer".split())


class _Token(NamedTuple):
    text: str
    start: int
    end: int
    weight: float


class _Shown(NamedTuple):
    """A text that the model was shown.

    :param sentences: where each of at least ``SENTENCE`` words begins and ends, in tokens; and the whole text.
    """

    id: str
    words: tuple[str, ...]
    weights: tuple[float, ...]
    sentences: tuple[tuple[int, int], ...]


def derived(reply: str, shown: Iterable[tuple[Segment, str]]) -> dict[str, Any]:
    """Metadata that says what of a reply repeats the texts that the model was shown; empty where nothing does.

    :param shown: segments with the text that stood in the context; of several that say the same, the first counts.
    """
    tokens = _tokens(reply)
    texts = [_read(segment.id, text) for segment, text in shown]
    parts = sorted([*_blocks(reply, texts), *_runs(tokens, texts), *_short(reply, texts)])
    if not parts:
        return {}
    covered = set(_covered(tokens, parts))
    whole = sum(token.weight for token in tokens)
    share = sum(token.weight for token in covered) / whole if whole else 1.0
    adds = _adds(tokens, covered, {word for text in texts for word in text.words})
    if len(parts) > MAX_PARTS:
        ids = dict.fromkeys(id_ for _, _, of in parts for id_ in of)
        parts = [(parts[0][0], max(end for _, end, _ in parts), tuple(ids))]
    told = [{"span": [start, end], "of": list(of)} for start, end, of in parts]
    return {FIELD: {"share": round(share, 3), "parts": told, **({"adds": True} if adds else {})}}


def repeated_by(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Ids of the segments that an echo repeats; none for a segment that is no echo."""
    told = metadata.get(FIELD)
    try:
        if told is None or not told["share"] >= MOSTLY or told.get("adds"):
            return ()
        return tuple(dict.fromkeys(str(id_) for part in told["parts"] for id_ in part["of"]))
    except (TypeError, KeyError, AttributeError):  # an import, or a caller, may have put anything there
        return ()


def is_echo(segment: Segment, stored: Mapping[str, Segment]) -> bool:
    """Whether recall offers other segments in place of this one: all that it repeats is stored, and came before it.

    :param stored: those that are, by id.
    """
    repeated = repeated_by(segment.metadata)
    return bool(repeated) and all(id_ in stored and stored[id_].seq < segment.seq for id_ in repeated)


def _covered(tokens: Sequence[_Token], parts: Sequence[tuple[int, int, tuple[str, ...]]]) -> Iterator[_Token]:
    """The tokens that lie in a part; both in order."""
    reach = n = 0
    for token in tokens:
        while n < len(parts) and parts[n][0] <= token.start:
            reach = max(reach, parts[n][1])
            n += 1
        if token.end <= reach:
            yield token


def _adds(tokens: Sequence[_Token], covered: Set[_Token], shown: Set[str]) -> bool:
    """Whether the reply says something of its own beside what it repeats."""
    long = 0.0
    new = False
    for token in tokens:
        if token in covered:
            long, new = 0.0, False
            continue
        long += token.weight
        says = token.text in _DENYING or not (token.text in STOP_WORDS or token.text in _QUOTING)
        new = new or (says and token.text not in shown)
        if new and long >= SENTENCE:
            return True
    return False


def _tokens(text: str, start: int = 0) -> list[_Token]:
    """:param start: where the text begins."""
    found = []
    for match in _TOKEN.finditer(text):
        word = match[0]
        if not word.isascii():
            word = _SHAPELESS.sub("", unicodedata.normalize("NFKC", word))
        if word:
            weight = SIGN if match["sign"] else 1.0
            found.append(_Token(word.casefold(), start + match.start(), start + match.end(), weight))
    return found


def _read(id_: str, text: str) -> _Shown:
    words: list[str] = []
    weights: list[float] = []
    ends = []
    for sentence in sentences([text]):
        tokens = _tokens(sentence)
        if sum(token.weight for token in tokens) >= SENTENCE:
            ends.append((len(words), len(words) + len(tokens)))
        words += [token.text for token in tokens]
        weights += [token.weight for token in tokens]
    if sum(weights) >= WHOLE:
        ends.append((0, len(words)))
    return _Shown(id_, tuple(words), tuple(weights), tuple(ends))


def _runs(tokens: Sequence[_Token], texts: Sequence[_Shown]) -> list[tuple[int, int, tuple[str, ...]]]:
    """``(start, end, ids)`` of the longest runs, from the left."""
    words = [token.text for token in tokens]
    seeds: defaultdict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    wanted = {tuple(words[i : i + SEED]) for i in range(len(words) - SEED + 1)}
    for n, text in enumerate(texts):
        for i in range(len(text.words) - SEED + 1):
            if (seed := text.words[i : i + SEED]) in wanted and len(seeds[seed]) < MAX_PLACES:
                seeds[seed].append((n, i))
    found: list[tuple[int, int, tuple[str, ...]]] = []
    at = 0
    while at <= len(words) - SEED:
        length, source = 0, ""
        for n, i in seeds.get(tuple(words[at : at + SEED]), ()):
            run = _common(words, at, texts[n].words, i)
            if run > length and _counts(texts[n], i, i + run):
                length, source = run, texts[n].id
        if length:
            found.append((tokens[at].start, tokens[at + length - 1].end, (source,)))
        at += length or 1
    return found


def _common(words: Sequence[str], at: int, others: Sequence[str], i: int) -> int:
    n = SEED
    while at + n < len(words) and i + n < len(others) and words[at + n] == others[i + n]:
        n += 1
    return n


def _counts(text: _Shown, start: int, end: int) -> bool:
    long = sum(text.weights[start:end]) >= RUN - 1e-6
    return long or any(start <= first and last <= end for first, last in text.sentences)


def _short(reply: str, texts: Sequence[_Shown]) -> Iterator[tuple[int, int, tuple[str, ...]]]:
    """The sentences that are a whole shown text, of too few words for ``_runs``."""
    whole = {text.words: text.id for text in reversed(texts) if len(text.words) < SEED and text.sentences}
    place = 0
    for sentence in sentences([reply] if whole else []):
        tokens = _tokens(sentence, place)
        if id_ := whole.get(tuple(token.text for token in tokens)):
            yield (tokens[0].start, tokens[-1].end, (id_,))
        place += len(sentence)


def _blocks(reply: str, texts: Sequence[_Shown]) -> Iterator[tuple[int, int, tuple[str, ...]]]:
    """Copies of the fenced block, however short its lines, if each of them comes from a shown text."""
    joined = [(text.id, f" {' '.join(text.words)} ") for text in texts]
    for match in _BLOCK.finditer(reply):
        lines = [_words(_HEAD.sub("", line, count=1)) for line in match["lines"].splitlines()[: MAX_PARTS + 1]]
        found = [_source(f" {line} ", joined) for line in lines if line]
        if found and found[-1] is None and match["close"] is None:  # cut off in a word
            found[-1] = _source(f" {lines[-1]}", joined)
        if found and None not in found and len(found) <= MAX_PARTS:
            yield (*match.span(), tuple(id_ for id_ in dict.fromkeys(found) if id_))


def _words(text: str) -> str:
    return " ".join(token.text for token in _tokens(text))


def _source(words: str, texts: Iterable[tuple[str, str]]) -> str | None:
    """Id of the first text with these words in it."""
    return next((id_ for id_, text in texts if words in text), None)
