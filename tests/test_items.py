"""Items: what is stored under a path and a key, found again, kept apart, outlived by nothing, and healed."""

import asyncio
import io
import json
import logging
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from memory_os import AsyncMemory, ConfigError, InvalidInputError, Memory, StoreError
from memory_os.adapters.scripted import HashEmbedder
from memory_os.cli.main import app
from memory_os.items import Items
from memory_os.memory import Scope
from memory_os.protocols import ItemChange
from memory_os.stores.items import SCAN_PAGE, VECTORS_PAGE

A = ("a",)
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
COUNTER = count()  # of namespaces in a database that examples share


@pytest.fixture
def memory(place):
    with Memory.open(place, embedder="hash") as opened:
        yield opened


@pytest.fixture
def items(memory):
    return memory.namespace("acme").items


def rows(memory, query="SELECT field, text, fingerprint, length(vector) FROM item_texts ORDER BY pk"):
    with memory.parts.store.database.read() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(query)]


def by_hand(memory, *statements):
    with memory.parts.store.database.write() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def refuse(memory, what, words, when="true"):
    """Have the database refuse a change of the table items with these words."""
    if memory.parts.store.database.place.startswith("postgresql"):
        by_hand(
            memory,
            f"CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION '{words}'; END $$",
            f"CREATE TRIGGER no BEFORE {what} ON items FOR EACH ROW WHEN ({when}) EXECUTE FUNCTION no()",
        )
    else:
        by_hand(
            memory,
            f"CREATE TRIGGER no BEFORE {what} ON items WHEN {when} BEGIN SELECT RAISE(ABORT, '{words}'); END",
        )


def keys(found):
    return [item.key for item in found]


