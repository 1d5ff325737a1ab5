"""Killed at any moment: what was acknowledged is there once, and nothing is half there.

A warmed process (this file, run as a script) forks a child for every run. The child does what its scenario says on a
copy of a prepared database, writes a line to a pipe whenever a call has returned, and kills itself with SIGKILL at its
n-th *point*: after a statement that writes, before or after a COMMIT or a step on a file. A first run counts them.
"""

import hashlib
import json
import os
import random
import re
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from memory_os import Memory, NewSegment
from memory_os.adapters.scripted import HashEmbedder, ScriptedLLM

ALICE, XIAO = ("acme", "alice"), ("小明",)
HELD = {"pending_vectors", "pending_item_vectors", "bank"}  # work that was interrupted, and files that nothing names
KILLS_EACH = 12
KILLS_OUTSIDE = 40
KILLED: Counter[str] = Counter()

Ack = Callable[..., None]


def text(n: int) -> str:
    return f"The bird of day {n} is called nomen{n}." if n % 3 else f"第 {n} 天的鸟叫 nomen{n} ，住在北京。"


def texts(start: int, n: int) -> list[str]:
    return [text(i) for i in range(start, start + n)]


class FakeLLM(ScriptedLLM):
    """Repeats the end of what it is asked; its keys and values are the lengths of words."""

    def __init__(self) -> None:
        super().__init__(lambda messages: f"It was asked: {messages[-1]['content'][-400:]}")

    def search_layer(self):
        return 0

    def kv_fingerprint(self, prompt):
        return "lengths"

    def encode_kv(self, prompt, *, surprisal=False):
        import torch

        from memory_os.protocols import KV

        for line in prompt.lines:
            ids = tuple(len(word) for word in line.split())
            keys = torch.tensor(ids, dtype=torch.float16)[None, None, :, None].repeat(1, 1, 1, 4)
            yield KV(ids, keys, keys)

    def query_keys(self, text, layer):
        raise AssertionError("not asked here")

    def count_cached(self, prompt):
        return 10 + sum(map(self.count_text, prompt.lines))

    def generate_cached(self, prompt, memory, *, max_tokens, stop=()):
        raise AssertionError("not asked here")

    def continuations(self, prompt, memory, texts):
        raise AssertionError("not asked here")


def opened(folder: Path, dimension: int = 64, name: str = "memory.db") -> Memory:
    return Memory.open(folder / name, llm=FakeLLM(), embedder=HashEmbedder(dimension))


def of(memory: Memory, ack: Ack, labels=ALICE):
    """The namespace, and what says which segments in it are stored, or gone."""

    def stored(*segments):
        ack("stored", labels, [[s.id, s.seq, s.text] for s in segments])

    return memory.namespace(*labels), stored


# -- what is done ------------------------------------------------------------------------------------------------------


class Scenario:
    """What is prepared, what the child does, and what must hold afterwards besides what always must."""

    dimension = 64

    def prepare(self, folder: Path) -> None:
        with opened(folder) as memory:
            memory.namespace(*ALICE).add_many([NewSegment(each, "old") for each in texts(0, 4)])

    def act(self, folder: Path, ack: Ack) -> None:
        raise NotImplementedError

    def before(self, folder: Path, acks: Sequence[Any]) -> None:
        """What holds before the database is opened again."""

    def after(self, memory: Memory, folder: Path, acks: Sequence[Any]) -> None:
        """What holds when it was opened and repaired."""


class FirstOpening(Scenario):
    def prepare(self, folder):
        pass

    def act(self, folder, ack):
        with opened(folder) as memory:
            scope, stored = of(memory, ack)
            stored(scope.add(text(1)))


class Add(Scenario):
    def act(self, folder, ack):
        with opened(folder) as memory:
            for n in range(10, 13):
                for labels in (ALICE, XIAO):
                    scope, stored = of(memory, ack, labels)
                    stored(scope.add(text(n)))


class AddMany(Scenario):
    def act(self, folder, ack):
        with opened(folder) as memory:
            scope, stored = of(memory, ack)
            for n in (10, 20):
                ack("together", ALICE, texts(n, 6))
                stored(*scope.add_many([NewSegment(each, "s") for each in texts(n, 6)]))


