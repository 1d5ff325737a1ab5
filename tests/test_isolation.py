"""Nothing crosses a namespace: hostile labels, every verb, every door, with a positive control beside each absence."""

import asyncio
import inspect
import io
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from langchain.agents import create_agent
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool

from memory_os import AsyncMemory, Memory
from memory_os.adapters import bytestore, langchain, langgraph, middleware
from memory_os.adapters.bytestore import MemoryByteStore
from memory_os.adapters.langchain import (
    MemoryChatHistory,
    MemoryChatModel,
    MemoryRetriever,
    MemoryVectorStore,
    memory_tools,
)
from memory_os.adapters.langgraph import MemoryStore
from memory_os.adapters.middleware import MemoryMiddleware
from memory_os.adapters.scripted import ScriptedLLM
from memory_os.aio import AsyncItems, AsyncScope
from memory_os.config import format_labels, parse_labels
from memory_os.errors import CapabilityError, NamespaceError, UnknownNameError
from memory_os.items import Items
from memory_os.memory import Scope
from memory_os.stores import manifest
from memory_os.stores.bank import SegmentBank
from memory_os.types import MAX_LABEL, BankOptions, Conversation, NewSegment

MINE, THEIRS = "mark-of-mine", "mark-of-theirs"
MARK = re.compile(r"mark-of-\w+")
ASKED = "Where is the kite with the mark?"

# -- pairs of namespaces that somebody could take for one another ------------------------------------------------------

PAIRS = [
    (("alice",), ("alice ",)),
    (("alice",), ("alic",)),
    (("alice",), ("Alice",)),
    (("alice",), ("%",)),
    (("alice",), ("a____",)),
    (("a*",), ("a?",)),
    (("acme", "alice"), ("acme",)),
    (("acme", "alice"), ("acme/alice",)),
    (("acme", "alice"), ("alice", "acme")),
    (("acme", "alice"), ("acme", "alice", "alice")),
    (("ab", "c"), ("a", "bc")),
    (("a", "b"), ('a", "b',)),
    (("a", "b"), ('a","b',)),
    (('["a"]',), ("a",)),
    (("'; DROP TABLE segments; --",), ("'; DROP TABLE segments; -- ",)),
    (("..",), ("../..",)),
    ((".",), ("./",)),
    (("é",), (unicodedata.normalize("NFD", "é"),)),
    (("alice",), ("\u0430lice",)),  # the first letter is Cyrillic
    (("alice",), ("ali\u200bce",)),
    (("\u0131",), ("I",)),
    (("x" * MAX_LABEL,), ("x" * (MAX_LABEL - 1) + "y",)),
    (("1",), ("01",)),
    (("null",), ("None",)),
    (("default",), ("default", "default")),
    (("\U0001f600",), ("\U0001f601",)),
    (("a\nb",), ("a b",)),
]
HOSTILE = "ab%_./\\\"'[], \t\u00e9e\u0301\u0430\u200b\u0131I\u5200-*?:;~"
LABEL = st.text(alphabet=HOSTILE, min_size=1, max_size=6).filter(str.strip)
LABELS = st.lists(LABEL, min_size=1, max_size=3).map(tuple)


