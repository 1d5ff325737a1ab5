"""A server of OpenAI's protocol, with the faults that servers have, behind the LLM seam."""

import contextlib
import json
import math
import socket
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from memory_os import Memory
from memory_os.adapters.langchain_models import DEFAULT_CONTEXT_WINDOW
from memory_os.adapters.openai_compatible import OpenAICompatibleLLM
from memory_os.adapters.scripted import WordCounter
from memory_os.ask import reply_to
from memory_os.build import make_llm, tokenizer_of
from memory_os.errors import CapabilityError, ConfigError, LLMError, UnknownNameError
from memory_os.protocols import LLM, ScoringLLM, StructuredLLM

ASK = [{"role": "user", "content": "Hello"}]
KEY = "sk-do-not-show-me"


class Server(ThreadingHTTPServer):
    """Answers ``/v1/chat/completions`` and ``/v1/completions``; a test sets what and how."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.seen = []  # (path, body, headers) of every request
        self.refuse = []  # (status, body) for the next requests; None hangs up
        self.stream = b""  # the chat's answer, whole, or a list of its chunks
        self.pause_s = 0.0  # before each chunk
        self.hang_up = False  # leave the answer without its end
        self.left = threading.Event()  # the client went away
        self.complete = lambda body: {"choices": []}

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.seen.append((self.path, body, dict(self.headers)))
        if server.refuse:
            refusal = server.refuse.pop(0)
            if refusal is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.answer(*refusal)
        elif self.path == "/v1/completions":
            self.answer(200, server.complete(body))
        else:
            self.send_chunks([server.stream] if isinstance(server.stream, bytes) else server.stream)

    def answer(self, status, body):
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send_chunks(self, chunks):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for chunk in chunks:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                time.sleep(self.server.pause_s)
            if not self.server.hang_up:
                self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.server.left.set()
        self.close_connection = True


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def llm_of(server, **settings):
    llm = OpenAICompatibleLLM(server.url, "some-model", **settings)
    llm._pause_s = 0
    return llm


def event(text=None, finish=None, **more):
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": finish}], **more}).encode()


def sse(*events):
    return b"".join(one + b"\n\n" for one in events)


DONE = b"data: [DONE]"
HI = sse(event("Hi "), event("there"), event(finish="stop"), DONE)


# Replies.


def test_the_reply_streams_and_the_request_is_openais(server):
    server.stream = HI
    chat = [{"role": r, "content": r} for r in ("system", "user", "assistant", "tool")]
    assert list(llm_of(server).generate(chat, max_tokens=9)) == ["Hi ", "there"]
    path, body, headers = server.seen[0]
    assert path == "/v1/chat/completions"
    assert [m["role"] for m in body.pop("messages")] == ["system", "user", "assistant", "user"]
    assert body == {"model": "some-model", "max_tokens": 9, "temperature": 0, "stream": True}
    assert "Authorization" not in headers


@pytest.mark.parametrize(
    "stream",
    [
        sse(event("Hi"), DONE),
        sse(event("Hi"), event(finish="length")),
        sse(event("Hi", finish="stop")),
        sse(b": ping", b"event: message\nid: 7\nretry: 10", event("Hi"), DONE),
        sse(event("Hi"), b'data: {"choices": [], "usage": {"total_tokens": 3}}', DONE),
        sse(event("Hi"), DONE).replace(b"\n", b"\r\n"),
        sse(event("Hi"), DONE).replace(b"data: ", b"data:").rstrip(),
        sse(b'data: {"choices": [{"delta": {"role": "assistant"}}]}', event("Hi"), event(""), DONE),
        sse(b'data: {"choices": [{"delta": null}]}', event("Hi"), DONE),
    ],
)
def test_every_form_of_the_stream_is_understood(server, stream):
    server.stream = stream
    assert list(llm_of(server).generate(ASK, max_tokens=9)) == ["Hi"]


def test_characters_may_be_cut_by_chunks_and_hold_any_line_end(server):
    text = "Grüße, 世界 🙂\u2028\x85 end"
    raw = json.dumps({"choices": [{"delta": {"content": text}}]}, ensure_ascii=False).encode()
    stream = sse(b"data: " + raw, DONE)
    server.stream = [stream[i : i + 1] for i in range(len(stream))]
    assert list(llm_of(server).generate(ASK, max_tokens=9)) == [text]


def test_stop_is_passed_on_and_kept_anyhow(server):
    server.stream = sse(event("Yes"), event("\nUs"), event("er: no"), event("more"), DONE)
    stops = ["\nUser:", "", "2", "3", "4", "5"]
    assert "".join(llm_of(server).generate(ASK, max_tokens=99, stop=stops)) == "Yes"
    assert server.seen[0][1]["stop"] == ["\nUser:", "2", "3", "4"]


def test_an_exact_count_keeps_the_limit_that_the_server_does_not(server):
    server.stream = sse(event("one two "), event("three four"), DONE)
    exact = llm_of(server, tokenizer=WordCounter())
    assert "".join(exact.generate(ASK, max_tokens=3)).split() == ["one", "two", "three"]
    assert "".join(llm_of(server).generate(ASK, max_tokens=3)) == "one two three four"


def test_no_room_for_a_reply_sends_nothing(server):
    assert list(llm_of(server).generate(ASK, max_tokens=0)) == []
    assert server.seen == []


def test_closing_midway_ends_the_connection(server):
    server.stream, server.pause_s = [sse(event("a "))] * 500, 0.01
    reply = llm_of(server).generate(ASK, max_tokens=999)
    assert next(reply) == "a "
    reply.close()
    assert server.left.wait(5)


def test_a_stop_ends_the_connection(server):
    server.stream, server.pause_s = [sse(event("a "))] * 500, 0.01
    assert list(llm_of(server).generate(ASK, max_tokens=999, stop=["a a a "])) == []
    assert server.left.wait(5)


# What goes wrong.


@pytest.mark.parametrize(
    ("status", "body", "problem"),
    [
        (401, {"error": {"message": f"Incorrect key {KEY}"}}, r"refuses the API key \(HTTP 401\); set OPENAI_API_KEY"),
        (404, {"error": {"message": "no such model"}}, "does it have the model 'some-model', .*: no such model"),
        (404, "<html>nothing here</html>", "<html>nothing here</html>"),
        (400, {"error": "too long"}, r"refuses the request \(HTTP 400\): too long"),
        (422, {"detail": [{"msg": "missing"}]}, '"msg": "missing"'),
        (307, "", "sends elsewhere"),
        (403, {"error": {"message": f"Bearer {KEY} may not"}}, r"Bearer \*\*\* may not"),
    ],
)
def test_a_refusal_is_told_once_and_names_the_fix(server, status, body, problem):
    server.refuse, server.stream = [(status, body)], HI
    with pytest.raises(LLMError, match=f"the LLM some-model failed: .*{problem}") as caught:
        next(llm_of(server, api_key=KEY).generate(ASK, max_tokens=9))
    assert len(server.seen) == 1
    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_a_server_that_wants_a_key_is_told_from_one_that_refuses_it(server):
    server.refuse = [(401, {})]
    with pytest.raises(LLMError, match="wants an API key"):
        next(llm_of(server).generate(ASK, max_tokens=9))


@pytest.mark.parametrize("trouble", [(500, "oops"), (503, {"error": "loading"}), (429, {}), None])
def test_what_may_pass_is_tried_again(server, trouble):
    server.refuse, server.stream = [trouble, trouble], HI
    assert "".join(llm_of(server).generate(ASK, max_tokens=9)) == "Hi there"
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("trouble", "problem"),
    [
        ((500, "oops"), r"an error of its own \(HTTP 500\).*: oops"),
        ((429, {"error": {"message": "quota"}}), "quota"),
        (None, "the connection .* broke"),
    ],
)
def test_what_does_not_pass_is_told(server, trouble, problem):
    server.refuse = [trouble] * 3
    with pytest.raises(LLMError, match=problem):
        next(llm_of(server).generate(ASK, max_tokens=9))
    assert len(server.seen) == 3


def test_attempts_wait_longer_each_time(server, monkeypatch):
    slept = []
    monkeypatch.setattr("tenacity.nap.time.sleep", slept.append)
    server.refuse, server.stream = [(500, ""), (500, "")], HI
    llm = OpenAICompatibleLLM(server.url, "some-model")
    assert "".join(llm.generate(ASK, max_tokens=9)) == "Hi there"
    assert [s for s in slept if s] == [0.5, 1.0]  # without the server's own


def test_a_server_that_is_not_there_is_named():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        llm = OpenAICompatibleLLM(url, "some-model")  # nothing is sent yet
        llm._pause_s = 0
        for ask in (llm.generate(ASK, max_tokens=9), llm.read(["a"], "b", "c")):
            with pytest.raises(LLMError, match=f"no server can be reached at {url} .*is it running there"):
                next(ask)


def test_a_silent_server_is_not_waited_for_thrice(server):
    server.stream, server.pause_s = [sse(event("a ")), sse(DONE)], 1
    reply = llm_of(server, timeout_s=0.2).generate(ASK, max_tokens=9)
    assert next(reply) == "a "
    with pytest.raises(LLMError, match=r"silent for 0.2 s; .*timeout_s"):
        next(reply)
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("stream", "problem"),
    [
        (b"", "ended before the reply did"),
        (sse(event("Hi")), "ended before the reply did"),
        (sse(event("Hi"))[:-9], "no piece of a reply"),
        (b"<html>hello</html>", "no stream of events.*<html>"),
        (b'{"choices": [{"message": {"content": "Hi"}}]}', "no stream of events"),
        (sse(b"data: {"), "no piece of a reply: {"),
        (sse(b"data: 7"), "no piece of a reply: 7"),
        (sse(b'data: {"choices": 7}'), "no piece of a reply"),
        (sse(b'data: {"choices": [{"delta": {"content": 7}}]}'), "no piece of a reply"),
        (sse(b'data: {"error": {"message": "out of memory"}}'), "broke the reply off: out of memory"),
        (sse(b'error: {"message": "out of memory"}'), "broke the reply off: out of memory"),
    ],
)
def test_a_broken_stream_is_an_error_and_not_a_short_reply(server, stream, problem):
    server.stream = stream
    with pytest.raises(LLMError, match=problem):
        list(llm_of(server).generate(ASK, max_tokens=9))
    assert len(server.seen) == 1


def test_a_connection_that_breaks_is_tried_again_only_before_the_first_piece(server):
    server.stream, server.hang_up = b": nothing yet\n", True
    with pytest.raises(LLMError, match="broke"):
        list(llm_of(server).generate(ASK, max_tokens=9))
    assert len(server.seen) == 3
    server.stream = sse(event("Hi"))
    reply = llm_of(server).generate(ASK, max_tokens=9)
    assert next(reply) == "Hi"
    with pytest.raises(LLMError, match="broke"):
        next(reply)
    assert len(server.seen) == 4


def test_text_that_no_server_can_be_sent_is_an_error_of_the_llm(server):
    server.stream = HI
    with contextlib.suppress(LLMError):  # newer versions of httpx refuse it
        list(llm_of(server).generate([{"role": "user", "content": "\ud800"}], max_tokens=9))


def test_a_proxy_that_cannot_be_used_is_an_error_of_the_llm(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "nonsense://proxy")
    llm = OpenAICompatibleLLM("http://models.invalid/v1", "some-model")
    for ask in (llm.generate(ASK, max_tokens=9), llm.read(["a"], "b", "c")):
        with pytest.raises(LLMError, match="proxy or certificates"):
            next(ask)


# Settings.


def test_the_key_is_sent_and_never_shown(server, monkeypatch):
    server.stream = HI
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    from_env = llm_of(server)
    list(from_env.generate(ASK, max_tokens=9))
    list(llm_of(server, api_key="sk-other").generate(ASK, max_tokens=9))
    list(llm_of(server, api_key="").generate(ASK, max_tokens=9))
    assert [h.get("Authorization") for _, _, h in server.seen] == [f"Bearer {KEY}", "Bearer sk-other", None]
    assert KEY not in repr(from_env) + from_env.fingerprint() + "".join(from_env.notes)
    with pytest.raises(ConfigError, match="copy it again") as caught:
        llm_of(server, api_key="sk-\nbroken")
    assert "broken" not in str(caught.value)


def test_counts_and_window_say_where_they_come_from(server):
    llm = llm_of(server)
    assert isinstance(llm, LLM)
    assert isinstance(llm, ScoringLLM)
    assert (llm.name, llm.exact, llm.context_window, len(llm.notes)) == ("some-model", False, 8192, 2)
    assert DEFAULT_CONTEXT_WINDOW == 8192
    assert "assumed" in llm.notes[0]
    known = OpenAICompatibleLLM(server.url, "gpt-4", context_window=99)
    assert (known.exact, known.context_window, known.notes) == (True, 99, ())
    assert (known.count_tokens(ASK), known.count_text("Hello there")) == (8, 2)
    assert server.seen == []


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("localhost:8000/v1", "names no http or https server"),
        ("http:///v1", "names no http or https server"),
        ("http://[::1/v1", "cannot be read"),
        ("http://host:port/v1", "cannot be read"),
        (f"http://me:{KEY}@host/v1", "no user, password"),
        (f"http://host/v1?key={KEY}", "no user, password"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_and_not_shown(url, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        OpenAICompatibleLLM(url, "some-model")
    assert KEY not in "".join(traceback.format_exception(caught.value)).replace(url, "", 1)


def test_numbers_that_cannot_be_used_are_refused():
    for wrong in ({"top_n": 0}, {"batch_size": 0}, {"timeout_s": 0}, {"timeout_s": math.nan}):
        with pytest.raises(ConfigError, match="at least 1"):
            OpenAICompatibleLLM("http://host/v1", "some-model", **wrong)
    with pytest.raises(ConfigError, match="URL#MODEL"):
        OpenAICompatibleLLM("http://host/v1", "")


def test_the_name_is_the_url_and_the_model():
    llm = make_llm("http://localhost:8000/v1/#org/qwen2.5:7b")
    assert isinstance(llm, OpenAICompatibleLLM)
    assert (llm.base_url, llm.name) == ("http://localhost:8000/v1", "org/qwen2.5:7b")
    assert tokenizer_of("http://localhost:8000/v1#gpt-4") == "gpt-4"
    for unfinished in ("https://host/v1", "https://host/v1#"):
        for use in (make_llm, tokenizer_of):
            with pytest.raises(ConfigError, match="URL#MODEL"):
                use(unfinished)
    with pytest.raises(UnknownNameError, match="URL#MODEL"):
        make_llm("nonesuch")


def test_a_memory_chats_by_url_and_its_traces_hold_no_key(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.stream = HI
    with Memory.open(tmp_path / "memory.db", llm=f"{server.url}#some-model", embedder="hash") as memory:
        alice = memory.namespace("alice")
        assert alice.chat("Hello").text == "Hi there"
        trace = str(alice.why()[0])
        server.refuse = [(403, KEY)]
        with pytest.raises(LLMError) as caught:
            alice.chat("Hello again")
        trace += str(alice.why()[0])
    assert "some-model" in trace
    assert KEY not in trace + str(caught.value)
    assert KEY.encode() not in b"".join(file.read_bytes() for file in tmp_path.iterdir())


# Probabilities.


def legacy(values):
    return {"top_logprobs": [{f"t{i}": value for i, value in enumerate(values)}]}


def chat_style(values):
    return {"content": [{"token": "t0", "top_logprobs": [{"token": "t", "logprob": value} for value in values]}]}


def answering(*per_prompt, form=legacy):
    """Answers each prompt with the log-probabilities at the number that it begins with, the last prompt first."""

    def complete(body):
        choices = [
            {"index": i, "text": "t0", "logprobs": form(per_prompt[int(prompt.split("\n")[0])])}
            for i, prompt in enumerate(body["prompt"])
        ]
        return {"choices": choices[::-1]}

    return complete


SURE, UNSURE = [-0.1, -3.0], [-0.7, -0.9, -4.0]


@pytest.mark.parametrize("form", [legacy, chat_style])
def test_readings_come_in_the_order_of_the_segments(server, form):
    server.complete = answering(*[[-0.1 * (i + 1), -9.0] for i in range(19)], form=form)
    readings = list(llm_of(server, top_n=2).read([str(i) for i in range(19)], "Who?", "It is "))
    assert np.allclose([r.next_token[0] for r in readings], [-0.1 * (i + 1) for i in range(19)])
    assert {(r.next_token.dtype, r.complete, r.question) for r in readings} == {(np.dtype("float32"), False, None)}
    assert [len(body["prompt"]) for _, body, _ in server.seen] == [8, 8, 3]
    path, body, _ = server.seen[0]
    assert path == "/v1/completions"
    assert body.pop("prompt")[1] == "1\n\nQuestion: Who?\nAnswer: It is"
    assert body == {"model": "some-model", "max_tokens": 1, "temperature": 0, "logprobs": 2}


def test_an_empty_stem_leaves_no_space_at_the_end(server):
    server.complete = answering(SURE)
    assert len(list(llm_of(server).read(["0"], "Who?", ""))) == 1
    assert server.seen[0][1]["prompt"] == ["0\n\nQuestion: Who?\nAnswer:"]
    assert server.seen[0][1]["logprobs"] == 20


def test_no_segments_no_request(server):
    assert list(llm_of(server).read([], "Who?", "")) == []
    assert server.seen == []


def test_readings_are_asked_for_as_they_are_wanted(server):
    server.complete = answering(SURE)
    readings = llm_of(server, batch_size=1).read(["0", "0", "0"], "Who?", "")
    next(readings)
    readings.close()
    assert len(server.seen) == 1


def test_a_server_may_answer_each_prompt_by_itself_or_leave_numbers_out(server):
    llm = llm_of(server)
    server.complete = lambda body: [
        {"choices": [{"index": i, "logprobs": legacy(v)}]} for i, v in [(1, UNSURE), (0, SURE)]
    ]
    assert [len(r.next_token) for r in llm.read(["a", "b"], "Who?", "")] == [2, 3]
    server.complete = lambda body: {"choices": [{"logprobs": legacy(SURE)}, {"logprobs": legacy(UNSURE)}]}
    assert [len(r.next_token) for r in llm.read(["a", "b"], "Who?", "")] == [2, 3]


@pytest.mark.parametrize("indexes", [[], [0, 0], [1, 2], [0, 1, 2], [None, "a"]])
def test_answers_that_cannot_be_told_apart_are_an_error(server, indexes):
    server.complete = lambda body: {"choices": [{"index": i, "logprobs": legacy(SURE)} for i in indexes]}
    with pytest.raises(LLMError, match=r"answered 1 prompts with|cannot be read"):
        list(llm_of(server).read(["a", "b"], "Who?", ""))


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        {},
        {"top_logprobs": None},
        {"top_logprobs": []},
        {"top_logprobs": [None]},
        {"top_logprobs": [{}]},
        {"content": [{"token": "a", "logprob": -0.1, "top_logprobs": []}]},
    ],
)
def test_a_server_without_probabilities_lacks_a_capability(server, logprobs):
    server.complete = lambda body: {"choices": [{"index": 0, "logprobs": logprobs}]}
    with pytest.raises(CapabilityError, match="'xl3m' needs an LLM with log-probabilities; HuggingFaceLLM is one"):
        list(llm_of(server).read(["a"], "Who?", ""))


CHAT_ONLY = "This is a chat model and not supported in the v1/completions endpoint. Did you mean v1/chat/completions?"


@pytest.mark.parametrize("refusal", [(404, {"error": {"message": CHAT_ONLY}}), (405, {}), (501, {})])
def test_a_server_that_only_chats_lacks_a_capability(server, refusal):
    server.refuse = [refusal] * 3
    with pytest.raises(CapabilityError, match="HuggingFaceLLM is one"):
        list(llm_of(server).read(["a", "b"], "Who?", ""))


@pytest.mark.parametrize("batch_size", [1, 8])
def test_probabilities_for_some_segments_only_are_an_error(server, batch_size):
    server.complete = answering(SURE, [])
    with pytest.raises(LLMError, match="for some segments, not for others"):
        list(llm_of(server, batch_size=batch_size).read(["0", "1"], "Who?", ""))


@pytest.mark.parametrize("values", [[math.nan], [0.5], [-0.1, -0.1], [math.inf], [True]])
def test_what_is_no_log_probability_is_an_error(server, values):
    server.complete = answering(values)
    with pytest.raises(LLMError, match="log-probabilities are none"):
        list(llm_of(server).read(["0"], "Who?", ""))


def test_rounding_and_impossible_tokens_are_put_up_with(server):
    server.complete = answering([0.0004, -math.inf, -9999.0])
    [reading] = llm_of(server).read(["0"], "Who?", "")
    assert reading.next_token.tolist() == [0.0, -9999.0]


@pytest.mark.parametrize(
    "answer", ["no JSON", [7], {"choices": 7}, {}, {"choices": [{"logprobs": legacy(["a"])}]}, {"choices": [7]}]
)
def test_an_answer_in_another_form_is_an_error(server, answer):
    server.complete = lambda body: answer
    with pytest.raises(LLMError, match="cannot be read"):
        list(llm_of(server).read(["a"], "Who?", ""))


def test_a_server_that_shows_fewer_names_the_fix(server):
    server.refuse = [(400, {"error": {"message": "Invalid value for 'logprobs': maximum is 5"}})]
    with pytest.raises(LLMError, match=r"does not show 20 .*top_n=5: Invalid value"):
        list(llm_of(server).read(["a"], "Who?", ""))
    assert len(server.seen) == 1


@pytest.mark.parametrize("how", [400, 500, "first only"])
def test_a_server_that_takes_one_prompt_at_a_time_is_given_them_so(server, how):
    answer = answering(*[[-0.1 * (i + 1)] for i in range(4)])
    server.complete = lambda body: answer({"prompt": body["prompt"][:1]})
    server.refuse = {400: [(400, "")], 500: [(500, "")] * 3}.get(how, [])
    llm = llm_of(server)
    for _ in range(2):
        readings = list(llm.read(["0", "1", "2", "3"], "Who?", ""))
        assert np.allclose([r.next_token[0] for r in readings], [-0.1, -0.2, -0.3, -0.4])
    assert [len(body["prompt"]) for _, body, _ in server.seen] == [4] * (3 if how == 500 else 1) + [1] * 8


def test_a_server_that_refuses_one_prompt_too_says_why(server):
    server.refuse = [(400, {"error": "too long"})] * 2
    with pytest.raises(LLMError, match=r"refuses the request .*: too long"):
        list(llm_of(server).read(["a", "b"], "Who?", ""))
    assert [len(body["prompt"]) for _, body, _ in server.seen] == [2, 1]


@pytest.mark.parametrize("refusal", [(401, {}), (404, {})])
def test_what_is_not_of_the_list_is_not_asked_again(server, refusal):
    server.refuse = [refusal]
    with pytest.raises(LLMError, match=f"HTTP {refusal[0]}"):
        list(llm_of(server).read(["a", "b"], "Who?", ""))
    assert len(server.seen) == 1


def test_a_reading_is_tried_again(server):
    server.refuse, server.complete = [(503, ""), None], answering(SURE)
    assert len(list(llm_of(server).read(["0"], "Who?", ""))) == 1


def test_the_fingerprint_tells_readings_apart():
    made = [
        OpenAICompatibleLLM(url, model, api_key=KEY, top_n=n).fingerprint()
        for url, model, n in [
            ("http://a:1/v1", "m", None),
            ("http://a:2/v1", "m", None),
            ("http://a:1/v2", "m", None),
            ("http://a:1/v1", "n", None),
            ("http://a:1/v1", "m", 5),
        ]
    ]
    assert len(set(made)) == 5
    assert OpenAICompatibleLLM("http://a:1/v1/", "m", top_n=20).fingerprint() == made[0] == "a:1/v1#m:20"


@pytest.mark.slow
def test_a_real_models_probabilities_arrive_as_they_are(server):
    import torch

    from memory_os.adapters.huggingface import HuggingFaceLLM

    model = HuggingFaceLLM(dtype="float32")
    distributions = []

    def complete(body):
        choices = []
        for i, prompt in enumerate(body["prompt"]):
            ids = torch.tensor([model._chat.tokenizer.encode(prompt, add_special_tokens=False)])
            with torch.inference_mode():
                full = model.model(ids.to(model.model.device)).logits[0, -1].float().log_softmax(-1).cpu()
            distributions.append(full.double().numpy())
            best = full.topk(body["logprobs"])
            # by number: texts of tokens may be alike, and a server that tells them by text loses some
            shown = dict(zip(map(str, best.indices.tolist()), best.values.tolist(), strict=True))
            choices.append({"index": i, "text": "", "logprobs": {"top_logprobs": [shown]}})
        return {"choices": choices}

    server.complete = complete
    segments = ["The capital of France is Paris.", "Bees make honey.", "Maria was born in 1984 in Lima, 秘鲁."]
    readings = list(llm_of(server).read(segments, "What is the capital of France?", "The capital of France is"))
    for reading, full in zip(readings, distributions, strict=True):
        assert np.array_equal(reading.next_token, np.sort(full)[::-1][:20].astype(np.float32))
        log_p = reading.next_token.astype(float)
        rest = 1 - np.exp(log_p).sum()
        assert 0 < rest < 1
        lumped = -(np.exp(log_p) * log_p).sum() - rest * math.log(rest)
        assert 0 < lumped <= -(np.exp(full) * full).sum()


# Structured output.

SCHEMA = {"title": "evidence", "type": "object", "properties": {"evidence": {"type": "array"}}}


def test_a_server_is_held_to_a_schema(server):
    server.stream = sse(event('{"evidence":'), event(" []}"), event(finish="stop"), DONE)
    llm = llm_of(server)
    assert isinstance(llm, StructuredLLM)
    assert llm.generate_structured(ASK, SCHEMA, max_tokens=9) == '{"evidence": []}'
    asked = server.seen[0][1]
    assert asked["max_tokens"] == 9
    assert asked["response_format"]["json_schema"] == {"name": "evidence", "strict": True, "schema": SCHEMA}


def test_a_reply_that_is_cut_off_comes_back_as_far_as_it_got(server):
    server.stream = sse(event('{"evidence": ["S1'), event(finish="length"), DONE)
    assert llm_of(server).generate_structured(ASK, SCHEMA, max_tokens=9) == '{"evidence": ["S1'


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"error": {"message": "unknown field: response_format"}}),
        (404, {"detail": "this model has no structured output"}),
        (422, {"detail": [{"loc": ["body", "response_format", "type"], "msg": "unexpected value"}]}),
        (501, "json_schema is not implemented"),
    ],
)
def test_a_server_without_schemas_lacks_a_capability_and_is_asked_once(server, status, body):
    server.refuse = [(status, body)] * (3 if status == 501 else 1)  # a 5xx may pass
    llm = llm_of(server)
    with pytest.raises(CapabilityError, match="structured output"):
        llm.generate_structured(ASK, SCHEMA, max_tokens=9)
    assert server.refuse == []
    server.seen.clear()
    with pytest.raises(CapabilityError, match="structured output"):
        llm.generate_structured(ASK, SCHEMA, max_tokens=9)
    assert server.seen == []
    server.stream = HI
    assert reply_to(llm, "Hello", max_tokens=9, schema=SCHEMA) == "Hi there"  # asked without


def test_another_refusal_is_a_failure_of_the_server(server):
    server.refuse = [(400, {"error": {"message": "the prompt is too long"}}), (401, {}), *[(500, "oops")] * 3]
    server.stream = sse(event("{}"), DONE)
    llm = llm_of(server)
    for problem in ("too long", "wants an API key", "oops"):
        with pytest.raises(LLMError, match=problem):
            llm.generate_structured(ASK, SCHEMA, max_tokens=9)
    assert llm.generate_structured(ASK, SCHEMA, max_tokens=9) == "{}"  # and is asked again with a schema
