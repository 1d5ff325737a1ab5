"""Connections to PostgreSQL: what a URL may say, and pools of them. What is set in one is set by its transactions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from memory_os.errors import StoreError
from memory_os.stores.pgerrors import LOCK_TIMEOUT_S

if TYPE_CHECKING:
    import psycopg

__all__ = ["MORE", "POOL", "address_of", "engine_of"]

POOL, MORE = 5, 27
"""Connections that stay open, and how many more there may be at a time; as many again for readers."""
DEFAULTS = {"connect_timeout": 10, "application_name": "memory_os"}


def address_of(url: str, place: str) -> sa.URL:
    """The URL in its parts.

    :raises StoreError: if it cannot be read, or sets what libpq does not know: the driver has more, such as autocommit.
    """
    from psycopg.pq import Conninfo

    try:
        address = sa.make_url(url).set(drivername="postgresql+psycopg")
    except (sa.exc.ArgumentError, ValueError):  # neither is shown: they may repeat the password
        raise StoreError(
            f"cannot open {place}: write postgresql+psycopg://USER:PASSWORD@HOST:PORT/NAME, with the port in digits "
            "and %25, %3A, %2F and %40 for the characters % : / @ in user or password"
        ) from None
    known = {option.keyword.decode() for option in Conninfo.get_defaults()}
    for name in address.query:
        if name not in known:
            raise StoreError(f"cannot open {place}: libpq, which connects, has no setting {name!r}; leave it out")
    return address


def engine_of(address: sa.URL, isolation: Any, *, read_only: bool) -> sa.Engine:
    """The pool of connections of one kind, none of which is made yet.

    :param isolation: of its transactions, as SQLAlchemy names it.
    """
    from psycopg import Cursor
    from psycopg.pq import Format

    class BinaryCursor(Cursor[Any]):
        """Asks for results in binary: vectors would come as hexadecimal digits."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.format = Format.BINARY

    engine = sa.create_engine(
        address,
        isolation_level=isolation,
        pool_size=POOL,
        max_overflow=MORE,
        pool_timeout=LOCK_TIMEOUT_S,
        pool_pre_ping=True,
        hide_parameters=True,
        connect_args={
            "cursor_factory": BinaryCursor,
            **{name: value for name, value in DEFAULTS.items() if name not in address.query},
            "client_encoding": "UTF8",  # whatever the environment says
            "prepare_threshold": None,  # what is prepared stays in a connection, which may be another's next
        },
    )
    if read_only:

        @sa.event.listens_for(engine, "connect")
        def keep_from_writing(connection: psycopg.Connection[Any], _: object) -> None:
            connection.read_only = True

    return engine
