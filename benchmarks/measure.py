"""What the benchmarks share: conversations whose evidence is known, and how much of it enters a bounded context."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from memory_os.benchmarks import peers
from memory_os.errors import InvalidInputError
from memory_os.memory import Memory, Scope
from memory_os.types import Action, Context, Form, NewSegment, Role

__all__ = [
    "SHARED",
    "TOKENIZER",
    "Conversation",
    "Progress",
    "Question",
    "Tally",
    "Turn",
    "measure",
    "percentile",
    "read_json",
    "squeezed",
    "store",
]

TOKENIZER = "cl100k_base"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
"""The project's evaluation data, beside a checkout; elsewhere nothing is there."""
WARM_UP = 3
SESSIONS = 10

Progress = Callable[[str, int, int], None]
"""Called with what is being measured, how many questions are done, and how many there are."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation.

    :param key: its name in the data, by which evidence refers to it.
    """

    key: str
    session: str
    text: str
    role: Role = "user"
    speaker: str | None = None
    when: datetime | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A question and the keys of the turns that hold its answer.

    :param groups: the rows of the table by category in which it counts.
    :param counted: whether it counts in recall, and not only in the search for sessions.
    :param answer: the reference answer, where the data has one.
    """

    text: str
    evidence: tuple[str, ...]
    groups: tuple[str, ...] = ()
    counted: bool = True
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, in order, and questions about them."""

    name: str
    turns: tuple[Turn, ...]
    questions: tuple[Question, ...]


