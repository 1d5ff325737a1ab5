"""Addresses of database servers: told from paths, and shown without what is secret in them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

__all__ = ["DatabaseUrl", "is_server", "without_password"]

SCHEMES = ("postgresql+psycopg", "postgresql", "postgres")
_SECRET = re.compile(r"(?i)([?&](?:password|passfile|sslpassword|sslkey)=)[^&]*")


def is_server(text: str) -> bool:
    """Whether it is the URL of a PostgreSQL database."""
    return text.partition("://")[0].lower() in SCHEMES and "://" in text


def without_password(url: str) -> str:
    """The URL as it may be shown.

    >>> without_password("postgresql+psycopg://ann:secret@db:5432/memory?password=too")
    'postgresql+psycopg://ann:***@db:5432/memory?password=***'
    """
    scheme, _, rest = url.partition("://")
    who, at, where = rest.rpartition("@")
    shown = f"{who.partition(':')[0]}{':***' if ':' in who else ''}{at}{where}"
    return _SECRET.sub(r"\1***", f"{scheme}://{shown}")


@dataclass(frozen=True, slots=True)
class DatabaseUrl:
    """The URL of a database, which is shown without its password."""

    url: str = field(repr=False)

    def __str__(self) -> str:
        return without_password(self.url)

    __repr__ = __str__
