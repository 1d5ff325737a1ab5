"""A change of embedder: opened at once, answered by words, made anew in the background, and nothing is lost."""

import logging
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from memory_os import Memory
from memory_os.adapters.scripted import HashEmbedder, ScriptedLLM
from memory_os.backlog import STEP
from memory_os.derive import INLINE_PENDING
from memory_os.types import NewSegment

N = 3000
OLD, NEW = 64, 96
NOTE = "segments have no vector of this embedder yet"


class Gated(HashEmbedder):
    """Makes vectors of documents only when it is let; so many batches at most."""

    def __init__(self, dimension: int = NEW, failures: int = 0) -> None:
        super().__init__(dimension)
        self.go = threading.Semaphore(0)
        self.failures = failures
        self.batches: list[list[str]] = []
        self.threads: set[str] = set()

    def embed_documents(self, texts):
        if len(texts) == STEP or threading.current_thread().name == "memory_os vectors":
            self.go.acquire(timeout=60)
        self.threads.add(threading.current_thread().name)
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the embedder is away")
        self.batches.append(list(texts))
        return super().embed_documents(texts)

    def embed_query(self, text):
        return HashEmbedder(self.dimension).embed_query(text)

    def let(self, n: int = 10**6) -> None:
        self.go.release(n)


@pytest.fixture(params=["exact", "chroma"])
def vectors(request):
    return request.param


@pytest.fixture
def path(tmp_path, vectors):
    """A store with vectors of the old embedder."""
    with Memory.open(tmp_path / "memory.db", embedder=HashEmbedder(OLD), vectors=vectors) as memory:
        fill(memory, ("a",), N)
        fill(memory, ("b",), INLINE_PENDING + 10)
        memory.namespace("a").search("kite number 7")
    return tmp_path / "memory.db"


def fill(memory: Memory, labels: tuple[str, ...], n: int) -> None:
    memory.namespace(*labels).add_many([NewSegment(f"kite number {i} of word{i % 50}", "s") for i in range(n)])


def by_fingerprint(path) -> dict[str, int]:
    """How many vectors there are of each embedder, and that each segment has exactly one."""
    raw = sqlite3.connect(path)
    assert (
        raw.execute("SELECT count(*) FROM segments").fetchone()
        == raw.execute("SELECT count(DISTINCT s.pk) FROM segments s JOIN vectors v ON v.segment_pk = s.pk").fetchone()
    )
    found = dict(raw.execute("SELECT fingerprint, count(*) FROM vectors GROUP BY 1").fetchall())
    widths = dict(raw.execute("SELECT fingerprint, max(length(vector)) / 4 FROM vectors GROUP BY 1").fetchall())
    raw.close()
    assert all(name == f"hash-{width}-v1" for name, width in widths.items())
    return found


def eventually(true, what: str) -> None:
    for _ in range(6000):
        if true():
            return
        time.sleep(0.01)
    pytest.fail(what)


def notes(memory: Memory, labels: str = "a") -> list[str]:
    return [note for note in memory.namespace(labels).context("kite number 7").trace.notes if NOTE in note]


