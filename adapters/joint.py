"""LongMem, form C: attention over remembered keys and values inside a frozen model, mixed in by one gate per head.

LongMem (arXiv 2306.07174) trains a side network of twelve layers that reads the memory. Here the frozen model reads
it itself: in the chosen layers every token looks up the ``k_chunks`` chunks of 4 tokens that answer its query best,
attends to them (R) beside the local attention (A), and each query head mixes the two:

    out = (1 - sigmoid(b)) A + sigmoid(b) R        b learned, as in the released code; the paper writes 1 - b for b

Only with gates that ``benchmarks/train_gate.py`` trained is this LongMem's method. Without gates the two are joined
as one softmax over local and remembered keys would join them (Extended Mind, arXiv 2406.02332), which trains nothing.

Works for Llama and what is built like it: ``model.model.layers[i].self_attn`` with ``q_proj``, ``k_proj``, ``v_proj``,
``o_proj`` and rotary positions. One sequence at a time. It does not choose what is in the memory.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from memory_os.errors import CapabilityError, ConfigError
from memory_os.protocols import KV

if TYPE_CHECKING:
    import torch

__all__ = ["SMOLLM2_GATES", "GatedMemory", "Gates", "LayerMemory", "encode", "merged", "weights_fingerprint"]

SMOLLM2_GATES = Path(__file__).with_name("smollm2_gates.safetensors")
"""Gates for the embedded SmolLM2, with their provenance inside."""

CHUNK_TOKENS = 4
K_CHUNKS = 16
DISTANCE = 64
"""By perplexity on books, untrained, in one and in ten layers: 34.5 and 35.4, against 34.9 and 54.0 at 0, and 34.7 and
37.6 at 1,024; without memory 34.9 (``train_gate.py --choose``)."""
FORMAT = "memory_os gates 1"
BLOCK = 256
"""So many query tokens look things up at once: what they find takes 64 keys and values each."""
STEADY_ROPE = ("default", "linear", "llama3")
"""Rotations that do not change with the length of the prompt, nor scale keys."""


@dataclass(eq=False, slots=True)
class Gates:
    """What trained heads take from memory, with all that must be the same when they are used.

    :param bias: b of every query head, float32 ``[len(layers), heads]``; its sigmoid is the share of the memory.
    :param layers: which layers read the memory, counted from 0.
    :param fingerprint: ``weights_fingerprint`` of the model they were trained in.
    :param distance: how far away all memory seems, in tokens; see ``GatedMemory``.
    :param provenance: how they were made; JSON.
    """

    bias: torch.Tensor
    layers: tuple[int, ...]
    fingerprint: str
    chunk_tokens: int = CHUNK_TOKENS
    k_chunks: int = K_CHUNKS
    distance: int = DISTANCE
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def untrained(cls, model: Any, layers: Sequence[int], *, start: float = 0.0, distance: int = DISTANCE) -> Gates:
        """Gates as training begins with them, every one ``start``; 0 is LongMem's, half and half."""
        import torch

        attentions = _attentions(model, layers)
        bias = torch.full((len(attentions), _n_heads(attentions[0])), start, device=model.device)
        return cls(bias, tuple(layers), weights_fingerprint(model), distance=distance)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        from safetensors.torch import save_file

        about = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "layers": json.dumps(self.layers),
            "chunk_tokens": str(self.chunk_tokens),
            "k_chunks": str(self.k_chunks),
            "distance": str(self.distance),
            "provenance": json.dumps(self.provenance, sort_keys=True),
        }
        save_file({"bias": self.bias.detach().float().cpu().contiguous()}, path, about)

    @classmethod
    def load(cls, path: str | Path, model: Any) -> Gates:
        """Read what ``save`` wrote, for this model.

        :raises ConfigError: if the file is not there, or was not made for this model.
        """
        from safetensors import SafetensorError, safe_open

        fix = "train gates for this model with benchmarks/train_gate.py, or pass gates=None"
        try:
            with safe_open(path, "pt") as file:
                about, bias = file.metadata() or {}, file.get_tensor("bias")
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"the gates {path} cannot be read: {error}; {fix}") from error
        if about.get("format") != FORMAT:
            raise ConfigError(f"{path} is {about.get('format', 'no file of gates')!r}, not {FORMAT!r}; {fix}")
        if about["fingerprint"] != (own := weights_fingerprint(model)):
            raise ConfigError(f"the gates {path} belong to the model {about['fingerprint']}, not {own}; {fix}")
        layers = tuple(json.loads(about["layers"]))
        shape = (len(layers), _n_heads(_attentions(model, layers)[0]))
        if bias.shape != shape:
            raise ConfigError(f"the gates {path} have the shape {tuple(bias.shape)}, this model needs {shape}; {fix}")
        chunk_tokens, k_chunks, distance = (int(about[name]) for name in ("chunk_tokens", "k_chunks", "distance"))
        provenance = json.loads(about["provenance"])
        return cls(bias.to(model.device), layers, own, chunk_tokens, k_chunks, distance, provenance)


