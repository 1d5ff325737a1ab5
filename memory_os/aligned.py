"""Training data from confirmed turns, in the form of ALR² (arXiv 2410.03227): the evidence, then the answer from it.

A turn gives two chat records: ``retrieve``, from sentences of memory and a question to the quotes that it needs, and
``reason``, from quotes and question to the answer. The paper's loss is the sum of two ordinary ones over them, prompts
masked. A record is verified as it will be read; where it does not hold, its turn is refused and counted, never mended.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Any

from memory_os.citations import Citations
from memory_os.errors import ConfigError
from memory_os.evidence import NOT_IN_MEMORY, answer_instruction, evidence_prompt, listed, target_of
from memory_os.lexical import language_of
from memory_os.pack import Frame, Packed, pack
from memory_os.protocols import TokenCounter
from memory_os.quotes import VERSION, Fault, Sentence, numbered, read_claims, spans_text, tokens_of, verify
from memory_os.types import Candidate, Choice, Confirmation, Decision, Form, Message, Reason, Segment, Trace

__all__ = ["STAGES", "AlignedReport", "Exporter", "Refusal", "question_hash"]

STAGES = ("retrieve", "reason")
LEAST = 8
"""No segment with its speaker and its date is listed in fewer tokens."""

_HASH = re.compile(r"[0-9a-f]{64}")


class Refusal(StrEnum):
    """Why a confirmed turn gives no records, besides the verifier's own reasons (``Fault``)."""

    FORGOTTEN = "evidence was forgotten"
    OUTSIDE = "a span lies outside its text"
    UNKNOWN = "no evidence is known"
    TOO_LONG = "the evidence alone is longer than the context"
    UNREADABLE = "the quotes cannot be read back"
    ALTERED = "a quote does not stand in its context to the letter"
    SILENT = "the answer is nothing but citations of what is not shown"


@dataclass(frozen=True, slots=True)
class AlignedReport:
    """What an export wrote, and what it did not.

    :param n_turns: confirmed turns that gave records.
    :param refused: confirmed turns that gave none, by reason.
    :param excluded: confirmed turns whose question is one of the evaluation.
    """

    n_records: int
    n_turns: int
    refused: Mapping[str, int]
    excluded: int


def question_hash(question: str) -> str:
    """What a question is excluded by: SHA-256, in hex, of its text without regard to case and white space.

    >>> question_hash("Where does  Ana live?") == question_hash("where does ana live? ")
    True
    """
    return sha256(" ".join(question.casefold().split()).encode()).hexdigest()


