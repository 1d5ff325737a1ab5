"""What memory_os is compared with: simple retrievers that fill a budget with the same texts, best first.

A budget of N buys a peer N tokens of memory text (cl100k_base), in lines ``[2023-05-08 13:56 Caroline] text``; its
prompt and question come on top. What does not fit is passed over, and what is behind it is tried.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from memory_os.errors import UnknownNameError
from memory_os.lexical import bm25, idf, query_terms, terms_of

if TYPE_CHECKING:
    from memory_os.benchmarks.measure import Turn
    from memory_os.protocols import Embedder, TokenCounter, Vector

__all__ = ["PEERS", "Bm25", "Pieces", "Ranker", "Rrf", "checked", "rankers"]

PEERS = ("bm25", "chroma", "recency", "rrf")
RRF_K = 60
CHUNK_CHARS = 1000


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a peer fills the budget with.

    :param costs: tokens of each piece.
    :param holds: the keys of the turns whose whole text stands in the piece.
    """

    costs: Sequence[int]
    holds: Sequence[frozenset[str]]

    def filled(self, order: Iterable[int], budget: int) -> tuple[set[str], int]:
        """The turns that stand in the filled budget, and its tokens."""
        inside: set[str] = set()
        used = 0
        for piece in order:
            if used + self.costs[piece] <= budget:
                used += self.costs[piece]
                inside |= self.holds[piece]
        return inside, used


class Ranker(Protocol):
    """A peer, ready for the questions about one conversation."""

    @property
    def pieces(self) -> Pieces:
        """What it ranks."""

    def rank(self, question: str, vector: Vector) -> Sequence[int]:
        """Pieces, best first.

        :param vector: the embedding of the question.
        """


def checked(names: Sequence[str]) -> list[str]:
    """The names, each once.

    :raises UnknownNameError: if there is no such peer.
    """
    for name in names:
        if name not in PEERS:
            raise UnknownNameError("peer", name, PEERS)
    return list(dict.fromkeys(names))


def line_of(turn: Turn) -> str:
    """A turn as a line of memory text: when, who and what."""
    when = turn.when.strftime("%Y-%m-%d %H:%M ") if turn.when else ""
    return f"[{when}{turn.speaker or turn.role}] {turn.text}"


def spoken(turn: Turn) -> str:
    """What is searched: the text, after the speaker's name where there is one."""
    return f"{turn.speaker}: {turn.text}" if turn.speaker else turn.text


def rankers(
    names: Sequence[str], turns: Sequence[Turn], embedder: Embedder, counter: TokenCounter
) -> dict[str, Ranker]:
    """The peers of these names over these turns; whatever needs vectors embeds here, once."""
    if not names:
        return {}
    texts = [spoken(turn) for turn in turns]
    pieces = Pieces([counter.count_text(line_of(t) + "\n") for t in turns], [frozenset([t.key]) for t in turns])
    made: dict[str, Ranker] = {}
    for name in names:
        if name == "recency":
            made[name] = Recency(pieces)
        elif name == "bm25":
            made[name] = Bm25(pieces, texts)
        elif name == "rrf":
            matrix = embedder.embed_documents(texts)
            made[name] = Rrf(pieces, texts, lambda vector, matrix=matrix: matrix @ vector)  # type: ignore[misc]
        else:
            made[name] = Chroma(turns, embedder, counter)
    return made


@dataclass(frozen=True, slots=True)
class Recency:
    """The latest turns."""

    pieces: Pieces

    def rank(self, question: str, vector: Vector) -> Sequence[int]:
        """Pieces, the latest first."""
        return range(len(self.pieces.costs) - 1, -1, -1)


class Bm25:
    """Lexical search alone."""

    def __init__(self, pieces: Pieces, texts: Sequence[str]) -> None:
        self.pieces = pieces
        self._documents = [terms_of(text) for text in texts]
        self._mean = sum(map(len, self._documents)) / max(len(texts), 1)
        self._holding: defaultdict[str, list[int]] = defaultdict(list)
        for number, document in enumerate(self._documents):
            for term in set(document):
                self._holding[term].append(number)

    def scores(self, question: str) -> dict[int, float]:
        """The score of every piece that shares a term with the question."""
        held = {term: self._holding[term] for term in query_terms(question) if term in self._holding}
        weights = {term: idf(len(self._documents), len(numbers)) for term, numbers in held.items()}
        matching = {number for numbers in held.values() for number in numbers}
        return {number: bm25(self._documents[number], weights, self._mean) for number in matching}

    def rank(self, question: str, vector: Vector) -> Sequence[int]:
        """Pieces, best first; those that share no term come last, in order."""
        scores = self.scores(question)
        return sorted(range(len(self._documents)), key=lambda number: (-scores.get(number, 0.0), number))


class Rrf:
    """Dense and lexical search, fused by reciprocal rank (k = 60).

    :param similarities: the cosine of every piece to a question's vector.
    """

    def __init__(self, pieces: Pieces, texts: Sequence[str], similarities: Callable[[Vector], Vector]) -> None:
        self.pieces = pieces
        self._lexical = Bm25(pieces, texts)
        self._similarities = similarities

    def rank(self, question: str, vector: Vector) -> Sequence[int]:
        """Pieces, best first."""
        import numpy as np

        fused = np.zeros(len(self.pieces.costs))
        dense = np.argsort(-self._similarities(vector), kind="stable")
        fused[dense] += 1.0 / (RRF_K + 1 + np.arange(len(dense)))
        scores = self._lexical.scores(question)
        for place, number in enumerate(sorted(scores, key=lambda n: (-scores[n], n)), start=1):
            fused[number] += 1.0 / (RRF_K + place)
        order: list[int] = np.argsort(-fused, kind="stable").tolist()
        return order


class Chroma:
    """The common recipe: chunks of the running transcript in a vector database, here Chroma in memory."""

    def __init__(self, turns: Sequence[Turn], embedder: Embedder, counter: TokenCounter) -> None:
        import chromadb
        from chromadb.config import Settings

        chunks, holds = chunked(turns)
        self.pieces = Pieces([counter.count_text(chunk + "\n") for chunk in chunks], holds)
        client = chromadb.EphemeralClient(settings=Settings(anonymized_telemetry=False))
        # clients in memory share their collections: hence a name of its own
        self._collection: Any = client.create_collection(uuid.uuid4().hex, configuration={"hnsw": {"space": "cosine"}})
        vectors = embedder.embed_documents(chunks)
        self._collection.add(ids=[str(n) for n in range(len(chunks))], embeddings=vectors, documents=chunks)

    def rank(self, question: str, vector: Vector) -> Sequence[int]:
        """Chunks, best first."""
        found: Mapping[str, Any] = self._collection.query(
            query_embeddings=vector.reshape(1, -1), n_results=len(self.pieces.costs), include=[]
        )
        return [int(id_) for id_ in found["ids"][0]]


def chunked(turns: Sequence[Turn]) -> tuple[list[str], list[frozenset[str]]]:
    """Chunks of whole lines, of about 1,000 characters, and the keys of the turns in each."""
    chunks: list[str] = []
    holds: list[frozenset[str]] = []
    lines: list[str] = []
    keys: list[str] = []
    for turn in turns:
        line = line_of(turn)
        if lines and sum(map(len, lines)) + len(lines) + len(line) > CHUNK_CHARS:
            chunks.append("\n".join(lines))
            holds.append(frozenset(keys))
            lines, keys = [], []
        lines.append(line)
        keys.append(turn.key)
    return [*chunks, "\n".join(lines)], [*holds, frozenset(keys)]
