"""LoCoMo: very long conversations of two people, and questions whose evidence turns are named."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memory_os.benchmarks.measure import Conversation, Question, Turn, read_json
from memory_os.errors import InvalidInputError
from memory_os.ingest import parse_time

__all__ = ["CATEGORIES", "evidence_of", "read", "turns_of"]

CATEGORIES = {"1": "multi-hop", "2": "temporal", "3": "open-domain", "4": "single-hop"}
UNANSWERABLE = 5

_EVIDENCE = re.compile(r"D:?(\d+):(\d+)")
_SESSION = re.compile(r"session_(\d+)")


def read(path: Path) -> tuple[list[Conversation], int]:
    """The conversations of a file, and how many questions were left out because nothing is known to answer them.

    :raises InvalidInputError: for a file that is not of LoCoMo's form.
    """
    data = read_json(path)
    try:
        conversations = [_conversation(item, number) for number, item in enumerate(data, start=1)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        problem = f"not of LoCoMo's form, a list of objects with 'conversation' and 'qa' ({error!r})"
        raise InvalidInputError(problem, source=str(path)) from error
    if not conversations:
        raise InvalidInputError("there is no conversation in it", source=str(path))
    return [conversation for conversation, _ in conversations], sum(left_out for _, left_out in conversations)


def _conversation(item: Mapping[str, Any], number: int) -> tuple[Conversation, int]:
    turns = turns_of(item)
    known = {turn.key for turn in turns}
    questions: list[Question] = []
    left_out = 0
    for asked in item["qa"]:
        category = int(asked["category"])
        evidence = tuple(key for key in evidence_of(asked) if key in known)
        if evidence:
            groups = () if category == UNANSWERABLE else (str(category),)
            questions.append(Question(str(asked["question"]), evidence, groups, category != UNANSWERABLE))
        elif category != UNANSWERABLE:
            left_out += 1
    return Conversation(str(item.get("sample_id", number)), tuple(turns), tuple(questions)), left_out


def turns_of(item: Mapping[str, Any]) -> list[Turn]:
    """The turns of one conversation, in order; a turn without text (a picture alone) says nothing and is left out."""
    inner = item["conversation"]
    turns: list[Turn] = []
    for number in sorted(int(match[1]) for name in inner if (match := _SESSION.fullmatch(name))):
        when = parse_time(inner[f"session_{number}_date_time"])
        turns += [
            Turn(said["dia_id"], str(number), said["text"], speaker=said["speaker"], when=when)
            for said in inner[f"session_{number}"]
            if said["text"].strip()
        ]
    return turns


def evidence_of(question: Mapping[str, Any]) -> list[str]:
    """Dialogue ids, also where they are written ``D8:6; D9:17`` or ``D:11:26``.

    >>> evidence_of({"evidence": ["D8:6; D9:17", "D:11:26", "D08:06", "D"]})
    ['D8:6', 'D9:17', 'D11:26']
    """
    found = _EVIDENCE.findall(" ".join(question.get("evidence") or []))
    return list(dict.fromkeys(f"D{int(session)}:{int(turn)}" for session, turn in found))