class Replace(Scenario):
    def act(self, folder, ack):
        with opened(folder) as memory:
            scope, stored = of(memory, ack)
            there: list[str] = []
            for n in (10, 20, 30):
                ack("going", ALICE, there)
                ack("together", ALICE, texts(n, 4))
                new = scope.replace_many([NewSegment(each, "s", key=f"k{i}") for i, each in enumerate(texts(n, 4))])
                ack("gone", ALICE, there)
                stored(*new)
                there = [segment.id for segment in new]

    def after(self, memory, folder, acks):
        keyed = [s.text for s in memory.namespace(*ALICE).history(99) if s.key]
        assert keyed in (
            [[]] if not acks else [[], texts(10, 4)] if len(acks) < 4 else [texts(n, 4) for n in (10, 20, 30)]
        )


class Ingest(Scenario):
    def prepare(self, folder):
        super().prepare(folder)
        lines = [json.dumps({"role": "user", "content": each}) for each in texts(10, 11)]
        (folder / "chat.jsonl").write_text("\n".join(lines), encoding="utf-8")

    def act(self, folder, ack):
        with opened(folder) as memory:
            memory.namespace(*ALICE).ingest(
                folder / "chat.jsonl", name="chat", progress=lambda stored, *_: ack("ingested", stored)
            )

    def after(self, memory, folder, acks):
        scope = memory.namespace(*ALICE)
        there = sum(segment.source == "chat" for segment in scope.history(99))
        assert there >= max((n for kind, *n in acks if kind == "ingested"), default=[0])[0]
        assert there in (0, 3, 6, 9, 11)  # whole batches
        assert scope.ingest(folder / "chat.jsonl", name="chat") == (11 - there, there)
        assert [s.text for s in scope.history(11)] == texts(10, 11)


class Chat(Scenario):
    def act(self, folder, ack):
        with opened(folder) as memory:
            scope, stored = of(memory, ack)
            for n in (10, 11):
                stream = scope.session("now").stream(f"Who is nomen{n}, I ask?")
                next(stream)  # the question is stored before the model says a word
                [asked] = scope.session("now").history(1)
                assert asked.role == "user"
                stored(asked)
                for _ in stream:
                    pass
                stored(stream.reply.segment)
                ack("trace", asked.id, stream.reply.segment.id)

    def after(self, memory, folder, acks):
        for _, asked, reply in (ack for ack in acks if ack[0] == "trace"):
            trace, _ = memory.namespace(*ALICE).why(asked)
            assert (trace.reply_id, trace.outcome) == (reply, "answered")


class Forget(Scenario):
    def prepare(self, folder):
        with opened(folder) as memory:
            scope = memory.namespace(*ALICE)
            for session, start in (("a", 10), ("b", 20), ("c", 30)):
                scope.add_many([NewSegment(each, session) for each in texts(start, 3)])
            scope.session("a").chat("What do you know?")
            scope.fill_bank()
            memory.namespace(*XIAO).add(text(40))

    def act(self, folder, ack):
        with opened(folder) as memory:
            scope = memory.namespace(*ALICE)
            for goes, forget in (
                (lambda s: s.seq < 3, lambda: scope.forget(1, 2)),
                (lambda s: s.session == "b", lambda: scope.forget(session="b")),
                (lambda s: True, lambda: scope.forget(everything=True)),
            ):
                going = [segment.id for segment in scope.history(99) if goes(segment)]
                ack("going", ALICE, going)
                forget()
                ack("gone", ALICE, going)

    def before(self, folder, acks):
        gone = {
            hashlib.sha256(id_.encode()).hexdigest()[:32] for kind, *rest in acks if kind == "gone" for id_ in rest[1]
        }
        assert not gone & {file.name[:32] for file in (folder / "memory.db.bank").rglob("*")}

    def after(self, memory, folder, acks):
        assert [s.text for s in memory.namespace(*XIAO).history()] == [text(40)]
        if sum(kind == "gone" for kind, *_ in acks) == 3:  # everything
            assert (memory.namespace(*ALICE).history(), memory.namespace(*ALICE).search("bird")) == ([], [])


