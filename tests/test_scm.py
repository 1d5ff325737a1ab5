"""The SCM controller: its gates, its ranking, the form of each turn, and the summaries, on real SQLite."""

import re
import threading
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_os import CapabilityError, ConfigError, Memory, NewSegment
from memory_os.adapters.scripted import HashEmbedder, ScriptedLLM, WordCounter
from memory_os.benchmarks import dialogues, measure
from memory_os.controllers.gates import coverage, helps_prompt, needed_prompt, read_verdict
from memory_os.controllers.scm import ScmController, fitted
from memory_os.errors import LLMError
from memory_os.lexical import language_of
from memory_os.turn_summary import by_llm, extract, prompt_for
from memory_os.types import Action, Form, Reason

NEEDED, HELPS, SUMMARY = "is information from earlier", "Can the content help", "Summarise the text"


class CountingEmbedder(HashEmbedder):
    """Counts the queries that it embeds."""

    def __init__(self):
        super().__init__()
        self.queries = []

    def embed_query(self, text):
        self.queries.append(text)
        return super().embed_query(text)


def judge(needed="A", helps=lambda text: "A", summary=lambda text: "short", reply="Right."):
    """An LLM that answers each kind of question by a rule."""

    def answer(messages):
        content = messages[-1]["content"]
        if NEEDED in content:
            return needed
        if HELPS in content:
            return helps(re.search(r"Content:\n(.*?)\n\nQuestion:", content, re.DOTALL)[1])
        if SUMMARY in content:
            return summary(re.search(r"Text:\n(.*?)\n\nSummarise", content, re.DOTALL)[1])
        return reply

    return ScriptedLLM(answer)


def opened(path, llm=None, controller=None, **options):
    options = {"embedder": HashEmbedder(), "tokenizer": WordCounter(), "reply_tokens": 50, **options}
    return Memory.open(path, llm=llm, controller=controller or ScmController(), **options)


def talked(scope, *turns, session="old"):
    """Store turns, each a question and a reply; gives back the segments."""
    new = []
    for asked, replied in turns:
        new.append(NewSegment(asked, session))
        new.append(NewSegment(replied, session, role="assistant"))
    return scope.add_many(new)


def turn(i, *, filler=0):
    return (f"fact{i} is about topic{i} " + f"word{i} " * filler, f"noted{i}")


def purposes(context):
    return [call.purpose for call in context.calls]


# Q1: is memory needed?


def test_no_means_no_query_is_embedded_and_nothing_archived_stands_in_the_prompt(tmp_path):
    embedder = CountingEmbedder()
    with opened(tmp_path / "m.db", judge(needed="B"), embedder=embedder) as memory:
        scope = memory.namespace("a")
        talked(scope, *(turn(i) for i in range(5)))
        context = scope.session("new").context("What is topic3 about?", budget=400)
    assert embedder.queries == []
    assert context.text == ""
    assert context.ledger == ()
    assert "fact3" not in str(context.messages)
    assert [(c.purpose, c.verdict, c.answer) for c in context.calls] == [("whether memory is needed", "no", "B")]
    assert any("memory is not needed; judged by the LLM" in note for note in context.trace.notes)


@pytest.mark.parametrize("answer", ["", "I cannot say", "A) no", "perhaps B"])
def test_an_answer_that_cannot_be_read_means_retrieve(tmp_path, answer):
    with opened(tmp_path / "m.db", judge(needed=answer)) as memory:
        scope = memory.namespace("a")
        talked(scope, turn(1), turn(2))
        context = scope.session("new").context("What is topic1?", budget=400)
    assert context.calls[0].verdict == "unreadable"
    assert "fact1" in context.text


def test_an_llm_that_fails_at_the_gate_means_retrieve_and_the_trace_says_so(tmp_path):
    def fail(messages):
        raise ValueError("no power")

    with opened(tmp_path / "m.db", ScriptedLLM(fail)) as memory:
        scope = memory.namespace("a")
        talked(scope, turn(1))
        context = scope.session("new").context("What is topic1?", budget=400)
    assert "fact1" in context.text
    assert any("whether memory is needed and failed" in note and "no power" in note for note in context.trace.notes)


