"""What was forgotten stays so: digests of the names that are not to be stored again. Functions on a connection.

What a digest was made of cannot be read back; it is another one in every namespace. Whoever has the file can test a
guess.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy import select

from memory_os.stores.rows import insert, parts
from memory_os.stores.schema import tombstones

__all__ = ["Names", "buried", "bury", "lift"]

KINDS = ("id", "key", "trace", "item")  # of Names, in order


class Names(NamedTuple):
    """Ids and keys of segments, ids of traces that are of no segment, and addresses of items."""

    ids: Collection[str] = ()
    keys: Collection[str] = ()
    traces: Collection[str] = ()
    items: Collection[str] = ()


def bury(connection: sa.Connection, ns: int, names: Names) -> int:
    """Have these not stored again; how many are new."""
    digests = _digests(ns, names)
    known = set(_existing(connection, ns, digests))
    rows = [
        {"namespace_id": ns, "digest": digest, "kind": kind}
        for digest, (kind, _) in digests.items()
        if digest not in known
    ]
    if rows:
        connection.execute(insert(connection, tombstones).on_conflict_do_nothing(), rows)
    return len(rows)


def buried(connection: sa.Connection, ns: int, names: Names) -> Names:
    """Those of them that are not to be stored again."""
    digests = _digests(ns, names)
    found = {digests[digest] for digest in _existing(connection, ns, digests)}
    return Names(*({name for kind, name in found if kind == each} for each in KINDS))


def lift(connection: sa.Connection, ns: int, names: Names) -> None:
    """Let these be stored again."""
    for part in parts(list(_digests(ns, names))):
        mine = sa.and_(tombstones.c.namespace_id == ns, tombstones.c.digest.in_(part))
        connection.execute(tombstones.delete().where(mine))


def _existing(connection: sa.Connection, ns: int, digests: Iterable[bytes]) -> Iterator[bytes]:
    for part in parts(list(digests)):
        query = select(tombstones.c.digest).where(tombstones.c.namespace_id == ns, tombstones.c.digest.in_(part))
        yield from connection.execute(query).scalars()


def _digests(ns: int, names: Names) -> dict[bytes, tuple[str, str]]:
    every = [(kind, name) for kind, each in zip(KINDS, names, strict=True) for name in each]
    return {hashlib.sha256(f"{ns} {kind} {name}".encode()).digest()[:16]: (kind, name) for kind, name in every}
