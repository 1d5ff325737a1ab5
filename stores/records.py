"""The source of truth in one database: records, vectors as rows, and the lexical index, in step by transaction.

Every write is one transaction, and begins with the lock of the namespace's row: a method that returns has reached the
disk, one that raises has changed nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, date, datetime
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
import uuid_utils
from sqlalchemy import func, select

from memory_os.echo import FIELD, repeated_by
from memory_os.lexical import TIME_TERMS, terms_of
from memory_os.protocols import Deleted, Profiles, State, VectorRows
from memory_os.redact import Redact, clean_key, clean_segment, clean_trace, cleaned
from memory_os.stores import digest, forgetting, fulltext, tombstones
from memory_os.stores import items as item_rows
from memory_os.stores.backend import Backend, again
from memory_os.stores.checkup import find_deep_faults, find_faults, mend, mend_deep
from memory_os.stores.namespaces import claim, locate
from memory_os.stores.rows import (
    SEGMENT_COLUMNS,
    VECTOR_COLUMNS,
    among,
    as_labels,
    as_seq,
    as_time,
    check_lengths,
    insert_many,
    own,
    parts,
    to_row,
    to_segment,
)
from memory_os.stores.schema import (
    SUMMARY_TASK,
    VECTOR_TASK,
    bank,
    namespaces,
    pending,
    scores,
    segments,
    store,
    summaries,
    traces,
    vectors,
)
from memory_os.stores.scrub import PATIENCE_S
from memory_os.trace import part_in, trace_from_dict, trace_to_dict, without_text
from memory_os.types import Kind, Namespace, NewSegment, Segment, Trace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from memory_os.protocols import Matrix

__all__ = ["Records"]

SCAN_PAGE = 1000
MANY = 256  # segments of one call

# Asked in every turn, so as plain SQL: building a statement takes longer than running it.
_LAST_VECTOR = "(SELECT max(pk) FROM vectors WHERE namespace_id = :ns AND fingerprint = :f)"
EPOCH = sa.text(f"SELECT (SELECT epoch FROM namespaces WHERE id = :ns), {_LAST_VECTOR}")
# smallest and largest fingerprint: two look-ups in the index instead of a scan for stale vectors
STATE = sa.text(f"""
    SELECT epoch, last_seq, n_segments,
        (SELECT pk FROM segments WHERE namespace_id = :ns ORDER BY seq DESC LIMIT 1), {_LAST_VECTOR},
        (SELECT count(*) FROM pending WHERE namespace_id = :ns AND task = :task),
        (SELECT min(fingerprint) FROM vectors WHERE namespace_id = :ns),
        (SELECT max(fingerprint) FROM vectors WHERE namespace_id = :ns)
    FROM namespaces WHERE id = :ns""")


@again
class Records:
    """``RecordStore`` over a database.

    :param count_tokens: gives a text's length in cl100k_base tokens.
    :param count_many: gives those of many texts, leaving the interpreter free meanwhile.
    :param redact: takes secrets out of all that is stored; names, which cannot be redacted, are refused.
    """

    def __init__(
        self,
        database: Backend,
        *,
        count_tokens: Callable[[str], int],
        count_many: Callable[[Sequence[str]], list[int]] | None = None,
        redact: Redact | None = None,
    ) -> None:
        self.database = database
        self._redact = redact
        self._count_tokens = count_tokens
        self._count_many = count_many
        self._ids: dict[Namespace, int] = {}

    # -- segments ------------------------------------------------------------------------------------------------

    def append(self, namespace: Namespace, new: Sequence[NewSegment], *, restore: bool = False) -> list[Segment]:
        """Store in the order given, with lexical entries and pending vectors.

        Leaves out what is already stored, and what was forgotten.

        :param restore: store also what was forgotten.
        """
        if not new:
            return []
        new = [self._cleaned(item) for item in new]
        prepared = self._all_prepared(new)
        with self.database.write(namespace) as connection:
            if restore:
                ns, _ = claim(connection, namespace)
                tombstones.lift(connection, ns, _names(new))
            return self._insert(connection, namespace, prepared, restore=restore)

    def forgotten(self, namespace: Namespace, new: Sequence[NewSegment]) -> int:
        """How many of these were forgotten, or sum up what was, and are not stored by ``append``."""
        with self.database.read(namespace) as connection:
            ns = self._namespace_id(connection, namespace)
            return len(_forgotten(connection, ns, [self._cleaned(item) for item in new]))

    def replace(self, namespace: Namespace, new: Sequence[NewSegment]) -> list[Segment]:
        """Store under their keys, in the order given, each in place of what is under its key and differs."""
        new = [self._cleaned(item) for item in new]
        wanted = {item.key: self._prepared(item) for item in new if item.key}  # the last of several under one key
        if not wanted:
            return []
        with self.database.write(namespace) as connection:
            ns, _ = claim(connection, namespace)
            there: dict[str, Segment] = {}
            for part in parts(list(wanted)):
                query = select(segments).where(segments.c.namespace_id == ns, segments.c.key.in_(part))
                there |= {row.key: to_segment(row, namespace) for row in connection.execute(query)}
            old = [segment.id for key, segment in there.items() if not _says_the_same(segment, wanted[key][0])]
            if old:
                going = digest.with_summaries(connection, ns, old)
                forgetting.remove(connection, self.database.bank_folder, ns, going)
            tombstones.lift(connection, ns, _names([item for item, _, _ in wanted.values()]))
            stored = self._insert(connection, namespace, list(wanted.values()))
        by_key = there | {segment.key: segment for segment in stored if segment.key}
        return [by_key[key] for key in wanted]

    def redacted(self, text: str) -> str:
        """The text as it would be stored."""
        return self._redact(text) if self._redact else text

    def _cleaned(self, item: NewSegment) -> NewSegment:
        return clean_segment(item, self._redact) if self._redact else item

    def _prepared(self, item: NewSegment) -> tuple[NewSegment, int, list[str]]:
        """A new segment with its length and its terms, which take time and need no lock."""
        return item, self._count_tokens(item.text), terms_of(item.text)

    def _all_prepared(self, new: Sequence[NewSegment]) -> list[tuple[NewSegment, int, list[str]]]:
        """As ``_prepared``; of many the lengths are counted in a thread, as counting leaves the interpreter free."""
        if self._count_many is None or len(new) < MANY:
            return [self._prepared(item) for item in new]
        with ThreadPoolExecutor(1) as pool:
            counted = pool.submit(self._count_many, [item.text for item in new])
            terms = [terms_of(item.text) for item in new]
            return list(zip(new, counted.result(), terms, strict=True))

    def _insert(
        self,
        connection: sa.Connection,
        namespace: Namespace,
        prepared: Sequence[tuple[NewSegment, int, list[str]]],
        *,
        restore: bool = False,
    ) -> list[Segment]:
        now = datetime.now(UTC)
        stored: list[Segment] = []
        ns, last_seq = claim(connection, namespace)
        keys = self._existing(connection, segments.c.key, [i.key for i, _, _ in prepared if i.key], ns)
        ids = self._existing(connection, segments.c.id, [i.id for i, _, _ in prepared if i.id], ns)
        gone = set() if restore else _forgotten(connection, ns, [item for item, _, _ in prepared])
        rows, n_terms = [], 0
        lexical: list[list[str]] = []
        for n, (item, n_tokens, terms) in enumerate(prepared):
            if n in gone or item.key in keys or item.id in ids:
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
                created_at=item.created_at.astimezone(UTC) if item.created_at else now,
                n_tokens=n_tokens,
                source=item.source,
                offset=item.offset,
                metadata=dict(item.metadata),
                key=item.key,
            )
            if item.key:
                keys.add(item.key)
            if item.id:
                ids.add(item.id)
            stored.append(segment)
            rows.append(to_row(segment, ns))
            lexical.append(terms)
            n_terms += len(terms)
        if not rows:
            return []
        insert_many(connection, segments, SEGMENT_COLUMNS, rows)
        pks = self._new_pks(connection, ns, stored)
        fulltext.add(connection, [(pk, ns, terms) for pk, terms in zip(pks, lexical, strict=True)])
        todo = select(segments.c.pk, sa.literal(VECTOR_TASK), sa.literal(ns)).where(
            segments.c.namespace_id == ns, segments.c.seq >= stored[0].seq
        )
        connection.execute(pending.insert().from_select(["segment_pk", "task", "namespace_id"], todo))
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

    def _new_pks(self, connection: sa.Connection, ns: int, stored: Sequence[Segment]) -> list[int]:
        new = segments.c.namespace_id == ns, segments.c.seq >= stored[0].seq
        return list(connection.execute(select(segments.c.pk).where(*new).order_by(segments.c.seq)).scalars())

    def _existing(self, connection: sa.Connection, column: sa.Column[Any], values: Sequence[str], ns: int) -> set[str]:
        found: set[str] = set()
        for part in parts(values):
            query = select(column).where(segments.c.namespace_id == ns, column.in_(part))
            found.update(connection.execute(query).scalars())
        return found

    def get(self, namespace: Namespace, ids: Iterable[str]) -> dict[str, Segment]:
        """The segments that exist, by id."""
        return {segment.id: segment for segment in self._having(namespace, segments.c.id, ids)}

    def by_key(self, namespace: Namespace, keys: Iterable[str]) -> dict[str, Segment]:
        """The segments that exist, by the key they were stored under."""
        wanted = {clean_key(key, self._redact) if self._redact else key: key for key in keys}
        found = self._having(namespace, segments.c.key, wanted)
        return {wanted[segment.key]: segment for segment in found if segment.key}

    def _having(self, namespace: Namespace, column: sa.Column[Any], values: Iterable[str]) -> list[Segment]:
        found: list[Segment] = []
        with self.database.read(namespace) as connection:
            ns = self._namespace_id(connection, namespace)
            for part in parts(list(values)):
                query = select(segments).where(segments.c.namespace_id == ns, column.in_(part))
                found += (to_segment(row, namespace) for row in connection.execute(query))
        return found

    def find(self, namespace: Namespace, ref: str | int) -> Segment | None:
        """The segment with this ``seq``; for text with this id, or if there is none and it says ``12`` or ``#12`` so.

        An id may be anything, a number too: it goes first, so that whoever has one gets its segment or none.
        """
        with self.database.read(namespace) as connection:
            mine = segments.c.namespace_id == self._namespace_id(connection, namespace)
            number = as_seq(ref) if isinstance(ref, str) else ref
            by_id, by_seq = segments.c.id == ref, segments.c.seq == number
            for which in (by_id, by_seq) if isinstance(ref, str) else (by_seq,):
                row = connection.execute(select(segments).where(mine, which)).one_or_none()
                if row:
                    return to_segment(row, namespace)
        return None

    def with_summaries(self, namespace: Namespace, ids: Sequence[str]) -> list[str]:
        """These ids, and those of every summary that was made of them or shown them, through all levels."""
        with self.database.read(namespace) as connection:
            return digest.with_summaries(connection, self._namespace_id(connection, namespace), ids)

    def tail(
        self,
        namespace: Namespace,
        n: int,
        *,
        session: str | None = None,
        upto: int | None = None,
        kind: Kind | None = None,
    ) -> list[Segment]:
        """The last ``n`` segments (of the session, of the kind) with ``seq <= upto``, in the order of ``seq``."""
        with self.database.read(namespace) as connection:
            query = select(segments).where(segments.c.namespace_id == self._namespace_id(connection, namespace))
            if session is not None:
                query = query.where(segments.c.session == session)
            if upto is not None:
                query = query.where(segments.c.seq <= upto)
            if kind is not None:
                query = query.where(segments.c.kind == kind)
            rows = connection.execute(query.order_by(segments.c.seq.desc()).limit(n)).all()
        return [to_segment(row, namespace) for row in reversed(rows)]

    def scan(self, namespace: Namespace, *, session: str | None = None, after: int = 0) -> Iterator[Segment]:
        """Every segment (of the session) with ``seq > after``, in the order of ``seq``, read page by page."""
        while True:
            with self.database.read(namespace) as connection:
                query = select(segments).where(
                    segments.c.namespace_id == self._namespace_id(connection, namespace), segments.c.seq > after
                )
                if session is not None:
                    query = query.where(segments.c.session == session)
                rows = connection.execute(query.order_by(segments.c.seq).limit(SCAN_PAGE)).all()
            if not rows:
                return
            yield from (to_segment(row, namespace) for row in rows)
            after = rows[-1].seq

    def last_seq(self, namespace: Namespace) -> int:
        """The highest ``seq`` ever given in the namespace."""
        with self.database.read(namespace) as connection:
            query = select(namespaces.c.last_seq).where(namespaces.c.labels == as_labels(namespace))
            return connection.execute(query).scalar_one_or_none() or 0

    def namespaces(self, *, emptied: bool = False) -> list[Namespace]:
        """All that hold anything, in alphabetical order; with ``emptied`` also those that held something once."""
        with self.database.read() as connection:
            items = sa.exists().where(*item_rows.live(namespaces.c.id, datetime.now(UTC)))
            query = select(namespaces.c.labels).where(sa.or_(namespaces.c.n_segments > 0, items, sa.literal(emptied)))
            return sorted(tuple(json.loads(labels)) for labels in connection.execute(query).scalars())

    def ids(
        self,
        namespace: Namespace,
        *,
        session: str | None = None,
        after: datetime | None = None,
        before: datetime | None = None,
    ) -> list[str]:
        """The ids of all segments (of the session) with event times in ``[after, before)``, in the order of ``seq``."""
        with self.database.read(namespace) as connection:
            query = select(segments.c.id).where(segments.c.namespace_id == self._namespace_id(connection, namespace))
            if session is not None:
                query = query.where(segments.c.session == session)
            if after is not None:
                query = query.where(segments.c.created_at >= as_time(after))
            if before is not None:
                query = query.where(segments.c.created_at < as_time(before))
            return list(connection.execute(query.order_by(segments.c.seq)).scalars())

    def delete(
        self,
        going: Mapping[Namespace, Sequence[str]],
        *,
        everything: bool = False,
        preview: bool = False,
        bury: bool = True,
    ) -> Deleted:
        """Delete segments and the summaries of them for good, with all that was derived from either.

        All scores of the namespaces go: nothing tells of which texts they are.

        :param everything: all that the namespaces hold, whatever segments are named.
        :param preview: only count.
        :param bury: leave tombstones.
        """
        counts = Counter(dict.fromkeys(forgetting.PLACES, 0))
        gone: set[bytes] | None = set()
        folder = self.database.bank_folder
        numbers: list[int] = []
        with self.database.write(next(iter(going)) if len(going) == 1 else None) as connection:
            for namespace, ids in going.items():
                ns, _ = locate(connection, namespace, lock=True)
                numbers.append(ns)
                removed = forgetting.forget(
                    connection, folder, ns, ids, everything=everything, bury=bury, preview=preview
                )
                counts.update(removed.counts)
                gone = None if gone is None or removed.gone is None else gone | removed.gone
            if preview or not any(counts.values()):
                connection.rollback()
                return Deleted(dict(counts), gone, 0, True)
            alone = not self.database.due(connection)
            return Deleted(dict(counts), gone if alone else None, self.database.mark(connection, numbers), alone)

    def scrub(self, deleted: Deleted | None, *, index_purged: bool, patience_s: float = PATIENCE_S) -> bool:
        """Leave nothing in the store's files of what was deleted, now or before; whether that is so now."""
        if deleted is None:
            return self.database.scrub_what_is_due(index_purged, patience_s=patience_s)
        return self.database.scrub(deleted.gone, deleted.mark, index_purged=index_purged, patience_s=patience_s)

    def files_with(self, texts: Iterable[str]) -> dict[str, list[str]]:
        """The files of the store in which any of these texts stands, in UTF-8 or as JSON escapes it, with those texts.

        Of the database, its log and its copies, the bank, the files of vectors, and the Chroma index. Of a database
        server none is looked at.
        """
        return self.database.files_with(texts)

    def still_held(self, texts: Iterable[str]) -> set[str]:
        """Those of the texts that something stored has in it."""
        with self.database.read() as connection:
            return forgetting.still_held(connection, set(texts))

    def _namespace_id(self, connection: sa.Connection, namespace: Namespace) -> int:
        """The namespace's number; -1, which no row has, if nothing was ever stored in it."""
        known = self._ids.get(namespace)
        if known is None:
            query = select(namespaces.c.id).where(namespaces.c.labels == as_labels(namespace))
            known = connection.execute(query).scalar_one_or_none()
            if known is None:
                return -1
            self._ids[namespace] = known
        return known

    # -- lexical -------------------------------------------------------------------------------------------------

    def search(self, namespace: Namespace, text: str, k: int, *, upto: int | None = None) -> list[tuple[str, float]]:
        """The ``k`` best ``(segment id, BM25)``; see ``fulltext.MAX_POSTINGS`` for very common terms."""
        with self.database.read(namespace) as connection:
            ns = self._namespace_id(connection, namespace)
            return fulltext.search(connection, ns, text, k, self._pk_bound(connection, ns, upto))

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

    @property
    def id(self) -> str:
        """A name of the store that no other has, but for copies of its file."""
        with self.database.read() as connection:
            id_: str = connection.execute(select(store.c.id)).scalar_one()
        return id_

    def vector_epoch(self, namespace: Namespace, fingerprint: str) -> tuple[int, int]:
        """``(epoch, last row)``; see ``VectorSource``."""
        with self.database.read(namespace) as connection:
            ns = self._namespace_id(connection, namespace)
            row = connection.execute(EPOCH, {"ns": ns, "f": fingerprint}).one()
        return row[0] or 0, row[1] or 0

    def read_vectors(
        self, namespace: Namespace, fingerprint: str, after: int = 0
    ) -> tuple[list[str], list[int], Matrix, int]:
        """The rows added after row ``after``, in the order in which they were added."""
        rows, ids, seqs, matrix = self.read_vector_rows(namespace, fingerprint, after, -1)
        return ids, seqs, matrix, int(rows[-1]) if ids else after

    def read_vector_rows(self, namespace: Namespace, fingerprint: str, after: int, limit: int) -> VectorRows:
        """The first rows after row ``after``, with their numbers.

        :param limit: most of them; -1 for all.
        """
        import numpy as np

        with self.database.read(namespace) as connection:
            ns = self._namespace_id(connection, namespace)
            query = (
                select(vectors.c.pk, segments.c.id, segments.c.seq, vectors.c.vector)
                .join(segments, sa.and_(own(segments, ns), segments.c.pk == vectors.c.segment_pk))
                .where(vectors.c.namespace_id == ns, vectors.c.fingerprint == fingerprint, vectors.c.pk > after)
                .order_by(vectors.c.pk)
            )
            found = connection.execute(query.limit(limit) if limit >= 0 else query).all()
        if not found:
            return VectorRows(np.empty(0, dtype=np.int64), [], [], np.empty((0, 0), dtype=np.float32))
        pks, ids, seqs, blobs = zip(*found, strict=True)
        check_lengths(fingerprint, set(map(len, blobs)))
        matrix = np.frombuffer(b"".join(blobs), dtype="<f4").reshape(len(found), -1).astype(np.float32, copy=False)
        return VectorRows(np.array(pks, dtype=np.int64), list(ids), list(seqs), matrix)

    def vector_rows(self, namespace: Namespace, fingerprint: str) -> NDArray[np.int64]:
        """The numbers of all rows that there are, rising: from the index alone, half a second for a million."""
        import numpy as np

        with self.database.read(namespace) as connection:
            mine = vectors.c.namespace_id == self._namespace_id(connection, namespace)
            query = select(vectors.c.pk).where(mine, vectors.c.fingerprint == fingerprint).order_by(vectors.c.pk)
            return np.fromiter(connection.execute(query).scalars(), dtype=np.int64)

    def count_vectors(self, namespace: Namespace, fingerprint: str) -> int:
        """How many rows ``read_vectors`` gives."""
        c = vectors.c
        with self.database.read(namespace) as connection:
            ns = self._namespace_id(connection, namespace)
            query = select(func.count()).where(c.namespace_id == ns, c.fingerprint == fingerprint)
            return connection.execute(query).scalar_one()

    def main_fingerprint(self) -> str | None:
        """The embedder that made the most vectors of the store; ``None`` where there are none."""
        number = func.count().label("number")
        query = select(vectors.c.fingerprint, number).group_by(vectors.c.fingerprint)
        with self.database.read() as connection:
            row = connection.execute(query.order_by(number.desc(), vectors.c.fingerprint).limit(1)).one_or_none()
        return row.fingerprint if row else None

    def vectors_of(
        self, namespace: Namespace, fingerprint: str, ids: Sequence[str]
    ) -> tuple[list[str], list[int], Matrix]:
        """The rows of these segments, of those that have one, in no order."""
        import numpy as np

        found: list[Any] = []
        with self.database.read(namespace) as connection:
            ns = self._namespace_id(connection, namespace)
            for part in parts(ids):
                query = (
                    select(segments.c.id, segments.c.seq, vectors.c.vector)
                    .join(vectors, sa.and_(own(vectors, ns), vectors.c.segment_pk == segments.c.pk))
                    .where(segments.c.namespace_id == ns, segments.c.id.in_(part), vectors.c.fingerprint == fingerprint)
                )
                found += connection.execute(query).all()
        if not found:
            return [], [], np.empty((0, 0), dtype=np.float32)
        check_lengths(fingerprint, {len(row.vector) for row in found})
        matrix = np.frombuffer(b"".join(row.vector for row in found), dtype="<f4").reshape(len(found), -1)
        return [row.id for row in found], [row.seq for row in found], matrix.astype(np.float32, copy=False)

    def read_tokens(self, namespace: Namespace, fingerprint: str, after: int = 0) -> list[tuple[int, bytes]]:
        """``(seq, token vectors)`` of the rows added after row ``after``, where there are any."""
        with self.database.read(namespace) as connection:
            ns = self._namespace_id(connection, namespace)
            rows = connection.execute(
                select(segments.c.seq, vectors.c.tokens)
                .join(segments, sa.and_(own(segments, ns), segments.c.pk == vectors.c.segment_pk))
                .where(
                    vectors.c.namespace_id == ns,
                    vectors.c.fingerprint == fingerprint,
                    vectors.c.pk > after,
                    vectors.c.tokens.is_not(None),
                )
                .order_by(vectors.c.pk)
            ).all()
        return [(row.seq, row.tokens) for row in rows]

    def state(self, namespace: Namespace, fingerprint: str) -> State:
        """Where the namespace stands now, by one query."""
        with self.database.read(namespace) as connection:
            ns = self._namespace_id(connection, namespace)
            row = connection.execute(STATE, {"ns": ns, "f": fingerprint, "task": VECTOR_TASK}).one_or_none()
            if row is None:
                return State(0, 0, 0, 0, 0, 0, 0)
            *numbers, listed, first, last = row
            stale = 0
            if any(end not in (None, fingerprint) for end in (first, last)):
                query = select(func.count()).where(vectors.c.namespace_id == ns, vectors.c.fingerprint != fingerprint)
                stale = connection.execute(query).scalar_one()
        return State._make(number or 0 for number in (*numbers, listed + stale, stale))

    def read_profiles(self, namespace: Namespace, after: int = 0) -> Profiles:
        """What recall keeps in memory of the segments added after row ``after``."""
        import numpy as np

        with self.database.read(namespace) as connection:
            ns = self._namespace_id(connection, namespace)
            asks = sa.or_(*(func.rtrim(segments.c.text).like(f"%{mark}") for mark in "?？"))
            c = segments.c
            # a question names people, and not "summary of jane_eyre.txt"
            who = sa.case((c.kind == "summary", c.role), else_=func.coalesce(c.speaker, c.role))
            written = sa.cast(c.metadata, sa.Text)
            echo = sa.case((sa.and_(c.role == "assistant", written.contains(f'"{FIELD}"')), written))
            rows = connection.execute(
                select(c.pk, c.id, c.seq, c.session, who, c.created_at, c.n_tokens, asks, c.role == "assistant", echo)
                .where(c.namespace_id == ns, c.pk > after)
                .order_by(c.seq)
            ).all()
            pks, ids, seqs, sessions, by, times, n_tokens, ends, replies, echoes = (
                zip(*rows, strict=True) if rows else [()] * 10
            )
            n_terms = fulltext.lengths(connection, ns, pks)
            timed = fulltext.holding(connection, ns, TIME_TERMS, pks)
        return Profiles(
            rows=np.array(pks, dtype=np.int64),
            ids=ids,
            seqs=seqs,
            sessions=sessions,
            who=by,
            days=[_day(time[:10]) for time in times],
            n_tokens=n_tokens,
            n_terms=[n_terms.get(pk, 0) for pk in pks],
            asks=ends,
            replies=replies,
            timed=[pk in timed for pk in pks],
            repeats={n: repeated_by(json.loads(metadata)) for n, metadata in enumerate(echoes) if metadata},
        )

    def postings(self, namespace: Namespace, terms: Iterable[str]) -> dict[str, NDArray[np.int64]]:
        """The rows in which each of these terms stands, rising, each as often as it does there."""
        with self.database.read(namespace) as connection:
            ns = self._namespace_id(connection, namespace)
            return {term: fulltext.places(connection, ns, term) for term in terms}

    def pending(
        self, namespace: Namespace, fingerprint: str, limit: int, *, newest: bool = False, stale: bool = True
    ) -> list[Segment]:
        """Segments whose vector under ``fingerprint`` is still to be made, oldest first, or newest first."""
        order = segments.c.pk.desc() if newest else segments.c.pk
        with self.database.read(namespace) as connection:
            query = self._pending_query(connection, namespace, fingerprint, select(segments), stale)
            rows = connection.execute(query.order_by(order).limit(limit)).all()
        return [to_segment(row, namespace) for row in rows]

    def count_pending(self, namespace: Namespace, fingerprint: str) -> int:
        """How many vectors are still to be made."""
        return self.state(namespace, fingerprint).n_pending

    def _has_stale(self, connection: sa.Connection, ns: int, fingerprint: str) -> bool:
        return any(end not in (None, fingerprint) for end in connection.execute(select(*_ends(ns))).one())

    def _pending_query(
        self, connection: sa.Connection, namespace: Namespace, fingerprint: str, query: sa.Select[Any], stale: bool
    ) -> sa.Select[Any]:
        ns = self._namespace_id(connection, namespace)
        listed = select(pending.c.segment_pk).where(pending.c.namespace_id == ns, pending.c.task == VECTOR_TASK)
        todo: sa.ColumnElement[bool] = segments.c.pk.in_(listed)
        if stale and self._has_stale(connection, ns, fingerprint):
            theirs = vectors.c.namespace_id == ns, vectors.c.fingerprint != fingerprint
            todo = sa.or_(todo, segments.c.pk.in_(select(vectors.c.segment_pk).where(*theirs)))
        return query.where(own(segments, ns), todo)

    def put_vectors(
        self,
        namespace: Namespace,
        fingerprint: str,
        ids: Sequence[str],
        matrix: Matrix,
        tokens: Sequence[bytes] | None = None,
    ) -> int:
        """Store vectors and strike the work off; ids that are gone by now are passed over. How many are new.

        They take the place of another embedder's; one that is there under the same fingerprint stays.
        """
        by_token: Sequence[bytes | None] = tokens or [None] * len(ids)
        n_new = 0
        blobs = {
            id_: (row.tobytes(), codes) for id_, row, codes in zip(ids, matrix.astype("<f4"), by_token, strict=True)
        }
        with self.database.write(namespace) as connection:
            ns, _ = locate(connection, namespace, lock=True)
            for part in parts(list(blobs)):
                query = select(segments.c.pk, segments.c.id).where(
                    segments.c.namespace_id == ns, segments.c.id.in_(part)
                )
                id_of: dict[int, str] = dict(sorted(map(tuple, connection.execute(query))))
                pks = list(id_of)
                if not pks:
                    continue
                theirs = sa.and_(own(vectors, ns), among(vectors.c.segment_pk, pks))
                there = connection.execute(select(vectors.c.segment_pk, vectors.c.fingerprint).where(theirs)).all()
                if any(other != fingerprint for _, other in there):
                    # the epoch stays: what is kept in memory of another embedder's vectors is still right
                    connection.execute(vectors.delete().where(theirs, vectors.c.fingerprint != fingerprint))
                made = {pk for pk, other in there if other == fingerprint}
                new = [(ns, pk, fingerprint, *blobs[id_of[pk]]) for pk in pks if pk not in made]
                n_new += len(new)
                if new:
                    insert_many(connection, vectors, VECTOR_COLUMNS, new)
                done = own(pending, ns), among(pending.c.segment_pk, pks), pending.c.task == VECTOR_TASK
                connection.execute(pending.delete().where(*done))
        return n_new

    # -- summaries and activations -------------------------------------------------------------------------------

    def read_summaries(self, namespace: Namespace, ids: Sequence[str], method: str) -> dict[str, str]:
        """The summaries by this method that there are, by segment id."""
        with self.database.read(namespace) as connection:
            return digest.read_summaries(connection, self._namespace_id(connection, namespace), ids, method)

    def put_summary(self, namespace: Namespace, id_: str, method: str, text: str) -> None:
        """Store a summary and strike the work off; nothing where the segment is gone by now."""
        with self.database.write(namespace) as connection:
            ns, _ = locate(connection, namespace, lock=True)
            digest.put_summary(connection, ns, id_, method, self.redacted(text))

    def list_for_summary(self, namespace: Namespace, ids: Sequence[str]) -> None:
        """Put segments on the list of those to be summarised."""
        with self.database.write(namespace) as connection:
            digest.put_on_list(connection, locate(connection, namespace, lock=True)[0], ids)

    def listed_for_summary(self, namespace: Namespace, limit: int) -> list[Segment]:
        """Segments still to be summarised, oldest first."""
        with self.database.read(namespace) as connection:
            ns = self._namespace_id(connection, namespace)
            listed = select(pending.c.segment_pk).where(pending.c.namespace_id == ns, pending.c.task == SUMMARY_TASK)
            query = select(segments).where(own(segments, ns), segments.c.pk.in_(listed))
            rows = connection.execute(query.order_by(segments.c.pk).limit(limit)).all()
        return [to_segment(row, namespace) for row in rows]

    def last_activations(self, namespace: Namespace) -> dict[int, int]:
        """``{seq of a segment: seq of the query in whose context it last stood}``, for recorded turns."""
        with self.database.read(namespace) as connection:
            return digest.last_activations(connection, self._namespace_id(connection, namespace))

    # -- scores --------------------------------------------------------------------------------------------------

    def read_scores(self, namespace: Namespace, keys: Sequence[str]) -> dict[str, Any]:
        """What was kept under these keys."""
        with self.database.read(namespace) as connection:
            return digest.read_scores(connection, self._namespace_id(connection, namespace), keys)

    def put_scores(self, namespace: Namespace, values: Mapping[str, Any], *, epoch: int) -> None:
        """Keep what an LLM made of texts, by key, as JSON; nothing if rows went away since ``epoch``."""
        if self._redact:
            values = {key: cleaned(value, self._redact) for key, value in values.items()}
        with self.database.write(namespace) as connection:
            ns, _ = claim(connection, namespace)
            now = connection.execute(select(namespaces.c.epoch).where(namespaces.c.id == ns)).scalar_one()
            if now == epoch:
                digest.put_scores(connection, ns, values)

    # -- traces --------------------------------------------------------------------------------------------------

    def save_trace(self, trace: Trace, *, restore: bool = False) -> None:
        """Store a trace, or replace the one with its id; nothing of a turn, or of words, that were forgotten."""
        if self._redact:
            trace = clean_trace(trace, self._redact)
        with self.database.write(trace.namespace) as connection:
            ns, _ = claim(connection, trace.namespace)
            name = tombstones.Names(traces=[trace.id])
            if restore:
                tombstones.lift(connection, ns, name)
            gone = tombstones.buried(connection, ns, name._replace(ids=part_in(trace)))
            connection.execute(traces.delete().where(traces.c.id == trace.id, traces.c.namespace_id == ns))
            if trace.id in gone.traces or {trace.query_id, trace.reply_id} & {*gone.ids}:
                return
            trace = without_text(trace, gone.ids)
            connection.execute(
                traces.insert().values(
                    id=trace.id,
                    namespace_id=ns,
                    query_id=trace.query_id,
                    reply_id=trace.reply_id,
                    created_at=as_time(trace.created_at),
                    body=trace_to_dict(trace),
                )
            )
            digest.note_activations(connection, ns, trace)

    def load_trace(self, namespace: Namespace, ref: str | int | None) -> Trace | None:
        """The trace with this id, or of the turn whose query or reply segment is ``ref``; the newest for ``None``."""
        this = traces.c.id == ref
        segment = self.find(namespace, ref) if ref is not None else None
        turn = sa.or_(*(column == segment.id for column in (traces.c.query_id, traces.c.reply_id))) if segment else this
        with self.database.read(namespace) as connection:
            mine = traces.c.namespace_id == self._namespace_id(connection, namespace)
            newest = select(traces.c.body).where(mine).order_by(traces.c.created_at.desc(), traces.c.id.desc()).limit(1)
            for which in [sa.true()] if ref is None else [this, turn] if isinstance(ref, str) else [turn]:
                body = connection.execute(newest.where(which)).scalar_one_or_none()
                if body is not None:
                    return trace_from_dict(body)
        return None

    def traces(self, namespace: Namespace) -> Iterator[Trace]:
        """Every trace of the namespace, oldest first."""
        with self.database.read(namespace) as connection:
            query = select(traces.c.id).where(traces.c.namespace_id == self._namespace_id(connection, namespace))
            ids = connection.execute(query.order_by(traces.c.created_at, traces.c.id)).scalars().all()
        for id_ in ids:
            trace = self.load_trace(namespace, id_)
            if trace is not None:
                yield trace

    # -- care ----------------------------------------------------------------------------------------------------

    def stats(self, namespace: Namespace, fingerprint: str | None = None) -> dict[str, Any]:
        """Counts of what the namespace holds.

        :param fingerprint: ``pending`` then counts vectors of another embedder as well, those of items included.
        """
        with self.database.read(namespace) as connection:
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
                for table in (vectors, summaries, pending, scores, bank, traces)
            }
            count["items"] = item_rows.count(connection, ns, datetime.now(UTC))
            if fingerprint is not None:
                stale = vectors.c.namespace_id == ns, vectors.c.fingerprint != fingerprint
                count["pending"] += connection.execute(select(func.count()).where(*stale)).scalar_one()
                count["pending"] += item_rows.count_pending(connection, ns, fingerprint)
        return {
            "segments": row[0],
            "sessions": row[1],
            "tokens": int(row[2]),
            "first": row[3],
            "last": row[4],
            **count,
            "file": self.database.place,
            "file_bytes": self.database.size_bytes(),
        }

    def check(self, fingerprint: str) -> dict[str, list[str]]:
        """Faults of the whole store by kind; see ``checkup``."""
        return find_faults(self.database, fingerprint)

    def repair(self, fingerprint: str) -> dict[str, int]:
        """Mend what ``check`` finds; vectors to be made are left on the pending list."""
        faults = self.check(fingerprint)
        if not faults["records"]:
            mend(self.database, faults, fingerprint)
        return {kind: len(found) for kind, found in faults.items()}

    def check_deep(
        self,
        fingerprint: str,
        dimension: int,
        token_dimension: int = 0,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> dict[str, list[str]]:
        """What ``check`` does not look at, row by row; see ``checkup.find_deep_faults``."""
        return find_deep_faults(self.database, fingerprint, dimension, token_dimension, trace_from_dict, progress)

    def repair_deep(self, faults: Mapping[str, Sequence[str]]) -> None:
        """Mend what of these is derived; vectors to be made are left on the pending list."""
        mend_deep(self.database, faults)

    def snapshot(self) -> AbstractContextManager[None]:
        """All that this thread reads meanwhile, items included, is of one moment; writers go on."""
        return self.database.snapshot()

    def close(self) -> None:
        """Release the database."""
        self.database.close()


@lru_cache(maxsize=4096)
def _day(text: str) -> int:
    return date.fromisoformat(text).toordinal()


def _names(new: Iterable[NewSegment]) -> tombstones.Names:
    every = list(new)
    return tombstones.Names({item.id for item in every if item.id}, {item.key for item in every if item.key})


def _forgotten(connection: sa.Connection, ns: int, new: Sequence[NewSegment]) -> set[int]:
    """Which of these, by position, were forgotten by id or key, or are summaries of what was."""
    sources = [set(digest.sources(item.metadata)) if item.kind == "summary" else set[str]() for item in new]
    names = _names(new)
    gone = tombstones.buried(connection, ns, tombstones.Names({*names.ids, *chain(*sources)}, names.keys))
    return {
        n
        for n, (item, of) in enumerate(zip(new, sources, strict=True))
        if item.id in gone.ids or item.key in gone.keys or not of.isdisjoint(gone.ids)
    }


def _says_the_same(segment: Segment, new: NewSegment) -> bool:
    """Whether storing ``new`` would change nothing; a time that it does not name counts for nothing."""
    same = all(
        getattr(segment, name) == getattr(new, name)
        for name in ("text", "session", "role", "speaker", "kind", "source", "offset")
    )
    return same and segment.metadata == new.metadata and new.created_at in (None, segment.created_at)


def _ends(ns: int) -> list[sa.ScalarSelect[str]]:
    """Smallest and largest fingerprint of a namespace's vectors: two look-ups in the index instead of a scan."""
    return [
        select(end(vectors.c.fingerprint)).where(vectors.c.namespace_id == ns).scalar_subquery()
        for end in (func.min, func.max)
    ]
