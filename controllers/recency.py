"""``recency``: the newest candidates first, whatever they say. The baseline that every controller must beat."""

from __future__ import annotations

from memory_os.protocols import MemoryView
from memory_os.types import Choice, Decision, Form, Reason

__all__ = ["RecencyController"]


class RecencyController:
    """Activates candidates from the newest to the oldest until the budget is full."""

    name = "recency"
    needs: tuple[type, ...] = ()

    def decide(self, query: str, memory: MemoryView, budget: int) -> Decision:
        """One verdict per candidate, the newest first."""
        newest_first = sorted(memory.candidates, key=lambda candidate: -candidate.segment.seq)
        return Decision(tuple(Choice(c.segment.id, Form.FULL, Reason.RECENT) for c in newest_first))
