"""Quotes: what a model claims to have copied is accepted when it stands in the stored text, and never otherwise."""

import string
from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from memory_os.citations import Citations
from memory_os.quotes import (
    MAX_CHARS,
    Claim,
    Fault,
    numbered,
    read_claims,
    spans_text,
    tokens_of,
    verify,
)
from memory_os.types import Segment

STORED = (
    "I was born in Oslo in 1998. My sister Ana is not allergic to nuts at all.",
    "We paid 1,250.50 euros for the boat. She said: “It’s the best boat in the harbour!”",
    "昨天我把钥匙放在厨房的抽屉里。我没有告诉小王。",
)


def segment(text, seq=1, namespace=("a",)):
    return Segment(f"id{seq}", seq, namespace, "s", "user", "Ana", "turn", text, datetime(2026, 1, 1, tzinfo=UTC), 9)


SHOWN = [sentence for seq, text in enumerate(STORED, start=1) for sentence in numbered(segment(text, seq))]


def verified(text, id_="", shown=SHOWN):
    return verify([Claim(id_, text)], shown)


def fault(text, id_="", shown=SHOWN):
    checked = verified(text, id_, shown)
    assert not checked.accepted
    return checked.rejected[0].fault


# -- sentences ---------------------------------------------------------------------------------------------------------


def test_sentences_are_numbered_with_their_places():
    assert [(s.id, s.text) for s in SHOWN[:3]] == [
        ("S1.1", "I was born in Oslo in 1998."),
        ("S1.2", "My sister Ana is not allergic to nuts at all."),
        ("S2.1", "We paid 1,250.50 euros for the boat."),
    ]
    assert [s.text for s in numbered(segment(STORED[2]))] == ["昨天我把钥匙放在厨房的抽屉里。", "我没有告诉小王。"]


@given(st.text(max_size=2000))
@example("x" * 3000)
@example("a\r\nb\u2028c\x85d" * 300)
def test_sentences_are_all_of_the_text_but_white_space(text):
    found = numbered(segment(text))
    assert "".join("".join(s.text for s in found).split()) == "".join(text.split())
    for sentence in found:
        assert sentence.text == text[sentence.start : sentence.end]
        assert sentence.text == sentence.text.strip()
        assert 0 < len(sentence.text) <= MAX_CHARS
    assert all(one.end <= two.start for one, two in pairwise(found))


def test_quotes_of_one_text_show_what_is_left_out():
    text = STORED[0] + " It rained."
    places = [(s.start, s.end) for s in numbered(segment(text))]
    assert spans_text(text, [places[2], places[0]]) == "I was born in Oslo in 1998. … It rained."
    assert spans_text(text, places[:2]) == STORED[0]


# -- what is accepted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "id_", "accepted"),
    [
        ("I was born in Oslo in 1998.", "S1.1", ["S1.1"]),
        ("  i WAS born\n in  Oslo in 1998", "S1.1", ["S1.1"]),
        ("“I was born in Oslo in 1998.”", "S1.1", ["S1.1"]),
        ('She said: "It\'s the best boat in the harbour!"', "S2.2", ["S2.2"]),
        ("She said: It's the best boat in the harbour", "S2.2", ["S2.2"]),
        ("We paid 1,250.50 euros for the boat.", "S9.9", ["S2.1"]),
        ("We paid 1,250.50 euros for the boat.", "", ["S2.1"]),
        ("my sister Ana is not allergic to nuts", "S1.2", ["S1.2"]),
        ("Ana is not allergic to nuts at all", "S1.1", ["S1.2"]),
        ("allergic to nuts at all", "S1.2", Fault.PART),
        ("is allergic to nuts at all", "S1.2", Fault.NEGATION),
        (STORED[0], "S1.1", ["S1.1", "S1.2"]),
        ("昨天我把钥匙放在厨房的抽屉里", "S3.1", ["S3.1"]),
        ("昨天 我把钥匙 放在厨房的抽屉里。", "S1.1", ["S3.1"]),
    ],
)
def test_what_stands_in_the_text_is_accepted_as_it_is_stored(claim, id_, accepted):
    checked = verified(claim, id_)
    if isinstance(accepted, Fault):
        assert [each.fault for each in checked.rejected] == [accepted]
        return
    assert [sentence.id for sentence in checked.accepted] == accepted
    assert all(sentence.text in STORED[sentence.segment.seq - 1] for sentence in checked.accepted)
    assert checked.hallucination_rate == 0.0


