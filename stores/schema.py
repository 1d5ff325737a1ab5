"""The tables, as SQLAlchemy sees them. Their history is in migrations/; a test keeps the two equal.

On PostgreSQL every key begins with ``namespace_id``, and the large tables are partitioned by it (``partitions``).

``segments``, ``traces``, ``items``, ``tombstones`` and ``namespaces`` are the record, and so are the texts in
``item_texts``: which of an item's are searched. ``vectors``, ``lexical``, ``summaries`` and ``pending`` are derived
from ``segments``, ``activations`` from ``traces``, ``scores`` and ``bank`` from texts and a model, the vectors of
``item_texts`` from its texts; they can be rebuilt at any time. ``workers`` and ``claims`` say who is at work on what,
and mean nothing where nobody is.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

__all__ = [
    "HEAD",
    "ITEM_TASK",
    "SUMMARY_TASK",
    "VECTOR_TASK",
    "activations",
    "bank",
    "claims",
    "item_texts",
    "items",
    "metadata",
    "namespaces",
    "pending",
    "scores",
    "segments",
    "store",
    "summaries",
    "tombstones",
    "traces",
    "vectors",
    "workers",
]

HEAD = "0010"
"""The schema revision that this version reads and writes."""

VECTOR_TASK = "vector"
"""The pending task of making a segment's vector."""

SUMMARY_TASK = "summary"
"""The pending task of summarising a segment."""

ITEM_TASK = "item"
"""The task of making the vector of an item's text; ``item_texts`` itself says which are to be made."""

metadata = MetaData()

Number = Integer().with_variant(BigInteger(), "postgresql")

store = Table(
    "store",
    metadata,
    Column("id", String(32), primary_key=True),  # one row: whose collections on a shared server are this store's
)

namespaces = Table(
    "namespaces",
    metadata,
    Column("id", Number, primary_key=True),
    Column("labels", Text, nullable=False, unique=True),  # JSON array; compared whole, never by pattern
    Column("last_seq", Number, nullable=False, default=0),
    Column("n_segments", Number, nullable=False, default=0),  # with n_terms: the corpus statistics of BM25
    Column("n_terms", Number, nullable=False, default=0),
    Column("epoch", Number, nullable=False, default=0),  # grows when segments or vectors go away, or terms are mended
)

