"""Derived work: vectors for segments that have none yet. Pending until stored, so an interruption loses nothing."""

from __future__ import annotations

from collections.abc import Callable

from memory_os.protocols import Embedder, RecordStore
from memory_os.types import Namespace

__all__ = ["catch_up"]

BATCH = 1024


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
        batch = store.pending(namespace, embedder.fingerprint, BATCH if limit is None else min(BATCH, limit - done))
        if not batch:
            break
        vectors = embedder.embed_documents([segment.text for segment in batch])
        store.put_vectors(namespace, embedder.fingerprint, [segment.id for segment in batch], vectors)
        done += len(batch)
        if progress:
            progress(done)
    return done
