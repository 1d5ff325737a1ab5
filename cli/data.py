"""Commands that put things in and take things out: ingest, summarize, confirm, history, export, import."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from memory_os.cli import render
from memory_os.cli.common import Embedder, Json, Llm, Namespace, Restore, Session, Store, Tokenizer, Vectors, opened

if TYPE_CHECKING:
    from rich.progress import TaskID

    from memory_os.types import Stored

__all__ = ["confirm", "export", "export_alr2", "history", "import_", "ingest", "summarize"]


def ingest(
    file: Annotated[str, typer.Argument(help="Text, Markdown, or a chat in JSON or JSONL; - reads standard input.")],
    format: Annotated[str | None, typer.Option("--format", "-f", help="text, markdown or chat.")] = None,
    source: Annotated[
        str | None, typer.Option("--source", help="The source's name; what is known by it is not stored again.")
    ] = None,
    pick: Annotated[str | None, typer.Option("--pick", help="Of several conversations, the one with this id.")] = None,
    restore: Restore = False,
    workers: Annotated[
        int, typer.Option("--workers", min=0, max=1000, help="Store first, then embed in so many processes.")
    ] = 0,
    ray: Annotated[
        bool, typer.Option("--ray", help="Embed on a Ray cluster, by so many actors (RAY_ADDRESS, or here).")
    ] = False,
    json: Json = False,
    store: Store = None,
    namespace: Namespace = None,
    session: Session = None,
    embedder: Embedder = None,
    vectors: Vectors = None,
) -> None:
    """Store a file. Run it again, and nothing is stored twice.

    Example: memos ingest notes.md

    JSON: {"stored": 12, "already_there": 0}, and "forgotten" and "too_old" where there are any
    """
    flags = {"store": store, "namespace": namespace, "session": session, "embedder": embedder, "vectors": vectors}
    with opened(flags, writes=True) as (_, scope, settings), _progress() as progress:
        how = partial(
            scope.ingest, format=format, name=source, pick=pick, restore=restore, progress=progress.stored,
            workers=workers, ray=ray, made=progress.made,
        )  # fmt: skip
        try:
            if file == "-":
                with tempfile.TemporaryFile() as spool:
                    while block := sys.stdin.buffer.read(1 << 20):
                        spool.write(block)
                    spool.seek(0)
                    done = how(spool)
            else:
                done = how(file)
        except KeyboardInterrupt:
            render.talk().print("Stopped. What was stored stays; run it again to go on, or memos worker to embed it.")
            raise
    _tell(done, json)
    if settings.derive == "workers" and not (workers or ray):
        render.talk().print("Embedding is left to workers: memos worker")


def _tell(done: Stored, json: bool) -> None:
    stored, known = done
    if json:
        left_out = {name: n for name in ("forgotten", "too_old") if (n := getattr(done, name))}
        render.print_json({"stored": stored, "already_there": known, **left_out})
        return
    render.out().print(f"Stored {render.count_of(stored)}" + (f"; {known} were already there." if known else "."))
    if done.forgotten:
        render.talk().print(f"{done.forgotten} were forgotten here and stay so; --restore brings them back.")
    if done.too_old:
        render.talk().print(f"{done.too_old} are older than retention_days, and are not kept.")


def summarize(
    file: Annotated[str, typer.Argument(help="Text, Markdown, or a chat in JSON or JSONL.")],
    format: Annotated[str | None, typer.Option("--format", "-f", help="text, markdown or chat.")] = None,
    source: Annotated[str | None, typer.Option("--source", help="The source's name; the path if left out.")] = None,
    pick: Annotated[str | None, typer.Option("--pick", help="Of several conversations, the one with this id.")] = None,
    json: Json = False,
    store: Store = None,
    namespace: Namespace = None,
    session: Session = None,
    llm: Llm = None,
    embedder: Embedder = None,
    vectors: Vectors = None,
) -> None:
    """Store a file and summarise it, however long it is. Stopped, it goes on where it was when it is run again.

    Every summary is stored too, so that search and chat find it.

    Example: memos summarize report.txt

    JSON: {"text", "levels": [[{"seq", "id", "of"}]], "complete", "notes", "calls", "found"}
    """
    flags = {
        "store": store, "namespace": namespace, "session": session, "llm": llm, "embedder": embedder,
        "vectors": vectors,
    }  # fmt: skip
    with opened(flags, llm=True, writes=True) as (_, scope, _), _levels() as progress:
        try:
            summary = scope.summarize(file, format=format, name=source, pick=pick, progress=progress)
        except KeyboardInterrupt:
            render.talk().print("Stopped; what was summarised is kept. Run it again to go on.")
            raise
    if json:
        levels = [
            [{"seq": segment.seq, "id": segment.id, "of": segment.metadata.get("of")} for segment in level]
            for level in summary.levels
        ]
        render.print_json(
            {
                "text": summary.text,
                "levels": levels,
                "complete": summary.complete,
                "notes": summary.notes,
                "calls": summary.calls,
                "found": summary.found,
            }
        )
        return
    print(render.printable(summary.text))
    talk = render.talk()
    counts = " + ".join(str(len(level)) for level in summary.levels)
    talk.print(f"{counts} summaries by level; the LLM was asked {summary.calls} times, {summary.found} were there.")
    for note in summary.notes:
        talk.print(render.plain(note, "yellow"))


@contextmanager
def _levels() -> Iterator[Callable[[int, int, int], None]]:
    """A bar a level on a terminal, a line a summary elsewhere; both on standard error."""
    console = render.talk()
    if not console.is_terminal:
        yield lambda level, done, total: console.print(f"level {level}: {done} of {total}") if done else None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[int, TaskID] = {}

        def show(level: int, done: int, total: int) -> None:
            if level not in tasks:
                tasks[level] = bar.add_task(f"Level {level}" if level else "Theme", total=total)
            bar.update(tasks[level], completed=done)

        yield show


class Shown(NamedTuple):
    """What is called with ``(stored, already there, total)``, and with ``(vectors, summaries, done a second)``."""

    stored: Callable[..., None]
    made: Callable[[int, int, float], None]


@contextmanager
def _progress() -> Iterator[Shown]:
    """Bars on a terminal, a line per batch elsewhere; both on standard error."""
    console = render.talk()
    if not console.is_terminal:

        def line(stored: int, known: int, total: int | None = None) -> None:
            if total != 0:
                console.print(f"{stored + known}" + (f" of {total}" if total is not None else ""))

        yield Shown(line, lambda n, _, pace: console.print(f"{n} vectors, {pace:.0f} a second"))
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("Remembering", total=None)
        vectors = bar.add_task("Vectors", total=None, visible=False)

        def show(stored: int, known: int, total: int | None = None) -> None:
            bar.update(task, completed=stored + known, total=total)
            bar.update(vectors, total=stored)

        yield Shown(show, lambda n, _, __: bar.update(vectors, completed=n, visible=True))


def confirm(
    turn: Annotated[
        str | None, typer.Argument(help="The turn, by its trace, query or reply; the latest if left out.")
    ] = None,
    answer: Annotated[
        str | None, typer.Option("--answer", help='The right answer; "" where memory does not hold it.')
    ] = None,
    by: Annotated[str, typer.Option("--by", help="Who says so: user, gold or judge.")] = "user",
    evidence: Annotated[
        str | None, typer.Option("--evidence", help="Segments that it follows from, such as 12,15.")
    ] = None,
    json: Json = False,
    store: Store = None,
    namespace: Namespace = None,
) -> None:
    """Say that a turn's answer is right, or tell the right one: what export-alr2 makes training data of.

    Example: memos confirm 14 --answer "She lives in Oslo." --evidence 12

    JSON: {"trace", "query", "confirmation": {"by", "answer", "at", "evidence" (ids, or null for what is cited)}}
    """
    from memory_os.trace import trace_to_dict

    refs = [ref.strip() for ref in evidence.split(",") if ref.strip()] if evidence is not None else None
    with opened({"store": store, "namespace": namespace}, writes=True) as (_, scope, _):
        trace = scope.confirm(turn, answer=answer, by=by, evidence=refs)
    if json:
        render.print_json({"trace": trace.id, **{k: trace_to_dict(trace)[k] for k in ("query", "confirmation")}})
        return
    assert trace.confirmation is not None
    told = trace.confirmation.answer or "Memory does not hold it."
    render.out().print(render.plain(f"Confirmed: {trace.query}\n{told}"), soft_wrap=True)


def history(
    n: Annotated[int, typer.Option("-k", "--last", min=1, help="How many segments.")] = 20,
    json: Json = False,
    store: Store = None,
    namespace: Namespace = None,
    session: Session = None,
) -> None:
    """Show the latest segments, oldest first.

    Example: memos history --last 50

    JSON: a list of segments: id, seq, session, role, speaker, text, created_at, metadata and more.
    """
    from memory_os.transfer import segment_to_dict

    with opened({"store": store, "namespace": namespace, "session": session}) as (_, scope, _):
        segments = scope.history(n)
    if json:
        render.print_json([segment_to_dict(segment) for segment in segments])
    elif segments:
        render.out().print(render.segments_table(segments))
    else:
        render.talk().print("Nothing is remembered here yet.")


def export(
    file: Annotated[str, typer.Argument(help="Where to; - writes to standard output.")],
    json: Json = False,
    store: Store = None,
    namespace: Namespace = None,
    session: Session = None,
) -> None:
    """Write all that is recorded as JSONL, lossless.

    Example: memos export backup.jsonl

    JSON: {"segments": 12, "file": "backup.jsonl"}
    """
    with opened({"store": store, "namespace": namespace, "session": session}) as (_, scope, _):
        count = scope.export(render.stdout() if file == "-" else file)
    if file == "-":
        return
    if json:
        render.print_json({"segments": count, "file": file})
    else:
        render.out().print(render.plain(f"Wrote {render.count_of(count)} to {file}."), soft_wrap=True)


def export_alr2(
    file: Annotated[str, typer.Argument(help="Where to; - writes to standard output.")],
    context_tokens: Annotated[
        str, typer.Option("--context-tokens", help="Most tokens of a context; several take turns, such as 4k,8k,16k.")
    ] = "4k",
    exclude: Annotated[
        str | None,
        typer.Option("--exclude", help="A file of questions (or their SHA-256), one a line, to leave out."),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="What the records say they are for.")] = "train",
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same file.")] = 0,
    json: Json = False,
    store: Store = None,
    namespace: Namespace = None,
    tokenizer: Tokenizer = None,
) -> None:
    """Write confirmed turns as training data for both stages of ALR², verified, in the form of chats.

    Example: memos export-alr2 train.jsonl --context-tokens 4k,8k,16k,32k --exclude questions.txt

    JSON: {"n_records", "n_turns", "refused" (turns by reason), "excluded", "file"}
    """
    from dataclasses import asdict

    lengths = [_tokens(each) for each in context_tokens.split(",")]
    with opened({"store": store, "namespace": namespace, "tokenizer": tokenizer}) as (_, scope, _):
        report = scope.export_alr2(
            render.stdout() if file == "-" else file,
            context_tokens=lengths,
            exclude=exclude if exclude is not None else (),
            split=split,
            seed=seed,
        )
    if json and file != "-":
        render.print_json({**asdict(report), "file": file})
        return
    talk = render.talk()
    console = talk if file == "-" else render.out()
    console.print(
        render.plain(f"Wrote {report.n_records} records of {report.n_turns} turns to {file}."), soft_wrap=True
    )
    for reason, count in report.refused.items():
        talk.print(render.plain(f"Refused {count}: {reason}.", "yellow"), soft_wrap=True)
    if report.excluded:
        talk.print(f"Left out {report.excluded} whose question is excluded.")


def _tokens(length: str) -> int:
    number = length.strip().lower()
    try:
        return int(number.removesuffix("k")) * (1024 if number.endswith("k") else 1)
    except ValueError:
        raise typer.BadParameter(f"{length!r} is no number of tokens, such as 4096 or 4k") from None


def import_(
    file: Annotated[str, typer.Argument(help="A file that export wrote; - reads standard input.")],
    restore: Restore = False,
    json: Json = False,
    store: Store = None,
    namespace: Namespace = None,
    embedder: Embedder = None,
    vectors: Vectors = None,
) -> None:
    """Store what export wrote. Run it again, and nothing is stored twice.

    Example: memos import backup.jsonl -n acme/alice

    JSON: {"stored": 12, "already_there": 0}, and "forgotten" and "too_old" where there are any
    """
    flags = {"store": store, "namespace": namespace, "embedder": embedder, "vectors": vectors}
    with opened(flags, writes=True) as (_, scope, _), _progress() as progress:
        done = scope.import_(sys.stdin if file == "-" else file, restore=restore, progress=progress.stored)
    _tell(done, json)
