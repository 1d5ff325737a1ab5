"""The ``memos`` command: its commands are in the files beside this one; here they are gathered, and errors end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from memory_os.cli import ask, bank, bench, chat, data, forget, inspect, migrate, worker

__all__ = ["app", "run"]

app = typer.Typer(
    name="memos",
    help="Memory for any LLM: it decides every turn what enters the bounded context, and says why.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("memory-os"))
        raise typer.Exit


@app.callback()
def memos(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", envvar="MEMOS_LOG_JSON", help="Write logs to stderr as JSON, without texts.")
    ] = False,
) -> None:
    """Memory for any LLM: it decides every turn what enters the bounded context, and says why."""
    if log_json:
        from memory_os.telemetry import log_as_json

        log_as_json(sys.stderr)


COMMANDS: dict[str, Callable[..., None]] = {
    "chat": chat.chat,
    "ask": ask.ask,
    "context": inspect.context,
    "search": inspect.search,
    "why": inspect.why,
    "confirm": data.confirm,
    "history": data.history,
    "ingest": data.ingest,
    "summarize": data.summarize,
    "forget": forget.forget,
    "retain": forget.retain,
    "export": data.export,
    "export-alr2": data.export_alr2,
    "import": data.import_,
    "migrate": migrate.migrate,
    "stats": inspect.stats,
    "bank": bank.bank,
    "worker": worker.worker,
    "doctor": inspect.doctor,
    "config": inspect.config,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
app.add_typer(bench.app, name="bench")


def run() -> None:
    """The console script: a user's mistake is one line and exit code 1, never a traceback."""
    from memory_os.errors import MemoryOSError

    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # a reader that is gone shows here, not when Python leaves
    except MemoryOSError as error:
        _say(f"Error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `memos history | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # the same, met by typer, which would exit with 1
            sys.exit(0)
        raise
    except Exception as error:
        if os.environ.get("MEMOS_DEBUG"):
            raise
        _say(f"This is a bug in memory_os: {error!r}. MEMOS_DEBUG=1 shows where.")
        sys.exit(1)


def _say(line: str) -> None:
    from memory_os.cli.render import plain, talk

    talk().print(plain(line, "red"), soft_wrap=True)
