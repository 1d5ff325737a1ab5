"""Derived work: vectors for segments that have none yet. Pending until stored, so an interruption loses nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from memory_os.errors import StoreError
from memory_os.protocols import Embedder, RecordStore, vectors_of
from memory_os.types import Namespace, Segment

__all__ = ["INLINE_PENDING", "catch_up", "deferrable", "embed", "embedded_text", "failure_of", "told"]

BATCH = 1024
INLINE_PENDING = 512
"""Up to so many missing vectors are made while somebody waits; more are made in the background (``backlog``)."""

log = logging.getLogger(__name__)


def embedded_text(segment: Segment) -> str:
    """What a segment's vector is made of: who said it belongs to what was said.

    LoCoMo's questions name the speaker; with the name before it, dense search alone finds 51 in place of 29 of a
    hundred evidence turns in 512 tokens.
    """
    return f"{segment.speaker}: {segment.text}" if segment.speaker else segment.text


@contextmanager
def deferrable(kind: type[Exception] = Exception) -> Iterator[list[str]]:
    """Around work that is derived from what is stored: where the disk or a model fails it, it stays pending.

    The records are durable; an error now would have the caller store them again. Gives what failed, for a note.

    :param kind: only such errors: ``StoreError`` where the caller must know of a model that fails.
    """
    failures: list[str] = []
    try:
        yield failures
    except kind as error:  # whatever a foreign model raises
        failures.append(failure_of(error))
        log.warning("it is stored; what is derived from it is still to be made, with the next write: %s", told(error))


def failure_of(error: Exception) -> str:
    """An error as notes tell of it."""
    return f"{type(error).__name__}: {error}"


def told(error: BaseException) -> str:
    """An error as a log may tell of it: the words of a foreign one may repeat the text that it was given."""
    return str(error) if isinstance(error, StoreError) else type(error).__name__


def embed(store: RecordStore, embedder: Embedder, namespace: Namespace, segments: Sequence[Segment]) -> int:
    """Make the vectors of these segments, a batch at a time; each batch is durable. How many were not there by then."""
    new = 0
    for start in range(0, len(segments), BATCH):
        batch = segments[start : start + BATCH]
        vectors, tokens = vectors_of(embedder, [embedded_text(segment) for segment in batch])
        ids = [segment.id for segment in batch]
        new += store.put_vectors(namespace, embedder.fingerprint, ids, vectors, tokens)
    return new


def catch_up(
    store: RecordStore,
    embedder: Embedder,
    namespace: Namespace,
    *,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Embed what is pending in the namespace, oldest first; gives back how many segments were embedded.

    :param limit: stop after about so many.
    :param progress: called with the number done so far, after each batch is durable.
    """
    done = 0
    while limit is None or done < limit:
        size = BATCH if limit is None else min(BATCH, limit - done)
        batch = store.pending(namespace, embedder.fingerprint, size)
        if not batch:
            break
        embed(store, embedder, namespace, batch)
        done += len(batch)
        if progress:
            progress(done)
        if len(batch) < size:
            break
    return done