def test_with_nothing_archived_nobody_is_asked(tmp_path):
    llm = judge()
    with opened(tmp_path / "m.db", llm) as memory:
        scope = memory.namespace("a").session("s")
        first = scope.chat("Hello there")  # turn 1: the plain prompt
        second = scope.chat("And again")  # turn 2: flash memory only
        third = scope.chat("Once more")
    assert first.trace.calls == second.trace.calls == ()
    assert [c.purpose for c in third.trace.calls] == ["whether memory is needed"]
    assert len(second.trace.flash) == 2


def test_small_talk_is_told_apart_without_the_llm(tmp_path):
    with Memory.open(tmp_path / "m.db", controller="scm", budget=600) as memory:
        scope = memory.namespace("a")
        talked(scope, ("My dog is called Rex and he loves cheese.", "Nice!"), ("I moved to Oslo in May.", "Lovely."))
        about = scope.session("new").context("What is my dog called?")
        talk = scope.session("new").context("Hello, how are you today?")
    assert "Rex" in about.text
    assert about.calls == ()
    assert talk.text == ""
    assert {e.reason for e in talk.ledger} == {Reason.UNRELATED}
    assert any("judged without the LLM" in note for note in talk.trace.notes)


# ranking


def test_of_equals_the_one_activated_lately_wins_under_the_paper_preset(tmp_path):
    with opened(tmp_path / "m.db", judge(), controller=ScmController(k=1)) as memory:
        scope = memory.namespace("a")
        talked(scope, ("red kite alpha", "yes"), ("red kite omega", "yes"), *(turn(i) for i in range(5)))
        scope.session("chat").chat("alpha")
        paper = ScmController.paper(k=2)
    with opened(tmp_path / "m.db", judge(), controller=paper) as memory:
        context = memory.namespace("a").session("new").context("red kite", budget=900)
    first, second = (next(e for e in context.ledger if e.seq == seq) for seq in (1, 3))
    assert first.signals["relevance"] == second.signals["relevance"]
    assert first.signals["recency"] > second.signals["recency"]
    assert first.rank < second.rank
    assert first.score > second.score


def test_of_equals_neither_wins_under_the_repo_preset(tmp_path):
    with opened(tmp_path / "m.db", judge(), controller=ScmController(k=1)) as memory:
        scope = memory.namespace("a")
        talked(scope, ("red kite alpha", "yes"), ("red kite omega", "yes"), *(turn(i) for i in range(5)))
        scope.session("chat").chat("omega")
    with opened(tmp_path / "m.db", judge(), controller=ScmController.repo()) as memory:
        context = memory.namespace("a").session("new").context("red kite", budget=900)
    first, second = (next(e for e in context.ledger if e.seq == seq) for seq in (1, 3))
    assert first.score == second.score
    assert first.rank < second.rank  # a tie goes to the earlier one
    assert "whether memory is needed" not in purposes(context)


def test_age_is_counted_in_turns_and_an_activation_that_was_not_recorded_changes_nothing(tmp_path):
    with opened(tmp_path / "m.db", judge(), controller=ScmController(decay=0.5, k=9)) as memory:
        scope = memory.namespace("a")
        talked(scope, *(turn(i) for i in range(4)))
        new = scope.session("new")
        before = new.context("topic0", budget=900)
        again = new.context("topic0", budget=900)
        assert before.messages == again.messages
        assert [e.signals["recency"] for e in sorted(before.ledger, key=lambda e: e.seq)[::2]] == [
            0.0625, 0.125, 0.25, 0.5,
        ]  # fmt: skip
        new.chat("topic0")
        after = scope.session("third").context("topic0", budget=900)
        assert next(e for e in after.ledger if e.seq == 1).signals["recency"] == 0.5  # activated one turn ago


