"""Secrets in text: found by their form, and replaced by ``[REDACTED:kind]`` before anything is stored.

Only forms that hardly any other text has: prefixes that issuers chose so that they can be found, PEM blocks, passwords
where the text itself says so, and card numbers of known issuers whose check digit is right. A secret in plain words
("my password is the name of my cat") is not found.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from functools import cache
from typing import Any

from memory_os.errors import ConfigError, InvalidInputError
from memory_os.protocols import ItemChange
from memory_os.types import NewSegment, Trace

__all__ = [
    "Redact",
    "clean_change",
    "clean_key",
    "clean_segment",
    "clean_trace",
    "cleaned",
    "digest_of",
    "redactor",
    "secrets",
]

Redact = Callable[[str], str]
"""Gives back a text without its secrets; the same text if there are none."""

_TOKENS = {
    "anthropic-key": r"sk-ant-[A-Za-z0-9_-]{20,}",
    "openai-key": r"sk-(?!ant-)(?:[a-z]{2,12}-)?[A-Za-z0-9_-]{20,}",
    "aws-key": r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}",
    "google-key": r"AIza[A-Za-z0-9_-]{35}",
    "google-token": r"ya29\.[A-Za-z0-9_-]{20,}",
    "google-secret": r"GOCSPX-[A-Za-z0-9_-]{20,}",
    "github-token": r"gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,}",
    "gitlab-token": r"glpat-[A-Za-z0-9_-]{20,}",
    "slack-token": r"xox[abeprs]-[A-Za-z0-9-]{10,}|xapp-[0-9A-Za-z-]{20,}",
    "slack-webhook": r"https://hooks\.slack\.com/services/[A-Za-z0-9/_-]{20,}",
    "stripe-key": r"[sr]k_(?:live|test)_[A-Za-z0-9]{16,}|whsec_[A-Za-z0-9+/=]{20,}",
    "huggingface-token": r"hf_[A-Za-z0-9]{30,}",
    "npm-token": r"npm_[A-Za-z0-9]{36}",
    "pypi-token": r"pypi-[A-Za-z0-9_-]{50,}",
    "sendgrid-key": r"SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}",
    "telegram-token": r"\d{8,10}:AA[A-Za-z0-9_-]{33}",
    "jwt": r"(?<![_-])eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*",
}
_NAMED = (
    r"(?:password|passwd|passphrase|pwd|secret[_-]?(?:access[_-]?)?key|[_-]secret|secret(?==)|api[_-]?key|access[_-]?key|"
    r"private[_-]?key|(?:auth|access|refresh|session)[_-]?token|密码|密碼|口令)"
)
_START = r"(?<![A-Za-z0-9])"
# where a word begins in what JSON (\n) and URLs (%3D) make of text; slower
_START_ESCAPED = rf"(?:{_START}|\\(?:[nrtbf]|u[0-9A-Fa-f]{{4}})|%[0-9A-Fa-f]{{2}})"


@cache
def _patterns(start: str) -> tuple[tuple[str, re.Pattern[str]], ...]:
    """``(kind, pattern)``; of a group "secret" alone that is replaced. The order counts: the more certain first."""
    return (
        (
            "private-key",  # one that was cut off is a secret as well, as far as there is what looks like lines of it
            re.compile(
                r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
                r"(?:(?:(?!-----BEGIN ).){0,32000}?-----END [A-Z0-9 ]*-----"
                r"|(?:[\s\\>|\"',#*]*(?:[A-Za-z-]{4,20}: [^\n]{0,200}\n|[A-Za-z0-9+/=]{16,}))*+"
                r"(?:[\s\\]+[A-Za-z0-9+/=]+\s*\Z)?)",
                re.DOTALL,
            ),
        ),
        *((kind, re.compile(rf"{start}(?P<secret>{token})(?![A-Za-z0-9])")) for kind, token in _TOKENS.items()),
        (
            "url-password",
            re.compile(
                rf"{start}[A-Za-z][A-Za-z0-9+.-]{{1,20}}://[^\s:/@?#'\"]{{0,256}}:"
                r"(?P<secret>[^\s/@'\"]{1,512}(?:@[^\s/@?#:'\"]{0,64}(?:/[^\s@?#:'\"]{0,64})?(?=@))?)(?=@)"
            ),
        ),
        (
            "authorization",
            re.compile(
                rf"{start}(?:proxy-)?authorization\\?[\"']?\s*[:=]\s*\\?[\"']?(?:(?:bearer|basic|token|digest)\s+)?"
                r"(?P<secret>[A-Za-z0-9._~+/=:-]{8,})",
                re.IGNORECASE,
            ),
        ),
        ("bearer-token", re.compile(rf"{start}bearer\s+(?P<secret>[A-Za-z0-9._~+/=-]{{20,}})", re.IGNORECASE)),
        (
            "password",
            re.compile(
                rf"{_NAMED}\\?[\"']?\s{{0,4}}(?:=>|[:=：＝])\s{{0,4}}(?P<quote>\\?[\"'])?(?!\[REDACTED:|(?:none|null|true|false)(?![\w])|(?:os|self|process)\.)"
                # in quotes: over lines where the quotes are closed soon, else to the end of the line
                r"(?P<secret>(?(quote)(?:(?:(?!(?P=quote))(?:\\.|[^\\])){1,256}(?=(?P=quote))"
                r"|(?:(?!(?P=quote))(?:\\.|[^\\\n]))+)|[^\s,;&\"'<>)\]}]{4,}))",
                re.IGNORECASE | re.DOTALL,
            ),
        ),
    )


# a look-ahead: what is no card must not hide one that begins within it
_CARD = re.compile(
    r"(?<![A-Za-z0-9_.])(?=(?P<number>\d{13,19}|\d{4}([ -])\d{4}\2\d{4}\2\d{1,4}(?P<more>\2\d{3})?"
    r"|\d{4}([ -])\d{6}\4\d{4,5})(?![A-Za-z0-9_]))"
)
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_ISSUER = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}"
    r"|6(?:011|5\d\d|4[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}|62\d{14,17}"
)


SHORTEST_NUMBER = 1000
"""No password or card is a smaller number."""
NAME_FIELDS, VALUE_FIELDS = ("name", "key", "field"), ("value", "values", "text", "secret")
"""``{"name": "password", "value": ...}``"""
ID_FIELDS = ("id", "query_id", "reply_id", "segment_id", "flash", "cited", "evidence", "config_hash", "by")
"""Of a trace: what something is found by."""


def secrets(text: str) -> str:
    """The text with every secret that is known by its form replaced by ``[REDACTED:kind]``.

    >>> secrets("export OPENAI_API_KEY=sk-abcdefghijklmnopqrstuvwx, then call 4111 1111 1111 1111")
    'export OPENAI_API_KEY=[REDACTED:openai-key], then call [REDACTED:card]'
    """
    escaped = "\\" in text or "%" in text
    for kind, pattern in _patterns(_START_ESCAPED if escaped else _START):
        text = pattern.sub(lambda match, kind=kind: _replaced(match, kind), text)  # type: ignore[misc]
    return _without_cards(text)


def _replaced(match: re.Match[str], kind: str) -> str:
    mark = f"[REDACTED:{kind}]"
    if "secret" not in match.re.groupindex:
        return mark
    start, end = (place - match.start() for place in match.span("secret"))
    return f"{match[0][:start]}{mark}{match[0][end:]}"


def _without_cards(text: str) -> str:
    left, place = "", 0
    for match in _CARD.finditer(text):
        start, end = match.span("number")
        if start < place:
            continue
        if not _is_card(text[start:end]):
            end -= len(match["more"] or "")  # the three digits from the back of it
        if _is_card(text[start:end]):
            left, place = f"{left}{text[place:start]}[REDACTED:card]", end
    return left + text[place:]


def _is_card(number: str) -> bool:
    digits = re.sub(r"\D", "", number)
    doubled = (int(d) * (2 if n % 2 else 1) for n, d in enumerate(reversed(digits)))
    return bool(_ISSUER.fullmatch(digits)) and sum(n - 9 if n > 9 else n for n in doubled) % 10 == 0


def redactor(redact: bool | Redact) -> Redact | None:
    """What takes secrets out of a text: ``secrets`` for ``True``, nothing for ``False``, or the caller's own.

    :raises ConfigError: for anything else.
    """
    if isinstance(redact, bool):
        return secrets if redact else None
    if not callable(redact):
        raise ConfigError(f"redact is True, False or a function from text to text, not {redact!r}")

    def own(text: str) -> str:
        left: object = redact(text)
        if not isinstance(left, str):
            raise ConfigError(f"redact gave {type(left).__name__} for a text; it must give back a text")
        return left

    return own


def cleaned(value: Any, redact: Redact, about: str = "") -> Any:
    """JSON-ready data with every text in it redacted, names of fields and numbers written out among them.

    :param about: the name of the field that it is in, which may tell that it is a secret.
    """
    if isinstance(value, str):
        return _named(about, value, redact)
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) >= SHORTEST_NUMBER:
        written = str(int(value)) if value == value // 1 else str(value)
        return value if (left := _named(about, written, redact)) == written else left
    if isinstance(value, Mapping):
        return _cleaned_fields(value, redact, about)
    if isinstance(value, list | tuple):
        if all(isinstance(inner, str) for inner in value):  # lines, of which no single one tells what they are
            together = redact("\n".join(value))
            if together != "\n".join(map(redact, value)):
                return together.split("\n")
        return [cleaned(inner, redact, about) for inner in value]
    return value


def _cleaned_fields(value: Mapping[str, Any], redact: Redact, about: str) -> dict[str, Any]:
    """A mapping's fields; names that become equal are numbered. ``value`` is about what ``name`` or the mapping is."""
    about = next((name for field in NAME_FIELDS if isinstance(name := value.get(field), str)), about)
    left: dict[str, Any] = {}
    for name, inner in value.items():
        clean = base = cleaned(name, redact)
        n = 1
        while clean != name and (clean in left or clean in value):
            n += 1
            clean = f"{base} {n}"
        left[clean] = cleaned(inner, redact, about if about and name in VALUE_FIELDS else name)
    return left


