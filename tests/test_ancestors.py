"""Ancestral traces: every answer follows from all links of a chain, and from nothing else that is told."""

import random
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_os.benchmarks.ancestors import KINDS, LANGUAGES, Link, conversation, names, pedigree, solve
from memory_os.errors import InvalidInputError

languages = pytest.mark.parametrize("language", LANGUAGES)


def by_walking(links, family):
    """The answer to a pedigree's question by these links alone; None where they do not reach."""
    people = family.people
    found = solve(links, people[-1])
    if not found or found[-1][0] != people[0]:
        return None
    return {"descendant": people[-1], "distance": str(found[-1][1])}.get(family.kind, found[-1][0])


@cache
def everybody(language):
    return frozenset(names(language))


def people_in(text, language):
    sizes = {len(name) for name in everybody(language)}
    return {text[i : i + size] for size in sizes for i in range(len(text))} & everybody(language)


@languages
@given(n=st.integers(1, 12), kind=st.sampled_from(KINDS), seed=st.integers(0, 10_000))
@settings(max_examples=60)
def test_the_answer_is_what_a_walk_over_the_links_finds(language, n, kind, seed):
    rng = random.Random(seed)
    family = pedigree(n, rng.sample(names(language), n + 1), language=language, kind=kind, rng=rng)
    shuffled = rng.sample(family.links, n)
    assert by_walking(shuffled, family) == family.answer
    left_out = rng.randrange(n)
    assert by_walking([*family.links[:left_out], *family.links[left_out + 1 :]], family) != family.answer
    for link in family.links:
        assert link.elder in link.text
        assert link.younger in link.text


def test_an_example_by_hand():
    links = [Link("Ada", "Ben", 1, ""), Link("Cleo", "Ada", 2, ""), Link("Dora", "Eli", 1, "")]
    assert solve(links, "Ben") == [("Ada", 1), ("Cleo", 3)]
    assert solve(links, "Cleo") == []


@languages
def test_names_are_unique_and_no_part_of_each_other(language):
    pool = names(language)
    assert len(pool) == len(set(pool)) > 600
    if len({len(name) for name in pool}) > 1:  # names of one length are no part of each other
        joined = "\n".join(pool)
        assert all(joined.count(name) == 1 for name in pool)


@languages
@given(n_links=st.integers(1, 6), n=st.integers(1, 5), n_distractors=st.integers(0, 40), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_a_conversation_tells_each_link_once_among_others(language, n_links, n, n_distractors, seed):
    told = conversation(n_links, n, n_distractors, language=language, seed=seed)
    assert told == conversation(n_links, n, n_distractors, language=language, seed=seed)
    assert len(told.turns) == n * n_links + n_distractors
    texts = {turn.key: turn.text for turn in told.turns}
    evidence = [key for question in told.questions for key in question.evidence]
    assert len(set(evidence)) == len(evidence) == n * n_links
    for question in told.questions:
        mine = people_in(" ".join(texts[key] for key in question.evidence), language)
        assert len(mine) == n_links + 1
        others = " ".join(text for key, text in texts.items() if key not in question.evidence)
        assert not mine & people_in(others, language)


def test_more_people_than_there_are_names_for_are_refused():
    with pytest.raises(InvalidInputError, match="names"):
        conversation(2, 2, 100_000, language="en")


def test_another_seed_tells_something_else():
    one, two = (conversation(3, 2, 9, language="en", seed=seed) for seed in (0, 1))
    assert one.turns != two.turns
