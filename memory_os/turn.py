"""The path of one turn, top to bottom: record, recall, decide, pack, generate, record, derive.

``prepare`` is the part before the reply (recall, decide, pack); ``run_turn`` is the whole. ``run_turn`` is a generator
that yields the reply piece by piece and returns a ``Reply``; the sync and the async API are two drivers of it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

import uuid_utils

from memory_os.backlog import Backlog, VectorBacklog
from memory_os.bank import Layout, LLMBank
from memory_os.bound import Bound
from memory_os.citations import Citations
from memory_os.corpus import Corpora
from memory_os.derive import INLINE_PENDING, catch_up, deferrable, embed
from memory_os.echo import derived
from memory_os.errors import ConfigError, LLMError, StoreError
from memory_os.forget import Retention
from memory_os.pack import CachedFrame, Frame, GivenFrame, fit_flash, pack, render_line
from memory_os.protocols import (
    LLM,
    Bank,
    CachingLLM,
    CitingController,
    Controller,
    Embedder,
    FlashController,
    ItemStore,
    RecordStore,
    State,
    SummarizingController,
    TokenCounter,
    VectorIndex,
    WorkQueue,
)
from memory_os.recall import Recall
from memory_os.types import (
    Candidate,
    Choice,
    Context,
    Conversation,
    Decision,
    Namespace,
    NewSegment,
    Outcome,
    Reason,
    Reply,
    Segment,
    Trace,
)
from memory_os.view import View
from memory_os.weights import learned

if TYPE_CHECKING:
    from memory_os.telemetry import Operation, Telemetry

__all__ = ["Clock", "Options", "Parts", "compose", "marks_of", "prepare", "run_turn"]

SYSTEM = "You are a helpful assistant with a long-term memory."
MAX_PRICES = 50_000


@dataclass(frozen=True, slots=True)
class Options:
    """How turns are run.

    :param budget: most tokens that the rendered prompt may take.
    :param reply_tokens: most tokens of a reply; kept free in the context window.
    :param flash_turns: how many of the session's latest segments are flash memory, unless the controller decides.
    :param system: the system prompt; may be empty.
    """

    budget: int = 2048
    reply_tokens: int = 512
    flash_turns: int = 6
    system: str = SYSTEM

    def __post_init__(self) -> None:
        for name in ("budget", "reply_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1 token, not {getattr(self, name)}")
        if self.flash_turns < 0:
            raise ConfigError(f"flash_turns must not be negative: {self.flash_turns}")


@dataclass(frozen=True, slots=True)
class Parts:
    """The collaborators of a turn."""

    store: RecordStore
    index: VectorIndex
    embedder: Embedder
    controller: Controller
    counter: TokenCounter
    llm: LLM | None
    options: Options = field(default_factory=Options)
    corpora: Corpora = field(default_factory=Corpora)
    prices: dict[tuple[str, str, int, int], int] = field(default_factory=dict, repr=False)
    backlog: Backlog | None = None
    vectors: VectorBacklog | None = None
    bank: Bank | None = None
    items: ItemStore | None = None
    retention: Retention | None = None
    queue: WorkQueue | None = None
    leaves_work: bool = False
    """Whether what is derived is left to workers."""
    bound: Bound | None = None
    make_embedder: Callable[[], Embedder] | None = None
    """Makes the embedder once more, in another process."""
    telemetry: Telemetry | None = None

    def clock(self, name: str, namespace: Namespace) -> Clock:
        """Times what is about to be done: a ``turn`` or a ``context``."""
        return Clock(self.telemetry.operation(name, namespace, self.controller.name) if self.telemetry else None)

    def keep_to_retention(self, *, always: bool = False) -> None:
        """Forget what has become too old, where there is a policy; see ``Retention.keep``."""
        if self.retention:
            self.retention.keep(self, always=always)

    def price_of(self, segment: Segment) -> int:
        """Tokens of the segment's line in the context. What was counted is kept by what the line says.

        Not by the id: another namespace may have the same, and what is restored under it may be another text.
        """
        # a text is hashed once, by a key of this process, and not kept
        says = (segment.who, segment.role, len(segment.text), hash(segment.text))
        price = self.prices.get(says)
        if price is None:
            if len(self.prices) > MAX_PRICES:
                self.prices.clear()
            price = self.prices[says] = self.counter.count_text(render_line(segment) + "\n")
        return price

    def catch_up(self, namespace: Namespace, new: Sequence[Segment] = (), *, most: int = INLINE_PENDING) -> None:
        """Make the vectors of new segments, and those that were missing before: now if they are few, else in a thread.

        Where work is left to workers, none.

        :param most: what is few.
        """
        if self.leaves_work:
            return
        state = self.store.state(namespace, self.embedder.fingerprint)
        if self.contested(namespace, state):  # each would make anew what the other made, with every search
            listed = self.store.pending(namespace, self.embedder.fingerprint, most + len(new), stale=False)
            embed(self.store, self.embedder, namespace, listed)
            return
        n_missing = state.n_pending
        if self.vectors and (n_missing > most + len(new) or self.vectors.busy(namespace)):
            embed(self.store, self.embedder, namespace, new)
            self.vectors.resume(namespace)
        elif n_missing:
            catch_up(self.store, self.embedder, namespace)
            self.contested(namespace, self.store.state(namespace, self.embedder.fingerprint))

    def contested(self, namespace: Namespace, state: State) -> bool:
        """Whether another memory made vectors anew by its own embedder after this one had made them all by this one."""
        if self.vectors is None:
            return False
        if state.n_segments and not state.n_stale:
            self.vectors.settled.add(namespace)
        return bool(state.n_stale) and namespace in self.vectors.settled

    @property
    def recall(self) -> Recall:
        """Candidates for a query."""
        return Recall(self.store, self.index, self.embedder, self.corpora)

    @property
    def llm_bank(self) -> LLMBank | None:
        """The bank as this LLM and system prompt use it; ``None`` where memory enters as text."""
        if self.bank is None or not isinstance(self.llm, CachingLLM):
            return None
        return LLMBank(self.store, self.bank, self.llm, Layout.of_turns(self.options.system, self.llm))

    def frame(
        self,
        query: str,
        budget: int,
        reply_reserve: int = 0,
        tools: Sequence[Mapping[str, Any]] = (),
        conversation: Conversation | None = None,
    ) -> Frame:
        """What surrounds the memory in a prompt, by the form in which the controller has it enter.

        :raises ConfigError: if memory would enter as keys and values, and the prompt is the caller's own.
        """
        system = self._system(query, self.options.system if conversation is None else conversation.system)
        cached = CachingLLM in self.controller.needs
        if conversation is None:
            kind = CachedFrame if cached else Frame
            return kind(system, query, self.counter, budget, reply_reserve, tools)
        if cached:
            raise ConfigError(
                f"controller {self.controller.name!r} puts keys and values before a local model's own prompt, and "
                'this prompt is another\'s; open the memory with a controller whose memory is text, such as "auto"'
            )
        return GivenFrame(system, query, self.counter, budget, reply_reserve, tools, conversation)

    def _system(self, query: str, system: str) -> str:
        """The system prompt, with what the controller adds to it."""
        if not isinstance(self.controller, CitingController):
            return system
        return f"{system}\n\n{self.controller.instruction(query)}".strip()

    def config_hash(self) -> str:
        """Changes whenever the same store and query could give another context."""
        settings = getattr(self.controller, "__dict__", {})
        config = {
            "options": asdict(self.options),
            "controller": [self.controller.name, {name: repr(value) for name, value in sorted(settings.items())}],
            "index": type(self.index).__name__,
            "embedder": self.embedder.fingerprint,
            "weights": learned()["provenance"]["digest"],
            "counter": self.counter.name,
            "bank": repr(self.bank.options) if self.bank and CachingLLM in self.controller.needs else None,
        }
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


class Clock:
    """Wall time by stage, milliseconds; entered and left, it also tells telemetry of the whole.

    :param told: where telemetry is on, what hears of each lap.
    """

    def __init__(self, told: Operation | None = None) -> None:
        self.timings: dict[str, float] = {}
        self._told = told
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """The time since the last lap was spent on ``stage``."""
        now = time.perf_counter()
        self.timings[stage] = self.timings.get(stage, 0.0) + (now - self._last) * 1000.0
        if self._told:
            self._told.stage(stage, now - self._last)
        self._last = now

    def result(self, trace: Trace) -> None:
        """What came of what was timed."""
        if self._told:
            self._told.result(trace)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._told:
            self._told.end(error)


def prepare(
    parts: Parts,
    namespace: Namespace,
    session: str | None,
    query: str,
    *,
    budget: int,
    reply_reserve: int = 0,
    tools: Sequence[Mapping[str, Any]] = (),
    asked: Segment | None = None,
    clock: Clock | None = None,
    conversation: Conversation | None = None,
    memory_tokens: int | None = None,
) -> Context:
    """Choose the context for a query: steps 2 to 4 of a turn. Writes nothing but derived data that is missing.

    :param session: whose latest turns are flash memory; without one there is none.
    :param budget: most tokens of the rendered messages, in ``parts.counter``'s tokens.
    :param asked: the query's own segment if it was recorded; recall sees only what came before it.
    :param conversation: what the caller shows the model anyway; it takes the place of flash memory.
    :param memory_tokens: most tokens of what is recalled, its fence included.
    :raises BudgetError: if system prompt, query and wrappers alone are over the budget.
    """
    clock = clock or Clock()
    frame = parts.frame(query, budget, reply_reserve, tools, conversation)
    fixed = frame.check()
    if memory_tokens is not None:
        frame = replace(frame, limit=min(budget, fixed + memory_tokens))
    state = parts.store.state(namespace, parts.embedder.fingerprint)
    upto = asked.seq - 1 if asked else state.last_seq
    now = asked.created_at if asked else datetime.now(UTC)
    breadth = _breadth(budget if memory_tokens is None else memory_tokens)
    memory = View(parts, namespace, query, upto=upto, now=now, breadth=breadth, state=state, clock=clock)

    # flash memory: always in, never recalled
    if conversation is None:
        flash = _flash(parts, namespace, session, memory, frame, upto)
        memory.flash_tokens = frame.count(flash) - fixed
    else:  # the caller's own, and counted with what is fixed
        there = parts.store.get(namespace, conversation.stored) | parts.store.by_key(namespace, conversation.stored)
        flash = tuple(sorted({s.seq: s for s in there.values() if s.seq <= upto}.values(), key=lambda s: s.seq))
    memory.flash = flash
    clock.lap("flash")

    # 2 recall, when the controller asks for it, and 3 decide
    decision = parts.controller.decide(query, memory, frame.room(flash))
    clock.lap("decide")

    # 4 pack
    return compose(memory, frame, memory.offered, decision, session=session, asked=asked)


def _flash(
    parts: Parts, namespace: Namespace, session: str | None, memory: View, frame: Frame, upto: int
) -> tuple[Segment, ...]:
    """The session's latest turns that enter the context: as many as fit their share of it."""
    own = parts.controller if isinstance(parts.controller, FlashController) else None
    n = own.looks_back if own else parts.options.flash_turns
    recent = parts.store.tail(namespace, n, session=session, upto=upto, kind="turn") if session else []
    flash = fit_flash(own.flash(recent, memory) if own else recent, frame)
    texts = {segment.id: segment.text for segment in recent}
    shortened = [f"#{segment.seq}" for segment in flash if segment.text != texts[segment.id]]
    if shortened:
        memory.notes.append(f"flash memory: as a summary: {', '.join(shortened)}")
    return flash


