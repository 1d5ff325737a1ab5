"""``alr2``: first the evidence, sentence by sentence, then an answer from it alone (arXiv 2410.03227).

Stage one copies the sentences that a question needs out of what recall finds; each copy is compared with the stored
text, and what does not stand there is rejected. Stage two, the reply, sees the stored sentences and nothing else, and
cites them. A model that is too small to copy is not asked: sentences are then taken by their relevance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from memory_os.controllers.auto import confidence
from memory_os.errors import ConfigError
from memory_os.evidence import NOT_IN_MEMORY, SCHEMA, answer_instruction, evidence_prompt, listed
from memory_os.lexical import idf, language_of, query_terms, terms_of
from memory_os.protocols import LLM, MemoryView, SizedLLM
from memory_os.quotes import Claim, Rejected, Sentence, Verified, numbered, read_claims, spans_text, verify
from memory_os.types import Candidate, Choice, Decision, Form, Reason, Segment
from memory_os.weights import learned

__all__ = ["Alr2Controller", "relevant"]

Extract = Literal["auto", "llm", "free"]
Nothing = Literal["recall", "say"]

ABLE = 1_000_000_000
"""Models of fewer parameters are not asked to copy: SmolLM2-135M invents or cuts most of what it is to copy."""
MANY_INVENTED = 0.5
"""So large a share of rejected claims is answered by a second try."""
RARE = 4
"""A word that stands in at most so many of the segments leads on to them."""
PER_HOP = 12
"""So many segments a hop looks at."""


@dataclass(frozen=True)
class Alr2Controller:
    """ALR²'s controller.

    :param extract: who takes the evidence out: ``"llm"``; ``"free"``, by relevance alone; or ``"auto"``, the LLM where
        there is one of at least a billion parameters, or of a size that is not known.
    :param shortlist: how many of recall's candidates are looked through.
    :param window_tokens: most tokens of sentences that the LLM is shown at once, in its own tokens; more are shown in
        several windows, and their evidence is joined.
    :param extract_tokens: most tokens of the evidence that the LLM copies out of a window.
    :param union: of so many of recall's first candidates the relevant sentences enter too, after what the LLM quoted,
        so that a weak model loses nothing.
    :param nothing: what happens when no evidence survives: ``"recall"``, the candidates enter whole, as recall ranks
        them, or ``"say"``, the reply is that it is not in memory, and the LLM is not asked. Either stands in the trace.
    :param whole: quoted segments enter whole, as in the paper, whose second stage sees the text beside the evidence.
    :param hops: so often what the evidence leads to is looked up in turn, for answers that follow from several places.
    :param flash_turns: the session's latest turns that the second stage sees; by default none, as they are no evidence.
    """

    extract: Extract = "auto"
    shortlist: int = 40
    window_tokens: int = 2048
    extract_tokens: int = 384
    union: int = 8
    nothing: Nothing = "recall"
    whole: bool = False
    hops: int = 0
    flash_turns: int = 0
    name: str = "alr2"

    def __post_init__(self) -> None:
        for option, known in {"extract": ("auto", "llm", "free"), "nothing": ("recall", "say")}.items():
            if getattr(self, option) not in known:
                raise ConfigError(f"alr2: {option} is one of {', '.join(known)}, not {getattr(self, option)!r}")
        for option, least in {
            "shortlist": 1, "window_tokens": 64, "extract_tokens": 16, "union": 0, "hops": 0, "flash_turns": 0,
        }.items():  # fmt: skip
            if getattr(self, option) < least:
                raise ConfigError(f"alr2: {option} must be at least {least}, not {getattr(self, option)}")

    @property
    def needs(self) -> tuple[type, ...]:
        """An LLM, where it is said that one extracts."""
        return (LLM,) if self.extract == "llm" else ()

    # -- flash memory and the reply --------------------------------------------------------------------------------

    @property
    def looks_back(self) -> int:
        """Turns of flash memory."""
        return self.flash_turns

    def flash(self, recent: Sequence[Segment], memory: MemoryView) -> Sequence[Segment]:
        """All of them."""
        return recent

    def instruction(self, query: str) -> str:
        """How to answer, and how to cite."""
        return answer_instruction(query)

    # -- stage one -------------------------------------------------------------------------------------------------

    def decide(self, query: str, memory: MemoryView, budget: int) -> Decision:
        """The evidence, what was quoted by the LLM first."""
        shortlist = list(memory.candidates[: self.shortlist])
        run = _Run(self, query, memory, by_llm=self._by_llm(memory))
        run.extract(shortlist)
        for _ in range(self.hops):
            if not run.hop():
                break
        if not run.found and self.nothing == "say":
            run.notes.append("alr2: no evidence was found; the reply says so, and the LLM was not asked")
            choices = [Choice(candidate.segment.id, None, Reason.NO_HELP) for candidate in memory.offered]
            return Decision(tuple(choices), tuple(run.notes), NOT_IN_MEMORY[language_of(query)])
        if not run.found:
            run.notes.append("alr2: no evidence was found: fallback to plain recall, whole segments")
            run.fall_back()
        elif run.by_llm:
            run.unite(shortlist[: self.union])
        return run.decided()

    def _by_llm(self, memory: MemoryView) -> bool:
        if self.extract != "auto" or memory.llm is None:
            return self.extract == "llm"
        return not isinstance(memory.llm, SizedLLM) or memory.llm.n_parameters() >= ABLE


Quotes = dict[str, tuple[Reason, list[Sentence]]]
"""By segment id, in the order in which they are wanted."""


class _Run:
    """Stage one for one query."""

    def __init__(self, own: Alr2Controller, query: str, memory: MemoryView, *, by_llm: bool) -> None:
        self.own, self.query, self.memory, self.by_llm = own, query, memory, by_llm
        self.found: Quotes = {}
        self.notes: list[str] = []
        self._looked_up = set[str]()
        self._leads = set(query_terms(query))  # words that may lead on

    def extract(self, shortlist: Sequence[Candidate]) -> None:
        """Take the evidence out of the shortlist."""
        if self.by_llm:
            self._lead_on(self._ask(shortlist))
            return
        sure = confidence(shortlist)
        if self.own.nothing == "say" and sure is not None and sure < learned()["abstention"]["threshold"]:
            self.notes.append(f"alr2: the LLM was not asked for evidence, and confidence {sure:.2f} is too low")
            return
        self.notes.append("alr2: the LLM was not asked for evidence: sentences by their relevance")
        self._add(Reason.RELEVANT, self._relevant(shortlist))

    def unite(self, first: Sequence[Candidate]) -> None:
        """Add the relevant sentences of recall's first candidates, behind what there is."""
        self._add(Reason.RELEVANT, self._relevant(first))

    def fall_back(self) -> None:
        """Add every candidate of recall, whole."""
        self._add(Reason.FALLBACK, [s for candidate in self.memory.candidates for s in numbered(candidate.segment)])

    def decided(self) -> Decision:
        """A verdict for each candidate: the quotes in their order, then the others, dropped."""
        by_id = {candidate.segment.id: candidate.segment for candidate in self.memory.offered}
        choices = []
        for id_, (reason, sentences) in self.found.items():
            spans = tuple(sorted((s.start, s.end) for s in sentences))
            text = by_id[id_].text if self.own.whole else spans_text(by_id[id_].text, spans)
            choices.append(Choice(id_, Form.QUOTE, reason, text, spans))
        choices += [Choice(id_, None, Reason.NOT_CHOSEN) for id_ in by_id if id_ not in self.found]
        return Decision(tuple(choices), tuple(self.notes))

    def _add(self, reason: Reason, quotes: Iterable[Sentence]) -> None:
        for sentence in quotes:
            _, held = self.found.setdefault(sentence.segment.id, (reason, []))
            if sentence not in held:
                held.append(sentence)

    def _relevant(self, candidates: Sequence[Candidate]) -> list[Sentence]:
        return relevant(self.query, [numbered(c.segment) for c in candidates], self.memory.similarities)

    # -- by the LLM ------------------------------------------------------------------------------------------------

    def _ask(self, candidates: Sequence[Candidate]) -> list[Sentence]:
        """What the LLM quotes of these, window by window, and stands there."""
        known = [sentence for _, quotes in self.found.values() for sentence in quotes]
        quoted: list[Sentence] = []
        n_claims = n_rejected = 0
        for window in self._windows([candidate.segment for candidate in candidates], known):
            first = self._claims(window, known)
            tries = [first]
            if first.rejected and (not first.accepted or first.hallucination_rate > MANY_INVENTED):
                tries.append(self._claims(window, known, first.rejected))
            for each in tries:
                n_claims, n_rejected = n_claims + each.n_claims, n_rejected + len(each.rejected)
                quoted += each.accepted
        self.notes.append(f"alr2: the LLM quoted {n_claims} sentences, {n_rejected} of them were rejected")
        self._add(Reason.QUOTED, quoted)
        return quoted

    def _claims(
        self, window: Sequence[Sentence], known: Sequence[Sentence], failed: Sequence[Rejected] = ()
    ) -> Verified:
        """What is left of the LLM's claims; the trace says what was rejected, and why."""
        checked = verify((), window)

        def read(answer: str) -> str:
            nonlocal checked
            claims = read_claims(answer)
            if claims is None and answer.strip():  # unreadable: one claim, that stands nowhere
                claims = [Claim("", answer)]
            checked = verify(claims or (), window)
            faults = [f"{each.claim.text[:80]!r} ({each.fault})" for each in checked.rejected]
            verdict = f"{len(checked.accepted)} accepted"
            return f"{verdict}; rejected: {', '.join(faults)}" if faults else verdict

        purpose = f"the evidence in {window[0].id} to {window[-1].id}" + (", once more" if failed else "")
        prompt = evidence_prompt(self.query, window, known=known, failed=failed)
        self.memory.ask(purpose, prompt, max_tokens=self.own.extract_tokens, read=read, schema=SCHEMA)
        return checked

    def _windows(self, segments: Iterable[Segment], known: Sequence[Sentence]) -> Iterator[list[Sentence]]:
        """Their sentences in chronological order, in parts that the LLM can be shown at once."""
        llm = self.memory.llm
        assert llm is not None  # the controller's needs were checked
        around = llm.count_tokens([{"role": "user", "content": evidence_prompt(self.query, (), known=known)}])
        # a second try repeats what failed, which is no longer than an answer
        room = min(self.own.window_tokens, llm.context_window - 2 * self.own.extract_tokens - around)
        window: list[Sentence] = []
        used = 0
        for segment in sorted(segments, key=lambda each: each.seq):
            for sentence in numbered(segment):
                cost = llm.count_text(listed([sentence]) + "\n")
                if window and used + cost > room:
                    yield window
                    window, used = [], 0
                window.append(sentence)
                used += cost
        if window:
            yield window

    # -- hop by hop ------------------------------------------------------------------------------------------------

    def hop(self) -> bool:
        """Look up the rare words of what was found last, or of the question; whether it led to anything."""
        counts = self.memory.frequencies(self._leads - self._looked_up)
        words = {word for word, n in counts.items() if 0 < n <= RARE}
        if not words:
            return False
        self._looked_up |= words
        candidates = self.memory.search(" ".join(sorted(words)), PER_HOP)
        if self.by_llm:
            linked = self._ask([c for c in candidates if c.segment.id not in self.found])
        else:
            sentences = [sentence for candidate in candidates for sentence in numbered(candidate.segment)]
            linked = [sentence for sentence in sentences if not words.isdisjoint(terms_of(sentence.text))]
            self._put_first(linked)
        self._lead_on(linked)
        return bool(linked)

    def _lead_on(self, found: Iterable[Sentence]) -> None:
        self._leads = {term for sentence in found for term in query_terms(sentence.text)}

    def _put_first(self, linked: Iterable[Sentence]) -> None:
        """Links go before what is only relevant, in the order in which they were found."""
        others, self.found = self.found, {k: v for k, v in self.found.items() if v[0] is Reason.LINKED}
        self._add(Reason.LINKED, linked)
        for id_, (reason, quotes) in others.items():
            self.found.setdefault(id_, (reason, quotes))


