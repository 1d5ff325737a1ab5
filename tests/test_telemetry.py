"""Telemetry tells numbers and names: of a session of sentinel texts none stands in spans, metrics or logs."""

import io
import json
import logging
import subprocess
import sys

import pytest

from memory_os import AsyncMemory, Memory
from memory_os.adapters.scripted import HashEmbedder, ScriptedLLM
from memory_os.errors import LLMError
from memory_os.telemetry import JsonFormatter, log_as_json

# no two alike, none a word of the code; labels are names too
SENTINELS = {
    "text": "zanzibarine", "query": "quoxalotic", "reply": "vrombulent", "label": "pellucidara",
    "session": "mondrakian", "speaker": "xanthippora", "metadata": "krellopode",
    "document": "ombrosphere", "failure": "gribbletonic",
}  # fmt: skip


class Collected:
    """What in-memory exporters have."""

    def __init__(self, spans, reader):
        self._spans, self._reader = spans, reader

    @property
    def spans(self):
        return self._spans.get_finished_spans()

    @property
    def metrics(self):
        data = self._reader.get_metrics_data()
        found = data.resource_metrics[0].scope_metrics if data else []
        return {
            metric.name: list(metric.data.data_points)
            for scope in found
            if scope.scope.name == "memory_os"
            for metric in scope.metrics
        }

    def named(self, name):
        return [span for span in self.spans if span.name == name]

    def __str__(self):
        return " ".join([*(span.to_json() for span in self.spans), repr(self.metrics)])


@pytest.fixture(scope="session")
def providers():
    """OpenTelemetry's providers can be set once in a process."""
    from opentelemetry import metrics, trace
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    traces = TracerProvider()
    traces.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(traces)
    metrics.set_meter_provider(MeterProvider([reader]))
    return spans, reader


@pytest.fixture
def collected(providers):
    spans, reader = providers
    spans.clear()
    return Collected(spans, reader)


def opened(path, replies=("Under the bed.",), **options):
    return Memory.open(path, **{"embedder": "hash", "llm": ScriptedLLM(list(replies)), "telemetry": True, **options})


def test_a_turn_is_one_span_with_its_stages_below_it(tmp_path, collected):
    from opentelemetry import trace

    with opened(tmp_path / "memory.db") as memory:
        scope = memory.namespace("acme", "alice").session("monday")
        scope.add("The kite is under the bed.")
        with trace.get_tracer("application").start_as_current_span("request"):
            reply = scope.chat("Where is the kite?")
        scope.context("Where is the kite?")
    [turn], [request] = collected.named("memory_os.turn"), collected.named("request")
    assert turn.parent.span_id == request.context.span_id
    below = {
        s.name.removeprefix("memory_os.")
        for s in collected.spans
        if s.parent and s.parent.span_id == turn.context.span_id
    }
    assert below >= {"flash", "recall", "decide", "pack", "generate", "record", "derive"}
    assert turn.attributes["memory_os.outcome"] == "answered"
    assert turn.attributes["memory_os.controller"] == "auto"
    assert turn.attributes["memory_os.candidates"] == len(reply.trace.ledger)
    account = reply.trace.account
    assert turn.attributes["memory_os.tokens.total"] == account.total
    assert (
        sum(turn.attributes[f"memory_os.tokens.{p}"] for p in ("system", "query", "flash", "activated"))
        == account.total
    )
    stages = [s for s in collected.spans if s.parent and s.parent.span_id == turn.context.span_id]
    assert all(turn.start_time - 10**8 <= s.start_time <= s.end_time <= turn.end_time for s in stages)
    [context] = collected.named("memory_os.context")
    assert context.parent is None
    assert "derive" not in reply.trace.timings_ms


