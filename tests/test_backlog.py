"""The threads of the background: one of each kind, ended with the process, never starved, and never in the way."""

import subprocess
import sys
import threading
import time

from memory_os import Memory
from memory_os.adapters.scripted import HashEmbedder, ScriptedLLM
from memory_os.backlog import STEP, Made, VectorBacklog
from memory_os.types import NewSegment

A, B = ("a",), ("b",)


def eventually(true) -> None:
    for _ in range(3000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to be")


def named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == f"memory_os {name}"]


class Work:
    """Counts what it was asked, and makes so much of it."""

    def __init__(self, **left: int) -> None:
        self.left = {(name,): n for name, n in left.items()}
        self.counted: list[tuple[str, ...]] = []
        self.asked: list[tuple[tuple[str, ...], int, bool]] = []
        self.fails_with: Exception | None = None
        self.theirs = 0
        self.go = threading.Event()
        self.go.set()

    def count(self, namespace):
        self.counted.append(namespace)
        return self.left[namespace]

    def make(self, namespace, most, newest):
        self.go.wait(30)
        self.asked.append((namespace, most, newest))
        if self.fails_with:
            raise self.fails_with
        made = min(most, self.left[namespace])
        self.left[namespace] -= made
        return Made(made, made - self.theirs)


# -- vectors -----------------------------------------------------------------------------------------------------------


