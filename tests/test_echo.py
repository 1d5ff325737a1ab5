"""Memory does not fill up with its own echoes: what a reply repeats is marked, and recall offers the original."""

import re
from collections import Counter
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_os import InvalidInputError, Memory, NewSegment
from memory_os.adapters.scripted import HashEmbedder, ScriptedLLM
from memory_os.echo import MOSTLY, derived, repeated_by
from memory_os.pack import CLOSE, OPEN
from memory_os.types import Action, Reason, Segment

FACTS = [
    "I adopted a grey cat called Miso in the second week of March.",
    "My sister Ana moved to Oslo and works there at the harbour office.",
    "The blue key to the boat house hangs behind the bread bin.",
    "We planted three apple trees along the garden wall last autumn.",
    "我在三月的第二个星期收养了一只叫味噌的灰猫。",
]  # fmt: skip
QUESTIONS = [
    "What is my grey cat called, and when did I adopt it?", "Where does my sister Ana work?",
    "Where is the blue key to the boat house?", "Which trees did we plant along the garden wall?",
    "我收养了什么猫？",
]  # fmt: skip
THINGS = "lamp piano mirror carpet bicycle barrel kettle globe ladder statue canoe drum stove clock sofa".split()
NAMES = "Bram Cleo Dina Egon Fara Gido Hana Ivor Jule Kaja Lino Mira Nero Olga Pavo".split()
FACTS += [
    f"{name} bought the {thing} from a man in Bergen and keeps it upstairs now."
    for name, thing in zip(NAMES, THINGS, strict=True)
]
QUESTIONS += [f"From whom did {name} buy the {thing}?" for name, thing in zip(NAMES, THINGS, strict=True)]


def lines_of(prompt: str) -> list[str]:
    """The texts in the fence, without who said them."""
    fenced = prompt.partition(OPEN)[2].partition(CLOSE)[0]
    return [text for line in fenced.splitlines() if not line.startswith("[") and (text := line.partition(": ")[2])]


def verbatim(prompt):
    return "\n".join(lines_of(prompt)) or "Well."


def with_the_fence(prompt):
    start, end = prompt.find(OPEN), prompt.find(CLOSE)
    return f"Here is what I know.\n{prompt[start : end + len(CLOSE)]}" if start >= 0 else "Well."


def a_sentence(prompt):
    return (lines_of(prompt) or ["Well."])[0].upper()


def quoted(prompt):
    return f"You once told me: “{(lines_of(prompt) or ['Well.'])[-1]}” — isn't that so?"


def among_others(prompt):
    said = (lines_of(prompt) or ["Well."])[0]
    return f"There is a great deal to be said about that, and I could go on for hours about it. {said} But I shall not."


STYLES = [verbatim, with_the_fence, a_sentence, quoted, among_others]


def spans_of(text: str) -> list[str]:
    """What must not come back unmarked: each fact, as its letters."""
    return [letters for fact in FACTS if (letters := plain(fact)) in plain(text)]


def plain(text: str) -> str:
    return re.sub(r"\W", "", text).casefold()


def talk(path, n: int, styles=STYLES, controller: str = "auto") -> tuple[list, Counter, Memory]:
    """``(replies, how often each fact stood in a context, memory)`` of ``n`` turns with a model that repeats."""
    turn = iter(range(10**6))
    llm = ScriptedLLM(lambda messages: styles[next(turn) % len(styles)](messages[-1]["content"]))
    memory = Memory.open(
        path / "memory.db", llm=llm, embedder="hash", controller=controller, budget=2000, flash_turns=4
    )
    alice = memory.namespace("alice")
    for fact in FACTS:
        alice.session("told").add(fact)
    seen: Counter[str] = Counter()
    for i in range(n):
        reply = alice.session(f"s{i // 10}").chat(QUESTIONS[i % len(QUESTIONS)])
        assert reply.context.account.total <= 2000
        seen.update({fact for fact in FACTS for segment in reply.context.segments if segment.text == fact})
    replies = [segment for segment in alice.history(10**4) if segment.role == "assistant"]
    assert len(replies) == n  # nothing is dropped from the record
    return replies, seen, memory


