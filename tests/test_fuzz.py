"""Whatever bytes come in, the outcome is a result or an error of ours, and only whole records before the fault stay."""

import io
import json
import os
import shutil
import typing
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from memory_os import Memory, MemoryOSError
from memory_os.adapters.scripted import ScriptedLLM
from memory_os.cli.main import COMMANDS as MEMOS
from memory_os.cli.main import app
from memory_os.config import format_labels, parse_labels
from memory_os.errors import LONGEST
from memory_os.ingest import parse_time

DEEP = "[" * 3000 + "]" * 3000
ODD = [DEEP, "9" * 5000, "1e999", "-0", "NaN", "\ud800".encode("utf-8", "surrogatepass"), "\x00", '"\\ud800"', "\ufeff"]
ODD = [odd if isinstance(odd, bytes) else odd.encode() for odd in ODD]
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["user", "turn", "2023-05-08T13:56:00Z", "\ud800", "x" * 2000, "session_1", 2**63, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
fields = st.sampled_from(
    ["text", "content", "role", "speaker", "name", "created_at", "timestamp", "session", "messages", "conversation",
     "session_1", "session_01", "session_1_date_time", "dialogue", "id", "sample_id"]
)  # fmt: skip
records = st.dictionaries(
    fields, values | st.lists(st.dictionaries(fields, values, max_size=4), max_size=3), max_size=5
)
chats = (records | st.lists(records, max_size=3) | values).map(lambda each: json.dumps(each).encode())
anything = st.one_of(
    st.binary(max_size=80),
    st.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass")),
    chats,
    st.lists(st.one_of(chats, st.sampled_from(ODD), st.just(b'{"text": "fine"}')), max_size=4).map(b"\n".join),
)


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    llm = ScriptedLLM(lambda _: "Noted.")
    with Memory.open(tmp_path_factory.mktemp("fuzz") / "memory.db", llm=llm, embedder="hash") as opened:
        yield opened


def outcome(act) -> object:
    """What it gives, or the error of ours; any other goes through."""
    try:
        return act()
    except MemoryOSError as error:
        return error


@given(
    data=anything, format=st.sampled_from(["text", "markdown", "chat", None]), name=st.sampled_from(["a.jsonl", "a"])
)
@settings(max_examples=250)
def test_ingest(memory, data, format, name):
    scope = memory.namespace("ingest")
    outcome(lambda: scope.ingest(io.BytesIO(data), format=format, name=name))
    before = scope.stats()["segments"]
    outcome(lambda: scope.ingest(io.BytesIO(data), format=format, name=name))  # again: nothing is stored twice
    assert scope.stats()["segments"] == before


@pytest.fixture(scope="module")
def exported(memory) -> list[str]:
    scope = memory.namespace("export")
    scope.chat("What is it?")
    scope.add("fine", speaker="Ana", metadata={"a": [1]})
    scope.items.put(("p",), "k", {"v": 1}, texts=[("t", "x")], ttl=5)
    lines = io.StringIO()
    scope.export(lines)
    return lines.getvalue().splitlines()


def paths_of(value, at=()):
    yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths_of(inner, (*at, key))


@given(data=st.data(), new=values)
@settings(max_examples=250)
def test_import_of_an_export_that_was_changed_anywhere(memory, exported, data, new):
    n = data.draw(st.integers(0, len(exported) - 1))
    record = json.loads(exported[n])
    *way, last = data.draw(st.sampled_from([path for path in paths_of(record) if path]))
    place = record
    for key in way:
        place = place[key]
    place[last] = new
    lines = [*exported[:n], json.dumps(record), *exported[n + 1 :]]
    scope = memory.namespace("import", str(n))
    result = outcome(lambda: scope.import_(lines))
    # what is there can be read, shown and exported
    copy = io.StringIO()
    scope.export(copy)
    outcome(lambda: scope.search("fine"))
    outcome(scope.why)
    outcome(lambda: scope.add("after"))
    if not isinstance(result, MemoryOSError):
        other = memory.namespace("copy", str(n))
        assert not isinstance(outcome(lambda: other.import_(copy.getvalue().splitlines())), MemoryOSError)
    outcome(lambda: scope.forget(everything=True))


@given(data=anything, whole=st.booleans())
@settings(max_examples=150)
def test_import_of_any_bytes(memory, exported, tmp_path_factory, data, whole):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(data if whole else exported[0].encode() + b"\n" + data)
    scope = memory.namespace("bytes")
    before = scope.stats()["segments"]
    if isinstance(outcome(lambda: scope.import_(path)), MemoryOSError) and whole:
        assert scope.stats()["segments"] == before


@given(st.one_of(values, st.text(), st.datetimes(), st.datetimes(timezones=st.timezones())))
def test_times(value):
    outcome(lambda: parse_time(value))


@given(st.text(alphabet=r"a/\ .", max_size=12) | st.text(max_size=12))
def test_labels_of_the_command(memory, text):
    labels = parse_labels(text)
    assert parse_labels(format_labels(labels)) == labels
    outcome(lambda: memory.namespace(*labels).stats())


any_text = st.text(st.characters(codec=None, exclude_categories=()), max_size=12) | st.sampled_from(
    ["\ud800", "a\x00", "9" * 30]
)


@given(any_text, any_text)
@example("\ud800", "\ud800")
def test_references_and_queries(memory, ref, query):
    scope = memory.namespace("export")
    for act in (
        scope.segment, scope.why, scope.sources, scope.search, scope.context, scope.confirm, scope.forget,
        lambda ref: scope.why(expect=ref), lambda ref: scope.lookup([ref]), lambda ref: scope.forget(session=ref),
        lambda ref: scope.ingest(io.BytesIO(b"hello"), name=ref),
    ):  # fmt: skip
        outcome(lambda act=act: act(ref))
    outcome(lambda: scope.session(query))


# -- the command line: every command, every option, one odd value at a time --------------------------------------------

NAMES = [
    "12", "-1", "9" * 25, "nan", "", "cat", "x" * 5000, os.fsdecode(b"\xff"), "a\x00b", "\x1b]0;x\x07", "2026-13-01",
    ".", "/dev/zero", "/proc/self/mem", "loop",
]  # fmt: skip
NUMBERS = ["12", "1", "0", "-1", "9" * 25, "9" * 5000, "1e400", "nan", "-inf", "0.5", "", "cat", "\u0661"]
VALID = {
    "ask": {"file": ["t.txt"], "question": ["cat?"]}, "context": {"query": ["cat"]}, "search": {"query": ["cat"]},
    "ingest": {"file": ["t.txt"]}, "summarize": {"file": ["t.txt"]}, "import": {"file": ["ok.jsonl"]},
    "export": {"file": ["out.jsonl"]}, "export-alr2": {"file": ["out.jsonl"]}, "confirm": {"answer": ["--answer", "x"]},
    "forget": {"yes": ["--yes"]}, "migrate": {"source": ["memory.db"], "dest": ["copy.db"]},
    "worker": {"until_idle": ["--until-idle"], "summaries": ["--no-summaries"]},
}  # fmt: skip
BESIDE = {("forget", "query"): ["-k", "1"], ("forget", "k"): ["--query", "cat"]}


def options_of(command: str) -> list[Any]:
    """What a command takes: arguments and options with a value; settings, which all share, are those of ``config``."""
    parameters = [p for p in typer.main.get_command(app).commands[command].params if not getattr(p, "is_flag", False)]
    shared = command != "config"
    return [p for p in parameters if not (shared and getattr(p, "rich_help_panel", None) == "Settings")]


def odd_values(command: str, option: Any) -> list[str]:
    told = typing.get_type_hints(MEMOS[command])[option.name]
    return NUMBERS if {int, float} & {told, *typing.get_args(told)} else NAMES


CASES = [(command, option) for command in MEMOS for option in options_of(command)]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A store with a turn in it, and files; every case gets a copy."""
    folder = tmp_path_factory.mktemp("template")
    with Memory.open(folder / "memory.db", embedder="hash") as memory:
        scope = memory.namespace("default")
        scope.add("My cat is called Miso.")
        scope.context("cat?", record=True)
        scope.export(folder / "ok.jsonl")
    (folder / "t.txt").write_text("The cat is grey.")
    (folder / "loop").symlink_to("loop")
    return folder


def words_of(command: str, option: Any, value: str) -> list[str]:
    given = {**VALID.get(command, {})}
    named = option.param_type_name == "option"
    given[option.name] = [*([option.opts[0]] if named else []), value, *BESIDE.get((command, option.name), [])]
    places = [p.name for p in typer.main.get_command(app).commands[command].params if p.param_type_name == "argument"]
    options = [word for name, words in given.items() if name not in places for word in words]
    return [command, *options, "--", *(word for name in places for word in given.get(name, []))]


def assert_an_answer_or_one_clear_error(words: list[str]) -> None:
    env = {
        "MEMOS_STORE": "memory.db",
        "MEMOS_EMBEDDER": "hash",
        "MEMOS_LLM": "nobody",
        "MEMOS_TOKENIZER": "cl100k_base",
    }
    done = CliRunner().invoke(app, words, env=env, input="")
    what = [word[:60] for word in words]
    assert done.exit_code in (0, 1, 2), what
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        assert isinstance(done.exception, MemoryOSError), (what, done.exception)  # which memos prints
        assert 0 < len(str(done.exception)) <= LONGEST, what
    assert "Traceback" not in done.output, what


def test_the_cases_are_of_every_command():
    assert {command for command in MEMOS if options_of(command)} == {command for command, _ in CASES}
    assert len(CASES) > 40
    assert VALID.keys() <= MEMOS.keys()


@pytest.mark.slow
@pytest.mark.parametrize(("command", "option"), CASES, ids=lambda each: getattr(each, "name", each))
def test_any_value_of_any_option_ends_in_an_answer_or_one_clear_error(command, option, template, tmp_path, monkeypatch):
    folder = tmp_path / "work"
    shutil.copytree(template, folder, symlinks=True)
    monkeypatch.chdir(folder)
    for value in odd_values(command, option):
        assert_an_answer_or_one_clear_error(words_of(command, option, value))
    assert Path("/dev/zero").is_char_device()
    with Memory.open(folder / "memory.db", embedder="hash") as memory:
        assert not any(kinds for kind, kinds in memory.check().items() if "pending" not in kind)
