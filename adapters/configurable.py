"""Whose memory a LangChain or LangGraph call is about: the constructor's namespace, or the call's configuration.

``config={"configurable": {"namespace": ("acme", "alice"), "session": "monday"}}``; without ``session`` the
``thread_id`` is the session.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from memory_os.errors import ConfigError, NamespaceError
from memory_os.memory import Memory
from memory_os.types import Namespace, as_namespace

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableConfig

    from memory_os.aio import AsyncMemory

__all__ = ["AMemory", "Labels", "labels_of", "memory_of", "pinned", "session_of"]


def memory_of(memory: Memory | AsyncMemory) -> Memory:
    """The memory behind either door.

    :raises ConfigError: for anything else.
    """
    from memory_os.aio import AsyncMemory

    if isinstance(memory, AsyncMemory):
        return memory.memory
    if not isinstance(memory, Memory):
        raise ConfigError(f"memory is what Memory.open(...) gives, not {type(memory).__name__}")
    return memory


def pinned(namespace: Sequence[str] | None) -> Namespace | None:
    """A constructor's namespace, checked.

    :raises NamespaceError: if it cannot be one.
    """
    return None if namespace is None else _checked(namespace)


AMemory = Annotated[Memory, BeforeValidator(memory_of)]
Labels = Annotated[tuple[str, ...] | None, BeforeValidator(pinned)]


def labels_of(namespace: Sequence[str] | None, config: RunnableConfig | None = None) -> Namespace:
    """The namespace of a call: the constructor's where there is one, which a call cannot change.

    :param config: the call's; by default that of the run that this is called from.
    :raises NamespaceError: if there is none, or it cannot be one.
    """
    given = namespace if namespace is not None else _configurable(config).get("namespace")
    if given is None:
        raise NamespaceError(
            'no namespace given: name one, as namespace=("acme", "alice") or in the call: '
            'config={"configurable": {"namespace": ("acme", "alice")}}'
        )
    return _checked(given)


def session_of(session: str | None, config: RunnableConfig | None = None) -> str | None:
    """The session of a call, by the same rule; ``None`` where neither a session nor a thread is named."""
    configurable = _configurable(config)
    for given in (session, configurable.get("session"), configurable.get("thread_id")):
        if given is not None and str(given).strip():
            return str(given)
    return None


def _checked(namespace: Any) -> Namespace:
    if not isinstance(namespace, str | list | tuple):
        raise NamespaceError(f"a namespace is a list of labels, not {type(namespace).__name__}: {namespace!r}")
    return as_namespace(namespace)


def _configurable(config: RunnableConfig | None) -> Mapping[str, Any]:
    from langchain_core.runnables.config import ensure_config

    return ensure_config(config).get("configurable", {})
