"""``memos ask``: a question about a file of any size, which is not stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer

from memory_os.cli import render
from memory_os.cli.common import Budget, Json, Llm, Namespace, Store, opened

__all__ = ["ask"]


def ask(
    file: Annotated[str, typer.Argument(help="UTF-8 text of any size.")],
    question: Annotated[str, typer.Argument(help="What is to be found in it.")],
    score: Annotated[
        str | None,
        typer.Option("--score", help="hybrid (where the LLM is able to), entropy (the paper's) or question_nll."),
    ] = None,
    segment_tokens: Annotated[int, typer.Option("--segment-tokens", help="Most tokens of a segment.")] = 512,
    overlap: Annotated[
        int | None, typer.Option("--overlap", help="Most tokens that neighbours share; by default an eighth.")
    ] = None,
    k: Annotated[int | None, typer.Option("--k", help="Segments to keep; by default what the budget holds.")] = None,
    stem: Annotated[str, typer.Option("--stem", help="Who begins the answer: auto, rules, llm or none.")] = "auto",
    show: Annotated[bool, typer.Option("--show", help="Also print the passages that the answer rests on.")] = False,
    json: Json = False,
    store: Store = None,
    namespace: Namespace = None,
    llm: Llm = None,
    budget: Budget = None,
) -> None:
    """Answer a question about a file of any size: the LLM reads every segment once, and the best in one context.

    The file is not stored. Stopped, it goes on where it was when it is run again.

    Example: memos ask book.txt "What is the captain called?"

    JSON: {"text", "passages": [{"start", "end", "text", "window", and what it was scored by}], "notes", "account"}
    """
    flags = {"store": store, "namespace": namespace, "llm": llm, "budget": budget}
    options: dict[str, Any] = {"segment_tokens": segment_tokens, "overlap": overlap, "k": k, "stem": stem}
    options |= {"score": score} if score else {}
    with opened(flags, llm=True) as (_, scope, _), _reading() as progress:
        try:
            reply = scope.read(file, question, progress=progress, options=options)
        except KeyboardInterrupt:
            render.talk().print("Stopped; what was read is kept. Run it again to go on.")
            raise
    if json:
        passages = [
            {"start": (segment.offset or (0, 0))[0], "end": (segment.offset or (0, 0))[1], "text": segment.text}
            | next(dict(entry.signals) for entry in reply.context.ledger if entry.segment_id == segment.id)
            for segment in reply.context.segments
        ]
        notes, account = list(reply.trace.notes), asdict(reply.context.account)
        render.print_json({"text": reply.text, "passages": passages, "notes": notes, "account": account})
        return
    if show:
        for segment in reply.context.segments:
            start, end = segment.offset or (0, 0)
            render.out().print(render.plain(f"[characters {start:,} to {end:,}]", "dim"))
            print(render.printable(segment.text) + "\n")
    print(render.printable(reply.text))
    for note in reply.trace.notes:
        render.talk().print(render.plain(note, "dim"))


@contextmanager
def _reading() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, a line every tenth of the file elsewhere; both on standard error."""
    console = render.talk()
    if not console.is_terminal:
        tenth = -1

        def line(done: int, total: int) -> None:
            nonlocal tenth
            if total and 10 * done // total > tenth:
                tenth = 10 * done // total
                console.print(f"read {done:,} of {total:,} bytes")

        yield line
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("Reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("Reading", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