def unmarked(replies) -> list[str]:
    """Replies with a fact in them that does not lie in a part that is marked."""
    found = []
    for reply in replies:
        rest = list(reply.text)
        for part in reply.metadata.get("derived", {}).get("parts", ()):
            start, end = part["span"]
            rest[start:end] = "\x00" * (end - start)
        if spans_of("".join(rest)):
            found.append(reply.text)
    return found


def test_in_100_turns_no_injected_span_is_stored_as_new_memory(tmp_path):
    replies, seen, memory = talk(tmp_path, 100)
    with memory:
        repeating = [reply for reply in replies if spans_of(reply.text)]
        assert len(repeating) >= 75
        assert unmarked(replies) == []
        alice = memory.namespace("alice")
        originals = {segment.text: segment.id for segment in alice.session("told").history()}
        # all marks lead back to an original, where they name another reply over that one
        rests_on = {id_: {id_} for id_ in originals.values()}
        for reply in replies:
            parts = reply.metadata.get("derived", {}).get("parts", ())
            rests_on[reply.id] = set().union(*(rests_on.get(id_, set()) for part in parts for id_ in part["of"]))
        assert all(rests_on[reply.id] for reply in repeating)
        # and each question still finds what it is about, while no echo stands in a context
        for fact, question in zip(FACTS, QUESTIONS, strict=True):
            context = alice.context(question)
            assert fact in [segment.text for segment in context.segments]
            assert not [s for s in context.segments if repeated_by(s.metadata)]
            hits = [hit.segment for hit in alice.search(question, k=40)]
            assert not [hit for hit in hits if repeated_by(hit.metadata)]
        # what was left out is told
        echoes = [entry for entry in context.ledger if entry.reason is Reason.ECHO]
        assert echoes
        assert {entry.action for entry in echoes} == {Action.DROPPED}
        assert len({entry.segment_id for entry in context.ledger}) == len(context.ledger)
    assert all(seen[fact] >= 5 for fact in FACTS)  # as often as it was asked for


def test_marks_of_a_very_long_reply_fit_into_its_metadata(tmp_path):
    with Memory.open(tmp_path / "memory.db", embedder="hash", tokenizer="gpt-4") as memory:
        alice = memory.namespace("alice")
        told = alice.add(FACTS[0])
        context = alice.context(QUESTIONS[0])
        reply = " ".join(f"{n}: {FACTS[0]}" for n in range(3000))
        said = alice.add(reply, role="assistant", reply_to=context)
        assert said.metadata["derived"]["parts"] == [{"span": [3, len(reply) - 1], "of": [told.id]}]
        assert said.metadata["derived"]["share"] == pytest.approx(13 / 14, abs=0.001)


def test_one_word_a_thousand_times_is_marked_as_well():
    segment = Segment("ha", 1, ("n",), "s", "user", None, "turn", "ha " * 300_000, datetime.now(UTC), 1)
    [part] = derived("Well: " + "ha " * 2000, [(segment, segment.text)])["derived"]["parts"]
    assert part["of"] == ["ha"]


def test_in_a_loop_of_the_callers_own_replies_are_marked_too(tmp_path):
    with Memory.open(tmp_path / "memory.db", embedder="hash", tokenizer="gpt-4") as memory:
        alice = memory.namespace("alice")
        told = alice.session("told").add(FACTS[0])
        chat = alice.session("today")
        context = chat.context(QUESTIONS[0], record=True)
        with pytest.raises(InvalidInputError, match='role="assistant"'):
            chat.add(FACTS[0], reply_to=context)
        said = chat.add(f"You said: {FACTS[0]}", role="assistant", metadata={"model": "m"}, reply_to=context)
        assert (said.metadata["model"], repeated_by(said.metadata)) == ("m", (told.id,))
        trace, _ = chat.why(said.id)
        assert (trace.id, trace.reply_id, trace.outcome) == (context.trace.id, said.id, "answered")
        assert said.id not in [segment.id for segment in alice.context(QUESTIONS[0]).segments]
        # a context that is not recorded has no trace to tell, and the marks are made all the same
        unrecorded = chat.add(FACTS[0], role="assistant", reply_to=alice.context(QUESTIONS[0]))
        assert repeated_by(unrecorded.metadata) == (told.id,)
        assert len(list(memory.parts.store.traces(alice.labels))) == 1


