"""Workers: derived work is taken from the database by any number of them, and the death of one loses nothing."""

import asyncio
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from memory_os import AsyncMemory, Memory
from memory_os.adapters.scripted import HashEmbedder, ScriptedLLM
from memory_os.cli.main import app
from memory_os.derive import embedded_text
from memory_os.errors import BacklogFullError, ConfigError, EmbedderError, InvalidInputError, LLMError, MemoryOSError
from memory_os.stores.schema import workers
from memory_os.types import NewSegment

ALICE, BOB = ("acme", "alice"), ("acme", "bob")

WORKER = """
import sys, time
from memory_os import Memory
from memory_os.adapters.scripted import HashEmbedder

class Slow(HashEmbedder):
    def embed_documents(self, texts):
        print("at work", flush=True)
        time.sleep(float(sys.argv[2]))
        return super().embed_documents(texts)

with Memory.open(sys.argv[1], embedder=Slow()) as memory:
    memory.work(until_idle=False, batch=int(sys.argv[3]))
"""


def opened(place, **options) -> Memory:
    return Memory.open(place, **{"embedder": "hash", "derive": "workers", **options})


def said(n: int, what: str = "kite") -> list[NewSegment]:
    return [NewSegment(f"{what} number {i}", "s", speaker=f"P{i % 3}") for i in range(n)]


def start(place, pause_s: float = 0.01, batch: int = 16) -> subprocess.Popen:
    command = [sys.executable, "-P", "-c", WORKER, str(place), str(pause_s), str(batch)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdout.close()


def eventually(true, patience_s: float = 60) -> None:
    end = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.02)


def assert_all_made(memory: Memory, *namespaces) -> None:
    """Every segment has one vector, which is that of its text."""
    embedder = memory.parts.embedder
    for namespace in namespaces:
        segments = {segment.id: segment for segment in memory.parts.store.scan(namespace)}
        ids, _, matrix, _ = memory.parts.store.read_vectors(namespace, embedder.fingerprint)
        assert sorted(ids) == sorted(segments)
        right = embedder.embed_documents([embedded_text(segments[id_]) for id_ in ids])
        np.testing.assert_array_equal(matrix, right)


