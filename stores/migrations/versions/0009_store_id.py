"""An id of the store, by which what it keeps on a shared server is told from what others keep there."""

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Create the table with its one row."""
    store = op.create_table("store", sa.Column("id", sa.String(32), primary_key=True))
    op.bulk_insert(store, [{"id": uuid.uuid4().hex}])
