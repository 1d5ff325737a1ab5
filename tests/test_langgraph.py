"""``MemoryStore`` and ``MemoryByteStore``: LangGraph's and LangChain's contracts, and where their own stores fail."""

import asyncio
import itertools
import math
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TypedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_tests.integration_tests.base_store import BaseStoreAsyncTests, BaseStoreSyncTests
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime
from langgraph.store.base import (
    BaseStore,
    GetOp,
    InvalidNamespaceError,
    ListNamespacesOp,
    MatchCondition,
    PutOp,
    SearchOp,
)
from langgraph.store.memory import InMemoryStore
from langgraph.store.sqlite import SqliteStore

from memory_os import AsyncMemory, ConfigError, InvalidInputError, Memory, NamespaceError
from memory_os.adapters.bytestore import MemoryByteStore
from memory_os.adapters.langgraph import MemoryStore

SIZE = 16
FAKE = DeterministicFakeEmbedding(size=SIZE)


def unit(texts) -> np.ndarray:
    vectors = np.array(FAKE.embed_documents(list(texts)), dtype=np.float32).reshape(-1, SIZE)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Fake:
    """The same vectors for us and for the peers: equal for equal texts, and telling nothing else."""

    fingerprint, dimension = "fake", SIZE

    def embed_documents(self, texts):
        return unit(texts)

    def embed_query(self, text):
        return unit([text])[0]


class PeersFake(Embeddings):
    def embed_documents(self, texts):
        return unit(texts).tolist()

    def embed_query(self, text):
        return unit([text])[0].tolist()


class Connection(sqlite3.Connection):
    """SqliteStore needs one function of the extension sqlite-vec, and many builds of Python load no extension."""

    def enable_load_extension(self, enabled):
        pass

    def load_extension(self, *_):
        def distance(a, b):
            x, y = (np.frombuffer(blob, "<f4").astype(np.float64) for blob in (a, b))
            return float(1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y))

        self.create_function("vec_distance_cosine", 2, distance, deterministic=True)


def in_memory(fields=None) -> InMemoryStore:
    return InMemoryStore(index={"dims": SIZE, "embed": PeersFake(), "fields": fields})


@contextmanager
def on_sqlite(*, ttl=None, **index):
    connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None, factory=Connection)
    store = SqliteStore(connection, index={"dims": SIZE, "embed": PeersFake(), **index}, ttl=ttl)
    store.setup()
    yield store
    connection.close()


@pytest.fixture
def memory(tmp_path):
    with Memory.open(tmp_path / "memory.db", embedder=Fake()) as opened:
        yield opened


@pytest.fixture
def store(memory):
    return MemoryStore(memory, namespace=("acme",))


def keys(found) -> list[str]:
    return [item.key for item in found]


def scored(found) -> list[tuple]:
    return [(item.namespace, item.key, None if item.score is None else round(item.score, 4)) for item in found]


# -- the standard suites of LangChain ----------------------------------------------------------------------------------


class TestByteStore(BaseStoreSyncTests[bytes]):
    @pytest.fixture
    def kv_store(self, memory):
        return MemoryByteStore(memory, namespace=("acme",))

    @pytest.fixture
    def three_values(self):
        return b"foo", b"\x00\xff", b""


class TestByteStoreAsync(BaseStoreAsyncTests[bytes]):
    @pytest.fixture
    async def kv_store(self, memory):
        return MemoryByteStore(memory, namespace=("acme",))

    @pytest.fixture
    def three_values(self):
        return b"foo", b"\x00\xff", b""


# -- as the peers, where they are right --------------------------------------------------------------------------------

LABELS = ("a", "A", "b", "*", "_", "%", "a%", "[a]", '"', 'a", "b', "\\", "ａ", "é", "e\u0301", "a b", "?")
WORDS = ("red fox", "blue whale", "old oak", "tall pine", "grey owl")
TAGS = ("north", "south", "east", "west")