def _named(name: str, value: str, redact: Redact) -> str:
    """A field's text without secrets, also where only the field's name tells that it is one."""
    left, told = redact(value), f'{name}="'
    together = redact(f'{told}{value}"') if name and left == value else ""
    return together[len(told) : -1] if together.startswith(told) and together.endswith('"') else left


def checked_name(name: str | None, what: str, redact: Redact) -> None:
    """Make sure that what things are found by holds no secret: it cannot be redacted, or two would become one.

    :raises InvalidInputError: if it does. The error does not repeat it.
    """
    if name is not None and not _UUID.fullmatch(name) and redact(name) != name:
        raise InvalidInputError(f"the {what} holds what is to be redacted, and a name cannot be; use another one")


def clean_key(key: str, redact: Redact) -> str:
    """A key that may have been made of what is said: as it is, or its digest."""
    return key if redact(key) == key else digest_of(key)


def digest_of(name: str) -> str:
    """What stands for a name that holds a secret."""
    return f"digest:{hashlib.sha256(name.encode()).hexdigest()}"


def clean_segment(item: NewSegment, redact: Redact) -> NewSegment:
    """A new segment without secrets.

    :raises InvalidInputError: if its session or id holds one.
    """
    checked_name(item.session, "session's name", redact)
    checked_name(item.id, "segment's id", redact)
    return replace(
        item,
        text=redact(item.text),
        speaker=item.speaker and redact(item.speaker),
        source=item.source and redact(item.source),
        metadata=cleaned(item.metadata, redact),
        key=item.key and clean_key(item.key, redact),
    )


