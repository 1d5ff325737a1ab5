"""Recall: every signal against a slow obvious reference, the corpus against the records, on real SQLite and MiniLM."""

import math
from datetime import date, datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_os import Memory, NewSegment
from memory_os.corpus import Corpora, Corpus
from memory_os.lexical import TIME_TERMS, bm25, idf, query_terms, terms_of
from memory_os.protocols import Profiles
from memory_os.question import read_question
from memory_os.signals import REACH, SHORT_TOKENS, Neighbours, best_cosines, late_signals, plain_signals
from memory_os.types import Segment
from memory_os.weights import learned

WORDS = "kite boat red blue harbour cat sunrise paint yesterday miso".split()
TODAY = date(2023, 8, 1)

rows = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["Ana", "Bo"]), st.lists(st.sampled_from(WORDS), max_size=6)),
    min_size=1,
    max_size=24,
)


def profiles(items, start: int = 0) -> Profiles:
    sessions, who, terms, n_tokens = zip(*((*item, 10)[:4] for item in items), strict=True)
    n = len(items)
    rows = np.arange(start + 1, start + n + 1)
    timed = [not TIME_TERMS.isdisjoint(each) for each in terms]
    return Profiles(
        rows, [f"id{row - 1}" for row in rows], rows.tolist(), sessions, who, list(range(738000, 738000 + n)), n_tokens,
        [len(each) for each in terms], [False] * n, [False] * n, timed, {},
    )  # fmt: skip


def empty_corpus(items) -> Corpus:
    """Of a store that holds these: rows are numbered from 1."""

    def read(terms):
        return {t: np.array([i for i, item in enumerate(items, 1) for term in item[2] if term == t]) for t in terms}

    return Corpus(0, 4, read)


def corpus_of(items) -> Corpus:
    corpus = empty_corpus(items)
    corpus._add(profiles(items))
    return corpus


def ask(corpus: Corpus, text: str, n: int):
    question = read_question(text, corpus.speakers, [2023], TODAY)
    every = np.arange(n)
    near = Neighbours(corpus, every, n)
    lexical = corpus.bm25(question.terms, n)
    return question, near, lexical, plain_signals(corpus, every, near, question, np.zeros(n, np.float32), lexical)


@given(rows, st.lists(st.sampled_from([*WORDS, "unheard"]), min_size=1, max_size=4, unique=True), st.integers(1, 24))
@settings(max_examples=80)
def test_bm25_over_the_corpus_equals_the_formula(items, query, upto):
    corpus = corpus_of(items)
    n = corpus.visible(upto)
    terms = query_terms(" ".join(query))
    documents = [item[2] for item in items[:n]]
    matching = {t: sum(t in d for d in documents) for t in terms}
    weights = {t: idf(n, matching[t]) for t in terms if matching[t]}
    mean = sum(map(len, documents)) / n
    most = sum(weights.values()) * 2.2
    expected = [bm25(d, weights, mean) / most if weights and mean else 0.0 for d in documents]
    np.testing.assert_allclose(corpus.bm25(terms, n), expected, atol=1e-5)


