"""The error tree. Every error carries the failing values as attributes and names the fix in its text.

MemoryOSError
├── ConfigError           a setting, name or argument that cannot be used (also a missing extra)
│   ├── NamespaceError    no namespace, or a label that cannot be one
│   ├── UnknownNameError  a backend, controller, model or segment that does not exist
│   └── MissingExtraError an optional package is not installed
├── InvalidInputError     text or a file that cannot be stored; carries source and line
├── BudgetError           the fixed parts of the context do not fit
├── CapabilityError       a controller needs an LLM that can do more
├── BacklogFullError      workers are too far behind for more to be stored
├── EmbedderError         a worker's embedder failed; what is stored stays pending
├── StoreError            the store cannot be read or written
│   ├── SchemaError       the database belongs to another version
│   └── StoreLockedError  another process owns an embedded index
└── LLMError              the wrapped LLM failed; the turn is already stored
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "BacklogFullError",
    "BudgetError",
    "CapabilityError",
    "ConfigError",
    "EmbedderError",
    "InvalidInputError",
    "LLMError",
    "MemoryOSError",
    "MissingExtraError",
    "NamespaceError",
    "SchemaError",
    "StoreError",
    "StoreLockedError",
    "UnknownNameError",
]


LONGEST = 1000
"""Characters of a message; what is longer is cut in its middle, where long names and paths stand."""


class MemoryOSError(Exception):
    """Root of everything that memory_os raises on purpose."""

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= LONGEST else f"{text[: LONGEST - 300]}[...]{text[-295:]}"


class ConfigError(MemoryOSError):
    """A setting or argument that cannot be used. Nothing was changed."""


class NamespaceError(ConfigError):
    """A namespace is missing or malformed; every read and write names exactly one."""


class UnknownNameError(ConfigError):
    """A name that is not known here.

    :param what: the sort of name, for example ``"controller"``.
    :param name: what was asked for.
    :param known: what could have been asked for; empty when the list is not finite.
    """

    def __init__(self, what: str, name: str, known: Iterable[str] = (), hint: str = "") -> None:
        self.what, self.name, self.known = what, name, tuple(sorted(known))
        text = f"unknown {what} {name!r}"
        if self.known:
            text += f"; known: {', '.join(self.known)}"
        super().__init__(f"{text}. {hint}" if hint else text)


class MissingExtraError(ConfigError):
    """An optional package is missing; ``command`` installs it."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        self.feature, self.package, self.extra = feature, package, extra
        self.command = f'pip install "memory-os[{extra}]"'
        super().__init__(f"{feature} needs the package {package!r}; install it with: {self.command}")


class InvalidInputError(MemoryOSError):
    """Text, a record or a file that cannot be stored.

    :param source: the file (or ``-``) it came from, if any.
    :param line: the 1-based line, if it is known.
    """

    def __init__(self, problem: str, *, source: str | None = None, line: int | None = None) -> None:
        self.problem, self.source, self.line = problem, source, line
        where = source or ""
        if line is not None:
            where += f"{', ' if where else ''}line {line}"
        super().__init__(f"{where}: {problem}" if where else problem)


class BudgetError(MemoryOSError):
    """The parts that must be in the context are longer than the budget.

    :param limit: the budget in tokens.
    :param needed: tokens of the fixed parts (system prompt, query, wrappers).
    """

    def __init__(self, limit: int, needed: int) -> None:
        self.limit, self.needed = limit, needed
        super().__init__(
            f"a budget of {limit} tokens is smaller than the fixed parts of the context "
            f"(system prompt, query and wrappers: {needed} tokens); raise the budget to at least {needed} "
            "or shorten the system prompt or the query"
        )


class CapabilityError(MemoryOSError):
    """The LLM lacks a capability that the controller needs.

    :param problem: what is in the way, where the LLM has the methods and this model cannot do it.
    """

    def __init__(self, controller: str, capability: str, adapter: str, problem: str | None = None) -> None:
        self.controller, self.capability, self.adapter, self.problem = controller, capability, adapter, problem
        with_it = "" if capability == "LLM" else f" with {capability}"
        because = f", and {problem}" if problem else ""
        super().__init__(f"controller {controller!r} needs an LLM{with_it}{because}; {adapter} is one")


class EmbedderError(MemoryOSError):
    """A worker's embedder failed, again and again. What it was to embed is stored and stays pending."""

    def __init__(self, embedder: str, problem: str) -> None:
        self.embedder, self.problem = embedder, problem
        super().__init__(
            f"the embedder {embedder} failed: {problem}; all is stored, and what has no vector yet stays pending: run "
            "it again when the embedder is well"
        )


class BacklogFullError(MemoryOSError):
    """Too much waits for workers, and does not grow less. Nothing was stored; try again when they have caught up.

    :param pending: so many segments have no vector.
    :param most: so many may have none (``max_pending``).
    """

    def __init__(self, pending: int, most: int) -> None:
        self.pending, self.most = pending, most
        super().__init__(
            f"{pending} segments wait for workers, max_pending is {most}, and they do not grow less; nothing was "
            "stored. Start more of them (memos worker; memos worker --status says who is there), or raise max_pending"
        )


class StoreError(MemoryOSError):
    """The store cannot be opened, read or written; nothing was changed."""


class SchemaError(StoreError):
    """The database's schema revision is not one that this version knows."""

    def __init__(self, path: str, found: str, newest: str) -> None:
        self.path, self.found, self.newest = path, found, newest
        super().__init__(
            f"{path} has schema revision {found!r}, newer than the {newest!r} that this version knows; "
            "upgrade memory-os (pip install -U memory-os) to open it"
        )


class StoreLockedError(StoreError):
    """Another process owns an embedded index that only one process may write."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(
            f"another process has the embedded Chroma index {path} open, and two would corrupt it; close that "
            "process, or use vectors='exact', which any number of processes may share"
        )


class LLMError(MemoryOSError):
    """The wrapped LLM failed. The user's segment and the trace are stored; ask again when it is back."""

    def __init__(self, llm: str, problem: str, trace_id: str | None = None) -> None:
        self.llm, self.problem, self.trace_id = llm, problem, trace_id
        super().__init__(f"the LLM {llm} failed: {problem}")
