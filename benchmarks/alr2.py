"""ALR² measured: how much of what an LLM quotes is invented, how much evidence is found, and chains of evidence.

Every question is asked once of the LLM, with recall's sentences added behind what it quotes; what it would be without
the verifier and without those sentences is read off the ledger and the trace. All at equal budgets.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from memory_os.adapters.tokenizers import counter_for
from memory_os.benchmarks.ancestors import Language, conversation
from memory_os.benchmarks.measure import TOKENIZER, Conversation, Progress, Question, Turn, store
from memory_os.benchmarks.needle import Book
from memory_os.benchmarks.riddles import RIDDLES, Riddle
from memory_os.benchmarks.xl3m import with_sentence
from memory_os.controllers.alr2 import Alr2Controller
from memory_os.controllers.auto import AutoController
from memory_os.errors import InvalidInputError
from memory_os.memory import Memory
from memory_os.protocols import LLM, Controller
from memory_os.quotes import numbered, read_claims, verify
from memory_os.turn import Parts, prepare
from memory_os.types import Context, Reason
from memory_os.windows import windows

__all__ = ["PARTS", "chains", "evidence", "planted_facts"]

PARTS = ("locomo", "planted")
BENCH = "bench"
TURN_TOKENS = 60


# -- quotes ------------------------------------------------------------------------------------------------------------


def evidence(
    conversations: Sequence[Conversation],
    *,
    llm: LLM,
    budget: int,
    options: dict[str, Any] | None = None,
    embedder: Any = "minilm",
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evidence recall and invented quotes, in percent, by system; see ``memos bench alr2 --help``.

    :param options: of ``Alr2Controller``.
    :param limit: most questions of a conversation.
    """
    rows: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    asked = [(c, [q for q in c.questions if q.counted][:limit]) for c in conversations]
    total, done = sum(len(questions) for _, questions in asked), 0
    if not total:
        raise InvalidInputError("there is no question with evidence in it")
    extracting = Alr2Controller(**{**(options or {}), "extract": "llm"})
    with tempfile.TemporaryDirectory() as folder:
        for number, (told, questions) in enumerate(asked):
            path = Path(folder) / f"{number}.db"
            with Memory.open(path, embedder=embedder, tokenizer=TOKENIZER, llm=llm, controller=extracting) as memory:
                embedder = memory.parts.embedder
                ids = store(memory.namespace(BENCH), told.turns)
                for question in questions:
                    if progress:
                        progress(told.name, done, total)
                    wanted = frozenset(ids[key] for key in question.evidence)
                    for name, row in _systems(memory.parts, question, wanted, budget).items():
                        rows[name].append(row)
                    done += 1
    report = {name: _means(found) for name, found in rows.items()}
    for name in ("quoted, not verified", "quoted, verified"):
        n_quotes = sum(row["quotes"] for row in rows[name])
        invented = sum(row["invented"] for row in rows[name])
        report[name]["hallucination_rate"] = round(100 * invented / n_quotes, 2) if n_quotes else 0.0
    return report


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {column: round(statistics.fmean(row[column] for row in rows), 2) for column in rows[0]} | {"n": len(rows)}


def _systems(parts: Parts, question: Question, wanted: frozenset[str], budget: int) -> dict[str, dict[str, float]]:
    """One question by every system: the evidence that stands in the context, and what was invented there."""
    asked = _context(parts, question, budget, parts.controller)
    free = _context(parts, question, budget, Alr2Controller(extract="free"))
    plain = _context(parts, question, budget, AutoController(abstain=0))
    looked_at = parts.store.get((BENCH,), [entry.segment_id for entry in asked.ledger])
    sentences = [sentence for segment in looked_at.values() for sentence in numbered(segment)]
    calls = [call for call in asked.calls if call.purpose.startswith("the evidence in")]
    first = [call for call in calls if not call.purpose.endswith("once more")]
    claims = verify([claim for call in first for claim in read_claims(call.answer) or ()], sentences)
    quoted = [entry for entry in asked.ledger if entry.reason is Reason.QUOTED and entry.spans]
    texts = {segment.id: segment.text for segment in asked.segments}
    unstored = sum(each.quote not in texts[each.segment_id] for each in asked.evidence)
    return {
        "quoted, not verified": {
            "recall": _share([sentence.segment.id for sentence in claims.accepted], wanted),
            "quotes": claims.n_claims, "invented": len(claims.rejected),
        },
        "quoted, verified": {
            "recall": _share([entry.segment_id for entry in quoted], wanted),
            "quotes": sum(len(entry.spans) for entry in quoted), "invented": unstored,
        },
        "alr2 (with recall's sentences)": {
            **_standing(asked, wanted), "calls": len(calls),
            "fallback": 100.0 * any("fallback" in note for note in asked.trace.notes),
        },
        "alr2, without the LLM": _standing(free, wanted),
        "auto": _standing(plain, wanted),
    }  # fmt: skip


