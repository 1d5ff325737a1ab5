"""What a memory costs as it grows: ingest, search, context, start and bytes by size, ours and the peers'.

Every system runs in a process of its own, so that its memory is its own: it stores the same texts with the same
vectors (``scale_data``; no encoder takes part) and answers the same questions. What is kept on disk is then opened
by a fresh process, whose first answer is the cold start.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memory_os.benchmarks.scale_peers import ON_SERVER, PEERS, SYSTEMS, System
from memory_os.errors import UnknownNameError

__all__ = ["exponent", "measure", "missing"]

OURS = "memory_os"
URL = "MEMOS_SCALE_URL"
"""By which variable a process is told of the server."""
K = 10
WARM_UP = 5
BUDGET = 1024
"""Tokens of ``context()``."""

Progress = Callable[[str, int, int], None]


def missing(peers: Sequence[str]) -> dict[str, str]:
    """What to say of those peers whose packages are not installed, by name.

    :raises UnknownNameError: for a name that is no peer's.
    """
    found = {}
    for name in peers:
        if name not in PEERS:
            raise UnknownNameError("peer", name, PEERS)
        try:
            PEERS[name].check()
        except ImportError as error:
            found[name] = f"{name} is left out: {error}; install it with: pip install {PEERS[name].package}"
    return found


def measure(
    *,
    sizes: Sequence[int],
    peers: Sequence[str],
    namespaces: int,
    per_namespace: int = 100,
    seed: int = 0,
    questions: int = 200,
    limit_s: float = 600.0,
    folder: Path | None = None,
    postgres: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """All of it, ready for JSON.

    :param sizes: segments in one namespace.
    :param namespaces: so many of ``per_namespace`` segments each, ours only; 0 for none.
    :param limit_s: a peer that needs longer for a size is stopped, and not asked for larger ones. We are not stopped.
    :param folder: where the databases lie while they are measured; a temporary one.
    :param postgres: the URL of a PostgreSQL database made for this: we are measured there too, under the same limit.
    """
    left_out = missing(peers)
    there = [*(ON_SERVER if postgres else ()), *(name for name in peers if name not in left_out)]
    jobs = [(name, size, 1) for size in sorted(sizes) for name in (OURS, *there)]
    if namespaces:
        jobs.append((OURS, namespaces * per_namespace, namespaces))
    report: dict[str, Any] = {
        "machine": _machine(), "seed": seed, "k": K, "budget": BUDGET, "questions": questions,
        "left_out": left_out, "systems": {name: {} for name in (OURS, *there)},
    }  # fmt: skip
    stopped: set[str] = set()
    for done, (name, size, n_namespaces) in enumerate(jobs):
        if progress:
            progress(f"{name}, {size:,} segments", done, len(jobs))
        if name in stopped:
            continue
        job = {"system": name, "size": size, "namespaces": n_namespaces, "seed": seed, "questions": questions}
        figures = _measured(job, None if name == OURS else limit_s, folder, postgres if name in ON_SERVER else None)
        if "stopped" in figures:
            stopped.add(name)
        if n_namespaces > 1:
            report["namespaces"] = {"namespaces": n_namespaces, "per_namespace": per_namespace, **figures}
        else:
            report["systems"][name][str(size)] = figures
    report["growth"] = {name: _growth(figures) for name, figures in report["systems"].items()}
    return report


def _machine() -> dict[str, Any]:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(), "load_before": load,
    }  # fmt: skip


def _measured(
    job: Mapping[str, Any], limit_s: float | None, folder: Path | None, url: str | None = None
) -> dict[str, Any]:
    """Both processes of one system at one size."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        told = {**job, "folder": place}
        start = time.monotonic()
        figures: dict[str, Any] = {}
        try:
            figures = _in_a_process({**told, "step": "store"}, limit_s, url)
            if SYSTEMS[job["system"]].persistent:
                left = None if limit_s is None else max(limit_s - (time.monotonic() - start), 1.0)
                figures |= _in_a_process({**told, "step": "open"}, left, url)
        except subprocess.TimeoutExpired as error:
            lines = (error.stdout or b"").splitlines()
            stored = job["size"] if figures else json.loads(lines[-1])["stored"] if lines else 0
            return {"stopped": f"after {limit_s:.0f} s, with {stored:,} of {job['size']:,} stored"}
        except subprocess.CalledProcessError as error:
            if job["system"] == OURS:
                raise
            return {"stopped": f"it failed: {(error.stderr.strip().splitlines() or ['?'])[-1][:200]}"}
    return figures