class Summarize(Scenario):
    def prepare(self, folder):
        super().prepare(folder)
        paragraphs = [" ".join(f"nomen{n} said w{n}w{i}" for i in range(60)) for n in range(50, 64)]
        (folder / "book.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")

    def _summary(self, memory, folder, progress=None):
        memory.parts.llm.context_window = 1024
        return memory.namespace(*ALICE).summarize(folder / "book.txt", name="book", progress=progress)

    def act(self, folder, ack):
        with opened(folder) as memory:
            done: set[tuple[int, int]] = set()

            def progress(level: int, n: int, total: int) -> None:
                done.update({(level, n)} if n else ())  # the n-th of the level is stored
                ack("summarised", len(done))

            self._summary(memory, folder, progress)

    def after(self, memory, folder, acks):
        kept = max((n for kind, *n in acks if kind == "summarised"), default=[0])[0]
        again = self._summary(memory, folder)
        summaries = [s for s in memory.namespace(*ALICE).history(999) if s.kind == "summary"]
        assert again.found >= kept
        assert len(summaries) == again.found + again.calls == sum(map(len, again.levels))
        assert self._summary(memory, folder).calls == 0
        assert len(memory.namespace(*ALICE).sources(summaries[-1].id)) > 10


class Bank(Scenario):
    def prepare(self, folder):
        with opened(folder) as memory:
            memory.namespace(*ALICE).add_many([NewSegment(each, "s") for each in texts(0, 6)])
            memory.namespace(*ALICE).fill_bank()

    def act(self, folder, ack):
        with opened(folder) as memory:
            scope, stored = of(memory, ack)
            scope.drop_bank()
            stored(scope.add(text(10)))
            scope.fill_bank(lambda n, _: ack("banked", n))
            ack("dropping")
            scope.drop_bank()
            ack("dropped")

    def after(self, memory, folder, acks):
        scope, bank = memory.namespace(*ALICE), memory.parts.bank
        segments = scope.history(99)
        fingerprint = memory.parts.llm_bank.fingerprint
        kept = max((n for kind, *n in acks if kind == "banked"), default=[0])[0]
        n = scope.bank_status().n_segments
        assert n == 0 if ["dropped"] in acks else n >= kept or ["dropping"] in acks
        for id_, kv in bank.get(ALICE, fingerprint, [s.id for s in segments]).items():
            assert kv.ids == tuple(len(word) for word in memory.parts.llm_bank._layout.line(scope.segment(id_)).split())
        scope.fill_bank()
        assert scope.bank_status().n_segments == len(segments)
        assert len(bank.get(ALICE, fingerprint, [s.id for s in segments])) == len(segments)


class Upgrade(Scenario):
    revision = "0001"
    tables = ("namespaces", "segments", "vectors", "traces")

    def prepare(self, folder):
        script = Path(__file__).parent / "fixtures" / f"revision-{self.revision}.sql"
        with closing(sqlite3.connect(folder / "memory.db")) as raw:
            raw.executescript(script.read_text("utf-8"))
            raw.execute("PRAGMA journal_mode = WAL")

    def act(self, folder, ack):
        with opened(folder, 8) as memory:
            scope, stored = of(memory, ack)
            ack("opened")
            stored(scope.add(text(1)))

    dimension = 8

    def _read(self, file):
        with closing(sqlite3.connect(file)) as raw:
            [(found,)] = raw.execute("SELECT version_num FROM alembic_version")
            assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            n = {table: raw.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in self.tables}
            return found, n, raw.execute("SELECT id, seq, text FROM segments ORDER BY pk").fetchall()

    def before(self, folder, acks):
        from memory_os.stores.schema import HEAD

        found, n, rows = self._read(folder / "memory.db")
        copy = folder / f"memory.db.before-{HEAD}"
        assert found in (self.revision, HEAD)
        if found == HEAD or copy.exists():
            assert self._read(copy)[0] == self.revision
            assert self._read(copy)[2] == rows[:8]
        assert rows[0][2] == "My cat is called Miso."
        assert n["segments"] in ((8,) if found != HEAD else (8, 9))

    def after(self, memory, folder, acks):
        from memory_os.stores.schema import HEAD

        assert [file.name for file in folder.glob("*.before-*")] == [f"memory.db.before-{HEAD}"]
        assert memory.namespace(*ALICE).search("北京大学", k=1)[0].segment.seq == 2


