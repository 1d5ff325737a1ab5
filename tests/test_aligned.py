"""Confirmed turns, and the training data made of them: no record holds a quote that its own prompt does not."""

import asyncio
import io
import json
import sys
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memory_os import Alr2Controller, AsyncMemory, ConfigError, InvalidInputError, Memory, UnknownNameError
from memory_os.adapters.scripted import HashEmbedder, ScriptedLLM, WordCounter
from memory_os.aligned import AlignedReport, Exporter, Refusal, question_hash
from memory_os.cli.main import run
from memory_os.evidence import ANSWER, NOT_IN_MEMORY, listed
from memory_os.quotes import VERSION, Fault, numbered, read_claims, verify
from memory_os.types import Confirmation, Reason, Segment

TOLD = (
    "My sister Ana keeps bees. She lives in Oslo since 2019. The weather was bad.",
    "CANARY: the boat is called Heron. We paid for it in May.",
    "Bees are not allowed on the roof of the house in Bergen.",
    "I had porridge for breakfast, and Tom had none.",
)
QUESTION = "Where does Ana, who keeps bees, live?"
QUOTE = "- S1.2: She lives in Oslo since 2019."
ANSWERED = "She lives in Oslo [#1]."
COUNTER = WordCounter()


class Talker(ScriptedLLM):
    """Extracts and answers as it is told to at the moment."""

    def __init__(self, evidence=QUOTE, answer=ANSWERED):
        super().__init__(self._say)
        self.evidence, self.answer = evidence, answer

    def _say(self, messages):
        prompt = messages[-1]["content"]
        return self.evidence if "Copy every sentence" in prompt or "请逐字抄出" in prompt else self.answer


def opened(path, llm=None, controller=None, told=TOLD, **options):
    memory = Memory.open(
        path / "memory.db",
        llm=llm,
        controller=controller or Alr2Controller(union=0, **options),
        embedder=HashEmbedder(),
        tokenizer=COUNTER,
        reply_tokens=50,
        budget=400,
    )
    for number, text in enumerate(told):
        day = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=number)
        memory.namespace("ana").session("monday").add(text, speaker="Ben", created_at=day)
    return memory


@pytest.fixture
def llm():
    return Talker()


@pytest.fixture
def scope(tmp_path, llm):
    with opened(tmp_path, llm) as memory:
        yield memory.namespace("ana").session("friday")


def exported(scope, **options):
    """The records by stage, and the report."""
    file = io.StringIO()
    report = scope.export_alr2(file, **options)
    records = [json.loads(line) for line in file.getvalue().splitlines()]
    assert report.n_records == len(records)
    for record in records:
        check(record)
    return {stage: [r for r in records if r["stage"] == stage] for stage in ("retrieve", "reason")}, report


def check(record):
    """What holds of every record: a trainer can read it, and its quotes stand in its own prompt."""
    *asked, said = record["messages"]
    roles = [message["role"] for message in asked if message["role"] != "system"]
    assert (roles, said["role"]) == (["user"], "assistant")
    assert all(message["content"].strip() for message in record["messages"])
    if record["stage"] == "retrieve" and said["content"] != "NONE":
        lines = asked[-1]["content"].split("\n")
        assert all(line.removeprefix("- ") in lines for line in said["content"].split("\n"))


def tampered(scope, **changes):
    """Change the ledger's entry that was quoted, in the store."""
    trace, _ = scope.why()
    ledger = tuple(replace(entry, **changes) if entry.spans else entry for entry in trace.ledger)
    scope._parts.store.save_trace(replace(trace, ledger=ledger))


# -- confirming --------------------------------------------------------------------------------------------------------


def test_a_confirmed_turn_keeps_its_reply_with_its_citations(scope):
    scope.chat(QUESTION)
    trace = scope.confirm()
    assert (trace.confirmation.by, trace.confirmation.answer) == ("user", ANSWERED)
    assert trace.confirmation.evidence is None
    assert trace.confirmation.at.tzinfo is not None
    assert scope.why()[0] == trace


