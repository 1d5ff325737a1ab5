"""The memory layer for LLM agents: decides every turn what enters the bounded context, and says why.

Names are imported when they are first used, so that a command that needs none of them starts at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memory_os.aio import AsyncMemory, AsyncScope
    from memory_os.build import migrate
    from memory_os.controllers.alr2 import Alr2Controller
    from memory_os.controllers.longmem import LongMemFreeController
    from memory_os.controllers.scm import ScmController
    from memory_os.controllers.xl3m import Xl3mController
    from memory_os.errors import (
        BacklogFullError,
        BudgetError,
        CapabilityError,
        ConfigError,
        EmbedderError,
        InvalidInputError,
        LLMError,
        MemoryOSError,
        MissingExtraError,
        NamespaceError,
        SchemaError,
        StoreError,
        StoreLockedError,
        UnknownNameError,
    )
    from memory_os.memory import Memory, Scope
    from memory_os.migration import Migration
    from memory_os.types import BankOptions, Context, Evidence, Hit, NewSegment, Reply, Segment, Trace

__all__ = [
    "Alr2Controller",
    "AsyncMemory",
    "AsyncScope",
    "BacklogFullError",
    "BankOptions",
    "BudgetError",
    "CapabilityError",
    "ConfigError",
    "Context",
    "EmbedderError",
    "Evidence",
    "Hit",
    "InvalidInputError",
    "LLMError",
    "LongMemFreeController",
    "Memory",
    "MemoryOSError",
    "Migration",
    "MissingExtraError",
    "NamespaceError",
    "NewSegment",
    "Reply",
    "SchemaError",
    "ScmController",
    "Scope",
    "Segment",
    "StoreError",
    "StoreLockedError",
    "Trace",
    "UnknownNameError",
    "Xl3mController",
    "migrate",
]

_HOMES = {
    "aio": ("AsyncMemory", "AsyncScope"),
    "build": ("migrate",),
    "controllers.alr2": ("Alr2Controller",),
    "controllers.longmem": ("LongMemFreeController",),
    "controllers.scm": ("ScmController",),
    "controllers.xl3m": ("Xl3mController",),
    "memory": ("Memory", "Scope"),
    "migration": ("Migration",),
    "types": ("BankOptions", "Context", "Evidence", "Hit", "NewSegment", "Reply", "Segment", "Trace"),
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((home for home, names in _HOMES.items() if name in names), "errors")
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