paths = st.lists(st.sampled_from(("a", "b", "*")) | st.sampled_from(LABELS), min_size=1, max_size=3).map(tuple)
values = st.fixed_dictionaries(
    {"n": st.integers(-3, 3) | st.sampled_from([0.5, 2.5])},
    optional={
        "title": st.sampled_from(WORDS),
        "tags": st.lists(st.sampled_from(TAGS), unique=True, max_size=3),
        "ok": st.booleans() | st.none(),
        "who": st.fixed_dictionaries({"name": st.sampled_from(["Ana", "Bo"])}, optional={"age": st.integers(0, 2)}),
        "a.b": st.integers(0, 1),
    },
)
indexes = st.sampled_from(
    [None, None, False, ["title"], ["tags[*]", "title"], ["tags[-1]"], ["who.name"], ["nowhere"], []]
)
bounds = st.dictionaries(st.sampled_from(["$gt", "$gte", "$lt", "$lte"]), st.integers(-3, 3), max_size=2)
filters = st.dictionaries(st.just("n"), st.integers(-2, 2) | bounds, max_size=1).flatmap(
    lambda n: st.fixed_dictionaries(
        {},
        optional={
            "title": st.sampled_from(WORDS) | st.sampled_from(WORDS).map(lambda word: {"$ne": word}),
            "tags": st.lists(st.sampled_from(TAGS), max_size=2),
            "ok": st.booleans() | st.none() | st.just({"$eq": True}),
            "who": st.sampled_from([{"name": "Ana"}, {"name": {"$ne": "Bo"}}, {"age": {"$eq": 1}}, {"$ne": None}]),
            "a.b": st.integers(0, 1),
        },
    ).map(lambda rest: {**n, **rest})
)
patterns = st.lists(st.sampled_from([*LABELS[:6], "*"]), max_size=2).map(tuple)
pages = st.tuples(st.integers(0, 4), st.integers(0, 4))
puts = st.tuples(st.just("put"), paths, st.sampled_from("xyz"), values, indexes)
operations = st.one_of(
    puts,
    puts,
    st.tuples(st.just("delete"), paths, st.sampled_from("xyz")),
    st.tuples(st.just("get"), paths, st.sampled_from("xyz")),
    st.tuples(st.just("search"), st.just(()) | paths, filters, st.none() | st.sampled_from([*WORDS, *TAGS]), pages),
    st.tuples(st.just("list"), patterns, patterns, st.none() | st.integers(1, 3), pages),
)


class Peer:
    """``InMemoryStore`` kept away from its faults, which have tests of their own below."""

    def __init__(self):
        self.store = in_memory()
        self.clock = itertools.count()
        self.at = {}  # of every item that there is: when it was put

    def put(self, path, key, value, index):
        self.delete(path, key)  # else it keeps vectors of the value before
        self.store.put(path, key, value, index)
        self.at[path, key] = next(self.clock)

    def delete(self, path, key):
        self.store.delete(path, key)
        self.at.pop((path, key), None)

    def search(self, prefix, condition, query, limit, offset):
        found = self.store.search(prefix, filter=condition, query=query, limit=1000)  # its offsets are wrong
        newest = sorted(found, key=lambda item: -self.at[item.namespace, item.key])  # it knows no order of updates
        best = sorted(newest, key=lambda item: math.inf if item.score is None else -round(item.score, 4))
        return best[offset : offset + limit]

    def list(self, prefix, suffix, depth, limit, offset):
        there = {path for path, _ in self.at}  # it lists what was only asked for
        found = self.store.list_namespaces(prefix=prefix or None, suffix=suffix or None, limit=1000)
        shown = sorted({path[:depth] for path in found if path in there})
        return shown[offset : offset + limit]


@settings(max_examples=60)
@given(todo=st.lists(operations, min_size=8, max_size=40))
def test_what_in_memory_store_does_we_do(tmp_path_factory, todo):
    with Memory.open(tmp_path_factory.mktemp("m") / "memory.db", embedder=Fake()) as memory:
        ours, peer = MemoryStore(memory, namespace=("acme",)), Peer()
        for kind, *told in [*todo, ("search", (), {}, WORDS[0], (1000, 0)), ("list", (), (), None, (1000, 0))]:
            if kind == "put":
                ours.put(*told)
                peer.put(*told)
            elif kind == "delete":
                ours.delete(*told)
                peer.delete(*told)
            elif kind == "get":
                mine, theirs = ours.get(*told), peer.store.get(*told)
                assert (mine and (mine.namespace, mine.value)) == (theirs and (theirs.namespace, theirs.value))
            elif kind == "search":
                prefix, condition, query, (limit, offset) = told
                mine = ours.search(prefix, filter=condition, query=query, limit=limit, offset=offset)
                theirs = peer.search(prefix, condition, query, limit, offset)
                assert scored(mine) == scored(theirs)
                assert [item.value for item in mine] == [item.value for item in theirs]
            else:
                prefix, suffix, depth, (limit, offset) = told
                mine = ours.list_namespaces(
                    prefix=prefix or None, suffix=suffix or None, max_depth=depth, limit=limit, offset=offset
                )
                assert mine == peer.list(prefix, suffix, depth, limit, offset)


plain = st.lists(st.sampled_from([label for label in LABELS if "." not in label]), min_size=1, max_size=3).map(tuple)


