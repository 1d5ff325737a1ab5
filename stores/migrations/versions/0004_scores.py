"""What an LLM made of texts and questions: derived, and kept so that it is computed once."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Create the table, empty: scores are made on demand."""
    op.create_table(
        "scores",
        sa.Column("pk", sa.Integer, primary_key=True),
        sa.Column("namespace_id", sa.Integer, sa.ForeignKey("namespaces.id"), nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("value", sa.JSON, nullable=False),
        sa.UniqueConstraint("namespace_id", "key"),
    )