def test_activations_come_back_with_an_import(tmp_path):
    with opened(tmp_path / "m.db", judge()) as memory:
        scope = memory.namespace("a")
        talked(scope, turn(1), turn(2))
        scope.session("new").chat("topic1")
        known = memory.parts.store.last_activations(("a",))
        scope.export(tmp_path / "a.jsonl")
    with opened(tmp_path / "other.db", judge()) as memory:
        memory.namespace("b").import_(tmp_path / "a.jsonl")
        assert memory.parts.store.last_activations(("b",)) == known != {}


def test_the_prompt_is_in_the_order_of_seq_although_selection_is_by_rank(tmp_path):
    with opened(tmp_path / "m.db", judge()) as memory:
        scope = memory.namespace("a")
        talked(scope, ("zebra", "yes"), ("apple", "yes"), ("apple pie", "yes"))
        context = scope.session("new").context("apple pie", budget=900)
    seqs = [segment.seq for segment in context.segments]
    assert seqs == sorted(seqs)
    assert len(seqs) == 6
    assert context.ledger[0].seq == 5
    assert context.text.index("zebra") < context.text.index("apple pie")


# flash memory


def test_a_flash_turn_never_stands_twice_even_if_it_is_the_nearest(tmp_path):
    with opened(tmp_path / "m.db", judge()) as memory:
        scope = memory.namespace("a")
        talked(scope, turn(1), turn(2))
        now = scope.session("now")
        now.add("the blue kite flies")
        now.add("a blue kite indeed", role="assistant")
        context = now.context("the blue kite", budget=900)
    shown = str(context.messages)
    assert shown.count("the blue kite flies") == shown.count("a blue kite indeed") == 1
    assert not {e.segment_id for e in context.ledger} & set(context.trace.flash)


def test_flash_memory_is_the_last_turn_and_can_be_turned_off(tmp_path):
    path = tmp_path / "m.db"
    with opened(path, judge()) as memory:
        talked(memory.namespace("a"), turn(1), turn(2), turn(3), session="s")
        assert len(memory.namespace("a").session("s").context("q", budget=900).trace.flash) == 2
    with opened(path, judge(), controller=ScmController(flash_turns=0)) as memory:
        context = memory.namespace("a").session("s").context("topic3", budget=900)
    assert context.trace.flash == ()
    assert "fact3" in context.text  # it is archived then
    with opened(path, judge(), controller=ScmController(flash_turns=3), flash_turns=1) as memory:
        assert len(memory.namespace("a").session("s").context("q", budget=900).trace.flash) == 6


def test_a_long_flash_turn_enters_as_its_summary(tmp_path):
    long = "Long ago " + "and so on " * 300
    llm = judge(summary=lambda text: "it was long ago")
    with opened(tmp_path / "m.db", llm, controller=ScmController(flash_limit=100)) as memory:
        scope = memory.namespace("a").session("s")
        scope.add("Tell me all")
        scope.add(long, role="assistant")
        context = scope.context("Go on", budget=2000)
    assert {"role": "assistant", "content": "it was long ago"} in context.messages
    assert "flash memory: as a summary: #2" in context.trace.notes
    assert long not in str(context.messages)


# Q2: the form of each turn


@dataclass
class Sized:
    """A turn by its sizes."""

    full: int
    short: int

    @property
    def n_tokens(self):
        return self.full


def fit(turns, limit, ask=None, **options):
    return [form for form, _ in fitted(turns, limit, ask=ask, summary_cost=lambda t: t.short, **options)]


def test_all_in_full_while_they_fit_and_nobody_is_asked():
    assert fit([Sized(50, 5), Sized(50, 5)], 100, ask=lambda turn: pytest.fail("asked")) == [Form.FULL] * 2


def test_the_worst_is_asked_about_first_and_the_best_never():
    asked = []
    turns = [Sized(60, 6), Sized(50, 5), Sized(40, 4)]
    answers = {50: Form.SUMMARY, 40: None}

    def ask(turn):
        asked.append(turn.full)
        return answers[turn.full]

    assert fit(turns, 100, ask) == [Form.FULL, Form.SUMMARY, None]
    assert asked == [40, 50]


