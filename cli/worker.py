"""``memos worker``: make what is derived, beside any number of others."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from threading import Event
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memory_os.cli import render
from memory_os.cli.common import Embedder, Json, Llm, Store, opened

if TYPE_CHECKING:
    from memory_os.protocols import QueueStatus

__all__ = ["worker"]


def worker(
    until_idle: Annotated[
        bool, typer.Option("--until-idle", "--once", help="Leave when nothing is left that nobody is at.")
    ] = False,
    status: Annotated[bool, typer.Option("--status", help="Show what is left and who is at it, and leave.")] = False,
    summaries: Annotated[
        bool | None,
        typer.Option("--summaries/--no-summaries", help="Also summarise; the default where an LLM is configured."),
    ] = None,
    batch: Annotated[
        int, typer.Option("--batch", min=1, max=10_000, help="So many texts are embedded at a time.")
    ] = 128,
    json: Json = False,
    store: Store = None,
    embedder: Embedder = None,
    llm: Llm = None,
) -> None:
    """Make vectors and summaries that are missing, of every namespace. Any number of workers may run, on any machine.

    Ctrl-C and SIGTERM end it after the batch that is under way; what a killed one had begun others take over.

    Example: memos worker --store postgresql+psycopg://memos@db/memory

    JSON: {"vectors", "summaries", "seconds", "per_second", "failed"}; with --status {"vectors", "items", "summaries",
    "oldest_at", "workers": [{"name", "started_at", "seen_at", "claimed", "done", "per_second"}]}
    """
    from memory_os.config import load

    flags = {"store": store, "embedder": embedder, "llm": llm}
    if summaries is None:
        summaries = load(flags)[1]["llm"].source != "default"
    if status:
        with opened(flags) as (memory, _, _):
            _show(memory.queue(), json)
        return
    with opened(flags, llm=summaries) as (memory, _, _), _asked_to_stop() as stop, _pace() as progress:
        done = memory.work(stop=stop, until_idle=until_idle, batch=batch, summaries=summaries, progress=progress)
    pace = (done.vectors + done.summaries) / done.seconds if done.seconds else 0.0
    if json:
        render.print_json({**done._asdict(), "per_second": pace})
        return
    failed = f"; {done.failed} summaries failed" if done.failed else ""
    render.out().print(
        f"{done.vectors} vectors and {done.summaries} summaries in {done.seconds:.1f} s, {pace:.0f} a second{failed}."
    )


def _show(queue: QueueStatus, json: bool) -> None:
    if json:
        told: dict[str, Any] = {
            "vectors": queue.vectors,
            "items": queue.items,
            "summaries": queue.summaries,
            "oldest_at": queue.oldest_at,
            "workers": [each._asdict() for each in queue.workers],
        }
        render.print_json(told)
        return
    rows = {
        "vectors to be made": f"{queue.vectors}",
        "vectors of items": f"{queue.items}",
        "summaries": f"{queue.summaries}",
        "the oldest waits": f"{(datetime.now(UTC) - queue.oldest_at).total_seconds():.0f} s"
        if queue.oldest_at
        else "-",
        "done a second": f"{sum(each.per_second for each in queue.workers):.0f}",
    }
    for each in queue.workers:
        rows[f"worker {each.name}"] = f"{each.done} done, {each.claimed} claimed, {each.per_second:.0f} a second"
    render.out().print(render.pairs_table(rows, "queue", "now"))


@contextmanager
def _asked_to_stop() -> Iterator[Event]:
    """Set by SIGINT or SIGTERM; a second one interrupts at once, and what is under way is anybody's."""
    stop = Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        render.talk().print("Ending after what is under way.")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _pace() -> Iterator[Callable[[int, int, float], None]]:
    """A line that changes on a terminal, a line a batch elsewhere; both on standard error."""
    console = render.talk()

    def line(vectors: int, summaries: int, pace: float) -> str:
        return f"{vectors} vectors, {summaries} summaries, {pace:.0f} a second"

    if not console.is_terminal:
        yield lambda *done: console.print(line(*done))
        return
    with console.status("Waiting for work") as status:
        yield lambda *done: status.update(line(*done))
