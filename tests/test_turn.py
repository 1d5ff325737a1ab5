"""One turn: what is durable when, what the model sees, and what a trace tells, on real SQLite with a scripted LLM."""

import asyncio
import json
import subprocess
import sys

import pytest

from memory_os import AsyncMemory, Memory, NewSegment
from memory_os.adapters.scripted import ScriptedLLM
from memory_os.errors import BudgetError, ConfigError, InvalidInputError, LLMError
from memory_os.types import Outcome

FACTS = [
    "My cat is called Miso.",
    "I work at the harbour museum.",
    "Lena broke her arm while skating.",
    "The blue bicycle has a flat tyre.",
    "Mr. Okafor is my landlord.",
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "memory.db"


def opened(path, llm=None, **options):
    return Memory.open(path, llm=llm, embedder="hash", **{"tokenizer": "cl100k_base", **options})


def test_the_query_is_durable_before_the_llm_is_called(path):
    seen = []

    def look(messages):
        with opened(path) as other:  # another connection sees only what is committed
            seen.extend(s.text for s in other.namespace("a").history())
        return "I see."

    with opened(path, ScriptedLLM(look)) as memory:
        memory.namespace("a").chat("What is my cat called?")
    assert seen == ["What is my cat called?"]


def test_a_turn_stores_both_sides_and_its_trace(path):
    llm = ScriptedLLM(["Miso, of course."])
    with opened(path, llm) as memory:
        scope = memory.namespace("a")
        for fact in FACTS:
            scope.session("old").add(fact)
        reply = scope.session("new").chat("What is my cat called?")
        assert [(s.role, s.text) for s in scope.history(2)] == [
            ("user", "What is my cat called?"),
            ("assistant", "Miso, of course."),
        ]
        assert "Miso" in llm.calls[0].messages[-1]["content"]
        for ref in (
            reply.trace.id,
            reply.segment.id,
            reply.trace.query_id,
            reply.segment.seq,
            f"#{reply.segment.seq}",
            None,
        ):
            assert scope.why(ref)[0] == reply.trace
        assert reply.trace.outcome is Outcome.ANSWERED
        assert reply.trace.account.reply_reserve == 512


def test_a_failing_llm_loses_nothing(path):
    def fail(messages):
        raise RuntimeError("no route to model")

    with opened(path, ScriptedLLM(fail)) as memory:
        scope = memory.namespace("a")
        with pytest.raises(LLMError, match="no route to model") as caught:
            scope.chat("Are you there?")
        assert [s.text for s in scope.history()] == ["Are you there?"]
        trace, _ = scope.why(caught.value.trace_id)
        assert (trace.outcome, trace.error, trace.reply_id) == (Outcome.FAILED, caught.value.problem, None)


def test_an_interrupted_reply_is_kept_and_marked(path):
    with opened(path, ScriptedLLM(["one two three four"])) as memory:
        scope = memory.namespace("a")
        stream = scope.stream("Count, please.")
        first = next(stream)
        stream.close()
        kept = scope.history()[-1]
        assert (kept.text, kept.role, kept.metadata) == (first, "assistant", {"outcome": "interrupted"})
        assert scope.why()[0].outcome is Outcome.INTERRUPTED
        with pytest.raises(ConfigError, match="iterate it to its end"):
            _ = stream.reply


def test_an_interrupted_model_has_stopped_before_the_turn_is_recorded(path):
    ended = []

    class Closing(ScriptedLLM):
        def generate(self, messages, *, max_tokens, stop=()):
            try:
                yield from ("one ", "two ")
            finally:
                ended.append(len(memory.namespace("a").history()))

    with opened(path, Closing([])) as memory:
        stream = memory.namespace("a").stream("Count.")
        next(stream)
        stream.close()
        assert ended == [1]  # the question alone


def test_flash_memory_is_always_in_and_never_recalled(path):
    llm = ScriptedLLM(lambda messages: "Yes.")
    with opened(path, llm) as memory:
        scope = memory.namespace("a").session("s")
        scope.chat("My cat is called Miso.")
        reply = scope.chat("What is my cat called?")
        assert [m["role"] for m in llm.calls[1].messages] == ["system", "user", "assistant", "user"]
        assert len(reply.trace.flash) == 2
        assert not set(reply.trace.flash) & {e.segment_id for e in reply.trace.ledger}
        assert str(llm.calls[1].messages).count("Miso") == 1


def test_injected_text_is_never_stored_again(path):
    with opened(path, ScriptedLLM(lambda messages: "Noted.")) as memory:
        scope = memory.namespace("a")
        for fact in FACTS:
            scope.session("old").add(fact)
        for _ in range(5):
            scope.session("new").chat("Tell me about my cat and my landlord.")
        assert sum("Miso" in s.text for s in scope.history(999)) == 1
        assert not any("<memory" in s.text for s in scope.history(999))


def test_context_is_read_only_and_the_same_each_time(path):
    with opened(path) as memory:
        scope = memory.namespace("a")
        for fact in FACTS:
            scope.add(fact)
        first = scope.context("What is my cat called?", budget=200)
        second = scope.context("What is my cat called?", budget=200)
        assert (first.messages, first.ledger) == (second.messages, second.ledger)
        assert len(scope.history(99)) == len(FACTS)
        recorded = scope.context("What is my cat called?", budget=200, record=True)
        assert scope.history(1)[0].id == recorded.trace.query_id
        assert scope.why()[0] == recorded.trace


SAME_BYTES = """
import sys
from memory_os import Memory
with Memory.open(sys.argv[1], embedder="hash") as memory:
    for budget in (90, 150, 400):
        context = memory.namespace("a").context("Who is my landlord and what is my cat called?", budget=budget)
        print(context.messages, [(e.segment_id, e.action, e.score) for e in context.ledger], context.account)
"""


def test_a_line_is_priced_by_what_it_says_and_not_by_its_id(path):
    """An import may bring ids that another namespace has, and what is restored may be another text."""
    long, short = "The cat " + "is very very grey " * 200, "The cat is grey."
    with Memory.open(path, embedder="hash", budget=400) as memory:
        alice, bob = memory.namespace("alice"), memory.namespace("bob")
        alice.add_many([NewSegment(short, "s", id="one")])
        bob.add_many([NewSegment(long, "s", id="one"), NewSegment(long, "s", id="two")])
        bob.context("grey cat")
        [entry] = alice.context("grey cat").ledger
        assert (entry.action, entry.n_tokens < 20) == ("activated", True)
        bob.forget("one", "two")
        bob.add_many([NewSegment(short, "s", id="two")], restore=True)
        [entry] = bob.context("grey cat").ledger
        assert (entry.action, entry.n_tokens < 20) == ("activated", True)


def test_the_same_store_and_query_give_the_same_bytes_in_other_processes(path):
    with opened(path) as memory:
        for fact in FACTS * 4:
            memory.namespace("a").add(fact)
    outputs = {
        subprocess.run(
            [sys.executable, "-c", SAME_BYTES, str(path)], capture_output=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(outputs) == 1
    assert b"Miso" in outputs.pop()


def test_tools_count_against_the_budget(path):
    tool = {"type": "function", "function": {"name": "search", "description": "Look something up. " * 20}}
    with opened(path) as memory:
        scope = memory.namespace("a")
        for i, fact in enumerate(FACTS * 5):
            scope.add(f"{fact} ({i})")
        without = scope.context("my cat", budget=300)
        with_tool = scope.context("my cat", budget=300, tools=[tool])
        assert with_tool.account.total <= 300
        assert with_tool.account.system > without.account.system + 50
        assert len(with_tool.segments) < len(without.segments)


def test_why_names_the_stage_that_lost_a_segment(path):
    with opened(path, ScriptedLLM(lambda messages: "Hm."), budget=100, flash_turns=2) as memory:
        scope = memory.namespace("a")
        for fact in FACTS:
            scope.session("old").add(fact)
        long = scope.session("old").add("About the cat: " + "she sleeps and eats and plays. " * 60)
        flash = scope.session("new").add("By the way, hello.")
        reply = scope.session("new").chat("What is my cat called?")

        def stage(ref):
            finding = scope.why(reply.trace.id, expect=ref)[1]
            return finding.stage, finding.present

        assert stage(1) == ("context", True)
        assert stage(long.id) in [("pack", False), ("context", True)]
        assert stage(flash.seq) == ("flash", True)
        assert stage(reply.segment.id) == ("stored", False)
        assert stage(999) == ("stored", False)
        assert set(json.loads(json.dumps(list(reply.trace.timings_ms)))) >= {
            "record",
            "recall",
            "decide",
            "pack",
            "generate",
        }


def test_recall_is_named_when_it_did_not_offer_a_segment(path):
    with opened(path, ScriptedLLM(["Hm."])) as memory:
        scope = memory.namespace("a")
        for i in range(80):
            scope.add(f"The cat number {i} is called Miso {i}.")
        lost = scope.session("other").add("zzz qqq")
        reply = scope.session("new").chat("What is the cat called?", budget=200)
        assert scope.why(reply.trace.id, expect=lost.seq)[1].stage == "recall"


def test_bad_input_changes_nothing(path):
    with opened(path, ScriptedLLM(["never"])) as memory:
        scope = memory.namespace("a")
        with pytest.raises(BudgetError) as caught:
            scope.chat("What is my cat called?", budget=10)
        assert caught.value.needed > 10
        for text in ("", "  \n", "a\x00b", "\ud800"):
            for verb in (scope.chat, scope.add, scope.context, scope.search):
                with pytest.raises(InvalidInputError):
                    verb(text)
        assert memory.namespaces() == []
    with opened(path) as memory, pytest.raises(ConfigError, match="chat needs an LLM"):
        memory.namespace("a").chat("Hello?")


def test_the_window_bounds_prompt_and_reply_together(path):
    llm = ScriptedLLM(["ok"], context_window=400)
    with Memory.open(path, llm=llm, embedder="hash", budget=5000, reply_tokens=100) as memory:
        scope = memory.namespace("a")
        for fact in FACTS * 20:
            scope.add(fact)
        reply = scope.chat("What is my cat called?")
        assert reply.trace.account.limit == 300
        assert llm.count_tokens(llm.calls[0].messages) == reply.trace.account.total <= 300


def test_an_approximate_count_is_said_in_the_trace(path):
    with opened(path, tokenizer="some-unknown-model") as memory:
        memory.namespace("a").add("hello")
        context = memory.namespace("a").context("hello?")
        assert not context.account.exact
        assert "approximation" in context.trace.notes[0]


def test_what_a_model_says_of_itself_is_in_the_trace(path):
    class Modest(ScriptedLLM):
        notes = ("the context window is assumed",)

    with opened(path, Modest(["ok"])) as memory:
        assert memory.namespace("a").chat("hello?").trace.notes == ("the context window is assumed",)


def test_the_async_verbs_do_the_same(path):
    async def talk():
        async with AsyncMemory.open(path, llm=ScriptedLLM(lambda m: "one two three"), embedder="hash") as memory:
            scope = memory.namespace("a").session("s")
            await scope.add("My cat is called Miso.")
            stream = scope.stream("What is my cat called?")
            pieces = [piece async for piece in stream]
            assert "".join(pieces) == stream.reply.text == "one two three"
            reply = await scope.chat("Again?")
            context = await scope.context("What is my cat called?")
            return reply, context, await scope.history(), await memory.namespaces()

    reply, context, history, namespaces = asyncio.run(talk())
    assert reply.trace.outcome is Outcome.ANSWERED
    assert [s.role for s in history] == ["user", "user", "assistant", "user", "assistant"]
    assert "Miso" in str(context.messages)
    assert namespaces == [("a",)]


def test_a_cancelled_async_turn_keeps_what_was_said(path):
    async def talk():
        memory = await AsyncMemory.open(path, llm=ScriptedLLM(["one two three"]), embedder="hash")
        scope = memory.namespace("a")
        stream = scope.stream("Count.")
        async for _ in stream:
            break
        await stream.aclose()
        history = await scope.history()
        await memory.close()
        return history

    history = asyncio.run(talk())
    assert history[-1].metadata == {"outcome": "interrupted"}
