"""The layout keeps its promises: imports run one way, importing is free, and what the README shows works."""

import ast
import doctest
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("memory_os", "stores", "controllers", "adapters", "cli", "benchmarks")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

# What the middle folders may see of the core, and who may see more.
VALUES = {
    "address", "certainty", "echo", "errors", "evidence", "fence", "lexical", "protocols", "quotes", "redact", "types",
    "weights",
}  # fmt: skip
EXCEPTIONS = {
    "stores/records.py": {"trace"},  # traces to JSON and back
    "stores/forgetting.py": {"trace"},
    # these wrap the facade
    "adapters/bytestore.py": {"", "memory", "aio", "items"},
    "adapters/chat_history.py": {"", "memory", "aio"},
    "adapters/configurable.py": {"", "memory", "aio"},
    "adapters/chat_model.py": {"", "memory", "aio"},
    "adapters/langchain.py": {"", "memory", "aio"},
    "adapters/langgraph.py": {"", "memory", "aio", "items"},
    "adapters/mcp.py": {"", "memory", "aio"},
    "adapters/middleware.py": {"", "memory", "aio"},
    "adapters/remembering.py": {"", "memory", "aio"},
    "adapters/server.py": {"", "memory", "aio"},
    "adapters/tools.py": {"", "memory", "aio"},
}
WIRES_LAZILY = {"memory_os/__init__.py", "memory_os/memory.py", "memory_os/aio.py"}

HEAVY = {
    "alembic", "chromadb", "langchain", "langchain_core", "langgraph", "pydantic", "pydantic_settings",
    "httpx", "matplotlib", "opentelemetry", "pgvector", "psycopg", "sentence_transformers", "sqlalchemy",
    "tenacity", "tiktoken", "torch", "transformers",
}  # fmt: skip
HEAVY_AT_TOP = {"stores": {"sqlalchemy", "alembic"}, "memory_os/config.py": {"pydantic", "pydantic_settings"}}

TOP_LEVEL = {
    ".ci", ".gitignore", "CHANGELOG.md", "LICENSE", "Makefile", "README.md", "adapters", "benchmarks", "cli",
    "controllers", "docs", "examples", "memory_os", "pyproject.toml", "stores", "tests",
}  # fmt: skip


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    """The name under which a file is installed: stores/records.py is memory_os.stores.records."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "memory_os" else ("memory_os", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


# Imports run one way: cli -> benchmarks -> facade, and cli -> build -> {adapters, controllers, stores} -> core.


def imports(node: ast.AST, lazy: bool = False) -> Iterator[tuple[str, bool]]:
    """``(module, lazy)`` of every import; lazy: inside a function, or for the type checker only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = "." * child.level + (child.module or "")
            for alias in child.names:
                full = f"{base}.{alias.name}"
                yield (full if full in MODULES else base, lazy)
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from imports(child, lazy or function or typing)


def allowed(importer: str, module: str, lazy: bool) -> bool:
    """Whether the file ``importer`` (``stores/records.py``) may import ``module``."""
    first, *rest = module.split(".")
    if first not in ("memory_os", ""):
        return first not in FOLDERS
    target = rest[0] if rest else ""
    folder = importer.split("/")[0]
    if not first:
        return False  # relative
    if folder == "cli":
        return target != "benchmarks" or (importer == "cli/bench.py" and lazy)
    if folder == "benchmarks":
        return target != "cli"
    if importer == "memory_os/build.py":
        return target not in ("cli", "benchmarks")
    if importer == "memory_os/__init__.py" and lazy and target == "controllers":
        return True  # typed options of a controller are part of the front door
    if folder == "memory_os":
        return target not in FOLDERS and (target != "build" or (importer in WIRES_LAZILY and lazy))
    return target == folder or target in VALUES | EXCEPTIONS.get(importer, set())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_one_way(path: Path):
    wrong = [
        module
        for module, lazy in imports(ast.parse(path.read_text("utf-8")))
        if not allowed(name_of(path), module, lazy)
    ]
    assert not wrong, f"{name_of(path)} must not import {wrong}"


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("memory_os/turn.py", "from memory_os.stores.records import Records"),
        ("memory_os/turn.py", "def f():\n    import memory_os.adapters"),
        ("memory_os/turn.py", "from memory_os.build import build_parts"),
        ("memory_os/memory.py", "from memory_os import build"),
        ("memory_os/build.py", "import memory_os.cli.main"),
        ("memory_os/build.py", "def f():\n    import memory_os.benchmarks.peers"),
        ("benchmarks/measure.py", "from memory_os.cli import render"),
        ("cli/inspect.py", "def f():\n    from memory_os.benchmarks import locomo"),
        ("cli/bench.py", "from memory_os.benchmarks import locomo"),
        ("stores/records.py", "from memory_os.controllers.auto import AutoController"),
        ("controllers/auto.py", "from memory_os import Memory"),
        ("controllers/auto.py", "from . import recency"),
        ("adapters/scripted.py", "try:\n    import stores.records\nfinally:\n    pass"),
    ],
)
def test_a_wrong_import_is_caught(importer: str, line: str):
    assert not all(allowed(importer, module, lazy) for module, lazy in imports(ast.parse(line)))


@pytest.mark.parametrize("path", [p for p in FILES if not name_of(p).startswith("adapters/")], ids=name_of)
def test_heavy_libraries_are_imported_where_they_are_used(path: Path):
    name = name_of(path)
    forbidden = HEAVY - HEAVY_AT_TOP.get(name, set()) - HEAVY_AT_TOP.get(name.split("/")[0], set())
    at_top = {module.split(".")[0] for module, lazy in imports(ast.parse(path.read_text("utf-8"))) if not lazy}
    assert not at_top & forbidden, f"move these into the function that uses them: {at_top & forbidden}"