def test_metrics_count_tokens_time_errors_and_work_that_is_left(tmp_path, collected):
    def points(name, **labels):
        wanted = {f"memory_os.{k}": v for k, v in labels.items()}
        return [p for p in collected.metrics.get(name, []) if wanted.items() <= dict(p.attributes).items()]

    def total(name, **labels):
        return sum(getattr(p, "value", getattr(p, "count", 0)) for p in points(name, **labels))

    before = {part: total("memory_os.tokens", part=part) for part in ("system", "activated")}
    generated = total("memory_os.stage.duration", stage="generate")
    failed = total("memory_os.errors", operation="turn")
    with opened(tmp_path / "memory.db", ["Here."]) as memory:  # and then it has no reply left
        scope = memory.namespace("alice").session("monday")
        account = scope.chat("Where is the kite?").trace.account
        with pytest.raises(LLMError):
            scope.chat("And now?")
        assert total("memory_os.tokens", part="system") > before["system"] + account.system - 1
        assert total("memory_os.stage.duration", stage="generate") == generated + 2
        assert total("memory_os.errors", operation="turn") == failed + 1
        assert sum(p.value for p in points("memory_os.pending")) == 0
        memory.namespace("bob").add_many([], embed=False)
        scope.whole().ingest(io.BytesIO(b"# Notes\n\nThe kite is red.\n"), format="markdown", name="n.md")
    assert [dict(span.attributes)["error.type"] for span in collected.named("memory_os.turn")[1:]] == ["LLMError"]
    assert not points("memory_os.pending"), "what is closed is not asked"


def test_interrupted_streams_and_asyncio_end_their_spans(tmp_path, collected):
    import asyncio

    with opened(tmp_path / "memory.db", ["one two three four"]) as memory:
        stream = memory.namespace("a").session("s").stream("Where?")
        next(iter(stream))
        stream.close()

    async def talk():
        async with await AsyncMemory.open(
            tmp_path / "m.db", embedder="hash", llm=ScriptedLLM(["Yes."]), telemetry=True
        ) as m:
            await m.namespace("a").session("s").chat("Is it?")

    asyncio.run(talk())
    interrupted, whole = collected.named("memory_os.turn")
    assert interrupted.attributes["memory_os.outcome"] == "interrupted"
    assert interrupted.status.is_unset
    assert whole.attributes["memory_os.outcome"] == "answered"


def session(path, **options):
    """Everything that a user does, and what goes wrong, with the sentinels everywhere."""
    s = SENTINELS

    class Broken(HashEmbedder):
        works = True

        def embed_documents(self, texts):
            if not self.works and len(texts) > 1:
                raise RuntimeError(f"cannot embed {texts}")
            return super().embed_documents(texts)

    def answer(messages):
        if "now?" in messages[-1]["content"]:
            raise RuntimeError(f"{s['failure']} in {s['query']}")
        return f"It is the {s['reply']}."

    embedder = Broken()
    with Memory.open(path, embedder=embedder, llm=ScriptedLLM(answer), **options) as memory:
        scope = memory.namespace(s["label"], "b").session(s["session"])
        first = scope.add(f"The {s['text']} is here.", speaker=s["speaker"], metadata={"k": s["metadata"]})
        scope.ingest(
            io.BytesIO(f"# {s['document']}\n\nIt is {s['document']}.".encode()), format="markdown", name="a.md"
        )
        scope.chat(f"Where is {s['query']}?")
        with pytest.raises(LLMError, match=s["failure"]):
            scope.chat(f"Where is {s['query']} now?")
        scope.context(f"What of {s['query']}?", budget=500, record=True)
        scope.search(s["query"])
        scope.nearest(s["text"])
        scope.items.put((s["label"],), s["text"], {"v": s["text"]}, texts=[("v", s["text"])])
        memory.check(deep=True)
        memory.repair(deep=True)
        embedder.works = False
        scope.add_many([_new(f"{s['text']} {n}", s["session"]) for n in range(600)], embed=False)
        scope.search(s["query"])  # the background fails to embed
        memory.parts.vectors.join(60)
        embedder.works = True
        scope.forget(first.id, verify=True)
        scope.whole().forget(everything=True)
        from memory_os.derive import deferrable
        from memory_os.errors import StoreError

        with deferrable():
            raise StoreError("the disk is full")


def _new(text, name):
    from memory_os.types import NewSegment

    return NewSegment(text, name)