def _in_a_process(job: Mapping[str, Any], limit_s: float | None, url: str | None) -> dict[str, Any]:
    command = [
        sys.executable,
        "-P",
        "-c",
        f"from {__name__} import work; work()",
        json.dumps({**job, "at": time.time()}),
    ]
    env = {**os.environ, URL: url or ""}  # a command line is everybody's to read, and the URL holds a password
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=limit_s, env=env)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


# -- in the process ----------------------------------------------------------------------------------------------------


def work() -> None:
    """Do the step that the command line describes, and print its figures as JSON."""
    job = json.loads(sys.argv[1])
    if job["system"] in PEERS:
        _bound_memory()
    system = SYSTEMS[job["system"]](Path(job["folder"]), os.environ[URL])
    figures = _stored(system, job) if job["step"] == "store" else _opened(system, job)
    print(json.dumps(figures))


def _bound_memory() -> None:
    """A peer that needs more than half of the machine's memory fails, and not the machine."""
    try:
        import resource

        half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        resource.setrlimit(resource.RLIMIT_DATA, (half, half))
    except (ImportError, ValueError, OSError):  # no such limit on this system
        pass


def _stored(system: System, job: Mapping[str, Any]) -> dict[str, Any]:
    from memory_os.benchmarks.scale_data import Data

    data, size, namespaces = Data(job["seed"]), job["size"], job["namespaces"]
    each = size // namespaces
    spent = busy = 0.0
    parts: dict[str, float] = {}
    before = _resident()
    stored = 0
    system.open()
    texts, vectors = data.block(0)  # a first batch apart: tokenizers and libraries are loaded by it
    system.encoder.learn(texts[:WARM_UP], vectors[:WARM_UP])
    system.add("warm", texts[:WARM_UP], vectors[:WARM_UP])
    for number in range(namespaces):
        for texts, vectors in data.batches(each, start=number * each):
            system.encoder.learn(texts, vectors)
            start, cpu = time.perf_counter(), time.process_time()
            for part, seconds in system.add(f"n{number}", texts, vectors).items():
                parts[part] = parts.get(part, 0.0) + seconds
            spent += time.perf_counter() - start
            busy += time.process_time() - cpu
            system.encoder.forget(texts)
            stored += len(texts)
            print(json.dumps({"stored": stored}), flush=True)  # for who stops this process
    start = time.perf_counter()
    system.settle(["n0"])
    settled = time.perf_counter() - start
    figures: dict[str, Any] = {
        "ingest_per_s": round(size / spent, 1),
        "ingest_per_cpu_s": round(size / busy, 1),
        **{f"{part}_per_s": round(size / seconds, 1) for part, seconds in parts.items()},
        "settle_s": round(settled, 2),
    }
    if not system.persistent:
        figures |= _asked(system, data, job) | _memory(before)
        figures["bytes_per_segment"] = round(figures["resident_grown_bytes"] / size)
    if job["system"] in ON_SERVER:
        figures["bytes_per_segment"] = round(system.bytes_on_disk() / size)
    system.close()
    if "bytes_per_segment" not in figures:  # of files, once they are closed
        figures["bytes_per_segment"] = round(system.bytes_on_disk() / size)
    return figures


def _opened(system: System, job: Mapping[str, Any]) -> dict[str, Any]:
    from memory_os.benchmarks.scale_data import Data

    data = Data(job["seed"])
    each = job["size"] // job["namespaces"]
    [question], vectors = data.questions(each, 1)
    system.encoder.learn([question], vectors)
    before = _resident()
    ready = time.perf_counter()
    system.open()
    system.search("n0", question, K)
    first = time.perf_counter() - ready
    figures = {
        "cold_first_answer_s": round(first, 3),
        "process_first_answer_s": round(time.time() - job["at"], 3),
        "resident_first_answer_mb": round((_resident()["all"]) / 2**20, 1),
    }
    figures |= _asked(system, data, job) | _memory(before)
    system.close()
    return figures


