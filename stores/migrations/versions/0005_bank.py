"""The manifest of the bank: which segments' keys and values lie in which file. Derived."""

import sqlalchemy as sa
from alembic import op

from memory_os.stores.partitions import create, is_postgres

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Create the table, empty: entries are made as segments are used."""
    connection = op.get_bind()
    if is_postgres(connection):
        create(
            connection,
            "bank",
            """namespace_id bigint NOT NULL, segment_pk bigint NOT NULL, fingerprint text COLLATE "C" NOT NULL,
            seq bigint NOT NULL, file text COLLATE "C" NOT NULL, n_tokens bigint NOT NULL, n_bytes bigint NOT NULL,
            sha256 text COLLATE "C" NOT NULL, used bigint NOT NULL, surprisal double precision, chunks bytea NOT NULL,
            PRIMARY KEY (namespace_id, segment_pk, fingerprint),
            FOREIGN KEY (namespace_id, segment_pk) REFERENCES segments (namespace_id, pk) ON DELETE CASCADE""",
        )
        op.create_index("ix_bank_namespace", "bank", ["namespace_id", "seq"])
        return
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
