"""Entries of texts in which letters touch a script without spaces: both were one term, and so found by neither."""

import sqlalchemy as sa
from alembic import op

from memory_os.lexical import terms_of
from memory_os.stores import fulltext

revision = "0008"
down_revision = "0007"

BATCH = 500
PAGE = "SELECT pk, text FROM segments WHERE namespace_id = :ns AND pk > :last ORDER BY pk LIMIT :n"


def upgrade() -> None:
    """Make the entries anew that differ, and the statistics of BM25."""
    connection = op.get_bind()
    changed = False
    for ns in connection.execute(sa.text("SELECT id FROM namespaces")).scalars().all():
        last = 0
        while rows := connection.execute(sa.text(PAGE), {"ns": ns, "last": last, "n": BATCH}).all():
            last = rows[-1].pk
            right = {row.pk: terms_of(row.text) for row in rows if not row.text.isascii()}
            stored = fulltext.read(connection, ns, list(right))
            stale = [pk for pk, terms in right.items() if stored.get(pk) != terms]
            fulltext.remove(connection, ns, stale)
            fulltext.add(connection, [(pk, ns, right[pk]) for pk in stale])
            changed = changed or bool(stale)
    if changed:
        fulltext.recount(connection)
