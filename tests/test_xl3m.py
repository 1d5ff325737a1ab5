"""XL3M: exact entropies, what is chosen and in which order, answer stems, and what is read only once."""

import asyncio
import io
import math
import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from memory_os import AsyncMemory, CapabilityError, ConfigError, InvalidInputError, LLMError, Memory, NewSegment
from memory_os.adapters.huggingface import HuggingFaceLLM
from memory_os.adapters.scripted import HashEmbedder, ScriptedLLM, WordCounter
from memory_os.benchmarks import needle
from memory_os.certainty import certainty_of, entropy, relevance, stands_out
from memory_os.controllers.xl3m import Xl3mController
from memory_os.errors import BudgetError
from memory_os.lexical import query_terms, terms_of
from memory_os.protocols import Reading
from memory_os.stem import by_rules, read_stem
from memory_os.stores import digest
from memory_os.types import Action, Certainty, Form, Reason
from memory_os.windows import sentences, windows

VOCABULARY = 50
UNIFORM = np.full(VOCABULARY, -math.log(VOCABULARY), dtype=np.float32)
QUESTION = "What is the code of the cellar?"
STEM = "The code of the cellar is"


def peaked(mass):
    """Log-probabilities with one token of probability ``mass`` and the rest spread evenly."""
    rest = (1 - mass) / (VOCABULARY - 1)
    return np.log(np.array([mass, *[rest] * (VOCABULARY - 1)], dtype=np.float64)).astype(np.float32)


def entropy_by_hand(mass):
    rest = (1 - mass) / (VOCABULARY - 1)
    return -(mass * math.log(mass) + (VOCABULARY - 1) * rest * math.log(rest))


class TableLLM(ScriptedLLM):
    """Reads by a rule from a segment's text to log-probabilities, and remembers what it was given."""

    version = 1

    def fingerprint(self):
        return f"table {self.version}"

    def __init__(self, rule, reply="Noted.", *, complete=True, **options):
        super().__init__(reply if callable(reply) else lambda messages: reply, **options)
        self.rule, self.complete = rule, complete
        self.read_texts, self.stems = [], set()

    def read(self, segments, question, stem):
        for segment in segments:
            self.read_texts.append(segment)
            self.stems.add(stem)
            yield Reading(self.rule(segment), self.complete)


class QuestionTableLLM(TableLLM):
    """The same, that also tells how likely the question is: by the words that it shares with the segment."""

    def read_question(self, segments, question, stem):
        for segment, reading in zip(segments, self.read(segments, question, stem), strict=True):
            shared = set(query_terms(question)) & set(terms_of(segment))
            yield Reading(reading.next_token, self.complete, np.full(4, len(shared) - 9.0, dtype=np.float32))


def certain_of(word, mass=0.9):
    return lambda text: peaked(mass) if word in text else UNIFORM


def opened(path, llm, controller=None, **options):
    options = {"embedder": HashEmbedder(), "tokenizer": WordCounter(), "reply_tokens": 50, "flash_turns": 0, **options}
    return Memory.open(path, llm=llm, controller=controller or Xl3mController(), **options)


def stored(scope, n=30, **marked):
    """``n`` turns of six words; those of the given numbers say something else."""
    texts = [marked.get(f"n{number}", f"turn {number} says nothing at all") for number in range(n)]
    return scope.add_many([NewSegment(text, "s") for text in texts])


# -- the formula -------------------------------------------------------------------------------------------------------


def test_entropy_is_exact():
    assert entropy(UNIFORM) == pytest.approx(math.log(VOCABULARY), abs=1e-5)
    assert entropy(peaked(0.9)) == pytest.approx(entropy_by_hand(0.9), abs=1e-5)
    certain = np.full(VOCABULARY, -np.inf, dtype=np.float32)
    certain[3] = 0.0
    assert entropy(certain) == 0.0


@given(st.lists(st.floats(0.001, 1.0), min_size=2, max_size=40), st.integers(1, 40))
def test_an_entropy_of_the_likeliest_tokens_is_a_lower_bound(weights, n):
    probs = np.array(sorted(weights, reverse=True)) / sum(weights)
    full = entropy(np.log(probs))
    bounded = entropy(np.log(probs[:n]), complete=False)
    assert bounded <= full + 1e-9
    if n >= len(probs) - 1:  # nothing, or a single token, is lumped
        assert bounded == pytest.approx(full, abs=1e-6)


def test_relevance_by_score():
    read = [Certainty(2.0, True, 1.0), Certainty(1.0, True, 3.0)]
    assert relevance(read, "entropy") == [-2.0, -1.0]
    assert relevance(read, "question_nll") == [-1.0, -3.0]
    assert relevance(read, "hybrid") == [-3.0, -4.0]
    with pytest.raises(ConfigError, match="how likely the question is"):
        relevance([Certainty(2.0, True)], "hybrid")
    assert certainty_of(Reading(UNIFORM, True, np.array([-1.0, -3.0]))).question_nll == 2.0


