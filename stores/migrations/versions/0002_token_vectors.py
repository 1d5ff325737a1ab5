"""Vectors of a segment's tokens, for late interaction, beside the segment's own."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column; it is filled as vectors are made."""
    op.add_column("vectors", sa.Column("tokens", sa.LargeBinary))
