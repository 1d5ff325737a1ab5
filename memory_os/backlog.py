"""Summaries by the LLM that are still to be made: durable work, done in a thread while nobody waits for a reply.

The thread starts after a turn that left work, stops at the next token when the next turn begins, and takes up again
after it. What it did not come to stays on the store's list, also across processes; a controller that needs a summary
before that has it made on the spot.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator

from memory_os import turn_summary
from memory_os.errors import LLMError, StoreError
from memory_os.protocols import LLM, RecordStore
from memory_os.types import Message, Namespace, Segment

__all__ = ["Backlog"]

log = logging.getLogger(__name__)


class Backlog:
    """The work on the list of segments to be summarised, a namespace at a time."""

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()  # of this thread; the next one has its own
        self._lock = threading.RLock()  # turns of several threads may end at once; one of them starts the thread
        self._failed: set[str] = set()

    def resume(self, namespace: Namespace, llm: LLM) -> None:
        """Start on what is listed in the namespace, if anything is."""
        with self._lock:
            self.pause()
            if self._next(namespace) is not None:
                self._stop = threading.Event()
                self._thread = threading.Thread(
                    target=self._work, args=(namespace, llm, self._stop), name="memory_os summaries", daemon=True
                )
                self._thread.start()

    def pause(self, patience_s: float = 0.5) -> None:
        """Leave the LLM to others. A summary that was under way is made again later.

        Waits for the thread, so that a model in this process has the machine to itself, but not long for a slow one.
        """
        with self._lock:
            self._stop.set()
            self.join(patience_s)

    def join(self, timeout: float | None = None) -> None:
        """Wait until the work is done or stopped."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _next(self, namespace: Namespace) -> Segment | None:
        listed = self._store.listed_for_summary(namespace, len(self._failed) + 1)
        return next((segment for segment in listed if segment.id not in self._failed), None)

    def _work(self, namespace: Namespace, llm: LLM, stop: threading.Event) -> None:
        try:
            while not stop.is_set() and (segment := self._next(namespace)):
                try:
                    text = self._summary(segment, llm, stop)
                except LLMError as error:  # asked again when the summary is needed
                    log.warning("no summary of #%d: %s", segment.seq, error)
                    self._failed.add(segment.id)
                    continue
                if text is not None:
                    self._store.put_summary(namespace, segment.id, turn_summary.by_llm(llm), text)
        except StoreError as error:  # the list keeps what was not done
            log.warning("summaries are left for later: %s", error)

    def _summary(self, segment: Segment, llm: LLM, stop: threading.Event) -> str | None:
        """The summary, or ``None`` if the work was stopped."""
        messages: list[Message] = [{"role": "user", "content": turn_summary.prompt_for(segment.text)}]
        speaking = llm.generate(messages, max_tokens=turn_summary.MAX_TOKENS)
        pieces: list[str] = []
        try:
            for piece in speaking:
                if stop.is_set():
                    return None
                pieces.append(piece)
        finally:
            if isinstance(speaking, Generator):
                speaking.close()
        return "".join(pieces).strip()
