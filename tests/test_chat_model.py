"""A chat model that remembers, in place of the model itself."""

import asyncio
import warnings
from collections.abc import Iterator

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.globals import set_llm_cache
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langchain_tests.unit_tests import ChatModelUnitTests
from langgraph.graph import START, MessagesState, StateGraph
from pydantic import BaseModel, ValidationError

from memory_os import AsyncMemory, ConfigError, InvalidInputError, Memory, NamespaceError
from memory_os.adapters.langchain import ChatLLM, LangChainLLM, MemoryChatModel, memory_tools
from memory_os.adapters.langchain_messages import as_counted, as_segments
from memory_os.adapters.scripted import ScriptedLLM
from memory_os.adapters.tokenizers import TiktokenCounter

ALICE = ("acme", "alice")
TOLD = "My cat is called Miso."
ASKED = "What is my cat called?"


@pytest.fixture
def memory(tmp_path) -> Iterator[Memory]:
    with Memory.open(tmp_path / "memory.db", embedder="hash") as opened:
        yield opened


@pytest.fixture
def remembering(memory, scripted_chat):
    def make(replies, **settings) -> MemoryChatModel:
        return MemoryChatModel(model=scripted_chat(replies=replies), memory=memory, **{"namespace": ALICE, **settings})

    return make


def turns(memory, session="default"):
    return [(s.role, s.text) for s in memory.namespace(*ALICE).session(session).history(99)]


class TestChatModelStandard(ChatModelUnitTests):
    @pytest.fixture(autouse=True)
    def made(self, memory: Memory, scripted_chat: type[BaseChatModel]) -> None:
        self.settings = {"model": scripted_chat(replies=[]), "memory": memory, "namespace": ALICE}

    @property
    def chat_model_class(self):
        return MemoryChatModel

    @property
    def chat_model_params(self):
        return self.settings


class TestChatLLMStandard(ChatModelUnitTests):
    @property
    def chat_model_class(self):
        return ChatLLM

    @property
    def chat_model_params(self):
        return {"llm": ScriptedLLM(["x"])}


def test_an_llm_of_ours_is_a_chat_model():
    llm = ScriptedLLM(["one two three", "four five", "six seven eight"])
    chat = ChatLLM(llm=llm, max_tokens=2)
    assert chat.invoke("Count.").text.strip() == "one two"
    assert chat.profile == {"max_input_tokens": llm.context_window}
    assert next(iter(chat.stream("Go on.", stop=["five"]))).text.strip() == "four"
    assert asyncio.run(chat.ainvoke("And?", max_tokens=3)).text == "six seven eight"
    said = [SystemMessage("s"), HumanMessage("h"), AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "1"}])]
    ChatLLM(llm=ScriptedLLM(["x"])).invoke([*said, ToolMessage("t", tool_call_id="1")])
    assert LangChainLLM(chat).counter is llm
    assert LangChainLLM(chat).context_window == llm.context_window


def answer_from_memory(messages):
    return "It is called Miso." if any("Miso" in message.text for message in messages) else "I do not know."


def call(model, query, mode, session):
    config = {"configurable": {"thread_id": session}}
    if mode == "sync":
        return model.invoke(query, config).text
    if mode == "stream":
        return "".join(chunk.text for chunk in model.stream(query, config))
    if mode == "async":
        return asyncio.run(model.ainvoke(query, config)).text

    async def read():
        return "".join([chunk.text async for chunk in model.astream(query, config)])

    return asyncio.run(read())


@pytest.mark.parametrize("mode", ["sync", "stream", "async", "astream"])
def test_what_was_told_in_one_session_is_there_in_the_next(remembering, memory, mode):
    assert call(remembering(["Noted."]), TOLD, mode, "1").strip() == "Noted."
    model = remembering(answer_from_memory)
    assert call(model, ASKED, mode, "2").strip() == "It is called Miso."
    [[asked]] = model.model.seen
    assert asked.text.endswith(f"\n\n{ASKED}")
    stored = [(role, text.strip()) for role, text in turns(memory, "2")]
    assert stored == [("user", ASKED), ("assistant", "It is called Miso.")]
    trace, _ = memory.namespace(*ALICE).why()
    assert [memory.namespace(*ALICE).segment(id_).text.strip() for id_ in (trace.query_id, trace.reply_id)] == [
        ASKED, "It is called Miso.",
    ]  # fmt: skip
    assert trace.outcome == "answered"


