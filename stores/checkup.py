"""What can be wrong between the tables, how it is found, and how it is mended from the segments."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import select

from memory_os.lexical import terms_of
from memory_os.stores import fts5, fulltext
from memory_os.stores.backend import Backend
from memory_os.stores.rows import insert, own, parts
from memory_os.stores.schema import VECTOR_TASK, item_texts, namespaces, pending, segments, traces, vectors

if TYPE_CHECKING:
    from memory_os.types import Trace

__all__ = ["find_deep_faults", "find_faults", "find_lexical_faults", "mend", "mend_deep"]

DIFFER = {
    "sqlite": {
        "entry": "rowid",
        "sources": "json_each(s.metadata, '$.of') o",
        "is_not": "IS NOT",
        "readable": "json_valid(body) AND json_type(body, '$.query_id') IS NOT NULL",
        "query_id": "json_extract(body, '$.query_id')",
        "reply_id": "json_extract(body, '$.reply_id')",
    },
    "postgresql": {
        "entry": "segment_pk",
        "sources": """LATERAL json_array_elements_text(
            CASE WHEN json_typeof(s.metadata -> 'of') = 'array' THEN s.metadata -> 'of' ELSE '[]' END) o(value)""",
        "is_not": "IS DISTINCT FROM",
        "readable": "json_typeof(body) = 'object' AND body -> 'query_id' IS NOT NULL",
        "query_id": "(body ->> 'query_id')",
        "reply_id": "(body ->> 'reply_id')",
    },
}
"""What the two databases call by another name."""
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
        WHERE NOT EXISTS (SELECT 1 FROM lexical l WHERE l.{entry} = s.pk) ORDER BY s.pk""",
    "orphan_lexical": """
        SELECT l.{entry} FROM lexical l
        WHERE NOT EXISTS (SELECT 1 FROM segments s WHERE s.pk = l.{entry}) ORDER BY l.{entry}""",
    "pending_item_vectors": """
        SELECT pk FROM item_texts WHERE fingerprint IS NULL UNION ALL
        SELECT pk FROM item_texts WHERE fingerprint != :f""",
    "orphan_item_texts": """
        SELECT t.pk FROM item_texts t WHERE NOT EXISTS
        (SELECT 1 FROM items i WHERE i.pk = t.item_pk AND i.namespace_id = t.namespace_id) ORDER BY t.pk""",
}


def _unreadable(no_json: str, no_list: str, no_time: str) -> str:
    """The query for rows that cannot be read, given what holds for a column that is none of these."""
    wrong = (
        ("segments", "metadata is no JSON", no_json.format("metadata")),
        ("segments", "created_at is no time", no_time.format("created_at")),
        ("segments", "unknown role", "role NOT IN ('user', 'assistant', 'system', 'tool')"),
        ("segments", "unknown kind", "kind NOT IN ('turn', 'document', 'note', 'summary')"),
        ("namespaces", "labels are no JSON list", no_list.format("labels")),
        ("items", "value is no JSON", no_json.format("value")),
        ("items", "path is no JSON", no_list.format("path")),
        ("items", "updated_at is no time", no_time.format("updated_at")),
        *(
            (table, "its namespace is not there", "namespace_id NOT IN (SELECT n.id FROM namespaces n)")
            for table in ("segments", "items", "traces")
        ),
    )
    key = {"namespaces": "id", "traces": "id"}
    return " UNION ALL ".join(
        f"SELECT '{table} ' || {key.get(table, 'pk')} || ': {what}' FROM {table} WHERE {condition}"
        for table, what, condition in wrong
    )


RECORDS = {
    "sqlite": _unreadable(
        "NOT json_valid({0})",
        "(NOT json_valid({0}) OR json_type(CASE WHEN json_valid({0}) THEN {0} END) != 'array')",
        "datetime({0}) IS NULL",
    ),
    # its columns of JSON hold nothing else
    "postgresql": _unreadable("FALSE", r"{0} !~ '^\[.*\]$'", "{0} !~ '^[0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}T'"),
}


def find_faults(database: Backend, fingerprint: str) -> dict[str, list[str]]:
    """Faults of the whole store by kind, each with the rows concerned.

    The kinds of ``FAULTS``; ``lexical_index`` where entries and their index differ; ``unfinished`` where what was
    forgotten may still stand in the files; ``records`` that cannot be read and ``damage``, which only a backup mends.

    :raises StoreError: if the store cannot be written, which this check needs.
    """
    readable = database.reads_lexical()
    with database.read() as connection:
        faults = _linked(connection, fingerprint, lexical=readable)
        faults["records"] = list(connection.exec_driver_sql(RECORDS[connection.dialect.name]).scalars())
        faults["unfinished"] = ["the files are still to be scrubbed"] if database.due(connection) else []
    faults["damage"] = database.damage(deep=False)
    faults["lexical_index"] = database.lexical_damage() if readable else ["the lexical index cannot be read"]
    return faults


