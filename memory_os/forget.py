"""What a call of ``forget`` means, its receipt, and forgetting by age. Deleting is the store's."""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import TYPE_CHECKING

from memory_os.errors import ConfigError, MemoryOSError, UnknownNameError
from memory_os.ingest import parse_time
from memory_os.protocols import KeptIndex
from memory_os.types import Namespace

if TYPE_CHECKING:
    from memory_os.turn import Parts

__all__ = ["Retention", "Selection", "cutoff", "expire", "forget", "ids_in", "with_summaries"]

TELLING = 8
"""Bytes of UTF-8: a shorter text stands in any file by chance, and is not looked for."""
PATIENCE_S = 5.0
EVERY_S = 3600
"""So often, at most, a memory that stays open looks for what has become too old."""
DAY_MS = 86_400_000
SILENCE_DAYS = 366
"""A store in which nothing was written for longer, by the clock, is a reason to doubt the clock."""
UUID7 = re.compile(r"([0-9a-f]{8})-([0-9a-f]{4})-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}")

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
    parts: Parts,
    going: Mapping[Namespace, Sequence[str]],
    *,
    everything: bool = False,
    preview: bool = False,
    verify: bool = False,
    bury: bool = True,
    patience_s: float = PATIENCE_S,
) -> dict[str, int]:
    """Delete segments and what is derived from them; counts by place.

    :param everything: all that the namespaces hold, whatever segments are named.
    :param bury: leave tombstones; otherwise what is stored again, comes back.
    :param patience_s: so long, at most, other processes that read are waited for.
    :param verify: also read every file of the store for the text: ``residue`` is how many files hold some, and
        ``still_held`` how many of the texts stand in something that is still stored, in any namespace.
    """
    texts: set[str] = set()
    if verify and not preview:
        for namespace, ids in going.items():
            texts |= _texts(parts, namespace, with_summaries(parts, namespace, ids), items=everything)
    deleted = parts.store.delete(going, everything=everything, preview=preview, bury=bury)
    counts = {**deleted.counts, "unfinished": 0}
    if deleted.mark:
        if parts.bank:
            for namespace in going:
                parts.bank.release(namespace)
        purged = parts.index.purge(going if deleted.alone else None)
        clean = parts.store.scrub(deleted, index_purged=purged, patience_s=patience_s)
        owing = isinstance(parts.index, KeptIndex) and parts.index.owing
        counts["unfinished"] = int(owing or not clean)
    if verify and not preview:
        files, held = residue(parts, texts)
        counts |= {"residue": len(files), "still_held": len(held)}
    return counts


def _texts(parts: Parts, namespace: Namespace, ids: Sequence[str], *, items: bool) -> set[str]:
    """What these segments say, and with ``items`` all values and texts of the namespace's items."""
    texts = {segment.text for segment in parts.store.get(namespace, ids).values()}
    if items and parts.items:
        for item in parts.items.scan(namespace, now=datetime.now(UTC)):
            texts.update(text for _, text in item.texts)
            texts.update(_strings(item.value))
    return texts


def _strings(value: object) -> Iterator[str]:
    """Every string in a JSON value, but for the names of its fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(map(_strings, value.values()))
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(map(_strings, value))


def residue(parts: Parts, texts: set[str]) -> tuple[list[str], set[str]]:
    """The files in which some of these texts stands, and those of the texts that something stored has in it.

    Files in which stand none but these are left out.
    """
    found = parts.store.files_with({text for text in texts if len(text.encode()) >= TELLING})
    held = parts.store.still_held({text for each in found.values() for text in each})
    files = [file for file, each in found.items() if not held.issuperset(each)]
    for file in files:
        log.warning("%s still holds text that was forgotten", file)
    return files, held


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
    parts: Parts,
    namespaces: Sequence[Namespace],
    days: float,
    *,
    preview: bool = False,
    verify: bool = False,
    patience_s: float = PATIENCE_S,
) -> dict[str, int]:
    """Forget what is older than so many days in these namespaces; counts by place.

    It leaves no tombstones: what is old is kept out by its age, as long as that is the policy.

    :param patience_s: so long, at most, other processes that read are waited for.
    """
    before = cutoff(days)
    old = {namespace: parts.store.ids(namespace, before=before) for namespace in namespaces}
    going = {namespace: ids for namespace, ids in old.items() if ids}
    return forget(parts, going, preview=preview, verify=verify, bury=False, patience_s=patience_s)


class Retention:
    """A memory's own policy: nothing older than so many days is kept, in any namespace.

    :raises ConfigError: for a number of days that cannot be.
    """

    def __init__(self, days: float) -> None:
        cutoff(days)
        self.days = days
        self._due = -math.inf
        self._lock = threading.Lock()

    def is_old(self, when: datetime | None) -> bool:
        """Whether what has this event time (``None``: now) is not to be kept."""
        return when is not None and when.astimezone(UTC) < cutoff(self.days)

    def keep(self, parts: Parts, *, always: bool = False) -> None:
        """Forget what has become too old, if it is time to look; another thread that is looking is not waited for.

        What fails is logged, and tried again the next time: it is no failure of what the caller is doing.
        """
        if not (always or time.monotonic() >= self._due) or not self._lock.acquire(blocking=always):
            return
        try:
            self._look(parts)
            self._due = time.monotonic() + EVERY_S
        except (MemoryOSError, OSError) as error:
            log.error("What is older than %s days could not be forgotten: %s", self.days, error)
        finally:
            self._lock.release()

    def _look(self, parts: Parts) -> None:
        old = [each for each in parts.store.namespaces() if parts.store.ids(each, before=cutoff(self.days))]
        if not old:
            return
        if last := _last_use_before_silence(parts):
            log.warning(
                "Nothing was forgotten by age: the clock says %s, but before that day the store was last written to on "
                "%s. If the clock is right, forget by hand: memos retain, or Memory.expire",
                datetime.now(UTC).date(), last.date(),
            )  # fmt: skip
            return
        counts = expire(parts, old, self.days, patience_s=0)
        level = logging.WARNING if counts["unfinished"] else logging.INFO
        log.log(level, "Forgot what is older than %s days: %s", self.days, counts)


def _last_use_before_silence(parts: Parts) -> datetime | None:
    """When the store was last written to, but for the last day, if that is over a year ago; ``None`` if it is not.

    Then the clock is more likely wrong, and would have everything forgotten. The last day counts for nothing, as a
    wrong clock has dated it; when a store was written to, the ids (UUIDv7) of what it holds say.
    """
    now_ms = datetime.now(UTC).timestamp() * 1000
    times = (_made_ms(id_) for namespace in parts.store.namespaces() for id_ in parts.store.ids(namespace))
    last_ms = max((ms for ms in times if ms is not None and ms < now_ms - DAY_MS), default=None)
    if last_ms is None or now_ms - last_ms <= SILENCE_DAYS * DAY_MS:
        return None
    return datetime.fromtimestamp(last_ms / 1000, UTC)


def _made_ms(id_: str) -> int | None:
    """When a UUIDv7 was made, milliseconds since 1970."""
    match = UUID7.fullmatch(id_)
    return int(match[1] + match[2], 16) if match else None
