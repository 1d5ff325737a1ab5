"""What callers with a prompt of their own use: a context around a conversation, and records looked up and replaced."""

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_os import AsyncMemory, BudgetError, ConfigError, InvalidInputError, Memory, NewSegment, UnknownNameError
from memory_os.adapters.tokenizers import TiktokenCounter
from memory_os.pack import MARKER
from memory_os.types import Action, Conversation

ASKED = "What is my cat called?"


@pytest.fixture
def memory(tmp_path) -> Iterator[Memory]:
    with Memory.open(tmp_path / "memory.db", embedder="hash", tokenizer="gpt-4") as opened:
        yield opened


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Iterator[Memory]:
    path = tmp_path_factory.mktemp("many") / "memory.db"
    with Memory.open(path, embedder="hash", tokenizer="gpt-4") as opened:
        for n in range(40):
            words = f"My cat number {n} is called Miso {n}. " + "It purrs. " * (n % 9)
            opened.namespace("a").session("old").add(words)
        yield opened


ROLES = ("user", "assistant", "tool")
message = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": st.text("ab c\n", max_size=90)})
messages = st.lists(message, max_size=5)


@given(system=st.text("xy z", max_size=90), before=messages, after=messages, budget=st.integers(1, 900))
def test_the_callers_prompt_is_counted_to_the_token(many, system, before, after, budget):
    conversation = Conversation(system, tuple(before), tuple(after))
    counter = TiktokenCounter("gpt-4")
    own = [*([{"role": "system", "content": system}] if system else []), *before]
    plain = counter.count_tokens([*own, {"role": "user", "content": ASKED}, *after])
    if plain > budget:
        with pytest.raises(BudgetError):
            many.namespace("a").context(ASKED, budget=budget, conversation=conversation)
        return
    context = many.namespace("a").context(ASKED, budget=budget, conversation=conversation)
    asked = {"role": "user", "content": f"{context.text}\n\n{ASKED}" if context.text else ASKED}
    assert context.messages == (*own, asked, *after)
    account = context.account
    assert counter.count_tokens(context.messages) == account.total == context.n_tokens <= budget
    assert account.system + account.query + account.flash + account.activated == account.total
    assert account.flash == plain - counter.count_tokens([*own[: bool(system)], {"role": "user", "content": ASKED}])


@given(tokens=st.integers(1, 600), budget=st.none() | st.integers(40, 600))
def test_memory_keeps_to_its_own_limit(many, tokens, budget):
    context = many.namespace("a").context(ASKED, memory_tokens=tokens, budget=budget)
    assert context.account.activated <= tokens
    if budget:
        assert context.n_tokens <= budget
    elif tokens > 100:
        assert context.text


def test_what_the_conversation_shows_is_not_recalled(memory):
    scope = memory.namespace("a")
    first = scope.session("s").add("My cat is called Miso.")
    scope.add_many([NewSegment("My cat Miso is grey.", "s", key="k")])
    third = scope.session("old").add("My cat was called Momo before.")
    for stored in ({first.id, "k"}, {first.id, "k", "nonesuch", third.id}):
        context = scope.session("s").context(ASKED, conversation=Conversation(stored=frozenset(stored)))
        assert {s.id for s in context.segments} == {third.id} - stored
        assert set(context.trace.flash) == {s.id for s in scope.history(9)} & (stored | {scope.segment(2).id})
        assert not {entry.segment_id for entry in context.ledger} & set(context.trace.flash)


def test_flash_memory_and_system_prompt_are_the_callers(memory):
    scope = memory.namespace("a").session("s")
    scope.add("Hello.")
    context = scope.context(ASKED, conversation=Conversation("Be brief."))
    assert [message["role"] for message in context.messages] == ["system", "user"]
    assert context.messages[0]["content"] == "Be brief."
    assert scope.context(ASKED, conversation=Conversation()).messages[0]["role"] == "user"


def test_what_is_shown_of_a_segment(many):
    for budget in range(60, 400, 20):
        context = many.namespace("a").context(ASKED, budget=budget)
        assert len(context.shown) == len(context.segments)
        entries = {entry.segment_id: entry for entry in context.ledger}
        for segment, text in zip(context.segments, context.shown, strict=True):
            assert text in context.text
            trimmed = entries[segment.id].action is Action.TRIMMED
            assert text.endswith(MARKER) if trimmed else text == segment.text


def test_a_stored_question_and_its_reply(memory):
    scope = memory.namespace("a").session("s")
    asked = scope.add(ASKED)
    context = scope.context(ASKED, asked=asked)
    assert asked.id not in {entry.segment_id for entry in context.ledger}
    assert scope.why()[0] == context.trace
    reply = scope.add("Miso.", role="assistant")
    trace = scope.answered(asked.seq, reply.id)
    assert scope.why()[0] == trace
    assert (trace.query_id, trace.reply_id, trace.outcome) == (asked.id, reply.id, "answered")
    assert scope.confirm(answer=None).confirmation.answer == "Miso."
    for turn, said in ((99, reply.id), (asked.id, "nonesuch")):
        with pytest.raises(UnknownNameError):
            scope.answered(turn, said)


