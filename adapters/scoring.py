"""What a model expects after a segment and a question; for local models: many segments in a batch, each read once.

A segment's keys and values are computed after a prefix that all share, then the question is read after them. Whoever
keeps the keys and values has only the question read again, with the same result to the last bit that this machine's
arithmetic gives.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

from memory_os.protocols import Reading

if TYPE_CHECKING:
    import torch

__all__ = [
    "BATCH_TOKENS",
    "KeptKV",
    "SegmentReader",
    "after_segment",
    "cache_argument",
    "in_batches",
    "padded_width",
]

BATCH_TOKENS = 4096
"""Tokens of a batch, questions and padding counted: with SmolLM2 about 90 MB of keys and values."""

WIDTH = 64
"""Segments are padded to a multiple of so many tokens."""

KeptKV = MutableMapping[tuple[int, ...], Any]
"""Keys and values by a segment's tokens: a tensor ``[layers, 2, kv_heads, tokens, head_dim]``."""


def after_segment(question: str, stem: str) -> tuple[str, str]:
    """The question as it follows a segment, and the beginning of the answer, where the next token is asked for.

    Plain text and no chat template, as in the paper: in a template a small instruction model began its answers anew.
    No space stands at the end: the token that comes next brings its own.
    """
    return f"\n\nQuestion: {question}\n", f"Answer: {stem}".rstrip()


def cache_argument(model: Any) -> str:
    """The name under which the model takes keys and values: transformers 5.24 changed it, and warns of the old one."""
    return "cache" if "cache" in signature(model.model.forward).parameters else "past_key_values"


class SegmentReader:
    """Reads segments with one causal model.

    :param prefix: token ids that stand before every segment; at least one, which the others can attend to.
    """

    def __init__(self, model: Any, prefix: Sequence[int]) -> None:
        self._model = model
        self._prefix = list(prefix)
        self._prefix_kv: Any = None
        self._cache_name = cache_argument(model)

    def read(
        self,
        segments: Sequence[Sequence[int]],
        question: Sequence[int],
        cue: Sequence[int],
        *,
        with_question: bool,
        kept: KeptKV | None = None,
    ) -> Iterator[Reading]:
        """One reading for each segment, in order.

        :param segments: token ids of each; they follow the prefix.
        :param question: token ids that follow the segment.
        :param cue: token ids that follow the question; the last one is where the next token is asked for.
        :param kept: keys and values to use where they are there, and to be given those that are not.
        """
        import torch

        readings: dict[int, Reading] = {}
        for batch in in_batches(segments, len(self._prefix) + len(question) + len(cue)):
            own = [segments[place] for place in batch]
            with torch.inference_mode():  # not around the yield: it would hold in the caller's code
                made = self._batch(own, [*question, *cue], len(question) if with_question else 0, kept)
            readings.update(zip(batch, made, strict=True))
        yield from (readings[place] for place in range(len(segments)))

    def _batch(
        self, segments: Sequence[Sequence[int]], tail: Sequence[int], n_question: int, kept: KeptKV | None
    ) -> list[Reading]:
        import torch

        known = {} if kept is None else {tuple(ids): kept[tuple(ids)] for ids in segments if tuple(ids) in kept}
        new = [ids for ids in segments if tuple(ids) not in known]
        if new:
            made = self._encoded(new)
            known |= made
            if kept is not None:
                kept.update(made)
        cache, mask = self._joined([known[tuple(ids)] for ids in segments])
        lengths = torch.tensor([len(self._prefix) + len(ids) for ids in segments], device=mask.device)
        ids = torch.tensor([list(tail)] * len(segments), device=mask.device)
        hidden = self._model.model(
            input_ids=ids,
            attention_mask=torch.cat([mask, torch.ones_like(ids)], dim=1),
            position_ids=lengths[:, None] + torch.arange(len(tail), device=mask.device),
            **{self._cache_name: cache},
        ).last_hidden_state
        nexts = self._log_probs(hidden[:, -1]).cpu().numpy()
        if not n_question:
            return [Reading(row, complete=True) for row in nexts]
        asked = ids[0, 1:n_question, None]
        told = [self._log_probs(own[: n_question - 1]).gather(1, asked).squeeze(1).cpu().numpy() for own in hidden]
        return [Reading(row, complete=True, question=own) for row, own in zip(nexts, told, strict=True)]

    def _log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model.get_output_embeddings()(hidden)
        return logits.float().log_softmax(-1)

    def _encoded(self, segments: Sequence[Sequence[int]]) -> dict[tuple[int, ...], torch.Tensor]:
        """Keys and values of segments after the prefix."""
        import torch

        device = self._model.device
        if self._prefix_kv is None:
            self._prefix_kv = self._forward([self._prefix], None)
        # padded on the right: no token attends to what comes after it
        width = padded_width(segments[0])
        rows = [[*ids, *[0] * (width - len(ids))] for ids in segments]
        past = [(k.expand(len(rows), -1, -1, -1), v.expand(len(rows), -1, -1, -1)) for k, v in self._prefix_kv]
        layers = self._forward(rows, past)
        start = len(self._prefix)
        return {
            tuple(ids): torch.stack(
                [torch.stack([kv[row, :, start : start + len(ids)] for kv in layer]) for layer in layers]
            ).to(device)
            for row, ids in enumerate(segments)
        }

    def _forward(self, rows: list[list[int]], past: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(past, config=self._model.config)
        ids = torch.tensor(rows, dtype=torch.long, device=self._model.device)
        self._model.model(input_ids=ids, **{self._cache_name: cache})
        layers: Any = cache.layers
        return [(layer.keys, layer.values) for layer in layers]

    def _joined(self, segments: Sequence[torch.Tensor]) -> tuple[Any, torch.Tensor]:
        """The prefix and each segment as one cache, padded as they were read, and its mask ``[segments, tokens]``."""
        import torch
        from transformers import DynamicCache

        start = len(self._prefix)
        lengths = [kv.shape[3] for kv in segments]
        width = padded_width(range(lengths[0]))
        mask = torch.zeros(len(segments), start + width, dtype=torch.long, device=self._model.device)
        for row, n in enumerate(lengths):
            mask[row, : start + n] = 1
        layers = []
        for number, layer in enumerate(self._prefix_kv):
            pair = []
            for which, shared in enumerate(layer):
                _, heads, _, size = shared.shape
                joined = shared.new_zeros(len(segments), heads, mask.shape[1], size)
                joined[:, :, :start] = shared
                for row, kv in enumerate(segments):
                    joined[row, :, start : start + lengths[row]] = kv[number, which]
                pair.append(joined)
            layers.append(tuple(pair))
        return DynamicCache(layers, config=self._model.config), mask


def in_batches(segments: Sequence[Sequence[int]], n_around: int, step: int = WIDTH) -> Iterator[list[int]]:
    """Places of segments of one width, in runs of at most ``BATCH_TOKENS`` with what is around them; at least one."""
    by_width: dict[int, list[int]] = {}
    for place, ids in enumerate(segments):
        by_width.setdefault(padded_width(ids, step), []).append(place)
    for width, places in by_width.items():
        size = max(BATCH_TOKENS // (width + n_around), 1)
        yield from (places[start : start + size] for start in range(0, len(places), size))


def padded_width(ids: Sequence[int], step: int = WIDTH) -> int:
    """The tokens to which a segment is padded: by its own length, whatever else is read.

    In 16 bits another padding gives other last digits, which moved entropies by up to 0.1 nats.
    """
    return max(-(-len(ids) // step), 1) * step
