"""Learns what recall weighs its signals by, on conversations with known evidence, and writes it as data.

    python benchmarks/train_recall.py --data ../shared/data/locomo_dev.json [--projection]

``memory_os/weights.json`` holds the weights with their provenance; ``adapters/minilm_tokens.npy`` (``--projection``)
the directions to which token vectors are projected. Learn on the development conversations only.

A question's evidence turns are told from all other candidates by a softmax over the candidates (ListNet, Cao et al.
2007) of a linear score, with an L2 penalty on standardised weights. Everything reported is cross-validated: each
conversation is scored by weights learned on the others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memory_os import Memory
from memory_os.adapters.sentence_transformer import SentenceTransformerEmbedder
from memory_os.benchmarks import needle
from memory_os.benchmarks.facts import FACTS
from memory_os.benchmarks.locomo import evidence_of, turns_of
from memory_os.benchmarks.measure import store
from memory_os.controllers.auto import margin
from memory_os.pack import render_line
from memory_os.question import KINDS
from memory_os.recall import Scored

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = (512, 1024, 2048)
FIXED_TOKENS = 45  # system prompt and wrappers, besides the question
DATE_TOKENS = 8
POOL = 128
"""Candidates are what either search ranks among so many, with their surroundings: as for a budget of 2,048."""
L2 = 1e-2
BY_KIND = (
    "dense", "dense_session", "lexical_window", "late", "late_pair", "late_three", "late_wide", "late_session",
    "late_before", "length", "speaker", "asks", "time",
)  # fmt: skip
"""The signals whose weight may depend on the kind of the question."""
PRICES = (0.0, 0.2, 0.4, 0.6, 0.8)
BOOK_TOKENS = 16_000
SURE_BY = ("dense", "late_exact", "margin")
"""What tells whether anything remembered is about a question: the best of a signal, or how far the best stands out."""
PASS = 0.998
"""The share of answerable questions that the abstention threshold lets through."""
SMALL_TALK = (
    "Hi!", "Hello there", "Good morning!", "Thanks!", "Thank you so much", "Okay, great.", "Bye, see you later",
    "How are you?", "lol", "Sounds good", "Good night", "What's up?", "Nice!", "Yes please", "Haha that's funny",
    "Write a haiku about the sea.", "What is 12 times 17?", "Translate 'good evening' into French.",
    "Sort these numbers: 4, 2, 9", "Write a Python function that reverses a list.", "What is the capital of Peru?",
    "Explain how photosynthesis works.", "Who wrote Hamlet?", "Convert 10 miles to kilometres.",
    "What does HTTP 404 mean?", "你好", "谢谢", "请把这句话翻译成英文",
)  # fmt: skip

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Example:
    """One question: its candidates' signals ``[candidates, signals]``, costs and dates, and where the evidence is."""

    conversation: int
    category: int
    values: Array
    costs: Array
    days: NDArray[np.int64]
    evidence: NDArray[np.int64]  # positions among the candidates; missing ones are not there
    n_evidence: int
    n_query: int


def expanded(scored: Scored, names: Sequence[str]) -> Array:
    """Signals and, for the question's kinds, signals by kind; ``[candidates, len(names)]``."""
    zero = np.zeros(len(scored.ids), dtype=np.float32)
    columns = []
    for name in names:
        signal, _, kind = name.partition("@")
        columns.append(scored.signals[signal] if not kind or kind in scored.question.kinds else zero)
    return np.stack(columns, axis=1).astype(np.float32)


def best_signals(scored: Scored, names: Sequence[str]) -> list[float]:
    """What the confidence is made of."""
    return [margin(scored.scores.tolist()) if name == "margin" else float(scored.signals[name].max()) for name in names]


def fit(examples: Sequence[Example], columns: NDArray[np.int64]) -> NDArray[np.float64]:
    """Weights of the columns, in the signals' own units."""
    import torch

    kept = [e for e in examples if len(e.evidence)]
    every = np.concatenate([e.values[:, columns] for e in kept])
    spread = every.std(axis=0) + 1e-6
    most = max(len(e.values) for e in kept)
    values = torch.zeros(len(kept), most, len(columns))
    mask = torch.full((len(kept), most), -1e9)
    target = torch.zeros(len(kept), most)
    for i, example in enumerate(kept):
        size = len(example.values)
        values[i, :size] = torch.from_numpy((example.values[:, columns] - every.mean(axis=0)) / spread)
        mask[i, :size] = 0.0
        target[i, example.evidence] = 1.0 / len(example.evidence)
    weights = torch.zeros(len(columns), requires_grad=True)
    solver: Any = torch.optim.LBFGS([weights], max_iter=80, line_search_fn="strong_wolfe")

    def loss() -> Any:
        solver.zero_grad()
        scores = values @ weights + mask
        value: Any = -(target * torch.log_softmax(scores, dim=1)).sum(dim=1).mean() + L2 * (weights**2).sum()
        value.backward()
        return value

    solver.step(loss)
    return np.asarray(weights.detach().numpy() / spread, dtype=np.float64)