def test_only_what_is_new_of_a_conversation_is_stored(remembering, memory):
    model = remembering(["Hello.", "Noted.", "Miso."])
    said = [SystemMessage("Be brief."), HumanMessage("Hi")]
    for query in (TOLD, ASKED):
        said += [model.invoke(said), HumanMessage(query)]
    model.invoke(said)
    assert turns(memory) == [
        ("user", "Hi"), ("assistant", "Hello."), ("user", TOLD), ("assistant", "Noted."), ("user", ASKED),
        ("assistant", "Miso."),
    ]  # fmt: skip
    # and what the caller shows anyway is not shown twice
    assert [str(message.text) for message in model.model.seen[-1]] == [str(message.text) for message in said]


def test_the_call_leaves_the_callers_messages_as_they_are(remembering, memory):
    memory.namespace(*ALICE).session("monday").add(TOLD)
    said = [HumanMessage([{"type": "text", "text": ASKED}])]
    model = remembering(["Miso."])
    model.invoke(said)
    assert said == [HumanMessage([{"type": "text", "text": ASKED}])]
    [[shown]] = model.model.seen
    assert shown.content[1] == {"type": "text", "text": ASKED}
    assert TOLD in shown.content[0]["text"]
    assert turns(memory) == [("user", ASKED), ("assistant", "Miso.")]


def test_the_system_prompt_is_the_callers(remembering, memory):
    memory.namespace(*ALICE).add(TOLD)
    model = remembering(["a", "b"])
    model.invoke([SystemMessage("Be brief."), HumanMessage(ASKED)])
    assert model.model.seen[0][0] == SystemMessage("Be brief.")
    model.invoke(ASKED)
    assert [message.type for message in model.model.seen[1]] == ["human"]


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def test_tools_reach_the_model_and_their_turns_are_stored(remembering, memory):
    wanted = AIMessage("", tool_calls=[{"name": "weather", "args": {"city": "Lyon"}, "id": "1"}])
    model = remembering([wanted, "It is sunny."])
    bound = model.bind_tools([weather], tool_choice="any")
    said = [HumanMessage("What is the weather in Lyon?")]
    reply = bound.invoke(said)
    assert reply.tool_calls[0]["name"] == "weather"
    assert model.model.options[0]["tools"][0]["function"]["name"] == "weather"
    assert model.model.options[0]["tool_choice"] == "any"
    assert "remembers_in" not in model.model.options[0]
    bound.invoke([*said, reply, ToolMessage("sunny", tool_call_id="1", name="weather")])
    assert turns(memory) == [
        ("user", "What is the weather in Lyon?"), ("assistant", 'weather({"city": "Lyon"})'), ("tool", "sunny"),
        ("assistant", "It is sunny."),
    ]  # fmt: skip
    trace, _ = memory.namespace(*ALICE).why()
    assert memory.namespace(*ALICE).segment(trace.reply_id).text == "It is sunny."


def test_a_structured_reply(remembering, memory):
    class Cat(BaseModel):
        """A cat."""

        name: str

    memory.namespace(*ALICE).add(TOLD)
    model = remembering([AIMessage("", tool_calls=[{"name": "Cat", "args": {"name": "Miso"}, "id": "1"}])])
    assert model.with_structured_output(Cat).invoke(ASKED) == Cat(name="Miso")
    assert TOLD in model.model.seen[0][0].text


def test_a_failing_model_leaves_the_question_stored(remembering, memory):
    model = remembering([RuntimeError("down")])
    with pytest.raises(RuntimeError, match="down"):
        model.invoke(TOLD)
    assert turns(memory) == [("user", TOLD)]


def test_an_interrupted_stream_leaves_what_was_said(remembering, memory):
    stream = remembering(["one two three"]).stream("Count.")
    next(stream)
    stream.close()
    assert turns(memory) == [("user", "Count."), ("assistant", "one ")]
    assert memory.namespace(*ALICE).history(1)[0].metadata["outcome"] == "interrupted"


