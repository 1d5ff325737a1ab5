"""Items in the database of the records: mutable JSON values under a path and a key, and the texts searched of them.

A path stands in its column as a JSON array, so that where a label ends is part of the text and nothing is a pattern.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import bindparam, func, select

from memory_os.protocols import Item, ItemChange, ItemPath
from memory_os.redact import Redact, clean_change
from memory_os.stores import tombstones
from memory_os.stores.backend import Backend, again
from memory_os.stores.namespaces import claim, locate
from memory_os.stores.rows import as_labels, as_time, own, parts
from memory_os.stores.schema import item_texts, items
from memory_os.types import Namespace

if TYPE_CHECKING:
    from memory_os.protocols import Matrix, Vector

__all__ = ["ItemRows", "count", "forget", "live"]

SCAN_PAGE = 1000
VECTORS_PAGE = 256  # half a megabyte at a time stays in the cache: 31 ms for 10,000 of MiniLM's, and 56 all at once
MOST = 2**61  # SQLite's numbers, and Python's sizes, end at 2**63
NO_TEXT = -math.inf  # worse than any cosine
NOT_MADE: Mapping[str, Any] = {"fingerprint": None, "vector": None}
TICK = timedelta(microseconds=1)
# as plain SQL: a bound list has a limit, and building a statement for each run of it takes longer than running it
VECTORS = {
    "sqlite": sa.text("""
        SELECT t.item_pk, t.vector FROM json_each(:pks) j CROSS JOIN item_texts t ON t.item_pk = j.value
        WHERE +t.namespace_id = :ns AND t.fingerprint = :f"""),
    "postgresql": sa.text("""
        SELECT t.item_pk, t.vector FROM json_array_elements_text(CAST(:pks AS json)) j
        JOIN item_texts t ON t.item_pk = CAST(j AS bigint) WHERE t.namespace_id = :ns AND t.fingerprint = :f"""),
}
# three look-ups in the index, where "is not this one" would read every row
PENDING = sa.text("""
    SELECT pk, text FROM item_texts WHERE pk IN (
        SELECT pk FROM item_texts WHERE namespace_id = :ns AND fingerprint IS NULL UNION ALL
        SELECT pk FROM item_texts WHERE namespace_id = :ns AND fingerprint < :f UNION ALL
        SELECT pk FROM item_texts WHERE namespace_id = :ns AND fingerprint > :f)
    ORDER BY fingerprint IS NOT NULL, pk LIMIT :limit""")
COUNT_PENDING = sa.text("""
    SELECT (SELECT count(*) FROM item_texts WHERE namespace_id = :ns AND fingerprint IS NULL)
        + (SELECT count(*) FROM item_texts WHERE namespace_id = :ns AND fingerprint < :f)
        + (SELECT count(*) FROM item_texts WHERE namespace_id = :ns AND fingerprint > :f)""")
NEWEST = (items.c.updated_at.desc(), items.c.pk.desc())

Address = tuple[ItemPath, str]


@again
class ItemRows:
    """``ItemStore`` over the tables ``items`` and ``item_texts``.

    :param database: that of the records.
    :param redact: takes secrets out of values and texts; paths and keys with one are refused.
    """

    def __init__(self, database: Backend, *, redact: Redact | None = None) -> None:
        self._database = database
        self._redact = redact
        self._ids: dict[Namespace, int] = {}

    # -- write -----------------------------------------------------------------------------------------------------

    def apply(self, namespace: Namespace, changes: Sequence[ItemChange], *, now: datetime) -> None:
        """Make all changes in one transaction; of several to one item the last."""
        if not changes:
            return
        changes = self._cleaned(changes)
        latest = {(change.path, change.key): change for change in changes}
        with self._database.write(namespace) as connection:
            ns, _ = claim(connection, namespace)
            _sweep(connection, ns, now)
            tombstones.lift(
                connection, ns, tombstones.Names(items=[_name(a) for a, c in latest.items() if c.value is not None])
            )
            _store(connection, ns, latest, _known(connection, ns, latest), now)

    def merge(
        self, namespace: Namespace, changes: Sequence[ItemChange], *, now: datetime, restore: bool = False
    ) -> tuple[int, int]:
        """Store what is newer than what is here and has not expired; ``(stored, left out as forgotten)``."""
        changes = self._cleaned(changes)
        latest = {(c.path, c.key): c for c in changes if c.expires_at is None or c.expires_at > now}
        if not latest:
            return 0, 0
        with self._database.write(namespace) as connection:
            ns, _ = claim(connection, namespace)
            _sweep(connection, ns, now)
            known = _known(connection, ns, latest)
            names = tombstones.Names(items=list(map(_name, latest)))
            if restore:
                tombstones.lift(connection, ns, names)
            gone = tombstones.buried(connection, ns, names).items
            newer = {
                address: change
                for address, change in latest.items()
                if _name(address) not in gone
                and (address not in known or known[address].updated_at < as_time(change.updated_at or now))
            }
            _store(connection, ns, newer, known, now)
        return len(newer), len(gone)

    def _cleaned(self, changes: Sequence[ItemChange]) -> Sequence[ItemChange]:
        return [clean_change(change, self._redact) for change in changes] if self._redact else changes

    def refresh(self, namespace: Namespace, found: Iterable[Item], *, now: datetime) -> None:
        """Have the items that expire begin their time anew; writes nothing if there are none."""
        rows = [
            {"p": as_labels(item.path), "k": item.key, "ttl": item.ttl, "then": as_time(_expiry(now, item.ttl))}
            for item in found
            if item.ttl is not None
        ]
        if not rows:
            return
        with self._database.write(namespace) as connection:
            ns, _ = locate(connection, namespace, lock=True)
            connection.execute(
                items.update()
                .where(items.c.namespace_id == ns, items.c.path == bindparam("p"), items.c.key == bindparam("k"))
                # put anew, or gone, since it was read: that put's time counts
                .where(
                    items.c.ttl_minutes == bindparam("ttl"), items.c.expires_at.between(as_time(now), bindparam("then"))
                )
                .values(expires_at=bindparam("then")),
                rows,
            )

    def sweep(self, namespace: Namespace, *, now: datetime) -> int:
        """Delete what has expired; how many items that was."""
        with self._database.write(namespace) as connection:
            return _sweep(connection, locate(connection, namespace, lock=True)[0], now)

    def _number(self, connection: sa.Connection, namespace: Namespace) -> int:
        """The namespace's number; -1, which no row has, where nothing was ever stored."""
        known = self._ids.get(namespace)
        if known is None:
            known, _ = locate(connection, namespace)
            if known >= 0:
                self._ids[namespace] = known
        return known

    # -- read ------------------------------------------------------------------------------------------------------

    def get(self, namespace: Namespace, addresses: Iterable[Address], *, now: datetime) -> list[Item]:
        """The items that exist under these paths and keys, each once."""
        with self._database.read(namespace) as connection:
            ns = self._number(connection, namespace)
            found: list[Item] = []
            for path, keys in _by_path(addresses).items():
                for part in parts(keys):
                    query = select(items).where(*live(ns, now), items.c.path == as_labels(path), items.c.key.in_(part))
                    found += (_to_item(row) for row in connection.execute(query))
        return found

    def search(
        self,
        namespace: Namespace,
        prefix: ItemPath,
        *,
        now: datetime,
        limit: int,
        offset: int = 0,
        accept: Callable[[dict[str, Any]], bool] | None = None,
        vector: Vector | None = None,
        fingerprint: str = "",
    ) -> list[Item]:
        """The latest updated first; with a vector, before all those that have none, by the best cosine of their texts.

        Values are read of the items that are given back, and of all that match the prefix where ``accept`` must see
        them.
        """
        limit, offset = min(limit, MOST), min(offset, MOST)
        with self._database.read(namespace) as connection:
            ns = self._number(connection, namespace)
            mine = [*live(ns, now), *_under(prefix)]
            if accept is None and vector is None:
                rows = connection.execute(select(items).where(*mine).order_by(*NEWEST).limit(limit).offset(offset))
                return [_to_item(row) for row in rows]
            if accept is None:
                every = connection.execute(select(items.c.pk).where(*mine).order_by(*NEWEST))
                newest: Iterator[int] = (pk for (pk,) in every.all())
            else:
                seen = connection.execute(select(items.c.pk, items.c.value).where(*mine).order_by(*NEWEST))
                newest = (pk for run in seen.partitions(SCAN_PAGE) for pk, value in run if accept(value))
            page: list[tuple[int, float | None]]
            if vector is None:
                page = [(pk, None) for pk in islice(newest, offset, offset + limit)]
            else:
                pks = list(newest)
                scores = _cosines(connection, ns, pks, vector, fingerprint)
                best_first = (-scores).argsort(kind="stable")[offset : offset + limit]  # ties stay: the newest first
                page = [(pks[i], float(scores[i]) if scores[i] > NO_TEXT else None) for i in best_first]
            found: dict[int, sa.Row[Any]] = {}
            for part in parts([pk for pk, _ in page]):
                query = select(items).where(own(items, ns), items.c.pk.in_(part))
                found.update((row.pk, row) for row in connection.execute(query))
        return [_to_item(found[pk], score) for pk, score in page]

    def paths(self, namespace: Namespace, *, now: datetime) -> list[ItemPath]:
        """Every path that holds an item, once, in order."""
        with self._database.read(namespace) as connection:
            ns = self._number(connection, namespace)
            found = connection.execute(select(items.c.path).where(*live(ns, now)).distinct()).scalars().all()
        return sorted(tuple(json.loads(path)) for path in found)

    def keys(
        self, namespace: Namespace, path: ItemPath, *, now: datetime, prefix: str, after: str | None, limit: int
    ) -> list[str]:
        """The keys under the path that begin with ``prefix``, in order: a run of the index."""
        begin = items.c.key >= prefix if after is None else items.c.key > after
        with self._database.read(namespace) as connection:
            ns = self._number(connection, namespace)
            query = select(items.c.key).where(*live(ns, now), items.c.path == as_labels(path), begin)
            found = connection.execute(query.order_by(items.c.key).limit(limit)).scalars().all()
        return [key for key in found if key.startswith(prefix)]  # those that do not stand behind all that do

    def count(self, namespace: Namespace, *, now: datetime) -> int:
        """How many items there are."""
        with self._database.read(namespace) as connection:
            return count(connection, self._number(connection, namespace), now)

    def scan(self, namespace: Namespace, *, now: datetime) -> Iterator[ItemChange]:
        """Every item with all that is recorded of it, read page by page."""
        after = 0
        while True:
            with self._database.read(namespace) as connection:
                ns = self._number(connection, namespace)
                query = select(items).where(*live(ns, now), items.c.pk > after).order_by(items.c.pk).limit(SCAN_PAGE)
                rows = connection.execute(query).all()
                texts: dict[int, list[tuple[str, str]]] = {row.pk: [] for row in rows}
                for part in parts(list(texts)):
                    columns = select(item_texts.c.item_pk, item_texts.c.field, item_texts.c.text)
                    these = columns.where(own(item_texts, ns), item_texts.c.item_pk.in_(part)).order_by(item_texts.c.pk)
                    for pk, field, text in connection.execute(these):
                        texts[pk].append((field, text))
            if not rows:
                return
            for row in rows:
                item = _to_item(row)
                yield ItemChange(
                    item.path, item.key, item.value, tuple(texts[row.pk]), item.ttl,
                    created_at=item.created_at, updated_at=item.updated_at, expires_at=item.expires_at,
                )  # fmt: skip
            after = rows[-1].pk

    # -- vectors ---------------------------------------------------------------------------------------------------

    def pending(self, namespace: Namespace, fingerprint: str, limit: int) -> list[tuple[int, str]]:
        """``(row, text)`` of texts without a vector under ``fingerprint``: those without any, then the others."""
        with self._database.read(namespace) as connection:
            told = {"ns": self._number(connection, namespace), "f": fingerprint, "limit": limit}
            return [(pk, text) for pk, text in connection.execute(PENDING, told)]

    def count_pending(self, namespace: Namespace, fingerprint: str) -> int:
        """How many texts have no vector under ``fingerprint``."""
        with self._database.read(namespace) as connection:
            return count_pending(connection, self._number(connection, namespace), fingerprint)

    def put_vectors(self, namespace: Namespace, fingerprint: str, rows: Sequence[int], vectors: Matrix) -> None:
        """Store the vectors of texts; rows that are gone by now are passed over."""
        with self._database.write(namespace) as connection:
            ns, _ = locate(connection, namespace, lock=True)
            connection.execute(
                item_texts.update().where(own(item_texts, ns), item_texts.c.pk == bindparam("row")).values(
                    fingerprint=fingerprint, vector=bindparam("blob")
                ),
                [{"row": row, "blob": v.astype("<f4").tobytes()} for row, v in zip(rows, vectors, strict=True)],
            )  # fmt: skip

    def read_vectors(self, namespace: Namespace, fingerprint: str) -> tuple[list[int], list[str], Matrix]:
        """``(rows, texts, vectors)`` of the texts that have one, in the order of rows."""
        import numpy as np

        t = item_texts.c
        with self._database.read(namespace) as connection:
            mine = t.namespace_id == self._number(connection, namespace), t.fingerprint == fingerprint
            found = connection.execute(select(t.pk, t.text, t.vector).where(*mine).order_by(t.pk)).all()
        matrix = np.frombuffer(b"".join(row.vector for row in found), dtype="<f4").reshape(
            len(found), -1 if found else 0
        )
        return [row.pk for row in found], [row.text for row in found], matrix