def test_without_the_guard_memory_does_fill_up(tmp_path, monkeypatch):
    monkeypatch.setattr("memory_os.turn.derived", lambda *_: {})
    replies, _, memory = talk(tmp_path, 30)
    with memory:
        assert len(unmarked(replies)) > 20
        contexts = [memory.namespace("alice").context(question) for question in QUESTIONS]
    assert any(s.role == "assistant" and spans_of(s.text) for context in contexts for s in context.segments)


@pytest.mark.parametrize("controller", ["recency", "scm"])
def test_other_controllers_are_not_offered_echoes_either(tmp_path, controller):
    replies, _, memory = talk(tmp_path, 12, [verbatim], controller)
    with memory:
        context = memory.namespace("alice").context(QUESTIONS[0])
    assert any(repeated_by(reply.metadata) for reply in replies)
    assert not [s for s in context.segments if repeated_by(s.metadata)]


def test_an_echo_whose_original_is_forgotten_is_memory_again(tmp_path):
    llm = ScriptedLLM([FACTS[0]])
    with Memory.open(tmp_path / "m.db", llm=llm, embedder="hash") as memory:
        alice = memory.namespace("alice")
        original = alice.session("a").add(FACTS[0])
        echo = alice.session("b").chat(QUESTIONS[0]).segment
        assert repeated_by(echo.metadata) == (original.id,)
        assert echo.id not in [entry.segment_id for entry in alice.context(QUESTIONS[0]).ledger if entry.form]
        alice.forget(original.id)
        assert echo.id in [s.id for s in alice.context(QUESTIONS[0]).segments]


def test_it_survives_an_export_and_an_import(tmp_path):
    _, _, memory = talk(tmp_path, 5)
    with memory:
        alice = memory.namespace("alice")
        alice.export(tmp_path / "e.jsonl")
        copy = memory.namespace("copy")
        copy.import_(tmp_path / "e.jsonl")
        for question in QUESTIONS:
            texts = [[s.text for s in scope.context(question).segments] for scope in (alice, copy)]
            assert texts[0] == texts[1]


def test_recall_of_a_memory_without_echoes_is_as_before(tmp_path, shared_data, monkeypatch):
    """The ranking is the scores', to the last place, and no segment is left out."""
    import numpy as np

    from memory_os.recall import worth

    with Memory.open(tmp_path / "m.db", embedder="hash") as memory:
        scope = memory.namespace("locomo")
        scope.ingest(shared_data / "locomo_dev.json", pick="conv-41", format="chat")
        recall = memory.parts.recall
        for query in ("When did Maria donate her car?", "What did they say about the shelter?", "yes"):
            scored = recall.score(scope.labels, query, k=40)
            order = worth(scored.scores, np.exp(scored.signals["length"]))
            expected = [scored.ids[i] for i in np.lexsort((scored.rows, -order))[:40]]
            found = recall(scope.labels, query, k=40, per_token=True)
            assert [hit.segment.id for hit in found.hits] == expected
            assert found.echoes == ()


# -- what counts -------------------------------------------------------------------------------------------------------


def shown(*texts):
    at = datetime(2023, 5, 8, tzinfo=UTC)
    return [
        (Segment(f"id-{n}", n, ("a",), "s", "user", None, "turn", text, at, 1), text)
        for n, text in enumerate(texts, start=1)
    ]


