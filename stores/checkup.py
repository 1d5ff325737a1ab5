"""What can be wrong between the tables, how it is found, and how it is mended from the segments."""

from __future__ import annotations

import glob
import json
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import select

from memory_os.errors import StoreError
from memory_os.lexical import terms_of
from memory_os.stores import fulltext, scrub
from memory_os.stores.database import Database
from memory_os.stores.rows import parts
from memory_os.stores.schema import VECTOR_TASK, item_texts, namespaces, pending, segments, vectors

if TYPE_CHECKING:
    from memory_os.types import Trace

__all__ = ["find_deep_faults", "find_faults", "mend", "mend_deep"]

FAULTS = {
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
    "pending_item_vectors": """
        SELECT pk FROM item_texts WHERE fingerprint IS NULL UNION ALL
        SELECT pk FROM item_texts WHERE fingerprint != :f""",
    "orphan_item_texts": """
        SELECT t.pk FROM item_texts t WHERE NOT EXISTS
        (SELECT 1 FROM items i WHERE i.pk = t.item_pk AND i.namespace_id = t.namespace_id) ORDER BY t.pk""",
}

RECORDS = """
    SELECT 'segments ' || pk || ': metadata is no JSON' FROM segments WHERE NOT json_valid(metadata) UNION ALL
    SELECT 'segments ' || pk || ': created_at is no time' FROM segments WHERE datetime(created_at) IS NULL UNION ALL
    SELECT 'segments ' || pk || ': unknown role' FROM segments
        WHERE role NOT IN ('user', 'assistant', 'system', 'tool') UNION ALL
    SELECT 'segments ' || pk || ': unknown kind' FROM segments
        WHERE kind NOT IN ('turn', 'document', 'note', 'summary') UNION ALL
    SELECT 'namespaces ' || id || ': labels are no JSON list' FROM namespaces
        WHERE NOT json_valid(labels) OR json_type(CASE WHEN json_valid(labels) THEN labels END) != 'array' UNION ALL
    SELECT 'items ' || pk || ': value is no JSON' FROM items WHERE NOT json_valid(value) UNION ALL
    SELECT 'items ' || pk || ': path is no JSON' FROM items WHERE NOT json_valid(path) UNION ALL
    SELECT 'items ' || pk || ': updated_at is no time' FROM items WHERE datetime(updated_at) IS NULL""" + "".join(
    f""" UNION ALL SELECT '{table} ' || {key} || ': its namespace is not there' FROM {table} t
        WHERE NOT EXISTS (SELECT 1 FROM namespaces n WHERE n.id = t.namespace_id)"""
    for table, key in (("segments", "pk"), ("items", "pk"), ("traces", "id"))
)


def find_faults(database: Database, fingerprint: str) -> dict[str, list[str]]:
    """Faults of the whole store by kind, each with the rows concerned.

    The kinds of ``FAULTS``; ``lexical_index`` where entries and their index differ; ``unfinished`` where what was
    forgotten may still stand in the files; ``records`` that cannot be read and ``damage``, which only a backup mends.

    :raises StoreError: if the store cannot be written, which this check needs.
    """
    readable = _reads_lexical(database)
    with database.read() as connection:
        faults = _linked(connection, fingerprint, lexical=readable)
        faults["records"] = list(connection.exec_driver_sql(RECORDS).scalars())
        faults["unfinished"] = ["the files are still to be scrubbed"] if scrub.due(connection) else []
        lines = connection.exec_driver_sql("PRAGMA quick_check").scalars().all()
        faults["damage"] = [] if lines == ["ok"] else [str(line) for line in lines]
    if not readable:
        return faults | {"lexical_index": ["the lexical index cannot be read"]}
    try:
        with database.write() as connection:
            connection.exec_driver_sql("INSERT INTO lexical(lexical) VALUES ('integrity-check')")
        faults["lexical_index"] = []
    except StoreError as error:
        if "damaged" not in str(error):
            raise
        faults["lexical_index"] = ["the lexical index does not match its entries"]
    return faults


