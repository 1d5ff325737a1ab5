"""Nearest segments by pgvector, in the records' database: a table for each embedder, derived from the vector rows.

A small namespace is searched exactly. A large one has an HNSW graph of its own, a partial index, so that what others
hold takes nothing from what is found here; it is made when the namespace has grown to that size, and searches are exact
until it is there. A row goes in the transaction in which the row that it was made of goes; and as those of a namespace
get numbers that grow, what is new is what has a higher one.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from memory_os.errors import MissingExtraError, StoreError
from memory_os.stores.backend import again
from memory_os.stores.namespaces import locate
from memory_os.stores.partitions import create, part_of
from memory_os.stores.rows import check_dimension, check_lengths
from memory_os.types import Namespace

if TYPE_CHECKING:
    from memory_os.protocols import Vector
    from memory_os.stores.postgres import Postgres

__all__ = ["PgVectorIndex"]

EXACT_UP_TO = 10_000
"""A namespace with more vectors than this is searched by HNSW. From 5,000 on it is the faster one, but what is exact
finds all, and takes some 11 ms for so many (docs/scale.md)."""
WALKING = {
    "hnsw.iterative_scan": "strict_order",  # on, while what it finds came after ``upto``
    "hnsw.max_scan_tuples": "200000",
    "enable_sort": "off",  # or the planner, which knows little of a table that was just filled, reads all of it
}
BATCH = 500
"""Rows that are added in one transaction: a graph takes some milliseconds for each, and writers wait meanwhile."""
MAX_DIMENSION = 2000
"""Of what an HNSW index of pgvector holds; longer vectors are searched exactly."""
OLDEST = (0, 8)
MAKING = 0x6D656D6F74  # the advisory lock's number
NO_EXTENSION = (
    "vectors='pgvector' needs the extension vector {version}in the database; install pgvector on the server and, as "
    "its superuser in this database, run: CREATE EXTENSION vector -- or use vectors='exact', which needs nothing"
)
OF_ROWS = "FROM vectors WHERE namespace_id = :ns AND fingerprint = :f"
AT_IT = sa.text(  # the lock of one who makes an index meanwhile
    "SELECT 1 FROM pg_locks WHERE relation = CAST(:table AS regclass) AND mode = 'ShareUpdateExclusiveLock' AND granted"
)
NEW_ROWS = """
    SELECT v.pk, v.segment_pk, s.seq, v.vector FROM vectors v
    JOIN segments s ON s.namespace_id = v.namespace_id AND s.pk = v.segment_pk
    WHERE v.namespace_id = :ns AND v.fingerprint = :f AND v.pk > :last ORDER BY v.pk LIMIT :k"""
ADD = """
    INSERT INTO {} (namespace_id, vector_pk, segment_pk, seq, vector)
    SELECT %s, * FROM unnest(%s::bigint[], %s::bigint[], %s::bigint[], %b::vector[])"""
NOTE = """
    INSERT INTO near (namespace_id, fingerprint, last, n) VALUES (:ns, :f, :last, :n)
    ON CONFLICT (namespace_id, fingerprint) DO UPDATE SET last = excluded.last, n = excluded.n"""
log = logging.getLogger(__name__)


@again
class PgVectorIndex:
    """``VectorIndex`` over pgvector.

    :param database: where the rows are.
    :param fingerprint: the embedder whose vectors are indexed.
    :raises StoreError: if the server has no pgvector, or too old a one.
    """

    def __init__(self, database: Postgres, *, fingerprint: str) -> None:
        try:
            import pgvector  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("vectors='pgvector'", "pgvector", "postgres") from error
        self._database = database
        self._fingerprint = fingerprint
        self._table = f"near_{hashlib.sha256(fingerprint.encode()).hexdigest()[:12]}"
        self._dimension: int | None = None
        self._with_graph: set[int] = set()
        self._gave_up: set[int] = set()
        self._make_extension()

    # -- reading ---------------------------------------------------------------------------------------------------

    def search(
        self, namespace: Namespace, vector: Vector, k: int, *, upto: int | None = None
    ) -> list[tuple[str, float]]:
        """The ``k`` best ``(segment id, cosine)`` among segments with ``seq <= upto``."""
        n = self._synced(namespace)
        if k < 1 or not n:
            return []
        check_dimension(self._fingerprint, self._dimension, len(vector))
        bound = "" if upto is None else "AND seq <= :upto"
        with self._database.read(namespace) as connection:
            ns, _ = locate(connection, namespace)
            graph = n > EXACT_UP_TO and self._has_graph(connection, ns)
            if graph:
                settings = WALKING | {"hnsw.ef_search": str(min(1000, max(200, 4 * k)))}
                wanted = ", ".join(f"set_config('{name}', '{value}', true)" for name, value in settings.items())
                connection.exec_driver_sql(f"SELECT {wanted}")
            # a sum is not what the graph is in order of: it is not walked, and ties go to the smaller seq
            order = "vector <#> CAST(:vector AS vector)" if graph else "(vector <#> CAST(:vector AS vector)) + 0, seq"
            query = f"""SELECT s.id, n.seq, n.distance FROM (
                    SELECT segment_pk, seq, vector <#> CAST(:vector AS vector) AS distance FROM {self._table}
                    WHERE namespace_id = CAST(:ns AS bigint) {bound} ORDER BY {order} LIMIT :k) n
                JOIN segments s ON s.namespace_id = :ns AND s.pk = n.segment_pk"""
            told = {"ns": ns, "vector": _as_text(vector), "k": k} | ({} if upto is None else {"upto": upto})
            rows = connection.execute(sa.text(query), told).all()
        return [(id_, -distance) for id_, _, distance in sorted(rows, key=lambda row: (row[2], row[1]))]

    def similarities(self, namespace: Namespace, vector: Vector, ids: Sequence[str]) -> Vector:
        """The cosines of these segments, in their order, as of the last search; 0 for one that has no vector."""
        import numpy as np

        query = sa.text(
            f"""SELECT s.id, -(n.vector <#> CAST(:vector AS vector)) FROM segments s
            JOIN vectors v ON v.namespace_id = :ns AND v.segment_pk = s.pk
            JOIN {self._table} n ON n.namespace_id = :ns AND n.vector_pk = v.pk
            WHERE s.namespace_id = :ns AND s.id = ANY(:ids)"""
        )
        found: dict[str, float] = {}
        with self._database.read(namespace) as connection:
            if self._exists(connection):
                ns, _ = locate(connection, namespace)
                told = {"ns": ns, "vector": _as_text(vector), "ids": list(ids)}
                found = {id_: float(cosine) for id_, cosine in connection.execute(query, told)}
        return np.array([found.get(id_, 0.0) for id_ in ids], dtype=np.float32)

    def ids(self, namespace: Namespace) -> set[str]:
        """What the table holds now."""
        query = f"""SELECT s.id FROM {self._table} n JOIN segments s
            ON s.namespace_id = n.namespace_id AND s.pk = n.segment_pk WHERE n.namespace_id = :ns"""
        with self._database.read(namespace) as connection:
            if not self._exists(connection):
                return set()
            ns, _ = locate(connection, namespace)
            return set(connection.execute(sa.text(query), {"ns": ns}).scalars())

    # -- keeping in step -------------------------------------------------------------------------------------------

    def sync(self, namespace: Namespace) -> None:
        """Add the rows that are new."""
        self._synced(namespace)

    def _synced(self, namespace: Namespace) -> int:
        """Bring the namespace up to date; how many vectors it has then, or had when it was last brought up to date."""
        with self._database.read(namespace) as connection:
            ns, _ = locate(connection, namespace)
            told = {"ns": ns, "f": self._fingerprint}
            newest = connection.execute(sa.text(f"SELECT max(pk) {OF_ROWS}"), told).scalar_one() or 0
            exists = self._exists(connection)
            last, n = self._state(connection, ns) if exists else (0, 0)
            if newest <= last:
                return n
            if not exists:
                length = connection.execute(sa.text(f"SELECT length(vector) {OF_ROWS} LIMIT 1"), told).scalar_one()
        if not exists:
            self._make_table(length // 4)
        while self._add_batch(namespace) == BATCH:
            pass
        with self._database.read(namespace) as connection:
            n = self._state(connection, ns)[1]
        if n > EXACT_UP_TO:
            self._make_graph(namespace, ns)
        return n

    def _add_batch(self, namespace: Namespace) -> int:
        """Add rows that are new, a durable batch of them; how many."""
        import numpy as np
        from pgvector.psycopg import register_vector

        with self._database.write(namespace) as connection:
            ns, _ = locate(connection, namespace, lock=True)  # nobody adds any, or makes them here, meanwhile
            last, n = self._state(connection, ns)
            told = {"ns": ns, "f": self._fingerprint, "last": last, "k": BATCH}
            rows = connection.execute(sa.text(NEW_ROWS), told).all()
            if rows:
                driver: Any = connection.connection.driver_connection
                register_vector(driver)
                pks, segment_pks, seqs, blobs = (list(column) for column in zip(*rows, strict=True))
                made = [np.frombuffer(blob, dtype="<f4") for blob in blobs]
                check_lengths(self._fingerprint, {self._dimension, *map(len, made)})
                with driver.cursor() as cursor:
                    cursor.execute(ADD.format(self._table), (ns, pks, segment_pks, seqs, made))
                told = {"ns": ns, "f": self._fingerprint, "last": rows[-1].pk, "n": n + len(rows)}
                connection.execute(sa.text(NOTE), told)
        return len(rows)

    def drop(self, namespace: Namespace) -> None:
        """Remove the namespace's rows; the next search makes them anew."""
        with self._database.write(namespace) as connection:
            ns, _ = locate(connection, namespace, lock=True)
            if self._exists(connection):
                connection.execute(sa.text(f"DELETE FROM {self._table} WHERE namespace_id = :ns"), {"ns": ns})
                gone = sa.text("DELETE FROM near WHERE namespace_id = :ns AND fingerprint = :f")
                connection.execute(gone, {"ns": ns, "f": self._fingerprint})
            graph = self._has_graph(connection, ns)
        if graph:  # a new one is made faster than as many rows are added to it
            self._drop_graph(ns)

    def purge(self, namespaces: Collection[Namespace] | None) -> bool:
        """Nothing: what was forgotten went with its segments, and is cleaned away with them (``Backend.scrub``)."""
        return True

    def close(self) -> None:
        """Nothing to release: the connections are the records'."""

    # -- tables ----------------------------------------------------------------------------------------------------

    def _exists(self, connection: sa.Connection) -> bool:
        if self._dimension is None:
            query = sa.text(
                "SELECT atttypmod FROM pg_attribute WHERE attrelid = to_regclass(:t) AND attname = 'vector'"
            )
            self._dimension = connection.execute(query, {"t": self._table}).scalar_one_or_none()
        return self._dimension is not None

    def _state(self, connection: sa.Connection, ns: int) -> tuple[int, int]:
        """``(last row that was added, how many there were then)``."""
        query = sa.text("SELECT last, n FROM near WHERE namespace_id = :ns AND fingerprint = :f")
        row = connection.execute(query, {"ns": ns, "f": self._fingerprint}).one_or_none()
        return (row.last, row.n) if row else (0, 0)

    def _make_extension(self) -> None:
        query = sa.text("SELECT extversion FROM pg_extension WHERE extname = 'vector'")
        with self._database.read() as connection:
            version = connection.execute(query).scalar_one_or_none()
        if version is None:
            try:
                with self._database.write() as connection:
                    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({MAKING})")
                    connection.exec_driver_sql("CREATE EXTENSION IF NOT EXISTS vector")
                    version = connection.execute(query).scalar_one()
            except StoreError as error:
                raise StoreError(f"{self._database.place}: {NO_EXTENSION.format(version='')} ({error})") from error
        if tuple(map(int, version.split(".")[:2])) < OLDEST:
            needed = f"{OLDEST[0]}.{OLDEST[1]} or newer (it is {version}; then: ALTER EXTENSION vector UPDATE) "
            raise StoreError(f"{self._database.place}: {NO_EXTENSION.format(version=needed)}")

    def _make_table(self, dimension: int) -> None:
        with self._database.write() as connection:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({MAKING})")
            if self._exists(connection):
                return
            if connection.exec_driver_sql("SELECT to_regclass('near')::text").scalar_one() is None:
                create(
                    connection,
                    "near",
                    """namespace_id bigint NOT NULL REFERENCES namespaces, fingerprint text COLLATE "C" NOT NULL,
                    last bigint NOT NULL, n bigint NOT NULL, PRIMARY KEY (namespace_id, fingerprint)""",
                )
            create(
                connection,
                self._table,
                f"""namespace_id bigint NOT NULL, vector_pk bigint NOT NULL, segment_pk bigint NOT NULL,
                seq bigint NOT NULL, vector vector({dimension}) NOT NULL, PRIMARY KEY (namespace_id, vector_pk),
                FOREIGN KEY (namespace_id, vector_pk) REFERENCES vectors (namespace_id, pk) ON DELETE CASCADE""",
                partitioned=True,
            )
            self._exists(connection)  # and so its dimension is known

    def _has_graph(self, connection: sa.Connection, ns: int) -> bool:
        if ns not in self._with_graph:
            query = sa.text("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name)")
            if connection.execute(query, {"name": self._graph(ns)}).scalar_one_or_none():
                self._with_graph.add(ns)
        return ns in self._with_graph

    def _graph(self, ns: int) -> str:
        return f"{self._table}_ns{ns}"

    def _make_graph(self, namespace: Namespace, ns: int) -> None:
        """Make the namespace's graph, if there is none and nobody is at it; others read and write meanwhile.

        Where it cannot be made, searches go on without it, and whoever opens the store next tries again.
        """
        assert self._dimension
        if self._dimension > MAX_DIMENSION or ns in self._gave_up:
            return
        with self._database.read(namespace) as connection:
            if self._has_graph(connection, ns):
                return
            table = f"{self._table}_p{part_of(connection, ns)}"
            if connection.execute(AT_IT, {"table": table}).first():
                return
        try:
            self._drop_graph(ns)  # of one who was killed at it
            self._database.run_alone(
                f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {self._graph(ns)} ON {table} "
                f"USING hnsw (vector vector_ip_ops) WHERE namespace_id = {ns}"
            )
        except StoreError as error:
            self._gave_up.add(ns)
            log.warning("a large namespace is searched without a graph, exactly and more slowly: %s", error)

    def _drop_graph(self, ns: int) -> None:
        self._with_graph.discard(ns)
        self._database.run_alone(f"DROP INDEX CONCURRENTLY IF EXISTS {self._graph(ns)}")


def _as_text(vector: Vector) -> str:
    return f"[{','.join(map(repr, vector.tolist()))}]"
