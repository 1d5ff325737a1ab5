"""LangGraph's long-term store over a memory's database."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, cast

from memory_os.adapters.configurable import labels_of, memory_of, pinned
from memory_os.aio import AsyncMemory
from memory_os.errors import ConfigError, MissingExtraError
from memory_os.items import Items, checked_change, is_ttl
from memory_os.memory import Memory
from memory_os.protocols import Item, ItemChange

try:
    from langgraph.store.base import (
        BaseStore,
        GetOp,
        ListNamespacesOp,
        MatchCondition,
        Op,
        PutOp,
        Result,
        SearchItem,
        SearchOp,
        TTLConfig,
        get_text_at_path,
        tokenize_path,
    )
    from langgraph.store.base import Item as StoreItem
except ImportError as error:
    raise MissingExtraError("MemoryStore", "langgraph", "langgraph") from error

__all__ = ["MemoryStore"]

WHOLE = "$"
ORDERS: Mapping[str, Callable[[Any, Any], bool]] = {
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}
OPERATORS = ("$eq", "$ne", *ORDERS)


class MemoryStore(BaseStore):
    """LangGraph's ``BaseStore`` over a memory: ``StateGraph(...).compile(store=MemoryStore(memory, namespace=...))``.

    What LangGraph calls a namespace is a path inside one of the memory's namespaces, and nothing crosses that one. A
    batch reads the state before it; its puts follow, in one transaction.

    Filters compare as ``InMemoryStore`` does: equality is Python's (``1 == True``), lists and objects by their members,
    ``$eq``, ``$ne``, ``$gt``, ``$gte``, ``$lt``, ``$lte`` at any depth. The last four are false for a value that is
    missing or of another kind; they compare numbers with numbers (``True`` is none) and text with text.

    :param memory: a ``Memory`` or an ``AsyncMemory``; its embedder is what search by meaning uses.
    :param namespace: by default that of the call, ``config["configurable"]["namespace"]``.
    :param index: LangGraph's ``IndexConfig``, of which ``fields`` counts: what of a value is searched, by default all
        of it (``["$"]``). ``False`` searches nothing by meaning: ``query`` is then ignored, as LangGraph has it.
    :param ttl: LangGraph's ``TTLConfig``: ``default_ttl`` and ``refresh_on_read``. What has expired is never given
        back; each put deletes it, and so does ``sweep_ttl``. There is no thread that does.
    :raises ConfigError: for an index or ttl that cannot be used.
    :raises NamespaceError: for a namespace that cannot be one.
    """

    supports_ttl = True

    def __init__(
        self,
        memory: Memory | AsyncMemory,
        *,
        namespace: Sequence[str] | None = None,
        index: Mapping[str, Any] | Literal[False] | None = None,
        ttl: Mapping[str, Any] | None = None,
    ) -> None:
        self._memory = memory_of(memory)
        self._namespace = pinned(namespace)
        self._fields = None if index is False else _tokenized(_fields_of(index or {}))
        self.ttl_config = None if ttl is None else _ttl_config(ttl)

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """The results of the operations, in order.

        :raises InvalidInputError: for a value, key or path that cannot be stored; nothing was changed.
        :raises ConfigError: for anything but an operation of LangGraph's, or a filter with an unknown operator.
        :raises NamespaceError: if neither the constructor nor the call names a namespace.
        """
        return self._run(self._items(), list(ops))

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """As ``batch``, in a worker thread."""
        return await asyncio.to_thread(self._run, self._items(), list(ops))

    def sweep_ttl(self) -> int:
        """Delete what has expired in the namespace; how many items that was."""
        return self._items().sweep()

    def _items(self) -> Items:
        return self._memory.namespace(*labels_of(self._namespace)).items

    def _run(self, items: Items, ops: Sequence[Op]) -> list[Result]:
        # all that can be refused is refused first
        filters = [accepting(op.filter) if isinstance(op, SearchOp) else None for op in ops]
        changes = [self._change(op) for op in ops if isinstance(op, PutOp)]
        found = items.get_many((op.namespace, op.key) for op in ops if isinstance(op, GetOp))
        results: list[Result] = []
        read: list[Item] = []
        for op, accept in zip(ops, filters, strict=True):
            match op:
                case GetOp():
                    item = found.get((tuple(op.namespace), op.key))
                    results.append(StoreItem(**_shown(item)) if item else None)
                    read += [item] if item and op.refresh_ttl else []
                case SearchOp():
                    hits = items.search(
                        op.namespace_prefix,
                        query=op.query if op.query and self._fields is not None else None,
                        accept=accept,
                        limit=op.limit,
                        offset=op.offset,
                    )
                    results.append([SearchItem(**_shown(hit), score=hit.score) for hit in hits])
                    read += hits if op.refresh_ttl else []
                case ListNamespacesOp():
                    results.append(_listed(items.paths(), op))
                case PutOp():
                    results.append(None)
                case _:
                    raise ConfigError(f"not an operation of a LangGraph store: {op!r}")
        items.apply(changes)
        items.refresh(read)
        return results

    def _change(self, op: PutOp) -> ItemChange:
        change = checked_change(ItemChange(op.namespace, op.key, op.value, ttl=op.ttl))
        if change.value is None or self._fields is None or op.index is False:
            return change
        if isinstance(op.index, str | bool):
            raise ConfigError(f"index is False or a list of fields, not {op.index!r}")
        fields = self._fields if op.index is None else _tokenized(op.index)
        texts: list[tuple[str, str]] = []
        for field, tokens in fields:
            here = get_text_at_path(change.value, tokens)
            texts += [(f"{field}.{i}" if len(here) > 1 else field, text) for i, text in enumerate(here)]
        return ItemChange(change.path, change.key, change.value, tuple(dict.fromkeys(texts)), change.ttl)


def _shown(item: Item) -> dict[str, Any]:
    return {
        "namespace": item.path,
        "key": item.key,
        "value": item.value,
        "created_at": item.created_at,
        "updated_at": item.updated_at,
    }


# -- settings ----------------------------------------------------------------------------------------------------------


def _fields_of(index: Mapping[str, Any]) -> Sequence[str]:
    if not isinstance(index, Mapping):
        raise ConfigError(f'index is False or a mapping such as {{"fields": ["title"]}}, not {index!r}')
    if "embed" in index or "dims" in index:
        raise ConfigError(
            "the memory's own embedder is used, so that index takes neither embed nor dims; "
            "name it where the memory is opened: Memory.open(..., embedder=...)"
        )
    if unknown := sorted(set(index) - {"fields"}):
        raise ConfigError(f"index takes fields, not {', '.join(map(repr, unknown))}")
    fields = index.get("fields")
    if isinstance(fields, str):
        raise ConfigError(f"fields is a list; write [{fields!r}]")
    return [WHOLE] if fields is None else list(fields)


def _tokenized(fields: Iterable[str]) -> list[tuple[str, str | list[str]]]:
    """Each field with its steps; ``$`` is the whole value, for a put too, where LangGraph's stores find a key ``$``."""
    return [(field, WHOLE if field == WHOLE else tokenize_path(field)) for field in fields]


