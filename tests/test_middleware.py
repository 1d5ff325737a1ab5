"""Memory in LangChain's agents, with real agents, checkpointers and middleware, and a scripted chat model."""

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain.agents import create_agent
from langchain.agents.middleware import (
    AgentMiddleware,
    HumanInTheLoopMiddleware,
    PIIMiddleware,
    SummarizationMiddleware,
    dynamic_prompt,
    hook_config,
)
from langchain.agents.structured_output import AutoStrategy, ToolStrategy
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import create_retriever_tool, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command
from pydantic import BaseModel

from memory_os import AsyncMemory, ConfigError, Memory, NamespaceError, ScmController, UnknownNameError
from memory_os.adapters.langchain import MemoryRetriever, memory_tools
from memory_os.adapters.langchain_messages import as_counted
from memory_os.adapters.middleware import MemoryMiddleware
from memory_os.adapters.scripted import HashEmbedder
from memory_os.adapters.tokenizers import TiktokenCounter

ALICE, BOB = ("acme", "alice"), ("acme", "bob")
TOLD = "My cat is called Miso."
ASKED = "What is my cat called?"
FENCE = "<memory "


@pytest.fixture
def memory(tmp_path) -> Iterator[Memory]:
    with Memory.open(tmp_path / "memory.db", embedder="hash") as opened:
        yield opened


def turns(memory, session, labels=ALICE):
    return [(s.role, s.text.strip()) for s in memory.namespace(*labels).session(session).history(99)]


def answer_from_memory(messages):
    return "It is called Miso." if any("Miso" in message.text for message in messages) else "I do not know."


def thread(name, **more):
    return {"configurable": {"thread_id": name, **more}}


def run(agent, query, mode, config):
    """The agent's last message, and what it streamed."""
    asked = {"messages": [HumanMessage(query)]}
    if mode == "sync":
        return agent.invoke(asked, config)["messages"][-1].text, None
    if mode == "async":
        return asyncio.run(agent.ainvoke(asked, config))["messages"][-1].text, None
    if mode == "stream":
        pieces = [piece.text for piece, _ in agent.stream(asked, config, stream_mode="messages")]
        return agent.get_state(config).values["messages"][-1].text, pieces

    async def read():
        return [piece.text async for piece, _ in agent.astream(asked, config, stream_mode="messages")]

    pieces = asyncio.run(read())
    return agent.get_state(config).values["messages"][-1].text, pieces


@pytest.mark.parametrize("mode", ["sync", "async", "stream", "astream"])
def test_a_fact_told_in_one_thread_is_used_in_another(memory, scripted_chat, mode):
    model = scripted_chat(replies=answer_from_memory)
    middleware = MemoryMiddleware(memory, namespace=ALICE)
    agent = create_agent(model, middleware=[middleware], checkpointer=InMemorySaver())
    run(agent, TOLD, mode, thread("1"))
    said, pieces = run(agent, ASKED, mode, thread("2"))
    assert said.strip() == "It is called Miso."
    if pieces is not None:
        assert "".join(pieces).strip() == "It is called Miso."
        assert len(pieces) > 3  # word by word, each once
    [[asked]] = [model.seen[-1]]
    assert asked.text.startswith(FENCE)
    assert asked.text.endswith(f"\n\n{ASKED}")
    # and the control: another user's agent knows nothing
    other = create_agent(model, middleware=[MemoryMiddleware(memory, namespace=BOB)], checkpointer=InMemorySaver())
    assert run(other, ASKED, mode, thread("3"))[0].strip() == "I do not know."


def test_nothing_that_was_put_in_is_in_the_state_or_stored(memory, scripted_chat):
    model = scripted_chat(replies=answer_from_memory)
    agent = create_agent(
        model,
        middleware=[MemoryMiddleware(memory, namespace=ALICE)],
        checkpointer=InMemorySaver(),
        system_prompt="Be brief.",
    )
    for n in range(5):
        agent.invoke({"messages": [HumanMessage(TOLD)]}, thread(f"told {n}"))
        agent.invoke({"messages": [HumanMessage(ASKED)]}, thread("asked"))
    for state in agent.get_state_history(thread("asked")):
        assert FENCE not in str(state)
    stored = memory.namespace(*ALICE).history(999)
    assert len(stored) == 20
    assert not [segment for segment in stored if FENCE in segment.text]
    assert model.seen[-1][0] == SystemMessage("Be brief.")
    # what the thread shows anyway is not recalled again
    assert sum(FENCE in message.text for message in model.seen[-1]) == 1
    assert model.seen[-1][-1].text.count(ASKED) == 1


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"It is sunny in {city}."


