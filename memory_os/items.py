"""Items: mutable JSON values under a path and a key in one namespace. Searched by meaning where they have texts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from memory_os.backlog import VectorBacklog
from memory_os.derive import BATCH, INLINE_PENDING, deferrable
from memory_os.errors import ConfigError, InvalidInputError, StoreError
from memory_os.limits import MAX_ITEM_CHARS, MAX_LABEL_CHARS, MAX_PATH_LABELS, MAX_TEXT_CHARS, check_depth
from memory_os.protocols import Embedder, Item, ItemChange, ItemPath, ItemStore
from memory_os.types import Namespace

__all__ = ["Items", "checked_change", "is_ttl"]

KEYS_PAGE = 1000


class Items:
    """The items of one namespace. Every read and write is of this namespace and nothing else, whatever the path.

    An item is replaced by a put under the same path and key; segments, in contrast, never change.

    >>> from memory_os import Memory
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Memory.open(folder + "/memory.db", embedder="hash") as memory:
    ...         items = memory.namespace("alice").items
    ...         items.put(("pets",), "cat", {"name": "Miso"}, texts=[("name", "a cat called Miso")])
    ...         items.search(query="the cat")[0].value
    {'name': 'Miso'}
    """

    def __init__(
        self,
        store: ItemStore,
        embedder: Embedder,
        namespace: Namespace,
        vectors: VectorBacklog | None = None,
        *,
        leaves_work: bool = False,
    ) -> None:
        self._store = store
        self._embedder = embedder
        self._vectors = vectors
        self._leaves_work = leaves_work  # to workers
        self.labels = namespace

    # -- write -----------------------------------------------------------------------------------------------------

    def put(
        self,
        path: ItemPath,
        key: str,
        value: Mapping[str, Any],
        *,
        texts: Iterable[tuple[str, str]] = (),
        ttl: float | None = None,
    ) -> None:
        """Store an item, or replace the one that is there; it is durable when this returns.

        :param texts: ``(field, text)`` of what search by meaning is to find it by.
        :param ttl: so many minutes after the last put or refresh it expires.
        :raises InvalidInputError: for what cannot be stored; nothing was changed.
        """
        self.apply([ItemChange(path, key, value, tuple(texts), ttl)])

    def delete(self, path: ItemPath, key: str) -> None:
        """Delete an item, if there is one."""
        self.apply([ItemChange(path, key, None)])

    def apply(self, changes: Iterable[ItemChange]) -> None:
        """Make all changes together, or none; of several to one item the last.

        Vectors are made when the changes are durable. Where that fails they stay pending, and are made before the next
        search.

        :raises InvalidInputError: as ``put``.
        """
        checked = [checked_change(change) for change in changes]
        self._store.apply(self.labels, checked, now=_now())
        n_texts = sum(len(change.texts) for change in checked)
        if n_texts:
            with deferrable():
                self._make_vectors(n_texts)

    def merge(self, changes: Iterable[ItemChange], *, restore: bool = False) -> tuple[int, int]:
        """Store what an export holds, times kept; an item that is as new here stays.

        ``(stored, left out because they were forgotten)``.

        :param restore: store also what was forgotten.
        """
        checked = [checked_change(change) for change in changes]
        stored, forgotten = self._store.merge(self.labels, checked, now=_now(), restore=restore)
        if stored:
            with deferrable():
                self._make_vectors(stored)
        return stored, forgotten

    def refresh(self, found: Iterable[Item]) -> None:
        """Have those of the items that expire begin their time anew; nothing is written if there are none."""
        self._store.refresh(self.labels, found, now=_now())

    def sweep(self) -> int:
        """Delete what has expired, which no read gives back anyway; how many items that was."""
        return self._store.sweep(self.labels, now=_now())

    def _make_vectors(self, n_new: int = 0) -> None:
        """Make the vectors of new texts, and those that were missing before: now if they are few, else in a thread."""
        if self._leaves_work:
            return
        n_missing = self._store.count_pending(self.labels, self._embedder.fingerprint)
        if self._vectors and (n_missing > INLINE_PENDING + n_new or self._vectors.busy(self.labels)):
            self.catch_up(limit=n_new)
            self._vectors.resume(self.labels)
        elif n_missing:
            self.catch_up()

    def catch_up(self, *, limit: int | None = None) -> int:
        """Make the vectors that are missing, then those that are another embedder's, oldest first; how many.

        :param limit: stop after about so many.
        """
        done = 0
        while limit is None or done < limit:
            size = BATCH if limit is None else min(BATCH, limit - done)
            todo = self._store.pending(self.labels, self._embedder.fingerprint, size)
            if not todo:
                break
            vectors = self._embedder.embed_documents([text for _, text in todo])
            self._store.put_vectors(self.labels, self._embedder.fingerprint, [row for row, _ in todo], vectors)
            done += len(todo)
            if len(todo) < size:
                break
        return done

    # -- read ------------------------------------------------------------------------------------------------------

    def get(self, path: ItemPath, key: str) -> Item | None:
        """The item under this path and key."""
        return self.get_many([(path, key)]).get((tuple(path), key))

    def get_many(self, addresses: Iterable[tuple[ItemPath, str]]) -> dict[tuple[ItemPath, str], Item]:
        """The items that exist, by path and key."""
        checked = [(_checked_path(path), _storable(key, "get", "key")) for path, key in addresses]
        return {(item.path, item.key): item for item in self._store.get(self.labels, checked, now=_now())}

    def search(
        self,
        prefix: ItemPath = (),
        *,
        query: str | None = None,
        accept: Callable[[dict[str, Any]], bool] | None = None,
        limit: int = 10,
        offset: int = 0,
    ) -> list[Item]:
        """The items whose path begins with these labels, the latest updated first.

        :param query: puts those that have texts first, by the cosine of the query and the nearest of their texts.
        :param accept: says by its value whether an item is one of them.
        :param limit: at most so many, after the first ``offset``.
        :raises ConfigError: for a negative limit or offset.
        """
        if limit < 0 or offset < 0:
            raise ConfigError(f"limit and offset must not be negative: {limit}, {offset}")
        vector = None
        if query is not None:
            vector = self._embedder.embed_query(_storable(query, "search", "query"))
            with deferrable(StoreError):  # the embedder is at work, as was just seen
                self._make_vectors()
        return self._store.search(
            self.labels,
            _checked_path(prefix),
            now=_now(),
            limit=limit,
            offset=offset,
            accept=accept,
            vector=vector,
            fingerprint=self._embedder.fingerprint,
        )

    def paths(self) -> list[ItemPath]:
        """Every path that holds an item, once, in order."""
        return self._store.paths(self.labels, now=_now())

    def keys(self, path: ItemPath, *, prefix: str = "") -> Iterator[list[str]]:
        """The keys under exactly this path that begin with ``prefix``, in order, page by page."""
        path, prefix = _checked_path(path), _storable(prefix, "keys", "prefix")
        after: str | None = None
        while page := self._store.keys(self.labels, path, now=_now(), prefix=prefix, after=after, limit=KEYS_PAGE):
            yield page
            after = page[-1]

    def count(self) -> int:
        """How many items there are."""
        return self._store.count(self.labels, now=_now())

    def scan(self) -> Iterator[ItemChange]:
        """Every item with all that is recorded of it, as the change that makes it; what an export writes."""
        return self._store.scan(self.labels, now=_now())


def _now() -> datetime:
    return datetime.now(UTC)


def checked_change(change: ItemChange) -> ItemChange:
    """The change as it can be stored, its value as plain JSON.

    :raises InvalidInputError: if it cannot.
    """
    path, where = _checked_path(change.path), f"the item {change.key!r} under {change.path!r}"
    if not path:
        raise InvalidInputError(f"{where}: an item needs a path of at least one label")
    _short(_storable(change.key, where, "key"), where, "key", MAX_LABEL_CHARS)
    value = None if change.value is None else _checked_value(change.value, where)
    for field, text in change.texts:
        _storable(field, where, "field")
        _short(_storable(text, where, "text"), where, "text", MAX_TEXT_CHARS)
    if change.ttl is not None and not is_ttl(change.ttl):
        raise InvalidInputError(f"{where}: ttl is a number of minutes above 0, not {change.ttl!r}")
    return replace(change, path=path, value=value)


def is_ttl(ttl: object) -> bool:
    """Whether it is a time to live: minutes above 0 that end before the calendar does."""
    if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not math.isfinite(ttl) or ttl <= 0:
        return False
    try:
        _now() + timedelta(minutes=ttl)
    except OverflowError:
        return False
    return True


def _checked_path(path: Sequence[str]) -> ItemPath:
    if isinstance(path, str):
        raise InvalidInputError(f"a path is a sequence of labels, not one string; write ({path!r},)")
    checked = tuple(path)
    if len(checked) > MAX_PATH_LABELS:
        raise InvalidInputError(f"a path has at most {MAX_PATH_LABELS} labels, not {len(checked)}; join some of them")
    for label in checked:
        if not _storable(label, f"the path {checked!r}", "label"):
            raise InvalidInputError(f"the path {checked!r} holds an empty label; leave it out")
        _short(label, "the path of an item", "label", MAX_LABEL_CHARS)
    return checked


def _storable(text: str, where: str, what: str) -> str:
    if not isinstance(text, str):
        raise InvalidInputError(f"{where}: the {what} must be a string, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"{where}: the {what} holds a lone surrogate, which cannot be stored") from error
    return text


def _short(text: str, where: str, what: str, most: int) -> None:
    if len(text) > most:
        raise InvalidInputError(
            f"{where[:200]}: the {what} has {len(text)} characters, and may have {most}; shorten it"
        )


def _checked_value(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidInputError(
            f"{where}: the value must be a mapping with string keys, not {type(value).__name__}; "
            'wrap it, as in {"value": ...}'
        )
    try:
        check_depth(value)
        plain = dict(value)
        text = json.dumps(plain, allow_nan=False, ensure_ascii=False)
        text.encode("utf-8")
        _check_keys(plain)
        _short(text, where, "value as JSON", MAX_ITEM_CHARS)
        return dict(json.loads(text))
    except (TypeError, ValueError) as error:  # UnicodeEncodeError is a ValueError
        raise InvalidInputError(
            f"{where}: the value cannot be written as JSON ({error}); "
            "store text, numbers, true, false, null, lists and objects with string keys"
        ) from error


def _check_keys(value: object) -> None:
    """JSON has string keys only, and json.dumps makes them of others without a word."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is no string")
            _check_keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_keys(inner)
