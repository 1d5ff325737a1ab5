"""Moving a whole store to another database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from memory_os.cli import render
from memory_os.cli.common import Json

if TYPE_CHECKING:
    from memory_os.migration import Migration

__all__ = ["migrate"]


def migrate(
    source: Annotated[str, typer.Argument(help="A database file, or postgresql+psycopg://USER:PASSWORD@HOST/NAME.")],
    dest: Annotated[
        str, typer.Argument(help="The same, empty or not there yet; SOURCE itself, to make only an index of it.")
    ],
    vectors: Annotated[
        str | None,
        typer.Option("--vectors", help="Make this index at once: exact, chroma, pgvector or chroma+http://HOST:PORT."),
    ] = None,
    verify_only: Annotated[bool, typer.Option("--verify-only", help="Compare the two, and write nothing.")] = False,
    json: Json = False,
) -> None:
    """Copy a whole store into another database, and compare both. Stopped, it goes on when it is run again.

    Exit code 1 if they differ. SOURCE is not changed.

    Example: memos migrate memory.db postgresql+psycopg://ann@db/memory --vectors pgvector

    JSON: {"source", "dest", "tables": {name: {"rows", "sha256"}}, "differences": [{"namespace", "table", "source",
    "dest"}], "left": {table: rows}, "index": vectors in it, or null}
    """
    from memory_os.build import migrate as bring

    with _progress() as progress:
        done = bring(source, dest, vectors=vectors, verify_only=verify_only, progress=progress)
    if json:
        render.print_json(
            {
                "source": done.source,
                "dest": done.dest,
                "tables": {each.table: {"rows": each.rows, "sha256": each.sha256} for each in done.tables},
                "differences": [each._asdict() for each in done.differences],
                "left": dict(done.left),
                "index": done.index,
            }
        )
    else:
        _show(done)
    if done.differences:
        raise typer.Exit(1)


def _show(done: Migration) -> None:
    from memory_os.stores.tablerows import LEFT

    differing = {each.table for each in done.differences}
    rows = {
        each.table: [f"{each.rows:,}", "DIFFERS" if each.table in differing else "the same", each.sha256[:16]]
        for each in done.tables
    }
    if rows:
        render.out().print(render.pairs_table(rows, "table", "rows", "on both sides", "sha256"))
    talk = render.talk()
    for difference in done.differences[:20]:
        talk.print(render.plain(str(difference), "red"), soft_wrap=True)
    for table, n in done.left.items():
        talk.print(render.plain(f"Left, {n:,} of {table}: {LEFT[table]}.", "yellow"), soft_wrap=True)
    if done.index is not None:
        talk.print(f"The index holds {done.index:,} vectors.")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A line that changes, on a terminal only; on standard error."""
    with render.talk().status("Opening") as status:
        yield lambda what, n, total: status.update(f"{n:,} of {total:,} {what}")