def wants(name, id_="1", says="", args=None, **more):
    return AIMessage(says, tool_calls=[{"name": name, "args": args or more, "id": id_}])


@pytest.mark.parametrize("mode", ["sync", "async", "stream", "astream"])
def test_tool_calls_and_their_results_are_stored(memory, scripted_chat, mode):
    memory.namespace(*ALICE).session("before").add("I live in Lyon, and ask for the weather there.")
    model = scripted_chat(replies=[wants("weather", city="Lyon", says="Let me see."), "Sunny."])
    agent = create_agent(
        model,
        [weather],
        middleware=[MemoryMiddleware(memory, namespace=ALICE)],
        checkpointer=InMemorySaver(),
        system_prompt="Be brief.",
    )
    run(agent, "What is the weather at home?", mode, thread("1"))
    assert turns(memory, "1") == [
        ("user", "What is the weather at home?"),
        ("assistant", f'Let me see.{" " * ("stream" in mode)}\nweather({{"city": "Lyon"}})'),
        ("tool", "It is sunny in Lyon."),
        ("assistant", "Sunny."),
    ]  # fmt: skip
    asked, called, result, replied = memory.namespace(*ALICE).session("1").history(4)
    assert called.metadata["tool_calls"] == [{"name": "weather", "id": "1"}]
    assert (result.speaker, result.metadata["tool_call_id"]) == ("weather", "1")
    first, second = model.seen
    assert first == second[:2]  # one turn, one memory: prefix caches survive
    assert [message.type for message in second] == ["system", "human", "ai", "tool"]
    assert first[0] == SystemMessage("Be brief.")
    assert "Lyon" in first[1].text
    trace, _ = memory.namespace(*ALICE).why()
    assert (trace.query_id, trace.reply_id, trace.outcome) == (asked.id, replied.id, "answered")
    assert len(list(memory.parts.store.traces(ALICE))) == 1


def test_a_turn_that_waits_for_a_person_is_stored_whole(memory, scripted_chat):
    model = scripted_chat(replies=[wants("weather", city="Lyon"), "Sunny."])
    agent = create_agent(
        model,
        [weather],
        middleware=[
            MemoryMiddleware(memory, namespace=ALICE),
            HumanInTheLoopMiddleware(interrupt_on={"weather": True}),
        ],
        checkpointer=InMemorySaver(),
    )
    waiting = agent.invoke({"messages": [HumanMessage("How is the weather?")]}, thread("1"))
    assert waiting["__interrupt__"]
    assert turns(memory, "1") == [("user", "How is the weather?")]
    edited = {"type": "edit", "edited_action": {"name": "weather", "args": {"city": "Nice"}}}
    agent.invoke(Command(resume={"decisions": [edited]}), thread("1"))
    asked, called, result, replied = turns(memory, "1")  # LangChain leaves the call as it was, and tells of the change
    assert [asked, called, replied] == [
        ("user", "How is the weather?"), ("assistant", 'weather({"city": "Lyon"})'), ("assistant", "Sunny."),
    ]  # fmt: skip
    assert result[0] == "tool"
    assert "It is sunny in Nice." in result[1]


def test_the_question_is_stored_before_the_model_is_called(memory, scripted_chat):
    def look(messages):
        assert turns(memory, "1") == [("user", TOLD)]
        raise RuntimeError("down")

    agent = create_agent(scripted_chat(replies=look), middleware=[MemoryMiddleware(memory, namespace=ALICE)])
    with pytest.raises(RuntimeError, match="down"):
        agent.invoke({"messages": [HumanMessage(TOLD)]}, thread("1"))
    assert turns(memory, "1") == [("user", TOLD)]


def test_a_turn_that_is_tried_again_is_stored_once(memory, scripted_chat):
    saver, middleware = InMemorySaver(), MemoryMiddleware(memory, namespace=ALICE)
    failing = create_agent(scripted_chat(replies=[RuntimeError()]), middleware=[middleware], checkpointer=saver)
    with pytest.raises(RuntimeError):
        failing.invoke({"messages": [HumanMessage(TOLD)]}, thread("1"))
    agent = create_agent(scripted_chat(replies=["Noted.", "Hello."]), middleware=[middleware], checkpointer=saver)
    agent.invoke(None, thread("1"))
    agent.invoke({"messages": [HumanMessage("Hi")]}, thread("1"))
    assert turns(memory, "1") == [("user", TOLD), ("assistant", "Noted."), ("user", "Hi"), ("assistant", "Hello.")]


