"""Commands that look and do not touch, but for ``doctor --repair``: context, search, why, stats, doctor, config."""

from __future__ import annotations

from typing import Annotated

import typer

from memory_os.cli import render
from memory_os.cli.common import (
    Budget,
    Controller,
    Embedder,
    Json,
    Llm,
    Namespace,
    Session,
    Store,
    Tokenizer,
    Vectors,
    opened,
)

__all__ = ["config", "context", "doctor", "search", "stats", "why"]


def context(
    query: Annotated[str, typer.Argument(help="What the model is about to be asked.")],
    why: Annotated[bool, typer.Option("--why", help="Also show the ledger: every candidate, and why.")] = False,
    json: Json = False,
    store: Store = None,
    namespace: Namespace = None,
    session: Session = None,
    budget: Budget = None,
    tokenizer: Tokenizer = None,
    llm: Llm = None,
    embedder: Embedder = None,
    vectors: Vectors = None,
    controller: Controller = None,
) -> None:
    """Show what a model would be given for a query, to the token. Nothing is recorded.

    Example: memos context "What is my cat called?" --budget 1000 --why

    JSON: messages, text, n_tokens, account (tokens by part), segments, ledger, calls, notes, trace.
    """
    flags = {
        "store": store, "namespace": namespace, "session": session, "budget": budget, "tokenizer": tokenizer,
        "llm": llm, "embedder": embedder, "vectors": vectors, "controller": controller,
    }  # fmt: skip
    with opened(flags, decides=True) as (_, scope, _):
        chosen = scope.context(query)
        if json:
            render.print_json(render.context_to_dict(chosen))
            return
        out = render.out()
        for message in chosen.messages:
            out.print(render.plain(message["role"], "bold"))
            out.print(render.printable(message["content"]), markup=False, soft_wrap=True)
            out.print()
        for line in (render.account_line(chosen.account), *chosen.trace.notes):
            out.print(render.plain(line))
        if why:
            out.print(render.ledger_table(chosen.trace, scope.segment))


def search(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many segments.")] = 10,
    json: Json = False,
    store: Store = None,
    namespace: Namespace = None,
    embedder: Embedder = None,
    vectors: Vectors = None,
) -> None:
    """Find segments by meaning and by words.

    Example: memos search "the cat" -k 5

    JSON: a list of {"score", "signals", "contributions", "segment"}, best first.
    """
    from memory_os.transfer import segment_to_dict

    with opened({"store": store, "namespace": namespace, "embedder": embedder, "vectors": vectors}) as (_, scope, _):
        hits = scope.search(query, k=k)
    if json:
        render.print_json(
            [
                {
                    "score": hit.score,
                    "signals": dict(hit.signals),
                    "contributions": dict(hit.contributions),
                    "segment": segment_to_dict(hit.segment),
                }
                for hit in hits
            ]
        )
    elif hits:
        render.out().print(render.hits_table(hits))
    else:
        render.talk().print("Nothing found.")


def why(
    turn: Annotated[
        str | None, typer.Argument(help="A turn, by its trace or by its query or reply; the latest if left out.")
    ] = None,
    expect: Annotated[
        str | None, typer.Option("--expect", help="A segment, by number or id: say which stage lost it.")
    ] = None,
    json: Json = False,
    store: Store = None,
    namespace: Namespace = None,
) -> None:
    """Show why a turn's context was what it was: every candidate, what became of it, and the reason.

    Example: memos why --expect 12

    JSON: {"trace": {...}, "finding": {"stage", "present", "sentence"} or null}
    """
    from dataclasses import asdict

    from memory_os.trace import trace_to_dict

    with opened({"store": store, "namespace": namespace}) as (_, scope, _):
        trace, finding = scope.why(turn, expect=expect)
        if json:
            render.print_json({"trace": trace_to_dict(trace), "finding": asdict(finding) if finding else None})
            return
        out = render.out()
        out.print(render.plain(render.snippet(trace.query, 200), "bold"), soft_wrap=True)
        for note in render.trace_notes(trace):
            out.print(render.plain(note), soft_wrap=True)
        out.print(render.ledger_table(trace, scope.segment))
        named = scope.segment(expect) if expect and finding and finding.stage != "stored" else None
        for entry in trace.ledger:
            if named and entry.segment_id == named.id:
                out.print()
                out.print(render.contributions_table(entry, trace))
        if finding:
            out.print(f"\n[bold]{finding.stage}[/]:", render.plain(finding.sentence), soft_wrap=True)


