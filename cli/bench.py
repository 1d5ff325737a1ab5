"""``memos bench``: measure recall and speed on data of one's own, beside simpler retrievers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memory_os.cli import render
from memory_os.cli.common import Json

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["app"]

app = typer.Typer(help="Measure recall and speed, beside simpler retrievers.", no_args_is_help=True)

Compare = Annotated[str, typer.Option("--compare", help="Peers beside us, with commas: bm25, chroma, recency, rrf.")]
Embedder = Annotated[str, typer.Option("--embedder", help="minilm, st:NAME or hash.")]
NoPlot = Annotated[bool, typer.Option("--no-plot", help="Draw nothing.")]
More = Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="More files.", show_default=False)]


@app.command()
def locomo(
    data: Annotated[Path, typer.Option("--data", help="A file of LoCoMo's form.")],
    budgets: Annotated[str, typer.Option("--budgets", help="Tokens, with commas.")] = "256,512,1024,2048,4096",
    compare: Compare = "",
    json: Json = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="The plot's file; bench-locomo.png, and none with --json.")
    ] = None,
    no_plot: NoPlot = False,
    embedder: Embedder = "minilm",
) -> None:
    """Measure how much of the evidence for questions about very long conversations enters the context.

    Peers get the same texts at equal tokens. Progress goes to standard error.

    Example: memos bench locomo --data locomo.json --budgets 512,1024 --compare rrf,chroma

    JSON: overall {budget: {recall, all, tokens, n}}, by_category {category: {budget: ...}}, session_recall_at_10,
    latency_ms {p50, p95, query_embedding_p50}, peers {name: {budget: ...}}, left_out.
    """
    from memory_os.benchmarks import locomo
    from memory_os.benchmarks.measure import measure

    limits, peers, file = numbers(budgets), words(compare), plot_file(plot, "bench-locomo.png", json, no_plot)
    conversations, left_out = locomo.read(data)
    with progress() as show:
        report = measure(
            conversations, budgets=limits, compare=peers, embedder=embedder, left_out=left_out, by_session=True,
            progress=show,
        )  # fmt: skip
    names = {key: f"{key} {name}" for key, name in locomo.CATEGORIES.items()}
    print_report(report, json, "LoCoMo", names)
    draw_curves(file, report, "LoCoMo: evidence in the context")


@app.command()
def dialogues(
    data: Annotated[list[Path], typer.Option("--data", help="A file of the form of SCM's dialogues.")],
    more: More = None,
    budgets: Annotated[str, typer.Option("--budgets", help="Tokens, with commas.")] = "512,1024",
    compare: Compare = "",
    json: Json = False,
    embedder: Embedder = "minilm",
) -> None:
    """Measure the same for long dialogues with an assistant, where evidence is found by the reference answer's words.

    A turn is evidence if it holds at least 60 % of the distinct words of the answer; questions without are left out.

    Example: memos bench dialogues --data dialogues_en.json dialogues_zh.json --compare rrf

    JSON: as memos bench locomo, by_category with the files' names and the questions' modes, and partly: the share of
    evidence that entered cut.
    """
    from memory_os.benchmarks import dialogues
    from memory_os.benchmarks.measure import measure

    limits, peers = numbers(budgets), words(compare)
    conversations, left_out = dialogues.read([*data, *(more or [])])
    with progress() as show:
        report = measure(
            conversations, budgets=limits, compare=peers, embedder=embedder, left_out=left_out, partly=True,
            progress=show,
        )  # fmt: skip
    print_report(report, json, "Dialogues", {})


# -- what is given -----------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """What stands between the commas.

    >>> words("rrf, bm25,")
    ['rrf', 'bm25']
    """
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str, scale: int = 1000) -> list[int]:
    """Whole numbers between commas, with k for thousands and M for millions.

    >>> numbers("512,4k,1M")
    [512, 4000, 1000000]
    """
    units = {"k": scale, "m": scale * scale}
    found = []
    for word in words(text):
        unit = units.get(word[-1].lower(), 1)
        digits = word[:-1] if unit > 1 else word
        if not digits.isdecimal() or int(digits) < 0:
            raise typer.BadParameter(f"{word!r} is not a whole number")
        found.append(int(digits) * unit)
    if not found:
        raise typer.BadParameter("give at least one number")
    return found


def plot_file(given: Path | None, default: str, json: bool, no_plot: bool) -> Path | None:
    """Where to draw; ``None`` for nowhere. Checked before anything is measured."""
    from memory_os.benchmarks.plot import writable

    if no_plot and given:
        raise typer.BadParameter("either --plot or --no-plot")
    if no_plot or (json and not given):
        return None
    return writable(given or Path(default))


# -- what is shown -----------------------------------------------------------------------------------------------------


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, a line per part elsewhere; both on standard error."""
    console = render.talk()
    if not console.is_terminal:
        seen: set[str] = set()

        def line(part: str, done: int, total: int) -> None:
            if part not in seen:
                seen.add(part)
                console.print(f"{done} of {total}: {part}", markup=False)

        yield line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("Measuring", total=None)

        def show(part: str, done: int, total: int) -> None:
            bar.update(task, description=part, completed=done, total=total)

        yield show