def test_a_forgotten_turn_does_not_come_back(memory, scripted_chat):
    agent = create_agent(
        scripted_chat(replies=answer_from_memory),
        middleware=[MemoryMiddleware(memory, namespace=ALICE)],
        checkpointer=InMemorySaver(),
    )
    agent.invoke({"messages": [HumanMessage(TOLD)]}, thread("1"))
    memory.namespace(*ALICE).forget(1, 2)
    agent.invoke({"messages": [HumanMessage("Hi")]}, thread("1"))
    assert [role for role, text in turns(memory, "1") if "Miso" in text] == ["assistant"]  # it read its own thread
    assert TOLD not in [text for _, text in turns(memory, "1")]


def test_messages_with_one_id_and_other_words_are_both_stored(memory, scripted_chat):
    agent = create_agent(scripted_chat(replies=["a", "b"]), middleware=[MemoryMiddleware(memory, namespace=ALICE)])
    for words in ("first", "second"):
        agent.invoke({"messages": [HumanMessage(words, id="1")]}, thread("1"))
    assert [text for role, text in turns(memory, "1") if role == "user"] == ["first", "second"]


def test_summarised_threads_lose_nothing_of_memory(memory, scripted_chat):
    model = scripted_chat(replies=lambda messages: f"Reply to {len(messages)}.")
    writer = scripted_chat(replies=lambda messages: "They talked.")
    for order in (0, 1):
        middleware = [MemoryMiddleware(memory, namespace=ALICE)]
        middleware.insert(order, SummarizationMiddleware(writer, trigger=("messages", 4), keep=("messages", 1)))
        agent = create_agent(model, middleware=middleware, checkpointer=InMemorySaver())
        said = [TOLD, *(f"Fact number {n}." for n in range(6)), ASKED]
        for words in said:
            agent.invoke({"messages": [HumanMessage(words)]}, thread(f"long {order}"))
        state = agent.get_state(thread(f"long {order}")).values["messages"]
        assert len(state) < 8  # it was summarised
        stored = turns(memory, f"long {order}")
        assert [text for role, text in stored if role == "user"] == said
        assert len(stored) == 16
        assert not [text for _, text in stored if "They talked." in text]
        assert TOLD in model.seen[-1][-1].text  # what is in the thread no longer is recalled


def test_a_long_turn_that_is_summarised_in_its_midst_is_stored_whole(memory, scripted_chat):
    steps = [wants("weather", str(n), city=f"city {n}") for n in range(6)]
    model = scripted_chat(replies=[*steps, "Done."])
    writer = scripted_chat(replies=lambda messages: "They talked.")
    agent = create_agent(
        model,
        [weather],
        middleware=[
            SummarizationMiddleware(writer, trigger=("messages", 4), keep=("messages", 2)),
            MemoryMiddleware(memory, namespace=ALICE),
        ],
        checkpointer=InMemorySaver(),
    )
    agent.invoke({"messages": [HumanMessage("Compare the weather.")]}, thread("1"))
    stored = turns(memory, "1")
    assert stored[0] == ("user", "Compare the weather.")
    assert [text for role, text in stored if role == "tool"] == [f"It is sunny in city {n}." for n in range(6)]
    assert len(stored) == 14
    assert stored[-1] == ("assistant", "Done.")


def test_what_other_middleware_redacts_is_not_stored(memory, scripted_chat):
    agent = create_agent(
        scripted_chat(replies=["Write to me@example.org"]),
        middleware=[
            PIIMiddleware("email", apply_to_output=True),
            MemoryMiddleware(memory, namespace=ALICE),
        ],
    )
    agent.invoke({"messages": [HumanMessage("I am ana@example.org")]}, thread("1"))
    assert turns(memory, "1") == [("user", "I am [REDACTED_EMAIL]"), ("assistant", "Write to [REDACTED_EMAIL]")]


def test_what_other_middleware_puts_in_is_not_stored(memory, scripted_chat):
    class Hint(AgentMiddleware):
        def wrap_model_call(self, request, handler):
            return handler(request.override(messages=[*request.messages, HumanMessage("hint", id="hint")]))

    agent = create_agent(scripted_chat(replies=["ok"]), middleware=[Hint(), MemoryMiddleware(memory, namespace=ALICE)])
    agent.invoke({"messages": [HumanMessage("Hi")]}, thread("1"))
    assert turns(memory, "1") == [("user", "Hi"), ("assistant", "ok")]