MARGIN = 0.15
"""Sentences of a segment that are less relevant than its best one by more than this are left out."""


def relevant(
    query: str,
    segments: Sequence[Sequence[Sentence]],
    similarities: Callable[[Sequence[str]], Sequence[float]],
) -> list[Sentence]:
    """Of each segment the most relevant sentence, those nearly as relevant, and the one after each; in the order given.

    The one after often goes on about what the one before names: "Ana keeps bees. She lives in Oslo."

    A sentence's relevance is the cosine of its embedding with the query's, and the share of the query's words that it
    holds, each weighed by its rarity in these sentences.

    :param segments: the sentences of each.
    :param similarities: cosines of texts with the query; of segments of one sentence none is needed.
    """
    held = {sentence.id: set(terms_of(sentence.text)) for sentences in segments for sentence in sentences}
    asked = query_terms(query)
    weights = {term: idf(len(held), sum(term in terms for terms in held.values())) for term in asked}
    total = sum(weights.values()) or 1.0
    several = [sentence for sentences in segments if len(sentences) > 1 for sentence in sentences]
    scores = {
        sentence.id: cosine + sum(weights[term] for term in asked if term in held[sentence.id]) / total
        for sentence, cosine in zip(several, similarities([sentence.text for sentence in several]), strict=True)
    }
    chosen: list[Sentence] = []
    for sentences in segments:
        values = [scores.get(sentence.id, 0.0) for sentence in sentences]
        near = [value >= max(values) - MARGIN for value in values]
        wanted = zip(sentences, near, [False, *near], strict=False)
        chosen += [sentence for sentence, itself, before in wanted if itself or before]
    return chosen