def test_a_turn_is_named_by_its_trace_its_query_or_its_reply(scope):
    first = scope.chat(QUESTION)
    scope.chat("And where does Tom live?")
    for name in (first.trace.id, first.trace.query_id, first.segment.seq, f"#{first.segment.seq}"):
        assert scope.confirm(name, answer=str(name)).id == first.trace.id
        assert scope.why(first.trace.id)[0].confirmation.answer == str(name)  # the last word holds
    assert scope.why()[0].confirmation is None


def test_the_right_answer_and_its_evidence_can_be_told(scope):
    scope.chat(QUESTION)
    bees = scope.segment(3)
    trace = scope.confirm(answer="In Oslo [#1].", by="gold", evidence=[1, bees.id, "#1"])
    assert trace.confirmation.answer == "In Oslo [#1]."
    assert trace.confirmation.evidence == (scope.segment(1).id, bees.id)


def test_a_confirmation_survives_export_and_import(scope, tmp_path):
    scope.chat(QUESTION)
    told = scope.confirm(evidence=[1]).confirmation
    scope.whole().export(tmp_path / "all.jsonl")
    (tmp_path / "copy").mkdir()
    with opened(tmp_path / "copy", told=()) as memory:
        copy = memory.namespace("copy")
        copy.import_(tmp_path / "all.jsonl")
        assert copy.why()[0].confirmation == told
        assert [r["messages"] for r in exported(copy)[0]["retrieve"]] == [
            r["messages"] for r in exported(scope)[0]["retrieve"]
        ]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"by": "me"}, ConfigError, "user, gold, judge"),
        ({"evidence": [99]}, UnknownNameError, "unknown segment '99'"),
        ({"turn": 99}, UnknownNameError, "unknown turn '99'"),
        ({"evidence": [6]}, ConfigError, "no evidence of itself"),
        ({"evidence": [1], "answer": " "}, ConfigError, "has no evidence"),
        ({"answer": "a\x00b"}, InvalidInputError, "NUL"),
    ],
)
def test_what_cannot_be_confirmed_changes_nothing(scope, arguments, error, words):
    scope.chat(QUESTION)
    with pytest.raises(error, match=words):
        scope.confirm(**arguments)
    assert scope.why()[0].confirmation is None


def test_a_turn_without_a_reply_needs_an_answer(scope):
    scope.context(QUESTION, record=True)
    with pytest.raises(ConfigError, match="answer="):
        scope.confirm()
    assert scope.confirm(answer="In Oslo.").confirmation.answer == "In Oslo."


# -- records -----------------------------------------------------------------------------------------------------------


def test_a_confirmed_turn_gives_a_record_for_each_stage(scope):
    scope.chat(QUESTION)
    trace = scope.confirm()
    records, report = exported(scope, split="dev")
    assert (report.n_turns, report.refused, report.excluded) == (1, {}, 0)
    [retrieve], [reason] = records["retrieve"], records["reason"]
    context = listed(s for seq in range(1, 5) for s in numbered(scope.segment(seq)))
    assert context in retrieve["messages"][0]["content"]
    assert retrieve["messages"][-1]["content"] == QUOTE
    system, asked, said = (message["content"] for message in reason["messages"])
    assert system.endswith(ANSWER["en"])
    assert system.startswith("You are")
    assert "[#1] Ben: She lives in Oslo since 2019.\n</memory>" in asked
    assert asked.endswith(QUESTION)
    assert "CANARY" not in asked
    assert said == ANSWERED
    assert retrieve["id"] != reason["id"]
    first = scope.segment(1)
    assert retrieve["meta"] == {
        "context_tokens": 4096,
        "n_tokens": COUNTER.count_text(context),
        "tokenizer": "words",
        "evidence_spans": [[first.id, 26, 55]],
        "verifier_version": VERSION,
        "source_ids": [scope.segment(seq).id for seq in range(1, 5)],
        "split": "dev",
        "confirmed_by": "user",
        "trace": trace.id,
        "language": "en",
    }
    assert first.text[26:55] == "She lives in Oslo since 2019."
    assert reason["meta"]["source_ids"] == [first.id]


