"""A full disk and a read-only one, during every operation: one clear error, nothing lost, and afterwards it works.

The disk is full in two ways: no file may grow beyond a size (a limit of the process), and the database may have no more
pages. Both start with no room at all and are given more and more, until the operation succeeds: so it fails at every
place where it can.
"""

import json
import logging
import os
import re
import resource
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch

from memory_os import Memory, NewSegment
from memory_os.adapters.scripted import HashEmbedder, ScriptedLLM
from memory_os.errors import InvalidInputError, MemoryOSError, StoreError
from memory_os.protocols import KV

ALICE = ("acme", "alice")
ROOM = [0, *(2**n for n in range(12, 24))]  # bytes
FIX = re.compile(r"[Ff]ree some space|full or broken|check (its|the) permissions")
UNFINISHED = {"pending_vectors", "pending_item_vectors", "bank"}


class FakeLLM(ScriptedLLM):
    """Repeats the end of what it is asked; its keys and values are the lengths of words."""

    def __init__(self):
        super().__init__(lambda messages: f"It was asked: {messages[-1]['content'][-300:]}", context_window=1024)

    def search_layer(self):
        return 0

    def kv_fingerprint(self, prompt):
        return "lengths"

    def encode_kv(self, prompt, *, surprisal=False):
        for line in prompt.lines:
            ids = tuple(len(word) for word in line.split())
            keys = torch.tensor(ids, dtype=torch.float16)[None, None, :, None].repeat(1, 1, 1, 64)
            yield KV(ids, keys, keys)

    def query_keys(self, text, layer):
        raise AssertionError("not asked here")

    def count_cached(self, prompt):
        return 10 + sum(map(self.count_text, prompt.lines))

    def generate_cached(self, prompt, memory, *, max_tokens, stop=()):
        raise AssertionError("not asked here")

    def continuations(self, prompt, memory, texts):
        raise AssertionError("not asked here")


def opened(folder: Path, dimension: int = 64) -> Memory:
    return Memory.open(folder / "memory.db", llm=FakeLLM(), embedder=HashEmbedder(dimension), reply_tokens=100)