def found_share(example: Example, scores: Array, price: float, budget: int) -> float:
    """The share of the evidence that stands in the context, packed as memory_os packs."""
    room = budget - FIXED_TOKENS - example.n_query
    inside: set[int] = set()
    dates: set[int] = set()
    for i in np.argsort(-(scores - price * np.log(example.costs)), kind="stable"):
        cost = example.costs[i] + (0 if example.days[i] in dates else DATE_TOKENS)
        if cost <= room:
            room -= cost
            inside.add(int(i))
            dates.add(int(example.days[i]))
    return sum(int(i) in inside for i in example.evidence) / example.n_evidence


def cross_validated(examples: Sequence[Example], columns: NDArray[np.int64]) -> dict[float, dict[int, float]]:
    """Mean recall by price and budget, in percent."""
    scores: dict[int, Array] = {}
    for conversation in sorted({e.conversation for e in examples}):
        weights = fit([e for e in examples if e.conversation != conversation], columns)
        for i, example in enumerate(examples):
            if example.conversation == conversation:
                scores[i] = (example.values[:, columns] @ weights).astype(np.float32)
    return {
        price: {
            budget: 100 * float(np.mean([found_share(e, scores[i], price, budget) for i, e in enumerate(examples)]))
            for budget in BUDGETS
        }
        for price in PRICES
    }


def of_documents(memory: Memory, folder: Path, data: Path) -> tuple[list[list[float]], list[list[float]]]:
    """The best signals of questions about facts that are planted in books, and about facts that are not."""
    planted: list[list[float]] = []
    absent: list[list[float]] = []
    for language, book in needle.books(sorted(data.glob("*.txt"))).items():
        facts = FACTS[language]
        half = len(facts) // 2
        for trial, own in enumerate((facts[:half], facts[half : 2 * half])):
            depths = [100 * i // (half - 1) for i in range(half)]
            file = folder / f"{language}{trial}.txt"
            start = trial * len(book.sentences) // 2
            file.write_text(needle.planted(book, BOOK_TOKENS, depths, own, start).text, encoding="utf-8")
            scope = memory.namespace("books", language, str(trial))
            scope.ingest(file)
            for fact in facts:
                scored = memory.parts.recall.score(scope.labels, fact[1], k=POOL)
                if scored and "late" in scored.signals:
                    (planted if fact in own else absent).append(best_signals(scored, SURE_BY))
    return planted, absent


def calibrated(
    yes: Sequence[list[float]], foreign: Sequence[list[float]], chat: Sequence[list[float]],
    planted: Sequence[list[float]], absent: Sequence[list[float]],
) -> dict[str, Any]:  # fmt: skip
    """A logistic model of the best signals: answerable questions against small talk and other people's questions.

    Questions about documents count more, because there are fewer of them.
    """
    import torch

    groups = {"answerable": yes, "planted": planted, "foreign": foreign, "small_talk": chat, "absent": absent}
    counts = {"planted": 8.0, "absent": 8.0, "small_talk": 2.0}
    values = torch.tensor([row for rows in groups.values() for row in rows])
    labels = torch.tensor([float(name in ("answerable", "planted")) for name, rows in groups.items() for _ in rows])
    each = torch.tensor([counts.get(name, 1.0) for name, rows in groups.items() for _ in rows])
    for label in (0.0, 1.0):
        each[labels == label] /= each[labels == label].sum()
    weights = torch.ones(len(SURE_BY) + 1, requires_grad=True)
    solver: Any = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Any:
        solver.zero_grad()
        logits = values @ weights[1:] ** 2 + weights[0]  # more of a signal never makes it less sure
        lost = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, each, reduction="sum")
        value: Any = lost + 1e-4 * (weights**2).sum()
        value.backward()
        return value

    solver.step(loss)
    with torch.no_grad():
        slopes = (weights[1:] ** 2).tolist()
        sure = torch.sigmoid(values @ weights[1:] ** 2 + weights[0]).numpy()
    ends = np.cumsum([len(rows) for rows in groups.values()])
    by_group = dict(zip(groups, np.split(sure, ends[:-1]), strict=True))
    for share in (0.98, 0.99, 0.995, PASS, 1.0):
        limit = np.quantile(by_group["answerable"], 1.0 - share)
        passing = {name: round(float((values >= limit).mean()), 3) for name, values in by_group.items()}
        print(f"threshold {limit:.3f} lets through", passing)
    threshold = float(np.quantile(by_group["answerable"], 1.0 - PASS))
    return {
        "weights": {
            "constant": round(weights[0].item(), 4),
            **{name: round(slope, 4) for name, slope in zip(SURE_BY, slopes, strict=True)},
        },
        "threshold": round(threshold, 4),
        "let_through": {name: round(float((values >= threshold).mean()), 4) for name, values in by_group.items()},
    }