def test_the_reason_record_is_what_a_turn_shows_its_llm(scope, llm):
    llm.evidence = (
        f"- S4.1: I had porridge for breakfast, and Tom had none.\n{QUOTE}\n- S1.1: My sister Ana keeps bees."
    )
    llm.answer = "Oslo [#1, #4]."
    reply = scope.chat(QUESTION)
    scope.confirm()
    assert exported(scope)[0]["reason"][0]["messages"][:-1] == list(reply.context.messages)


def test_only_what_is_cited_is_evidence_unless_more_is_named(scope, llm):
    llm.evidence += "\n- S4.1: I had porridge for breakfast, and Tom had none."
    scope.chat(QUESTION)
    scope.confirm()
    assert exported(scope)[0]["retrieve"][0]["messages"][-1]["content"] == QUOTE
    scope.confirm(evidence=[4, 1, 3])  # of 3 nothing was quoted: all of it
    target = exported(scope)[0]["retrieve"][0]["messages"][-1]["content"]
    assert target.split("\n") == [
        QUOTE,
        "- S3.1: Bees are not allowed on the roof of the house in Bergen.",
        "- S4.1: I had porridge for breakfast, and Tom had none.",
    ]
    llm.answer = "In Oslo."
    scope.chat(QUESTION)
    scope.confirm()
    assert [each["messages"][-1]["content"].count("\n") for each in exported(scope)[0]["retrieve"]] == [2, 1]


@pytest.mark.parametrize("told", ["In Oslo [#1], not in Bergen [#3, #1][#77].", "In Oslo [#1], not in Bergen [#1]."])
def test_an_answer_cites_only_what_its_prompt_shows(scope, told):
    scope.chat(QUESTION)
    scope.confirm(answer=told)
    assert exported(scope)[0]["reason"][0]["messages"][-1]["content"] == "In Oslo [#1], not in Bergen [#1]."


def test_an_answer_of_nothing_but_such_citations_is_refused(scope):
    scope.chat(QUESTION)
    scope.confirm(answer="[#3]")
    assert exported(scope)[1].refused == {Refusal.SILENT: 1}


@pytest.mark.parametrize(
    ("question", "language"), [("What is the name of Ana's boss?", "en"), ("安娜的老板叫什么名字？", "zh")]
)
def test_what_memory_does_not_hold_is_answered_with_none(scope, question, language):
    scope.chat(question)
    scope.confirm(answer="")
    records, _ = exported(scope)
    [retrieve], [reason] = records["retrieve"], records["reason"]
    assert retrieve["messages"][-1]["content"] == "NONE"
    assert "S1.1: My sister" in retrieve["messages"][0]["content"]
    assert reason["messages"][-1]["content"] == NOT_IN_MEMORY[language]
    assert reason["messages"][-2]["content"] == question
    assert reason["messages"][0]["content"].endswith(ANSWER[language])
    assert (retrieve["meta"]["evidence_spans"], retrieve["meta"]["language"]) == ([], language)


def test_a_reply_that_said_so_is_confirmed_as_it_is(tmp_path):
    with opened(tmp_path, Talker("NONE"), nothing="say") as memory:
        scope = memory.namespace("ana").session("friday")
        scope.chat("What is the name of Ana's boss?")
        scope.confirm()
        assert exported(scope)[0]["retrieve"][0]["messages"][-1]["content"] == "NONE"


def test_any_controllers_turn_will_do_where_its_evidence_is_named(tmp_path):
    with opened(tmp_path, ScriptedLLM(["In Oslo."] * 2), controller="recency") as memory:
        scope = memory.namespace("ana").session("friday")
        scope.chat(QUESTION)
        scope.confirm()
        scope.chat("Where may no bees be?")
        scope.confirm(answer="In Bergen [#3].", evidence=[3])
        records, report = exported(scope)
    assert report.refused == {Refusal.UNKNOWN: 1}
    assert [each["messages"][-1]["content"] for each in records["reason"]] == ["In Bergen [#3]."]
    assert "Answer only from the quotes" in records["reason"][0]["messages"][0]["content"]


def test_what_recall_fell_back_to_is_no_evidence(tmp_path):
    with opened(tmp_path, Talker("NONE", "In Oslo.")) as memory:
        scope = memory.namespace("ana").session("friday")
        scope.chat(QUESTION)
        scope.confirm()
        assert {entry.reason for entry in scope.why()[0].ledger if entry.spans} == {Reason.FALLBACK}
        assert exported(scope)[1].refused == {Refusal.UNKNOWN: 1}


