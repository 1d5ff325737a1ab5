"""What is kept about segments besides their vectors: summaries, scores, and when each was last activated.

Functions on an open connection, called by the store inside its transactions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import select

from memory_os.stores.rows import insert, own, parts, upsert
from memory_os.stores.schema import SUMMARY_TASK, activations, pending, scores, segments, summaries
from memory_os.types import Action, Trace

__all__ = [
    "last_activations",
    "note_activations",
    "put_on_list",
    "put_scores",
    "put_summary",
    "read_scores",
    "read_summaries",
    "sources",
    "with_summaries",
]

MAX_SCORES = 200_000
"""Scores kept in a namespace, the newest, and a few more: some 30 MB, enough for a document of 80 million tokens."""
SWEEP = 4096
"""Every so many scores those over the limit go: to look for them takes as long as to skip the others."""


def read_summaries(connection: sa.Connection, ns: int, ids: Sequence[str], method: str) -> dict[str, str]:
    """The summaries by this method that there are, by segment id."""
    found: dict[str, str] = {}
    for part in parts(ids):
        rows = connection.execute(
            select(segments.c.id, summaries.c.text)
            .select_from(segments)
            .join(summaries, sa.and_(own(summaries, ns), summaries.c.segment_pk == segments.c.pk))
            .where(segments.c.namespace_id == ns, segments.c.id.in_(part), summaries.c.method == method)
        )
        found.update((row.id, row.text) for row in rows)
    return found


def put_summary(connection: sa.Connection, ns: int, id_: str, method: str, text: str) -> None:
    """Store a summary and strike the work off; nothing where the segment is gone by now."""
    for pk in _pks(connection, ns, [id_]):
        row = {"segment_pk": pk, "method": method, "namespace_id": ns, "text": text}
        upsert(connection, summaries, [row], ("segment_pk", "method"))
        done = own(pending, ns), pending.c.segment_pk == pk, pending.c.task == SUMMARY_TASK
        connection.execute(pending.delete().where(*done))


def put_on_list(connection: sa.Connection, ns: int, ids: Sequence[str]) -> None:
    """Put segments on the list of those to be summarised."""
    for pk in _pks(connection, ns, ids):
        row = {"segment_pk": pk, "task": SUMMARY_TASK, "namespace_id": ns}
        connection.execute(insert(connection, pending).values(row).on_conflict_do_nothing())


def read_scores(connection: sa.Connection, ns: int, keys: Sequence[str]) -> dict[str, Any]:
    """The scores that are there, by key."""
    found: dict[str, Any] = {}
    for part in parts(keys):
        query = select(scores.c.key, scores.c.value).where(scores.c.namespace_id == ns, scores.c.key.in_(part))
        found.update((row.key, row.value) for row in connection.execute(query))
    return found


def put_scores(connection: sa.Connection, ns: int, values: Mapping[str, Any]) -> None:
    """Keep scores, replacing those with the same keys; of more than ``MAX_SCORES`` the oldest go, sooner or later."""
    rows = [{"namespace_id": ns, "key": key, "value": value} for key, value in values.items()]
    if not rows:
        return
    upsert(connection, scores, rows, ("namespace_id", "key"))
    newest = select(scores.c.pk).where(scores.c.namespace_id == ns).order_by(scores.c.pk.desc())
    if connection.execute(newest.limit(1)).scalar_one() % SWEEP >= len(rows):
        return
    last = connection.execute(newest.offset(MAX_SCORES).limit(1)).scalar_one_or_none()
    if last is not None:
        connection.execute(scores.delete().where(scores.c.namespace_id == ns, scores.c.pk <= last))


def note_activations(connection: sa.Connection, ns: int, trace: Trace) -> None:
    """Note that a turn activated segments, if the turn itself was recorded."""
    if trace.query_id is None:
        return
    query = select(segments.c.seq).where(segments.c.namespace_id == ns, segments.c.id == trace.query_id)
    seq = connection.execute(query).scalar_one_or_none()
    active = [entry.segment_id for entry in trace.ledger if entry.action is not Action.DROPPED]
    if seq is None or not active:
        return
    pks = set(_pks(connection, ns, active))
    for part in parts(sorted(pks)):
        later = own(activations, ns), activations.c.segment_pk.in_(part), activations.c.seq > seq
        pks.difference_update(connection.execute(select(activations.c.segment_pk).where(*later)).scalars())
    rows = [{"segment_pk": pk, "namespace_id": ns, "seq": seq} for pk in sorted(pks)]
    upsert(connection, activations, rows, ("segment_pk",))


def last_activations(connection: sa.Connection, ns: int) -> dict[int, int]:
    """``{seq of a segment: seq of the query in whose context it last stood}``."""
    rows = connection.execute(
        select(segments.c.seq, activations.c.seq)
        .join(segments, sa.and_(own(segments, ns), segments.c.pk == activations.c.segment_pk))
        .where(activations.c.namespace_id == ns)
    )
    return {row[0]: row[1] for row in rows}


def with_summaries(connection: sa.Connection, ns: int, ids: Sequence[str]) -> list[str]:
    """These ids, each once, and those of every summary of a document that rests on them, through all levels.

    What a summary's prompt showed as background counts too: it may have found its way into the text.
    """
    made = connection.execute(
        select(segments.c.id, segments.c.metadata).where(segments.c.namespace_id == ns, segments.c.kind == "summary")
    )
    rest_on: defaultdict[str, list[str]] = defaultdict(list)
    for id_, metadata in made:
        for part in sources(metadata):
            rest_on[part].append(id_)
    found, open_ends = dict.fromkeys(ids), list(ids)
    while open_ends:
        new = [id_ for id_ in rest_on[open_ends.pop()] if id_ not in found]
        found.update(dict.fromkeys(new))
        open_ends += new
    return list(found)


def sources(metadata: Mapping[str, Any]) -> list[str]:
    """The ids of what a summary with this metadata was made of, or shown."""
    named = (metadata.get(field) for field in ("of", "background"))
    return [str(id_) for ids in named if isinstance(ids, list | tuple) for id_ in ids]  # an import may hold anything


def _pks(connection: sa.Connection, ns: int, ids: Sequence[str]) -> list[int]:
    found: list[int] = []
    for part in parts(ids):
        query = select(segments.c.pk).where(segments.c.namespace_id == ns, segments.c.id.in_(part))
        found += connection.execute(query).scalars()
    return found
