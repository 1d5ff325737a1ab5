"""Scores by an LLM's certainty, each computed once: kept under a digest of model, question, stem and text.

A scan that is interrupted goes on where it was, because what was scored is durable batch by batch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence

from memory_os import stem as stems
from memory_os.certainty import certainty_of
from memory_os.errors import CapabilityError, ConfigError, LLMError, MemoryOSError
from memory_os.protocols import LLM, QuestionScoringLLM, RecordStore, ScoringLLM
from memory_os.types import Certainty, Namespace
from memory_os.windows import sentences, windows, within

__all__ = ["STEMS", "Scorer"]

VERSION = 1
"""Of what is kept; older scores are not used."""
BATCH = 16
"""Texts that are scored before their scores are durable."""
STEMS = ("auto", "rules", "llm", "none")
ROOM = 128
"""Tokens of the context window that are left to the stem and what surrounds text and question."""


class Scorer:
    """What one query makes of texts.

    :param epoch: of the namespace when the texts were read: once anything was forgotten, nothing more is kept.
    :param controller: who asks, for errors.
    :param notes: where the trace's notes go.
    """

    def __init__(
        self,
        store: RecordStore,
        namespace: Namespace,
        llm: LLM,
        query: str,
        *,
        epoch: int,
        controller: str,
        notes: list[str],
    ) -> None:
        if not isinstance(llm, ScoringLLM):
            raise CapabilityError(controller, "ScoringLLM", "HuggingFaceLLM")
        self._store, self._namespace, self._llm = store, namespace, llm
        self._epoch, self._controller, self._query, self._notes = epoch, controller, query, notes
        self.n_scored = 0
        """Texts that were read by the LLM; the others' scores were known."""

    def stem(self, how: str, ask: Callable[..., str]) -> str:
        """How an answer begins; noted. One that the LLM made is kept, so that every later score rests on the same.

        :param ask: ``MemoryView.ask``.
        :raises ConfigError: for an unknown way.
        """
        if how not in STEMS:
            raise ConfigError(f"a stem is made by one of {', '.join(STEMS)}, not {how!r}")
        made, by = None, "by rules"
        if how in ("auto", "rules"):
            made = stems.by_rules(self._query)
        if made is None and how in ("auto", "llm"):
            made, by = self._stem_by_llm(ask), "by the LLM"
        if made:
            self._notes.append(f'the answer begins, {by}: "{made}"')
        elif how != "none":
            self._notes.append("no beginning of an answer could be made: confidence=low")
        return made or ""

    def _stem_by_llm(self, ask: Callable[..., str]) -> str:
        key = self._key("stem", stems.VERSION)
        known = self._store.read_scores(self._namespace, [key]).get(key)
        if known is None:
            known = ask(
                "how the answer begins",
                stems.prompt_for(self._query),
                max_tokens=stems.MAX_TOKENS,
                read=lambda answer: stems.read_stem(answer, self._query),
            )
            if known:  # what a model that failed did not say is asked again
                self._store.put_scores(self._namespace, {key: known}, epoch=self._epoch)
        return str(known)

    def __call__(self, texts: Sequence[str], stem: str, *, with_question: bool) -> list[Certainty]:
        """The certainty of each text; one that is too long for the model is scored by its best part.

        :raises CapabilityError: if the LLM cannot tell how likely the question is, and that is asked for.
        :raises LLMError: if the model fails; what it scored before is kept.
        """
        if with_question and not isinstance(self._llm, QuestionScoringLLM):
            raise CapabilityError(self._controller, "QuestionScoringLLM", "HuggingFaceLLM")
        parts = [self._fitting(text) for text in texts]
        flat = list(dict.fromkeys(part for own in parts for part in own))
        found: dict[str, Certainty] = {}
        for start in range(0, len(flat), BATCH):
            found |= self._scored(flat[start : start + BATCH], stem, with_question)
        return [_best([found[part] for part in own]) for own in parts]

    def _fitting(self, text: str) -> list[str]:
        limit = max(self._llm.context_window - self._llm.count_text(self._query) - ROOM, ROOM)
        if len(text.encode()) <= limit or self._llm.count_text(text) <= limit:  # no token is shorter than a byte
            return [text]
        pieces = (piece for each in sentences([text]) for piece in within(each, self._llm.count_text, limit))
        return ["".join(run) for run in windows(pieces, self._llm.count_text, limit, 0)]

    def _scored(self, texts: Sequence[str], stem: str, with_question: bool) -> dict[str, Certainty]:
        keys = {text: self._key("certainty", stem, text) for text in texts}
        known = self._store.read_scores(self._namespace, list(keys.values()))
        found = {text: Certainty(**known[key]) for text, key in keys.items() if key in known}
        found = {text: each for text, each in found.items() if each.question_nll is not None or not with_question}
        missing = [text for text in texts if text not in found]
        if missing:
            made = self._read(missing, stem, with_question)
            values = {keys[text]: _as_json(each) for text, each in made.items()}
            self._store.put_scores(self._namespace, values, epoch=self._epoch)
            found |= made
            self.n_scored += len(made)
        return found

    def _read(self, texts: Sequence[str], stem: str, with_question: bool) -> dict[str, Certainty]:
        llm = self._llm
        assert isinstance(llm, ScoringLLM)
        try:
            if with_question:
                assert isinstance(llm, QuestionScoringLLM)
                readings = llm.read_question(texts, self._query, stem)
            else:
                readings = llm.read(texts, self._query, stem)
            made = {text: certainty_of(reading) for text, reading in zip(texts, readings, strict=True)}
        except MemoryOSError:
            raise
        except Exception as error:  # whatever a foreign LLM raises becomes one typed error
            raise LLMError(llm.name, f"{type(error).__name__}: {error}") from error
        if not all(math.isfinite(each.entropy) and math.isfinite(each.question_nll or 0.0) for each in made.values()):
            raise LLMError(llm.name, "its probabilities are not numbers; load it with another dtype, such as float32")
        return made

    def _key(self, *what: object) -> str:
        assert isinstance(self._llm, ScoringLLM)
        content = [VERSION, self._llm.fingerprint(), self._query, *what]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:40]


def _as_json(each: Certainty) -> dict[str, object]:
    return {"entropy": each.entropy, "complete": each.complete, "question_nll": each.question_nll}


def _best(parts: Sequence[Certainty]) -> Certainty:
    likelihoods = [part.question_nll for part in parts if part.question_nll is not None]
    return Certainty(
        min(part.entropy for part in parts), all(part.complete for part in parts), min(likelihoods, default=None)
    )
