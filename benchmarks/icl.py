"""In-context learning measured: examples from the bank against examples in the window, on sentences of film reviews.

SST-2 (Socher et al. 2013) as LongMem's paper (arXiv 2306.07174) has it: few examples fit into the window, thousands
into memory. What is stored are sentences of the training set; what is asked are those of the development set.
"""

from __future__ import annotations

import csv
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from memory_os.benchmarks.measure import Progress
from memory_os.errors import InvalidInputError
from memory_os.examples import CONTENT_FREE, Prediction
from memory_os.memory import Memory
from memory_os.protocols import CachingLLM, Embedder
from memory_os.types import BankOptions, CachedPrompt

__all__ = ["LABELS", "measure", "read_tsv"]

LABELS = ("negative", "positive")
INPUT, LABEL = "Review", "Sentiment"
SEEDS = 3
"""So many draws of fixed examples."""
VOTERS = 20
TIMED = 12
"""Queries by which the time of an ordinary prefill is measured."""

Example = tuple[str, str]


def read_tsv(path: Path) -> list[Example]:
    """``(sentence, label in words)`` of a file with the columns ``sentence`` and ``label`` (0 or 1).

    :raises InvalidInputError: with the line, for anything else.
    """
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        for line, row in enumerate(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE), start=2):
            if not row.get("sentence") or row.get("label") not in ("0", "1"):
                raise InvalidInputError("not a sentence and a label of 0 or 1", source=str(path), line=line)
            rows.append((row["sentence"].strip(), LABELS[int(row["label"])]))
    return rows


