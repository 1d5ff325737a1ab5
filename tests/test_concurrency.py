"""Many processes, threads and tasks on one store: nothing lost, nothing doubled, nobody locked out, no foreign row."""

import asyncio
import fcntl
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from memory_os import AsyncMemory, Memory, NewSegment
from memory_os.build import open_database

N_PROCESSES, N_WRITES = 8, 500
N_ON_A_SERVER = 80  # where a write takes longer, and no lock of all is waited for
SHARED = ("team",)

WRITER = """
import json, sys, time
from memory_os import Memory

path, me, n_writes, mixed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "mixed"
labels = ("team",) if me % 2 else ("own", str(me))
slowest = 0.0
with Memory.open(path, embedder="hash") as memory:
    scope = memory.namespace(*labels).session(f"s{me}")
    print("ready", flush=True)
    sys.stdin.readline()
    kept = []
    for i in range(n_writes):
        begun = time.perf_counter()
        segment = scope.add(f"writer {me} says {i} in {'/'.join(labels)}")
        slowest = max(slowest, time.perf_counter() - begun)
        kept.append((segment.seq, segment.id, i))
        if mixed and i % 20 == 19:
            scope.forget(segment.id)  # its own
            kept.pop()
            scope.items.put(("of", str(me)), str(i), {"n": i}, texts=[("n", f"item {i} of {me}")])
            scope.context(f"what does writer {me} say", budget=600, record=True)
    n_recorded = n_writes // 20 if mixed else 0
print(json.dumps({"labels": labels, "kept": kept, "slowest": slowest, "recorded": n_recorded}))
"""

READER = """
import json, sys, time
from memory_os import Memory

path, labels = sys.argv[1], tuple(sys.argv[2].split("/"))
seen, rounds = [], 0
with Memory.open(path, embedder="hash") as memory:
    scope = memory.namespace(*labels)
    print("ready", flush=True)
    sys.stdin.readline()
    while True:
        last = len(seen)
        seen += [(s.seq, s.id) for s in memory.parts.store.scan(labels, after=last)]
        assert [seq for seq, _ in seen[last:]] == list(range(last + 1, len(seen) + 1)), "a gap"
        found = [hit.segment for hit in scope.search("what does the writer say", k=5)]
        found += scope.context("what does the writer say", budget=500).segments
        assert all(s.text.endswith(" in " + "/".join(labels)) for s in found), "of another namespace"
        assert found or not seen, "nothing found"
        rounds += 1
        if len(seen) == int(sys.argv[3]):
            break
        time.sleep(0.02)
    assert seen == [(s.seq, s.id) for s in memory.parts.store.scan(labels)], "what was read before is another now"
print(json.dumps({"rounds": rounds}))
"""


