"""Derived work that is done in a thread while nobody waits for it: summaries by the LLM, and vectors.

What a thread did not come to stays on the store's lists, also across processes. The thread of summaries starts after a
turn that left work, stops at the next token when the next turn begins, and takes up again after it; a controller that
needs a summary before that has it made on the spot. The thread of vectors starts when a namespace is used that lacks
many of them, as after a change of embedder, and waits between two batches while a turn runs.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from memory_os import turn_summary
from memory_os.derive import told
from memory_os.errors import LLMError
from memory_os.protocols import LLM, RecordStore
from memory_os.types import Namespace, Segment

__all__ = ["Backlog", "Made", "VectorBacklog"]

log = logging.getLogger(__name__)

LAST_PATIENCE_S = 20.0
"""So long, at most, each thread is waited for in the end: torch must not be at work when Python leaves."""
TURN_PATIENCE_S = 10.0
"""So long a batch of vectors waits for turns to end: where they overlap, or one is never ended, it is made anyway."""
STEP = 128
"""So many vectors are made and stored at a time: under a second of work, and all that a kill can cost."""


class Backlog:
    """The work on the list of segments to be summarised, a namespace at a time."""

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self._failed: set[str] = set()
        self._begin()
        _alive.add(self)

    def _begin(self) -> None:
        self._thread: threading.Thread | None = None
        self._job: tuple[Namespace, LLM, threading.Event] | None = None  # the next; its event stops it
        self._stop = threading.Event()  # of the latest
        self._lock = threading.Lock()  # turns of several threads may end at once

    def resume(self, namespace: Namespace, llm: LLM) -> None:
        """Start on what is listed in the namespace, if anything is: in the one thread, after what it cannot leave."""
        self.pause()
        if self._next(namespace) is None:
            return
        with self._lock:
            self._stop.set()
            self._stop = threading.Event()
            self._job = namespace, llm, self._stop
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="memory_os summaries", daemon=True)
                atexit.register(self.close)  # a model that is at work when Python leaves takes the process down
                self._thread.start()

    def pause(self, patience_s: float = 0.5) -> None:
        """Leave the LLM to others. A summary that was under way is made again later.

        Waits for the thread, so that a model in this process has the machine to itself, but not long for a slow one.
        """
        with self._lock:
            self._stop.set()
            self._job = None
        self.join(patience_s)

    def close(self) -> None:
        """Stop at the next token, for which this waits."""
        self.pause(LAST_PATIENCE_S)

    def join(self, timeout: float | None = None) -> None:
        """Wait until the work is done or stopped."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)

    def _work(self) -> None:
        while True:
            with self._lock:
                job, self._job = self._job, None
                if job is None:
                    self._thread = None
                    atexit.unregister(self.close)
                    return
            self._summarize(*job)

    def _next(self, namespace: Namespace) -> Segment | None:
        listed = self._store.listed_for_summary(namespace, len(self._failed) + 1)
        return next((segment for segment in listed if segment.id not in self._failed), None)

    def _summarize(self, namespace: Namespace, llm: LLM, stop: threading.Event) -> None:
        try:
            while not stop.is_set() and (segment := self._next(namespace)):
                try:
                    text = turn_summary.summarize(segment.text, llm, stop)
                except LLMError as error:  # asked again when the summary is needed
                    # not what it said: a server may repeat the prompt
                    log.warning("no summary of #%d: the LLM failed (%s)", segment.seq, told(error.__cause__ or error))
                    self._failed.add(segment.id)
                    continue
                if text is not None:
                    self._store.put_summary(namespace, segment.id, turn_summary.by_llm(llm), text)
        except Exception as error:  # the list keeps what was not done, whatever the disk or a foreign LLM raises
            log.warning("summaries are left for later: %s", told(error))


class Made(NamedTuple):
    """So many vectors were made, and so many of them were not there already, of another process's making."""

    made: int
    new: int


class VectorBacklog:
    """The vectors that are still to be made, namespaces in the order in which they were asked for.

    :param count: how many a namespace lacks.
    :param make: makes up to so many of them, durably, the oldest or the newest.
    :param patience_s: so long a batch waits for turns to end.
    """

    def __init__(
        self,
        count: Callable[[Namespace], int],
        make: Callable[[Namespace, int, bool], Made],
        patience_s: float = TURN_PATIENCE_S,
    ) -> None:
        self.count, self._make, self._patience_s = count, make, patience_s
        self.settled: set[Namespace] = set()
        """Namespaces that have had all their vectors by this memory's embedder."""
        self._closed = False
        self._begin()
        _alive.add(self)

    def _begin(self) -> None:
        self._queue: dict[Namespace, int | None] = {}  # with how many are to be made, once that was counted
        self._change = threading.Condition()
        self._n_turns = 0
        self._thread: threading.Thread | None = None
        self._newest = False  # from which end: two processes at one work meet in the middle
        self.failure = ""
        """What the embedder failed with, if it did when it was last tried."""

    def resume(self, namespace: Namespace) -> None:
        """Have the namespace's vectors made, after those of the namespaces asked for before."""
        with self._change:
            if self._closed:
                return
            self._queue.setdefault(namespace, None)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="memory_os vectors", daemon=True)
                atexit.register(self.close)  # a model that is at work when Python leaves takes the process down
                self._thread.start()

    def busy(self, namespace: Namespace) -> bool:
        """Whether vectors of the namespace are being made, or are about to be."""
        return namespace in self._queue

    @contextmanager
    def held(self) -> Iterator[None]:
        """While a turn runs nothing is begun: the LLM has the machine to itself."""
        with self._change:
            self._n_turns += 1
        try:
            yield
        finally:
            with self._change:
                self._n_turns -= 1
                self._change.notify_all()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the work is done or stopped."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)

    def close(self, patience_s: float = LAST_PATIENCE_S) -> None:
        """Stop after the batch that is under way, for which this waits; what is not done stays pending."""
        with self._change:
            self._closed = True
            self._queue.clear()
            self._change.notify_all()
        self.join(patience_s)

    def _next(self) -> Namespace | None:
        with self._change:
            self._change.wait_for(lambda: self._n_turns <= 0 or self._closed, self._patience_s)
            if self._closed or not self._queue:
                self._thread = None
                atexit.unregister(self.close)
                return None
            return next(iter(self._queue))

    def _work(self) -> None:
        while (namespace := self._next()) is not None:
            try:
                # counted once, so that this ends even if a process with another embedder makes them anew for itself
                left = self._queue.get(namespace)
                left = self.count(namespace) if left is None else left
                made, new = self._make(namespace, min(STEP, left), self._newest) if left else (0, 0)
                if new < made:  # another process is at the same end
                    self._newest = not self._newest
                self._note(namespace, left - made if made else 0)
            except Exception as error:  # whatever a foreign embedder raises: tried again when memory is next used
                log.warning("vectors are left for later: the embedder failed (%s)", told(error))
                self._note(namespace, 0, f"{type(error).__name__}: {error}")

    def _note(self, namespace: Namespace, left: int, failure: str = "") -> None:
        with self._change:
            self.failure = failure
            if failure:
                self._queue.clear()
            elif left > 0 and namespace in self._queue:
                self._queue[namespace] = left
            else:
                self._queue.pop(namespace, None)


_alive: weakref.WeakSet[Backlog | VectorBacklog] = weakref.WeakSet()


def _in_child() -> None:
    """A forked child has none of its parent's threads, and may have inherited their locks."""
    for backlog in list(_alive):
        backlog._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
