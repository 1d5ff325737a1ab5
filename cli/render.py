"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any, cast

from memory_os.errors import UnknownNameError
from memory_os.trace import set_apart

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from memory_os.types import Account, Context, Evidence, Hit, LedgerEntry, Segment, Trace

__all__ = [
    "account_line",
    "context_to_dict",
    "contributions_table",
    "count_of",
    "evidence_line",
    "evidence_to_dict",
    "figures_table",
    "hits_table",
    "ledger_table",
    "marked",
    "out",
    "pairs_table",
    "plain",
    "print_json",
    "printable",
    "segments_table",
    "snippet",
    "stdout",
    "talk",
    "trace_notes",
]

PIPE_WIDTH = 160
# What was stored, or what a model says, must not steer the terminal: an escape is shown, not obeyed.
CONTROLS: dict[int, str | None] = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t\r"},
    **dict.fromkeys((*range(0x7F, 0xA0), *range(0xD800, 0xE000)), "\N{REPLACEMENT CHARACTER}"),
    ord("\r"): None,
}


def out() -> Console:
    """Where results go."""
    # a pipe has no width: tables are then wide enough to lose nothing
    return _console(sys.stdout, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def talk() -> Console:
    """Where everything else goes: progress, questions, notes."""
    return _console(sys.stderr)


def _console(file: IO[str], width: int | None = None) -> Console:
    """A console that passes no control on but rich's own, whatever is printed on it."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment as Piece

    class Guarded(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Piece]:
            for piece in super().render(renderable, options):
                yield piece if piece.control else Piece(piece.text.translate(CONTROLS), piece.style)

    return Guarded(file=file, highlight=False, width=width)


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    text = json.dumps(data, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None, default=str)
    print(printable(text.encode(errors="backslashreplace").decode()))  # a file's name may be no UTF-8


def printable(text: str) -> str:
    """The text as a terminal may have it; for a pipe, exactly as it is."""
    return text.translate(CONTROLS) if sys.stdout.isatty() else text


def stdout() -> IO[str]:
    """Standard output for who writes to a file: a terminal gets what is printable."""
    return cast("IO[str]", _Printable()) if sys.stdout.isatty() else sys.stdout


class _Printable(io.TextIOBase):
    def write(self, text: str) -> int:
        return sys.stdout.write(printable(text))


def count_of(segments: int) -> str:
    """A number of segments, in words.

    >>> count_of(1), count_of(12)
    ('1 segment', '12 segments')
    """
    return f"{segments} segment" if segments == 1 else f"{segments} segments"


def snippet(text: str, length: int) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."


def _table(*columns: str | tuple[str, Mapping[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        name, options = (column, {}) if isinstance(column, str) else column
        table.add_column(name, **options)
    return table


RIGHT: Mapping[str, Any] = {"justify": "right", "no_wrap": True}


def plain(text: str, style: str = "") -> Text:
    """Text that is shown and nothing else: no markup, no escape."""
    from rich.text import Text

    return Text(text.translate(CONTROLS), style=style)


def ledger_table(trace: Trace, segment_of: Callable[[str], Segment]) -> Table:
    """The ledger of a turn: every candidate, the most wanted first, what became of it, and why.

    :param segment_of: finds a segment by id, to show its text.
    """
    table = _table(
        ("seq", RIGHT), ("outcome", {"no_wrap": True}), ("tokens", RIGHT), ("score", RIGHT),
        ("more than the average candidate", {"min_width": 24}), ("text", {"no_wrap": True}),
    )  # fmt: skip
    room = out().width - 92  # on a narrow terminal the text gives way, and nothing else
    colours = {"activated": "green", "trimmed": "yellow", "dropped": "dim"}
    for entry, reasons in zip(trace.ledger, set_apart(trace.ledger), strict=True):
        try:
            text = snippet(segment_of(entry.segment_id).text, max(room, 12))
        except UnknownNameError:
            text = "(forgotten)"
        outcome = plain(entry.action, colours[entry.action])
        outcome.append("" if entry.form in (None, "full") else f" as {entry.form}", "")
        if entry.flags:
            outcome.append_text(plain(f" (reads like an instruction: {', '.join(entry.flags)})", "yellow"))
        table.add_row(
            f"#{entry.seq}", outcome.append(f", {entry.reason}", ""), str(entry.n_tokens),
            f"{entry.score:.3f}", plain(_reasons(reasons, entry.signals)), plain(text),
        )  # fmt: skip
    return table


def _reasons(apart: Sequence[tuple[str, float]], signals: Mapping[str, float], n: int = 3) -> str:
    """The weightiest contributions, or the signals themselves where ranks were fused."""
    if not apart:
        return " ".join(f"{name} {value:.3f}" for name, value in signals.items() if value)[:60]
    return " ".join(f"{name} {difference:+.2f}" for name, difference in apart[:n])


def contributions_table(entry: LedgerEntry, trace: Trace) -> Table:
    """Every signal of one candidate: its value, what it added to the score, and how much more than on average."""
    apart = dict(
        dict(zip((e.segment_id for e in trace.ledger), set_apart(trace.ledger), strict=True))[entry.segment_id]
    )
    table = _table("signal", ("value", RIGHT), ("contribution", RIGHT), ("more than average", RIGHT))
    for name, value in sorted(entry.signals.items(), key=lambda pair: -abs(apart.get(pair[0], 0.0))):
        added = entry.contributions.get(name, 0.0)
        table.add_row(plain(name), f"{value:.3f}", f"{added:+.3f}", f"{apart.get(name, 0.0):+.3f}")
    return table


def segments_table(segments: Sequence[Segment]) -> Table:
    """Segments, one a row, in full."""
    table = _table(("seq", RIGHT), ("when", {"no_wrap": True}), "session", "who", "text")
    for segment in segments:
        when = segment.created_at.strftime("%Y-%m-%d %H:%M")
        table.add_row(f"#{segment.seq}", when, plain(segment.session), plain(segment.who), plain(segment.text))
    return table


def evidence_line(evidence: Evidence) -> str:
    """A quote with what it is cited by, its date and speaker."""
    return f"[#{evidence.seq}] {evidence.date:%Y-%m-%d} {evidence.speaker}: “{snippet(evidence.quote, 300)}”"


def evidence_to_dict(evidence: Evidence) -> dict[str, Any]:
    """A quote as JSON-ready data."""
    return {**asdict(evidence), "date": evidence.date.isoformat()}


def marked(text: str, spans: Sequence[tuple[int, int]]) -> Text:
    """A text with these parts of it set off."""
    shown, place = plain(""), 0
    for start, end in sorted(spans):
        shown.append_text(plain(text[place:start])).append_text(plain(text[start:end], "bold reverse"))
        place = end
    return shown.append_text(plain(text[place:]))


def hits_table(hits: Sequence[Hit]) -> Table:
    """Search results with their scores."""
    table = _table(("seq", RIGHT), ("score", RIGHT), "more than the average hit", "who", "text")
    for hit, reasons in zip(hits, set_apart(hits), strict=True):
        segment = hit.segment
        table.add_row(
            f"#{segment.seq}", f"{hit.score:.3f}", plain(_reasons(reasons, hit.signals)), plain(segment.who),
            plain(snippet(segment.text, 200)),
        )  # fmt: skip
    return table


def pairs_table(rows: Mapping[str, Sequence[str] | str], *columns: str) -> Table:
    """Names and what belongs to them."""
    table = _table(*columns)
    for name, cells in rows.items():
        table.add_row(plain(name), *([plain(cells)] if isinstance(cells, str) else [plain(cell) for cell in cells]))
    return table


def figures_table(label: str, *columns: str) -> Table:
    """An empty table of figures: a label, then numbers."""
    return _table((label, {"no_wrap": True}), *((column, RIGHT) for column in columns))


def account_line(account: Account) -> str:
    """The exact tokens by part, in one line."""
    about = "" if account.exact else "about "
    return (
        f"{about}{account.total} of at most {account.limit} tokens ({account.tokenizer}): system {account.system}, "
        f"query {account.query}, flash {account.flash}, activated {account.activated}"
    )


def trace_notes(trace: Trace) -> list[str]:
    """What a reader of a trace should know besides the ledger."""
    took = ", ".join(f"{stage} {ms:.0f}" for stage, ms in trace.timings_ms.items())
    head = f"turn {trace.id}: {trace.outcome}, controller {trace.controller}, {took} ms"
    asked = [
        f"asked {call.purpose}: {call.verdict}{f' ({snippet(call.answer, 40)})' if call.answer else ''}, "
        f"{call.prompt_tokens} + {call.reply_tokens} tokens"
        for call in trace.calls
    ]
    tokens = sum(call.prompt_tokens + call.reply_tokens for call in trace.calls)
    extra = [f"{len(trace.calls)} calls of the LLM besides the reply, {tokens} tokens"] if asked else []
    error = [f"error: {trace.error}"] if trace.error else []
    return [head, account_line(trace.account), *asked, *extra, *trace.notes, *error]


def context_to_dict(context: Context) -> dict[str, Any]:
    """A context as JSON-ready data."""
    from memory_os.trace import trace_to_dict
    from memory_os.transfer import segment_to_dict

    trace = trace_to_dict(context.trace)
    return {
        "messages": list(context.messages),
        "text": context.text,
        "n_tokens": context.n_tokens,
        "account": trace["account"],
        "segments": [segment_to_dict(segment) for segment in context.segments],
        "evidence": [evidence_to_dict(each) for each in context.evidence],
        "ledger": trace["ledger"],
        "calls": trace["calls"],
        "notes": trace["notes"],
        "trace": trace["id"],
    }
