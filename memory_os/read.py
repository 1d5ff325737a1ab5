"""Reading a document of any size for one question: XL3M over a file instead of the archive.

The file is streamed: sentences become windows, each is scored by the LLM's certainty, and only the best are held. What
was scored is kept, so that a scan that was stopped goes on where it was. The document itself is not stored.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from io import SEEK_END
from itertools import groupby
from pathlib import PurePath
from typing import IO

from memory_os.errors import InvalidInputError, LLMError
from memory_os.ingest import check_utf8
from memory_os.pack import Frame, render_line
from memory_os.turn import Clock, Parts, compose
from memory_os.types import Candidate, Certainty, Choice, Context, Decision, Namespace, Outcome, Reason, Reply, Segment
from memory_os.view import View
from memory_os.windows import sentences, windows, within

__all__ = ["Progress", "read_document"]

BLOCK_CHARS = 1 << 13

Progress = Callable[[int, int], None]
"""Called with the bytes that were read of the document, and all of its bytes."""


def read_document(
    parts: Parts,
    namespace: Namespace,
    document: IO[bytes],
    question: str,
    *,
    name: str,
    when: datetime,
    budget: int,
    progress: Progress | None = None,
) -> Reply:
    """Answer a question about a document; nothing is stored but scores.

    :param parts: whose controller decides by ``MemoryView.windows``, and whose LLM scores and answers.
    :param document: seekable; UTF-8.
    :param budget: most tokens of the prompt.
    :raises InvalidInputError: for a document that is empty or not text.
    :raises BudgetError: if the fixed parts of the prompt are over the budget; nothing was read.
    :raises LLMError: if the model fails; what it scored before is kept.
    """
    llm = parts.llm
    assert llm is not None  # the controller needs one
    limit = min(budget, llm.context_window - parts.options.reply_tokens)
    frame = Frame(parts.options.system, question, parts.counter, limit, parts.options.reply_tokens)
    frame.check()
    if not document.seekable():
        raise InvalidInputError("it can be read only once; save it as a file first", source=name)
    document.seek(0)
    check_utf8(document, name)
    memory = DocumentView(parts, namespace, document, question, name=name, when=when, progress=progress)
    room = frame.room(())
    with memory.clock as clock:
        decision = parts.controller.decide(question, memory, room)
        clock.lap("decide")
        if not memory.offered:
            raise InvalidInputError("there is nothing in it to read", source=name)
        candidates, decided = passages(memory.offered, decision, memory.price, room)
        reply = _answered(parts, compose(memory, frame, candidates, decided), clock)
        clock.result(reply.trace)
    return reply


def _answered(parts: Parts, context: Context, clock: Clock) -> Reply:
    llm = parts.llm
    assert llm is not None
    try:
        text = "".join(llm.generate(context.messages, max_tokens=parts.options.reply_tokens))
    except Exception as error:  # whatever a foreign LLM raises becomes one typed error
        problem = error.problem if isinstance(error, LLMError) else f"{type(error).__name__}: {error}"
        raise LLMError(llm.name, problem) from error
    clock.lap("generate")
    trace = replace(context.trace, outcome=Outcome.ANSWERED, timings_ms=clock.timings)
    return Reply(text, None, replace(context, trace=trace), trace)


class DocumentView(View):
    """``MemoryView`` of one document: its sentences are the segments, and nothing else is there."""

    def __init__(
        self,
        parts: Parts,
        namespace: Namespace,
        document: IO[bytes],
        question: str,
        *,
        name: str,
        when: datetime,
        progress: Progress | None,
    ) -> None:
        state = parts.store.state(namespace, parts.embedder.fingerprint)
        now = datetime.now(UTC)
        super().__init__(
            parts, namespace, question, upto=0, now=now, breadth=0, state=state, clock=parts.clock("read", namespace)
        )
        self._document, self._name, self._when, self._progress = document, name, when, progress
        self._total = document.seek(0, SEEK_END)

    @property
    def candidates(self) -> Sequence[Candidate]:
        """None: nothing is recalled."""
        return ()

    def offer(
        self, segment: Segment, score: float, signals: Mapping[str, float], contributions: Mapping[str, float]
    ) -> Candidate:
        """Make a sentence a candidate. It enters as part of a passage, which has the price."""
        candidate = self._offered[segment.id] = Candidate(segment, score, signals, 0, contributions)
        return candidate

    def price(self, passage: Segment) -> int:
        """Tokens of a passage in the context; not kept, as what stands in a file may change."""
        return self.parts.counter.count_text(render_line(passage) + "\n")

    def windows(self, size: int, overlap: int) -> Iterator[tuple[Segment, ...]]:
        """The document's sentences, as overlapping runs; one that is longer than a run is cut."""
        count = self._llm.count_text
        return windows(self._sentences(size), lambda sentence: count(sentence.text), size, overlap)

    def _sentences(self, size: int) -> Iterator[Segment]:
        start = 0
        pieces = (piece for each in sentences(self._blocks()) for piece in within(each, self._llm.count_text, size))
        for number, text in enumerate(pieces, start=1):
            end = start + len(text)
            if number == 1 and not text.strip():  # white space before anything; between sentences it belongs to them
                start = end
                continue
            yield Segment(
                id=f"{self._name}:{start}-{end}",
                seq=number,
                namespace=self.namespace,
                session="",
                role="user",
                speaker=PurePath(self._name).name,
                kind="document",
                text=text,
                created_at=self._when,
                n_tokens=0,
                source=self._name,
                offset=(start, end),
            )
            start = end

    def _blocks(self) -> Iterator[str]:
        document = self._document
        document.seek(0)
        text = codecs.getreader("utf-8-sig")(document)
        while block := text.read(BLOCK_CHARS, BLOCK_CHARS):
            yield block

    def certainties(
        self, windows: Sequence[Sequence[Segment]], stem: str, *, with_question: bool
    ) -> Sequence[Certainty]:
        """What the LLM's certainty says of each window; tells how far the document was read."""
        found = super().certainties(windows, stem, with_question=with_question)
        if self._progress:
            self._progress(self._document.tell(), self._total)
        return found

    @staticmethod
    def _shown(window: Sequence[Segment]) -> str:
        """The text alone, so that a file's name and date do not change its scores."""
        return "".join(segment.text for segment in window).strip()


