"""``auto``, the default: the most relevant for its price first, until the budget is full. No LLM call."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache

from memory_os.protocols import MemoryView
from memory_os.types import Candidate, Choice, Decision, Form, Reason, Segment
from memory_os.weights import learned

__all__ = ["AutoController", "confidence", "margin", "statement"]

FILLERS = frozenset("a an the just really very so well oh ok okay hey hi yes yeah wow thanks".split())

STANDS_OUT = 10


class AutoController:
    """Activates candidates in the order of relevance per token, each statement once.

    :param abstain: activate nothing when the confidence that anything remembered is about the query is below this;
        0 turns it off. The default lets through 99 of 100 answerable questions of the conversations that it was
        calibrated on.
    :param price: how much a token counts against relevance: 0 is relevance alone. By default as learned.
    """

    name = "auto"
    needs: tuple[type, ...] = ()

    def __init__(self, *, abstain: float | None = None, price: float | None = None) -> None:
        self.abstain = learned()["abstention"]["threshold"] if abstain is None else abstain
        self.price = learned()["price"] if price is None else price

    def decide(self, query: str, memory: MemoryView, budget: int) -> Decision:
        """One verdict per candidate, the most wanted first."""
        wanted = sorted(memory.candidates, key=lambda c: (-self._worth(c), c.segment.seq))
        sure = confidence(memory.candidates)
        if sure is not None and sure < self.abstain:
            choices = tuple(Choice(c.segment.id, None, Reason.UNRELATED) for c in wanted)
            return Decision(choices, (f"nothing was activated: confidence {sure:.2f} is below {self.abstain:.2f}",))
        said = {c.segment.id: statement(c.segment.who, c.segment.text) for c in wanted}
        newest: dict[tuple[str, ...], Segment] = {}
        for candidate in wanted:
            known = newest.setdefault(said[candidate.segment.id], candidate.segment)
            if known.seq < candidate.segment.seq:
                newest[said[candidate.segment.id]] = candidate.segment
        # the newest of several that say the same takes the best place among them
        placed = dict.fromkeys(newest[key].id for key in said.values())
        repeats = [id_ for id_ in said if id_ not in placed]
        ordered = [*placed, *repeats]
        return Decision(
            tuple(
                Choice(id_, None, Reason.REPEATED) if id_ not in placed else Choice(id_, Form.FULL, Reason.RELEVANT)
                for id_ in ordered
            )
        )

    def _worth(self, candidate: Candidate) -> float:
        if not candidate.contributions:  # fused ranks have no price
            return candidate.score
        return candidate.score - self.price * math.log(candidate.n_tokens)


def confidence(candidates: Sequence[Candidate]) -> float | None:
    """How sure it is that something remembered is about the query: a logistic model, in 0 to 1.

    Of the best value of some signals, and of how far the best candidate stands out. ``None`` where the signals that it
    was calibrated on are not there.
    """
    model = learned()["abstention"]["weights"]
    names = [name for name in model if name not in ("constant", "margin")]
    if not candidates or any(name not in candidates[0].signals for name in names):
        return None
    sure = model["constant"] + model["margin"] * margin([c.score for c in candidates])
    sure += sum(model[name] * max(c.signals[name] for c in candidates) for name in names)
    return 1.0 / (1.0 + math.exp(-sure))


def margin(scores: Sequence[float]) -> float:
    """By how much the best score exceeds the tenth; the last where there are fewer.

    >>> margin([1.0, 5.0, 2.0])
    4.0
    """
    ordered = sorted(scores, reverse=True)
    return ordered[0] - ordered[min(STANDS_OUT, len(ordered)) - 1]


@lru_cache(maxsize=20_000)
def statement(who: str, text: str) -> tuple[str, ...]:
    """What two segments share that say the same: the speaker, and the words in order but for case and fillers.

    No other word is left out: "I like him" and "I like her" are two statements, as are "by bus" and "not by bus".
    """
    words = re.findall(r"[\w'’]+", text.casefold())
    return (who, *([word for word in words if word not in FILLERS] or words))
