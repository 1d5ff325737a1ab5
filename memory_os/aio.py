"""``AsyncMemory``: the same verbs as coroutines. One body: each runs the synchronous verb in a worker thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial, update_wrapper
from pathlib import Path
from threading import Event
from typing import IO, Any, Concatenate, ParamSpec, Self, TypeVar

from memory_os.backlog import STEP
from memory_os.examples import Examples, Prediction
from memory_os.items import Items
from memory_os.memory import Memory, Scope, Stream
from memory_os.protocols import QueueStatus
from memory_os.types import Namespace, Reply, Segment
from memory_os.worker import Worked

__all__ = ["AsyncExamples", "AsyncItems", "AsyncMemory", "AsyncScope", "AsyncStream"]

P = ParamSpec("P")
R = TypeVar("R")

STORING = 4
"""So many threads store at a time where ``max_pending`` has them wait: they must not be all that there are."""


class Calls:
    """What is at work in threads. A thread goes on when who waits for it is cancelled; ``close`` waits for all.

    :param bounded: whether who stores may have to wait for workers.
    """

    def __init__(self, bounded: bool = False) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._storing = ThreadPoolExecutor(STORING, "memory_os storing") if bounded else None

    async def __call__(self, verb: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """What the verb gives back, from a worker thread."""
        return await self.all_of(asyncio.to_thread(verb, *args, **kwargs))

    async def storing(self, verb: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """As any call; where it may have to wait for workers, not from a thread that others need."""
        if self._storing is None:
            return await self(verb, *args, **kwargs)
        return await self.all_of(_within(self._storing, verb, *args, **kwargs))

    async def apart(self, verb: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """As any call, from a thread of its own: it may go on for ever."""
        own = ThreadPoolExecutor(1, "memory_os apart")
        try:
            return await self.all_of(_within(own, verb, *args, **kwargs))
        finally:
            own.shutdown(wait=False)

    async def all_of(self, work: Coroutine[Any, Any, R]) -> R:
        """What the work gives back; cancelled or not, all of it is done."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen, also where nobody waits any more

    async def ended(self) -> None:
        """Wait until nothing is at work."""
        while self._tasks:
            await asyncio.wait(self._tasks)


