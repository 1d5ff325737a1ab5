"""Citations in a reply, such as ``[#12]``: those of what was not shown are taken out, while the reply is streamed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import regex

__all__ = ["Citations"]

MAX_CHARS = 80
"""So much of a reply is held back at most, to see whether a bracket that was opened is a citation."""

_NUMBER = r"\d{1,18}"  # no segment has a longer one
_ONE = rf"[#S]{_NUMBER}(?:\.{_NUMBER})?"
_CITATION = regex.compile(
    rf"\s{{0,{MAX_CHARS}}}\[\s*({_ONE}(?:\s*[,;，；、]\s*(?:{_ONE}|{_NUMBER}))*)\s*\]", regex.IGNORECASE
)
_OPEN = regex.compile(rf"\s{{0,{MAX_CHARS}}}(?:\[[^\[\]]{{0,{MAX_CHARS}}})?\Z")
_SEQ = regex.compile(r"(\d+)(?:\.\d+)?")


class Citations:
    """Checks the citations of one reply.

    >>> citations = Citations({12: "a", 13: "b"})
    >>> "".join(citations.check(["He lives in Oslo [#1", "2, #40] and sails [#7]."]))
    'He lives in Oslo [#12] and sails.'
    >>> citations.cited, citations.invented
    (('a',), ('#40', '#7'))

    :param shown: the segments that may be cited, id by ``seq``.
    """

    def __init__(self, shown: Mapping[int, str]) -> None:
        self._shown = shown
        self._cited: dict[str, None] = {}
        self._invented: dict[str, None] = {}

    @property
    def cited(self) -> tuple[str, ...]:
        """Ids of the segments that were cited so far, in order."""
        return tuple(self._cited)

    @property
    def invented(self) -> tuple[str, ...]:
        """What was cited and not shown."""
        return tuple(self._invented)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the trace should say of it."""
        if not self._invented:
            return ()
        return (f"the reply cited what it was not shown, which was taken out: {', '.join(self._invented)}",)

    def check(self, pieces: Iterable[str]) -> Iterator[str]:
        """The reply, piece by piece, with the citations that stand."""
        held = ""
        for piece in pieces:
            held += piece
            unfinished = _OPEN.search(held, max(0, len(held) - 2 * MAX_CHARS - 1))
            end = unfinished.start() if unfinished else len(held)
            if ready := _CITATION.sub(self._read, held[:end]):
                yield ready
            held = held[end:]
        if held:
            yield _CITATION.sub(self._read, held)

    def _read(self, match: regex.Match[str]) -> str:
        seqs = dict.fromkeys(int(each) for each in _SEQ.findall(match[1]))
        self._cited.update((self._shown[seq], None) for seq in seqs if seq in self._shown)
        self._invented.update((f"#{seq}", None) for seq in seqs if seq not in self._shown)
        standing = ", ".join(f"#{seq}" for seq in seqs if seq in self._shown)
        before = match[0][: len(match[0]) - len(match[0].lstrip())]
        return f"{before}[{standing}]" if standing else ""
