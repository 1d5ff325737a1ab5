"""Any server that speaks OpenAI's HTTP protocol as an LLM: vLLM, llama.cpp, Ollama, LM Studio, OpenAI itself.

Replies come from ``/chat/completions`` as they are made; probabilities, where the server shows them, from
``/completions``, which OpenAI has for none of its chat models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from memory_os.adapters.langchain_models import DEFAULT_CONTEXT_WINDOW
from memory_os.adapters.scoring import after_segment
from memory_os.adapters.tokenizers import counter_for, end_before, end_within
from memory_os.errors import CapabilityError, ConfigError, LLMError, MemoryOSError
from memory_os.protocols import Reading
from memory_os.types import Message

if TYPE_CHECKING:
    import httpx
    import numpy as np
    from numpy.typing import NDArray

    from memory_os.protocols import TokenCounter

__all__ = ["OpenAICompatibleLLM"]

EXAMPLE = "http://localhost:8000/v1#qwen2.5"
TOP_N = 20  # the most that vLLM shows unless it is started with more
LEGACY_TOP_N = 5  # the most that OpenAI's own /completions shows
MAX_STOPS = 4  # the most that OpenAI takes; all of them are looked for here anyway
ATTEMPTS = 3
MAX_CONNECT_S = 10.0
MAX_QUOTE = 300
SUM_TOLERANCE = 1e-3  # probabilities come rounded

T = TypeVar("T")


class OpenAICompatibleLLM:
    """A chat model behind OpenAI's HTTP protocol. Nothing is sent before the first reply or reading is asked for.

    A connection that fails and an answer 429 or 5xx are tried again, up to three times in all, but never after the
    first piece of a reply.

    :param base_url: where the protocol begins, for example ``http://localhost:8000/v1``.
    :param model: the server's name for the model; errors and traces use it too.
    :param api_key: by default ``OPENAI_API_KEY`` of the environment, if it is set; ``""`` sends none.
    :param context_window: most tokens of prompt and reply together; by default 8192, and ``notes`` says so.
    :param tokenizer: counts tokens; by default by the model's name, exactly for OpenAI's models with cl100k_base and
        approximately (cl100k_base and 15%) for others.
    :param top_n: how many of the likeliest tokens a reading holds, by default 20; OpenAI shows at most 5.
    :param timeout_s: most seconds without a byte from the server.
    :param batch_size: most prompts in one request for readings; 1 from when a server shows that it takes no list.
    :raises ConfigError: for a URL, model, key or number that cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        context_window: int | None = None,
        tokenizer: TokenCounter | None = None,
        top_n: int | None = None,
        timeout_s: float = 120.0,
        batch_size: int = 8,
    ) -> None:
        self.base_url, self._host = _checked_url(base_url)
        if not model:
            raise ConfigError(f"no model named at {self.base_url}; write URL#MODEL, for example {EXAMPLE}")
        self.name = model
        self._key = _checked_key(os.environ.get("OPENAI_API_KEY", "") if api_key is None else api_key)
        self.top_n = TOP_N if top_n is None else top_n
        if self.top_n < 1 or batch_size < 1 or not timeout_s > 0:
            raise ConfigError("top_n and batch_size are at least 1, and timeout_s is more than 0")
        self._batch_size = batch_size
        self._takes_schemas = True  # until a server says otherwise
        self._timeout_s = timeout_s
        self._pause_s = 0.5  # before the second attempt; twice as long before each further one
        self._counter = tokenizer or counter_for(model)
        notes = []
        if context_window is None:
            notes.append(f"the context window of {model} is not known; {DEFAULT_CONTEXT_WINDOW} tokens are assumed")
        if not self._counter.exact:
            notes.append(f"tokens of {model} are counted approximately, by {self._counter.name}")
        self.notes: tuple[str, ...] = tuple(notes)
        self.context_window: int = context_window or DEFAULT_CONTEXT_WINDOW

    def __repr__(self) -> str:
        return f"OpenAICompatibleLLM({self.base_url!r}, {self.name!r})"

    @property
    def exact(self) -> bool:
        """Whether token counts are the model's own."""
        return self._counter.exact

    def fingerprint(self) -> str:
        """Server, model and ``top_n``; what else the server changes cannot be seen from here."""
        return f"{self.base_url.partition('://')[2]}#{self.name}:{self.top_n}"

    def count_text(self, text: str) -> int:
        """Tokens of ``text`` alone."""
        return self._counter.count_text(text)

    def count_tokens(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> int:
        """Tokens of the whole chat."""
        return self._counter.count_tokens(messages, tools)

    def generate(self, messages: Sequence[Message], *, max_tokens: int, stop: Sequence[str] = ()) -> Iterator[str]:
        """Yield the reply as the server streams it. Closing the iterator closes the connection.

        :raises LLMError: if the server cannot be reached, refuses, or does not keep to the protocol.
        """
        if max_tokens < 1:
            return
        stream = self._stream(messages, max_tokens, [s for s in stop if s])
        # the server was told the limit, and counts better than an approximation, which would cut its replies short
        within = end_within(stream, max_tokens, self._counter) if self.exact else stream
        try:
            yield from end_before(within, stop)
        finally:
            stream.close()

    def generate_structured(self, messages: Sequence[Message], schema: Mapping[str, Any], *, max_tokens: int) -> str:
        """The whole reply, held to a JSON schema by the server (``response_format``).

        :raises CapabilityError: if the server refuses to; it is not asked to again.
        :raises LLMError: as ``generate``.
        """
        if self._takes_schemas:
            form = {"name": schema["title"], "strict": True, "schema": dict(schema)}
            asked = {"response_format": {"type": "json_schema", "json_schema": form}}
            try:
                return "".join(self._stream(messages, max_tokens, [], asked))
            except LLMError as error:
                if not _takes_no_schema(error.__cause__):
                    raise
                self._takes_schemas = False
        raise CapabilityError("alr2", "structured output", "a server that takes response_format")

    def read(self, segments: Sequence[str], question: str, stem: str) -> Iterator[Reading]:
        """One reading for each segment, in order, of the ``top_n`` likeliest tokens; see ``ScoringLLM``.

        :raises LLMError: if the server cannot be reached, refuses, or does not keep to the protocol.
        :raises CapabilityError: if the server shows no log-probabilities.
        """
        if not segments:
            return
        asked, cue = after_segment(question, stem)
        prompts = [segment + asked + cue for segment in segments]
        done = 0
        with self._client() as client:
            while done < len(prompts):
                some = prompts[done : done + self._batch_size]
                try:
                    readings = self._read_batch(client, some)
                except LLMError as error:
                    if _completes_nothing(error.__cause__):
                        raise CapabilityError("xl3m", "log-probabilities", "HuggingFaceLLM") from error
                    if len(some) == 1 or not _may_be_of_the_list(error.__cause__):
                        raise
                    readings = self._read_batch(client, some[:1])
                    self._batch_size = 1
                shown = [len(reading.next_token) > 0 for reading in readings]
                if not done and not any(shown):
                    raise CapabilityError("xl3m", "log-probabilities", "HuggingFaceLLM")
                if not all(shown):
                    raise LLMError(self.name, "the server shows log-probabilities for some segments, not for others")
                yield from readings
                done += len(readings)

    def _stream(
        self, messages: Sequence[Message], max_tokens: int, stop: list[str], more: Mapping[str, Any] | None = None
    ) -> Generator[str, None, None]:
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [_to_openai(message) for message in messages],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            **(more or {}),
        }
        if stop:
            body["stop"] = stop[:MAX_STOPS]

        def begin() -> tuple[Generator[str, None, None], str]:
            begun = self._pieces(body)
            return begun, next(begun, "")

        pieces = None
        try:
            pieces, first = self._tried(begin)
            if first:
                yield first
            yield from pieces
        except MemoryOSError:
            raise
        except Exception as error:
            raise self._failed(error) from error
        finally:
            if pieces is not None:
                pieces.close()

    def _pieces(self, body: Mapping[str, Any]) -> Generator[str, None, None]:
        with (
            self._client() as client,
            client.stream("POST", f"{self.base_url}/chat/completions", json=body) as response,
        ):
            if not response.is_success:
                response.read()  # what it says of the reason
                response.raise_for_status()
            for event in _events(response.iter_bytes()):
                if event == "[DONE]":
                    return
                text, finished = _read_event(event)
                if text:
                    yield text
                if finished:
                    return
        raise _BadAnswerError("the server's stream ended before the reply did; see its log, and ask again")

    def _read_batch(self, client: httpx.Client, prompts: list[str]) -> list[Reading]:
        body = {"model": self.name, "prompt": prompts, "max_tokens": 1, "temperature": 0, "logprobs": self.top_n}

        def post() -> httpx.Response:
            return client.post(f"{self.base_url}/completions", json=body).raise_for_status()

        try:
            return _readings(self._tried(post).text, len(prompts))
        except Exception as error:
            raise self._failed(error) from error

    def _client(self) -> httpx.Client:
        import httpx

        try:
            return httpx.Client(
                headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
                timeout=httpx.Timeout(self._timeout_s, connect=min(self._timeout_s, MAX_CONNECT_S)),
                # a proxy that the environment names would look for this machine's server on its own machine
                trust_env=self._host not in ("localhost", "127.0.0.1", "::1"),
            )
        except Exception as error:
            problem = f"the proxy or certificates that the environment names cannot be used: {error}"
            raise LLMError(self.name, problem) from error

    def _tried(self, call: Callable[[], T]) -> T:
        """What the call gives, made again while it fails for a reason that may pass."""
        from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

        retrying = Retrying(
            retry=retry_if_exception(_may_pass),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential(multiplier=self._pause_s),
            reraise=True,
        )
        return retrying(call)

    def _failed(self, error: Exception) -> LLMError:
        """The error as a user should see it."""
        import httpx

        if isinstance(error, _BadAnswerError):
            problem = f"{error}{self._quote(error.said)}"
        elif isinstance(error, httpx.HTTPStatusError):
            problem = self._refusal(error.response)
        elif isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            problem = f"no server can be reached at {self.base_url} ({error}); is it running there?"
        elif isinstance(error, httpx.TimeoutException):
            problem = f"{self.base_url} was silent for {self._timeout_s:g} s; see its log, or raise timeout_s"
        elif isinstance(error, httpx.TransportError):
            problem = f"the connection to {self.base_url} broke ({error}); see the server's log, and ask again"
        else:
            problem = f"{type(error).__name__}: {error}"
        return LLMError(self.name, problem)

    def _refusal(self, response: httpx.Response) -> str:
        status, said = response.status_code, _message_of(response.text)
        quote = self._quote(said)
        if status == 401:  # its text is left out: OpenAI's repeats a part of the key
            whose = "refuses the API key" if self._key else "wants an API key"
            return f"{self.base_url} {whose} (HTTP 401); set OPENAI_API_KEY or give api_key="
        if status == 404:
            hint = f"does it have the model {self.name!r}, and is {self.base_url} where its API begins (mostly .../v1)?"
            return f"HTTP 404 of {response.url.path}; {hint}{quote}"
        if status == 429:
            return f"it has no room for more requests (HTTP 429); wait, or raise the limit there{quote}"
        if status >= 500:
            return f"the server has an error of its own (HTTP {status}); see its log{quote}"
        if response.is_redirect:
            return f"{self.base_url} sends elsewhere (HTTP {status}); give the URL of where it sends to"
        if self.top_n > LEGACY_TOP_N and "logprob" in said.lower():
            fewer = f"it does not show {self.top_n} log-probabilities (HTTP {status})"
            return f"{fewer}; make this LLM with top_n={LEGACY_TOP_N}{quote}"
        return f"it refuses the request (HTTP {status}){quote}"

    def _quote(self, said: str) -> str:
        """What the server said, as the end of an error: short, and without the key that it may repeat."""
        text = " ".join((said.replace(self._key, "***") if self._key else said).split())
        return f": {text[:MAX_QUOTE]}{'...' if len(text) > MAX_QUOTE else ''}" if text else ""


