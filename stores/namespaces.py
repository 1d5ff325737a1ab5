"""A namespace's row: its number, and the lock under which its writers take turns. Functions on an open connection."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import select

from memory_os.stores.rows import as_labels, insert
from memory_os.stores.schema import namespaces
from memory_os.types import Namespace

__all__ = ["claim", "locate"]


def locate(connection: sa.Connection, namespace: Namespace, *, lock: bool = False) -> tuple[int, int]:
    """``(number of the namespace, its last seq)``; -1, which no row has, if nothing was ever stored in it.

    :param lock: have other writers of the namespace wait until this transaction ends. Row numbers are then given in the
        order in which rows become visible, on which whatever reads "what was added since" relies.
    """
    query = select(namespaces.c.id, namespaces.c.last_seq).where(namespaces.c.labels == as_labels(namespace))
    if lock:
        query = query.with_for_update(key_share=True)  # says nothing on SQLite, where a writer is alone anyway
    row = connection.execute(query).one_or_none()
    return (row.id, row.last_seq) if row else (-1, 0)


def claim(connection: sa.Connection, namespace: Namespace) -> tuple[int, int]:
    """As ``locate`` with its lock, making the row if there is none."""
    found = locate(connection, namespace, lock=True)
    if found[0] < 0:
        row = {"labels": as_labels(namespace), "last_seq": 0, "n_segments": 0, "n_terms": 0, "epoch": 0}
        connection.execute(insert(connection, namespaces).values(row).on_conflict_do_nothing())
        found = locate(connection, namespace, lock=True)
    return found