@pytest.mark.parametrize(
    ("reply", "parts"),
    [
        ("Your cat is called Miso.", []),  # says the same in other words
        ("I adopted a grey cat.", []),  # five words of a longer sentence
        ("she said i adopted a GREY cat, called: miso in spring", ["i adopted a GREY cat, called: miso in"]),
        ("Yes. She is two.", []),  # three words are no sentence
        ("Well, she sleeps all day. Good.", ["she sleeps all day"]),
        ("灰猫叫味噌。", []),
        ("是的，收养了一只叫味噌的灰色的猫。", []),
        ("好：我在三月的第二个星期收养了一只猫。", ["我在三月的第二个星期收养了一只"]),
        ("I ado\u200bpted a grey cat called Ｍｉｓｏ in the", ["I ado\u200bpted a grey cat called Ｍｉｓｏ in the"]),
        (f"{OPEN}\n[2023-05-08]\nAna: Miso.\n{CLOSE} So?", [f"{OPEN}\n[2023-05-08]\nAna: Miso.\n{CLOSE}"]),
        (f"{OPEN}\nAna: Mis", [f"{OPEN}\nAna: Mis"]),
        ("Well. Miso is two! Yes.", ["Miso is two"]),  # three words are, where nothing else was said
        ("Well, Miso is two! Yes.", []),
    ],
)
def test_what_counts_as_repeated(reply, parts):
    told = derived(reply, shown(FACTS[0], "She is two. She sleeps all day.", FACTS[4], "Miso.", "miso is two"))
    found = [reply[slice(*part["span"])] for part in told.get("derived", {}).get("parts", ())]
    assert found == parts


def test_the_original_is_the_first_that_says_it_and_a_share_tells_how_much():
    told = derived(f"Listen: {FACTS[0]}", shown("Hello.", FACTS[0], FACTS[0]))["derived"]
    assert told == {"share": round(13 / 14, 3), "parts": [{"span": [8, 68], "of": ["id-2"]}]}
    assert repeated_by({"derived": told}) == ("id-2",)
    assert repeated_by({"derived": {**told, "share": MOSTLY - 0.01}}) == ()


@pytest.mark.parametrize(
    ("reply", "adds"),
    [
        (f"{FACTS[0]} Her vet is Dr Bo.", True),
        (f"Her vet is Dr Bo. {FACTS[0]}", True),
        (f"{FACTS[0]} That is no longer so.", True),
        (f"{FACTS[4]}它的兽医是王医生。", True),
        (f"You once told me: “{FACTS[0]}” — isn't that so?", False),
        (f"{FACTS[0]} Let me know if you need anything else!", False),
        (f"我记得你说过：{FACTS[4]}", False),
        (f"{FACTS[0]} Vet: Bo.", False),  # three words are no statement
        (FACTS[0], False),
    ],
)
def test_what_adds_a_statement_of_its_own_is_no_echo(reply, adds):
    told = derived(reply, shown(FACTS[0], FACTS[4]))["derived"]
    assert told["share"] >= MOSTLY
    assert (told.get("adds", False), repeated_by({"derived": told}) == ()) == (adds, adds)
    told.pop("adds", None)  # as marks were before
    assert repeated_by({"derived": told}) != ()


def test_a_new_fact_beside_a_repeated_one_is_recalled(tmp_path):
    llm = ScriptedLLM([f"{FACTS[0]} Her vet is Dr Bo."])
    with Memory.open(tmp_path / "m.db", llm=llm, embedder="hash") as memory:
        alice = memory.namespace("alice")
        alice.session("a").add(FACTS[0])
        said = alice.session("b").chat(QUESTIONS[0]).segment
        assert said.metadata["derived"]["adds"] is True
        assert "Dr Bo" in alice.context("Who is the vet of Miso?").text
        assert said.id in [hit.segment.id for hit in alice.search("Who is the vet of Miso?")]


def test_short_memories_do_not_fill_up_memory_either(tmp_path):
    llm = ScriptedLLM(lambda _: "Miso is grey.")
    with Memory.open(tmp_path / "m.db", llm=llm, embedder="hash") as memory:
        alice = memory.namespace("alice")
        told = alice.session("told").add("Miso is grey.")
        replies = [alice.session(f"s{i}").chat("What colour is Miso?").segment for i in range(10)]
        assert all(repeated_by(reply.metadata) for reply in replies)
        assert replies[0].metadata["derived"]["parts"][0]["of"] == [told.id]
        assert alice.context("What colour is Miso?").text.count("Miso is grey") == 1


