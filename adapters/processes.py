"""Embedding in several processes of this machine: each holds an embedder, and gets batches of texts.

Processes are spawned: a script that uses this has its work under ``if __name__ == "__main__":``.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

from memory_os.errors import ConfigError, MemoryOSError
from memory_os.protocols import Embedder, vectors_of

if TYPE_CHECKING:
    from memory_os.protocols import Matrix

__all__ = ["ProcessPool", "made", "sendable"]

Vectors = tuple["Matrix", list[bytes] | None]


def sendable(make: Callable[[], Embedder]) -> bytes:
    """What makes an embedder, as ``made`` takes it in another process.

    :raises ConfigError: if it cannot be sent.
    """
    try:
        return pickle.dumps(make)
    except Exception as error:  # whatever a foreign object raises
        raise ConfigError(
            "this embedder cannot be sent to other processes; open the memory with the name of one, such as minilm"
        ) from error


def made(make: bytes, fingerprint: str) -> Embedder:
    """The embedder, made where this is called.

    :raises ConfigError: if it cannot be, or its vectors would be others.
    """
    try:
        embedder: Embedder = pickle.loads(make)()
    except Exception as error:  # such as a module that is not there
        raise ConfigError(
            f"the embedder cannot be made in another process ({error!r}); open the memory with the name of one, such "
            "as minilm, or define its class in a module that can be imported there"
        ) from error
    if embedder.fingerprint != fingerprint:
        raise ConfigError(
            f"the embedder is {embedder.fingerprint!r} there and {fingerprint!r} here; install the same packages"
        )
    return embedder


class ProcessPool:
    """``EmbedderPool`` of so many processes, started when they are first needed and again when one of them was killed.

    :param make: makes the embedder in each of them; it is pickled.
    :param fingerprint: of that embedder.
    :param n: how many. The processor's cores are shared out evenly.
    :raises ConfigError: for fewer than 1, or an embedder that cannot be sent to another process.
    """

    def __init__(self, make: Callable[[], Embedder], fingerprint: str, n: int) -> None:
        if n < 1:
            raise ConfigError(f"embedding needs at least 1 process, not {n}")
        self._make, self._fingerprint, self._n = sendable(make), fingerprint, n
        self._processes: ProcessPoolExecutor | None = None

    def embed(self, batches: Iterable[Sequence[str]]) -> Iterator[Vectors]:
        """In order; one batch more than there are processes is under way, so that none of them waits.

        :raises MemoryOSError: if one of them was killed; the next call starts them again.
        """
        under_way: deque[Future[Vectors]] = deque()
        try:
            for texts in batches:
                under_way.append(self._started().submit(_vectors, self._make, self._fingerprint, list(texts)))
                if len(under_way) > self._n:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool as error:
            self.close()
            raise MemoryOSError(
                "a process that embeds was killed, perhaps for want of memory; have fewer of them. What is stored "
                "stays so: run it again for the vectors that are missing"
            ) from error
        finally:
            for each in under_way:
                each.cancel()

    def _started(self) -> ProcessPoolExecutor:
        if self._processes is None:
            threads = max(1, (os.cpu_count() or 1) // self._n)
            self._processes = ProcessPoolExecutor(
                self._n, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(threads,)
            )
        return self._processes

    def close(self) -> None:
        """End the processes."""
        processes, self._processes = self._processes, None
        if processes:
            processes.shutdown(cancel_futures=True)


_embedder: Embedder | None = None


def _begin(threads: int) -> None:
    """In a child: get ready."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them; the parent says what becomes of it
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # before torch is loaded
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without its parent, killed perhaps, a child would wait for ever for the next batch."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _vectors(make: bytes, fingerprint: str, texts: list[str]) -> Vectors:
    """In a child: the first batch makes the embedder."""
    global _embedder
    _embedder = _embedder or made(make, fingerprint)
    return vectors_of(_embedder, texts)