class _BadAnswerError(Exception):
    """An answer that breaks the protocol. What the server ``said`` is no part of the text: it may repeat the key."""

    def __init__(self, problem: str, said: str = "") -> None:
        super().__init__(problem)
        self.said = said


class _WrongNumberError(_BadAnswerError):
    """Not one answer for each prompt."""


def _checked_url(base_url: str) -> tuple[str, str]:
    """``(URL without a slash at the end, host)``. Its text may hold a password, so errors do not show it."""
    try:
        parts = urlsplit(base_url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"the LLM's URL cannot be read; write it as in {EXAMPLE}") from error
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(f"the LLM's URL names no http or https server; write it as in {EXAMPLE}")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(
            "the LLM's URL must hold no user, password, query or fragment; give a key as OPENAI_API_KEY or api_key="
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}", host


def _checked_key(key: str) -> str:
    key = key.strip()
    if not (key.isascii() and key.isprintable()):  # httpx would refuse it with an error that shows it
        raise ConfigError("the API key (OPENAI_API_KEY or api_key=) holds characters that no key has; copy it again")
    return key


def _may_pass(error: BaseException) -> bool:
    import httpx

    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    # a time-out of a server that did accept the request has taken long enough
    return isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError | httpx.ConnectTimeout)


def _completes_nothing(error: BaseException | None) -> bool:
    """Whether a server has the model, but no ``/completions`` for it: OpenAI's chat models among them."""
    import httpx

    if not isinstance(error, httpx.HTTPStatusError):
        return False
    status, said = error.response.status_code, _message_of(error.response.text).lower()
    return status in (405, 501) or (status in (400, 404) and "chat" in said and "completions" in said)


