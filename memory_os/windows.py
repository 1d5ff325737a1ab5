"""Cutting text into overlapping segments of bounded length, never inside a sentence where that can be helped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

__all__ = ["sentences", "windows", "within"]

T = TypeVar("T")

MAX_SENTENCE_CHARS = 2000
"""A sentence that is longer is cut: at the end of a line, else at a clause, else between words, else anywhere."""

# after a stop and the quotation marks behind it, but not after a title or an initial; and at the end of a paragraph
_END = re.compile(
    r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\b[A-Z])[.!?][”’\"')\]]*\s+|[。！？][”’」』]*\s*|\n[^\S\n]*\n\s*"
)
_CLAUSES = (re.compile(r"\n\s*"), re.compile(r"[,;:，；：、]\s*"), re.compile(r"\s+"))


def sentences(blocks: Iterable[str]) -> Iterator[str]:
    """The sentences of a text that comes in blocks of any size; together they are the text.

    >>> list(sentences(["Mr. Fox r", "an. “Stop!” he said."]))
    ['Mr. Fox ran. ', '“Stop!” ', 'he said.']
    """
    left = ""
    for block in blocks:
        left += block
        start = 0
        # what stands in the last characters may go on in the next block
        for match in _END.finditer(left):
            if match.end() >= len(left) - 1:
                break
            yield from _cut(left[start : match.end()])
            start = match.end()
        left = left[start:]
        while len(left) > 2 * MAX_SENTENCE_CHARS:
            yield left[: (end := _clause_end(left))]
            left = left[end:]
    start = 0
    for match in _END.finditer(left):
        yield from _cut(left[start : match.end()])
        start = match.end()
    yield from _cut(left[start:])


def _cut(sentence: str) -> Iterator[str]:
    while len(sentence) > MAX_SENTENCE_CHARS:
        yield sentence[: (end := _clause_end(sentence))]
        sentence = sentence[end:]
    if sentence:
        yield sentence


def _clause_end(sentence: str, limit: int = MAX_SENTENCE_CHARS) -> int:
    """Where to cut a sentence of more than ``limit`` characters: in the second half of what they allow."""
    for separator in _CLAUSES:
        ends = [match.end() for match in separator.finditer(sentence, limit // 2, limit)]
        if ends:
            return ends[-1]
    return limit


def within(sentence: str, count: Callable[[str], int], limit: int) -> Iterator[str]:
    """A sentence in pieces of at most ``limit`` tokens, cut as a long one is; together they are the sentence.

    >>> list(within("one two, three", lambda text: len(text.split()), 2))
    ['one two, ', 'three']
    """
    n = count(sentence)
    if n <= limit or len(sentence) < 2:
        yield sentence
        return
    most = min(max(len(sentence) * limit // n, 1), len(sentence) - 1)
    end = _clause_end(sentence, most)
    yield from within(sentence[:end], count, limit)
    yield from within(sentence[end:], count, limit)


def windows(items: Iterable[T], cost: Callable[[T], int], size: int, overlap: int) -> Iterator[tuple[T, ...]]:
    """Runs of neighbouring items of at most ``size`` tokens, each beginning with the last items of the one before.

    An item that is longer is a run of its own.

    :param overlap: most tokens that two runs share.

    >>> list(windows([3, 3, 2, 2, 9, 1], lambda item: item, 6, 2))
    [(3, 3), (2, 2), (9,), (1,)]
    """
    run: list[tuple[T, int]] = []
    for item in items:
        tokens = cost(item)
        if run and sum(n for _, n in run) + tokens > size:
            yield tuple(each for each, _ in run)
            run = _carried(run, min(overlap, max(size - tokens, 0)))
        run.append((item, tokens))
    if run:
        yield tuple(each for each, _ in run)


def _carried(run: list[tuple[T, int]], limit: int) -> list[tuple[T, int]]:
    """The last items of a run, but never all of it, of at most ``limit`` tokens."""
    carried: list[tuple[T, int]] = []
    for item, tokens in reversed(run[1:]):
        if tokens > limit:
            break
        limit -= tokens
        carried.insert(0, (item, tokens))
    return carried