class Process:
    """A real process that says ``ready``, waits to be let go, and ends with one JSON object."""

    def __init__(self, script: str, *args: object) -> None:
        command = [sys.executable, "-c", script, *map(str, args)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def ready(self) -> None:
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            pytest.fail(self.process.communicate()[1])

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def result(self) -> dict:
        out, err = self.process.communicate(timeout=600)
        assert self.process.returncode == 0, err
        assert err == ""
        return json.loads(out)


def run_all(*processes: Process) -> list[dict]:
    """All at the same time; a process that hangs or fails leaves none behind."""
    try:
        for process in processes:
            process.ready()
        for process in processes:
            process.go()
        return [process.result() for process in processes]
    finally:
        for process in processes:
            process.process.kill()
            process.process.wait()
            for stream in (process.process.stdin, process.process.stdout, process.process.stderr):
                if stream:
                    stream.close()


def rows(place: Path | str, labels: tuple[str, ...]) -> list[tuple[int, str, str]]:
    """What the database holds of a namespace, as it says itself."""
    query = """SELECT s.seq, s.id, s.text FROM segments s JOIN namespaces n ON n.id = s.namespace_id
        WHERE n.labels = :labels ORDER BY s.pk"""
    database = open_database(place)
    with database.read() as connection:
        found = [tuple(row) for row in connection.execute(sa.text(query), {"labels": json.dumps(labels)})]
    database.close()
    return found


def assert_whole(place: Path | str, labels: tuple[str, ...], written: dict[int, str], *, gapless: bool = True) -> None:
    """The namespace holds what was written and nothing else, under the numbers that the writers were told."""
    there = rows(place, labels)
    seqs = [seq for seq, _, _ in there]
    assert seqs == sorted(set(seqs)), "in the order in which rows were written"
    if gapless:
        assert seqs == list(range(1, len(seqs) + 1))
    assert {seq: id_ for seq, id_, _ in there} == written
    assert len({text for _, _, text in there}) == len(there)


@pytest.mark.slow
def test_eight_processes_write_and_readers_read(place):
    n_writes = N_WRITES if isinstance(place, Path) else N_ON_A_SERVER
    Memory.open(place, embedder="hash").close()
    writers = [Process(WRITER, place, me, n_writes, "plain") for me in range(N_PROCESSES)]
    readers = [
        Process(READER, place, "team", N_PROCESSES // 2 * n_writes),
        Process(READER, place, "own/0", n_writes),
    ]
    *results, by_team, by_own = run_all(*writers, *readers)
    written: dict[tuple[str, ...], list] = {}
    for result in results:
        written.setdefault(tuple(result["labels"]), []).extend(result["kept"])
    assert {len(kept) for labels, kept in written.items() if labels != SHARED} == {n_writes}
    assert len(written[SHARED]) == N_PROCESSES // 2 * n_writes
    for labels, kept in written.items():
        assert_whole(place, labels, {seq: id_ for seq, id_, _ in kept})
    for result in results:  # each writer's own order is the order of its numbers
        assert [i for _, _, i in sorted(result["kept"])] == list(range(n_writes))
    assert by_team["rounds"] > 1
    assert by_own["rounds"] > 1
    with Memory.open(place, embedder="hash") as memory:
        assert not any(memory.check().values())


@pytest.mark.slow
def test_writers_that_forget_put_items_and_record_turns(place):
    n_writes = 60
    writers = [Process(WRITER, place, me, n_writes, "mixed") for me in range(N_PROCESSES)]  # the file is made by them
    results = run_all(*writers)
    with Memory.open(place, embedder="hash") as memory:
        for labels in {tuple(result["labels"]) for result in results}:
            mine = [result for result in results if tuple(result["labels"]) == labels]
            kept = {seq: id_ for result in mine for seq, id_, _ in result["kept"]}
            there = list(memory.parts.store.scan(labels))
            asked = [s for s in there if s.text.startswith("what does writer")]
            assert {s.seq: s.id for s in there if s not in asked} == kept
            assert len(asked) == sum(result["recorded"] for result in mine)
            assert len(list(memory.parts.store.traces(labels))) == len(asked)
            scope = memory.namespace(*labels)
            assert scope.items.count() == len(asked)
            last = memory.parts.store.last_seq(labels)
            assert last == len(mine) * n_writes + len(asked)  # every number was given once
        assert not any(memory.check().values())


@pytest.mark.slow
def test_a_writer_that_holds_the_lock_delays_others_and_fails_none(place):
    Memory.open(place, embedder="hash").close()
    holder = """
import sys, time
from memory_os.build import open_database
from memory_os.stores.namespaces import claim
database = open_database(sys.argv[1])
with database.write(("team",)) as connection:
    claim(connection, ("team",))
    print("ready", flush=True)
    sys.stdin.readline()
    time.sleep(4)
database.close()
print("{}")
"""
    hold = Process(holder, place)
    with Memory.open(place, embedder="hash") as memory:
        scope = memory.namespace(*SHARED)
        try:
            hold.ready()
            hold.go()
            with ThreadPoolExecutor(40) as pool:  # more than a pool of connections holds by default
                writing = [pool.submit(scope.add, f"kite {i}") for i in range(40)]
                assert scope.history() == []  # who reads is not delayed
                assert not any(each.done() for each in writing)
                assert sorted(each.result().seq for each in writing) == list(range(1, 41))
        finally:
            hold.result()
            hold.process.stdin.close()


COMES_AND_GOES = """
import sys
from memory_os import Memory
with Memory.open(sys.argv[1], embedder="hash") as memory:
    scope = memory.namespace("team")
    scope.add("by one who comes and goes")
    print([segment.text for segment in scope.history(99)])
"""
LOOKS = {
    "forget": lambda memory, scope: scope.forget(1),
    "verify": lambda memory, scope: scope.forget(1, verify=True),
    "scan": lambda memory, scope: memory.scan_for("to be forgotten"),
    "two": lambda memory, scope: _opened_twice(memory, scope),
}


def _opened_twice(memory, scope):
    with Memory.open(memory.parts.store.database.path, embedder="hash") as other:
        other.namespace(*SHARED).forget(1, verify=True)


@pytest.mark.parametrize("look", LOOKS)
def test_a_process_that_reads_the_files_keeps_its_locks(tmp_path, look):
    """Else the next one to close the database deletes the log that this one goes on writing to."""
    path = tmp_path / "memory.db"
    come_and_go = [sys.executable, "-c", COMES_AND_GOES, str(path)]
    with Memory.open(path, embedder="hash") as memory:
        scope = memory.namespace(*SHARED)
        scope.add_many([NewSegment(text, "s") for text in ("to be forgotten", "to be kept")])
        LOOKS[look](memory, scope)
        log = Path(f"{path}-wal").stat().st_ino
        subprocess.run(come_and_go, check=True, capture_output=True)
        assert Path(f"{path}-wal").stat().st_ino == log
        scope.add("acknowledged")
        seen = subprocess.run(come_and_go, check=True, capture_output=True, text=True).stdout
        assert "acknowledged" in seen
        assert seen.count("comes and goes") == 2
    with Memory.open(path, embedder="hash") as memory:
        texts = [segment.text for segment in memory.namespace(*SHARED).history(99)]
        assert texts[-3:] == ["by one who comes and goes", "acknowledged", "by one who comes and goes"]
        assert not any(memory.check(deep=True).values())


def test_reading_the_files_lets_nobody_into_a_transaction(tmp_path):
    path = tmp_path / "memory.db"
    begin = (
        "import sqlite3, sys\ntry: sqlite3.connect(sys.argv[1], timeout=0).execute('BEGIN IMMEDIATE')\n"
        "except sqlite3.OperationalError as error: print(error)"
    )
    with Memory.open(path, embedder="hash") as memory:
        memory.namespace(*SHARED).add("told")
        with memory.parts.store.database.write() as connection:
            connection.exec_driver_sql("UPDATE segments SET speaker = 'Ana'")
            looking = threading.Thread(target=memory.scan_for, args=("told",))
            looking.start()
            looking.join()
            tried = subprocess.run([sys.executable, "-c", begin, str(path)], check=True, capture_output=True, text=True)
        assert tried.stdout == "database is locked\n"


def test_threads(place):
    """More of them than a pool of connections holds by default, each with its own scope of one memory."""
    n_threads, n_writes = 32, 8
    with Memory.open(place, embedder="hash") as memory:
        start = threading.Barrier(n_threads)

        def work(me: int) -> list[tuple[int, str]]:
            labels = SHARED if me % 2 else ("own", str(me))
            scope = memory.namespace(*labels)
            start.wait()
            kept = []
            for i in range(n_writes):
                segment = scope.add(f"thread {me} says {i} in {labels}")
                kept.append((segment.seq, segment.id))
                hits = scope.search(f"thread {me} says", k=3)
                assert hits
                assert all(hit.segment.text.endswith(f" in {labels}") for hit in hits)
                assert scope.segment(segment.id) == segment  # what is written is there to be read
            return kept

        with ThreadPoolExecutor(n_threads) as pool:
            kept = list(pool.map(work, range(n_threads)))
    assert_whole(place, SHARED, dict(pair for me in range(1, n_threads, 2) for pair in kept[me]))
    for me in range(0, n_threads, 2):
        assert_whole(place, ("own", str(me)), dict(kept[me]))


def test_asyncio(place):
    n_tasks, n_writes = 24, 6

    async def run() -> list[list[tuple[int, str]]]:
        async with AsyncMemory.open(place, embedder="hash") as memory:

            async def work(me: int) -> list[tuple[int, str]]:
                labels = SHARED if me % 2 else ("own", str(me))
                scope = memory.namespace(*labels)
                kept = []
                for i in range(n_writes):
                    segment, _, context = await asyncio.gather(
                        scope.add(f"task {me} says {i} in {labels}"),
                        scope.items.put(("of", str(me)), str(i), {"n": i}),
                        scope.context(f"task {me} says", budget=500),
                    )
                    kept.append((segment.seq, segment.id))
                    assert all(s.text.endswith(f" in {labels}") for s in context.segments)
                return kept

            kept = await asyncio.gather(*(work(me) for me in range(n_tasks)))
            assert await memory.namespace(*SHARED).items.count() == n_tasks // 2 * n_writes
            return kept

    kept = asyncio.run(run())
    assert_whole(place, SHARED, dict(pair for me in range(1, n_tasks, 2) for pair in kept[me]))
    for me in range(0, n_tasks, 2):
        assert_whole(place, ("own", str(me)), dict(kept[me]))


CHAT = """
import sys
from memory_os import build
from memory_os.adapters.scripted import ScriptedLLM
from memory_os.cli.main import run

build.make_llm = lambda name: ScriptedLLM(lambda messages: "I heard: " + messages[-1]["content"].split()[-1])
build.tokenizer_of = lambda llm: "cl100k_base"
sys.argv = ["memos", "chat", "--embedder", "hash", "--session", sys.argv[1]]
run()
"""


class Terminal:
    """``memos chat`` at a terminal of its own."""

    def __init__(self, folder: Path, session: str) -> None:
        self.leader, follower = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHAT, session],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env={**os.environ, "MEMOS_STORE": str(folder / "memory.db"), "TERM": "xterm", "XDG_DATA_HOME": str(folder)},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(follower)
        self.seen = ""

    def type(self, keys: bytes) -> None:
        os.write(self.leader, keys)

    def until(self, words: str) -> None:
        end = time.monotonic() + 120
        while words not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.leader], [], [], 1)[0]:
                self.seen += os.read(self.leader, 4096).decode(errors="replace")
                if "\x1b[6n" in self.seen:  # the editor asks where the cursor is; a real terminal answers
                    self.seen = self.seen.replace("\x1b[6n", "")
                    self.type(b"\x1b[1;1R")
        self.seen = self.seen.split(words, 1)[1]