def test_what_was_said_after_the_question_is_not_seen(memory):
    scope = memory.namespace("a").session("s")
    asked, later = scope.add(ASKED), scope.add("My cat is called Miso.", role="assistant")
    context = scope.context(ASKED, asked=asked, conversation=Conversation(stored=frozenset({later.id})))
    assert context.trace.flash == ()
    assert context.segments == ()


def test_cached_memory_cannot_enter_anothers_prompt(tmp_path):
    with (
        Memory.open(tmp_path / "m.db", llm="smollm2", embedder="hash", controller="longmem-free") as memory,
        pytest.raises(ConfigError, match="longmem-free"),
    ):
        memory.namespace("a").context("x", conversation=Conversation())


# Records looked up, replaced, and found by embedding alone.


def test_records_are_looked_up_by_id_or_key(memory):
    scope = memory.namespace("a")
    [kept] = scope.add_many([NewSegment("text", "s", key="k")])
    assert scope.lookup([kept.id, "k", "nonesuch", "k"]) == {kept.id: kept, "k": kept}
    assert memory.namespace("b").lookup([kept.id, "k"]) == {}


def test_replacing_changes_what_differs_and_only_that(memory):
    scope = memory.namespace("a")
    one, two = scope.replace_many([NewSegment("one", "s", key="1"), NewSegment("two", "s", key="2")])
    again = scope.replace_many([NewSegment("two", "s", key="2"), NewSegment("ONE", "s", key="1")])
    assert again[0] == two
    assert (again[1].text, again[1].seq) == ("ONE", 3)
    assert scope.lookup([one.id]) == {}
    assert memory.namespace("b").replace_many([NewSegment("b", "s", key="1")])[0].text == "b"
    assert [s.text for s in scope.history(9)] == ["two", "ONE"]
    assert scope.stats()["vectors"] == scope.stats()["segments"] == 2
    changed = scope.replace_many([NewSegment("two", "s", key="2", metadata={"page": 1})])
    assert changed[0].metadata == {"page": 1}
    assert scope.replace_many([]) == []


@pytest.mark.parametrize(
    "wrong",
    [
        NewSegment("text", "s"),
        NewSegment("", "s", key="2"),
        NewSegment("x", "s", key="2", metadata={"x": float("nan")}),
    ],
)
def test_a_bad_record_replaces_nothing(memory, wrong):
    scope = memory.namespace("a")
    scope.replace_many([NewSegment("one", "s", key="1")])
    with pytest.raises(InvalidInputError):
        scope.replace_many([NewSegment("other", "s", key="1"), wrong])
    assert [s.text for s in scope.history(9)] == ["one"]


def test_a_crash_while_replacing_loses_nothing(memory, monkeypatch):
    scope = memory.namespace("a")
    scope.replace_many([NewSegment("one", "s", key="1")])
    store = memory.parts.store
    monkeypatch.setattr(store, "_insert", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scope.replace_many([NewSegment("other", "s", key="1")])
    assert [s.text for s in scope.history(9)] == ["one"]
    assert scope.stats()["vectors"] == 1


@given(data=st.data())
def test_nearest_is_what_a_search_of_everything_finds(many, data):
    scope = many.namespace("a")
    k = data.draw(st.integers(1, 50))
    modulus = data.draw(st.integers(1, 7))
    query = data.draw(st.sampled_from([ASKED, "It purrs.", "number 7"]))
    found = scope.nearest(query, k=k, where=lambda segment: segment.seq % modulus == 0)
    embedder = many.parts.embedder
    everything = [s for s in scope.history(999) if s.seq % modulus == 0]
    cosines = embedder.embed_documents([s.text for s in everything]) @ embedder.embed_query(query)
    best = np.lexsort(([s.seq for s in everything], -np.round(cosines, 6)))[:k]
    assert [round(hit.score, 5) for hit in found] == [round(float(cosines[n]), 5) for n in best]
    assert len({hit.segment.id for hit in found}) == len(found) == min(k, len(everything))


def test_nearest_refuses_what_is_no_query(memory):
    scope = memory.namespace("a")
    assert scope.nearest("anything") == []
    for wrong in ([1.0, 2.0], [float("inf")] * 64):
        with pytest.raises(InvalidInputError, match="64 finite numbers"):
            scope.nearest(wrong)
    with pytest.raises(ConfigError):
        scope.nearest("x", k=0)
    with pytest.raises(InvalidInputError):
        scope.nearest(" ")


def test_the_same_verbs_for_asyncio(tmp_path):
    async def use():
        async with AsyncMemory.open(tmp_path / "memory.db", embedder="hash") as memory:
            scope = memory.namespace("a").session("s")
            await scope.replace_many([NewSegment("one", "s", key="1")])
            asked = await scope.add("two?")
            await scope.context("two?", asked=asked, conversation=Conversation())
            reply = await scope.add("three", role="assistant")
            await scope.answered(asked.id, reply.id)
            return await scope.lookup(["1"]), await scope.nearest("one", k=1)

    known, [hit] = asyncio.run(use())
    assert known["1"] == hit.segment
