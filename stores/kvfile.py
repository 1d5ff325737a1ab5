"""One entry of the bank as a safetensors file: in which form keys and values are kept, read back, and verified.

In float16 as they are, or in int8 with float16 scales: each channel of the keys has one, as some channels are far
larger than the others in every token, and each token of the values (KIVI, arXiv 2402.02750).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from memory_os.errors import StoreError
from memory_os.protocols import KV

if TYPE_CHECKING:
    import torch

__all__ = ["FORMAT", "decode", "encode", "least_bytes", "load", "problem"]

FORMAT = "1"
HALF_MAX = 65504.0


def least_bytes(kv: KV, dtype: str) -> int:
    """What the tensors take in a file; its header comes on top."""
    layers, heads, n_tokens, dim = kv.keys.shape
    numbers = 2 * kv.keys.numel()
    stored = 2 * numbers if dtype == "float16" else numbers + 2 * layers * heads * (dim + n_tokens)
    return stored + 4 * n_tokens


def encode(kv: KV, dtype: str, fingerprint: str, layer: int) -> bytes:
    """The content of an entry's file.

    :param layer: whose keys are searched; it stands in the file so that another one is another checksum.
    :raises StoreError: for numbers that float16 does not hold, or parts that do not belong together.
    """
    import torch
    from safetensors.numpy import save

    if kv.keys.shape != kv.values.shape or kv.keys.shape[2] != len(kv.ids):
        shapes = f"keys {tuple(kv.keys.shape)}, values {tuple(kv.values.shape)} and {len(kv.ids)} tokens"
        raise StoreError(f"the bank cannot keep {shapes}: they do not belong together")
    keys, values = _as_half(kv.keys), _as_half(kv.values)
    tensors = {"ids": torch.tensor(kv.ids, dtype=torch.int32), "keys": keys, "values": values}
    if dtype == "int8":
        tensors["keys"], tensors["key_scales"] = _quantised(keys, 2)
        tensors["values"], tensors["value_scales"] = _quantised(values, 3)
    metadata = {"format": FORMAT, "fingerprint": fingerprint, "layer": str(layer)}
    return save({name: tensor.numpy() for name, tensor in tensors.items()}, metadata)


def load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, mapped into memory: they are read as they are used."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def decode(tensors: Mapping[str, torch.Tensor], surprisal: float | None) -> KV:
    """Keys and values in float16."""
    keys, values = tensors["keys"], tensors["values"]
    if "key_scales" in tensors:
        keys, values = _dequantised(keys, tensors["key_scales"]), _dequantised(values, tensors["value_scales"])
    return KV(ids=tuple(tensors["ids"].tolist()), keys=keys, values=values, surprisal=surprisal)


def problem(path: Path, n_bytes: int, sha256: str, fingerprint: str) -> str | None:
    """What is wrong with a file that should be this one, as the end of a sentence; ``None`` where all is well."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.stat().st_size != n_bytes:
            return "has another size than it was written with"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                return "does not match its checksum"
        with safe_open(path, framework="numpy") as opened:
            if (opened.metadata() or {}).get("fingerprint") != fingerprint:
                return "was made by another model, prompt or form than its entry says"
    except FileNotFoundError:
        return "is missing"
    except (OSError, SafetensorError) as error:
        return f"cannot be read ({error})"
    return None


def _as_half(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    half = tensor.detach().to("cpu", torch.float16).contiguous()
    if not half.isfinite().all():
        raise StoreError(
            f"the bank keeps keys and values in float16, which ends at {HALF_MAX:.0f}; these are {tensor.dtype} and "
            f"reach {tensor.abs().max().item():.3g}, so this model's cannot be kept"
        )
    return half


def _quantised(half: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(int8, float16 scales)``, symmetric, with one scale for all numbers along the dimension."""
    import torch

    exact = half.float()
    scales = (exact.abs().amax(dim, keepdim=True) / 127).half()
    divisors = scales.float().where(scales > 0, 1.0)  # all zeros, or so small that they become zeros
    return (exact / divisors).round().clamp(-127, 127).to(torch.int8), scales


def _dequantised(stored: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    # a scale that was rounded up can lead beyond the end of float16
    return (stored.float() * scales.float()).clamp(-HALF_MAX, HALF_MAX).half()