segments = Table(
    "segments",
    metadata,
    Column("pk", Number, primary_key=True),
    Column("id", String(36), nullable=False),
    Column("namespace_id", Number, ForeignKey("namespaces.id"), nullable=False),
    Column("seq", Number, nullable=False),
    Column("session", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("speaker", Text),
    Column("kind", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("created_at", Text, nullable=False),  # event time, ISO 8601, UTC
    Column("n_tokens", Number, nullable=False),
    Column("source", Text),
    Column("offset_start", Number),
    Column("offset_end", Number),
    Column("metadata", JSON, nullable=False),
    Column("key", Text),
    UniqueConstraint("namespace_id", "id"),  # an export imported into another namespace keeps its ids
    UniqueConstraint("namespace_id", "seq"),
    UniqueConstraint("namespace_id", "key"),
    Index("ix_segments_session", "namespace_id", "session", "seq"),
    sqlite_autoincrement=True,  # a deleted row's number never comes back under another text
)

vectors = Table(
    "vectors",
    metadata,
    Column("pk", Number, primary_key=True),
    Column("segment_pk", Number, ForeignKey("segments.pk", ondelete="CASCADE"), nullable=False, unique=True),
    Column("namespace_id", Number, nullable=False),
    Column("fingerprint", Text, nullable=False),
    Column("vector", LargeBinary, nullable=False),  # float32, little-endian, unit length
    Column("tokens", LargeBinary),  # int8, [tokens, token dimension]: see TokenEmbedder
    Index("ix_vectors_namespace", "namespace_id", "fingerprint", "pk"),
    sqlite_autoincrement=True,
)

pending = Table(
    "pending",
    metadata,
    Column("segment_pk", Number, ForeignKey("segments.pk", ondelete="CASCADE"), primary_key=True),
    Column("task", Text, primary_key=True),
    Column("namespace_id", Number, nullable=False),
    Index("ix_pending_namespace", "namespace_id", "task", "segment_pk"),
)

workers = Table(
    "workers",
    metadata,
    Column("number", Number, primary_key=True, autoincrement=False),  # of a lock that it holds while it lives
    Column("name", Text, nullable=False),
    Column("started_at", Text, nullable=False),  # ISO 8601, UTC; the other too
    Column("seen_at", Text, nullable=False),
    Column("done", Number, nullable=False),
    Column("per_second", Float, nullable=False),
)

claims = Table(
    "claims",
    metadata,
    Column("namespace_id", Number, primary_key=True, autoincrement=False),
    Column("task", Text, primary_key=True),
    Column("of_pk", Number, primary_key=True, autoincrement=False),  # the segment's; the text's of an item
    Column("worker", Number, nullable=False),  # a dead one's count for nothing; no key, so that nobody waits for it
)

summaries = Table(
    "summaries",
    metadata,
    Column("segment_pk", Number, ForeignKey("segments.pk", ondelete="CASCADE"), primary_key=True),
    Column("method", Text, primary_key=True),  # which model and prompt made it
    Column("namespace_id", Number, nullable=False),
    Column("text", Text, nullable=False),
)

activations = Table(
    "activations",
    metadata,
    Column("segment_pk", Number, ForeignKey("segments.pk", ondelete="CASCADE"), primary_key=True),
    Column("namespace_id", Number, nullable=False),
    Column("seq", Number, nullable=False),  # of the query in whose context the segment last stood
    Index("ix_activations_namespace", "namespace_id"),
)

scores = Table(
    "scores",
    metadata,
    Column("pk", Number, primary_key=True),
    Column("namespace_id", Number, ForeignKey("namespaces.id"), nullable=False),
    Column("key", Text, nullable=False),  # digest of model, question and text
    Column("value", JSON, nullable=False),
    UniqueConstraint("namespace_id", "key"),
)

bank = Table(
    "bank",
    metadata,
    Column("segment_pk", Number, ForeignKey("segments.pk", ondelete="CASCADE"), primary_key=True),
    Column("fingerprint", Text, primary_key=True),  # of model, prompt and form
    Column("namespace_id", Number, nullable=False),
    Column("seq", Number, nullable=False),
    Column("file", Text, nullable=False),  # its name in the namespace's folder
    Column("n_tokens", Number, nullable=False),
    Column("n_bytes", Number, nullable=False),  # of the file and the chunks together
    Column("sha256", Text, nullable=False),  # of the file
    Column("used", Number, nullable=False),  # the namespace's last seq when it was last written or used
    Column("surprisal", Float),
    Column("chunks", LargeBinary, nullable=False),  # mean keys, float16, [chunks, kv_heads, head_dim]
    Index("ix_bank_namespace", "namespace_id", "seq"),
)

UNMADE = text("fingerprint IS NULL")

items = Table(
    "items",
    metadata,
    Column("pk", Number, primary_key=True),
    Column("namespace_id", Number, ForeignKey("namespaces.id"), nullable=False),
    Column("path", Text, nullable=False),  # JSON array, as namespaces.labels
    Column("key", Text, nullable=False),
    Column("value", JSON, nullable=False),
    Column("created_at", Text, nullable=False),  # ISO 8601, UTC; the others too
    Column("updated_at", Text, nullable=False),
    Column("ttl_minutes", Float),
    Column("expires_at", Text),
    UniqueConstraint("namespace_id", "path", "key"),
    Index("ix_items_updated", "namespace_id", "updated_at"),
    Index("ix_items_expires", "namespace_id", "expires_at"),
    sqlite_autoincrement=True,
)

item_texts = Table(
    "item_texts",
    metadata,
    Column("pk", Number, primary_key=True),
    Column("item_pk", Number, ForeignKey("items.pk", ondelete="CASCADE"), nullable=False),
    Column("namespace_id", Number, nullable=False),
    Column("field", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("fingerprint", Text),  # NULL, or another embedder's: the vector is still to be made
    Column("vector", LargeBinary),  # float32, little-endian, unit length
    CheckConstraint("(fingerprint IS NULL) = (vector IS NULL)"),
    Index("ix_item_texts_item", "item_pk"),
    Index("ix_item_texts_pending", "namespace_id", "fingerprint"),
    Index("ix_item_texts_unmade", "namespace_id", "pk", sqlite_where=UNMADE, postgresql_where=UNMADE),
    sqlite_autoincrement=True,  # a vector that was made for a text that is gone must not land on another
)

tombstones = Table(
    "tombstones",
    metadata,
    Column("namespace_id", Number, ForeignKey("namespaces.id"), primary_key=True),
    Column("digest", LargeBinary, primary_key=True),  # of what was forgotten, and must not come back by itself
    Column("kind", Text, nullable=False),  # of a name: see tombstones
    sqlite_with_rowid=False,
)

traces = Table(
    "traces",
    metadata,
    Column("namespace_id", Number, ForeignKey("namespaces.id"), primary_key=True),
    Column("id", String(36), primary_key=True),
    Column("query_id", String(36), index=True),
    Column("reply_id", String(36), index=True),
    Column("created_at", Text, nullable=False),
    Column("body", JSON, nullable=False),
    Index("ix_traces_namespace", "namespace_id", "created_at"),
)