def test_still_too_long_turns_become_summaries_and_then_go_from_the_worst_on():
    turns = [Sized(60, 30), Sized(60, 30), Sized(60, 30)]
    keep = lambda turn: Form.FULL  # noqa: E731
    assert fit(turns, 125, keep) == [Form.FULL, Form.SUMMARY, Form.SUMMARY]
    assert fit(turns, 95, keep) == [Form.SUMMARY] * 3
    assert fit(turns, 65, keep) == [Form.SUMMARY, Form.SUMMARY, None]
    assert fit(turns, 10, keep) == [Form.SUMMARY, None, None]  # the best stays; the packer cuts it
    # the best last: weaker turns go before it is shortened
    assert fit(turns, 125, keep, best_last=True) == [Form.FULL, Form.SUMMARY, Form.SUMMARY]
    assert fit(turns, 95, keep, best_last=True) == [Form.FULL, Form.SUMMARY, None]
    assert fit(turns, 65, keep, best_last=True) == [Form.FULL, None, None]
    assert fit(turns, 35, keep, best_last=True) == [Form.SUMMARY, None, None]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99)), max_size=8),
    limit=st.integers(0, 300),
    answers=st.lists(st.sampled_from([None, Form.SUMMARY, Form.FULL]), min_size=8, max_size=8),
    best_last=st.booleans(),
)
def test_fitting_ends_within_the_limit_or_with_the_best_alone(sizes, limit, answers, best_last):
    turns = [Sized(max(pair), min(pair)) for pair in sizes]
    asked = iter(answers)
    forms = fit(turns, limit, lambda turn: next(asked), best_last=best_last)
    cost = {Form.FULL: "full", Form.SUMMARY: "short"}
    total = sum(getattr(turn, cost[form]) for turn, form in zip(turns, forms, strict=True) if form)
    assert total <= limit or all(form is None for form in forms[1:])
    assert not turns or forms[0] is not None


def long_turns(n=4):
    return [turn(i, filler=60) for i in range(n)]


def test_the_whole_map_full_summary_and_dropped(tmp_path):
    def helps(text):
        if "fact1" in text:
            return "B"
        return "A" if "fact0" not in text else "unreadable"

    llm = judge(helps=helps, summary=lambda text: "gist of " + text.split()[0])
    controller = ScmController(k=4, summary_from=20, w_recency=0.0)
    with opened(tmp_path / "m.db", llm, controller=controller) as memory:
        scope = memory.namespace("a")
        talked(scope, *long_turns())
        context = scope.session("new").context("fact3 topic3 word3", budget=220)
    by_seq = {e.seq: e for e in context.ledger}
    assert by_seq[7].form is Form.FULL  # the best, never asked about
    assert by_seq[5].form is Form.SUMMARY
    assert by_seq[5].reason is Reason.SUMMARY_ENOUGH
    assert by_seq[3].form is None
    assert by_seq[3].reason is Reason.NO_HELP
    assert "user (summary): gist of fact2" in context.text
    assert "fact1" not in context.text
    assert "gist of fact1" not in context.text
    assert context.n_tokens <= 220
    order = [p for p in purposes(context) if "helps" in p]
    assert order == sorted(order, key=lambda p: by_seq[int(re.search(r"#(\d+)", p)[1])].score)


def test_a_fact_that_the_summary_lacks_stands_verbatim(tmp_path):
    secret = "fact0 the code is 7731 " + "filler " * 60
    llm = judge(helps=lambda text: "A" if "7731" in text else "B", summary=lambda text: "a code was named")
    with opened(tmp_path / "m.db", llm, controller=ScmController(k=3, summary_from=20, w_recency=0.0)) as memory:
        scope = memory.namespace("a")
        talked(scope, (secret, "ok"), turn(1, filler=60), turn(2, filler=60))
        context = scope.session("new").context("word1 topic1 fact1 what", budget=240)
    assert secret.strip() in context.text
    assert any(call.verdict == "no" and "summary" in call.purpose for call in context.calls)