class LaterUpgrade(Upgrade):
    revision = "0005"


class Export(Scenario):
    def prepare(self, folder):
        super().prepare(folder)
        with opened(folder) as memory:
            scope = memory.namespace(*ALICE)
            scope.export(folder / "out.jsonl")
            scope.session("s").chat("What now?")
            scope.items.put(("a",), "k", {"v": 1})
            scope.export(folder / "new.jsonl")

    def act(self, folder, ack):
        with opened(folder) as memory:
            memory.namespace(*ALICE).export(folder / "out.jsonl")
            ack("exported")

    def before(self, folder, acks):
        lines = (folder / "out.jsonl").read_text("utf-8").splitlines()
        whole = (folder / "new.jsonl").read_text("utf-8").splitlines()
        assert lines in (whole, whole[:5])  # the earlier export had the header and four segments

    def after(self, memory, folder, acks):
        if ["exported"] in acks:
            assert (folder / "out.jsonl").read_bytes() == (folder / "new.jsonl").read_bytes()


class Import(Scenario):
    def prepare(self, folder):
        with opened(folder, name="other.db") as memory:
            scope = memory.namespace("other")
            scope.add_many([NewSegment(each, "s") for each in texts(10, 9)])
            scope.session("s").chat("What now?")
            for n in range(3):
                scope.items.put(("a",), f"k{n}", {"v": n}, texts=[("v", text(n))])
            scope.export(folder / "in.jsonl")

    def act(self, folder, ack):
        with opened(folder) as memory:
            memory.namespace(*ALICE).import_(folder / "in.jsonl", progress=lambda n, _: ack("imported", n))

    def after(self, memory, folder, acks):
        scope = memory.namespace(*ALICE)
        there = len(scope.history(99))
        assert there >= max((n for kind, *n in acks if kind == "imported"), default=[0])[0]
        assert scope.import_(folder / "in.jsonl") == (11 - there, there)
        again = folder / "again.jsonl"
        assert scope.export(again) == 11
        mine, theirs = (
            [json.loads(line) for line in file.read_text("utf-8").splitlines()] for file in (again, folder / "in.jsonl")
        )
        for records in (mine, theirs):
            for record in records:
                for part in record.values():
                    if isinstance(part, dict):
                        part.pop("namespace", None)
        assert mine == theirs


class AnotherEmbedder(Scenario):
    dimension = 16

    def prepare(self, folder):
        with opened(folder) as memory:
            memory.namespace(*ALICE).add_many([NewSegment(each, "s") for each in texts(0, 9)])
            memory.namespace(*ALICE).items.put(("a",), "k", {"v": 1}, texts=[("v", text(1))])

    def act(self, folder, ack):
        with opened(folder, self.dimension) as memory:
            memory.repair(lambda n: ack("embedded", n))

    def after(self, memory, folder, acks):
        for n in range(9):
            assert memory.namespace(*ALICE).nearest(text(n), k=1)[0].segment.text == text(n)


class Repair(Scenario):
    def prepare(self, folder):
        with opened(folder) as memory:
            memory.namespace(*ALICE).add_many([NewSegment(each, "s") for each in texts(0, 9)])
        with closing(sqlite3.connect(folder / "memory.db")) as raw:
            for statement in (
                "DELETE FROM vectors WHERE segment_pk IN (2, 3, 4, 5)",
                "DELETE FROM lexical WHERE rowid IN (4, 5)",
                "INSERT INTO lexical(rowid, terms) VALUES (999, '1_bird')",
                "UPDATE lexical_content SET c0 = '1_changed' WHERE id = 7",
            ):
                raw.execute(statement)
            raw.commit()

    def act(self, folder, ack):
        with opened(folder) as memory:
            memory.repair()
            ack("repaired")

    def after(self, memory, folder, acks):
        for n in range(9):
            assert memory.namespace(*ALICE).search(f"nomen{n}", k=1)[0].segment.text == text(n)


