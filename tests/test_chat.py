"""``memos chat``: replies, commands, interruption, and being remembered by the next process."""

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from memory_os import Alr2Controller, Memory
from memory_os.adapters.scripted import ScriptedLLM
from memory_os.cli.chat import Chat, _edited_lines

MEMOS = Path(sys.executable).with_name("memos")


@pytest.fixture
def talk(tmp_path, capfd):
    """Say lines to a scripted LLM: ``(stdout, stderr, scope)``."""
    memories = []

    def say(*lines, reply=lambda messages: "Noted.", llm=None, controller="auto", **options):
        memory = Memory.open(
            tmp_path / "memory.db", llm=llm or ScriptedLLM(reply), embedder="hash", controller=controller
        )
        memories.append(memory)
        scope = memory.namespace("a").session("s")
        Chat(scope, budget=400, **options).run(iter(lines))
        return (*capfd.readouterr(), scope)

    yield say
    for memory in memories:
        memory.close()


def test_a_reply_is_printed_and_both_sides_are_kept(talk):
    out, _, scope = talk("My cat is called Miso.", "", "/quit", "never said")
    assert out == "Noted.\n"
    assert [s.text for s in scope.history()] == ["My cat is called Miso.", "Noted."]


def test_json_is_one_object_a_reply(talk):
    out, _, scope = talk("one", "two", json=True)
    first, second = map(json.loads, out.splitlines())
    assert first["text"] == second["text"] == "Noted."
    assert second["trace"] == scope.why()[0].id
    assert set(first) == {"text", "n_tokens", "segments", "evidence", "calls", "trace"}


CITES = Alr2Controller(union=0)


def quoting(messages):
    """Quotes the first sentence that it is shown, then cites it, and one that it was not shown."""
    prompt = messages[-1]["content"]
    if "Copy every sentence" not in prompt:
        return "Miso [#1, #8]."
    return "- " + next((line for line in prompt.splitlines() if line.startswith("S1.2")), "NONE")


def test_alr2_shows_its_citations_and_opens_them(talk):
    told = "It rained \x1b[31m a lot. My cat is called Miso. She sleeps."
    out, err, _ = talk(told, "/session b", "What is my cat called?", "/evidence", "/evidence 1", "/evidence #9",
                       reply=quoting, controller=CITES)  # fmt: skip
    assert "Miso [#1].\n" in out
    assert err.count("[#1]") == 1  # under the reply
    assert out.count("user: “My cat is called Miso.”") == 1  # by /evidence
    assert "a lot. My cat is called Miso. She sleeps." in out  # in its place
    assert "\x1b" not in out
    assert "unknown segment '9'" in err


def test_evidence_stands_in_the_json(talk):
    out, _, _ = talk("It rained. My cat is called Miso.", "/session b", "What is my cat called?", reply=quoting,
                     controller=CITES, json=True)  # fmt: skip
    [evidence] = json.loads(out.splitlines()[-1])["evidence"]
    assert (evidence["seq"], evidence["span"], evidence["cited"]) == (1, [11, 33], True)
    assert evidence["quote"] == "My cat is called Miso."


def test_without_quotes_there_is_no_evidence_to_open(talk):
    _, err, _ = talk("/evidence", "My cat is called Miso.", "/evidence")
    assert err.count("rests on no quotes") == 2


def test_an_answer_is_confirmed(talk):
    _, err, scope = talk("/confirm", "What is my cat called?", "/confirm")
    assert "no answer to confirm" in err
    assert scope.why()[0].confirmation.answer == "Noted."
    *_, scope = talk("What is my cat called?", "/confirm Miso.")
    assert scope.why()[0].confirmation.answer == "Miso."


def test_every_command_does_what_help_says(talk, tmp_path):
    out, err, _ = talk("/help")
    for name in Chat.COMMANDS:
        assert f"/{name}" in out
    out, err, scope = talk(
        "My cat is called Miso.", "/session other", "What is my cat called?", "/why", "/memory", "/budget",
        "/budget 300", "/search cat", f"/export {tmp_path / 'out.jsonl'}", "/forget 1", "/budget some", "/export",
        "/nope", "/forget 77", "/search", "/forget",
    )  # fmt: skip
    assert "activated, relevant" in out
    assert "My cat is called Miso." in out
    assert "At most 400 tokens" in out
    assert "of at most 400 tokens (scripted)" in out
    assert "At most 300 tokens" in out
    assert "Session other." in out
    assert "Wrote 4 segments" in out
    assert "Forgot 1 segment." in out
    assert "a budget is a number" in err
    assert "name a file: /export FILE" in err
    assert "say what to look for: /search QUERY" in err
    assert "name a segment: /forget SEGMENT" in err
    assert "there is no /nope" in err
    assert "unknown segment '77'" in err
    assert [s.seq for s in scope.whole().history()] == [2, 3, 4]


