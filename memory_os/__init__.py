"""The memory layer for LLM agents: decides every turn what enters the bounded context, and says why."""

from memory_os.aio import AsyncMemory, AsyncScope
from memory_os.errors import (
    BudgetError,
    CapabilityError,
    ConfigError,
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
from memory_os.types import Context, Hit, NewSegment, Reply, Segment, Trace

__all__ = [
    "AsyncMemory",
    "AsyncScope",
    "BudgetError",
    "CapabilityError",
    "ConfigError",
    "Context",
    "Hit",
    "InvalidInputError",
    "LLMError",
    "Memory",
    "MemoryOSError",
    "MissingExtraError",
    "NamespaceError",
    "NewSegment",
    "Reply",
    "SchemaError",
    "Scope",
    "Segment",
    "StoreError",
    "StoreLockedError",
    "Trace",
    "UnknownNameError",
]