def _takes_no_schema(error: BaseException | None) -> bool:
    """Whether a server refused a request because of the schema of its answer."""
    import httpx

    if not isinstance(error, httpx.HTTPStatusError) or error.response.status_code not in (400, 404, 415, 422, 501):
        return False
    said = error.response.text.lower()
    return "response_format" in said or "json_schema" in said or "structured output" in said


def _may_be_of_the_list(error: BaseException | None) -> bool:
    """Whether a server that takes one prompt at a time may have failed so when it was given several."""
    import httpx

    if isinstance(error, httpx.HTTPStatusError):
        status = error.response.status_code
        return status in (400, 422) or status >= 500  # 500: llama-cpp-python
    return isinstance(error, _WrongNumberError)  # it answered the first of them


def _to_openai(message: Message) -> dict[str, str]:
    # a recalled "tool" message has lost the call that it answers, and servers refuse it: it is told by the user
    role = message["role"] if message["role"] in ("system", "assistant") else "user"
    return {"role": role, "content": message["content"]}


def _events(chunks: Iterable[bytes]) -> Iterator[str]:
    """The data of each server-sent event. Lines are cut as bytes: a chunk may end within a character."""
    held = b""
    for chunk in chunks:
        *lines, held = (held + chunk).split(b"\n")
        yield from _data(lines)
    yield from _data([held])


