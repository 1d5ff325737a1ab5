"""Embedding on a Ray cluster, through Ray Data: actors hold an embedder each, and batches of texts go to them.

The cluster is that of ``RAY_ADDRESS``; without it, one on this machine. memory-os must be installed on its nodes. What
the actors make comes back here, and this process stores it: no node needs the database.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from memory_os.adapters.processes import made, sendable
from memory_os.errors import ConfigError, MissingExtraError
from memory_os.protocols import Embedder, vectors_of

if TYPE_CHECKING:
    from memory_os.protocols import Matrix

__all__ = ["RayPool"]

CHUNK = 1024
"""So many batches are one dataset: enough that loading the model does not count, and few enough for this memory."""


class RayPool:
    """``EmbedderPool`` of so many actors.

    :param make: makes the embedder in each of them; it is pickled.
    :param fingerprint: of that embedder.
    :raises ConfigError: for fewer than 1, or an embedder that cannot be sent.
    :raises MissingExtraError: without the package ray.
    """

    def __init__(self, make: Callable[[], Embedder], fingerprint: str, n: int) -> None:
        if n < 1:
            raise ConfigError(f"embedding needs at least 1 actor, not {n}")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
        try:
            import ray.data  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("embedding on Ray", "ray[data]", "ray") from error
        self._make, self._fingerprint, self._n = sendable(make), fingerprint, n
        self._started = False

    def embed(self, batches: Iterable[Sequence[str]]) -> Iterator[tuple[Matrix, list[bytes] | None]]:
        """In order; 1,024 batches at a time are a dataset."""
        import numpy as np
        import ray
        import ray.data

        rest = iter(batches)
        while chunk := [{"texts": list(texts)} for texts in islice(rest, CHUNK)]:
            self._connect()
            context = ray.data.DataContext.get_current().copy()
            context.execution_options.preserve_order = True
            context.enable_progress_bars = False
            with ray.data.DataContext.current(context):
                vectors_made = ray.data.from_items(chunk, override_num_blocks=min(len(chunk), 4 * self._n)).map_batches(
                    _Actor,
                    fn_constructor_args=(self._make, self._fingerprint),
                    batch_size=1,
                    compute=ray.data.ActorPoolStrategy(size=self._n),
                )
                for row in vectors_made.iter_rows():
                    shape = row["n"], -1
                    vectors = np.frombuffer(row["vectors"], dtype=np.float32).reshape(shape)
                    yield vectors, list(row["tokens"]) if row["by_token"] else None

    def _connect(self) -> None:
        import ray

        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
            self._started = True

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self._started:
            import ray

            ray.shutdown()
            self._started = False


class _Actor:
    """An embedder on a node. Vectors travel as bytes: so they come back as they were made."""

    def __init__(self, make: bytes, fingerprint: str) -> None:
        self._embedder = made(make, fingerprint)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        out: dict[str, list[Any]] = {"n": [], "vectors": [], "by_token": [], "tokens": []}
        for texts in batch["texts"]:
            vectors, tokens = vectors_of(self._embedder, [str(text) for text in texts])
            out["n"].append(len(vectors))
            out["vectors"].append(np.ascontiguousarray(vectors, dtype=np.float32).tobytes())
            out["by_token"].append(tokens is not None)
            out["tokens"].append(tokens or [])
        return out
