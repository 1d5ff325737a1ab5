"""Labelled examples by the thousand: those nearest to a text stand before it when an LLM is asked for its label.

LongMem's memory-augmented in-context learning (arXiv 2306.07174) for a model that is not trained for it: examples are
kept as keys and values, so that a query reads none of them again. They are found by what they say, not by attention.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from memory_os.bank import Layout, LLMBank
from memory_os.derive import deferrable
from memory_os.errors import BudgetError, CapabilityError, ConfigError, InvalidInputError
from memory_os.ingest import check_text
from memory_os.protocols import KV, Bank, CachingLLM
from memory_os.turn import Parts
from memory_os.types import CachedPrompt, Namespace, NewSegment, Segment

__all__ = ["Examples", "Prediction"]

BEGINNING = CachedPrompt(system="", opening="", lines=(), messages=(), plain=True)
LAYOUT = Layout("examples 1", BEGINNING, lambda segment: f"{segment.text}\n\n")
CONTENT_FREE = "N/A"
"""In place of a text, it shows which label is likely whatever the text (Zhao et al., arXiv 2102.09690)."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What an LLM takes a text for.

    :param label: the likeliest; of equals the one that was named first.
    :param log_probs: of each label, nats; among the labels, so that their probabilities add up to 1.
    :param examples: what stood before the text, in the order of the prompt.
    :param n_tokens: of the whole prompt, those of the examples included.
    """

    label: str
    log_probs: dict[str, float]
    examples: tuple[Segment, ...]
    n_tokens: int


class Examples:
    """Labelled examples of one task, in one namespace: stored as notes, in a session named after the task.

    Give them a namespace of their own: they share the bank's bounds with whatever else is in it.

    :param input_name: what a text is called in the prompt, such as ``"Review"``.
    :param label_name: what its label is called, such as ``"Sentiment"``.
    :param labels: all that there are, in the words that the LLM is to say.
    :param k: most examples that stand before a text.
    :raises ConfigError: for names or labels that cannot be used.
    :raises CapabilityError: if the LLM's keys and values cannot be kept, or none was named.
    """

    def __init__(
        self, parts: Parts, namespace: Namespace, input_name: str, label_name: str, *, labels: Sequence[str], k: int
    ) -> None:
        for name in (input_name, label_name, *labels):
            if name != name.strip() or len(name.splitlines()) != 1:
                raise ConfigError(f"a name or label is one line without blanks around it, not {name!r}")
        if isinstance(labels, str) or len(labels) < 2 or len(set(labels)) < len(labels):
            raise ConfigError(f"name at least two labels, each once, not {labels!r}")
        if k < 0:
            raise ConfigError(f"k must not be negative: {k}")
        if not isinstance(parts.llm, CachingLLM) or parts.bank is None:
            raise CapabilityError("examples", "CachingLLM", 'llm="smollm2"')
        self.labels, self.k = tuple(labels), k
        self.session = f"examples: {input_name} / {label_name}"
        self._parts, self._namespace = parts, namespace
        self._names = input_name, label_name
        self._llm: CachingLLM = parts.llm
        self._kept: Bank = parts.bank

    # -- write -----------------------------------------------------------------------------------------------------

    def add(self, pairs: Iterable[tuple[str, str]]) -> list[Segment]:
        """Store texts with their labels, all or none; gives back those that were not stored before.

        :raises InvalidInputError: for a label that was not named, or a text that cannot be stored; nothing is stored.
        """
        stored = self._parts.store.append(self._namespace, [self._segment(text, label) for text, label in pairs])
        with deferrable():
            self._parts.catch_up(self._namespace, stored)
        self._parts.keep_to_retention()
        return stored

    def _segment(self, text: str, label: str) -> NewSegment:
        if label not in self.labels:
            raise InvalidInputError(f"unknown label {label!r}; the labels are {', '.join(self.labels)}")
        rendered = f"{self._asking(text)} {label}"
        digest = hashlib.sha256(json.dumps([self.session, rendered], ensure_ascii=False).encode()).hexdigest()
        return NewSegment(rendered, self.session, kind="note", metadata={"label": label}, key=f"example {digest[:40]}")

    def _asking(self, text: str) -> str:
        """A text up to where its label comes next."""
        input_name, label_name = self._names
        return f"{input_name}: {check_text(text).strip()}\n{label_name}:"

    def fill(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Compute keys and values of the newest examples that the bank has room for; how many were computed.

        ``classify`` does so for what it needs; this is so that it need not. Stopped, it goes on where it was.

        :param progress: called with ``(examples computed, examples to compute)`` after each batch is durable.
        :raises LLMError: if the model fails; what it computed before is kept.
        """
        return self._bank.fill(self._namespace, progress, session=self.session, only=self._is_example)

    # -- read ------------------------------------------------------------------------------------------------------

    def classify(self, text: str, *, budget: int | None = None, calibrate: bool = True) -> Prediction:
        """The likeliest label of a text after the ``k`` examples nearest to it; after none where there are none.

        :param budget: most tokens of the prompt; by default what the context window leaves to the longest label. Of
            the ``k`` nearest those enter that fit, the nearest first.
        :param calibrate: count what a label has gained over its likelihood after a text that says nothing. After 20
            cached examples SmolLM2 is then right more often (SST-2: 78 to 82 of a hundred); after few it need not be.
        :raises InvalidInputError: for a text that cannot be stored either.
        :raises BudgetError: if the text alone is over the budget.
        :raises CapabilityError: if this model's keys and values cannot be used so.
        :raises LLMError: if the model fails.
        """
        options = [f" {label}" for label in self.labels]
        window = self._llm.context_window - max(map(self._llm.count_text, options))
        limit = window if budget is None else min(budget, window)
        asked = [self._asking(text), *([self._asking(CONTENT_FREE)] if calibrate else ())]
        room = limit - max(self._llm.count_cached(self._prompt((), asking)) for asking in asked)
        if room < 0:
            raise BudgetError(limit, limit - room)
        chosen = []
        for segment in self._nearest(text.strip()):
            if self._price(segment) <= room:
                room -= self._price(segment)
                chosen.append(segment)
        chosen.sort(key=lambda segment: segment.seq)
        prompt, *free = [self._prompt(chosen, asking) for asking in asked]
        memory = self._cached(chosen)
        likely = self._llm.continuations(prompt, memory, options)
        for each in free:
            whatever = self._llm.continuations(each, memory, options)
            likely = [own - after_nothing for own, after_nothing in zip(likely, whatever, strict=True)]
        among = math.log(sum(math.exp(each - max(likely)) for each in likely)) + max(likely)
        log_probs = {label: each - among for label, each in zip(self.labels, likely, strict=True)}
        label = max(self.labels, key=log_probs.__getitem__)
        return Prediction(label, log_probs, tuple(chosen), self._llm.count_cached(prompt))

    def _nearest(self, text: str) -> list[Segment]:
        """The ``k`` examples nearest to a text, best first."""
        store, index, embedder = self._parts.store, self._parts.index, self._parts.embedder
        if not self.k:
            return []
        self._parts.catch_up(self._namespace)
        vector, n = embedder.embed_query(text), self.k
        while True:  # the index knows no sessions: it is asked for more where others stand between
            found = index.search(self._namespace, vector, n)
            segments = store.get(self._namespace, [id_ for id_, _ in found])
            own = [segments[id_] for id_, _ in found if id_ in segments and self._is_example(segments[id_])]
            if len(own) >= self.k or len(found) < n:
                return own[: self.k]
            n *= 4

    def _is_example(self, segment: Segment) -> bool:
        is_ours = segment.session == self.session and segment.kind == "note"
        return is_ours and segment.metadata.get("label") in self.labels

    @cached_property
    def _bank(self) -> LLMBank:
        return LLMBank(self._parts.store, self._kept, self._llm, LAYOUT)

    def _prompt(self, segments: Sequence[Segment], asking: str) -> CachedPrompt:
        lines = tuple(map(LAYOUT.line, segments))
        return CachedPrompt("", "", lines, ({"role": "user", "content": asking},), plain=True)

    def _cached(self, segments: Sequence[Segment]) -> list[KV]:
        """Keys and values of the examples; those that were not there are computed now, and kept."""
        return self._bank.fetch(self._namespace, self._prompt(segments, ""), segments)[0]

    def _price(self, segment: Segment) -> int:
        return self._llm.count_text(LAYOUT.line(segment))
