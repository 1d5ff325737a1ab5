"""A memory's life: forked, closed, exported while others write."""

import ast
import asyncio
import json
import os
import subprocess
import sys
import threading

import pytest

from memory_os import AsyncMemory, Memory, StoreError
from memory_os.adapters.scripted import HashEmbedder, ScriptedLLM
from memory_os.protocols import ItemChange
from memory_os.types import NewSegment

# -- fork --------------------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


def forked(child) -> str:
    """What the child gives back, or the error that it raised; it leaves without any clean-up."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            told = repr(child())
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        os.write(write, told.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as end:
        told = end.read()
    os.waitpid(pid, 0)
    return told


@pytest.mark.parametrize("last", ["parent", "child", "nobody"])
@pytest.mark.parametrize("anew", [False, True])
def test_what_a_forked_child_stores_is_there_whoever_closes_last(place, last, anew):
    memory = Memory.open(place, embedder="hash")
    memory.namespace("a").add("before")
    begun, go_on = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        own = Memory.open(place, embedder="hash") if anew else memory
        own.namespace("a").add("of the child, first")
        os.write(begun[1], b"x")
        os.read(go_on[0], 1)
        for n in range(5):
            own.namespace("a").add(f"of the child, {n}")
        if last == "child":
            own.close()
        os._exit(0)
    os.read(begun[0], 1)
    memory.namespace("a").add("of the parent")
    if last != "parent":
        memory.close()
    os.write(go_on[1], b"x")
    os.waitpid(pid, 0)
    memory.close()
    for end in (*begun, *go_on):
        os.close(end)
    with Memory.open(place, embedder="hash") as memory:
        assert len(memory.namespace("a").history(100)) == 8
        found = {kind: rows for kind, rows in memory.check(deep=True).items() if rows}
        assert found in ({}, {"settings": ["fsync is off"]})  # the tests' server


def test_a_fork_while_a_thread_is_at_work_is_one_clear_error_in_the_child(tmp_path):
    with Memory.open(tmp_path / "memory.db", embedder="hash") as memory:
        memory.namespace("a").add("before")
        with memory.parts.store.snapshot():
            assert "in another thread when this process was forked" in forked(lambda: memory.namespace("a").add("lost"))
            anew = forked(lambda: Memory.open(tmp_path / "memory.db", embedder="hash"))
            assert "in another thread when this process was forked" in anew
            assert forked(memory.close) == "None"
        assert memory.namespace("a").add("the parent goes on").seq == 2


def test_a_child_leaves_the_connections_to_a_server_to_its_parent(postgres_server):
    """In the midst of a snapshot, and while a thread is at work: what they wait for would be read by the other."""
    with Memory.open(postgres_server.url(postgres_server.new()), embedder="hash") as memory:
        scope = memory.namespace("a")
        scope.add("before")

        def used() -> set[int]:
            """The server's processes at the other ends of the connections that lie ready."""
            database = memory.parts.store.database
            with database.read() as one, database.write() as other:
                return {each.exec_driver_sql("SELECT pg_backend_pid()").scalar_one() for each in (one, other)}

        assert used() == used()
        assert used().isdisjoint(ast.literal_eval(forked(used)))
        begun, go_on = threading.Event(), threading.Event()

        def work() -> None:
            with memory.parts.store.database.write(("b",)):
                begun.set()
                go_on.wait()

        thread = threading.Thread(target=work)
        thread.start()
        begun.wait()
        with memory.parts.store.snapshot():
            for n in range(3):
                assert forked(lambda n=n: scope.add(f"of child {n}").seq) == str(n + 2)
                assert forked(memory.close) == "None"
                assert len(scope.history()) == 1
        go_on.set()
        thread.join()
        assert scope.add("of the parent").seq == 5
        assert len(scope.history()) == 5


OPEN_CHROMA = """
import sys
from memory_os import Memory
try:
    Memory.open(sys.argv[1], embedder="hash", vectors="chroma").close()
except Exception as error:
    print(type(error).__name__)
"""