def measure(
    train: Sequence[Example],
    dev: Sequence[Example],
    *,
    llm: CachingLLM,
    embedder: Embedder,
    n_stored: int = 2000,
    limit: int | None = None,
    ks: Sequence[int] = (0, 4, 20),
    dtype: Literal["float16", "int8"] = "float16",
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Accuracy by system, plain and calibrated, with 95 % intervals after Wilson, and milliseconds a query.

    ``"text K"`` is K fixed examples in the window, ``"cached K"`` the same ones as keys and values, ``"bank"`` the
    nearest of the stored ones in as many tokens as the most fixed examples take, ``"bank as text"`` these as text, and
    ``"neighbours"`` no LLM: what most of the nearest are.

    :param limit: so many queries of ``dev``, drawn at random; all by default.
    :param ks: how many fixed examples; from 1 on as many of each label as may be, the mean of several draws.
    :param dtype: of the bank.
    :param seed: of what is stored, drawn and asked.
    :param folder: where the bank is, which may be there already; by default a temporary one.
    """
    rng = random.Random(seed)
    shuffled = list(train)
    rng.shuffle(shuffled)
    stored = shuffled[:n_stored]  # the rest is for whoever tunes something
    queries = rng.sample(list(dev), limit) if limit is not None and limit < len(dev) else list(dev)
    most = max(ks)
    draws = [_balanced(stored, most, random.Random(seed + n)) for n in range(SEEDS)]
    n_fixed = [sum(llm.count_text(_line(example)) for example in draw) for draw in draws]
    window = round(statistics.fmean(n_fixed))

    def each(name: str, answer: Callable[[str], Outcome]) -> list[Outcome]:
        outcomes = []
        for done, (text, _) in enumerate(queries):
            if progress:
                progress(name, done, len(queries))
            outcomes.append(answer(text))
        return outcomes

    systems: dict[str, list[list[Outcome]]] = {}
    for k in ks:
        fixed = [draw[:k] for draw in draws] if k else [[]]
        systems[f"text {k}"] = [each(f"text {k}", _from_text(llm, examples)) for examples in fixed]
    systems[f"cached {most}"] = [each(f"cached {most}", _from_cache(llm, examples)) for examples in draws]
    with tempfile.TemporaryDirectory() as temporary:
        path = (folder or Path(temporary)) / "memory.db"
        options = BankOptions(max_tokens=1_000_000, max_bytes=64_000_000_000, dtype=dtype)
        with Memory.open(path, llm=llm, embedder=embedder, bank=options) as memory:
            scope = memory.namespace("sst2")
            # more than fit, so that the window is what bounds them
            examples = scope.examples(INPUT, LABEL, labels=LABELS, k=2 * most)
            examples.add(stored)
            start = time.perf_counter()
            examples.fill((lambda done, total: progress("fill", done, total)) if progress else None)
            filled_s = time.perf_counter() - start
            status = scope.bank_status()
            found: list[Prediction] = []

            def from_bank(text: str) -> Outcome:
                budget = window + llm.count_cached(_prompt("", _asking(text)))
                start = time.perf_counter()
                prediction = examples.classify(text, budget=budget, calibrate=False)
                took = 1000 * (time.perf_counter() - start)
                found.append(prediction)
                gained = examples.classify(text, budget=budget)
                return Outcome(prediction.label, gained.label, took)

            systems["bank"] = [each("bank", from_bank)]
    nearest = iter(found)
    systems["bank as text"] = [each("bank as text", lambda text: _from_window(llm, next(nearest), text))]
    systems["neighbours"] = [each("neighbours", _from_neighbours(embedder, stored))]

    truth = [label for _, label in queries]
    own = systems["bank"][0]
    timed = {
        f"text {k}": [_prefill_ms(llm, draws[0][:k], text) for text, _ in queries[:TIMED]] for k in ks
    }  # not by the outcomes: there, fixed examples are read once for all queries
    return {
        "n_stored": n_stored,
        "n_queries": len(queries),
        "window_tokens": window,
        "bank": {
            "examples": round(statistics.fmean(len(p.examples) for p in found), 1),
            "prompt_tokens": round(statistics.fmean(p.n_tokens for p in found)),
            "of_the_right_label": round(_right_share(found, truth), 3),
            "dtype": dtype, "tokens": status.n_tokens, "mb": round(status.n_bytes / 1e6), "fill_s": round(filled_s),
        },
        "systems": {
            name: {
                **{way: _figure(runs, own, truth, way) for way in ("plain", "calibrated")},
                "ms": round(statistics.median(timed.get(name) or [each.ms for run in runs for each in run]), 1),
            }
            for name, runs in systems.items()
        },
    }  # fmt: skip


class Outcome(NamedTuple):
    """What a system takes a text for: by the likeliest label, and by the one that gained most; and how long it took."""

    plain: str
    calibrated: str
    ms: float


def _balanced(stored: Sequence[Example], k: int, rng: random.Random) -> list[Example]:
    """``k`` examples, of each label in turn; the first few are as balanced as all of them."""
    shuffled = rng.sample(list(stored), len(stored))
    by_label = [[example for example in shuffled if example[1] == label] for label in LABELS]
    rng.shuffle(by_label)
    drawn = [example for together in zip(*by_label, strict=False) for example in together]
    return drawn[:k]


# -- systems -----------------------------------------------------------------------------------------------------------


def _asking(text: str) -> str:
    return f"{INPUT}: {text}\n{LABEL}:"


def _line(example: Example) -> str:
    return f"{_asking(example[0])} {example[1]}\n\n"


def _prompt(opening: str, asking: str, lines: Sequence[str] = ()) -> CachedPrompt:
    return CachedPrompt("", opening, tuple(lines), ({"role": "user", "content": asking},), plain=True)


OPTIONS = [f" {label}" for label in LABELS]


def _likeliest(likely: Sequence[float], after_nothing: Sequence[float] = (0.0, 0.0)) -> str:
    gains = [own - base for own, base in zip(likely, after_nothing, strict=True)]
    return LABELS[gains.index(max(gains))]


def _shown(llm: CachingLLM, lines: Sequence[str]) -> Callable[[str], list[float]]:
    """The labels of a text after examples as text.

    The tokens are those of one prefill, but what stands before the text is computed once for all texts.
    """
    shown = "".join(lines).removesuffix("\n\n")
    gap = "\n\n" if shown else ""
    return lambda text: llm.continuations(_prompt(shown, gap + _asking(text)), (), OPTIONS)


def _from_text(llm: CachingLLM, examples: Sequence[Example]) -> Callable[[str], Outcome]:
    likely = _shown(llm, list(map(_line, examples)))
    after_nothing = likely(CONTENT_FREE)

    def answer(text: str) -> Outcome:
        start = time.perf_counter()
        own = likely(text)
        return Outcome(_likeliest(own), _likeliest(own, after_nothing), 1000 * (time.perf_counter() - start))

    return answer


def _prefill_ms(llm: CachingLLM, examples: Sequence[Example], text: str) -> float:
    """How long it takes to read examples and text, all of it."""
    start = time.perf_counter()
    llm.continuations(_prompt("", "".join(map(_line, examples)) + _asking(text)), (), OPTIONS)
    return 1000 * (time.perf_counter() - start)


def _from_cache(llm: CachingLLM, examples: Sequence[Example]) -> Callable[[str], Outcome]:
    lines = list(map(_line, examples))
    memory = list(llm.encode_kv(_prompt("", "", lines)))
    after_nothing = llm.continuations(_prompt("", _asking(CONTENT_FREE), lines), memory, OPTIONS)

    def answer(text: str) -> Outcome:
        start = time.perf_counter()
        own = llm.continuations(_prompt("", _asking(text), lines), memory, OPTIONS)
        return Outcome(_likeliest(own), _likeliest(own, after_nothing), 1000 * (time.perf_counter() - start))

    return answer


def _from_window(llm: CachingLLM, prediction: Prediction, text: str) -> Outcome:
    """The examples that the bank gave, read as text."""
    likely = _shown(llm, [f"{segment.text}\n\n" for segment in prediction.examples])
    start = time.perf_counter()
    own = likely(text)
    took = 1000 * (time.perf_counter() - start)
    return Outcome(_likeliest(own), _likeliest(own, likely(CONTENT_FREE)), took)


def _from_neighbours(embedder: Embedder, stored: Sequence[Example]) -> Callable[[str], Outcome]:
    """What most of the nearest are; where they are even, what the nearest is."""
    vectors = embedder.embed_documents([text for text, _ in stored])

    def answer(text: str) -> Outcome:
        start = time.perf_counter()
        order = (-(vectors @ embedder.embed_query(text))).argsort(kind="stable")[:VOTERS]
        votes = [stored[place][1] for place in order]
        label = max(votes, key=votes.count)  # the first of equals
        return Outcome(label, label, 1000 * (time.perf_counter() - start))

    return answer


# -- figures -----------------------------------------------------------------------------------------------------------


def _right_share(found: Sequence[Prediction], truth: Sequence[str]) -> float:
    shares = [
        statistics.fmean(segment.metadata["label"] == label for segment in prediction.examples)
        for prediction, label in zip(found, truth, strict=True)
        if prediction.examples
    ]
    return statistics.fmean(shares) if shares else 0.0


def _figure(
    runs: Sequence[Sequence[Outcome]], bank: Sequence[Outcome], truth: Sequence[str], way: str
) -> dict[str, float]:
    """Accuracy in percent, the mean of the runs, and what the bank is above it, query by query.

    The interval is that of as many trials as there are queries, however many runs: they ask the same.
    """
    hits = [statistics.fmean(getattr(run[place], way) == label for run in runs) for place, label in enumerate(truth)]
    gains = [float(getattr(own, way) == label) - hit for own, label, hit in zip(bank, truth, hits, strict=True)]
    half = 1.96 * statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    low, high = wilson(statistics.fmean(hits), len(hits))
    gain = statistics.fmean(gains)
    values = {
        "accuracy": statistics.fmean(hits), "low": low, "high": high,
        "bank_gain": gain, "gain_low": gain - half, "gain_high": gain + half,
    }  # fmt: skip
    return {**{name: round(100 * value, 1) for name, value in values.items()}, "n": len(hits)}


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share of ``n`` trials.

    >>> [round(end, 3) for end in wilson(0.5, 100)]
    [0.404, 0.596]
    """
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(middle - half, 0.0), min(middle + half, 1.0)