@settings(max_examples=25)
@given(
    todo=st.lists(
        st.tuples(plain, st.sampled_from("xyz"), values, indexes), min_size=3, max_size=20, unique_by=lambda t: t[:2]
    ),
    gone=st.lists(st.integers(0, 19), max_size=4),
    query=st.sampled_from([*WORDS, *TAGS]),
    prefix=st.just(()) | plain,
    patterns=st.tuples(patterns, patterns),
)  # fmt: skip
def test_what_sqlite_store_does_we_do(tmp_path_factory, todo, gone, query, prefix, patterns):
    """It keeps vectors of items that are gone, so nothing is put twice here."""
    folder = tmp_path_factory.mktemp("m")
    with Memory.open(folder / "memory.db", embedder=Fake()) as memory, on_sqlite() as peer:
        ours = MemoryStore(memory, namespace=("acme",))
        for each in (ours, peer):
            for put in todo:
                each.put(*put)
            for i in gone:
                each.delete(*todo[i % len(todo)][:2])
        for path, key, *_ in todo:
            mine, theirs = ours.get(path, key), peer.get(path, key)
            assert (mine and mine.value) == (theirs and theirs.value)
        every = ours.search(prefix, limit=1000)
        assert {(i.namespace, i.key) for i in every} == {(i.namespace, i.key) for i in peer.search(prefix, limit=1000)}
        mine = [each for each in scored(ours.search(prefix, query=query, limit=1000)) if each[2] is not None]
        theirs = peer.search(prefix, query=query, limit=1000)  # it leaves out what has no text
        assert {each[:2]: each[2] for each in mine} == {
            (i.namespace, i.key): pytest.approx(i.score, abs=2e-4) for i in theirs
        }
        told = {"prefix": patterns[0] or None, "suffix": patterns[1] or None, "limit": 1000}
        assert ours.list_namespaces(**told) == sorted(peer.list_namespaces(**told))


# -- where the peers are wrong: each fails when the peer is mended or we are broken ------------------------------------


@pytest.mark.parametrize("peer", ["memory", "sqlite"])
def test_peers_lose_created_at_when_an_item_is_updated(store, peer):
    with on_sqlite() as sqlite:
        theirs = in_memory() if peer == "memory" else sqlite
        for each in (store, theirs):
            each.put(("a",), "k", {"n": 1})
        created = [each.get(("a",), "k").created_at for each in (store, theirs)]
        time.sleep(1.1 if peer == "sqlite" else 0.01)  # its times are of whole seconds
        for each in (store, theirs):
            each.put(("a",), "k", {"n": 2})
        now = [each.get(("a",), "k") for each in (store, theirs)]
        assert now[0].created_at == created[0] < now[0].updated_at
        assert now[1].created_at > created[1]


@pytest.mark.parametrize("peer", ["memory", "sqlite"])
def test_peers_find_an_item_by_what_it_no_longer_says(store, peer):
    with on_sqlite() as sqlite:
        theirs = in_memory() if peer == "memory" else sqlite
        for each in (store, theirs):
            each.put(("a",), "k", {"secret": "the old address"}, index=["secret"])
            each.put(("a",), "k", {"title": "new"}, index=["title"])
        assert store.search(("a",), query="the old address")[0].score < 0.99
        assert theirs.search(("a",), query="the old address")[0].score == pytest.approx(1)


def test_sqlite_store_keeps_the_vectors_of_what_was_deleted(store):
    with on_sqlite() as theirs:
        for each in (store, theirs):
            each.put(("a",), "k", {"secret": "the old address"}, index=["secret"])
            each.delete(("a",), "k")
            each.put(("a",), "k", {"title": "new"}, index=False)
        assert scored(store.search(("a",), query="the old address")) == [(("a",), "k", None)]
        assert scored(theirs.search(("a",), query="the old address")) == [(("a",), "k", 1.0)]


@pytest.mark.parametrize("value", [{"a": "same", "b": "other"}, {"a": "same", "b": "same"}])
def test_in_memory_store_refuses_equal_texts_in_one_batch(store, value):
    ops = [PutOp(("a",), "1", {"a": "same", "b": "same"}, ["a", "b"]), PutOp(("a",), "2", value, ["a", "b"])]
    with pytest.raises(ValueError, match="Number of embeddings"):
        in_memory().batch(ops)
    store.batch(ops)
    assert [item.score for item in store.search(("a",), query="same")] == pytest.approx([1, 1])


def test_in_memory_store_pages_over_items_without_texts_again_and_again(store):
    theirs = in_memory()
    for each in (store, theirs):
        each.put(("a",), "t", {"t": "text"}, index=["t"])
        for i in range(4):
            each.put(("a",), str(i), {"n": i}, index=False)
    paged = [keys(store.search(("a",), query="text", limit=2, offset=offset)) for offset in (0, 2, 4)]
    assert paged == [["t", "3"], ["2", "1"], ["0"]]
    assert keys(theirs.search(("a",), query="text", limit=2, offset=2)) == ["0", "1"]
    assert keys(theirs.search(("a",), query="text", limit=2, offset=4)) == ["0", "1"]