# -- within a transaction, also the record store's -------------------------------------------------------------------


def live(ns: int | sa.Column[int], now: datetime) -> tuple[sa.ColumnElement[bool], ...]:
    """The condition for an item of the namespace that has not expired."""
    return items.c.namespace_id == ns, sa.or_(items.c.expires_at.is_(None), items.c.expires_at > as_time(now))


def count(connection: sa.Connection, ns: int, now: datetime) -> int:
    """How many items the namespace holds."""
    return connection.execute(select(func.count()).select_from(items).where(*live(ns, now))).scalar_one()


def count_pending(connection: sa.Connection, ns: int, fingerprint: str) -> int:
    """How many texts of items have no vector under ``fingerprint``."""
    return int(connection.execute(COUNT_PENDING, {"ns": ns, "f": fingerprint}).scalar_one())


def forget(connection: sa.Connection, ns: int, now: datetime) -> list[str]:
    """Delete every item of the namespace, with its texts; the names of their tombstones."""
    _sweep(connection, ns, now)
    mine = items.c.namespace_id == ns
    there = connection.execute(select(items.c.path, items.c.key).where(mine)).all()
    connection.execute(items.delete().where(mine))
    return [_name((tuple(json.loads(row.path)), row.key)) for row in there]


def _name(address: Address) -> str:
    """By which a forgotten item is known again."""
    path, key = address
    return json.dumps([*path, key])


