"""What can be wrong between the tables, how it is found, and how it is mended from the segments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import select

from memory_os.errors import StoreError
from memory_os.lexical import terms_of
from memory_os.stores import fulltext
from memory_os.stores.database import Database
from memory_os.stores.rows import parts
from memory_os.stores.schema import VECTOR_TASK, item_texts, namespaces, pending, segments, vectors

__all__ = ["find_faults", "mend"]

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


def find_faults(database: Database, fingerprint: str) -> dict[str, list[str]]:
    """Faults of the whole store by kind, each with the rows concerned.

    The kinds of ``FAULTS``; ``lexical_index`` where entries and their index differ; ``damage`` for what only a backup
    mends.

    :raises StoreError: if the store cannot be written, which this check needs.
    """
    with database.read() as connection:
        faults = {
            kind: [str(value) for value in connection.execute(sa.text(query), {"f": fingerprint}).scalars()]
            for kind, query in FAULTS.items()
        }
        lines = connection.exec_driver_sql("PRAGMA quick_check").scalars().all()
        faults["damage"] = [] if lines == ["ok"] else [str(line) for line in lines]
    try:
        with database.write() as connection:
            connection.exec_driver_sql("INSERT INTO lexical(lexical) VALUES ('integrity-check')")
        faults["lexical_index"] = []
    except StoreError as error:
        if "damaged" not in str(error):
            raise
        faults["lexical_index"] = ["the lexical index does not match its entries"]
    return faults


def mend(database: Database, faults: Mapping[str, Sequence[str]]) -> None:
    """Mend what can be mended from the segments; vectors to be made are left pending."""
    with database.write() as connection:
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
