"""Derived work: vectors for segments that have none yet. Pending until stored, so an interruption loses nothing."""

from __future__ import annotations

from collections.abc import Callable

from memory_os.protocols import Embedder, RecordStore, TokenEmbedder
from memory_os.types import Namespace, Segment

__all__ = ["catch_up", "embedded_text"]

BATCH = 1024


def embedded_text(segment: Segment) -> str:
    """What a segment's vector is made of: who said it belongs to what was said.

    LoCoMo's questions name the speaker; with the name before it, dense search alone finds 51 in place of 29 of a
    hundred evidence turns in 512 tokens.
    """
    return f"{segment.speaker}: {segment.text}" if segment.speaker else segment.text


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
        texts = [embedded_text(segment) for segment in batch]
        if isinstance(embedder, TokenEmbedder):
            vectors, tokens = embedder.embed_documents_by_token(texts)
        else:
            vectors, tokens = embedder.embed_documents(texts), None
        store.put_vectors(namespace, embedder.fingerprint, [segment.id for segment in batch], vectors, tokens)
        done += len(batch)
        if progress:
            progress(done)
    return done
