"""Keys and values that are computed once: read before rotation, rotated again to where they are needed, and spliced.

Training-free: what LongMem (arXiv 2306.07174) keeps of a frozen model, without its trained reader. Every segment is
read alone, after a beginning that all share; in a prompt, segments stand one after the other at positions of their
own. With one segment that is exactly what the model itself would compute; with several, segments do not see each
other, which is what ``Repair`` mends in part.
"""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

from memory_os.adapters.scoring import cache_argument, in_batches, padded_width
from memory_os.errors import CapabilityError, ConfigError
from memory_os.protocols import KV

if TYPE_CHECKING:
    import torch

    from memory_os.protocols import Matrix3

    Layers = list[tuple[torch.Tensor, torch.Tensor]]

__all__ = ["CONTROLLER", "EXAMPLE", "Divergence", "Repair", "Splicer"]

CONTROLLER = "longmem-free"
"""Who needs keys and values, for errors."""
EXAMPLE = "HuggingFaceLLM('smollm2')"
PREFIXES = 4
"""Beginnings whose keys and values are kept at hand."""
MOVABLE = ("default", "linear", "llama3")
"""Kinds of RoPE whose angles depend on the position alone."""
WIDTH = 16
"""Segments are padded to a multiple of so many tokens: turns are short, and what is padded is computed."""
LEAST_EXPECTED = 0.1
"""The share of a segment's tokens whose surprisal is its own."""


