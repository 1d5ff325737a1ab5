"""The first tables: namespaces, segments, vectors, pending work, traces, and the lexical index."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create everything."""
    op.create_table(
        "namespaces",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("labels", sa.Text, nullable=False, unique=True),
        sa.Column("last_seq", sa.Integer, nullable=False),
        sa.Column("n_segments", sa.Integer, nullable=False),
        sa.Column("n_terms", sa.Integer, nullable=False),
        sa.Column("epoch", sa.Integer, nullable=False),
    )
    op.create_table(
        "segments",
        sa.Column("pk", sa.Integer, primary_key=True),
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("namespace_id", sa.Integer, sa.ForeignKey("namespaces.id"), nullable=False),
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("session", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("speaker", sa.Text),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("created_at", sa.Text, nullable=False),
        sa.Column("n_tokens", sa.Integer, nullable=False),
        sa.Column("source", sa.Text),
        sa.Column("offset_start", sa.Integer),
        sa.Column("offset_end", sa.Integer),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("key", sa.Text),
        sa.UniqueConstraint("namespace_id", "id"),
        sa.UniqueConstraint("namespace_id", "seq"),
        sa.UniqueConstraint("namespace_id", "key"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_segments_session", "segments", ["namespace_id", "session", "seq"])
    op.create_table(
        "vectors",
        sa.Column("pk", sa.Integer, primary_key=True),
        sa.Column(
            "segment_pk", sa.Integer, sa.ForeignKey("segments.pk", ondelete="CASCADE"), nullable=False, unique=True
        ),
        sa.Column("namespace_id", sa.Integer, nullable=False),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("vector", sa.LargeBinary, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_vectors_namespace", "vectors", ["namespace_id", "fingerprint", "pk"])
    op.create_table(
        "pending",
        sa.Column("segment_pk", sa.Integer, sa.ForeignKey("segments.pk", ondelete="CASCADE"), primary_key=True),
        sa.Column("task", sa.Text, primary_key=True),
        sa.Column("namespace_id", sa.Integer, nullable=False),
    )
    op.create_index("ix_pending_namespace", "pending", ["namespace_id", "task", "segment_pk"])
    op.create_table(
        "traces",
        sa.Column("namespace_id", sa.Integer, sa.ForeignKey("namespaces.id"), primary_key=True),
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("query_id", sa.String(36)),
        sa.Column("reply_id", sa.String(36)),
        sa.Column("created_at", sa.Text, nullable=False),
        sa.Column("body", sa.JSON, nullable=False),
    )
    op.create_index("ix_traces_namespace", "traces", ["namespace_id", "created_at"])
    op.create_index("ix_traces_query_id", "traces", ["query_id"])
    op.create_index("ix_traces_reply_id", "traces", ["reply_id"])
    # Terms come ready-made from stores/lexical.py, so the tokenizer only splits at spaces: "ascii" takes every
    # non-ASCII character as part of a token.
    op.execute("CREATE VIRTUAL TABLE lexical USING fts5(terms, tokenize = \"ascii tokenchars '_'\")")