def test_a_forked_child_leaves_the_chroma_index_to_its_owner(tmp_path):
    path = tmp_path / "memory.db"
    with Memory.open(path, embedder="hash", vectors="chroma") as memory:
        scope = memory.namespace("a")
        scope.add("one")
        assert scope.search("one")
        assert "belongs to the process that opened it" in forked(lambda: scope.search("one"))
        assert forked(memory.close) == "None"
        other = subprocess.run([sys.executable, "-c", OPEN_CHROMA, str(path)], capture_output=True, text=True)
        assert other.stdout == "StoreLockedError\n"
        assert scope.search("one")


def test_a_forked_child_leaves_the_connections_to_a_chroma_server_to_its_parent(tmp_path, chroma_server):
    with Memory.open(tmp_path / "memory.db", embedder="hash", vectors=chroma_server.url) as memory:
        scope = memory.namespace("a")
        one = scope.add("one")
        assert scope.search("one")
        for verb in (
            lambda: scope.search("one"),
            lambda: scope.forget(one.id),
            lambda: memory.parts.index.sync(("a",)),
        ):
            assert "belong to the process that opened them" in forked(verb)
        assert forked(memory.close) == "None"
        assert scope.nearest("one") == []  # the child has forgotten it
        assert memory.parts.index.notes == ()


def test_background_work_begins_anew_in_a_child(tmp_path):
    path = tmp_path / "memory.db"
    with Memory.open(path, embedder=HashEmbedder(64)) as memory:
        memory.namespace("a").add_many([NewSegment(f"kite {n}", "s") for n in range(1000)])
    with Memory.open(path, embedder=HashEmbedder(96), llm=ScriptedLLM(["one two"])) as memory:
        stream = memory.namespace("a").stream("kite")
        next(stream)  # a turn holds the thread back

        def child():
            memory.namespace("a").search("kite")
            memory.parts.vectors.join(30)
            return memory.pending()

        with memory.parts.vectors._change:  # and its lock is held
            assert forked(child) == "{}"
        stream.close()


# -- closed ------------------------------------------------------------------------------------------------------------

VERBS = {
    "add": lambda scope: scope.add("two"),
    "search": lambda scope: scope.search("one"),
    "nearest": lambda scope: scope.nearest("one"),
    "context": lambda scope: scope.context("one"),
    "chat": lambda scope: scope.chat("one"),
    "forget": lambda scope: scope.forget(1),
    "history": lambda scope: scope.history(),
    "export": lambda scope: scope.export(sys.stderr),
    "items": lambda scope: scope.items.put(("p",), "k", {}),
    "drop_bank": lambda scope: scope.drop_bank(),
    "stats": lambda scope: scope.stats(),
}


@pytest.mark.parametrize("vectors", ["exact", "chroma", "server"])
def test_a_closed_memory_says_so_and_writes_nothing(place, tmp_path, vectors, request):
    if vectors == "server":
        vectors = request.getfixturevalue("chroma_server").url
    if vectors == "chroma":
        place = tmp_path / "memory.db"
    memory = Memory.open(place, embedder="hash", vectors=vectors, llm=ScriptedLLM(lambda messages: "Noted."))
    scope = memory.namespace("a")
    scope.add("one")
    scope.search("one")
    memory.close()
    memory.close()  # does no harm
    for name, verb in VERBS.items():
        if name == "drop_bank" and memory.parts.bank is None:
            continue  # a server has no place for one
        with pytest.raises(StoreError, match="was closed; open the memory again"):
            verb(scope)
    for verb in (
        memory.namespaces,
        memory.check,
        memory.repair,
        memory.pending,
        lambda: memory.parts.index.sync(("a",)),
    ):
        with pytest.raises(StoreError, match="was closed; open the memory again"):
            verb()
    assert isinstance(place, str) or not [file.name for file in place.parent.iterdir() if file.name.endswith("-wal")]
    with Memory.open(place, embedder="hash", vectors=vectors) as memory:
        assert len(memory.namespace("a").history()) == 1