def _edits(labels: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Namespaces that are one small change away."""
    first, rest = labels[0], labels[1:]
    near = [
        (first + "x", *rest), (first[:-1], *rest), (first.swapcase(), *rest), (*labels, first), labels[:-1],
        ("/".join(labels),), ('", "'.join(labels),), ("".join(labels),), tuple("".join(labels)[:16]), labels[::-1],
        (unicodedata.normalize("NFD", first), *rest), (unicodedata.normalize("NFC", first), *rest),
        (first.replace("a", "\u0430"), *rest), (first.replace("%", "_"), *rest), (first.strip(), *rest),
        (json.dumps(labels, ensure_ascii=False),), (format_labels(labels),),
    ]  # fmt: skip
    return [each for each in near if each != labels and each and all(label.strip() for label in each)]


@st.composite
def near_pairs(draw: st.DrawFn) -> tuple[tuple[str, ...], tuple[str, ...]]:
    labels = draw(LABELS)
    return labels, draw(st.sampled_from(_edits(labels)))


# -- what is kept in both ----------------------------------------------------------------------------------------------


def echo(messages: Any) -> str:
    """A reply with the first mark that stands in the prompt."""
    found = [mark for message in messages for mark in MARK.findall(str(message.get("content", message)))]
    return f"It is the {found[0]}." if found else "I was told of none."


def steady(counts: dict[str, Any]) -> dict[str, Any]:
    """Counts of a namespace, without those of the file that it shares."""
    return {name: value for name, value in counts.items() if not name.startswith("file")}


class World:
    """One memory, emptied for each pair, and what was stored in it."""

    def __init__(self, folder: Path, place: Path | str, vectors: str) -> None:
        self.folder = folder
        self.path = place
        self.llm = ScriptedLLM(echo)
        self.memory = Memory.open(self.path, llm=self.llm, embedder="hash", vectors=vectors, budget=1500)
        self.told: dict[str, dict[str, Any]] = {}
        self.n_files = 0
        self.n_examples: dict[str, int] = {}

    def enough(self) -> bool:
        """Whether a test has had its example by hand, and needs no more: on a server, where each takes seconds.

        How namespaces are told from one another is the same there, by the labels whole.
        """
        name = os.environ["PYTEST_CURRENT_TEST"]
        self.n_examples[name] = self.n_examples.get(name, 0) + 1
        return isinstance(self.path, str) and self.n_examples[name] > 1

    def plant(self, pair: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
        """The same in both, under the same sessions, keys and paths, but for the mark."""
        for labels in self.memory.namespaces():
            self.memory.namespace(*labels).forget(everything=True)
            self.memory.parts.index.drop(labels)
        for labels, mark in zip(pair, (MINE, THEIRS), strict=True):
            self.told[mark] = self._planted(self.memory.namespace(*labels), mark)

    def _planted(self, scope: Scope, mark: str) -> dict[str, Any]:
        session = scope.session("s")
        told = session.add(f"The kite has the {mark}.", speaker="Ada", metadata={"of": mark})
        scope.replace_many([NewSegment(f"A boat has the {mark} too.", "s", key="key", kind="document")])
        self.n_files += 1  # what was forgotten is not taken in again from where it came
        file = self.folder / f"notes-{self.n_files}.txt"
        file.write_text(f"The notes of the kite say {mark}.\n\n" * 3)
        summary = scope.summarize(file)
        reply = session.chat(ASKED)
        scope.confirm(evidence=[told.id])
        scope.items.put(("p",), "k", {"is": mark}, texts=[("is", f"the kite of {mark}")])
        epoch = self.memory.parts.store.state(scope.labels, self.memory.parts.embedder.fingerprint).epoch
        self.memory.parts.store.put_scores(scope.labels, {"score": mark}, epoch=epoch)
        assert reply.segment
        counts = {name: steady(count(scope)) for name, count in COUNTS.items()}
        return {
            "counts": counts,
            "scope": scope, "id": told.id, "seq": told.seq, "trace": reply.trace.id, "reply": reply.segment.id,
            "summary": summary.levels[-1][0].id, "query": reply.trace.query_id, "n": len(scope.history(99)),
        }  # fmt: skip

    def rows(self, labels: tuple[str, ...]) -> dict[str, list[Any]]:
        """Every row of a namespace, table by table, as the database has it."""
        told = {"labels": json.dumps(labels, ensure_ascii=False)}
        with self.memory.parts.store.database.read() as connection:
            ns = connection.execute(sa.text("SELECT id FROM namespaces WHERE labels = :labels"), told).scalar_one()
            found = {}
            for table in sa.inspect(connection).get_table_names():
                query = f"SELECT * FROM {table}"
                # parts of tables that are looked at as a whole, and pgvector's, which a read brings up to date
                skipped = re.search(r"_p\d+$|^near", table)
                if not skipped and "namespace_id" in tuple(connection.exec_driver_sql(f"{query} LIMIT 0").keys()):
                    mine = connection.execute(sa.text(f"{query} WHERE namespace_id = :ns"), {"ns": ns})
                    found[table] = sorted(map(tuple, mine), key=repr)
        return found


IN_A_FILE = ["exact", "chroma"]


@pytest.fixture(
    scope="module", params=[*IN_A_FILE, "exact on postgres", pytest.param("pgvector", marks=pytest.mark.slow)]
)
def world(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("isolation")
    place: Path | str = folder / "memory.db"
    if request.param not in IN_A_FILE:
        server = request.getfixturevalue("postgres_server")
        place = server.url(server.new())
    made = World(folder, place, request.param.split()[0])
    yield made
    made.memory.close()


# -- every verb, by name: one that is new and not here fails the test --------------------------------------------------


def _exported(scope: Any, verb: str, **options: Any) -> Any:
    file = io.StringIO()
    done = getattr(scope, verb)(file, **options)
    if inspect.isawaitable(done):
        asyncio.run(_awaited(done))
    return file.getvalue()


async def _awaited(coroutine: Any) -> Any:
    return await coroutine


def _streamed(scope: Any) -> Any:
    stream = scope.stream(ASKED)
    if isinstance(scope, Scope):
        return list(stream), stream.reply

    async def read() -> Any:
        return [piece async for piece in stream], stream.reply

    return asyncio.run(read())


READS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "chat": lambda scope, own: scope.chat(ASKED),
    "confirm": lambda scope, own: scope.confirm(),
    "context": lambda scope, own: scope.context(ASKED),
    "export": lambda scope, own: _exported(scope, "export"),
    "export_alr2": lambda scope, own: _exported(scope, "export_alr2"),
    "history": lambda scope, own: scope.history(99),
    "lookup": lambda scope, own: scope.lookup(["key", own["id"]]),
    "nearest": lambda scope, own: scope.nearest(ASKED, k=50),
    "search": lambda scope, own: scope.search(ASKED, k=50),
    "segment": lambda scope, own: scope.segment(own["seq"]),
    "session": lambda scope, own: scope.session("s").history(99),
    "sources": lambda scope, own: scope.sources(own["summary"]),
    "stream": lambda scope, own: _streamed(scope),
    "summarize": lambda scope, own: scope.summarize(
        io.BytesIO(f"The kite: {THEIRS}.".encode()),
        name=str(uuid4()),  # what was forgotten of a name stays so
    ),
    "would_forget": lambda scope, own: scope.would_forget(everything=True),
    "why": lambda scope, own: scope.why(expect=own["id"]),
    "whole": lambda scope, own: scope.session("s").whole().history(99),
    "answered": lambda scope, own: scope.answered(own["trace"], own["reply"]),
}
COUNTS: dict[str, Callable[[Any], dict[str, Any]]] = {"stats": lambda scope: scope.stats()}
WRITES = {
    "add",
    "add_many",
    "replace_many",
    "ingest",
    "import_",
    "forget",
    "expire",
}  # below, one test for each promise
WITH_A_BANK = {"bank_status", "fill_bank", "drop_bank", "examples"}  # below, and in test_bank_store
ELSEWHERE = {
    "read": "reads a document and nothing that is stored; its scores are below",
    "items": "below",
    "labels": "data",
    "session_name": "data",
    "scope": "data",
}
ITEM_READS: dict[str, Callable[[Any], Any]] = {
    "get": lambda items: items.get(("p",), "k"),
    "get_many": lambda items: items.get_many([(("p",), "k")]),
    "search": lambda items: (items.search(("p",)), items.search(query="the kite", limit=50)),
    "paths": lambda items: items.paths(),
    "keys": lambda items: list(items.keys(("p",))),
    "count": lambda items: items.count(),
    "scan": lambda items: list(items.scan()),
}
ITEM_WRITES = {"put", "delete", "apply", "merge", "refresh", "sweep", "catch_up"}


def public(of: type) -> set[str]:
    return {name for name in dir(of) if not name.startswith("_")}


def test_every_verb_is_covered():
    known = READS.keys() | COUNTS.keys() | WRITES | WITH_A_BANK | ELSEWHERE.keys()
    assert public(Scope) - known == set(), "say in test_isolation what keeps the new verb in its namespace"
    assert public(AsyncScope) - known == set()
    assert (public(Items) | public(AsyncItems)) - (ITEM_READS.keys() | ITEM_WRITES | {"labels"}) == set()
    doors = {name for module in (langchain, langgraph, middleware, bytestore) for name in module.__all__}
    no_memory = {"ChatLLM", "LangChainEmbedder", "LangChainLLM", "MemoryEmbeddings"}
    assert doors == DOORS.keys() | no_memory


def check_verbs(world: World, scope_of: Callable[[Scope], Any]) -> None:
    own = world.told[THEIRS]
    scope = scope_of(own["scope"])
    for name, read in READS.items():
        if not hasattr(scope, name):
            continue
        calls_before = len(world.llm.calls)
        found = read(scope, own)
        if inspect.isawaitable(found):
            found = asyncio.run(_awaited(found))
        shown = repr(found) + repr(world.llm.calls[calls_before:])
        assert THEIRS in shown or own["id"] in shown, name
        assert MINE not in shown, name
        assert not any(world.told[MINE][of] in shown for of in ("id", "trace", "reply", "summary", "query")), name
    for read_items in ITEM_READS.values():
        found = read_items(own["scope"].items)
        assert MINE not in repr(found)
        assert found
    assert own["scope"].items.count() == 1


@pytest.mark.slow
@pytest.mark.parametrize("door", ["sync", "async"])
@example(pair=(("acme", "alice"), ("acme/alice",)))
@settings(max_examples=8, suppress_health_check=list(HealthCheck), derandomize=True)
@given(pair=near_pairs())
def test_no_verb_shows_what_is_another_namespaces(world, door, pair):
    if world.enough():
        return
    world.plant(pair)
    check_verbs(world, AsyncScope if door == "async" else lambda scope: scope)


@pytest.mark.parametrize("world", IN_A_FILE, indirect=True)
@pytest.mark.parametrize("pair", PAIRS, ids=repr)
def test_look_alikes_are_two_namespaces(world, pair):
    world.plant(pair)
    for mark, other in ((MINE, THEIRS), (THEIRS, MINE)):
        scope = world.told[mark]["scope"]
        # the first was counted when it was alone
        assert {name: steady(count(scope)) for name, count in COUNTS.items()} == world.told[mark]["counts"]
        for found in (
            scope.search(ASKED, k=50), scope.nearest(ASKED, k=50), scope.context(ASKED).messages, scope.history(99),
            scope.items.search(query="kite"), _exported(scope, "export"),
            world.memory.parts.store.read_scores(scope.labels, ["score"]),
        ):  # fmt: skip
            assert mark in repr(found)
            assert other not in repr(found)
        assert scope.stats()["segments"] == len(scope.history(99)) == world.told[mark]["n"]
        assert world.memory.parts.index.ids(scope.labels) == {segment.id for segment in scope.history(99)}
    assert sorted(world.memory.namespaces()) == sorted(pair)


def test_look_alikes_are_namespaces_of_their_own_side_by_side(place):
    every = list(dict.fromkeys(labels for pair in PAIRS for labels in pair))
    with Memory.open(place, embedder="hash") as memory:
        for n, labels in enumerate(every):
            memory.namespace(*labels).add(f"The kite has mark-of-{n}.")
        for n, labels in enumerate(every):
            scope = memory.namespace(*labels)
            for found in (scope.history(99), scope.search("kite", k=99), scope.nearest("kite", k=99)):
                assert set(MARK.findall(repr(found))) == {f"mark-of-{n}"}
        assert sorted(memory.namespaces()) == sorted(every)


@example(pair=(("acme", "alice"), ("acme", "bob")))
@settings(max_examples=6, suppress_health_check=list(HealthCheck), derandomize=True)
@given(pair=near_pairs())
def test_ids_of_another_namespace_are_unknown_and_nothing_changes(world, pair):
    if world.enough():
        return
    world.plant(pair)
    foreign, own = world.told[MINE], world.told[THEIRS]
    mine, scope = foreign["scope"], own["scope"]
    shown_to_them = mine.context(ASKED)
    before = world.rows(mine.labels), world.rows(scope.labels)
    refused = [
        lambda: scope.segment(foreign["id"]),
        lambda: scope.why(foreign["trace"]),
        lambda: scope.why(foreign["reply"]),
        lambda: scope.forget(foreign["id"]),
        lambda: scope.forget(own["id"], foreign["id"]),
        lambda: scope.sources(foreign["summary"]),
        lambda: scope.confirm(foreign["trace"]),
        lambda: scope.confirm(evidence=[foreign["id"]]),
        lambda: scope.answered(foreign["trace"], own["reply"]),
        lambda: scope.answered(own["trace"], foreign["reply"]),
        lambda: scope.context("Where?", asked=mine.segment(foreign["query"])),
        lambda: scope.add("There.", role="assistant", reply_to=shown_to_them),
    ]
    for call in refused:
        with pytest.raises(UnknownNameError) as caught:
            call()
        said = f"{caught.value} {vars(caught.value)}"
        assert MINE not in said  # nor whose it is
        assert not any(label in said for label in set(mine.labels) - set(scope.labels) if len(label) > 4)
    assert scope.lookup([foreign["id"], "no key"]) == {}
    trace, finding = scope.why(expect=foreign["id"])
    assert finding.stage == "stored"
    assert not finding.present
    assert MINE not in repr((trace, finding))
    shown = Conversation("", stored=frozenset([foreign["id"], own["id"]]))
    context = scope.context(ASKED, conversation=shown)
    assert MINE not in repr(context)
    assert set(context.trace.flash) == {own["id"]}  # of the two ids the one that is its own
    assert (world.rows(mine.labels), world.rows(scope.labels)) == before
    assert mine.segment(foreign["id"]).id == foreign["id"]  # the same ids where they belong
    assert mine.why(foreign["trace"])[0].id == foreign["trace"]
    assert mine.sources(foreign["summary"])


@example(pair=(("acme", "alice"), ("acme", "bob")))
@settings(max_examples=6, suppress_health_check=list(HealthCheck), derandomize=True)
@given(pair=near_pairs())
def test_writes_leave_the_other_namespace_as_it_is(world, pair):
    if world.enough():
        return
    world.plant(pair)
    mine, scope = (world.told[mark]["scope"] for mark in (MINE, THEIRS))
    before = world.rows(mine.labels)
    world.n_files += 1
    file = world.folder / f"same-{world.n_files}.txt"
    exported = _exported(mine, "export").splitlines()
    file.write_text("The very same file, in both.\n")
    mine.ingest(file)
    mine.add("An old one.", created_at="2001-01-01T00:00:00Z")
    before = world.rows(mine.labels)
    assert scope.ingest(file) == (1, 0)  # not "already there": that it is elsewhere is nobody's business here
    scope.add("one more")
    scope.add_many([NewSegment("another", "s", key="other key")])
    [replaced] = scope.replace_many([NewSegment("something else now", "s", key="key")])
    assert scope.lookup(["key"])["key"] == replaced
    scope.items.put(("p",), "k", {"is": "changed"}, texts=[("is", "changed")])
    scope.items.delete(("p",), "nothing")
    stored, known = scope.import_(exported)  # the same ids: stored once more, here
    assert stored > 0
    assert known == 1  # what is under "key" by now
    assert world.rows(mine.labels) == before
    scope.add("An old one.", created_at="2001-01-01T00:00:00Z")
    assert scope.expire(30)["segments"] == 1
    assert world.rows(mine.labels) == before
    assert scope.forget(session="s")["segments"] > 0
    assert world.rows(mine.labels) == before
    assert scope.forget(everything=True)["segments"] > 0
    assert world.rows(mine.labels) == before
    assert [hit for hit in mine.search(ASKED) if MINE in hit.segment.text]
    assert (scope.search(ASKED), scope.history(), scope.items.count()) == ([], [], 0)
    with pytest.raises(UnknownNameError):
        scope.why()


# -- LangChain and LangGraph -------------------------------------------------------------------------------------------


def _retriever(world: World, labels: tuple[str, ...], chat: Any) -> Any:
    fixed = MemoryRetriever(memory=world.memory, namespace=labels, k=50)
    called = MemoryRetriever(memory=world.memory, budget_tokens=400)
    return fixed.invoke(ASKED), called.invoke(ASKED, {"configurable": {"namespace": labels}})


def _vector_store(world: World, labels: tuple[str, ...], chat: Any) -> Any:
    store = MemoryVectorStore(world.memory, namespace=labels)
    mark = MARK.search(repr(world.memory.namespace(*labels).history(1)))
    assert mark
    store.add_documents([Document(f"A kite document, {mark[0]}.", id="one")])
    store.delete(["not there"])
    return (
        store.similarity_search(ASKED, k=50), store.get_by_ids(["one"]),
        store.max_marginal_relevance_search(ASKED, k=20),
    )  # fmt: skip


def _chat_model(world: World, labels: tuple[str, ...], chat: Any) -> Any:
    model = chat(replies=lambda messages: "Noted.")
    MemoryChatModel(model=model, memory=world.memory, namespace=labels, session="lc").invoke(ASKED)
    return model.seen


def _tools(world: World, labels: tuple[str, ...], chat: Any) -> Any:
    recall = next(each for each in memory_tools(world.memory, namespace=labels) if each.name == "recall")
    return recall.invoke({"query": ASKED})


def _chat_history(world: World, labels: tuple[str, ...], chat: Any) -> Any:
    return MemoryChatHistory(world.memory, namespace=labels, session="s").messages


def _middleware(world: World, labels: tuple[str, ...], chat: Any) -> Any:
    model = chat(replies=lambda messages: AIMessage("Noted."))
    create_agent(model, middleware=[MemoryMiddleware(world.memory, namespace=labels, session="mw")]).invoke(
        {"messages": [HumanMessage(ASKED)]}
    )
    return model.seen


def _graph_store(world: World, labels: tuple[str, ...], chat: Any) -> Any:
    store = MemoryStore(world.memory, namespace=labels)
    assert store.list_namespaces() == [("p",)]
    return store.get(("p",), "k"), store.search(("p",)), store.search((), query="kite")


def _byte_store(world: World, labels: tuple[str, ...], chat: Any) -> Any:
    store = MemoryByteStore(world.memory, namespace=labels)
    assert list(store.yield_keys()) == []
    mark = MARK.search(repr(world.memory.namespace(*labels).items.scan().__next__()))
    assert mark
    store.mset([("bytes", mark[0].encode())])
    return store.mget(["bytes"]), list(store.yield_keys())


DOORS: dict[str, Callable[[World, tuple[str, ...], Any], Any]] = {
    "MemoryRetriever": _retriever,
    "MemoryVectorStore": _vector_store,
    "MemoryChatModel": _chat_model,
    "memory_tools": _tools,
    "MemoryChatHistory": _chat_history,
    "MemoryMiddleware": _middleware,
    "MemoryStore": _graph_store,
    "MemoryByteStore": _byte_store,
}


@example(pair=(("acme", "alice"), ("acme", "bob")))
@settings(max_examples=5, suppress_health_check=list(HealthCheck), derandomize=True)
@given(pair=near_pairs())
def test_no_langchain_part_shows_what_is_another_namespaces(world, scripted_chat, pair):
    if world.enough():
        return
    world.plant(pair)
    for mark, other in ((MINE, THEIRS), (THEIRS, MINE)):
        labels = world.told[mark]["scope"].labels
        for name, door in DOORS.items():
            shown = repr(door(world, labels, scripted_chat))
            assert mark in shown, name
            assert other not in shown, name
    mine, theirs = (world.told[mark]["scope"] for mark in (MINE, THEIRS))
    before = world.rows(mine.labels)
    store = MemoryVectorStore(world.memory, namespace=theirs.labels)
    store.delete()
    assert store.get_by_ids(["one"]) == []
    MemoryByteStore(world.memory, namespace=theirs.labels).mdelete(["bytes"])
    MemoryStore(world.memory, namespace=theirs.labels).delete(("p",), "k")
    MemoryChatHistory(world.memory, namespace=theirs.labels, session="s").clear()
    forget = next(each for each in memory_tools(world.memory, namespace=theirs.labels) if each.name == "forget")
    forget.invoke({"number": theirs.history(1)[0].seq})
    assert world.rows(mine.labels) == before
    assert MemoryVectorStore(world.memory, namespace=mine.labels).get_by_ids(["one"])


def test_the_namespace_of_the_constructor_cannot_be_changed_by_a_call(world, scripted_chat):
    world.plant((("acme", "alice"), ("acme", "bob")))
    mine, theirs = (world.told[mark]["scope"].labels for mark in (MINE, THEIRS))
    call = {"configurable": {"namespace": theirs, "thread_id": "t"}}
    model = scripted_chat(replies=lambda messages: "Noted.")
    recall = next(each for each in memory_tools(world.memory, namespace=mine) if each.name == "recall")
    agent = create_agent(
        scripted_chat(replies=lambda messages: repr(messages)),
        middleware=[MemoryMiddleware(world.memory, namespace=mine)],
    )
    chat_model = MemoryChatModel(model=model, memory=world.memory, namespace=mine, session="lc")
    doors = {
        "MemoryRetriever": lambda: MemoryRetriever(memory=world.memory, namespace=mine, k=50).invoke(ASKED, call),
        "MemoryVectorStore": lambda: _within(
            call, lambda: MemoryVectorStore(world.memory, namespace=mine).similarity_search(ASKED, k=50)
        ),
        "MemoryChatModel": lambda: (chat_model.invoke(ASKED, call), model.seen),
        "memory_tools": lambda: recall.invoke({"query": ASKED}, call),
        "MemoryMiddleware": lambda: agent.invoke({"messages": [HumanMessage(ASKED)]}, call),
        "MemoryStore": lambda: _within(call, lambda: MemoryStore(world.memory, namespace=mine).search(("p",))),
    }
    before = world.rows(theirs)
    for name, door in doors.items():
        shown = repr(door())
        assert MINE in shown, name
        assert THEIRS not in shown, name
    assert world.rows(theirs) == before


def _within(call: Any, act: Callable[[], Any]) -> Any:
    """As in a run that is called so."""
    return RunnableLambda(lambda _: act()).invoke("", call)


def test_one_middleware_keeps_the_runs_of_two_namespaces_apart_also_one_within_the_other(world, scripted_chat):
    world.plant((("acme", "alice"), ("acme", "bob")))
    mine, theirs = (world.told[mark]["scope"].labels for mark in (MINE, THEIRS))
    shared = MemoryMiddleware(world.memory, session="same")
    asked = {"messages": [HumanMessage(ASKED, id="1")]}

    @tool
    def ask_bob() -> str:
        """Ask somebody else the same."""
        bob = create_agent(scripted_chat(replies=[AIMessage("Noted by Bob.", id="2")]), middleware=[shared])
        bob.invoke(asked, {"configurable": {"namespace": theirs}})
        return "He was asked."

    calls = AIMessage("", id="2", tool_calls=[{"name": "ask_bob", "args": {}, "id": "c"}])
    model = scripted_chat(replies=[calls, AIMessage("It is settled.", id="3")])
    create_agent(model, [ask_bob], middleware=[shared]).invoke(asked, {"configurable": {"namespace": mine}})
    assert len(model.seen) == 2
    for seen in model.seen:
        assert MINE in repr(seen)
        assert THEIRS not in repr(seen)
    alice, bob = (world.memory.namespace(*labels).session("same") for labels in (mine, theirs))
    assert [s.text for s in alice.history()] == [ASKED, "ask_bob({})", "He was asked.", "It is settled."]
    assert [s.text for s in bob.history()] == [ASKED, "Noted by Bob."]
    for scope, reply in ((alice, "It is settled."), (bob, "Noted by Bob.")):
        trace, _ = scope.why()
        assert scope.segment(trace.query_id).text == ASKED
        assert scope.segment(trace.reply_id).text == reply


# -- the bank ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS[:19], ids=repr)
def test_the_bank_keeps_namespaces_apart(tmp_path, pair):
    import torch

    from memory_os.protocols import KV

    with Memory.open(tmp_path / "memory.db", embedder="hash") as memory:
        bank = SegmentBank(memory.parts.store.database, manifest.bank_folder(tmp_path / "memory.db"), BankOptions())
        ids = {}
        for n, labels in enumerate(pair):
            shape = (2, 2, 4, 8)
            generator = torch.Generator().manual_seed(n)
            kv = KV((1, 2, 3, 4), *(torch.randn(shape, generator=generator, dtype=torch.bfloat16) for _ in range(2)))
            ids[labels] = memory.namespace(*labels).add("text").id
            bank.put(labels, "f", {ids[labels]: kv}, 1)
        for labels in pair:
            assert set(bank.entries(labels, "f")) == {ids[labels]}
            assert set(bank.get(labels, "f", list(ids.values()))) == {ids[labels]}
        folders = {path.parent for path in manifest.bank_folder(tmp_path / "memory.db").rglob("*.safetensors")}
        assert len(folders) == 2
        bank.drop(pair[0])
        assert not bank.entries(pair[0], "f")
        assert set(bank.get(pair[1], "f", list(ids.values()))) == {ids[pair[1]]}
        bank.close()


def test_the_verbs_of_the_bank_need_a_model_that_has_one(world):
    world.plant((("a",), ("b",)))
    scope = world.told[THEIRS]["scope"]
    before = world.rows(("a",))
    for call in (scope.bank_status, scope.fill_bank, lambda: scope.examples("Text", "Label", labels=["x", "y"])):
        with pytest.raises(CapabilityError):
            call()
    scope.drop_bank()
    assert world.rows(("a",)) == before


# -- a namespace is named, always --------------------------------------------------------------------------------------

NONE = [(), ("",), (" ",), ("a", ""), ("a", None), ("a\x00",), ("\ud800",), ("x" * (MAX_LABEL + 1),), ("a",) * 17]


@pytest.mark.parametrize("labels", NONE, ids=repr)
def test_no_namespace_is_an_error_at_every_door(new_place, labels):
    with Memory.open(new_place(shared=True), embedder="hash") as memory:
        for labels_of_before in memory.namespaces():
            memory.namespace(*labels_of_before).forget(everything=True)
        doors = [
            lambda: memory.namespace(*labels),
            lambda: AsyncMemory(memory).namespace(*labels),
            lambda: MemoryRetriever(memory=memory, namespace=labels),
            lambda: MemoryRetriever(memory=memory).invoke("kite", {"configurable": {"namespace": labels}}),
            lambda: MemoryVectorStore(memory, namespace=labels),
            lambda: MemoryChatHistory(memory, namespace=labels, session="s"),
            lambda: MemoryMiddleware(memory, namespace=labels),
            lambda: MemoryStore(memory, namespace=labels),
            lambda: MemoryByteStore(memory, namespace=labels),
        ]
        for door in doors:
            with pytest.raises((NamespaceError, ValueError), match="namespace"):
                door()
        nameless = [
            lambda: MemoryRetriever(memory=memory).invoke("kite"),
            lambda: MemoryVectorStore(memory).similarity_search("kite"),
            lambda: MemoryStore(memory).get(("p",), "k"),
            lambda: MemoryByteStore(memory).mget(["k"]),
            lambda: memory_tools(memory)[1].invoke({"query": "kite"}),
        ]
        for door in nameless:
            with pytest.raises(NamespaceError, match="no namespace given"):
                door()
        assert memory.namespaces() == []
        memory.namespace("a").add("kite")  # the positive control
        assert MemoryRetriever(memory=memory, namespace=("a",)).invoke("kite")


def test_a_namespace_that_is_one_string_is_refused(world):
    with pytest.raises(NamespaceError, match="one string"):
        MemoryByteStore(world.memory, namespace="alice")


# -- the command line --------------------------------------------------------------------------------------------------


@given(labels=st.lists(st.text(min_size=1, max_size=8).filter(lambda t: "\x00" not in t), min_size=1, max_size=4))
def test_what_n_says_is_read_back_as_it_was(labels):
    assert parse_labels(format_labels(labels)) == tuple(labels)


@pytest.mark.slow
def test_the_command_line_keeps_to_the_namespace_of_n(place):
    pairs = [("acme", "alice"), ("acme/alice",), ("acme",), ("default",)]
    with Memory.open(place, embedder="hash") as memory:
        for n, labels in enumerate(pairs):
            memory.namespace(*labels).add(f"The kite has mark-of-{n}.")

    def memos(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-c", "from memory_os.cli.main import run; run()", *words],
            env={**os.environ, "MEMOS_STORE": str(place), "MEMOS_EMBEDDER": "hash"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    for n, labels in enumerate(pairs):
        commands = ["search", "kite"], ["history"], ["export", "-"]
        for words in commands if isinstance(place, Path) else commands[:1]:
            shown = memos(*words, "-n", format_labels(labels))
            assert set(MARK.findall(shown)) == {f"mark-of-{n}"}, words
    assert set(MARK.findall(memos("history"))) == {"mark-of-3"}  # without -n: the namespace "default"
    for nothing in ("", "/", "acme/", "/alice"):
        assert "not a non-empty string" in memos("history", "-n", nothing, code=1)
