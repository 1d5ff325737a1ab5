"""Segments, vectors and questions of any number, made up from a seed: what ``memos bench scale`` stores and asks.

Vectors have the shape of MiniLM's over LoCoMo's turns: a common direction, topics, and a spectrum of which 128 of 384
directions keep 0.92 of the squared length (``energy`` measures it). A question's vector lies at a cosine of about 0.7
to that of a stored segment, and its words are some of that segment's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from memory_os.lexical import STOP_WORDS

if TYPE_CHECKING:
    from memory_os.protocols import Matrix, Vector

__all__ = ["BLOCK", "DIMENSION", "Data", "LookUp", "energy"]

DIMENSION = 384
BLOCK = 5000
"""Rows are made in blocks of so many; a row does not depend on how many there are."""
N_WORDS = 30_000
N_TOPICS = 3000
TOPIC_WORDS = 200
SYLLABLES = "ba be bi bo bu da de di do du fa fi fo ga ge go ka ke ki ko la le li lo ma me mi mo na ne no".split()


@dataclass(frozen=True)
class Data:
    """What is stored: the row's number says everything.

    :param seed: of words, topics and vectors.
    """

    seed: int = 0

    @cached_property
    def words(self) -> list[str]:
        """The vocabulary, the commonest first: the stop words of English, then words of one to three syllables."""
        n = len(SYLLABLES)
        made = [
            "".join(SYLLABLES[rank // n**place % n] for place in range(size))
            for size in (1, 2, 3)
            for rank in range(n**size)
        ]
        return [*sorted(STOP_WORDS), *(word for word in made if word not in STOP_WORDS)][:N_WORDS]

    @cached_property
    def _spread(self) -> Vector:
        """Standard deviation along each direction."""
        import numpy as np

        i = np.arange(DIMENSION)
        slow, fast = np.exp(-i / 77.0), np.exp(-i / 8.0)
        spread: Vector = np.sqrt(0.42 * slow / slow.sum() + 0.58 * fast / fast.sum()).astype(np.float32)
        return spread

    @cached_property
    def _topics(self) -> Matrix:
        import numpy as np

        drawn: Matrix = np.random.default_rng([self.seed, 1]).standard_normal((N_TOPICS, DIMENSION), dtype=np.float32)
        return drawn * self._spread

    @lru_cache(maxsize=2)  # noqa: B019  # of one run
    def block(self, number: int) -> tuple[list[str], Matrix]:
        """``(texts, unit vectors [BLOCK, DIMENSION])``."""
        import numpy as np

        rng = np.random.default_rng([self.seed, 2, number])
        topics = (N_TOPICS * rng.random(BLOCK) ** 2).astype(np.int64)
        common = np.zeros(DIMENSION, dtype=np.float32)
        common[0] = 0.35
        own = rng.standard_normal((BLOCK, DIMENSION), dtype=np.float32) * self._spread
        vectors = common + 0.65 * self._topics[topics] + 0.7 * own
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        lengths = rng.integers(6, 40, BLOCK)
        zipf = (N_WORDS ** rng.random((BLOCK, 40))).astype(np.int64) - 1  # log-uniform ranks: Zipf's law
        near = (N_WORDS // 2 + topics[:, None] * 5 + rng.integers(0, TOPIC_WORDS, (BLOCK, 40))) % N_WORDS
        chosen = np.where(rng.random((BLOCK, 40)) < 0.25, near, zipf)
        words = self.words
        texts = [
            " ".join([words[w] for w in row[:length]]) for row, length in zip(chosen.tolist(), lengths, strict=True)
        ]
        return texts, vectors

    def batches(self, n: int, start: int = 0) -> Iterator[tuple[list[str], Matrix]]:
        """Rows ``start`` to ``start + n``, in batches of at most ``BLOCK``."""
        at, end = start, start + n
        while at < end:
            texts, vectors = self.block(at // BLOCK)
            first = at % BLOCK
            stop = min(BLOCK, first + end - at)
            yield texts[first:stop], vectors[first:stop]
            at += stop - first

    def questions(self, among: int, n: int, start: int = 0) -> tuple[list[str], Matrix]:
        """``n`` questions, each about one of ``among`` rows from ``start`` on."""
        import numpy as np

        rng = np.random.default_rng([self.seed, 3, among, start])
        asked: list[str] = []
        rows: list[Vector] = []
        for number in sorted(rng.integers(start, start + among, n).tolist()):
            texts, vectors = self.block(number // BLOCK)
            words = texts[number % BLOCK].split()
            picked = rng.choice(len(words), min(len(words), int(rng.integers(6, 11))), replace=False)
            asked.append(f"{len(asked)} " + " ".join(words[i] for i in sorted(picked.tolist())))
            off = rng.standard_normal(DIMENSION, dtype=np.float32) * self._spread
            row = vectors[number % BLOCK] + 0.9 * off / np.linalg.norm(off)
            rows.append(row / np.linalg.norm(row))
        order = rng.permutation(n)
        return [asked[i] for i in order], np.stack(rows).astype(np.float32)[order]


class LookUp:
    """An embedder that embeds nothing: it looks up what was made before. Also LangChain's ``Embeddings`` in form."""

    fingerprint = "scale-lookup-384"
    dimension = DIMENSION

    def __init__(self) -> None:
        self._known: dict[str, Vector] = {}

    def learn(self, texts: list[str], vectors: Matrix) -> None:
        """Know these texts from now on."""
        self._known.update(zip(texts, vectors, strict=True))

    def forget(self, texts: list[str]) -> None:
        """Know these texts no more."""
        for text in texts:
            self._known.pop(text, None)

    def embed_documents(self, texts: Sequence[str]) -> Matrix:
        """Their vectors, ``[len(texts), dimension]``."""
        import numpy as np

        return np.stack([self._known[text] for text in texts])

    def embed_query(self, text: str) -> Vector:
        """Its vector."""
        return self._known[text]


def energy(vectors: Matrix) -> dict[int, float]:
    """What share of the squared length so many principal directions keep."""
    import numpy as np

    values = np.linalg.eigvalsh(vectors.T.astype(np.float64) @ vectors)[::-1]
    share = np.cumsum(values) / values.sum()
    return {n: round(float(share[n - 1]), 3) for n in (32, 64, 128, 256)}
