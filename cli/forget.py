"""Commands that delete: forget, and retain, which forgets by age."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memory_os.cli import render
from memory_os.cli.common import Embedder, Json, Namespace, Store, Vectors, old_history, opened

if TYPE_CHECKING:
    from memory_os.address import DatabaseUrl
    from memory_os.types import Segment

__all__ = ["forget", "retain"]

SHOWN = 20
Verify = Annotated[
    bool, typer.Option("--verify", help="Then read every file of the store for the text; a server's are not read.")
]


def forget(
    refs: Annotated[list[str] | None, typer.Argument(help="Segments, by number or id.")] = None,
    whole_session: Annotated[str | None, typer.Option("--whole-session", help="Forget this session.")] = None,
    after: Annotated[
        str | None, typer.Option("--after", help="Forget what was said at this time or later, such as 2025-01-31.")
    ] = None,
    before: Annotated[str | None, typer.Option("--before", help="Forget what was said before this time.")] = None,
    query: Annotated[str | None, typer.Option("--query", help="Forget what search finds best for this.")] = None,
    k: Annotated[int | None, typer.Option("-k", min=1, help="With --query: how many segments.")] = None,
    everything: Annotated[bool, typer.Option("--everything", help="Forget all of the namespace.")] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Only say what would go.")] = False,
    verify: Verify = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
    store: Store = None,
    namespace: Namespace = None,
    embedder: Embedder = None,
    vectors: Vectors = None,
) -> None:
    """Delete segments for good, with all that was derived from them; shows first what would go, and asks.

    Example: memos forget 12 13

    JSON: counts by place: segments, vectors, lexical, summaries, pending, scores, bank, traces, traces_blanked,
    tombstones, items, unfinished (1: done when the store is next opened), residue (with --verify: files that hold it),
    still_held (with --verify: texts that something still stored says too);
    with --preview also going: a list of seq, id and text.
    """
    by_time = after is not None or before is not None
    ways = [bool(refs), whole_session is not None or by_time, query is not None, everything]
    if sum(ways) != 1 or (query is None) != (k is None):
        raise typer.BadParameter(
            "name segments, or --whole-session NAME and/or --after and --before, or --query with -k, or --everything"
        )
    chosen: dict[str, Any] = {
        "session": whole_session, "after": after, "before": before, "query": query, "k": k, "everything": everything,
    }  # fmt: skip
    flags = {"store": store, "namespace": namespace, "embedder": embedder, "vectors": vectors}
    with opened(flags) as (_, scope, settings):
        scope = scope.whole()  # the setting session says where to write, not what to forget
        going = scope.would_forget(*refs or (), **chosen)
        counts = scope.forget(*refs or (), **chosen, preview=True)
        if not json and not everything and (preview or not yes):
            _show(going)
        if not preview:
            if not yes:
                what = _going(counts)
                if not sys.stdin.isatty():
                    raise typer.BadParameter(f"this would forget {what}; say --yes to do it unasked")
                typer.confirm(f"Forget {what} of {settings.namespace} for good?", abort=True, err=True)
            if everything:
                counts = scope.forget(everything=True, verify=verify)
            elif there := scope.lookup(segment.id for segment in going):  # what was shown, and nothing said since
                counts = scope.forget(*(segment.seq for segment in there.values()), verify=verify)
    if json and preview:
        shown = [{"seq": each.seq, "id": each.id, "text": each.text} for each in going]
        render.print_json({**counts, "going": shown})
    else:
        _tell(counts, preview, json, settings.store)


def retain(
    days: Annotated[
        float | None, typer.Option("--days", help="Keep what is not older; the setting retention_days if left out.")
    ] = None,
    all_namespaces: Annotated[bool, typer.Option("--all", help="In every namespace.")] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Only say how much would go.")] = False,
    verify: Verify = False,
    json: Json = False,
    store: Store = None,
    namespace: Namespace = None,
    embedder: Embedder = None,
    vectors: Vectors = None,
) -> None:
    """Forget what is older than so many days, by the time when it was said. Does not ask; see --preview.

    With the setting retention_days, every command that stores something does so by itself, in every namespace, and
    stores nothing that is older. What went by age comes back when it is stored again without the setting.

    Example: memos retain --days 90 --preview

    JSON: counts by place, as of memos forget
    """
    flags = {"store": store, "namespace": namespace, "embedder": embedder, "vectors": vectors}
    with opened(flags) as (memory, scope, settings):
        days = settings.retention_days if days is None else days
        if days is None:
            raise typer.BadParameter("say how long to keep: --days 90, or the setting retention_days")
        expire = memory.expire if all_namespaces else scope.expire
        counts = expire(days, preview=preview, verify=verify)
    _tell(counts, preview, json, settings.store)


def _show(going: Sequence[Segment]) -> None:
    """What would go, on standard error: what is asked about."""
    talk = render.talk()
    if going:
        talk.print(render.segments_table(going[:SHOWN]))
    if len(going) > SHOWN:
        talk.print(f"and {len(going) - SHOWN} more")


def _tell(counts: Mapping[str, int], preview: bool, json: bool, store: Path | DatabaseUrl) -> None:
    if json:
        render.print_json(dict(counts))
        return
    render.out().print(f"{'Would forget' if preview else 'Forgot'} {_going(counts)}.")
    talk = render.talk()
    in_files = isinstance(store, Path)
    if counts.get("unfinished"):
        talk.print(
            "Another process is reading the store, whose files hold the text until it is next opened; or the Chroma "
            "server is away, and holds the vectors until it is back."
            if in_files
            else "The rows are gone, but the tables could not be cleaned of them: somebody still reads the database as "
            "it was, or the tables are another role's: have their owner run VACUUM. Or the Chroma server is away.",
            style="yellow",
        )
    if counts.get("residue"):
        talk.print(f"{counts['residue']} files still hold some of the text.", style="yellow")
    elif "residue" in counts:
        held = counts["still_held"]
        but = f", but for {held} of the texts, which something still stored says too" if held else ""
        talk.print(
            f"Verified: no file of the store holds the text{but}."
            if in_files
            else "The files of a database server are not looked at: they are its administrator's."
        )
    copies = sorted(store.parent.glob(f"{store.name}.before-*")) if isinstance(store, Path) else []
    if counts["segments"] and copies and not preview:
        names = ", ".join(copy.name for copy in copies)
        talk.print(render.plain(f"Copies from before an upgrade are as they were; delete them: {names}", "yellow"))
    if counts["segments"] and not preview and (old := old_history()):
        talk.print(
            render.plain(f"What was typed in memos chat before is as it was; delete it: {old}", "yellow"),
            soft_wrap=True,
        )


def _going(counts: Mapping[str, int]) -> str:
    segments, items = render.count_of(counts.get("segments", 0)), counts.get("items", 0)
    return f"{segments} and {items} item{'s' if items > 1 else ''}" if items else segments