def test_in_memory_store_raises_where_there_is_nothing_to_compare(store):
    theirs = in_memory()
    for each in (store, theirs):
        each.put(("a",), "k", {"n": 1, "s": "abc", "t": True, "z": None})
    for condition in ({"x": {"$gt": 0}}, {"s": {"$gt": "abb"}}, {"z": {"$lte": 1}}):
        with pytest.raises((TypeError, ValueError)):
            theirs.search(("a",), filter=condition)
    assert keys(store.search(("a",), filter={"s": {"$gt": "abb"}})) == ["k"]
    for condition in (
        {"x": {"$gt": 0}}, {"x": {"$lt": 0}}, {"s": {"$gt": 1}}, {"n": {"$gt": "0"}}, {"z": {"$lte": 1}},
        {"t": {"$gte": 0}}, {"n": {"$gte": None}}, {"n": {"$lt": math.nan}}, {"n": {"$gt": [0]}},
    ):  # fmt: skip
        assert store.search(("a",), filter=condition) == []
    assert keys(theirs.search(("a",), filter={"t": {"$gte": 0}})) == ["k"]  # to it True is a number, and so is "10"


def test_in_memory_store_and_its_caller_share_one_value(store):
    theirs = in_memory()
    value = {"list": [1]}
    for each in (store, theirs):
        each.put(("a",), "k", value, index=False)
    value["list"].append(2)
    for each in (store, theirs):
        each.get(("a",), "k").value["list"].append(3)
    assert store.get(("a",), "k").value == {"list": [1]}
    assert theirs.get(("a",), "k").value == {"list": [1, 2, 3]}


def test_in_memory_store_lists_namespaces_that_hold_nothing(store):
    theirs = in_memory()
    for each in (store, theirs):
        each.get(("asked",), "k")
        each.put(("emptied",), "k", {"n": 1})
        each.delete(("emptied",), "k")
    assert store.list_namespaces() == []
    assert theirs.list_namespaces() == [("asked",), ("emptied",)]


def test_peers_do_not_know_the_whole_value_as_a_field_of_a_put(store):
    text = '{"t": "kite"}'
    with on_sqlite() as sqlite:
        for each, found in ((store, [(("a",), "k", 1.0)]), (in_memory(), [(("a",), "k", None)]), (sqlite, [])):
            each.put(("a",), "k", {"t": "kite"}, index=["$"])
            assert scored(each.search(("a",), query=text)) == found


def test_sqlite_store_loses_items_behind_one_with_many_texts(store):
    with on_sqlite() as theirs:
        for each in (store, theirs):
            each.put(("a",), "many", {"t": ["kite"] * 6}, index=["t[*]"])
            for i in range(5):
                each.put(("a",), str(i), {"t": f"word {i}"}, index=["t"])
        sizes = [
            [len(each.search(("a",), query="kite", limit=2, offset=o)) for o in (0, 2, 4)] for each in (store, theirs)
        ]
        assert sizes == [[2, 2, 2], [1, 0, 0]]


def test_sqlite_store_leaves_out_what_has_no_text(store):
    with on_sqlite() as theirs:
        for each in (store, theirs):
            each.put(("a",), "k", {"n": 1}, index=False)
        assert keys(store.search(("a",), query="kite")) == ["k"]
        assert theirs.search(("a",), query="kite") == []


def test_sqlite_store_filters_by_less_than_it_says(store):
    with on_sqlite() as theirs:
        for each in (store, theirs):
            each.put(("a",), "k", {"who": {"name": "Ana"}, "list": [1, 2], "a.b": 1, "a b": 2}, index=False)
        for condition in ({"gone": {"$ne": 1}}, {"list": {"$eq": [1, 2]}}, {"a.b": 1}):
            assert (keys(store.search(("a",), filter=condition)), theirs.search(("a",), filter=condition)) == (
                ["k"],
                [],
            )
        for condition in ({"who": {"name": "Ana"}}, {"a b": 2}):
            assert keys(store.search(("a",), filter=condition)) == ["k"]
            with pytest.raises(ValueError, match=r"Unsupported operator|Invalid filter key"):
                theirs.search(("a",), filter=condition)


def test_sqlite_store_does_not_know_the_setting_fields(memory):
    ours = MemoryStore(memory, namespace=("acme",), index={"fields": ["t"]})
    with on_sqlite(fields=["t"]) as theirs:
        for each in (ours, theirs):
            each.put(("a",), "k", {"t": "kite", "u": "boat"})
        assert ours.search(("a",), query="kite")[0].score == pytest.approx(1)
        assert theirs.search(("a",), query="kite")[0].score < 0.99


