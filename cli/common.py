"""What commands share: their options, and opening the memory that the settings name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from memory_os.config import Settings
    from memory_os.memory import Memory, Scope

__all__ = [
    "Budget",
    "Controller",
    "Embedder",
    "Json",
    "Llm",
    "Namespace",
    "Restore",
    "Session",
    "Store",
    "Tokenizer",
    "Vectors",
    "old_history",
    "opened",
]

Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        help="The database file, or postgresql+psycopg://USER:PASSWORD@HOST/NAME.",
        rich_help_panel="Settings",
    ),
]
Namespace = Annotated[
    str | None,
    typer.Option(
        "--namespace",
        "-n",
        help=r"Whose memory: labels with / between them, \/ within one; default if not given.",
        rich_help_panel="Settings",
    ),
]
Session = Annotated[
    str | None, typer.Option("--session", "-s", help="One conversation in it.", rich_help_panel="Settings")
]
Llm = Annotated[
    str | None,
    typer.Option("--llm", help="smollm2, hf:NAME, URL#MODEL or provider:model.", rich_help_panel="Settings"),
]
Embedder = Annotated[
    str | None, typer.Option("--embedder", help="minilm, st:NAME, provider:model or hash.", rich_help_panel="Settings")
]
Vectors = Annotated[
    str | None,
    typer.Option("--vectors", help="exact, chroma, pgvector, or chroma+http://HOST:PORT.", rich_help_panel="Settings"),
]
Controller = Annotated[
    str | None,
    typer.Option("--controller", help="auto, scm, xl3m, alr2, longmem-free or recency.", rich_help_panel="Settings"),
]
Tokenizer = Annotated[
    str | None,
    typer.Option("--tokenizer", help="Whose tokens the budget counts.", rich_help_panel="Settings"),
]
Budget = Annotated[
    int | None, typer.Option("--budget", "-b", help="Most tokens of the prompt.", rich_help_panel="Settings")
]
Restore = Annotated[bool, typer.Option("--restore", help="Store also what was forgotten here.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextmanager
def opened(
    flags: Mapping[str, Any], *, llm: bool = False, decides: bool = False, writes: bool = False
) -> Iterator[tuple[Memory, Scope, Settings]]:
    """The memory that the settings name, and its namespace or session.

    :param flags: settings given on the command line, ``None`` for those that were not.
    :param llm: whether the command talks to the LLM; otherwise only its way of counting tokens is used.
    :param decides: whether the command needs the controller's decisions, for which the controller may ask the LLM.
    :param writes: whether the command stores something: only then is what is older than ``retention_days`` forgotten.
    """
    from memory_os.build import ASKING, tokenizer_of
    from memory_os.config import load
    from memory_os.memory import Memory

    settings, origins = load(flags)
    asks = settings.controller in ASKING
    llm = llm or (decides and asks)
    controller = "auto" if asks and not llm else settings.controller  # nothing is decided, so nobody is asked
    if origins["store"].source == "default" and isinstance(settings.store, Path):
        settings.store.parent.mkdir(parents=True, exist_ok=True)
    with Memory.open(
        settings.store,
        llm=settings.llm if llm else None,
        embedder=settings.embedder,
        vectors=settings.vectors,
        controller=controller,
        tokenizer=settings.tokenizer or (None if llm else tokenizer_of(settings.llm)),
        budget=settings.budget,
        reply_tokens=settings.reply_tokens,
        flash_turns=settings.flash_turns,
        system=settings.system,
        bank=settings.bank,
        retention_days=settings.retention_days if writes else None,
        redact=settings.redact,
        derive=settings.derive,
        max_pending=settings.max_pending,
        telemetry=settings.telemetry,
    ) as memory:
        scope = memory.namespace(*settings.labels)
        yield memory, scope.session(settings.session) if settings.session else scope, settings


def old_history() -> Path | None:
    """The file in which earlier versions of ``memos chat`` kept every line that was typed, if it is still there."""
    from platformdirs import user_data_dir

    file = Path(user_data_dir("memory_os")) / "chat_history"
    return file if file.exists() else None