def _sweep(connection: sa.Connection, ns: int, now: datetime) -> int:
    gone = items.delete().where(items.c.namespace_id == ns, items.c.expires_at <= as_time(now))
    return connection.execute(gone).rowcount


def _known(connection: sa.Connection, ns: int, addresses: Iterable[Address]) -> dict[Address, Any]:
    """What stands under these addresses now."""
    columns = select(items.c.pk, items.c.key, items.c.created_at, items.c.updated_at)
    found: dict[Address, Any] = {}
    for path, keys in _by_path(addresses).items():
        for part in parts(keys):
            query = columns.where(items.c.namespace_id == ns, items.c.path == as_labels(path), items.c.key.in_(part))
            found.update(((path, row.key), row) for row in connection.execute(query))
    return found


def _store(
    connection: sa.Connection,
    ns: int,
    changes: Mapping[Address, ItemChange],
    known: Mapping[Address, Any],
    now: datetime,
) -> None:
    """Make the changes; ``known`` is what stands under their addresses."""
    deleted = [known[address].pk for address, change in changes.items() if change.value is None and address in known]
    for part in parts(deleted):
        connection.execute(items.delete().where(own(items, ns), items.c.pk.in_(part)))
    puts = {address: change for address, change in changes.items() if change.value is not None}
    old = {address: known[address] for address in puts if address in known}
    new = [address for address in puts if address not in known]
    if old:
        connection.execute(
            items.update().where(own(items, ns), items.c.pk == bindparam("row")),
            [{"row": row.pk, **_values(puts[address], now, row)} for address, row in old.items()],
        )
    pks = {address: row.pk for address, row in old.items()}
    if new:
        where = ({"namespace_id": ns, "path": as_labels(path), "key": key} for path, key in new)
        connection.execute(items.insert(), [w | _values(puts[a], now) for w, a in zip(where, new, strict=True)])
        pks |= {address: row.pk for address, row in _known(connection, ns, new).items()}
    made = _take_texts(connection, ns, [row.pk for row in old.values()])
    texts = [
        {"item_pk": pk, "namespace_id": ns, "field": field, "text": text, **made.get((pk, text), NOT_MADE)}
        for address, pk in pks.items()
        for field, text in puts[address].texts
    ]
    if texts:
        connection.execute(item_texts.insert(), texts)