def test_an_error_is_one_line_and_the_chat_goes_on(talk):
    replies = iter([RuntimeError("model gone"), "Back again."])

    def reply(messages):
        answer = next(replies)
        if isinstance(answer, Exception):
            raise answer
        return answer

    out, err, scope = talk("hello?", "/budget 9", "hello?", "/budget 300", "hello?", reply=reply)
    assert "model gone" in err
    assert "raise the budget" in err
    assert "Traceback" not in err
    assert "Back again." in out
    assert [s.text for s in scope.history()] == ["hello?", "hello?", "Back again."]


class Interrupted(ScriptedLLM):
    """Ctrl-C arrives while it speaks."""

    def generate(self, messages, *, max_tokens, stop=()):
        yield "one two"
        raise KeyboardInterrupt


def test_ctrl_c_in_mid_answer_keeps_what_was_said(talk):
    out, err, scope = talk("Count.", "/why", llm=Interrupted([]))
    assert out.startswith("one two\n")
    assert "stopped" in err
    kept = scope.history()[-1]
    assert (kept.text, kept.metadata) == ("one two", {"outcome": "interrupted"})
    assert "interrupted, controller auto" in out


class InterruptedLater(ScriptedLLM):
    """Answers once, then is interrupted."""

    def generate(self, messages, *, max_tokens, stop=()):
        if messages[-1]["content"].endswith("first"):
            yield "an answer"
            return
        yield "half"
        raise KeyboardInterrupt


def test_why_after_an_interruption_is_about_the_interrupted_answer(talk):
    out, _, scope = talk("first", "second", "/why", llm=InterruptedLater([]))
    trace, _ = scope.why()
    assert trace.query == "second"
    assert f"turn {trace.id}: interrupted" in out


def test_json_of_an_interrupted_answer_leaves_stdout_clean(talk):
    out, err, _ = talk("Count.", llm=Interrupted([]), json=True)
    assert out == ""
    assert "stopped" in err


def test_ctrl_c_in_a_command_comes_back_to_the_prompt(talk, monkeypatch):
    def hang(self, query):
        raise KeyboardInterrupt

    monkeypatch.setattr(Chat, "_search", hang)
    out, err, _ = talk("/search cat", "hello")
    assert "stopped" in err
    assert out == "Noted.\n"


def test_ctrl_c_while_the_model_loads_waits_until_it_is_loaded(talk):
    done = []

    def loading(messages):
        if not done:
            os.kill(os.getpid(), signal.SIGINT)
        done.append("loaded")  # not reached if the signal had struck above
        return "Here."

    out, err, scope = talk("first", "second", reply=loading)
    assert done == ["loaded", "loaded"]
    assert "stopping as soon as the model is loaded" in err
    assert out == "\nHere.\n"
    assert [s.text for s in scope.history()] == ["first", "Here.", "second", "Here."]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_while_the_model_loads_leaves(talk):
    def loading(messages):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return "never"

    with pytest.raises(SystemExit) as end:
        talk("first", reply=loading)
    assert end.value.code == 130


def test_the_arrow_keys_bring_back_what_is_stored_and_no_file_has_it_besides(tmp_path, monkeypatch, capfd):
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    key = "ghp_" + "abcdefghij" * 4

    def typed(keys: str) -> str:
        """What the memory was asked last when these keys were pressed in ``memos chat``."""
        with (
            create_pipe_input() as pipe,
            create_app_session(input=pipe, output=DummyOutput()),
            Memory.open(tmp_path / "m.db", llm=ScriptedLLM(lambda _: "Noted."), embedder="hash", redact=True) as memory,
        ):
            pipe.send_text(keys + "\r/quit\r")
            scope = memory.namespace("a").session("s")
            Chat(scope, budget=400).run(_edited_lines(scope))
            return scope.why()[0].query

    assert typed("My boat is blue.") == "My boat is blue."
    assert typed(f"My key is {key}") == "My key is [REDACTED:github-token]"
    assert typed("\x1b[A\x1b[A") == "My boat is blue."
    assert [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()] == []
    with Memory.open(tmp_path / "m.db", embedder="hash") as memory:
        memory.namespace("a").forget(1, 5)
    assert typed("\x1b[A") == "My key is [REDACTED:github-token]"
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("m.db")] == []


