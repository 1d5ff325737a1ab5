"""Words to terms, and BM25 over terms, for any language.

Words of alphabetic scripts are case-folded, freed of Latin accents and stemmed (English Snowball). Scripts without
spaces are cut into n-grams: pairs for Chinese, Japanese and Korean, triples for Thai, Lao, Khmer and Burmese.

BM25 (Robertson and Zaragoza 2009, k1 = 1.2, b = 0.75) is computed here and not by FTS5, because FTS5's statistics
span the whole file: another namespace's text would move this one's scores.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, Literal

import regex

__all__ = ["K1", "STOP_WORDS", "B", "bm25", "idf", "language_of", "query_terms", "stem", "terms_of"]

K1, B = 1.2, 0.75

_PAIRS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\u30fc"
_TRIPLES = r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(
    rf"(?V1)(?P<pairs>[{_PAIRS}]+)|(?P<triples>[{_TRIPLES}]+)"
    rf"|(?P<word>[\p{{L}}\p{{N}}--{_PAIRS}{_TRIPLES}][\p{{L}}\p{{N}}\p{{M}}--{_PAIRS}{_TRIPLES}]*)"
)
_ASCII_WORD = re.compile(r"[a-z0-9]+")
_HAN = regex.compile(r"\p{Han}")
_LETTER = regex.compile(r"\p{L}")
_ACCENTS = regex.compile(r"[\u0300-\u036f]+")

STOP_WORDS = frozenset(
    """a about above after again against all am an and any are as at be because been before being below between both
    but by can could d did do does doing don down during each few for from further had has have having he her here hers
    him his how i if in into is it its itself just ll m me more most my no nor not now of off on once only or other our
    out over own re s same she should so some such t than that the their them then there these they this those through
    to too under until up ve very was we were what when where which while who whom why will with would you
    your""".split()
)


@cache
def _stemmer() -> Any:
    import snowballstemmer

    return snowballstemmer.stemmer("english")


@lru_cache(maxsize=100_000)
def stem(word: str) -> str:
    """The stem of a case-folded word."""
    if word.isdecimal():
        return word
    return str(_stemmer().stemWord(word))


def _words(text: str) -> Iterable[tuple[str, str]]:
    folded = _ACCENTS.sub("", unicodedata.normalize("NFKD", text)).casefold()
    for match in _WORD.finditer(unicodedata.normalize("NFC", folded)):
        yield match.lastgroup or "word", match.group()


def _ngrams(run: str, n: int) -> list[str]:
    return [run[i : i + n] for i in range(len(run) - n + 1)] or [run]


def terms_of(text: str) -> list[str]:
    """Every index term of ``text``, in order, with repeats.

    >>> terms_of("Painting the café")
    ['paint', 'the', 'cafe']
    >>> terms_of("北京大学")
    ['北京', '京大', '大学', '北', '京', '大', '学']
    >>> terms_of("iPhone手机")
    ['iphon', '手机', '手', '机']
    """
    if text.isascii():  # the same, ten times as fast: nothing to fold but case, and only words
        return list(map(stem, _ASCII_WORD.findall(text.lower())))
    terms: list[str] = []
    for script, run in _words(text):
        if script == "word":
            terms.append(stem(run))
        elif script == "pairs":
            # single characters too, so that a question for one character finds it
            terms.extend(_ngrams(run, 2) + (list(run) if len(run) > 1 else []))
        else:
            terms.extend(_ngrams(run, 3))
    return terms


def query_terms(text: str) -> list[str]:
    """The distinct terms to look up: stop words are left out unless there is nothing else.

    >>> query_terms("What did Ana paint?")
    ['ana', 'paint']
    """
    content: dict[str, None] = {}
    stop: dict[str, None] = {}
    for script, run in _words(text):
        if script == "word":
            (stop if run in STOP_WORDS else content)[stem(run)] = None
        else:
            content.update(dict.fromkeys(_ngrams(run, 2 if script == "pairs" else 3)))
    return list(content or stop)


def idf(n_segments: int, n_matching: int) -> float:
    """Inverse document frequency in its always-positive form.

    :param n_segments: segments in the namespace.
    :param n_matching: segments that hold the term.
    """
    return math.log(1.0 + (n_segments - n_matching + 0.5) / (n_matching + 0.5))


def bm25(document: Sequence[str], weights: Mapping[str, float], mean_length: float) -> float:
    """BM25 of one document.

    :param document: its terms, with repeats.
    :param weights: idf by query term.
    :param mean_length: terms per document, on average.
    """
    counts = Counter(term for term in document if term in weights)
    norm = K1 * (1.0 - B + B * len(document) / mean_length)
    return sum(weights[term] * n * (K1 + 1.0) / (n + norm) for term, n in counts.items())


def language_of(text: str) -> Literal["en", "zh"]:
    """In which language to ask an LLM about a text: Chinese where its letters are mostly Han, else English.

    >>> language_of("话说天下大势，分久必合"), language_of("Call me Ishmael.")
    ('zh', 'en')
    """
    return "zh" if 2 * len(_HAN.findall(text)) > len(_LETTER.findall(text)) else "en"