class DeepRepair(Repair):
    def prepare(self, folder):
        super().prepare(folder)
        with closing(sqlite3.connect(folder / "memory.db")) as raw:
            for statement in (
                "UPDATE vectors SET vector = zeroblob(length(vector)) WHERE segment_pk IN (6, 7)",
                "UPDATE lexical SET terms = '1_boat' WHERE rowid = 8",
                "UPDATE namespaces SET n_terms = 1",
            ):
                raw.execute(statement)
            raw.commit()

    def act(self, folder, ack):
        with opened(folder) as memory:
            memory.repair(deep=True)
            ack("repaired")

    def after(self, memory, folder, acks):
        memory.repair(deep=True)
        assert {kind: rows for kind, rows in memory.check(deep=True).items() if rows} == {}
        super().after(memory, folder, acks)


class Expire(Scenario):
    def prepare(self, folder):
        with opened(folder) as memory:
            for n, each in enumerate(texts(0, 6)):
                memory.namespace(*ALICE).add(each, created_at=None if n > 3 else "2020-01-01T00:00:00Z")

    def act(self, folder, ack):
        with opened(folder) as memory:
            going = [segment.id for segment in memory.namespace(*ALICE).history()[:4]]
            ack("going", ALICE, going)
            memory.expire(30)
            ack("gone", ALICE, going)


class Shared(Scenario):
    """Another process has the store open all the while, so that no close is the last."""

    def act(self, folder, ack):
        told, until = os.pipe(), os.pipe()
        if not os.fork():
            os.close(until[1])
            held = sqlite3.connect(folder / "memory.db")
            held.execute("SELECT count(*) FROM segments").fetchall()
            os.write(told[1], b"x")
            os.read(until[0], 1)  # nothing comes: the end of the other process
            os._exit(0)
        os.read(told[0], 1)
        for round_ in (1, 2):
            with opened(folder) as memory:
                scope, stored = of(memory, ack)
                stored(scope.add(text(50 + round_)))
                going = [scope.segment(round_).id]
                ack("going", ALICE, going)
                scope.forget(round_)
                ack("gone", ALICE, going)
        os.close(until[1])


class Items(Scenario):
    def act(self, folder, ack):
        with opened(folder) as memory:
            items = memory.namespace(*ALICE).items
            for n in (1, 2):
                for key in ("a", "b"):
                    ack("put", key, n)
                    items.put(("path",), key, {"v": n}, texts=[("v", text(n))])
                    ack("there", key, n)
            ack("put", "a", None)
            items.delete(("path",), "a")
            ack("there", "a", None)

    def after(self, memory, folder, acks):
        items = memory.namespace(*ALICE).items
        for key in ("a", "b"):
            told = [ack[2] for ack in acks if ack[:2] == ["there", key]]
            tried = [ack[2] for ack in acks if ack[:2] == ["put", key]]
            item = items.get(("path",), key)
            assert (item.value["v"] if item else None) in {told[-1] if told else None, tried[-1] if tried else None}
        assert {i.key for i in items.search(("path",), query="bird")} == {
            k for page in items.keys(("path",)) for k in page
        }


class Traces(Scenario):
    def act(self, folder, ack):
        with opened(folder) as memory:
            scope, stored = of(memory, ack)
            for n in (10, 11):
                context = scope.session("s").context(f"What of nomen{n}?", record=True)
                stored(scope.segment(context.trace.query_id))
                ack("trace", context.trace.id, None, None)
                reply = scope.session("s").add(text(n), role="assistant")
                stored(reply)
                scope.answered(context.trace.id, reply.id)
                ack("trace", context.trace.id, reply.id, None)
                scope.confirm(context.trace.id, answer="yes")
                ack("trace", context.trace.id, reply.id, "yes")

    def after(self, memory, folder, acks):
        for _, id_, reply, answer in (ack for ack in acks if ack[0] == "trace"):
            trace, _ = memory.namespace(*ALICE).why(id_)
            assert trace.reply_id in ({reply} if reply else {None, trace.reply_id})
            assert answer is None or trace.confirmation.answer == answer


