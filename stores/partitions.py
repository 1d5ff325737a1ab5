"""What the steps of the schema's history need on PostgreSQL: hash partitions by namespace, and row-level security.

A table's own key begins with ``namespace_id``, and so does every unique one: the tables can be distributed by it
(Citus: ``create_distributed_table('segments', 'namespace_id')``, with ``namespaces`` as a reference table).
"""

from __future__ import annotations

import sqlalchemy as sa

__all__ = ["PARTITIONS", "SETTING", "create", "is_postgres", "part_of"]

PARTITIONS = 16
SETTING = "memos.namespace"
"""The session's setting that names the namespace, as its labels in JSON; ``*`` is all of them."""

# as one value, computed once in a query and not for every row
_NAMED = f"(SELECT current_setting('{SETTING}', true))"


def is_postgres(connection: sa.Connection) -> bool:
    """Whether a step is to make PostgreSQL's tables."""
    return connection.dialect.name == "postgresql"


def create(connection: sa.Connection, table: str, columns: str, *, partitioned: bool = False) -> None:
    """Make a table whose rows only a session sees that has named their namespace.

    :param columns: as in CREATE TABLE.
    :param partitioned: by namespace.
    """
    run = connection.exec_driver_sql
    run(f"CREATE TABLE {table} ({columns})" + (" PARTITION BY HASH (namespace_id)" if partitioned else ""))
    for n in range(PARTITIONS) if partitioned else ():
        run(f"CREATE TABLE {table}_p{n} PARTITION OF {table} FOR VALUES WITH (MODULUS {PARTITIONS}, REMAINDER {n})")
    mine = (
        f"labels = {_NAMED}"
        if table == "namespaces"
        else f"namespace_id = (SELECT id FROM namespaces WHERE labels = {_NAMED})"
    )
    for name in (table, *(f"{table}_p{n}" for n in range(PARTITIONS if partitioned else 0))):
        run(f"ALTER TABLE {name} ENABLE ROW LEVEL SECURITY")
        run(f"ALTER TABLE {name} FORCE ROW LEVEL SECURITY")  # for the owner too
        run(f"CREATE POLICY of_namespace ON {name} USING ({mine} OR {_NAMED} = '*')")


def part_of(connection: sa.Connection, ns: int) -> int:
    """The number of the partition in which a namespace's rows are; the same for every table."""
    query = sa.text(
        "SELECT n FROM generate_series(0, :last) n "
        "WHERE satisfies_hash_partition(CAST('segments' AS regclass), :of, n, CAST(:ns AS bigint))"
    )
    return int(connection.execute(query, {"last": PARTITIONS - 1, "of": PARTITIONS, "ns": ns}).scalar_one())