def test_values_that_are_all_equal_do_not_stand_out():
    assert not stands_out([-3.9, -3.9, -3.9])
    assert stands_out([-3.9, -3.9, -3.0])
    assert stands_out([-3.9])


# -- windows -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 30), max_size=60),
    st.integers(1, 40).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size - 1))),
)
def test_windows_hold_everything_in_order_and_overlap_no_more_than_told(costs, limits):
    size, overlap = limits
    items = list(enumerate(costs))
    runs = list(windows(items, lambda item: item[1], size, overlap))
    seen = -1
    for run in runs:
        assert [number for number, _ in run] == list(range(run[0][0], run[-1][0] + 1))
        assert sum(cost for _, cost in run) <= size or len(run) == 1
        assert run[0][0] <= seen + 1 <= run[-1][0]  # nothing is left out, and each run brings something new
        assert sum(cost for number, cost in run if number <= seen) <= overlap
        seen = run[-1][0]
    assert seen == len(items) - 1


@given(st.text(alphabet="ab .!?\n”。，", max_size=300), st.lists(st.integers(1, 50), min_size=1, max_size=30))
def test_sentences_are_the_text_whatever_the_blocks(text, lengths):
    blocks, rest = [], text
    while rest:
        for length in lengths:
            blocks.append(rest[:length])
            rest = rest[length:]
    found = list(sentences(blocks))
    assert "".join(found) == text
    assert found == list(sentences([text]))


def test_an_endless_sentence_is_cut_and_nothing_of_it_is_lost():
    text = "word, " * 3000 + "x" * 5000
    found = list(sentences(text[i : i + 700] for i in range(0, len(text), 700)))
    assert "".join(found) == text
    assert max(map(len, found)) <= 2000
    assert all(sentence.endswith(", ") for sentence in found[:8])


# -- stems -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "stem"),
    [
        ("What is the code of the wine cellar?", "The code of the wine cellar is"),
        ("Where is the observatory's spare key kept?", "The observatory's spare key is kept"),
        ("Which spice is Dr Solberg allergic to?", "Dr Solberg is allergic to"),
        ("At what charge does Mateo's scooter fail?", "The charge that Mateo's scooter fails at is"),
        ("How many jars of plums are aboard Calypso Nine?", "The number of jars of plums aboard Calypso Nine is"),
        ("Who bought the museum from Hana?", "The one who bought the museum from Hana is"),
        ("When did Maria meet Jean?", "Maria met Jean on"),
        ("When does the night ferry leave?", "The night ferry leaves"),
        ("How long has Nate had his turtles?", "Nate has had his turtles for"),
        ("Where has Maria made friends?", "Maria has made friends"),
        ("What are some changes Caroline has faced?", "Some changes Caroline has faced are"),
        ("What area was hit by a flood?", "The area that was hit by a flood is"),
        ("Which town won the rowing cup?", "The town that won the rowing cup is"),
        ("Why did he sell the boat?", "He sold the boat because"),
        ("Hi! Do you remember where I put my keys?", "You put your keys"),
        ("I like tea. What does Ann drink?", "Ann drinks"),
        ("他把钥匙放在哪里？", "他把钥匙放在"),
        ("谁画了公爵夫人的肖像？", "画了公爵夫人的肖像的人是"),
        ("夜班渡轮什么时候开？", "夜班渡轮开的时间是"),
    ],
)
def test_rules_begin_the_answer(question, stem):
    assert by_rules(question) == stem


@pytest.mark.parametrize("text", ["", "   ", "Hello!", "My cat is ill.", "Is it raining?", "?", "What?", "好的"])
def test_rules_leave_alone_what_they_do_not_know(text):
    assert by_rules(text) is None


@pytest.mark.parametrize(
    "piece", ["a", " ", "<", "\u0301", "what ", "eyJ", ",", "so ", "what's ", "please tell me ", "多"]
)
def test_rules_read_the_last_sentence_of_a_long_question_and_take_no_time_over_it(piece):
    """With quadratic time it does not come back."""
    long = f"x{piece * 200_000}x"
    assert by_rules(long) is None
    assert by_rules(f"{long}. Where did Priya buy the bike?") == "Priya bought the bike"
    by_rules(f"What is {piece * (450 // len(piece))}?")


@given(st.text(max_size=200))
def test_no_question_breaks_the_rules(text):
    made = by_rules(text)
    assert made is None or (made.strip() == made and re.search(r"\w", made))