def compose(
    memory: View,
    frame: Frame,
    candidates: Sequence[Candidate],
    decision: Decision,
    *,
    session: str | None = None,
    asked: Segment | None = None,
) -> Context:
    """Pack what was decided, and write down why.

    :param candidates: those that the decision names.
    """
    parts = memory.parts
    named = {choice.segment_id for choice in decision.choices}
    if echoes := [echo for echo in memory.echoes if echo.segment.id not in named]:
        candidates = [*candidates, *echoes]
        left_out = (Choice(echo.segment.id, None, Reason.ECHO) for echo in echoes)
        decision = replace(decision, choices=(*decision.choices, *left_out))
    packed = pack(frame, memory.flash, candidates, decision)
    memory.clock.lap("pack")
    trace = Trace(
        id=str(uuid_utils.uuid7()),
        namespace=memory.namespace,
        session=session,
        query=memory.query,
        query_id=asked.id if asked else None,
        reply_id=None,
        created_at=memory.now,
        controller=parts.controller.name,
        llm=parts.llm.name if parts.llm else None,
        config_hash=parts.config_hash(),
        upto=memory.upto,
        flash=tuple(segment.id for segment in memory.flash),
        ledger=packed.ledger,
        account=packed.account,
        notes=(*_visible_fallbacks(parts), *memory.notes, *decision.notes),
        timings_ms=memory.clock.timings,
        outcome=Outcome.CONTEXT,
        calls=tuple(memory.calls),
    )
    return Context(packed.messages, packed.text, packed.segments, trace, decision.reply, packed.cached, packed.shown)


