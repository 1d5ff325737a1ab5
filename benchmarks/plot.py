"""Plots of the measurements, as PNG files. Needs matplotlib: ``pip install "memory-os[bench]"``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from memory_os.errors import InvalidInputError, MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["costs", "curves", "heat_maps", "writable"]

DPI = 150


def writable(file: Path) -> Path:
    """The file, if a plot can be written there.

    :raises InvalidInputError: if its folder does not exist, or it does not end in ``.png``.
    """
    if file.suffix.lower() != ".png":
        raise InvalidInputError("a plot is a PNG file; name it so", source=str(file))
    if not file.absolute().parent.is_dir():
        raise InvalidInputError("its folder does not exist; create it first", source=str(file))
    return file


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("the plot", "matplotlib", "bench") from error
    return Figure(figsize=(width, height), layout="constrained")  # no pyplot: no window, no global state


def curves(file: Path, title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draw recall in percent against tokens.

    :param series: points ``(tokens, recall)`` by name; the first is ours and stands out.
    :raises MissingExtraError: without matplotlib.
    """
    figure = _figure(7, 4.5)
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(series.items()):
        line, marker = ("-", "o") if number == 0 else ("--", ".")
        axes.plot(*zip(*points, strict=True), line, marker=marker, label=name, linewidth=2.2 if number == 0 else 1.3)
    ticks = sorted({round(tokens) for tokens, _ in next(iter(series.values()))})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set(title=title, xlabel="tokens in the context (mean)", ylabel="evidence in the context, %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=DPI)


def costs(file: Path, title: str, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> None:
    """Draw costs against size, both logarithmic, one panel a cost.

    :param panels: points ``(size, cost)`` by cost and by name; the first name is ours and stands out.
    :raises MissingExtraError: without matplotlib.
    """
    figure = _figure(11, 7.5)
    figure.suptitle(title)
    grid = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flat
    for axes, (cost, series) in zip(grid, panels.items(), strict=False):
        for number, (name, points) in enumerate(series.items()):
            if points:
                line, width = ("-o", 2.2) if number == 0 else ("--.", 1.3)
                # a system has one colour in all panels, also where another has no such cost
                axes.plot(*zip(*points, strict=True), line, label=name, linewidth=width, color=f"C{number}")
        axes.set(xscale="log", yscale="log", xlabel="segments", ylabel=cost)
        axes.grid(alpha=0.3)
    figure.legend(*grid[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    figure.savefig(file, dpi=DPI)


def heat_maps(
    file: Path, title: str, maps: Mapping[str, Sequence[Sequence[float]]], rows: Sequence[str], columns: Sequence[str]
) -> None:
    """Draw percentages by length (rows) and depth (columns), one map beside the other.

    :raises MissingExtraError: without matplotlib.
    """
    figure = _figure(1.5 + 4 * len(maps), 2.0 + 0.55 * len(rows))
    figure.suptitle(title)
    grid = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, (name, values) in zip(grid, maps.items(), strict=True):
        axes.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(columns)), [f"{column}%" for column in columns])
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set(title=name, xlabel="depth", ylabel="length, tokens")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=9)
    figure.savefig(file, dpi=DPI)