class Gate(HashEmbedder):
    """Stands still, while it embeds, until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go = threading.Event(), threading.Event()

    def embed_documents(self, texts):
        self.entered.set()
        assert self.go.wait(60)
        return super().embed_documents(texts)


@pytest.fixture
def at_work(place):
    """A memory that leaves its work, and a worker that has claimed it and stands still in the embedder."""
    gate = Gate()
    with opened(place) as memory, Memory.open(place, embedder=gate) as other:
        scope = memory.namespace(*ALICE)
        scope.add_many(said(5))
        thread = threading.Thread(target=other.work)
        thread.start()
        try:
            assert gate.entered.wait(60)
            yield memory, scope, gate, thread
        finally:
            gate.go.set()
            thread.join(60)


# -- the queue ---------------------------------------------------------------------------------------------------------


def test_work_is_left_and_traces_say_so(place):
    with opened(place) as memory:
        scope = memory.namespace(*ALICE)
        scope.add_many(said(700))
        scope.items.put(("p",), "k", {"x": 1}, texts=[("x", "a cat")])
        context = scope.context("which kite is number 7?")
        assert "they are left to workers" in " ".join(context.trace.notes)
        assert scope.search("kite number 7")
        assert (memory.queue().vectors, memory.queue().items) == (700, 1)
        assert memory.work().vectors == 701
        assert (memory.queue().vectors, memory.queue().items) == (0, 0)
        assert scope.items.search(query="a cat")
        assert "left to workers" not in " ".join(scope.context("which kite is number 7?").trace.notes)
        assert_all_made(memory, ALICE)


def test_two_workers_do_not_take_the_same(place):
    with opened(place) as memory:
        memory.namespace(*ALICE).add_many(said(40))
        memory.namespace(*BOB).add_many(said(10))
        queue, f = memory.parts.queue, memory.parts.embedder.fingerprint
        with queue.shift("one") as one, queue.shift("two") as two:
            taken = [queue.take(worker, "vector", f, 15) for worker in (one, two, one, two)]
            assert [len(each) for each in taken] == [15, 15, 15, 5]
            assert len({(job.number, job.row) for each in taken for job in each}) == 50
            assert queue.take(two, "vector", f, 15) == []
            assert [each.claimed for each in memory.queue().workers] == [30, 20]
            queue.release(one, taken[0])
            assert len(queue.take(two, "vector", f, 15)) == 15
        assert memory.queue().workers == ()
        with queue.shift("three") as three:
            assert len(queue.take(three, "vector", f, 99)) == 50


def test_workers_that_look_at_the_same_moment_do_not_take_the_same(place):
    with opened(place) as memory:
        memory.namespace(*ALICE).add_many(said(400))
        f, taken, together = memory.parts.embedder.fingerprint, [], threading.Barrier(4)

        def take() -> None:
            with opened(place) as own, own.parts.queue.shift("one") as number:
                together.wait(60)
                while jobs := own.parts.queue.take(number, "vector", f, 10):
                    taken.extend(job.row for job in jobs)
                together.wait(60)

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(taken) == len(set(taken)) == 400


def test_a_worker_skips_what_another_is_about_to_claim(postgres_server):
    """It neither waits for the other's transaction nor takes what is locked in it."""
    url = postgres_server.url(postgres_server.new())
    with opened(url) as memory:
        memory.namespace(*ALICE).add_many(said(30))
        queue, f = memory.parts.queue, memory.parts.embedder.fingerprint
        with queue.shift("one") as one, memory.parts.store.database.claiming() as connection:
            about = connection.exec_driver_sql(
                "SELECT segment_pk FROM pending ORDER BY segment_pk LIMIT 20 FOR UPDATE SKIP LOCKED"
            )
            locked = set(about.scalars())
            taken = queue.take(one, "vector", f, 99)
            assert len(taken) == 10
            assert locked.isdisjoint(job.row for job in taken)


def test_namespaces_have_their_turns(place):
    with opened(place) as memory:
        memory.namespace(*ALICE).add_many(said(500))
        memory.namespace(*BOB).add("one kite")
        queue = memory.parts.queue
        with queue.shift("one") as one:
            f = memory.parts.embedder.fingerprint
            assert {job.namespace for job in queue.take(one, "vector", f, 50)} == {ALICE}
            assert BOB in {job.namespace for job in queue.take(one, "vector", f, 50)}
            assert queue.take(one, "vector", f, 500, only=BOB) == []


def test_all_of_another_embedders_are_made_anew_however_many(place):
    with Memory.open(place, embedder=HashEmbedder(32)) as memory:
        memory.namespace(*ALICE).add_many(said(50))
    with opened(place, llm=ScriptedLLM(["never asked"])) as memory:
        assert memory.work(batch=1).vectors == 50
        assert memory.queue().vectors == 0


def test_items_do_not_wait_for_a_bulk_load(place):
    class Noting(HashEmbedder):
        def embed_documents(self, texts):
            made.extend(texts)
            return super().embed_documents(texts)

    made: list[str] = []
    with opened(place, embedder=Noting()) as memory:
        memory.namespace(*ALICE).add_many(said(50))
        memory.namespace(*BOB).items.put(("p",), "k", {"x": 1}, texts=[("x", "a cat")])
        assert memory.work(batch=1).vectors == 51
        assert made.index("a cat") < 50


def test_another_embedders_vectors_are_made_anew(place):
    with Memory.open(place, embedder=HashEmbedder(32)) as memory:
        memory.namespace(*ALICE).add_many(said(30))
        memory.namespace(*BOB).add_many(said(3))
        memory.namespace(*BOB).items.put(("p",), "k", {"x": 1}, texts=[("x", "a cat")])
    with opened(place) as memory:
        memory.namespace(*ALICE).add("a new one")
        assert (memory.queue().vectors, memory.queue().items) == (34, 1)
        assert memory.work(batch=7).vectors == 35
        assert_all_made(memory, ALICE, BOB)
        assert memory.work().vectors == 0