def test_no_text_query_or_label_is_in_spans_metrics_or_logs(tmp_path, collected, caplog):
    root, said = logging.getLogger(), io.StringIO()
    handler = logging.StreamHandler(said)
    handler.setFormatter(JsonFormatter())
    loggers = [root, *(logging.getLogger(name) for name in ("memory_os", "sqlalchemy.engine"))]
    levels = [logger.level for logger in loggers]
    root.addHandler(handler)
    try:
        for logger in loggers:
            logger.setLevel(logging.DEBUG)
        logging.getLogger("sqlalchemy.engine").setLevel(logging.INFO)  # its DEBUG shows the rows themselves
        session(tmp_path / "memory.db", telemetry=True)
    finally:
        root.removeHandler(handler)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    assert "INSERT INTO segments" in said.getvalue(), "it listens"
    assert "the embedder failed (RuntimeError)" in said.getvalue()
    assert collected.named("memory_os.turn")
    for what, sentinel in SENTINELS.items():
        for place, told in (("logs", said.getvalue()), ("plain logs", caplog.text), ("telemetry", str(collected))):
            assert sentinel not in told, f"{what} stands in the {place}"
    for line in said.getvalue().splitlines():
        json.loads(line)


def test_a_log_line_is_json_and_tells_of_an_error_its_class_and_where():
    said = io.StringIO()
    handler = log_as_json(said, logging.DEBUG)
    logger = logging.getLogger("memory_os")
    try:
        try:
            raise ValueError("the words of " + SENTINELS["text"])
        except ValueError:
            logging.getLogger("memory_os.stores.bank").exception("the bank lacks %d segments", 3)
        logging.getLogger("httpx").warning("not ours")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
    [line] = said.getvalue().splitlines()
    told = json.loads(line)
    assert (told["level"], told["logger"], told["message"]) == (
        "ERROR",
        "memory_os.stores.bank",
        "the bank lacks 3 segments",
    )
    assert told["error"] == "ValueError"
    assert "test_telemetry.py" in told["where"][0]
    assert SENTINELS["text"] not in line


def test_the_command_writes_json_where_it_is_told_to(tmp_path, capsys):
    from memory_os.cli.main import app

    logger = logging.getLogger("memory_os")
    try:
        with pytest.raises(SystemExit):
            app(["--log-json", "stats", "--store", str(tmp_path / "memory.db")])
        logging.getLogger("memory_os.derive").warning("after")
        assert json.loads(capsys.readouterr().err.splitlines()[-1])["message"] == "after"
    finally:
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)
        logger.propagate = True


OFF = """
import sys, tempfile
import memory_os, memory_os.telemetry
from memory_os import Memory
from memory_os.adapters.scripted import ScriptedLLM
with tempfile.TemporaryDirectory() as folder:
    with Memory.open(folder + "/m.db", embedder="hash", llm=ScriptedLLM(["x"])) as memory:
        memory.namespace("a").session("s").chat("Where is the kite?")
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
sys.modules["opentelemetry"] = None
from memory_os.errors import MissingExtraError
with tempfile.TemporaryDirectory() as folder:
    try:
        Memory.open(folder + "/m.db", embedder="hash", telemetry=True)
    except MissingExtraError as error:
        assert "memory-os[otel]" in str(error)
    else:
        raise AssertionError
"""


def test_off_it_costs_no_import_and_without_the_package_it_is_one_error():
    subprocess.run([sys.executable, "-c", OFF], check=True)


def test_two_memories_in_one_process_share_the_instruments(tmp_path, collected, caplog):
    with opened(tmp_path / "a.db") as a, opened(tmp_path / "b.db") as b:
        for memory in (a, b):
            memory.namespace("x").session("s").chat("Where?")
        namespaces = {span.attributes["memory_os.namespace"] for span in collected.named("memory_os.turn")}
        assert len(namespaces) == 2, "the same labels in another store are not to be matched"
        assert collected.metrics["memory_os.pending"]
    assert "opentelemetry" not in " ".join(record.name for record in caplog.records)
