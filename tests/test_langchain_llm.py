"""LangChain's own fake chat models behind the LLM seam."""

import json
import sys

import pytest
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from memory_os.adapters.langchain_models import DEFAULT_CONTEXT_WINDOW, LangChainLLM
from memory_os.adapters.scripted import WordCounter
from memory_os.ask import reply_to
from memory_os.errors import CapabilityError, ConfigError, LLMError, MissingExtraError
from memory_os.protocols import StructuredLLM

ASK = [{"role": "user", "content": "Hello"}]


class Recorder(GenericFakeChatModel):
    """Streams ``parts``; keeps what it was given in ``seen``."""

    messages: object = iter(())
    parts: list = []  # noqa: RUF012 - a pydantic field
    seen: list = []  # noqa: RUF012
    model_name: str = "some-model"

    def _stream(self, messages, stop=None, run_manager=None, **kwargs):
        try:
            for part in self.parts:
                if isinstance(part, Exception):
                    raise part
                self.seen.append((messages, stop, getattr(self, "max_tokens", None)))
                yield ChatGenerationChunk(message=AIMessageChunk(content=part))
        finally:
            self.seen.append("closed")


class Limited(Recorder):
    """With a limit to set, as OpenAI's and Anthropic's classes have."""

    max_tokens: int | None = None


def test_the_reply_streams_and_messages_keep_their_roles():
    model = Recorder(parts=["Hi ", "there"], seen=[])
    chat = [{"role": r, "content": r} for r in ("system", "user", "assistant", "tool")]
    assert list(LangChainLLM(model).generate(chat, max_tokens=9)) == ["Hi ", "there"]
    sent = model.seen[0][0]
    assert [type(m) for m in sent] == [SystemMessage, HumanMessage, AIMessage, HumanMessage]
    assert [m.content for m in sent] == ["system", "user", "assistant", "tool"]


def test_generic_fake_chat_model_works():
    llm = LangChainLLM(GenericFakeChatModel(messages=iter([AIMessage(content="one two three")])))
    assert "".join(llm.generate(ASK, max_tokens=9)) == "one two three"
    assert llm.name == "GenericFakeChatModel"


def test_blocks_of_content_become_their_text():
    blocks = [{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "Hi"}]
    assert list(LangChainLLM(Recorder(parts=[blocks, []], seen=[])).generate(ASK, max_tokens=9)) == ["Hi"]


def test_a_model_without_a_limit_is_cut_by_our_count():
    llm = LangChainLLM(Recorder(parts=["one two ", "three four"], seen=[]), tokenizer=WordCounter())
    assert "".join(llm.generate(ASK, max_tokens=3)).split() == ["one", "two", "three"]


def test_a_model_with_a_limit_is_told_on_a_copy_of_it():
    model = Limited(parts=["one ", "two"], seen=[])
    llm = LangChainLLM(model)
    # the count is approximate, and the model was told: its own end of the reply stands
    assert "".join(llm.generate(ASK, max_tokens=1)) == "one two"
    assert model.seen[0][2] == 1
    assert model.max_tokens is None


def test_stop_is_passed_on_and_kept_anyhow():
    model = Recorder(parts=["Yes", "\nUs", "er: no", "more"], seen=[])
    assert "".join(LangChainLLM(model).generate(ASK, max_tokens=99, stop=["\nUser:"])) == "Yes"
    assert model.seen[0][1] == ["\nUser:"]


def test_closing_closes_the_providers_stream():
    model = Recorder(parts=["a "] * 100, seen=[])
    reply = LangChainLLM(model).generate(ASK, max_tokens=99)
    assert next(reply) == "a "
    reply.close()
    assert model.seen[-1] == "closed"
    assert len(model.seen) < 5


def test_whatever_the_provider_raises_is_an_llm_error():
    llm = LangChainLLM(Recorder(parts=["a", ConnectionError("refused")], seen=[]))
    reply = llm.generate(ASK, max_tokens=9)
    assert next(reply) == "a"
    with pytest.raises(LLMError, match="some-model failed: ConnectionError: refused") as caught:
        next(reply)
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_counts_and_window_say_where_they_come_from():
    llm = LangChainLLM(Recorder())
    assert (llm.exact, llm.context_window, len(llm.notes)) == (False, DEFAULT_CONTEXT_WINDOW, 2)
    assert "assumed" in llm.notes[0]
    known = LangChainLLM(Recorder(model_name="gpt-4", profile={"max_input_tokens": 128_000}))
    assert (known.exact, known.context_window, known.notes) == (True, 128_000, ())
    assert known.count_tokens(ASK) == 8
    assert LangChainLLM(Recorder(), context_window=99, tokenizer=WordCounter()).notes == ()


