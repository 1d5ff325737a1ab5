"""Every size has its limit, and one clear error that names it; special files and archives are refused."""

import gzip
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from memory_os import InvalidInputError, Memory, NewSegment
from memory_os import limits as lim
from memory_os.adapters.scripted import ScriptedLLM


@pytest.fixture
def alice(tmp_path):
    with Memory.open(tmp_path / "memory.db", llm=ScriptedLLM(["x"]), embedder="hash") as memory:
        yield memory.namespace("alice")


def long(n: int) -> str:
    return "x" * (n + 1)


def nested(depth: int) -> object:
    inner: object = 1
    for n in range(depth):
        inner = [inner] if n % 2 else {"a": inner}
    return inner


def of_itself() -> dict[str, object]:
    loop: dict[str, object] = {}
    loop["a"] = loop
    return loop


TOO_LONG = {
    "a text": (lambda a: a.add(long(lim.MAX_TEXT_CHARS)), lim.MAX_TEXT_CHARS),
    "a text among several": (
        lambda a: a.add_many([NewSegment("fine", "s"), NewSegment(long(lim.MAX_TEXT_CHARS), "s")]),
        lim.MAX_TEXT_CHARS,
    ),
    "a query": (lambda a: a.context(long(lim.MAX_TEXT_CHARS)), lim.MAX_TEXT_CHARS),
    "a session": (lambda a: a.session(long(lim.MAX_NAME_CHARS)), lim.MAX_NAME_CHARS),
    "a session of a segment": (lambda a: a.add_many([NewSegment("x", long(lim.MAX_NAME_CHARS))]), lim.MAX_NAME_CHARS),
    "a speaker": (lambda a: a.add("x", speaker=long(lim.MAX_NAME_CHARS)), lim.MAX_NAME_CHARS),
    "a speaker who asks": (lambda a: a.chat("x", speaker=long(lim.MAX_NAME_CHARS)), lim.MAX_NAME_CHARS),
    "a key": (lambda a: a.replace_many([NewSegment("x", "s", key=long(lim.MAX_NAME_CHARS))]), lim.MAX_NAME_CHARS),
    "an id": (lambda a: a.add_many([NewSegment("x", "s", id=long(lim.MAX_NAME_CHARS))]), lim.MAX_NAME_CHARS),
    "a source": (lambda a: a.add_many([NewSegment("x", "s", source=long(8192))]), 8192),
    "metadata": (lambda a: a.add("x", metadata={"a": long(lim.MAX_METADATA_CHARS)}), lim.MAX_METADATA_CHARS),
    "depth of metadata": (lambda a: a.add("x", metadata={"a": nested(lim.MAX_DEPTH)}), lim.MAX_DEPTH),
    "metadata that holds itself": (lambda a: a.add("x", metadata=of_itself()), lim.MAX_DEPTH),
    "depth of a message of a file": (
        lambda a: a.ingest(io.BytesIO(json.dumps([{"text": "x", "a": nested(600)}]).encode()), format="chat"),
        lim.MAX_DEPTH,
    ),
    "depth of an item's value": (lambda a: a.items.put(("p",), "k", {"a": nested(lim.MAX_DEPTH)}), lim.MAX_DEPTH),
    "segments at once": (
        lambda a: a.add_many([NewSegment("x", "s")] * (lim.MAX_SEGMENTS_PER_CALL + 1)),
        lim.MAX_SEGMENTS_PER_CALL,
    ),
    "a number": (lambda a: a.add_many([NewSegment("x", "s", seq=lim.MAX_SEQ + 1)]), lim.MAX_SEQ),
    "an item's value": (lambda a: a.items.put(("p",), "k", {"a": long(lim.MAX_ITEM_CHARS)}), lim.MAX_ITEM_CHARS),
    "an item's text": (
        lambda a: a.items.put(("p",), "k", {}, texts=[("t", long(lim.MAX_TEXT_CHARS))]),
        lim.MAX_TEXT_CHARS,
    ),
    "an item's key": (lambda a: a.items.put(("p",), long(lim.MAX_LABEL_CHARS), {}), lim.MAX_LABEL_CHARS),
    "an item's label": (lambda a: a.items.put((long(lim.MAX_LABEL_CHARS),), "k", {}), lim.MAX_LABEL_CHARS),
    "an item's path": (lambda a: a.items.put(("p",) * (lim.MAX_PATH_LABELS + 1), "k", {}), lim.MAX_PATH_LABELS),
    "a message of a file": (
        lambda a: a.ingest(io.BytesIO(json.dumps([{"text": long(lim.MAX_TEXT_CHARS)}]).encode()), format="chat"),
        lim.MAX_TEXT_CHARS,
    ),
    "a line of an import": (
        lambda a: a.import_(['{"memory_os_export": 1}', '"' + long(lim.MAX_LINE_CHARS) + '"']),
        lim.MAX_LINE_CHARS,
    ),
}


