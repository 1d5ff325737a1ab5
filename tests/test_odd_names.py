"""Names that nothing can have, files that are none, bytes that are no text: one clear error of ours for each."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memory_os import ConfigError, InvalidInputError, Memory, StoreError, UnknownNameError
from memory_os.adapters.scripted import ScriptedLLM
from memory_os.errors import LONGEST

LONE = "\ud800"


@pytest.fixture
def alice(tmp_path):
    with Memory.open(tmp_path / "memory.db", llm=ScriptedLLM(lambda _: "Noted."), embedder="hash") as memory:
        scope = memory.namespace("alice")
        scope.session("s").chat("My cat is called Miso.")
        yield scope


@pytest.mark.parametrize("ref", [LONE, "\x00", 10**6000, "x" * 100_000], ids=["lone", "nul", "huge", "long"])
def test_a_reference_that_nothing_can_have_is_unknown(alice, ref):
    for act in (
        alice.segment, alice.why, alice.sources, alice.forget, alice.confirm,
        lambda ref: alice.answered(ref, 1), lambda ref: alice.answered(2, ref),
        lambda ref: alice.confirm(evidence=[ref]), lambda ref: alice.forget(1, ref),
    ):  # fmt: skip
        with pytest.raises(UnknownNameError) as caught:
            act(ref)
        assert len(str(caught.value)) <= LONGEST
    assert len(alice.history()) == 2


def test_a_name_that_cannot_be_stored_is_refused(alice):
    with pytest.raises(UnknownNameError):
        alice.why(expect=LONE)
    assert alice.lookup([LONE, "\x00"]) == {}
    for act in (
        lambda: alice.forget(session=LONE),
        lambda: alice.would_forget(session=LONE),
        lambda: alice.ingest(io.BytesIO(b"hi there"), name=LONE),
        lambda: alice.summarize(io.BytesIO(b"hi there"), name=LONE),
        lambda: alice.import_(io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8")),
    ):
        with pytest.raises(InvalidInputError):
            act()
    assert len(alice.history(10**20)) == 2
    for n in (0, -1):
        with pytest.raises(ConfigError):
            alice.history(n)


@pytest.mark.parametrize("path", ["a\x00b", "x" * 300, "~nobody-of-this-name/memory.db", LONE, "loop/memory.db"])
def test_a_store_that_cannot_be_is_one_error(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(StoreError):
        Memory.open(path, embedder="hash")
    assert [each.name for each in tmp_path.iterdir()] == ["loop"]


@pytest.mark.parametrize("what", ["llm", "embedder", "controller", "tokenizer", "vectors", "system"])
def test_a_setting_that_cannot_be_is_one_error(tmp_path, what):
    with pytest.raises((UnknownNameError, InvalidInputError)):
        Memory.open(tmp_path / "memory.db", **{"embedder": "hash", what: LONE})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["/proc/self/mem", "/proc/kmsg", "/proc/self/maps", "a\x00b", "x" * 300, "~nobody/x"])
def test_what_is_no_real_file_is_not_read(alice, file):
    if file.startswith("/proc") and not Path(file).exists():
        pytest.skip(f"there is no {file} here")
    alice.confirm()
    for act in (
        alice.ingest, alice.import_, lambda file: alice.export_alr2(io.StringIO(), exclude=file),
        lambda file: alice.summarize(file),
    ):  # fmt: skip
        with pytest.raises(InvalidInputError):
            act(file)


def test_a_file_that_breaks_while_it_is_read_is_one_error(alice, tmp_path):
    from memory_os.limits import open_file

    (tmp_path / "broken.txt").write_text("hello")
    with (
        pytest.raises(InvalidInputError, match=r"broken.txt: cannot read it: Input/output error"),
        open_file(tmp_path / "broken.txt"),
    ):
        raise OSError(5, os.strerror(5))


def test_an_export_takes_the_place_of_a_file_only(alice, tmp_path):
    """Put in the place of /dev/null by root, a file would break every other program."""
    os.mkfifo(tmp_path / "device")
    (tmp_path / "link").symlink_to("device")
    for place in (tmp_path / "device", tmp_path / "link", tmp_path):
        with pytest.raises(InvalidInputError, match="no regular file, and stays"):
            alice.export(place)
    assert (tmp_path / "device").is_fifo()
    (tmp_path / "old.jsonl").write_text("old")
    assert alice.export(tmp_path / "old.jsonl") == 2


ODD = os.fsdecode(b"\xff")
COMMANDS = [
    ["why", ODD], ["why", "--expect", ODD], ["forget", ODD, "--yes"], ["forget", "--whole-session", ODD, "--yes"],
    ["confirm", ODD, "--answer", "x"], ["ingest", "t.txt", "--source", ODD], ["context", "cat", "--tokenizer", ODD],
    ["history", "-n", ODD], ["history", "-s", ODD], ["search", ODD], ["import", "-"], ["export", "x" * 300],
    ["stats", "--store", "x" * 300], ["stats", "--store", ODD], ["ingest", "/proc/self/mem"], ["ingest", ODD],
    ["ingest", f"{ODD}.txt"], ["forget", "y" * 5000, "--yes"],
]  # fmt: skip


def test_the_command_line_says_it_in_one_line(tmp_path):
    """In one process, which has the arguments as a shell gives them: bytes."""
    (tmp_path / "t.txt").write_text("Hello there.")
    (tmp_path / f"{ODD}.txt").write_text("Hello there.")
    with Memory.open(tmp_path / "memory.db", embedder="hash") as memory:
        memory.namespace("default").add("My cat is called Miso.")
        memory.namespace("default").context("cat?", record=True)
    code = """
import io, sys
from memory_os.cli.main import run
words = sys.argv[1:]
while words:
    end = words.index("--next")
    sys.argv, words = ["memos", *words[:end]], words[end + 1 :]
    sys.stdin = io.TextIOWrapper(io.BytesIO(b"\\xff"), encoding="utf-8")
    try:
        run()
    except SystemExit as end:
        print("code", end.code, file=sys.stderr)
    else:
        print("code", 0, sys.argv, file=sys.stderr)
"""
    words = [word for command in COMMANDS for word in (*command, "--next")]
    env = {**os.environ, "MEMOS_STORE": "memory.db", "MEMOS_EMBEDDER": "hash"}
    done = subprocess.run([sys.executable, "-P", "-c", code, *words], cwd=tmp_path, env=env, capture_output=True)
    said = done.stderr.decode(errors="replace")
    assert said.count("\ncode 1") == len(COMMANDS), said
    assert said.count("Error: ") == len(COMMANDS), said
    assert "bug in memory_os" not in said
    assert all(len(line) < LONGEST + 10 for line in said.splitlines())


@pytest.mark.parametrize("name", ["SYSTEM", "SESSION", "NAMESPACE", "TOKENIZER", "LLM"])
def test_a_variable_of_no_utf8_is_one_error_that_names_it(monkeypatch, name):
    from memory_os.config import load

    monkeypatch.setenv(f"MEMOS_{name}", ODD)
    with pytest.raises(ConfigError, match=f"environment MEMOS_{name}: "):
        load({})


@pytest.mark.parametrize("text", ["x = " + "[" * 3000, "budget = " + "9" * 5000, "\ud800"])
def test_a_configuration_file_beyond_reading_is_one_error(monkeypatch, tmp_path, text):
    from memory_os.config import load

    (tmp_path / "config.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    monkeypatch.setenv("MEMOS_CONFIG", str(tmp_path / "config.toml"))
    with pytest.raises(ConfigError, match="cannot read the configuration file"):
        load({})