def test_a_part_stands_for_the_whole_so_that_no_negation_is_lost():
    shown = numbered(segment("I do not think he likes the new flat in Bergen."))
    assert [s.text for s in verified("he likes the new flat in Bergen", "S1.1", shown).accepted] == [shown[0].text]


def test_a_wrong_number_is_put_right_and_counted():
    checked = verify([Claim("S1.1", "We paid 1,250.50 euros for the boat."), Claim("S1.2", SHOWN[1].text)], SHOWN)
    assert [s.id for s in checked.accepted] == ["S2.1", "S1.2"]
    assert checked.moved == 1
    assert checked.n_claims == 2


def test_of_equal_sentences_the_named_one_then_the_newest_is_meant():
    shown = [s for seq in (1, 2, 3) for s in numbered(segment("It rained all day.", seq))]
    assert [s.id for s in verified("it rained all day", "S2.1", shown).accepted] == ["S2.1"]
    assert [s.id for s in verified("it rained all day", "", shown).accepted] == ["S3.1"]


# -- what is rejected --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "id_", "why"),
    [
        ("I was born in Oslo in 1989.", "S1.1", Fault.NUMBER),
        ("I was not born in Oslo in 1998.", "S1.1", Fault.NEGATION),
        ("My sister Ana is allergic to nuts at all.", "S1.2", Fault.NEGATION),
        ("We paid 125,050 euros for the boat.", "S2.1", Fault.NUMBER),
        ("We paid 1,250.5 euros for the boat.", "S2.1", Fault.NUMBER),
        ("I was born in Bergen in 1998.", "S1.1", Fault.INVENTED),
        ("I was born in Oslo, not allergic to nuts at all.", "S1.1", Fault.SPLICED),
        ("I was born in Oslo my sister Ana is not allergic", "S1.1", Fault.SPLICED),
        ("in 1998. My sister Ana", "S1.1", Fault.SPLICED),
        ("I was born in Oslo in 1998. We paid 1,250.50 euros for the boat.", "S1.1", Fault.SPLICED),
        ("我告诉小王。", "S3.2", Fault.NEGATION),
        ("昨天我把钥匙放在客厅的抽屉里。", "S3.1", Fault.INVENTED),
        ("The moon is made of green cheese.", "S1.1", Fault.INVENTED),
        ("  …  ", "S1.1", Fault.EMPTY),
        ("", "S1.1", Fault.EMPTY),
    ],
)
def test_what_does_not_stand_in_the_text_is_rejected(claim, id_, why):
    assert fault(claim, id_) == why


def test_a_quote_of_another_namespace_is_rejected():
    theirs = segment("The password of the vault is heron.", 1, ("b",))
    assert fault(theirs.text, "S1.1") == Fault.INVENTED


def test_without_any_sentence_everything_is_rejected():
    assert fault("I was born in Oslo.", "S1.1", []) == Fault.INVENTED


def test_the_rate_is_invented_claims_over_all():
    claims = [Claim("S1.1", SHOWN[0].text), Claim("S1.1", "No."), Claim("", "Not so."), Claim("S1.2", SHOWN[1].text)]
    assert verify(claims, SHOWN).hallucination_rate == 0.5
    assert verify([], SHOWN).hallucination_rate == 0.0


@pytest.mark.parametrize("sign", ["-", "\u2212"])
def test_a_minus_sign_belongs_to_its_number(sign):
    shown = numbered(segment(f"It was {sign}5 degrees in the hut."))
    assert fault("It was 5 degrees in the hut.", "S1.1", shown) == Fault.NUMBER
    assert verified("it was -5 degrees in the hut", "S1.1", shown).accepted


