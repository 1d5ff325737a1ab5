"""``longmem-free``: memory enters as cached keys and values (LongMem, arXiv 2306.07174, without its trained reader).

The frozen model's own attention finds segments, as in the paper: each token of the query looks for the chunks whose
mean key fits it best. What it finds joins what recall finds, and all of it enters as keys and values from the bank, so
that no memory is read a second time. Training-free, and so not called LongMem: the paper's trained gate is in
``adapters.joint``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from memory_os.controllers.auto import AutoController
from memory_os.errors import ConfigError
from memory_os.protocols import CachingLLM, MemoryView
from memory_os.types import Choice, Decision, Form, Reason

__all__ = ["LongMemFreeController"]


@dataclass(frozen=True)
class LongMemFreeController:
    """The bank's controller.

    :param k: how many segments the model's attention may add to recall's; 0 leaves it to recall alone.
    :param place: before which of recall's choices they stand, counted from 0. By measurement they are worth less than
        recall's first (docs/bank.md).
    :param abstain: as of ``AutoController``, which decides about recall's candidates; ``price`` likewise.
    """

    k: int = 2
    place: int = 16
    abstain: float | None = None
    price: float | None = None
    name: str = "longmem-free"

    def __post_init__(self) -> None:
        if self.k < 0 or self.place < 0:
            raise ConfigError(f"longmem-free: k and place must not be negative, not {self.k} and {self.place}")

    @property
    def needs(self) -> tuple[type, ...]:
        """An LLM whose keys and values can be kept."""
        return (CachingLLM,)

    def decide(self, query: str, memory: MemoryView, budget: int) -> Decision:
        """What ``auto`` activates, and what the query's tokens attend to; all of it in the form ``cached``."""
        decision = AutoController(abstain=self.abstain, price=self.price).decide(query, memory, budget)
        chosen = [self._cached(choice) for choice in decision.choices]
        if not any(choice.form for choice in chosen):
            return replace(decision, choices=tuple(chosen))
        attended = memory.attended(self.k)
        recalled = {choice.segment_id for choice in chosen}
        added = [
            Choice(each.segment.id, Form.CACHED, Reason.ATTENDED)
            for each in attended
            if each.segment.id not in recalled
        ]
        place = min(self.place, sum(choice.form is not None for choice in chosen))
        return replace(decision, choices=(*chosen[:place], *added, *chosen[place:]))

    @staticmethod
    def _cached(choice: Choice) -> Choice:
        return choice if choice.form is None else replace(choice, form=Form.CACHED)
