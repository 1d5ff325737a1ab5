"""The bank's manifest: a row for every entry, and the name of its file. Functions on an open connection.

A file's name begins with a digest of its segment's id (an imported id may hold anything), so that forgetting a segment
finds all of its files, also one that a crash left without a row.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import func, select

from memory_os.errors import StoreError
from memory_os.stores.namespaces import locate
from memory_os.stores.rows import parts, upsert
from memory_os.stores.schema import bank, segments
from memory_os.types import BankOptions

__all__ = [
    "Entry",
    "bank_folder",
    "clear",
    "file_name",
    "forget",
    "leaving",
    "locate",
    "read",
    "read_all",
    "read_chunks",
    "remove",
    "segments_of",
    "touch",
    "unlink",
    "write",
]

STEM = 32  # hex digits


class Entry(NamedTuple):
    """A row of ``bank``, but for its chunks.

    :param id: of the segment.
    :param file_bytes: with ``chunk_bytes`` the column ``n_bytes``.
    """

    namespace_id: int
    segment_pk: int
    id: str
    fingerprint: str
    seq: int
    file: str
    n_tokens: int
    file_bytes: int
    chunk_bytes: int
    sha256: str
    used: int
    surprisal: float | None

    @property
    def n_bytes(self) -> int:
        """What it takes on disk."""
        return self.file_bytes + self.chunk_bytes

    @property
    def key(self) -> tuple[int, str]:
        """The row's primary key."""
        return self.segment_pk, self.fingerprint


def bank_folder(database: Path) -> Path:
    """Where the bank of this database keeps its files, a folder for each namespace."""
    return database.with_name(database.name + ".bank")


def file_name(id_: str, fingerprint: str) -> str:
    """The name of an entry's file in its namespace's folder."""
    return f"{_stem(id_)}.{hashlib.sha256(fingerprint.encode()).hexdigest()[:8]}.safetensors"


def _stem(id_: str) -> str:
    return hashlib.sha256(id_.encode()).hexdigest()[:STEM]


def segments_of(connection: sa.Connection, ns: int, ids: Sequence[str]) -> dict[str, tuple[int, int]]:
    """``{id: (row, seq)}`` of the segments that exist."""
    found: dict[str, tuple[int, int]] = {}
    for part in parts(ids):
        query = select(segments.c.id, segments.c.pk, segments.c.seq)
        rows = connection.execute(query.where(segments.c.namespace_id == ns, segments.c.id.in_(part)))
        found.update((row.id, (row.pk, row.seq)) for row in rows)
    return found


def read(connection: sa.Connection, ns: int, fingerprint: str | None = None) -> list[Entry]:
    """A namespace's entries (under the fingerprint), in the order of ``seq``."""
    query = _ENTRIES.where(bank.c.namespace_id == ns, segments.c.pk.is_not(None))
    if fingerprint is not None:
        query = query.where(bank.c.fingerprint == fingerprint)
    return [Entry._make(row) for row in connection.execute(query.order_by(bank.c.seq)).all()]


def read_all(connection: sa.Connection) -> list[Entry]:
    """The entries of every namespace."""
    query = _ENTRIES.order_by(bank.c.namespace_id, bank.c.seq)
    return [Entry._make(row) for row in connection.execute(query).all()]


def read_chunks(connection: sa.Connection, fingerprint: str, pks: Sequence[int]) -> dict[int, bytes]:
    """The mean keys of these segments, by row."""
    found: dict[int, bytes] = {}
    for part in parts(pks):
        query = select(bank.c.segment_pk, bank.c.chunks)
        rows = connection.execute(query.where(bank.c.fingerprint == fingerprint, bank.c.segment_pk.in_(part)))
        found.update((row.segment_pk, row.chunks) for row in rows)
    return found


def write(connection: sa.Connection, entry: Entry, chunks: bytes) -> None:
    """Store a row, replacing the one with its key."""
    values = {
        "namespace_id": entry.namespace_id,
        "seq": entry.seq,
        "file": entry.file,
        "n_tokens": entry.n_tokens,
        "n_bytes": entry.n_bytes,
        "sha256": entry.sha256,
        "used": entry.used,
        "surprisal": entry.surprisal,
        "chunks": chunks,
    }
    row = {"segment_pk": entry.segment_pk, "fingerprint": entry.fingerprint, **values}
    upsert(connection, bank, [row], ("segment_pk", "fingerprint"))


