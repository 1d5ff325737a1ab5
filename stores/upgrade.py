"""The steps of the schema's history up to this version's own, and none beyond.

The package on the disk may have been upgraded since this one was loaded: its newer steps are not this version's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

from memory_os.errors import SchemaError

__all__ = ["Upgrade"]


class Upgrade:
    """What brings a database to this version's schema.

    :param place: what the database is called in messages.
    :param head: this version's revision.
    """

    def __init__(self, place: str, head: str) -> None:
        from alembic.config import Config

        self._place = place
        self._head = head
        self._config = Config()
        self._config.set_main_option("script_location", "memory_os.stores:migrations")

    def check(self, found: str | None) -> None:
        """Make sure that there is a way from this revision, before anything is written.

        :raises SchemaError: for one that this version does not know.
        """
        from alembic.script import ScriptDirectory

        with self._told(found):
            steps = ScriptDirectory.from_config(self._config).iterate_revisions(self._head, "base")
            if found not in {None, *(step.revision for step in steps)}:
                raise SchemaError(self._place, str(found), self._head)

    def run(self, connection: sa.Connection, found: str | None) -> None:
        """Take every step from this revision, in the connection's transaction.

        :raises SchemaError: for one that this version does not know.
        """
        from alembic.command import upgrade

        self.check(found)
        with self._told(found):
            self._config.attributes["connection"] = connection
            upgrade(self._config, self._head)

    @contextmanager
    def _told(self, found: str | None) -> Iterator[None]:
        from alembic.util import CommandError

        try:
            yield
        except CommandError as error:
            raise SchemaError(self._place, str(found), self._head) from error