def test_every_summary_over_budget_still_ends_within_the_calls_it_may_make(tmp_path):
    llm = judge(summary=lambda text: " ".join(text.split()[:40]))
    k = 5
    with opened(tmp_path / "m.db", llm, controller=ScmController(k=k, summary_from=20)) as memory:
        scope = memory.namespace("a")
        talked(scope, *long_turns(8))
        context = scope.session("new").context("topic1 word1", budget=90)
    assert context.n_tokens <= 90
    assert len(llm.calls) <= 1 + 2 * (k - 1) + k  # Q1, Q2 twice for all but the best, and a summary each


def test_no_summary_is_made_of_a_turn_that_does_not_help(tmp_path):
    llm = judge(helps=lambda text: "B")
    with opened(tmp_path / "m.db", llm, controller=ScmController(k=4, summary_from=20)) as memory:
        scope = memory.namespace("a")
        talked(scope, *long_turns())
        context = scope.session("new").context("topic1 word1", budget=150)
    assert [p for p in purposes(context) if p.startswith("a summary")] == []
    assert sum("helps" in p for p in purposes(context)) == 3


@pytest.mark.parametrize("control", [True, False])
def test_a_turn_that_is_too_long_by_itself_is_cut_at_its_long_part(tmp_path, control):
    controller = ScmController(control=control, summary_from=10_000)
    with opened(tmp_path / "m.db", judge(), controller=controller) as memory:
        scope = memory.namespace("a")
        talked(scope, ("Tell me of kites", "The kite " + "flies and flies " * 100))
        context = scope.session("new").context("kite", budget=150)
    by_seq = {e.seq: e for e in context.ledger}
    assert by_seq[2].action is Action.TRIMMED
    assert by_seq[1].action is Action.ACTIVATED
    assert context.n_tokens <= 150


def test_nothing_is_asked_twice_within_a_turn(tmp_path):
    llm = judge(summary=lambda text: "gist")
    with opened(tmp_path / "m.db", llm, controller=ScmController(k=4, summary_from=20)) as memory:
        scope = memory.namespace("a")
        talked(scope, *([turn(1, filler=60)] * 4))  # the same words four times
        context = scope.session("new").context("topic1", budget=150)
    prompts = [call.messages[-1]["content"] for call in llm.calls]
    assert len(prompts) == len(set(prompts)) > 0
    assert len(context.calls) == len(prompts)


def test_a_paper_turn_asks_q2_only_from_its_two_thresholds_on(tmp_path):
    with opened(tmp_path / "m.db", judge(), controller=ScmController.paper(total_limit=100)) as memory:
        scope = memory.namespace("a")
        talked(scope, *long_turns())
        context = scope.session("new").context("topic1", budget=2000)  # none over 800: the budget alone counts
    assert purposes(context) == ["whether memory is needed"]
    assert all(e.form is Form.FULL for e in context.ledger)