def long(n: int) -> str:
    return f"Fact {n}: " + " ".join(f"word{n}x{i}" for i in range(300))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    with opened(folder) as memory:
        scope = memory.namespace(*ALICE)
        scope.add_many([NewSegment(f"Old fact {n} of the harbour.", "old") for n in range(8)])
        scope.session("old").chat("What of the harbour?")
        scope.replace_many([NewSegment(f"Version 0 of {n}.", "s", key=f"k{n}") for n in range(3)])
        scope.items.put(("a",), "k", {"v": 0}, texts=[("v", "an item")])
        scope.add_many([NewSegment(long(n), "bulk") for n in range(100, 110)])
        scope.export(folder / "out.jsonl")
    (folder / "book.txt").write_text("\n\n".join(long(n) for n in range(200, 212)), encoding="utf-8")
    lines = [json.dumps({"role": "user", "content": long(n)}) for n in range(300, 320)]
    (folder / "chat.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with opened(folder / "..") as other:
        other.namespace("other").add_many([NewSegment(long(n), "s") for n in range(400, 410)])
        other.namespace("other").session("s").chat("What now?")
        other.namespace("other").items.put(("b",), "k", {"v": 1})
        other.namespace("other").export(folder / "in.jsonl")
    return folder


@pytest.fixture
def folder(prepared, tmp_path) -> Path:
    shutil.copytree(prepared, tmp_path / "work")
    return tmp_path / "work"


Operation = Callable[[Memory, Path, int], object]


def _scope(memory: Memory):
    return memory.namespace(*ALICE)


OPERATIONS: dict[str, Operation] = {
    "add": lambda m, _, n: _scope(m).add(long(n)),
    "add_many": lambda m, _, n: _scope(m).add_many([NewSegment(long(1000 + 20 * n + i), "s") for i in range(20)]),
    "replace_many": lambda m, _, n: _scope(m).replace_many(
        [NewSegment(f"Version 1 of {i}. " + long(i), "s", key=f"k{i}") for i in range(3)]
    ),
    "ingest": lambda m, f, _: _scope(m).ingest(f / "chat.jsonl", name="chat"),
    "chat": lambda m, _, n: _scope(m).session("new").chat(f"Attempt {n}: what of the harbour?"),
    "context": lambda m, _, n: _scope(m).session("new").context(f"Attempt {n}: the harbour?", record=True),
    "forget": lambda m, *_: _scope(m).forget(session="bulk"),
    "forget everything": lambda m, *_: _scope(m).forget(everything=True),
    "summarize": lambda m, f, _: _scope(m).summarize(f / "book.txt", name="book"),
    "fill_bank": lambda m, *_: _scope(m).fill_bank(),
    "export": lambda m, f, _: _scope(m).export(f / "out.jsonl"),
    "import": lambda m, f, _: _scope(m).import_(f / "in.jsonl"),
    "put an item": lambda m, _, n: _scope(m).items.put(("a",), "k", {"v": 9 * long(n)}, texts=[("v", long(n))]),
    "delete an item": lambda m, *_: _scope(m).items.delete(("a",), "k"),
    "confirm": lambda m, *_: _scope(m).confirm(answer=long(1)),
    "re-embed": lambda m, *_: m.repair(),
}
NO_NEW_PAGE = {"export", "forget", "forget everything", "delete an item", "re-embed"}


# -- faults ------------------------------------------------------------------------------------------------------------


@contextmanager
def no_file_beyond(n_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def on_every_connection(memory: Memory, fault: str, cure: str) -> Iterator[None]:
    engine, statement = memory.parts.store.database.engine, [fault]

    def taken(connection, *_):
        connection.execute(statement[0])

    sa.event.listen(engine, "checkout", taken)
    try:
        yield
    finally:
        statement[0] = cure
        with memory.parts.store.database.read() as connection:
            connection.exec_driver_sql("SELECT 1")
        sa.event.remove(engine, "checkout", taken)


@contextmanager
def no_page_beyond(memory: Memory, n_bytes: int) -> Iterator[None]:
    with memory.parts.store.database.read() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        free = connection.exec_driver_sql("PRAGMA freelist_count").scalar_one()
    assert free < 4
    most = pages + n_bytes // 4096
    with on_every_connection(memory, f"PRAGMA max_page_count = {most}", "PRAGMA max_page_count = 1073741823"):
        yield


@contextmanager
def read_only(memory: Memory) -> Iterator[None]:
    with on_every_connection(memory, "PRAGMA query_only = ON", "PRAGMA query_only = OFF"):
        yield


def state(memory: Memory) -> tuple[dict[str, str], dict[str, object]]:
    segments = list(memory.parts.store.scan(ALICE))
    assert [s.seq for s in segments] == sorted({s.seq for s in segments})
    assert max(Counter(s.text for s in segments).values(), default=0) <= 1, "stored twice"
    return {s.id: s.text for s in segments}, {item.key: item.value for item in _scope(memory).items.search(limit=99)}


def faults(memory: Memory) -> set[str]:
    return {kind for kind, rows in memory.check().items() if rows}


# -- during every operation --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "name"),
    [("file size", name) for name in OPERATIONS] + [("pages", name) for name in OPERATIONS if name not in NO_NEW_PAGE],
)
def test_a_full_disk_is_one_clear_error_and_with_room_it_works(name, fault, folder):
    exported = (folder / "out.jsonl").read_bytes()
    errors: list[MemoryOSError] = []
    with opened(folder, 16 if name == "re-embed" else 64) as memory:
        for attempt, room in enumerate(ROOM):
            before, items = state(memory)
            full = no_file_beyond(room) if fault == "file size" else no_page_beyond(memory, room)
            try:
                with full:
                    OPERATIONS[name](memory, folder, attempt)
            except (StoreError, InvalidInputError) as error:
                errors.append(error)
            else:
                break
            after, items_after = state(memory)
            assert items_after == items
            assert before.items() <= after.items() or not after.items() & before.items() ^ after.items()
            assert (folder / "out.jsonl").read_bytes() == exported
            assert faults(memory) <= UNFINISHED
        else:
            pytest.fail(f"{name} never succeeded: {errors}")
        assert errors, "the fault came too late"
        for error in errors:
            assert FIX.search(str(error)), error
        memory.repair()
        assert faults(memory) == set()
        if name != "forget":
            OPERATIONS[name](memory, folder, 99)
            memory.repair()
            assert faults(memory) == set()
        left, _ = state(memory)
        gone = {"forget": 10, "forget everything": len(before), "replace_many": 3}.get(name, 0)
        assert len(before.items() - left.items()) == gone
    assert {file.name for file in folder.iterdir()} <= {
        "memory.db", "memory.db.bank", "out.jsonl", "in.jsonl", "book.txt", "chat.jsonl",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "export"])
def test_a_read_only_disk_is_one_clear_error_and_nothing_is_changed(name, folder):
    with opened(folder, 16 if name == "re-embed" else 64) as memory:
        before = state(memory)
        with read_only(memory), pytest.raises(StoreError, match=r"cannot be written .*check the permissions"):
            OPERATIONS[name](memory, folder, 0)
        assert state(memory) == before
        assert faults(memory) <= UNFINISHED
        OPERATIONS[name](memory, folder, 0)
        memory.repair()
        assert faults(memory) == set()