def _linked(connection: sa.Connection, fingerprint: str, *, lexical: bool = True) -> dict[str, list[str]]:
    """The kinds of ``FAULTS``; without those of the lexical index, which are then empty."""
    asked = {kind: query for kind, query in FAULTS.items() if lexical or "lexical" not in kind}
    found = {
        kind: [str(value) for value in connection.execute(sa.text(query), {"f": fingerprint}).scalars()]
        for kind, query in asked.items()
    }
    return {kind: found.get(kind, []) for kind in FAULTS}


def _reads_lexical(database: Database) -> bool:
    """Whether FTS5 takes its index for one."""
    try:
        with database.read() as connection:
            connection.exec_driver_sql("SELECT rowid FROM lexical LIMIT 1").first()
    except StoreError as error:
        if "constructor failed" not in str(error):
            raise
        return False
    return True


def mend(database: Database, found: Mapping[str, Sequence[str]], fingerprint: str) -> None:
    """Mend what can be mended from the segments; vectors to be made are left pending."""
    if found["lexical_index"] and not _reads_lexical(database):
        with database.write() as connection:
            fulltext.clear(connection)
    with database.write() as connection:
        faults = {**found, **_linked(connection, fingerprint)}  # as it is under the lock: others may be mending too
        for pk in faults["orphan_item_texts"]:
            connection.execute(item_texts.delete().where(item_texts.c.pk == int(pk)))
        for pk in faults["orphan_vectors"]:
            connection.execute(vectors.delete().where(vectors.c.pk == int(pk)))
        fulltext.remove(connection, [int(pk) for pk in faults["orphan_lexical"]])
        missing = _rows(connection, faults["missing_lexical"])
        fulltext.add(connection, [(row.pk, row.namespace_id, terms_of(row.text)) for row in missing])
        for row in _rows(connection, faults["missing_vectors"]):
            connection.execute(
                pending.insert().values(segment_pk=row.pk, task=VECTOR_TASK, namespace_id=row.namespace_id)
            )
        if faults["lexical_index"]:
            fulltext.rewrite(connection)
        if faults["orphan_vectors"]:
            connection.execute(namespaces.update().values(epoch=namespaces.c.epoch + 1))
        if any(faults[kind] for kind in ("orphan_lexical", "missing_lexical", "lexical_index")):
            fulltext.recount(connection)


def _rows(connection: sa.Connection, pks: Sequence[str]) -> Iterator[sa.Row[Any]]:
    for part in parts([int(pk) for pk in pks]):
        yield from connection.execute(select(segments).where(segments.c.pk.in_(part))).all()


# -- every row of a store, not only what goes with what ----------------------------------------------------------------

DEEP = {
    "wrong_seq": """
        SELECT pk FROM (SELECT pk, seq, lag(seq, 1, 0) OVER (PARTITION BY namespace_id ORDER BY pk) AS before
        FROM segments) WHERE seq <= before UNION
        SELECT s.pk FROM segments s JOIN namespaces n ON n.id = s.namespace_id WHERE s.seq > n.last_seq ORDER BY 1""",
    "wrong_vectors": """
        SELECT segment_pk FROM vectors WHERE fingerprint = :f AND (length(vector) != 4 * :d
        OR (:t > 0 AND (tokens IS NULL OR length(tokens) % :t != 0))) ORDER BY 1""",
    "wrong_item_vectors": """
        SELECT pk FROM item_texts WHERE fingerprint = :f AND length(vector) != 4 * :d ORDER BY 1""",
    "trace_columns": """
        SELECT id FROM traces WHERE json_valid(body) AND json_type(body, '$.query_id') IS NOT NULL
        AND (query_id IS NOT json_extract(body, '$.query_id') OR reply_id IS NOT json_extract(body, '$.reply_id'))
        ORDER BY 1""",
    "foreign_rows": " UNION ALL ".join(
        f"""SELECT '{table} ' || t.segment_pk FROM {table} t JOIN segments s ON s.pk = t.segment_pk
        WHERE t.namespace_id != s.namespace_id"""
        for table in ("pending", "summaries", "activations", "bank")
    ),
    "lost_sources": """
        SELECT s.pk FROM segments s JOIN json_each(s.metadata, '$.of') o WHERE s.kind = 'summary' AND NOT EXISTS
        (SELECT 1 FROM segments t WHERE t.namespace_id = s.namespace_id AND t.id = o.value) GROUP BY s.pk""",
}
TRACE_COLUMNS = """
    UPDATE traces SET query_id = json_extract(body, '$.query_id'), reply_id = json_extract(body, '$.reply_id')
    WHERE json_valid(body)"""