@pytest.mark.slow
def test_two_terminals_talk_at_the_same_time_on_one_store(tmp_path):
    n_turns = 6
    terminals = {name: Terminal(tmp_path, name) for name in ("monday", "tuesday")}
    try:
        for terminal in terminals.values():
            terminal.until("you>")
        for i in range(n_turns):
            for name, terminal in terminals.items():  # both have a turn going
                terminal.type(f"turn {i} word-{name}-{i}\r".encode())
            for name, terminal in terminals.items():
                terminal.until(f"I heard: word-{name}-{i}")
                terminal.until("you>")
        for terminal in terminals.values():
            terminal.type(b"/quit\r")
            assert terminal.process.wait(timeout=30) == 0
    finally:
        for terminal in terminals.values():
            terminal.process.kill()
            terminal.process.wait()
            os.close(terminal.leader)
    with Memory.open(tmp_path / "memory.db", embedder="hash") as memory:
        scope = memory.namespace("default")
        for name in terminals:
            said = [(s.role, re.sub(r"^turn \d+ ", "", s.text)) for s in scope.session(name).history(100)]
            told = ((("user", f"word-{name}-{i}"), ("assistant", f"I heard: word-{name}-{i}")) for i in range(n_turns))
            assert said == [each for pair in told for each in pair]
        whole = scope.history(100)
        assert [s.seq for s in whole] == list(range(1, 4 * n_turns + 1))
        assert Counter(trace.outcome for trace in memory.parts.store.traces(scope.labels)) == {"answered": 2 * n_turns}
        assert not any(memory.check().values())
