"""A chat model that remembers, in place of the model itself."""

import asyncio
from collections.abc import Iterator

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.globals import set_llm_cache
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_tests.unit_tests import ChatModelUnitTests
from langgraph.graph import START, MessagesState, StateGraph
from pydantic import BaseModel, ValidationError

from memory_os import ConfigError, InvalidInputError, Memory, NamespaceError
from memory_os.adapters.langchain import ChatLLM, LangChainLLM, MemoryChatModel
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
