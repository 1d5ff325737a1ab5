"""The controller longmem-free on the real SmolLM2: memory enters as keys and values, and is read once in its life."""

import copy
import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memory_os import BankOptions, CapabilityError, ConfigError, LongMemFreeController, Memory, NewSegment
from memory_os.adapters.huggingface import HuggingFaceLLM
from memory_os.adapters.scripted import ScriptedLLM
from memory_os.bank import LLMBank
from memory_os.cli.main import run
from memory_os.pack import CachedFrame, cached_line, pack
from memory_os.protocols import CachingLLM
from memory_os.turn import prepare
from memory_os.types import Action, Candidate, Choice, Decision, Form, Outcome, Reason, Segment

FACTS = [
    "My cat is called Miso.",
    "I work at the harbour museum.",
    "Lena broke her arm while skating.",
    "The blue bicycle has a flat tyre.",
    "Mr. Okafor is my landlord.",
]


@pytest.fixture(scope="module")
def llm():
    return HuggingFaceLLM()


@contextmanager
def opened(path, llm, **options):
    options = {"embedder": "hash", "controller": "longmem-free", "reply_tokens": 12, **options}
    with Memory.open(path, llm=llm, **options) as memory:
        yield memory


@pytest.fixture
def path(tmp_path):
    return tmp_path / "memory.db"


@contextmanager
def tokens_read(llm):
    """The numbers of tokens that the model was given, one for each time that it ran."""
    read = []
    hook = llm.model.model.embed_tokens.register_forward_hook(lambda _, args, __: read.append(args[0].numel()))
    try:
        yield read
    finally:
        hook.remove()


def told(scope, texts=FACTS, session="old"):
    return scope.add_many([NewSegment(text, session) for text in texts])


# What enters, and how it is accounted for.


def test_memory_enters_as_cached_and_the_trace_says_so(path, llm):
    with opened(path, llm) as memory:
        scope = memory.namespace("a")
        told(scope)
        reply = scope.session("new").chat("What is my cat called?")
        entered = [entry for entry in reply.trace.ledger if entry.action is Action.ACTIVATED]
        assert entered
        assert {entry.form for entry in entered} == {Form.CACHED}
        assert "entered as cached keys and values; 5 of 5 segments were computed now" in reply.trace.notes[-1]
        again = scope.session("newer").chat("What is my cat called?")
        assert "; 0 of " in again.trace.notes[-1]
        account = again.trace.account
        assert account.total == llm.count_cached(again.context.cached) == again.context.n_tokens
        assert account.system + account.query + account.flash + account.activated == account.total
        assert sum(e.n_tokens for e in again.trace.ledger if e.form) < account.activated
        # the messages are the same prompt as text, for people and for other models
        [_, user] = again.context.messages
        assert user["content"].startswith('<memory note="recollections')
        assert "user: My cat is called Miso.\n" in user["content"]
        assert user["content"].endswith("\n</memory>\n\nWhat is my cat called?")


def test_what_is_in_the_bank_is_never_read_again(path, llm):
    with opened(path, llm, budget=1024) as memory:
        told(memory.namespace("a"))
        memory.namespace("a").fill_bank()
    with opened(path, llm, budget=1024) as memory, tokens_read(llm) as read:
        scope = memory.namespace("a")
        context = scope.context("What is my cat called?")
        [*_] = LLMBank.generate(
            memory.parts.llm_bank, scope.labels, context, max_tokens=4, stop=(), notes=(notes := [])
        )
        in_memory = sum(llm.count_text(line) for line in context.cached.lines)
        assert len(context.segments) == len(FACTS)
        # the question for the search, the prompt's own parts once more, and four tokens of the reply
        assert sum(read) < in_memory + llm.count_cached(context.cached) - in_memory + 20
        longest_run = max(read)
        assert longest_run < llm.count_cached(context.cached) - in_memory + 2
        assert "0 of 5 segments were computed now" in notes[0]