class Loop(Scenario):
    """Everything in turn, until it is killed from outside."""

    def act(self, folder, ack):
        start = int((folder / "next").read_text())
        with opened(folder) as memory:
            scope, stored = of(memory, ack)
            for n in range(start, start + 10_000, 20):
                ack("began", n)
                one = scope.add(text(n))
                stored(one)
                ack("together", ALICE, texts(n + 1, 5))
                stored(*scope.add_many([NewSegment(each, "s") for each in texts(n + 1, 5)]))
                ack("going", ALICE, [one.id])
                scope.forget(one.id)
                ack("gone", ALICE, [one.id])
                stored(*scope.replace_many([NewSegment(text(n + 6), "s", key=f"k{n}")]))
                stream = scope.session("now").stream(f"Who is nomen{n + 7}, I ask?")
                for _ in stream:
                    pass
                stored(stream.reply.segment)
                scope.items.put(("path",), f"k{n}", {"v": n}, texts=[("v", text(n))])
                scope.fill_bank()
                now = [segment.id for segment in scope.session("now").history(99)]  # also of turns before the last kill
                ack("going", ALICE, now)
                scope.forget(session="now")
                ack("gone", ALICE, now)


SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario()
    for scenario in (
        FirstOpening, Add, AddMany, Replace, Ingest, Chat, Forget, Summarize, Bank, Upgrade, LaterUpgrade, Export,
        Import, AnotherEmbedder, Repair, DeepRepair, Expire, Shared, Items, Traces, Loop,
    )
}  # fmt: skip


# -- the child ---------------------------------------------------------------------------------------------------------


