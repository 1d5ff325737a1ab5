"""The bank as one LLM and one system prompt use it: keys and values come from there, or are computed and kept.

What is in the bank is derived from the records and bounded: whatever is missing is computed when it is needed, and a
turn that finds everything there reads no memory again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

from memory_os.derive import told
from memory_os.errors import ConfigError, LLMError
from memory_os.pack import CachedFrame, cached_line
from memory_os.protocols import KV, Bank, BankStatus, CachingLLM, RecordStore
from memory_os.types import CachedPrompt, Context, Namespace, Segment

__all__ = ["LLMBank", "Layout"]

BATCH_TOKENS = 4096
"""Tokens that are computed before they are durable."""
PAGE = 512

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Layout:
    """How segments stand in a prompt.

    :param name: changes whenever ``line`` gives other text than before.
    :param beginning: a prompt without lines: what stands before them is what they are computed after.
    :param line: the text of a segment.
    """

    name: str
    beginning: CachedPrompt
    line: Callable[[Segment], str]

    @classmethod
    def of_turns(cls, system: str, llm: CachingLLM) -> Self:
        """Of memory in a conversation."""
        return cls("turns 3", CachedFrame(system, "", llm, 0).prompt((), ()), lambda s: f"{cached_line(s)}\n")


class LLMBank:
    """Fills, searches and reads the bank for one LLM and one layout."""

    def __init__(self, store: RecordStore, bank: Bank, llm: CachingLLM, layout: Layout) -> None:
        self._store, self._bank, self._llm, self._layout = store, bank, llm, layout

    @cached_property
    def fingerprint(self) -> str:
        """Of all that the keys and values depend on, and of the layer that is searched.

        :raises CapabilityError: if this model's keys and values cannot be used so.
        """
        model = self._llm.kv_fingerprint(self._layout.beginning)
        return f"{model} {self._layout.name} searched={self._layer}"

    @property
    def _layer(self) -> int:
        chosen = self._bank.options.layer
        return self._llm.search_layer() if chosen is None else chosen

    def _prompt(self, segments: Sequence[Segment]) -> CachedPrompt:
        return replace(self._layout.beginning, lines=tuple(map(self._layout.line, segments)))

    def _cost(self, segment: Segment) -> int:
        return self._llm.count_text(self._layout.line(segment))

    # -- write -----------------------------------------------------------------------------------------------------

    def keep(self, namespace: Namespace, segments: Sequence[Segment]) -> None:
        """Compute and store what is not there of these segments, within the bank's bounds."""
        if not segments:
            return
        there = self._bank.entries(namespace, self.fingerprint)
        try:
            for batch in self._batches([segment for segment in segments if segment.id not in there]):
                self._put(namespace, batch)
        except LLMError as error:  # derived: computed again when it is needed
            log.warning(
                "the bank lacks %d segments: the LLM failed (%s)", len(segments), told(error.__cause__ or error)
            )

    def fill(
        self,
        namespace: Namespace,
        progress: Callable[[int, int], None] | None = None,
        *,
        session: str | None = None,
        only: Callable[[Segment], bool] = lambda _: True,
    ) -> int:
        """Compute the newest segments that the bank has room for, as far as they are not there; how many that were.

        Stopped, it goes on where it was.

        :param progress: called with ``(segments computed, segments to compute)`` after each batch is durable.
        :param session: only those of this session; ``only`` likewise.
        """
        there = self._bank.entries(namespace, self.fingerprint)
        newest = self._newest(namespace, there, session, only)
        todo = [segment for segment in newest if segment.id not in there]
        done = 0
        for batch in self._batches(todo):
            self._put(namespace, batch)
            done += len(batch)
            if progress:
                progress(done, len(todo))
        return done

    def _newest(
        self, namespace: Namespace, there: Mapping[str, int], session: str | None, only: Callable[[Segment], bool]
    ) -> list[Segment]:
        """The newest segments that fit into the bank together, oldest first."""
        room, upto = self._bank.options.max_tokens, self._store.last_seq(namespace)
        newest: list[Segment] = []
        while page := self._store.tail(namespace, PAGE, session=session, upto=upto):
            for segment in filter(only, reversed(page)):
                n_tokens = there.get(segment.id) or self._cost(segment)
                if n_tokens > self._longest:
                    continue
                room -= n_tokens
                if room < 0:
                    return newest[::-1]
                newest.append(segment)
            upto = page[0].seq - 1
        return newest[::-1]

    @cached_property
    def _longest(self) -> int:
        """Tokens of a segment that can stand whole in a context; a longer one is never kept."""
        return self._llm.context_window - self._llm.count_cached(self._layout.beginning)

    def _batches(self, segments: Sequence[Segment]) -> Iterator[list[Segment]]:
        batch: list[Segment] = []
        size = 0
        for segment in segments:
            n_tokens = self._cost(segment)
            if n_tokens > self._longest:
                continue
            if batch and size + n_tokens > BATCH_TOKENS:
                yield batch
                batch, size = [], 0
            batch.append(segment)
            size += n_tokens
        if batch:
            yield batch

    def _put(self, namespace: Namespace, segments: Sequence[Segment]) -> dict[str, KV]:
        surprisal = self._bank.options.policy == "surprisal"
        computed = self._llm.encode_kv(self._prompt(segments), surprisal=surprisal)
        made = {segment.id: kv for segment, kv in zip(segments, computed, strict=True)}
        n_layers = min((len(kv.keys) for kv in made.values()), default=0)
        if not 0 <= self._layer < n_layers:
            raise ConfigError(f"bank: {self._llm.name} has the layers 0 to {n_layers - 1}, not {self._layer}")
        self._bank.put(namespace, self.fingerprint, made, self._layer)
        return made

    # -- read ------------------------------------------------------------------------------------------------------

    def search(self, namespace: Namespace, query: str, k: int) -> list[tuple[str, float]]:
        """The ``k`` segments of the bank to which the query's tokens attend most, with their share of attention."""
        if not self._bank.status(namespace, self.fingerprint).n_segments:
            return []
        return self._bank.search(namespace, self.fingerprint, self._llm.query_keys(query, self._layer), k)

    def fetch(self, namespace: Namespace, prompt: CachedPrompt, segments: Sequence[Segment]) -> tuple[list[KV], int]:
        """Keys and values of a prompt's lines, and how many of these were computed now (and kept).

        :param segments: whose lines they are; one that was cut is computed for this prompt alone.
        """
        whole = [self._layout.line(s) == line for s, line in zip(segments, prompt.lines, strict=True)]
        wanted = [segment for segment, is_whole in zip(segments, whole, strict=True) if is_whole]
        found = self._bank.get(namespace, self.fingerprint, [segment.id for segment in wanted])
        missing = [segment for segment in wanted if segment.id not in found]
        if missing:
            made = self._put(namespace, missing)
            # as it will be read the next time, in the bank's own precision
            found |= made | self._bank.get(namespace, self.fingerprint, list(made))
        cut = [line for line, is_whole in zip(prompt.lines, whole, strict=True) if not is_whole]
        parts = self._llm.encode_kv(replace(prompt, lines=tuple(cut))) if cut else iter(())
        memory = [
            found[segment.id] if is_whole else next(parts) for segment, is_whole in zip(segments, whole, strict=True)
        ]
        return memory, len(missing) + len(cut)

    def generate(
        self, namespace: Namespace, context: Context, *, max_tokens: int, stop: Sequence[str], notes: list[str]
    ) -> Iterator[str]:
        """The reply to a context whose memory enters as keys and values, piece by piece.

        :param notes: where it is said how much was computed.
        """
        assert context.cached is not None
        memory, n_computed = self.fetch(namespace, context.cached, context.segments)
        notes.append(
            f"bank: {sum(len(kv.ids) for kv in memory)} tokens of memory entered as cached keys and values; "
            f"{n_computed} of {len(memory)} segments were computed now"
        )
        yield from self._llm.generate_cached(context.cached, memory, max_tokens=max_tokens, stop=stop)

    def status(self, namespace: Namespace) -> BankStatus:
        """What the namespace has in the bank."""
        return self._bank.status(namespace, self.fingerprint)