# -- one moment --------------------------------------------------------------------------------------------------------


class Slow:
    """A file that lets another write after the first lines."""

    def __init__(self, meanwhile) -> None:
        self.lines: list[str] = []
        self.meanwhile = meanwhile

    def writelines(self, lines):
        for n, line in enumerate(lines):
            self.lines.append(line)
            if n == 3:
                thread = threading.Thread(target=self.meanwhile)
                thread.start()
                thread.join()


def test_an_export_is_of_one_moment(place, tmp_path):
    llm = ScriptedLLM(lambda messages: "Noted.")
    with Memory.open(place, embedder="hash", llm=llm) as memory:
        scope = memory.namespace("a")

        def price(n: int) -> None:
            scope.replace_many([NewSegment(f"the price of {k} is {n}", "s", key=k) for k in ("tea", "milk")])
            scope.items.apply([ItemChange(("p",), "price", {"n": n})])

        price(10)
        scope.add_many([NewSegment(f"filler {n}", "s") for n in range(1500)], embed=False)

        def meanwhile() -> None:
            price(99)
            scope.chat("What is the price?")

        file = Slow(meanwhile)
        assert scope.export(file) == 1502
        assert scope.stats()["segments"] == 1504
        records = [json.loads(line) for line in file.lines]
        assert [r["segment"]["text"] for r in records if r.get("segment", {}).get("key") == "tea"] == [
            "the price of tea is 10"
        ]
        assert [r["item"]["value"] for r in records if "item" in r] == [{"n": 10}]
        assert not [r for r in records if "trace" in r]
    with Memory.open(tmp_path / "b.db", embedder="hash") as memory:
        assert tuple(memory.namespace("a").import_(file.lines)) == (1502, 0)


# -- asyncio -----------------------------------------------------------------------------------------------------------


def test_what_was_cancelled_has_ended_when_the_memory_is_closed(tmp_path):
    go = threading.Event()

    class Gated(HashEmbedder):
        def embed_documents(self, texts):
            go.wait(30)
            return super().embed_documents(texts)

    async def cancelled() -> None:
        memory = await AsyncMemory.open(tmp_path / "memory.db", embedder=Gated(64))
        adding = asyncio.create_task(memory.namespace("a").add_many([NewSegment("kite", "s")]))
        await asyncio.sleep(0.2)
        adding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await adding
        closing = asyncio.create_task(memory.close())
        await asyncio.sleep(0.2)
        assert not closing.done()
        go.set()
        await closing

    asyncio.run(cancelled())
    with Memory.open(tmp_path / "memory.db", embedder=HashEmbedder(64)) as memory:
        assert memory.pending() == {}
        assert len(memory.namespace("a").history()) == 1


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_turn_that_is_cancelled_again_and_again_keeps_what_was_said(tmp_path, times):
    said, go = threading.Event(), threading.Event()

    class Gated(ScriptedLLM):
        def generate(self, *args, **kwargs):
            yield "one "
            said.set()
            go.wait(30)
            yield "two "
            yield "three"

    async def cancelled() -> None:
        async with AsyncMemory.open(tmp_path / "memory.db", embedder="hash", llm=Gated([])) as memory:
            turn = asyncio.create_task(memory.namespace("a").chat("hi"))
            await asyncio.to_thread(said.wait, 30)
            for _ in range(times):
                turn.cancel()
                await asyncio.sleep(0.05)
            go.set()
            with pytest.raises(asyncio.CancelledError):
                await turn
            await memory.calls.ended()
            assert memory.memory.parts.vectors._n_turns == 0

    asyncio.run(cancelled())
    with Memory.open(tmp_path / "memory.db", embedder="hash") as memory:
        asked, reply = memory.namespace("a").history()
        assert (asked.text, reply.metadata["outcome"]) == ("hi", "interrupted")
        assert reply.text.startswith("one two")
