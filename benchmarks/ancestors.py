"""The Ancestral Trace Challenge (NeedleBench, arXiv 2407.11963) as memory: one relation a turn, asked about at the end.

A trace is a chain of relations such as "Torin is the father of Ulrika". No single turn answers its question: all of its
links must be found, and each is found by a name that the link before it tells. Other families' relations, told in the
same words, and small talk stand between. Everything is drawn from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Literal, NamedTuple

from memory_os.benchmarks.measure import Conversation, Question, Turn
from memory_os.errors import InvalidInputError

__all__ = ["KINDS", "LANGUAGES", "Language", "Link", "Pedigree", "conversation", "names", "pedigree", "solve"]

Language = Literal["en", "zh"]
Kind = Literal["eldest", "ancestor", "descendant", "distance"]

LANGUAGES: tuple[Language, ...] = ("en", "zh")
KINDS: tuple[Kind, ...] = ("eldest", "ancestor", "descendant", "distance")
FAMILY = 4
"""Links in each family of the distractors."""
SMALL_TALK_SHARE = 0.25
"""Of the distractors."""


class Relation(NamedTuple):
    """A word for a relation, and how many generations it spans."""

    elder: str
    younger: str
    step: int


RELATIONS: dict[Language, tuple[Relation, ...]] = {
    "en": (
        Relation("father", "son", 1), Relation("mother", "daughter", 1), Relation("father", "daughter", 1),
        Relation("mother", "son", 1), Relation("grandfather", "grandson", 2),
        Relation("grandmother", "granddaughter", 2),
    ),
    "zh": (
        Relation("父亲", "儿子", 1), Relation("母亲", "女儿", 1), Relation("父亲", "女儿", 1),
        Relation("母亲", "儿子", 1), Relation("祖父", "孙子", 2), Relation("祖母", "孙女", 2),
    ),
}  # fmt: skip
TOLD: dict[Language, tuple[str, ...]] = {
    "en": (
        "{a} is the {elder} of {b}.",
        "{b} is the {younger} of {a}.",
        "{b}'s {elder} is called {a}.",
        "Somebody told me that {a} is {b}'s {elder}.",
    ),
    "zh": ("{a}是{b}的{elder}。", "{b}是{a}的{younger}。", "{b}的{elder}叫{a}。", "听人说{a}是{b}的{elder}。"),
}
ASKED: dict[Language, dict[Kind, str]] = {
    "en": {
        "eldest": "Who is the eldest ancestor of {young} that is known?",
        "ancestor": "Who is the ancestor of {young}, {n} generations before?",
        "descendant": "Who is the descendant of {old}, {n} generations later?",
        "distance": "How many generations lie between {young} and {old}?",
    },
    "zh": {
        "eldest": "{young}已知的最年长的祖先是谁？",
        "ancestor": "{young}往上第{n}代的祖先是谁？",
        "descendant": "{old}往下第{n}代的后代是谁？",
        "distance": "{young}和{old}之间隔了几代？",
    },
}
SMALL_TALK: dict[Language, tuple[str, ...]] = {
    "en": (
        "It rained all morning and I forgot my umbrella.", "The train was late again, by half an hour.",
        "I tried a new recipe for lentil soup yesterday.", "The garden needs weeding before the weekend.",
        "My phone's battery does not last a day any more.", "They are painting the stairs of our house green.",
    ),
    "zh": (
        "今天早上一直在下雨，我忘了带伞。", "火车又晚点了半个小时。", "昨天我试着做了一种新的扁豆汤。",
        "周末之前花园该除草了。", "我的手机电池用不了一天了。", "他们正在把楼梯漆成绿色。",
    ),
}  # fmt: skip

ONSETS = "B D F G H J K L M N P R S T V W Z Br Dr Kl St Tr".split()
MIDDLES = "a e i o u ai ei".split()
CODAS = "bri dro fen gal hild kor len mir nor ric san tok ver wen".split()
SURNAMES = "赵钱孙李周吴郑王冯陈褚卫蒋沈韩杨朱秦尤许何吕施张孔曹严华金魏陶姜戚谢邹喻柏窦章苏"
GIVEN = "安辰德恩芳歌海佳凯乐梅宁鹏琴瑞松涛薇轩雅泽博彩丹帆刚浩慧建洁君康兰丽亮林玲龙露曼敏娜楠奇倩青蓉珊诗思婷彤伟文欣"


@dataclass(frozen=True, slots=True)
class Link:
    """One relation, as it is told.

    :param step: generations between the two.
    """

    elder: str
    younger: str
    step: int
    text: str


@dataclass(frozen=True, slots=True)
class Pedigree:
    """A chain of relations, the eldest first, with a question that all of them are needed for."""

    links: tuple[Link, ...]
    kind: Kind
    question: str
    answer: str

    @property
    def people(self) -> tuple[str, ...]:
        """Everybody in it, the eldest first."""
        return (self.links[0].elder, *(link.younger for link in self.links))


@cache
def names(language: Language) -> tuple[str, ...]:
    """Invented names, none of them a part of another: some 2,000 in English, and 100,000 in Chinese."""
    if language == "zh":
        return tuple(s + a + b for s in SURNAMES for a in GIVEN for b in GIVEN if a != b)
    return tuple(onset + middle + coda for onset in ONSETS for middle in MIDDLES for coda in CODAS)


def pedigree(n: int, people: Sequence[str], *, language: Language, kind: Kind, rng: random.Random) -> Pedigree:
    """A chain of ``n`` links between the first ``n + 1`` of these people."""
    chain = people[: n + 1]
    links = []
    for elder, younger in pairwise(chain):
        relation = rng.choice(RELATIONS[language])
        text = rng.choice(TOLD[language]).format(a=elder, b=younger, elder=relation.elder, younger=relation.younger)
        links.append(Link(elder, younger, relation.step, text))
    old, young, total = chain[0], chain[-1], sum(link.step for link in links)
    question = ASKED[language][kind].format(young=young, old=old, n=total)
    answer = {"eldest": old, "ancestor": old, "descendant": young, "distance": str(total)}[kind]
    return Pedigree(tuple(links), kind, question, answer)


def solve(links: Iterable[Link], person: str) -> list[tuple[str, int]]:
    """The ancestors of a person by these links, each with the generations between: a walk over the graph."""
    parents = {link.younger: link for link in links}
    found, generations = [], 0
    while link := parents.get(person):
        person, generations = link.elder, generations + link.step
        found.append((person, generations))
    return found


def conversation(n_links: int, n: int, n_distractors: int, *, language: Language, seed: int = 0) -> Conversation:
    """``n`` traces of so many links each, told in turns in any order among distractors, with their questions."""
    rng = random.Random(f"{seed} {n_links} {language}")
    n_people = n * (n_links + 1) + (n_distractors // FAMILY + 1) * (FAMILY + 1)
    if n_people > len(names(language)):
        raise InvalidInputError(f"{n_people} people are needed, and there are {len(names(language))} names")
    pool = iter(rng.sample(names(language), n_people))
    asked = [_family(n_links, pool, language, KINDS[i % len(KINDS)], rng) for i in range(n)]
    small_talk = [rng.choice(SMALL_TALK[language]) for _ in range(int(n_distractors * SMALL_TALK_SHARE))]
    others: list[str] = []
    while len(others) + len(small_talk) < n_distractors:
        others += [link.text for link in _family(FAMILY, pool, language, "eldest", rng).links]
    told = [link.text for each in asked for link in each.links] + small_talk
    told += others[: n_distractors - len(small_talk)]
    order = rng.sample(range(len(told)), len(told))
    turns = tuple(Turn(str(place), "family", told[i]) for place, i in enumerate(order))
    place_of = {told[i]: str(place) for place, i in enumerate(order)}
    questions = tuple(
        Question(each.question, tuple(place_of[link.text] for link in each.links), (each.kind,), answer=each.answer)
        for each in asked
    )
    return Conversation(f"traces of {n_links} links", turns, questions)


def _family(n: int, pool: Iterator[str], language: Language, kind: Kind, rng: random.Random) -> Pedigree:
    return pedigree(n, [next(pool) for _ in range(n + 1)], language=language, kind=kind, rng=rng)
