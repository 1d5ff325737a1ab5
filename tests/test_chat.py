"""``memos chat``: replies, commands, interruption, and being remembered by the next process."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memory_os import Memory
from memory_os.adapters.scripted import ScriptedLLM
from memory_os.cli.chat import Chat

MEMOS = Path(sys.executable).with_name("memos")


@pytest.fixture
def talk(tmp_path, capfd):
    """Say lines to a scripted LLM: ``(stdout, stderr, scope)``."""
    memories = []

    def say(*lines, reply=lambda messages: "Noted.", llm=None, **options):
        memory = Memory.open(tmp_path / "memory.db", llm=llm or ScriptedLLM(reply), embedder="hash")
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
    assert set(first) == {"text", "n_tokens", "segments", "trace"}


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
    def process(line):
        return subprocess.run(
            [MEMOS, "chat", "--json"], input=line, env=environment(tmp_path), capture_output=True, text=True, check=True
        )

    process("My sister's dog is called Biscuit.\n")
    second = process("What is the name of my sister's dog?\n")
    assert "Biscuit" in json.loads(second.stdout)["text"]
    assert "Traceback" not in second.stderr


@pytest.mark.slow
def test_a_terminal_gets_a_prompt_and_ctrl_c_and_ctrl_d_do_what_they_should(tmp_path):
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [MEMOS, "chat"], stdin=follower, stdout=follower, stderr=follower, env=environment(tmp_path), close_fds=True
    )
    os.close(follower)
    seen = ""

    def until(words: str) -> None:
        nonlocal seen
        end = time.monotonic() + 60
        while words not in seen:
            assert time.monotonic() < end, seen
            if select.select([leader], [], [], 1)[0]:
                seen += os.read(leader, 4096).decode(errors="replace")
                if "\x1b[6n" in seen:  # the editor asks where the cursor is; a real terminal answers
                    seen = seen.replace("\x1b[6n", "")
                    os.write(leader, b"\x1b[1;1R")
        seen = seen.split(words, 1)[1]

    until("/help lists commands")
    until("you>")
    os.write(leader, b"half a line\x03")
    until("you>")
    os.write(leader, b"/session\r")
    until("Session default.")
    until("you>")
    os.write(leader, b"\x04")
    assert process.wait(timeout=30) == 0
    os.close(leader)
