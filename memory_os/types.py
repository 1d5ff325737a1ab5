"""The values that pass between the parts: plain, frozen, and free of any store or model.

Conventions: scores are higher-is-better; vectors are float32 of unit length; ``seq`` is strictly increasing within
a namespace and is the only meaning of "before"; times are UTC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, Self, TypedDict

from memory_os.errors import ConfigError, NamespaceError

__all__ = [
    "Account",
    "Action",
    "BankOptions",
    "CachedPrompt",
    "Candidate",
    "Certainty",
    "Choice",
    "Confirmation",
    "Context",
    "Conversation",
    "Decision",
    "Evidence",
    "Form",
    "Hit",
    "Kind",
    "LLMCall",
    "LedgerEntry",
    "Message",
    "Namespace",
    "NewSegment",
    "Outcome",
    "Reason",
    "Reply",
    "Role",
    "Segment",
    "Stored",
    "Trace",
    "as_namespace",
]

Namespace = tuple[str, ...]
Role = Literal["user", "assistant", "system", "tool"]
Kind = Literal["turn", "document", "note", "summary"]

MAX_LABEL = 256
MAX_LABELS = 16


class Message(TypedDict):
    """One chat message in the form every LLM adapter takes."""

    role: str
    content: str


def as_namespace(labels: Sequence[str]) -> Namespace:
    """Give back the labels as a checked namespace.

    >>> as_namespace(["acme", "alice"])
    ('acme', 'alice')

    :raises NamespaceError: for no label, an empty or blank one, or one that is not text.
    """
    if isinstance(labels, str):
        raise NamespaceError(f"a namespace is a sequence of labels, not one string; write ({labels!r},)")
    checked = tuple(labels)
    if not checked:
        raise NamespaceError('no namespace given; name one, for example memory.namespace("alice")')
    if len(checked) > MAX_LABELS:
        raise NamespaceError(f"a namespace has at most {MAX_LABELS} labels, not {len(checked)}")
    for label in checked:
        if not isinstance(label, str) or not label.strip():
            raise NamespaceError(f"namespace label {label!r} is not a non-empty string")
        if len(label) > MAX_LABEL:
            raise NamespaceError(f"a namespace label has at most {MAX_LABEL} characters, not {len(label)}")
        if "\x00" in label or any(0xD800 <= ord(c) <= 0xDFFF for c in label):
            raise NamespaceError(f"namespace label {label!r} holds a character that cannot be stored")
    return checked


@dataclass(frozen=True, slots=True)
class NewSegment:
    """A segment that has not been stored yet: everything but ``id``, ``seq`` and ``n_tokens``.

    :param key: makes storing idempotent: a second segment with the same key in the namespace is not stored again.
    :param id: only set by an import, which keeps the ids of the export; ``seq`` likewise.
    """

    text: str
    session: str
    role: Role = "user"
    speaker: str | None = None
    kind: Kind = "turn"
    created_at: datetime | None = None
    source: str | None = None
    offset: tuple[int, int] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    id: str | None = None
    seq: int | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """The unit of memory: verbatim, immutable text.

    :param id: UUIDv7, as text.
    :param seq: strictly increasing in the namespace; chronological order everywhere.
    :param created_at: event time, UTC.
    :param offset: character span in the source, for parts of documents; in what redaction left of it, where it is on.
    :param n_tokens: length in cl100k_base tokens, for statistics only; budgets are counted in the target model's own.
    """

    id: str
    seq: int
    namespace: Namespace
    session: str
    role: Role
    speaker: str | None
    kind: Kind
    text: str
    created_at: datetime
    n_tokens: int
    source: str | None = None
    offset: tuple[int, int] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None

    @property
    def who(self) -> str:
        """The speaker's name where there is one, else the role."""
        return self.speaker or self.role

    def summarized(self, summary: str) -> Segment:
        """The segment with a summary in place of its text."""
        return replace(self, text=summary)