@settings(max_examples=40)
@given(
    window=st.integers(40, 1500),
    system=st.text("abc de", max_size=400),
    history=st.lists(st.text("fgh ij", min_size=1, max_size=200), max_size=6),
    n_tools=st.integers(0, 3),
    memory_tokens=st.integers(1, 2000),
)
def test_a_request_never_outgrows_the_window(many, scripted_chat, window, system, history, n_tools, memory_tokens):
    model = scripted_chat(replies=["ok"])
    tools = [weather, *memory_tools(many, namespace=ALICE)][:n_tools]
    middleware = MemoryMiddleware(
        many, namespace=ALICE, context_window=window, tokenizer="gpt-4", reply_tokens=30, memory_tokens=memory_tokens
    )
    agent = create_agent(model, tools, middleware=[middleware], system_prompt=system or None)
    said = [kind(text) for text, kind in zip(history, [HumanMessage, AIMessage] * 3, strict=False)]
    agent.invoke({"messages": [*said, HumanMessage(ASKED)]}, thread("1"))
    many.namespace(*ALICE).forget(session="1")  # the next example finds what this one found
    counter = TiktokenCounter("gpt-4")
    schemas = model.options[0].get("tools", [])

    def count(messages):
        roles = {"human": "user", "ai": "assistant", "system": "system"}
        return counter.count_tokens([{"role": roles[m.type], "content": m.text} for m in messages], schemas)

    sent = model.seen[0]
    plain = [*([SystemMessage(system)] if system else []), *said, HumanMessage(ASKED)]
    assert count(sent) <= max(window - 30, count(plain))
    assert count(sent) - count(plain) <= memory_tokens
    if [m.text for m in sent] != [m.text for m in plain]:
        assert count(sent) <= window - 30
        assert FENCE in sent[-1].text


def test_a_tool_loop_that_outgrows_the_window_is_shown_less_memory_and_then_none(many, scripted_chat):
    @tool
    def read(page: int) -> str:
        """Read a page."""
        return f"page {page} " * 30

    steps = [wants("read", str(n), page=n) for n in range(8)]
    model = scripted_chat(replies=[*steps, "Done."])
    middleware = MemoryMiddleware(many, namespace=ALICE, context_window=700, tokenizer="gpt-4", reply_tokens=20)
    agent = create_agent(model, [read], middleware=[middleware], system_prompt="Be brief.")
    agent.invoke({"messages": [HumanMessage(ASKED)]}, thread("loop"))
    many.namespace(*ALICE).forget(session="loop")
    counter = TiktokenCounter("gpt-4")
    lengths = []
    for sent, options in zip(model.seen, model.options, strict=True):
        memory_text = sent[1].text.removesuffix(ASKED)
        lengths.append(len(memory_text))
        if memory_text:
            assert counter.count_tokens([as_counted(message) for message in sent], options["tools"]) <= 680
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 0 == lengths[-1]
    assert len(set(lengths)) < len(lengths)  # it stays the same as long as it fits


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Iterator[Memory]:
    with Memory.open(tmp_path_factory.mktemp("many") / "memory.db", embedder="hash") as opened:
        for n in range(60):
            opened.namespace(*ALICE).session("old").add(
                f"My cat number {n} is called Miso {n}. " + "It purrs. " * (n % 7)
            )
        yield opened


def test_the_models_own_profile_and_limit_count(memory, scripted_chat):
    memory.namespace(*ALICE).session("old").add(TOLD)
    for window, fits in ((20, False), (2000, True)):
        model = scripted_chat(replies=["ok"], profile={"max_input_tokens": window})
        middleware = MemoryMiddleware(memory, namespace=ALICE, reply_tokens=10)
        create_agent(model, middleware=[middleware]).invoke({"messages": [HumanMessage(ASKED)]}, thread(str(window)))
        assert (FENCE in model.seen[0][0].text) is fits


def test_a_structured_reply(memory, scripted_chat):
    class Cat(BaseModel):
        """A cat."""

        name: str

    memory.namespace(*ALICE).session("old").add(TOLD)
    model = scripted_chat(replies=[wants("Cat", args={"name": "Miso"})])
    agent = create_agent(
        model, middleware=[MemoryMiddleware(memory, namespace=ALICE)], response_format=ToolStrategy(Cat)
    )
    assert agent.invoke({"messages": [HumanMessage(ASKED)]}, thread("1"))["structured_response"] == Cat(name="Miso")
    assert TOLD in model.seen[0][0].text