def test_a_stem_of_the_llms_is_cut_where_it_invents():
    question = "Would Caroline likely have a bookshelf by her bed?"
    assert read_stem("Caroline would likely have a bookshelf by her bed because of 300 novels", question) == (
        "Caroline would likely have a bookshelf by her bed because of"
    )
    assert read_stem("Beginning: Anna was born in", "Where was Anna born?") == "Anna was born in"
    assert read_stem("\n\n", question) == read_stem("Sorry!", question) == ""
    assert read_stem("小王把钥匙放在了厨房", "小王把钥匙放在哪里了？") == "小王把钥匙放在了"


# -- the scan ----------------------------------------------------------------------------------------------------------


def test_the_scan_keeps_the_segments_of_least_entropy_in_the_order_of_time(tmp_path):
    masses = {"north": 0.5, "south": 0.9, "east": 0.7}

    def rule(text):
        return next((peaked(mass) for word, mass in masses.items() if word in text), UNIFORM)

    llm = TableLLM(rule)
    with opened(tmp_path / "m.db", llm, Xl3mController.scan(k=2, segment_tokens=12, overlap=0)) as memory:
        scope = memory.namespace("a")
        stored(scope, n5="to the east of it", n11="to the south of it", n20="to the north of it")
        context = scope.context(QUESTION, budget=400)
    assert [segment.text for segment in context.segments] == ["to the east of it", "to the south of it"]
    best = context.ledger[0]
    assert best.signals["entropy"] == pytest.approx(entropy_by_hand(0.9), abs=1e-3)
    assert best.score == -best.signals["entropy"] or best.score == pytest.approx(-best.signals["entropy"], abs=1e-3)
    assert [entry.form for entry in context.ledger[:2]] == [Form.FULL, Form.FULL]
    assert {entry.reason for entry in context.ledger[2:]} == {Reason.NOT_CHOSEN}
    assert llm.stems == {STEM}
    assert f'the answer begins, by rules: "{STEM}"' in context.trace.notes


def test_the_model_reads_each_window_once(tmp_path):
    llm = TableLLM(certain_of("cellar"))
    with opened(tmp_path / "m.db", llm, Xl3mController.scan(segment_tokens=40, overlap=10)) as memory:
        scope = memory.namespace("a")
        turns = stored(scope, 40)
        context = scope.context(QUESTION, budget=300)
        m = int(re.search(r"all (\d+) windows", context.trace.notes[-2])[1])
        assert len(llm.read_texts) == len(set(llm.read_texts)) == m
        assert all(any(turn.text in text for text in llm.read_texts) for turn in turns)
        scope.context(QUESTION, budget=300)
        assert len(llm.read_texts) == m
        scope.context("Where is it?", budget=300)
        assert len(llm.read_texts) == 2 * m


def test_what_two_windows_share_is_shown_once(tmp_path):
    llm = TableLLM(certain_of("shared"))
    with opened(tmp_path / "m.db", llm, Xl3mController.scan(k=2, segment_tokens=24, overlap=8)) as memory:
        scope = memory.namespace("a")
        stored(scope, 12, n2="this is the shared one here")
        context = scope.context(QUESTION, budget=400)
    holding = [text for text in llm.read_texts if "shared" in text]
    assert len(holding) == 2
    assert context.text.count("shared") == 1
    assert [segment.seq for segment in context.segments] == sorted({segment.seq for segment in context.segments})


def test_equal_certainties_say_so_and_the_earliest_are_taken(tmp_path):
    llm = TableLLM(lambda text: UNIFORM)
    with opened(tmp_path / "m.db", llm, Xl3mController.scan(k=2, segment_tokens=12, overlap=0)) as memory:
        scope = memory.namespace("a")
        stored(scope, 10)
        context = scope.context(QUESTION, budget=400)
    assert [segment.seq for segment in context.segments] == [1, 2]
    assert any("confidence=low" in note for note in context.trace.notes)
    assert all(e.signals["entropy"] == pytest.approx(math.log(VOCABULARY), abs=1e-3) for e in context.ledger)


class NoiseEmbedder(HashEmbedder):
    """Vectors that have nothing to do with the text."""

    fingerprint = "noise"

    def embed_documents(self, texts):
        return np.roll(super().embed_documents([text[::-1] for text in texts]), 7, axis=1)


def test_entropy_needs_no_vectors(tmp_path):
    chosen = []
    for name, embedder in (("a", HashEmbedder()), ("b", NoiseEmbedder())):
        llm = TableLLM(certain_of("cellar"))
        controller = Xl3mController.scan(k=1, segment_tokens=12, overlap=0)
        with opened(tmp_path / name, llm, controller, embedder=embedder) as memory:
            scope = memory.namespace("a")
            stored(scope, n7="the cellar has it")
            chosen.append([segment.seq for segment in scope.context(QUESTION, budget=400).segments])
    assert chosen == [[8], [8]]


