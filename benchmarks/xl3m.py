"""XL3M measured: which score finds a planted fact, whether it adds to recall, how far it reads, and what it costs.

Segments are windows of a book; a fact, or a sentence that only repeats the question, is planted in the middle of one.
The keys and values of the windows are kept, so that only questions are read again: the scores are the same bits.
"""

from __future__ import annotations

import json
import math
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from memory_os.adapters.huggingface import HuggingFaceLLM
from memory_os.adapters.scoring import BATCH_TOKENS, KeptKV
from memory_os.benchmarks.measure import TOKENIZER, Conversation, Progress, Question, squeezed, store
from memory_os.benchmarks.needle import Book, planted
from memory_os.benchmarks.peers import Bm25, Pieces
from memory_os.benchmarks.riddles import RIDDLES, Riddle
from memory_os.certainty import SCORES, certainty_of, relevance
from memory_os.controllers.auto import AutoController
from memory_os.errors import InvalidInputError
from memory_os.memory import Memory
from memory_os.pack import Frame, pack
from memory_os.protocols import Embedder
from memory_os.stem import by_rules
from memory_os.turn import Clock
from memory_os.types import Action, Candidate, Certainty, Choice, Decision, Form, Reason
from memory_os.view import View
from memory_os.windows import windows

__all__ = ["KINDS", "PARTS", "cost", "document", "ranking", "rerank", "segments_of", "share", "with_sentence"]

PARTS = ("ranking", "rerank", "document", "cost")

KINDS = ("easy", "paraphrased", "decoys")
"""The fact in the question's words; in other words; and plainly beside three segments that repeat the question."""
SYSTEMS = ("entropy", "entropy, no stem", "question_nll", "hybrid", "minilm", "bm25")
SEGMENT_TOKENS = 120
N_PLANTED = 4
"""Segments of a trial that something may be planted in: the fact, and three decoys."""
POOL = 2
"""The other segments of a trial are drawn from so many times as many as are needed."""
SHORTLIST = 40
RUN = 7
"""Sentences that stay together where a book is repeated in another order: fewer than a segment has."""
WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Of a certainty, in standard deviations, beside recall's score; chosen on the other conversations."""


# -- planted facts -----------------------------------------------------------------------------------------------------


