"""The bank of cached keys and values measured: exactness, time to first token, answers, size, and growth.

Everything is compared with the same memory read as text in the same run. Segments are windows of a book; a fact may be
planted in the middle of one.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from memory_os.adapters.caching import Repair, Splicer
from memory_os.adapters.huggingface import HuggingFaceLLM
from memory_os.bank import LLMBank
from memory_os.benchmarks.measure import Progress, squeezed
from memory_os.benchmarks.needle import Book
from memory_os.benchmarks.riddles import RIDDLES, Riddle
from memory_os.benchmarks.xl3m import segments_of, share, with_sentence
from memory_os.memory import Memory, Scope
from memory_os.pack import CachedFrame, cached_line
from memory_os.types import BankOptions, CachedPrompt, Message, NewSegment, Segment
from memory_os.windows import windows

__all__ = ["PARTS", "REPAIRS", "agreement", "answer_of", "exactness", "first_token", "growth", "storage"]

PARTS = ("exact", "first-token", "answers", "storage", "growth", "icl")

DTYPES: tuple[Literal["float16", "int8"], ...] = ("float16", "int8")
SYSTEM = "You are a helpful assistant with a long-term memory."
WHEN = datetime(2026, 5, 1, tzinfo=UTC)
SEGMENT_TOKENS = 128
ANSWER_TOKENS = 20
REPAIRS: dict[str, Repair] = {
    "spliced": Repair(),
    "first 8": Repair(first=8),
    "first 16": Repair(first=16),
    "15 %": Repair(share=0.15),
    "first 8 + 15 %": Repair(first=8, share=0.15),
    "temperature 0.9": Repair(temperature=0.9),
}
"""By name; see ``adapters.caching.Repair``."""
QUESTION = "What does the old fisherman say about the weather?"


def segment(number: int, text: str, speaker: str = "Reader") -> Segment:
    """A segment that is in no store."""
    return Segment(str(number), number, ("bench",), "s", "user", speaker, "note", text, WHEN, 0)


def prompt_of(segments: Sequence[Segment], question: str, llm: HuggingFaceLLM) -> tuple[CachedPrompt, CachedFrame]:
    """The prompt with these segments as memory, and its frame."""
    frame = CachedFrame(SYSTEM, question, llm, llm.context_window)
    return frame.prompt((), lines_of(segments)), frame


def lines_of(segments: Sequence[Segment]) -> list[tuple[Segment, str]]:
    """The segments with their lines."""
    return [(each, cached_line(each)) for each in segments]


# -- exactness ---------------------------------------------------------------------------------------------------------


def exactness(book: Book) -> dict[str, float]:
    """Largest differences of logits and keys from full prefill, in float32: one segment, moved, and from the bank."""
    import torch

    llm = HuggingFaceLLM(dtype="float32")
    texts = segments_of(book, llm, 2, random.Random(0))
    splicer = Splicer("smollm2", llm.model)
    prompt, _ = prompt_of([segment(1, texts[0])], QUESTION, llm)
    head, [line], tail = llm.ids_of(prompt)
    [kv] = splicer.encode(head, [line])
    whole = splicer.next_token([*head, *line, *tail])
    positions = torch.arange(777, 777 + len(line))
    moved = splicer.rotated(splicer.rotated(kv.keys, positions), positions, back=True)
    [far] = splicer.encode([*head, *[head[-1]] * 777], [line])
    report = {
        "one segment, largest difference of a logit": _most(splicer.next_token(tail, head, [kv]) - whole),
        "keys of the first layer, computed 777 tokens further on": _most(far.keys[0] - kv.keys[0]),
        "keys rotated by 777 places and back": _most(moved - kv.keys),
        "largest key": _most(kv.keys),
    }
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as folder, opened(folder, llm, BankOptions(dtype=dtype)) as (_, scope):
            [stored] = scope.add_many([NewSegment(texts[0], "s", speaker="Reader", kind="note", created_at=WHEN)])
            bank = bank_of(scope)
            bank.keep(scope.labels, [stored])
            [back], _ = bank.fetch(scope.labels, prompt, [stored])
            report[f"one segment, from disk in {dtype}, largest difference of a logit"] = _most(
                splicer.next_token(tail, head, [back]) - whole
            )
    return {name: float(f"{value:.2g}") for name, value in report.items()}


def _most(difference: Any) -> float:
    return float(difference.abs().max())


@contextmanager
def opened(folder: str, llm: HuggingFaceLLM, options: BankOptions) -> Iterator[tuple[Memory, Scope]]:
    """A memory in this folder with such a bank."""
    path = Path(folder) / f"{options.dtype}-{options.max_tokens}.db"
    with Memory.open(path, llm=llm, embedder="hash", controller="longmem-free", system=SYSTEM, bank=options) as memory:
        yield memory, memory.namespace("bench")


def bank_of(scope: Scope) -> LLMBank:
    """The scope's bank."""
    bank = scope._parts.llm_bank
    assert bank is not None
    return bank