def assert_same_postings(one: Corpus, other: Corpus, n: int) -> None:
    for word in WORDS:
        for mine, theirs in zip(one.postings(word, n), other.postings(word, n), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@given(rows, st.integers(1, 24), st.integers(0, 2**31))
@settings(max_examples=80)
def test_a_corpus_that_grew_equals_one_that_was_read_at_once(items, cut, seed):
    whole = corpus_of(items)
    grown = empty_corpus(items)
    grown._add(profiles(items[:cut]))
    assert_same_postings(whole, grown, cut)  # the store has terms of rows that are not read yet
    if items[cut:]:
        grown._add(profiles(items[cut:], cut)._replace(days=list(range(738000 + cut, 738000 + len(items)))))
    rng = np.random.default_rng(seed)
    blobs = [(i + 1, rng.integers(-9, 9, (i % 3, 4), dtype=np.int8).tobytes()) for i in range(len(items))]
    whole._add_tokens(blobs)
    late = [blobs[i] for i in rng.permutation(len(blobs))]  # vectors may come in another order than segments
    grown._add_tokens(late[: len(late) // 2])
    grown._add_tokens(late[len(late) // 2 :])
    for name in whole.rows.dtype.names:
        if name != "first":
            np.testing.assert_array_equal(whole.rows[name], grown.rows[name])
    assert_same_postings(whole, grown, len(items))
    query = np.ones((1, 4), np.float32)
    every = np.arange(len(items))
    np.testing.assert_allclose(best_cosines(whole, every, query), best_cosines(grown, every, query), atol=1e-6)


def test_tokens_that_another_process_adds_meanwhile_are_read_next_time(tmp_path, monkeypatch):
    def tell(store) -> None:
        with store.database.write() as connection:
            connection.exec_driver_sql("UPDATE vectors SET tokens = x'01020304'")

    with Memory.open(tmp_path / "memory.db", embedder="hash") as memory:
        store, fingerprint = memory.parts.store, memory.parts.embedder.fingerprint
        memory.namespace("a").add("a kite")
        tell(store)
        state, read, corpora = store.state(("a",), fingerprint), store.read_profiles, Corpora()

        def and_more(*told):
            found = read(*told)
            memory.namespace("a").add("a boat")
            tell(store)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(store, "read_profiles", and_more)
            assert corpora.of(store, ("a",), fingerprint, 4, state).rows["count"].tolist() == [1]
        state = store.state(("a",), fingerprint)
        assert corpora.of(store, ("a",), fingerprint, 4, state).rows["count"].tolist() == [1, 1]


@given(rows, st.integers(1, 24))
@settings(max_examples=80)
def test_neighbours_are_the_turns_of_the_session(items, upto):
    corpus = corpus_of(items)
    n = corpus.visible(upto)
    near = Neighbours(corpus, np.arange(n), n)
    for i in range(n):
        mine = [j for j in range(n) if items[j][0] == items[i][0]]
        at = mine.index(i)
        for step in range(REACH):
            assert near.before[step][i] == (mine[at - step - 1] if at > step else -1)
            assert near.after[step][i] == (mine[at + step + 1] if at + step + 1 < len(mine) else -1)


def test_late_interaction_equals_a_hand_computed_value():
    """Tokens along axes: question (x, y) weighted 3 to 1; rows x | y | nothing, one session."""
    corpus = corpus_of([("a", "Ana", ["kite"])] * 3)
    x, y = [9, 0, 0, 0], [0, 5, 0, 0]
    corpus._add_tokens([(1, np.array([x], np.int8).tobytes()), (2, np.array([y, y], np.int8).tobytes())])
    near = Neighbours(corpus, np.arange(3), 3)
    best = best_cosines(corpus, np.arange(3), np.eye(4, dtype=np.float32)[:2])
    np.testing.assert_allclose(best, [[1, 0, 0], [0, 1, 0]], atol=1e-6)
    signals = late_signals(near, best, np.array([0.75, 0.25], np.float32))
    np.testing.assert_allclose(signals["late"], [0.75, 0.25, 0.0])
    np.testing.assert_allclose(signals["late_pair"], [0.75, 1.0, 0.25])  # with the turn before
    np.testing.assert_allclose(signals["late_three"], [1.0, 1.0, 0.25])  # and with the turn after
    np.testing.assert_allclose(signals["late_wide"], [1.0, 1.0, 1.0])
    np.testing.assert_allclose(signals["late_session_whole"], [1.0, 1.0, 1.0])
    np.testing.assert_allclose(signals["late_session"], [1 / 3] * 3, atol=1e-6)
    np.testing.assert_allclose(signals["late_before"], [0.0, 0.75, 0.25])
    e = math.exp(-6)
    np.testing.assert_allclose(signals["late_exact"], [0.75 + 0.25 * e, 0.25 + 0.75 * e, e], atol=1e-6)


def test_long_texts_lean_less_on_their_surroundings():
    items = [("a", "Ana", ["kite"], 10), ("a", "Bo", ["boat"], 10), ("b", "Ana", ["kite"], 10),
             ("b", "Bo", ["boat"], int(4 * SHORT_TOKENS))]  # fmt: skip
    corpus = corpus_of(items)
    *_, signals = ask(corpus, "kite?", 4)
    short, long = signals["lexical_before"][1], signals["lexical_before"][3]
    assert short == pytest.approx(signals["lexical"][0])
    assert long == pytest.approx(short / 4)


def test_speaker_time_and_date_are_told_by_the_question():
    corpus = corpus_of(
        [
            ("a", "Ana Lee", terms_of("I painted it yesterday")),
            ("a", "Bo", terms_of("nice colours")),
            ("b", "Bo", ["x"]),
        ]
    )
    question, _, _, signals = ask(corpus, "When did Ana paint it?", 3)
    assert question.speaker == "Ana Lee"
    assert "when" in question.kinds
    assert signals["speaker"].tolist() == [1.0, -1.0, -1.0]
    assert signals["time"].tolist() == [1.0, 0.0, 0.0]
    assert not signals["date"].any()
    assert not ask(corpus, "What do Ana and Bo paint?", 3)[3]["speaker"].any()  # two are named


@pytest.mark.parametrize(
    ("text", "days"),
    [
        ("What did we do on 5 July, 2023?", {(date(2023, 7, 5), True)}),
        ("the July 5th 2023 trip", {(date(2023, 7, 5), True)}),
        ("on 2023-07-05", {(date(2023, 7, 5), True)}),
        ("in July", {(date(2022, 7, 15), False), (date(2023, 7, 15), False)}),
        ("2023年7月5日做了什么", {(date(2023, 7, 5), True)}),
        ("what did I say yesterday?", {(date(2023, 7, 31), True)}),
        ("two weeks ago", {(date(2023, 7, 18), False)}),
        ("May I ask?", {(date(2022, 5, 15), False), (date(2023, 5, 15), False)}),
        ("you may go, march on", set()),
        ("31 February 2023", set()),
        ("no date at all, 12 eggs", set()),
    ],
)
def test_dates_in_a_question_are_read(text, days):
    question = read_question(text, [], [2022, 2023], TODAY)
    assert set(question.days) == {(day.toordinal(), exact) for day, exact in days}


@given(st.text(max_size=60))
def test_any_text_can_be_asked(text):
    question = read_question(text, ["Ana", "user"], [2023], TODAY)
    assert set(question.rest) <= set(question.terms) or question.rest == question.terms


# -- the whole, on MiniLM ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    with Memory.open(tmp_path_factory.mktemp("recall") / "memory.db", tokenizer="cl100k_base") as opened:
        yield opened


def talk(scope, *lines: str, session: str = "s", when: datetime | None = None) -> list[Segment]:
    pairs = [line.split(": ", 1) for line in lines]
    return scope.add_many([NewSegment(text, session, speaker=who, created_at=when) for who, text in pairs])


def test_an_answer_is_found_by_the_question_before_it(memory):
    scope = memory.namespace("answers")
    talk(scope, *[f"Bo: I had a quiet day number {i} at the office." for i in range(40)], session="filler")
    [_, answer] = talk(scope, "Bo: Which instrument did you take up, Ana?", "Ana: The old one from my uncle's attic!")
    hits = scope.search("Which instrument did Ana take up?", k=2)
    assert answer.id in {hit.segment.id for hit in hits}


def test_a_score_is_the_sum_of_its_contributions_and_its_context_says_so(memory):
    scope = memory.namespace("sums")
    talk(scope, "Ana: I painted a sunrise last week.", "Bo: Lovely colours!", "Ana: Thanks, it took days.")
    context = scope.context("When did Ana paint a sunrise?", budget=200)
    names = {name.partition("@")[0] for name in learned()["with_tokens"]}
    for entry in context.ledger:
        assert set(entry.signals) == set(entry.contributions) == names
        assert entry.score == pytest.approx(sum(entry.contributions.values()), abs=0.01)


@pytest.mark.parametrize("vectors", ["exact", "chroma"])
def test_every_index_gives_the_same_context(tmp_path, vectors):
    with Memory.open(tmp_path / "memory.db", tokenizer="cl100k_base", vectors=vectors) as opened:
        scope = opened.namespace("a")
        talk(scope, *[f"{'Ana' if i % 2 else 'Bo'}: {WORDS[i % 10]} and {WORDS[i % 7]} number {i}" for i in range(60)])
        first = scope.context("Which boat did Bo paint red?", budget=300)
        assert scope.context("Which boat did Bo paint red?", budget=300).messages == first.messages
    with Memory.open(tmp_path / "memory.db", tokenizer="cl100k_base", vectors="exact") as opened:
        assert opened.namespace("a").context("Which boat did Bo paint red?", budget=300).messages == first.messages


def test_what_was_added_or_forgotten_shows_at_once_also_from_another_process(tmp_path):
    with (
        Memory.open(tmp_path / "memory.db", embedder="hash") as one,
        Memory.open(tmp_path / "memory.db", embedder="hash") as two,
    ):
        reader, writer = one.namespace("a"), two.namespace("a")
        writer.add("the red kite")
        assert [h.segment.text for h in reader.search("kite")] == ["the red kite"]
        added = writer.add("a blue kite")
        assert {h.segment.text for h in reader.search("kite")} == {"the red kite", "a blue kite"}
        writer.forget(added.seq)
        assert [h.segment.text for h in reader.search("kite")] == ["the red kite"]
        assert reader.search("kite")[0].segment.namespace == ("a",)
        assert two.namespace("b").search("kite") == []


def test_the_corpora_in_memory_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("memory_os.corpus.MAX_NAMESPACES", 2)
    with Memory.open(tmp_path / "memory.db", embedder="hash") as opened:
        for name in "abc":
            opened.namespace(name).add(f"kite of {name}")
        for name in "abcabc":
            assert opened.namespace(name).search("kite")[0].segment.text == f"kite of {name}"
        assert len(opened.parts.corpora._held) == 2
        monkeypatch.setattr("memory_os.corpus.MAX_ROWS", 1)
        assert opened.namespace("c").search("kite")[0].segment.text == "kite of c"
        assert len(opened.parts.corpora._held) == 1


def test_a_namespace_too_large_for_memory_is_searched_by_ranks_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("memory_os.recall.MAX_SEGMENTS", 3)
    with Memory.open(tmp_path / "memory.db", embedder="hash", tokenizer="cl100k_base") as opened:
        scope = opened.namespace("a")
        for i in range(5):
            scope.add(f"kite number {i}")
        context = scope.context("kite 3", budget=200)
        assert "too many to weigh" in " ".join(context.trace.notes)
        assert set(context.ledger[0].signals) == {"dense", "lexical"}
        assert "kite number 3" in context.text
        assert scope.search("kite 3", k=2)[0].segment.text == "kite number 3"


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("我昨天去了北京大学看朋友", "北京大学在哪里"),
        ("昨日、東京タワーに行きました", "東京タワーはどうでしたか"),
        ("어제 서울에서 김치를 먹었다", "김치"),
        ("ฉันมีแมวสีดำชื่อมะลิ", "แมวสีดำ"),
    ],
    ids=["chinese", "japanese", "korean", "thai"],
)
def test_text_without_spaces_is_recalled(memory, text, query):
    scope = memory.namespace("scripts", text)
    scope.add_many(
        [
            NewSegment(f"{other} {i}", "s")
            for i in range(5)
            for other in ("另外的事情", "別の話です", "다른 이야기", "เรื่องอื่น")
        ]
    )
    wanted = scope.add(text)
    assert scope.search(query, k=1)[0].segment.id == wanted.id
    assert text in scope.context(query, budget=300).text


def test_the_weights_have_their_provenance():
    weights = learned()
    assert {"data_sha256", "made_by", "digest", "n_questions", "cross_validated_recall"} <= set(weights["provenance"])
    assert weights["provenance"]["data"] == "locomo_dev.json"
    assert not [name for name in weights["without_tokens"] if name.startswith("late")]


def test_corpora_are_apart_by_namespace_and_fingerprint(tmp_path):
    with Memory.open(tmp_path / "memory.db", embedder="hash") as opened:
        for name in "ab":
            opened.namespace(name).add(f"kite of {name}")
        store, corpora = opened.parts.store, Corpora()
        held = [corpora.of(store, (n,), f, 0, store.state((n,), f)) for n in "ab" for f in ("x", "y")]
        assert len({id(corpus) for corpus in held}) == 4
