"""A worker: takes derived work from the store's queue, has it made, and stores it, until there is none or it is told.

What it has claimed and not stored when it ends, however it ends, is anybody's again. Vectors are made by a pool, one
batch behind the other; summaries by the LLM between them.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import count, groupby
from threading import Event
from typing import TYPE_CHECKING, NamedTuple

from memory_os import turn_summary
from memory_os.backlog import STEP
from memory_os.derive import embedded_text, failure_of, told
from memory_os.errors import ConfigError, EmbedderError, LLMError, MemoryOSError
from memory_os.protocols import LLM, Embedder, EmbedderPool, ItemStore, Job, RecordStore, WorkQueue, vectors_of
from memory_os.types import Namespace, Segment

if TYPE_CHECKING:
    from tenacity import RetryCallState

    from memory_os.protocols import Matrix

__all__ = ["Inline", "Worked", "Worker"]

ROUND = 32
"""So many batches of segments' vectors are made, at most, before those of items and a summary have their turn."""
MOST_TEXTS = 10_000
POLL_S = 1.0
LOOK_S, LOOKS = 30.0, 2
"""After so many looks, so far apart, that found no vector of another embedder, a worker makes none anew any more.

Another worker's claims may hide some from the first look. What comes later is being made by a process with that
embedder: each would make anew what the other made.
"""
TRIES = 5
"""So often in a row something is tried, where the worker is not to go on for ever."""
MOST_WAIT_S = 30.0
ASK_AGAIN_S = 600.0
"""So long after its last failure the LLM is asked again for what it failed at, and for anything after 5 in a row."""

log = logging.getLogger(__name__)


class Worked(NamedTuple):
    """What a worker has done: vectors made and stored, summaries likewise, seconds, and what failed at last."""

    vectors: int
    summaries: int
    seconds: float
    failed: int = 0