def test_a_namespace_is_needed_and_a_call_may_name_it(remembering, memory):
    model = remembering(["a", "b", "c"], namespace=None)
    with pytest.raises(NamespaceError):
        model.invoke(TOLD)
    model.invoke(TOLD, {"configurable": {"namespace": ALICE, "session": "s"}})
    assert turns(memory, "s") == [("user", TOLD), ("assistant", "a")]
    with pytest.raises(NamespaceError):
        remembering([], namespace="alice")


def test_settings_are_the_models(remembering, memory, scripted_chat):
    model = remembering([], temperature=0.0)
    assert model.model.temperature == 0.0
    with pytest.raises(ConfigError, match="memory_tokens must be at least 1"):
        remembering([], memory_tokens=0)
    with pytest.raises((ValidationError, ConfigError)):
        MemoryChatModel(model=3, memory=memory, namespace=ALICE)
    with pytest.raises(ConfigError, match="cannot be"):
        MemoryChatModel(model="openai:gpt-4", memory=memory, namespace=ALICE)
    inner = scripted_chat(replies=[], profile={"max_input_tokens": 1000})
    assert MemoryChatModel(model=inner, memory=memory, namespace=ALICE).profile == {"max_input_tokens": 1000}


def test_langchains_cache_does_not_answer_for_memory(remembering, memory):
    set_llm_cache(InMemoryCache())
    try:
        model = remembering(answer_from_memory)
        assert model.invoke(ASKED).text == "I do not know."
        memory.namespace(*ALICE).add(TOLD)
        assert model.invoke(ASKED).text == "It is called Miso."
    finally:
        set_llm_cache(None)


def test_the_request_stays_within_the_window(remembering, memory):
    for n in range(200):
        memory.namespace(*ALICE).add(f"My cat number {n} is called Miso {n}.")
    for window in (200, 400, 800):
        model = remembering(["ok"], context_window=window, tokenizer="gpt-4", reply_tokens=50, memory_tokens=1000)
        model.invoke([SystemMessage("Be brief."), HumanMessage(ASKED)])
        shown = [{"role": m.type if m.type == "system" else "user", "content": m.text} for m in model.model.seen[0]]
        used = TiktokenCounter("gpt-4").count_tokens(shown)
        assert used <= window - 50
        assert used > (window - 50) * 0.6  # and memory makes use of it
    model = remembering(["ok"], context_window=60, tokenizer="gpt-4", reply_tokens=50)
    model.invoke(ASKED)  # no room at all: the request goes as it is
    assert [m.text for m in model.model.seen[0]] == [ASKED]


def test_chunks_add_up(remembering):
    chunks = list(remembering(["one two"]).stream("Count."))
    assert all(isinstance(chunk, AIMessageChunk) for chunk in chunks)
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.text == "one two "


def test_text_that_cannot_be_stored_is_mended(remembering, memory):
    remembering(["ok"]).invoke("a\x00b \ud800")
    assert turns(memory)[0] == ("user", "a\ufffdb ?")


def test_images_stand_as_a_word(remembering, memory):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    remembering(["ok"]).invoke([HumanMessage([{"type": "text", "text": "Look"}, image])])
    assert turns(memory)[0] == ("user", "Look\n[image]")
    with pytest.raises(InvalidInputError):
        memory.namespace(*ALICE).add("")


class Heard(BaseCallbackHandler):
    def __init__(self):
        self.started, self.tokens = 0, []

    def on_chat_model_start(self, *args, **kwargs):
        self.started += 1

    def on_llm_new_token(self, token, **kwargs):
        self.tokens.append(token)


def test_who_listens_hears_of_each_token_once(remembering):
    heard = Heard()
    graph = StateGraph(MessagesState)
    model = remembering(["one two", "one two"])
    graph.add_node("talk", lambda state: {"messages": [model.invoke(state["messages"])]})
    graph.add_edge(START, "talk")
    pieces = graph.compile().stream(
        {"messages": [HumanMessage("Count.")]}, {"callbacks": [heard]}, stream_mode="messages"
    )
    assert [piece.text for piece, _ in pieces if piece.text] == ["one ", "two "]
    assert (heard.started, [token for token in heard.tokens if token]) == (1, ["one ", "two "])
    assert "".join(chunk.text for chunk in model.stream("Count.", {"callbacks": [heard]})) == "one two "
    assert heard.started == 2