def ranking(
    book: Book,
    *,
    llm: HuggingFaceLLM,
    embedder: Embedder,
    sizes: Sequence[int],
    trials: int,
    seed: int = 0,
    riddles: Sequence[Riddle] = RIDDLES,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """R@1 and R@3 by kind, number of segments and system, with 95 % confidence intervals; see ``share``.

    :param trials: of each riddle; every one in another place.
    :param seed: of what is planted where.
    """
    rng = random.Random(seed)
    n_pool = POOL * max(sizes)
    drawn = segments_of(book, llm, n_pool + trials * len(riddles) * N_PLANTED, rng)
    pool, hosts = drawn[:n_pool], iter(drawn[n_pool:])
    vectors = embedder.embed_documents(pool)
    kept: KeptKV = {}
    ranks: defaultdict[tuple[str, int, str], list[int]] = defaultdict(list)
    for done, riddle in enumerate(riddles):
        if progress:
            progress(riddle.question, done, len(riddles))
        read = Reader(riddle.question, llm, embedder)
        llm.kept = kept
        others = read.certainties(pool)  # no matter what is planted among them
        llm.kept = None
        for _ in range(trials):
            own_hosts = list(islice(hosts, N_PLANTED))
            chosen = rng.sample(range(n_pool), max(sizes))
            for kind in KINDS:
                own = _planted(riddle, kind, own_hosts)
                values = read.relevances(
                    own, [pool[i] for i in chosen], [each[chosen] for each in others], vectors[chosen]
                )
                for size in sizes:
                    for system, relevances in values.items():
                        ahead = sum(
                            value >= relevances[0] for value in relevances[1:size]
                        )  # of equals the fact is last
                        ranks[kind, size, system].append(ahead)
    return {
        kind: {
            str(size): {
                system: {f"r@{k}": share([rank < k for rank in ranks[kind, size, system]], trials) for k in (1, 3)}
                for system in SYSTEMS
            }
            for size in sizes
        }
        for kind in KINDS
    }


def segments_of(book: Book, llm: HuggingFaceLLM, n: int, rng: random.Random) -> list[str]:
    """Windows of the book, drawn at random."""
    cut = windows(book.sentences, llm.count_text, SEGMENT_TOKENS, 0)
    texts = ["".join(window).strip() for window in cut]
    texts = [text for text in texts if SEGMENT_TOKENS // 2 < llm.count_text(text) <= SEGMENT_TOKENS]
    if len(texts) < n:
        raise InvalidInputError(f"the book has {len(texts)} segments of {SEGMENT_TOKENS} tokens, and {n} are needed")
    return rng.sample(texts, n)


def _planted(riddle: Riddle, kind: str, hosts: Sequence[str]) -> list[str]:
    """The segment with the fact, and those with decoys."""
    fact = riddle.veiled if kind == "paraphrased" else riddle.plain
    own = [with_sentence(hosts[0], fact)]
    if kind == "decoys":
        own += [with_sentence(host, decoy) for host, decoy in zip(hosts[1:], riddle.decoys, strict=True)]
    return own


def with_sentence(host: str, sentence: str) -> str:
    """The text with a sentence at the end of the sentence that is nearest to its middle."""
    ends = [match.end() for match in re.finditer(r"[.!?][”’\"')]*\s", host)]
    place = min(ends, key=lambda end: abs(end - len(host) / 2), default=len(host))
    return f"{host[:place].rstrip()} {sentence} {host[place:].lstrip()}".strip()


@dataclass(frozen=True, slots=True)
class Reader:
    """All systems, for one question."""

    question: str
    llm: HuggingFaceLLM
    embedder: Embedder

    def certainties(self, texts: Sequence[str]) -> tuple[Any, Any]:
        """What the LLM makes of texts with the answer's stem, and without: arrays of objects, ``[n]``."""
        import numpy as np

        stem = by_rules(self.question) or ""
        stemmed = [certainty_of(reading) for reading in self.llm.read_question(texts, self.question, stem)]
        bare = [certainty_of(reading) for reading in self.llm.read(texts, self.question, "")]
        return np.array(stemmed, dtype=object), np.array(bare, dtype=object)

    def relevances(
        self, own: Sequence[str], others: Sequence[str], read: Sequence[Any], vectors: Any
    ) -> dict[str, list[float]]:
        """By system, the relevance of each segment: the planted ones first.

        :param read: ``certainties`` of the others.
        :param vectors: embeddings of the others.
        """
        import numpy as np

        stemmed, bare = ([*mine, *theirs] for mine, theirs in zip(self.certainties(own), read, strict=True))
        texts = [*own, *others]
        lexical = Bm25(Pieces([], []), texts).scores(self.question)
        cosines = np.concatenate([self.embedder.embed_documents(own), vectors])
        return {
            "entropy": relevance(stemmed, "entropy"),
            "entropy, no stem": relevance(bare, "entropy"),
            "question_nll": relevance(stemmed, "question_nll"),
            "hybrid": relevance(stemmed, "hybrid"),
            "minilm": (cosines @ self.embedder.embed_query(self.question)).tolist(),
            "bm25": [lexical.get(number, 0.0) for number in range(len(texts))],
        }


def share(hits: Sequence[bool], together: int) -> dict[str, float]:
    """The share of hits in percent, and its 95 % confidence interval after Wilson.

    Trials of one fact resemble each other, so they count as fewer: as many as would vary as the facts' shares do.

    :param together: so many neighbours are trials of one fact.
    """
    total, z = len(hits), 1.96
    part = sum(hits) / total
    by_fact = [statistics.fmean(hits[start : start + together]) for start in range(0, total, together)]
    spread = statistics.variance(by_fact) / len(by_fact) if len(by_fact) > 1 else 0.0
    n = min(max(part * (1 - part) / spread, len(by_fact)), total) if spread else len(by_fact)
    middle = (part + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(part * (1 - part) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low, high = max(middle - half, 0.0), min(middle + half, 1.0)
    return {"percent": round(100 * part, 1), "low": round(100 * low, 1), "high": round(100 * high, 1), "n": total}


# -- beside recall -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """One question with its shortlist, ready to be packed in any order.

    :param worth: recall's ranking with the price of length, as the default controller has it.
    """

    conversation: int
    view: View
    question: Question
    candidates: Sequence[Candidate]
    certainties: Sequence[Certainty]
    worth: Sequence[float]
    evidence: frozenset[str]


def rerank(
    conversations: Sequence[Conversation],
    *,
    budgets: Sequence[int],
    llm: HuggingFaceLLM,
    embedder: Any = "minilm",
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Share of the evidence in the context, by order of recall's candidates and budget.

    ``recall`` is the default controller's order. A score reorders the first candidates of recall. ``recall + score``
    adds it, in standard deviations, with the weight that is best on the other conversations. ``gain`` is the mean
    difference from recall over the questions, with its 95 % confidence interval.

    :param limit: most questions of a conversation.
    """
    found: defaultdict[tuple[str, int], list[tuple[int, float]]] = defaultdict(list)
    total = sum(len([q for q in c.questions if q.counted][:limit]) for c in conversations)
    if not total:
        raise InvalidInputError("there is no question with evidence in it")
    done = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, conversation in enumerate(conversations):
            llm.kept = {}
            path = Path(folder) / f"{number}.db"
            controller = AutoController(abstain=0)
            with Memory.open(path, embedder=embedder, tokenizer=TOKENIZER, llm=llm, controller=controller) as memory:
                embedder = memory.parts.embedder
                ids = store(memory.namespace("bench"), conversation.turns)
                for question in [q for q in conversation.questions if q.counted][:limit]:
                    if progress:
                        progress(conversation.name, done, total)
                    asked = _asked(memory, number, question, ids, controller)
                    for name, order in _orders(asked).items():
                        for budget in budgets:
                            found[name, budget].append((number, _recall(asked, order, budget)))
                    done += 1
    llm.kept = None
    return {
        name: {str(budget): _figure(found, name, budget) for budget in budgets}
        for name in ("recall", *SCORES, *(f"recall + {score}" for score in SCORES))
    }


def _asked(
    memory: Memory, number: int, question: Question, ids: Mapping[str, str], controller: AutoController
) -> Asked:
    parts, namespace = memory.parts, ("bench",)
    state = parts.store.state(namespace, parts.embedder.fingerprint)
    view = View(
        parts, namespace, question.text, upto=state.last_seq, now=datetime.now(UTC), breadth=170, state=state,
        clock=Clock(),
    )  # fmt: skip
    decision = controller.decide(question.text, view, 0)
    by_id = {candidate.segment.id: candidate for candidate in view.candidates}
    wanted = [by_id[choice.segment_id] for choice in decision.choices if choice.form]
    worth = [c.score - controller.price * math.log(c.n_tokens) for c in wanted]
    windows = [(candidate.segment,) for candidate in wanted[:SHORTLIST]]
    read = view.certainties(windows, by_rules(question.text) or "", with_question=True)
    evidence = frozenset(ids[key] for key in question.evidence)
    return Asked(number, view, question, wanted, read, worth, evidence)


def _orders(asked: Asked) -> dict[str, list[int]]:
    """Places of the candidates in each order; weights are part of the name."""
    n, everyone = len(asked.certainties), range(len(asked.candidates))
    orders = {"recall": list(everyone)}
    for score in SCORES:
        values = _standard(relevance(asked.certainties, score))
        first = sorted(range(n), key=lambda i, values=values: -values[i])  # type: ignore[misc]
        orders[score] = [*first, *everyone[n:]]
        for weight in WEIGHTS:
            sums = [worth + weight * value for worth, value in zip(asked.worth[:n], values, strict=True)]
            first = sorted(range(n), key=lambda i, sums=sums: -sums[i])  # type: ignore[misc]
            orders[f"recall + {score} {weight}"] = [*first, *everyone[n:]]
    return orders


def _standard(values: Sequence[float]) -> list[float]:
    spread = statistics.pstdev(values) or 1.0
    mean = statistics.fmean(values)
    return [(value - mean) / spread for value in values]


def _recall(asked: Asked, order: Sequence[int], budget: int) -> float:
    """The share of the evidence that stands in the packed context."""
    parts = asked.view.parts
    frame = Frame(parts.options.system, asked.question.text, parts.counter, budget)
    chosen = [asked.candidates[i] for i in order]
    decision = Decision(tuple(Choice(c.segment.id, Form.FULL, Reason.RELEVANT) for c in chosen))
    packed = pack(frame, (), chosen, decision)
    inside = {entry.segment_id for entry in packed.ledger if entry.action is Action.ACTIVATED}
    return 100 * len(inside & asked.evidence) / len(asked.evidence)


def _figure(found: Mapping[tuple[str, int], Sequence[tuple[int, float]]], name: str, budget: int) -> dict[str, float]:
    if not name.startswith("recall + "):
        values = [share for _, share in found[name, budget]]
        return _beside(values, found["recall", budget])
    weighted = {weight: found[f"{name} {weight}", budget] for weight in WEIGHTS}
    values, chosen = [], []
    for left_out in sorted({number for number, _ in weighted[0.0]}):
        others = {w: [s for number, s in rows if number != left_out] for w, rows in weighted.items()}
        best = max(WEIGHTS, key=lambda w: (statistics.fmean(others[w]) if others[w] else 0.0, -w))
        chosen.append(best)
        values += [share for number, share in weighted[best] if number == left_out]
    return {**_beside(values, found["recall", budget]), "weight": statistics.median(chosen)}


def _beside(values: Sequence[float], recall: Sequence[tuple[int, float]]) -> dict[str, float]:
    """The mean, and what it is above recall's, question by question; both in the order of the conversations."""
    gains = [value - own for value, (_, own) in zip(values, recall, strict=True)]
    gain = statistics.fmean(gains)
    half = 1.96 * statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    figure = {"recall": statistics.fmean(values), "gain": gain, "low": gain - half, "high": gain + half}
    return {**{name: round(value, 2) for name, value in figure.items()}, "n": len(values)}


# -- a long document ---------------------------------------------------------------------------------------------------

READ = """
import json, resource, sys, time
from memory_os import Memory
path, file, question, options = json.loads(sys.argv[1])
start = time.perf_counter()
with Memory.open(path, llm="smollm2") as memory:
    reply = memory.namespace("bench").read(file, question, options=options)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"text": reply.text, "shown": reply.context.text, "notes": list(reply.trace.notes),
    "tokens": reply.context.n_tokens, "seconds": time.perf_counter() - start, "peak": peak}))
"""


def document(book: Book, length: int, *, score: str = "hybrid", riddle: Riddle = RIDDLES[3]) -> dict[str, Any]:
    """A document of so many tokens (cl100k_base) with a fact in its middle, read in a process of its own.

    :param book: where it is shorter, it is repeated in another order, so that no segment is read twice.
    """
    haystack = planted(_longer(book, length), length, [50], [(riddle.plain, riddle.question)], 0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "document.txt"
        file.write_text(haystack.text, encoding="utf-8")
        told = json.dumps([f"{folder}/memory.db", str(file), riddle.question, {"score": score}])
        done = subprocess.run([sys.executable, "-c", READ, told], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InvalidInputError(f"the document could not be read: {done.stderr.strip().splitlines()[-1]}")
    report = json.loads(done.stdout.splitlines()[-1])
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "tokens": length,
        "characters": len(haystack.text),
        "score": score,
        "seconds": round(report["seconds"], 1),
        "peak_mb": round(report["peak"] * unit / 1e6),
        "found": squeezed(riddle.plain) in squeezed(report["shown"]),
        "context_tokens": report["tokens"],
        "answer": report["text"],
        "notes": report["notes"],
    }


def _longer(book: Book, length: int) -> Book:
    """At least so many tokens: the book, then its runs of sentences in ever other orders."""
    rng = random.Random(0)
    sentences, costs = list(book.sentences), list(book.costs)
    runs = [range(start, min(start + RUN, len(book.sentences))) for start in range(0, len(book.sentences), RUN)]
    total = sum(costs)
    while total < length:
        for run in rng.sample(runs, len(runs)):
            sentences += [book.sentences[i] for i in run]
            costs += [book.costs[i] for i in run]
        total += sum(book.costs)
    return Book(sentences, costs)


# -- cost --------------------------------------------------------------------------------------------------------------


def cost(
    book: Book, *, llm: HuggingFaceLLM, lengths: Sequence[int] = (128, 256, 512), n: int = 32, rounds: int = 3
) -> dict[str, Any]:
    """Milliseconds a segment: the bare forward pass over padded batches of the same size, ours, and with what is kept.

    The best of the rounds; ``throughput`` is bare over ours, ``kept_ratio`` bare over ours with keys and values kept.
    """
    question = RIDDLES[3].question
    stem = by_rules(question) or ""
    report = {}
    for length in lengths:
        cut = ("".join(window).strip() for window in windows(book.sentences, llm.count_text, length, 0))
        texts = list(islice((text for text in cut if llm.count_text(text) > 0.9 * length), n))

        def ours(texts: Sequence[str] = texts) -> None:
            for reading in llm.read(texts, question, stem):
                certainty_of(reading)

        llm.kept = None
        bare = _best_ms(_bare(llm, texts, question, stem), rounds, len(texts))
        fresh = _best_ms(ours, rounds, len(texts))
        llm.kept = {}
        ours()
        kept = _best_ms(ours, rounds, len(texts))
        llm.kept = None
        report[str(length)] = {
            "bare_ms": round(bare, 2), "ours_ms": round(fresh, 2), "kept_ms": round(kept, 2),
            "throughput": round(bare / fresh, 2), "kept_ratio": round(bare / kept, 1),
        }  # fmt: skip
    return report


def _bare(llm: HuggingFaceLLM, texts: Sequence[str], question: str, stem: str) -> Callable[[], None]:
    """The model alone over the same prompts, padded, in batches of as many tokens, for the last logits of each."""
    import torch

    model = llm.model
    prompts = [llm.prompt_of(text, question, stem) for text in texts]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    size = max(BATCH_TOKENS // longest, 1)

    def work() -> None:
        with torch.inference_mode():
            for start in range(0, len(prompts), size):
                part = slice(start, start + size)
                model(input_ids=ids[part], attention_mask=mask[part], logits_to_keep=1, use_cache=False)

    return work


def _best_ms(work: Callable[[], object], rounds: int, n: int) -> float:
    times = []
    for _ in range(rounds + 1):  # the first one warms up
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * min(times[1:]) / n