@pytest.mark.parametrize("name", ["stores", "controllers", "adapters", "cli", "benchmarks"])
def test_the_folders_have_one_name_only(name: str):
    """``import stores`` would be a second copy, with other classes. Run plain ``pytest``, not ``python -m pytest``."""
    spec = importlib.util.find_spec(name)
    places = [spec.origin, *(spec.submodule_search_locations or [])] if spec else []
    assert not [place for place in places if place and Path(place).is_relative_to(ROOT)]


# Importing is free.

AUDIT = """
import os, sys, threading
seen = []
def hook(event, args):
    if event == "open":
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
        if isinstance(args[2], int) and args[2] & writes:
            seen.append((event, args[0]))
    elif event.startswith(("socket.", "subprocess.", "sqlite3.", "urllib.")) or event in (
        "os.mkdir", "os.rename", "os.remove", "os.system", "os.fork", "_thread.start_new_thread", "tempfile.mkstemp"
    ):
        seen.append((event, str(args)))
sys.addaudithook(hook)
before = set(sys.modules)
import memory_os
heavy = sorted({name.split(".")[0] for name in set(sys.modules) - before} & set(sys.argv[1:]))
assert not heavy, f"imports {heavy}"
assert not seen, f"does {seen}"
assert threading.active_count() == 1, threading.enumerate()
"""


def test_importing_the_package_loads_writes_and_starts_nothing(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-I", "-B", "-c", AUDIT, *sorted(HEAVY)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


# Names.


def in_ruff_order(name: str) -> tuple[int, str]:
    """CONSTANTS, then Classes, then the rest: the order in which ruff sorts ``__all__``."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def test_public_names_are_sorted_and_complete():
    import memory_os
    from memory_os import errors

    assert memory_os.__all__ == sorted(memory_os.__all__, key=in_ruff_order)
    assert [name for name in memory_os.__all__ if not hasattr(memory_os, name)] == []
    others = {"TYPE_CHECKING", "annotations"}
    bound = {name for name, value in vars(memory_os).items() if name[0] != "_" and not isinstance(value, ModuleType)}
    bound -= others
    assert bound | set(errors.__all__) <= set(memory_os.__all__)


def test_the_top_level_holds_what_was_agreed():
    done = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in done.stdout.split("\0") if name} == TOP_LEVEL


# Examples are true. --doctest-modules would import second copies, so every module comes under its real name.


@pytest.mark.parametrize("module", sorted(MODULES - {"memory_os.stores.migrations.env"}))  # env runs only under Alembic
def test_doctests(module: str):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def fenced(language: str) -> list[tuple[int, list[str]]]:
    """``(line number, lines)`` of the README's code blocks whose fence says exactly ``language``."""
    blocks: list[tuple[int, list[str]]] = []
    fence = None
    for number, line in enumerate((ROOT / "README.md").read_text("utf-8").splitlines(), start=1):
        if line.startswith("```"):
            fence = line[3:].strip() if fence is None else None
            if fence == language:
                blocks.append((number + 1, []))
        elif fence == language:
            blocks[-1][1].append(line)
    return blocks


def test_readme_python_runs_as_shown(tmp_path: Path):
    """The blocks run as one program. A block fenced ``python no-run`` needs something that a test has not got."""
    blocks = fenced("python")
    assert blocks, "the README shows no Python"
    program: list[str] = []
    for start, lines in blocks:
        program += [""] * (start - 1 - len(program)) + lines  # an error names the README's own line
    (tmp_path / "notes.md").write_text("The key is under the red pot.", "utf-8")  # what it reads
    script = tmp_path / "README.py"
    script.write_text("\n".join(program) + "\n", "utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


def memos_commands() -> list[str]:
    shell = [line for language in ("sh", "bash", "console", "shell") for _, lines in fenced(language) for line in lines]
    inline = re.findall(r"`(memos [^`\n]+)`", (ROOT / "README.md").read_text("utf-8"))
    found = [re.sub(r"^\s*\$?\s*(\S*/)?(?=memos )", "", line) for line in [*shell, *inline]]
    return sorted({line for line in found if line.startswith("memos ")})


def test_memos_commands_in_readme_exist():
    from typer.main import get_command

    from memory_os.cli.main import app

    lines = memos_commands()
    assert lines, "the README shows no memos command"
    unknown = []
    for line in lines:
        command, skip = get_command(app), False
        for word in shlex.split(line, comments=True)[1:]:
            options = {o: p for p in command.params for o in [*p.opts, *p.secondary_opts]} | {"--help": None}
            if skip:
                skip = False
            elif word in ("|", ">", ">>", "<", "&&", "||", ";"):
                break
            elif word.startswith("-") and word != "-":
                option = options.get(word.split("=")[0], unknown)
                if option is unknown:
                    unknown.append(f"{line}: {word}")
                skip = "=" not in word and not getattr(option, "is_flag", True)
            elif hasattr(command, "commands"):
                if word not in command.commands:
                    unknown.append(f"{line}: {word}")
                    break
                command = command.commands[word]
    assert not unknown


def test_nothing_but_sqlite_opens_the_database_file():
    """To close any descriptor of it takes SQLite's locks away; ``stores/files.py`` knows how to read it."""
    opens = re.compile(r"\bopen\(|read_bytes\(|read_text\(|copyfile\(|copy2?\(")
    # the one way, the bank's, a copy of nobody's yet, and files of vectors, which SQLite never opens
    own_files = {"files.py", "kvfile.py", "bank.py", "backup.py", "vectorfile.py"}
    for path in (ROOT / "stores").glob("*.py"):
        found = [line for line in path.read_text().splitlines() if opens.search(line) and "safe_open" not in line]
        assert path.name in own_files or not found, (path.name, found)
