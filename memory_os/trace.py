"""Traces as data and as an answer to "why?": pure functions, no store, no rendering."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from memory_os.types import (
    Account,
    Action,
    Confirmation,
    Form,
    LedgerEntry,
    LLMCall,
    Outcome,
    Reason,
    Segment,
    Trace,
)

__all__ = [
    "Finding",
    "explain",
    "knows_less",
    "ledger_to_dicts",
    "part_in",
    "set_apart",
    "trace_from_dict",
    "trace_to_dict",
    "without_text",
]

FORMAT = 1


class Weighed(Protocol):
    """What has a score that is a sum."""

    @property
    def contributions(self) -> Mapping[str, float]:
        """What each signal added."""


def ledger_to_dicts(ledger: tuple[LedgerEntry, ...]) -> list[dict[str, Any]]:
    """Give back the ledger as JSON-ready dictionaries, one per candidate."""
    return [{**asdict(entry), "signals": dict(entry.signals)} for entry in ledger]


def trace_to_dict(trace: Trace) -> dict[str, Any]:
    """Give back the trace as JSON-ready data; ``trace_from_dict`` undoes it."""
    return {
        **asdict(trace),
        "format": FORMAT,
        "namespace": list(trace.namespace),
        "flash": list(trace.flash),
        "notes": list(trace.notes),
        "calls": [asdict(call) for call in trace.calls],
        "cited": list(trace.cited),
        "confirmation": _confirmation_to_dict(trace.confirmation),
        "created_at": trace.created_at.isoformat(),
        "ledger": ledger_to_dicts(trace.ledger),
    }


def trace_from_dict(data: Mapping[str, Any]) -> Trace:
    """Read what ``trace_to_dict`` wrote.

    :raises KeyError, TypeError, ValueError: for data of another form.
    """
    fields = {name: value for name, value in data.items() if name != "format"}
    ledger = tuple(
        LedgerEntry(
            **{
                **entry,
                "action": Action(entry["action"]),
                "form": Form(entry["form"]) if entry["form"] else None,
                "reason": Reason(entry["reason"]),
                "spans": tuple((start, end) for start, end in entry.get("spans", ())),
                "flags": tuple(entry.get("flags", ())),
            }
        )
        for entry in fields["ledger"]
    )
    return Trace(
        **{
            **fields,
            "namespace": tuple(fields["namespace"]),
            "flash": tuple(fields["flash"]),
            "notes": tuple(fields["notes"]),
            "calls": tuple(LLMCall(**call) for call in fields.get("calls", ())),
            "cited": tuple(fields.get("cited", ())),
            "confirmation": _confirmation_from_dict(fields.get("confirmation")),
            "created_at": datetime.fromisoformat(fields["created_at"]),
            "ledger": ledger,
            "account": Account(**fields["account"]),
            "outcome": Outcome(fields["outcome"]),
        }
    )


FORGOTTEN = "(forgotten)"
FAILED = " and failed: "  # what follows are the words of an LLM's server, which may repeat the prompt


def without_text(trace: Trace, gone: Collection[str]) -> Trace:
    """The trace without the words that it may have of these segments; the same where they had no part in its turn.

    What the LLM was asked and what went wrong are words of the whole turn: they go when one of the segments stood
    before the LLM or was a candidate. An answer that was told goes when it rests on one of them: its evidence, or else
    what the reply cites, or else what stood before the LLM. Numbers stay.
    """
    told = trace.confirmation
    rests_on: Sequence[str] = ()
    if told is not None and told.evidence is not None:
        rests_on = told.evidence
    elif told is not None:
        active = (entry.segment_id for entry in trace.ledger if entry.action is not Action.DROPPED)
        rests_on = trace.cited or (*trace.flash, *active)
    if told is not None and told.answer and any(id_ in gone for id_ in rests_on):
        trace = replace(trace, confirmation=replace(told, answer=FORGOTTEN))
    if not any(id_ in gone for id_ in (*trace.flash, *(entry.segment_id for entry in trace.ledger))):
        return trace
    return replace(
        trace,
        calls=tuple(replace(call, answer="", verdict=FORGOTTEN) for call in trace.calls),
        error=trace.error and FORGOTTEN,
        notes=tuple(note for note in trace.notes if FAILED not in note),
    )


def part_in(trace: Trace) -> set[str]:
    """The ids of all segments that have a part in a trace."""
    told = trace.confirmation.evidence if trace.confirmation else None
    offered = (entry.segment_id for entry in trace.ledger)
    named = (trace.query_id, trace.reply_id, *trace.flash, *offered, *trace.cited, *(told or ()))
    return {id_ for id_ in named if id_}


def knows_less(trace: Trace, other: Trace) -> bool:
    """Whether a trace was written before the other of the same turn: not yet its reply, or what was confirmed since."""
    if other.reply_id is not None and trace.reply_id is None:
        return True
    mine, told = trace.confirmation, other.confirmation
    return told is not None and (mine is None or mine.at.astimezone(UTC) < told.at.astimezone(UTC))


def _confirmation_to_dict(told: Confirmation | None) -> dict[str, Any] | None:
    return {**asdict(told), "at": told.at.isoformat()} if told else None


def _confirmation_from_dict(data: Mapping[str, Any] | None) -> Confirmation | None:
    if data is None:
        return None
    evidence = data["evidence"]
    return Confirmation(
        data["by"],
        data["answer"],
        datetime.fromisoformat(data["at"]),
        None if evidence is None else tuple(evidence),
    )


def set_apart(candidates: Sequence[Weighed]) -> list[list[tuple[str, float]]]:
    """For each candidate its contributions less the average candidate's, the weightiest first, zeros left out.

    What all candidates share says nothing about why this one; ``candidates`` are ledger entries or hits.
    """
    names = {name: None for candidate in candidates for name in candidate.contributions}
    means = {name: sum(c.contributions.get(name, 0.0) for c in candidates) / len(candidates) for name in names}
    apart = []
    for candidate in candidates:
        differences = [(name, round(candidate.contributions.get(name, 0.0) - means[name], 3)) for name in names]
        apart.append(sorted(((n, d) for n, d in differences if d), key=lambda pair: (-abs(pair[1]), pair[0])))
    return apart


@dataclass(frozen=True, slots=True)
class Finding:
    """Where an expected segment ended up.

    :param stage: ``stored``, ``flash``, ``recall``, ``decide``, ``pack`` or ``context``: the stage that lost it, or
        (``flash``, ``context``) the place where it stood in front of the model.
    :param present: whether the model saw it, at least in part.
    """

    stage: str
    present: bool
    sentence: str


def explain(trace: Trace, ref: str, segment: Segment | None) -> Finding:
    """Say which stage lost an expected segment.

    :param ref: how the user named it.
    :param segment: the segment, or ``None`` when the namespace holds none of that name.
    """
    if segment is None:
        return Finding("stored", False, f"segment {ref} is not stored in this namespace")
    name = f"segment #{segment.seq}"
    if segment.seq > trace.upto:
        return Finding("stored", False, f"{name} was stored after this turn, or is the turn's own query")
    if segment.id in trace.flash:
        return Finding("flash", True, f"{name} stood in the context as flash memory")
    entry = next((e for e in trace.ledger if e.segment_id == segment.id), None)
    if entry is None:
        return Finding(
            "recall", False, f"recall did not offer {name}: it was not among the {len(trace.ledger)} candidates"
        )
    if entry.action is Action.DROPPED:
        if entry.reason is Reason.OVER_BUDGET:
            return Finding(
                "pack",
                False,
                f"{name} was wanted (rank {entry.rank}), but its {entry.n_tokens} tokens no longer fitted",
            )
        return Finding(
            "decide", False, f"controller {trace.controller!r} dropped {name} (rank {entry.rank}): {entry.reason}"
        )
    how = "cut to fit" if entry.action is Action.TRIMMED else "as a quote" if entry.spans else "in full"
    return Finding("context", True, f"{name} stood in the context {how} ({entry.n_tokens} tokens, rank {entry.rank})")