def find_lexical_faults(database: Backend) -> dict[str, list[str]]:
    """As ``find_faults``, of the lexical index only."""
    asked = {kind: query for kind, query in FAULTS.items() if "lexical" in kind}
    with database.read() as connection:
        faults = _found(connection, asked, {})
    return {**faults, "lexical_index": database.lexical_damage()}


def _linked(connection: sa.Connection, fingerprint: str, *, lexical: bool = True) -> dict[str, list[str]]:
    """The kinds of ``FAULTS``; without those of the lexical index, which are then empty."""
    asked = {kind: query for kind, query in FAULTS.items() if lexical or "lexical" not in kind}
    return {kind: list[str]() for kind in FAULTS} | _found(connection, asked, {"f": fingerprint})


def _found(connection: sa.Connection, queries: Mapping[str, str], told: Mapping[str, Any]) -> dict[str, list[str]]:
    """What each of the queries finds."""
    differ = DIFFER[connection.dialect.name]
    return {
        kind: [str(value) for value in connection.execute(sa.text(query.format(**differ)), told).scalars()]
        for kind, query in queries.items()
    }


def mend(database: Backend, found: Mapping[str, Sequence[str]], fingerprint: str) -> None:
    """Mend what can be mended from the segments; vectors to be made are left pending."""
    if found["lexical_index"] and not database.reads_lexical():
        with database.write() as connection:
            fts5.wipe(connection)
    with database.write() as connection:
        # as it is under the lock: others may be mending too
        faults = {**found, **_linked(connection, fingerprint)}
        for pk in faults["orphan_item_texts"]:
            connection.execute(item_texts.delete().where(item_texts.c.pk == int(pk)))
        for pk in faults["orphan_vectors"]:
            connection.execute(vectors.delete().where(vectors.c.pk == int(pk)))
        fulltext.remove(connection, 0, [int(pk) for pk in faults["orphan_lexical"]])  # PostgreSQL's keys let none be
        missing = _rows(connection, faults["missing_lexical"])
        fulltext.add(connection, [(row.pk, row.namespace_id, terms_of(row.text)) for row in missing])
        for row in _rows(connection, faults["missing_vectors"]):
            connection.execute(
                pending.insert().values(segment_pk=row.pk, task=VECTOR_TASK, namespace_id=row.namespace_id)
            )
        if faults["lexical_index"]:
            fulltext.rewrite(connection)
        words = any(faults[kind] for kind in ("orphan_lexical", "missing_lexical", "lexical_index"))
        if faults["orphan_vectors"] or words:  # what others keep in memory of either is to be read anew
            connection.execute(namespaces.update().values(epoch=namespaces.c.epoch + 1))
        if words:
            fulltext.recount(connection)


def _rows(connection: sa.Connection, pks: Sequence[str]) -> Iterator[sa.Row[Any]]:
    for part in parts([int(pk) for pk in pks]):
        yield from connection.execute(select(segments).where(segments.c.pk.in_(part))).all()


# -- every row of a store, not only what goes with what ----------------------------------------------------------------

DEEP = {
    "wrong_seq": """
        SELECT pk FROM (SELECT pk, seq, lag(seq, 1, 0) OVER (PARTITION BY namespace_id ORDER BY pk) AS before
        FROM segments) numbered WHERE seq <= before UNION
        SELECT s.pk FROM segments s JOIN namespaces n ON n.id = s.namespace_id WHERE s.seq > n.last_seq ORDER BY 1""",
    "wrong_vectors": """
        SELECT segment_pk FROM vectors WHERE fingerprint = :f AND (length(vector) != 4 * :d
        OR (:t > 0 AND (tokens IS NULL OR length(tokens) % NULLIF(:t, 0) != 0))) ORDER BY 1""",
    "wrong_item_vectors": """
        SELECT pk FROM item_texts WHERE fingerprint = :f AND length(vector) != 4 * :d ORDER BY 1""",
    "trace_columns": """
        SELECT id FROM traces WHERE {readable} AND (query_id {is_not} {query_id} OR reply_id {is_not} {reply_id})
        ORDER BY 1""",
    "foreign_rows": " UNION ALL ".join(
        f"""SELECT '{table} ' || t.segment_pk FROM {table} t JOIN segments s ON s.pk = t.segment_pk
        WHERE t.namespace_id != s.namespace_id"""
        for table in ("pending", "summaries", "activations", "bank")
    ),
    "lost_sources": """
        SELECT s.pk FROM segments s CROSS JOIN {sources} WHERE s.kind = 'summary' AND NOT EXISTS
        (SELECT 1 FROM segments t WHERE t.namespace_id = s.namespace_id AND t.id = o.value) GROUP BY s.pk""",
}
TRACE_COLUMNS = "UPDATE traces SET query_id = {query_id}, reply_id = {reply_id} WHERE {readable}"
DERIVED = ("activations", "bank", "item_texts", "pending", "scores", "summaries", "vectors")
Progress = Callable[[str, int, int], None]