def test_the_namespace_of_the_run(memory, scripted_chat):
    model = scripted_chat(replies=answer_from_memory)
    agent = create_agent(model, middleware=[MemoryMiddleware(memory)], checkpointer=InMemorySaver())
    for mode in ("sync", "async"):
        run(agent, TOLD, mode, thread(f"{mode} 1", namespace=list(ALICE)))
        assert run(agent, ASKED, mode, thread(f"{mode} 2", namespace=list(ALICE)))[0] == "It is called Miso."
        assert run(agent, ASKED, mode, thread(f"{mode} 3", namespace=list(BOB)))[0] == "I do not know."
        with pytest.raises(NamespaceError, match="no namespace given"):
            run(agent, ASKED, mode, thread(f"{mode} 4"))
    assert turns(memory, "sync 3", BOB) == [("user", ASKED), ("assistant", "I do not know.")]


def test_a_session_may_be_named(memory, scripted_chat):
    middleware = MemoryMiddleware(memory, namespace=ALICE)
    agent = create_agent(scripted_chat(replies=["a", "b", "c"]), middleware=[middleware])
    agent.invoke({"messages": [HumanMessage("x")]}, {"configurable": {"session": "monday"}})
    agent.invoke({"messages": [HumanMessage("y")]})
    assert turns(memory, "monday") == [("user", "x"), ("assistant", "a")]
    assert turns(memory, "default") == [("user", "y"), ("assistant", "b")]
    pinned = MemoryMiddleware(memory, namespace=ALICE, session="s")
    create_agent(scripted_chat(replies=["c"]), middleware=[pinned]).invoke(
        {"messages": [HumanMessage("z")]}, thread("t")
    )
    assert turns(memory, "s") == [("user", "z"), ("assistant", "c")]


def test_an_async_memory(tmp_path, scripted_chat):
    async def use():
        async with AsyncMemory.open(tmp_path / "memory.db", embedder="hash") as memory:
            agent = create_agent(
                scripted_chat(replies=answer_from_memory), middleware=[MemoryMiddleware(memory, namespace=ALICE)]
            )
            await agent.ainvoke({"messages": [HumanMessage(TOLD)]}, thread("1"))
            return (await agent.ainvoke({"messages": [HumanMessage(ASKED)]}, thread("2")))["messages"][-1].text

    assert asyncio.run(use()) == "It is called Miso."


def test_threads_at_once_do_not_mix(memory, scripted_chat):
    def reply(messages):
        return messages[-1].text.rsplit(" ", 1)[-1]

    agent = create_agent(
        scripted_chat(replies=reply), middleware=[MemoryMiddleware(memory)], checkpointer=InMemorySaver()
    )

    async def talk(user):
        for n in range(3):
            config = thread(user, namespace=("acme", user))
            await agent.ainvoke({"messages": [HumanMessage(f"I am {user} and say {user}-{n}")]}, config)

    async def all_of_them():
        await asyncio.gather(*(talk(f"user{n}") for n in range(6)))

    asyncio.run(all_of_them())
    for n in range(6):
        said = turns(memory, f"user{n}", ("acme", f"user{n}"))
        assert [text for role, text in said if role == "assistant"] == [f"user{n}-{i}" for i in range(3)]
        assert not [text for _, text in said if "user" in text.replace(f"user{n}", "")]


@pytest.mark.parametrize("controller", ["auto", "recency", "scm", "alr2", ScmController(gate="free", k=2)])
def test_every_controller_of_text_decides_for_an_agent(tmp_path, scripted_chat, controller):
    with Memory.open(tmp_path / "memory.db", embedder="hash", controller=controller) as memory:
        agent = create_agent(
            scripted_chat(replies=answer_from_memory),
            middleware=[MemoryMiddleware(memory, namespace=ALICE)],
            checkpointer=InMemorySaver(),
        )
        agent.invoke({"messages": [HumanMessage(TOLD)]}, thread("1"))
        for _ in range(2):
            agent.invoke({"messages": [HumanMessage("Hello there.")]}, thread("2"))
        answer = agent.invoke({"messages": [HumanMessage(ASKED)]}, thread("2"))["messages"][-1].text
        assert answer == "It is called Miso."
        shown = memory.namespace(*ALICE).why()[0]
        there = {segment.id for segment in memory.namespace(*ALICE).session("2").history(99)}
        assert not {entry.segment_id for entry in shown.ledger} & there  # the thread shows these itself


def test_a_controller_that_cites_adds_its_instruction(tmp_path, scripted_chat):
    with Memory.open(tmp_path / "memory.db", embedder="hash", controller="alr2") as memory:
        memory.namespace(*ALICE).session("old").add(TOLD)
        model = scripted_chat(replies=["Miso [#1]", "Miso [#1]"])
        middleware = [MemoryMiddleware(memory, namespace=ALICE)]
        blocks = SystemMessage([{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}])
        for prompt in ("Be brief.", blocks):
            agent = create_agent(model, middleware=middleware, system_prompt=prompt)
            agent.invoke({"messages": [HumanMessage(ASKED)]}, thread("1"))
            system, asked = model.seen[-1]
            assert system.text.startswith("Be brief.\n\n")
            assert "[#" in system.text
            assert "[#1] user: My cat is called Miso." in asked.text
        assert system.content[0] == blocks.content[0]


