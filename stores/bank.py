"""Keys and values of segments on disk, bounded: LongMem's memory bank (arXiv 2306.07174) for a model without training.

One safetensors file for a segment and a fingerprint, its row in the table ``bank`` beside the records. All of it is
derived: an entry that is missing or damaged is removed when it is met, and whoever asked encodes the segment again.
What the keys and values are put to is not decided here.
"""

from __future__ import annotations

import hashlib
import logging
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from memory_os.errors import StoreError
from memory_os.protocols import KV, BankStatus
from memory_os.stores import kvfile, manifest
from memory_os.stores.backend import Backend
from memory_os.stores.chunks import Table, mean_keys
from memory_os.stores.manifest import Entry
from memory_os.types import BankOptions, Namespace

if TYPE_CHECKING:
    import sqlalchemy as sa
    import torch

    from memory_os.protocols import Matrix3

__all__ = ["SegmentBank"]

ASIDE = ".tmp"
LEFTOVER_S = 3600
"""Before it has this age, a file written aside is not taken for one that a crash left behind."""

Key = tuple[int, str, str]  # namespace's number, fingerprint, segment's id
Signature = tuple[str, int, int]  # sha256, size and mtime of a file

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """An entry's tensors as they are stored, mapped from its file."""

    signature: Signature
    tensors: dict[str, torch.Tensor]
    n_bytes: int