@pytest.mark.parametrize("what", TOO_LONG)
def test_what_is_over_a_limit_is_refused_with_the_limit_and_changes_nothing(alice, what):
    act, limit = TOO_LONG[what]
    with pytest.raises(InvalidInputError, match=str(limit)):
        act(alice)
    assert alice.stats()["segments"] == alice.stats()["items"] == 0


def test_what_is_at_the_limit_is_stored(alice):
    alice.session("s" * lim.MAX_NAME_CHARS).add(
        "x" * lim.MAX_TEXT_CHARS, speaker="s" * lim.MAX_NAME_CHARS, metadata={"a": "x" * (lim.MAX_METADATA_CHARS - 9)}
    )
    alice.items.put(("x" * lim.MAX_LABEL_CHARS,) * lim.MAX_PATH_LABELS, "k", {"a": "x" * (lim.MAX_ITEM_CHARS - 9)})
    deep = {"a": nested(lim.MAX_DEPTH - 1)}
    alice.add("deep", metadata=deep)
    alice.items.put(("deep",), "k", deep)
    lines = io.StringIO()
    alice.export(lines)
    alice.forget(everything=True)
    alice.import_(lines.getvalue().splitlines(), restore=True)
    assert alice.history()[1].metadata == alice.items.get(("deep",), "k").value == deep
    alice.add_many([NewSegment("last", "s", seq=lim.MAX_SEQ)])
    assert alice.add("after it").seq == lim.MAX_SEQ + 1


@pytest.mark.parametrize(
    "new",
    [
        {"text": 1}, {"session": 1}, {"session": " "}, {"session": "a\x00"}, {"speaker": 1}, {"speaker": "\ud800"},
        {"role": "boss"}, {"kind": "x"}, {"metadata": {"a": float("nan")}}, {"metadata": {"a": object()}},
        {"metadata": [1]}, {"seq": "1"}, {"seq": True}, {"seq": -1}, {"offset": (2, 1)}, {"offset": ("a", "b")},
        {"created_at": "yesterday"}, {"key": 1}, {"id": 1}, {"source": 1},
    ],
)  # fmt: skip
def test_add_many_takes_nothing_that_cannot_be_stored(alice, new):
    with pytest.raises(InvalidInputError):
        alice.add_many([NewSegment("fine", "s"), NewSegment(**{"text": "x", "session": "s", **new})])
    assert alice.stats()["segments"] == 0


# -- files -------------------------------------------------------------------------------------------------------------


def archives(folder: Path) -> list[Path]:
    (folder / "in.txt").write_text("hello")
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("../../evil.txt", "x")
    with tarfile.open(folder / "a.tar", "w") as archive:
        archive.add(folder / "in.txt", "../../evil.txt")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    return [folder / name for name in ("a.zip", "a.tar", "a.jsonl.gz")]


def test_archives_are_not_opened(alice, tmp_path):
    for archive in archives(tmp_path):
        for act in (alice.ingest, alice.import_):
            with pytest.raises(InvalidInputError, match=r"is an archive .* unpack it"):
                act(archive)
    assert not list(tmp_path.parent.glob("**/evil.txt"))