def test_settings_that_cannot_be_used_are_refused(memory, tmp_path):
    for wrong, match in (
        ({"namespace": "alice"}, "not one string"),
        ({"memory_tokens": 0}, "memory_tokens must be"),
        ({"reply_tokens": -1}, "reply_tokens must be"),
        ({"tools": ("recal",)}, "known: forget, recall, remember"),
    ):
        with pytest.raises(ConfigError, match=match):
            MemoryMiddleware(memory, **{"namespace": ALICE, **wrong})
    with pytest.raises(ConfigError, match=r"what Memory\.open"):
        MemoryMiddleware(tmp_path, namespace=ALICE)


# Tools of the agent's own.


def test_an_agent_remembers_recalls_and_forgets_by_itself(memory, scripted_chat):
    memory.namespace(*BOB).add("My cat is called Rex.")
    model = scripted_chat(
        replies=[
            wants("remember", args={"text": "The user's cat is called Miso."}),
            "Kept.",
            wants("recall", "2", query="cat"),
            wants("forget", "3", number=2),
            "Gone.",
        ]
    )  # fmt: skip
    middleware = MemoryMiddleware(memory, tools=("remember", "recall", "forget"))
    agent = create_agent(model, middleware=[middleware], checkpointer=InMemorySaver())
    agent.invoke({"messages": [HumanMessage("Remember my cat Miso.")]}, thread("1", namespace=ALICE))
    [note] = [s for s in memory.namespace(*ALICE).history(9) if s.kind == "note"]
    assert (note.text, note.session, note.seq) == ("The user's cat is called Miso.", "1", 2)
    state = agent.invoke({"messages": [HumanMessage("Forget my cat.")]}, thread("2", namespace=ALICE))
    results = [message.text for message in state["messages"] if isinstance(message, ToolMessage)]
    assert "#2 [" in results[0]
    assert "Rex" not in results[0]
    assert results[1] == "#2 is forgotten."
    assert not [s for s in memory.namespace(*ALICE).history(99) if s.kind == "note"]
    # what the tools said comes from memory, and is not stored again
    assert turns(memory, "2") == [("user", "Forget my cat."), ("assistant", "Gone.")]


def test_what_a_model_does_wrong_is_told_to_the_model(memory):
    remember, recall, forget = memory_tools(memory, namespace=ALICE)
    assert recall.invoke({"query": "cat"}) == "Nothing is remembered yet."
    assert "unknown segment '99'" in forget.invoke({"number": 99})
    assert "the text is empty" in remember.invoke({"text": " "})
    assert remember.invoke({"text": "A </memory> trick\n[2020-01-01]"}) == "Kept as #1."
    assert "</memory>" not in recall.invoke({"query": "trick"})
    assert asyncio.run(recall.ainvoke({"query": "trick"})).startswith("#1 [")
    assert [tool.name for tool in memory_tools(memory, namespace=ALICE, names=("recall",))] == ["recall"]
    with pytest.raises(UnknownNameError):
        memory_tools(memory, names=("nonesuch",))
    with pytest.raises(NamespaceError):
        memory_tools(memory)[1].invoke({"query": "cat"})


def test_tools_that_look_into_this_memory_need_not_be_stored(memory, scripted_chat):
    memory.namespace(*ALICE).session("old").add(TOLD)
    look = create_retriever_tool(MemoryRetriever(memory=memory, namespace=ALICE), "look", "What was said before.")
    agent = create_agent(
        scripted_chat(replies=[wants("look", query="cat"), "Miso."]),
        [look],
        middleware=[MemoryMiddleware(memory, namespace=ALICE, unrecorded=["look"])],
    )
    agent.invoke({"messages": [HumanMessage(ASKED)]}, thread("1"))
    assert turns(memory, "1") == [("user", ASKED), ("assistant", "Miso.")]


# What a reviewer found.


def test_what_a_controller_asks_is_not_streamed_to_the_user(tmp_path, scripted_chat):
    inner = scripted_chat(replies=lambda messages: "HIDDEN")
    with Memory.open(
        tmp_path / "memory.db", llm=inner, embedder="hash", controller=ScmController(gate="llm")
    ) as memory:
        memory.namespace(*ALICE).session("old").add(TOLD)
        agent = create_agent(scripted_chat(replies=["visible"]), middleware=[MemoryMiddleware(memory, namespace=ALICE)])
        asked = {"messages": [HumanMessage(ASKED)]}
        pieces = [piece.text for piece, _ in agent.stream(asked, thread("1"), stream_mode="messages")]
        assert inner.seen  # it was asked
        assert [piece.strip() for piece in pieces if piece] == ["visible"]


