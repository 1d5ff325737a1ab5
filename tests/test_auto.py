"""The ``auto`` controller: repeats enter once, the newest last, and nothing where nothing is about the query."""

from datetime import UTC, datetime, timedelta

import pytest

from memory_os import Memory
from memory_os.controllers.auto import AutoController, confidence, statement
from memory_os.errors import ConfigError
from memory_os.types import Action, Candidate, Form, Reason, Segment

START = datetime(2024, 1, 1, tzinfo=UTC)


class View:
    flash = ()
    llm = None
    now = START

    def __init__(self, *candidates):
        self.candidates = candidates


def candidate(seq, text, score=1.0, n_tokens=10, who="Ana", **signals):
    item = Segment(f"id{seq}", seq, ("a",), "s", "user", who, "turn", text, START + timedelta(days=seq), n_tokens)
    return Candidate(item, score, signals, n_tokens, {"dense": score})


def verdicts(decision):
    return [(c.segment_id, c.form, c.reason) for c in decision.choices]


def test_relevance_counts_per_token():
    cheap, dear = candidate(1, "a", 2.0, 10), candidate(2, "b", 2.1, 200)
    ranked = AutoController(price=0.4, abstain=0).decide("q", View(dear, cheap), 100)
    assert [c.segment_id for c in ranked.choices] == ["id1", "id2"]
    by_score = AutoController(price=0.0, abstain=0).decide("q", View(dear, cheap), 100)
    assert [c.segment_id for c in by_score.choices] == ["id2", "id1"]


def test_what_is_said_twice_enters_once_as_the_newer_and_in_the_better_place():
    view = View(
        candidate(1, "I live in Rome.", 3.0), candidate(2, "I like figs.", 2.0), candidate(9, "I live in Rome!", 1.0)
    )
    assert verdicts(AutoController(abstain=0).decide("q", view, 100)) == [
        ("id9", Form.FULL, Reason.RELEVANT),
        ("id2", Form.FULL, Reason.RELEVANT),
        ("id1", None, Reason.REPEATED),
    ]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("I live in Rome.", "Oh, I live in Rome!", True),
        ("I live in Rome.", "I live in Paris.", False),
        ("I like him", "I like her", False),
        ("by bus", "not by bus", False),
        ("room 12", "room 13", False),
        ("Thanks!", "thanks", True),
        ("我住在北京", "我住在上海", False),
    ],
)
def test_only_the_same_words_are_the_same_statement(one, other, same):
    assert (statement("Ana", one) == statement("Ana", other)) is same
    assert statement("Ana", one) != statement("Bo", one)


def test_an_update_stands_after_what_it_replaces_with_both_dates(tmp_path):
    with Memory.open(tmp_path / "memory.db", embedder="hash", tokenizer="cl100k_base") as memory:
        scope = memory.namespace("a")
        scope.add("I live in Paris now.", created_at="2024-03-01")
        scope.add("I live in Rome.", created_at="2023-03-01")  # told later of an earlier time: seq decides
        scope.add("I live in Oslo these days.", created_at="2024-06-01")
        lines = scope.context("Where do I live?", budget=200).text.splitlines()[1:-1]
        assert lines == [
            "[2024-03-01]", "user: I live in Paris now.", "[2023-03-01]", "user: I live in Rome.",
            "[2024-06-01]", "user: I live in Oslo these days.",
        ]  # fmt: skip


@pytest.fixture(scope="module")
def scope(tmp_path_factory):
    with Memory.open(tmp_path_factory.mktemp("auto") / "memory.db", tokenizer="cl100k_base") as memory:
        scope = memory.namespace("a")
        for text in ("My cat is called Miso.", "I work at the harbour museum.", "The blue bicycle has a flat tyre."):
            scope.add(text)
        yield scope


@pytest.mark.parametrize("query", ["Explain photosynthesis in one sentence.", "What is 12 times 17?", "lol ok"])
def test_nothing_is_injected_where_nothing_is_about_the_query(scope, query):
    context = scope.context(query, budget=300)
    assert context.text == ""
    assert {entry.reason for entry in context.ledger} == {Reason.UNRELATED}
    assert "confidence" in " ".join(context.trace.notes)
    assert len(scope.search(query, k=2)) == 2  # an exact k is what was asked for


@pytest.mark.parametrize("query", ["What is my cat called?", "Where do I work?", "bicycle tyre"])
def test_what_is_remembered_is_injected(scope, query):
    context = scope.context(query, budget=300)
    assert any(entry.action is Action.ACTIVATED for entry in context.ledger)


def test_abstaining_can_be_turned_off_and_needs_its_signals():
    weak = candidate(1, "x", dense=0.0, late_exact=0.0)
    assert AutoController(abstain=0.5).decide("q", View(weak), 10).choices[0].reason is Reason.UNRELATED
    assert AutoController(abstain=0).decide("q", View(weak), 10).choices[0].form is Form.FULL
    assert confidence([candidate(1, "x", dense=0.0)]) is None
    assert confidence([]) is None
    assert confidence([candidate(1, "x", dense=0.9, late_exact=0.9)]) > 0.99 > confidence([weak])


def test_unknown_options_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not take these options"):
        Memory.open(tmp_path / "memory.db", controller_options={"min_dense": 0.2})