def test_a_fence_that_a_model_made_up_is_no_copy():
    invented = f"{OPEN}\n[2023-05-08]\nAna: Miso is blue now.\n{CLOSE}"
    assert derived(invented, shown("Miso is grey.")) == {}
    mixed = f"{OPEN}\n[2023-05-08]\nAna: Miso.\nAna: Her vet is called Bo.\n{CLOSE}"
    assert derived(mixed, shown("Miso.")) == {}
    copied = f"{OPEN}\n[2023-05-08]\nAna: Miso.\nBo (summary): Two lines.\n I know.\n{CLOSE}"
    told = derived(copied, shown("Miso.", "Two lines.\nI know."))["derived"]
    assert told["share"] == 1
    assert told["parts"][0] == {"span": [0, len(copied)], "of": ["id-1", "id-2"]}


def test_marking_takes_linear_time():
    """With quadratic time it does not come back."""
    for reply in ("<memory " * 50_000, "<memory>" * 50_000, "<" + " " * 100_000, "< " * 50_000, "a: " * 50_000):
        assert derived(reply, shown("x")) == {}
        assert derived(f"<memory>{reply}", shown("x")) == {}


@pytest.mark.parametrize("told", [None, 1, "x", [], {}, {"share": "y"}, {"share": 1}, {"share": 1, "parts": [1]}])
def test_anything_may_stand_in_the_metadata_of_an_import(tmp_path, told):
    assert repeated_by({"derived": told}) == ()
    with Memory.open(tmp_path / "m.db", embedder="hash") as memory:
        alice = memory.namespace("alice")
        alice.add("The cat is grey.", role="assistant", metadata={"derived": told})
        assert len(alice.search("cat")) == 1


def test_two_segments_cannot_hide_each_other(tmp_path):
    def hides(own, other):
        metadata = {"derived": {"share": 1, "parts": [{"span": [0, 1], "of": [other]}]}}
        return NewSegment(f"The cat {own} is grey.", "s", role="assistant", metadata=metadata, id=own)

    with Memory.open(tmp_path / "m.db", embedder="hash") as memory:
        alice = memory.namespace("alice")
        alice.add_many([hides("a", "b"), hides("b", "a"), hides("c", "c")])
        assert {s.id for s in alice.context("cat").segments} == {"a", "c"}


@given(st.text(max_size=80), st.lists(st.text(max_size=60), max_size=3))
def test_parts_lie_in_the_reply_in_order(reply, texts):
    told = derived(reply, shown(*texts)).get("derived")
    if told:
        assert 0 <= told["share"] <= 1
        spans = [part["span"] for part in told["parts"]]
        assert spans == sorted(spans)
        assert all(0 <= start < end <= len(reply) for start, end in spans)


# -- agents and chat models --------------------------------------------------------------------------------------------


def content_of(message) -> str:
    return message.content if isinstance(message.content, str) else str(message.text)


def test_replies_of_an_agent_and_of_a_chat_model_are_marked_too(tmp_path, scripted_chat):
    pytest.importorskip("langchain")
    from langchain.agents import create_agent

    from memory_os.adapters.chat_model import MemoryChatModel
    from memory_os.adapters.middleware import MemoryMiddleware

    turn = iter(range(100))
    model = scripted_chat(replies=lambda messages: STYLES[next(turn) % 4](content_of(messages[-1])))
    with Memory.open(tmp_path / "m.db", embedder=HashEmbedder(), budget=700) as memory:
        alice = memory.namespace("alice")
        for fact in FACTS:
            alice.session("told").add(fact)
        agent = create_agent(model, middleware=[MemoryMiddleware(memory, namespace=("alice",))])
        remembering = MemoryChatModel(model=model, memory=memory, namespace=("alice",))
        for i in range(12):
            question = QUESTIONS[i % len(QUESTIONS)]
            config = {"configurable": {"thread_id": f"t{i}"}}
            if i % 2:
                agent.invoke({"messages": [("user", question)]}, config)
            else:
                remembering.invoke(question, config)
        replies = [segment for segment in alice.history(1000) if segment.role == "assistant"]
        assert len(replies) == 12
        assert len([reply for reply in replies if spans_of(reply.text)]) > 8
        assert unmarked(replies) == []