@given(budget=st.integers(40, 700), fillers=st.lists(st.integers(0, 90), min_size=1, max_size=6))
def test_no_context_is_over_its_budget(tmp_path_factory, budget, fillers):
    llm = judge(helps=lambda text: "AB"[len(text) % 2], summary=lambda text: text[: len(text) // 3])
    with opened(tmp_path_factory.mktemp("m") / "m.db", llm, controller=ScmController(summary_from=10)) as memory:
        scope = memory.namespace("a")
        talked(scope, *(turn(i, filler=n) for i, n in enumerate(fillers)))
        assert scope.session("old").context("topic1", budget=budget).n_tokens <= budget


# ablations


def test_without_controller_the_most_similar_turns_enter_in_full_and_nobody_is_asked(tmp_path):
    llm = judge()
    with opened(tmp_path / "m.db", llm, controller=ScmController(control=False)) as memory:
        scope = memory.namespace("a")
        talked(scope, *long_turns())
        context = scope.session("new").context("fact2 word2", budget=220)
    assert llm.calls == []
    assert [e.seq for e in context.ledger if e.form][:2] == [5, 6]
    assert all(e.form in (Form.FULL, None) for e in context.ledger)


def test_without_activation_there_is_flash_memory_only(tmp_path):
    with opened(tmp_path / "m.db", judge(), controller=ScmController(activate=False)) as memory:
        scope = memory.namespace("a")
        talked(scope, turn(1), turn(2), session="s")
        context = scope.session("s").context("topic1", budget=900)
    assert context.text == ""
    assert context.ledger == ()
    assert len(context.trace.flash) == 2


# without the LLM


def test_q2_without_the_llm_goes_by_the_words_of_the_query(tmp_path):
    controller = ScmController(k=3, summary_from=10, gate="free", ask_first=False, w_recency=0.0)
    filler = "It was said again and again. " * 20
    with opened(tmp_path / "m.db", judge(), controller=controller) as memory:
        scope = memory.namespace("a")
        talked(
            scope,
            ("The kite is red. " + filler, "ok"),
            ("Nothing of that. " * 30, "ok"),
            ("The red kite is here. " + filler, "ok"),
        )
        context = scope.session("new").context("Where is the red kite?", budget=170)
    by_seq = {e.seq: e for e in context.ledger}
    assert by_seq[3].reason is Reason.NO_HELP
    assert not any("helps" in purpose for purpose in purposes(context))


def test_an_extract_is_made_of_the_text_s_own_sentences():
    text = "The dog Rex likes cheese. It rained. Rex the dog is old. Rex likes the sea. We left. " * 2
    short = extract(text)
    assert 0 < len(short) < len(text) / 2
    assert all(sentence in text for sentence in re.findall(r"[^.]+\.", short))
    assert extract("One line") == "One line"
    assert extract("话说天下大势。合久必分！周末七国分争，并入于秦。") in ("话说天下大势。", "周末七国分争，并入于秦。")


def test_coverage_is_the_share_of_the_query_s_words():
    assert coverage("Where does Rex sleep?", "Rex is a dog") == 0.5
    assert coverage("?!", "anything") == 1.0


# prompts and answers


def test_prompts_are_in_the_language_of_what_is_asked_about():
    assert language_of(needed_prompt("他住在哪里？", "")) == language_of(prompt_for("话说天下大势")) == "zh"
    assert "Latest messages:\nuser: hi" in needed_prompt("Where?", "user: hi")
    assert "最近的消息" in needed_prompt("他住在哪里？", "user: 你好")
    assert "能帮助回答" in helps_prompt("他住在哪里？", "他住在北京。")


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("A", "yes"), ("(A)", "yes"), ("A) yes", "yes"), ("Yes.", "yes"), ("需要", "yes"), ("A：能", "yes"),
        ("B", "no"), ("**B**", "no"), ("B. no", "no"), ("No, it is not.", "no"), ("不需要。", "no"),
        ("A) no", "unreadable"), ("Both", "unreadable"), ("A is right", "unreadable"), ("nothing", "unreadable"),
        ("能不能", "unreadable"), ("AB", "unreadable"),
    ],
)  # fmt: skip
def test_only_a_clear_answer_counts(answer, verdict):
    assert read_verdict(answer) == verdict


# options


@pytest.mark.parametrize(
    "options", [{"k": 0}, {"decay": 0.0}, {"decay": 1.5}, {"flash_turns": -1}, {"gate": "human"}, {"speed": 1}]
)
def test_a_wrong_option_is_one_clear_error_and_creates_nothing(tmp_path, options):
    with pytest.raises(ConfigError, match=r"scm|options"):
        Memory.open(tmp_path / "m.db", embedder="hash", controller="scm", controller_options=options)
    assert not (tmp_path / "m.db").exists()