@pytest.mark.slow
def test_it_opens_at_once_answers_by_words_and_embeds_in_the_background(path, vectors):
    embedder = Gated()
    with Memory.open(path, embedder=embedder, vectors=vectors) as memory:
        scope = memory.namespace("a")
        assert memory.pending() == {("a",): N, ("b",): INLINE_PENDING + 10}
        assert (memory.parts.vectors._thread, embedder.batches) == (None, [])  # nothing yet: nobody asked

        # by words alone, and it is said so
        assert scope.search("number 1234")[0].segment.text.startswith("kite number 1234 ")
        [note] = notes(memory)
        assert note.startswith(f"{N} segments")
        assert scope.nearest("kite number 7") == []
        assert memory.namespace("b").search("number 3")  # asked for second
        assert embedder.batches == []

        # two batches: each is durable, counted, and found by meaning
        embedder.let(2)
        eventually(lambda: memory.pending()[("a",)] == N - 2 * STEP, "two batches")
        assert scope.stats()["pending"] == N - 2 * STEP
        assert by_fingerprint(path)[f"hash-{NEW}-v1"] == 2 * STEP
        assert notes(memory)[0].startswith(f"{N - 2 * STEP} segments")
        near = scope.nearest("kite number 7", k=N)
        # of the new ones, all; of the old, none
        assert {hit.segment.seq for hit in near} == set(range(1, 2 * STEP + 1))
        assert near[0].score == pytest.approx(
            max(float(np.dot(HashEmbedder(NEW).embed_query("kite number 7"),
                             HashEmbedder(NEW).embed_query(hit.segment.text))) for hit in near), abs=1e-5)  # fmt: skip
        assert len({hit.segment.id for hit in near}) == len(near)

        # what is added meanwhile has its vector at once
        new = scope.add("a boat called Zephyr")
        assert scope.nearest("a boat called Zephyr")[0].segment == new
        embedder.let()
        eventually(lambda: memory.pending() == {}, "all of them")
        assert scope.stats()["pending"] == 0
        assert notes(memory) == []
        assert embedder.threads == {"memory_os vectors", "MainThread"}
        texts = [text for batch in embedder.batches for text in batch]
        assert len(texts) == len(set(texts[:N])) + 1 + INLINE_PENDING + 10  # each once, but for those that "b" shares
        of_a = [text for text in texts if "boat" not in text][:N]
        assert of_a == [f"kite number {i} of word{i % 50}" for i in range(N)]  # the namespace asked for first, in order
        assert not any(memory.check().values())
    assert by_fingerprint(path) == {f"hash-{NEW}-v1": N + 1 + INLINE_PENDING + 10}


@pytest.mark.slow
def test_what_was_made_answers_as_a_store_that_never_had_another(path, vectors, tmp_path):
    with Memory.open(path, embedder=HashEmbedder(NEW), vectors=vectors) as memory:
        memory.namespace("a").search("kite")
        memory.parts.vectors.join()
        changed = [(hit.segment.seq, hit.score) for hit in memory.namespace("a").search("number 77 word9", k=20)]
    (tmp_path / "fresh").mkdir()
    with Memory.open(tmp_path / "fresh" / "memory.db", embedder=HashEmbedder(NEW), vectors=vectors) as memory:
        fill(memory, ("a",), N)
        fresh = [(hit.segment.seq, hit.score) for hit in memory.namespace("a").search("number 77 word9", k=20)]
    assert changed == fresh


CHANGED = """
import sys, time
from memory_os import Memory
from memory_os.adapters.scripted import HashEmbedder

class Slow(HashEmbedder):
    def embed_documents(self, texts):
        time.sleep(float(sys.argv[2]))
        return super().embed_documents(texts)

with Memory.open(sys.argv[1], embedder=Slow(96), vectors=sys.argv[3]) as memory:
    scope = memory.namespace("a")
    scope.search("kite")
    print("begun", flush=True)
    while memory.parts.vectors.busy(("a",)):
        assert scope.search("number 1234")[0].segment.text.startswith("kite number 1234 ")
        time.sleep(0.01)
    print(scope.stats()["pending"], flush=True)
"""


def changing(path, vectors, pause: float) -> subprocess.Popen:
    command = [sys.executable, "-c", CHANGED, str(path), str(pause), vectors]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_kill_or_a_close_in_the_middle_costs_no_more_than_a_batch(path, vectors):
    process = changing(path, vectors, 0.1)
    assert process.stdout.readline() == "begun\n"
    eventually(lambda: by_fingerprint(path).get(f"hash-{NEW}-v1", 0) >= 3 * STEP, "three batches")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    made = by_fingerprint(path)[f"hash-{NEW}-v1"]
    assert 3 * STEP <= made < N
    embedder = Gated()
    memory = Memory.open(path, embedder=embedder, vectors=vectors)
    assert memory.pending()[("a",)] == N - made  # it goes on where it was
    memory.namespace("a").search("kite")
    embedder.let(1)
    eventually(lambda: len(embedder.batches) == 1, "a batch")
    closing = threading.Thread(target=memory.close)
    closing.start()
    embedder.let()
    closing.join(30)
    assert not closing.is_alive()
    assert len(embedder.batches) <= 3  # the one under way and no more
    assert by_fingerprint(path)[f"hash-{NEW}-v1"] == made + sum(map(len, embedder.batches))
    assert not [thread for thread in threading.enumerate() if thread.name == "memory_os vectors"]
    with Memory.open(path, embedder=HashEmbedder(NEW), vectors=vectors) as memory:
        for labels in ("a", "b"):
            memory.namespace(labels).search("kite")
        memory.parts.vectors.join()
        assert memory.pending() == {}
        assert not any(memory.check().values())