def test_one_stage_can_be_written_alone(scope):
    scope.chat(QUESTION)
    scope.confirm()
    for stage in ("retrieve", "reason"):
        records, report = exported(scope, stages=[stage])
        assert (len(records[stage]), report.n_records, report.n_turns) == (1, 1, 1)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("span", "reason"),
    [
        ((30, 43), Fault.PART),  # lives in Oslo
        ((26, 49), Refusal.ALTERED),  # most of the sentence: the verifier would let it pass
        ((26, 76), Refusal.ALTERED),  # two sentences, which no line of the context holds
        ((20, 40), Fault.INVENTED),  # from the end of one into the next
        ((26, 999), Refusal.OUTSIDE),
        ((-3, 20), Refusal.OUTSIDE),
        ((40, 40), Refusal.OUTSIDE),
    ],
)
def test_a_quote_that_is_not_in_its_context_is_refused(scope, span, reason):
    scope.chat(QUESTION)
    scope.confirm()
    tampered(scope, spans=(span,))
    assert exported(scope) == ({"retrieve": [], "reason": []}, AlignedReport(0, 0, {reason: 1}, 0))


def test_evidence_that_was_forgotten_is_refused(scope):
    scope.chat(QUESTION)
    scope.confirm()
    scope.chat(QUESTION)
    scope.confirm(answer="She had.", evidence=[4])
    scope.forget(1)
    records, report = exported(scope)
    assert report.refused == {Refusal.FORGOTTEN: 1}
    assert report.n_turns == 1
    assert "Oslo since 2019" not in json.dumps(records)
    scope.forget(4)
    assert exported(scope)[1].refused == {Refusal.FORGOTTEN: 2}


def test_quotes_that_cannot_be_read_back_are_refused(tmp_path):
    told = ["The sign for honey is this one: |"]  # the reader takes it for the end of a table's row
    with opened(tmp_path, Talker(f"- S1.1: {told[0]}", "make bees [#1]"), told=told) as memory:
        scope = memory.namespace("ana").session("friday")
        scope.context("Which command makes honey?", record=True)
        scope.confirm(answer="make bees", evidence=[1])
        assert exported(scope)[1].refused == {Refusal.UNREADABLE: 1}


def test_control_tokens_are_quoted_as_they_are_shown(tmp_path):
    told = ["Ana wrote <|im_end|> and [INST] to her bees, </memory> too."]
    with opened(tmp_path, Talker("- S1.1: " + told[0], "Tokens [#1]."), told=told) as memory:
        scope = memory.namespace("ana").session("friday")
        scope.chat("What did Ana write to her bees?")
        scope.confirm()
        records, report = exported(scope)
    assert report.refused == {}
    assert "< |im_end| >" in records["retrieve"][0]["messages"][-1]["content"]
    assert "<|im_end|>" not in json.dumps(records)


def test_nothing_is_written_without_a_confirmed_turn(scope, tmp_path):
    scope.chat(QUESTION)
    file = tmp_path / "train.jsonl"
    file.write_text("older")
    with pytest.raises(ConfigError, match="memos confirm"):
        scope.export_alr2(file)
    assert file.read_text() == "older"


@pytest.mark.parametrize("options", [{"context_tokens": 0}, {"context_tokens": []}, {"stages": ["x"]}, {"stages": ()}])
def test_options_that_make_no_sense_are_refused(scope, options):
    scope.chat(QUESTION)
    scope.confirm()
    with pytest.raises(ConfigError):
        exported(scope, **options)


def test_questions_of_an_evaluation_are_left_out(scope, tmp_path):
    scope.chat(QUESTION)
    scope.confirm()
    file = tmp_path / "questions.txt"
    same = "  where does ANA,\twho keeps bees, live?"
    for line in (same, question_hash(QUESTION), question_hash(QUESTION).upper()):
        for bom in ("", "\ufeff"):
            file.write_text(f"{bom}{line}\n\nWho?\n", "utf-8")
            assert exported(scope, exclude=file)[1].excluded == 1
        _, report = exported(scope, exclude=["Who?", line])
        assert (report.n_records, report.n_turns, report.refused, report.excluded) == (0, 0, {}, 1)
    assert exported(scope, exclude=["Where does Ana live?", question_hash("x")])[1].n_turns == 1
    with pytest.raises(InvalidInputError, match="No such file"):
        exported(scope, exclude=str(tmp_path / "nowhere.txt"))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInputError, match="UTF-8"):
        exported(scope, exclude=file)