# -- what goes in comes out --------------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
jsons = st.recursive(
    scalars | st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
texts = st.text(min_size=1, max_size=8)


@given(
    value=st.dictionaries(st.text(), jsons, max_size=4),
    at=st.lists(texts, min_size=1, max_size=3),
    key=st.text(max_size=9),
)
def test_a_value_comes_back_as_it_was(new_place, value, at, key):
    if new_place.enough(40):
        return
    if new_place.kind == "postgres":
        key = key.replace("\x00", "0")  # which no text of PostgreSQL may hold
    with Memory.open(new_place(shared=True), embedder="hash") as memory:
        items = memory.namespace(f"acme {next(COUNTER)}").items
        items.put(at, key, value, texts=[("$", json.dumps(value, ensure_ascii=False))])
        item = items.get(at, key)
        assert (item.path, item.key) == (tuple(at), key)
        assert json.dumps(item.value) == json.dumps(value)
        assert items.search(at, query="x") == [replace(item, score=items.search(at, query="x")[0].score)]


def test_a_put_replaces_a_delete_deletes_and_times_are_sensible(items):
    before = datetime.now(UTC)
    items.put(A, "k", {"n": 1}, ttl=5)
    first = items.get(A, "k")
    assert before <= first.created_at == first.updated_at <= datetime.now(UTC)
    assert (first.ttl, first.expires_at) == (5, first.updated_at + timedelta(minutes=5))
    items.put(A, "k", {"n": 2})
    second = items.get(A, "k")
    assert second.created_at == first.created_at < second.updated_at
    assert (second.value, second.ttl, second.expires_at) == ({"n": 2}, None, None)
    items.delete(A, "k")
    items.delete(A, "k")
    assert (items.get(A, "k"), items.search(), items.paths(), items.count()) == (None, [], [], 0)
    items.put(A, "k", {"n": 3})
    assert items.get(A, "k").created_at > second.updated_at


def test_times_grow_where_the_clock_stands_still_or_goes_back(memory):
    store = memory.parts.items
    for now in (NOON, NOON, NOON - timedelta(days=1)):
        store.apply(A, [ItemChange(A, "k", {})], now=now)
    [item] = store.get(A, [(A, "k")], now=NOON)
    assert (item.created_at, item.updated_at) == (NOON, NOON + timedelta(microseconds=2))


def test_several_at_once_are_one_transaction_and_the_last_of_one_counts(memory, items):
    items.put(A, "old", {"n": 0})
    changes = [ItemChange(A, str(i), {"n": i}) for i in range(3)]
    items.apply([*changes, ItemChange(A, "1", {"n": 10}), ItemChange(A, "2", None), ItemChange(A, "old", None)])
    assert {item.key: item.value["n"] for item in items.search()} == {"0": 0, "1": 10}
    refuse(memory, "INSERT", "no room", "NEW.key = 'no'")
    with pytest.raises(StoreError, match="no room"):
        items.apply([ItemChange(A, "0", None), ItemChange(A, "1", {"n": 11}), ItemChange(A, "no", {"n": 1})])
    assert {item.key: item.value["n"] for item in items.search()} == {"0": 0, "1": 10}


def test_what_cannot_be_stored_is_said(items):
    for at, key in (("a", "k"), ((), "k"), (("",), "k"), ((1,), "k"), (("\ud800",), "k"), (A, "\ud800"), (A, 1)):
        with pytest.raises(InvalidInputError):
            items.put(at, key, {})
    for told in ({"texts": [("f", "\ud800")]}, {"texts": [("f", 1)]}, {"ttl": 0}, {"ttl": True}, {"ttl": 1e300}):
        with pytest.raises(InvalidInputError):
            items.put(A, "k", {}, **told)
    with pytest.raises(InvalidInputError, match="lone surrogate"):
        items.search(query="\ud800")
    with pytest.raises(ConfigError, match="negative"):
        items.search(limit=-1)
    assert items.count() == 0
    with pytest.raises(ConfigError, match=r"Memory\.open makes one"):
        assert Scope(replace(items_parts(items), items=None), A).items


def items_parts(items):
    from memory_os.turn import Parts

    return Parts(None, None, items._embedder, None, None, None)


# -- order, pages, prefixes --------------------------------------------------------------------------------------------


def test_order_and_pages(items):
    n = max(VECTORS_PAGE, 900) + 50  # more than one query takes
    items.apply(
        [
            ItemChange(("x", str(i % 3)), f"{i:04}", {"n": i}, (("t", f"word{i % 7}"),) if i % 2 else ())
            for i in range(n)
        ]
    )
    items.put(("y",), "other", {"n": -1}, texts=[("t", "word1")])
    items.put(("x", "0"), "0000", {"n": 0})  # updated last
    newest = ["0000", *(f"{i:04}" for i in range(n - 1, 0, -1))]
    assert keys(items.search(("x",), limit=5000)) == newest
    assert keys(items.search(("x",), limit=7, offset=4)) == newest[4:11]
    even = [key for key in newest if int(key) % 2 == 0]
    assert keys(items.search(("x",), accept=lambda v: v["n"] % 2 == 0, limit=9, offset=3)) == even[3:12]
    found = items.search(("x",), query="word1", limit=5000)
    cosine = {i: float(HashEmbedder().embed_query("word1") @ HashEmbedder().embed_query(f"word{i}")) for i in range(7)}
    odd = sorted((key for key in newest if int(key) % 2), key=lambda key: -round(cosine[int(key) % 7], 5))
    assert keys(found) == [*odd, *even]
    assert [item.score for item in found[: len(odd)]] == pytest.approx([cosine[int(key) % 7] for key in odd])
    assert {item.score for item in found[len(odd) :]} == {None}
    pages = [items.search(("x",), query="word1", limit=100, offset=start) for start in range(0, n + 100, 100)]
    assert [item for page in pages for item in page] == found
    assert len(list(items.scan())) == n + 1


def test_the_best_text_of_an_item_counts(items):
    items.put(A, "one", {}, texts=[("t", "boat"), ("u", "kite in the sky")])
    items.put(A, "two", {}, texts=[("t", "kite over a boat")])
    items.put(A, "three", {}, texts=[("t", "kite"), ("t", "lamp")])
    found = items.search(query="kite")
    assert keys(found) == ["three", "two", "one"]  # of equals the newest first
    assert [item.score for item in found] == pytest.approx([1, 0.5, 0.5])


def test_only_what_is_given_back_is_read(memory, items):
    items.put(A, "near", {"n": 1}, texts=[("t", "kite")])
    items.put(A, "far", {"n": 2}, texts=[("t", "boat")])
    by_hand(memory, "UPDATE items SET created_at = 'never' WHERE key = 'far'")
    assert keys(items.search(query="kite", limit=1)) == ["near"]
    with pytest.raises(ValueError, match="never"):
        items.search(query="kite", limit=2)


HARD = (
    "_", "%", "*", "?", "[", "]", "[a]", ".", ",", '"', "\\", '\\"', '", "', '"]', "a", "A", "ａ", "a ", "é", "e\u0301",
    "😀", "\x00", "\n",
)  # fmt: skip
labels = st.sampled_from(HARD) | st.text(min_size=1, max_size=4)
some_paths = st.lists(st.lists(labels, min_size=1, max_size=3).map(tuple), min_size=1, max_size=4, unique=True)


def is_namespace(path) -> bool:
    return all(label.strip() and "\x00" not in label for label in path)


@settings(max_examples=50)
@given(there=some_paths, more=some_paths, cut=st.integers(0, 2))
def test_prefixes_and_namespaces_are_literal(new_place, there, more, cut):
    """Everything is asked for from each namespace: what it holds is found, and nothing else ever is."""
    if new_place.enough(15):
        return
    with Memory.open(new_place(shared=True), embedder="hash") as memory:
        own = str(next(COUNTER))
        spaces = [path for path in dict.fromkeys([A, *there, ("a", "b")]) if is_namespace(path)]
        held = {space: (there if i % 2 else more) for i, space in enumerate(spaces)}
        for space in spaces:
            changes = [ItemChange(path, "k", {"at": [*space, "|", *path]}, (("t", "kite"),)) for path in held[space]]
            memory.namespace(own, *space).items.apply(changes)
        for space in spaces:
            items = memory.namespace(own, *space).items
            assert items.paths() == sorted(held[space])
            nearly = {(*path[:-1], label) for path in held[space] for label in (path[-1][:-1], path[-1] + "x") if label}
            for prefix in {(), *there, *more, *(path[:cut] for path in more), *nearly}:
                wanted = sorted(path for path in held[space] if path[: len(prefix)] == prefix)
                for query in (None, "kite"):
                    found = items.search(prefix, query=query, limit=99)
                    assert sorted(item.path for item in found) == wanted
                    assert all(item.value["at"] == [*space, "|", *item.path] for item in found)
                if prefix:
                    assert bool(items.get(prefix, "k")) == (prefix in held[space])


# -- texts and vectors -------------------------------------------------------------------------------------------------


class Counting(HashEmbedder):
    """Tells documents from queries, and can fail."""

    def __init__(self, dimension=64):
        super().__init__(dimension)
        self.documents, self.queries, self.fails = [], [], 0

    def embed_documents(self, texts):
        if self.fails:
            self.fails -= 1
            raise RuntimeError("the model is not there")
        self.documents += texts
        return super().embed_documents(texts)

    def embed_query(self, text):
        self.queries.append(text)
        return HashEmbedder(self.dimension).embed_documents([text])[0]


def test_vectors_go_with_their_texts(memory, items):
    made = ("hash-64-v1", 256)
    items.put(A, "k", {}, texts=[("t", "kite"), ("u", "boat")])
    items.put(A, "l", {}, texts=[("t", "lamp")])
    assert rows(memory) == [("t", "kite", *made), ("u", "boat", *made), ("t", "lamp", *made)]
    items.put(A, "k", {}, texts=[("u", "boat"), ("v", "tree")])
    assert rows(memory) == [("t", "lamp", *made), ("u", "boat", *made), ("v", "tree", *made)]
    items.put(A, "k", {})
    items.delete(A, "l")
    assert rows(memory) == []
    items.put(A, "k", {}, texts=[("t", "kite")], ttl=5)
    by_hand(memory, "UPDATE items SET expires_at = '2020-01-01T00:00:00.000000+00:00'")
    items.put(A, "new", {})
    assert (rows(memory), rows(memory, "SELECT key FROM items")) == ([], [("new",)])


def test_queries_are_embedded_as_queries_and_a_text_once(place):
    embedder = Counting()
    with Memory.open(place, embedder=embedder) as memory:
        items = memory.namespace("acme").items
        items.put(A, "k", {"n": 1}, texts=[("t", "kite")])
        items.put(A, "k", {"n": 2}, texts=[("t", "kite"), ("u", "boat")])  # the kite's vector is there
        items.search(query="lamp")
    assert (embedder.documents, embedder.queries) == (["kite", "boat"], ["lamp"])


@pytest.mark.parametrize("dimension", [32, 96])  # fingerprints that come before and after the old one's
def test_another_embedder_embeds_anew(place, dimension):
    with Memory.open(place, embedder="hash") as memory:
        for name in ("acme", "other"):
            memory.namespace(name).items.put(A, "k", {}, texts=[("t", "kite"), ("u", "boat")])
    with Memory.open(place, embedder=Counting(dimension)) as memory:
        assert len(memory.check()["pending_item_vectors"]) == 4
        told = {"now": NOON, "limit": 9, "vector": HashEmbedder(dimension).embed_query("kite")}
        [found] = memory.parts.items.search(("acme",), (), fingerprint=f"hash-{dimension}-v1", **told)
        assert found.score is None  # the old vectors are no one's
        [found] = memory.namespace("acme").items.search(query="kite")
        assert found.score == pytest.approx(1)
        assert sorted(rows(memory, "SELECT namespace_id, fingerprint, length(vector) FROM item_texts"))[:2] == [
            (1, f"hash-{dimension}-v1", 4 * dimension)
        ] * 2  # fmt: skip
        assert len(memory.check()["pending_item_vectors"]) == 2
        assert memory.repair()["pending_item_vectors"] == 2
        assert not any(memory.check().values())


def test_what_was_not_embedded_is_stored_and_embedded_later(place, caplog):
    embedder = Counting()
    with Memory.open(place, embedder=embedder) as memory:
        items, embedder.fails = memory.namespace("acme").items, 1
        with caplog.at_level(logging.WARNING, "memory_os"):
            items.put(A, "k", {"n": 1}, texts=[("t", "kite")])  # an error would have it put again
        assert "it is stored" in caplog.text
        assert "the model is not there" not in caplog.text  # its own words may repeat a text
        assert items.get(A, "k").value == {"n": 1}
        assert rows(memory) == [("t", "kite", None, None)]
        assert items.search(query="kite")[0].score == pytest.approx(1)
        memory.namespace("other").items.put(A, "k", {}, texts=[("t", "boat")])
        by_hand(memory, "UPDATE item_texts SET vector = NULL, fingerprint = NULL")
    with Memory.open(place, embedder="hash") as memory:
        assert len(memory.check()["pending_item_vectors"]) == 2
        assert memory.namespace("acme").items.search(query="kite")[0].score == pytest.approx(1)
        assert len(memory.check()["pending_item_vectors"]) == 1  # another namespace's texts are its own affair
        memory.repair()
        assert not any(memory.check().values())
        with pytest.raises(StoreError, match=r"(?i)check"):
            by_hand(memory, "UPDATE item_texts SET vector = NULL")


def test_a_vector_never_lands_on_another_text(memory, items):
    """An item is replaced while its text is at the model: what comes back is of a row that is gone."""

    class Slow(HashEmbedder):
        def embed_documents(self, texts):
            if texts == ["kite"]:
                items.put(A, "k", {}, texts=[("t", "boat")])
            return super().embed_documents(texts)

    Items(memory.parts.items, Slow(), ("acme",)).put(A, "k", {}, texts=[("t", "kite")])
    assert [text for _, text, *_ in rows(memory)] == ["boat"]
    assert items.search(query="boat")[0].score == pytest.approx(1)


def test_threads_and_processes_lose_nothing(place, memory, items):
    program = (
        "import sys; from memory_os import Memory\n"
        "with Memory.open(sys.argv[1], embedder='hash') as memory:\n"
        "    items = memory.namespace('acme').items\n"
        "    for i in range(30): items.put(('p', sys.argv[2]), str(i), {'n': i}, texts=[('t', f'kite {i}')])"
    )
    others = [subprocess.Popen([sys.executable, "-c", program, str(place), name]) for name in "xy"]

    def work(name):
        for i in range(50):
            items.put(("p", name), str(i), {"n": i}, texts=[("t", f"kite {i}")])

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [other.wait(timeout=60) for other in others] == [0, 0]
    found = {
        (item.path[1], item.value["n"]) for item in items.search(query="kite", limit=999) if item.score is not None
    }
    assert found == {(name, i) for name in "abcd" for i in range(50)} | {(name, i) for name in "xy" for i in range(30)}


# -- what expires ------------------------------------------------------------------------------------------------------


def test_what_has_expired_is_as_good_as_gone(memory):
    store, late = memory.parts.items, NOON + timedelta(minutes=5)
    store.apply(A, [ItemChange(A, "k", {"n": 1}, (("t", "x"),), 5), ItemChange(("b",), "stays", {})], now=NOON)
    just_before = late - timedelta(microseconds=1)
    assert keys(store.get(A, [(A, "k")], now=just_before)) == ["k"]
    vector = HashEmbedder().embed_query("x")
    for now, there in ((just_before, ["k", "stays"]), (late, ["stays"])):
        assert sorted(keys(store.search(A, (), now=now, limit=9))) == there
        assert sorted(keys(store.search(A, (), now=now, limit=9, vector=vector))) == there
        assert sorted(keys(store.search(A, (), now=now, limit=9, accept=lambda _: True))) == there
        assert store.count(A, now=now) == len(store.paths(A, now=now)) == len(there)
        assert sorted(change.key for change in store.scan(A, now=now)) == there
        assert store.keys(A, A, now=now, prefix="", after=None, limit=9) == there[:-1]
    assert store.get(A, [(A, "k")], now=late) == []
    [item] = store.get(A, [(A, "k")], now=NOON)
    store.refresh(A, [item], now=late + timedelta(minutes=1))  # too late
    assert store.get(A, [(A, "k")], now=late) == []
    store.refresh(A, [item], now=NOON + timedelta(minutes=3))
    store.refresh(A, [item], now=NOON + timedelta(minutes=2))  # of another process, a little slow
    assert store.get(A, [(A, "k")], now=NOON)[0].expires_at == NOON + timedelta(minutes=8)
    store.apply(A, [ItemChange(A, "k", {"n": 2}, ttl=2)], now=NOON + timedelta(minutes=4))
    store.refresh(A, [item], now=NOON + timedelta(minutes=5))  # it was put anew since it was read
    assert store.get(A, [(A, "k")], now=NOON)[0].expires_at == NOON + timedelta(minutes=6)
    later = NOON + timedelta(minutes=200)
    store.apply(A, [ItemChange(A, "k", {"n": 3})], now=later)
    assert store.get(A, [(A, "k")], now=later)[0].created_at == later  # what expired is not what was updated
    store.apply(A, [ItemChange(A, "k", {}, ttl=1)], now=later)
    assert [store.sweep(A, now=later + timedelta(minutes=minutes)) for minutes in (0.5, 1, 2)] == [0, 1, 0]
    assert store.sweep(("never",), now=later) == 0


# -- whole-namespace verbs ---------------------------------------------------------------------------------------------


def test_forgetting_everything_takes_the_items(memory, items):
    scope = memory.namespace("acme")
    segment = scope.add("kite")
    items.put(A, "k", {}, texts=[("t", "kite")])
    items.put(A, "soon", {}, ttl=5)
    memory.namespace("other").items.put(A, "k", {}, texts=[("t", "kite")])
    assert (scope.stats()["items"], memory.namespaces()) == (2, [("acme",), ("other",)])
    by_hand(memory, "UPDATE items SET expires_at = '2020-01-01T00:00:00.000000+00:00' WHERE key = 'soon'")
    for chosen, n_items in (
        (scope.forget(segment.id, preview=True), 0),
        (scope.forget(everything=True, preview=True), 1),
    ):
        assert (chosen["segments"], chosen["items"]) == (1, n_items)
    refuse(memory, "DELETE", "not now")
    with pytest.raises(StoreError, match="not now"):
        scope.forget(everything=True)
    assert (scope.stats()["segments"], items.count()) == (1, 1)
    postgres = memory.parts.store.database.place.startswith("postgresql")
    by_hand(memory, "DROP TRIGGER no ON items" if postgres else "DROP TRIGGER no")
    counts = scope.forget(everything=True)
    assert (counts["segments"], counts["items"]) == (1, 1)
    assert (scope.stats()["items"], items.search(), memory.namespaces()) == (0, [], [("other",)])
    assert len(rows(memory)) == 1
    assert scope.forget(everything=True)["items"] == 0
    scope.add("boat")
    items.put(A, "k", {})
    assert scope.session("default").forget(session="default")["items"] == 0
    assert items.count() == 1


def test_an_export_carries_items_losslessly(memory, items, tmp_path):
    scope = memory.namespace("acme")
    scope.session("s").add("kite")
    items.put(("a", '"b"'), "k", {"n": [1, {"é": None}]}, texts=[("t", "kite"), ("u[*].0", "boat")], ttl=5)
    items.put(("a", '"b"'), "k", {"n": 2}, texts=[("t", "kite"), ("u[*].0", "boat")], ttl=5)
    items.apply([ItemChange(A, str(i), {"n": i}) for i in range(SCAN_PAGE + 3)])
    items.put(A, "soon", {}, ttl=5)
    by_hand(memory, "UPDATE items SET expires_at = '2020-01-01T00:00:00.000000+00:00' WHERE key = 'soon'")
    file = io.StringIO()
    assert scope.export(file) == 1
    lines = file.getvalue().splitlines()
    assert sum('{"item"' in line for line in lines) == SCAN_PAGE + 4
    with Memory.open(tmp_path / "other.db", embedder=HashEmbedder(32)) as other:
        there = other.namespace("new")
        for _ in range(2):
            there.import_(lines)
            assert list(there.items.scan()) == list(items.scan())
            assert there.stats()["segments"] == 1
            assert not any(other.check().values())
        assert there.import_(lines) == (0, 1)
        there.items.put(A, "0", {"n": "newer"})
        there.items.delete(A, "1")
        there.import_(lines)
        assert (there.items.get(A, "0").value, there.items.get(A, "1").value) == ({"n": "newer"}, {"n": 1})
        items.put(A, "0", {"n": "newest"})
        file = io.StringIO()
        scope.export(file)
        there.import_(file.getvalue().splitlines())
        assert there.items.get(A, "0").value == {"n": "newest"}
    file = io.StringIO()
    scope.session("s").export(file)
    assert "item" not in file.getvalue()


def test_an_item_that_is_not_whole_is_told_with_its_line(memory):
    good = {"path": ["a"], "key": "k", "value": {}, "texts": [], "ttl": None, "created_at": None, "updated_at": None,
            "expires_at": None}  # fmt: skip
    header = json.dumps({"memory_os_export": 1})
    for wrong in (
        {"path": []},
        {"path": "a"},
        {"key": 1},
        {"value": [1]},
        {"ttl": -1},
        {"texts": ["x"]},
        {"created_at": "soon"},
    ):
        with pytest.raises(InvalidInputError) as caught:
            memory.namespace("acme").import_(
                [header, json.dumps({"item": good}), json.dumps({"item": {**good, **wrong}})]
            )
        assert caught.value.line == 3
    assert keys(memory.namespace("acme").items.search()) == ["k"]


def test_the_doctor_finds_what_is_wrong_with_items(tmp_path):
    path = tmp_path / "memory.db"
    with Memory.open(path, embedder="hash") as memory:
        find_what_is_wrong(path, memory, memory.namespace("acme").items)


def find_what_is_wrong(path, memory, items):
    items.put(A, "k", {}, texts=[("t", "kite"), ("u", "boat")])
    assert not any(memory.check().values())
    by_hand(memory, "UPDATE item_texts SET vector = NULL, fingerprint = NULL WHERE field = 't'")
    with sqlite3.connect(path) as raw:  # without foreign keys
        raw.execute("INSERT INTO item_texts(item_pk, namespace_id, field, text) VALUES (99, 1, 'f', 'stray')")
    raw.close()
    found = memory.check()
    assert (found["pending_item_vectors"], found["orphan_item_texts"]) == (["1", "3"], ["3"])
    repaired = memory.repair()
    assert (repaired["pending_item_vectors"], repaired["orphan_item_texts"]) == (2, 1)
    assert not any(memory.check().values())
    assert len(rows(memory)) == 2


def test_the_command_knows_items(place, tmp_path, monkeypatch):
    def memos(*words):
        told = ["--store", str(place), "--embedder", "hash"]
        return CliRunner().invoke(app, [*words, *(told if words[0] not in ("stats", "export") else told[:2])])

    with Memory.open(place, embedder="hash") as memory:
        items = memory.namespace("default").items
        items.put(A, "k", {"n": 1}, texts=[("t", "kite")])
        items.put(A, "l", {"n": 2})
        by_hand(memory, "UPDATE item_texts SET vector = NULL, fingerprint = NULL")
    assert json.loads(memos("stats", "--json").stdout)["items"] == 2
    doctor = memos("doctor")
    assert (doctor.exit_code, "work left, no fault" in doctor.stdout) == (0, True)
    assert memos("doctor", "--repair").exit_code == 0
    file = tmp_path / "out.jsonl"
    assert "Wrote 0 segments" in memos("export", str(file)).stdout
    assert memos("forget", "--everything", "--preview").stdout == "Would forget 0 segments and 2 items.\n"
    assert memos("forget", "--everything", "--yes").stdout == "Forgot 0 segments and 2 items.\n"
    assert memos("import", str(file), "--restore").exit_code == 0
    assert json.loads(memos("forget", "--everything", "--yes", "--json").stdout)["items"] == 2


def test_a_database_of_before_gets_its_tables(tmp_path):
    path = tmp_path / "memory.db"
    from alembic.command import upgrade
    from alembic.config import Config
    from sqlalchemy import create_engine

    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", "memory_os.stores:migrations")
        upgrade(config, "0005")
    engine.dispose()
    with Memory.open(path, embedder="hash") as memory:
        assert memory.namespace("a").items.count() == 0
        memory.namespace("a").items.put(A, "k", {}, texts=[("t", "kite")])
        assert np.isclose(memory.namespace("a").items.search(query="kite")[0].score, 1)


def test_the_same_verbs_for_asyncio(place):
    async def use():
        async with AsyncMemory.open(place, embedder="hash") as memory:
            items = memory.namespace("a").items
            await items.put(("a",), "k", {"x": 1}, texts=[("x", "one cat")])
            await items.put(("a",), "gone", {})
            await items.delete(("a",), "gone")
            [found] = await items.search(query="cat")
            assert (await items.get(("a",), "k")).value == found.value == {"x": 1}
            return await items.paths(), await items.count(), await items.sweep()

    assert asyncio.run(use()) == ([("a",)], 1, 0)