def test_what_may_never_end_is_refused_and_a_link_is_followed(alice, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_zero").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "to_zero", Path("/dev/zero"), tmp_path):
        for act in (alice.ingest, alice.import_):
            with pytest.raises(InvalidInputError, match="no regular file"):
                act(path)
    (tmp_path / "notes.txt").write_text("The cat is grey.")
    (tmp_path / "link.txt").symlink_to("notes.txt")
    assert alice.ingest(tmp_path / "link.txt")[0] == 1
    for path in ("a\x00b", tmp_path / "missing"):
        with pytest.raises(InvalidInputError):
            alice.ingest(path)


def test_a_file_that_is_read_as_a_whole_has_a_limit(alice, monkeypatch):
    monkeypatch.setattr("memory_os.ingest.MAX_FILE_BYTES", 10)
    with pytest.raises(InvalidInputError, match="may have 10"):
        alice.ingest(io.BytesIO(b"hello, hello"), format="text")


def test_nothing_that_is_imported_is_used_as_a_path(alice, tmp_path):
    evil = "../../../../evil"
    alice.add_many([NewSegment("The cat is grey.", evil, source=evil, key=evil, id=evil, speaker=evil)])
    alice.items.put((evil,), evil, {"a": evil})
    alice.export(tmp_path / "e.jsonl")
    alice.whole().import_(tmp_path / "e.jsonl")
    alice.context("cat")
    alice.forget(everything=True)
    assert {path.name.split(".")[0] for path in tmp_path.iterdir()} == {"memory", "e"}
    from memory_os.stores.manifest import file_name

    assert "/" not in file_name(evil, evil)


def test_the_table_of_limits_tells_what_holds():
    table = (Path(__file__).resolve().parents[1] / "docs" / "limits.md").read_text("utf-8")
    for name in [name for name in dir(lim) if name.startswith("MAX_") and name != "MAX_SEQ"]:
        assert f"{getattr(lim, name):,}" in table, name


BAD_TRACES = {
    "notes.1": lambda trace: trace.update(notes=["a", 1]),
    "error": lambda trace: trace.update(error=["x"]),
    "calls.0.answer": lambda trace: trace.update(calls=[{**CALL, "answer": {"a": 1}}]),
    "calls.0.purpose": lambda trace: trace.update(calls=[{**CALL, "purpose": json.loads("[" * 80 + "]" * 80)}]),
    "calls.0.prompt_tokens": lambda trace: trace.update(calls=[{**CALL, "prompt_tokens": "x"}]),
    "ledger.0.flags.0": lambda trace: trace["ledger"][0].update(flags=[1, None]),
    "ledger.0.signals.a": lambda trace: trace["ledger"][0].update(signals={"a": None}),
    "ledger.0.contributions": lambda trace: trace["ledger"][0].update(contributions=[1]),
    "ledger.0.spans.0.0": lambda trace: trace["ledger"][0].update(spans=[["a", "b"]]),
    "timings_ms": lambda trace: trace.update(timings_ms=[1.0]),
    "account.system": lambda trace: trace["account"].update(system="x"),
    "account.exact": lambda trace: trace["account"].update(exact="no"),
    "confirmation.answer": lambda trace: trace.update(confirmation={**TOLD, "answer": 5}),
    "confirmation.evidence.0": lambda trace: trace.update(confirmation={**TOLD, "evidence": [1]}),
}
CALL = {"purpose": "p", "verdict": "v", "answer": "a", "prompt_tokens": 1, "reply_tokens": 1}
TOLD = {"by": "user", "answer": "a", "at": "2024-01-01T00:00:00+00:00", "evidence": None}


@pytest.mark.parametrize("what", BAD_TRACES)
def test_an_imported_trace_is_of_the_types_that_its_readers_rely_on(alice, what):
    alice.add("The cat is grey.")
    alice.context("cat?", record=True)
    lines = io.StringIO()
    alice.export(lines)
    records = [json.loads(line) for line in lines.getvalue().splitlines()]
    trace = next(record["trace"] for record in records if "trace" in record)
    trace["id"] = "other"
    trace.update(calls=[CALL], confirmation=TOLD)
    alice.import_(map(json.dumps, records))
    assert alice.why("other")[0].calls
    trace["id"] = "worse"
    BAD_TRACES[what](trace)
    with pytest.raises(InvalidInputError, match=rf"line 4: .*\b{what}\b"):
        alice.import_(map(json.dumps, records))
