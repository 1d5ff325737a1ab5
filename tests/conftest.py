"""What every test gets: no network, no telemetry, nothing of the developer's own settings."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

# before anything imports a model library
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["ANONYMIZED_TELEMETRY"] = "False"

from pathlib import Path
from typing import Any

import hypothesis
import pytest

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def own_settings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty configuration; only the cache of converted models is shared with other runs."""
    for name in [name for name in os.environ if name.startswith("MEMOS_") and name != "MEMOS_CACHE_DIR"]:
        monkeypatch.delenv(name)
    folder = tmp_path_factory.mktemp("settings")
    config = folder / "config.toml"
    config.touch()
    monkeypatch.setenv("MEMOS_CONFIG", str(config))
    for place in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(place, str(folder / place))


class ChromaServer:
    """A real `chroma run`, which can be killed, stopped in its tracks, and started again on its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"chroma+http://127.0.0.1:{self.port}"

    def start(self) -> None:
        code = "import sys; from chromadb.cli.cli import app; sys.argv[0] = 'chroma'; app()"
        words = ["run", "--path", str(self.folder), "--host", "127.0.0.1", "--port", str(self.port)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, "-c", code, *words], **quiet)
        for _ in range(600):
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", self.port)):
                    return
            assert self.process.poll() is None, "chroma run has ended"
            time.sleep(0.1)
        raise AssertionError("chroma run does not listen")

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def client(self, **options: Any) -> Any:
        import chromadb
        from chromadb.config import Settings

        return chromadb.HttpClient("127.0.0.1", self.port, settings=Settings(anonymized_telemetry=False), **options)


@pytest.fixture(scope="session")
def chroma_server(tmp_path_factory: pytest.TempPathFactory):
    """One for all tests that leave it running."""
    server = ChromaServer(tmp_path_factory.mktemp("chroma"))
    yield server
    server.kill()


@pytest.fixture
def own_chroma(tmp_path: Path):
    """One that the test may kill."""
    server = ChromaServer(tmp_path / "server")
    yield server
    server.kill()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The project's real conversations and books, which lie next to the checkout and not in it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the shared data, and {folder} is not there")
    return folder


@pytest.fixture(scope="session")
def scripted_chat() -> Any:
    """A LangChain chat model that answers from a script, streams by words, and remembers what it was sent."""
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import AIMessage, AIMessageChunk
    from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
    from langchain_core.utils.function_calling import convert_to_openai_tool
    from pydantic import Field

    class ScriptedChat(BaseChatModel):
        replies: Any  # a function of the messages, or a list of replies: texts, messages and errors
        seen: list[Any] = Field(default_factory=list)
        options: list[dict[str, Any]] = Field(default_factory=list)
        temperature: float = 1.0

        @property
        def _llm_type(self):
            return "scripted"

        def bind_tools(self, tools, *, tool_choice=None, **kwargs):
            return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools], tool_choice=tool_choice, **kwargs)

        def _reply(self, messages, kwargs):
            self.seen.append(messages)
            self.options.append(kwargs)
            reply = self.replies(messages) if callable(self.replies) else self.replies.pop(0)
            if isinstance(reply, Exception):
                raise reply
            return AIMessage(reply) if isinstance(reply, str) else reply

        def _generate(self, messages, stop=None, run_manager=None, **kwargs):
            return ChatResult(generations=[ChatGeneration(message=self._reply(messages, kwargs))])

        def _stream(self, messages, stop=None, run_manager=None, **kwargs):
            reply = self._reply(messages, kwargs)
            for word in reply.text.split(" ") if reply.text else []:
                yield ChatGenerationChunk(message=AIMessageChunk(content=f"{word} "))
            if reply.tool_calls:
                chunks = [
                    {**call, "args": json.dumps(call["args"]), "index": n} for n, call in enumerate(reply.tool_calls)
                ]
                yield ChatGenerationChunk(message=AIMessageChunk(content="", tool_call_chunks=chunks))

    return ScriptedChat
