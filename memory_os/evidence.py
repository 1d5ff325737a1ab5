"""What ALR² asks of an LLM (arXiv 2410.03227): first the evidence, then an answer from the evidence alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from memory_os.fence import defused
from memory_os.lexical import language_of
from memory_os.quotes import Rejected, Sentence

__all__ = ["NOT_IN_MEMORY", "SCHEMA", "answer_instruction", "evidence_prompt", "listed", "target_of"]

EVIDENCE = {
    "en": "Numbered sentences that were said or written before:\n\n{sentences}\n\n{known}Question: {query}\n\n"
    "Copy every sentence that is needed to answer the question, word for word, each on a line of its own with its "
    "number, like this:\n- S7.1: the sentence\nIf none of them is needed, answer NONE. Do not answer the question "
    "itself.{failed}",
    "zh": "以下是以前说过或写过的句子，带有编号：\n\n{sentences}\n\n{known}问题：{query}\n\n"
    "请逐字抄出回答问题所需的每一句，每句一行，带上编号，例如：\n- S7.1: 句子\n"
    "如果都不需要，只回答 NONE。不要直接回答问题。{failed}",
}
KNOWN = {"en": "Known so far:\n{quotes}\n\n", "zh": "目前已知：\n{quotes}\n\n"}
FAILED = {
    "en": "\n\nThese are not in the text above; copy only what stands there:\n{claims}",
    "zh": "\n\n下面这些不在上文中，只能抄上文里有的句子：\n{claims}",
}
ANSWER = {
    "en": "Answer only from the quotes in the memory block, and put after each statement the number of the quote that "
    "it follows from, such as [#7]. If they do not hold the answer, say that it is not in memory.",
    "zh": "只根据记忆中的引文回答，每个结论之后注明它所依据的引文编号，例如 [#7]。如果引文中没有答案，就说记忆里没有。",
}
NOT_IN_MEMORY = {"en": "That is not in memory.", "zh": "记忆里没有这个内容。"}

SCHEMA: dict[str, Any] = {
    "title": "evidence",
    "type": "object",
    "properties": {
        "evidence": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"id": {"type": "string"}, "quote": {"type": "string"}},
                "required": ["id", "quote"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["evidence"],
    "additionalProperties": False,
}
"""Of the evidence, for models that can be held to one."""


def evidence_prompt(
    query: str, shown: Sequence[Sentence], *, known: Sequence[Sentence] = (), failed: Sequence[Rejected] = ()
) -> str:
    """Stage one: asks for the sentences that a question needs, in the question's language.

    :param known: evidence that was found before, by an earlier hop.
    :param failed: claims of a first try that do not stand in the text.
    """
    language = language_of(query)
    quotes = KNOWN[language].format(quotes=target_of(known)) if known else ""
    claims = "\n".join(f"- {defused(each.claim.text)}" for each in failed)
    return EVIDENCE[language].format(
        sentences=listed(shown),
        known=quotes,
        query=query,
        failed=FAILED[language].format(claims=claims) if failed else "",
    )


def listed(shown: Iterable[Sentence]) -> str:
    """Sentences with their numbers, under a line with the speaker and the date of each segment."""
    lines: list[str] = []
    before = ""
    for sentence in shown:
        segment = sentence.segment
        if segment.id != before:
            before = segment.id
            lines.append(f"({defused(segment.who)}, {segment.created_at:%Y-%m-%d})")
        lines.append(f"{sentence.id}: {defused(sentence.text)}")
    return "\n".join(lines)


def target_of(quotes: Iterable[Sentence]) -> str:
    """What a model that extracts without a fault would answer, in the form in which ``listed`` shows it."""
    return "\n".join(f"- {sentence.id}: {defused(sentence.text)}" for sentence in quotes) or "NONE"


def answer_instruction(query: str) -> str:
    """Stage two: how to answer, in the query's language."""
    return ANSWER[language_of(query)]
