"""What was forgotten and must not come back by itself: digests of ids and keys, and nothing that can be read."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Create the table, empty: what was forgotten before left nothing to make it of."""
    op.create_table(
        "tombstones",
        sa.Column("namespace_id", sa.Integer, sa.ForeignKey("namespaces.id"), primary_key=True),
        sa.Column("digest", sa.LargeBinary, primary_key=True),
        sa.Column("kind", sa.Text, nullable=False),
        sqlite_with_rowid=False,
    )