def print_report(report: dict[str, Any], json: bool, title: str, names: dict[str, str]) -> None:
    """The report: JSON, or tables for people.

    :param names: what the categories are called.
    """
    if report.get("disagreements"):
        render.talk().print(
            f"{report['disagreements']} times the ledger called evidence activated whose text is not in the messages."
        )
    if json:
        render.print_json(report)
        return
    out = render.out()
    out.print(render.plain(f"{title}: share of the evidence in the context", "bold"))
    out.print(overall_table(report))
    out.print()
    out.print(category_table(report["by_category"], names))
    out.print()
    if report["session_recall_at_10"] is not None:
        out.print(f"Sessions of the evidence among the first 10: {report['session_recall_at_10']:.1f} %")
    ms = report["latency_ms"]
    out.print(
        f"context(): p50 {ms['p50']:.1f} ms, p95 {ms['p95']:.1f} ms; "
        f"the query's embedding alone: p50 {ms['query_embedding_p50']:.1f} ms"
    )
    if report["left_out"]:
        out.print(f"Left out, because nothing is known to answer them: {report['left_out']} questions")


def overall_table(report: dict[str, Any]) -> Table:
    """Us by budget, and beside us the peers' recall."""
    first = next(iter(report["overall"].values()))
    columns = [name for name in ("recall", "partly", "all", "tokens", "n") if name in first]
    table = render.figures_table("budget", *columns, *report["peers"])
    for budget, figure in report["overall"].items():
        ours = [f"{figure[name]:.0f}" if name in ("tokens", "n") else f"{figure[name]:.1f}" for name in columns]
        table.add_row(budget, *ours, *(f"{peer[budget]['recall']:.1f}" for peer in report["peers"].values()))
    return table


def category_table(by_category: dict[str, Any], names: dict[str, str]) -> Table:
    """Recall by category and budget."""
    budgets = list(next(iter(by_category.values())))
    table = render.figures_table("category", *budgets, "n")
    for category, figures in by_category.items():
        row = [f"{figures[budget]['recall']:.1f}" for budget in budgets]
        table.add_row(render.plain(names.get(category, category)), *row, str(figures[budgets[0]]["n"]))
    return table


def draw_curves(file: Path | None, report: dict[str, Any], title: str) -> None:
    """Recall against tokens, ours and the peers'."""
    from memory_os.benchmarks import plot

    everyone = {"memory_os": report["overall"], **report["peers"]}
    series = {name: [(f["tokens"], f["recall"]) for f in figures.values()] for name, figures in everyone.items()}
    drawn(file, lambda target: plot.curves(target, title, series))


def drawn(file: Path | None, draw: Callable[[Path], None]) -> None:
    """Draw, and say where; without matplotlib say in one line what is missing."""
    from memory_os.errors import MissingExtraError

    if file is None:
        return
    try:
        draw(file)
    except MissingExtraError as error:
        render.talk().print(str(error), markup=False, soft_wrap=True)
    except OSError as error:
        render.talk().print(f"{file}: cannot write it: {error.strerror}", markup=False, soft_wrap=True)
    else:
        render.talk().print(f"The plot is {file}", markup=False, soft_wrap=True)
