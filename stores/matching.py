"""Which of many byte strings stand in a block of bytes: in one pass, however many they are. Exact."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Matcher"]

WORD = 8  # bytes
BITS = 20
FEW = 50  # reading a block by words takes about as long
SPREAD = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio


class Matcher:
    """Finds these patterns.

    Blocks are read as words of 8 bytes. A pattern of 15 bytes or more holds a whole word of the block, beginning at one
    of its own first 8 bytes, wherever it stands; of a shorter one only the first word is known, so that blocks are read
    from each of 8 positions. What has a word in common is compared in full.

    :param few: so many are looked for one by one.
    """

    def __init__(self, patterns: Collection[bytes], *, few: int = FEW) -> None:
        many = len(patterns) > few
        self._one_by_one = [each for each in patterns if not many or len(each) < WORD]
        long = [each for each in patterns if many and len(each) >= 2 * WORD - 1]
        short = [each for each in patterns if many and WORD <= len(each) < 2 * WORD - 1]
        self._groups = [_Words(long, range(WORD), [0]), _Words(short, [0], range(WORD))]

    def found(self, block: bytes) -> set[bytes]:
        """Those that stand in the block."""
        there = {each for each in self._one_by_one if each in block}
        for group in self._groups:
            there.update(group.found(block))
        return there


class _Words:
    """Patterns by the words at these offsets in them; blocks are read from these starts."""

    def __init__(self, patterns: Collection[bytes], offsets: Sequence[int], starts: Sequence[int]) -> None:
        import numpy as np

        self._starts = starts if patterns else ()
        # by word, then by where in the pattern it is and how long that is: one look-up for all that begin alike
        self._known: dict[int, dict[tuple[int, int], set[bytes]]] = defaultdict(lambda: defaultdict(set))
        for each in patterns:
            for offset in offsets:
                word = int.from_bytes(each[offset : offset + WORD], "little")
                self._known[word][offset, len(each)].add(each)
        self._maybe = np.zeros(2**BITS, dtype=bool)
        self._maybe[_slots(np.array(list(self._known), dtype=np.uint64))] = True

    def found(self, block: bytes) -> Iterator[bytes]:
        import numpy as np

        for start in [start for start in self._starts if start + WORD <= len(block)]:
            words = np.frombuffer(block, dtype="<u8", offset=start, count=(len(block) - start) // WORD)
            for i in np.flatnonzero(self._maybe[_slots(words)]).tolist():
                for (offset, length), those in self._known.get(int(words[i]), {}).items():
                    at = start + WORD * i - offset
                    if at >= 0 and (each := block[at : at + length]) in those:
                        yield each


def _slots(words: NDArray[np.uint64]) -> NDArray[np.intp]:
    import numpy as np

    return ((words * np.uint64(SPREAD)) >> np.uint64(64 - BITS)).astype(np.intp)