def test_a_file_of_what_was_typed_before_is_named_until_it_is_deleted(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from memory_os.cli.main import app

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    old = tmp_path / "memory_os" / "chat_history"
    old.parent.mkdir()
    old.write_text("+hello\n")
    flags = ["--store", str(tmp_path / "m.db"), "--embedder", "hash"]
    for there in (True, False):
        with Memory.open(tmp_path / "m.db", embedder="hash") as memory:
            memory.namespace("default").add("hello")
        ran = CliRunner().invoke(app, ["forget", "--everything", "--yes", *flags])
        assert (ran.exit_code, str(old) in ran.stderr) == (0, there)
        old.unlink(missing_ok=True)


def environment(tmp_path) -> dict[str, str]:
    cache = {name: os.environ[name] for name in ("MEMOS_CACHE_DIR", "HOME") if name in os.environ}
    return {
        **cache,
        "PATH": os.environ["PATH"],
        "MEMOS_STORE": str(tmp_path / "memory.db"),
        "XDG_DATA_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "MEMOS_REPLY_TOKENS": "24",
        "TERM": "xterm",
    }


@pytest.mark.slow
def test_the_next_process_remembers(tmp_path):
    """What the LLM is shown counts: what SmolLM2 makes of it is another thing on another processor."""

    def process(session, line):
        return subprocess.run(
            [MEMOS, "chat", "--json", "--session", session], input=line, env=environment(tmp_path), capture_output=True,
            text=True, check=True,
        )  # fmt: skip

    process("monday", "My sister's dog is called Biscuit.\n")
    second = process("tuesday", "What is the name of my sister's dog?\n")
    assert 1 in json.loads(second.stdout)["segments"]
    assert json.loads(second.stdout)["text"]
    assert "Traceback" not in second.stderr


class Terminal:
    """``memos chat`` at a terminal, as a person has it."""

    def __init__(self, tmp_path):
        self.leader, follower = pty.openpty()
        self.process = subprocess.Popen(
            [MEMOS, "chat"], stdin=follower, stdout=follower, stderr=follower, env=environment(tmp_path),
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(follower)
        self.seen = ""

    def type(self, keys: bytes) -> None:
        os.write(self.leader, keys)

    def until(self, words: str) -> None:
        end = time.monotonic() + 120
        while words not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.leader], [], [], 1)[0]:
                self.seen += os.read(self.leader, 4096).decode(errors="replace")
                if "\x1b[6n" in self.seen:  # the editor asks where the cursor is; a real terminal answers
                    self.seen = self.seen.replace("\x1b[6n", "")
                    self.type(b"\x1b[1;1R")
        self.seen = self.seen.split(words, 1)[1]


@pytest.fixture
def terminal(tmp_path):
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.leader)


@pytest.mark.slow
def test_a_terminal_gets_a_prompt_and_ctrl_c_and_ctrl_d_do_what_they_should(terminal):
    terminal.until("/help lists commands")
    terminal.until("you>")
    terminal.type(b"half a line\x03")
    terminal.until("you>")
    terminal.type(b"/session\r")
    terminal.until("Session default.")
    terminal.until("you>")
    terminal.type(b"\x04")
    assert terminal.process.wait(timeout=30) == 0


@pytest.mark.slow
def test_ctrl_c_while_libraries_are_imported_breaks_no_later_answer(terminal, tmp_path):
    terminal.until("you>")
    terminal.type(b"My cat is called Miso.\r")
    terminal.until("thinking")
    time.sleep(1)  # in the middle of importing torch and transformers
    terminal.type(b"\x03")
    terminal.until("stopping as soon as the model is loaded")
    terminal.until("stopped")
    terminal.until("you>")
    terminal.type(b"And hers is called Taro.\r")
    terminal.until("thinking")
    terminal.until("you>")
    terminal.type(b"/quit\r")
    assert terminal.process.wait(timeout=30) == 0
    with Memory.open(tmp_path / "memory.db", embedder="hash") as memory:
        trace, _ = memory.namespace("default").why()
    assert (trace.query, trace.outcome) == ("And hers is called Taro.", "answered")
