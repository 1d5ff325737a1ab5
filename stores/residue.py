"""What is left in SQLite's file of rows that are gone.

Under ``secure_delete`` a deleted row is overwritten with zeros where it stands. But when pages are split or joined,
rows move, and a page may keep the bytes of a row that has moved away between its list of cells and the cells
themselves; of one row in some thousands such a copy outlives the row. Here these bytes are read, by the documented
file format (https://sqlite.org/fileformat2.html), so that it is known when the file must be written anew.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from memory_os.stores.files import reading
from memory_os.stores.matching import Matcher

__all__ = ["files_with", "forms_of", "leftovers", "pieces", "still_there"]

PIECE = 16
"""Text is looked for in pieces of so many bytes: whatever is left of it, 31 bytes in a row hold a whole piece."""
PAGE_TYPES = (2, 5, 10, 13)  # interior and leaf pages of indexes and tables
AT_ONCE = 4096  # pages
WORTH = 20
"""Writing a file anew takes about as long as searching so many times its bytes."""


def leftovers(path: Path) -> bytes:
    """The bytes in the unused middle of every page, but for zeros."""
    found: list[bytes] = []
    with reading(path) as file:
        header = file.read(100)
        size = int.from_bytes(header[16:18], "big")
        size = 65536 if size == 1 else size
        if len(header) < 100 or size < 512:
            return b""
        file.seek(0)
        start = 100  # the first page begins with the file's header
        while block := file.read(size * AT_ONCE):
            for page in range(0, len(block), size):
                at = page + start
                start = 0
                kind = block[at]
                if kind not in PAGE_TYPES:
                    continue
                n_cells = int.from_bytes(block[at + 3 : at + 5], "big")
                cells = int.from_bytes(block[at + 5 : at + 7], "big") or 65536
                low = at + (12 if kind < 10 else 8) + 2 * n_cells
                if unused := block[low : page + cells].strip(b"\0"):
                    found.append(unused)
    return b"\0".join(found)


def pieces(text: str, tail: str = "") -> set[bytes]:
    """A text as it is looked for.

    :param tail: what stands behind the text in its row: it makes the end of the text, or a short text, long enough.
    """
    whole = text.encode()
    row = whole + tail.encode()
    return {row[start : start + PIECE] for start in range(0, len(whole), PIECE)}


def still_there(path: Path, wanted: Collection[bytes]) -> bool:
    """Whether a page may have kept some of what is gone; also true where looking takes longer than writing anew."""
    unused = leftovers(path)
    if len(unused) * len(wanted) > WORTH * path.stat().st_size:
        return True
    return any(piece in unused for piece in wanted)


def files_with(database: Path, texts: Iterable[str]) -> dict[str, list[str]]:
    """The files of a store in which any of these texts stands, with those texts; see ``RecordStore.files_with``."""
    wanted = forms_of(texts)
    if not wanted:
        return {}
    matcher, longest = Matcher(wanted), max(map(len, wanted))
    found: dict[str, list[str]] = {}
    for path in _files(database):
        there = {form for block in _blocks(path, longest) for form in matcher.found(block)}
        if there:
            found[str(path)] = list(dict.fromkeys(text for form in there for text in wanted[form]))
    return found


def forms_of(texts: Iterable[str]) -> dict[bytes, set[str]]:
    """The texts by the bytes that they may be in a file."""
    forms: defaultdict[bytes, set[str]] = defaultdict(set)
    for text in filter(None, texts):
        escaped = (json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False))
        for form in (text, *escaped):
            forms[form.encode()].add(text)
    return forms


def _files(database: Path) -> Iterator[Path]:
    """Every file whose name, or whose folder's name, begins with the database's: log, copies, bank, vectors, Chroma.

    But for the log's index, which has page numbers and no text, and on which SQLite's locks are.
    """
    for place in sorted(database.parent.iterdir()):
        if place.name == f"{database.name}-shm":
            continue
        if place.name == database.name or place.name.startswith((f"{database.name}-", f"{database.name}.")):
            yield from (path for path in [place, *sorted(place.rglob("*"))] if path.is_file())


def _blocks(path: Path, overlap: int) -> Iterator[bytes]:
    with reading(path) as file:
        block = b""
        while more := file.read(1 << 24):
            block = (block[-overlap:] if overlap else b"") + more
            yield block
