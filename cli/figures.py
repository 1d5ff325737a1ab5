"""What ``memos bench`` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memory_os.cli import render

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "print_bank",
    "print_chains",
    "print_evidence",
    "print_needles",
    "print_report",
    "print_scale",
    "print_speed",
    "print_systems",
    "print_xl3m",
]


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


def print_systems(report: dict[str, Any], json: bool) -> None:
    """The systems of ``memos bench scm``, a table a budget, then recall and F1 by group."""
    if json:
        render.print_json(report)
        return
    out = render.out()
    systems = report["systems"]
    first = next(iter(systems.values()))
    for budget, some in first["overall"].items():
        columns = list(some)
        table = render.figures_table(f"{budget} tokens", *columns)
        for name, figures in systems.items():
            table.add_row(name, *(f"{figures['overall'][budget][column]:.4g}" for column in columns))
        out.print(table)
        out.print()
    measures = [name for name in ("recall", "f1") if name in next(iter(first["overall"].values()))]
    for group, by_budget in first["by_group"].items():
        table = render.figures_table(group, *(f"{name} {budget}" for budget in by_budget for name in measures), "n")
        for name, figures in systems.items():
            cells = [f"{figures['by_group'][group][b][measure]:.1f}" for b in by_budget for measure in measures]
            table.add_row(name, *cells, str(figures["by_group"][group][next(iter(by_budget))]["n"]))
        out.print(table)
        out.print()
    out.print(f"LLM: {report['llm'] or 'none'}", markup=False)
    if report["left_out"]:
        out.print(f"Left out, because nothing is known to answer them: {report['left_out']} questions")


def print_xl3m(report: dict[str, Any], json: bool) -> None:
    """The parts of ``memos bench xl3m`` that were measured."""
    if json:
        render.print_json(report)
        return
    out = render.out()
    for kind, by_size in report.get("ranking", {}).items():
        for size, systems in by_size.items():
            first = next(iter(systems.values()))
            title = f"{kind}, {size} segments, {first['r@1']['n']} trials"
            table = render.figures_table(title, "R@1", "95 %", "R@3", "95 % ")
            for system, figure in systems.items():
                cells = [(f["percent"], f"{f['low']:.0f} to {f['high']:.0f}") for f in figure.values()]
                table.add_row(system, *(str(cell) for pair in cells for cell in pair))
            out.print(table)
            out.print()
    if orders := report.get("rerank"):
        budgets = list(next(iter(orders.values())))
        table = render.figures_table("evidence in the context, % (95 % of the gain over recall)", *budgets, "weight")
        for name, figure in orders.items():
            weights = " ".join(f"{figure[budget]['weight']:.2g}" for budget in budgets if "weight" in figure[budget])
            beside = (f"{f['recall']:.1f} ({f['low']:+.1f} to {f['high']:+.1f})" for f in map(figure.get, budgets))
            table.add_row(name, *beside, weights)
        out.print(table)
        out.print()
    if told := report.get("document"):
        out.print(render.pairs_table({name: str(value) for name, value in told.items()}, "document", "measured"))
        out.print()
    if lengths := report.get("cost"):
        table = render.figures_table("tokens of a segment", *next(iter(lengths.values())))
        for length, figure in lengths.items():
            table.add_row(length, *(str(value) for value in figure.values()))
        out.print(table)


def print_bank(report: dict[str, Any], json: bool) -> None:
    """A table for each part of ``memos bench bank``; one for each number of segments of its answers."""
    if json:
        render.print_json(report)
        return
    out = render.out()
    parts = {name: part for name, part in report.items() if name in ("first-token", "storage", "growth")}
    parts |= {f"answers, {count} segments": part for count, part in report.get("answers", {}).items()}
    if exact := report.get("exact"):
        out.print(render.pairs_table({name: str(value) for name, value in exact.items()}, "float32", "difference"))
        out.print()
    for name, columns in parts.items():  # figures are rows: they are many, and their names long
        table = render.figures_table(name, *columns)
        for figure in dict.fromkeys(figure for column in columns.values() for figure in column):
            table.add_row(figure, *(str(column.get(figure, "")) for column in columns.values()))
        out.print(table)
        out.print()
    if icl := report.get("icl"):
        table = render.figures_table(
            f"accuracy on {icl['n_queries']} sentences, {icl['window_tokens']} tokens of examples",
            "%", "95 %", "calibrated", "95 % ", "ms",
        )  # fmt: skip
        for name, figure in icl["systems"].items():
            ways = (figure["plain"], figure["calibrated"])
            cells = [(f"{way['accuracy']:.1f}", f"{way['low']:.1f} to {way['high']:.1f}") for way in ways]
            table.add_row(name, *(cell for pair in cells for cell in pair), str(figure["ms"]))
        out.print(table)
        out.print(render.pairs_table({name: str(value) for name, value in icl["bank"].items()}, "bank", "measured"))


def print_evidence(report: dict[str, Any], json: bool) -> None:
    """A table for each part of ``memos bench alr2``."""
    if json:
        render.print_json(report)
        return
    out = render.out()
    for part, systems in report.items():
        if part == "llm":
            continue
        columns = list(dict.fromkeys(column for figure in systems.values() for column in figure))
        table = render.figures_table(part, *columns)
        for name, figure in systems.items():
            table.add_row(name, *(f"{figure[column]:.4g}" if column in figure else "" for column in columns))
        out.print(table)
        out.print()
    out.print(f"LLM: {report['llm']}", markup=False)


def print_chains(report: dict[str, Any], json: bool) -> None:
    """A table for each budget of ``memos bench atc``: links found, and in brackets traces that are complete."""
    if json:
        render.print_json(report)
        return
    out = render.out()
    for budget in next(iter(report.values())):
        table = render.figures_table(f"{budget} tokens, % (complete)", *(f"{links} links" for links in report))
        for system in next(iter(report.values()))[budget]:
            cells = [figures[budget][system] for figures in report.values()]
            table.add_row(system, *(f"{cell['links']:.1f} ({cell['all']:.0f})" for cell in cells))
        out.print(table)
        out.print()


def print_needles(report: dict[str, Any]) -> None:
    """A table of length by depth for each language, ours and then the peers'."""
    out = render.out()
    out.print(f"[bold]Planted facts in a context of {report['budget']} tokens, %[/]")
    everyone = {"memory_os": report, **report["peers"]}
    for language in report["recall"]:
        for name, figures in everyone.items():
            rows = figures["recall"][language]
            depths = list(next(iter(rows.values())))
            table = render.figures_table(f"{name}, {language}", *(f"depth {depth} %" for depth in depths))
            for length, row in rows.items():
                table.add_row(f"{int(length):,} tokens", *(f"{value:.0f}" for value in row.values()))
            out.print()
            out.print(table)
            out.print(f"{name}, {language}, all in all: {figures['overall'][language]:.1f} %")