# -- contexts ----------------------------------------------------------------------------------------------------------


def many(scope, llm, n=8):
    """A namespace with much in it, and as many confirmed turns."""
    for number in range(60):
        scope.add(f"Box {number} holds {number} jars of honey. {'It stands on a shelf. ' * (number % 4)}")
    for number in range(n):
        box = scope.segment(5 + 6 * number)
        llm.evidence = f"- {numbered(box)[0].id}: {numbered(box)[0].text}"
        llm.answer = f"{box.seq - 5} jars [#{box.seq}]."
        scope.chat(f"How many jars does box {box.seq - 5} hold?")
        scope.confirm()


@pytest.mark.parametrize("limit", [60, 61, 62, 63, 100, 333, 700])
def test_a_context_is_filled_to_its_limit_around_the_evidence(scope, llm, limit):
    many(scope, llm, 4)
    records, report = exported(scope, context_tokens=limit)
    assert report.n_turns == 4
    for record in records["retrieve"]:
        segments = [scope.segment(id_) for id_ in record["meta"]["source_ids"]]
        context = listed(s for segment in segments for s in numbered(segment))
        assert context in record["messages"][0]["content"]
        assert record["meta"]["n_tokens"] == COUNTER.count_text(context) <= limit
        assert [s.seq for s in segments] == sorted({s.seq for s in segments})
        assert {id_ for id_, _, _ in record["meta"]["evidence_spans"]} <= {s.id for s in segments}
        trace, _ = scope.why(record["meta"]["trace"])
        assert all(segment.seq <= trace.upto for segment in segments)  # neither the query nor the reply
        others = [scope.segment(seq) for seq in range(1, trace.upto + 1)]
        least = min(COUNTER.count_text(listed(numbered(each))) for each in others if each not in segments)
        assert limit - record["meta"]["n_tokens"] < least


def test_evidence_that_is_longer_than_the_context_is_refused(scope):
    scope.chat(QUESTION)
    scope.confirm()
    needed = COUNTER.count_text(listed(numbered(scope.segment(1))))
    assert exported(scope, context_tokens=needed - 1)[1].refused == {Refusal.TOO_LONG: 1}
    [record] = exported(scope, context_tokens=needed)[0]["retrieve"]
    assert record["meta"]["n_tokens"] == needed
    assert record["meta"]["source_ids"] == [scope.segment(1).id]


def test_the_turns_other_candidates_come_before_the_rest(scope, llm):
    many(scope, llm, 1)
    trace, _ = scope.why()
    other = next(entry for entry in trace.ledger if not entry.spans)
    ledger = (*(entry for entry in trace.ledger if entry.spans), other)
    scope._parts.store.save_trace(replace(trace, ledger=ledger))
    beside = set()
    for seed in range(9):
        [record] = exported(scope, context_tokens=100, seed=seed)[0]["retrieve"]
        assert {entry.segment_id for entry in ledger} < set(record["meta"]["source_ids"])
        beside |= set(record["meta"]["source_ids"])
    assert len(beside) >= 4  # the rest is drawn


def test_a_turn_does_not_stand_in_its_own_context(scope):
    reply = scope.chat(QUESTION)
    scope._parts.store.save_trace(replace(scope.confirm(), upto=99))  # as when others were there before an import
    [record] = exported(scope)[0]["retrieve"]
    assert {reply.trace.query_id, reply.trace.reply_id}.isdisjoint(record["meta"]["source_ids"])
    assert len(record["meta"]["source_ids"]) == 4


def test_what_was_said_later_is_not_in_the_context(scope):
    scope.chat(QUESTION)
    scope.confirm()
    scope.add("PELICAN: Ana has moved to Bergen.")
    assert "PELICAN" not in json.dumps(exported(scope)[0])