def test_other_probabilities_give_another_choice(tmp_path):
    rng = np.random.default_rng(3)
    tables = [rng.dirichlet(np.full(VOCABULARY, spread)) for spread in rng.uniform(0.05, 5.0, 30)]
    chosen = []
    for shift in (0, 11):

        def rule(text, shift=shift):
            return np.log(tables[(int(re.search(r"turn (\d+)", text)[1]) + shift) % 30] + 1e-30).astype(np.float32)

        controller = Xl3mController.scan(k=3, segment_tokens=12, overlap=0)
        with opened(tmp_path / str(shift), TableLLM(rule), controller) as memory:
            scope = memory.namespace("a")
            stored(scope)
            chosen.append([segment.seq - 1 for segment in scope.context(QUESTION, budget=400).segments])
    entropies = [entropy(np.log(table + 1e-30)) for table in tables]
    expected = sorted(np.argsort(entropies)[:3].tolist())
    assert chosen[0] == expected
    assert sorted((number + 11) % 30 for number in chosen[1]) == expected
    assert chosen[0] != chosen[1]


@given(st.integers(40, 500), st.integers(8, 200), st.integers(0, 7), st.integers(0, 2**32))
def test_no_key_context_exceeds_its_budget(tmp_path_factory, budget, size, overlap, seed):
    rng = np.random.default_rng(seed)
    llm = TableLLM(lambda text: peaked(rng.uniform(0.1, 0.99)))
    path = tmp_path_factory.mktemp("m") / "m.db"
    with opened(path, llm, Xl3mController.scan(segment_tokens=size, overlap=overlap)) as memory:
        scope = memory.namespace("a")
        scope.add_many([NewSegment("word " * int(n), "s") for n in rng.integers(1, 60, 12)])
        context = scope.context(QUESTION, budget=budget)
    assert context.n_tokens <= budget
    seqs = [segment.seq for segment in context.segments]
    assert seqs == sorted(set(seqs))


def test_flash_memory_and_summaries_are_not_read(tmp_path):
    llm = TableLLM(lambda text: UNIFORM)
    controller = Xl3mController.scan(segment_tokens=12, overlap=0)
    with opened(tmp_path / "m.db", llm, controller, flash_turns=2) as memory:
        scope = memory.namespace("a").session("s")
        stored(scope, 6)
        new = NewSegment("a summary of it all", "s", kind="summary", metadata={"of": []})
        memory.parts.store.append(("a",), [new])
        scope.context(QUESTION, budget=400)
    assert not any("summary" in text or "turn 5" in text for text in llm.read_texts)
    assert len(llm.read_texts) == 4


def test_an_empty_memory_asks_nothing(tmp_path):
    for mode in ("scan", "rerank"):
        llm = TableLLM(lambda text: UNIFORM)
        with opened(tmp_path / mode, llm, Xl3mController(mode=mode)) as memory:
            context = memory.namespace("a").context(QUESTION, budget=400)
        assert (context.text, llm.read_texts, llm.calls) == ("", [], [])


# -- rerank ------------------------------------------------------------------------------------------------------------


def test_rerank_reads_the_shortlist_and_orders_it(tmp_path):
    llm = TableLLM(certain_of("brass"))
    with opened(tmp_path / "m.db", llm, Xl3mController(shortlist=5, k=2)) as memory:
        scope = memory.namespace("a")
        stored(scope, n3="the cellar code", n9="the code brass", n14="cellar of the code")
        context = scope.context(QUESTION, budget=400)
    assert len(llm.read_texts) == 5
    assert context.ledger[0].seq == 10
    assert set(context.ledger[0].signals) == {"recall", "entropy"}
    assert set(context.ledger[0].contributions) == {"entropy"}
    assert len(context.segments) == 2
    dropped = [entry for entry in context.ledger if entry.action is Action.DROPPED]
    assert dropped
    assert {entry.reason for entry in dropped} == {Reason.NOT_CHOSEN}


def test_scores_are_kept_by_question_text_and_model_and_go_with_what_is_forgotten(tmp_path):
    llm = TableLLM(certain_of("cellar"))
    with opened(tmp_path / "m.db", llm) as memory:
        scope = memory.namespace("a")
        first = stored(scope, 8)[0]
        before = scope.context(QUESTION, budget=400)
        assert len(llm.read_texts) == 8
        assert scope.context(QUESTION, budget=400).text == before.text
        assert len(llm.read_texts) == 8
        llm.version = 2
        scope.context(QUESTION, budget=400)
        assert len(llm.read_texts) == 16
        assert memory.namespace("b").stats()["scores"] == 0
        assert scope.forget(first.seq)["scores"] == scope_scores(8, 2)
        assert scope.stats()["scores"] == 0
        scope.context(QUESTION, budget=400)
        assert len(llm.read_texts) == 16 + 7


