"""What a failing PostgreSQL server says, and what is said of it: one line that names the fix."""

from __future__ import annotations

import re

import sqlalchemy as sa

from memory_os.errors import InvalidInputError

__all__ = ["LOCK_TIMEOUT_S", "UNDONE", "bare", "is_lost", "problem"]

LOCK_TIMEOUT_S = 60
UNDONE = {"40001", "40P01"}  # serialization_failure, deadlock_detected
GONE = {"57P01", "57P02", "57P03", "08000", "08001", "08003", "08004", "08006"}  # the server ended, or is starting


def is_lost(error: sa.exc.DBAPIError) -> bool:
    """Whether the connection is gone, or none was to be had."""
    import psycopg

    code = getattr(error.orig, "sqlstate", None)
    no_answer = isinstance(error.orig, psycopg.OperationalError) and code is None
    return error.connection_invalidated or code in GONE or no_answer


def bare(error: sa.exc.DBAPIError) -> BaseException:
    """The driver's own error: SQLAlchemy's repeats the statement."""
    return error.orig or error


def problem(error: sa.exc.DBAPIError) -> str | Exception:
    """What is wrong and what helps, in one line."""
    import psycopg

    code = getattr(error.orig, "sqlstate", None)
    # of what the server says the first line: its details may repeat what was to be stored
    text = error.orig.diag.message_primary if isinstance(error.orig, psycopg.Error) else None
    text = " ".join((text or str(error.orig)).split())
    if "NUL" in text and isinstance(error.orig, psycopg.DataError):
        return InvalidInputError("a NUL character cannot be stored in PostgreSQL; remove it")
    if code == "54000":  # program_limit_exceeded: a key that no index entry holds
        return (
            "a session, id, key, path or namespace is longer than the 2,500 bytes of UTF-8 that an index of PostgreSQL "
            "holds; use a shorter one"
        )
    for said, remedy in _SAID.items():
        if said in text:
            return remedy
    if re.search(r'database "[^"]*" does not exist', text):
        return "there is no such database; make it: createdb --encoding=UTF8 --template=template0 NAME"
    if re.search(r'role "[^"]*" does not exist', text):
        return "there is no such user; make it: createuser NAME"
    if code == "42501":
        return f"the user may not do this ({text}); let it own the database, or grant it what is missing"
    if code == "25006":
        return "the database can only be read; connect to the primary, or turn default_transaction_read_only off"
    if code == "55P03":
        return "another one held the lock for too long; try again"
    if code in ("53100", "53200", "53300"):
        return f"the server has no room ({text}); free some disk, memory or connections and try again"
    if is_lost(error):
        return f"the server does not answer ({text}); see that it runs, and that host and port are right"
    return text


_SAID = {
    "password authentication failed": "user or password is wrong; correct the URL",
    "no password supplied": "the server wants a password, and the URL has none; write postgresql+psycopg://USER:PASSWORD@...",
    "no pg_hba.conf entry": "the server lets nobody in from here as this user; add a line to its pg_hba.conf",
    "too many clients": "the server has no connection left; close some, or raise its max_connections",
}
