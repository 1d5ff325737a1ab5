"""What ``migrate`` says: how much there is on both sides, by table, and where they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from memory_os.types import Namespace

__all__ = ["Compared", "Difference", "Migration"]


class Compared(NamedTuple):
    """A table of both stores, read back from both.

    :param rows: of the source.
    :param sha256: the sum modulo 2**256 of the SHA-256 of every row of the source, in hexadecimal: in any order.
    """

    table: str
    rows: int
    sha256: str


class Difference(NamedTuple):
    """A namespace's rows of one table that are not the same on both sides.

    :param source: how many the source has.
    :param dest: how many the other has; where it is as many, it is what they hold that differs.
    """

    namespace: Namespace
    table: str
    source: int
    dest: int

    def __str__(self) -> str:
        whose = f"{self.table} of {'/'.join(self.namespace)}"
        if self.source != self.dest:
            return f"{whose}: {self.source} rows, and {self.dest}"
        return f"{whose}: {self.source} rows on both sides, with another checksum"


@dataclass(frozen=True, slots=True)
class Migration:
    """How two stores compare, after a migration or without one.

    :param source: as it may be shown, without a password; ``dest`` likewise.
    :param differences: of what is there but differs; none after a migration.
    :param left: how many rows of a table of the source were not brought over, as they are made anew when needed.
    :param index: how many vectors the index that was asked for holds by now; ``None`` where none was.
    """

    source: str
    dest: str
    tables: Sequence[Compared] = ()
    differences: Sequence[Difference] = ()
    left: Mapping[str, int] = field(default_factory=dict)
    index: int | None = None