class LayerMemory:
    """The keys and values of one layer in chunks; a chunk never spans two texts, the last of a text may be shorter.

    :param kvs: in any order, which has no meaning here.
    :param dtype: in which the model computes.
    """

    def __init__(
        self, kvs: Sequence[KV], layer: int, chunk_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        import torch

        def chunks(x: torch.Tensor) -> torch.Tensor:
            own = torch.nn.functional.pad(x.to(device), (0, 0, 0, -x.shape[1] % chunk_tokens))
            return own.reshape(len(x), -1, chunk_tokens, x.shape[2])

        kvs = [kv for kv in kvs if kv.ids]
        self.n_tokens = sum(len(kv.ids) for kv in kvs)
        if not kvs:
            return
        keys = torch.cat([chunks(kv.keys[layer]) for kv in kvs], dim=1)
        filled = torch.cat([chunks(kv.keys[layer, :1, :, :1].new_ones(1, len(kv.ids), 1)) for kv in kvs], dim=1)
        self.filled = filled[0, :, :, 0] > 0
        """Which places of a chunk hold a token, ``[chunks, chunk_tokens]``."""
        self.means = keys.float().sum(2) / self.filled.sum(1)[:, None]
        """Mean key of each chunk, float32 ``[kv_heads, chunks, head_dim]``."""
        self.keys = keys.to(dtype)
        """Before rotation, ``[kv_heads, chunks, chunk_tokens, head_dim]``."""
        self.values = torch.cat([chunks(kv.values[layer]) for kv in kvs], dim=1).to(dtype)

    def search(self, queries: torch.Tensor, k: int) -> torch.Tensor:
        """The ``k`` chunks of highest inner product with the mean key, ``[kv_heads, tokens, k]``; all if fewer.

        :param queries: before rotation, ``[kv_heads, tokens, head_dim]``.
        """
        scores = queries.detach().float() @ self.means.mT
        return scores.topk(min(k, scores.shape[-1]), sorted=False).indices

    def attend(self, queries: torch.Tensor, found: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over the tokens of the chunks found, and the log-sum-exp of its scores, both float32.

        :param queries: as they meet the keys, ``[heads, tokens, head_dim]``.
        :param found: chunks of each KV head, ``[kv_heads, tokens, k]``.
        """
        import torch

        heads = torch.arange(len(found), device=found.device)[:, None, None]
        keys, values = (x[heads, found].flatten(2, 3) for x in (self.keys, self.values))
        scores = torch.einsum("ghtd,gtnd->ghtn", _grouped(queries, len(found)), keys).float() * scale
        scores = scores.masked_fill(~self.filled[found].flatten(2)[:, None], -torch.inf)
        read = torch.einsum("ghtn,gtnd->ghtd", scores.softmax(-1).to(values.dtype), values)
        return read.flatten(0, 1).float(), scores.logsumexp(-1).flatten(0, 1)


def merged(a: torch.Tensor, l_a: torch.Tensor, r: torch.Tensor, l_r: torch.Tensor) -> torch.Tensor:
    """One softmax over two sets of keys, from the attention over each and the log-sum-exps of their scores.

    :param a: ``[..., head_dim]``, with ``l_a`` ``[...]``; so ``r`` and ``l_r``.
    """
    share = (l_r - l_a).sigmoid()[..., None]  # e^l_r / (e^l_a + e^l_r), without overflow
    return (1 - share) * a + share * r


class GatedMemory:
    """While it is entered, the model's chosen layers also attend to what is remembered.

    What is remembered has no position: its keys are not rotated, and a query meets them as if they were all
    ``distance`` tokens back (InfLLM, arXiv 2402.04617). An empty memory changes nothing.

        with GatedMemory(model, Gates.load(SMOLLM2_GATES, model), kvs):
            model.generate(...)

    :param gates: what was trained; ``None`` joins memory and local attention as one softmax would.
    :param kvs: of this model; only the chosen layers are kept.
    :param layers: which layers read the memory; as the gates say. Without gates one at two thirds of the depth: in all
        layers, untrained, memory raised the perplexity of book text from 35 to 63.
    :raises ConfigError: if a setting is not that of the gates; inside, if more than one sequence is read at once.
    :raises CapabilityError: if the model is not built like Llama.
    """

    def __init__(
        self,
        model: Any,
        gates: Gates | None,
        kvs: Sequence[KV],
        *,
        layers: Sequence[int] | None = None,
        chunk_tokens: int | None = None,
        k_chunks: int | None = None,
        distance: int | None = None,
    ) -> None:
        middle = (2 * len(_layers(model)) // 3,)
        self.layers = _agreed("layers", layers and tuple(layers), gates and gates.layers, middle)
        self.chunk_tokens = _agreed("chunk_tokens", chunk_tokens, gates and gates.chunk_tokens, CHUNK_TOKENS)
        self.k_chunks = _agreed("k_chunks", k_chunks, gates and gates.k_chunks, K_CHUNKS)
        self.distance = _agreed("distance", distance, gates and gates.distance, DISTANCE)
        self.gates = gates
        self._attentions = _attentions(model, self.layers)
        self._rotary = model.model.rotary_emb
        self._memories = [
            LayerMemory(kvs, layer, self.chunk_tokens, model.dtype, attention.o_proj.weight.device)
            for layer, attention in zip(self.layers, self._attentions, strict=True)
        ]
        self._seen: dict[int, dict[str, Any]] = {}
        self._hooks: list[Any] = []

    @property
    def n_tokens(self) -> int:
        """How many tokens are remembered."""
        return self._memories[0].n_tokens

    def __enter__(self) -> Self:
        if self.n_tokens:
            for place, attention in enumerate(self._attentions):
                before, fuse = partial(self._before, place), partial(self._fuse, place)
                self._hooks.append(attention.register_forward_pre_hook(before, with_kwargs=True))
                self._hooks.append(attention.o_proj.register_forward_pre_hook(fuse))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._seen.clear()

    def _before(self, place: int, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what the layer was given: its output projection sees only the heads' outputs."""
        given = kwargs | ({"hidden_states": args[0]} if args else {})
        if len(given["hidden_states"]) != 1:
            n = len(given["hidden_states"])
            raise ConfigError(f"memory is read by one sequence at a time, not {n}: use batches and beams of one")
        self._seen[place] = given

    def _fuse(self, place: int, o_proj: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The heads' outputs with what they read from memory, ``[1, tokens, heads * head_dim]`` as they came."""
        import torch

        attention, memory, given = self._attentions[place], self._memories[place], self._seen.pop(place)
        hidden = given["hidden_states"]
        queries = _heads(attention, "q", hidden)
        local = args[0][0].reshape(-1, len(queries), attention.head_dim).transpose(0, 1).float()
        at = torch.tensor([[self.distance]], device=hidden.device)
        away = _rotated(attention, queries, self._rotary(hidden, at)) if self.distance else queries
        looked_for = _grouped(queries, len(memory.keys)).mean(1)
        lookup = None if self.gates else _Local(attention, queries, given)
        parts = []
        for start in range(0, queries.shape[1], BLOCK):
            part = slice(start, start + BLOCK)
            found = memory.search(looked_for[:, part], self.k_chunks)
            read, l_read = memory.attend(away[:, part], found, attention.scaling)
            if self.gates:
                share = self.gates.bias[place].sigmoid()[:, None, None]
                parts.append((1 - share) * local[:, part] + share * read)
            elif lookup:
                parts.append(merged(local[:, part], lookup.log_sum_exp(part), read, l_read))
        fused = torch.cat(parts, dim=1).transpose(0, 1).flatten(1)
        return (fused.to(args[0].dtype)[None],)


class _Local:
    """The scores of a layer's own attention, computed once more: it tells its outputs but not their log-sum-exp."""

    def __init__(self, attention: Any, queries: torch.Tensor, given: Mapping[str, Any]) -> None:
        import torch

        positions = given["position_embeddings"]
        # transformers 5.24 renamed it
        cache = given.get("cache", given.get("past_key_values"))
        kept = None if cache is None else cache.layers[attention.layer_idx]
        if kept is not None and (kept.is_compileable or kept.is_sliding):
            raise ConfigError("memory without gates needs a cache that grows: use trained gates or a DynamicCache")
        self.queries = _rotated(attention, queries, positions)
        if kept is None:
            self.keys = _rotated(attention, _heads(attention, "k", given["hidden_states"]), positions)
        else:  # it holds the new keys by now
            self.keys = kept.keys[0]
        self.scale = attention.scaling
        n, total = queries.shape[1], self.keys.shape[1]
        mask = given.get("attention_mask")
        if mask is not None and mask.dim() == 4:  # what to add, or which keys are visible
            visible = mask[0, 0, :, :total]
            self.mask = visible if visible.dtype != torch.bool else visible.float().log()
        else:  # none is made where it would be the causal one
            ones = torch.ones(n, total, dtype=torch.bool, device=queries.device)
            self.mask = ones.tril(total - n).float().log()

    def log_sum_exp(self, part: slice) -> torch.Tensor:
        """Of the scores of some query tokens, float32 ``[heads, tokens]``."""
        queries = _grouped(self.queries[:, part], len(self.keys))
        scores: torch.Tensor = (queries @ self.keys[:, None].mT).float() * self.scale + self.mask[part]
        return scores.logsumexp(-1).flatten(0, 1)


def encode(model: Any, ids: Sequence[int], *, after: Sequence[int] = ()) -> KV:
    """Keys before rotation and values of a text, read by the plain model.

    :param after: what it reads first, without remembering it. Begin with the beginning-of-text token: whatever comes
        first draws attention that is not meant for it, and would do so from memory.
    """
    import torch

    attentions = _attentions(model, range(len(_layers(model))))
    keys, values, hooks = [], [], []

    def keep(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        keys.append(_heads(attention, "k", hidden)[:, len(after) :])
        values.append(_heads(attention, "v", hidden)[:, len(after) :])

    try:
        hooks += [attention.register_forward_pre_hook(keep, with_kwargs=True) for attention in attentions]
        with torch.no_grad():
            model.model(input_ids=torch.tensor([[*after, *ids]], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return KV(tuple(ids), torch.stack(keys), torch.stack(values))


def weights_fingerprint(model: Any) -> str:
    """Changes with any weight, but not between float32 and bfloat16, in which the same gates hold."""
    import torch

    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy())
    return f"{model.config.model_type} {digest.hexdigest()[:16]}"


def _agreed(name: str, given: Any, trained: Any, default: Any) -> Any:
    """A setting: that of the gates, which no other may contradict."""
    if trained is not None and given not in (None, trained):
        raise ConfigError(f"the gates were trained with {name}={trained!r}, not {given!r}; leave {name} out")
    return trained if trained is not None else given if given is not None else default


def _layers(model: Any) -> Any:
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None or not hasattr(model.model, "rotary_emb"):
        raise CapabilityError("longmem", "rotary positions and model.layers", "HuggingFaceLLM('smollm2')")
    return layers


def _attentions(model: Any, layers: Sequence[int]) -> list[Any]:
    """The attention modules of these layers, if they can be read from outside.

    :raises CapabilityError: if they are not built like Llama's.
    :raises ConfigError: if there is no such layer.
    """
    every = _layers(model)
    if not layers or not set(layers) <= set(range(len(every))) or len(set(layers)) < len(layers):
        raise ConfigError(f"layers={tuple(layers)} must name some of the model's layers 0 to {len(every) - 1}, once")
    found: list[Any] = [getattr(every[layer], "self_attn", None) for layer in layers]
    rope = getattr(model.model.rotary_emb, "rope_type", "default")
    for attention in found:
        needs = ""
        if missing := [name for name in ("q_proj", "k_proj", "v_proj", "o_proj") if not hasattr(attention, name)]:
            needs = " and ".join(missing)
        elif attention.q_proj.out_features != attention.o_proj.in_features:
            needs = "queries as wide as the heads' outputs"
        elif getattr(attention, "attn_logit_softcapping", None) or hasattr(attention, "sinks"):
            needs = "a plain softmax in its attention"
        elif rope not in STEADY_ROPE or not hasattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb"):
            needs = f"one rotation for all lengths, not {rope!r}"
        if needs:
            raise CapabilityError("longmem", needs, "HuggingFaceLLM('smollm2')")
    return found


def _n_heads(attention: Any) -> int:
    return int(attention.o_proj.in_features // attention.head_dim)


def _heads(attention: Any, which: str, hidden: torch.Tensor) -> torch.Tensor:
    """Queries, keys or values before rotation, ``[heads, tokens, head_dim]``."""
    flat: torch.Tensor = getattr(attention, f"{which}_proj")(hidden[0])
    norm = getattr(attention, f"{which}_norm", None)
    if norm is not None and norm.weight.shape[0] == flat.shape[-1] != attention.head_dim:  # over all heads (OLMo 2)
        flat, norm = norm(flat), None
    split: torch.Tensor = flat.reshape(len(flat), -1, attention.head_dim)
    return (split if norm is None else norm(split)).transpose(0, 1)


def _grouped(queries: torch.Tensor, n_kv_heads: int) -> torch.Tensor:
    """Those that share a KV head together, ``[kv_heads, heads of each, tokens, head_dim]``."""
    return queries.reshape(n_kv_heads, -1, *queries.shape[1:])


def _rotated(attention: Any, x: torch.Tensor, positions: Any) -> torch.Tensor:
    """As the model's own code rotates, ``[heads, tokens, head_dim]``; ``positions`` are cosines and sines."""
    rotate = sys.modules[type(attention).__module__].__dict__["apply_rotary_pos_emb"]
    both: tuple[torch.Tensor, torch.Tensor] = rotate(x[None], x[None], *positions)
    return both[0][0]
