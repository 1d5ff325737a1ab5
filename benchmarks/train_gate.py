"""Learns what share each head of the embedded model takes from memory, on books, and writes it as data.

    python benchmarks/train_gate.py --data ../shared/data/robinson_crusoe.txt ../shared/data/jane_eyre.txt \
        --out adapters/smollm2_gates.safetensors

As LongMem (arXiv 2306.07174) is trained, with one number per head in place of a side network: each book is read in
order, a segment at a time, with the keys and values of the segments before it in memory (first in, first out); a
segment is remembered after it was predicted, so that none ever sees itself. The loss is that of the next token, the
model is frozen. Nothing is random.

The last tenth of each book is held out. The memory of the other book is the control: what it gains is not memory.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory_os.adapters.huggingface import HuggingFaceLLM
from memory_os.adapters.joint import DISTANCE, SMOLLM2_GATES, GatedMemory, Gates, encode
from memory_os.benchmarks import needle
from memory_os.protocols import KV
from memory_os.types import CachedPrompt

if TYPE_CHECKING:
    import torch

HELD_OUT = 0.1
DISTANCES = (0, 16, 64, 256, 1024)


@dataclass
class Reader:
    """The frozen model; ``first`` is the token that begins every text, which is never remembered."""

    model: Any
    first: int

    def loss(self, segment: Sequence[int], before: Sequence[int] = ()) -> torch.Tensor:
        """Mean surprisal of a segment's tokens, nats; ``before`` is read too and not counted."""
        import torch

        ids = torch.tensor([[self.first, *before, *segment]])
        logits = self.model(ids, logits_to_keep=len(segment) + 1).logits[0, :-1].float()
        return torch.nn.functional.cross_entropy(logits, ids[0, -len(segment) :])

    def encode(self, segment: Sequence[int]) -> KV:
        """What is remembered of a segment."""
        return encode(self.model, segment, after=[self.first])


@dataclass(frozen=True)
class Step:
    """A segment and what stands before it in its book: the oldest segment of the memory first."""

    segment: list[int]
    before: list[list[int]]
    memory: list[KV]


def ids_of(llm: HuggingFaceLLM, text: str) -> tuple[list[int], list[int]]:
    """Token ids of what every text begins with, and of the text."""
    prompt = CachedPrompt("", "", (), ({"role": "user", "content": text},), plain=True)
    beginning, _, ids = llm.ids_of(prompt)
    return beginning, ids


def steps_of(reader: Reader, segments: Sequence[list[int]], n_memory: int, n: int) -> Iterator[Step]:
    """The first ``n`` segments that have ``n_memory`` others before them."""
    memory: list[KV] = []
    for place, segment in enumerate(segments[: n_memory + n]):
        if place >= n_memory:
            yield Step(segment, list(segments[place - n_memory : place]), memory[-n_memory:])
        memory = [*memory[1 - n_memory :], reader.encode(segment)]