DERIVED = ("activations", "bank", "item_texts", "pending", "scores", "summaries", "vectors")
Progress = Callable[[str, int, int], None]


def find_deep_faults(
    database: Database,
    fingerprint: str,
    dimension: int,
    token_dimension: int,
    read_trace: Callable[[dict[str, Any]], Trace],
    progress: Progress | None = None,
) -> dict[str, list[str]]:
    """What ``find_faults`` does not look at, by kind, each with the rows concerned.

    Nothing where records, or the index of words, cannot be read.

    The kinds of ``DEEP``, ``integrity``, ``foreign_keys``, ``wrong_lexical`` (entries that are not what their segments
    give), ``counters``, ``traces`` (that cannot be read, or name another namespace), ``settings`` of the connection,
    ``permissions``, and ``copies`` of before an upgrade, which are no fault.

    :param read_trace: raises for what is none.
    :param progress: called with ``(what is looked at, done, of so many)``.
    """
    if not _reads_lexical(database):
        return {}
    with database.read() as connection:
        if connection.exec_driver_sql(RECORDS).first():
            return {}
        told = {"f": fingerprint, "d": dimension, "t": token_dimension}
        found = {
            kind: [str(value) for value in connection.execute(sa.text(query), told).scalars()]
            for kind, query in DEEP.items()
        }
        lines = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
        found["integrity"] = [] if lines == ["ok"] else [str(line) for line in lines]
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
        found["foreign_keys"] = [f"{table} {row}" for table, row, *_ in broken]
        found["wrong_lexical"], n_terms = _lexical_faults(connection, progress)
        found["counters"] = _counter_faults(connection, n_terms)
        found["traces"] = _trace_faults(connection, read_trace, progress)
        journal = connection.exec_driver_sql("PRAGMA journal_mode").scalar_one()
        synchronous = connection.exec_driver_sql("PRAGMA synchronous").scalar_one()
    found["settings"] = [
        *([] if journal == "wal" else [f"journal_mode is {journal}, not wal"]),
        *([] if synchronous == 2 else [f"synchronous is {synchronous}, not 2 (FULL)"]),
    ]
    files = sorted(database.path.parent.glob(glob.escape(database.path.name) + "*"))
    found["permissions"] = [file.name for file in files if _anybody_writes(file)]
    found["copies"] = [file.name for file in files if ".before-" in file.name]
    return found


def _anybody_writes(file: Path) -> bool:
    return bool(file.stat().st_mode & stat.S_IWOTH)