def _asked(system: System, data: Any, job: Mapping[str, Any]) -> dict[str, Any]:
    """p50 and p95 of search and context, milliseconds, and how many of the true ``K`` nearest were found.

    Also the p95 of the processor's time: where others use the machine too, it says more than the clock.
    """
    import numpy as np

    each = job["size"] // job["namespaces"]
    names = [n * job["namespaces"] // min(50, job["namespaces"]) for n in range(min(50, job["namespaces"]))]
    asked = []
    for number in names:
        texts, vectors = data.questions(each, max(1, job["questions"] // len(names)), start=number * each)
        system.encoder.learn(texts, vectors)
        asked += [(f"n{number}", text) for text in texts]
    verbs: dict[str, Callable[[str, str], object]] = {"search": lambda name, text: system.search(name, text, K)}
    if system.context is not None:
        verbs["context"] = system.context
    figures: dict[str, Any] = {}
    for verb, call in verbs.items():
        for name, text in asked[:WARM_UP]:
            call(name, text)
        times, busy = [], []
        for name, text in asked:
            start, cpu = time.perf_counter(), time.process_time()
            call(name, text)
            times.append(1000 * (time.perf_counter() - start))
            busy.append(1000 * (time.process_time() - cpu))
        figures[f"{verb}_cpu_p95_ms"] = round(float(np.percentile(busy, 95)), 2)
        figures[f"{verb}_p50_ms"] = round(statistics.median(times), 2)
        figures[f"{verb}_p95_ms"] = round(float(np.percentile(times, 95)), 2)
    if system.nearest is not None:
        figures["recall"] = _recall(system, data, each, asked[:20])
    return figures


def _recall(system: System, data: Any, each: int, asked: Sequence[tuple[str, str]]) -> float:
    """The share of the ``K`` true nearest, by brute force over what was stored, that the vector index gives."""
    import numpy as np

    found = wanted = 0
    assert system.nearest is not None
    for name in dict.fromkeys(name for name, _ in asked):
        texts = [text for each_name, text in asked if each_name == name]
        queries = np.stack([system.encoder.embed_query(text) for text in texts])
        best = np.full((len(texts), K), -1.0, dtype=np.float32)
        for _, vectors in data.batches(each, start=int(name[1:]) * each):
            best = -np.sort(-np.concatenate([best, queries @ vectors.T], axis=1), axis=1)[:, :K]
        for text, true in zip(texts, best, strict=True):
            cosines = system.nearest(name, text, K)
            wanted += min(K, each)
            found += sum(cosine >= true[min(K, each) - 1] - 1e-5 for cosine in cosines)
    return round(found / wanted, 4)


def _resident() -> dict[str, int]:
    """Bytes of memory of this process: all, and without the pages of mapped files where the system tells them apart."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {"all": int(lines["VmRSS"].split()[0]) * 1024, "own": int(lines["RssAnon"].split()[0]) * 1024}
    except (OSError, KeyError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"all": most, "own": most}


def _memory(before: Mapping[str, int]) -> dict[str, Any]:
    now = _resident()
    return {
        "resident_mb": round(now["all"] / 2**20, 1),
        "resident_own_mb": round(now["own"] / 2**20, 1),
        "resident_grown_bytes": now["own"] - before["own"],
    }


# -- how it grows ------------------------------------------------------------------------------------------------------

COSTS = ("search_p50_ms", "search_p95_ms", "context_p95_ms", "cold_first_answer_s", "resident_mb")


def _growth(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The exponent of each cost in the number of segments, over all sizes that were measured: 1 is linear."""
    found = {}
    for cost in COSTS:
        points = [(int(size), float(each[cost])) for size, each in figures.items() if each.get(cost)]
        if len(points) > 1:
            found[cost] = round(exponent(points), 3)
    return found


def exponent(points: Sequence[tuple[int, float]]) -> float:
    """The slope of a line through the points on axes that are both logarithmic.

    >>> round(exponent([(10, 2.0), (100, 20.0), (1000, 200.0)]), 3)
    1.0
    """
    return statistics.linear_regression([math.log(n) for n, _ in points], [math.log(y) for _, y in points]).slope