def marks_of(parts: Parts, reply: str, context: Context) -> dict[str, Any]:
    """Metadata that says what of a reply stood in its context; of the text as it is stored."""
    flash = parts.store.get(context.trace.namespace, context.trace.flash).values()
    shown = [*zip(context.segments, context.shown, strict=True), *((segment, segment.text) for segment in flash)]
    return derived(parts.store.redacted(reply), shown)


def _breadth(budget: int) -> int:
    """How many candidates recall offers: more turns of common length than the budget could hold."""
    return max(32, min(400, budget // 12))


def _visible_fallbacks(parts: Parts) -> list[str]:
    """What the parts do less well than their names say; models may tell by an attribute ``notes``."""
    approximate = [] if parts.counter.exact else [f"token counts are an approximation: {parts.counter.name}"]
    return [*approximate, *getattr(parts.llm, "notes", ()), *getattr(parts.embedder, "notes", ())]


def run_turn(
    parts: Parts,
    namespace: Namespace,
    session: str,
    query: str,
    *,
    speaker: str | None = None,
    budget: int | None = None,
    stop: Sequence[str] = (),
) -> Generator[str, None, Reply]:
    """One whole turn. Closing the generator interrupts the model; what was said so far is kept and marked.

    :raises ConfigError: if there is no LLM.
    :raises BudgetError: before anything is stored, if the fixed parts do not fit.
    :raises LLMError: if the model fails; the query and the trace are stored.
    """
    with parts.vectors.held() if parts.vectors else nullcontext(), parts.clock("turn", namespace) as clock:
        turn = _turn(parts, namespace, session, query, speaker=speaker, budget=budget, stop=stop, clock=clock)
        return (yield from turn)


def _turn(
    parts: Parts,
    namespace: Namespace,
    session: str,
    query: str,
    *,
    speaker: str | None,
    budget: int | None,
    stop: Sequence[str],
    clock: Clock,
) -> Generator[str, None, Reply]:
    """The turn, while no vectors are made in the background."""
    llm, reply_tokens = parts.llm, parts.options.reply_tokens
    if llm is None:
        raise ConfigError(
            'chat needs an LLM: open the memory with llm="smollm2", "URL#MODEL", "provider:model" or an object'
        )
    limit = min(parts.options.budget if budget is None else budget, llm.context_window - reply_tokens)
    parts.frame(query, limit).check()
    if parts.backlog:
        parts.backlog.pause()

    # 1 record: durable before anything else happens
    [asked] = parts.store.append(namespace, [NewSegment(query, session, role="user", speaker=speaker)])
    clock.lap("record")

    # 2 recall, 3 decide, 4 pack
    context = prepare(
        parts, namespace, session, query, budget=limit, reply_reserve=reply_tokens, asked=asked, clock=clock
    )

    # 5 generate
    pieces: list[str] = []
    outcome, error = Outcome.INTERRUPTED, None
    said: Segment | None = None
    citations = Citations({s.seq: s.id for s in context.segments})
    notes: list[str] = []
    speaking: Iterator[str]
    if context.reply is not None:  # the controller has found that there is nothing to ask the LLM
        speaking = iter([context.reply])
    elif context.cached is None:
        speaking = llm.generate(context.messages, max_tokens=reply_tokens, stop=stop)
    else:  # memory is not read again: its keys and values are put in place
        assert parts.llm_bank is not None
        speaking = parts.llm_bank.generate(namespace, context, max_tokens=reply_tokens, stop=stop, notes=notes)
    checked = citations.check(speaking) if isinstance(parts.controller, CitingController) else speaking
    try:
        for piece in checked:
            pieces.append(piece)
            yield piece
        outcome = Outcome.ANSWERED
    except StoreError as failure:  # of the bank: the LLM is not to blame
        outcome, error = Outcome.FAILED, str(failure)
        raise
    except Exception as failure:  # whatever a foreign LLM raises becomes one typed error
        outcome, error = Outcome.FAILED, failure.problem if isinstance(failure, LLMError) else repr(failure)
        raise LLMError(llm.name, error, context.trace.id) from failure
    finally:
        if isinstance(speaking, Generator):
            speaking.close()  # an interrupted model stops now, not when it is garbage
        clock.lap("generate")
        # 6 record the reply and the trace, also when generation failed or was interrupted
        text = "".join(pieces)
        if text.strip():
            metadata = {} if outcome is Outcome.ANSWERED else {"outcome": str(outcome)}
            # what of it the model was shown is no new memory
            metadata |= marks_of(parts, text, context)
            reply = NewSegment(text, session, role="assistant", metadata=metadata)
            [said] = parts.store.append(namespace, [reply])
        clock.lap("record")
        trace = replace(
            context.trace,
            reply_id=said.id if said else None,
            outcome=outcome,
            error=error,
            timings_ms=dict(clock.timings),  # without what comes after it was written down
            cited=citations.cited,
            notes=(*context.trace.notes, *notes, *citations.notes),
        )
        parts.store.save_trace(trace)
        clock.result(trace)

    # 7 derive: cheap for one turn; after an interruption it stays pending and is made before the next recall
    with deferrable():  # both sides of the turn are stored
        parts.catch_up(namespace, [segment for segment in (asked, said) if segment])
        if CachingLLM in parts.controller.needs and parts.llm_bank:
            parts.llm_bank.keep(namespace, [segment for segment in (asked, said) if segment])
        if parts.backlog and isinstance(parts.controller, SummarizingController):
            long = [segment for segment in (asked, said) if segment and parts.controller.wants_summary(segment, llm)]
            if long:
                parts.store.list_for_summary(namespace, [segment.id for segment in long])
            if not parts.leaves_work:
                parts.backlog.resume(namespace, llm)
    clock.lap("derive")
    return Reply(text, said, replace(context, trace=trace), trace)
