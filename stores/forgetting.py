"""Deleting segments: every row that is theirs or was derived from them. Functions on an open connection.

What is deleted for good leaves tombstones, so that it does not come back by itself, and takes along what other turns'
traces say of it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import select

from memory_os.stores import digest, fulltext, items, manifest, tombstones
from memory_os.stores.matching import Matcher
from memory_os.stores.residue import forms_of, pieces
from memory_os.stores.rows import holds, own, parts
from memory_os.stores.schema import namespaces, pending, scores, segments, summaries, traces, vectors
from memory_os.trace import trace_from_dict, trace_to_dict, without_text

__all__ = ["PLACES", "Removal", "forget", "remove", "still_held"]

DERIVED = ("segments", "vectors", "lexical", "summaries", "pending", "scores", "bank", "traces")
PLACES = (*DERIVED, "traces_blanked", "tombstones", "items")
"""Where rows are deleted, or changed, for good: the names of the counts."""
MANY = 500
"""More segments than this are not looked for in the file: it is written anew at once."""
SHORTEST_TERM = 4  # bytes; a shorter one is found in anything


class Removal(NamedTuple):
    """What was deleted.

    :param gone: its text, in pieces as ``residue`` looks for them; ``None`` where it is too much.
    """

    counts: dict[str, int]
    gone: set[bytes] | None


def forget(
    connection: sa.Connection,
    bank: Path | None,
    ns: int,
    ids: Sequence[str],
    *,
    everything: bool = False,
    bury: bool = True,
    preview: bool = False,
) -> Removal:
    """Delete segments for good, and the summaries of them, with all that was derived from either.

    :param bank: the folder of the bank's files, which are deleted at once; ``None`` where there is none.
    :param everything: all that the namespace holds, whatever segments are named.
    :param bury: leave tombstones, so that they are not stored again.
    :param preview: the transaction will be undone: no file is deleted.
    """
    if everything:
        ids = connection.execute(select(segments.c.id).where(segments.c.namespace_id == ns)).scalars().all()
    going = digest.with_summaries(connection, ns, ids)
    rows = _rows(connection, ns, going)
    if not rows and not everything:  # scores and tombstones are of what goes
        return Removal(dict.fromkeys(PLACES, 0), set())
    # a summary that is asked for again is made again: only what an export or a source brings back has to stay away
    names = tombstones.Names(
        [row.id for row in rows], [row.key for row in rows if row.key is not None and row.kind != "summary"]
    )
    gone = _pieces(connection, ns, rows) if len(rows) <= MANY and not everything else None
    terms = fulltext.read(connection, ns, [row.pk for row in rows]) if gone is not None else {}
    counts = remove(connection, bank, ns, going, preview=preview)
    if everything:
        mine = traces.c.namespace_id == ns
        orphans = connection.execute(select(traces.c.id).where(mine)).scalars().all()  # of no segment that was here
        names = names._replace(traces=orphans, items=items.forget(connection, ns, datetime.now(UTC)))
        counts["traces"] += connection.execute(traces.delete().where(mine)).rowcount
    counts["items"] = len(names.items)
    counts["traces_blanked"] = _blank_traces(connection, ns, set(names.ids), gone)
    counts["tombstones"] = tombstones.bury(connection, ns, names) if bury else 0
    if counts["segments"] and not preview:
        fulltext.compact(connection)
        if gone is not None:
            every = (term for each in terms.values() for term in each if len(term.encode()) >= SHORTEST_TERM)
            gone.update(term.encode() for term in fulltext.unheard(connection, ns, every))
    return Removal(counts, gone)


def remove(
    connection: sa.Connection, bank: Path | None, ns: int, ids: Sequence[str], *, preview: bool = False
) -> dict[str, int]:
    """Delete the rows of these segments, and what was derived from them; counts by place."""
    counts = dict.fromkeys(DERIVED, 0)
    counts["scores"] = connection.execute(scores.delete().where(scores.c.namespace_id == ns)).rowcount
    counts["bank"] = manifest.forget(connection, bank, ns, ids, preview=preview)
    for part in parts(ids):
        query = select(segments.c.pk).where(segments.c.namespace_id == ns, segments.c.id.in_(part))
        pks = connection.execute(query).scalars().all()
        mine = sa.or_(traces.c.query_id.in_(part), traces.c.reply_id.in_(part))
        counts["traces"] += connection.execute(traces.delete().where(traces.c.namespace_id == ns, mine)).rowcount
        for table in (vectors, summaries, pending):
            deleted = connection.execute(table.delete().where(own(table, ns), table.c.segment_pk.in_(pks)))
            counts[table.name] += deleted.rowcount
        lengths = fulltext.remove(connection, ns, pks)
        counts["lexical"] += len(lengths)
        connection.execute(
            namespaces.update()
            .where(namespaces.c.id == ns)
            .values(
                n_segments=namespaces.c.n_segments - len(pks),
                n_terms=namespaces.c.n_terms - sum(lengths),
                epoch=namespaces.c.epoch + 1,
            )
        )
        gone = segments.delete().where(own(segments, ns), segments.c.pk.in_(pks))
        counts["segments"] += connection.execute(gone).rowcount
    return counts


def _rows(connection: sa.Connection, ns: int, ids: Sequence[str]) -> list[sa.Row[Any]]:
    c = segments.c
    columns = (c.pk, c.id, c.key, c.kind, c.text, c.created_at, c.metadata)
    found: list[sa.Row[Any]] = []
    for part in parts(ids):
        query: sa.Select[Any] = select(*columns).where(c.namespace_id == ns, c.id.in_(part))
        found += connection.execute(query).all()
    return found


def _pieces(connection: sa.Connection, ns: int, rows: Sequence[sa.Row[Any]]) -> set[bytes]:
    """The text that goes with these segments, wherever it stands."""
    gone: set[bytes] = set()
    for row in rows:
        gone |= pieces(row.text, row.created_at)
        if row.metadata:
            gone |= pieces(json.dumps(row.metadata))
    for part in parts([row.pk for row in rows]):
        theirs = own(summaries, ns), summaries.c.segment_pk.in_(part)
        made = connection.execute(select(summaries.c.text).where(*theirs)).scalars()
        gone |= {piece for text in made for piece in pieces(text)}
    for part in parts([row.id for row in rows]):
        mine = sa.or_(traces.c.query_id.in_(part), traces.c.reply_id.in_(part))
        for body in connection.execute(select(traces.c.body).where(traces.c.namespace_id == ns, mine)).scalars():
            gone |= _told(body)
    return gone


def _told(body: dict[str, Any]) -> set[bytes]:
    """What a trace says in words, as its JSON has it."""
    told = [body.get("query"), body.get("error"), (body.get("confirmation") or {}).get("answer")]
    told += [call["answer"] for call in body.get("calls", ())]
    return {piece for text in told if text for piece in pieces(json.dumps(text)[1:-1], '"')}


def _blank_traces(connection: sa.Connection, ns: int, ids: Collection[str], gone: set[bytes] | None) -> int:
    """Take out what traces of other turns may quote of these segments; how many traces that were."""
    empty = ('"calls": []', '"confirmation": null', '"error": null')
    speaks = sa.or_(*(sa.not_(holds(traces.c.body, each)) for each in empty))
    mine = select(traces.c.id, traces.c.body).where(traces.c.namespace_id == ns, speaks)
    n_blanked = 0
    for id_, body in connection.execute(mine).all():
        trace = trace_from_dict(body)
        blanked = without_text(trace, ids)
        if blanked == trace:
            continue
        n_blanked += 1
        if gone is not None:
            gone |= _told(body)
        this = sa.and_(traces.c.namespace_id == ns, traces.c.id == id_)
        connection.execute(traces.update().where(this).values(body=trace_to_dict(blanked)))
    return n_blanked


HELD = (
    "SELECT text, CAST(metadata AS text), session, speaker, source, key FROM segments",
    "SELECT labels FROM namespaces",
    "SELECT text FROM summaries",
    "SELECT CAST(body AS text) FROM traces",
    "SELECT CAST(value AS text), path, key FROM items",
    "SELECT text FROM item_texts",
)
BETWEEN = b"\xff"  # stands in no text


def still_held(connection: sa.Connection, texts: Collection[str]) -> set[str]:
    """Those of the texts that stand in something that is stored, also as a part of it."""
    forms = forms_of(texts)
    matcher = Matcher(forms)
    held: set[str] = set()
    for query in HELD if forms else ():
        for rows in connection.exec_driver_sql(query).partitions(1000):
            said = BETWEEN.join(value.encode() for row in rows for value in row if value)
            held.update(text for form in matcher.found(said) for text in forms[form])
    return held
