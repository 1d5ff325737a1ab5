"""Whatever bytes come in, the outcome is a result or an error of ours, and only whole records before the fault stay."""

import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from memory_os import Memory, MemoryOSError
from memory_os.adapters.scripted import ScriptedLLM
from memory_os.cli.main import app
from memory_os.config import format_labels, parse_labels
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


@given(st.text(max_size=12), st.text(max_size=12))
def test_references_and_queries(memory, ref, query):
    scope = memory.namespace("export")
    for act in (scope.segment, scope.why, scope.sources, scope.search, scope.context):
        outcome(lambda act=act: act(ref))
    outcome(lambda: scope.session(query))


COMMANDS = "search context why forget history stats export import ingest retain config doctor".split()
OPTIONS = (
    "-n --session --budget --json -k --expect --yes --after --before --query --help --repair --days --preview".split()
)
ODDITIES = ["cat", "12", "#3", "-1", "1e9", "nan", "", " ", "%", "..", "2026-13-01", "a\x00b", "\udc80", "a/b", "/"]
WORDS = st.sampled_from([*COMMANDS, *OPTIONS, *ODDITIES, "'; DROP TABLE segments"])


@settings(max_examples=80)
@given(command=st.sampled_from(COMMANDS), words=st.lists(WORDS, max_size=5))
def test_any_command_line_ends_in_an_answer_or_one_clear_error(command, words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    path = folder / "memory.db"
    with Memory.open(path, embedder="hash") as memory:
        memory.namespace("default").add("My cat is called Miso.")
    env = {"MEMOS_STORE": str(path), "MEMOS_EMBEDDER": "hash"}
    here = Path.cwd()
    os.chdir(folder)
    try:
        done = CliRunner().invoke(app, [command, *words], env=env, input="")
    finally:
        os.chdir(here)
    assert done.exit_code in (0, 1, 2)
    assert done.exception is None or isinstance(done.exception, SystemExit | MemoryOSError)  # which memos prints
    assert "Traceback" not in done.output
