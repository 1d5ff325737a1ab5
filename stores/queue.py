"""The queue of derived work: what is pending, taken in batches by workers that do not meet.

What is to be done is what the rows say: ``pending``, vectors of another embedder, texts of items without one. A claim
says that a worker is at it; it is made under row locks that others skip and committed at once, so that nothing is
locked while a model works: neither writers nor forgetting nor VACUUM wait for a worker. A claim counts as long as its
worker holds its number (``Backend.shift``), which ends with its process, however that ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func, select

from memory_os.errors import StoreError
from memory_os.protocols import Job, QueueStatus, WorkerStatus
from memory_os.stores.backend import Backend, again
from memory_os.stores.rows import as_labels, as_time, insert, parts, to_segment
from memory_os.stores.schema import (
    ITEM_TASK,
    SUMMARY_TASK,
    VECTOR_TASK,
    claims,
    item_texts,
    namespaces,
    pending,
    segments,
    vectors,
    workers,
)
from memory_os.types import Namespace

__all__ = ["Queue"]

TRIES = 3
"""So often a batch is looked for where others were faster: what they took is seen at the next look."""

STALE_PAGE = 16
"""So many namespaces are looked for at a time in which another embedder's vectors stand."""


@again
class Queue:
    """``WorkQueue`` over a database."""

    def __init__(self, database: Backend) -> None:
        self._database = database
        self._stale_from: dict[str, int] = {}
        # what there was when it looked, by worker: those with different embedders do not take turns for ever
        self._stale_left: dict[tuple[int, str], int] = {}
        self._after: dict[str, int] = {}  # the namespace of the last batch, by task: each has its turn

    @contextmanager
    def shift(self, name: str) -> Iterator[int]:
        """Be a worker until this is left; gives its number."""
        with self._database.shift() as number:
            self._begin(number, name)
            try:
                yield number
            finally:
                for table in (vectors, item_texts):
                    self._stale_left.pop((number, table.name), None)
                with suppress(StoreError):  # a number that nobody holds says as much
                    self._end(number)

    def _begin(self, number: int, name: str) -> None:
        now = as_time(datetime.now(UTC))
        with self._database.claiming() as connection:
            connection.execute(claims.delete().where(claims.c.worker == number))  # of a dead one that had this number
            row = {"number": number, "name": name, "started_at": now, "seen_at": now, "done": 0, "per_second": 0.0}
            connection.execute(workers.delete().where(workers.c.number == number))
            connection.execute(workers.insert().values(row))

    def _end(self, number: int) -> None:
        with self._database.claiming() as connection:
            connection.execute(claims.delete().where(claims.c.worker == number))
            connection.execute(workers.delete().where(workers.c.number == number))

    def take(
        self, worker: int, task: str, fingerprint: str, limit: int, *, only: Namespace | None = None, stale: bool = True
    ) -> list[Job]:
        """Claim up to so many pieces of work that nobody is at; fewer, or none, where there are no more."""
        with self._database.claiming() as connection:
            self._leave_to_the_living(connection, worker)
            which = None if only is None else self._number(connection, only)
            for _ in range(TRIES):
                taken: list[tuple[int, int]] = []
                for query in self._listed(task, which):
                    taken += self._claim(connection, query, worker, task, limit - len(taken))
                if taken:
                    self._after[task] = taken[-1][0]
                    return self._read(connection, worker, task, taken)
            if not stale or task == SUMMARY_TASK:
                return []
            return self._read(
                connection, worker, task, self._claim_stale(connection, worker, task, fingerprint, limit, which)
            )

    def _leave_to_the_living(self, connection: sa.Connection, worker: int) -> None:
        """Drop the claims of workers that are gone, and make sure that this one is not taken for one of them."""
        numbers = set(connection.execute(select(workers.c.number)).scalars())
        alive = self._database.on_shift(connection, numbers | {worker})
        if worker not in alive:
            raise StoreError(f"{self._database.place}: the connection by which this worker is alive was lost")
        dead = numbers - alive
        if dead:
            connection.execute(claims.delete().where(claims.c.worker.in_(dead)))
            connection.execute(workers.delete().where(workers.c.number.in_(dead)))

    def _number(self, connection: sa.Connection, namespace: Namespace) -> int:
        query = select(namespaces.c.id).where(namespaces.c.labels == as_labels(namespace))
        return connection.execute(query).scalar_one_or_none() or -1

    def _listed(self, task: str, which: int | None) -> list[sa.Select[Any]]:
        """Work that is listed and that nobody has claimed, the next namespace's first."""
        if task == ITEM_TASK:
            table, pk, ns = item_texts, item_texts.c.pk, item_texts.c.namespace_id
            query = _unclaimed(table, pk, task).where(item_texts.c.fingerprint.is_(None)).order_by(ns, pk)
        else:  # in the order of the index, which SQLite would not see if the task were known to be one
            table, pk, ns = pending, pending.c.segment_pk, pending.c.namespace_id
            query = _unclaimed(table, pk, task).where(pending.c.task.concat("") == task)
            query = query.order_by(ns, pending.c.task, pk)
        after = self._after.get(task, 0)
        return [query.where(turn) for turn in ([ns == which] if which is not None else [ns > after, ns <= after])]

    def _claim_stale(
        self, connection: sa.Connection, worker: int, task: str, fingerprint: str, limit: int, which: int | None
    ) -> list[tuple[int, int]]:
        """Claim what has a vector of another embedder, of one namespace."""
        table, pk = (item_texts, item_texts.c.pk) if task == ITEM_TASK else (vectors, vectors.c.segment_pk)
        left = self._stale_left.pop((worker, table.name), None)  # counted anew at the next look where none is taken
        if left is None:
            left = self._count_stale(connection, table, fingerprint)
        limit = min(limit, left)
        taken: list[tuple[int, int]] = []
        for number in self._with_stale(connection, table, fingerprint, which) if limit else ():
            for other in (table.c.fingerprint < fingerprint, table.c.fingerprint > fingerprint):  # both by the index
                query = _unclaimed(table, pk, task).where(table.c.namespace_id == number, other).order_by(table.c.pk)
                taken += self._claim(connection, query, worker, task, limit - len(taken))
            if taken:
                self._stale_from[table.name] = number
                self._stale_left[worker, table.name] = left - len(taken)
                return taken
        self._stale_from[table.name] = 0
        return []

    def _with_stale(
        self, connection: sa.Connection, table: sa.Table, fingerprint: str, which: int | None
    ) -> Iterator[int]:
        """The namespaces in which another embedder's vectors stand, from where some were found last."""
        query = _stale(table, fingerprint).order_by(namespaces.c.id).limit(STALE_PAGE)
        if which is not None:
            query = query.where(namespaces.c.id == which)
        start = self._stale_from.get(table.name, 0) if which is None else 0
        while page := connection.execute(query.where(namespaces.c.id >= start)).scalars().all():
            yield from page
            start = page[-1] + 1

    def _count_stale(self, connection: sa.Connection, table: sa.Table, fingerprint: str) -> int:
        count = select(func.count()).where(table.c.namespace_id.in_(_stale(table, fingerprint)))
        return connection.execute(count.where(table.c.fingerprint != fingerprint)).scalar_one()

    def _claim(
        self, connection: sa.Connection, query: sa.Select[Any], worker: int, task: str, limit: int
    ) -> list[tuple[int, int]]:
        """Claim up to so many of these; what another has claimed since the query began stays that one's."""
        if limit <= 0:
            return []
        found = query.limit(limit).subquery()
        rows = select(found.c.namespace_id, sa.literal(task), found.c.pk, sa.literal(worker)).where(sa.true())
        new = insert(connection, claims).from_select(["namespace_id", "task", "of_pk", "worker"], rows)
        made = connection.execute(new.on_conflict_do_nothing().returning(claims.c.namespace_id, claims.c.of_pk))
        return sorted((row.namespace_id, row.of_pk) for row in made)

    def _read(self, connection: sa.Connection, worker: int, task: str, taken: Sequence[tuple[int, int]]) -> list[Job]:
        """The texts of what was claimed; what was forgotten meanwhile is claimed no more."""
        table, column = (item_texts, item_texts.c.text) if task == ITEM_TASK else (segments, segments)
        jobs: list[Job] = []
        for ns, rows in groupby(taken, key=lambda each: each[0]):
            pks = [pk for _, pk in rows]
            labels = connection.execute(select(namespaces.c.labels).where(namespaces.c.id == ns)).scalar_one()
            namespace = tuple(json.loads(labels))
            for part in parts(pks):
                query = select(column, table.c.pk).where(table.c.namespace_id == ns, table.c.pk.in_(part))
                for row in connection.execute(query.order_by(table.c.pk)):
                    of = row.text if task == ITEM_TASK else to_segment(row, namespace)
                    jobs.append(Job(task, namespace, ns, row.pk, of))
        self._drop(connection, worker, task, sorted(set(taken) - {(job.number, job.row) for job in jobs}))
        return jobs

    def release(self, worker: int, jobs: Sequence[Job], *, done: int = 0, per_second: float = 0.0) -> None:
        """Give up claims: what is not done is anybody's."""
        with self._database.claiming() as connection:
            for task in {job.task for job in jobs}:
                self._drop(connection, worker, task, [(job.number, job.row) for job in jobs if job.task == task])
            told = {"seen_at": as_time(datetime.now(UTC)), "done": workers.c.done + done, "per_second": per_second}
            connection.execute(workers.update().where(workers.c.number == worker).values(told))

    def _drop(self, connection: sa.Connection, worker: int, task: str, rows: Sequence[tuple[int, int]]) -> None:
        for ns, group in groupby(sorted(rows), key=lambda each: each[0]):
            for part in parts([pk for _, pk in group]):
                mine = claims.c.namespace_id == ns, claims.c.task == task, claims.c.of_pk.in_(part)
                connection.execute(claims.delete().where(*mine, claims.c.worker == worker))

    def status(self, fingerprint: str) -> QueueStatus:
        """What is to be done, and who is at it."""
        with self._database.read() as connection:
            listed = self._counts(connection, pending.c.task)
            count = select(func.count())
            unmade = connection.execute(count.where(item_texts.c.fingerprint.is_(None))).scalar_one()
            stale = {table.name: self._count_stale(connection, table, fingerprint) for table in (vectors, item_texts)}
            first = select(pending.c.namespace_id, pending.c.segment_pk).where(pending.c.task == VECTOR_TASK)
            found = first.order_by(pending.c.segment_pk).limit(1).subquery()
            same = found.c.namespace_id == segments.c.namespace_id, found.c.segment_pk == segments.c.pk
            oldest = connection.execute(select(segments.c.id).join(found, sa.and_(*same))).scalar_one_or_none()
            rows = connection.execute(select(workers).order_by(workers.c.number)).all()
            alive = self._database.on_shift(connection, {row.number for row in rows})
            at = self._counts(connection, claims.c.worker)
        return QueueStatus(
            vectors=listed.get(VECTOR_TASK, 0) + stale[vectors.name],
            items=unmade + stale[item_texts.name],
            summaries=listed.get(SUMMARY_TASK, 0),
            oldest=oldest,
            workers=tuple(
                WorkerStatus(
                    row.name,
                    datetime.fromisoformat(row.started_at),
                    datetime.fromisoformat(row.seen_at),
                    at.get(row.number, 0),
                    row.done,
                    row.per_second,
                )
                for row in rows
                if row.number in alive
            ),
        )

    def _counts(self, connection: sa.Connection, column: sa.Column[Any]) -> dict[Any, int]:
        return {row[0]: row[1] for row in connection.execute(select(column, func.count()).group_by(column))}

    def length(self) -> int:
        """How many segments have no vector at all."""
        with self._database.read() as connection:
            return connection.execute(select(func.count()).where(pending.c.task == VECTOR_TASK)).scalar_one()


def _unclaimed(table: sa.Table, pk: sa.Column[Any], task: str) -> sa.Select[Any]:
    """Rows that no worker has claimed, under a lock that others skip; SQLite has one writer, and no such lock."""
    ns = table.c.namespace_id
    claimed = sa.exists().where(claims.c.namespace_id == ns, claims.c.task == task, claims.c.of_pk == pk)
    return select(ns, pk.label("pk")).where(~claimed).with_for_update(skip_locked=True, of=table)


def _stale(table: sa.Table, fingerprint: str) -> sa.Select[Any]:
    """The namespaces in which another embedder's vectors stand: two look-ups in the index for each."""
    mine = table.c.namespace_id == namespaces.c.id
    ends = (select(end(table.c.fingerprint)).where(mine).scalar_subquery() for end in (func.min, func.max))
    return select(namespaces.c.id).where(sa.or_(*(end != fingerprint for end in ends)))