def test_a_line_that_says_nothing_is_no_evidence(scope):
    noted = scope.add("Ana's bees:\n* * *\nShe has nine hives.")
    scope.chat("How many hives has Ana?")
    scope.confirm(answer="Nine.", evidence=[noted.seq])
    [record] = exported(scope)[0]["retrieve"]
    assert record["messages"][-1]["content"] == "- S5.1: Ana's bees:\n- S5.3: She has nine hives."


def test_a_summary_is_no_distractor(scope):
    summary = replace(scope.segment(2), id="summary", seq=5, kind="summary", text="Ana lives in Oslo.")
    scope.chat(QUESTION)
    trace = replace(scope.confirm(), upto=5)
    exporter = Exporter([*(scope.segment(seq) for seq in range(1, 5)), summary], COUNTER)
    records = [json.loads(line) for line in exporter.lines([trace])]
    assert "Ana lives in Oslo." not in records[0]["messages"][0]["content"]


def test_turns_are_spread_evenly_over_the_lengths(scope, llm):
    many(scope, llm, 8)
    tampered(scope, spans=((0, 999),))  # a refused turn takes no one's place
    lengths = (64, 128, 256)
    records, report = exported(scope, context_tokens=lengths)
    assert (report.n_turns, report.n_records) == (7, 14)
    for stage in ("retrieve", "reason"):
        counts = Counter(record["meta"]["context_tokens"] for record in records[stage])
        assert counts == {64: 3, 128: 2, 256: 2}
    assert all(0.7 < r["meta"]["n_tokens"] / r["meta"]["context_tokens"] <= 1 for r in records["retrieve"])


def test_the_same_seed_gives_the_same_bytes(scope, llm, tmp_path):
    many(scope, llm, 3)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        scope.export_alr2(tmp_path / name, seed=seed, context_tokens=1200)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


ODD = st.text(st.sampled_from("ab 9.。!?\n\t-*#[]<>|/`'\"“…:S1١é\u0301中\u2028\u200b"), min_size=1, max_size=60)
PIECES = st.sampled_from(["<|im_end|>", "</memory>", "[INST]", "S1.1: ", "- ", "NONE", "```", "{", "not ", "1,998 "])
TEXTS = st.lists(st.lists(ODD | PIECES, min_size=1, max_size=5).map("".join).filter(str.strip), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    with opened(tmp_path_factory.mktemp("template"), Talker()) as memory:
        return memory.namespace("ana").session("friday").chat(QUESTION).trace


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=TEXTS, data=st.data(), limit=st.integers(20, 400))
def test_every_exported_line_stands_in_its_own_prompt(template, texts, data, limit):
    now = datetime(2026, 1, 1, tzinfo=UTC)
    segments = [
        Segment(str(seq), seq, ("a",), "s", "user", data.draw(ODD), "turn", text, now, 1)
        for seq, text in enumerate(texts, start=1)
    ]
    [entry] = [entry for entry in template.ledger if entry.spans]
    chosen = data.draw(
        st.sets(
            st.sampled_from([s for segment in segments for s in numbered(segment)] or [None]).map(
                lambda s: s and (s.segment.id, s.start, s.end)
            ),
            min_size=1,
        )
    )
    ledger = tuple(
        replace(entry, segment_id=segment.id, seq=segment.seq, spans=spans)
        for segment in segments
        if (spans := tuple((start, end) for id_, start, end in filter(None, chosen) if id_ == segment.id))
    )
    told = Confirmation("user", "So it is.", now, tuple(e.segment_id for e in ledger))
    trace = replace(template, upto=99, ledger=ledger, cited=(), confirmation=told)
    exporter = Exporter(segments, COUNTER, context_tokens=limit)
    records = [json.loads(line) for line in exporter.lines([trace])]
    if not records:
        assert set(exporter.report.refused) <= {Refusal.UNKNOWN, Refusal.TOO_LONG, Refusal.UNREADABLE}
        return
    check(records[0])
    shown = [s for segment in segments if segment.id in records[0]["meta"]["source_ids"] for s in numbered(segment)]
    checked = verify(read_claims(records[0]["messages"][-1]["content"]), shown)
    assert not checked.rejected
    assert {(s.segment.id, s.start, s.end) for s in checked.accepted} <= chosen
    assert COUNTER.count_text(listed(shown)) <= limit