def test_a_context_from_disk_gives_the_same_reply(path, llm):
    replies = []
    for session in ("one", "two"):
        with opened(path, llm) as memory:
            scope = memory.namespace("a")
            if session == "one":
                told(scope)
                scope.fill_bank()
            context = scope.context("What is my cat called?")
            replies.append(
                "".join(memory.parts.llm_bank.generate(scope.labels, context, max_tokens=12, stop=(), notes=[]))
            )
    assert replies[0] == replies[1]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_answer_comes_out_of_the_bank(path, llm, dtype):
    with opened(path, llm, bank=BankOptions(dtype=dtype), reply_tokens=16) as memory:
        scope = memory.namespace("a")
        told(scope, ["The code of the wine cellar is 4812."])
        reply = scope.session("new").chat("What is the code of the wine cellar?")
        assert "4812" in reply.text


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text(min_size=1, max_size=120).filter(str.strip), min_size=1, max_size=12),
    st.integers(60, 400),
    st.randoms(use_true_random=False),
)
def test_no_cached_context_is_over_its_budget(llm, texts, limit, random):
    frame = CachedFrame("Be brief.", "What?", llm, limit)
    now = datetime(2026, 5, 1, tzinfo=UTC)
    segments = [
        Segment(str(n), n, ("a",), "s", "user", None, "turn", text, now, 0) for n, text in enumerate(texts, start=1)
    ]
    candidates = [Candidate(s, 1.0, {}, llm.count_text(cached_line(s) + "\n")) for s in segments]
    wanted = random.sample(segments, len(segments))
    decision = Decision(tuple(Choice(s.id, Form.CACHED, Reason.RELEVANT) for s in wanted))
    packed = pack(frame, (), candidates, decision)
    assert packed.account.total <= limit
    assert [s.seq for s in packed.segments] == sorted(s.seq for s in packed.segments)
    assert len(packed.ledger) == len(candidates)
    if packed.cached:
        head, lines, tail = llm.ids_of(packed.cached)
        assert packed.account.total == len(head) + sum(map(len, lines)) + len(tail)
        assert len(lines) == len(packed.segments)


def test_a_line_that_was_cut_is_computed_for_this_prompt_alone(path, llm):
    with opened(path, llm, budget=160) as memory:
        scope = memory.namespace("a")
        told(scope, ["The code of the wine cellar is 4812. " + "It was changed in spring. " * 40])
        reply = scope.session("new").chat("What is the code of the wine cellar?")
        assert [entry.action for entry in reply.trace.ledger] == [Action.TRIMMED]
        assert "1 of 1 segments were computed now" in reply.trace.notes[-1]
        again = scope.session("newer").context("What is the code of the wine cellar?")
        assert again.n_tokens <= 160


def test_flash_memory_follows_what_is_cached(path, llm):
    with opened(path, llm) as memory:
        scope = memory.namespace("a")
        told(scope)
        talk = scope.session("new")
        talk.chat("Hello, it is me again.")
        context = talk.context("What is my cat called?")
        roles = [message["role"] for message in context.messages]
        assert roles == ["system", "user", "assistant", "user"]
        assert "</memory>\n\nHello, it is me again." in context.messages[1]["content"]
        assert context.account.flash > 0
        assert context.n_tokens == llm.count_cached(context.cached)


def test_tool_schemas_count_beside_cached_memory(path, llm):
    chat = copy.deepcopy(llm._chat)
    chat.tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + chat.tokenizer.chat_template
    told_of_tools = HuggingFaceLLM()
    told_of_tools._parts = {**llm._parts, "tokenizer": chat}
    told_of_tools._parts.pop("kv fingerprint", None)
    tools = [{"type": "function", "function": {"name": "look_up", "description": "Looks things up. " * 10}}]
    with opened(path, told_of_tools) as memory:
        scope = memory.namespace("a")
        told(scope)
        bare, counted = (scope.context("What is my cat called?", tools=own) for own in ((), tools))
        assert counted.segments == bare.segments
        assert counted.n_tokens == told_of_tools.count_tokens(counted.messages, tools) > bare.n_tokens + 30
        tight = scope.context("What is my cat called?", tools=tools, budget=counted.n_tokens - 1)
        assert len(tight.segments) < len(counted.segments)
        assert tight.n_tokens < counted.n_tokens


def test_opening_loads_no_weights(path):
    fresh = HuggingFaceLLM()
    with opened(path, fresh) as memory:
        memory.namespace("a").add("My cat is called Miso.")
    assert "model" not in fresh._parts


# What the model's attention adds.


def test_attention_joins_recall_and_is_shown(path, llm):
    with opened(path, llm, controller=LongMemFreeController(k=3, place=0)) as memory:
        scope = memory.namespace("a")
        told(scope, [*FACTS, *(f"Number {n} is odd, said the clerk at desk {n}." for n in range(60))])
        scope.fill_bank()
        context = scope.context("What is my cat called?")
        attended = [entry for entry in context.ledger if "attention" in entry.signals]
        assert len(attended) == 3
        assert all(0 < entry.signals["attention"] <= 1 for entry in attended)
        added = [entry for entry in context.ledger if entry.reason is Reason.ATTENDED]
        assert {entry.rank for entry in added} <= {1, 2, 3}
        plain = scope.context("What is my cat called?")
        assert plain.text == context.text  # the same again
    with opened(path, llm, controller=LongMemFreeController(k=0)) as memory:
        context = memory.namespace("a").context("What is my cat called?")
        assert not any("attention" in entry.signals for entry in context.ledger)