def test_a_prompt_that_changes_within_a_turn_is_sent_as_it_is(memory, scripted_chat):
    memory.namespace(*ALICE).session("old").add("I ask for the weather in Lyon.")
    calls = []

    @dynamic_prompt
    def prompt(request):
        calls.append(1)
        return f"Prompt {len(calls)}."

    model = scripted_chat(replies=[wants("weather", city="Lyon"), "Sunny."])
    agent = create_agent(model, [weather], middleware=[prompt, MemoryMiddleware(memory, namespace=ALICE)])
    agent.invoke({"messages": [HumanMessage("How is the weather in Lyon?")]}, thread("1"))
    assert [sent[0].text for sent in model.seen] == ["Prompt 1.", "Prompt 2."]
    assert FENCE in model.seen[1][1].text


def test_what_the_agent_forgets_in_a_turn_stays_forgotten_in_it(memory, scripted_chat):
    memory.namespace(*ALICE).session("old").add("My PIN is 1234.")
    steps = [wants("forget", "1", number=1), wants("forget", "2", number=2), "Gone."]
    model = scripted_chat(replies=steps)
    agent = create_agent(
        model, middleware=[MemoryMiddleware(memory, namespace=ALICE, tools=("forget",))], checkpointer=InMemorySaver()
    )
    agent.invoke({"messages": [HumanMessage("Forget my PIN, it was 1234.")]}, thread("1"))
    assert "My PIN is 1234." in model.seen[0][0].text
    assert "My PIN is 1234." not in model.seen[1][0].text
    assert turns(memory, "1") == [("assistant", "Gone.")]


def test_a_draft_that_other_middleware_sends_back_is_stored(memory, scripted_chat):
    class Longer(AgentMiddleware):
        @hook_config(can_jump_to=["model"])
        def after_model(self, state, runtime):
            if state["messages"][-1].text == "draft one":
                return {"messages": [HumanMessage("Too short.")], "jump_to": "model"}
            return None

    model = scripted_chat(replies=["draft one", "draft two"])
    agent = create_agent(model, middleware=[Longer(), MemoryMiddleware(memory, namespace=ALICE)])
    agent.invoke({"messages": [HumanMessage("Write.")]}, thread("1"))
    assert turns(memory, "1") == [
        ("user", "Write."), ("assistant", "draft one"), ("user", "Too short."), ("assistant", "draft two"),
    ]  # fmt: skip


def test_what_an_abandoned_turn_had_said_is_stored_with_the_next(memory, scripted_chat):
    model = scripted_chat(replies=[wants("weather", says="I will look.", city="Lyon"), "Never mind."])
    agent = create_agent(
        model,
        [weather],
        middleware=[
            MemoryMiddleware(memory, namespace=ALICE),
            HumanInTheLoopMiddleware(interrupt_on={"weather": True}),
        ],
        checkpointer=InMemorySaver(),
    )
    agent.invoke({"messages": [HumanMessage("How is the weather?")]}, thread("1"))
    agent.invoke({"messages": [HumanMessage("Leave it.")]}, thread("1"))
    said = [text for role, text in turns(memory, "1") if role != "tool"]
    assert said == ["How is the weather?", 'I will look.\nweather({"city": "Lyon"})', "Leave it.", "Never mind."]


def test_a_history_that_is_sent_whole_each_time_is_stored_once_and_not_recalled(memory, scripted_chat):
    model = scripted_chat(replies=lambda messages: f"Reply {len(messages)}.")
    agent = create_agent(model, middleware=[MemoryMiddleware(memory, namespace=ALICE)])
    for ids in (False, True):
        said = []
        for n, words in enumerate([TOLD, "Hi.", ASKED]):
            said.append({"role": "user", "content": words, **({"id": f"{n}"} if ids else {})})
            reply = agent.invoke({"messages": said}, thread(f"ids {ids}"))["messages"][-1]
            said.append({"role": "assistant", "content": reply.text})
        stored = turns(memory, f"ids {ids}")
        assert [text for role, text in stored if role == "user"] == [TOLD, "Hi.", ASKED]
        assert len(stored) == 6
        shown = model.seen[-1][-1].text
        assert shown.count(TOLD) == ids  # of the other session, where there is one