def _ttl_config(ttl: Mapping[str, Any]) -> TTLConfig:
    if unknown := sorted(set(ttl) - set(TTLConfig.__annotations__)):
        raise ConfigError(f"ttl takes {', '.join(TTLConfig.__annotations__)}, not {', '.join(map(repr, unknown))}")
    default = ttl.get("default_ttl")
    if default is not None and not is_ttl(default):
        raise ConfigError(f"default_ttl is a number of minutes above 0, or None, not {default!r}")
    if ttl.get("sweep_interval_minutes") is not None:
        raise ConfigError(
            "there is no thread that sweeps: what has expired is never given back, and each put deletes it; "
            "leave out sweep_interval_minutes, and call sweep_ttl() where nothing is put for long"
        )
    if ttl.get("omit_expired") is False:
        raise ConfigError("what has expired is never given back; leave out omit_expired")
    return cast(TTLConfig, dict(ttl))


# -- listing -----------------------------------------------------------------------------------------------------------


def _listed(paths: Iterable[tuple[str, ...]], op: ListNamespacesOp) -> list[tuple[str, ...]]:
    if op.limit < 0 or op.offset < 0 or (op.max_depth is not None and op.max_depth < 0):
        raise ConfigError(f"limit, offset and max_depth must not be negative: {op!r}")
    matching = [path for path in paths if all(_matches_path(path, each) for each in op.match_conditions or ())]
    shown = sorted({path[: op.max_depth] for path in matching})
    return shown[op.offset : op.offset + op.limit]


def _matches_path(path: Sequence[str], condition: MatchCondition) -> bool:
    wanted = tuple(condition.path)
    if condition.match_type not in ("prefix", "suffix"):
        raise ConfigError(f"a namespace is matched by its prefix or its suffix, not by {condition.match_type!r}")
    part = path[: len(wanted)] if condition.match_type == "prefix" else path[max(0, len(path) - len(wanted)) :]
    return len(part) == len(wanted) and all(w in ("*", label) for w, label in zip(wanted, part, strict=True))


# -- filters -----------------------------------------------------------------------------------------------------------


def accepting(filter: Mapping[str, Any] | None) -> Callable[[dict[str, Any]], bool] | None:
    """The filter as a function of an item's value; ``None`` where it says nothing.

    :raises ConfigError: for an operator that is not known.
    """
    if not filter:
        return None
    if not isinstance(filter, Mapping):
        raise ConfigError(f"a filter is a mapping from a key of the value to what it must be, not {filter!r}")
    wanted = dict(filter)
    for condition in wanted.values():
        _check_operators(condition)
    return lambda value: all(_is(value.get(key), condition) for key, condition in wanted.items())


def _check_operators(condition: object) -> None:
    if isinstance(condition, Mapping):
        if _has_operators(condition) and (unknown := [name for name in condition if name not in OPERATORS]):
            raise ConfigError(f"unknown operator {unknown[0]!r} in a filter; known: {', '.join(OPERATORS)}")
        for name, inner in condition.items():
            if name not in ("$eq", "$ne"):  # these compare with the value as it stands
                _check_operators(inner)
    elif isinstance(condition, list | tuple):
        for inner in condition:
            _check_operators(inner)


def _has_operators(condition: Mapping[Any, Any]) -> bool:
    return any(isinstance(name, str) and name.startswith("$") for name in condition)


def _is(value: Any, condition: Any) -> bool:
    if isinstance(condition, Mapping):
        if _has_operators(condition):
            return all(_holds(value, name, wanted) for name, wanted in condition.items())
        return isinstance(value, dict) and all(_is(value.get(name), inner) for name, inner in condition.items())
    if isinstance(condition, list | tuple):
        same = isinstance(value, list) and len(value) == len(condition)
        return same and all(_is(each, inner) for each, inner in zip(value, condition, strict=True))
    return bool(value == condition)


def _holds(value: Any, name: str, wanted: Any) -> bool:
    if name in ORDERS:
        comparable = (isinstance(value, str) and isinstance(wanted, str)) or (_is_number(value) and _is_number(wanted))
        return comparable and ORDERS[name](value, wanted)
    wanted = list(wanted) if isinstance(wanted, tuple) else wanted  # JSON has lists only
    return bool(value == wanted) is (name == "$eq")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
