"""What a question asks for, as far as words tell it: its kind, the people and the dates that it names. No model.

The rules know English, and the commonest words of Chinese; a question in another language is of no special kind.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

from memory_os.lexical import query_terms, stem

__all__ = ["Question", "read_question", "tells_time"]

KINDS = {
    "when": re.compile(
        r"^\s*(when|since when|what (date|day|month|year)|how long|(in|on) (which|what) (day|month|year)|which year)\b"
        r"|什么时候|何时|哪[天年]|几月|几号|多久",
        re.IGNORECASE,
    ),
    "open": re.compile(
        r"^\s*(would|could|is|does|do|did|might|has|have|are|was|were|can|should)\b|\b(might|likely|would)\b|[吗嗎][？?]?\s*$",
        re.IGNORECASE,
    ),
    "list": re.compile(
        r"\b(what|which) (\w+ )?\w*s\b (has|have|did|does|do|are|were)\b|\b(has|have|both|how many|all)\b|\bin common\b"
        r"|\b(activities|types|kinds)\b|哪些|多少|几个",
        re.IGNORECASE,
    ),
}
"""``when`` asks for a time; ``open`` for a judgement; ``list`` for several things, told at several times."""

MONTHS = {name.lower(): number for number, name in enumerate(calendar.month_name) if name}
_MONTH = "|".join(MONTHS)
_DATES = re.compile(
    rf"(?P<y1>(?:19|20)\d\d)-(?P<m1>\d\d?)-(?P<d1>\d\d?)"
    rf"|(?:(?P<d2>\d\d?)(?:st|nd|rd|th)?,? (?:of )?)?\b(?P<m2>{_MONTH})\b(?:,? (?P<d3>\d\d?)(?:st|nd|rd|th)?\b(?!\d))?"
    r"(?:,? (?:of )?(?P<y2>(?:19|20)\d\d))?"
    r"|(?:(?P<y4>(?:19|20)\d\d)年)?(?P<m4>\d\d?)月(?:(?P<d4>\d\d?)[日号])?",
    re.IGNORECASE,
)
_AGO = re.compile(
    r"\b(?P<n>\d+|an?|one|two|three|four|five|six) (?P<unit>day|week|month|year)s? ago\b"
    r"|\b(?P<last>yesterday|today|last (?:night|week|month|year))\b|(?P<zh>昨天|前天|今天|上周|上个月|去年)",
    re.IGNORECASE,
)
_NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
_DAYS = {"day": 1, "week": 7, "month": 30, "year": 365}
_LAST = {"today": 0, "yesterday": 1, "last night": 1, "last week": 7, "last month": 30, "last year": 365}
_LAST |= {"今天": 0, "昨天": 1, "前天": 2, "上周": 7, "上个月": 30, "去年": 365}

TIME_TERMS = frozenset(
    stem(word)
    for word in """yesterday today tonight tomorrow last next ago week weekend month year day recently morning evening
    since soon monday tuesday wednesday thursday friday saturday sunday january february march april june july august
    september october november december 昨天 今天 明天 上周 下周 去年 今年 明年 上个 星期 周末""".split()
)
_YEAR = re.compile(r"(?:19|20)\d\d")


@dataclass(frozen=True, slots=True)
class Question:
    """A question, read.

    :param terms: the terms to look up; ``rest`` are those that name no speaker.
    :param kinds: of ``KINDS``, those that it is of.
    :param speaker: the one speaker whom it names; ``None`` for none or several.
    :param days: the days that it may mean, as ordinals, each with 1 if it names the day itself and not only a month.
    """

    terms: tuple[str, ...]
    rest: tuple[str, ...]
    kinds: frozenset[str]
    speaker: str | None
    days: tuple[tuple[int, bool], ...]


def read_question(text: str, speakers: Iterable[str], years: Sequence[int], today: date) -> Question:
    """Read a question.

    :param speakers: who speaks in the memory.
    :param years: the years that a date without one may be of.
    :param today: what "last week" counts from.
    """
    terms = query_terms(text)
    named = _named(text, speakers)
    names = {stem(word.casefold()) for name in named for word in name.split()}
    rest = tuple(term for term in terms if term not in names)
    return Question(
        terms=tuple(terms),
        rest=rest or tuple(terms),
        kinds=frozenset(kind for kind, pattern in KINDS.items() if pattern.search(text)),
        speaker=named[0] if len(named) == 1 else None,
        days=tuple(_days(text, years, today)),
    )


def _named(text: str, speakers: Iterable[str]) -> list[str]:
    """The speakers whom the question names, by a whole word or by the capitalised beginning of one (Mel: Melanie)."""
    words = set(re.findall(r"\w+", text))
    folded = {word.casefold() for word in words}
    short = [word.casefold() for word in words if len(word) > 2 and word[0].isupper()]
    return [
        speaker
        for speaker in speakers
        if any(part in folded or part.startswith(tuple(short)) for part in speaker.casefold().split())
    ]


def _days(text: str, years: Sequence[int], today: date) -> Iterable[tuple[int, bool]]:
    for match in _DATES.finditer(text):
        group = match.groupdict()
        name = group["m2"]
        if name and name.lower() in ("may", "march") and not name[0].isupper():
            continue  # the verb
        month = MONTHS[name.lower()] if name else int(group["m1"] or group["m4"])
        day = next((int(group[key]) for key in ("d1", "d2", "d3", "d4") if group[key]), 0)
        year = next((int(group[key]) for key in ("y1", "y2", "y4") if group[key]), 0)
        for each in [year] if year else years:
            if 1 <= month <= 12 and day <= calendar.monthrange(each, month)[1]:
                yield date(each, month, day or 15).toordinal(), bool(day)
    for match in _AGO.finditer(text):
        if match["n"]:
            n = _NUMBERS.get(match["n"].lower()) or int(match["n"])
            back, exact = n * _DAYS[match["unit"].lower()], match["unit"].lower() == "day"
        else:
            back = _LAST[(match["last"] or match["zh"]).lower()]
            exact = back <= 2
        yield (today - timedelta(days=min(back, today.toordinal() - 1))).toordinal(), exact


def tells_time(terms: Sequence[str]) -> bool:
    """Whether a text says when something was or will be.

    >>> tells_time(["i", "paint", "yesterday"]), tells_time(["i", "paint"])
    (True, False)
    """
    # isdigit first: most texts have no number at all, and recall asks this of every segment
    return not TIME_TERMS.isdisjoint(terms) or any(
        len(t) == 4 and _YEAR.fullmatch(t) is not None for t in filter(str.isdigit, terms)
    )