class SegmentBank:
    """``Bank`` over files in a folder, with its manifest in the records' database.

    :param folder: made with the first entry; see ``manifest.bank_folder``.
    """

    def __init__(self, database: Backend, folder: Path, options: BankOptions) -> None:
        self._database = database
        self._folder = folder
        self._options = options
        self._lock = Lock()
        self._resident: OrderedDict[Key, _Loaded] = OrderedDict()  # the most recently used last
        self._verified: dict[Key, Signature] = {}
        self._tables: dict[tuple[int, str], Table] = {}

    @property
    def options(self) -> BankOptions:
        """Its bounds and form."""
        return self._options

    def _in_form(self, fingerprint: str) -> str:
        """The fingerprint under which entries are kept: those of another form are another model's, as it were."""
        return f"{fingerprint} v{kvfile.FORMAT} {self._options.dtype} chunk={self._options.chunk_tokens}"

    def _path(self, entry: Entry) -> Path:
        return self._folder / str(entry.namespace_id) / entry.file

    # -- reading -------------------------------------------------------------------------------------------------

    def entries(self, namespace: Namespace, fingerprint: str) -> dict[str, int]:
        """``{segment id: tokens}`` of what is there, in the order of ``seq``."""
        form = self._in_form(fingerprint)
        with self._database.read() as connection:
            ns, _ = manifest.locate(connection, namespace)
            found = manifest.read(connection, ns, form)
        self._release_all_but(ns, form, found)
        return {entry.id: entry.n_tokens for entry in found}

    def get(self, namespace: Namespace, fingerprint: str, ids: Sequence[str]) -> dict[str, KV]:
        """Those that are there and whole, in the order asked for; a damaged one is removed. Counts as use.

        The tensors may be those that stay in memory for the next time: they are not to be changed in place.
        """
        form = self._in_form(fingerprint)
        with self._database.read() as connection:
            ns, last_seq = manifest.locate(connection, namespace)
            known = manifest.read(connection, ns, form)
        self._release_all_but(ns, form, known)
        by_id = {entry.id: entry for entry in known}
        wanted = [by_id[id_] for id_ in dict.fromkeys(ids) if id_ in by_id]
        found: dict[str, KV] = {}
        damaged: list[Entry] = []
        for entry in wanted:
            kv = self._load(entry)
            if isinstance(kv, str):
                log.warning("the bank's file %s %s; it is removed, and made again", self._path(entry), kv)
                damaged.append(entry)
            else:
                found[entry.id] = kv
        self._trim()
        if damaged:
            self._remove(damaged)
        if self._options.policy == "lru":  # no other policy asks, and a read that need not write does not
            used = [entry.segment_pk for entry in wanted if entry.id in found and entry.used != last_seq]
            if used:
                with self._database.write() as connection:
                    manifest.touch(connection, form, used, last_seq)
        return found

    def _problem(self, entry: Entry) -> str | None:
        if not entry.id:
            return "belongs to a segment that does not exist"
        return kvfile.problem(self._path(entry), entry.file_bytes, entry.sha256, entry.fingerprint)

    def _load(self, entry: Entry) -> KV | str:
        """What the entry holds, or what is wrong with its file."""
        from safetensors import SafetensorError

        path, key = self._path(entry), _key(entry)
        try:
            stat = path.stat()
            signature = (entry.sha256, stat.st_size, stat.st_mtime_ns)
            with self._lock:
                loaded = self._resident.get(key)
                verified = self._verified.get(key) == signature
            if loaded is None or loaded.signature != signature:
                if not verified and (problem := self._problem(entry)):
                    return problem
                tensors = kvfile.load(path)
                loaded = _Loaded(signature, tensors, sum(tensor.nbytes for tensor in tensors.values()))
        except FileNotFoundError:
            return "is missing"
        except (OSError, SafetensorError) as error:
            return f"cannot be read ({error})"
        with self._lock:
            self._verified[key] = signature
            if loaded.n_bytes <= self._options.resident_bytes:
                self._resident[key] = loaded
                self._resident.move_to_end(key)
        return kvfile.decode(loaded.tensors, entry.surprisal)

    def _trim(self) -> None:
        """Let go of what was not asked for longest, until the rest is within its bound."""
        with self._lock:
            n_bytes = sum(loaded.n_bytes for loaded in self._resident.values())
            while n_bytes > self._options.resident_bytes:
                n_bytes -= self._resident.popitem(last=False)[1].n_bytes

    def _release(self, gone: Callable[[Key], bool]) -> None:
        """Let go of what is in memory of entries that are gone: a deleted file stays on the disk while it is mapped."""
        with self._lock:
            for key in [key for key in self._verified if gone(key)]:
                self._resident.pop(key, None)
                del self._verified[key]

    def _release_all_but(self, ns: int, form: str, present: Iterable[Entry]) -> None:
        """Let go of what others removed."""
        kept = {entry.id for entry in present}
        self._release(lambda key: key[:2] == (ns, form) and key[2] not in kept)

    def release(self, namespace: Namespace) -> None:
        """Let go of what is in memory of entries that others removed."""
        with self._database.read() as connection:
            ns, _ = manifest.locate(connection, namespace)
            kept = {_key(entry) for entry in manifest.read(connection, ns)}
        self._release(lambda key: key[0] == ns and key not in kept)
        with self._lock:  # the mean keys are read anew
            self._tables = {key: table for key, table in self._tables.items() if key[0] != ns}

    def status(self, namespace: Namespace, fingerprint: str) -> BankStatus:
        """What is there now; an entry counts for itself, also where its segment has another one."""
        form = self._in_form(fingerprint)
        with self._database.read() as connection:
            found = manifest.read(connection, manifest.locate(connection, namespace)[0])
        return BankStatus(
            n_segments=len(found),
            n_tokens=sum(entry.n_tokens for entry in found),
            n_bytes=sum(entry.n_bytes for entry in found),
            n_stale=sum(entry.fingerprint != form for entry in found),
        )

    # -- writing -------------------------------------------------------------------------------------------------

    def put(self, namespace: Namespace, fingerprint: str, entries: Mapping[str, KV], layer: int) -> list[str]:
        """Store, and let go what is over the bounds; gives back the ids that are not, or no longer, there.

        :raises StoreError: if a file cannot be written, or a number does not fit float16; nothing was changed.
        """
        form = self._in_form(fingerprint)
        with self._database.read() as connection:
            ns, last_seq = manifest.locate(connection, namespace)
            planned = self._planned(connection, ns, form, entries, last_seq)
            over = {entry.key for entry in self._leaving(connection, ns, planned, form, last_seq)}
        with ExitStack() as asides, ExitStack() as undo:
            written: list[tuple[Entry, Path, bytes]] = []
            for entry in planned:
                if entry.key not in over:
                    aside = (self._folder / str(ns) / entry.file).with_suffix(f".{secrets.token_hex(4)}{ASIDE}")
                    asides.callback(manifest.unlink, aside)
                    if done := self._write_aside(aside, entry, entries[entry.id], layer):
                        written.append(done)
            with self._database.write() as connection:
                evicted = self._enter(connection, namespace, form, written, undo)
                present = {entry.id for entry in manifest.read(connection, ns, form)}
            undo.pop_all()
        self._release({_key(entry) for entry in evicted}.__contains__)
        return [id_ for id_ in dict.fromkeys([*entries, *(entry.id for entry in evicted)]) if id_ not in present]

    def _planned(
        self, connection: sa.Connection, ns: int, form: str, entries: Mapping[str, KV], last_seq: int
    ) -> list[Entry]:
        """Rows of the segments that exist, with the least number of bytes that their files can have."""
        known = manifest.segments_of(connection, ns, list(entries))
        return [
            Entry(
                namespace_id=ns,
                segment_pk=known[id_][0],
                id=id_,
                fingerprint=form,
                seq=known[id_][1],
                file=manifest.file_name(id_, form),
                n_tokens=len(kv.ids),
                file_bytes=kvfile.least_bytes(kv, self._options.dtype),
                chunk_bytes=2 * math.ceil(len(kv.ids) / self._options.chunk_tokens) * kv.keys[0, :, 0].numel(),
                sha256="",
                used=last_seq,
                surprisal=kv.surprisal,
            )
            for id_, kv in entries.items()
            if id_ in known and kv.ids
        ]

    def _leaving(
        self, connection: sa.Connection, ns: int, incoming: Iterable[Entry], form: str, last_seq: int
    ) -> list[Entry]:
        after = {entry.key: entry for entry in manifest.read(connection, ns)}
        after.update((entry.key, entry) for entry in incoming)
        return manifest.leaving(after.values(), form, self._options, last_seq)

    def _write_aside(self, aside: Path, entry: Entry, kv: KV, layer: int) -> tuple[Entry, Path, bytes] | None:
        """Write a file under a name of its own, which forgetting its segment finds; nothing if it is forgotten already.

        The file is there, empty, before the segment is looked for under the write lock: from then on whoever forgets it
        takes the file's name away, and a crash leaves nothing of it. It is not synced: what a power failure leaves of
        it does not match its checksum.
        """
        content = kvfile.encode(kv, self._options.dtype, entry.fingerprint, layer)
        chunks = mean_keys(kv.keys[layer], self._options.chunk_tokens)
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                with self._database.write() as connection:
                    if not manifest.segments_of(connection, entry.namespace_id, [entry.id]):
                        return None
                file.write(content)
        except OSError as error:
            raise StoreError(_unwritten(aside, error)) from error
        digest = hashlib.sha256(content).hexdigest()
        return entry._replace(file_bytes=len(content), chunk_bytes=len(chunks), sha256=digest), aside, chunks

    def _enter(
        self,
        connection: sa.Connection,
        namespace: Namespace,
        form: str,
        written: Sequence[tuple[Entry, Path, bytes]],
        undo: ExitStack,
    ) -> list[Entry]:
        """Put files in their places, enter their rows, and let go what is over the bounds, which is given back.

        Nobody else writes to the database meanwhile. What a crash leaves is a file without a row, or one that does not
        match the checksum in its row.
        """
        ns, last_seq = manifest.locate(connection, namespace)
        known = manifest.segments_of(connection, ns, [entry.id for entry, _, _ in written])
        there = [item for item in written if known.get(item[0].id) == (item[0].segment_pk, item[0].seq)]
        evicted = self._leaving(connection, ns, (entry for entry, _, _ in there), form, last_seq)
        over = {entry.key for entry in evicted}
        stored = [entry for entry in manifest.read(connection, ns) if entry.key in over]
        manifest.remove(connection, self._folder, stored)
        placed = []
        for entry, aside, chunks in there:
            if entry.key in over:
                continue
            undo.callback(manifest.unlink, self._path(entry))
            try:
                aside.replace(self._path(entry))
            except FileNotFoundError:
                continue  # whoever removed it wants nothing of this segment or namespace to be kept
            except OSError as error:
                raise StoreError(_unwritten(self._path(entry), error)) from error
            placed.append((entry._replace(used=last_seq), chunks))
        for entry, chunks in placed:
            manifest.write(connection, entry, chunks)
        return evicted

    def drop(self, namespace: Namespace) -> None:
        """Remove everything of the namespace."""
        with self._database.write() as connection:
            ns, _ = manifest.locate(connection, namespace)
            manifest.clear(connection, self._folder, ns)
        self._release(lambda key: key[0] == ns)
        with self._lock:
            self._tables = {key: table for key, table in self._tables.items() if key[0] != ns}

    # -- search --------------------------------------------------------------------------------------------------

    def search(self, namespace: Namespace, fingerprint: str, queries: Matrix3, k: int) -> list[tuple[str, float]]:
        """The ``k`` segments to which the tokens of a query attend most, with their share of the attention.

        Exact; a segment that gets none is not among them.
        """
        import numpy as np

        n_tokens, n_heads, dim = queries.shape
        table = self._table(namespace, self._in_form(fingerprint), n_heads, dim)
        ids = list(table.state.values())
        if k < 1 or not n_tokens or not ids:
            return []
        found = table.shares(queries, self._options.k_chunks)
        best = np.argsort(-found, kind="stable")[:k]  # the ids are in the order of seq
        return [(ids[i], float(found[i])) for i in best if found[i] > 0.0]

    def _table(self, namespace: Namespace, form: str, n_heads: int, dim: int) -> Table:
        """The mean keys as they are now; only those of new entries are read."""
        with self._lock, self._database.read() as connection:
            ns, _ = manifest.locate(connection, namespace)
            present = manifest.read(connection, ns, form)
            old = self._tables.get((ns, form)) or Table.empty(n_heads, dim)
            new = [entry.segment_pk for entry in present if (entry.segment_pk, entry.sha256) not in old.state]
            blobs = manifest.read_chunks(connection, form, new)
            table = old.updated({(entry.segment_pk, entry.sha256): entry.id for entry in present}, blobs)
            self._tables[ns, form] = table
        return table

    # -- care ----------------------------------------------------------------------------------------------------

    def check(self) -> list[str]:
        """Faults of the whole bank, each beginning with the file concerned: read-only, but under the write lock.

        :raises StoreError: if the database cannot be written.
        """
        suspects = self._suspects()
        with self._database.write() as connection:  # so that no file is in its place and its row still to come
            found = [(self._path(entry), why) for entry, why in self._damaged(connection, suspects)]
            found += ((path, "belongs to no entry") for path in self._strays(connection))
        return [f"{path.relative_to(self._folder)} {why}" for path, why in found]

    def repair(self) -> int:
        """Remove what ``check`` finds; gives back how much that was."""
        removed = self._remove(self._suspects())
        with self._database.write() as connection:
            strays = self._strays(connection)
            for path in strays:
                manifest.unlink(path)
        return len(removed) + len(strays)

    def _suspects(self) -> list[Entry]:
        """Entries that cannot be given back, if nobody was writing meanwhile; every file is read whole."""
        with self._database.read() as connection:
            present = manifest.read_all(connection)
        return [entry for entry in present if self._problem(entry)]

    def _damaged(self, connection: sa.Connection, suspects: Iterable[Entry]) -> list[tuple[Entry, str]]:
        """Those of the suspects that are damaged, and how, now that nobody else writes."""
        present = {(entry.key, entry.sha256) for entry in manifest.read_all(connection)}
        there = [entry for entry in suspects if (entry.key, entry.sha256) in present]
        return [(entry, why) for entry in there if (why := self._problem(entry))]

    def _remove(self, suspects: Iterable[Entry]) -> list[Entry]:
        with self._database.write() as connection:
            damaged = [entry for entry, _ in self._damaged(connection, suspects)]
            manifest.remove(connection, self._folder, damaged)
        self._release({_key(entry) for entry in damaged}.__contains__)
        return damaged

    def _strays(self, connection: sa.Connection) -> list[Path]:
        """Files of no entry; in a folder of no namespace all are. One that may be being written is left alone."""
        known = {self._path(entry) for entry in manifest.read_all(connection)}
        young = time.time() - LEFTOVER_S
        strays = []
        for path in sorted(self._folder.rglob("*")):
            try:
                if path.is_file() and path not in known and not (path.suffix == ASIDE and path.stat().st_mtime > young):
                    strays.append(path)
            except FileNotFoundError:
                continue  # its writer is done with it
        return strays

    def close(self) -> None:
        """Let go of files and memory."""
        with self._lock:
            self._resident.clear()
            self._verified.clear()
            self._tables.clear()


def _unwritten(path: Path, error: OSError) -> str:
    return f"cannot write {path}: {error.strerror}; nothing was changed. Free some space, or check its permissions"


def _key(entry: Entry) -> Key:
    return entry.namespace_id, entry.fingerprint, entry.id