@pytest.mark.filterwarnings("ignore:The default datetime adapter:DeprecationWarning")
def test_sqlite_store_gives_back_what_has_expired(memory):
    ours = MemoryStore(memory, namespace=("acme",))
    with on_sqlite() as theirs:
        for each in (ours, theirs):
            each.put(("a",), "k", {"n": 1}, ttl=0.0005)
        time.sleep(0.05)
        assert (ours.get(("a",), "k"), ours.search(("a",)), ours.list_namespaces()) == (None, [], [])
        assert theirs.get(("a",), "k").value == {"n": 1}


def test_sqlite_store_embeds_a_query_as_a_document(tmp_path):
    told = []

    class Telling(PeersFake):
        def embed_documents(self, texts):
            told.append("document")
            return super().embed_documents(texts)

        def embed_query(self, text):
            told.append("query")
            return super().embed_query(text)

    class Ours(Fake):
        embed_documents = lambda _, texts: np.array(Telling().embed_documents(texts), np.float32)  # noqa: E731
        embed_query = lambda _, text: np.array(Telling().embed_query(text), np.float32)  # noqa: E731

    with Memory.open(tmp_path / "m.db", embedder=Ours()) as memory, on_sqlite(embed=Telling()) as theirs:
        for each, wanted in ((MemoryStore(memory, namespace=("a",)), "query"), (theirs, "document")):
            each.put(("a",), "k", {"n": 1})
            each.search(("a",), query="kite")
            assert told == ["document", wanted]
            told.clear()


# -- batches -----------------------------------------------------------------------------------------------------------


def test_a_batch_reads_the_state_before_it_and_answers_in_order(store):
    store.put(("a",), "k", {"n": 1})
    ops = (
        op for op in [
            PutOp(("a",), "k", {"n": 2}), GetOp(("a",), "k"), PutOp(("b",), "new", {"n": 3}), SearchOp(()),
            ListNamespacesOp(), GetOp(("b",), "new"), PutOp(("b",), "new", {"n": 4}), PutOp(("a",), "gone", None),
        ]
    )  # fmt: skip
    results = store.batch(ops)
    assert results[1].value == {"n": 1}
    assert [results[i] for i in (0, 2, 5, 6, 7)] == [None] * 5
    assert (keys(results[3]), results[4]) == (["k"], [("a",)])
    assert (store.get(("a",), "k").value, store.get(("b",), "new").value) == ({"n": 2}, {"n": 4})


BAD = [
    {"x": math.nan}, {"x": [math.inf]}, {"x": datetime.now(UTC)}, {1: 2}, {"x": [{None: 1}]}, {"x": {1, 2}},
    {"x": "\ud800"}, {"\udfff": 1}, ["x"], "text", 7, {"x": object()},
]  # fmt: skip


@pytest.mark.parametrize("value", BAD, ids=repr)
def test_a_bad_value_is_one_clear_error_and_changes_nothing(store, value):
    store.put(("a",), "good", {"n": 1})
    with pytest.raises(InvalidInputError, match=r"the item 'bad' under \('a',\).*(store text|must be a mapping)"):
        store.batch([PutOp(("a",), "good", {"n": 2}), PutOp(("a",), "bad", value), PutOp(("a",), "good", None)])
    assert (keys(store.search(())), store.get(("a",), "good").value) == (["good"], {"n": 1})


def test_what_cannot_be_done_is_said(store):
    circle: dict = {}
    circle["x"] = circle
    deep: dict = {}
    for _ in range(100_000):
        deep = {"x": deep}
    for value in (circle, deep):
        with pytest.raises(InvalidInputError):
            store.put(("a",), "k", value)
    for op in ("get", None, ("a",)):
        with pytest.raises(ConfigError, match="not an operation"):
            store.batch([PutOp(("a",), "k", {"n": 1}), op])
    for op in (
        PutOp("ab", "k", {}),
        PutOp((), "k", {}),
        PutOp(("a", ""), "k", {}),
        PutOp(("a", 1), "k", {}),
        GetOp(("a",), 1),
    ):
        with pytest.raises(InvalidInputError):
            store.batch([op])
    for ttl in (0, -1, math.nan, math.inf, 1e300, "1"):
        with pytest.raises(InvalidInputError, match="minutes above 0"):
            store.put(("a",), "k", {}, ttl=ttl)
    for told in ({"limit": -1}, {"offset": -1}):
        with pytest.raises(ConfigError, match="negative"):
            store.search((), **told)
        with pytest.raises(ConfigError, match="negative"):
            store.list_namespaces(**told)
    for index in ("title", True):
        with pytest.raises(ConfigError, match="list of fields"):
            store.put(("a",), "k", {"title": "x"}, index=index)
    with pytest.raises(InvalidNamespaceError):
        store.put(("a.b",), "k", {})
    store.put(("a",), "k", {"n": 1})
    for told in ({}, {"filter": {"n": 1}}, {"query": "x"}):
        assert keys(store.search((), limit=10**30, **told)) == ["k"]
        assert store.search((), limit=10**30, offset=10**30, **told) == []


