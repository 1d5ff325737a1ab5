"""What operators see: OpenTelemetry spans and metrics of turns, and logs as JSON. Numbers and names, never texts.

Off unless asked for (``Memory.open(telemetry=True)``); nothing of OpenTelemetry is imported before that. Only its API
is used: where the spans go is what the application configures.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import traceback
from collections.abc import Callable, Iterable
from functools import cache
from typing import IO, TYPE_CHECKING, Any

from memory_os.errors import MissingExtraError

if TYPE_CHECKING:
    from types import TracebackType

    from opentelemetry.metrics import CallbackOptions, Observation

    from memory_os.types import Namespace, Trace

__all__ = ["JsonFormatter", "Operation", "Telemetry", "log_as_json"]

NAME = "memory_os"


class Instruments:
    """The tracer and the instruments of this process, of the providers that the application has set."""

    def __init__(self) -> None:
        from opentelemetry import metrics, trace

        self.tracer = trace.get_tracer(NAME)
        meter = metrics.get_meter(NAME)
        self.stages = meter.create_histogram("memory_os.stage.duration", "s", "Time of a stage of a turn")
        self.operations = meter.create_histogram("memory_os.operation.duration", "s", "Time of a turn or a context")
        self.tokens = meter.create_counter("memory_os.tokens", "{token}", "Tokens of contexts, by part")
        self.errors = meter.create_counter("memory_os.errors", "{error}", "What failed, by the class of the error")
        meter.create_observable_gauge(
            "memory_os.pending", [self._observe], "{vector}", "Vectors that are still to be made, in all namespaces"
        )
        self.open: set[Telemetry] = set()

    def _observe(self, _: CallbackOptions) -> Iterable[Observation]:
        from opentelemetry.metrics import Observation

        each = list(self.open)
        return [Observation(sum(one.count_pending() for one in each))] if each else []


@cache
def instruments() -> Instruments:
    """One set for all memories of a process: OpenTelemetry has each instrument made once."""
    return Instruments()


class Telemetry:
    """What one memory tells.

    :param store_id: makes what stands for a namespace unguessable: its labels may be people's names.
    :param count_pending: how much derived work is left; asked when metrics are collected, until ``close``.
    :raises MissingExtraError: if the API of OpenTelemetry is not installed.
    """

    def __init__(self, store_id: str, count_pending: Callable[[], int]) -> None:
        try:
            self.instruments = instruments()
        except ImportError as error:
            raise MissingExtraError("telemetry=True", "opentelemetry-api", "otel") from error
        self._store_id = store_id
        self.count_pending = count_pending
        self.instruments.open.add(self)

    def close(self) -> None:
        """Ask nothing of the store any more."""
        self.instruments.open.discard(self)

    def operation(self, name: str, namespace: Namespace, controller: str) -> Operation:
        """What is about to be done, as a span under the caller's own."""
        identity = json.dumps([self._store_id, *namespace], ensure_ascii=False)
        stands_for = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return Operation(
            self.instruments, name, {"memory_os.namespace": stands_for, "memory_os.controller": controller}
        )


class Operation:
    """A turn or a context: one span, with one below it for each stretch of a stage.

    The spans of stages are given their times afterwards, so that none has to be held open across a generator's yield.
    """

    def __init__(self, told: Instruments, name: str, attributes: dict[str, str]) -> None:
        from opentelemetry import trace

        self._told, self._name, self._attributes = told, name, attributes
        self._span = told.tracer.start_span(f"memory_os.{name}", attributes=attributes)
        self._below = trace.set_span_in_context(self._span)
        self._began = time.perf_counter()
        self._outcome = "none"

    def stage(self, stage: str, seconds: float) -> None:
        """So many seconds up to now were spent on a stage."""
        now = time.time_ns()
        span = self._told.tracer.start_span(
            f"memory_os.{stage}", self._below, attributes=self._attributes, start_time=now - int(seconds * 1e9)
        )
        span.end(now)
        labels = {"memory_os.stage": stage, "memory_os.controller": self._attributes["memory_os.controller"]}
        self._told.stages.record(seconds, labels)

    def result(self, trace: Trace) -> None:
        """What came of it."""
        account, ledger = trace.account, trace.ledger
        parts = {name: getattr(account, name) for name in ("system", "query", "flash", "activated")}
        self._outcome = str(trace.outcome)
        self._span.set_attributes(
            {
                "memory_os.outcome": self._outcome,
                "memory_os.candidates": len(ledger),
                "memory_os.activations": sum(entry.action != "dropped" for entry in ledger),
                "memory_os.llm_calls": len(trace.calls),
                "memory_os.notes": len(trace.notes),
                "memory_os.tokens.total": account.total,
                "memory_os.tokens.limit": account.limit,
                **{f"memory_os.tokens.{part}": n for part, n in parts.items()},
            }
        )
        for part, n in parts.items():
            self._told.tokens.add(n, {"memory_os.part": part})

    def end(self, error: BaseException | None) -> None:
        """It is over. Of an error only its class is told: what it says may repeat a text."""
        from opentelemetry.trace import Status, StatusCode

        labels = {"memory_os.operation": self._name, "memory_os.outcome": self._outcome}
        if error is not None and not isinstance(error, GeneratorExit):  # which is an interruption, and no error
            self._span.set_attribute("error.type", type(error).__name__)
            self._span.set_status(Status(StatusCode.ERROR))
            self._told.errors.add(1, {"error.type": type(error).__name__, "memory_os.operation": self._name})
        self._told.operations.record(time.perf_counter() - self._began, labels)
        self._span.end()


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message; of an error its class and where, and not what it says."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line."""
        told: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info and record.exc_info[0]:
            kind, _, where = record.exc_info
            told |= {"error": kind.__name__, "where": _where(where)}
        return json.dumps(told, ensure_ascii=False)


def _where(frames: TracebackType | None) -> list[str]:
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(frames)]


def log_as_json(stream: IO[str], level: int = logging.INFO) -> logging.Handler:
    """Have what memory_os logs, and nothing of other libraries, written as JSON; gives back the handler."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger(NAME)
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    return handler
