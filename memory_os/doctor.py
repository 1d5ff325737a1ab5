"""Care for a store: find what is derived and missing or wrong, and rebuild it from the records."""

from __future__ import annotations

from collections.abc import Callable

from memory_os.derive import catch_up, embedded_text
from memory_os.errors import StoreError
from memory_os.items import Items
from memory_os.protocols import KeptIndex, TokenEmbedder
from memory_os.turn import Parts
from memory_os.types import Namespace

__all__ = ["FIXES", "NO_FAULT", "check", "check_deep", "repair"]

SAMPLE = 2000
"""Of so many segments of a namespace, at most, the vector is made again and compared."""
NEAR = 0.99
"""The cosine of a vector and the same made again: on other hardware they differ a little."""
NEAR_TOKENS = 0.95
"""As ``NEAR``, on average over the token vectors of a text, which are rounded to bytes."""
NO_FAULT = ("pending_vectors", "pending_item_vectors", "pending_deliveries", "lost_sources", "copies")
"""What is found and is no fault: work that is left, summaries of what was not imported along, copies to be deleted."""
BY_HAND = "restore a backup or an export: memos import"
FIXES = {
    "damage": BY_HAND,
    "records": f"{BY_HAND}; until then nothing else can be looked at or mended",
    "unfinished": "close what else has the store open, then: memos doctor --repair",
    "integrity": BY_HAND,
    "wrong_seq": f"memos doctor --repair --deep, where the counter is behind; else {BY_HAND}",
    "traces": "forget the turn, or restore a backup or an export",
    "settings": "move the file to a local disk, which can keep a write-ahead log; of a server, turn on what is off",
    "permissions": "let nobody else write it: chmod o-w FILE",
    "lost_sources": "the summaries are of segments that are not here, as after the import of a session",
    "index_unreachable": "start the server, or open the store without it: --vectors exact",
    "copies": "made before an upgrade, with what was forgotten since; delete them when all is well",
}
"""What to do about what ``repair`` does not mend."""


def check(parts: Parts) -> dict[str, list[str]]:
    """Faults by kind, each with what it concerns: of the store, of the index (what it holds too much), of the bank.

    ``pending_vectors`` and ``pending_item_vectors`` are work that was interrupted and not a fault of the data.
    """
    faults = parts.store.check(parts.embedder.fingerprint)
    faults |= {"index": []} if faults["records"] else _index_faults(parts)
    faults["bank"] = parts.bank.check() if parts.bank else []
    return faults


def check_deep(parts: Parts, progress: Callable[[str, int, int], None] | None = None) -> dict[str, list[str]]:
    """What ``check`` does not look at, by kind; see ``FIXES`` and ``NO_FAULT``. Read-only.

    :param progress: called with ``(what is looked at, done, of so many)``.
    """
    embedder, store = parts.embedder, parts.store
    width = embedder.token_dimension if isinstance(embedder, TokenEmbedder) else 0
    found = store.check_deep(embedder.fingerprint, embedder.dimension, width, progress)
    if not found:  # records that cannot be read, as check says
        return found
    found |= _index_faults(parts, deep=True)
    # of one length, so that they can be read as a matrix
    segments, items = not found["wrong_vectors"], parts.items and not found["wrong_item_vectors"]
    names = store.namespaces()
    for n, namespace in enumerate(names, start=1):
        if segments:
            found["wrong_vectors"] += _unlike(parts, namespace)
        if items:
            found["wrong_item_vectors"] += _unlike_items(parts, namespace)
        if progress:
            progress("vectors of namespaces", n, len(names))
    return found


def _unlike(parts: Parts, namespace: Namespace) -> list[str]:
    """Rows of the sampled segments whose vector is not what their text gives, evenly over the namespace."""
    import numpy as np

    embedder, store = parts.embedder, parts.store
    ids, seqs, matrix, _ = store.read_vectors(namespace, embedder.fingerprint)
    segments = store.get(namespace, [ids[i] for i in _sample(len(ids))])
    rows = [i for i in _sample(len(ids)) if ids[i] in segments]
    if not rows:
        return []
    texts = [embedded_text(segments[ids[i]]) for i in rows]
    if isinstance(embedder, TokenEmbedder):
        again, tokens = embedder.embed_documents_by_token(texts)
        held = dict(store.read_tokens(namespace, embedder.fingerprint))
        width = embedder.token_dimension
        like = [_like(held.get(seqs[i], b""), token, width) for i, token in zip(rows, tokens, strict=True)]
    else:
        again, like = embedder.embed_documents(texts), [True] * len(rows)
    cosines = np.einsum("ij,ij->i", matrix[rows], again)
    wrong = [ids[i] for i, cosine, same in zip(rows, cosines, like, strict=True) if not (same and cosine >= NEAR)]
    known = {profile.id: profile.row for profile in store.read_profiles(namespace)} if wrong else {}
    return [str(known[id_]) for id_ in wrong if id_ in known]