def test_nothing_enters_where_nothing_is_about_the_query(path, llm):
    with opened(path, llm, embedder="minilm", controller=LongMemFreeController(k=60)) as memory:
        scope = memory.namespace("a")
        told(scope, [*FACTS, *(f"Number {n} is odd, said the clerk at desk {n}." for n in range(400))])
        scope.fill_bank()  # attention always finds something, also what recall did not offer
        assert any(e.reason is Reason.ATTENDED for e in scope.context("What is my cat called?").ledger)
        assert scope.context("What is my cat called?").segments
        context = scope.context("Thanks, good night!")
        assert not context.segments
        assert context.cached is None


def test_a_query_sees_only_what_was_before_it(path, llm):
    with opened(path, llm) as memory:
        scope = memory.namespace("a")
        told(scope)
        reply = scope.session("new").chat("What is my cat called?")
        assert reply.trace.query_id not in {entry.segment_id for entry in reply.trace.ledger}
        asked, *_ = told(scope, ["What is my cat called?", *(f"My cat number {n} is called Tom." for n in range(20))])
        scope.fill_bank()
        parts = replace(memory.parts, controller=LongMemFreeController(k=50, place=0))
        context = prepare(parts, scope.labels, None, asked.text, budget=2048, asked=asked)
        assert any("attention" in entry.signals for entry in context.ledger)
        assert all(entry.seq < asked.seq for entry in context.ledger)


# The bank keeps up, heals, and forgets.


def test_a_turn_puts_what_was_said_into_the_bank(path, llm):
    with opened(path, llm) as memory:
        scope = memory.namespace("a")
        scope.session("new").chat("My cat is called Miso.")
        assert scope.bank_status().n_segments == 2
        assert scope.fill_bank() == 0  # nothing is missing


def test_what_the_bank_has_no_room_for_is_computed_for_this_turn(path, llm):
    with opened(path, llm, bank=BankOptions(max_tokens=1)) as memory:
        scope = memory.namespace("a")
        told(scope)
        for session in ("one", "two"):
            reply = scope.session(session).chat("What is my cat called?")
            assert reply.text
            n = len(reply.context.segments)
            assert f"; {n} of {n} segments were computed now" in reply.trace.notes[-1]
        assert scope.bank_status().n_segments == 0


def test_filling_takes_the_newest_that_there_is_room_for(path, llm):
    with opened(path, llm, bank=BankOptions(max_tokens=100)) as memory:
        scope = memory.namespace("a")
        stored = told(scope, [f"The clerk at desk {n} counts odd numbers." for n in range(20)])
        shown = []
        n = scope.fill_bank(lambda done, total: shown.append((done, total)))
        status = scope.bank_status()
        assert 0 < status.n_segments == n < 20
        assert shown[-1] == (n, n)
        assert status.n_tokens <= 100 < status.n_tokens + 30
        fingerprint = memory.parts.llm_bank.fingerprint
        assert list(memory.parts.bank.entries(scope.labels, fingerprint)) == [s.id for s in stored[-n:]]
        assert scope.fill_bank() == 0


def test_another_system_prompt_does_not_get_these_keys_and_values(path, llm):
    with opened(path, llm) as memory:
        told(memory.namespace("a"))
        memory.namespace("a").fill_bank()
    with opened(path, llm, system="Be brief.") as memory:
        scope = memory.namespace("a")
        assert scope.bank_status().n_stale == len(FACTS)
        reply = scope.session("new").chat("What is my cat called?")
        assert "; 5 of 5 segments were computed now" in reply.trace.notes[-1]


def test_a_damaged_file_is_computed_again(path, llm, caplog):
    with opened(path, llm) as memory:
        told(memory.namespace("a"))
        memory.namespace("a").fill_bank()
    victim = sorted(path.with_name("memory.db.bank").rglob("*.safetensors"))[2]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with opened(path, llm) as memory:
        assert len(memory.check()["bank"]) == 1
        reply = memory.namespace("a").session("new").chat("What is my cat called?")
        assert "; 1 of 5 segments were computed now" in reply.trace.notes[-1]
        assert memory.check()["bank"] == []
    assert "damaged" in caplog.text or "removed" in caplog.text