@pytest.mark.parametrize("name", ["scm-paper", "scm-repo"])
def test_a_preset_that_asks_the_llm_needs_one(tmp_path, name):
    with pytest.raises(CapabilityError, match=f"'{name}' needs an LLM; llm='smollm2' is one"):
        Memory.open(tmp_path / "m.db", embedder="hash", controller=name)
    with Memory.open(tmp_path / "m.db", embedder="hash", controller=name, llm=judge()) as memory:
        assert memory.parts.controller.name == name


# summaries ahead of need


def test_long_turns_are_summarised_after_the_reply_and_never_in_its_way(tmp_path):
    begun, go = threading.Event(), threading.Event()

    def summary(text):
        begun.set()
        assert go.wait(20)
        return "a gist"

    long = "I said " + "many words " * 200
    controller = ScmController(summary_from=50)
    with opened(tmp_path / "m.db", judge(summary=summary), controller=controller, budget=3000) as memory:
        scope = memory.namespace("a").session("s")
        reply = scope.chat(long)  # gives back although the summary is not there
        assert reply.text == "Right."
        assert begun.wait(20)
        go.set()
        memory.parts.backlog.join()
        store, method = memory.parts.store, by_llm(memory.parts.llm)
        asked = scope.history()[0]
        assert store.read_summaries(("a",), [asked.id], method) == {asked.id: "a gist"}
        assert store.listed_for_summary(("a",), 9) == []
        scope.forget(asked.seq)
        assert store.read_summaries(("a",), [asked.id], method) == {}


def test_what_was_left_is_done_after_the_next_turn_also_by_another_process(tmp_path):
    def fail(text):
        raise LLMError("scripted", "busy")

    long = "I said " + "many words " * 200
    controller = ScmController(summary_from=50)
    with opened(tmp_path / "m.db", judge(summary=fail), controller=controller, budget=3000) as memory:
        memory.namespace("a").session("s").chat(long)
        memory.parts.backlog.join()
        assert len(memory.parts.store.listed_for_summary(("a",), 9)) == 1
    with opened(tmp_path / "m.db", judge(), controller=controller, budget=3000) as memory:
        memory.namespace("a").session("t").chat("Hello")
        memory.parts.backlog.join()
        assert memory.parts.store.listed_for_summary(("a",), 9) == []


def test_a_summary_that_is_missing_is_made_on_the_spot_and_kept(tmp_path):
    llm = judge(summary=lambda text: "gist")
    with opened(tmp_path / "m.db", llm, controller=ScmController(k=3, summary_from=20)) as memory:
        scope = memory.namespace("a")
        talked(scope, *long_turns(3))
        new = scope.session("new")
        first, second = (new.context("topic1 word1", budget=150) for _ in range(2))
    made = [call for call in first.calls if call.purpose.startswith("a summary")]
    assert made
    assert all(call.answer == "" and call.reply_tokens == 1 for call in made)
    assert not any(call.purpose.startswith("a summary") for call in second.calls)
    assert first.messages == second.messages


# on real dialogues, with the real embedder


@pytest.mark.slow
def test_silver_recall_of_six_turns_beats_the_latest_six_and_any_six(shared_data, tmp_path):
    conversations, _ = dialogues.read([shared_data / "scm_dialogue_en_dev.json"])
    ours, latest, n = 0.0, 0.0, 0
    chance = 0.0
    options = {"embedder": "minilm", "tokenizer": "cl100k_base", "controller": "scm"}
    for conversation in conversations:
        with Memory.open(tmp_path / f"{conversation.name}.db", **options) as memory:
            scope = memory.namespace("a")
            ids = measure.store(scope, conversation.turns)
            for question in conversation.questions:
                context = scope.session("new").context(question.text, budget=8000)
                chosen = {e.segment_id for e in context.ledger if e.form}
                wanted = {ids[key] for key in question.evidence}
                newest = {segment.id for segment in scope.history(12)}  # six turns of two segments
                ours += len(wanted & chosen) / len(wanted)
                latest += len(wanted & newest) / len(wanted)
                chance += min(1.0, 12 / len(ids))
                n += 1
    assert n > 10
    assert ours > 2 * latest
    assert ours > 2 * chance
