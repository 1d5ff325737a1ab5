"""``auto``, the default: everything recall offers that is not plainly unrelated, best first. No LLM call."""

from __future__ import annotations

from memory_os.protocols import MemoryView
from memory_os.types import Choice, Decision, Form, Reason

__all__ = ["AutoController"]


class AutoController:
    """Activates candidates in the order of their fused score until the budget is full.

    :param min_dense: a candidate that shares no word with the query must have at least this cosine to it. For
        MiniLM, unrelated turns lie around 0.0 to 0.2.
    """

    name = "auto"
    needs: tuple[type, ...] = ()

    def __init__(self, *, min_dense: float = 0.15) -> None:
        self.min_dense = min_dense

    def decide(self, query: str, memory: MemoryView, budget: int) -> Decision:
        """One verdict per candidate, in the order of their scores."""
        choices = []
        for candidate in memory.candidates:
            strong = "lexical" in candidate.signals or candidate.signals.get("dense", 0.0) >= self.min_dense
            choices.append(
                Choice(candidate.segment.id, Form.FULL, Reason.RELEVANT)
                if strong
                else Choice(candidate.segment.id, None, Reason.WEAK)
            )
        return Decision(tuple(choices))