def clean_trace(trace: Trace, redact: Redact) -> Trace:
    """A trace without secrets, whatever field they are in; names of segments that hold one become digests."""
    clean: Trace = _without_secrets(replace(trace, namespace=()), cache(redact), "")
    return replace(clean, namespace=trace.namespace)


def _without_secrets(value: Any, redact: Redact, field: str) -> Any:
    """A value of a trace's field, and all that is in it."""
    if isinstance(value, Enum):
        return value
    if isinstance(value, str):
        if field not in ID_FIELDS:
            return redact(value)
        return value if _UUID.fullmatch(value) else clean_key(value, redact)
    if isinstance(value, tuple):
        return tuple(_without_secrets(each, redact, field) for each in value)
    if isinstance(value, Mapping):
        return {redact(name): _without_secrets(each, redact, name) for name, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        each = {part.name: _without_secrets(getattr(value, part.name), redact, part.name) for part in fields(value)}
        return replace(value, **each)
    return value


def clean_change(change: ItemChange, redact: Redact) -> ItemChange:
    """A change of an item without secrets.

    :raises InvalidInputError: if its path or key holds one.
    """
    for label in change.path:
        checked_name(label, "path", redact)
    checked_name(change.key, "item's key", redact)
    texts = tuple((redact(field), redact(text)) for field, text in change.texts)
    return replace(change, value=cleaned(change.value, redact), texts=texts)