class Exporter:
    """Makes the records of a namespace's confirmed turns.

    :param segments: all of the namespace, in the order of ``seq``.
    :param system: the system prompt, without the instruction to answer from quotes.
    :param context_tokens: most tokens of the sentences that are listed; several lengths take turns.
    :param stages: which records to write, of ``STAGES``.
    :param exclude: questions of evaluations, or their ``question_hash``; no record is made of them.
    """

    def __init__(
        self,
        segments: Iterable[Segment],
        counter: TokenCounter,
        *,
        system: str = "",
        context_tokens: int | Sequence[int] = 4096,
        stages: Sequence[str] = STAGES,
        exclude: Iterable[str] = (),
        split: str = "train",
        seed: int = 0,
    ) -> None:
        self._lengths = (context_tokens,) if isinstance(context_tokens, int) else tuple(context_tokens)
        if not self._lengths or min(self._lengths) < 1:
            raise ConfigError(f"context_tokens must be at least 1, or several such lengths, not {context_tokens!r}")
        if not stages or not set(stages) <= set(STAGES):
            raise ConfigError(f"stages are one or both of {', '.join(STAGES)}, not {stages!r}")
        lines = [line.strip() for line in exclude]
        self._excluded = {line.lower() if _HASH.fullmatch(line.lower()) else question_hash(line) for line in lines}
        self._segments = {segment.id: segment for segment in segments}
        self._counter, self._system, self._stages = counter, system, stages
        self._split, self._seed = split, seed
        self._costs: dict[str, int] = {}
        self._refused = Counter[str]()
        self._n_turns = self._n_records = self._n_excluded = 0

    @property
    def report(self) -> AlignedReport:
        """The account of the lines so far."""
        return AlignedReport(self._n_records, self._n_turns, dict(self._refused), self._n_excluded)

    def lines(self, traces: Iterable[Trace]) -> Iterator[str]:
        """The records of those turns that are confirmed, as lines of JSON."""
        for trace in traces:
            if trace.confirmation is None:
                continue
            if question_hash(trace.query) in self._excluded:
                self._n_excluded += 1
                continue
            records = self._records(trace, trace.confirmation)
            if isinstance(records, str):
                self._refused[str(records)] += 1
                continue
            self._n_turns += 1
            for record in records:
                if record["stage"] in self._stages:
                    self._n_records += 1
                    yield json.dumps(record, ensure_ascii=False) + "\n"

    def _records(self, trace: Trace, told: Confirmation) -> list[dict[str, Any]] | Refusal | Fault:
        query, language = trace.query, language_of(trace.query)
        limit = self._lengths[self._n_turns % len(self._lengths)]
        unanswerable = not told.answer or told.answer in NOT_IN_MEMORY.values()
        quotes = [] if unanswerable else _evidence(trace, told, self._segments)
        if isinstance(quotes, Refusal):
            return quotes
        context = self._context(trace, quotes, limit)
        if isinstance(context, Refusal):
            return context
        shown = [sentence for segment in context for sentence in numbered(segment)]
        prompt, target = evidence_prompt(query, shown), target_of(quotes)
        if fault := _fault(prompt, target, shown):
            return fault

        citable = Citations({quote.segment.seq: quote.segment.id for quote in quotes})
        answer = NOT_IN_MEMORY[language] if unanswerable else "".join(citable.check([told.answer])).strip()
        if not answer:
            return Refusal.SILENT
        packed = self._packed(query, quotes)
        meta = {
            "context_tokens": limit,
            "tokenizer": self._counter.name,
            "evidence_spans": [[quote.segment.id, quote.start, quote.end] for quote in quotes],
            "verifier_version": VERSION,
            "split": self._split,
            "confirmed_by": told.by,
            "trace": trace.id,
            "language": language,
        }
        asked: Message = {"role": "user", "content": prompt}
        return [
            {
                "id": f"{trace.id}:{stage}",
                "stage": stage,
                "messages": [*messages, {"role": "assistant", "content": said}],
                "meta": {**meta, "n_tokens": n_tokens, "source_ids": [segment.id for segment in sources]},
            }
            for stage, messages, said, n_tokens, sources in (
                ("retrieve", (asked,), target, self._tokens(context), context),
                ("reason", packed.messages, answer, packed.account.activated, packed.segments),
            )
        ]

    def _context(self, trace: Trace, quotes: Sequence[Sentence], limit: int) -> Sequence[Segment] | Refusal:
        """The evidence's segments, and as many of the turn's other candidates, then of any before it, as fit."""
        held = {quote.segment.id: quote.segment for quote in quotes}
        if self._tokens(held.values()) > limit:
            return Refusal.TOO_LONG
        ranked = [entry.segment_id for entry in sorted(trace.ledger, key=lambda entry: entry.rank)]
        before = [segment.id for segment in self._segments.values() if segment.seq <= trace.upto]
        random.Random(f"{self._seed} {trace.id}").shuffle(before)
        n_evidence, room = len(held), limit - sum(self._cost(segment) for segment in held.values())
        for id_ in (*ranked, *before):
            if room < LEAST:
                break
            segment = self._segments.get(id_)
            if segment is None or id_ in held or id_ in (trace.query_id, trace.reply_id):
                continue
            # a summary may say in other words what the evidence says, and would be wrong to leave out
            if segment.kind != "summary" and (cost := self._cost(segment)) <= room:
                held[id_] = segment
                room -= cost
        while len(held) > n_evidence and self._tokens(held.values()) > limit:  # costs add up only nearly
            held.popitem()
        return _in_order(held.values())

    def _tokens(self, segments: Iterable[Segment]) -> int:
        return self._counter.count_text(listed(s for segment in _in_order(segments) for s in numbered(segment)))

    def _cost(self, segment: Segment) -> int:
        if segment.id not in self._costs:
            self._costs[segment.id] = self._counter.count_text(listed(numbered(segment)) + "\n")
        return self._costs[segment.id]

    def _packed(self, query: str, quotes: Sequence[Sentence]) -> Packed:
        """The prompt of stage two, made as a turn makes it."""
        spans: dict[str, tuple[tuple[int, int], ...]] = {}
        for quote in quotes:
            spans[quote.segment.id] = (*spans.get(quote.segment.id, ()), (quote.start, quote.end))
        segments = [self._segments[id_] for id_ in spans]
        choices = [
            Choice(s.id, Form.QUOTE, Reason.QUOTED, spans_text(s.text, spans[s.id]), spans[s.id]) for s in segments
        ]
        system = f"{self._system}\n\n{answer_instruction(query)}".strip()
        frame = Frame(system, query, self._counter, sys.maxsize)
        return pack(frame, (), [Candidate(segment, 0.0, {}, 0) for segment in segments], Decision(tuple(choices)))


def _in_order(segments: Iterable[Segment]) -> list[Segment]:
    return sorted(segments, key=lambda segment: segment.seq)


def _evidence(trace: Trace, told: Confirmation, segments: Mapping[str, Segment]) -> list[Sentence] | Refusal:
    """The quotes that the answer follows from, in the order of ``seq``."""
    entries = {entry.segment_id: entry for entry in trace.ledger if entry.spans}
    quoted = [id_ for id_, entry in entries.items() if entry.reason is not Reason.FALLBACK]  # nobody chose those
    quotes: list[Sentence] = []
    for id_ in dict.fromkeys(told.evidence if told.evidence is not None else trace.cited or quoted):
        if id_ not in segments:
            return Refusal.FORGOTTEN
        segment = segments[id_]
        sentences = numbered(segment)
        if id_ not in entries:
            quotes += sentences if told.evidence is not None else ()
            continue
        for start, end in sorted(set(entries[id_].spans)):
            if not 0 <= start < end <= len(segment.text):
                return Refusal.OUTSIDE
            number = sum(sentence.start <= start for sentence in sentences)
            quotes.append(Sentence(segment, number, start, end))
    quotes = [quote for quote in quotes if tokens_of(quote.text)]  # a line of asterisks says nothing
    return sorted(quotes, key=lambda quote: (quote.segment.seq, quote.start)) or Refusal.UNKNOWN


def _fault(prompt: str, target: str, shown: Sequence[Sentence]) -> Refusal | Fault | None:
    """What is wrong with a record, read as a model's answer to its prompt would be."""
    claims = read_claims(target)
    lines = [f"{claim.id}: {claim.text}" for claim in claims or ()]
    if claims is None or ("\n".join(f"- {line}" for line in lines) or "NONE") != target:
        return Refusal.UNREADABLE
    checked = verify(claims, shown)
    if checked.rejected:
        return checked.rejected[0].fault
    context = listed(shown)
    stands = context in prompt and set(lines) <= set(context.split("\n"))
    return None if stands else Refusal.ALTERED