def train(reader: Reader, gates: Gates, lanes: Sequence[Iterator[Step]], n: int, rate: float) -> None:
    """``n`` steps of Adam, each on the next segment of every book; the rate falls to 0."""
    import torch

    gates.bias.requires_grad_()
    solver = torch.optim.Adam([gates.bias], lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(solver, 1.0, 0.0, total_iters=n)
    start = time.monotonic()
    for number in range(n):
        total = 0.0
        for lane in lanes:
            step = next(lane)
            with GatedMemory(reader.model, gates, step.memory):
                loss = reader.loss(step.segment) / len(lanes)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        solver.step()
        schedule.step()
        solver.zero_grad()
        if number % 10 == 9:
            print(f"step {number + 1}: loss {total:.3f}, {time.monotonic() - start:.0f} s", flush=True)
    gates.bias.requires_grad_(False)


def perplexity(loss_of: Callable[[int, int], torch.Tensor], n_books: int, n: int) -> float:
    """Over all held-out tokens; ``loss_of(book, place)``."""
    import torch

    with torch.inference_mode():
        losses = [loss_of(book, place).item() for book in range(n_books) for place in range(n)]
    return math.exp(sum(losses) / len(losses))


def compared(reader: Reader, held: Sequence[Sequence[Step]], init: Gates, trained: Gates) -> dict[str, float]:
    """Perplexity by what is remembered and how it is read."""

    def read(gates: Gates | None, book: int, place: int, of: int, **more: Any) -> torch.Tensor:
        with GatedMemory(reader.model, gates, held[of][place].memory, distance=init.distance, **more):
            return reader.loss(held[book][place].segment)

    def whole(book: int, place: int) -> torch.Tensor:
        step = held[book][place]
        return reader.loss(step.segment, before=[token for segment in step.before for token in segment])

    rows: dict[str, Callable[[int, int], torch.Tensor]] = {
        "no_memory": lambda book, place: reader.loss(held[book][place].segment),
        "joint_softmax": lambda book, place: read(None, book, place, book),  # in one layer
        "joint_same_layers": lambda book, place: read(None, book, place, book, layers=init.layers),
        "at_init": lambda book, place: read(init, book, place, book),
        "trained": lambda book, place: read(trained, book, place, book),
        "other_book": lambda book, place: read(trained, book, place, (book + 1) % len(held)),
        "all_in_context": whole,
    }
    found = {}
    for name, loss_of in rows.items():
        found[name] = round(perplexity(loss_of, len(held), len(held[0])), 3)
        print(f"{name:<20}{found[name]:8.2f}", flush=True)
    return found


def choose(reader: Reader, steps: Sequence[Step]) -> None:
    """The table by which layers and distance were chosen: perplexity of the joint softmax, before any training."""
    n_layers = reader.model.config.num_hidden_layers
    print(f"no memory {perplexity(lambda _, place: reader.loss(steps[place].segment), 1, len(steps)):.2f}")
    for layers in ((2 * n_layers // 3,), tuple(range(2, n_layers, 3)), tuple(range(n_layers))):
        for distance in DISTANCES:

            def read(_: int, place: int, layers: tuple[int, ...] = layers, distance: int = distance) -> torch.Tensor:
                with GatedMemory(reader.model, None, steps[place].memory, layers=layers, distance=distance):
                    return reader.loss(steps[place].segment)

            print(f"{len(layers)} layers, distance {distance}: {perplexity(read, 1, len(steps)):.2f}", flush=True)


def main() -> None:
    """Learn, report, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="books, at least two")
    parser.add_argument("--out", type=Path, default=SMOLLM2_GATES)
    parser.add_argument("--layers", type=int, nargs="+", help="which layers read the memory; by default all")
    parser.add_argument("--distance", type=int, default=DISTANCE, help="how far away memory seems, in tokens")
    parser.add_argument("--start", type=float, default=-3.0, help="every gate's first value; LongMem's is 0")
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--segment-tokens", type=int, default=256)
    parser.add_argument("--memory-segments", type=int, default=8)
    parser.add_argument("--held-out-segments", type=int, default=10, help="of each book")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--choose", action="store_true", help="only compare layers and distances, without training")
    options = parser.parse_args()
    if len(options.data) < 2:
        parser.error("--data needs at least two books: the memory of the other one is the control")
    import torch

    torch.set_num_threads(options.threads)
    llm = HuggingFaceLLM(dtype="bfloat16")
    beginning, _ = ids_of(llm, "")
    reader = Reader(llm.model.requires_grad_(False), beginning[0])
    n, n_memory = options.segment_tokens, options.memory_segments
    training, held_out = [], []
    for path in options.data:
        _, ids = ids_of(llm, "".join(s for book in needle.books([path]).values() for s in book.sentences))
        segments = [ids[start : start + n] for start in range(0, len(ids) - n + 1, n)]
        cut = int(len(segments) * (1 - HELD_OUT))
        training.append(segments[:cut])
        held_out.append(segments[cut:])
    if options.choose:  # on the end of what is trained on, not on what is held out
        lanes = [steps_of(reader, own[-n_memory - 6 :], n_memory, 6) for own in training]
        choose(reader, [step for lane in lanes for step in lane])
        return
    layers = options.layers or range(reader.model.config.num_hidden_layers)
    init = Gates.untrained(reader.model, layers, start=options.start, distance=options.distance)
    trained = Gates(init.bias.clone(), init.layers, init.fingerprint, distance=init.distance)
    train(
        reader, trained, [steps_of(reader, own, n_memory, options.steps) for own in training],
        options.steps, options.rate,
    )  # fmt: skip
    held = [list(steps_of(reader, own, n_memory, options.held_out_segments)) for own in held_out]
    found = compared(reader, held, init, trained)
    shares = [round(share, 3) for share in trained.bias.sigmoid().mean(1).tolist()]
    print("mean share of the memory by layer", dict(zip(trained.layers, shares, strict=True)))
    trained.provenance = {
        "made_by": "benchmarks/train_gate.py",
        "made_on": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python benchmarks/train_gate.py", *sys.argv[1:]]),
        "model": f"{llm.name}, trained in bfloat16",
        "data": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in options.data},
        "seed": "nothing is random",
        "start": options.start,
        "rate": options.rate,
        "steps": options.steps,
        "segment_tokens": n,
        "memory_tokens": n * n_memory,
        "held_out_tokens": n * options.held_out_segments * len(options.data),
        "perplexity": found,
    }
    trained.save(options.out)
    print(f"{options.out}: {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