@pytest.mark.slow
def test_two_processes_at_once_do_no_harm(tmp_path):
    path = tmp_path / "memory.db"
    with Memory.open(path, embedder=HashEmbedder(OLD)) as memory:
        fill(memory, ("a",), N)
    both = [changing(path, "exact", 0.002) for _ in range(2)]
    for process in both:
        assert process.communicate(timeout=120)[0] in ("begun\n0\n", "begun\n")
        assert process.returncode == 0
    with Memory.open(path, embedder=HashEmbedder(NEW)) as memory:
        assert memory.pending() == {}
        assert not any(memory.check().values())
    assert by_fingerprint(path) == {f"hash-{NEW}-v1": N}


class Counting(HashEmbedder):
    n_embedded = 0

    def embed_documents(self, texts):
        self.n_embedded += len(texts)
        return super().embed_documents(texts)

    def embed_query(self, text):
        return HashEmbedder(self.dimension).embed_query(text)


@pytest.mark.parametrize("n", [200, 1000])
def test_two_embedders_on_one_store_make_vectors_once_and_say_so(tmp_path, n):
    """Each would make anew what the other made, with every search."""
    path, former, later = tmp_path / "memory.db", Counting(OLD), Counting(NEW)
    with Memory.open(path, embedder=former) as one, Memory.open(path, embedder=later) as other:
        fill(one, ("a",), n)
        for _ in range(3):
            for memory in (other, one):
                assert memory.namespace("a").search("number 77")[0].segment.text.startswith("kite number 77 ")
                memory.parts.vectors.join(60)
        assert (former.n_embedded, later.n_embedded) == (n, n)
        assert [note for note in other.namespace("a").context("kite").trace.notes if "another embedder" in note] == []
        [note] = [note for note in one.namespace("a").context("kite").trace.notes if "another embedder" in note]
        assert note.startswith(f"{n} segments have vectors by another embedder")
        new = one.namespace("a").add("a boat called Zephyr")  # has its vector, by who adds it
        assert [hit.segment for hit in one.namespace("a").nearest("a boat called Zephyr")] == [new]
        [listed] = one.namespace("a").add_many([NewSegment("a ship called Boreas", "s")], embed=False)
        one.namespace("a").search("ship")
        assert {hit.segment.id for hit in one.namespace("a").nearest("a ship")} == {new.id, listed.id}
        one.repair()  # asked for, it makes all of them
        assert one.pending() == {}


