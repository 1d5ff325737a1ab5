"""Care for a store: find what is derived and missing or wrong, and rebuild it from the records."""

from __future__ import annotations

from collections.abc import Callable

from memory_os.derive import catch_up
from memory_os.items import Items
from memory_os.turn import Parts

__all__ = ["check", "repair"]


def check(parts: Parts) -> dict[str, list[str]]:
    """Faults by kind, each with what it concerns: of the store, of the index (what it holds too much), of the bank.

    ``pending_vectors`` and ``pending_item_vectors`` are work that was interrupted and not a fault of the data.
    """
    faults = parts.store.check(parts.embedder.fingerprint)
    faults["index"] = _index_strays(parts)
    faults["bank"] = parts.bank.check() if parts.bank else []
    return faults


def _index_strays(parts: Parts) -> list[str]:
    strays: set[str] = set()
    for namespace in parts.store.namespaces(emptied=True):
        held = parts.index.ids(namespace)
        strays |= held - set(parts.store.get(namespace, held))
    return sorted(strays)


def repair(parts: Parts, progress: Callable[[int], None] | None = None) -> dict[str, int]:
    """Mend what ``check`` finds and make every pending vector; counts by kind of what was found.

    Damage to the file itself is reported and cannot be mended here: restore a backup or an export.
    """
    found = parts.store.repair(parts.embedder.fingerprint)
    found["index"] = len(_index_strays(parts))
    found["bank"] = parts.bank.repair() if parts.bank else 0
    moved = any(found[kind] for kind in ("index", "missing_vectors", "orphan_vectors", "pending_vectors"))
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
        if moved:
            parts.index.drop(namespace)
        parts.index.sync(namespace)
    return found


def _from(base: int, progress: Callable[[int], None] | None) -> Callable[[int], None] | None:
    """Progress of one namespace as progress of all."""
    return None if progress is None else lambda n: progress(base + n)
