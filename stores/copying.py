"""A store made a copy of another: every row with the number it has there, in durable batches, and compared in the end.

The numbers of namespaces and rows are kept: tombstones are digests made with them, and what is older is told by them.
A run needs no note of how far an earlier one came. It goes through the keys of both in the same order: what the source
no longer has, or has otherwise, is taken out of the copy, and what is missing is stored. What is derived and not in
``tablerows.TABLES``, entries of the lexical index, is made in the transaction of its segments.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from heapq import merge
from itertools import groupby, islice
from operator import itemgetter

import sqlalchemy as sa

from memory_os.errors import StoreError
from memory_os.lexical import terms_of
from memory_os.migration import Compared, Difference
from memory_os.stores import fulltext, unfinished
from memory_os.stores.backend import Backend, again
from memory_os.stores.checkup import find_lexical_faults
from memory_os.stores.numbers import last_numbers, set_last_numbers
from memory_os.stores.partitions import is_postgres
from memory_os.stores.schema import namespaces, store
from memory_os.stores.tablerows import LEFT, TABLES, Key, Row, Table, Total, delete, insert, keys, read, totals
from memory_os.types import Namespace

__all__ = ["Copy", "compare", "count_left"]

BATCH = 500
"""Rows of a transaction. A text has up to a million characters, so not many more."""

Progress = Callable[[str, int, int], None]


@again
class Copy:
    """A database that is made a copy of another, by this run and no other; see ``unfinished``.

    :param dest: opened to be filled.
    :param source: has its ``snapshot`` entered: it is read as of one moment.
    """

    def __init__(self, dest: Backend, source: Backend) -> None:
        self._dest, self._source = dest, source
        self._run = uuid.uuid4().hex

    def begin(self) -> None:
        """Mark the copy as unfinished, or go on with one that is.

        :raises StoreError: if it holds memories, or is a copy of another store.
        """
        with self._source.read() as there:
            source_id = there.execute(sa.select(store.c.id)).scalar_one()
        copying = unfinished.Copying(source_id, self._source.place, self._run)
        with self._dest.write() as connection:
            if not unfinished.is_unfinished(connection):
                if connection.execute(sa.select(namespaces.c.id).limit(1)).first():
                    raise StoreError(
                        f"{self._dest.place} holds memories already, and they would be mixed up; name a store that is "
                        "empty or not there yet. Whether it is a whole copy already says: memos migrate "
                        f"{self._source.place} {self._dest.place} --verify-only"
                    )
                unfinished.begin(connection, copying)
                return
            begun = unfinished.read(connection)
            if begun.source_id != source_id:
                raise StoreError(
                    f"{self._dest.place} is the unfinished copy of another store, {begun.source}; finish that first, "
                    "or delete it and begin anew"
                )
            unfinished.take_over(connection, self._run)

    def fill(self, progress: Progress | None = None) -> None:
        """Make the copy's rows those of the source."""
        with self._source.read() as source:
            for table in sorted(TABLES, key=_is_namespaces):  # last those that others refer to
                self._take_out(source, table)
            for table in TABLES:
                total = source.execute(sa.text(f"SELECT count(*) FROM {table.name}")).scalar_one()
                self._bring(source, table, total, progress)

    def _take_out(self, source: sa.Connection, table: Table) -> None:
        """Remove what the source does not have, or has otherwise; a namespace that it has is brought up to date."""
        with self._dest.snapshot(), self._dest.read() as dest:
            if not dest.execute(sa.text(f"SELECT 1 FROM {table.name} LIMIT 1")).first():
                return
            for batch in _batches(_merged(keys(source, table), keys(dest, table))):
                both = [key for key, side in batch if side == BOTH]
                here, there = read(source, table, both), read(dest, table, both)
                other = {key for key in both if here[key] != there[key] and not _is_namespaces(table)}
                gone = [key for key, side in batch if side == DEST or key in other]
                if gone:
                    self.remove(table, gone)

    def _bring(self, source: sa.Connection, table: Table, total: int, progress: Progress | None) -> None:
        """Store what is missing; all of the namespaces, whose counters change."""
        done = 0
        whole = _is_namespaces(table)
        with self._dest.snapshot(), self._dest.read() as dest:
            for batch in _batches(_merged(keys(source, table), keys(dest, table))):
                missing = [key for key, side in batch if side == SOURCE or (whole and side == BOTH)]
                if missing:
                    self.put(table, [*read(source, table, missing).values()])
                done += len(batch)
                if progress:
                    progress(f"{table.name} copied", done, total)

    def remove(self, table: Table, gone: Sequence[Key]) -> None:
        """Take rows out of the copy, in one transaction."""
        with self._writing() as connection:
            if table.name == "segments":
                for ns, group in groupby(gone, key=itemgetter(0)):
                    fulltext.remove(connection, ns, [pk for _, pk in group])
            delete(connection, table, gone)

    def put(self, table: Table, rows: Sequence[Row]) -> None:
        """Store rows, in one transaction; segments with their lexical entries."""
        entries = []
        if table.name == "segments":
            pk, ns, text = (table.columns.index(name) for name in ("pk", "namespace_id", "text"))
            entries = [(row[pk], row[ns], terms_of(row[text])) for row in rows]
        with self._writing() as connection:
            insert(connection, table, rows, replace=_is_namespaces(table))
            fulltext.add(connection, entries)

    def verify(self, progress: Progress | None = None) -> list[Compared]:
        """Read both back and compare them; the lexical index, which is made anew, with the segments.

        :raises StoreError: if anything differs; the copy stays unfinished.
        """
        tables, differences = compare(self._source, self._dest, progress)
        if differences:
            first = "; ".join(map(str, differences[:5])) + ("; ..." if len(differences) > 5 else "")
            raise StoreError(
                f"{self._dest.place} is not what {self._source.place} is: {first}. It stays unfinished; run memos "
                "migrate again, which mends it. If it is so again, see what is wrong with the disk or the server"
            )
        if any(find_lexical_faults(self._dest).values()):
            raise StoreError(
                f"the lexical index of {self._dest.place} is not what its segments give, so the copy stays unfinished; "
                "see what is wrong with the disk or the server, delete the copy and begin anew"
            )
        return tables

    def finish(self) -> None:
        """Take the mark away: from now on it is a memory like others."""
        with self._source.read() as source:
            numbers = last_numbers(source)
        with self._writing() as connection:
            set_last_numbers(connection, numbers)
            if is_postgres(connection):  # or its first searches would be planned without knowing how much there is
                names = [table.name for table in TABLES]
                connection.exec_driver_sql(f"ANALYZE {', '.join([*names, 'lexical', 'postings'])}")
            unfinished.finish(connection)

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        with self._dest.write() as connection:
            mine = unfinished.is_unfinished(connection) and unfinished.read(connection).run == self._run
            if not mine:
                raise StoreError(f"another memos migrate goes on with {self._dest.place}; this one has ended")
            yield connection