class Inline:
    """``EmbedderPool`` of this process alone."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    def embed(self, batches: Iterable[Sequence[str]]) -> Iterator[tuple[Matrix, list[bytes] | None]]:
        """One batch after the other."""
        return (vectors_of(self._embedder, texts) for texts in batches)

    def close(self) -> None:
        """There is nothing to end."""


class Worker:
    """One worker on a store's queue.

    :param fingerprint: of the embedder whose vectors the pool makes.
    :param llm: makes summaries; without one those that are listed stay so.
    :param batch: how many texts are embedded at a time.
    :param only: do nothing of other namespaces.
    :param progress: called with ``(vectors, summaries, done a second)`` whenever some are durable.
    :raises ConfigError: for a batch that cannot be.
    """

    def __init__(
        self,
        queue: WorkQueue,
        store: RecordStore,
        items: ItemStore | None,
        pool: EmbedderPool,
        fingerprint: str,
        *,
        llm: LLM | None = None,
        batch: int = STEP,
        only: Namespace | None = None,
        progress: Callable[[int, int, float], None] | None = None,
    ) -> None:
        if not (isinstance(batch, int) and 1 <= batch <= MOST_TEXTS):
            raise ConfigError(f"a batch has from 1 to {MOST_TEXTS} texts, a whole number, not {batch!r}")
        self._queue, self._store, self._items, self._pool, self._llm = queue, store, items, pool, llm
        self._fingerprint, self._batch, self._only, self._progress = fingerprint, batch, only, progress
        self._shift = ExitStack()
        self._number: int | None = None
        self._n_vectors = self._n_summaries = self._n_failed = 0
        self._per_second, self._last = 0.0, 0.0
        self._look_at, self._empty_looks, self._n_ended = 0.0, 0, 0
        self._refused: list[Job] = []  # summaries that the LLM failed at: claimed, so that nobody tries them meanwhile
        self._n_in_a_row, self._ask_at = 0, 0.0

    def run(self, stop: Event, *, until_idle: bool) -> Worked:
        """Work until ``stop`` is set, after which what is under way is finished and stored.

        Where the store or the embedder fails, what was claimed is given up, and it is tried again after a pause.

        :param until_idle: also stop where nothing is left that nobody is at; what fails 5 times in a row is then raised
            (otherwise it is logged, and tried for ever).
        :raises ConfigError: for an embedder that cannot be made where it is to work.
        :raises StoreError: if the store fails.
        :raises EmbedderError: if the embedder does.
        """
        from tenacity import (
            Retrying,
            retry_if_not_exception_type,
            sleep_using_event,
            stop_after_attempt,
            stop_never,
            stop_when_event_set,
            wait_exponential,
        )

        trying = Retrying(
            retry=retry_if_not_exception_type((ConfigError, KeyboardInterrupt)),
            wait=wait_exponential(multiplier=0.5, max=MOST_WAIT_S),
            sleep=sleep_using_event(stop),
            stop=stop_when_event_set(stop) | (stop_after_attempt(TRIES) if until_idle else stop_never),
            before_sleep=_tell,
            reraise=True,
        )
        began = self._last = time.perf_counter()
        with self._shift:
            while not stop.is_set():
                if trying(self._round, stop):
                    continue
                if until_idle:
                    break
                stop.wait(POLL_S)
                self._last = time.perf_counter()
        self._number = None
        return Worked(self._n_vectors, self._n_summaries, time.perf_counter() - began, self._n_failed)

    def _round(self, stop: Event) -> int:
        """Some batches of vectors and a summary; how much was done."""
        try:
            if self._number is None:
                self._number = self._shift.enter_context(self._queue.shift(f"{socket.gethostname()}:{os.getpid()}"))
            tasks = ("vector", "item") if self._items else ("vector",)
            looks = time.monotonic() >= self._look_at and self._empty_looks < LOOKS
            self._n_ended = 0
            made = sum(self._embed(self._number, task, stop, looks) for task in tasks)
            if looks and self._n_ended == len(tasks):
                self._look_at, self._empty_looks = time.monotonic() + LOOK_S, self._empty_looks + 1
            return made + self._summarize(self._number, stop)
        except BaseException:
            self._number = None
            self._refused.clear()
            self._shift.close()  # what was claimed is anybody's
            raise

    def _embed(self, number: int, task: str, stop: Event, looks: bool) -> int:
        at_work: deque[list[Job]] = deque()
        made = 0
        embedding = self._pool.embed(self._batches(number, task, at_work, stop, looks))
        while (embedded := self._next(embedding)) is not None:
            vectors, tokens = embedded
            jobs = at_work.popleft()
            self._put(task, jobs, vectors, tokens)
            self._n_vectors += len(jobs)
            self._note(number, jobs)
            made += len(jobs)
        return made

    def _next(self, embedding: Iterator[tuple[Matrix, list[bytes] | None]]) -> tuple[Matrix, list[bytes] | None] | None:
        try:
            return next(embedding, None)
        except MemoryOSError:
            raise
        except Exception as error:  # whatever a foreign embedder raises
            raise EmbedderError(self._fingerprint, failure_of(error)) from error

    def _batches(
        self, number: int, task: str, at_work: deque[list[Job]], stop: Event, looks: bool
    ) -> Iterator[list[str]]:
        for _ in count() if self._only else range(ROUND):  # a pool, for one bulk load, is kept busy
            if stop.is_set():
                return
            jobs = self._queue.take(number, task, self._fingerprint, self._batch, only=self._only, stale=looks)
            if not jobs:
                self._n_ended += 1
                return
            at_work.append(jobs)
            yield [job.of if isinstance(job.of, str) else embedded_text(job.of) for job in jobs]

    def _put(self, task: str, jobs: Sequence[Job], vectors: Matrix, tokens: Sequence[bytes] | None) -> None:
        """Store a batch's vectors, each namespace's in a transaction; of what was forgotten meanwhile nothing is."""
        at = 0
        for namespace, group in groupby(jobs, key=lambda job: job.namespace):
            own = list(group)
            rows = slice(at, at + len(own))
            at = rows.stop
            if task == "vector":
                ids = [job.of.id for job in own if isinstance(job.of, Segment)]
                part = tokens[rows] if tokens is not None else None
                self._store.put_vectors(namespace, self._fingerprint, ids, vectors[rows], part)
            elif self._items:
                self._items.put_vectors(namespace, self._fingerprint, [job.row for job in own], vectors[rows])

    def _summarize(self, number: int, stop: Event) -> int:
        if self._llm is None or stop.is_set():
            return 0
        may_ask = time.monotonic() >= self._ask_at
        if may_ask:
            self._n_in_a_row = 0
        elif self._n_in_a_row >= TRIES:
            return 0
        jobs = self._queue.take(number, "summary", self._fingerprint, 1, only=self._only)
        if not jobs and self._refused and may_ask:  # last, so that they keep nobody waiting
            self._queue.release(number, self._refused)
            self._refused.clear()
            jobs = self._queue.take(number, "summary", self._fingerprint, 1, only=self._only)
        for job in jobs:
            assert isinstance(job.of, Segment)
            try:
                text = turn_summary.summarize(job.of.text, self._llm, stop)
            except LLMError as error:
                log.warning("no summary of #%d: %s", job.of.seq, told(error))
                self._n_failed += 1
                self._n_in_a_row += 1
                self._ask_at = time.monotonic() + ASK_AGAIN_S
                self._refused.append(job)
                continue
            self._n_in_a_row = 0
            if text is not None:
                self._store.put_summary(job.namespace, job.of.id, turn_summary.by_llm(self._llm), text)
                self._n_summaries += 1
            self._note(number, jobs, done=text is not None)
        return len(jobs)

    def _note(self, number: int, jobs: Sequence[Job], *, done: bool = True) -> None:
        """Give the claims up, and say how it goes."""
        now = time.perf_counter()
        pace = len(jobs) / max(now - self._last, 1e-6)
        self._per_second = 0.8 * self._per_second + 0.2 * pace if self._per_second else pace
        self._last = now
        self._queue.release(number, jobs, done=len(jobs) if done else 0, per_second=self._per_second)
        if self._progress:
            self._progress(self._n_vectors, self._n_summaries, self._per_second)


def _tell(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, EmbedderError):
        error = error.__cause__
    log.warning("tried again in a while: %s", told(error) if error else "")
