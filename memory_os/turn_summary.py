"""The summary of one segment: by the LLM, or made of its own sentences.

SCM (arXiv 2304.13343) summarises a turn as one sentence for the user's part and one for the assistant's. Here each part
is a segment and has its own summary.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Generator
from threading import Event

from memory_os.fence import inert
from memory_os.lexical import language_of, query_terms
from memory_os.protocols import LLM
from memory_os.types import Message

__all__ = ["MAX_TOKENS", "by_llm", "extract", "prompt_for", "summarize"]

VERSION = 1
"""Of the prompts: what older ones made is not used."""
MAX_TOKENS = 96
SHARE = 0.3
"""An extract takes about this share of the text."""

PROMPTS = {
    "en": "Text:\n{text}\n\nSummarise the text in one sentence. Keep names, numbers and dates.\nSummary:",
    "zh": "原文：\n{text}\n\n请用一句话概括原文，保留人名、数字和日期。\n概括：",
}

_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")


def by_llm(llm: LLM) -> str:
    """The method of summaries by this LLM."""
    return f"llm {llm.name} v{VERSION}"


def prompt_for(text: str) -> str:
    """The prompt that asks for a text's summary, in the text's language."""
    return PROMPTS[language_of(text)].format(text=text)


def summarize(text: str, llm: LLM, stop: Event) -> str | None:
    """A text's summary by the LLM, or ``None`` if it was stopped, which it is at the next token.

    :raises LLMError: if the model fails.
    """
    messages: list[Message] = [{"role": "user", "content": inert(prompt_for(text))}]
    speaking = llm.generate(messages, max_tokens=MAX_TOKENS)
    pieces: list[str] = []
    try:
        for piece in speaking:
            if stop.is_set():
                return None
            pieces.append(piece)
    finally:
        if isinstance(speaking, Generator):
            speaking.close()
    return "".join(pieces).strip()


def extract(text: str) -> str:
    """The sentences that say most of what the text says, in its order: SumBasic (Nenkova and Vanderwende 2005).

    Sentences are taken by the mean probability of their words, and what is said once counts less from then on. At least
    one is taken, and no more than some three tenths of the text.

    >>> extract("Rex is a dog. It rained. Rex the dog likes cheese, and Rex likes to swim. Then we went home.")
    'Rex is a dog. It rained.'
    """
    sentences = [" ".join(sentence.split()) for sentence in _END.split(text) if sentence.strip()]
    terms = [query_terms(sentence) for sentence in sentences]
    counts = Counter(term for own in terms for term in own)
    total = sum(counts.values())
    if len(sentences) < 2 or not total:
        return text.strip()
    weight = {term: count / total for term, count in counts.items()}
    left, taken, room = set(range(len(sentences))), set[int](), SHARE * len(text)
    while left:
        best = max(left, key=lambda i: (sum(weight[t] for t in terms[i]) / (len(terms[i]) or 1), -i))
        left.remove(best)
        if taken and len(sentences[best]) > room:
            continue
        taken.add(best)
        room -= len(sentences[best])
        for term in set(terms[best]):
            weight[term] **= 2
        if room <= 0:
            break
    joint = "" if language_of(text) == "zh" else " "
    return joint.join(sentences[i] for i in sorted(taken))