def compare(
    source: Backend, dest: Backend, progress: Progress | None = None
) -> tuple[list[Compared], list[Difference]]:
    """Read both back, each from its own database, and compare by namespace and table: counts and checksums."""
    compared: list[Compared] = []
    found: list[Difference] = []
    with source.read() as here, dest.snapshot(), dest.read() as there:
        named = {**_labels(there), **_labels(here)}
        for n, table in enumerate(TABLES):
            if progress:
                progress("tables compared", n, len(TABLES))
            ours, theirs = totals(here, table), totals(there, table)
            none = Total(0, 0)
            whole = sum(ours.values(), start=none)
            compared.append(Compared(table.name, whole.rows, f"{whole.digest:064x}"))
            for ns in sorted(ours.keys() | theirs.keys()):
                mine, other = ours.get(ns, none), theirs.get(ns, none)
                if mine != other:
                    found.append(Difference(named.get(ns, ()), table.name, mine.rows, other.rows))
    return compared, found


def count_left(source: Backend) -> dict[str, int]:
    """How many rows of the tables that are not copied there are; the store's own id is not counted."""
    with source.read() as connection:
        counts = {
            name: connection.execute(sa.text(f"SELECT count(*) FROM {name}")).scalar_one()
            for name in LEFT
            if name != store.name
        }
    return {name: count for name, count in counts.items() if count}


def _labels(connection: sa.Connection) -> dict[int, Namespace]:
    rows = connection.execute(sa.select(namespaces.c.id, namespaces.c.labels))
    return {number: tuple(json.loads(labels)) for number, labels in rows}


def _is_namespaces(table: Table) -> bool:
    return table.name == namespaces.name


SOURCE, DEST, BOTH = 1, 2, 3


def _merged(source: Iterable[Key], dest: Iterable[Key]) -> Iterator[tuple[Key, int]]:
    """Every key once, in order, and whose it is."""
    both = merge(((key, SOURCE) for key in source), ((key, DEST) for key in dest))
    for key, group in groupby(both, key=itemgetter(0)):
        yield key, sum(side for _, side in group)


def _batches(pairs: Iterator[tuple[Key, int]]) -> Iterator[list[tuple[Key, int]]]:
    while batch := list(islice(pairs, BATCH)):
        yield batch
