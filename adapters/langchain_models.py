"""Any LangChain chat model as an LLM and any of its embeddings as an embedder: so every provider that LangChain has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from memory_os.adapters.tokenizers import counter_for, end_before, end_within
from memory_os.errors import CapabilityError, ConfigError, InvalidInputError, LLMError, MissingExtraError
from memory_os.types import Message

if TYPE_CHECKING:
    from langchain_core.embeddings import Embeddings
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import BaseMessage
    from langchain_core.runnables import RunnableConfig

    from memory_os.protocols import Matrix, TokenCounter, Vector

__all__ = ["DEFAULT_CONTEXT_WINDOW", "LIMITS", "QUIET", "LangChainEmbedder", "LangChainLLM"]

DEFAULT_CONTEXT_WINDOW = 8192

QUIET: RunnableConfig = {"callbacks": []}
"""For calls inside of another: who listens to that one must not hear what a controller asks, nor each token twice."""

# what LangChain's integrations call the limit of the reply, and what tells one of their embeddings from another
LIMITS = ("max_tokens", "max_output_tokens", "num_predict", "max_new_tokens", "max_completion_tokens")
IDENTITY = (
    "model", "model_name", "model_id", "repo_id", "deployment_name", "deployment", "endpoint_name", "dimensions",
    "size", "encode_kwargs", "model_kwargs", "query_instruction", "embed_instruction",
)  # fmt: skip


class LangChainLLM:
    """A chat model of LangChain, for example ``LangChainLLM.from_string("openai:gpt-4")``.

    :param model: any ``BaseChatModel``.
    :param context_window: by default what the model's LangChain profile says, else 8192, and ``notes`` says so.
    :param tokenizer: counts tokens; by default by the model's name, exactly for OpenAI's models with cl100k_base and
        approximately (cl100k_base and 15%) for others.
    :param name: how errors and traces call the model.
    """

    def __init__(
        self,
        model: BaseChatModel,
        *,
        context_window: int | None = None,
        tokenizer: TokenCounter | None = None,
        name: str | None = None,
    ) -> None:
        model_name = getattr(model, "model_name", None) or getattr(model, "model", None)
        self.model = model
        self.name: str = name or (model_name if isinstance(model_name, str) else type(model).__name__)
        own = tokenizer or getattr(model, "token_counter", None)  # ChatLLM has one
        self.counts_by_name = own is None
        self.counter: TokenCounter = own or counter_for(model_name if isinstance(model_name, str) else self.name)
        notes = []
        profile = getattr(model, "profile", None) or {}
        self.window_is_assumed = context_window is None and not profile.get("max_input_tokens")
        if self.window_is_assumed:
            notes.append(f"the context window of {self.name} is not known; {DEFAULT_CONTEXT_WINDOW} tokens are assumed")
        if not self.counter.exact:
            notes.append(f"tokens of {self.name} are counted approximately, by {self.counter.name}")
        self.notes: tuple[str, ...] = tuple(notes)
        self.context_window: int = context_window or profile.get("max_input_tokens") or DEFAULT_CONTEXT_WINDOW

    @classmethod
    def from_string(cls, model: str, *, context_window: int | None = None, **settings: Any) -> LangChainLLM:
        """The model that LangChain knows by ``"provider:model"``; ``settings`` go to its class.

        :raises MissingExtraError: if langchain is not installed.
        :raises ConfigError: if the provider is unknown, its package missing, or its settings refused.
        """
        made: BaseChatModel = _made("model", "langchain.chat_models", "init_chat_model", model, settings)
        return cls(made, context_window=context_window, name=model)

    @property
    def exact(self) -> bool:
        """Whether token counts are the model's own."""
        return self.counter.exact

    def count_text(self, text: str) -> int:
        """Tokens of ``text`` alone."""
        return self.counter.count_text(text)

    def count_tokens(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> int:
        """Tokens of the whole chat."""
        return self.counter.count_tokens(messages, tools)

    def generate(self, messages: Sequence[Message], *, max_tokens: int, stop: Sequence[str] = ()) -> Iterator[str]:
        """Yield the reply as the provider streams it. Closing the iterator closes the stream.

        :raises LLMError: for whatever the provider raises.
        """
        model, told = _limited(self.model, max_tokens)
        stream = self._stream(model, messages, stop)
        # a provider that was told counts better than an approximation, which would cut its replies short
        within = stream if told and not self.exact else end_within(stream, max_tokens, self.counter)
        try:
            yield from end_before(within, stop)
        finally:
            stream.close()

    def generate_structured(self, messages: Sequence[Message], schema: Mapping[str, Any], *, max_tokens: int) -> str:
        """The whole reply, held to a JSON schema as far as the provider can.

        :raises CapabilityError: if LangChain has no way to, or the provider fails: its errors do not tell which of
            the two it is, so whoever asks may ask again without a schema.
        """
        model, _ = _limited(self.model, max_tokens)
        try:
            held = model.with_structured_output(dict(schema), include_raw=True)
            told: Any = held.invoke([_to_langchain(message) for message in messages], QUIET)
        except Exception as error:
            raise CapabilityError("alr2", "structured output", "a LangChain model with tools or JSON mode") from error
        if told["parsed"] is not None:
            return json.dumps(told["parsed"], ensure_ascii=False)
        # a call cut off at the limit is not among the calls: its JSON does not end
        broken = [call["args"] for call in told["raw"].invalid_tool_calls if call["args"]]
        return str(broken[0] if broken else told["raw"].text)

    def _stream(
        self, model: BaseChatModel, messages: Sequence[Message], stop: Sequence[str]
    ) -> Generator[str, None, None]:
        chunks = None
        try:
            chunks = model.stream([_to_langchain(message) for message in messages], QUIET, stop=list(stop) or None)
            for chunk in chunks:
                if text := str(chunk.text):
                    yield text
        except Exception as error:
            raise LLMError(self.name, f"{type(error).__name__}: {error}") from error
        finally:
            if isinstance(chunks, Generator):
                chunks.close()


class LangChainEmbedder:
    """Embeddings of LangChain, for example ``LangChainEmbedder.from_string("openai:text-embedding-3-small")``.

    :param embeddings: any ``Embeddings``. Its vectors are brought to unit length.
    :param name: tells models apart whose vectors must not be compared; by default made of the class and of those of
        its fields that say which model it is.
    """

    def __init__(self, embeddings: Embeddings, *, name: str | None = None) -> None:
        self.embeddings = embeddings
        self.fingerprint = f"langchain:{name or _identity(embeddings)}"
        self._dimension: int | None = None

    @classmethod
    def from_string(cls, model: str, **settings: Any) -> LangChainEmbedder:
        """The embeddings that LangChain knows by ``"provider:model"``; ``settings`` go to its class.

        :raises MissingExtraError: if langchain is not installed.
        :raises ConfigError: if the provider is unknown, its package missing, or its settings refused.
        """
        made: Embeddings = _made("embedder", "langchain.embeddings", "init_embeddings", model, settings)
        told = f"{model} {json.dumps(settings, sort_keys=True, default=repr)}" if settings else model
        return cls(made, name=told)

    @property
    def dimension(self) -> int:
        """Length of a vector; asked of the model when it is first needed."""
        if self._dimension is None:
            self._dimension = len(self.embeddings.embed_query("dimension"))
        return self._dimension

    def embed_documents(self, texts: Sequence[str]) -> Matrix:
        """Unit vectors, shape ``[len(texts), dimension]``."""
        import numpy as np

        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        vectors = self._checked(self.embeddings.embed_documents(list(texts)), len(texts))
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        lengths[lengths == 0.0] = 1.0
        unit: Matrix = vectors / lengths
        return unit

    def embed_query(self, text: str) -> Vector:
        """The unit vector of a question."""
        import numpy as np

        [vector] = self._checked([self.embeddings.embed_query(text)], 1)
        unit: Vector = vector / (np.linalg.norm(vector) or 1.0)
        return unit

    def _checked(self, numbers: Any, n: int) -> Matrix:
        """What the model gave, as ``[n, dimension]``.

        :raises InvalidInputError: if it cannot be that.
        """
        import numpy as np

        try:
            vectors = np.asarray(numbers, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f"the embeddings {self.fingerprint} gave no vectors: {error}") from error
        if vectors.ndim != 2 or len(vectors) != n or not vectors.shape[1] or not np.isfinite(vectors).all():
            shape = f"the shape {vectors.shape}"
            raise InvalidInputError(f"the embeddings {self.fingerprint} gave no {n} vectors of finite numbers: {shape}")
        self._dimension = vectors.shape[1]
        return vectors


def _made(what: str, home: str, maker: str, model: str, settings: Mapping[str, Any]) -> Any:
    """What LangChain makes of ``"provider:model"``."""
    try:
        make = getattr(import_module(home), maker)
    except ImportError as error:
        raise MissingExtraError(f"the {what} {model!r}", "langchain", "langchain") from error
    try:
        return make(model, **settings)
    except ImportError as error:  # langchain's own text names the package and how to install it
        raise ConfigError(f"the {what} {model!r} cannot be used: {error}") from error
    except Exception as error:  # every provider has its own for a missing key
        raise ConfigError(f"the {what} {model!r} cannot be set up: {error}") from error


def _identity(embeddings: Embeddings) -> str:
    """Class, model name, and a digest of what else its vectors depend on."""
    told = {name: getattr(embeddings, name) for name in IDENTITY if getattr(embeddings, name, None)}
    kind = type(embeddings)
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=repr).encode()).hexdigest()[:8]
    named = next((str(value) for value in told.values() if isinstance(value, str)), "")
    return f"{kind.__module__}.{kind.__qualname__}:{named}:{digest}"


def _limited(model: BaseChatModel, max_tokens: int) -> tuple[BaseChatModel, bool]:
    """The model with its limit set, and whether it has one to set.

    A copy and not a call argument: some integrations (Ollama) refuse the setting there.
    """
    fields = type(model).model_fields
    for limit in LIMITS:
        if limit in fields:
            return model.model_copy(update={limit: max_tokens}), True
    return model, False


def _to_langchain(message: Message) -> BaseMessage:
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

    # a recalled "tool" message has lost the call that it answers, and providers refuse it: it is told by the user
    kinds: dict[str, type[BaseMessage]] = {"system": SystemMessage, "assistant": AIMessage}
    return kinds.get(message["role"], HumanMessage)(content=message["content"])