def test_a_read_only_disk_can_still_be_read(folder):
    with opened(folder) as memory:
        scope = _scope(memory)
        scope._parts.store.append(ALICE, [NewSegment("The lighthouse keeper is called Ines.", "s")])  # without a vector
        with read_only(memory):
            assert scope.search("lighthouse keeper", k=1)[0].segment.text == "The lighthouse keeper is called Ines."
            context = scope.context("Who keeps the lighthouse?")
            assert "Ines" in context.text
            assert any("searched by their words only" in note for note in context.trace.notes)
            assert scope.nearest("harbour")
            assert scope.items.search(query="item")[0].value == {"v": 0}
            assert scope.history(1)
            assert scope.why()[0].query == "What of the harbour?"
            assert scope.export(folder / "out.jsonl") == 24
            with pytest.raises(StoreError, match="check the permissions"):
                memory.check()


# -- what is stored is stored ------------------------------------------------------------------------------------------


def test_what_is_stored_is_acknowledged_also_where_there_is_no_room_for_its_vector(folder, caplog):
    """An error would have the caller store it again."""
    with opened(folder) as memory:
        engine, scope = memory.parts.store.database.engine, _scope(memory)

        def after_the_first_transaction(connection, *_):
            connection.execute(f"PRAGMA query_only = {'ON' if begun else 'OFF'}")
            begun.append(True)

        for write in (
            lambda: scope.add("The lighthouse keeper is called Ines."),
            lambda: scope.replace_many([NewSegment("The ferryman is called Omar.", "s", key="ferry")]),
            lambda: scope.items.put(("c",), "k", {"v": 1}, texts=[("v", "a lighthouse")]),
        ):
            caplog.clear()
            begun: list[bool] = []
            sa.event.listen(engine, "checkout", after_the_first_transaction)
            with caplog.at_level(logging.WARNING, "memory_os"):
                write()
            assert "it is stored; what is derived from it is still to be made" in caplog.text
            with pytest.raises(StoreError):
                scope.add("There is no room for this.")
            begun.clear()
            assert scope.history(1)
            sa.event.remove(engine, "checkout", after_the_first_transaction)
        assert faults(memory) == {"pending_vectors", "pending_item_vectors"}
        assert scope.nearest("The lighthouse keeper is called Ines.", k=1)[0].segment.text.endswith("Ines.")
        assert scope.items.search(query="a lighthouse")[0].value == {"v": 1}
        assert faults(memory) == set()


@pytest.mark.parametrize("room", [0, 4096])
def test_a_new_database_on_a_full_disk_is_one_clear_error(tmp_path, room):
    with no_file_beyond(room), pytest.raises(StoreError, match=r"full or broken|disk is full"):
        opened(tmp_path)
    with opened(tmp_path) as memory:
        memory.namespace("a").add("now there is room")
        assert faults(memory) == set()


# -- folders that cannot be written ------------------------------------------------------------------------------------


@contextmanager
def as_an_ordinary_user() -> Iterator[None]:
    """Root may write everywhere, so it steps back to nobody."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)


@pytest.fixture
def open_folder(folder) -> Iterator[Path]:
    """The folder where an ordinary user may come in, and write the database."""
    place = Path(tempfile.mkdtemp())
    shutil.copytree(folder, place / "work")
    for path in (place, *place.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    yield place / "work"
    for path in (place, *place.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    shutil.rmtree(place)


def test_a_bank_whose_folder_cannot_be_written_costs_nothing_but_the_bank(open_folder):
    with opened(open_folder) as memory:
        scope, bank = _scope(memory), open_folder / "memory.db.bank" / "1"
        segments = scope.history(4)
        scope.fill_bank()
        extra = scope.add("One more.")
        bank.chmod(0o555)
        before = state(memory)
        with as_an_ordinary_user():
            with pytest.raises(StoreError, match=r"cannot write .*check its permissions"):
                scope.fill_bank()
            # what cannot be deleted from the disk is not said to be forgotten
            with pytest.raises(StoreError, match=r"cannot delete .*check the permissions of its folder"):
                scope.forget(segments[0].id)
        assert state(memory) == before
        bank.chmod(0o777)
        assert faults(memory) == set()
        assert scope.fill_bank() == 1
        assert scope.forget(segments[0].id, extra.id)["bank"] == 2
        assert faults(memory) == set()


def test_an_export_to_where_nothing_can_be_written_leaves_what_was_there(open_folder):
    exported = (open_folder / "out.jsonl").read_bytes()
    with opened(open_folder) as memory:
        _scope(memory).add("One more.")
        open_folder.chmod(0o555)
        with (
            as_an_ordinary_user(),
            pytest.raises(InvalidInputError, match=r"Permission denied; .*check the permissions"),
        ):
            _scope(memory).export(open_folder / "out.jsonl")
        assert (open_folder / "out.jsonl").read_bytes() == exported
        open_folder.chmod(0o777)
        assert _scope(memory).export(open_folder / "out.jsonl") == 24