def find_deep_faults(
    database: Backend,
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
    if not database.reads_lexical():
        return {}
    with database.read() as connection:
        if connection.exec_driver_sql(RECORDS[connection.dialect.name]).first():
            return {}
        found = _found(connection, DEEP, {"f": fingerprint, "d": dimension, "t": token_dimension})
        found["foreign_keys"] = database.broken_keys(connection)
        found["wrong_lexical"], n_terms = _lexical_faults(connection, progress)
        found["counters"] = _counter_faults(connection, n_terms)
        found["traces"] = _trace_faults(connection, read_trace, progress)
        found["settings"] = database.settings(connection)
    found["integrity"] = database.damage(deep=True)
    found["permissions"], found["copies"] = database.file_faults()
    return found


def _lexical_faults(connection: sa.Connection, progress: Progress | None) -> tuple[list[str], dict[int, int]]:
    """Rows whose entry is not what their text gives, and the number of terms of each namespace by its texts."""
    pks = connection.execute(select(segments.c.pk).order_by(segments.c.pk)).scalars().all()
    wrong: list[str] = []
    n_terms: dict[int, int] = {}
    done = 0
    for part in parts(pks):
        rows = connection.execute(select(segments).where(segments.c.pk.in_(part))).all()
        stored: dict[int, list[str]] = {}
        for ns, theirs in _by_namespace(rows).items():
            stored |= fulltext.read(connection, ns, [row.pk for row in theirs])
        for row in rows:
            terms = terms_of(row.text)
            n_terms[row.namespace_id] = n_terms.get(row.namespace_id, 0) + len(terms)
            if row.pk in stored and stored[row.pk] != terms:  # one that is missing is found without this
                wrong.append(str(row.pk))
        done += len(part)
        if progress:
            progress("lexical entries", done, len(pks))
    return wrong, n_terms


def _by_namespace(rows: Iterable[sa.Row[Any]]) -> dict[int, list[sa.Row[Any]]]:
    found: dict[int, list[sa.Row[Any]]] = {}
    for row in rows:
        found.setdefault(row.namespace_id, []).append(row)
    return found


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
    owned = traces.outerjoin(namespaces, namespaces.c.id == traces.c.namespace_id)
    # as it is written: a body that is no JSON is a fault to be told, and not to fail by
    columns = (traces.c.id, sa.cast(traces.c.body, sa.Text), namespaces.c.labels)
    wrong = []
    rows = connection.execute(select(*columns).select_from(owned).order_by(traces.c.id)).all()
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


def mend_deep(database: Backend, faults: Mapping[str, Sequence[str]]) -> None:
    """Mend what of it is derived; ``wrong_vectors`` are left pending."""
    with database.write() as connection:
        for row in _rows(connection, faults["wrong_vectors"]):
            connection.execute(vectors.delete().where(own(vectors, row.namespace_id), vectors.c.segment_pk == row.pk))
            listed = {"segment_pk": row.pk, "task": VECTOR_TASK, "namespace_id": row.namespace_id}
            connection.execute(insert(connection, pending).values(listed).on_conflict_do_nothing())
        for pk in faults["wrong_item_vectors"]:
            unmade = item_texts.update().where(item_texts.c.pk == int(pk))
            connection.execute(unmade.values(fingerprint=None, vector=None))
        if faults["trace_columns"]:
            differ = DIFFER[connection.dialect.name]
            connection.execute(sa.text(TRACE_COLUMNS.format(**differ)))
        for fault in (*faults["foreign_rows"], *faults["foreign_keys"]):
            table, _, number = fault.partition(" ")
            if table in DERIVED and number.isdigit():
                column = "segment_pk" if fault in faults["foreign_rows"] else "rowid"
                connection.execute(sa.text(f"DELETE FROM {table} WHERE {column} = :number"), {"number": int(number)})
        wrong = list(_rows(connection, faults["wrong_lexical"]))
        for ns, theirs in _by_namespace(wrong).items():
            fulltext.remove(connection, ns, [row.pk for row in theirs])
        fulltext.add(connection, [(row.pk, row.namespace_id, terms_of(row.text)) for row in wrong])
        if wrong or faults["counters"]:
            fulltext.recount(connection)
        if any(faults[kind] for kind in ("wrong_vectors", "wrong_lexical", "foreign_rows", "foreign_keys")):
            connection.execute(namespaces.update().values(epoch=namespaces.c.epoch + 1))
        highest = (
            select(sa.func.max(segments.c.seq)).where(segments.c.namespace_id == namespaces.c.id).scalar_subquery()
        )
        connection.execute(namespaces.update().where(namespaces.c.last_seq < highest).values(last_seq=highest))
