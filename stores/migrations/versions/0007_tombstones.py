"""What was forgotten and must not come back by itself: digests of ids and keys, and nothing that can be read."""

import sqlalchemy as sa
from alembic import op

from memory_os.stores.partitions import create, is_postgres

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Create the table, empty: what was forgotten before left nothing to make it of."""
    connection = op.get_bind()
    if is_postgres(connection):
        create(
            connection,
            "tombstones",
            """namespace_id bigint NOT NULL REFERENCES namespaces, digest bytea NOT NULL,
            kind text COLLATE "C" NOT NULL, PRIMARY KEY (namespace_id, digest)""",
        )
        return
    op.create_table(
        "tombstones",
        sa.Column("namespace_id", sa.Integer, sa.ForeignKey("namespaces.id"), primary_key=True),
        sa.Column("digest", sa.LargeBinary, primary_key=True),
        sa.Column("kind", sa.Text, nullable=False),
        sqlite_with_rowid=False,
    )