def _data(lines: Iterable[bytes]) -> Iterator[str]:
    for raw in lines:
        line = raw.decode("utf-8", "replace").rstrip("\r")
        field, colon, value = line.partition(":")
        if field == "data" and colon:
            yield value.strip()
        elif field == "error" and colon:  # how llama.cpp tells of one in the middle of a reply
            raise _BadAnswerError("the server broke the reply off", _message_of(value))
        elif field not in ("", "event", "id", "retry"):
            raise _BadAnswerError("the server's answer is no stream of events; does its API begin at this URL?", line)


def _read_event(event: str) -> tuple[str, bool]:
    """``(piece of the reply, whether it is the last)``."""
    try:
        told = json.loads(event)
        if told.get("error"):
            raise _BadAnswerError("the server broke the reply off", _message_of(event))
        choices = told.get("choices") or [{}]  # none: an event with nothing but the number of tokens
        text = (choices[0].get("delta") or {}).get("content") or ""
        if not isinstance(text, str):
            raise TypeError(type(text))
        return text, bool(choices[0].get("finish_reason"))
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise _BadAnswerError("the server's stream has an event that is no piece of a reply", event) from error


def _message_of(body: str) -> str:
    """The message in an error's body, in whatever form servers give it."""
    try:
        told = json.loads(body)
    except ValueError:
        return body
    for field in ("error", "message", "detail"):
        if isinstance(told, dict) and told.get(field):
            told = told[field]
    return told if isinstance(told, str) else json.dumps(told, ensure_ascii=False)


def _readings(body: str, n: int) -> list[Reading]:
    """The readings of ``n`` prompts, in their order; empty ones where the server shows no log-probabilities."""
    try:
        answer = json.loads(body)
        # some versions of llama.cpp answer several prompts with several answers
        choices = [choice for one in (answer if isinstance(answer, list) else [answer]) for choice in one["choices"]]
        by_index = {choice.get("index", at): choice for at, choice in enumerate(choices)}
        if len(choices) != n or by_index.keys() != set(range(n)):
            problem = f"the server answered {n} prompts with {len(choices)} choices, numbered {sorted(by_index)}"
            raise _WrongNumberError(problem)
        shown = [_log_probs(by_index[at].get("logprobs") or {}) for at in range(n)]
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise _BadAnswerError("the server's answer to /completions cannot be read", body) from error
    return [Reading(next_token=one, complete=False, question=None) for one in shown]


def _log_probs(logprobs: Mapping[str, Any]) -> NDArray[np.float32]:
    """Log-probabilities (nats) of the first token made, ``[at most top_n]``; none where the server shows none."""
    import numpy as np

    if content := logprobs.get("content"):  # as for chats; llama.cpp
        listed = [entry["logprob"] for entry in content[0].get("top_logprobs") or ()]
    else:
        listed = list(((logprobs.get("top_logprobs") or [None])[0] or {}).values())
    values = np.array([float(value) for value in listed])
    if np.isnan(values).any() or (values > SUM_TOLERANCE).any() or np.exp(values).sum() > 1 + SUM_TOLERANCE:
        raise _BadAnswerError("the server's log-probabilities are none", str(listed))
    likely: NDArray[np.float32] = np.minimum(values[np.isfinite(values)], 0.0).astype(np.float32)
    return likely  # without the impossible
