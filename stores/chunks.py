"""The mean keys of short runs of tokens, and which of them a query attends to (LongMem, arXiv 2306.07174)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from memory_os.protocols import Matrix3

__all__ = ["Table", "mean_keys"]

BLOCK = 64  # tokens of a query that are searched at a time: it bounds the memory that takes

Key = tuple[int, str]  # the segment's row and the checksum of its file


def mean_keys(keys: torch.Tensor, chunk_tokens: int) -> bytes:
    """Mean keys of a layer's ``[kv_heads, tokens, head_dim]``: float16 ``[chunks, kv_heads, head_dim]``.

    What remains after the last whole chunk is a smaller one of its own. The paper's code drops it, at most a few of
    1,024 tokens; of a short turn it would be the end, or all.
    """
    import numpy as np

    exact = keys.detach().cpu().float().numpy()
    starts = np.arange(0, exact.shape[1], chunk_tokens)
    lengths = np.diff(starts, append=exact.shape[1])
    means = np.add.reduceat(exact, starts, axis=1) / lengths[:, np.newaxis]
    return means.swapaxes(0, 1).astype("<f2").tobytes()


@dataclass(frozen=True, slots=True)
class Table:
    """The chunks of all entries of a namespace under a fingerprint.

    :param state: ``{key of an entry: its segment's id}``, in the order of ``seq``.
    :param owners: to which entry each chunk belongs, counted from 0.
    :param chunks: ``[chunks, kv_heads, head_dim]``, in the order of the entries.
    """

    state: Mapping[Key, str]
    owners: NDArray[np.int64]
    chunks: Matrix3

    @classmethod
    def empty(cls, n_heads: int, dim: int) -> Table:
        """A table without entries."""
        import numpy as np

        return cls({}, np.empty(0, dtype=np.int64), np.empty((0, n_heads, dim), dtype=np.float32))

    def updated(self, state: Mapping[Key, str], new: Mapping[int, bytes]) -> Table:
        """The table of these entries.

        :param new: the mean keys of those that are not in this one, by the segment's row.
        """
        import numpy as np

        if list(state) == list(self.state):
            return self
        starts = np.searchsorted(self.owners, np.arange(len(self.state) + 1))
        rows = {key: self.chunks[starts[i] : starts[i + 1]] for i, key in enumerate(self.state)}
        for key in state:
            if key not in rows:
                blob = np.frombuffer(new[key[0]], dtype="<f2")
                rows[key] = blob.reshape(-1, *self.chunks.shape[1:]).astype(np.float32)
        lengths = np.array([len(rows[key]) for key in state], dtype=np.int64)
        owners = np.repeat(np.arange(len(state)), lengths)
        return Table(state, owners, np.concatenate([self.chunks[:0], *(rows[key] for key in state)]))

    def shares(self, queries: Matrix3, k_chunks: int) -> NDArray[np.float64]:
        """How much of a query's attention each entry gets, in 0 to 1 and together 1.

        Each token and head finds its ``k_chunks`` best chunks by inner product, and attends to these alone. The table
        and the query are not empty.

        :param queries: ``[tokens, kv_heads, head_dim]``.
        """
        import numpy as np

        n_tokens, n_heads, dim = queries.shape
        n_best = min(k_chunks, len(self.chunks))
        total: NDArray[np.float64] = np.zeros(len(self.state))
        for start in range(0, n_tokens, BLOCK):
            for head in range(n_heads):
                scores = queries[start : start + BLOCK, head] @ self.chunks[:, head].T / math.sqrt(dim)
                best = np.argpartition(scores, -n_best, axis=1)[:, -n_best:]
                found = np.take_along_axis(scores, best, axis=1)
                weights = np.exp(found - found.max(axis=1, keepdims=True))
                weights /= weights.sum(axis=1, keepdims=True)
                total += np.bincount(self.owners[best].ravel(), weights.ravel(), minlength=len(total))
        total /= n_tokens * n_heads
        return total
