"""The first tables. Ledgers from before there were revisions have some of them or all."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.operations import Operations

from service.schema import RevisionError

revision = "0001"
down_revision = None


def upgrade(op: Operations) -> None:
    """Make what is missing."""
    key = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    make(
        op,
        "bundles",
        sa.Column("bundle", sa.Integer, primary_key=True),
        sa.Column("identity", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("task", sa.Text, nullable=False),
        sa.Column("width", sa.Integer),
        sa.Column("classes", sa.Text),
        sa.Column("levels", sa.Text),
        sa.UniqueConstraint("model", "version", "identity"),
    )
    make(
        op,
        "predictions",
        sa.Column("seq", key, primary_key=True),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("bundle", sa.Integer, nullable=False),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("grp", sa.BigInteger),
        sa.Column("level", sa.Text),
        sa.Column("label", sa.Integer),
        sa.Column("confidence", sa.Double),
        sa.Column("bin", sa.SmallInteger),
        sa.Column("entropy", sa.Double),
        sa.Column("probs", sa.LargeBinary),
        sa.Column("set", sa.LargeBinary),
        sa.Column("set_size", sa.Integer),
        sa.Column("mean", sa.LargeBinary),
        sa.Column("std", sa.LargeBinary),
        sa.Column("lower", sa.LargeBinary),
        sa.Column("upper", sa.LargeBinary),
        sa.Column("quantiles", sa.LargeBinary),
        sa.Column("ood_pvalue", sa.Double),
        sa.Column("ood", sa.Boolean),
        sa.Column("abstain", sa.Boolean),
    )
    make(
        op,
        "images",
        sa.Column("seq", key, primary_key=True),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("bundle", sa.Integer, nullable=False),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("level", sa.Text),
        sa.Column("confidence", sa.Double),
        sa.Column("entropy", sa.Double),
        sa.Column("set_size", sa.Double),
        sa.Column("std", sa.Double),
        sa.Column("ood", sa.Double),
        sa.Column("abstain", sa.Double),
        sa.Column("ood_pvalue", sa.Double),
    )
    make(
        op,
        "labels",
        sa.Column("seq", key, primary_key=True),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("value", sa.Text, nullable=False),
        sa.Column("received", sa.Double, nullable=False),
        sa.Column("joined", sa.Double),
        sa.Column("next_try", sa.Double, nullable=False),
    )
    make(
        op,
        "feedback",
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("result", sa.Text, primary_key=True),
        sa.Column("n", sa.BigInteger, nullable=False),
    )
    for table in ("predictions", "images", "labels"):
        op.create_index(f"{table}_id", table, ["model", "id"], unique=True, if_not_exists=True)
    op.create_index(
        "predictions_served",
        "predictions",
        ["bundle", "time", "bin", "confidence"],
        if_not_exists=True,
    )
    op.create_index("images_served", "images", ["bundle", "time"], if_not_exists=True)
    pending = sa.column("joined").is_(None)
    op.create_index(
        "labels_pending",
        "labels",
        ["next_try"],
        sqlite_where=pending,
        postgresql_where=pending,
        if_not_exists=True,
    )


def make(op: Operations, name: str, *parts: sa.schema.SchemaItem) -> None:
    """Make a table unless it is there. Raises RevisionError for one that is somebody else's."""
    found = sa.inspect(op.get_bind())
    if not found.has_table(name):
        op.create_table(name, *parts)
        return
    there = {column["name"] for column in found.get_columns(name)}
    if lacking := sorted({p.name for p in parts if isinstance(p, sa.Column)} - there):
        raise RevisionError(
            f"{op.get_bind().engine.url.database} has a table {name} that is no ledger's (it has "
            f"no {', '.join(lacking)}); give the ledger a file or a database of its own"
        )