def with_points(point: Callable[[str], None]) -> None:
    """Have every durable step of this process pass a point before and after it."""
    import sqlalchemy as sa
    from sqlalchemy.engine.default import DefaultDialect

    def around(owner: Any, name: str, label: str) -> None:
        original = getattr(owner, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            point(f"{label}:before")
            result = original(*args, **kwargs)
            point(f"{label}:after")
            return result

        setattr(owner, name, step)

    around(DefaultDialect, "do_commit", "commit")
    for name in ("replace", "unlink", "fsync", "mkdir"):
        around(os, name, name)

    def write_bytes(path: Path, content: bytes) -> None:
        point("write:before")
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            point("write:half")
            file.write(content[len(content) // 2 :])
        point("write:after")

    Path.write_bytes = write_bytes

    def executed(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        words = statement.split()
        if words[0] in ("INSERT", "UPDATE", "DELETE", "CREATE", "ALTER", "DROP", "VACUUM"):
            point(f"{' '.join(words[:3])}:after")

    sa.event.listen(sa.Engine, "after_cursor_execute", executed)

    def begun(statement: str) -> None:  # what scrubs goes to the driver's connection itself
        for words in ("PRAGMA wal_checkpoint", "VACUUM", "PRAGMA user_version = 0"):
            if statement.startswith(words):
                point(f"scrub:before {words}")

    sa.event.listen(sa.Engine, "connect", lambda connection, _: connection.set_trace_callback(begun))


def child(name: str, folder: Path, kill_at: int | None, pipe: int) -> None:
    from memory_os import bank, derive, ingest

    derive.BATCH, ingest.BATCH, bank.BATCH_TOKENS = 4, 3, 30  # several batches of little data
    names: list[str] = []

    def say(*line: Any) -> None:
        os.write(pipe, json.dumps(line).encode() + b"\n")

    def point(label: str) -> None:
        names.append(label)
        if len(names) - 1 == kill_at:
            say("killed", label)
            os.kill(os.getpid(), signal.SIGKILL)

    with_points(point)
    SCENARIOS[name].act(folder, say)
    say("points", names)


def run(name: str, folder: Path, kill_at: int | None, after_s: float | None) -> list[list[Any]]:
    """Fork a child for it; what it said, and the status with which it ended."""
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked safely"
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(reading)
            child(name, folder, kill_at, writing)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    said, deadline = b"", None
    while True:
        if after_s is not None and said and deadline is None:
            deadline = time.monotonic() + after_s  # from the first acknowledgement on
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if left == 0.0 or not select.select([reading], [], [], left)[0]:
            os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + 3600
        elif block := os.read(reading, 65536):
            said += block
        else:
            break
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    whole, _, _ = said.rpartition(b"\n")  # the last line may be half a line
    return [*map(json.loads, whole.splitlines()), ["status", status]]


def serve() -> None:
    import importlib
    import tempfile

    for module in ("alembic.command", "safetensors.torch", "torch"):
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as folder:
        for name in (
            "Chat",
            "Forget",
            "Summarize",
            "Import",
            "Upgrade",
        ):  # imports whatever is needed; every connection is closed again
            place = Path(folder) / name
            place.mkdir()
            SCENARIOS[name].prepare(place)
            SCENARIOS[name].act(place, lambda *_: None)
    for line in sys.stdin:
        name, place, kill_at, after_s = json.loads(line)
        sys.stdout.write(json.dumps(run(name, Path(place), kill_at, after_s)) + "\n")
        sys.stdout.flush()


# -- the verifier ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forked() -> Iterator[Callable[..., list[list[Any]]]]:
    """Runs a scenario in a child of the warmed process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert server.stdin
    assert server.stdout

    def ask(name: str, folder: Path, kill_at: int | None = None, after_s: float | None = None) -> list[list[Any]]:
        server.stdin.write(json.dumps([name, str(folder), kill_at, after_s]) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the warmed process is gone"
        return json.loads(answer)

    with server:
        yield ask
        server.stdin.close()


class Expected:
    """What must be there after what was acknowledged, by namespace and id; and what may or may not."""

    def __init__(self) -> None:
        self.there: dict[tuple[Any, str], tuple[int, str]] = {}
        self.gone: set[tuple[Any, str]] = set()
        self.going: set[tuple[Any, str]] = set()
        self.together: list[tuple[Any, list[str]]] = []

    def hear(self, acks: Sequence[Any]) -> None:
        for kind, *rest in acks:
            labels = tuple(rest[0]) if rest and isinstance(rest[0], list) else None
            if kind == "stored":
                self.there |= {(labels, id_): (seq, body) for id_, seq, body in rest[1]}
            elif kind == "going":
                self.going = {(labels, id_) for id_ in rest[1]}
            elif kind == "gone":
                self.gone |= {(labels, id_) for id_ in rest[1]}
                self.going -= self.gone
                self.there = {key: value for key, value in self.there.items() if key not in self.gone}
            elif kind == "together":
                self.together.append((labels, rest[1]))

    def hold(self, memory: Memory) -> None:
        found: dict[tuple[Any, str], tuple[int, str]] = {}
        for labels in memory.namespaces():
            segments = list(memory.parts.store.scan(labels))
            seqs = [segment.seq for segment in segments]
            assert seqs == sorted(set(seqs))
            assert max(Counter(segment.text for segment in segments).values(), default=0) <= 1, "stored twice"
            for segment in segments:
                assert segment.n_tokens == memory.parts.store._count_tokens(segment.text), (
                    "not the text that was stored"
                )
            found |= {(labels, segment.id): (segment.seq, segment.text) for segment in segments}
        for key, value in self.there.items():
            assert found.get(key) == value or (key in self.going and key not in found), f"lost: {value}"
        assert not self.gone & set(found), "what was forgotten is there again"
        assert len(self.going & set(found)) in (0, len(self.going)), "half of what was to go together"
        here = {(labels, body) for (labels, _), (_, body) in found.items()}
        went = {self.there[key][1] for key in self.going if key in self.there}
        for labels, bodies in self.together:
            n = len({(labels, body) for body in bodies} & here)
            assert n in (0, len(bodies)) or went & set(bodies), "half of what was to be stored together"
        self.there, self.going, self.together = found, set(), []


def is_found(memory: Memory) -> None:
    """Every segment by one of its words, and in the index of vectors."""
    for labels in memory.namespaces():
        segments = list(memory.parts.store.scan(labels))
        memory.parts.index.sync(labels)
        assert memory.parts.index.ids(labels) == {segment.id for segment in segments}
        for segment in segments[-3:]:
            word = re.search(r"nomen\d+|Miso|北京", segment.text)
            assert word is None or segment.id in dict(memory.parts.store.search(labels, word[0], 99))


def verify(name: str, folder: Path, acks: Sequence[Any], expected: Expected) -> None:
    scenario = SCENARIOS[name]
    scenario.before(folder, acks)
    expected.hear(acks)
    with opened(folder, scenario.dimension) as memory:
        faults = {kind for kind, rows in memory.check().items() if rows}
        assert faults <= HELD or name in ("Repair", "DeepRepair"), faults
        expected.hold(memory)
        memory.repair()
        assert {kind: rows for kind, rows in memory.check().items() if rows} == {}
        is_found(memory)
        scenario.after(memory, folder, acks)
        assert {kind: rows for kind, rows in memory.check().items() if rows} == {}


def prepared(name: str, folder: Path) -> Expected:
    folder.mkdir()
    SCENARIOS[name].prepare(folder)
    return known(name, folder)


def known(name: str, folder: Path) -> Expected:
    expected = Expected()
    if name not in ("FirstOpening", "Import"):
        with closing(sqlite3.connect(folder / "memory.db")) as raw:
            rows = raw.execute(
                "SELECT labels, s.id, seq, text FROM segments s JOIN namespaces n ON n.id = namespace_id"
            )
            expected.there = {(tuple(json.loads(labels)), id_): (seq, body) for labels, id_, seq, body in rows}
    return expected


def chosen(points: Sequence[str]) -> list[int]:
    """Which points to be killed at: spread over the durable steps first, and some within transactions."""
    durable = [at for at, label in enumerate(points) if label[0].islower()]
    within = [at for at, label in enumerate(points) if not label[0].islower()]
    n = KILLS_EACH - min(len(within), KILLS_EACH // 4)
    return sorted(_spread(durable, n) + _spread(within, KILLS_EACH - min(n, len(durable))))


def _spread(places: Sequence[int], n: int) -> list[int]:
    n = min(n, len(places))
    return [places[i * (len(places) - 1) // max(n - 1, 1)] for i in range(n)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "Loop"])
def test_killed_at_any_point_nothing_acknowledged_is_lost_or_doubled(name, forked, tmp_path):
    prepared(name, tmp_path / "prepared")
    shutil.copytree(tmp_path / "prepared", tmp_path / "whole")
    *acks, [_, points], status = forked(name, tmp_path / "whole")
    assert status == ["status", 0]
    verify(name, tmp_path / "whole", acks, known(name, tmp_path / "prepared"))
    for at in chosen(points):
        folder = tmp_path / f"{at}"
        shutil.copytree(tmp_path / "prepared", folder)
        *acks, [_, label], status = forked(name, folder, at)
        assert (label, status) == (points[at], ["status", -signal.SIGKILL])
        try:
            verify(name, folder, acks, known(name, tmp_path / "prepared"))
        except BaseException as error:
            error.add_note(f"{name}, killed at point {at} of {len(points)}: {label}")
            raise
        shutil.rmtree(folder)
        KILLED[name] += 1


@pytest.mark.slow
def test_killed_from_outside_again_and_again_one_database_keeps_everything(forked, tmp_path):
    delays, folder = random.Random(9), tmp_path / "work"
    expected = prepared("Loop", folder)
    n = 100
    for _ in range(KILLS_OUTSIDE):
        (folder / "next").write_text(str(n))
        *acks, status = forked("Loop", folder, None, delays.uniform(0.0, 0.25))
        assert status == ["status", -signal.SIGKILL]
        verify("Loop", folder, acks, expected)
        n = max([n] + [ack[1] for ack in acks if ack[0] == "began"]) + 20
        KILLED["Loop"] += 1
    assert len(expected.there) > KILLS_OUTSIDE


@pytest.mark.slow
def test_there_were_at_least_200_kills(capsys):
    if set(KILLED) != set(SCENARIOS):
        pytest.skip("counts the kills of the tests above, and not all of them ran")
    with capsys.disabled():
        sys.stdout.write(f"\n{KILLED.total()} kills: {dict(KILLED)}\n")
    assert KILLED.total() >= 200


if __name__ == "__main__":
    serve()