def _take_texts(connection: sa.Connection, ns: int, pks: Sequence[int]) -> dict[tuple[int, str], dict[str, Any]]:
    """Delete the items' texts; gives back the vectors that they had, so that of a text put again none is made."""
    made: dict[tuple[int, str], dict[str, Any]] = {}
    for part in parts(pks):
        theirs = sa.and_(own(item_texts, ns), item_texts.c.item_pk.in_(part))
        for row in connection.execute(select(item_texts).where(theirs)):
            made[row.item_pk, row.text] = {"fingerprint": row.fingerprint, "vector": row.vector}
        connection.execute(item_texts.delete().where(theirs))
    return made


def _values(change: ItemChange, now: datetime, old: sa.Row[Any] | None = None) -> dict[str, Any]:
    """The columns that a change sets."""
    created, updated = now, now
    if old is not None:
        created = datetime.fromisoformat(old.created_at)
        updated = max(now, datetime.fromisoformat(old.updated_at) + TICK)  # it grows, whatever the clock does
    expires = change.expires_at or (None if change.ttl is None else _expiry(now, change.ttl))
    return {
        "value": dict(change.value or {}),
        "created_at": as_time(change.created_at or created),
        "updated_at": as_time(change.updated_at or updated),
        "ttl_minutes": change.ttl,
        "expires_at": as_time(expires) if expires else None,
    }