async def _within(threads: Executor, verb: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    call = partial(copy_context().run, verb, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(threads, call)


def _threaded(verb: Callable[Concatenate[Scope, P], R]) -> Callable[Concatenate[AsyncScope, P], Coroutine[Any, Any, R]]:
    async def run(self: AsyncScope, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self.calls(verb, self.scope, *args, **kwargs)

    update_wrapper(run, verb)
    return run


def _storing(verb: Callable[Concatenate[Scope, P], R]) -> Callable[Concatenate[AsyncScope, P], Coroutine[Any, Any, R]]:
    async def run(self: AsyncScope, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self.calls.storing(verb, self.scope, *args, **kwargs)

    update_wrapper(run, verb)
    return run


def _of_items(verb: Callable[Concatenate[Items, P], R]) -> Callable[Concatenate[AsyncItems, P], Coroutine[Any, Any, R]]:
    async def run(self: AsyncItems, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self.calls(verb, self.items, *args, **kwargs)

    update_wrapper(run, verb)
    return run


class AsyncItems:
    """``Items`` for asyncio."""

    def __init__(self, items: Items, calls: Calls | None = None) -> None:
        self.items = items
        self.calls = calls or Calls()

    put = _of_items(Items.put)
    delete = _of_items(Items.delete)
    apply = _of_items(Items.apply)
    get = _of_items(Items.get)
    get_many = _of_items(Items.get_many)
    search = _of_items(Items.search)
    paths = _of_items(Items.paths)
    count = _of_items(Items.count)
    sweep = _of_items(Items.sweep)
    catch_up = _of_items(Items.catch_up)


class AsyncScope:
    """``Scope`` for asyncio."""

    def __init__(self, scope: Scope, calls: Calls | None = None) -> None:
        self.scope = scope
        self.calls = calls or Calls()

    def session(self, name: str) -> AsyncScope:
        """The same verbs on one session of the namespace."""
        return AsyncScope(self.scope.session(name), self.calls)

    @property
    def items(self) -> AsyncItems:
        """Mutable values under a path and key; see ``Scope.items``."""
        return AsyncItems(self.scope.items, self.calls)

    def examples(self, input_name: str, label_name: str, *, labels: Sequence[str], k: int = 20) -> AsyncExamples:
        """Labelled examples of one task, kept in this namespace; see ``Scope.examples``."""
        return AsyncExamples(self.scope.examples(input_name, label_name, labels=labels, k=k), self.calls)

    add = _storing(Scope.add)
    add_many = _storing(Scope.add_many)
    replace_many = _storing(Scope.replace_many)
    ingest = _storing(Scope.ingest)
    summarize = _storing(Scope.summarize)
    sources = _threaded(Scope.sources)
    forget = _threaded(Scope.forget)
    would_forget = _threaded(Scope.would_forget)
    expire = _threaded(Scope.expire)
    export = _threaded(Scope.export)
    export_alr2 = _threaded(Scope.export_alr2)
    import_ = _storing(Scope.import_)
    context = _threaded(Scope.context)
    answered = _threaded(Scope.answered)
    search = _threaded(Scope.search)
    nearest = _threaded(Scope.nearest)
    lookup = _threaded(Scope.lookup)
    why = _threaded(Scope.why)
    confirm = _threaded(Scope.confirm)
    history = _threaded(Scope.history)
    segment = _threaded(Scope.segment)
    stats = _threaded(Scope.stats)
    bank_status = _threaded(Scope.bank_status)
    fill_bank = _threaded(Scope.fill_bank)
    drop_bank = _threaded(Scope.drop_bank)

    async def read(
        self,
        document: str | Path | IO[bytes],
        question: str,
        *,
        name: str | None = None,
        budget: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Reply:
        """Answer a question about a document of any size; cancelling it stops after the segments being scored."""
        cancelled = Event()

        def watched(done: int, total: int) -> None:
            if cancelled.is_set():
                raise asyncio.CancelledError
            if progress:
                progress(done, total)

        try:
            return await self.calls(
                self.scope.read, document, question, name=name, budget=budget, progress=watched, options=options
            )
        finally:
            cancelled.set()

    async def chat(self, query: str, *, speaker: str | None = None, budget: int | None = None) -> Reply:
        """One whole turn; cancelling it interrupts the model and stores what was said."""
        stream = self.stream(query, speaker=speaker, budget=budget)
        async for _ in stream:
            pass
        return stream.reply

    def stream(self, query: str, *, speaker: str | None = None, budget: int | None = None) -> AsyncStream:
        """One whole turn, piece by piece."""
        return AsyncStream(self.scope.stream(query, speaker=speaker, budget=budget), self.calls)


class AsyncExamples:
    """``Examples`` for asyncio."""

    def __init__(self, examples: Examples, calls: Calls | None = None) -> None:
        self.examples = examples
        self.calls = calls or Calls()

    async def add(self, pairs: Iterable[tuple[str, str]]) -> list[Segment]:
        """Store texts with their labels, all or none."""
        return await self.calls(self.examples.add, pairs)

    async def fill(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Compute keys and values of the newest examples that the bank has room for."""
        return await self.calls(self.examples.fill, progress)

    async def classify(self, text: str, *, budget: int | None = None, calibrate: bool = True) -> Prediction:
        """The likeliest label of a text after the examples nearest to it."""
        return await self.calls(self.examples.classify, text, budget=budget, calibrate=calibrate)


class AsyncStream:
    """``Stream`` for asyncio."""

    def __init__(self, stream: Stream, calls: Calls | None = None) -> None:
        self._stream = stream
        self._calls = calls or Calls()
        self._pieces = self._run()

    def __aiter__(self) -> AsyncIterator[str]:
        return self._pieces

    async def aclose(self) -> None:
        """Interrupt the model; what it said is stored."""
        await self._pieces.aclose()

    async def _run(self) -> AsyncGenerator[str, None]:
        end = object()
        step: asyncio.Future[Any] | None = None
        try:
            while True:
                step = asyncio.ensure_future(asyncio.to_thread(next, self._stream, end))
                piece = await asyncio.shield(step)
                if piece is end:
                    return
                yield piece
        finally:
            # work of its own: cancelled once more, it is done all the same
            await self._calls.all_of(self._ended(step))

    async def _ended(self, step: asyncio.Future[Any] | None) -> None:
        if step is not None and not step.done():  # the thread must come back before the turn can be closed
            await asyncio.wait([step])
        await asyncio.to_thread(self._stream.close)

    @property
    def reply(self) -> Reply:
        """The whole reply, when the stream has ended."""
        return self._stream.reply


class AsyncMemory:
    """``Memory`` for asyncio: ``async with AsyncMemory.open(...) as memory``, or ``await AsyncMemory.open(...)``."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.calls = Calls(bounded=memory.parts.bound is not None)

    @staticmethod
    def open(path: str | Path, **kwargs: Any) -> _Opening:
        """Open as ``Memory.open`` does, with the same parameters, in a worker thread."""
        return _Opening(lambda: Memory.open(path, **kwargs))

    def namespace(self, *labels: str) -> AsyncScope:
        """The verbs on one namespace."""
        return AsyncScope(self.memory.namespace(*labels), self.calls)

    async def namespaces(self) -> list[Namespace]:
        """All that hold anything."""
        return await self.calls(self.memory.namespaces)

    async def expire(self, days: float, *, preview: bool = False, verify: bool = False) -> dict[str, int]:
        """Forget what is older than so many days in every namespace."""
        return await self.calls(self.memory.expire, days, preview=preview, verify=verify)

    async def scan_for(self, *texts: str) -> dict[str, list[str]]:
        """``{file: texts}``: in which files of the store any of these texts stands."""
        return await self.calls(self.memory.scan_for, *texts)

    async def pending(self) -> dict[Namespace, int]:
        """How many vectors each namespace still lacks."""
        return await self.calls(self.memory.pending)

    async def queue(self) -> QueueStatus:
        """What is left to be derived, and who is at it; see ``Memory.queue``."""
        return await self.calls(self.memory.queue)

    async def work(
        self,
        *,
        stop: Event | None = None,
        until_idle: bool = True,
        batch: int = STEP,
        summaries: bool = True,
        progress: Callable[[int, int, float], None] | None = None,
    ) -> Worked:
        """Be a worker; see ``Memory.work``. Cancelled, it sets ``stop``, and ends after what is under way."""
        stop = stop or Event()
        how: dict[str, Any] = {"until_idle": until_idle, "batch": batch, "summaries": summaries, "progress": progress}
        try:
            return await self.calls.apart(partial(self.memory.work, stop=stop, **how))
        except asyncio.CancelledError:
            stop.set()
            raise

    async def check(self, *, deep: bool = False) -> dict[str, list[str]]:
        """What is wrong with the store, by kind."""
        return await self.calls(self.memory.check, deep=deep)

    async def repair(self, *, deep: bool = False) -> dict[str, int]:
        """Rebuild what is derived and missing or wrong."""
        return await self.calls(self.memory.repair, deep=deep)

    async def close(self) -> None:
        """Release the database and the index, when all that is at work has ended, what was cancelled included."""
        await self.calls.ended()
        await asyncio.to_thread(self.memory.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _Opening:
    """A memory that is being opened: awaitable, and an async context manager."""

    def __init__(self, opener: Callable[[], Memory]) -> None:
        self._opener = opener
        self._memory: AsyncMemory | None = None

    def __await__(self) -> Generator[Any, None, AsyncMemory]:
        return self._open().__await__()

    async def _open(self) -> AsyncMemory:
        return AsyncMemory(await asyncio.to_thread(self._opener))

    async def __aenter__(self) -> AsyncMemory:
        self._memory = await self._open()
        return self._memory

    async def __aexit__(self, *_: object) -> None:
        if self._memory is not None:
            await self._memory.close()