def test_a_provider_that_cannot_be_had_is_named(monkeypatch):
    pytest.importorskip("langchain")
    with pytest.raises(ConfigError, match="pip install langchain-mistralai"):
        LangChainLLM.from_string("mistralai:mistral-small")
    with pytest.raises(ConfigError, match="nonesuch"):
        LangChainLLM.from_string("nonesuch:model")
    monkeypatch.setitem(sys.modules, "langchain.chat_models", None)
    with pytest.raises(MissingExtraError, match=r"memory-os\[langchain\]"):
        LangChainLLM.from_string("openai:gpt-4")


# Structured output.

SCHEMA = {
    "title": "evidence",
    "type": "object",
    "properties": {"evidence": {"type": "array", "items": {"type": "string"}}},
    "required": ["evidence"],
}


class WithTools(Limited):
    """Answers with a call of the tool that it was given, with a message or a plain text, or with an error."""

    answer: object = None

    def bind_tools(self, tools, **settings):
        self.seen.append(tools)
        return self.bind()

    def _generate(self, messages, stop=None, run_manager=None, **settings):
        self.seen.append((messages, self.max_tokens))
        if isinstance(self.answer, Exception):
            raise self.answer
        if isinstance(self.answer, AIMessage):
            message = self.answer
        elif isinstance(self.answer, dict):
            call = {"name": "evidence", "args": self.answer, "id": "1", "type": "tool_call"}
            message = AIMessage("", tool_calls=[call])
        else:
            message = AIMessage(str(self.answer))
        return ChatResult(generations=[ChatGeneration(message=message)])


def test_a_model_with_tools_is_held_to_a_schema():
    model = WithTools(answer={"evidence": ["S1.1: 安娜"]}, seen=[])
    llm = LangChainLLM(model)
    assert isinstance(llm, StructuredLLM)
    assert json.loads(llm.generate_structured(ASK, SCHEMA, max_tokens=9)) == {"evidence": ["S1.1: 安娜"]}
    assert model.seen[0][0]["title"] == "evidence"
    assert model.seen[1] == ([HumanMessage("Hello")], 9)
    assert model.max_tokens is None


def test_what_is_no_call_comes_back_as_it_is():
    model = WithTools(answer="- S1.1: Anna", seen=[])
    assert LangChainLLM(model).generate_structured(ASK, SCHEMA, max_tokens=9) == "- S1.1: Anna"


def test_of_a_call_that_is_cut_off_comes_back_what_there_is():
    whole = json.dumps({"evidence": ["S1.1: Anna", "S1.2: Ben"]})
    call = {"id": "1", "type": "function", "function": {"name": "evidence", "arguments": whole[:-9]}}
    cut = AIMessage("I copy:", additional_kwargs={"tool_calls": [call]})  # LangChain tells it as an invalid call
    llm = LangChainLLM(WithTools(answer=cut, seen=[]))
    assert llm.generate_structured(ASK, SCHEMA, max_tokens=9) == whole[:-9]


@pytest.mark.parametrize(
    "model", [Recorder(parts=["plain"], seen=[]), WithTools(answer=ValueError("no tools"), parts=["plain"], seen=[])]
)
def test_a_model_without_schemas_is_asked_without(model):
    llm = LangChainLLM(model)
    with pytest.raises(CapabilityError, match="structured output"):
        llm.generate_structured(ASK, SCHEMA, max_tokens=9)
    assert reply_to(llm, "Hello", max_tokens=9, schema=SCHEMA) == "plain"


def test_a_provider_that_fails_is_an_llm_error_once_it_is_asked_without():
    down = ConnectionError("refused")
    llm = LangChainLLM(WithTools(answer=down, parts=[down], seen=[]))
    with pytest.raises(CapabilityError) as caught:  # perhaps it is the schema
        llm.generate_structured(ASK, SCHEMA, max_tokens=9)
    assert caught.value.__cause__ is down
    with pytest.raises(LLMError, match="some-model failed: ConnectionError: refused"):
        reply_to(llm, "Hello", max_tokens=9, schema=SCHEMA)
