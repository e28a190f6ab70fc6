"""An index by which `hedged monitor` follows what was joined."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0002"
down_revision = "0001"


def upgrade(op: Operations) -> None:
    """Index the labels that were joined by when they were."""
    done = sa.column("joined").is_not(None)
    op.create_index(
        "labels_joined",
        "labels",
        ["joined", "seq"],
        sqlite_where=done,
        postgresql_where=done,
        if_not_exists=True,
    )
