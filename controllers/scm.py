"""``scm``: the Self-Controlled Memory controller (arXiv 2304.13343), turn by turn.

1. Is memory needed at all? (Q1)
2. If so, turns are ranked by relevance and recency, and the best are activated.
3. Where they are too long, each is asked about (Q2): left out, activated as its summary, or in full; then fitted.

Both questions are put to the wrapped LLM, or answered without it: Q1 by recall's confidence, Q2 by the query's words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

from memory_os.controllers.auto import confidence
from memory_os.controllers.gates import MAX_TOKENS, coverage, helps_prompt, needed_prompt, read_verdict
from memory_os.errors import ConfigError
from memory_os.protocols import LLM, MemoryView
from memory_os.types import Candidate, Choice, Decision, Form, Reason, Segment
from memory_os.weights import learned

__all__ = ["Gate", "ScmController", "Turn", "fitted"]

Gate = Literal["auto", "llm", "free"]
PAPER: Mapping[str, Any] = {
    "name": "scm-paper", "w_recency": 1.0, "total_limit": 2000, "item_limit": 800, "best_last": False, "gate": "llm",
    "summaries": "llm",
}  # fmt: skip
REPO: Mapping[str, Any] = {
    "name": "scm-repo", "k": 4, "w_recency": 0.0, "best_last": False, "ask_first": False, "gate": "llm",
    "summaries": "llm",
}  # fmt: skip
ASKED = {None: Reason.NO_HELP, Form.SUMMARY: Reason.SUMMARY_ENOUGH, Form.FULL: Reason.RELEVANT}


@dataclass(frozen=True)
class ScmController:
    """SCM's controller. The defaults are the paper's form but for ``w_recency`` and ``best_last``; see the presets.

    :param k: turns to activate.
    :param w_relevance: weight of the cosine between query and turn.
    :param w_recency: weight of ``decay ** age``, the age in turns since the turn was last activated, or said.
    :param decay: of recency, in a turn.
    :param flash_turns: how many of the session's latest turns are flash memory; 0 is the ablation "no flash".
    :param flash_limit: a segment of flash memory longer than this (cl100k_base tokens) enters as its summary.
    :param total_limit: most tokens of activated turns and flash memory together, budget permitting.
    :param item_limit: Q2 is only asked if one activated turn has more tokens than this.
    :param summary_from: segments of more tokens than this have summaries (cl100k_base).
    :param best_last: whether weaker turns are left out before the best one is shortened; not so in the paper's form.
    :param gate: who answers Q1 and Q2: ``"llm"``, ``"free"`` (no LLM call), or ``"auto"``: the LLM where there is one.
    :param summaries: who makes summaries, likewise.
    :param ask_first: whether Q1 is asked; otherwise memory is always consulted.
    :param control: ``False`` is the ablation "no controller": the most similar turns in full until the budget is spent.
    :param activate: ``False`` is the ablation "no activation": flash memory only.
    """

    k: int = 6
    w_relevance: float = 1.0
    w_recency: float = 0.1
    decay: float = 0.995
    flash_turns: int = 1
    flash_limit: int = 500
    total_limit: int = 2500
    item_limit: int = 0
    summary_from: int = 200
    gate: Gate = "auto"
    summaries: Gate = "auto"
    best_last: bool = True
    ask_first: bool = True
    control: bool = True
    activate: bool = True
    name: str = "scm"

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """The paper's values: recency and relevance weigh the same, Q2 from 2,000 tokens with one turn over 800."""
        return cls(**{**PAPER, **changes})

    @classmethod
    def repo(cls, **changes: Any) -> Self:
        """What the released code does: memory is always consulted, recency counts nothing, 4 turns, Q2 from 2,500."""
        return cls(**{**REPO, **changes})

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"scm: k must be at least 1 turn, not {self.k}")
        if not 0.0 < self.decay <= 1.0:
            raise ConfigError(f"scm: decay must be over 0 and at most 1, not {self.decay}")
        if min(self.flash_turns, self.flash_limit, self.total_limit, self.item_limit, self.summary_from) < 0:
            raise ConfigError("scm: flash_turns and the limits must not be negative")
        for option in (self.gate, self.summaries):
            if option not in ("auto", "llm", "free"):
                raise ConfigError(f"scm: gate and summaries are 'auto', 'llm' or 'free', not {option!r}")

    @property
    def needs(self) -> tuple[type, ...]:
        """An LLM, where one is to be asked without fail."""
        return (LLM,) if "llm" in (self.gate, self.summaries) else ()

    # -- flash memory ----------------------------------------------------------------------------------------------

    @property
    def looks_back(self) -> int:
        """Enough segments for so many turns, even where each has several replies."""
        return 4 * self.flash_turns

    def flash(self, recent: Sequence[Segment], memory: MemoryView) -> list[Segment]:
        """The session's latest turns; a long segment as its summary."""
        turns: list[list[Segment]] = []
        for segment in recent:
            if segment.role != "assistant" or not turns:
                turns.append([])
            turns[-1].append(segment)
        kept = [segment for turn in turns[max(0, len(turns) - self.flash_turns) :] for segment in turn]
        return [self._as_flash(segment, memory) for segment in kept]

    def _as_flash(self, segment: Segment, memory: MemoryView) -> Segment:
        if segment.n_tokens <= self.flash_limit:
            return segment
        return segment.summarized(memory.summary(segment, by_llm=self._asks(self.summaries, memory.llm)))

    # -- the decision ----------------------------------------------------------------------------------------------

    def decide(self, query: str, memory: MemoryView, budget: int) -> Decision:
        """Nothing, or the best turns, each in full or as its summary, fitted to the budget."""
        if not self.activate:
            return Decision((), ("scm: activation is turned off",))
        if not memory.n_archived:
            return Decision((), ("scm: there is nothing outside flash memory yet",))
        most = max(self.total_limit - memory.flash_tokens, 0)
        if not self.control:
            similar = self._most_similar(memory, min(budget, most))
            return _decision(similar, memory, "scm: its controller is turned off")
        asks = self._asks(self.gate, memory.llm)
        who = "by the LLM" if asks else "without the LLM"
        if self.ask_first and not self._needed(query, memory, asks):
            return _decision([], memory, f"scm: memory is not needed; judged {who}", Reason.UNRELATED)
        ranked = [self._turn(memory, row, self.w_recency) for row in self._order(memory, self.w_recency)[: 3 * self.k]]
        turns = [turn for turn in ranked if turn.parts][: self.k]
        choices = self._fit(query, memory, turns, budget, most, asks)
        return _decision(choices, memory, f"scm: memory is needed; judged {who}")

    def _fit(
        self, query: str, memory: MemoryView, turns: Sequence[Turn], budget: int, most: int, asks: bool
    ) -> list[Choice]:
        """Q2 where the turns are too long together, and the form of each."""
        room = budget - memory.cost_of_dates([part.segment for turn in turns for part in turn.parts])
        limit = min(room, most)
        ask: Callable[[Turn], Form | None] | None = partial(self._enough, query, memory, asks)
        if (
            max((turn.n_tokens for turn in turns), default=0) <= self.item_limit
        ):  # no turn is long: only the budget counts
            limit, ask = room, None
        cost = partial(self._summary_cost, memory)
        fits = fitted(turns, limit, ask=ask, summary_cost=cost, best_last=self.best_last)
        return [
            choice
            for turn, (form, reason) in zip(turns, fits, strict=True)
            for choice in self._choices(memory, turn, form, reason)
        ]

    def _needed(self, query: str, memory: MemoryView, asks: bool) -> bool:
        """Q1. What cannot be read means yes: memory in vain costs tokens, memory that is missing costs the answer."""
        if asks:
            prompt = needed_prompt(query, "\n".join(f"{segment.who}: {segment.text}" for segment in memory.flash))
            return memory.ask("whether memory is needed", prompt, max_tokens=MAX_TOKENS, read=read_verdict) != "no"
        sure = confidence(memory.candidates)
        return sure is None or sure >= learned()["abstention"]["threshold"]

    def _order(self, memory: MemoryView, w_recency: float) -> list[int]:
        """The rows of the archive, the best first, the earlier of equals first."""
        import numpy as np

        archive = memory.archive
        rank = self.w_relevance * archive.cosine + w_recency * self.decay**archive.age
        order: list[int] = np.lexsort((np.arange(len(rank)), -rank)).tolist()
        return order

    def _turn(self, memory: MemoryView, row: int, w_recency: float) -> Turn:
        archive = memory.archive
        signals = {
            "relevance": round(float(archive.cosine[row]), 4),
            "recency": round(float(self.decay ** archive.age[row]), 4),
        }
        added = {"relevance": self.w_relevance * signals["relevance"], "recency": w_recency * signals["recency"]}
        return Turn([memory.offer(s, sum(added.values()), signals, added) for s in archive.segments(row)])

    def _most_similar(self, memory: MemoryView, limit: int) -> list[Choice]:
        """The ablation: turns in full, by similarity alone, until the next one would be too much."""
        choices: list[Choice] = []
        for row in self._order(memory, 0.0):
            turn = self._turn(memory, row, 0.0)
            if choices and turn.n_tokens > limit:
                break
            limit -= turn.n_tokens
            choices += self._choices(memory, turn, Form.FULL, Reason.RELEVANT)
        return choices

    def _enough(self, query: str, memory: MemoryView, asks: bool, turn: Turn) -> Form | None:
        """Q2: nothing of a turn that does not help, its summary if that helps as well, else all of it."""
        if not asks:
            in_full = coverage(query, turn.text)
            if not in_full:
                return None
            return Form.SUMMARY if coverage(query, self._summary_of(turn, memory)) >= in_full else Form.FULL

        def helps(text: str, what: str) -> str:
            purpose = f"whether {what} {turn.title} helps to answer"
            return memory.ask(purpose, helps_prompt(query, text), max_tokens=MAX_TOKENS, read=read_verdict)

        if helps(turn.text, "all of") == "no":
            return None
        summary = self._summary_of(turn, memory)
        return Form.SUMMARY if summary != turn.text and helps(summary, "the summary of") == "yes" else Form.FULL

    def _summary_of(self, turn: Turn, memory: MemoryView) -> str:
        return "\n".join(self._summary(part.segment, memory) for part in turn.parts)

    def _choices(self, memory: MemoryView, turn: Turn, form: Form | None, reason: Reason) -> list[Choice]:
        """The verdict on each segment of a turn; a segment whose summary is its own text enters in full.

        The longest comes first: if the best turn is too long by itself, that is what the packer cuts.
        """
        choices = []
        for part in sorted(turn.parts, key=lambda part: -part.n_tokens):
            text = self._summary(part.segment, memory) if form is Form.SUMMARY else None
            if text == part.segment.text:
                choices.append(Choice(part.segment.id, Form.FULL, Reason.RELEVANT))
            else:
                choices.append(Choice(part.segment.id, form, reason, text))
        return choices

    def _summary_cost(self, memory: MemoryView, turn: Turn) -> int:
        total = 0
        for part in turn.parts:
            text = self._summary(part.segment, memory)
            own = text == part.segment.text
            total += part.n_tokens if own else memory.cost(part.segment, Form.SUMMARY, text)
        return total

    def _summary(self, segment: Segment, memory: MemoryView) -> str:
        if segment.n_tokens <= self.summary_from:
            return segment.text
        return memory.summary(segment, by_llm=self._asks(self.summaries, memory.llm))

    def wants_summary(self, segment: Segment, llm: LLM | None) -> bool:
        """Whether the LLM is to summarise a new segment, after the reply."""
        return segment.n_tokens > self.summary_from and self._asks(self.summaries, llm)

    @staticmethod
    def _asks(who: Gate, llm: LLM | None) -> bool:
        return who == "llm" or (who == "auto" and llm is not None)


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of the archive as candidates, in the order of ``seq``."""

    parts: list[Candidate]

    @property
    def text(self) -> str:
        """All that was said."""
        return "\n".join(part.segment.text for part in self.parts)

    @property
    def title(self) -> str:
        """How the trace names it."""
        return "#" + "+".join(str(part.segment.seq) for part in self.parts)

    @property
    def n_tokens(self) -> int:
        """What it takes in full."""
        return sum(part.n_tokens for part in self.parts)


def fitted(
    turns: Sequence[Turn],
    limit: int,
    *,
    ask: Callable[[Turn], Form | None] | None,
    summary_cost: Callable[[Turn], int],
    best_last: bool = False,
) -> list[tuple[Form | None, Reason]]:
    """The form of each turn so that all together take at most ``limit`` tokens, and why.

    In full while they fit. Otherwise from the worst to the second best each is asked about (``ask``); then from the
    worst on turns become summaries, and then are left out, until the rest fits. The best turn is shortened with the
    others, or last (``best_last``), and never left out: the packer cuts it if it is too long even so. The released code
    has no such end and loops.

    :param turns: the best first.
    :param ask: Q2; ``None`` where it is not to be asked.
    """
    fits: list[tuple[Form | None, Reason]] = [(Form.FULL, Reason.RELEVANT)] * len(turns)

    def over() -> bool:
        costs = (
            {Form.FULL: turn.n_tokens, None: 0}[form] if form is not Form.SUMMARY else summary_cost(turn)
            for turn, (form, _) in zip(turns, fits, strict=True)
        )
        return sum(costs) > limit

    worst_first = range(len(turns) - 1, -1, -1)
    if ask and over():
        for i in worst_first[:-1]:
            form = ask(turns[i])
            fits[i] = (form, ASKED[form])
    for i in worst_first[:-1] if best_last else worst_first:
        if fits[i][0] is Form.FULL and over():
            fits[i] = (Form.SUMMARY, Reason.SHORTENED)
    for i in worst_first[:-1]:
        if fits[i][0] and over():
            fits[i] = (None, Reason.OVER_BUDGET)
    if best_last and over():
        fits[0] = (Form.SUMMARY, Reason.SHORTENED)
    return fits


def _decision(choices: list[Choice], memory: MemoryView, note: str, others: Reason = Reason.NOT_CHOSEN) -> Decision:
    """The verdicts, wanted ones first; every other candidate that the controller was given is dropped as ``others``."""
    order = sorted(choices, key=lambda choice: choice.form is None)
    named = {choice.segment_id for choice in choices}
    rest = [c for c in memory.offered if c.segment.id not in named]
    rest.sort(key=lambda c: (-c.score, c.segment.seq))
    return Decision((*order, *(Choice(c.segment.id, None, others) for c in rest)), (note,))