# -- properties --------------------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(categories=["L", "N", "M", "P", "S", "Zs", "Cf", "Cc"]), min_size=1, max_size=60)
TEXTS = st.lists(WORDS, min_size=1, max_size=4).map(". ".join)


@given(TEXTS, st.data())
def test_a_verified_quote_is_the_stored_text_at_its_span(text, data):
    """Over any Unicode text: whatever is claimed, what is handed on stands in the segment, to the character."""
    shown = numbered(segment(text))
    assume(shown)
    start = data.draw(st.integers(0, len(text) - 1))
    piece = text[start : data.draw(st.integers(start, len(text)))]
    claim = data.draw(st.sampled_from([text, piece, piece.upper(), f"“{piece}”", shown[0].text, shown[-1].text + " x"]))
    for sentence in verify([Claim("S1.1", claim)], shown).accepted:
        assert sentence.segment.text[sentence.start : sentence.end] == sentence.text
        assert sentence.text in text
        assert set(tokens_of(claim)) <= set(tokens_of(text)) | {token for s in shown for token in tokens_of(s.text)}


@given(TEXTS, st.data())
def test_a_copied_sentence_is_accepted_however_it_is_typed(text, data):
    shown = numbered(segment(text))
    sentence = data.draw(st.sampled_from(shown))
    assume(tokens_of(sentence.text))
    blanks = data.draw(st.sampled_from([" ", "  ", "\n", "\t "]))
    copied = blanks + blanks.join(sentence.text.split(" ")) + blanks
    copied = data.draw(st.sampled_from([copied, f"“{copied}”", f"'{copied}'"]))
    accepted = verify([Claim(sentence.id, copied)], shown).accepted
    assert [tokens_of(s.text) for s in accepted] == [tokens_of(sentence.text)]


LETTERS = st.text(string.ascii_lowercase, min_size=1, max_size=8)


@given(st.lists(LETTERS, min_size=2, max_size=12), st.data())
def test_a_word_that_is_added_left_out_or_changed_is_noticed(words, data):
    shown = numbered(segment(" ".join(words) + "."))
    place = data.draw(st.integers(1, len(words) - 1))
    other = data.draw(st.sampled_from(["not", "1998", "zzzzzzzzz"]))
    changed = data.draw(
        st.sampled_from([[*words[:place], other, *words[place:]], [*words[:place], other, *words[place + 1 :]]])
    )
    assume(changed != words)
    assert not verify([Claim("S1.1", " ".join(changed))], shown).accepted


# -- claims ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "claims"),
    [
        ("- S1.1: I was born.\n- S1.2: It rained.", [("S1.1", "I was born."), ("S1.2", "It rained.")]),
        ("1. [s1.1] I was born.", [("S1.1", "I was born.")]),
        ("* (S12.3) - 5 degrees", [("S12.3", "5 degrees")]),
        ("I was born. [S1.1]", [("S1.1", "I was born.")]),
        ("“I was born.” - S1.1", [("S1.1", "“I was born.”")]),
        ("- **S1.1**: I was born.", [("S1.1", "I was born.")]),
        ("**S1.1:** I was born.", [("S1.1", "I was born.")]),
        ("| S1.1 | I was born. |", [("S1.1", "I was born.")]),
        ("`S1.1` I was born.", [("S1.1", "I was born.")]),
        ("- S1.1、我生在海州。", [("S1.1", "我生在海州。")]),
        ("- S1.1, S1.2: I was born.", [("S1.1", "I was born.")]),
        ("Sentence S1.1: I was born.", [("S1.1", "I was born.")]),
        ("S1.1\nI was born.", [("S1.1", "I was born.")]),
        ("- S1.1: -5 degrees", [("S1.1", "-5 degrees")]),
        ("-5 degrees", [("", "-5 degrees")]),
        ('{"evidence": [{"id": "S1.1", "sentence": "I was born."}]}', [("S1.1", "I was born.")]),
        ('{"evidence": {"S1.1": "I was born."}}', [("S1.1", "I was born.")]),
        ("S1.1", [("S1.1", "")]),
        ("Here are the sentences:\n- S1.1: I was born.", [("S1.1", "I was born.")]),
        ("I was born.", [("", "I was born.")]),
        ('{"evidence": [{"id": "S1.1", "quote": "I was born."}]}', [("S1.1", "I was born.")]),
        ('```json\n{"evidence": [{"id": "[S1.1]", "quote": "Yes."}]}\n```', [("S1.1", "Yes.")]),
        ('{"evidence": [{"id": "S1.1", "quote": "Yes."}, {"id": "S1.2", "quo', [("S1.1", "Yes.")]),
        ("- S1.1: Type ```ls``` and ```cd```.", [("S1.1", "Type ```ls``` and ```cd```.")]),
        ('{"evidence": ["S1.1: Yes."]}', [("S1.1", "Yes.")]),
        ('[{"id": "S1.1", "quote": "Yes."}]', [("S1.1", "Yes.")]),
        ('{"evidence": []}', []),
        ("NONE", []),
        ("None.", []),
        ("无", []),
        ("There are no relevant sentences.", []),
        ("S1.1: There is no evidence of it.", [("S1.1", "There is no evidence of it.")]),
        ("", None),
        ("```\n```", None),
        ('{"evidence": 7}', None),
        ('{"evid', None),
    ],
)  # fmt: skip
def test_claims_are_read_from_lines_and_from_json(answer, claims):
    found = read_claims(answer)
    assert (found if found is None else [(claim.id, claim.text) for claim in found]) == claims


