"""Echoes: what of a reply repeats what the model was shown from memory, so that memory does not fill up with itself.

A reply is stored as it was said; its metadata then tells which parts of it stood in the context, and in which segments:
``{"derived": {"share": 0.9, "parts": [{"span": [start, end], "of": [ids]}]}}``. A part is

- a run of at least 8 words (or 12 characters of a script without spaces, or a mixture) of one shown text,
- a whole sentence of one, of at least 4 words (or 6 such characters), or
- a copy of the fenced block itself.

Case, punctuation and white space do not count. A reply of which ``MOSTLY`` is derived is an echo: recall offers what it
repeats in its place, as long as all of that is stored.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import regex

from memory_os.types import Segment
from memory_os.windows import sentences

__all__ = ["FIELD", "derived", "is_echo", "repeated_by"]

FIELD = "derived"
"""The name in a segment's metadata."""
RUN = 8.0
SENTENCE = 4.0
SIGN = RUN / 12
"""What a character of a script without spaces counts, in words."""
MOSTLY = 0.6
"""A share so high leaves no room for a statement of its own beside what is repeated: at most 5 words to 8."""
SEED = 4
MAX_PLACES = 100
"""Of the places where the same four words stand, so many are looked at: a text may be one word a thousand times."""
MAX_PARTS = 500
"""Where there are more, one part stands for all, from the first to the last: metadata has a limit."""

_TOKEN = regex.compile(
    r"(?P<sign>[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*)"
    r"|(?:(?![\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}])[\p{L}\p{M}\p{N}\p{Cf}])+"
)
_BLOCK = regex.compile(r"<\s*memory\b[^>]*>.*?(?:<\s*/\s*memory\s*>|\Z)", regex.DOTALL | regex.IGNORECASE)
_SHAPELESS = regex.compile(r"\p{Cf}+")


class _Token(NamedTuple):
    text: str
    start: int
    end: int
    weight: float


class _Shown(NamedTuple):
    """A text that the model was shown.

    :param ends: where each sentence of at least ``SENTENCE`` words begins and ends, in tokens.
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
    parts = sorted([*_blocks(reply, texts), *_runs(tokens, texts)])
    if not parts:
        return {}
    whole = sum(token.weight for token in tokens)
    share = sum(token.weight for token in _covered(tokens, parts)) / whole if whole else 1.0
    if len(parts) > MAX_PARTS:
        ids = dict.fromkeys(id_ for _, _, of in parts for id_ in of)
        parts = [(parts[0][0], max(end for _, end, _ in parts), tuple(ids))]
    told = [{"span": [start, end], "of": list(of)} for start, end, of in parts]
    return {FIELD: {"share": round(share, 3), "parts": told}}


def repeated_by(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Ids of the segments that an echo repeats; none for a segment that is no echo."""
    told = metadata.get(FIELD)
    try:
        if told is None or not told["share"] >= MOSTLY:
            return ()
        return tuple(dict.fromkeys(str(id_) for part in told["parts"] for id_ in part["of"]))
    except (TypeError, KeyError):  # an import, or a caller, may have put anything there
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


def _tokens(text: str) -> list[_Token]:
    found = []
    for match in _TOKEN.finditer(text):
        word = _SHAPELESS.sub("", unicodedata.normalize("NFKC", match[0])).casefold()
        if word:
            found.append(_Token(word, match.start(), match.end(), SIGN if match["sign"] else 1.0))
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


def _blocks(reply: str, texts: Sequence[_Shown]) -> list[tuple[int, int, tuple[str, ...]]]:
    """Copies of the fenced block, with the segments that stand in them, however short."""
    found = []
    for match in _BLOCK.finditer(reply):
        inside = " ".join(["", *(token.text for token in _tokens(match[0])), ""])
        ids = [text.id for text in texts if text.words and f" {' '.join(text.words)} " in inside]
        found.append((*match.span(), tuple(dict.fromkeys(ids))))
    return found
