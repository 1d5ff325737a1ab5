"""What a controller sees and may ask: each thing is done when it is asked for, and noted for the trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING

from memory_os import turn_summary
from memory_os.archive import Archive, read_archive
from memory_os.ask import reply_to
from memory_os.derive import catch_up
from memory_os.errors import CapabilityError, LLMError
from memory_os.pack import date_line, render_line
from memory_os.protocols import LLM, State
from memory_os.types import Candidate, Form, LLMCall, Message, Namespace, Segment

if TYPE_CHECKING:
    from memory_os.turn import Clock, Parts

__all__ = ["View"]

INLINE_PENDING = 512
"""Up to so many missing vectors are made before recall; with more, the trace says how many are missing."""


class View:
    """``MemoryView`` of one query.

    :param upto: only segments with ``seq <= upto`` are seen.
    :param breadth: how many candidates recall offers.
    """

    def __init__(
        self,
        parts: Parts,
        namespace: Namespace,
        query: str,
        *,
        upto: int,
        now: datetime,
        breadth: int,
        state: State,
        clock: Clock,
    ) -> None:
        self.llm = parts.llm
        self.now = now
        self.flash: tuple[Segment, ...] = ()
        self.flash_tokens = 0
        self.notes: list[str] = []
        self.calls: list[LLMCall] = []
        self._parts, self._namespace, self._query = parts, namespace, query
        self._upto, self._breadth, self._clock = upto, breadth, clock
        self._state = state
        self._offered: dict[str, Candidate] = {}
        self._answers: dict[tuple[str, int], str] = {}
        self._summaries: dict[tuple[str, bool], str] = {}

    @property
    def n_archived(self) -> int:
        """How many segments there are outside flash memory, but for those after ``upto``."""
        state = self._state
        return state.n_segments - max(0, state.last_seq - self._upto) - len(self.flash)

    @property
    def offered(self) -> list[Candidate]:
        """Every candidate that the controller was given."""
        return list(self._offered.values())

    # -- what there is ---------------------------------------------------------------------------------------------

    @cached_property
    def candidates(self) -> Sequence[Candidate]:
        """What recall offers, best first."""
        self._clock.lap("decide")
        recalled = self._parts.recall(
            self._namespace,
            self._query,
            k=self._breadth + len(self.flash),
            upto=self._upto,
            now=self.now,
            per_token=True,
            state=self._ready(),
        )
        self.notes += recalled.notes
        in_flash = {segment.id for segment in self.flash}
        found = [
            Candidate(hit.segment, hit.score, hit.signals, self._parts.price_of(hit.segment), hit.contributions)
            for hit in recalled.hits
            if hit.segment.id not in in_flash
        ]
        self._offered = {candidate.segment.id: candidate for candidate in found} | self._offered
        self._clock.lap("recall")
        return found

    @cached_property
    def archive(self) -> Archive:
        """Every turn outside flash memory."""
        self._clock.lap("decide")
        flash = [segment.id for segment in self.flash]
        archive = read_archive(
            self._parts.recall, self._namespace, self._query, upto=self._upto, flash=flash, state=self._ready()
        )
        self._clock.lap("recall")
        return archive

    def _ready(self) -> State:
        """The namespace's state with the vectors made that were pending, if they are few."""
        parts, n_pending = self._parts, self._state.n_pending
        if 0 < n_pending <= INLINE_PENDING:
            catch_up(parts.store, parts.embedder, self._namespace)
            self._state = parts.store.state(self._namespace, parts.embedder.fingerprint)
        elif n_pending:
            note = f"{n_pending} segments have no vector yet and were searched by their words only; run: memos doctor"
            if note not in self.notes:
                self.notes.append(note)
        return self._state

    def offer(
        self, segment: Segment, score: float, signals: Mapping[str, float], contributions: Mapping[str, float]
    ) -> Candidate:
        """Make a segment of the archive a candidate."""
        candidate = Candidate(segment, score, signals, self._parts.price_of(segment), contributions)
        self._offered[segment.id] = candidate
        return candidate

    def cost(self, segment: Segment, form: Form, text: str) -> int:
        """Tokens of the segment in the context with this text in place of its own."""
        return self._parts.counter.count_text(render_line(segment, form=form, text=text) + "\n")

    def cost_of_dates(self, segments: Sequence[Segment]) -> int:
        """Tokens of the lines with the dates of these segments."""
        return sum(self._parts.counter.count_text(date + "\n") for date in {date_line(s) for s in segments})

    # -- what the LLM is asked -------------------------------------------------------------------------------------

    def ask(self, purpose: str, prompt: str, *, max_tokens: int, read: Callable[[str], str]) -> str:
        """Ask the LLM and give back its answer as ``read`` reads it."""
        known = (prompt, max_tokens) in self._answers
        answer = self._answer(purpose, prompt, max_tokens)
        verdict = read(answer)
        if not known:
            self._note_call(purpose, verdict, prompt, answer, answer)
        return verdict

    def summary(self, segment: Segment, *, by_llm: bool) -> str:
        """A segment's summary, or its own text where that would not be shorter."""
        if (segment.id, by_llm) not in self._summaries:
            self._summaries[segment.id, by_llm] = self._shorter(segment, by_llm)
        return self._summaries[segment.id, by_llm]

    def _shorter(self, segment: Segment, by_llm: bool) -> str:
        if by_llm:
            method = turn_summary.by_llm(self._llm)
            text = self._parts.store.read_summaries(self._namespace, [segment.id], method).get(segment.id)
            if text is None:
                text = self._summarized(segment, method)
        else:
            text = turn_summary.extract(segment.text)
        count = self._parts.counter.count_text
        return text if text and count(text) < count(segment.text) else segment.text

    def _summarized(self, segment: Segment, method: str) -> str:
        purpose = f"a summary of #{segment.seq}"
        prompt = turn_summary.prompt_for(segment.text)
        known = (prompt, turn_summary.MAX_TOKENS) in self._answers
        text = self._answer(purpose, prompt, turn_summary.MAX_TOKENS)
        if not known:
            self._note_call(purpose, "kept" if text else "none came; the text stays", prompt, "", text)
        if text:
            self._parts.store.put_summary(self._namespace, segment.id, method, text)
        return text

    @property
    def _llm(self) -> LLM:
        if self.llm is None:
            raise CapabilityError(self._parts.controller.name, "LLM", "llm='smollm2'")
        return self.llm

    def _answer(self, purpose: str, prompt: str, max_tokens: int) -> str:
        known = self._answers.get((prompt, max_tokens))
        if known is None:
            self._clock.lap("decide")
            if self._parts.backlog:
                self._parts.backlog.pause()
            try:
                known = reply_to(self._llm, prompt, max_tokens=max_tokens)
            except LLMError as error:
                known = ""
                self.notes.append(f"the LLM was asked for {purpose} and failed: {error.problem}")
            self._answers[prompt, max_tokens] = known
            self._clock.lap("ask")
        return known

    def _note_call(self, purpose: str, verdict: str, prompt: str, shown: str, answer: str) -> None:
        messages: list[Message] = [{"role": "user", "content": prompt}]
        tokens = self._llm.count_tokens(messages), self._llm.count_text(answer)
        self.calls.append(LLMCall(purpose, verdict, shown, *tokens))