@pytest.mark.parametrize("condition", [{"n": {"$in": [1]}}, {"n": {"$gt": 1, "x": 2}}, {"n": [{"deep": {"$or": 1}}]}])
def test_an_unknown_operator_is_said_even_where_there_is_nothing(store, condition):
    with pytest.raises(ConfigError, match=r"unknown operator .* known: \$eq"):
        store.search((), filter=condition)


def test_filters_by_example(store):
    for key, n in (("int", 1), ("float", 1.0), ("true", True), ("text", "1"), ("big", 2**80), ("none", None)):
        store.put(("a",), key, {"n": n, "$odd key, 'quoted'": {"deep": [1, {"x": 2}]}}, index=False)
    store.put(("a",), "missing", {"m": 1}, index=False)

    def found(condition):
        return sorted(keys(store.search(("a",), filter=condition)))

    assert (
        found({"n": 1}) == found({"n": {"$eq": 1}}) == ["float", "int", "true"]
    )  # as Python and InMemoryStore have it
    assert found({"n": None}) == found({"n": {"$eq": None}}) == ["missing", "none"]
    assert found({"n": {"$gte": 1}}) == ["big", "float", "int"]
    assert found({"n": {"$gt": 2**80 - 1}}) == ["big"]
    assert found({"n": {"$ne": 1}}) == ["big", "missing", "none", "text"]
    assert found({"$odd key, 'quoted'": {"deep": [{"$lt": 2}, {"x": 2}]}, "n": 2**80}) == ["big"]
    assert (
        found({"$odd key, 'quoted'": {"$eq": {"deep": (1, {"x": 2})}}, "n": "1"}) == []
    )  # a tuple is not looked for deep
    assert found({"n": {}}) == []


def test_namespaces_by_example(store):
    there = [("a",), ("a", "b"), ("a", "b", "c"), ("a", "*"), ("ab", "c"), ("b", "a", "c")]
    store.batch([PutOp(path, "k", {}) for path in there])

    def listed(match=(), **told):
        conditions = tuple(MatchCondition(kind, path) for kind, path in match)
        [found] = store.batch([ListNamespacesOp(conditions, **told)])
        return found

    assert listed() == listed([("prefix", ()), ("suffix", ())]) == sorted(there)
    assert listed([("prefix", ("a",))]) == [("a",), ("a", "*"), ("a", "b"), ("a", "b", "c")]
    assert listed([("prefix", ("*", "b"))]) == [("a", "b"), ("a", "b", "c")]
    assert listed([("suffix", ("c",))]) == [("a", "b", "c"), ("ab", "c"), ("b", "a", "c")]
    assert listed([("suffix", ("*", "*", "c"))]) == [("a", "b", "c"), ("b", "a", "c")]
    assert listed([("prefix", ("a",)), ("suffix", ("c",))]) == [("a", "b", "c")]
    assert listed(max_depth=1) == [("a",), ("ab",), ("b",)]
    assert listed(max_depth=1, limit=1, offset=1) == [("ab",)]
    assert listed(max_depth=2, limit=2, offset=1) == [("a", "*"), ("a", "b")]
    with pytest.raises(ConfigError, match="prefix or its suffix"):
        listed([("middle", ("a",))])


# -- settings ----------------------------------------------------------------------------------------------------------


def test_the_namespace_is_the_constructors_or_the_calls(memory):
    free, bound = MemoryStore(memory), MemoryStore(memory, namespace=("acme",))
    with pytest.raises(NamespaceError, match="no namespace given"):
        free.put(("a",), "k", {"n": 1})

    def put(value, config: RunnableConfig):
        for each in (free, bound):
            each.put(("a",), "k", value)
            asyncio.run(each.aput(("a",), "async", value))

    for name in ("bo", "cy"):
        RunnableLambda(put).invoke({"who": name}, {"configurable": {"namespace": (name,)}})
    there = {
        name: [i.value["who"] for i in MemoryStore(memory, namespace=(name,)).search(())]
        for name in ("acme", "bo", "cy")
    }
    assert there == {"acme": ["cy", "cy"], "bo": ["bo", "bo"], "cy": ["cy", "cy"]}
    with pytest.raises(NamespaceError):
        MemoryStore(memory, namespace="acme")


