"""The facade: names, export and import, forgetting, and what it says of a wrong call."""

import io
import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_os import Memory
from memory_os.adapters.scripted import ScriptedLLM
from memory_os.errors import (
    CapabilityError,
    ConfigError,
    InvalidInputError,
    NamespaceError,
    StoreError,
    UnknownNameError,
)
from memory_os.protocols import ScoringLLM
from memory_os.types import Choice, Decision, as_namespace


@pytest.fixture
def memory(tmp_path):
    with Memory.open(tmp_path / "memory.db", llm=ScriptedLLM(lambda m: "Noted."), embedder="hash") as opened:
        yield opened


@pytest.mark.parametrize("labels", [(), ("",), (" ",), ("a", ""), ("x" * 300,), ("a\x00",), tuple("abcdefghijklmnopq")])
def test_a_namespace_that_is_none_is_an_error(memory, labels):
    with pytest.raises(NamespaceError):
        memory.namespace(*labels)
    with pytest.raises(NamespaceError, match="not one string"):
        as_namespace("alice")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"llm": "gpt-9"}, UnknownNameError, "unknown LLM 'gpt-9'"),
        ({"llm": "hf:/no/such/model"}, ConfigError, "no/such/model"),
        ({"embedder": "word2vec"}, UnknownNameError, "unknown embedder"),
        ({"vectors": "faiss"}, UnknownNameError, "known: chroma, exact"),
        ({"controller": "scm9"}, UnknownNameError, "known: alr2, auto, longmem-free, recency"),
        ({"controller_options": {"speed": 1}}, ConfigError, "does not take these options"),
        ({"budget": 0}, ConfigError, "at least 1 token"),
        ({"bugdet": 9}, ConfigError, "bugdet"),
    ],
)
def test_a_wrong_name_is_one_clear_error_and_creates_nothing(tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        Memory.open(tmp_path / "new.db", **{"embedder": "hash", **options})
    assert list(tmp_path.glob("new.db*")) == []


def test_a_url_names_a_file_and_another_scheme_is_refused(tmp_path):
    with Memory.open(f"sqlite:///{tmp_path}/url.db", embedder="hash") as memory:
        memory.namespace("a").add("hello")
    assert (tmp_path / "url.db").exists()
    with pytest.raises(StoreError, match="sqlite:///"):
        Memory.open("mysql://host/db", embedder="hash")
    for nowhere in (":memory:", "sqlite:///:memory:"):
        with pytest.raises(StoreError, match="kept in a file"):
            Memory.open(nowhere, embedder="hash")


def test_a_controller_that_needs_more_of_the_llm_is_refused(tmp_path):
    class Needy:
        name = "needy"
        needs = (ScoringLLM,)

        def decide(self, query, memory, budget):
            return Decision(tuple(Choice(c.segment.id, None, "weak") for c in memory.candidates))

    with pytest.raises(CapabilityError, match="'needy' needs an LLM with ScoringLLM; HuggingFaceLLM"):
        Memory.open(tmp_path / "m.db", llm=ScriptedLLM([]), embedder="hash", controller=Needy())


def test_add_checks_what_it_is_given(memory):
    scope = memory.namespace("a")
    for bad in ({"role": "king"}, {"kind": "poem"}, {"created_at": "soon"}, {"metadata": {"x": object()}}):
        with pytest.raises(InvalidInputError):
            scope.add("text", **bad)
    assert memory.namespaces() == []
    segment = scope.add("text", created_at="2023-05-08", metadata={"x": [1]})
    assert (segment.created_at, segment.metadata) == (datetime(2023, 5, 8, tzinfo=UTC), {"x": [1]})


@given(
    turns=st.lists(
        st.tuples(
            st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1).filter(str.strip),
            st.sampled_from(["user", "assistant", "tool"]),
            st.datetimes(min_value=datetime(1971, 1, 1), max_value=datetime(2100, 1, 1), timezones=st.just(UTC)),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_an_export_imports_to_the_same_memory(tmp_path_factory, turns):
    folder = tmp_path_factory.mktemp("export")
    with (
        Memory.open(folder / "a.db", llm=ScriptedLLM(lambda m: "Noted."), embedder="hash") as first,
        Memory.open(folder / "b.db", embedder="hash") as second,
    ):
        here, there = first.namespace("x"), second.namespace("x")
        for text, role, when in turns:
            here.add(text, role=role, created_at=when, metadata={"role": role})
        here.forget(1)
        here.chat("And you?")
        here.export(folder / "out.jsonl")
        assert there.import_(folder / "out.jsonl") == (len(turns) + 1, 0)
        assert there.history(99) == here.history(99)
        assert there.why() == here.why()
        assert there.context("you?").messages == here.context("you?").messages
        assert there.import_(folder / "out.jsonl") == (0, len(turns) + 1)
        again = io.StringIO()
        there.export(again)
        assert again.getvalue() == (folder / "out.jsonl").read_text(encoding="utf-8")


def test_an_import_into_another_namespace_of_the_same_store_is_a_copy(memory):
    memory.namespace("a").add("hello")
    file = io.StringIO()
    memory.namespace("a").export(file)
    assert memory.namespace("b").import_(file.getvalue().splitlines()) == (1, 0)
    memory.namespace("a").forget(everything=True)
    assert [s.text for s in memory.namespace("b").history()] == ["hello"]


def test_a_broken_export_names_its_line_and_keeps_what_came_before(memory):
    scope = memory.namespace("a")
    for i in range(3):
        scope.add(f"turn {i}")
    file = io.StringIO()
    scope.export(file)
    lines = file.getvalue().splitlines()
    other = memory.namespace("b")
    for broken in (lines[3][:40], json.dumps({"segment": {"text": "x"}}), "[]"):
        with pytest.raises(InvalidInputError) as caught:
            other.import_([*lines[:3], broken])
        assert caught.value.line == 4
        assert [s.text for s in other.history()] == ["turn 0", "turn 1"]
    with pytest.raises(InvalidInputError, match="memos ingest"):
        other.import_(['{"role": "user", "content": "hi"}'])


def test_forget_takes_exactly_what_was_named(memory):
    scope = memory.namespace("a")
    keep = scope.session("keep").add("keep the boat")
    gone = [scope.session("gone").add(f"kite {i}") for i in range(3)]
    reply = scope.session("gone").chat("kite?")
    preview = scope.forget(session="gone", preview=True)
    counts = scope.forget(session="gone")
    assert preview == counts
    assert (counts["segments"], counts["traces"]) == (5, 1)
    assert [s.id for s in scope.history(99)] == [keep.id]
    assert [h.segment.id for h in scope.search("kite")] == [keep.id]
    with pytest.raises(UnknownNameError):
        scope.why(reply.trace.id)
    for refs in ((gone[0].id,), (keep.id, 999)):
        with pytest.raises(UnknownNameError):
            scope.forget(*refs)
    with pytest.raises(UnknownNameError, match="session"):
        scope.forget(session="gone")
    with pytest.raises(ConfigError):
        scope.forget()
    assert scope.forget(keep.seq)["segments"] == 1
    assert memory.namespaces() == []


def test_search_gives_k_hits_with_their_signals(memory):
    scope = memory.namespace("a")
    for i in range(9):
        scope.add(f"kite number {i}")
    hits = scope.search("kite 3", k=4)
    assert len(hits) == 4
    assert hits[0].segment.text == "kite number 3"
    assert set(hits[0].signals) == set(hits[0].contributions) >= {"dense", "lexical", "length"}
    assert hits[0].score == pytest.approx(sum(hits[0].contributions.values()), abs=0.01)
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    with pytest.raises(ConfigError):
        scope.search("kite", k=0)


def test_sessions_share_a_namespace_and_nothing_else(memory):
    alice = memory.namespace("alice")
    alice.session("one").add("My cat is called Miso.")
    assert "Miso" in alice.session("two").context("cat?").text
    assert alice.session("two").history() == []
    assert memory.namespace("bob").context("cat?").text == ""


def test_both_vector_indexes_serve_the_facade(tmp_path):
    texts = []
    for vectors in ("exact", "chroma"):
        with Memory.open(tmp_path / "m.db", embedder="hash", vectors=vectors) as memory:
            if vectors == "exact":
                for i in range(30):
                    memory.namespace("a").add(f"the kite number {i} flew over house {i * 7}")
            texts.append(memory.namespace("a").context("kite 5 house", budget=200).text)
    assert texts[0] == texts[1] != ""


def test_an_older_export_takes_back_neither_a_confirmation_nor_a_reply(memory):
    scope = memory.namespace("a")
    context = scope.context("Where does she live?", record=True)
    exports = []

    def export() -> None:
        exports.append(io.StringIO())
        scope.export(exports[-1])

    export()
    scope.add("In Oslo.", role="assistant", reply_to=context)
    export()
    for answer in ("In Bergen.", "In Oslo."):
        scope.confirm(answer=answer)
        export()
    newest = scope.why()[0]
    for each in (*exports, exports[0]):
        scope.import_(each.getvalue().splitlines())
        assert scope.why()[0] == newest
    other = memory.namespace("b")
    for each in exports:  # a newer one is taken
        other.import_(each.getvalue().splitlines())
    assert other.why()[0].confirmation == newest.confirmation
