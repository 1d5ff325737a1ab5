"""The mark on a database that is being made a copy of another: until it is whole, nobody takes it for a memory.

It stands where the schema's revision does, which every version looks at first: one that does not know the mark refuses
the database too. Beside it, while it lasts, is a table with what the copy is of. Functions on an open connection.
"""

from __future__ import annotations

from typing import NamedTuple

import sqlalchemy as sa

from memory_os.errors import StoreError
from memory_os.stores.backend import Opening
from memory_os.stores.schema import HEAD

__all__ = ["UNFINISHED", "Copying", "begin", "finish", "is_unfinished", "may_be_opened", "read", "take_over"]

UNFINISHED = f"{HEAD} unfinished"
"""In place of the revision. A copy is finished by the version that began it: the tables are of its schema."""

table = sa.Table(
    "copying",
    sa.MetaData(),
    sa.Column("source_id", sa.Text, nullable=False),  # of the store: see schema.store
    sa.Column("source", sa.Text, nullable=False),  # where it was, without a password
    sa.Column("run", sa.Text, nullable=False),  # of several processes, the one that goes on with it
)


class Copying(NamedTuple):
    """What a database is being made a copy of, and by which run."""

    source_id: str
    source: str
    run: str


def may_be_opened(connection: sa.Connection, place: str, found: str | None, head: str, opening: Opening) -> bool:
    """Whether a database of this revision is opened as it is; ``False`` where it is to be made or upgraded first.

    :param head: the newest revision that whoever opens it knows.
    :raises StoreError: if it is an unfinished copy, or would have to be changed and is only to be read.
    """
    if found is not None and found.endswith("unfinished"):
        if opening is Opening.FILL and found == UNFINISHED:
            return True
        copying = read(connection)
        another = (
            "" if found == UNFINISHED else f" (with the version of memory_os that began it, of schema {found[:4]})"
        )
        raise StoreError(
            f"{place} is the unfinished copy of {copying.source}; finish it{another}: memos migrate {copying.source} "
            f"{place}, or delete it and begin anew"
        )
    if found == head:
        return True
    if opening is Opening.USE or (found and found > head):  # a newer one is told by whoever would upgrade it
        return False
    if opening is Opening.FILL:
        if found is None:
            return False
        raise StoreError(
            f"{place} is a memory of schema revision {found}, and a copy is made of {head}; name a store that is empty "
            "or not there yet"
        )
    if found is None:
        raise StoreError(f"{place} holds no memory; name the store that is to be read")
    raise StoreError(
        f"{place} has schema revision {found}, and is only to be read; bring it to {head} first, of which a file is "
        f"copied before: memos stats --store {place}"
    )


def begin(connection: sa.Connection, copying: Copying) -> None:
    """Mark the database, which is at the newest revision and empty."""
    table.create(connection)
    connection.execute(table.insert().values(copying._asdict()))
    _set_revision(connection, UNFINISHED)


def is_unfinished(connection: sa.Connection) -> bool:
    """Whether the database, which has the tables, is marked."""
    return bool(connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one() == UNFINISHED)


def read(connection: sa.Connection) -> Copying:
    """What the database, which is marked, is a copy of."""
    return Copying(*connection.execute(sa.select(table)).one())


def take_over(connection: sa.Connection, run: str) -> None:
    """Have this run, and no earlier one, go on with the copy."""
    connection.execute(table.update().values(run=run))


def finish(connection: sa.Connection) -> None:
    """Take the mark away: the copy is a memory now."""
    table.drop(connection)
    _set_revision(connection, HEAD)


def _set_revision(connection: sa.Connection, revision: str) -> None:
    connection.execute(sa.text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})