def _context(parts: Parts, question: Question, budget: int, controller: Controller) -> Context:
    return prepare(replace(parts, controller=controller), (BENCH,), None, question.text, budget=budget)


def _standing(context: Context, wanted: frozenset[str]) -> dict[str, float]:
    inside = [segment.id for segment in context.segments]
    return {"recall": _share(inside, wanted), "tokens": context.account.activated}


def _share(found: Iterable[str], wanted: frozenset[str]) -> float:
    return 100 * len(wanted & set(found)) / len(wanted)


def planted_facts(
    book: Book, *, riddles: Sequence[Riddle] = RIDDLES, n_turns: int = 400, seed: int = 0
) -> Conversation:
    """A book told in turns: each riddle's fact stands in one, and sentences that repeat its question in three others.

    :param n_turns: most turns of the book.
    """
    counter = counter_for(TOKENIZER)
    rng = random.Random(seed)
    runs = islice(windows(book.sentences, counter.count_text, TURN_TOKENS, 0), n_turns)
    told = ["".join(run).strip() for run in runs]
    planted = [(sentence, n) for n, riddle in enumerate(riddles) for sentence in (riddle.plain, *riddle.decoys)]
    places = rng.sample(range(len(told)), len(planted))
    evidence: dict[int, int] = {}
    for place, (sentence, number) in zip(places, planted, strict=True):
        told[place] = with_sentence(told[place], sentence)
        if sentence == riddles[number].plain:
            evidence[number] = place
    turns = tuple(Turn(str(place), "book", text) for place, text in enumerate(told))
    questions = tuple(Question(riddle.question, (str(evidence[n]),)) for n, riddle in enumerate(riddles))
    return Conversation("planted facts", turns, questions)


# -- chains ------------------------------------------------------------------------------------------------------------


def chains(
    *,
    links: Sequence[int],
    budgets: Sequence[int],
    n: int,
    n_distractors: int,
    language: Language = "en",
    embedder: Any = "minilm",
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Of ancestral traces of so many links, the share of links in the context, and of traces with all of them.

    ``{links: {budget: {system: {"links", "all", "tokens", "n"}}}}``, in percent; no LLM takes part.

    :param n: traces of each number of links.
    :param n_distractors: turns that belong to no trace, in each memory.
    """
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, length in enumerate(links):
            if progress:
                progress(f"{length} links", number, len(links))
            told = conversation(length, n, n_distractors, language=language, seed=seed)
            systems: dict[str, Controller] = {
                "one search (auto)": AutoController(abstain=0),
                "one search (alr2)": Alr2Controller(extract="free"),
                "hops (alr2)": Alr2Controller(extract="free", hops=length + 1),
            }
            with Memory.open(Path(folder) / f"{length}.db", embedder=embedder, tokenizer=TOKENIZER) as memory:
                embedder = memory.parts.embedder
                ids = store(memory.namespace(BENCH), told.turns)
                report[str(length)] = {
                    str(budget): {
                        name: _traces(memory.parts, told.questions, ids, budget, system)
                        for name, system in systems.items()
                    }
                    for budget in budgets
                }
    return report


def _traces(
    parts: Parts, questions: Sequence[Question], ids: Mapping[str, str], budget: int, controller: Controller
) -> dict[str, float]:
    rows = []
    for question in questions:
        wanted = frozenset(ids[key] for key in question.evidence)
        rows.append(_standing(_context(parts, question, budget, controller), wanted))
    return {
        "links": round(statistics.fmean(row["recall"] for row in rows), 2),
        "all": round(100 * statistics.fmean(row["recall"] == 100.0 for row in rows), 2),
        "tokens": round(statistics.fmean(row["tokens"] for row in rows), 1),
        "n": len(rows),
    }
