"""The SCM controller, its presets and ablations, beside the default controller: evidence, answers and what they cost.

Each dialogue is stored once, and every system reads the same store at the same budget. A question is asked in the
dialogue's own session, so that there is flash memory. Summaries by the LLM are kept in the store: systems that come
later find those of the ones before, and count no call for them.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memory_os.benchmarks.measure import TOKENIZER, Conversation, Progress, Question, squeezed, store
from memory_os.controllers.auto import AutoController
from memory_os.controllers.scm import ScmController
from memory_os.errors import InvalidInputError, UnknownNameError
from memory_os.lexical import language_of
from memory_os.memory import Memory
from memory_os.protocols import LLM, Controller
from memory_os.types import Context, Reason

__all__ = ["SYSTEMS", "compare", "token_f1"]

ANSWER_TOKENS = 96

SYSTEMS: dict[str, Callable[[Mapping[str, Any]], Controller]] = {
    "scm-paper": lambda options: ScmController.paper(**options),
    "scm-repo": lambda options: ScmController.repo(**options),
    "scm": lambda options: ScmController(**options),
    "auto": lambda options: AutoController(),
    "no-controller": lambda options: ScmController.paper(control=False, **options),
    "no-flash": lambda options: ScmController.paper(flash_turns=0, **options),
    "no-activation": lambda options: ScmController.paper(activate=False, **options),
}
"""By name; the last three are the ablations of ``scm-paper``."""


def token_f1(answer: str, reference: str) -> float:
    """Overlap of two answers as multisets of words; of characters where the reference is Chinese.

    Lower case, without punctuation and English articles, as SQuAD and LoCoMo compare.

    >>> token_f1("The cat is called Miso.", "Miso, a cat"), token_f1("北京", "在北京")
    (0.6666666666666666, 0.8)
    """
    mine, theirs = (_tokens(text, language_of(reference) == "zh") for text in (answer, reference))
    both = (Counter(mine) & Counter(theirs)).total()
    return 2 * both / (len(mine) + len(theirs)) if both else 0.0


def _tokens(text: str, by_character: bool) -> list[str]:
    if by_character:
        return re.findall(r"\w", text.lower())
    # by category, as references are full of typographic quotes, which an LLM writes straight
    bare = "".join(letter for letter in text.lower() if unicodedata.category(letter)[0] not in "PS")
    return [word for word in bare.split() if word not in ("a", "an", "the")]


def compare(
    conversations: Sequence[Conversation],
    *,
    systems: Sequence[str],
    budgets: Sequence[int],
    llm: LLM | None,
    answers: bool = True,
    options: Mapping[str, Any] | None = None,
    embedder: Any = "minilm",
    left_out: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The report, ready for JSON: see ``memos bench scm --help``.

    :param llm: asked by the gates, for summaries and, with ``answers``, for the answers.
    :param options: of every SCM controller, such as ``{"gate": "free"}``.
    """
    unknown = [name for name in systems if name not in SYSTEMS]
    if unknown:
        raise UnknownNameError("system", unknown[0], SYSTEMS)
    systems, budgets = list(dict.fromkeys(systems)), sorted(set(budgets))  # what is named twice must not count twice
    total = len(systems) * sum(len(conversation.questions) for conversation in conversations)
    if not total:
        raise InvalidInputError("there is no question with evidence in it")
    rows: defaultdict[tuple[str, str, int], list[dict[str, float]]] = defaultdict(list)
    done = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, conversation in enumerate(conversations):
            path = Path(folder) / f"{number}.db"
            with Memory.open(path, embedder=embedder, tokenizer=TOKENIZER) as memory:
                embedder = memory.parts.embedder
                ids = store(memory.namespace("bench"), conversation.turns)
            for name in systems:
                if progress:
                    progress(f"{name}, {conversation.name}", done, total)
                controller = SYSTEMS[name](options or {})
                with Memory.open(
                    path, embedder=embedder, tokenizer=TOKENIZER, llm=llm, controller=controller
                ) as memory:
                    scope = memory.namespace("bench").session("dialogue")
                    for question in conversation.questions:
                        for budget in budgets:
                            context = scope.context(question.text, budget=budget)
                            row = _row(context, question, ids, conversation)
                            if answers and llm:
                                said = "".join(llm.generate(context.messages, max_tokens=ANSWER_TOKENS))
                                row["f1"] = 100 * token_f1(said, question.answer)
                            for group in ("", *question.groups):
                                rows[name, group, budget].append(row)
                        done += 1
    groups = sorted({group for _, group, _ in rows if group})
    return {
        "systems": {
            name: {
                "overall": {str(budget): _means(rows[name, "", budget]) for budget in budgets},
                "by_group": {
                    group: {str(budget): _means(rows[name, group, budget]) for budget in budgets} for group in groups
                },
            }
            for name in systems
        },
        "llm": llm.name if llm else None,
        "left_out": left_out,
    }


def _row(context: Context, question: Question, ids: Mapping[str, str], conversation: Conversation) -> dict[str, float]:
    """What one context holds of the evidence, and what it cost."""
    shown = squeezed(" ".join(message["content"] for message in context.messages))
    texts = {ids[turn.key]: squeezed(turn.text) for turn in conversation.turns if turn.key in ids}
    evidence = [ids[key] for key in question.evidence]
    present = {entry.segment_id for entry in context.ledger if entry.form} | set(context.trace.flash)
    return {
        "recall": 100 * statistics.fmean(id_ in present and texts[id_] in shown for id_ in evidence),
        "partly": 100 * statistics.fmean(id_ in present and texts[id_] not in shown for id_ in evidence),
        "tokens": context.n_tokens,
        "calls": len(context.calls),
        "call_tokens": sum(call.prompt_tokens + call.reply_tokens for call in context.calls),
        "unreadable": 100.0 * any(call.verdict == "unreadable" for call in context.calls),
        "not_needed": 100.0 * _judged_unneeded(context),
    }


def _judged_unneeded(context: Context) -> bool:
    reasons = {entry.reason for entry in context.ledger}
    return reasons == {Reason.UNRELATED} or any("memory is not needed" in note for note in context.trace.notes)


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    means = {name: round(statistics.fmean(row[name] for row in rows), 2) for name in rows[0]} if rows else {}
    return {**means, "n": len(rows)}