def test_index_takes_fields_and_nothing_that_the_memory_has(memory):
    for index, text in (
        ({"embed": PeersFake(), "dims": 3}, "Memory.open"), ({"dims": 3}, "Memory.open"), ({"fields": "title"}, "list"),
        ({"text_fields": ["x"]}, "text_fields"), ("title", "mapping"), (True, "mapping"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=text):
            MemoryStore(memory, namespace=("a",), index=index)
    value = {"title": "kite", "who": {"name": "Ana"}, "tags": ["red", "blue"], "n": 3}
    told = {
        ("title",): ["title"], ("who.name",): ["who.name"], ("tags[*]",): ["tags[*].0", "tags[*].1"],
        ("tags[0]", "tags[-1]"): ["tags[0]", "tags[-1]"], ("$",): ["$"], ("n", "gone", "title"): ["n", "title"],
        ("{title,n}",): ["{title,n}.0", "{title,n}.1"], (): [],
    }  # fmt: skip
    for fields, named in told.items():
        for store, index in (
            (MemoryStore(memory, namespace=("a",), index={"fields": list(fields)}), None),
            (MemoryStore(memory, namespace=("a",)), list(fields)),
        ):
            store.put(("a",), "k", value, index=index)
            [change] = memory.namespace("a").items.scan()
            assert [field for field, _ in change.texts] == named
    off = MemoryStore(memory, namespace=("off",), index=False)
    off.put(("a",), "1", value)
    off.put(("a",), "2", value, index=["title"])
    assert scored(off.search(("a",), query="kite")) == [(("a",), "2", None), (("a",), "1", None)]
    assert all(change.texts == () for change in memory.namespace("off").items.scan())


def left(memory) -> float | None:
    """Minutes that the only item has left."""
    [change] = memory.namespace("acme").items.scan()
    return change.expires_at and (change.expires_at - datetime.now(UTC)).total_seconds() / 60


def pass_by(memory, minutes: float) -> None:
    """Time goes by for what expires."""
    with memory.parts.store.database.write() as connection:
        connection.exec_driver_sql(
            "UPDATE items SET expires_at = strftime('%Y-%m-%dT%H:%M:%f000+00:00', expires_at, ?)",
            (f"-{minutes} minutes",),
        )


def test_time_to_live(memory):
    for ttl, text in (
        ({"default_ttl": 0}, "above 0"), ({"minutes": 3}, "minutes"), ({"omit_expired": False}, "omit_expired"),
        ({"sweep_interval_minutes": 5}, "sweep_ttl"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=text):
            MemoryStore(memory, namespace=("acme",), ttl=ttl)
    store = MemoryStore(memory, namespace=("acme",), ttl={"default_ttl": 10, "refresh_on_read": False})
    store.put(("a",), "k", {"n": 1})
    assert left(memory) == pytest.approx(10, abs=0.1)
    pass_by(memory, 6)
    for read in (lambda **kw: store.get(("a",), "k", **kw), lambda **kw: store.search(("a",), query="x", **kw)):
        assert read()
        assert left(memory) == pytest.approx(4, abs=0.1)
        assert read(refresh_ttl=True)
        assert left(memory) == pytest.approx(10, abs=0.1)
        pass_by(memory, 6)
    pass_by(memory, 5)
    assert (store.get(("a",), "k"), store.search(()), store.search((), query="x"), store.list_namespaces()) == (
        None,
        [],
        [],
        [],
    )
    assert memory.namespace("acme").stats()["items"] == 0
    assert (memory.namespaces(), store.sweep_ttl(), store.sweep_ttl()) == ([], 1, 0)
    MemoryStore(memory, namespace=("acme",)).put(("a",), "k", {"n": 1}, ttl=0.5)
    assert MemoryStore(memory, namespace=("acme",)).get(("a",), "k")  # a read refreshes, if not told otherwise
    store.put(("a",), "k", {"n": 1}, ttl=None)
    assert left(memory) is None


def test_reading_what_does_not_expire_writes_nothing(memory, store, monkeypatch):
    store.put(("a",), "k", {"n": 1})
    store.search((), query="x")
    monkeypatch.setattr(type(memory.parts.store.database), "write", None)
    assert store.get(("a",), "k", refresh_ttl=True)
    assert store.search((), query="x", refresh_ttl=True)
    assert store.list_namespaces()


def test_without_langgraph_the_error_names_the_extra():
    program = (
        "import sys; sys.modules['langgraph'] = sys.modules['langgraph.store.base'] = None\n"
        "from memory_os import MissingExtraError\n"
        "try: import memory_os.adapters.langgraph\n"
        "except MissingExtraError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert (
        done.stdout
        == "MemoryStore needs the package 'langgraph'; install it with: pip install \"memory-os[langgraph]\"\n"
    )


# -- in a graph --------------------------------------------------------------------------------------------------------


class State(TypedDict):
    said: str
    found: list[str]


def by_runtime(state: State, runtime: Runtime) -> State:
    found = runtime.store.search(("facts",), query=state["said"])
    runtime.store.put(("facts",), state["said"], {"text": state["said"]}, index=["text"])
    return {"said": state["said"], "found": keys(found)}


def by_store(state: State, *, store: BaseStore) -> State:
    found = store.search(("facts",), query=state["said"])
    store.put(("facts",), state["said"], {"text": state["said"]}, index=["text"])
    return {"said": state["said"], "found": keys(found)}


async def by_async_store(state: State, *, store: BaseStore) -> State:
    found = await store.asearch(("facts",), query=state["said"])
    await store.aput(("facts",), state["said"], {"text": state["said"]}, index=["text"])
    return {"said": state["said"], "found": keys(found)}


def compiled(node, store):
    graph = StateGraph(State)
    graph.add_node("node", node)
    graph.add_edge(START, "node")
    graph.add_edge("node", END)
    return graph.compile(store=store)


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("node", [by_runtime, by_store, by_async_store])
def test_in_a_graph(memory, node, bound):
    """Two threads of one namespace share what is stored, two namespaces do not; the call names it where we do not."""
    graph = compiled(node, MemoryStore(memory, namespace=("acme",) if bound else None))

    async def turn(said, thread, name):
        told = {"said": said, "found": []}, {"configurable": {"thread_id": thread, "namespace": (name,)}}
        return (await graph.ainvoke(*told) if node is by_async_store else graph.invoke(*told))["found"]

    async def turns():
        return [
            await turn("red fox", "1", "acme"), await turn("old oak", "2", "acme"), await turn("old oak", "3", "acme"),
            await turn("old oak", "4", "other"),
        ]  # fmt: skip

    found = asyncio.run(turns())
    assert found[:3] == [[], ["red fox"], ["old oak", "red fox"]]
    assert found[3] == (["old oak", "red fox"] if bound else [])
    assert memory.namespaces() == ([("acme",)] if bound else [("acme",), ("other",)])


def test_async_memory_and_many_at_once(tmp_path):
    async def run():
        async with AsyncMemory.open(tmp_path / "m.db", embedder=Fake()) as memory:
            store = MemoryStore(memory, namespace=("acme",))
            await asyncio.gather(*(store.aput((f"p{i % 3}",), str(i), {"n": i}) for i in range(30)))
            found = await store.asearch((), query="x", limit=100)
            await store.adelete(("p0",), "0")
            assert await store.aget(("p0",), "0") is None
            return {item.value["n"] for item in found}, await store.alist_namespaces()

    assert asyncio.run(run()) == (set(range(30)), [("p0",), ("p1",), ("p2",)])


def test_four_threads_lose_nothing(store):
    def work(name):
        for i in range(50):
            store.put(("t", name), str(i), {"n": i, "who": name}, index=["who"])

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = store.search(("t",), query="a", limit=1000)
    assert {(i.namespace[1], i.value["n"]) for i in found} == {(name, i) for name in "abcd" for i in range(50)}
    assert {i.namespace[1] for i in found[:50]} == {"a"}
    assert all(item.score is not None for item in found)


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_keys_are_literal_and_read_as_they_are_asked_for(memory, monkeypatch):
    bytes_ = MemoryByteStore(memory, namespace=("acme",))
    names = ["a", "a%", "a_", "ab", "A", "*", "a\x00b", "é", "", "a" * 300, "日本"]
    bytes_.mset([(name, name.encode()) for name in names])
    MemoryByteStore(memory, namespace=("other",)).mset([("a%x", b"x")])
    MemoryByteStore(memory, namespace=("acme",), path=("else",)).mset([("a%y", b"y")])
    assert bytes_.mget(names) == [name.encode() for name in names]
    for prefix in (None, "", "a", "a%", "a_", "*", "A", "a\x00", "日", "x"):
        assert list(bytes_.yield_keys(prefix=prefix)) == sorted(n for n in names if n.startswith(prefix or ""))
    monkeypatch.setattr("memory_os.items.KEYS_PAGE", 3)

    async def all_of(prefix):
        return [key async for key in bytes_.ayield_keys(prefix=prefix)]

    assert asyncio.run(all_of(None)) == list(bytes_.yield_keys()) == sorted(names)
    walk = bytes_.yield_keys()
    first = [next(walk), next(walk)]
    bytes_.mdelete([*names[:9], "日本"])
    assert [*first, *walk] == ["", "*", "A", "a" * 300]  # the page that was read, then what is there now


def test_bytes_or_nothing(memory):
    bytes_ = MemoryByteStore(memory, namespace=("acme",))
    with pytest.raises(InvalidInputError, match="must be bytes, not str"):
        bytes_.mset([("k", b"1"), ("l", "2")])
    assert bytes_.mget(["k", "l"]) == [None, None]
    memory.namespace("acme").items.put(("bytes",), "odd", {"base64": "*"})
    with pytest.raises(InvalidInputError, match="a path of its own"):
        bytes_.mget(["odd"])
    with pytest.raises(NamespaceError):
        MemoryByteStore(memory).mget(["k"])
    bytes_.mset([("k", b"1"), ("k", b"2")])
    assert bytes_.mget(["k", "k"]) == [b"2", b"2"]
