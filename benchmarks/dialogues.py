"""Dialogues of a user and an assistant, with questions and reference answers, as in the SCM paper's test set.

Nobody named the evidence, so it is found: silver evidence is every turn that holds most of the words of the reference
answer. Questions without any are left out and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memory_os.benchmarks.measure import Conversation, Question, Turn, read_json
from memory_os.errors import InvalidInputError
from memory_os.lexical import query_terms, terms_of

__all__ = ["SHARE", "read", "silver"]

SHARE = 0.6
"""Evidence holds at least this share of the answer's distinct terms."""


def silver(answer: str, turns: Sequence[Turn]) -> tuple[str, ...]:
    """The keys of the turns that hold most of the answer.

    >>> turns = [Turn("1", "s", "My cat is called Miso."), Turn("2", "s", "A cat? How nice.")]
    >>> silver("Your cat Miso", turns)
    ('1',)
    """
    wanted = set(query_terms(answer))
    if not wanted:
        return ()
    return tuple(turn.key for turn in turns if len(wanted & set(terms_of(turn.text))) >= SHARE * len(wanted))


def read(paths: Sequence[Path]) -> tuple[list[Conversation], int]:
    """The dialogues of the files, and how many questions were left out because no turn holds their answer.

    :raises InvalidInputError: for a file that is not of the form of SCM's dialogues.
    """
    conversations: list[Conversation] = []
    left_out = 0
    for path in paths:
        data = read_json(path)
        try:
            for dialogue in data["dialogues"]:
                conversation, missing = _dialogue(dialogue, data["questions"], path.stem)
                conversations.append(conversation)
                left_out += missing
        except (KeyError, TypeError, AttributeError) as error:
            problem = f"not of the dialogues' form, an object with 'dialogues' and 'questions' ({error!r})"
            raise InvalidInputError(problem, source=str(path)) from error
    return conversations, left_out


def _dialogue(dialogue: Mapping[str, Any], asked: Sequence[Mapping[str, Any]], name: str) -> tuple[Conversation, int]:
    turns = tuple(
        Turn(str(number), "dialogue", text, role="assistant" if number % 2 else "user")
        for number, text in enumerate(dialogue["dialogue"])
        if text.strip()
    )
    own = [item for item in asked if item["id"] == dialogue["id"]]
    with_evidence = [(item, silver(item["answer"], turns)) for item in own]
    questions = tuple(
        Question(item["question"], evidence, (name, str(item.get("mode", "any mode"))), answer=item["answer"])
        for item, evidence in with_evidence
        if evidence
    )
    return Conversation(str(dialogue["id"]), turns, questions), len(own) - len(questions)