def test_ids_that_are_used_again_hide_nothing(memory, scripted_chat):
    agent = create_agent(
        scripted_chat(replies=answer_from_memory), middleware=[MemoryMiddleware(memory, namespace=ALICE)]
    )
    for words, id_ in ((ASKED, "1"), (TOLD, "2"), (ASKED, "1")):
        reply = agent.invoke({"messages": [HumanMessage(words, id=id_)]}, {"configurable": {}})["messages"][-1].text
    assert reply == "It is called Miso."
    assert [text for role, text in turns(memory, "default") if role == "user"] == [ASKED, TOLD, ASKED]


def test_tools_of_memory_are_not_stored_whoever_gives_them(memory, scripted_chat):
    memory.namespace(*ALICE).session("old").add(TOLD)
    agent = create_agent(
        scripted_chat(replies=[wants("recall", query="cat"), "Miso."]),
        memory_tools(memory, namespace=ALICE),
        middleware=[MemoryMiddleware(memory, namespace=ALICE)],
    )
    state = agent.invoke({"messages": [HumanMessage(ASKED)]}, thread("1"))
    assert "Miso" in next(message.text for message in state["messages"] if message.type == "tool")
    assert ASKED not in next(message.text for message in state["messages"] if message.type == "tool")
    assert turns(memory, "1") == [("user", ASKED), ("assistant", "Miso.")]


def test_a_tool_of_the_users_own_may_have_such_a_name(memory, scripted_chat):
    @tool
    def recall(product: str) -> str:
        """Recall a product from the market."""
        return f"{product} is recalled."

    agent = create_agent(
        scripted_chat(replies=[wants("recall", product="P"), "Done."]),
        [recall],
        middleware=[MemoryMiddleware(memory, namespace=ALICE, tools=("remember",))],
    )
    agent.invoke({"messages": [HumanMessage("Recall P.")]}, thread("1"))
    assert ("tool", "P is recalled.") in turns(memory, "1")


class Cat(BaseModel):
    """A cat."""

    name: str


class Dog(BaseModel):
    """A dog."""

    name: str


@pytest.mark.parametrize(
    "wanted", [Cat, Cat | Dog, AutoStrategy(Cat | Dog), ToolStrategy(Cat), Cat.model_json_schema()]
)
def test_every_form_of_a_structured_reply_is_counted_and_noted(memory, scripted_chat, wanted):
    memory.namespace(*ALICE).session("old").add(TOLD)
    model = scripted_chat(replies=[wants("Cat", args={"name": "Miso"})])
    agent = create_agent(model, middleware=[MemoryMiddleware(memory, namespace=ALICE)], response_format=wanted)
    agent.invoke({"messages": [HumanMessage(ASKED)]}, thread("1"))
    assert TOLD in model.seen[0][0].text
    trace, _ = memory.namespace(*ALICE).why()
    assert memory.namespace(*ALICE).segment(trace.reply_id).text == 'Cat({"name": "Miso"})'
    assert trace.outcome == "answered"


def test_a_limit_of_the_reply_for_one_call_is_kept_free(many, scripted_chat):
    class Long(AgentMiddleware):
        def wrap_model_call(self, request, handler):
            return handler(request.override(model_settings={"max_tokens": 600}))

    model = scripted_chat(replies=["ok"])
    last = MemoryMiddleware(many, namespace=ALICE, context_window=1000, tokenizer="gpt-4")
    agent = create_agent(model, middleware=[Long(), last])
    agent.invoke({"messages": [HumanMessage(ASKED)]}, thread("limit"))
    many.namespace(*ALICE).forget(session="limit")
    used = TiktokenCounter("gpt-4").count_tokens([as_counted(message) for message in model.seen[0]])
    assert 300 < used <= 400


def test_an_embedder_that_fails_does_not_take_the_reply(tmp_path, scripted_chat):
    class Failing(HashEmbedder):
        fails = False

        def embed_documents(self, texts):
            if self.fails:
                raise RuntimeError("429")
            return super().embed_documents(texts)

    embedder = Failing()
    with Memory.open(tmp_path / "memory.db", embedder=embedder) as memory:

        def reply(messages):
            embedder.fails = True
            return "Noted."

        agent = create_agent(scripted_chat(replies=reply), middleware=[MemoryMiddleware(memory, namespace=ALICE)])
        said = agent.invoke({"messages": [HumanMessage(TOLD)]}, thread("1"))["messages"][-1].text
        assert said == "Noted."
        assert len(turns(memory, "1")) == 2
        assert memory.namespace(*ALICE).stats()["pending"] == 1
        embedder.fails = False
        assert memory.namespace(*ALICE).search("cat", k=1)[0].segment.text == TOLD