def scope_scores(n, models):
    return n * models


def test_bounded_entropies_are_called_so(tmp_path):
    llm = TableLLM(lambda text: peaked(0.6)[:5], complete=False)
    with opened(tmp_path / "m.db", llm) as memory:
        scope = memory.namespace("a")
        stored(scope, 3)
        context = scope.context(QUESTION, budget=400)
    assert all("entropy" not in entry.signals for entry in context.ledger)
    assert context.ledger[0].signals["entropy_topn"] < entropy_by_hand(0.6)


def test_likelihood_scores_are_their_own(tmp_path):
    sums = {"question_nll": 7.0, "hybrid": entropy_by_hand(0.9) + 9.0}
    for score, names, seq in (("question_nll", {"question_nll"}, 5), ("hybrid", {"entropy", "question_nll"}, 9)):
        llm = QuestionTableLLM(certain_of("brass"))
        with opened(tmp_path / score, llm, Xl3mController(score=score)) as memory:
            scope = memory.namespace("a")
            stored(scope, n4="the code of the cellar", n8="it is brass")
            context = scope.context(QUESTION, budget=400)
        best = context.ledger[0]
        assert best.seq == seq
        assert set(best.contributions) == names
        assert best.score == pytest.approx(-sums[score], abs=1e-3)
        assert best.score == pytest.approx(sum(best.contributions.values()), abs=1e-3)
        assert f"ranked by {score}" in context.trace.notes[-1]


@pytest.mark.parametrize(
    ("llm", "controller", "needs"),
    [
        (ScriptedLLM(["x"]), Xl3mController(), "ScoringLLM"),
        (None, Xl3mController(), "ScoringLLM"),
        (TableLLM(lambda text: UNIFORM), Xl3mController(score="question_nll"), "QuestionScoringLLM"),
        (TableLLM(lambda text: UNIFORM), Xl3mController(score="hybrid"), "QuestionScoringLLM"),
    ],
)
def test_an_llm_that_shows_too_little_is_refused(tmp_path, llm, controller, needs):
    with pytest.raises(CapabilityError, match=f"needs an LLM with {needs}; HuggingFaceLLM is one"):
        opened(tmp_path / "m.db", llm, controller)
    assert not (tmp_path / "m.db").exists()


@pytest.mark.parametrize(
    "options",
    [{"k": 0}, {"score": "nll"}, {"mode": "all"}, {"stem": "me"}, {"shortlist": 0}, {"overlap": 512}, {"overlap": -1}],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigError, match="xl3m"):
        Xl3mController(**options)


# -- stems in use ------------------------------------------------------------------------------------------------------

UNKNOWN = "Would Caroline pursue counselling?"


def test_the_llm_begins_the_answer_once_for_all_time(tmp_path):
    llm = TableLLM(certain_of("cellar"), reply="Caroline would pursue counselling because she is kind.")
    for _ in range(2):
        with opened(tmp_path / "m.db", llm) as memory:
            scope = memory.namespace("a")
            stored(scope, 3)
            context = scope.context(UNKNOWN, budget=400)
    assert len(llm.calls) == 1
    assert llm.stems == {"Caroline would pursue counselling because she is"}
    assert any("by the LLM" in note for note in context.trace.notes)


def test_without_a_beginning_confidence_is_low(tmp_path):
    llm = TableLLM(certain_of("cellar"), reply="")
    with opened(tmp_path / "m.db", llm) as memory:
        scope = memory.namespace("a")
        stored(scope, 3)
        context = scope.context(UNKNOWN, budget=400)
        assert any("confidence=low" in note for note in context.trace.notes)
    with opened(tmp_path / "m.db", llm, Xl3mController(stem="none")) as memory:
        context = memory.namespace("a").context(QUESTION, budget=400)
        assert not any("answer begins" in note for note in context.trace.notes)
    assert llm.stems == {""}


def test_a_turn_is_answered_and_traced(tmp_path):
    llm = TableLLM(certain_of("brass"), reply="It is brass.")
    with opened(tmp_path / "m.db", llm) as memory:
        scope = memory.namespace("a").session("s")
        stored(scope, n3="the code is brass")
        reply = scope.chat(QUESTION)
        trace, finding = scope.why(expect=4)
    assert reply.text == "It is brass."
    assert finding.present
    assert trace.controller == "xl3m"
    assert trace.timings_ms["score"] > 0