def learn_projection(texts: Sequence[str]) -> None:
    """Write the directions in which the token vectors of these texts vary most."""
    import torch

    embedder = SentenceTransformerEmbedder("minilm")
    _, fast = embedder._model()
    assert fast is not None
    square = np.zeros((384, 384))
    ids = fast._tokens(list(texts))["input_ids"]
    with torch.inference_mode():
        for each in ids:
            states, _ = fast._states([each])
            kept = states[torch.from_numpy(fast.meaning[np.asarray(each)])].float()
            unit = torch.nn.functional.normalize(kept, dim=1).numpy()
            square += unit.T @ unit
    directions = np.linalg.eigh(square)[1][:, ::-1][:, :64]
    np.save(ROOT / "adapters" / "minilm_tokens.npy", directions.astype(np.float16))


def main() -> None:
    """Learn, report, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "locomo_dev.json")
    parser.add_argument("--projection", action="store_true", help="learn the projection of token vectors first")
    parser.add_argument("--dry-run", action="store_true", help="report only")
    options = parser.parse_args()
    conversations = json.loads(options.data.read_text(encoding="utf-8"))
    if options.projection:
        learn_projection(
            [f"{turn.speaker}: {turn.text}" for conversation in conversations for turn in turns_of(conversation)]
        )
    examples: list[Example] = []
    names: list[str] = []
    yes: list[list[float]] = []
    no: list[list[float]] = []
    chat: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder, Memory.open(Path(folder) / "m.db", embedder="minilm") as memory:
        for number, conversation in enumerate(conversations):
            scope = memory.namespace(str(number))
            segment_ids = store(scope, turns_of(conversation))
            every = {s.id: s for s in memory.parts.store.get(scope.labels, list(segment_ids.values())).values()}
            costs = {id_: memory.parts.counter.count_text(render_line(s) + "\n") for id_, s in every.items()}
            for question in conversation["qa"]:
                evidence = [segment_ids[d] for d in evidence_of(question) if d in segment_ids]
                if not evidence or question["category"] == 5:
                    continue
                scored = memory.parts.recall.score(scope.labels, question["question"], k=POOL)
                assert scored is not None
                if not names:
                    names = [*scored.signals, *(f"{signal}@{kind}" for kind in KINDS for signal in BY_KIND)]
                place = {id_: i for i, id_ in enumerate(scored.ids)}
                examples.append(
                    Example(
                        number,
                        question["category"],
                        expanded(scored, names),
                        np.array([costs[id_] for id_ in scored.ids], dtype=np.float32),
                        np.array([every[id_].created_at.toordinal() for id_ in scored.ids]),
                        np.array([place[id_] for id_ in evidence if id_ in place], dtype=np.int64),
                        len(evidence),
                        memory.parts.counter.count_text(question["question"]),
                    )
                )
                yes.append(best_signals(scored, SURE_BY))
            others = [q["question"] for c in conversations if c is not conversation for q in c["qa"]][::7]
            for texts, found_in in ((others, no), (SMALL_TALK, chat)):
                for text in texts:
                    scored = memory.parts.recall.score(scope.labels, text, k=POOL)
                    if scored and "late" in scored.signals:
                        found_in.append(best_signals(scored, SURE_BY))
        planted, absent = of_documents(memory, Path(folder), options.data.parent)
    found = np.mean([len(e.evidence) / e.n_evidence for e in examples])
    print(f"{len(examples)} questions; {100 * found:.1f}% of the evidence is among the candidates")
    sets = {
        title: np.array([i for i, name in enumerate(names) if not name.startswith(unused)])
        for title, unused in (("with_tokens", ()), ("without_tokens", ("late",)), ("lexical_only", ("late", "dense")))
    }
    report = {}
    for title, columns in sets.items():
        report[title] = cross_validated(examples, columns)
        for price, row in report[title].items():
            print(title, "price", price, "  ".join(f"{budget}: {value:.1f}" for budget, value in row.items()))
    price = max(PRICES, key=lambda p: sum(report["with_tokens"][p].values()))
    abstention = calibrated(yes, no, chat, planted, absent)
    print("price", price, "abstention", abstention)
    weights: dict[str, Any] = {
        title: {names[i]: round(float(w), 4) for i, w in zip(columns, fit(examples, columns), strict=True)}
        for title, columns in sets.items()
    }
    weights |= {"price": price, "abstention": abstention}
    digest = hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()[:16]
    provenance = {
        "digest": digest,
        "made_by": "benchmarks/train_recall.py",
        "made_on": datetime.now(UTC).date().isoformat(),
        "data": options.data.name,
        "data_sha256": hashlib.sha256(options.data.read_bytes()).hexdigest(),
        "embedder": SentenceTransformerEmbedder("minilm").fingerprint,
        "n_questions": len(examples),
        "cross_validated_recall": {
            title: {str(budget): round(value, 2) for budget, value in rows[price].items()}
            for title, rows in report.items()
        },
    }
    if not options.dry_run:
        text = json.dumps({"provenance": provenance, **weights}, indent=2, sort_keys=False)
        (ROOT / "memory_os" / "weights.json").write_text(text + "\n", encoding="utf-8")
    assert math.isfinite(price)


if __name__ == "__main__":
    main()
