"""What a call of ``forget`` means, its receipt, and forgetting by age. Deleting is the store's."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from memory_os.errors import ConfigError, UnknownNameError
from memory_os.ingest import parse_time
from memory_os.types import Namespace

if TYPE_CHECKING:
    from memory_os.turn import Parts

__all__ = ["Retention", "Selection", "cutoff", "expire", "forget", "ids_in", "with_summaries"]

EVERY_S = 3600
"""So often, at most, a memory that stays open looks for what has become too old."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Selection:
    """What is to be forgotten, in one of four ways: segments; a query; a session, a time range or both; everything.

    :param refs: ids or ``seq``.
    :param k: how many segments of a query.
    :param after: event times from this one on.
    :param before: event times up to, and without, this one.
    """

    refs: Sequence[str | int] = ()
    session: str | None = None
    everything: bool = False
    after: datetime | str | None = None
    before: datetime | str | None = None
    query: str | None = None
    k: int | None = None

    def __post_init__(self) -> None:
        by_time = self.after is not None or self.before is not None
        ways = [bool(self.refs), self.everything, self.query is not None, by_time or self.session is not None]
        if sum(ways) != 1:
            raise ConfigError(
                "forget takes one of: segments; session=... and/or after=..., before=...; query=... with k=...; "
                "everything=True"
            )
        if (self.query is None) != (self.k is None):
            raise ConfigError("forgetting by a query takes query=... and k=..., how many of the best to forget")

    @property
    def times(self) -> tuple[datetime | None, datetime | None]:
        """The bounds ``[after, before)``.

        :raises ConfigError: if nothing can lie between them.
        :raises InvalidInputError: for a time that cannot be read.
        """
        after, before = (None if bound is None else parse_time(bound) for bound in (self.after, self.before))
        if after is not None and before is not None and after >= before:
            raise ConfigError(f"nothing is after {after.isoformat()} and before {before.isoformat()}; swap them?")
        return after, before


def with_summaries(parts: Parts, namespace: Namespace, ids: Sequence[str]) -> list[str]:
    """These ids and those of the summaries that go with them, each once."""
    return parts.store.with_summaries(namespace, list(dict.fromkeys(ids)))


def ids_in(parts: Parts, namespace: Namespace, selection: Selection) -> list[str]:
    """The segments of the session and time range, or of the whole namespace.

    :raises UnknownNameError: if there is no such session.
    """
    after, before = selection.times
    ids = parts.store.ids(namespace, session=selection.session, after=after, before=before)
    if selection.session is not None and not ids and not parts.store.ids(namespace, session=selection.session):
        raise UnknownNameError("session", selection.session)
    return ids


def forget(
    parts: Parts, namespace: Namespace, ids: Sequence[str], *, items: bool, preview: bool, verify: bool
) -> dict[str, int]:
    """Delete segments and what is derived from them; counts by place.

    :param verify: also read every file of the store for the text: ``residue`` is how many files hold some.
    """
    unique = list(dict.fromkeys(ids))
    if preview:
        return parts.store.delete(namespace, unique, items=items, preview=True)
    going = parts.store.get(namespace, with_summaries(parts, namespace, unique)) if verify else {}
    counts = parts.store.delete(namespace, unique, items=items)
    if counts["segments"] and not parts.index.purge(namespace):
        counts["unfinished"] = 1
    if verify:
        counts["residue"] = len(residue(parts, {segment.text for segment in going.values()}))
    return counts


def residue(parts: Parts, texts: set[str]) -> list[str]:
    """The files in which some of these texts stands, although nothing that is stored has it in it."""
    found = parts.store.files_with(texts)
    held = parts.store.still_held({text for each in found.values() for text in each})
    files = [file for file, each in found.items() if not held.issuperset(each)]
    for file in files:
        log.warning("%s still holds text that was forgotten", file)
    return files


def cutoff(days: float) -> datetime:
    """The event time before which segments are older than so many days.

    :raises ConfigError: for a number of days that cannot be.
    """
    if isinstance(days, bool) or not isinstance(days, int | float) or not (0 < days < math.inf):
        raise ConfigError(f"days to keep must be a number above 0, not {days!r}")
    try:
        return datetime.now(UTC) - timedelta(days=days)
    except OverflowError as error:
        raise ConfigError(f"{days} days go back further than dates do; name fewer, or keep everything") from error


def expire(
    parts: Parts, namespaces: Sequence[Namespace], days: float, *, preview: bool = False, verify: bool = False
) -> dict[str, int]:
    """Forget what is older than so many days in these namespaces; counts by place."""
    before = cutoff(days)
    total: Counter[str] = Counter()
    for namespace in namespaces:
        ids = parts.store.ids(namespace, before=before)
        total.update(forget(parts, namespace, ids, items=False, preview=preview, verify=verify))
    return dict(total)


class Retention:
    """A memory's own policy: nothing older than so many days is kept, in any namespace.

    :raises ConfigError: for a number of days that cannot be.
    """

    def __init__(self, days: float) -> None:
        cutoff(days)
        self.days = days
        self._due = -math.inf
        self._lock = threading.Lock()

    def keep(self, parts: Parts) -> None:
        """Forget what has become too old, if it is time to look."""
        with self._lock:
            now = time.monotonic()
            if now < self._due:
                return
            self._due = now + EVERY_S
        for namespace in parts.store.namespaces():
            if parts.store.ids(namespace, before=cutoff(self.days)):
                expire(parts, [namespace], self.days)
