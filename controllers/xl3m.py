"""``xl3m``: what enters the context is what makes the LLM certain of its answer (arXiv 2405.17755).

Each segment is read together with the question and the beginning of an answer (the stem). The less the entropy of the
next token, the more relevant the segment; the best enter, in chronological order.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Self

from memory_os.certainty import SCORES, Score, relevance, stands_out
from memory_os.errors import ConfigError
from memory_os.protocols import MemoryView, QuestionScoringLLM, ScoringLLM
from memory_os.types import Certainty, Choice, Decision, Form, Reason, Segment

__all__ = ["Xl3mController"]

Mode = Literal["rerank", "scan"]
Stem = Literal["auto", "rules", "llm", "none"]
Window = tuple[Segment, ...]

BATCH = 16
"""Windows that are scored together, and are in memory at once."""
WRAPPER = 16
"""Tokens that a window takes in the context besides its own: a speaker's name, a date."""
SHOWN = 16
"""So many windows that were not chosen, the best of them, stand in the ledger of a scan."""


@dataclass(frozen=True)
class Xl3mController:
    """XL3M's controller.

    :param mode: ``"scan"`` reads everything that is stored, cut into windows, as the paper does; ``"rerank"`` reads
        the best candidates of recall, each by itself.
    :param score: ``"entropy"`` is the paper's; see ``certainty.relevance`` for the others.
    :param k: how many segments (windows, in a scan) to activate; by default as many as the budget has room for.
    :param shortlist: how many of recall's candidates are read; the others come after them, as recall ranks them.
    :param segment_tokens: most tokens of a window, in the LLM's tokens; fewer where the budget has no room for them.
    :param overlap: most tokens that neighbouring windows share, so that what stands at a cut stands whole in one; by
        default an eighth of ``segment_tokens``.
    :param stem: who makes the beginning of the answer: ``"rules"``, ``"llm"``, ``"auto"`` (the LLM where the rules do
        not know the question's form), or ``"none"``, with which entropy was no better than chance.
    """

    mode: Mode = "rerank"
    score: Score = "entropy"
    k: int | None = None
    shortlist: int = 40
    segment_tokens: int = 512
    overlap: int | None = None
    stem: Stem = "auto"
    name: str = "xl3m"

    @classmethod
    def scan(cls, **changes: Any) -> Self:
        """The paper's form: everything is read."""
        return cls(**{"mode": "scan", "name": "xl3m-scan", **changes})

    def __post_init__(self) -> None:
        choices = {"mode": ("rerank", "scan"), "score": SCORES, "stem": ("auto", "rules", "llm", "none")}
        for option, known in choices.items():
            if getattr(self, option) not in known:
                raise ConfigError(f"xl3m: {option} is one of {', '.join(known)}, not {getattr(self, option)!r}")
        if self.k is not None and self.k < 1:
            raise ConfigError(f"xl3m: k must be at least 1 segment, not {self.k}")
        if self.shortlist < 1 or self.segment_tokens < 1:
            raise ConfigError("xl3m: shortlist and segment_tokens must be at least 1")
        if self.overlap is not None and not 0 <= self.overlap < self.segment_tokens:
            raise ConfigError(
                f"xl3m: overlap must be at least 0 and less than segment_tokens ({self.segment_tokens}), "
                f"not {self.overlap}"
            )

    @property
    def needs(self) -> tuple[type, ...]:
        """An LLM that shows its probabilities."""
        return (ScoringLLM,) if self.score == "entropy" else (QuestionScoringLLM,)

    def decide(self, query: str, memory: MemoryView, budget: int) -> Decision:
        """The segments after which the LLM is most certain."""
        return self._scan(memory, budget) if self.mode == "scan" else self._rerank(memory)

    # -- rerank ----------------------------------------------------------------------------------------------------

    def _rerank(self, memory: MemoryView) -> Decision:
        shortlist, rest = memory.candidates[: self.shortlist], memory.candidates[self.shortlist :]
        if not shortlist:
            return Decision((), ("xl3m: there is nothing to read",))
        read = self._read([(candidate.segment,) for candidate in shortlist], memory, self._stem(memory))
        values = relevance(read, self.score)
        for candidate, certainty, value in zip(shortlist, read, values, strict=True):
            signals = {"recall": round(candidate.score, 4), **_signals(certainty)}
            memory.offer(candidate.segment, value, signals, _contributions(certainty, self.score))
        order = sorted(range(len(shortlist)), key=lambda i: (-values[i], shortlist[i].segment.seq))
        wanted = [shortlist[i].segment.id for i in order] + [candidate.segment.id for candidate in rest]
        choices = [Choice(id_, Form.FULL, Reason.RELEVANT) for id_ in wanted[: self.k]]
        choices += [Choice(id_, None, Reason.NOT_CHOSEN) for id_ in wanted[len(choices) :]]
        return Decision(tuple(choices), self._notes(values, f"{len(shortlist)} of recall's candidates"))

    # -- scan ------------------------------------------------------------------------------------------------------

    def _scan(self, memory: MemoryView, budget: int) -> Decision:
        size = max(min(self.segment_tokens, budget - WRAPPER), 1)
        k = self.k or max(budget // (size + WRAPPER), 1)
        best: list[tuple[float, int, Window, Certainty]] = []
        n, low, high = 0, math.inf, -math.inf
        overlap = self.segment_tokens // 8 if self.overlap is None else self.overlap
        windows = memory.windows(size, min(overlap, size - 1))
        stem: str | None = None
        while batch := list(islice(windows, BATCH)):
            stem = self._stem(memory) if stem is None else stem
            read = self._read(batch, memory, stem)
            for window, certainty, value in zip(batch, read, relevance(read, self.score), strict=True):
                # the number is unique: of equals the earlier one is better, and windows are never compared
                heapq.heappush(best, (value, -n, window, certainty))
                n, low, high = n + 1, min(low, value), max(high, value)
            best = heapq.nlargest(k + SHOWN, best)
            heapq.heapify(best)
        if not n:
            return Decision((), ("xl3m: there is nothing to read",))
        choices: dict[str, Choice] = {}
        for place, (value, number, window, certainty) in enumerate(sorted(best, reverse=True)):
            form, reason = (Form.FULL, Reason.RELEVANT) if place < k else (None, Reason.NOT_CHOSEN)
            for segment in window:  # what windows share is taken once, as part of the best
                if segment.id not in choices:
                    signals = {**_signals(certainty), "window": 1.0 - number}
                    memory.offer(segment, value, signals, _contributions(certainty, self.score))
                    choices[segment.id] = Choice(segment.id, form, reason)
        return Decision(tuple(choices.values()), self._notes((low, high)[:n], f"all {n} windows"))

    def _stem(self, memory: MemoryView) -> str:
        """How the answer begins; the question's likelihood does not depend on it."""
        return "" if self.score == "question_nll" else memory.stem(self.stem)

    def _read(self, windows: Sequence[Window], memory: MemoryView, stem: str) -> Sequence[Certainty]:
        return memory.certainties(windows, stem, with_question=self.score != "entropy")

    def _notes(self, values: Sequence[float], what: str) -> tuple[str, ...]:
        note = f"xl3m: {what} were read, ranked by {self.score}"
        if stands_out(values):
            return (note,)
        return (note, "xl3m: the LLM is equally certain after each of them, the earliest were taken: confidence=low")


def _signals(certainty: Certainty) -> dict[str, float]:
    """What the ledger shows, in nats; an entropy that is only a lower bound is called so."""
    name = "entropy" if certainty.complete else "entropy_topn"
    signals = {name: round(certainty.entropy, 4)}
    if certainty.question_nll is not None:
        signals["question_nll"] = round(certainty.question_nll, 4)
    return signals


def _contributions(certainty: Certainty, score: Score) -> Mapping[str, float]:
    signals = _signals(certainty)
    used = {"entropy": ("entropy", "entropy_topn"), "question_nll": ("question_nll",), "hybrid": tuple(signals)}[score]
    return {name: -value for name, value in signals.items() if name in used}