@dataclass(slots=True)
class Tally:
    """Outcomes of questions, by group and budget; the group of all is ``""``."""

    rows: defaultdict[tuple[str, int], list[tuple[float, float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def add(self, question: Question, budget: int, found: float, cut: float, tokens: float) -> None:
        """Count one question: the shares of its evidence that stand in full and cut, and the tokens it took."""
        for group in ("", *question.groups):
            self.rows[group, budget].append((found, cut, tokens))

    def figures(self, group: str = "", *, partly: bool = False) -> dict[str, dict[str, float]]:
        """``{budget: {"recall", "all", "tokens", "n"}}``; with ``partly`` also the share that entered cut."""
        budgets = sorted(budget for name, budget in self.rows if name == group)
        return {str(budget): self._figure(self.rows[group, budget], partly) for budget in budgets}

    @staticmethod
    def _figure(rows: Sequence[tuple[float, float, float]], partly: bool) -> dict[str, float]:
        found, cut, tokens = zip(*rows, strict=True)
        figure = {
            "recall": round(100 * statistics.fmean(found), 2),
            "all": round(100 * statistics.fmean(share == 1.0 for share in found), 2),
            "tokens": round(statistics.fmean(tokens), 1),
            "n": len(rows),
        }
        return {**figure, "partly": round(100 * statistics.fmean(cut), 2)} if partly else figure

    @property
    def groups(self) -> list[str]:
        """The groups that have any question."""
        return sorted({group for group, _ in self.rows if group})


def read_json(path: Path) -> Any:
    """The data in a JSON file.

    :raises InvalidInputError: for a file that cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInputError(f"cannot read it: {error.strerror}", source=str(path)) from error
    except json.JSONDecodeError as error:
        raise InvalidInputError(f"not JSON: {error.msg}", source=str(path), line=error.lineno) from error
    except UnicodeDecodeError as error:
        raise InvalidInputError("not UTF-8", source=str(path)) from error


def store(scope: Scope, turns: Sequence[Turn]) -> dict[str, str]:
    """Store turns as a user would; ``{key: segment id}``."""
    new = [
        NewSegment(turn.text, turn.session, role=turn.role, speaker=turn.speaker, created_at=turn.when, key=turn.key)
        for turn in turns
    ]
    return {segment.key or "": segment.id for segment in scope.add_many(new)}


def squeezed(text: str) -> str:
    """The text with every run of white space as one blank."""
    return " ".join(text.split())


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least so many percent of the values do not exceed.

    >>> percentile([4.0, 1.0, 2.0, 3.0], 50)
    2.0
    """
    ordered = sorted(values)
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]


def measure(
    conversations: Sequence[Conversation],
    *,
    budgets: Sequence[int],
    compare: Sequence[str] = (),
    embedder: str = "minilm",
    left_out: int = 0,
    partly: bool = False,
    by_session: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The whole report, ready for JSON: see ``memos bench locomo --help``.

    :param compare: names of peers, which get the same texts at equal tokens.
    :param partly: also give the share of evidence that entered cut.
    :param by_session: also search for the sessions of the evidence.
    """
    if not any(question.counted for conversation in conversations for question in conversation.questions):
        raise InvalidInputError("there is no question with evidence in it")
    run = Run(sorted(set(budgets)), {name: Tally() for name in peers.checked(compare)}, by_session)
    total = sum(len(conversation.questions) for conversation in conversations)
    done = 0
    model: Any = embedder
    with tempfile.TemporaryDirectory() as folder:
        for number, conversation in enumerate(conversations):
            with Memory.open(Path(folder) / f"{number}.db", embedder=model, tokenizer=TOKENIZER) as memory:
                model = memory.parts.embedder  # the next conversation need not load it again
                if progress:
                    progress(conversation.name, done, total)
                for _ in run.conversation(memory, conversation):
                    done += 1
                    if progress:
                        progress(conversation.name, done, total)
    report: dict[str, Any] = {
        "overall": run.ours.figures(partly=partly),
        "by_category": {group: run.ours.figures(group, partly=partly) for group in run.ours.groups},
        "session_recall_at_10": round(100 * statistics.fmean(run.sessions), 2) if run.sessions else None,
        "latency_ms": {
            "p50": round(percentile(run.context_ms, 50), 2),
            "p95": round(percentile(run.context_ms, 95), 2),
            "query_embedding_p50": round(percentile(run.embedding_ms, 50), 2),
        },
        "peers": {name: tally.figures() for name, tally in run.theirs.items()},
        "left_out": left_out,
    }
    return report | ({"disagreements": run.disagreements} if run.disagreements else {})


@dataclass(slots=True)
class Run:
    """One measurement under way.

    :param disagreements: evidence that the ledger calls activated in full, and whose text is not in the messages.
    """

    budgets: Sequence[int]
    theirs: Mapping[str, Tally]
    by_session: bool
    ours: Tally = field(default_factory=Tally)
    sessions: list[float] = field(default_factory=list)
    context_ms: list[float] = field(default_factory=list)
    embedding_ms: list[float] = field(default_factory=list)
    disagreements: int = 0

    def conversation(self, memory: Memory, conversation: Conversation) -> Iterator[None]:
        """Measure every question of a conversation; yields after each."""
        scope = memory.namespace("bench")
        ids = store(scope, conversation.turns)
        texts = {turn.key: squeezed(turn.text) for turn in conversation.turns}
        rankers = peers.rankers(list(self.theirs), conversation.turns, memory.parts.embedder, memory.parts.counter)
        for question in conversation.questions[:WARM_UP]:
            memory.parts.embedder.embed_query(question.text)
            scope.context(question.text, budget=self.budgets[-1])
        for question in conversation.questions:
            if self.by_session:
                self._find_sessions(scope, conversation.turns, question)
            if question.counted:
                self._ask(memory, scope, question, ids, texts)
                vector = memory.parts.embedder.embed_query(question.text)
                for name, ranker in rankers.items():
                    order = ranker.rank(question.text, vector)
                    for budget in self.budgets:
                        inside, tokens = ranker.pieces.filled(order, budget)
                        share = sum(key in inside for key in question.evidence) / len(question.evidence)
                        self.theirs[name].add(question, budget, share, 0.0, tokens)
            yield

    def _ask(
        self, memory: Memory, scope: Scope, question: Question, ids: Mapping[str, str], texts: Mapping[str, str]
    ) -> None:
        for budget in self.budgets:
            start = time.perf_counter()
            memory.parts.embedder.embed_query(question.text)
            middle = time.perf_counter()
            context = scope.context(question.text, budget=budget)
            self.embedding_ms.append(1000 * (middle - start))
            self.context_ms.append(1000 * (time.perf_counter() - middle))
            full, cut = _standing(context, [ids[key] for key in question.evidence])
            shown = squeezed(" ".join(message["content"] for message in context.messages))
            self.disagreements += sum(ids[key] in full and texts[key] not in shown for key in question.evidence)
            n = len(question.evidence)
            self.ours.add(question, budget, len(full) / n, len(cut) / n, context.n_tokens)

    def _find_sessions(self, scope: Scope, turns: Sequence[Turn], question: Question) -> None:
        session_of = {turn.key: turn.session for turn in turns}
        wanted = {session_of[key] for key in question.evidence}
        hits = scope.search(question.text, k=len(turns))
        first = list(dict.fromkeys(hit.segment.session for hit in hits))[:SESSIONS]
        self.sessions.append(len(wanted & set(first)) / len(wanted))


def _standing(context: Context, evidence: Sequence[str]) -> tuple[set[str], set[str]]:
    """Of these segments, those that entered in full and those that entered cut."""
    full = {e.segment_id for e in context.ledger if e.action is Action.ACTIVATED and e.form is Form.FULL}
    cut = {e.segment_id for e in context.ledger if e.action is Action.TRIMMED}
    return full & set(evidence), cut & set(evidence)
