"""What recall weighs its signals by: learned, with their provenance (``weights.json``, benchmarks/train_recall.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["learned"]


@cache
def learned() -> Mapping[str, Any]:
    """The weights.

    ``with_tokens``, ``without_tokens`` and ``lexical_only`` by signal; ``price``, ``abstention`` and ``provenance``.
    """
    weights: dict[str, Any] = json.loads(Path(__file__).with_name("weights.json").read_text(encoding="utf-8"))
    return weights
