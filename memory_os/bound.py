"""Back-pressure: who stores in bulk waits while the queue of work for workers is too long."""

from __future__ import annotations

import time

from memory_os.errors import BacklogFullError
from memory_os.protocols import WorkQueue

__all__ = ["Bound"]

LOOK_S = 0.2
SHARE = 10
"""Counting takes at most the SHARE-th part of the time: a queue far above the bound is long."""
PATIENCE_S = 60.0
"""So long the queue may stand still before it is an error."""


class Bound:
    """A bound on how many segments may have no vector at all, in all namespaces together.

    :param most: where more than this have none, writers wait.
    :param patience_s: so long, at most, for the queue to grow shorter.
    """

    def __init__(self, queue: WorkQueue, most: int, patience_s: float = PATIENCE_S) -> None:
        self._queue, self.most, self._patience_s = queue, most, patience_s
        self._room = 0

    def wait(self, n_new: int) -> None:
        """Return when so many may be stored: when the queue is no longer than the bound.

        It is counted again when a tenth of the room that there was is used up, so that a single segment costs nothing.

        :raises BacklogFullError: if it does not grow shorter; nothing was stored.
        """
        if n_new <= self._room:
            self._room -= n_new
            return
        shortest = None
        began = since = time.monotonic()
        while (n := self._queue.length()) > self.most:
            now = time.monotonic()
            if shortest is None or n < shortest:
                shortest, since = n, now
            elif now - since > self._patience_s:
                raise BacklogFullError(n, self.most)
            time.sleep(max(LOOK_S, SHARE * (now - began)))
            began = time.monotonic()
        self._room = max(0, (self.most - n) // 10 - n_new)
