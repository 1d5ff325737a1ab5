"""PostgreSQL's tables without what was deleted from them: VACUUM, and what the server says of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

if TYPE_CHECKING:
    import psycopg

__all__ = ["vacuumed"]

LOCKED = "lock not available"
STILL_SEEN = re.compile(r"(\d+) are dead but not yet removable")


def vacuumed(engine: sa.Engine, tables: Sequence[str], patience_s: float) -> bool:
    """Clean tables; whether nothing is left in them of what was deleted.

    Not so where somebody still looks at what was there before, or where the tables are another role's.

    :param patience_s: so long, at most, another one that cleans or changes them is waited for.
    """
    import tenacity

    patiently = tenacity.Retrying(
        retry=tenacity.retry_if_result(lambda told: any(LOCKED in line for line in told)),
        stop=tenacity.stop_after_delay(patience_s),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=1),
        retry_error_callback=lambda state: state.outcome.result() if state.outcome else [],
    )
    told: list[str] = patiently(_vacuum, engine, tables)
    seen = [int(number) for line in told for number in STILL_SEEN.findall(line)]
    return len(seen) >= len(tables) and not any(seen) and not any(line.startswith("WARNING") for line in told)


def _vacuum(engine: sa.Engine, tables: Sequence[str]) -> list[str]:
    """What the server says while it cleans those that nobody else holds."""
    told: list[str] = []
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        driver: psycopg.Connection[Any] = connection.connection.driver_connection  # type: ignore[assignment]

        def listen(diagnostic: psycopg.errors.Diagnostic) -> None:
            told.append(f"{diagnostic.severity_nonlocalized}: {diagnostic.message_primary}")

        driver.add_notice_handler(listen)
        try:
            connection.exec_driver_sql(f"VACUUM (VERBOSE, SKIP_LOCKED) {', '.join(tables)}")
        finally:
            driver.remove_notice_handler(listen)
    return told