TWICE = """
import sys, time
from memory_os import Memory
from memory_os.adapters.scripted import HashEmbedder

class Slow(HashEmbedder):
    n_embedded = 0
    def embed_documents(self, texts):
        time.sleep(0.05)
        Slow.n_embedded += len(texts)
        return super().embed_documents(texts)

with Memory.open(sys.argv[1], embedder=Slow(96)) as memory:
    print("ready", flush=True)
    sys.stdin.readline()
    memory.namespace("a").search("kite")
    memory.parts.vectors.join()
    print(Slow.n_embedded)
"""


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path):
    path = tmp_path / "memory.db"
    with Memory.open(path, embedder=HashEmbedder(OLD)) as memory:
        fill(memory, ("a",), N)
    command = [sys.executable, "-c", TWICE, str(path)]
    both = [subprocess.Popen(command, stdin=-1, stdout=-1, text=True) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    made = [int(process.communicate(timeout=120)[0]) for process in both]
    assert N <= sum(made) <= N + 6 * STEP  # what both took up at once, at the start and where they met
    assert by_fingerprint(path) == {f"hash-{NEW}-v1": N}


def test_an_embedder_that_fails_is_noted_and_tried_again_and_no_search_fails(tmp_path, caplog):
    path = tmp_path / "memory.db"
    with Memory.open(path, embedder=HashEmbedder(OLD)) as memory:
        fill(memory, ("a",), 1000)
    embedder = Gated(failures=1)
    embedder.let()
    with Memory.open(path, embedder=embedder) as memory, caplog.at_level(logging.WARNING, "memory_os"):
        scope = memory.namespace("a")
        scope.search("kite")
        memory.parts.vectors.join()
        assert memory.pending() == {("a",): 1000}
        assert (embedder.batches, embedder.failures) == ([], 0)  # once, and not again and again
        assert "the embedder failed (ConnectionError)" in caplog.text  # what it said is in the trace, and no log
        [note] = notes(memory)  # tells of it, and tries again
        assert "making them failed (ConnectionError: the embedder is away)" in note
        memory.parts.vectors.join()
        assert memory.pending() == {}
        assert notes(memory) == []


def test_it_waits_while_a_turn_runs(tmp_path):
    path = tmp_path / "memory.db"
    with Memory.open(path, embedder=HashEmbedder(OLD)) as memory:
        fill(memory, ("a",), 1000)
    embedder = Gated()
    embedder.let()
    with Memory.open(path, embedder=embedder, llm=ScriptedLLM(["one two three four"])) as memory:
        stream = memory.namespace("a").stream("What of the kite?")
        next(stream)
        time.sleep(0.1)
        assert [len(batch) for batch in embedder.batches] == []  # it is asked for, and waits
        assert memory.parts.vectors.busy(("a",))
        for _ in stream:
            pass
        assert NOTE in " ".join(stream.reply.trace.notes)
        memory.parts.vectors.join()
        assert memory.pending() == {}


def test_few_are_made_on_the_spot(tmp_path):
    path = tmp_path / "memory.db"
    with Memory.open(path, embedder=HashEmbedder(OLD)) as memory:
        fill(memory, ("a",), INLINE_PENDING)
    with Memory.open(path, embedder=HashEmbedder(NEW)) as memory:
        assert notes(memory) == []
        assert memory.parts.vectors._thread is None
        assert memory.pending() == {}


def test_repair_makes_all_of_them_and_tells_how_far_it_is(tmp_path):
    path = tmp_path / "memory.db"
    with Memory.open(path, embedder=HashEmbedder(OLD)) as memory:
        fill(memory, ("a",), 1500)
    with Memory.open(path, embedder=HashEmbedder(NEW)) as memory:
        told: list[int] = []
        memory.repair(told.append)
        assert told[-1] == 1500
        assert told == sorted(set(told))
        assert memory.pending() == {}


def test_texts_of_items_are_made_anew_in_the_background_as_well(tmp_path):
    path, n = tmp_path / "memory.db", INLINE_PENDING + 200
    with Memory.open(path, embedder=HashEmbedder(OLD)) as memory:
        from memory_os.protocols import ItemChange

        memory.namespace("a").items.apply(
            [ItemChange(("p",), str(i), {"n": i}, (("n", f"kite number {i}"),)) for i in range(n)]
        )
    embedder = Gated()
    with Memory.open(path, embedder=embedder) as memory:
        items = memory.namespace("a").items
        assert memory.pending() == {("a",): n}
        assert len(items.search(query="kite number 7", limit=n)) == n  # all are there, without a score
        assert embedder.batches == []
        items.put(("p",), "new", {"n": -1}, texts=[("n", "a boat called Zephyr")])
        [best] = items.search(query="a boat called Zephyr", limit=1)  # has its vector at once
        assert (best.key, best.score) == ("new", pytest.approx(1.0))
        embedder.let()
        memory.parts.vectors.join()
        assert memory.pending() == {}
        assert items.search(query="kite number 7", limit=1)[0].score == pytest.approx(1.0)
        assert memory.namespace("a").stats()["pending"] == 0


def test_the_index_of_the_former_embedder_goes(tmp_path):
    import chromadb

    path = tmp_path / "memory.db"
    with Memory.open(path, embedder=HashEmbedder(OLD), vectors="chroma") as memory:
        for labels in ("a", "b"):
            fill(memory, (labels,), 5)
            memory.namespace(labels).search("kite")
    with Memory.open(path, embedder=HashEmbedder(NEW), vectors="chroma") as memory:
        memory.namespace("a").search("kite")
    client = chromadb.PersistentClient(str(path) + ".chroma", settings=chromadb.Settings(anonymized_telemetry=False))
    try:
        collections = client.list_collections()
        assert sorted(len(each.get(include=["embeddings"])["embeddings"][0]) for each in collections) == [OLD, NEW]
        assert len(collections) == 2  # of "a" the new one; of "b", which was not asked for, still the old one
    finally:
        client.close()
