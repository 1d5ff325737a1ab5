"""LangChain's key-value interface over a memory's database."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Iterator, Sequence

from langchain_core.stores import ByteStore

from memory_os.adapters.configurable import labels_of, memory_of, pinned
from memory_os.aio import AsyncMemory
from memory_os.errors import InvalidInputError
from memory_os.items import Items
from memory_os.memory import Memory
from memory_os.protocols import Item, ItemChange

__all__ = ["MemoryByteStore"]

FIELD = "base64"


class MemoryByteStore(ByteStore):
    """LangChain's ``ByteStore`` over a memory, for example for ``CacheBackedEmbeddings`` or a parent document store.

    Several keys are set or deleted in one transaction.

    :param memory: a ``Memory`` or an ``AsyncMemory``.
    :param namespace: by default that of the call, ``config["configurable"]["namespace"]``.
    :param path: where in the namespace the bytes are kept, as items; nothing else may be kept there.
    :raises NamespaceError: for a namespace that cannot be one.
    """

    def __init__(
        self,
        memory: Memory | AsyncMemory,
        *,
        namespace: Sequence[str] | None = None,
        path: Sequence[str] = ("bytes",),
    ) -> None:
        self._memory = memory_of(memory)
        self._namespace = pinned(namespace)
        self._path = tuple(path) if not isinstance(path, str) else (path,)

    def _items(self) -> Items:
        return self._memory.namespace(*labels_of(self._namespace)).items

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """The bytes under each key, in order; ``None`` where there are none.

        :raises InvalidInputError: if something else is kept under a key.
        """
        return self._get(self._items(), list(keys))

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """Keep bytes under keys, all or none; of several for one key the last.

        :raises InvalidInputError: for a value that is not bytes, or a key that is not text.
        """
        self._items().apply(self._puts(key_value_pairs))

    def mdelete(self, keys: Sequence[str]) -> None:
        """Delete what is under these keys, if anything."""
        self._items().apply(self._deletes(keys))

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
        """The keys that begin with ``prefix``, taken literally, in order; read as they are asked for."""
        pages = self._items().keys(self._path, prefix=prefix or "")
        return (key for page in pages for key in page)

    async def amget(self, keys: Sequence[str]) -> list[bytes | None]:
        """As ``mget``, in a worker thread."""
        return await asyncio.to_thread(self._get, self._items(), list(keys))

    async def amset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """As ``mset``, in a worker thread."""
        await asyncio.to_thread(self._items().apply, self._puts(key_value_pairs))

    async def amdelete(self, keys: Sequence[str]) -> None:
        """As ``mdelete``, in a worker thread."""
        await asyncio.to_thread(self._items().apply, self._deletes(keys))

    async def ayield_keys(self, *, prefix: str | None = None) -> AsyncIterator[str]:
        """As ``yield_keys``, each page of keys read in a worker thread."""
        pages = self._items().keys(self._path, prefix=prefix or "")
        while page := await asyncio.to_thread(next, pages, None):
            for key in page:
                yield key

    def _get(self, items: Items, keys: Sequence[str]) -> list[bytes | None]:
        found = items.get_many((self._path, key) for key in keys)
        return [_bytes_of(found.get((self._path, key))) for key in keys]

    def _puts(self, pairs: Sequence[tuple[str, bytes]]) -> list[ItemChange]:
        changes = []
        for key, value in pairs:
            if not isinstance(value, bytes | bytearray | memoryview):
                raise InvalidInputError(f"the value under {key!r} must be bytes, not {type(value).__name__}; encode it")
            changes.append(ItemChange(self._path, key, {FIELD: base64.b64encode(value).decode("ascii")}))
        return changes

    def _deletes(self, keys: Sequence[str]) -> list[ItemChange]:
        return [ItemChange(self._path, key, None) for key in keys]


def _bytes_of(item: Item | None) -> bytes | None:
    if item is None:
        return None
    try:
        return base64.b64decode(item.value[FIELD], validate=True)
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise InvalidInputError(
            f"the item {item.key!r} under {item.path!r} holds no bytes; give the byte store a path of its own"
        ) from error