def test_workers_with_different_embedders_do_not_make_each_others_vectors_for_ever(place):
    class Slow(HashEmbedder):
        def embed_documents(self, texts):
            time.sleep(0.01)
            return super().embed_documents(texts)

    with Memory.open(place, embedder=HashEmbedder(16)) as memory:
        memory.namespace(*ALICE).add_many(said(120))
    stop, done = threading.Event(), []
    with Memory.open(place, embedder=Slow(32)) as one, Memory.open(place, embedder=Slow(64)) as two:
        how = {"batch": 8, "stop": stop}
        threads = [threading.Thread(target=lambda m=m: done.append(m.work(**how).vectors)) for m in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        stop.set()
        for thread in threads:
            thread.join(20)
    assert sum(done) <= 2 * 120


# -- beside others -----------------------------------------------------------------------------------------------------


def test_who_forgets_or_stores_does_not_wait_for_a_worker(at_work):
    memory, scope, gate, thread = at_work
    gone, *_kept = scope.history()
    receipt = scope.forget(gone.id)
    assert (receipt["segments"], receipt["pending"], receipt["unfinished"]) == (1, 1, 0)
    scope.add("stored meanwhile")
    assert memory.queue().workers[0].claimed == 5
    gate.go.set()
    thread.join(60)
    assert scope.lookup([gone.id]) == {}
    assert memory.queue().vectors == 0
    assert_all_made(memory, ALICE)
    assert memory.queue().workers == ()


def test_what_is_all_forgotten_meanwhile_does_not_come_back(at_work):
    memory, scope, gate, thread = at_work
    scope.forget(everything=True)
    gate.go.set()
    thread.join(60)
    assert memory.parts.store.read_vectors(ALICE, memory.parts.embedder.fingerprint)[0] == []
    assert memory.namespaces() == []


def test_a_worker_that_cannot_embed_gives_up_what_it_has_claimed(place):
    class Away(HashEmbedder):
        def embed_documents(self, texts):
            raise OSError("the model's server is away")

    stop = threading.Event()
    with opened(place) as memory, Memory.open(place, embedder=Away()) as other:
        memory.namespace(*ALICE).add_many(said(5))
        thread = threading.Thread(target=other.work, kwargs={"stop": stop, "until_idle": False})
        thread.start()
        try:
            eventually(lambda: memory.work().vectors == 5)
            assert_all_made(memory, ALICE)
        finally:
            stop.set()
            thread.join(60)


def test_until_idle_a_failure_is_raised_in_the_end(place, monkeypatch, caplog):
    monkeypatch.setattr("memory_os.worker.MOST_WAIT_S", 0.01)

    class Away(HashEmbedder):
        asked = 0

        def embed_documents(self, texts):
            self.asked += 1
            raise OSError("the model's server is away")

    away = Away()
    with Memory.open(place, embedder=away, derive="workers") as memory:
        memory.namespace(*ALICE).add("kite")
        with pytest.raises(EmbedderError, match=r"OSError: the model's server is away; .* run it again"):
            memory.work()
        assert away.asked == 5
        assert "tried again in a while: OSError" in caplog.text
        assert "server is away" not in caplog.text  # its own words may repeat a text
        assert memory.queue().vectors == 1


def test_numbers_that_are_none_are_refused_before_anything_is_stored(place, tmp_path):
    with pytest.raises(ConfigError, match="max_pending is a whole number from 1"):
        opened(place, derive="workers", max_pending=2.5)
    (tmp_path / "notes.md").write_text("A kite.")
    with opened(place) as memory:
        with pytest.raises(ConfigError, match="workers are a whole number from 0"):
            memory.namespace(*ALICE).ingest(tmp_path / "notes.md", workers=1.5)
        with pytest.raises(ConfigError, match="a whole number, not 'x'"):
            memory.work(batch="x")
        assert memory.namespace(*ALICE).stats()["segments"] == 0


def test_an_interrupted_bulk_load_says_that_what_was_stored_stays(tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("memory_os.memory.Scope.ingest", stopped)
    done = CliRunner().invoke(app, ["ingest", "notes.md", "--store", str(tmp_path / "m.db"), "--embedder", "hash"])
    assert done.exit_code == 130
    assert "What was stored stays" in done.stderr


def test_summaries_are_made_of_those_that_are_listed(place):
    def reply(messages):
        if "bad" in messages[-1]["content"]:
            raise LLMError("scripted", "no")
        return "In short."

    llm = ScriptedLLM(reply)
    with opened(place, llm=llm) as memory:
        scope = memory.namespace(*ALICE)
        good, bad = scope.add("a long text. " * 50), scope.add("a bad text. " * 50)
        memory.parts.store.list_for_summary(ALICE, [good.id, bad.id])
        assert memory.work(summaries=False).summaries == 0
        done = memory.work()
        assert (done.vectors, done.summaries, done.failed) == (0, 1, 1)
        assert memory.parts.store.read_summaries(ALICE, [good.id, bad.id], "llm scripted v1") == {good.id: "In short."}
        assert memory.queue().summaries == 1  # the other is tried by the next worker
    with opened(place) as memory:  # without an LLM nobody is asked
        assert memory.work().summaries == 0


def test_an_llm_that_was_away_is_asked_again(place, monkeypatch):
    away, asked = threading.Event(), []
    away.set()

    def reply(messages):
        asked.append(messages)
        if away.is_set():
            raise LLMError("scripted", "it is away")
        return "In short."

    with opened(place, llm=ScriptedLLM(reply)) as memory:
        said = memory.namespace(*ALICE).add_many([NewSegment(f"long text {i}. " * 50, "s") for i in range(12)])
        memory.parts.store.list_for_summary(ALICE, [segment.id for segment in said])
        assert memory.work().failed == len(asked) == 5  # then it is left alone
        monkeypatch.setattr("memory_os.worker.ASK_AGAIN_S", 0.5)
        stop = threading.Event()
        thread = threading.Thread(target=memory.work, kwargs={"stop": stop, "until_idle": False})
        thread.start()
        try:
            eventually(lambda: len(asked) > 10)
            away.clear()
            eventually(lambda: memory.queue().summaries == 0)
        finally:
            stop.set()
            thread.join(60)


# -- processes ---------------------------------------------------------------------------------------------------------


def test_what_a_killed_worker_had_claimed_is_taken_at_once(place):
    with opened(place) as memory:
        memory.namespace(*ALICE).add_many(said(20))
        process = start(place, pause_s=600)
        try:
            assert process.stdout.readline() == "at work\n"
            assert [each.claimed for each in memory.queue().workers] == [16]
            assert memory.work().vectors == 4
            queue, f = memory.parts.queue, memory.parts.embedder.fingerprint
            with queue.shift("beside it") as number:
                assert queue.take(number, "vector", f, 99) == []
                ended(process)
                eventually(lambda: len(memory.queue().workers) == 1)  # the server has to notice
                assert len(queue.take(number, "vector", f, 99)) == 16
        finally:
            ended(process)
        assert memory.work().vectors == 16
        assert_all_made(memory, ALICE)


@pytest.mark.slow
def test_workers_killed_at_any_moment_lose_nothing(place):
    rng = random.Random(10)
    spaces = [(f"n{i}",) for i in range(4)]
    with opened(place) as memory:
        processes = [start(place) for _ in range(3)]
        try:
            for n in range(12):
                for space in spaces:
                    memory.namespace(*space).add_many(said(40, f"round {n} of {space[0]}"))
                gone = memory.namespace(*spaces[0]).history(3)[0]
                assert memory.namespace(*spaces[0]).forget(gone.id)["segments"] == 1
                time.sleep(rng.uniform(0.0, 0.4))
                ended(processes.pop(0))
                processes.append(start(place))
            eventually(lambda: memory.queue().vectors == 0, 120)
        finally:
            for process in processes:
                ended(process)
        eventually(lambda: memory.queue().workers == ())
        assert_all_made(memory, *spaces)
        with memory.parts.store.database.read() as connection:
            left = connection.execute(sa.text("SELECT count(*) FROM pending")).scalar_one()
        assert left == 0
        assert not any(found for kind, found in memory.check().items() if kind != "settings")


def test_sigterm_ends_a_worker_after_what_is_under_way(place):
    with opened(place) as memory:
        memory.namespace(*ALICE).add_many(said(300))
    command = [sys.executable, "-P", "-c", "from memory_os.cli.main import run; run()", "worker", "--json"]
    command += ["--store", str(place), "--embedder", "hash", "--batch", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        assert "1 vectors" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Ending after what is under way." in err
    done = json.loads(out)
    with opened(place) as memory:
        assert memory.queue().vectors == 300 - done["vectors"] > 0
        assert memory.queue().workers == ()


def test_a_worker_goes_on_when_its_connections_were_cut(postgres_server):
    url = postgres_server.url(postgres_server.new())
    with opened(url) as memory:
        memory.namespace(*ALICE).add_many(said(400))
        process = start(url)
        try:
            for _ in range(3):
                process.stdout.readline()
                postgres_server.admin(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    f"WHERE datname = '{url.rpartition('/')[2]}' AND application_name = 'memory_os'"
                )
            eventually(lambda: memory.queue().vectors == 0)
            assert process.poll() is None
        finally:
            ended(process)
        assert_all_made(memory, ALICE)


def test_the_claims_of_another_namespace_cannot_be_seen(postgres_server):
    url = postgres_server.url(postgres_server.new())
    with opened(url) as memory:
        for labels in (ALICE, BOB):
            memory.namespace(*labels).add("kite")
        queue = memory.parts.queue
        with queue.shift("one") as one:
            assert len(queue.take(one, "vector", "f", 9)) == 2
            with memory.parts.store.database.read(ALICE) as connection:
                assert connection.exec_driver_sql("SELECT count(*) FROM claims").scalar_one() == 1


def test_a_worker_at_rest_does_not_keep_the_server_from_cleaning(postgres_server):
    """Its transaction has neither a number nor a snapshot."""
    url = postgres_server.url(postgres_server.new())
    with opened(url) as memory, memory.parts.queue.shift("one"):
        held = postgres_server.admin(
            "SELECT count(*) FILTER (WHERE state = 'idle in transaction'), count(backend_xid), count(backend_xmin) "
            f"FROM pg_stat_activity WHERE datname = '{url.rpartition('/')[2]}'"
        )
        assert held == [(1, 0, 0)]
        segment = memory.namespace(*ALICE).add("gone")
        assert memory.namespace(*ALICE).forget(segment.id)["unfinished"] == 0


def test_a_worker_that_takes_a_dead_ones_number_meanwhile_keeps_its_claims(postgres_server, monkeypatch):
    url = postgres_server.url(postgres_server.new())
    with opened(url) as memory, opened(url) as other:
        memory.namespace(*ALICE).add_many(said(20))
        f = memory.parts.embedder.fingerprint
        queue, database = memory.parts.queue, memory.parts.store.database
        with queue.shift("one") as one, ExitStack() as born:
            dead = {"number": one + 1, "name": "dead", "started_at": "", "seen_at": "", "done": 0, "per_second": 0.0}
            with database.claiming() as connection:
                connection.execute(workers.insert().values(dead))
            looks = database.on_shift

            def on_shift(connection, numbers):
                alive = looks(connection, numbers)
                if not taken:  # at the worst moment: the dead one was seen, and is not struck off yet
                    new = born.enter_context(other.parts.queue.shift("new"))
                    taken.extend(other.parts.queue.take(new, "vector", f, 5))
                return alive

            taken = []
            monkeypatch.setattr(database, "on_shift", on_shift)
            taken.extend(queue.take(one, "vector", f, 99))
            assert len(taken) == len({job.row for job in taken}) == 20
            assert [(each.name, each.claimed) for each in memory.queue().workers] == [("one", 15), ("new", 5)]


# -- back-pressure -----------------------------------------------------------------------------------------------------


def test_who_stores_waits_for_workers_and_no_longer_than_they_work(place, monkeypatch):
    with opened(place, max_pending=50) as memory:
        scope = memory.namespace(*ALICE)
        scope.add_many(said(60))
        monkeypatch.setattr(memory.parts.bound, "_patience_s", 0.3)
        for store in (lambda: scope.add("one more"), lambda: scope.replace_many([NewSegment("x", "s", key="k")])):
            with pytest.raises(BacklogFullError, match="60 segments wait for workers, max_pending is 50") as raised:
                store()
            assert (raised.value.pending, raised.value.most) == (60, 50)
        assert scope.stats()["segments"] == 60
        monkeypatch.setattr(memory.parts.bound, "_patience_s", 60)
        waiting = threading.Thread(target=scope.add, args=("one more",))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        with opened(place) as other:
            other.work(batch=10)
        waiting.join(60)
        assert scope.stats()["segments"] == 61


def test_a_queue_far_above_the_bound_that_grows_shorter_is_no_error(place, monkeypatch):
    class Slow(HashEmbedder):
        def embed_documents(self, texts):
            time.sleep(0.1)
            return super().embed_documents(texts)

    with opened(place, max_pending=5) as memory, Memory.open(place, embedder=Slow()) as other:
        other.namespace(*BOB).add_many(said(3000), embed=False)
        monkeypatch.setattr(memory.parts.bound, "_patience_s", 0.5)
        worker = threading.Thread(target=other.work, kwargs={"batch": 200})
        worker.start()
        try:
            memory.namespace(*ALICE).add("one more")
        finally:
            worker.join(60)


def test_what_cannot_be_stored_is_refused_without_waiting(place, monkeypatch):
    with opened(place, max_pending=5) as memory:
        memory.namespace(*ALICE).add_many(said(9))
        monkeypatch.setattr(memory.parts.bound, "_patience_s", 0.0)
        with pytest.raises(InvalidInputError):
            memory.namespace(*ALICE).add_many([NewSegment("", "s")])


async def test_for_asyncio_who_waits_to_store_keeps_nobody_out(place):
    async with AsyncMemory.open(place, embedder="hash", derive="workers", max_pending=5) as memory:
        scope = memory.namespace(*ALICE)
        await scope.add_many(said(50))
        waiting = [asyncio.create_task(scope.add(f"one more: {i}")) for i in range(40)]
        await asyncio.sleep(0.3)
        assert not any(task.done() for task in waiting)
        assert await asyncio.wait_for(scope.search("kite"), 20)
        working = asyncio.create_task(memory.work(until_idle=False))
        await asyncio.wait_for(asyncio.gather(*waiting), 60)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        await asyncio.wait_for(memory.calls.ended(), 30)  # it was told to end
        assert (await scope.stats())["segments"] == 90


def test_settings_that_cannot_be(tmp_path):
    path = tmp_path / "memory.db"
    for wrong in (
        {"derive": "there"},
        {"max_pending": 0},
        {"max_pending": 10**30},
        {"derive": "here", "max_pending": 9},
    ):
        with pytest.raises(ConfigError):
            opened(path, **wrong)
    assert not path.exists()
    with opened(path) as memory:
        for batch in (0, 10**30):
            with pytest.raises(ConfigError, match="a batch has from 1 to"):
                memory.work(batch=batch)
        with pytest.raises(ConfigError, match="not -1"):
            memory.namespace("a").ingest(path, workers=-1)


# -- the command -------------------------------------------------------------------------------------------------------


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_shows_what_is_left_and_does_it(place):
    with opened(place) as memory:
        memory.namespace(*ALICE).add_many(said(5))
    which = ("--store", place, "--embedder", "hash")
    told = json.loads(run("worker", "--status", "--json", *which))
    assert (told["vectors"], told["items"], told["summaries"], told["workers"]) == (5, 0, 0, [])
    assert told["oldest_at"]
    assert "vectors to be made" in run("worker", "--status", *which)
    assert json.loads(run("worker", "--until-idle", "--json", *which))["vectors"] == 5
    assert json.loads(run("worker", "--status", "--json", *which))["vectors"] == 0


# -- bulk loads --------------------------------------------------------------------------------------------------------


MARKED = """
import os
from memory_os.adapters.scripted import HashEmbedder

class Marked(HashEmbedder):
    \"""Says in a folder in which process it is at work, and dies with it the first time that a text says so.\"""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def embed_documents(self, texts):
        open(f"{self.folder}/{os.getpid()}", "w").close()
        once = f"{self.folder}/died"
        if any("the end" in text for text in texts) and not os.path.exists(once):
            open(once, "w").close()
            os._exit(1)
        return super().embed_documents(texts)
"""


@pytest.fixture
def marked(tmp_path, monkeypatch):
    """An embedder that leaves marks in a folder, of a module that other processes can import."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "marked_embedder.py").write_text(MARKED)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "marked_embedder", raising=False)
    (tmp_path / "marks").mkdir()
    return importlib.import_module("marked_embedder").Marked(str(tmp_path / "marks"))


def content(memory: Memory, namespace) -> list:
    """What is stored, with the vector of each, and without what is another with each run."""
    store = memory.parts.store
    ids, _, matrix, _ = store.read_vectors(namespace, memory.parts.embedder.fingerprint)
    vectors = dict(zip(ids, [row.tobytes() for row in matrix], strict=True))
    return [(s.seq, s.key, s.text, s.source, vectors.pop(s.id)) for s in store.scan(namespace)]


@pytest.fixture
def notes(tmp_path):
    file = tmp_path / "notes.md"
    days = (f"# Day {i}\n\nOn day {i} we saw {i * 7} kites. {'They flew. ' * 20}" for i in range(400))
    file.write_text("\n\n".join(days))
    return file


def test_with_processes_the_same_is_stored(place, notes, marked, tmp_path):
    folder, made = tmp_path / "marks", []
    with Memory.open(place, embedder=marked) as memory:
        one, many = memory.namespace("one"), memory.namespace("many")
        done = one.ingest(notes)
        assert [path.name for path in folder.iterdir()] == [str(os.getpid())]
        assert many.ingest(notes, workers=2, made=lambda *told: made.append(told)) == done
        assert len(list(folder.iterdir())) in (2, 3)  # the first may have made all before the second was there
        assert content(memory, ("many",)) == content(memory, ("one",))
        assert made[-1][0] == done[0]
        assert many.ingest(notes, workers=2) == (0, done[0])
    assert not [child for child in multiprocessing.active_children() if child.is_alive()]


def test_a_process_that_dies_is_replaced_and_its_batch_made_again(place, marked, tmp_path):
    file = tmp_path / "notes.md"
    file.write_text("a beginning\n\nthe end")
    with Memory.open(place, embedder=marked) as memory:
        memory.namespace(*ALICE).ingest(file, workers=1)
        assert (tmp_path / "marks" / "died").exists()
        assert_all_made(memory, ALICE)


def test_processes_that_die_each_time_are_a_clear_error(tmp_path, marked, monkeypatch):
    monkeypatch.setattr("memory_os.worker.MOST_WAIT_S", 0.01)
    file = tmp_path / "notes.md"
    file.write_text("a beginning\n\nthe end")
    (tmp_path / "modules" / "marked_embedder.py").write_text(MARKED.replace("open(f", "os._exit(1) #"))
    with Memory.open(tmp_path / "memory.db", embedder=marked) as memory:
        with pytest.raises(MemoryOSError, match="killed, perhaps for want of memory; have fewer"):
            memory.namespace(*ALICE).ingest(file, workers=1)
        assert memory.queue().vectors == memory.namespace(*ALICE).stats()["segments"] > 0
        assert memory.queue().workers == ()


INGEST = """
import sys, time
from memory_os import Memory
from memory_os.adapters.scripted import HashEmbedder

class Slow(HashEmbedder):
    def embed_documents(self, texts):
        time.sleep(0.2)
        return super().embed_documents(texts)

if __name__ == "__main__":
    with Memory.open(sys.argv[1], embedder=Slow()) as memory:
        memory.namespace("acme", "alice").ingest(sys.argv[2], workers=2, made=lambda n, *_: print(n, flush=True))
"""


def test_a_bulk_load_that_is_killed_has_stored_everything_and_goes_on(place, notes, tmp_path):
    script = tmp_path / "bulk.py"
    script.write_text(INGEST)
    command = [sys.executable, "-P", str(script), str(place), str(notes)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        made = int(process.stdout.readline())
    finally:
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        ended(process)
    assert children
    eventually(lambda: not any(alive(int(child)) for child in children))  # they end with their parent
    with opened(place) as memory:
        n = memory.namespace(*ALICE).stats()["segments"]
        assert made <= n - memory.queue().vectors < n
        eventually(lambda: memory.queue().workers == ())
        assert memory.namespace(*ALICE).ingest(notes, workers=1) == (0, n)
        assert memory.queue().vectors == 0
        assert_all_made(memory, ALICE)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_embedder_that_cannot_be_sent_is_refused_before_anything_is_stored(tmp_path, notes):
    embedder = HashEmbedder()
    embedder.model = threading.Lock()
    with Memory.open(tmp_path / "memory.db", embedder=embedder) as memory:
        with pytest.raises(ConfigError, match="cannot be sent to other processes"):
            memory.namespace("a").ingest(notes, workers=2)
        assert memory.namespaces() == []


def test_an_embedder_that_cannot_be_made_elsewhere_is_a_clear_error(tmp_path, notes, marked, monkeypatch):
    with Memory.open(tmp_path / "memory.db", embedder=marked) as memory:
        shutil.rmtree(tmp_path / "modules")
        with pytest.raises(ConfigError, match="cannot be made in another process"):
            memory.namespace("a").ingest(notes, workers=1)
        assert memory.queue().vectors == memory.namespace("a").stats()["segments"] > 0
        assert memory.queue().workers == ()


def test_the_command_embeds_in_processes(place, notes):
    told = run("ingest", notes, "--workers", "2", "--embedder", "hash", "--store", place, "--json")
    with opened(place) as memory:
        assert json.loads(told)["stored"] == memory.namespace("default").stats()["vectors"] > 0


@pytest.mark.slow
def test_minilms_vectors_are_the_same_from_other_processes(tmp_path, notes):
    """But for rounding: each process has fewer threads, and other texts beside."""
    with Memory.open(tmp_path / "memory.db") as memory:
        memory.namespace("one").ingest(notes)
        memory.namespace("many").ingest(notes, workers=2)
        f = memory.parts.embedder.fingerprint
        by_key = {}
        for name in ("one", "many"):
            ids, _, matrix, _ = memory.parts.store.read_vectors((name,), f)
            segments = memory.parts.store.get((name,), ids)
            by_key[name] = {segments[id_].key: row for id_, row in zip(ids, matrix, strict=True)}
        assert list(by_key["one"]) == list(by_key["many"])
        cosines = [float(row @ by_key["many"][key]) for key, row in by_key["one"].items()]
        assert min(cosines) > 0.9995


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_on_ray_the_same_is_stored(place, notes):
    pytest.importorskip("ray")
    with Memory.open(place, embedder="hash") as memory:
        one, ray = memory.namespace("one"), memory.namespace("ray")
        done = one.ingest(notes)
        assert ray.ingest(notes, workers=2, ray=True) == done
        assert content(memory, ("ray",)) == content(memory, ("one",))