# -- time to first token -----------------------------------------------------------------------------------------------


def first_token(
    book: Book, *, llm: HuggingFaceLLM, sizes: Sequence[int], rounds: int = 5, progress: Progress | None = None
) -> dict[str, Any]:
    """Milliseconds from a decided context to the first token of the reply, by tokens of memory; medians of the rounds.

    ``text`` reads the memory; ``cached`` takes it from a bank that is open; ``opened`` from one that was opened just
    now, checksums included. Repairs are measured with the open one. ``load_ms`` is reading keys and values from a bank
    opened just now, ``compute_ms`` computing them.
    """
    rng, report = random.Random(0), {}
    texts = segments_of(book, llm, max(sizes) // 80, rng)
    with tempfile.TemporaryDirectory() as folder, opened(folder, llm, BankOptions(resident_bytes=10**9)) as (_, scope):
        new = [NewSegment(text, "s", speaker="Reader", kind="note", created_at=WHEN) for text in texts]
        stored = scope.add_many(new)
        bank = bank_of(scope)
        bank.fill(scope.labels)
        for number, size in enumerate(sizes):
            if progress:
                progress(f"first token, {size} tokens of memory", number, len(sizes))
            segments = _until(stored, size, lambda s: llm.count_text(cached_line(s) + "\n"))
            prompt, frame = prompt_of(segments, QUESTION, llm)
            messages = frame.messages((), lines_of(segments))
            ms: defaultdict[str, list[float]] = defaultdict(list)

            ours = partial(_cached, llm, prompt, segments)
            for _ in range(rounds + 1):
                ms["text"].append(_ms(partial(_exhaust_text, llm, messages)))
                for name, repair in REPAIRS.items():
                    ms[name].append(_ms(partial(ours, scope, repair)))
                with opened(folder, llm, BankOptions()) as (_, again):
                    ms["opened"].append(_ms(partial(ours, again, Repair())))
                ms["load"].append(_load_ms(folder, llm, BankOptions(), prompt, segments))
                ms["compute"].append(_ms(partial(_computed, llm, prompt)))
            llm.repair = None
            median = {name: statistics.median(values[1:]) for name, values in ms.items()}  # the first one warms up
            report[str(size)] = {
                "tokens": llm.count_cached(prompt),
                **{f"{name}_ms": round(value, 1) for name, value in median.items()},
                "text_over_cached": round(median["text"] / median["spliced"], 1),
                "text_over_opened": round(median["text"] / median["opened"], 1),
                "compute_over_load": round(median["compute"] / median["load"], 1),
            }
    return report


def _cached(
    llm: HuggingFaceLLM, prompt: CachedPrompt, segments: Sequence[Segment], scope: Scope, repair: Repair
) -> None:
    """One token of a reply whose memory comes from the bank."""
    llm.repair = repair
    memory, n_computed = bank_of(scope).fetch(scope.labels, prompt, segments)
    assert not n_computed
    for _ in llm.generate_cached(prompt, memory, max_tokens=1):
        pass


def _exhaust_text(llm: HuggingFaceLLM, messages: Sequence[Message]) -> None:
    for _ in llm.generate(messages, max_tokens=1):
        pass


def _computed(llm: HuggingFaceLLM, prompt: CachedPrompt) -> None:
    for _ in llm.encode_kv(prompt):
        pass


def _load_ms(
    folder: str, llm: HuggingFaceLLM, options: BankOptions, prompt: CachedPrompt, segments: Sequence[Segment]
) -> float:
    """Milliseconds to read keys and values from a bank that was opened just now."""
    with opened(folder, llm, options) as (_, scope):
        bank = bank_of(scope)
        return _ms(partial(bank.fetch, scope.labels, prompt, segments))


def _until(segments: Sequence[Segment], size: int, cost: Callable[[Segment], int]) -> list[Segment]:
    """The first segments, as many as have about so many tokens together."""
    chosen: list[Segment] = []
    for each in segments:
        if size <= 0:
            break
        chosen.append(each)
        size -= cost(each)
    return chosen


def _ms(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


# -- answers -----------------------------------------------------------------------------------------------------------


def agreement(
    book: Book,
    *,
    llm: HuggingFaceLLM,
    counts: Sequence[int],
    trials: int,
    repairs: Sequence[str],
    seed: int = 0,
    riddles: Sequence[Riddle] = RIDDLES,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Right answers to questions about a planted fact, by number of segments and way of reading, beside full prefill.

    ``of_full`` is accuracy as a percentage of full prefill's; ``same`` how often the reply is the same to the letter;
    ``kl`` the median divergence (nats) of the first token from full prefill over the same tokens.

    :param trials: of each riddle, each among other segments.
    """
    rng = random.Random(seed)
    texts = iter(segments_of(book, llm, sum(counts) * trials * len(riddles), rng))
    splicer = Splicer("smollm2", llm.model)
    report: dict[str, Any] = {}
    for count in counts:
        right: defaultdict[str, list[bool]] = defaultdict(list)
        same: defaultdict[str, list[bool]] = defaultdict(list)
        kl: defaultdict[str, list[float]] = defaultdict(list)
        for number, riddle in enumerate(riddles):
            if progress:
                progress(f"answers, {count} segments", number, len(riddles))
            for _ in range(trials):
                own = [next(texts) for _ in range(count)]
                place = rng.randrange(count)
                own[place] = with_sentence(own[place], riddle.plain)
                segments = [segment(n, text) for n, text in enumerate(own, start=1)]
                prompt, frame = prompt_of(segments, riddle.question, llm)
                memory = list(llm.encode_kv(prompt))
                head, lines, tail = llm.ids_of(prompt)
                whole = splicer.next_token([*head, *(token for line in lines for token in line), *tail])
                full = _said(llm.generate(frame.messages((), lines_of(segments)), max_tokens=ANSWER_TOKENS))
                bare = _said(llm.generate(frame.messages(), max_tokens=ANSWER_TOKENS))
                right["full prefill"].append(is_right(full, riddle))
                right["no memory"].append(is_right(bare, riddle))
                for name in repairs:
                    llm.repair = REPAIRS[name]
                    said = _said(llm.generate_cached(prompt, memory, max_tokens=ANSWER_TOKENS))
                    right[name].append(is_right(said, riddle))
                    same[name].append(said == full)
                    after = splicer.next_token(tail, head, memory, REPAIRS[name])
                    kl[name].append(float((whole.exp() * (whole - after)).sum()))
                llm.repair = None
        most = sum(right["full prefill"])
        figures: dict[str, dict[str, Any]] = {name: share(values, trials) for name, values in right.items()}
        for name, values in right.items():
            figures[name]["of_full"] = round(100 * sum(values) / most, 1) if most else None
        for name in repairs:
            figures[name]["same"] = round(100 * statistics.mean(same[name]), 1)
            figures[name]["kl"] = round(statistics.median(kl[name]), 4)
        report[str(count)] = figures
    return report


def _said(pieces: Iterator[str]) -> str:
    return squeezed("".join(pieces))


def answer_of(riddle: Riddle) -> tuple[str, ...]:
    """The words that answer a riddle: those of both tellings that are not in the question, little ones left out.

    >>> answer_of(RIDDLES[4])
    ('ilmar', 'voss')
    """
    asked, plain, veiled = (
        re.findall(r"[\w-]+", text.lower()) for text in (riddle.question, riddle.plain, riddle.veiled)
    )
    return tuple(word for word in plain if word in veiled and word not in asked and len(word) > 2)


def is_right(reply: str, riddle: Riddle) -> bool:
    """Whether every word of the answer is in the reply."""
    said = re.findall(r"[\w-]+", reply.lower())
    return all(word in said for word in answer_of(riddle))


# -- size and growth ---------------------------------------------------------------------------------------------------


def storage(book: Book, *, llm: HuggingFaceLLM, tokens: int, progress: Progress | None = None) -> dict[str, Any]:
    """Bytes on disk of a bank of so many tokens, by form, and seconds to compute it and to load 2,048 tokens of it."""
    report: dict[str, Any] = {}
    for number, dtype in enumerate(DTYPES):
        if progress:
            progress(f"a bank of {tokens} tokens in {dtype}", number, 2)
        options = BankOptions(max_tokens=tokens, max_bytes=10**10, dtype=dtype)
        with tempfile.TemporaryDirectory() as folder, opened(folder, llm, options) as (_, scope):
            stored = scope.add_many(_long(book, llm, tokens))
            without = _bytes_in(folder)
            bank = bank_of(scope)
            seconds = _ms(partial(bank.fill, scope.labels)) / 1000
            status = bank.status(scope.labels)
            on_disk = _bytes_in(folder) - without
            few = _until(stored[-200:], 2048, lambda s: llm.count_text(cached_line(s) + "\n"))
            prompt, _ = prompt_of(few, QUESTION, llm)
            load = [_load_ms(folder, llm, options, prompt, few) for _ in range(5)]
            report[dtype] = {
                "tokens": status.n_tokens,
                "segments": status.n_segments,
                "bytes_on_disk": on_disk,
                "bytes_per_token": round(on_disk / status.n_tokens),
                "compute_s": round(seconds, 1),
                "tokens_per_s": round(status.n_tokens / seconds),
                "load_2048_ms": round(statistics.median(load), 1),
            }
    return report


def _long(book: Book, llm: HuggingFaceLLM, tokens: int) -> list[NewSegment]:
    """The book from its beginning, in windows, at least so many tokens of it."""
    new: list[NewSegment] = []
    for window in windows(book.sentences, llm.count_text, SEGMENT_TOKENS, 0):
        text = "".join(window).strip()
        if tokens <= 0:
            break
        if text:
            new.append(NewSegment(text, "s", speaker="Reader", kind="note", created_at=WHEN))
            tokens -= llm.count_text(cached_line(segment(1, text)) + "\n")
    return new


def _bytes_in(folder: str) -> int:
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


GROWTH = """
import json, random, re, statistics, sys, time
from pathlib import Path
from memory_os.adapters.huggingface import HuggingFaceLLM
from memory_os.benchmarks.bank import QUESTION, bank_of, lines_of, opened, prompt_of
from memory_os.pack import cached_line
from memory_os.types import BankOptions

def megabytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6

folder, options, turns, take = json.loads(sys.argv[1])
llm = HuggingFaceLLM()
list(llm.generate([{"role": "user", "content": "Hi"}], max_tokens=1))
with opened(folder, llm, BankOptions(**options)) as (_, scope):
    bank = bank_of(scope)
    bank.fingerprint
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    base = megabytes("VmRSS")
    stored, rng = list(scope.history(100_000)), random.Random(0)
    search, first = [], []
    for turn in range(turns + 1):
        start = time.perf_counter()
        bank.search(scope.labels, QUESTION, 4)
        search.append(time.perf_counter() - start)
        own = sorted(rng.sample(stored, min(take, len(stored))), key=lambda s: s.seq)
        prompt, _ = prompt_of(own, QUESTION, llm)
        start = time.perf_counter()
        memory, n_computed = bank.fetch(scope.labels, prompt, own)
        for _ in llm.generate_cached(prompt, memory, max_tokens=1): pass
        first.append(time.perf_counter() - start)
    status = bank.status(scope.labels)
print(json.dumps({
    "tokens": status.n_tokens, "segments": status.n_segments, "search_ms": 1000 * statistics.median(search[1:]),
    "first_search_ms": 1000 * search[0], "first_token_ms": 1000 * statistics.median(first[1:]),
    "base": base, "peak": megabytes("VmHWM"),
}))
"""
"""Run on its own, so that the peak of memory is that of the bank's use alone; on Linux, which tells it."""


def growth(
    book: Book, *, llm: HuggingFaceLLM, sizes: Sequence[int], resident_mb: int = 64, turns: int = 20,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Speed and peak memory of turns with 8 random segments each, as the bank grows; each size in a process of its own.

    ``peak_over_model_mb`` is what turns with the bank take above the loaded model, at most.

    :param resident_mb: bound on entries kept in memory between turns.
    """
    report = {}
    new = _long(book, llm, max(sizes))
    options = BankOptions(max_tokens=10 * max(sizes), max_bytes=10**11, resident_bytes=resident_mb * 1_000_000)
    told = {"max_tokens": options.max_tokens, "max_bytes": options.max_bytes, "resident_bytes": options.resident_bytes}
    with tempfile.TemporaryDirectory() as folder:
        for number, size in enumerate(sizes):
            if progress:
                progress(f"a bank of {size} tokens", number, len(sizes))
            with opened(folder, llm, options) as (_, scope):
                bank = bank_of(scope)
                while new and bank.status(scope.labels).n_tokens < size:
                    room = size - bank.status(scope.labels).n_tokens
                    n = max(1, room // (SEGMENT_TOKENS + 20))
                    scope.add_many(new[:n])
                    del new[:n]
                    bank.fill(scope.labels)
            arguments = json.dumps([folder, told, turns, 8])
            done = subprocess.run([sys.executable, "-c", GROWTH, arguments], capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            report[str(size)] = {
                "tokens": found["tokens"],
                "segments": found["segments"],
                "search_ms": round(found["search_ms"], 1),
                "first_search_ms": round(found["first_search_ms"], 1),
                "first_token_ms": round(found["first_token_ms"], 1),
                "model_mb": round(found["base"]),
                "peak_over_model_mb": round(found["peak"] - found["base"]),
            }
    return report