def _unlike_items(parts: Parts, namespace: Namespace) -> list[str]:
    """Rows of the sampled texts of items whose vector is not what they give."""
    import numpy as np

    if parts.items is None:
        return []
    pks, texts, matrix = parts.items.read_vectors(namespace, parts.embedder.fingerprint)
    rows = list(_sample(len(pks)))
    if not rows:
        return []
    again = parts.embedder.embed_documents([texts[i] for i in rows])
    cosines = np.einsum("ij,ij->i", matrix[rows], again)
    return [str(pks[i]) for i, cosine in zip(rows, cosines, strict=True) if not cosine >= NEAR]


def _sample(n: int) -> range:
    """Places of at most ``SAMPLE`` of ``n``, evenly."""
    return range(0, n, max(1, -(-n // SAMPLE)))


def _like(tokens: bytes, again: bytes, width: int) -> bool:
    """Whether token vectors are those that were made again, but for rounding."""
    import numpy as np

    if len(tokens) != len(again) or not tokens:
        return len(tokens) == len(again)
    one, other = (np.frombuffer(each, dtype=np.int8).reshape(-1, width).astype(np.float32) for each in (tokens, again))
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return bool(np.mean(np.einsum("ij,ij->i", one, other) / np.maximum(lengths, 1.0)) >= NEAR_TOKENS)


KINDS_OF_INDEX = {
    "index": "extra", "index_missing": "missing", "index_wrong": "wrong", "pending_deliveries": "undelivered",
}  # fmt: skip


def _index_faults(parts: Parts, *, deep: bool = False) -> dict[str, list[str]]:
    """What the index holds too much (``index``); of one that is kept elsewhere also what it lacks or has wrong."""
    index, names = parts.index, parts.store.namespaces(emptied=True)
    if not isinstance(index, KeptIndex):
        held = ((namespace, index.ids(namespace)) for namespace in names)
        return {"index": sorted({id_ for ns, ids in held for id_ in ids - set(parts.store.get(ns, ids))})}
    found: dict[str, list[str]] = {kind: [] for kind in KINDS_OF_INDEX}
    try:
        for namespace in names:
            differences = index.differences(namespace, deep=deep)
            for kind, difference in KINDS_OF_INDEX.items():
                found[kind] += differences[difference]
    except StoreError as error:
        return {**found, "index_unreachable": [str(error)]}
    return found


def repair(parts: Parts, progress: Callable[[int], None] | None = None, *, deep: bool = False) -> dict[str, int]:
    """Mend what ``check`` finds and make every pending vector; counts by kind of what was found.

    Damage to the file itself, and records that cannot be read, are reported and cannot be mended here: restore a backup
    or an export.
    """
    found = parts.store.repair(parts.embedder.fingerprint)
    if found["records"]:
        return found
    found |= {kind: len(rows) for kind, rows in _index_faults(parts).items()}
    if found["unfinished"]:
        parts.store.scrub(None, index_purged=parts.index.purge(None))
    if deep:
        faults = check_deep(parts)
        parts.store.repair_deep(faults)
        # the index was looked at before it was purged
        found |= {kind: max(len(rows), found.get(kind, 0)) for kind, rows in faults.items()}
        parts.store.repair(parts.embedder.fingerprint)  # what stood under another namespace is missing from its own now
    found["bank"] = parts.bank.repair() if parts.bank else 0
    kinds = ("index", "missing_vectors", "orphan_vectors", "pending_vectors", "wrong_vectors")
    moved = any(found.get(kind) for kind in kinds)
    done = 0
    for namespace in parts.store.namespaces(emptied=True):
        done += catch_up(
            parts.store,
            parts.embedder,
            namespace,
            progress=_from(done, progress),
        )
        if parts.items:
            Items(parts.items, parts.embedder, namespace).catch_up()
        if isinstance(parts.index, KeptIndex):
            if not found.get("index_unreachable"):
                parts.index.mend(namespace, deep=deep)
            continue
        if moved:
            parts.index.drop(namespace)
        parts.index.sync(namespace)
    return found


def _from(base: int, progress: Callable[[int], None] | None) -> Callable[[int], None] | None:
    """Progress of one namespace as progress of all."""
    return None if progress is None else lambda n: progress(base + n)