@dataclass(frozen=True, slots=True)
class Repair:
    """What is computed again of spliced segments, which have not seen each other.

    :param first: so many first tokens of each segment but the first (LegoLink, arXiv 2410.15332).
    :param share: the share of tokens whose values in the second layer differ most from what they would be in this
        prompt (CacheBlend, arXiv 2405.16444), in [0, 1].
    :param temperature: by which attention to memory is sharpened (APE, arXiv 2502.05431), in (0, 1]; 1 is as it is.
    """

    first: int = 0
    share: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.first < 0 or not 0.0 <= self.share <= 1.0 or not 0.0 < self.temperature <= 1.0:
            raise ConfigError(f"repair: first >= 0, 0 <= share <= 1 and 0 < temperature <= 1, not {self}")


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far spliced keys and values lead from an ordinary prefill; measured when a model is first used so.

    :param moved: of one segment, which must be exact but for rounding: Kullback-Leibler divergence (nats) of the next
        token.
    :param spliced: the same of two segments that refer to each other.
    :param without: the same with no memory at all, for scale.
    """

    moved: float
    spliced: float
    without: float


class Splicer:
    """The keys and values of one causal model.

    :param name: of the model, for errors.
    :raises CapabilityError: if they cannot be moved, as positions do not enter by a plain RoPE.
    """

    def __init__(self, name: str, model: Any) -> None:
        self._name = name
        self._model = model
        self._decoder: Any = getattr(model, "model", None)
        self._check_architecture()
        self._cache_name = cache_argument(model)
        self._lock = Lock()
        self._prefixes: OrderedDict[tuple[int, ...], Layers] = OrderedDict()

    def _check_architecture(self) -> None:
        decoder, config = self._decoder, self._model.config
        rotary = getattr(decoder, "rotary_emb", None)
        kind = getattr(rotary, "rope_type", None)
        windows = {kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"}
        problem = None
        if rotary is None or kind not in MOVABLE or getattr(rotary, "attention_scaling", 1.0) != 1.0:
            problem = f"the positions ({kind or 'no RoPE'}) cannot be moved"
        elif windows or getattr(config, "sliding_window", None):
            problem = "not every layer attends to everything"
        elif not all(
            hasattr(layer, "input_layernorm") and hasattr(getattr(layer, "self_attn", None), "q_proj")
            for layer in decoder.layers
        ):
            problem = "the attention is built otherwise than Llama's"
        elif 2 * rotary.inv_freq.numel() != self._head_dim:
            problem = "only a part of each head is rotated"
        if problem:
            raise CapabilityError(CONTROLLER, "CachingLLM", EXAMPLE, f"of {self._name} {problem}")

    @property
    def _head_dim(self) -> int:
        size: int = self._decoder.layers[0].self_attn.head_dim
        return size

    @property
    def n_layers(self) -> int:
        """How many layers the model has."""
        return len(self._decoder.layers)

    def fingerprint(self) -> str:
        """Changes with any weight, and with the angles of RoPE.

        Sums of the weights' bits as whole numbers: the same whatever the order in which they are added.
        """
        import torch

        ints = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.int8}
        state = {**self._model.state_dict(), "inv_freq": self._decoder.rotary_emb.inv_freq}
        sums = [
            (
                name,
                tuple(w.shape),
                str(w.dtype),
                int(w.contiguous().view(ints[w.element_size()]).sum(dtype=torch.int64)),
            )
            for name, w in sorted(state.items())
        ]
        return hashlib.sha256(repr(sums).encode()).hexdigest()[:16]

    # -- write -----------------------------------------------------------------------------------------------------

    def encode(self, prefix: Sequence[int], lines: Sequence[Sequence[int]], *, surprisal: bool = False) -> Iterator[KV]:
        """Keys and values of each line, in order, read after the prefix alone."""
        import torch

        made: dict[int, KV] = {}
        for batch in in_batches(lines, len(prefix), WIDTH):
            with torch.inference_mode():
                own = self._encode_batch(prefix, [lines[place] for place in batch], surprisal)
            made.update(zip(batch, own, strict=True))
        yield from (made[place] for place in range(len(lines)))

    def _encode_batch(self, prefix: Sequence[int], lines: Sequence[Sequence[int]], surprisal: bool) -> list[KV]:
        import torch

        start, width = len(prefix), padded_width(lines[0], WIDTH)
        past = [(k.expand(len(lines), -1, -1, -1), v.expand(len(lines), -1, -1, -1)) for k, v in self._prefix(prefix)]
        # padded on the right: no token attends to what comes after it
        ids = torch.tensor([[*line, *[0] * (width - len(line))] for line in lines], device=self._model.device)
        cache = self._cache(past)
        hidden = self._decoder(input_ids=ids, **{self._cache_name: cache}).last_hidden_state
        keys = torch.stack([layer.keys[:, :, start:] for layer in cache.layers], dim=1)
        values = torch.stack([layer.values[:, :, start:] for layer in cache.layers], dim=1)
        positions = torch.arange(start, start + width, device=ids.device)
        keys = self.rotated(keys, positions, back=True)
        if values.element_size() == 2:  # float16 is finer than bfloat16, and what the bank keeps
            keys = keys.to(torch.float16)
        return [
            KV(
                tuple(line),
                keys[row, :, :, : len(line)].clone(),
                values[row, :, :, : len(line)].clone(),
                self._surprisal(hidden[row], line) if surprisal else None,
            )
            for row, line in enumerate(lines)
        ]

    def _surprisal(self, hidden: torch.Tensor, line: Sequence[int]) -> float:
        """Mean over the tokens that were least expected; the first one has nothing to be expected by but the prefix."""
        import torch

        if len(line) < 2:
            return 0.0
        logits = self._model.get_output_embeddings()(hidden[: len(line) - 1]).float()
        target = torch.tensor(line[1:], device=logits.device)
        each = -logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1)
        return float(each.topk(max(1, round(LEAST_EXPECTED * len(each)))).values.mean())

    # -- read ------------------------------------------------------------------------------------------------------

    def splice(self, prefix: Sequence[int], memory: Sequence[KV], repair: Repair) -> Any:
        """Prefix and memory as one cache, each line at positions of its own, ready for what follows."""
        import torch

        with torch.inference_mode():
            cache = self._spliced(prefix, memory, repair.temperature)
            again = self._to_repair(prefix, memory, repair)
            if again:
                self._recompute(cache, prefix, memory, again)
        return cache

    def as_argument(self, prefix: Sequence[int], memory: Sequence[KV], repair: Repair) -> dict[str, Any]:
        """``splice`` as an argument of the model's ``forward`` and ``generate``."""
        return {self._cache_name: self.splice(prefix, memory, repair)}

    def _spliced(self, prefix: Sequence[int], memory: Sequence[KV], temperature: float) -> Any:
        import torch

        head = self._prefix(prefix)
        start, n = len(prefix), sum(len(kv.ids) for kv in memory)
        _, heads, _, size = head[0][0].shape
        keys = torch.empty(len(head), heads, start + n, size, dtype=self._model.dtype, device=self._model.device)
        values = torch.empty_like(keys)
        for number, (k, v) in enumerate(head):
            keys[number, :, :start], values[number, :, :start] = k[0], v[0]
        at = start
        for kv in memory:
            end = at + len(kv.ids)
            positions = torch.arange(at, end, device=keys.device)
            moved = self.rotated(kv.keys.to(keys.device), positions)
            keys[:, :, at:end] = moved if temperature == 1.0 else moved / temperature
            values[:, :, at:end] = kv.values
            at = end
        return self._cache([(keys[n][None], values[n][None]) for n in range(len(head))])

    def rotated(self, keys: torch.Tensor, positions: torch.Tensor, *, back: bool = False) -> torch.Tensor:
        """Keys ``[..., tokens, head_dim]`` rotated to these positions, or back from them, in float32.

        The half-split layout of Llama: element ``j`` turns with element ``j + head_dim / 2``.
        """
        import torch

        angles = positions[:, None].float() * self._decoder.rotary_emb.inv_freq.float()
        cos, sin = angles.cos(), -angles.sin() if back else angles.sin()
        a, b = keys.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def continuations(
        self,
        prefix: Sequence[int],
        memory: Sequence[KV],
        repair: Repair,
        tail: Sequence[int],
        options: Sequence[Sequence[int]],
    ) -> list[float]:
        """Log-probability (nats) of each option's tokens after the prompt; ``tail`` has at least one token."""
        import torch

        cache = self.splice(prefix, memory, repair)
        with torch.inference_mode():
            following = self._after(cache, tail)
            found = []
            for ids in options:
                told = following[ids[0]]
                if len(ids) > 1:
                    own = self._model(
                        input_ids=torch.tensor([ids[:-1]], device=self._model.device),
                        **{self._cache_name: copy.deepcopy(cache)},
                    ).logits[0]
                    target = torch.tensor(ids[1:], device=own.device)[:, None]
                    told = told + own.float().log_softmax(-1).gather(1, target).sum()
                found.append(float(told))
        return found

    # -- repair ----------------------------------------------------------------------------------------------------

    def _to_repair(self, prefix: Sequence[int], memory: Sequence[KV], repair: Repair) -> list[int]:
        """Places in the prompt of the tokens that are computed again, in order; the first segment needs none."""
        places: set[int] = set()
        start = len(prefix) + len(memory[0].ids) if memory else 0
        at = start
        for kv in memory[1:]:
            places.update(range(at, at + min(repair.first, len(kv.ids))))
            at += len(kv.ids)
        if repair.share and at > start:
            deviations = self._deviations(prefix, memory)[start:]
            most = deviations.topk(round(repair.share * len(deviations))).indices
            places.update((most + start).tolist())
        return sorted(places)

    def _deviations(self, prefix: Sequence[int], memory: Sequence[KV]) -> torch.Tensor:
        """How much keys and values of the second layer differ from those of the whole prompt, ``[tokens]``."""
        import torch

        ids = [*prefix, *(token for kv in memory for token in kv.ids)]
        hidden = self._until(1, ids)
        attention = self._decoder.layers[1].self_attn
        fresh_values = self._by_head(attention.v_proj(hidden))
        fresh_keys = self._by_head(attention.k_proj(hidden), getattr(attention, "k_norm", None))
        kept_keys = torch.cat([kv.keys[1] for kv in memory], dim=1).to(hidden.device).float()
        kept_values = torch.cat([kv.values[1] for kv in memory], dim=1).to(hidden.device).float()
        start = len(prefix)
        squares = (fresh_keys.float()[:, start:] - kept_keys).square() / kept_keys.square().mean()
        squares += (fresh_values.float()[:, start:] - kept_values).square() / kept_values.square().mean()
        own = squares.sum(dim=(0, 2))
        return torch.cat([own.new_zeros(start), own])

    def _recompute(self, cache: Any, prefix: Sequence[int], memory: Sequence[KV], places: Sequence[int]) -> None:
        """Read these tokens again where they stand, each after all that is before it, and put them into the cache."""
        import torch

        ids = [*prefix, *(token for kv in memory for token in kv.ids)]
        where = torch.tensor(places, device=self._model.device)
        mask = torch.arange(len(ids), device=where.device) <= where[:, None]
        self._decoder(
            input_ids=torch.tensor([[ids[place] for place in places]], device=where.device),
            attention_mask=mask[None, None],
            position_ids=where[None],
            **{self._cache_name: _rewriting(cache, where)},
        )

    # -- search ----------------------------------------------------------------------------------------------------

    def query_keys(self, prefix: Sequence[int], ids: Sequence[int], layer: int) -> Matrix3:
        """Queries before rotation of ``ids`` after the prefix, the mean of each group of heads, float32."""
        import torch

        with torch.inference_mode():
            hidden = self._until(layer, [*prefix, *ids])
            attention = self._decoder.layers[layer].self_attn
            heads = self._by_head(attention.q_proj(hidden), getattr(attention, "q_norm", None))
            n_kv = self._prefix(prefix)[0][0].shape[1]
            grouped = heads.float().reshape(n_kv, -1, *heads.shape[1:]).mean(dim=1)
            queries: Matrix3 = grouped[:, len(prefix) :].transpose(0, 1).contiguous().cpu().numpy()
        return queries

    def _until(self, layer: int, ids: Sequence[int]) -> torch.Tensor:
        """What comes to a layer's attention, ``[tokens, hidden]``: the model as far as there."""
        import torch

        part = copy.copy(self._decoder)  # the same weights, fewer layers; the model itself is not touched
        layers = self._decoder.layers
        part._modules = {**part._modules, "layers": layers[:layer], "norm": layers[layer].input_layernorm}
        hidden: torch.Tensor = part(
            input_ids=torch.tensor([list(ids)], device=self._model.device), use_cache=False
        ).last_hidden_state[0]
        return hidden

    def _by_head(self, projected: torch.Tensor, norm: Any = None) -> torch.Tensor:
        """``[tokens, heads * head_dim]`` as ``[heads, tokens, head_dim]``."""
        heads = projected.reshape(len(projected), -1, self._head_dim)
        by_head: torch.Tensor = (heads if norm is None else norm(heads)).transpose(0, 1)
        return by_head

    # -- check -----------------------------------------------------------------------------------------------------

    def divergence(
        self, prefix: Sequence[int], first: Sequence[int], second: Sequence[int], asked: Sequence[int]
    ) -> Divergence:
        """How far splicing leads from prefill, for two lines and a question that is about both."""
        one, two = self.encode(prefix, [first, second])
        moved = self.next_token(asked, prefix, [two])
        spliced = self.next_token(asked, prefix, [one, two])
        without, whole, both = (self.next_token([*prefix, *line, *asked]) for line in ((), second, [*first, *second]))
        return Divergence(_kl(whole, moved), _kl(both, spliced), _kl(both, without))

    def next_token(
        self, ids: Sequence[int], prefix: Sequence[int] = (), memory: Sequence[KV] = (), repair: Repair | None = None
    ) -> torch.Tensor:
        """Log-probabilities (nats) of the next token after ``ids``, ``[vocabulary]``.

        :param prefix: with memory, what stands before it; without, all is in ``ids``.
        """
        import torch

        cache = self.splice(prefix, memory, repair or Repair()) if memory else None
        with torch.inference_mode():
            return self._after(cache, [*(() if memory else prefix), *ids])

    def _after(self, cache: Any, ids: Sequence[int]) -> torch.Tensor:
        import torch

        given = {} if cache is None else {self._cache_name: cache}
        out = self._model(input_ids=torch.tensor([list(ids)], device=self._model.device), logits_to_keep=1, **given)
        log_probs: torch.Tensor = out.logits[0, -1].float().log_softmax(-1)
        return log_probs

    # -- caches ----------------------------------------------------------------------------------------------------

    def _prefix(self, ids: Sequence[int]) -> Layers:
        """Keys (rotated) and values of the prefix by layer, ``[1, kv_heads, tokens, head_dim]``."""
        import torch

        with self._lock:
            known = self._prefixes.get(tuple(ids))
        if known is None:
            cache = self._cache([])
            with torch.inference_mode():
                self._decoder(
                    input_ids=torch.tensor([list(ids)], device=self._model.device), **{self._cache_name: cache}
                )
            known = [(layer.keys, layer.values) for layer in cache.layers]
        with self._lock:
            self._prefixes[tuple(ids)] = known
            self._prefixes.move_to_end(tuple(ids))
            while len(self._prefixes) > PREFIXES:
                self._prefixes.popitem(last=False)
        return known

    def _cache(self, layers: Layers) -> Any:
        """A cache over these tensors, which are not copied."""
        from transformers import DynamicCache

        cache: Any = DynamicCache(config=self._model.config)
        for layer, (keys, values) in zip(cache.layers, layers, strict=False):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        return cache


def _rewriting(cache: Any, places: torch.Tensor) -> Any:
    """The cache, but that what is computed replaces what stands at these places."""
    from transformers import DynamicCache

    class Rewriting(DynamicCache):
        def update(self, key_states: Any, value_states: Any, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
            layer: Any = cache.layers[layer_idx]
            layer.keys.index_copy_(2, places, key_states)
            layer.values.index_copy_(2, places, value_states)
            return layer.keys, layer.values

    return Rewriting()


def _kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """Kullback-Leibler divergence of log-probabilities, nats."""
    return float((p.exp() * (p - q)).sum())