def test_forgetting_takes_keys_and_values_along(path, llm):
    folder = path.with_name("memory.db.bank")
    with opened(path, llm) as memory:
        scope, other = memory.namespace("a"), memory.namespace("b")
        for each in (scope, other):
            told(each)
            each.fill_bank()
        assert len(list(folder.rglob("*.safetensors"))) == 10
        assert scope.forget(1, 2)["bank"] == 2
        assert len(list(folder.rglob("*.safetensors"))) == 8
        assert (scope.bank_status().n_segments, other.bank_status().n_segments) == (3, 5)
        scope.drop_bank()
        assert (scope.bank_status().n_segments, other.bank_status().n_segments) == (0, 5)
        assert len(scope.history()) == 3


def test_another_namespaces_bank_is_never_searched(path, llm):
    with opened(path, llm) as memory:
        told(memory.namespace("a"))
        memory.namespace("a").fill_bank()
        told(memory.namespace("b"), ["The clerk counts."])
        memory.namespace("b").fill_bank()
        found = memory.parts.llm_bank.search(("b",), "What is my cat called?", 10)
        assert len(found) == 1
        assert len(memory.parts.llm_bank.search(("a",), "What is my cat called?", 10)) == 5


def test_a_failing_model_loses_no_turn(path, llm):
    class Failing(HuggingFaceLLM):
        def generate_cached(self, *_, **__):
            raise RuntimeError("out of memory")
            yield

    failing = Failing()
    failing._parts = llm._parts
    with opened(path, failing) as memory:
        scope = memory.namespace("a")
        told(scope)
        with pytest.raises(Exception, match="out of memory"):
            scope.session("new").chat("What is my cat called?")
        assert scope.history()[-1].text == "What is my cat called?"
        assert scope.why()[0].outcome is Outcome.FAILED


# Who cannot use it.


def test_what_is_missing_is_one_clear_error(path, llm):
    assert not isinstance(ScriptedLLM(["x"]), CachingLLM)
    with pytest.raises(CapabilityError, match="needs an LLM with CachingLLM; HuggingFaceLLM is one"):
        Memory.open(path, llm=ScriptedLLM(["x"]), controller="longmem-free")
    with pytest.raises(ConfigError, match="leave out tokenizer"):
        Memory.open(path, llm=llm, controller="longmem-free", tokenizer="cl100k_base")
    with pytest.raises(ConfigError, match="must not be negative"):
        LongMemFreeController(k=-1)
    with pytest.raises(ConfigError, match="dtype is one of float16, int8"):
        BankOptions(dtype="int4")
    assert not path.exists()
    with Memory.open(path, embedder="hash") as memory, pytest.raises(CapabilityError, match="llm="):
        memory.namespace("a").fill_bank()
    with opened(path, llm, bank=BankOptions(layer=99)) as memory:
        told(memory.namespace("a"))
        with pytest.raises(ConfigError, match="layers 0 to 29, not 99"):
            memory.namespace("a").fill_bank()


def test_the_command_shows_fills_and_empties(path, llm, monkeypatch, capfd):
    monkeypatch.setenv("MEMOS_STORE", str(path))
    monkeypatch.setenv("MEMOS_EMBEDDER", "hash")
    monkeypatch.setenv("MEMOS_BANK_DTYPE", "int8")

    def memos(*arguments):
        monkeypatch.setattr(sys, "argv", ["memos", "bank", "--json", *arguments])
        try:
            run()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        out, _ = capfd.readouterr()
        return code, json.loads(out) if out else None

    with opened(path, llm) as memory:
        told(memory.namespace("default"))
    code, report = memos()
    assert (code, report["segments"], report["dtype"], report["max_tokens"]) == (0, 0, "int8", 65_536)
    assert memos("--fill")[1]["computed"] == 5
    code, report = memos()
    assert (report["segments"], report["computed"]) == (5, 0)
    assert 0 < report["bytes"] < 5 * 40 * 13_000
    assert memos("--drop")[1]["segments"] == 0
    assert any("full prefill" in note for note in report["notes"])
    assert memos("--drop", "--fill")[0] == 2
    monkeypatch.setenv("MEMOS_LLM", "http://localhost:1/v1#any")  # which has no keys and values to show
    assert memos("--drop")[0] == 0
    assert memos()[0] == 1
