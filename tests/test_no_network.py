"""No network and no telemetry: every part runs in a process in which whatever leaves the machine raises.

That is asked of Python. What a library in C or Rust sends is counted by the kernel, where it lets us have a network
of our own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GUARD = """
import os, sys

def guard(event, args):
    # connect and sendto of a UNIX socket name a path; of every other family a tuple
    if event in ("socket.connect", "socket.sendto") and not isinstance(args[1], str | bytes):
        raise_(f"{event} {args[1]!r}")
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendmsg"):
        raise_(f"{event} {args!r}")
    if event in ("urllib.Request", "http.client.connect", "smtplib.connect", "ftplib.connect"):
        raise_(f"{event} {args!r}")

def raise_(what):
    with open(os.environ["GUARD_LOG"], "a") as log:  # also of what a library catches
        log.write(what + "\\n")
    raise AssertionError("the network was used: " + what)

sys.addaudithook(guard)
"""

TALK = """
from memory_os import Memory
with Memory.open("memory.db", llm="smollm2", reply_tokens=8) as memory:
    scope = memory.namespace("a").session("s")
    scope.add("My cat is called Miso.")
    open("notes.md", "w").write("# Notes\\n\\nThe kite is red.\\n")
    assert scope.ingest("notes.md")[0] > 0
    assert scope.search("What is the cat called?", k=1)[0].segment.text == "My cat is called Miso."
    assert scope.chat("What is my cat called?").text
    assert "Miso" in str(scope.context("What is my cat called?", budget=400).messages)
    scope.items.put(("p",), "k", {"n": 1}, texts=[("n", "a boat")])
    assert scope.items.search(query="a ship")
    assert not any(memory.check().values())
    scope.export("out.jsonl")
    scope.forget(everything=True)
"""

CHROMA = """
from memory_os import Memory
with Memory.open("chroma.db", embedder="hash", vectors="chroma") as memory:
    memory.namespace("a").add("My cat is called Miso.")
    assert memory.namespace("a").nearest("cat")[0].segment.seq == 1
    from chromadb.config import Settings
    assert memory.parts.index._client.get_settings().anonymized_telemetry is False
import sys
assert "posthog" not in sys.modules or sys.modules["posthog"].disabled
"""

LANGCHAIN = """
from langchain.agents import create_agent
from langchain_core.documents import Document
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage
from memory_os import Memory
from memory_os.adapters.bytestore import MemoryByteStore
from memory_os.adapters.langchain import (
    MemoryChatHistory, MemoryChatModel, MemoryRetriever, MemoryVectorStore, memory_tools,
)
from memory_os.adapters.langgraph import MemoryStore
from memory_os.adapters.middleware import MemoryMiddleware

def model():
    return GenericFakeChatModel(messages=iter([AIMessage("Noted."), AIMessage("Noted.")]))

with Memory.open("langchain.db", embedder="hash") as memory:
    named = {"namespace": ("a",)}
    MemoryVectorStore(memory, **named).add_documents([Document("The kite is red.")])
    assert MemoryRetriever(memory=memory, **named).invoke("kite")
    assert MemoryChatModel(model=model(), memory=memory, session="s", **named).invoke("The boat is blue.")
    agent = create_agent(model(), middleware=[MemoryMiddleware(memory, session="s", **named)])
    assert agent.invoke({"messages": [HumanMessage("And the kite?")]})
    assert memory_tools(memory, **named)[1].invoke({"query": "kite"})
    assert MemoryChatHistory(memory, session="s", **named).messages
    MemoryStore(memory, **named).put(("p",), "k", {"text": "a boat"})
    assert MemoryStore(memory, **named).search(("p",), query="a ship")
    MemoryByteStore(memory, **named).mset([("k", b"v")])
"""

IMPORT = """
import importlib, pathlib, memory_os
root = pathlib.Path(memory_os.__file__).parents[1]
for folder in ("memory_os", "stores", "adapters", "controllers", "cli"):
    for file in sorted((root / folder).glob("*.py")):
        if file.stem in ("__main__",):
            continue
        name = "memory_os" if folder == "memory_os" else f"memory_os.{folder}"
        importlib.import_module(name if file.stem == "__init__" else f"{name}.{file.stem}")
"""

COMMANDS = [
    ["ingest", "chat.jsonl", "-s", "monday"],
    ["search", "the cat", "--json"],
    ["context", "What is my cat called?", "--budget", "400", "--json"],
    ["history"],
    ["stats", "--json"],
    ["doctor", "--json"],
    ["config"],
    ["export", "-"],
    ["forget", "1", "--yes"],
]


ALONE = """
ip link set lo up && ip route add local default dev lo || exit 77
ip -6 route add local default dev lo 2>/dev/null
"$@"
code=$?
awk '$1 == "lo:" { print $11 }' /proc/net/dev > "$SENT"
exit $code
"""
"""A network of one machine, in which every address is this machine's own: whoever sends anything is counted."""


