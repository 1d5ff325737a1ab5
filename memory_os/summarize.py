"""Summaries of texts of any length, a document or a meeting: block by block, then level by level.

The recursive summarisation of SCM (arXiv 2304.13343). Stored passages are joined into blocks; each block is summarised
with the one before it as background; runs of summaries are summarised again, until one is left. Each summary is a
segment of its own, stored before the next is asked for, under a key made of its exact prompt: whoever runs it again,
after a kill or an error, asks the LLM only for what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TypeVar

from memory_os.ask import reply_to
from memory_os.derive import BATCH, catch_up, deferrable
from memory_os.errors import ConfigError, InvalidInputError, LLMError
from memory_os.ingest import check_text
from memory_os.lexical import language_of
from memory_os.protocols import LLM, Embedder, RecordStore
from memory_os.types import Namespace, NewSegment, Segment

__all__ = ["Summarizer", "Summary", "packed", "sources_of"]

T = TypeVar("T")

VERSION = 1
"""Of prompts and method; summaries by older ones are made again."""
DOCUMENT_BLOCK, MEETING_BLOCK, GROUP = 3000, 2800, 2300
FLASH = 500
"""A block of fewer tokens is background for the next one as it is, a longer one as its summary."""
OPENING_CHARS = 1200
BLOCK_WORDS, BLOCK_REPLY, THEME_REPLY = 500, 700, 60
SHRINK = 0.9
"""A level of more than this share of the tokens below it is the last."""
MARGIN = 64
"""Tokens kept free in the context window besides prompt and reply, for what merges where texts meet."""

BLOCK = {
    "en": "{background}{about}Section:\n{text}\n\nSummarise this section in at most {words} words. "
    'Begin with "This section describes". Keep names, places, numbers and dates.',
    "zh": "{background}{about}本节：\n{text}\n\n"
    "请用不超过{words}字概括本节，以“本节讲述”开头，保留人名、地名、数字和日期。",
}
BACKGROUND = {
    "en": "Background, what came before; do not repeat it:\n{text}\n\n",
    "zh": "背景，即前文内容，不要重复：\n{text}\n\n",
}
ABOUT = {"en": "A meeting about: {theme}\n\n", "zh": "会议主题：{theme}\n\n"}
THEME = {
    "en": "Opening of a meeting:\n{text}\n\nSay in one line what the meeting is about.\nTheme:",
    "zh": "会议开头：\n{text}\n\n请用一句话说明会议的主题。\n主题：",
}
REDUCE = {
    "en": "Summaries of consecutive sections:\n{text}\n\nMerge them into one summary of at most {words} words. "
    "Keep the most important 30 percent.",
    "zh": "以下是连续各节的概括：\n{text}\n\n请合并成一篇不超过{words}字的概括，只保留最重要的三成内容。",
}

Progress = Callable[[int, int, int], None]
"""Called with the level, how many of its summaries are there, and how many it will have."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What came of a text.

    :param levels: the summaries, those of the blocks first; the last level is ``text``.
    :param complete: whether one summary of the whole was reached.
    :param calls: how often the LLM was asked.
    :param found: how many summaries were there from an earlier run.
    """

    text: str
    levels: tuple[tuple[Segment, ...], ...]
    complete: bool
    notes: tuple[str, ...]
    calls: int
    found: int


@dataclass
class Summarizer:
    """One run over one source.

    :param progress: see ``Progress``.
    """

    store: RecordStore
    embedder: Embedder
    llm: LLM
    namespace: Namespace
    progress: Progress | None = None
    calls: int = 0
    found: int = 0
    notes: list[str] = field(default_factory=list)

    def run(self, passages: Sequence[Segment]) -> Summary:
        """Summarise stored passages of one source, in the order of ``seq``.

        :raises InvalidInputError: if there are none.
        :raises ConfigError: if the model's context window is too small.
        :raises LLMError: if the model fails or says nothing; what it said before is stored.
        """
        if not passages:
            raise InvalidInputError(
                "nothing of it is stored, so there is nothing to summarise; what was forgotten here comes back with "
                "ingest(..., restore=True), or memos ingest --restore"
            )
        meeting = passages[0].kind == "turn"
        levels = [self._blocks(passages, meeting)]
        complete = True
        while len(levels[-1]) > 1:
            below = levels[-1]
            levels.append(self._reduced(below, len(levels) + 1))
            # a model that heeds no limit could go on for ever
            if len(levels[-1]) > 1 and self._tokens(levels[-1]) > SHRINK * self._tokens(below):
                complete = False
                self.notes.append(f"level {len(levels)} is hardly shorter than the one below it; stopped there")
                break
        # few, or else the backlog's: as many as a change of embedder leaves are not made while somebody waits
        with deferrable():
            catch_up(self.store, self.embedder, self.namespace, limit=BATCH)
        text = "\n\n".join(segment.text for segment in levels[-1])
        return Summary(text, tuple(map(tuple, levels)), complete, tuple(self.notes), self.calls, self.found)

    # -- levels ----------------------------------------------------------------------------------------------------

    def _blocks(self, passages: Sequence[Segment], meeting: bool) -> list[Segment]:
        """A summary of each block, carrying flash memory: the block before it, or its summary if that is long."""
        about = [self._theme(passages)] if meeting else []
        theme = about[0].text.splitlines()[0] if about else ""
        reply = min(BLOCK_REPLY, self.llm.context_window // 5)
        empty = self._n(self._block_prompt("", "", theme, passages[0]))
        limit = self.llm.context_window - empty - 2 * reply - MARGIN  # the background is no longer than a reply
        if limit < reply:
            raise ConfigError(f"a context window of {self.llm.context_window} tokens is too small for summaries")
        limit = min(MEETING_BLOCK if meeting else DOCUMENT_BLOCK, limit)
        blocks = packed(passages, lambda passage: self._n(_line(passage, meeting) + "\n\n"), limit)
        summaries: list[Segment] = []
        carried, shown = "", list[Segment]()
        for n, block in enumerate(blocks):
            text = self._cut("\n\n".join(_line(passage, meeting) for passage in block), limit, block)
            prompt = self._block_prompt(text, carried, theme, block[0])
            summaries.append(self._summary(1, block, prompt, reply, n, len(blocks), [*about, *shown]))
            short = self._n(text) < min(FLASH, reply)
            carried, shown = (text, block) if short else (summaries[-1].text, summaries[-1:])
        return summaries

    def _theme(self, passages: Sequence[Segment]) -> Segment:
        opening: list[Segment] = []
        while len(opening) < len(passages) and sum(len(_line(p, True)) for p in opening) < OPENING_CHARS:
            opening.append(passages[len(opening)])
        text = "\n".join(_line(passage, True) for passage in opening)[:OPENING_CHARS]
        return self._summary(0, opening, THEME[language_of(text)].format(text=text), THEME_REPLY, 0, 1)

    @staticmethod
    def _block_prompt(text: str, carried: str, theme: str, first: Segment) -> str:
        language = language_of(text or first.text)
        background = BACKGROUND[language].format(text=carried) if carried else ""
        about = ABOUT[language].format(theme=theme) if theme else ""
        return BLOCK[language].format(text=text, background=background, about=about, words=BLOCK_WORDS)

    def _reduced(self, below: Sequence[Segment], level: int) -> list[Segment]:
        """A summary of each run of summaries that fits together."""
        empty = self._n(REDUCE[language_of(below[0].text)].format(text="", words=1000))
        room = self.llm.context_window - MARGIN - empty
        limit = min(GROUP, max(room // 2, 1))
        groups = packed(below, lambda summary: self._n(summary.text + "\n\n"), limit)
        made: list[Segment] = []
        for n, group in enumerate(groups):
            text = self._cut("\n\n".join(summary.text for summary in group), room - room // 4, group)
            target = max(min(4000 - max(self._n(text), GROUP) - 400, 1500 if len(groups) == 1 else 1000), 1)
            target = min(target, room // 4)
            language = language_of(text)
            words = target if language == "zh" else target * 3 // 4
            prompt = REDUCE[language].format(text=text, words=words)
            made.append(self._summary(level, group, prompt, target, n, len(groups)))
        return made

    # -- one summary -----------------------------------------------------------------------------------------------

    def _summary(
        self,
        level: int,
        of: Sequence[Segment],
        prompt: str,
        max_tokens: int,
        done: int,
        total: int,
        background: Sequence[Segment] = (),
    ) -> Segment:
        """The summary that this prompt gives: the stored one, or one that is made and stored now.

        :param background: what the prompt shows besides; parts of it may find their way into the summary.
        """
        if self.progress:
            self.progress(level, done, total)
        ids = [segment.id for segment in of]
        content = json.dumps([VERSION, self.llm.name, level, ids, max_tokens, prompt], ensure_ascii=False)
        key = f"summary.{hashlib.sha256(content.encode()).hexdigest()[:40]}"
        known = self.store.by_key(self.namespace, [key]).get(key)
        if known is None:
            self.calls += 1
            known = self._stored(level, of, background, self._said(prompt, max_tokens), key)
        else:
            self.found += 1
        if self.progress:
            self.progress(level, done + 1, total)
        return known

    def _said(self, prompt: str, max_tokens: int) -> str:
        text = reply_to(self.llm, prompt, max_tokens=max_tokens)
        try:
            return check_text(text)
        except InvalidInputError as error:
            raise LLMError(self.llm.name, f"its summary cannot be kept: {error}; run it again") from error

    def _stored(self, level: int, of: Sequence[Segment], background: Sequence[Segment], text: str, key: str) -> Segment:
        first, last = of[0], of[-1]
        source = first.source or first.session
        what = "theme" if level == 0 else "summary"
        ids = {"of": [segment.id for segment in of], "background": [segment.id for segment in background]}
        new = NewSegment(
            text,
            first.session,
            role="system",
            speaker=f"{what} of {PurePath(source).name or source}",
            kind="summary",
            created_at=last.created_at,
            source=source,
            offset=(first.offset[0], last.offset[1]) if first.offset and last.offset else None,
            metadata={"level": level, **ids, "by": self.llm.name},
            key=key,
        )
        self.store.append(self.namespace, [new])
        stored = self.store.by_key(self.namespace, [key]).get(key)
        if stored is None:
            raise InvalidInputError("some of it was forgotten meanwhile; run it again", source=source)
        return stored

    # -- tokens ----------------------------------------------------------------------------------------------------

    def _n(self, text: str) -> int:
        return self.llm.count_text(text)

    def _tokens(self, level: Sequence[Segment]) -> int:
        return sum(self._n(segment.text) for segment in level)

    def _cut(self, text: str, limit: int, of: Sequence[Segment]) -> str:
        """The text, or so much of its beginning as has ``limit`` tokens: only one that is too long by itself is cut."""
        n = self._n(text)
        if n <= limit or len(of) > 1:
            return text
        low, high = 0, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._n(text[:middle]) <= limit else (low, middle - 1)
        self.notes.append(f"#{of[0].seq} has {n} tokens and was cut to {limit}")
        return text[:low]


def packed(items: Sequence[T], cost: Callable[[T], int], limit: int) -> list[list[T]]:
    """Runs of neighbouring items of at most ``limit`` tokens together; one that is longer is a run of its own.

    >>> packed([3, 3, 9, 2, 2, 2], lambda item: item, 6)
    [[3, 3], [9], [2, 2, 2]]
    """
    runs: list[list[T]] = []
    left = 0
    for item in items:
        tokens = cost(item)
        if not runs or tokens > left:
            runs.append([])
            left = limit
        runs[-1].append(item)
        left -= tokens
    return runs


def sources_of(store: RecordStore, namespace: Namespace, summary: Segment) -> list[Segment]:
    """The stored passages that a summary was made of, through all levels, in the order of ``seq``."""
    seen, found, open_ends = {summary.id}, list[Segment](), [summary]
    while open_ends:
        of = open_ends.pop().metadata.get("of")
        new = set(of if isinstance(of, list) else ()) - seen  # an import may hold anything
        seen |= new
        for segment in store.get(namespace, new).values():
            (open_ends if segment.kind == "summary" else found).append(segment)
    return sorted(found, key=lambda segment: segment.seq)


def _line(passage: Segment, meeting: bool) -> str:
    return f"{passage.who}: {passage.text}" if meeting else passage.text
