"""The questions that SCM's controller asks, of the LLM or without it (arXiv 2304.13343).

Prompts are short and in the language of what is asked about; an answer is an A or a B, and anything else is unreadable.
"""

from __future__ import annotations

import re
from typing import Literal

from memory_os.lexical import language_of, query_terms, terms_of

__all__ = ["MAX_TOKENS", "coverage", "helps_prompt", "needed_prompt", "read_verdict"]

MAX_TOKENS = 8
"""Of an answer: a letter or a word, and what a talkative model puts before it."""

NEEDED = {
    "en": "{flash}New message: {query}\n\n"
    "To answer the new message, is information from earlier conversation needed that is not shown above?\n"
    "A) yes\nB) no\nAnswer with A or B only.",
    "zh": "{flash}新消息：{query}\n\n要回答这条新消息，是否需要上面没有显示的历史对话内容？\n"
    "A) 需要\nB) 不需要\n只回答 A 或 B。",
}
SHOWN = {"en": "Latest messages:\n{flash}\n\n", "zh": "最近的消息：\n{flash}\n\n"}
HELPS = {
    "en": "Content:\n{text}\n\nQuestion: {query}\n\nCan the content help to answer the question?\n"
    "A) yes\nB) no\nAnswer with A or B only.",
    "zh": "内容：\n{text}\n\n问题：{query}\n\n这段内容能帮助回答这个问题吗？\nA) 能\nB) 不能\n只回答 A 或 B。",
}

_SAYS = r"\W*(?:(?:{letter}[).:：、]?\s*)?(?:{words})(?:\W*$|[,.;:!，。；：！])|{letter}\W*$)"
_OPTION = re.compile(r"\W*[AB]\W*[).:：、]", re.IGNORECASE)
_NO = re.compile(_SAYS.format(letter="B", words="no|不需要|不能|不可以|否|不"), re.IGNORECASE)
_YES = re.compile(_SAYS.format(letter="A", words="yes|需要|能|可以|是"), re.IGNORECASE)


def needed_prompt(query: str, flash: str) -> str:
    """Q1: whether anything is needed that is not in flash memory."""
    language = language_of(query)
    shown = SHOWN[language].format(flash=flash) if flash else ""
    return NEEDED[language].format(flash=shown, query=query)


def helps_prompt(query: str, text: str) -> str:
    """Q2: whether this content helps to answer; asked of a turn in full, then of its summary."""
    return HELPS[language_of(text)].format(text=text, query=query)


def read_verdict(answer: str) -> Literal["yes", "no", "unreadable"]:
    r"""What an answer says: its first line is a letter or word that was asked for, and means it; reasons may follow.

    >>> read_verdict("(B) no"), read_verdict("A"), read_verdict("不需要。"), read_verdict("Yes, it is.")
    ('no', 'yes', 'no', 'yes')
    >>> read_verdict("A good question!"), read_verdict("A) no"), read_verdict("不知道"), read_verdict("")
    ('unreadable', 'unreadable', 'unreadable', 'unreadable')
    >>> read_verdict("A) yes\nIt names the dog."), read_verdict("A) yes\nB) no")
    ('yes', 'unreadable')
    """
    first, *rest = answer.strip().splitlines() or [""]
    if any(_OPTION.match(line) for line in rest):  # it repeats what could be answered
        return "unreadable"
    if _NO.match(first):
        return "no"
    return "yes" if _YES.match(first) else "unreadable"


def coverage(query: str, text: str) -> float:
    """The share of the query's distinct terms that stand in the text, 1 where it has none: Q2 without the LLM.

    >>> coverage("Where does Rex sleep?", "Rex sleeps in the kitchen")
    1.0
    """
    wanted = set(query_terms(query))
    return len(wanted & set(terms_of(text))) / len(wanted) if wanted else 1.0