# -- the command line, and asyncio -------------------------------------------------------------------------------------


@pytest.fixture
def memos(tmp_path, monkeypatch, capfd):
    with opened(tmp_path, Talker()) as memory:
        scope = memory.namespace("ana").session("friday")
        scope.chat(QUESTION)
        scope.chat("Where may no bees be?")
    settings = {"STORE": tmp_path / "memory.db", "NAMESPACE": "ana", "EMBEDDER": "hash", "TOKENIZER": "cl100k_base"}
    for name, value in settings.items():
        monkeypatch.setenv(f"MEMOS_{name}", str(value))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["memos", *map(str, arguments)])
        code = 0
        try:
            run()
        except SystemExit as end:
            code = end.code or 0
        return (code, *capfd.readouterr())

    return call


def test_the_commands_confirm_and_export(memos, tmp_path):
    file = tmp_path / "train.jsonl"
    code, _, err = memos("export-alr2", file)
    assert (code, "memos confirm" in err, file.exists()) == (1, True, False)
    code, out, _ = memos("confirm", 5)
    assert (code, out) == (0, f"Confirmed: {QUESTION}\n{ANSWERED}\n")
    arguments = ["--answer", "In Bergen [#3].", "--by", "gold", "--evidence", "3, #1", "--json"]
    shown = json.loads(memos("confirm", *arguments)[1])
    assert set(shown) == {"trace", "query", "confirmation"}
    assert shown["confirmation"]["by"] == "gold"
    assert len(shown["confirmation"]["evidence"]) == 2
    code, out, err = memos("export-alr2", file, "--context-tokens", "4k, 100", "--split", "dev", "--seed", 3)
    assert (code, out, err) == (0, f"Wrote 4 records of 2 turns to {file}.\n", "")
    records = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [record["meta"]["context_tokens"] for record in records] == [4096, 4096, 100, 100]
    assert {record["meta"]["split"] for record in records} == {"dev"}
    assert memos("export-alr2", "-", "--context-tokens", "4k,100", "--split", "dev", "--seed", 3)[1] == file.read_text()


def test_the_command_tells_what_it_left_out(memos, tmp_path):
    memos("confirm", 5)
    assert "does not hold it" in memos("confirm", "--answer", "")[1]
    memos("forget", 1, "--yes")
    (tmp_path / "x.txt").write_text("where may no bees be?")
    _, out, err = memos("export-alr2", tmp_path / "out", "--exclude", tmp_path / "x.txt")
    assert out.startswith("Wrote 0 records of 0 turns")
    assert f"Refused 1: {Refusal.FORGOTTEN}." in err
    assert "Left out 1" in err
    report = json.loads(memos("export-alr2", tmp_path / "out", "--json")[1])
    assert report == {
        "n_records": 2, "n_turns": 1, "refused": {"evidence was forgotten": 1}, "excluded": 0,
        "file": str(tmp_path / "out"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["confirm", "99"], 1, "unknown turn '99'"),
        (["confirm", "--by", "me"], 1, "user, gold, judge"),
        (["confirm", "--evidence", "77"], 1, "unknown segment '77'"),
        (["export-alr2", "x", "--context-tokens", "4q"], 2, "no number of tokens"),
        (["export-alr2", "/no/such/folder/x"], 1, "No such file"),
    ],
)
def test_a_mistake_is_one_clear_line(memos, arguments, code, words):
    if arguments[0] == "export-alr2":
        memos("confirm")
    got, out, err = memos(*arguments)
    assert (got, words in err, "Traceback" in out + err) == (code, True, False)


def test_the_async_api_confirms_and_exports(tmp_path):
    async def main():
        async with AsyncMemory(opened(tmp_path, Talker())) as memory:
            scope = memory.namespace("ana").session("friday")
            await scope.chat(QUESTION)
            trace = await scope.confirm(by="judge")
            return trace, await scope.export_alr2(tmp_path / "train.jsonl")

    trace, report = asyncio.run(main())
    assert trace.confirmation.by == "judge"
    assert (report.n_records, report.n_turns) == (2, 1)