def test_a_model_that_fails_while_it_reads_is_one_clear_error(tmp_path):
    def rule(text):
        raise ZeroDivisionError("no luck")

    with opened(tmp_path / "m.db", TableLLM(rule)) as memory:
        scope = memory.namespace("a").session("s")
        stored(scope, 3)
        with pytest.raises(LLMError, match="no luck"):
            scope.chat(QUESTION)
        assert scope.history(1)[0].text == QUESTION  # the turn is recorded all the same


def test_a_text_longer_than_the_window_is_scored_by_its_best_part(tmp_path):
    llm = TableLLM(certain_of("brass"), context_window=900)
    with opened(tmp_path / "m.db", llm, Xl3mController(k=1)) as memory:
        scope = memory.namespace("a")
        scope.add("Nothing to see here. " * 300 + "The code is brass. " + "Nothing at all. " * 300)
        scope.add("cellar code")
        context = scope.context(QUESTION, budget=400)
    assert max(llm.count_text(text) for text in llm.read_texts) <= 900 - 128
    assert context.ledger[0].seq == 1


def test_a_text_without_any_sentence_fits_the_window_too(tmp_path):
    llm = TableLLM(certain_of("brass"), context_window=400)
    with opened(tmp_path / "m.db", llm, Xl3mController(k=1)) as memory:
        memory.namespace("a").add(" ".join(f"word{number}" for number in range(3000)))
        memory.namespace("a").context(QUESTION, budget=400)
    assert max(llm.count_text(text) for text in llm.read_texts) <= 400 - 128
    assert 10 < len(llm.read_texts) < 25


def test_what_a_model_that_failed_did_not_say_is_asked_again(tmp_path):
    failing = TableLLM(certain_of("cellar"), [LLMError("x", "down")].pop)
    question = "Something about the cellar, please"  # no form that the rules know
    with opened(tmp_path / "m.db", failing) as memory:
        stored(memory.namespace("a"), 3)
        assert "confidence=low" in " ".join(memory.namespace("a").context(question).trace.notes)
    well = TableLLM(certain_of("cellar"), "The cellar is")
    with opened(tmp_path / "m.db", well) as memory:
        memory.namespace("a").context(question)
    assert well.stems == {"The cellar is"}


def test_the_likelihood_of_the_question_needs_no_stem(tmp_path):
    llm = QuestionTableLLM(certain_of("cellar"))
    with opened(tmp_path / "m.db", llm, Xl3mController(score="question_nll")) as memory:
        stored(memory.namespace("a"), 3)
        context = memory.namespace("a").context("Something about the cellar, please")
    assert llm.stems == {""}
    assert not llm.calls
    assert not context.calls


def test_what_recall_offers_beyond_the_shortlist_follows(tmp_path):
    llm = TableLLM(certain_of("cellar"))
    with opened(tmp_path / "m.db", llm, Xl3mController(shortlist=5)) as memory:
        stored(memory.namespace("a"), 40, n3="the code of the cellar is brass")
        context = memory.namespace("a").context(QUESTION, budget=400)
    assert len(llm.read_texts) == 5
    assert len(context.segments) > 20
    assert context.n_tokens <= 400


def test_nothing_is_kept_of_what_was_forgotten_meanwhile(tmp_path):
    llm = TableLLM(lambda text: memory.namespace("a").forget(everything=True) and UNIFORM)
    with opened(tmp_path / "m.db", llm) as memory:
        stored(memory.namespace("a"), 3)
        memory.namespace("a").context(QUESTION)
        assert memory.namespace("a").stats()["scores"] == 0


def test_probabilities_that_are_no_numbers_are_an_error_and_not_kept(tmp_path):
    llm = TableLLM(lambda text: np.full(VOCABULARY, np.nan, dtype=np.float32))
    with opened(tmp_path / "m.db", llm) as memory:
        stored(memory.namespace("a"), 3)
        with pytest.raises(LLMError, match="another dtype"):
            memory.namespace("a").context(QUESTION)
        assert memory.namespace("a").stats()["scores"] == 0


def test_the_oldest_scores_go(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "MAX_SCORES", 20)
    monkeypatch.setattr(digest, "SWEEP", 10)
    with opened(tmp_path / "m.db", TableLLM(certain_of("x"))) as memory:
        store = memory.parts.store
        for number in range(60):
            store.put_scores(("a",), {f"k{number}": number}, epoch=0)
            assert memory.namespace("a").stats()["scores"] <= 30
        assert store.read_scores(("a",), ["k0", "k59"]) == {"k59": 59}


# -- documents ---------------------------------------------------------------------------------------------------------


