"""How certain an LLM is of its next word, and what that says of the segment before it: XL3M (arXiv 2405.17755).

Pure functions. Entropies and likelihoods are in nats; a relevance is higher-is-better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

from memory_os.errors import ConfigError
from memory_os.protocols import Reading
from memory_os.types import Certainty

if TYPE_CHECKING:
    from memory_os.protocols import Vector

__all__ = ["SCORES", "Score", "certainty_of", "entropy", "relevance", "stands_out"]

Score = Literal["entropy", "question_nll", "hybrid"]
SCORES: tuple[Score, ...] = get_args(Score)

EVEN = 1e-4
"""Entropies that differ by less than this (nats) tell nothing apart."""


def certainty_of(reading: Reading) -> Certainty:
    """What a reading says of its segment."""
    told = reading.question
    return Certainty(
        entropy=entropy(reading.next_token, complete=reading.complete),
        complete=reading.complete,
        question_nll=None if told is None else -float(told.mean()) if len(told) else 0.0,
    )


def entropy(log_probs: Vector, *, complete: bool = True) -> float:
    """``-sum p log p`` of a next-token distribution, in nats: the score of XL3M.

    Where only the likeliest tokens are known, the rest counts as one more token: a lower bound of the entropy.

    :param log_probs: of the whole vocabulary, or of the likeliest tokens, ``[n]``.
    """
    import numpy as np

    wide = log_probs.astype(np.float64)
    probs = np.exp(wide)
    # a token of probability 0 adds nothing, though its logarithm is minus infinity
    known = float(-(probs * np.where(probs > 0, wide, 0.0)).sum())
    if complete:
        return max(known, 0.0)
    rest = 1.0 - float(probs.sum())
    return max(known - rest * math.log(rest), 0.0) if rest > 0 else max(known, 0.0)


def relevance(certainties: Sequence[Certainty], score: Score) -> list[float]:
    """The relevance of segments for one question.

    ``entropy`` is XL3M's: the less, the better. ``question_nll`` is query likelihood, the older measure of information
    retrieval (Ponte and Croft 1998). ``hybrid`` is the sum of both, nats.

    :raises ConfigError: if the question's likelihood was not asked for.
    """
    if score == "entropy":
        return [-each.entropy for each in certainties]
    likelihoods = [each.question_nll for each in certainties]
    known = [value for value in likelihoods if value is not None]
    if len(known) < len(certainties):
        raise ConfigError(f"score {score!r} needs an LLM that can tell how likely the question is: HuggingFaceLLM")
    if score == "question_nll":
        return [-value for value in known]
    return [-each.entropy - value for each, value in zip(certainties, known, strict=True)]


def stands_out(values: Sequence[float]) -> bool:
    """Whether relevances tell segments apart; one alone has nothing to be told apart from."""
    return len(values) < 2 or max(values) - min(values) > EVEN