def print_speed(results: dict[str, Any]) -> None:
    """What was measured, part by part."""
    out = render.out()
    out.print(f"Machine: {results['machine']}", markup=False)
    parts = {"start": results["start"], "ingest": results["ingest"]}
    parts |= {f"context, {figures['segments']:,} segments": figures for figures in results["context"]}
    for title, figures in parts.items():
        cells = {name: f"{value:.3g}" if isinstance(value, float) else str(value) for name, value in figures.items()}
        out.print()
        out.print(render.pairs_table(cells, title, "measured"))


SCALE = {
    "ingest_per_s": "ingest/s", "bytes_per_segment": "bytes each", "search_p50_ms": "search p50",
    "search_p95_ms": "p95 ms", "context_p50_ms": "context p50", "context_p95_ms": "p95 ms",
    "cold_first_answer_s": "cold s", "resident_own_mb": "own MB", "resident_mb": "resident MB", "recall": "recall",
}  # fmt: skip


def print_scale(report: dict[str, Any]) -> None:
    """A row for each system and size, and how the costs grow."""
    out = render.out()
    table = render.figures_table("segments", *SCALE.values())
    rows = [
        (f"{name}, {int(size):,}", each) for name, sizes in report["systems"].items() for size, each in sizes.items()
    ]
    if "namespaces" in report:
        told = report["namespaces"]
        rows.append((f"memory_os, {told['namespaces']:,} x {told['per_namespace']}", told))
    for title, each in rows:
        if "stopped" in each:
            out.print(f"{title}: {each['stopped']}", markup=False)
        else:
            table.add_row(title, *(f"{each[key]:,}" if key in each else "-" for key in SCALE))
    out.print(table)
    for name, costs in report["growth"].items():
        if costs:
            told = ", ".join(f"{cost} {power}" for cost, power in costs.items())
            out.print(f"{name} grows with the power (1 is linear): {told}", markup=False)