def touch(connection: sa.Connection, fingerprint: str, pks: Sequence[int], used: int) -> None:
    """Note that entries were used."""
    for part in parts(pks):
        mine = sa.and_(bank.c.fingerprint == fingerprint, bank.c.segment_pk.in_(part))
        connection.execute(bank.update().where(mine).values(used=used))


def leaving(entries: Collection[Entry], fingerprint: str, options: BankOptions, last_seq: int) -> list[Entry]:
    """What must go for the rest to be within the bounds, in the order of leaving.

    First what is over the bounds by itself, then entries under another fingerprint, the oldest first, then by policy.
    """

    def turn(entry: Entry) -> tuple[bool, float, int]:
        if entry.fingerprint != fingerprint:
            return False, 0.0, entry.seq
        match options.policy:
            case "fifo":
                return True, 0.0, entry.seq
            case "lru":
                return True, entry.used, entry.seq
            case "surprisal":
                return True, (entry.surprisal or 0.0) * options.decay ** (last_seq - entry.seq), entry.seq

    def fits(n_tokens: int, n_bytes: int) -> bool:
        return n_tokens <= options.max_tokens and n_bytes <= options.max_bytes

    gone = [entry for entry in entries if not fits(entry.n_tokens, entry.n_bytes)]
    rest = sorted((entry for entry in entries if fits(entry.n_tokens, entry.n_bytes)), key=turn)
    n_tokens, n_bytes = sum(entry.n_tokens for entry in rest), sum(entry.n_bytes for entry in rest)
    for entry in rest:
        if fits(n_tokens, n_bytes):
            break
        gone.append(entry)
        n_tokens, n_bytes = n_tokens - entry.n_tokens, n_bytes - entry.n_bytes
    return gone


def remove(connection: sa.Connection, folder: Path, entries: Iterable[Entry]) -> None:
    """Delete rows and their files."""
    for entry in entries:
        mine = sa.and_(bank.c.segment_pk == entry.segment_pk, bank.c.fingerprint == entry.fingerprint)
        connection.execute(bank.delete().where(mine))
        unlink(folder / str(entry.namespace_id) / entry.file)


def forget(
    connection: sa.Connection, folder: Path | None, ns: int, ids: Sequence[str], *, preview: bool = False
) -> int:
    """Delete all that there is of these segments, files without a row included; gives back how many entries.

    The files go before the transaction ends: what is forgotten is gone from the disk. If the transaction fails, rows
    are left without a file, which the bank removes when it meets them.

    :param folder: ``None`` where this database has no bank.
    :param preview: the transaction will be undone: leave the files.
    """
    if folder is None:
        return 0
    stems = {_stem(id_) for id_ in ids}
    gone = {name for name in _names(folder / str(ns)) if name[:STEM] in stems}
    for name in () if preview else gone:
        unlink(folder / str(ns) / name)
    rows = segments_of(connection, ns, ids).values()
    for part in parts([pk for pk, _ in rows]):
        mine = bank.c.segment_pk.in_(part)
        gone.update(connection.execute(select(bank.c.file).where(mine)).scalars())
        connection.execute(bank.delete().where(mine))
    return len(gone)


def clear(connection: sa.Connection, folder: Path, ns: int) -> None:
    """Delete all that there is of a namespace.

    The folder stays: another process may be about to write into it.
    """
    for name in _names(folder / str(ns)):
        unlink(folder / str(ns) / name)
    connection.execute(bank.delete().where(bank.c.namespace_id == ns))


def unlink(path: Path) -> None:
    """Delete a file that may be gone already.

    :raises StoreError: if it is still there.
    """
    try:
        path.unlink()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise StoreError(f"cannot delete {path}: {error.strerror}; check the permissions of its folder") from error


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []  # it is made with the first entry
    except OSError as error:
        raise StoreError(f"cannot read {folder}: {error.strerror}; check its permissions") from error


# the fields of Entry, in order; an entry whose segment is gone, which foreign keys rule out, has no id
_ENTRIES: sa.Select[Any] = select(
    bank.c.namespace_id,
    bank.c.segment_pk,
    func.coalesce(segments.c.id, "").label("id"),
    bank.c.fingerprint,
    bank.c.seq,
    bank.c.file,
    bank.c.n_tokens,
    (bank.c.n_bytes - func.length(bank.c.chunks)).label("file_bytes"),
    func.length(bank.c.chunks).label("chunk_bytes"),
    bank.c.sha256,
    bank.c.used,
    bank.c.surprisal,
).select_from(bank.outerjoin(segments, segments.c.pk == bank.c.segment_pk))
