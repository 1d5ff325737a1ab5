"""Items: mutable JSON values under a path and a key, and the texts of them that are searched."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Create both tables, empty."""
    op.create_table(
        "items",
        sa.Column("pk", sa.Integer, primary_key=True),
        sa.Column("namespace_id", sa.Integer, sa.ForeignKey("namespaces.id"), nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("value", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Text, nullable=False),
        sa.Column("updated_at", sa.Text, nullable=False),
        sa.Column("ttl_minutes", sa.Float),
        sa.Column("expires_at", sa.Text),
        sa.UniqueConstraint("namespace_id", "path", "key"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_items_updated", "items", ["namespace_id", "updated_at"])
    op.create_index("ix_items_expires", "items", ["namespace_id", "expires_at"])
    op.create_table(
        "item_texts",
        sa.Column("pk", sa.Integer, primary_key=True),
        sa.Column("item_pk", sa.Integer, sa.ForeignKey("items.pk", ondelete="CASCADE"), nullable=False),
        sa.Column("namespace_id", sa.Integer, nullable=False),
        sa.Column("field", sa.Text, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("fingerprint", sa.Text),
        sa.Column("vector", sa.LargeBinary),
        sa.CheckConstraint("(fingerprint IS NULL) = (vector IS NULL)"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_item_texts_item", "item_texts", ["item_pk"])
    op.create_index("ix_item_texts_pending", "item_texts", ["namespace_id", "fingerprint"])
