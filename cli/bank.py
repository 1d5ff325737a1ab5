"""``memos bank``: what is cached of a namespace, in keys and values."""

from __future__ import annotations

from typing import Annotated

import typer

from memory_os.cli import render
from memory_os.cli.common import Json, Llm, Namespace, Store, opened
from memory_os.protocols import BankStatus

__all__ = ["bank"]


def bank(
    fill: Annotated[bool, typer.Option("--fill", help="Compute what is missing, the newest first.")] = False,
    drop: Annotated[bool, typer.Option("--drop", help="Remove all of it; it is computed again when needed.")] = False,
    json: Json = False,
    store: Store = None,
    namespace: Namespace = None,
    llm: Llm = None,
) -> None:
    """Show, fill or empty the bank of cached keys and values, from which the controller longmem-free takes memory.

    Example: memos bank --fill

    JSON: segments, tokens, bytes, stale, max_tokens, max_bytes, policy, dtype, computed, notes (the model's
    self-check among them)
    """
    if fill and drop:
        raise typer.BadParameter("either --fill or --drop")
    flags = {"store": store, "namespace": namespace, "llm": llm}
    status, notes, computed = BankStatus(0, 0, 0, 0), [], 0
    with opened(flags, llm=not drop) as (memory, scope, settings):
        if drop:
            scope.drop_bank()
        if fill:
            with render.talk().status("Computing") as shown:
                computed = scope.fill_bank(lambda done, total: shown.update(f"Computing: {done} of {total} segments"))
        if not drop:
            status = scope.bank_status()
            notes = list(getattr(memory.parts.llm, "notes", ()))
    report = {
        "segments": status.n_segments, "tokens": status.n_tokens, "bytes": status.n_bytes, "stale": status.n_stale,
        "max_tokens": settings.bank.max_tokens, "max_bytes": settings.bank.max_bytes,
        "policy": settings.bank.policy, "dtype": settings.bank.dtype, "computed": computed, "notes": notes,
    }  # fmt: skip
    if json:
        render.print_json(report)
        return
    render.out().print(
        render.pairs_table(
            {**{name: str(value) for name, value in report.items()}, "notes": "; ".join(notes)}, "what", "value"
        )
    )