def test_an_image_takes_its_share_of_the_window(remembering, memory):
    memory.namespace(*ALICE).session("old").add(TOLD)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    for n_images, shown in ((0, True), (1, False)):
        model = remembering(["ok"], context_window=1500, reply_tokens=100)
        model.invoke([HumanMessage([{"type": "text", "text": ASKED}, *[image] * n_images])])
        assert (TOLD in model.model.seen[0][0].text) is shown


# What a reviewer found.


def test_a_stream_of_events_goes_where_the_call_says(remembering, memory):
    outer = RunnableLambda(
        lambda _: "".join(
            remembering(["ok"], namespace=None)
            .stream_events("secret of alice", {"configurable": {"namespace": ALICE, "thread_id": "t"}}, version="v3")
            .text
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LangChain says that it is in beta
        outer.invoke("x", {"configurable": {"namespace": ("acme", "bob")}})
    assert memory.namespace("acme", "bob").history(9) == []
    assert turns(memory, "t")[0] == ("user", "secret of alice")

    async def read():
        model = remembering(["ok"], namespace=None)
        config = {"configurable": {"namespace": ALICE, "thread_id": "v2"}}
        return [event["event"] async for event in model.astream_events("hello", config, version="v2")]

    assert "on_chat_model_stream" in asyncio.run(read())
    assert turns(memory, "v2")[0] == ("user", "hello")


def test_a_copy_remembers_where_it_says(remembering, memory, tmp_path):
    model = remembering(["a", "b"])
    bob = model.model_copy(update={"namespace": ("acme", "bob")})
    bob.generate([[HumanMessage("I am Bob.")]])
    assert turns(memory) == []
    with Memory.open(tmp_path / "other.db", embedder="hash") as other:
        model.model_copy(update={"memory": other}).invoke("Hi.")
        assert [s.text for s in other.namespace(*ALICE).history(9)] == ["Hi.", "b"]


def test_models_that_do_not_stream(memory):
    inner = FakeListChatModel(responses=["one", "two", "three"], disable_streaming=True)
    model = MemoryChatModel(model=inner, memory=memory, namespace=ALICE)
    assert "".join(chunk.text for chunk in model.stream("1")) == "one"

    async def read():
        return "".join([chunk.text async for chunk in model.astream("2")])

    assert asyncio.run(read()) == "two"
    assert [text for role, text in turns(memory) if role == "assistant"] == ["one", "two"]


def test_a_question_that_is_tried_again_is_stored_once(remembering, memory):
    retried = remembering([RuntimeError("down"), "ok"]).with_retry(wait_exponential_jitter=False)
    assert retried.invoke(TOLD).text == "ok"
    falling = remembering([RuntimeError("down")]).with_fallbacks([remembering(["fine"])])
    assert falling.invoke(ASKED).text == "fine"
    assert turns(memory) == [("user", TOLD), ("assistant", "ok"), ("user", ASKED), ("assistant", "fine")]


def test_the_beginning_of_a_reply_is_no_reply(remembering, memory):
    remembering(["red."]).invoke([HumanMessage("A poem about Miso."), AIMessage("Roses are")])
    assert turns(memory)[0] == ("user", "A poem about Miso.")


def test_a_changed_system_prompt_is_sent_and_counted(remembering, memory):
    memory.namespace(*ALICE).session("old").add(TOLD)
    model = remembering([AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "1"}]), "ok"])
    said = [HumanMessage(ASKED)]
    reply = model.invoke([SystemMessage("System A."), *said])
    model.invoke([SystemMessage("System B."), *said, reply, ToolMessage("r", tool_call_id="1")])
    assert [sent[0].text for sent in model.model.seen] == ["System A.", "System B."]
    assert TOLD in model.model.seen[1][1].text


CONTENTS = [
    (HumanMessage([{"type": "text-plain", "text": "five years"}]), "five years"),
    (HumanMessage(["a", {"type": "text", "text": "b"}]), "a\nb"),
    (HumanMessage([{"text": "bedrock"}, {"cachePoint": {"type": "default"}}]), "bedrock"),
    (HumanMessage([{"type": None, "text": "none"}]), "none"),
    (HumanMessage([{"type": "input_audio", "input_audio": {}}]), "[audio]"),
    (ChatMessage("by role", role="user"), "by role"),
]


