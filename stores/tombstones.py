"""What was forgotten stays so: digests of the ids and keys that are not to be stored again. Functions on a connection.

A digest tells nothing of what it was made of, and is another one in every namespace.
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


class Names(NamedTuple):
    """Ids and keys of segments."""

    ids: Collection[str]
    keys: Collection[str] = ()


def bury(connection: sa.Connection, ns: int, names: Names) -> int:
    """Have these ids and keys not stored again; how many are new."""
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
    found = [digests[digest] for digest in _existing(connection, ns, digests)]
    return Names({name for kind, name in found if kind == "id"}, {name for kind, name in found if kind == "key"})


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
    both = [("id", id_) for id_ in names.ids] + [("key", key) for key in names.keys]
    return {hashlib.sha256(f"{ns} {kind} {name}".encode()).digest()[:16]: (kind, name) for kind, name in both}