@dataclass(frozen=True, slots=True)
class Hit:
    """A segment that a search found, with its score, each signal, and what each signal contributed to the score."""

    segment: Segment
    score: float
    signals: Mapping[str, float]
    contributions: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Candidate:
    """What recall offers to a controller.

    :param signals: every signal by name.
    :param score: relevance; the sum of the contributions where there are any, a fused rank otherwise.
    :param n_tokens: cost of the segment in full, rendered as a line of memory, in the target model's tokens.
    :param contributions: what each signal added to the score.
    """

    segment: Segment
    score: float
    signals: Mapping[str, float]
    n_tokens: int
    contributions: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Certainty:
    """What an LLM's expectations say of a segment, for one question and the beginning of its answer.

    :param entropy: of the next token, nats.
    :param complete: ``False`` where only the likeliest tokens were known, and the entropy is a lower bound.
    :param question_nll: mean negative log-likelihood of the question's tokens after the segment, nats per token;
        ``None`` where it was not asked for.
    """

    entropy: float
    complete: bool
    question_nll: float | None = None


@dataclass(frozen=True, slots=True)
class BankOptions:
    """How the bank of cached keys and values is kept; bounds hold for each namespace.

    :param max_tokens: most tokens in it; the paper's 65,536.
    :param max_bytes: most bytes of it on disk.
    :param policy: what leaves it first: ``"fifo"`` (the oldest; LongMem), ``"lru"`` (what was not used for longest) or
        ``"surprisal"`` (what surprised the model least, faded by age; SirLLM, arXiv 2405.12528).
    :param decay: of ``"surprisal"``: what is left of it after each segment that came since, in (0, 1].
    :param dtype: of keys and values on disk: ``"float16"`` or ``"int8"``.
    :param resident_bytes: most bytes of loaded entries that stay in memory between turns.
    :param chunk_tokens: tokens whose mean key is searched; the paper's 4.
    :param k_chunks: chunks that each token of a query finds; the paper's 16 (64 tokens in chunks of 4).
    :param layer: whose keys are searched, counted from 0; by default the LLM's own choice.
    """

    max_tokens: int = 65_536
    max_bytes: int = 1_600_000_000
    policy: Literal["fifo", "lru", "surprisal"] = "fifo"
    decay: float = 0.99
    dtype: Literal["float16", "int8"] = "float16"
    resident_bytes: int = 256_000_000
    chunk_tokens: int = 4
    k_chunks: int = 16
    layer: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_bytes", "chunk_tokens", "k_chunks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"bank: {name} must be at least 1, not {getattr(self, name)}")
        if self.resident_bytes < 0:
            raise ConfigError(f"bank: resident_bytes must not be negative: {self.resident_bytes}")
        if not 0.0 < self.decay <= 1.0:
            raise ConfigError(f"bank: decay must be above 0 and at most 1, not {self.decay}")
        for name, known in (("policy", ("fifo", "lru", "surprisal")), ("dtype", ("float16", "int8"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"bank: {name} is one of {', '.join(known)}, not {getattr(self, name)!r}")


@dataclass(frozen=True, slots=True)
class CachedPrompt:
    """A prompt whose memory enters as keys and values, which were computed line by line after the same beginning.

    :param system: the system prompt; may be empty.
    :param opening: how the first user message begins, up to the memory.
    :param lines: the memory; each is encoded by itself, so that its tokens do not depend on its neighbours.
    :param messages: what follows. The first one is the user's, and continues the message that the memory is in.
    :param plain: whether all of it is plain text, one after the other, and no chat: for text to be continued.
    """

    system: str
    opening: str
    lines: tuple[str, ...]
    messages: tuple[Message, ...]
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a caller with a prompt of its own shows the model around the query: its own flash memory.

    :param system: its system prompt; may be empty.
    :param before: its messages before the query.
    :param after: its messages after the query, such as tool calls and their results.
    :param stored: ids or keys of the stored segments that these messages are; they are not recalled again.
    """

    system: str = ""
    before: tuple[Message, ...] = ()
    after: tuple[Message, ...] = ()
    stored: frozenset[str] = frozenset()


class Form(StrEnum):
    """How an activated segment enters the context."""

    FULL = "full"
    SUMMARY = "summary"
    QUOTE = "quote"
    CACHED = "cached"


class Action(StrEnum):
    """What became of a candidate."""

    ACTIVATED = "activated"
    TRIMMED = "trimmed"
    DROPPED = "dropped"


class Reason(StrEnum):
    """Why; a closed set, so that it can be counted and tested."""

    RELEVANT = "relevant"
    RECENT = "recent"
    TOO_LONG = "too long: the best candidate entered cut"
    OVER_BUDGET = "over budget"
    WEAK = "weak relevance"
    UNRELATED = "nothing remembered is about this"
    REPEATED = "repeats a newer candidate"
    NOT_CHOSEN = "not chosen by the controller"
    SUMMARY_ENOUGH = "its summary is enough"
    SHORTENED = "as its summary, to fit"
    NO_HELP = "does not help to answer"
    QUOTED = "quoted by the LLM, and verified"
    LINKED = "linked to what was found before it"
    FALLBACK = "fallback to plain recall"
    ATTENDED = "the model's attention found it in the bank"
    ECHO = "repeats what was remembered before it"


@dataclass(frozen=True, slots=True)
class Choice:
    """A controller's verdict on one candidate: the form in which to activate it, or ``None`` to drop it.

    :param text: what enters in place of the segment's own text, for the forms ``summary`` and ``quote``.
    :param spans: of the form ``quote``, what of the segment's text is evidence, in characters.
    """

    segment_id: str
    form: Form | None
    reason: Reason
    text: str | None = None
    spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """A controller's verdicts: exactly one per candidate, the most wanted first.

    :param notes: what a reader of the trace should know, such as a fallback that was taken.
    :param reply: what is answered without asking the LLM, where there is nothing to ask it.
    """

    choices: tuple[Choice, ...]
    notes: tuple[str, ...] = ()
    reply: str | None = None


class Stored(tuple[int, int]):
    """``(stored, already there)``, of segments that were to be stored.

    :param forgotten: how many more were forgotten here before, and are not stored again.
    :param too_old: how many more are older than the memory's ``retention_days``, and are not kept.
    """

    forgotten: int
    too_old: int

    def __new__(cls, stored: int, known: int, forgotten: int = 0, too_old: int = 0) -> Self:
        """A pair with the other numbers beside it."""
        both = super().__new__(cls, (stored, known))
        both.forgotten, both.too_old = forgotten, too_old
        return both


@dataclass(frozen=True, slots=True)
class LLMCall:
    """One thing that was asked of the LLM besides the reply.

    :param purpose: what was to be found out.
    :param verdict: how the answer was read.
    :param answer: the answer as it came; empty for a summary, which is kept with its segment.
    """

    purpose: str
    verdict: str
    answer: str
    prompt_tokens: int
    reply_tokens: int


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """The account of one candidate.

    :param rank: 1 is what the controller wanted most.
    :param n_tokens: tokens it took in the context; for a dropped one, tokens it would have taken in full.
    :param spans: what of its text entered as evidence, in characters; empty unless its form is ``quote``.
    :param flags: what of the text that entered reads like an instruction to a model; see ``suspicion``.
    """

    segment_id: str
    seq: int
    rank: int
    action: Action
    form: Form | None
    reason: Reason
    score: float
    signals: Mapping[str, float]
    n_tokens: int
    contributions: Mapping[str, float] = field(default_factory=dict)
    spans: tuple[tuple[int, int], ...] = ()
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Evidence:
    """A quote that stood in the context: stored text, to the character.

    :param span: in the segment's text; ``quote == segment.text[span[0]:span[1]]``.
    :param date: event time of the segment, UTC.
    :param speaker: name or role.
    :param cited: whether the reply cites the segment.
    """

    segment_id: str
    seq: int
    span: tuple[int, int]
    quote: str
    date: datetime
    speaker: str
    cited: bool = False


@dataclass(frozen=True, slots=True)
class Confirmation:
    """That somebody found an answer right, or told the right one.

    :param by: who: ``"user"``, ``"gold"`` (a label) or ``"judge"`` (a model).
    :param answer: the right answer; empty where memory does not hold it.
    :param evidence: ids of the segments that it follows from; ``None`` for those that the reply cites.
    """

    by: str
    answer: str
    at: datetime
    evidence: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Account:
    """The exact tokens of a rendered context, by part. The parts sum to ``total``.

    ``total`` is counted on the whole rendering; a part is what the count grows by when that part is added, in the
    order system (with the query's wrappers), query, flash, activated.
    """

    limit: int
    system: int
    query: int
    flash: int
    activated: int
    total: int
    reply_reserve: int
    tokenizer: str
    exact: bool


class Outcome(StrEnum):
    """How a turn ended."""

    CONTEXT = "context"
    ANSWERED = "answered"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Trace:
    """Why a turn's context was what it was.

    :param query_id: the recorded segment of the query; ``None`` when it was not recorded.
    :param reply_id: the recorded segment of the reply.
    :param upto: recall saw the segments with ``seq <= upto``.
    :param flash: ids of the flash memory that entered, in order.
    :param notes: visible fallbacks and approximations.
    :param timings_ms: wall time by stage, milliseconds.
    :param calls: what the LLM was asked besides the reply, in order.
    :param cited: ids of the segments that the reply cites.
    :param confirmation: what was said of the answer later.
    """

    id: str
    namespace: Namespace
    session: str | None
    query: str
    query_id: str | None
    reply_id: str | None
    created_at: datetime
    controller: str
    llm: str | None
    config_hash: str
    upto: int
    flash: tuple[str, ...]
    ledger: tuple[LedgerEntry, ...]
    account: Account
    notes: tuple[str, ...]
    timings_ms: Mapping[str, float]
    outcome: Outcome
    error: str | None = None
    calls: tuple[LLMCall, ...] = ()
    cited: tuple[str, ...] = ()
    confirmation: Confirmation | None = None


@dataclass(frozen=True, slots=True)
class Context:
    """What the LLM receives.

    :param messages: system, flash memory, then the fenced memory with the query.
    :param text: the fenced memory alone, for callers who place it in a prompt of their own; may be empty.
    :param segments: the activated segments in the order of ``seq``.
    :param shown: the text of each as it stands in the context: in full, cut, or in another form.
    :param reply: the answer that the controller gives by itself; the LLM need not be asked.
    :param cached: where memory is to enter as cached keys and values, the same prompt with its lines apart.
    """

    messages: tuple[Message, ...]
    text: str
    segments: tuple[Segment, ...]
    trace: Trace
    reply: str | None = None
    cached: CachedPrompt | None = None
    shown: tuple[str, ...] = ()

    @property
    def n_tokens(self) -> int:
        """Exact tokens of ``messages``, never above the budget."""
        return self.trace.account.total

    @property
    def account(self) -> Account:
        """Tokens by part."""
        return self.trace.account

    @property
    def ledger(self) -> tuple[LedgerEntry, ...]:
        """The account of every candidate."""
        return self.trace.ledger

    @property
    def calls(self) -> tuple[LLMCall, ...]:
        """What the LLM was asked to make it."""
        return self.trace.calls

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """The quotes in it, in the order of ``seq``."""
        spans = {entry.segment_id: entry.spans for entry in self.ledger}
        return tuple(
            Evidence(s.id, s.seq, (start, end), s.text[start:end], s.created_at, s.who, s.id in self.trace.cited)
            for s in self.segments
            for start, end in spans[s.id]
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """The LLM's answer, with the context that it saw."""

    text: str
    segment: Segment | None
    context: Context
    trace: Trace

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """The quotes that the LLM was shown, in the order of ``seq``; ``cited`` are those that the answer cites."""
        return self.context.evidence
