"""Summaries of segments, and when each segment was last activated: both derived."""

import sqlalchemy as sa
from alembic import op

from memory_os.stores.partitions import create, is_postgres

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Create both tables, empty: summaries are made on demand, activations come from the traces of turns to be."""
    connection = op.get_bind()
    if is_postgres(connection):
        of_segment = "FOREIGN KEY (namespace_id, segment_pk) REFERENCES segments (namespace_id, pk) ON DELETE CASCADE"
        create(
            connection,
            "summaries",
            f"""namespace_id bigint NOT NULL, segment_pk bigint NOT NULL, method text COLLATE "C" NOT NULL,
            text text NOT NULL, PRIMARY KEY (namespace_id, segment_pk, method), {of_segment}""",
        )
        create(
            connection,
            "activations",
            f"""namespace_id bigint NOT NULL, segment_pk bigint NOT NULL, seq bigint NOT NULL,
            PRIMARY KEY (namespace_id, segment_pk), {of_segment}""",
        )
        return
    op.create_table(
        "summaries",
        sa.Column("segment_pk", sa.Integer, sa.ForeignKey("segments.pk", ondelete="CASCADE"), primary_key=True),
        sa.Column("method", sa.Text, primary_key=True),
        sa.Column("namespace_id", sa.Integer, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
    )
    op.create_table(
        "activations",
        sa.Column("segment_pk", sa.Integer, sa.ForeignKey("segments.pk", ondelete="CASCADE"), primary_key=True),
        sa.Column("namespace_id", sa.Integer, nullable=False),
        sa.Column("seq", sa.Integer, nullable=False),
    )
    op.create_index("ix_activations_namespace", "activations", ["namespace_id"])
