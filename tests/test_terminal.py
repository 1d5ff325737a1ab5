"""Nothing that was stored, imported, said by a model or typed steers the terminal, whatever the command."""

import contextlib
import io
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from memory_os import Memory
from memory_os.adapters.scripted import ScriptedLLM
from memory_os.cli.chat import Chat
from memory_os.cli.main import COMMANDS, run

EVIL = "\x1b]0;PWNED\x07\x1b[5;7;41mRED\x9b31m\x7f[/b][bold]\x08\r"
SGR = "\x1b[5;7;41m"
OURS = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[2K|\x1b\[1A")  # rich's colours, and its moving bars
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Terminal(io.StringIO):
    """What a command takes for a terminal, and shows on it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def colours(monkeypatch):
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def shown_by(act) -> str:
    """All that is printed on either stream, which must be harmless."""
    screen = Terminal()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen), contextlib.suppress(SystemExit):
        act()
    text = screen.getvalue()
    assert SGR not in text
    rest = OURS.sub("", text).replace("\r", "")  # with which a bar goes back to the margin
    assert not CONTROL.search(rest), (CONTROL.findall(rest), text[-300:])
    assert "bug in memory_os" not in text
    return text


@pytest.fixture(scope="module")
def server():
    """An LLM that says what it should not."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            chunk = {"choices": [{"delta": {"content": "Noted. " + EVIL}, "finish_reason": "stop"}]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1#model"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store in which every text is hostile, its export, and files to read."""
    folder = tmp_path_factory.mktemp("terminal")
    with Memory.open(folder / "first.db", llm=ScriptedLLM(lambda _: "Noted."), embedder="hash") as memory:
        scope = memory.namespace("default")
        scope.session("s" + EVIL).add("The cat is grey. " + EVIL, speaker="Ana" + EVIL, metadata={EVIL: EVIL})
        scope.session("t" + EVIL).chat("Which cat? " + EVIL)
        scope.items.put(("p" + EVIL,), "k" + EVIL, {EVIL: EVIL}, texts=[("t", EVIL)])
        lines = io.StringIO()
        scope.export(lines)
    records = [json.loads(line) for line in lines.getvalue().splitlines()]
    for trace in (record["trace"] for record in records if "trace" in record):
        trace |= {
            "notes": [EVIL], "controller": EVIL, "error": EVIL, "llm": EVIL, "timings_ms": {EVIL: 1.0},
            "calls": [{"purpose": EVIL, "verdict": EVIL, "answer": EVIL, "prompt_tokens": 1, "reply_tokens": 1}],
        }  # fmt: skip
        trace["account"]["tokenizer"] = EVIL
        for entry in trace["ledger"]:
            entry |= {"signals": {EVIL: 1.0, "[/b]": 2.0}, "flags": ["[/x]", EVIL], "contributions": {}}
        trace["ledger"].append({**trace["ledger"][0], "contributions": {EVIL: 2.0}, "rank": 2, "segment_id": EVIL})
    (folder / "evil.jsonl").write_text("\n".join(map(json.dumps, records)))
    with Memory.open(folder / "memory.db", embedder="hash") as memory:
        memory.namespace("default").import_(folder / "evil.jsonl")
        memory.namespace("evil" + EVIL).add("x")
    picks = [{"id": EVIL, "messages": [{"role": "user", "content": "x"}]}, {"id": "b", "messages": []}]
    (folder / "picks.json").write_text(json.dumps(picks))
    (folder / "role.json").write_text(json.dumps([{"role": EVIL, "content": "x"}]))
    (folder / "broken.jsonl").write_text('{"memory_os_export": 1}\n{"trace": {' + json.dumps(EVIL) + ": 1}}")
    (folder / "story.txt").write_text(f"The cat {EVIL} is grey. " * 20)
    return folder


WALK = [
    ["chat"], ["chat", "--json"],
    ["ask", "story.txt", "Which cat?"],
    ["context", "cat", "--why"], ["context", "cat", "--json"], ["context", EVIL],
    ["search", "cat"], ["search", "cat", "--json"], ["search", EVIL],
    ["why"], ["why", "--expect", "1"], ["why", "--json"], ["why", EVIL], ["why", "--expect", EVIL],
    ["confirm", "--answer", EVIL], ["confirm", "--json", "--answer", "x"], ["confirm", "--by", EVIL],
    ["history"], ["history", "--json"], ["history", "-s", EVIL],
    ["ingest", "picks.json", "--pick", "zz"], ["ingest", "role.json"], ["ingest", "story.txt", "--format", EVIL],
    ["ingest", "picks.json", "--source", EVIL], ["ingest", EVIL],
    ["summarize", "story.txt"], ["summarize", "story.txt", "--json"],
    ["forget", "1", "--preview"], ["forget", "1", "--preview", "--json"], ["forget", "--whole-session", EVIL, "--yes"],
    ["forget", EVIL, "--yes"], ["forget", "--after", EVIL, "--yes"],
    ["retain", "--days", "0.000001", "--preview", "--all"],
    ["export", "-"], ["export", "out" + EVIL], ["export", "/nowhere/" + EVIL],
    ["export-alr2", "-"], ["export-alr2", "out.jsonl", "--exclude", EVIL],
    ["import", "evil.jsonl", "-n", "copy"], ["import", "broken.jsonl"], ["import", EVIL],
    ["stats"], ["stats", "--json"], ["stats", "-n", EVIL],
    ["bank", "--drop"],
    ["doctor"], ["doctor", "--deep"], ["doctor", "--json"],
    ["worker", "--until-idle", "--no-summaries"], ["worker", "--status"], ["worker", "--status", "--json"],
    ["migrate", "memory.db", "copy.db"], ["migrate", "first.db", "copy.db", "--verify-only"],
    ["migrate", "first.db", "copy.db", "--verify-only", "--json"], ["migrate", EVIL, "x.db"],
    ["migrate", "memory.db", "nowhere/" + EVIL], ["migrate", "memory.db", "x.db", "--vectors", EVIL],
    ["config", "-n", EVIL], ["config", "--json", "-n", EVIL],
    ["stats", "--store", "nowhere/" + EVIL], ["search", "cat", "--embedder", EVIL], ["chat", "--controller", EVIL],
]  # fmt: skip


def test_the_walk_goes_by_every_command():
    assert {words[0] for words in WALK} == COMMANDS.keys()


def test_no_command_passes_a_control_on_to_the_terminal(folder, server, monkeypatch):
    monkeypatch.chdir(folder)
    for name, value in {"STORE": "memory.db", "EMBEDDER": "hash", "TOKENIZER": "cl100k_base", "LLM": server}.items():
        monkeypatch.setenv(f"MEMOS_{name}", value)
    saw = {}
    for words in WALK:
        monkeypatch.setattr(sys, "argv", ["memos", *words])
        monkeypatch.setattr(sys, "stdin", io.StringIO("cat?\n/why\n" if words[0] == "chat" else ""))
        saw[" ".join(words)] = shown_by(run)
    compared = "migrate first.db copy.db --verify-only"
    for words in ("why", "context cat --why", "history", "export -", "chat", "summarize story.txt", compared):
        assert "PWNED" in saw[words], words  # it was shown, and did nothing
    assert "\x1b[" in saw["why"]  # colours are there


def test_no_line_of_the_chat_passes_a_control_on_to_the_terminal(folder):
    with Memory.open(folder / "memory.db", llm=ScriptedLLM(lambda _: EVIL), embedder="hash") as memory:
        trace = next(iter(memory.parts.store.traces(("default",)))).id
        lines = [
            "Which cat?", "/why", f"/why {trace}", "/memory", "/evidence", f"/confirm {EVIL}", f"/search {EVIL}",
            f"/forget {EVIL}", "/budget", f"/budget {EVIL}", f"/session {EVIL}", f"/export {folder}/o{EVIL}", "/help",
            f"/{EVIL}",
        ]  # fmt: skip
        scope = memory.namespace("default").session("chat")
        text = shown_by(lambda: Chat(scope, budget=2000).run(iter(lines)))
    assert text.count("PWNED") > 10