def run(tmp_path: Path, *words: str, within: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Python under the guard, without a variable that turns any telemetry off."""
    quiet = ("TELEMETRY", "DO_NOT_TRACK", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "POSTHOG")
    env = {name: value for name, value in os.environ.items() if not any(word in name for word in quiet)}
    guard = tmp_path / "guard"
    guard.mkdir(exist_ok=True)
    (guard / "sitecustomize.py").write_text(GUARD)
    paths = [str(guard), *filter(None, [env.get("PYTHONPATH")])]
    env |= {"PYTHONPATH": os.pathsep.join(paths), "GUARD_LOG": str(tmp_path / "used"), "MEMOS_STORE": "memory.db"}
    env |= {"SENT": str(tmp_path / "sent")}
    whole = [*within, sys.executable, *words]
    return subprocess.run(whole, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)


def run_alone(tmp_path: Path, code: str) -> tuple[subprocess.CompletedProcess[str], int]:
    """The same in a network of its own, and how many packets were sent there, by whatever part of the process."""
    for unshare in (["unshare", "-rn"], ["unshare", "-n"]):
        try:
            works = subprocess.run(
                [*unshare, "sh", "-c", ALONE, "sh", "true"], capture_output=True, env={**os.environ, "SENT": os.devnull}
            )
        except FileNotFoundError:
            continue
        if works.returncode == 0:
            done = run(tmp_path, "-c", code, within=(*unshare, "sh", "-c", ALONE, "sh"))
            return done, int((tmp_path / "sent").read_text())
    pytest.skip("needs a network namespace: unshare -rn, or -n for root, and ip")


def assert_nothing_left(tmp_path: Path, done: subprocess.CompletedProcess[str]) -> None:
    used = tmp_path / "used"
    assert not used.exists(), used.read_text()
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "attempt",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9/')",
        "import httpx; httpx.get('http://127.0.0.1:9/')",
        "import asyncio; asyncio.run(asyncio.open_connection('127.0.0.1', 9))",
        "import threading, socket; threading.Thread(target=socket.create_connection, args=(('127.0.0.1', 9),)).start()",
        "import socket\ntry: socket.getaddrinfo('localhost', 80)\nexcept BaseException: pass",
    ],
)
def test_the_guard_catches_what_leaves_also_where_it_is_swallowed(tmp_path, attempt):
    run(tmp_path, "-c", attempt)
    assert "socket" in (tmp_path / "used").read_text() or "urllib" in (tmp_path / "used").read_text()


def test_the_guard_lets_a_unix_socket_be(tmp_path):
    code = "import socket; a, b = socket.socketpair(); a.send(b'x'); assert b.recv(1) == b'x'"
    assert_nothing_left(tmp_path, run(tmp_path, "-c", code))


@pytest.mark.slow
@pytest.mark.parametrize("script", [IMPORT, TALK, CHROMA, LANGCHAIN], ids=["import", "talk", "chroma", "langchain"])
def test_nothing_leaves_the_machine(tmp_path, script):
    assert_nothing_left(tmp_path, run(tmp_path, "-c", script))


@pytest.mark.slow
def test_the_command_line_keeps_to_itself(tmp_path):
    lines = [{"role": "user", "content": "My cat is called Miso."}, {"role": "assistant", "content": "Noted."}]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    # one process for all: what is asked is whether anything leaves, and importing takes the time
    code = """
import json, sys
from memory_os.cli.main import app
for words in json.loads(sys.argv[1]):
    try:
        app(words)
    except SystemExit as end:
        assert not end.code, (words, end.code)
"""
    done = run(tmp_path, "-c", code, json.dumps(COMMANDS))
    assert_nothing_left(tmp_path, done)
    assert "Miso" in done.stdout


BY_C = """
import ctypes, socket, struct
libc = ctypes.CDLL(None, use_errno=True)  # as a library in C or Rust does it, which Python's audit does not see
one = libc.socket(socket.AF_INET, socket.SOCK_STREAM, 0)
libc.connect(one, struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", 443, bytes([192, 0, 2, 1])), 16)
"""


def test_what_c_sends_is_counted_where_the_guard_does_not_see_it(tmp_path):
    done, n_sent = run_alone(tmp_path, BY_C)
    assert_nothing_left(tmp_path, done)
    assert n_sent > 0
    assert run_alone(tmp_path, "pass")[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("script", [TALK, CHROMA, LANGCHAIN], ids=["talk", "chroma", "langchain"])
def test_no_library_in_any_language_sends_a_packet(tmp_path, script):
    done, n_sent = run_alone(tmp_path, script)
    assert_nothing_left(tmp_path, done)
    assert n_sent == 0
