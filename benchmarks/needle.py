"""Needles in haystacks: invented facts planted in books, and whether a question brings the fact into the context.

One haystack holds a fact at every depth, each another, so that one ingest serves a whole row of the table.
"""

from __future__ import annotations

import re
import statistics
import tempfile
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from memory_os.adapters.tokenizers import TiktokenCounter
from memory_os.benchmarks.facts import FACTS
from memory_os.benchmarks.measure import TOKENIZER, Progress, squeezed
from memory_os.benchmarks.peers import Pieces, Rrf
from memory_os.errors import ConfigError, InvalidInputError, UnknownNameError
from memory_os.memory import Memory, Scope

__all__ = ["Book", "Haystack", "books", "language_of", "measure", "planted"]

HAN_SHARE = 0.2
PEERS = ("rrf",)

# a sentence ends at a stop, with the quotation marks behind it, but not after a title or an initial
_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\b[A-Z])[.!?][”’\"']*(?=\s)|[。！？][”’」』]*")
_HEAD = re.compile(r"\A.*?^\*\*\* START OF [^\n]*\n", re.DOTALL | re.MULTILINE)
_TAIL = re.compile(r"^\*\*\* END OF .*\Z", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Book:
    """The sentences of all that there is in a language, each with the white space before it, and their tokens."""

    sentences: Sequence[str]
    costs: Sequence[int]


@dataclass(frozen=True, slots=True)
class Haystack:
    """A text and the facts in it: ``(sentence, question)``, one for each depth."""

    text: str
    facts: Sequence[tuple[str, str]]


def language_of(text: str) -> str:
    """``zh`` for Chinese, else ``en``.

    >>> language_of("话说天下大势"), language_of("Call me Ishmael.")
    ('zh', 'en')
    """
    han = sum("\u4e00" <= character <= "\u9fff" for character in text)
    return "zh" if han > HAN_SHARE * len(text) else "en"


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, which together are the text.

    >>> sentences_of("Mr. Fox ran. “Stop!” he said.")
    ['Mr. Fox ran.', ' “Stop!”', ' he said.']
    """
    ends = [match.end() for match in _END.finditer(text)]
    cuts = [0, *ends, len(text)]
    return [text[low:high] for low, high in pairwise(cuts) if low < high]


def books(paths: Sequence[Path]) -> dict[str, Book]:
    """What the files hold, by language; files of one language follow one another.

    :raises InvalidInputError: for a file that cannot be read or is empty.
    """
    found: defaultdict[str, list[str]] = defaultdict(list)
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise InvalidInputError(f"cannot read it: {error.strerror}", source=str(path)) from error
        except UnicodeDecodeError as error:
            raise InvalidInputError("not UTF-8", source=str(path)) from error
        text = _TAIL.sub("", _HEAD.sub("", text))  # Project Gutenberg's notices
        if not text.strip():
            raise InvalidInputError("there is no text in it", source=str(path))
        found[language_of(text)] += sentences_of(text)
    counter = TiktokenCounter(TOKENIZER)
    return {name: Book(parts, [counter.count_text(part) for part in parts]) for name, parts in sorted(found.items())}


def planted(book: Book, length: int, depths: Sequence[int], facts: Sequence[tuple[str, str]], start: int) -> Haystack:
    """A haystack of about so many tokens, from a sentence of the book on, with a fact at each depth.

    :param start: which sentence comes first; after the last one the book begins again.
    """
    n = len(book.sentences)
    chosen: list[int] = []
    total = 0
    while total < length:
        sentence = (start + len(chosen)) % n
        chosen.append(sentence)
        total += book.costs[sentence]
    reached = list(accumulate(book.costs[sentence] for sentence in chosen))
    parts = [book.sentences[sentence] for sentence in chosen]
    for depth, (fact, _) in zip(depths, facts, strict=True):
        place = bisect_left(reached, total * depth / 100) if depth else -1
        gap = "" if fact.endswith("。") else " "
        if place < 0:
            parts[0] = f"{fact}{gap}{parts[0].lstrip()}"
        else:
            place = min(place, len(chosen) - 1)
            parts[place] += gap + fact
    return Haystack("".join(parts), facts)


def measure(
    library: dict[str, Book],
    *,
    lengths: Sequence[int],
    depths: Sequence[int],
    budget: int = 512,
    compare: Sequence[str] = (),
    trials: int = 2,
    embedder: str = "minilm",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The whole report, ready for JSON: see ``memos bench needle --help``."""
    for name in compare:
        if name not in PEERS:
            raise UnknownNameError("peer of needles", name, PEERS)
    most = min(len(facts) for facts in FACTS.values())
    if not depths or len(depths) > most or not all(0 <= depth <= 100 for depth in depths):
        raise ConfigError(f"depths are one to {most} numbers from 0 to 100, not {list(depths)}")
    found: defaultdict[tuple[str, str, int, int], list[bool]] = defaultdict(list)
    total, done = len(library) * len(lengths) * trials, 0
    model: Any = embedder
    for language, book in library.items():
        for length in lengths:
            for trial in range(trials):
                if progress:
                    progress(f"{language}, {length:,} tokens, planting {trial + 1}", done, total)
                facts = FACTS[language]
                own = [facts[(trial * len(depths) + i) % len(facts)] for i in range(len(depths))]
                haystack = planted(book, length, depths, own, trial * len(book.sentences) // trials)
                with tempfile.TemporaryDirectory() as folder:
                    file = Path(folder) / "haystack.txt"
                    file.write_text(haystack.text, encoding="utf-8")
                    with Memory.open(Path(folder) / "m.db", embedder=model, tokenizer=TOKENIZER) as memory:
                        model = memory.parts.embedder
                        scope = memory.namespace("bench")
                        scope.ingest(file)
                        asked: dict[str, Asked] = {"memory_os": lambda q, scope=scope: shown(scope, q, budget)}  # type: ignore[misc]
                        if compare:
                            asked["rrf"] = rrf(memory, scope, budget)
                        for depth, (fact, question) in zip(depths, haystack.facts, strict=True):
                            for name, ask in asked.items():
                                found[name, language, length, depth].append(squeezed(fact) in ask(question))
                done += 1
                if progress:
                    progress(f"{language}, {length:,} tokens, planting {trial + 1}", done, total)
    tables = {
        name: {
            language: {
                str(length): {str(depth): _percent(found[name, language, length, depth]) for depth in depths}
                for length in lengths
            }
            for language in library
        }
        for name in ("memory_os", *compare)
    }
    overall = {
        name: {
            language: _percent([hit for key, hits in found.items() if key[:2] == (name, language) for hit in hits])
            for language in library
        }
        for name in tables
    }
    return {
        "recall": tables.pop("memory_os"), "overall": overall.pop("memory_os"),
        "peers": {name: {"recall": tables[name], "overall": overall[name]} for name in tables},
        "budget": budget, "trials": trials,
    }  # fmt: skip


Asked = Callable[[str], str]


def shown(scope: Scope, question: str, budget: int) -> str:
    """All that a model would be shown, white space squeezed."""
    context = scope.context(question, budget=budget)
    return squeezed(" ".join(message["content"] for message in context.messages))


def rrf(memory: Memory, scope: Scope, budget: int) -> Asked:
    """The peer over the passages that were stored, with the vectors that were stored: embedded once."""
    passages = scope.history(int(scope.stats()["segments"]))
    texts = [passage.text for passage in passages]
    ids = [passage.id for passage in passages]
    costs = [memory.parts.counter.count_text(text + "\n") for text in texts]
    pieces = Pieces(costs, [frozenset([str(number)]) for number in range(len(texts))])
    ranker = Rrf(pieces, texts, lambda vector: memory.parts.index.similarities(scope.labels, vector, ids))

    def ask(question: str) -> str:
        order = ranker.rank(question, memory.parts.embedder.embed_query(question))
        inside, _ = pieces.filled(order, budget)
        return " ".join(squeezed(texts[int(number)]) for number in inside)

    return ask


def _percent(hits: Sequence[bool]) -> float:
    return round(100 * statistics.fmean(hits), 1)
