"""The manifest of the bank: which segments' keys and values lie in which file. Derived."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Create the table, empty: entries are made as segments are used."""
    op.create_table(
        "bank",
        sa.Column("segment_pk", sa.Integer, sa.ForeignKey("segments.pk", ondelete="CASCADE"), primary_key=True),
        sa.Column("fingerprint", sa.Text, primary_key=True),
        sa.Column("namespace_id", sa.Integer, nullable=False),
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("file", sa.Text, nullable=False),
        sa.Column("n_tokens", sa.Integer, nullable=False),
        sa.Column("n_bytes", sa.Integer, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("used", sa.Integer, nullable=False),
        sa.Column("surprisal", sa.Float),
        sa.Column("chunks", sa.LargeBinary, nullable=False),
    )
    op.create_index("ix_bank_namespace", "bank", ["namespace_id", "seq"])