def test_it_counts_once_and_ends_also_where_nothing_grows_less():
    class Undone(Work):
        def make(self, namespace, most, newest):
            super().make(namespace, most, newest)
            self.left[namespace] = 1000  # another embedder makes them anew for itself
            return Made(most, most)

    work = Undone(a=1000)
    backlog = VectorBacklog(work.count, work.make)
    backlog.resume(A)
    backlog.join(30)
    assert work.counted == [A]
    assert len(work.asked) == -(-1000 // STEP)
    assert not backlog.busy(A)


def test_a_failure_ends_the_queue_and_the_next_use_begins_anew():
    work = Work(a=1000, b=10)
    work.fails_with = ConnectionError("away")
    work.go.clear()
    backlog = VectorBacklog(work.count, work.make)
    backlog.resume(A)
    backlog.resume(B)
    work.go.set()
    backlog.join(30)
    assert len(work.asked) == 1  # and not "b", by the same embedder
    assert backlog.failure == "ConnectionError: away"
    assert [backlog.busy(each) for each in (A, B)] == [False, False]
    work.fails_with = None
    backlog.resume(A)
    backlog.join(30)
    assert (work.left[A], backlog.failure) == (0, "")


def test_a_thread_that_died_is_started_again():
    work = Work(a=10)
    backlog = VectorBacklog(work.count, work.make)
    backlog._thread = threading.Thread(target=int)
    backlog._thread.start()
    backlog._thread.join()
    backlog.resume(A)
    backlog.join(30)
    assert work.left[A] == 0


def test_close_waits_for_the_batch_under_way_and_begins_no_other():
    work = Work(a=1000)
    work.go.clear()
    backlog = VectorBacklog(work.count, work.make)
    backlog.resume(A)
    closing = threading.Thread(target=backlog.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    work.go.set()
    closing.join(30)
    assert named("vectors") == []
    assert len(work.asked) == 1
    backlog.resume(A)
    assert (named("vectors"), len(work.asked)) == ([], 1)


def test_turns_that_never_end_hold_it_back_so_long_and_no_longer():
    work = Work(a=2 * STEP)
    backlog = VectorBacklog(work.count, work.make, patience_s=0.05)
    with backlog.held():
        backlog.resume(A)
        backlog.join(30)
    assert work.left[A] == 0
    work.left[A] = STEP
    patient = VectorBacklog(work.count, work.make)
    with patient.held():
        patient.resume(A)
        patient.join(0.2)
        assert work.left[A] == STEP
    patient.join(30)
    assert work.left[A] == 0


def test_who_finds_another_at_its_end_goes_to_the_other():
    work = Work(a=4 * STEP)
    work.theirs = 1
    backlog = VectorBacklog(work.count, work.make)
    backlog.resume(A)
    backlog.join(30)
    assert [newest for _, _, newest in work.asked] == [False, True, False, True]


def test_what_is_being_made_in_the_thread_is_not_made_by_a_search_as_well(tmp_path):
    path = tmp_path / "memory.db"
    with Memory.open(path, embedder=HashEmbedder(64)) as memory:
        memory.namespace("a").add_many([NewSegment(f"kite {n}", "s") for n in range(600)])
    threads: list[str] = []
    go = threading.Event()

    class Gated(HashEmbedder):
        def embed_documents(self, texts):
            threads.append(threading.current_thread().name)
            if len(threads) > 1:
                go.wait(30)
            return super().embed_documents(texts)

        def embed_query(self, text):
            return HashEmbedder(96).embed_query(text)

    with Memory.open(path, embedder=Gated(96)) as memory:
        memory.namespace("a").search("kite")
        eventually(lambda: memory.pending() == {A: 600 - STEP})  # fewer than are made while somebody waits
        memory.namespace("a").search("kite")
        go.set()
        memory.parts.vectors.join(30)
    assert set(threads) == {"memory_os vectors"}


def test_vectors_of_another_embedder_are_seen_on_either_side_of_its_name(tmp_path):
    class Named(HashEmbedder):
        def __init__(self, name: str) -> None:
            super().__init__(64)
            self.fingerprint = name

    for n, (former, later) in enumerate([("a", "b"), ("b", "a")]):
        path = tmp_path / f"{n}.db"
        with Memory.open(path, embedder=Named(former)) as memory:
            memory.namespace("a").add("kite")
            memory.namespace("a").add("boat")
        with Memory.open(path, embedder=Named(later)) as memory:
            memory.namespace("a").add("ship", metadata={})  # catches up
            assert memory.pending() == {}
            assert len(memory.namespace("a").nearest("kite")) == 3
        with Memory.open(path, embedder=Named(former)) as memory:
            assert memory.pending() == {A: 3}


# -- summaries ---------------------------------------------------------------------------------------------------------


class Slow(ScriptedLLM):
    """Says nothing in the thread of summaries until it is let."""

    def __init__(self) -> None:
        super().__init__(lambda messages: "Noted.")
        self.go = threading.Event()
        self.at_once, self.most = 0, 0

    def generate(self, *args, **kwargs):
        if threading.current_thread().name == "memory_os summaries":
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            self.go.wait(30)
            self.at_once -= 1
        yield from super().generate(*args, **kwargs)


def test_a_slow_llm_is_asked_by_one_thread_which_goes_on_with_the_latest(tmp_path):
    llm = Slow()
    with Memory.open(tmp_path / "memory.db", embedder="hash", llm=llm) as memory:
        backlog = memory.parts.backlog
        for labels in (A, B):
            ids = [memory.namespace(*labels).add(f"story {n} " * 200).id for n in range(3)]
            memory.parts.store.list_for_summary(labels, ids)
        for labels in (A, A, B):
            backlog.resume(labels, llm)
        assert len(named("summaries")) == 1
        llm.go.set()
        backlog.join(30)
        assert llm.most == 1
        assert memory.parts.store.listed_for_summary(B, 9) == []
        assert len(memory.parts.store.listed_for_summary(A, 9)) == 3  # stopped, and left on the list
        backlog.resume(A, llm)
        backlog.join(30)
        assert memory.parts.store.listed_for_summary(A, 9) == []
    assert named("summaries") == []


LEAVING = """
import atexit, sys, threading, time
ended = threading.Event()
atexit.register(lambda: print("ended before" if ended.is_set() else "still at work", flush=True))
from memory_os import Memory
from memory_os.adapters.scripted import HashEmbedder, ScriptedLLM
from memory_os.types import NewSegment
begun = threading.Event()

class Llm(ScriptedLLM):
    def generate(self, messages, **options):
        begun.set()
        time.sleep(0.5)
        ended.set()
        yield "Noted."

class Slow(HashEmbedder):
    def embed_documents(self, texts):
        begun.set()
        time.sleep(0.5)
        ended.set()
        return super().embed_documents(texts)

if sys.argv[2] == "summaries":
    memory = Memory.open(sys.argv[1], embedder="hash", llm=Llm([]))
    segment = memory.namespace("a").add("a long story of kites " * 60)
    memory.parts.store.list_for_summary(("a",), [segment.id])
    memory.parts.backlog.resume(("a",), memory.parts.llm)
else:
    with Memory.open(sys.argv[1], embedder=HashEmbedder(64)) as memory:
        memory.namespace("a").add_many([NewSegment(f"kite {n}", "s") for n in range(1000)])
    memory = Memory.open(sys.argv[1], embedder=Slow(96))
    memory.namespace("a").search("kite")
begun.wait()
"""


def test_a_process_that_leaves_without_close_waits_for_what_is_at_work(tmp_path):
    for what in ("summaries", "vectors"):
        command = [sys.executable, "-c", LEAVING, str(tmp_path / f"{what}.db"), what]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.stdout, done.stderr, done.returncode) == ("ended before\n", "", 0)