def _lexical_faults(connection: sa.Connection, progress: Progress | None) -> tuple[list[str], dict[int, int]]:
    """Rows whose entry is not what their text gives, and the number of terms of each namespace by its texts."""
    pks = connection.execute(select(segments.c.pk).order_by(segments.c.pk)).scalars().all()
    wrong: list[str] = []
    n_terms: dict[int, int] = {}
    done = 0
    for part in parts(pks):
        marks = ",".join("?" * len(part))
        entries = connection.exec_driver_sql(f"SELECT rowid, terms FROM lexical WHERE rowid IN ({marks})", tuple(part))
        stored = {pk: terms.split() for pk, terms in entries}
        for row in connection.execute(select(segments).where(segments.c.pk.in_(part))):
            terms = [f"{row.namespace_id}_{term}" for term in terms_of(row.text)]
            n_terms[row.namespace_id] = n_terms.get(row.namespace_id, 0) + len(terms)
            if row.pk in stored and stored[row.pk] != terms:  # one that is missing is found without this
                wrong.append(str(row.pk))
        done += len(part)
        if progress:
            progress("lexical entries", done, len(pks))
    return wrong, n_terms


def _counter_faults(connection: sa.Connection, n_terms: Mapping[int, int]) -> list[str]:
    counted = select(segments.c.namespace_id, sa.func.count()).group_by(segments.c.namespace_id)
    n_segments = {row.namespace_id: row[1] for row in connection.execute(counted)}
    return [
        row.labels
        for row in connection.execute(select(namespaces))
        if (row.n_segments, row.n_terms) != (n_segments.get(row.id, 0), n_terms.get(row.id, 0))
    ]


def _trace_faults(
    connection: sa.Connection, read_trace: Callable[[dict[str, Any]], Trace], progress: Progress | None
) -> list[str]:
    query = "SELECT t.id, t.body, n.labels FROM traces t LEFT JOIN namespaces n ON n.id = t.namespace_id ORDER BY t.id"
    wrong = []
    rows = connection.exec_driver_sql(query).all()
    for n, (id_, body, labels) in enumerate(rows, start=1):
        try:
            trace = read_trace(json.loads(body))
            if trace.id != id_ or list(trace.namespace) != json.loads(labels or "null"):
                wrong.append(id_)
        except (ValueError, KeyError, TypeError, AttributeError):  # whatever a body that is none can lead to
            wrong.append(id_)
        if progress and n % 1000 == 0:
            progress("traces", n, len(rows))
    return wrong


def mend_deep(database: Database, faults: Mapping[str, Sequence[str]]) -> None:
    """Mend what of it is derived; ``wrong_vectors`` are left pending."""
    with database.write() as connection:
        for row in _rows(connection, faults["wrong_vectors"]):
            connection.execute(vectors.delete().where(vectors.c.segment_pk == row.pk))
            listed = {"segment_pk": row.pk, "task": VECTOR_TASK, "namespace_id": row.namespace_id}
            connection.execute(pending.insert().prefix_with("OR IGNORE").values(listed))
        for pk in faults["wrong_item_vectors"]:
            unmade = item_texts.update().where(item_texts.c.pk == int(pk))
            connection.execute(unmade.values(fingerprint=None, vector=None))
        if faults["trace_columns"]:
            connection.exec_driver_sql(TRACE_COLUMNS)
        for fault in (*faults["foreign_rows"], *faults["foreign_keys"]):
            table, _, number = fault.partition(" ")
            if table in DERIVED and number.isdigit():
                column = "segment_pk" if fault in faults["foreign_rows"] else "rowid"
                connection.exec_driver_sql(f"DELETE FROM {table} WHERE {column} = ?", (int(number),))
        wrong = list(_rows(connection, faults["wrong_lexical"]))
        fulltext.remove(connection, [row.pk for row in wrong])
        fulltext.add(connection, [(row.pk, row.namespace_id, terms_of(row.text)) for row in wrong])
        if wrong or faults["counters"]:
            fulltext.recount(connection)
        if any(faults[kind] for kind in ("wrong_vectors", "wrong_lexical", "foreign_rows", "foreign_keys")):
            connection.execute(namespaces.update().values(epoch=namespaces.c.epoch + 1))
        highest = (
            select(sa.func.max(segments.c.seq)).where(segments.c.namespace_id == namespaces.c.id).scalar_subquery()
        )
        connection.execute(namespaces.update().where(namespaces.c.last_seq < highest).values(last_seq=highest))