@given(st.text(max_size=300))
@example('{"evidence": [null, 3, [], {}]}')
@example("[[[[[[[[")
def test_no_answer_breaks_the_parser(answer):
    for claim in read_claims(answer) or ():
        verify([claim], SHOWN)


# -- citations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "shown", "cited", "invented"),
    [
        ("He sails [#3].", "He sails [#3].", ("c",), ()),
        ("He sails [#9].", "He sails.", (), ("#9",)),
        ("He sails [#3, #9] and rows [S4.2].", "He sails [#3] and rows [#4].", ("c", "d"), ("#9",)),
        ("An array a[3] and [a list] stay.", "An array a[3] and [a list] stay.", (), ()),
        ("It ends with [", "It ends with [", (), ()),
        ("[#3]", "[#3]", ("c",), ()),
    ],
)
def test_citations_of_what_was_not_shown_are_taken_out(reply, shown, cited, invented):
    for size in (1, 2, 3, 100):  # however the reply is cut into pieces
        citations = Citations({3: "c", 4: "d"})
        pieces = [reply[i : i + size] for i in range(0, len(reply), size)]
        assert "".join(citations.check(pieces)) == shown
        assert (citations.cited, citations.invented) == (cited, invented)


@given(st.lists(st.text(alphabet="ab [#]S123.,\n", max_size=12), max_size=12))
def test_a_streamed_reply_is_checked_as_a_whole_one(pieces):
    streamed, whole = Citations({1: "a", 12: "b"}), Citations({1: "a", 12: "b"})
    assert "".join(streamed.check(pieces)) == "".join(whole.check(["".join(pieces)]))
    assert streamed.cited == whole.cited


@pytest.mark.parametrize("piece", [" ", "\n", "[", "[#1,", "]", "[ "])
def test_citations_take_linear_time_in_any_pieces(piece):
    """With quadratic time it does not come back."""
    n = 200_000
    for pieces in ([piece] * n, [f"x{piece * n}y"]):
        assert "".join(Citations({1: "a"}).check(pieces)) == "".join(pieces)


def test_a_number_that_no_segment_can_have_is_no_citation():
    citations = Citations({1: "a"})
    reply = f"Yes [#{'1' * 5000}]."
    assert "".join(citations.check([reply])) == reply
    assert citations.invented == ()


@pytest.mark.parametrize("answer", ["[" * 5000, '{"evidence": [{"id": ' + "[" * 5000 + "}", '{"a": ' * 5000])
def test_an_answer_nested_too_deep_is_one_that_cannot_be_read(answer):
    assert not read_claims(answer) or read_claims(answer) == [Claim("", answer)]