def _expiry(now: datetime, ttl: float) -> datetime:
    return now + timedelta(minutes=ttl)


def _cosines(connection: sa.Connection, ns: int, pks: Sequence[int], vector: Vector, fingerprint: str) -> Vector:
    """For each item the best cosine of its texts, ``NO_TEXT`` where it has no vector."""
    import numpy as np

    best = np.full(len(pks), NO_TEXT, dtype=np.float32)
    place = {pk: i for i, pk in enumerate(pks)}
    told = {"pks": json.dumps(sorted(pks)), "ns": ns, "f": fingerprint}
    found = connection.execute(VECTORS[connection.dialect.name], told)
    for run in found.partitions(VECTORS_PAGE):
        theirs, blobs = zip(*run, strict=True)
        matrix = np.frombuffer(b"".join(blobs), dtype="<f4").reshape(len(run), -1)
        # row by row: a matrix product may give equal texts cosines that differ in the last bit, and no tie
        np.maximum.at(best, [place[pk] for pk in theirs], np.einsum("ij,j->i", matrix, vector))
    return best


def _by_path(addresses: Iterable[Address]) -> dict[ItemPath, list[str]]:
    keys: dict[ItemPath, list[str]] = {}
    for path, key in dict.fromkeys(addresses):
        keys.setdefault(path, []).append(key)
    return keys


def _under(prefix: ItemPath) -> list[sa.ColumnElement[bool]]:
    """The condition for a path that begins with these labels.

    Such a path has, after the closing quote of the last of them, a comma or the closing bracket, and everything between
    these two begins with the same characters: a range of the index, and no pattern.
    """
    if not prefix:
        return []
    begin = as_labels(prefix)[:-1]
    return [items.c.path.between(f"{begin},", f"{begin}]")]


def _to_item(row: sa.Row[Any], score: float | None = None) -> Item:
    return Item(
        path=tuple(json.loads(row.path)),
        key=row.key,
        value=row.value,
        created_at=datetime.fromisoformat(row.created_at).astimezone(UTC),
        updated_at=datetime.fromisoformat(row.updated_at).astimezone(UTC),
        ttl=row.ttl_minutes,
        expires_at=None if row.expires_at is None else datetime.fromisoformat(row.expires_at),
        score=score,
    )