def book(n=400, fact="The code of the cellar is brass."):
    told = [f"In chapter {number} nothing happened at all." for number in range(n)]
    told.insert(n // 2, fact)
    return " ".join(told)


def test_a_document_far_beyond_the_window_is_read(tmp_path):
    llm = TableLLM(certain_of("brass"), reply="Brass.", context_window=600)
    (tmp_path / "book.txt").write_text(book(), encoding="utf-8")
    seen = []
    with opened(tmp_path / "m.db", llm) as memory:
        scope = memory.namespace("a")
        options = {"segment_tokens": 60, "overlap": 15}
        reply = scope.read(
            tmp_path / "book.txt", QUESTION, budget=300, progress=lambda *at: seen.append(at), options=options
        )
        assert reply.text == "Brass."
        assert "The code of the cellar is brass." in reply.context.text
        assert reply.context.n_tokens <= 300
        assert reply.segment is None
        for passage in reply.context.segments:
            assert passage.text == book()[slice(*passage.offset)].strip()
        assert seen == sorted(seen)
        assert seen[-1] == (len(book()), len(book()))
        # nothing but scores is kept
        assert memory.namespaces() == []
        assert scope.stats()["scores"] == len(llm.read_texts)
        # and they are found again
        again = scope.read(tmp_path / "book.txt", QUESTION, budget=300, options=options)
        assert again.context.text == reply.context.text
        assert scope.stats()["scores"] == len(llm.read_texts)


def test_a_scan_that_was_stopped_goes_on_where_it_was(tmp_path):
    stop_after = 40

    def rule(text):
        if len(llm.read_texts) > stop_after:
            raise KeyboardInterrupt
        return certain_of("brass")(text)

    llm = TableLLM(rule)
    document = io.BytesIO(book().encode())
    options = {"segment_tokens": 60, "overlap": 0}
    with opened(tmp_path / "m.db", llm) as memory, pytest.raises(KeyboardInterrupt):
        memory.namespace("a").read(document, QUESTION, options=options)
    llm.rule = certain_of("brass")
    with opened(tmp_path / "m.db", llm) as memory:
        kept = memory.namespace("a").stats()["scores"]
        assert stop_after - 16 <= kept <= stop_after
        before = len(llm.read_texts)
        reply = memory.namespace("a").read(document, QUESTION, options=options)
        assert len(llm.read_texts) - before == memory.namespace("a").stats()["scores"] - kept
    with opened(tmp_path / "other.db", TableLLM(certain_of("brass"))) as memory:
        whole = memory.namespace("a").read(document, QUESTION, options=options, name=None)
    assert whole.context.segments == tuple(
        type(segment)(**{**as_fields(segment), "created_at": w.created_at})
        for segment, w in zip(reply.context.segments, whole.context.segments, strict=True)
    )


def as_fields(segment):
    return {name: getattr(segment, name) for name in segment.__slots__}


@pytest.mark.parametrize(("k", "budget", "size"), [(1, 200, 100), (3, 200, 100), (None, 150, 512), (None, 300, 64)])
def test_the_best_window_is_never_cut(tmp_path, k, budget, size):
    """Its neighbours, which repeat its sentence at a cut, are not joined to it where that would be too long."""
    turns = [f"Line {number} of the log says nothing much." for number in range(120)]
    turns[57] = "Line 57 has the brass code."
    (tmp_path / "log.txt").write_text("\n".join(turns), "utf-8")
    llm = TableLLM(certain_of("brass"))
    with opened(tmp_path / "m.db", llm) as memory:
        options = {"k": k, "segment_tokens": size, "overlap": size // 3}
        reply = memory.namespace("a").read(tmp_path / "log.txt", QUESTION, budget=budget, options=options)
        assert "Line 57 has the brass code." in reply.context.text
        assert reply.context.n_tokens <= budget
        assert max(llm.count_text(text) for text in llm.read_texts) <= size


def test_a_cancelled_reading_stops(tmp_path):
    (tmp_path / "log.txt").write_text("One more sentence of the log. " * 3000, "utf-8")
    llm = TableLLM(certain_of("brass"))

    async def work():
        async with AsyncMemory.open(
            tmp_path / "m.db", llm=llm, embedder=HashEmbedder(), tokenizer=WordCounter(), reply_tokens=50
        ) as memory:
            begun = asyncio.Event()
            loop = asyncio.get_running_loop()
            reading = asyncio.create_task(
                memory.namespace("a").read(
                    tmp_path / "log.txt",
                    QUESTION,
                    progress=lambda *_: loop.call_soon_threadsafe(begun.set),
                    options={"segment_tokens": 32, "overlap": 0},
                )
            )
            await begun.wait()
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading

    asyncio.run(work())
    assert 0 < len(llm.read_texts) < 400  # of 600 windows


def test_overlapping_windows_of_a_document_are_one_passage(tmp_path):
    llm = TableLLM(certain_of("brass"))
    with opened(tmp_path / "m.db", llm) as memory:
        options = {"segment_tokens": 40, "overlap": 20, "k": 2}
        reply = memory.namespace("a").read(io.BytesIO(book(60).encode()), QUESTION, options=options)
    assert len([text for text in llm.read_texts if "brass" in text]) == 2
    [passage] = reply.context.segments
    assert reply.context.text.count("brass") == 1
    assert passage.text in book(60)
    assert {entry.reason for entry in reply.context.ledger[1:]} == {Reason.NOT_CHOSEN}


@given(st.text(alphabet="aé日 .\n", min_size=1, max_size=400))
def test_any_text_can_be_read_and_passages_are_parts_of_it(tmp_path_factory, text):
    assume(text.strip())
    llm = TableLLM(lambda shown: peaked(0.2 + 0.7 * (len(shown) % 7) / 7))
    with opened(tmp_path_factory.mktemp("m") / "m.db", llm) as memory:
        options = {"segment_tokens": 9, "overlap": 2}
        reply = memory.namespace("a").read(io.BytesIO(text.encode()), QUESTION, budget=80, options=options)
    for passage in reply.context.segments:
        assert passage.text == text[slice(*passage.offset)].strip()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "nothing in it to read"),
        (b" \n\n ", "nothing in it to read"),
        (b"a\x00b", "not text"),
        (b"caf\xe9 au lait", "not UTF-8"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, content, problem):
    llm = TableLLM(lambda text: UNIFORM)
    (tmp_path / "file").write_bytes(content)
    with opened(tmp_path / "m.db", llm) as memory:
        with pytest.raises(InvalidInputError, match=problem):
            memory.namespace("a").read(tmp_path / "file", QUESTION)
        with pytest.raises(InvalidInputError, match="cannot read it"):
            memory.namespace("a").read(tmp_path / "missing", QUESTION)
        with pytest.raises(BudgetError):
            memory.namespace("a").read(tmp_path / "file", QUESTION, budget=3)
        with pytest.raises(ConfigError, match="does not take these options"):
            memory.namespace("a").read(tmp_path / "file", QUESTION, options={"size": 3})
        with pytest.raises(ConfigError, match="leave out the option mode"):
            memory.namespace("a").read(tmp_path / "file", QUESTION, options={"mode": "rerank"})
        assert memory.namespace("a").stats()["scores"] == 0
    with (
        opened(tmp_path / "n.db", ScriptedLLM(["x"]), "auto") as memory,
        pytest.raises(CapabilityError, match="'xl3m-scan' needs"),
    ):
        memory.namespace("a").read(tmp_path / "file", QUESTION)


# -- the real model ----------------------------------------------------------------------------------------------------

CODES = ["Harrow Station", "the wine cellar", "Project Falcon", "the north gate", "the old vault"]


@pytest.mark.slow
def test_smollm2_finds_planted_codes_and_is_not_misled(shared_data):
    """The specification's set: 10 segments of about 120 tokens, one planted fact, stems by rules."""
    llm = HuggingFaceLLM(kept={})
    told = needle.books([shared_data / "jane_eyre.txt"])["en"].sentences
    fillers = ["".join(run).strip() for run in windows(told[200:900], llm.count_text, 120, 0)][:50]
    found = beaten = 0
    for trial in range(20):
        name, code = CODES[trial % 5], 3000 + 617 * trial % 6000
        question = f"What is the code of {name}?"
        stem = by_rules(question)
        segments = fillers[2 * trial : 2 * trial + 10]
        place = (7 * trial) % 10
        host = segments[place]
        segments[place] = f"{host[:200]} The code of {name} is {code}. {host[200:]}"
        values = [certainty_of(reading).entropy for reading in llm.read(segments, question, stem)]
        found += values[place] == min(values)
        decoy = f"{host[:200]} Nobody would tell what the code of {name} is. {host[200:]}"
        [misled] = llm.read([decoy], question, stem)
        beaten += values[place] < certainty_of(misled).entropy
    assert found >= 16
    assert beaten >= 18


@pytest.mark.parametrize(("kind", "score"), [(TableLLM, "entropy"), (QuestionTableLLM, "hybrid")])
def test_a_document_is_ranked_by_the_best_score_that_the_llm_allows(tmp_path, kind, score):
    text = "There is a chair. " * 20 + "The code of the cellar is 4812. " + "There is a table. " * 20
    with opened(tmp_path / "m.db", kind(certain_of("4812"))) as memory:
        read = memory.namespace("a").read
        options = {"segment_tokens": 24}
        reply = read(io.BytesIO(text.encode()), QUESTION, budget=100, options=options)
        assert any(note.endswith(f"ranked by {score}") for note in reply.trace.notes)
        paper = read(io.BytesIO(text.encode()), QUESTION, budget=100, options={**options, "score": "entropy"})
        assert any(note.endswith("ranked by entropy") for note in paper.trace.notes)
        assert "4812" in reply.context.text
