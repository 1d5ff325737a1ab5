"""What a controller sees and may ask: each thing is done when it is asked for, and noted for the trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from memory_os import turn_summary
from memory_os.archive import Archive, read_archive
from memory_os.ask import reply_to
from memory_os.derive import deferrable
from memory_os.echo import is_echo, repeated_by
from memory_os.errors import CapabilityError, LLMError
from memory_os.fence import inert
from memory_os.pack import date_line, render_line, render_lines
from memory_os.protocols import LLM, State
from memory_os.recall import FAILED
from memory_os.scoring import Scorer
from memory_os.types import Candidate, Certainty, Form, LLMCall, Message, Namespace, Segment
from memory_os.windows import windows

if TYPE_CHECKING:
    from memory_os.turn import Clock, Parts

__all__ = ["View"]


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
        self.parts, self.namespace, self.query = parts, namespace, query
        self.upto, self.clock = upto, clock
        self._breadth = breadth
        self._state = state
        self._epoch = state.epoch
        self._caught_up = False
        self._offered: dict[str, Candidate] = {}
        self._echoes: dict[str, Candidate] = {}
        self._answers: dict[tuple[str, int], str] = {}
        self._summaries: dict[tuple[str, bool], str] = {}

    @property
    def n_archived(self) -> int:
        """How many segments there are outside flash memory, but for those after ``upto``."""
        state = self._state
        return state.n_segments - max(0, state.last_seq - self.upto) - len(self.flash)

    @property
    def offered(self) -> list[Candidate]:
        """Every candidate that the controller was given."""
        return list(self._offered.values())

    @property
    def echoes(self) -> list[Candidate]:
        """What recall found and did not offer, as it repeats what is stored."""
        return [each for id_, each in self._echoes.items() if id_ not in self._offered]

    # -- what there is ---------------------------------------------------------------------------------------------

    @cached_property
    def candidates(self) -> Sequence[Candidate]:
        """What recall offers, best first."""
        found = self._recalled(self.query, self._breadth)
        self._offered = {candidate.segment.id: candidate for candidate in found} | self._offered
        return found

    def search(self, query: str, k: int) -> Sequence[Candidate]:
        """What recall finds for another query, best first."""
        found = self._recalled(query, k)
        self._offered |= {each.segment.id: each for each in found if each.segment.id not in self._offered}
        return found

    def attended(self, k: int) -> Sequence[Candidate]:
        """The segments of the bank to which the query's tokens attend most, best first."""
        if not k or self.parts.llm_bank is None:
            return []
        self.clock.lap("decide")
        outside = {segment.id for segment in self.flash}
        shares = dict(self.parts.llm_bank.search(self.namespace, self.query, k + len(outside)))
        segments = self.parts.store.get(self.namespace, [id_ for id_ in shares if id_ not in outside])
        found = []
        repeated = {id_ for segment in segments.values() for id_ in repeated_by(segment.metadata)}
        stored = self.parts.store.get(self.namespace, repeated)
        inside = {id_ for id_, s in segments.items() if s.seq <= self.upto and not is_echo(s, stored)}
        for id_ in [id_ for id_ in shares if id_ in inside][:k]:
            known = self._offered.get(id_)
            signals = {**(known.signals if known else {}), "attention": round(shares[id_], 4)}
            score = known.score if known else shares[id_]
            found.append(self.offer(segments[id_], score, signals, known.contributions if known else {}))
        self.clock.lap("attend")
        return found

    def frequencies(self, terms: Iterable[str]) -> Mapping[str, int]:
        """In how many segments each term of the lexical index stands."""
        return self.parts.recall.frequencies(self.namespace, terms, upto=self.upto, state=self._ready())

    def similarities(self, texts: Sequence[str]) -> Sequence[float]:
        """How near each text is to the query."""
        if not texts:
            return []
        embedder = self.parts.embedder
        with deferrable() as failures:
            cosines: list[float] = (embedder.embed_documents(texts) @ embedder.embed_query(self.query)).tolist()
            return cosines
        self._note(FAILED.format(failures[0]))
        return [0.0] * len(texts)

    def _recalled(self, query: str, k: int) -> list[Candidate]:
        self.clock.lap("decide")
        recalled = self.parts.recall(
            self.namespace,
            query,
            k=k + len(self.flash),
            upto=self.upto,
            now=self.now,
            per_token=True,
            state=self._ready(),
        )
        self._note(*recalled.notes, *getattr(self.parts.index, "notes", ()))
        in_flash = {segment.id for segment in self.flash}
        found, echoes = (
            [
                Candidate(hit.segment, hit.score, hit.signals, self.parts.price_of(hit.segment), hit.contributions)
                for hit in hits
                if hit.segment.id not in in_flash
            ]
            for hits in (recalled.hits, recalled.echoes)
        )
        self._echoes |= {each.segment.id: each for each in echoes if each.segment.id not in self._echoes}
        self.clock.lap("recall")
        return found

    @cached_property
    def archive(self) -> Archive:
        """Every turn outside flash memory."""
        self.clock.lap("decide")
        flash = [segment.id for segment in self.flash]
        archive = read_archive(
            self.parts.recall, self.namespace, self.query, upto=self.upto, flash=flash, state=self._ready()
        )
        self._note(archive.note, *getattr(self.parts.index, "notes", ()))
        self.clock.lap("recall")
        return archive

    def _note(self, *notes: str) -> None:
        self.notes += [note for note in notes if note and note not in self.notes]

    def _ready(self) -> State:
        """The namespace's state, once the vectors that were pending are made if they are few."""
        parts = self.parts
        if self._state.n_pending and not self._caught_up:
            self._caught_up = True  # the same for all that this query asks
            with deferrable() as failures:  # what there is can still be searched
                parts.catch_up(self.namespace)
            self._state = parts.store.state(self.namespace, parts.embedder.fingerprint)
            if parts.contested(self.namespace, self._state):
                self.notes.append(CONTESTED.format(self._state.n_stale))
            elif self._state.n_pending:
                self.notes.append(
                    _lacking(self._state.n_pending, [*failures, parts.vectors.failure if parts.vectors else ""][0])
                    if not parts.leaves_work
                    else LEFT.format(self._state.n_pending)
                )
        return self._state

    def offer(
        self, segment: Segment, score: float, signals: Mapping[str, float], contributions: Mapping[str, float]
    ) -> Candidate:
        """Make a segment of the archive a candidate."""
        candidate = Candidate(segment, score, signals, self.parts.price_of(segment), contributions)
        self._offered[segment.id] = candidate
        return candidate

    def cost(self, segment: Segment, form: Form, text: str) -> int:
        """Tokens of the segment in the context with this text in place of its own."""
        return self.parts.counter.count_text(render_line(segment, form=form, text=text) + "\n")

    def cost_of_dates(self, segments: Sequence[Segment]) -> int:
        """Tokens of the lines with the dates of these segments."""
        return sum(self.parts.counter.count_text(date + "\n") for date in {date_line(s) for s in segments})

    def windows(self, size: int, overlap: int) -> Iterator[tuple[Segment, ...]]:
        """All that was stored outside flash memory, as runs of neighbouring segments."""
        flash = {segment.id for segment in self.flash}
        stored = self.parts.store.scan(self.namespace)
        seen = takewhile(lambda segment: segment.seq <= self.upto, stored)
        return windows(
            (segment for segment in _without_echoes(seen) if segment.id not in flash and segment.kind != "summary"),
            lambda segment: self._llm.count_text(render_line(segment) + "\n"),
            size,
            overlap,
        )

    # -- what the LLM is asked -------------------------------------------------------------------------------------

    def ask(
        self,
        purpose: str,
        prompt: str,
        *,
        max_tokens: int,
        read: Callable[[str], str],
        schema: Mapping[str, Any] | None = None,
    ) -> str:
        """Ask the LLM and give back its answer as ``read`` reads it."""
        known = (prompt, max_tokens) in self._answers
        answer = self._answer(purpose, prompt, max_tokens, schema)
        verdict = read(answer)
        if not known:
            self._note_call(purpose, verdict, prompt, answer, answer)
        return verdict

    def stem(self, how: str) -> str:
        """How an answer to the query begins."""
        return self._scorer.stem(how, self.ask)

    def certainties(
        self, windows: Sequence[Sequence[Segment]], stem: str, *, with_question: bool
    ) -> Sequence[Certainty]:
        """What the LLM's certainty says of each window."""
        self.clock.lap("decide")
        if self.parts.backlog:
            self.parts.backlog.pause()
        found = self._scorer([self._shown(window) for window in windows], stem, with_question=with_question)
        self.clock.lap("score")
        return found

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(
            self.parts.store,
            self.namespace,
            self._llm,
            self.query,
            epoch=self._epoch,
            controller=self.parts.controller.name,
            notes=self.notes,
        )

    @staticmethod
    def _shown(window: Sequence[Segment]) -> str:
        """A window as it is scored: as it would stand in the context."""
        return render_lines(window)

    def summary(self, segment: Segment, *, by_llm: bool) -> str:
        """A segment's summary, or its own text where that would not be shorter."""
        if (segment.id, by_llm) not in self._summaries:
            self._summaries[segment.id, by_llm] = self._shorter(segment, by_llm)
        return self._summaries[segment.id, by_llm]

    def _shorter(self, segment: Segment, by_llm: bool) -> str:
        if by_llm:
            method = turn_summary.by_llm(self._llm)
            text = self.parts.store.read_summaries(self.namespace, [segment.id], method).get(segment.id)
            if text is None:
                text = self._summarized(segment, method)
        else:
            text = turn_summary.extract(segment.text)
        count = self.parts.counter.count_text
        return text if text and count(text) < count(segment.text) else segment.text

    def _summarized(self, segment: Segment, method: str) -> str:
        purpose = f"a summary of #{segment.seq}"
        prompt = turn_summary.prompt_for(segment.text)
        known = (prompt, turn_summary.MAX_TOKENS) in self._answers
        text = self._answer(purpose, prompt, turn_summary.MAX_TOKENS)
        if not known:
            self._note_call(purpose, "kept" if text else "none came; the text stays", prompt, "", text)
        if text:
            self.parts.store.put_summary(self.namespace, segment.id, method, text)
        return text

    @property
    def _llm(self) -> LLM:
        if self.llm is None:
            raise CapabilityError(self.parts.controller.name, "LLM", "llm='smollm2'")
        return self.llm

    def _answer(self, purpose: str, prompt: str, max_tokens: int, schema: Mapping[str, Any] | None = None) -> str:
        known = self._answers.get((prompt, max_tokens))
        if known is None:
            self.clock.lap("decide")
            if self.parts.backlog:
                self.parts.backlog.pause()
            try:
                known = reply_to(self._llm, prompt, max_tokens=max_tokens, schema=schema)
            except LLMError as error:
                known = ""
                self.notes.append(f"the LLM was asked for {purpose} and failed: {error.problem}")
            self._answers[prompt, max_tokens] = known
            self.clock.lap("ask")
        return known

    def _note_call(self, purpose: str, verdict: str, prompt: str, shown: str, answer: str) -> None:
        messages: list[Message] = [{"role": "user", "content": inert(prompt)}]  # as it was sent
        tokens = self._llm.count_tokens(messages), self._llm.count_text(answer)
        self.calls.append(LLMCall(purpose, verdict, shown, *tokens))


def _without_echoes(segments: Iterable[Segment]) -> Iterator[Segment]:
    """All of a namespace's segments, in the order of ``seq``, but for those that repeat others of them."""
    ids: set[str] = set()
    for segment in segments:
        repeated = repeated_by(segment.metadata)
        if not repeated or not ids.issuperset(repeated):
            yield segment
        ids.add(segment.id)


CONTESTED = (
    "{} segments have vectors by another embedder, with which this store is in use at the same time: they were "
    "searched by their words only; open it with one embedder everywhere"
)


LEFT = (
    "{} segments have no vector of this embedder yet and were searched by their words only; they are left to workers: "
    "memos worker"
)


def _lacking(n: int, failure: str) -> str:
    """What is to be said of segments without a vector."""
    why = f"making them failed ({failure}) and is tried again" if failure else "they are being made in the background"
    return (
        f"{n} segments have no vector of this embedder yet and were searched by their words only; {why}; "
        "all at once: memos doctor --repair"
    )
