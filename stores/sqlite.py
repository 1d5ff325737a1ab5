"""The source of truth in one SQLite file: records, vectors as rows, and the lexical index, in step by transaction.

Every write is one ``BEGIN IMMEDIATE`` transaction under ``synchronous=FULL``: a method that returns has reached the
disk, one that raises has changed nothing.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa
import uuid_utils
from sqlalchemy import event, func, select

from memory_os.errors import SchemaError, StoreError
from memory_os.stores.lexical import bm25, idf, query_terms, terms_of
from memory_os.stores.schema import HEAD, namespaces, pending, segments, traces, vectors
from memory_os.trace import trace_from_dict, trace_to_dict
from memory_os.types import Namespace, NewSegment, Segment, Trace

if TYPE_CHECKING:
    from memory_os.protocols import Matrix

__all__ = ["SqliteStore"]

T = TypeVar("T")

BUSY_TIMEOUT_S = 60
SCAN_PAGE = 1000
IN_LIMIT = 900  # SQLite's limit on bound variables is 999 in old builds
MAX_POSTINGS = 1000
"""A term's matches are read newest first up to this many: in namespaces where more segments hold the term, it can
still lift the newest ones, while rarer terms decide. It bounds the time of a search."""
SHORTLIST = 2  # exact BM25 is computed for this many times k segments, chosen by the sum of their terms' idf
VECTOR_TASK = "vector"


class SqliteStore:
    """``RecordStore`` over one SQLite file.

    :param path: the file; its folder must exist.
    :param count_tokens: gives a text's length in cl100k_base tokens.
    :raises StoreError: if the file cannot be opened, created or migrated.
    :raises SchemaError: if it was written by a newer version.
    """

    def __init__(self, path: Path, *, count_tokens: Callable[[str], int]) -> None:
        self.path = path
        self._count_tokens = count_tokens
        self._ids: dict[Namespace, int] = {}
        if not path.parent.is_dir():
            raise StoreError(f"cannot open {path}: the folder {path.parent} does not exist; create it first")
        if path.is_dir():
            raise StoreError(f"cannot open {path}: it is a folder; name a file in it, such as {path / 'memory.db'}")
        self._engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_TIMEOUT_S})
        event.listen(self._engine, "connect", _on_connect)
        event.listen(self._engine, "begin", _on_begin)
        self._writer = self._engine.execution_options(memos_write=True)
        try:
            self._migrate()
        except BaseException:
            self.close()
            raise

    # -- transactions --------------------------------------------------------------------------------------------

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.DBAPIError as error:
            raise StoreError(_problem(self.path, error.orig)) from error

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        with self._translated(), self._writer.begin() as connection:
            yield connection

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        with self._translated(), self._engine.connect() as connection:
            yield connection

    def _migrate(self) -> None:
        if self._revision() == HEAD:
            return
        with self._write() as connection:  # the write lock: of two processes that open a new file, one migrates
            found = _revision_of(connection)
            if found == HEAD:
                return
            from alembic.command import upgrade
            from alembic.config import Config
            from alembic.util import CommandError

            config = Config(attributes={"connection": connection})
            config.set_main_option("script_location", "memory_os.stores:migrations")
            try:
                upgrade(config, "head")
            except CommandError as error:
                raise SchemaError(str(self.path), str(found), HEAD) from error

    def _revision(self) -> str | None:
        with self._read() as connection:
            return _revision_of(connection)

    # -- segments ------------------------------------------------------------------------------------------------

    def append(self, namespace: Namespace, new: Sequence[NewSegment]) -> list[Segment]:
        """Store in the order given, with lexical entries and pending vectors; leaves out what is already stored."""
        if not new:
            return []
        prepared = [(item, self._count_tokens(item.text), terms_of(item.text)) for item in new]
        now = datetime.now(UTC)
        stored: list[Segment] = []
        with self._write() as connection:
            ns, last_seq = self._claim(connection, namespace)
            keys = self._existing(connection, segments.c.key, [i.key for i in new if i.key], ns)
            ids = self._existing(connection, segments.c.id, [i.id for i in new if i.id], ns)
            rows, n_terms = [], 0
            lexical: list[str] = []
            for item, n_tokens, terms in prepared:
                if item.key in keys or item.id in ids:
                    continue
                last_seq = max(last_seq + 1, item.seq or 0)
                segment = Segment(
                    id=item.id or str(uuid_utils.uuid7()),
                    seq=last_seq,
                    namespace=namespace,
                    session=item.session,
                    role=item.role,
                    speaker=item.speaker,
                    kind=item.kind,
                    text=item.text,
                    created_at=(item.created_at or now).astimezone(UTC),
                    n_tokens=n_tokens,
                    source=item.source,
                    offset=item.offset,
                    metadata=dict(item.metadata),
                    key=item.key,
                )
                keys.update(filter(None, [item.key]))
                ids.update(filter(None, [item.id]))
                stored.append(segment)
                rows.append(_to_row(segment, ns))
                lexical.append(_entry(ns, terms))
                n_terms += len(terms)
            if not rows:
                return []
            connection.execute(segments.insert(), rows)
            first, last = self._pk_range(connection, ns, stored)
            pks = range(first, last + 1)
            connection.exec_driver_sql(
                "INSERT INTO lexical(rowid, terms) VALUES (?, ?)", list(zip(pks, lexical, strict=True))
            )
            connection.execute(
                pending.insert(), [{"segment_pk": pk, "task": VECTOR_TASK, "namespace_id": ns} for pk in pks]
            )
            connection.execute(
                namespaces.update()
                .where(namespaces.c.id == ns)
                .values(
                    last_seq=last_seq,
                    n_segments=namespaces.c.n_segments + len(rows),
                    n_terms=namespaces.c.n_terms + n_terms,
                )
            )
        return stored

    def _claim(self, connection: sa.Connection, namespace: Namespace) -> tuple[int, int]:
        labels = _labels(namespace)
        query = select(namespaces.c.id, namespaces.c.last_seq).where(namespaces.c.labels == labels)
        row = connection.execute(query).one_or_none()
        if row is None:
            connection.execute(namespaces.insert().values(labels=labels, last_seq=0, n_segments=0, n_terms=0, epoch=0))
            row = connection.execute(query).one()
        return row.id, row.last_seq

    def _pk_range(self, connection: sa.Connection, ns: int, stored: Sequence[Segment]) -> tuple[int, int]:
        # AUTOINCREMENT under the write lock numbers the rows of one insert without gaps
        query = select(segments.c.pk).where(segments.c.namespace_id == ns, segments.c.seq == stored[-1].seq)
        last = connection.execute(query).scalar_one()
        return last - len(stored) + 1, last

    def _existing(self, connection: sa.Connection, column: sa.Column[Any], values: Sequence[str], ns: int) -> set[str]:
        found: set[str] = set()
        for part in _parts(values):
            query = select(column).where(segments.c.namespace_id == ns, column.in_(part))
            found.update(connection.execute(query).scalars())
        return found

    def get(self, namespace: Namespace, ids: Iterable[str]) -> dict[str, Segment]:
        """The segments that exist, by id."""
        found: dict[str, Segment] = {}
        with self._read() as connection:
            ns = self._namespace_id(connection, namespace)
            for part in _parts(list(ids)):
                query = select(segments).where(segments.c.namespace_id == ns, segments.c.id.in_(part))
                found.update((row.id, _to_segment(row, namespace)) for row in connection.execute(query))
        return found

    def find(self, namespace: Namespace, ref: str) -> Segment | None:
        """The segment with this id, or with this ``seq`` where ``ref`` is a number (``12`` or ``#12``)."""
        with self._read() as connection:
            ns = self._namespace_id(connection, namespace)
            number = _as_seq(ref)
            which = segments.c.id == ref if number is None else segments.c.seq == number
            row = connection.execute(select(segments).where(segments.c.namespace_id == ns, which)).one_or_none()
            return _to_segment(row, namespace) if row else None

    def tail(
        self, namespace: Namespace, n: int, *, session: str | None = None, upto: int | None = None
    ) -> list[Segment]:
        """The last ``n`` segments (of the session) with ``seq <= upto``, in the order of ``seq``."""
        with self._read() as connection:
            query = select(segments).where(segments.c.namespace_id == self._namespace_id(connection, namespace))
            if session is not None:
                query = query.where(segments.c.session == session)
            if upto is not None:
                query = query.where(segments.c.seq <= upto)
            rows = connection.execute(query.order_by(segments.c.seq.desc()).limit(n)).all()
        return [_to_segment(row, namespace) for row in reversed(rows)]

    def scan(self, namespace: Namespace, *, session: str | None = None, after: int = 0) -> Iterator[Segment]:
        """Every segment (of the session) with ``seq > after``, in the order of ``seq``, read page by page."""
        while True:
            with self._read() as connection:
                query = select(segments).where(
                    segments.c.namespace_id == self._namespace_id(connection, namespace), segments.c.seq > after
                )
                if session is not None:
                    query = query.where(segments.c.session == session)
                rows = connection.execute(query.order_by(segments.c.seq).limit(SCAN_PAGE)).all()
            if not rows:
                return
            yield from (_to_segment(row, namespace) for row in rows)
            after = rows[-1].seq

    def last_seq(self, namespace: Namespace) -> int:
        """The highest ``seq`` ever given in the namespace."""
        with self._read() as connection:
            query = select(namespaces.c.last_seq).where(namespaces.c.labels == _labels(namespace))
            return connection.execute(query).scalar_one_or_none() or 0

    def namespaces(self) -> list[Namespace]:
        """All that hold anything, in alphabetical order."""
        with self._read() as connection:
            query = select(namespaces.c.labels).where(namespaces.c.n_segments > 0)
            return sorted(tuple(json.loads(labels)) for labels in connection.execute(query).scalars())

    def delete(self, namespace: Namespace, ids: Sequence[str]) -> dict[str, int]:
        """Delete segments with all that was derived from them and the traces of their turns; counts by place."""
        counts = dict.fromkeys(("segments", "vectors", "lexical", "pending", "traces"), 0)
        with self._write() as connection:
            ns = self._namespace_id(connection, namespace)
            for part in _parts(ids):
                query = select(segments.c.pk, segments.c.id).where(
                    segments.c.namespace_id == ns, segments.c.id.in_(part)
                )
                found = connection.execute(query).all()
                pks = [row.pk for row in found]
                own = traces.c.namespace_id == ns
                mine = sa.or_(traces.c.query_id.in_(part), traces.c.reply_id.in_(part))
                counts["traces"] += connection.execute(traces.delete().where(own, mine)).rowcount
                for table in (vectors, pending):
                    deleted = connection.execute(table.delete().where(table.c.segment_pk.in_(pks)))
                    counts[table.name] += deleted.rowcount
                lexical = [(pk, _lexical_terms(connection, pk)) for pk in pks]
                counts["lexical"] += sum(terms is not None for _, terms in lexical)
                connection.execute(
                    namespaces.update()
                    .where(namespaces.c.id == ns)
                    .values(
                        n_segments=namespaces.c.n_segments - len(pks),
                        n_terms=namespaces.c.n_terms - sum(len(terms or ()) for _, terms in lexical),
                        epoch=namespaces.c.epoch + 1,
                    )
                )
                for pk in pks:
                    connection.exec_driver_sql("DELETE FROM lexical WHERE rowid = ?", (pk,))
                counts["segments"] += connection.execute(segments.delete().where(segments.c.pk.in_(pks))).rowcount
        return counts

    def _namespace_id(self, connection: sa.Connection, namespace: Namespace) -> int:
        """The namespace's number; -1, which no row has, if nothing was ever stored in it."""
        known = self._ids.get(namespace)
        if known is None:
            query = select(namespaces.c.id).where(namespaces.c.labels == _labels(namespace))
            known = connection.execute(query).scalar_one_or_none()
            if known is None:
                return -1
            self._ids[namespace] = known
        return known

    # -- lexical -------------------------------------------------------------------------------------------------

    def search(self, namespace: Namespace, text: str, k: int, *, upto: int | None = None) -> list[tuple[str, float]]:
        """The ``k`` best ``(segment id, BM25)``; see ``MAX_POSTINGS`` for very common terms."""
        wanted = query_terms(text)
        if not wanted or k < 1:
            return []
        with self._read() as connection:
            ns = self._namespace_id(connection, namespace)
            statistics = connection.execute(
                select(namespaces.c.n_segments, namespaces.c.n_terms).where(namespaces.c.id == ns)
            ).one_or_none()
            if statistics is None or not statistics.n_segments:
                return []
            bound = self._pk_bound(connection, ns, upto)
            weights: dict[str, float] = {}
            postings: list[list[int]] = []
            for term in wanted:
                postings.append(self._postings(connection, f"{ns}_{term}", bound))
                n_matching = self._estimate_matches(connection, postings[-1], statistics.n_segments)
                weights[f"{ns}_{term}"] = idf(statistics.n_segments, n_matching)
            shortlist = _heaviest(postings, list(weights.values()), SHORTLIST * k)
            mean_length = statistics.n_terms / statistics.n_segments
            scored: list[tuple[float, int, str]] = []
            for part in _parts(shortlist):
                found = connection.execute(
                    select(segments.c.pk, segments.c.seq, segments.c.id).where(segments.c.pk.in_(part))
                ).all()
                # not one joined query: SQLite would then look into the full-text table in the order of segments
                marks = ",".join("?" * len(part))
                lookup = f"SELECT rowid, terms FROM lexical WHERE rowid IN ({marks})"
                entries = connection.exec_driver_sql(lookup, tuple(part))
                terms = {pk: entry.split() for pk, entry in entries}
                scored.extend((-bm25(terms[pk], weights, mean_length), seq, id_) for pk, seq, id_ in found)
        return [(id_, -negative) for negative, _, id_ in sorted(scored)[:k]]

    def _postings(self, connection: sa.Connection, term: str, bound: int) -> list[int]:
        """Rows that hold the term, newest first; straight from the driver, as thousands of result objects take time."""
        cursor = connection.connection.cursor()
        cursor.execute(
            "SELECT rowid FROM lexical WHERE lexical MATCH ? AND rowid <= ? ORDER BY rowid DESC LIMIT ?",
            (f'"{term}"', bound, MAX_POSTINGS),
        )
        return [pk for (pk,) in cursor.fetchall()]

    def _estimate_matches(self, connection: sa.Connection, pks: list[int], n_segments: int) -> int:
        """How many segments hold a term: all of its postings, or where they were cut off, in proportion."""
        if len(pks) < MAX_POSTINGS:
            return min(len(pks), n_segments)
        ends = select(segments.c.seq).where(segments.c.pk.in_([pks[0], pks[-1]])).order_by(segments.c.seq)
        oldest, newest = connection.execute(ends).scalars().all()
        estimate: int = round(len(pks) * newest / (newest - oldest + 1))
        return min(n_segments, estimate)

    def _pk_bound(self, connection: sa.Connection, ns: int, upto: int | None) -> int:
        """The row number of the last segment with ``seq <= upto``; row numbers grow with ``seq`` in a namespace."""
        if upto is None:
            return 2**62
        newest = (
            select(segments.c.pk)
            .where(segments.c.namespace_id == ns, segments.c.seq <= upto)
            .order_by(segments.c.seq.desc())
            .limit(1)
        )
        return connection.execute(newest).scalar_one_or_none() or 0

    # -- vectors -------------------------------------------------------------------------------------------------

    def vector_epoch(self, namespace: Namespace, fingerprint: str) -> tuple[int, int]:
        """``(epoch, last row)``; see ``VectorSource``."""
        with self._read() as connection:
            ns = self._namespace_id(connection, namespace)
            mine = sa.and_(vectors.c.namespace_id == ns, vectors.c.fingerprint == fingerprint)
            epoch = select(namespaces.c.epoch).where(namespaces.c.id == ns).scalar_subquery()
            last = select(func.max(vectors.c.pk)).where(mine).scalar_subquery()
            row = connection.execute(select(epoch, last)).one()
        return row[0] or 0, row[1] or 0

    def read_vectors(
        self, namespace: Namespace, fingerprint: str, after: int = 0
    ) -> tuple[list[str], list[int], Matrix, int]:
        """The rows added after row ``after``, in the order in which they were added."""
        import numpy as np

        with self._read() as connection:
            rows = connection.execute(
                select(vectors.c.pk, segments.c.id, segments.c.seq, vectors.c.vector)
                .join(segments, segments.c.pk == vectors.c.segment_pk)
                .where(
                    vectors.c.namespace_id == self._namespace_id(connection, namespace),
                    vectors.c.fingerprint == fingerprint,
                    vectors.c.pk > after,
                )
                .order_by(vectors.c.pk)
            ).all()
        if not rows:
            return [], [], np.empty((0, 0), dtype=np.float32), after
        matrix = np.frombuffer(b"".join(row.vector for row in rows), dtype="<f4").reshape(len(rows), -1)
        return [row.id for row in rows], [row.seq for row in rows], matrix.astype(np.float32, copy=False), rows[-1].pk

    def pending(self, namespace: Namespace, fingerprint: str, limit: int) -> list[Segment]:
        """Segments whose vector under ``fingerprint`` is still to be made, oldest first."""
        with self._read() as connection:
            query = self._pending_query(connection, namespace, fingerprint, select(segments))
            rows = connection.execute(query.order_by(segments.c.pk).limit(limit)).all()
        return [_to_segment(row, namespace) for row in rows]

    def count_pending(self, namespace: Namespace, fingerprint: str) -> int:
        """How many vectors are still to be made."""
        with self._read() as connection:
            ns = self._namespace_id(connection, namespace)
            listed = select(func.count()).where(pending.c.namespace_id == ns, pending.c.task == VECTOR_TASK)
            row = connection.execute(select(listed.scalar_subquery(), *_ends(ns))).one()
            count: int = row[0]
            if any(end not in (None, fingerprint) for end in row[1:]):
                stale = select(func.count()).where(vectors.c.namespace_id == ns, vectors.c.fingerprint != fingerprint)
                count += connection.execute(stale).scalar_one()
        return count

    def _has_stale(self, connection: sa.Connection, ns: int, fingerprint: str) -> bool:
        return any(end not in (None, fingerprint) for end in connection.execute(select(*_ends(ns))).one())

    def _pending_query(
        self, connection: sa.Connection, namespace: Namespace, fingerprint: str, query: sa.Select[Any]
    ) -> sa.Select[Any]:
        ns = self._namespace_id(connection, namespace)
        listed = select(pending.c.segment_pk).where(pending.c.namespace_id == ns, pending.c.task == VECTOR_TASK)
        todo: sa.ColumnElement[bool] = segments.c.pk.in_(listed)
        if self._has_stale(connection, ns, fingerprint):
            stale = select(vectors.c.segment_pk).where(
                vectors.c.namespace_id == ns, vectors.c.fingerprint != fingerprint
            )
            todo = sa.or_(todo, segments.c.pk.in_(stale))
        return query.where(todo)

    def put_vectors(self, namespace: Namespace, fingerprint: str, ids: Sequence[str], matrix: Matrix) -> None:
        """Store vectors, replacing older ones, and strike the work off; ids that are gone by now are passed over."""
        blobs = {id_: row.astype("<f4").tobytes() for id_, row in zip(ids, matrix, strict=True)}
        with self._write() as connection:
            ns = self._namespace_id(connection, namespace)
            for part in _parts(list(blobs)):
                query = select(segments.c.pk, segments.c.id).where(
                    segments.c.namespace_id == ns, segments.c.id.in_(part)
                )
                found = connection.execute(query).all()
                pks = [row.pk for row in found]
                if not pks:
                    continue
                replaced = connection.execute(vectors.delete().where(vectors.c.segment_pk.in_(pks))).rowcount
                if replaced:
                    connection.execute(
                        namespaces.update().where(namespaces.c.id == ns).values(epoch=namespaces.c.epoch + 1)
                    )
                connection.execute(
                    vectors.insert(),
                    [
                        {"segment_pk": pk, "namespace_id": ns, "fingerprint": fingerprint, "vector": blobs[id_]}
                        for pk, id_ in found
                    ],
                )
                connection.execute(pending.delete().where(pending.c.segment_pk.in_(pks), pending.c.task == VECTOR_TASK))

    # -- traces --------------------------------------------------------------------------------------------------

    def save_trace(self, trace: Trace) -> None:
        """Store a trace, or replace the one with its id."""
        with self._write() as connection:
            ns, _ = self._claim(connection, trace.namespace)
            connection.execute(traces.delete().where(traces.c.id == trace.id, traces.c.namespace_id == ns))
            connection.execute(
                traces.insert().values(
                    id=trace.id,
                    namespace_id=ns,
                    query_id=trace.query_id,
                    reply_id=trace.reply_id,
                    created_at=_iso(trace.created_at),
                    body=trace_to_dict(trace),
                )
            )

    def load_trace(self, namespace: Namespace, ref: str | None) -> Trace | None:
        """The trace with this id, or of the turn whose query or reply segment is ``ref``; the newest for ``None``."""
        segment = self.find(namespace, ref) if ref is not None else None
        wanted = segment.id if segment else ref
        with self._read() as connection:
            query = select(traces.c.body).where(traces.c.namespace_id == self._namespace_id(connection, namespace))
            if wanted is not None:
                columns = (traces.c.id, traces.c.query_id, traces.c.reply_id)
                query = query.where(sa.or_(*(column == wanted for column in columns)))
            newest = query.order_by(traces.c.created_at.desc(), traces.c.id.desc()).limit(1)
            body = connection.execute(newest).scalar_one_or_none()
        return trace_from_dict(body) if body is not None else None

    def traces(self, namespace: Namespace) -> Iterator[Trace]:
        """Every trace of the namespace, oldest first."""
        with self._read() as connection:
            query = select(traces.c.id).where(traces.c.namespace_id == self._namespace_id(connection, namespace))
            ids = connection.execute(query.order_by(traces.c.created_at, traces.c.id)).scalars().all()
        for id_ in ids:
            trace = self.load_trace(namespace, id_)
            if trace is not None:
                yield trace

    # -- care ----------------------------------------------------------------------------------------------------

    def stats(self, namespace: Namespace) -> dict[str, Any]:
        """Counts of what the namespace holds."""
        with self._read() as connection:
            ns = self._namespace_id(connection, namespace)
            mine = segments.c.namespace_id == ns
            row = connection.execute(
                select(
                    func.count(),
                    func.count(sa.distinct(segments.c.session)),
                    func.coalesce(func.sum(segments.c.n_tokens), 0),
                    func.min(segments.c.created_at),
                    func.max(segments.c.created_at),
                ).where(mine)
            ).one()
            count = {
                table.name: connection.execute(select(func.count()).where(table.c.namespace_id == ns)).scalar_one()
                for table in (vectors, pending, traces)
            }
        return {
            "segments": row[0],
            "sessions": row[1],
            "tokens": row[2],
            "first": row[3],
            "last": row[4],
            **count,
            "file": str(self.path),
            "file_bytes": sum(f.stat().st_size for f in self._files()),
        }

    def _files(self) -> list[Path]:
        return [f for suffix in ("", "-wal", "-shm") if (f := Path(f"{self.path}{suffix}")).exists()]

    def check(self, fingerprint: str) -> dict[str, list[str]]:
        """Faults of the whole store by kind; see ``_FAULTS``, and ``damage`` for what only a backup mends."""
        with self._read() as connection:
            faults = {
                kind: [str(value) for value in connection.execute(sa.text(query), {"f": fingerprint}).scalars()]
                for kind, query in _FAULTS.items()
            }
            ok = connection.exec_driver_sql("PRAGMA quick_check").scalars().all()
            faults["damage"] = [] if ok == ["ok"] else [str(line) for line in ok]
        try:
            with self._write() as connection:
                connection.exec_driver_sql("INSERT INTO lexical(lexical) VALUES ('integrity-check')")
            faults["lexical_index"] = []
        except StoreError as error:
            if "damaged" not in str(error):
                raise  # the store cannot be written, which says nothing about the index
            faults["lexical_index"] = ["the lexical index does not match its entries"]
        return faults

    def repair(self, fingerprint: str) -> dict[str, int]:
        """Mend what ``check`` finds; vectors to be made are left on the pending list."""
        faults = self.check(fingerprint)
        with self._write() as connection:
            for pk in faults["orphan_vectors"]:
                connection.execute(vectors.delete().where(vectors.c.pk == int(pk)))
            for pk in faults["orphan_lexical"]:
                connection.exec_driver_sql("DELETE FROM lexical WHERE rowid = ?", (int(pk),))
            for row in _rows(connection, faults["missing_lexical"]):
                connection.exec_driver_sql(
                    "INSERT INTO lexical(rowid, terms) VALUES (?, ?)",
                    (row.pk, _entry(row.namespace_id, terms_of(row.text))),
                )
            for row in _rows(connection, faults["missing_vectors"]):
                connection.execute(
                    pending.insert().values(segment_pk=row.pk, task=VECTOR_TASK, namespace_id=row.namespace_id)
                )
            if faults["lexical_index"]:
                _rewrite_lexical(connection)
            if faults["orphan_vectors"]:
                connection.execute(namespaces.update().values(epoch=namespaces.c.epoch + 1))
            if any(faults[kind] for kind in ("orphan_lexical", "missing_lexical", "lexical_index")):
                _recount(connection)
        return {kind: len(found) for kind, found in faults.items()}

    def close(self) -> None:
        """Release the database."""
        self._engine.dispose()


_FAULTS = {
    "missing_vectors": """
        SELECT s.pk FROM segments s
        WHERE NOT EXISTS (SELECT 1 FROM vectors v WHERE v.segment_pk = s.pk)
        AND NOT EXISTS (SELECT 1 FROM pending p WHERE p.segment_pk = s.pk AND p.task = 'vector') ORDER BY s.pk""",
    "pending_vectors": """
        SELECT s.pk FROM segments s JOIN pending p ON p.segment_pk = s.pk AND p.task = 'vector' UNION ALL
        SELECT s.pk FROM segments s JOIN vectors v ON v.segment_pk = s.pk WHERE v.fingerprint != :f""",
    "orphan_vectors": """
        SELECT v.pk FROM vectors v WHERE NOT EXISTS
        (SELECT 1 FROM segments s WHERE s.pk = v.segment_pk AND s.namespace_id = v.namespace_id) ORDER BY v.pk""",
    "missing_lexical": """
        SELECT s.pk FROM segments s
        WHERE NOT EXISTS (SELECT 1 FROM lexical l WHERE l.rowid = s.pk) ORDER BY s.pk""",
    "orphan_lexical": """
        SELECT l.rowid FROM lexical l
        WHERE NOT EXISTS (SELECT 1 FROM segments s WHERE s.pk = l.rowid) ORDER BY l.rowid""",
}


def _ends(ns: int) -> list[sa.ScalarSelect[str]]:
    """Smallest and largest fingerprint of a namespace's vectors: two look-ups in the index instead of a scan."""
    return [
        select(end(vectors.c.fingerprint)).where(vectors.c.namespace_id == ns).scalar_subquery()
        for end in (func.min, func.max)
    ]


def _on_connect(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself; _on_begin does
    for pragma in ("foreign_keys = ON", "synchronous = FULL", "secure_delete = ON"):
        connection.execute(f"PRAGMA {pragma}")
    try:
        connection.execute("PRAGMA journal_mode = WAL")
    except sqlite3.OperationalError as error:
        if "readonly" not in str(error):
            raise  # a read-only medium can still be read; the first write says what is wrong


def _on_begin(connection: sa.Connection) -> None:
    write = connection.get_execution_options().get("memos_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _problem(path: Path, error: BaseException | None) -> str:
    text = str(error)
    if "disk is full" in text or "disk full" in text:
        return f"{path}: the disk is full; nothing was changed. Free some space and try again"
    if "readonly" in text or "unable to open" in text:
        return f"{path} cannot be written ({text}); check the permissions of the file and of its folder"
    if "locked" in text:
        return f"{path} was locked by another process for {BUSY_TIMEOUT_S} s; nothing was changed. Try again"
    if "not a database" in text or "malformed" in text:
        return f"{path} is not a memory_os database, or is damaged ({text}); name another file or restore a backup"
    return f"{path}: {text}; nothing was changed"


def _revision_of(connection: sa.Connection) -> str | None:
    if not connection.exec_driver_sql("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").first():
        return None
    return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one_or_none()


def _labels(namespace: Namespace) -> str:
    return json.dumps(namespace, ensure_ascii=False)


def _parts(values: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), IN_LIMIT):
        yield values[start : start + IN_LIMIT]


def _as_seq(ref: str) -> int | None:
    digits = ref.removeprefix("#")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else None


def _iso(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="microseconds")


def _entry(ns: int, terms: Sequence[str]) -> str:
    # the namespace is part of every term: a search cannot reach another one's entries
    return " ".join(f"{ns}_{term}" for term in terms)


def _heaviest(postings: Sequence[Sequence[int]], weights: Sequence[float], n: int) -> list[int]:
    """The ``n`` rows whose terms weigh most together, ties by the smaller row."""
    import numpy as np

    rows = np.concatenate([np.asarray(pks, dtype=np.int64) for pks in postings])
    each = np.repeat(np.asarray(weights), [len(pks) for pks in postings])
    distinct, where = np.unique(rows, return_inverse=True)
    totals = np.bincount(where, weights=each, minlength=len(distinct))
    best: list[int] = distinct[np.lexsort((distinct, -totals))[:n]].tolist()
    return best


def _lexical_terms(connection: sa.Connection, pk: int) -> list[str] | None:
    row = connection.exec_driver_sql("SELECT terms FROM lexical WHERE rowid = ?", (pk,)).one_or_none()
    return row[0].split() if row else None


def _rows(connection: sa.Connection, pks: Sequence[str | int]) -> Iterator[sa.Row[Any]]:
    for part in _parts([int(pk) for pk in pks]):
        yield from connection.execute(select(segments).where(segments.c.pk.in_(part))).all()


def _rewrite_lexical(connection: sa.Connection) -> None:
    connection.exec_driver_sql("INSERT INTO lexical(lexical) VALUES ('rebuild')")  # so that the deletion finds its way
    connection.exec_driver_sql("DELETE FROM lexical")
    pks = connection.execute(select(segments.c.pk).order_by(segments.c.pk)).scalars().all()
    for row in _rows(connection, pks):
        connection.exec_driver_sql(
            "INSERT INTO lexical(rowid, terms) VALUES (?, ?)", (row.pk, _entry(row.namespace_id, terms_of(row.text)))
        )


def _recount(connection: sa.Connection) -> None:
    for ns in connection.execute(select(namespaces.c.id)).scalars().all():
        rows = connection.exec_driver_sql(
            "SELECT l.terms FROM lexical l JOIN segments s ON s.pk = l.rowid WHERE s.namespace_id = ?", (ns,)
        )
        lengths = [len(terms.split()) for (terms,) in rows]
        connection.execute(
            namespaces.update().where(namespaces.c.id == ns).values(n_segments=len(lengths), n_terms=sum(lengths))
        )


def _to_row(segment: Segment, ns: int) -> dict[str, Any]:
    start, end = segment.offset or (None, None)
    return {
        "id": segment.id,
        "namespace_id": ns,
        "seq": segment.seq,
        "session": segment.session,
        "role": segment.role,
        "speaker": segment.speaker,
        "kind": segment.kind,
        "text": segment.text,
        "created_at": _iso(segment.created_at),
        "n_tokens": segment.n_tokens,
        "source": segment.source,
        "offset_start": start,
        "offset_end": end,
        "metadata": dict(segment.metadata),
        "key": segment.key,
    }


def _to_segment(row: sa.Row[Any], namespace: Namespace) -> Segment:
    return Segment(
        id=row.id,
        seq=row.seq,
        namespace=namespace,
        session=row.session,
        role=row.role,
        speaker=row.speaker,
        kind=row.kind,
        text=row.text,
        created_at=datetime.fromisoformat(row.created_at),
        n_tokens=row.n_tokens,
        source=row.source,
        offset=None if row.offset_start is None else (row.offset_start, row.offset_end),
        metadata=row.metadata,
        key=row.key,
    )