def passages(
    offered: Sequence[Candidate], decision: Decision, price: Callable[[Segment], int], room: int
) -> tuple[list[Candidate], Decision]:
    """Runs of neighbouring sentences of one verdict, each as one candidate with the best of its scores.

    Of the wanted ones only those that fit together are joined: a longer passage would be cut by the packer, and what
    was found may stand at its end.

    :param room: tokens for all passages.
    """
    verdicts = {choice.segment_id: choice for choice in _fitting(offered, decision, price, room)}
    rank = {choice.segment_id: place for place, choice in enumerate(decision.choices)}
    joined: list[tuple[int, Candidate, Choice]] = []
    for run in _runs(offered, lambda each: (verdicts[each.segment.id].form, verdicts[each.segment.id].reason)):
        best = min(run, key=lambda candidate: rank[candidate.segment.id])
        passage = _joined([candidate.segment for candidate in run])
        choice = replace(verdicts[best.segment.id], segment_id=passage.id)
        joined.append((rank[best.segment.id], replace(best, segment=passage, n_tokens=price(passage)), choice))
    joined.sort(key=lambda each: each[0])
    return [each[1] for each in joined], Decision(tuple(each[2] for each in joined), decision.notes)


def _fitting(
    offered: Sequence[Candidate], decision: Decision, price: Callable[[Segment], int], room: int
) -> Iterator[Choice]:
    """The verdicts, with windows that do not fit any more dropped; the best is kept."""
    by_id = {candidate.segment.id: candidate for candidate in offered}
    wanted = [by_id[choice.segment_id] for choice in decision.choices if choice.form]
    over: set[str] = set()
    for number, (_, window) in enumerate(groupby(wanted, key=lambda candidate: candidate.signals.get("window"))):
        own = list(window)
        cost = sum(price(_joined([each.segment for each in run])) for run in _runs(own, lambda _: None))
        if cost <= room or not number:
            room -= cost
        else:
            over.update(candidate.segment.id for candidate in own)
    for choice in decision.choices:
        yield replace(choice, form=None, reason=Reason.OVER_BUDGET) if choice.segment_id in over else choice


def _runs(candidates: Sequence[Candidate], verdict: Callable[[Candidate], object]) -> Iterator[list[Candidate]]:
    """Neighbouring sentences of one verdict, in the order of the document."""
    in_order = sorted(candidates, key=lambda candidate: candidate.segment.seq)
    for _, group in groupby(enumerate(in_order), key=lambda pair: (pair[1].segment.seq - pair[0], verdict(pair[1]))):
        yield [candidate for _, candidate in group]


def _joined(run: Sequence[Segment]) -> Segment:
    start, end = (run[0].offset or (0, 0))[0], (run[-1].offset or (0, 0))[1]
    text = "".join(sentence.text for sentence in run).strip()
    return replace(run[0], id=f"{run[0].source}:{start}-{end}", text=text, offset=(start, end))