@pytest.mark.parametrize(("message", "stored"), CONTENTS)
def test_every_kind_of_content_is_stored(remembering, memory, message, stored):
    model = remembering(["ok"])
    model.invoke([message])
    assert turns(memory) == [("user", stored), ("assistant", "ok")]


def test_every_kind_of_reply_is_stored(remembering, memory):
    broken = [{"name": "pay", "args": '{"eur": 1', "id": "1", "error": "cut off", "type": "invalid_tool_call"}]
    thought = [{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "Yes."}]
    refused = AIMessage([{"type": "refusal", "refusal": "No."}])
    for reply in (refused, AIMessage("", invalid_tool_calls=broken), AIMessage(thought)):
        remembering([reply]).invoke("Pay?")
    assert [text for role, text in turns(memory) if role == "assistant"] == ["No.", 'pay({"eur": 1)', "Yes."]
    assert "signature" in as_counted(AIMessage(thought))["content"]
    result = ToolMessage([{"type": "json", "json": {"a": 1}}], tool_call_id="1")
    assert as_segments([result], "s")[0][1].text == '{"type": "json", "json": {"a": 1}}'


def test_what_is_bound_counts(remembering, memory):
    for n in range(60):
        memory.namespace(*ALICE).session("old").add(f"My cat number {n} is called Miso {n}.")
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"description": "word " * 200}}}
    counter = TiktokenCounter("gpt-4")
    for bound, reserve, more in (({"max_tokens": 300}, 300, 0), ({"response_format": schema}, 50, 200), ({}, 50, 0)):
        more_settings = {} if "max_tokens" in bound else {"reply_tokens": 50}
        model = remembering(["ok"], context_window=700, tokenizer="gpt-4", memory_tokens=5000, **more_settings)
        model.bind(**bound).invoke(ASKED)
        used = counter.count_tokens([as_counted(message) for message in model.model.seen[0]])
        assert 700 - reserve - more - 120 < used <= 700 - reserve - more


def test_a_long_reply_does_not_take_the_window_of_a_model_that_is_not_known(remembering, memory, scripted_chat):
    memory.namespace(*ALICE).session("old").add(TOLD)

    class Long(scripted_chat):
        max_tokens: int = 8192

    model = MemoryChatModel(model=Long(replies=["ok"]), memory=memory, namespace=ALICE)
    model.invoke(ASKED)
    assert TOLD in model.model.seen[0][0].text


def test_a_tool_of_memorys_own_is_not_stored(remembering, memory):
    memory.namespace(*ALICE).session("old").add(TOLD)
    [recall] = memory_tools(memory, namespace=ALICE, names=("recall",))
    call = {"name": "recall", "args": {"query": "cat"}, "id": "1", "type": "tool_call"}
    result = recall.invoke(call)
    assert "Miso" in result.text
    model = remembering([AIMessage("", tool_calls=[call]), "Miso."], unrecorded=("recall",))
    said = [HumanMessage(ASKED)]
    reply = model.invoke(said)
    model.invoke([*said, reply, result])
    assert turns(memory) == [("user", ASKED), ("assistant", "Miso.")]


def test_an_async_stream_that_is_closed_stops_and_is_stored_before_the_memory_closes(tmp_path, scripted_chat):
    async def use():
        async with AsyncMemory.open(tmp_path / "memory.db", embedder="hash") as memory:
            model = MemoryChatModel(model=scripted_chat(replies=["one two three"]), memory=memory, namespace=ALICE)
            stream = model.astream("Count.")
            await anext(stream)
            await stream.aclose()
            return [s.text for s in await memory.namespace(*ALICE).history(9)]

    assert asyncio.run(use()) == ["Count.", "one "]


def test_a_misspelt_setting_is_refused(remembering):
    with pytest.raises(ConfigError, match="'sesion'"):
        remembering([], sesion="x")


def test_tokens_of_a_text_are_those_of_the_budget(remembering):
    assert remembering([], tokenizer="gpt-4").get_num_tokens("hello there") == 2