def stats(json: Json = False, store: Store = None, namespace: Namespace = None) -> None:
    """Count what is remembered.

    Example: memos stats -n acme/alice

    JSON: segments, sessions, tokens, first, last, vectors, summaries, pending, scores, traces, bank, items, file,
    file_bytes, namespaces.
    """
    from memory_os.config import format_labels

    with opened({"store": store, "namespace": namespace}) as (memory, scope, _):
        counts = {**scope.stats(), "namespaces": [format_labels(labels) for labels in memory.namespaces()]}
    if json:
        render.print_json(counts)
        return
    rows = {name: ", ".join(value) if isinstance(value, list) else str(value) for name, value in counts.items()}
    render.out().print(render.pairs_table(rows, "what", "value"))


def doctor(
    repair: Annotated[bool, typer.Option("--repair", help="Mend what is found, and finish pending work.")] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Look at every row: make again what is derived, and compare.")
    ] = False,
    json: Json = False,
    store: Store = None,
    embedder: Embedder = None,
    vectors: Vectors = None,
) -> None:
    """Check the store: what is derived must match what is recorded. Exit code 1 if a fault remains.

    Example: memos doctor --deep --repair

    JSON: {"found": {kind: count}, "remaining": {kind: count}, "rows": {kind: the first rows that remain}}
    """
    from memory_os.doctor import FIXES, NO_FAULT

    with (
        opened({"store": store, "embedder": embedder, "vectors": vectors}) as (memory, _, _),
        render.talk().status("Checking") as status,
    ):

        def show(what: str, done: int, total: int) -> None:
            status.update(f"Checking: {what}, {done} of {total}")

        rows = memory.check(deep=deep, progress=show)
        found = {kind: len(rows[kind]) for kind in rows}
        remaining = found
        if repair and any(found.values()):
            status.update("Mending")
            memory.repair(lambda n: status.update(f"Mending: {n} vectors made"), deep=deep)
            rows = memory.check(deep=deep, progress=show)
            remaining = {kind: len(rows[kind]) for kind in rows}
    faulty = [kind for kind in remaining if remaining[kind] and kind not in NO_FAULT]
    if json:
        first = {kind: rows[kind][:10] for kind in rows if rows[kind]}
        render.print_json({"found": found, "remaining": remaining, "rows": first})
    else:
        verdicts = {
            kind.replace("_", " "): _verdict(kind, found[kind], remaining[kind], kind in faulty) for kind in found
        }
        render.out().print(render.pairs_table(verdicts, "check", "result"))
        for kind in (kind for kind in remaining if remaining[kind]):
            fix = FIXES.get(kind, "memos doctor --repair" + (" --deep" if deep else ""))
            named = ", ".join(rows[kind][:5]) + (", ..." if len(rows[kind]) > 5 else "")
            render.talk().print(render.plain(f"{kind.replace('_', ' ')} ({named}): {fix}"), soft_wrap=True)
    if faulty:
        raise typer.Exit(1)


def _verdict(kind: str, found: int, remaining: int, faulty: bool) -> str:
    if not found:
        return "ok"
    if not remaining:
        return f"{found} mended"
    if faulty:
        return f"{remaining} FAULTY"
    return f"{remaining} still to be made (work left, no fault)" if "pending" in kind else f"{remaining} (no fault)"


def config(
    json: Json = False,
    store: Store = None,
    namespace: Namespace = None,
    session: Session = None,
    budget: Budget = None,
    tokenizer: Tokenizer = None,
    llm: Llm = None,
    embedder: Embedder = None,
    vectors: Vectors = None,
    controller: Controller = None,
) -> None:
    """Show every setting and where it comes from: flag, environment, file or default.

    Example: MEMOS_BUDGET=1000 memos config

    JSON: {name: {"value", "source"}}
    """
    from memory_os.config import config_path, load, without_secrets

    flags = {
        "store": store, "namespace": namespace, "session": session, "budget": budget, "tokenizer": tokenizer,
        "llm": llm, "embedder": embedder, "vectors": vectors, "controller": controller,
    }  # fmt: skip
    _, origins = load(flags)

    def shown(value: object) -> object:
        return without_secrets(value) if isinstance(value, str) else value

    if json:
        render.print_json(
            {name: {"value": shown(origin.value), "source": origin.source} for name, origin in origins.items()}
        )
        return
    rows = {name: [str(shown(origin.value)), origin.source] for name, origin in origins.items()}
    render.out().print(render.pairs_table(rows, "setting", "value", "from"))
    line = f"The file is {config_path()}; a variable is MEMOS_ and the setting's name in capitals."
    render.talk().print(render.plain(line))
