"""Who is at work on what that is derived: workers and their claims. And what items lack, found without a search."""

import sqlalchemy as sa
from alembic import op

from memory_os.stores.partitions import create, is_postgres

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Create both tables, empty, and the index."""
    connection = op.get_bind()
    unmade = sa.text("fingerprint IS NULL")
    op.create_index(
        "ix_item_texts_unmade", "item_texts", ["namespace_id", "pk"], sqlite_where=unmade, postgresql_where=unmade
    )
    if is_postgres(connection):
        connection.exec_driver_sql(
            """CREATE TABLE workers (number bigint PRIMARY KEY, name text NOT NULL, started_at text NOT NULL,
            seen_at text NOT NULL, done bigint NOT NULL, per_second double precision NOT NULL)"""
        )
        create(
            connection,
            "claims",
            """namespace_id bigint NOT NULL, task text COLLATE "C" NOT NULL, of_pk bigint NOT NULL,
            worker bigint NOT NULL, PRIMARY KEY (namespace_id, task, of_pk)""",
        )
        return
    op.create_table(
        "workers",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("started_at", sa.Text, nullable=False),
        sa.Column("seen_at", sa.Text, nullable=False),
        sa.Column("done", sa.Integer, nullable=False),
        sa.Column("per_second", sa.Float, nullable=False),
    )
    op.create_table(
        "claims",
        sa.Column("namespace_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("task", sa.Text, primary_key=True),
        sa.Column("of_pk", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("worker", sa.Integer, nullable=False),
    )
