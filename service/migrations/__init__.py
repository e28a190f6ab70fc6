"""The revisions of the ledger's tables, by Alembic.

`upgrade` makes the tables of a new ledger and brings an old one to ``HEAD``. A revision is a page
of ``versions/`` whose ``upgrade(op)`` takes an `alembic.operations.Operations`. Revisions go
forward only, and only add what older code can leave alone: while replicas are replaced one by
one, some still write as before.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from service.schema import LEDGER_LOCK, RevisionError, reading

HEAD = "0002"
VERSION_TABLE = "hedged_revision"  # not Alembic's usual name: the database may be shared
_PAGES = Path(__file__).parent
_VERSION = sa.table(VERSION_TABLE, sa.column("version_num"))


def current(conn: sa.Connection) -> str | None:
    """The revision of a ledger; None for a new one, and for one from before there were any."""
    if not sa.inspect(conn).has_table(VERSION_TABLE):
        return None
    return conn.execute(sa.select(_VERSION.c.version_num)).scalar_one_or_none()


def upgrade(engine: sa.Engine) -> None:
    """Bring a ledger to HEAD in one transaction; safe when several processes do it at once.

    A ledger that is there already costs one look. Raises RevisionError for one that is newer, or
    whose tables lack columns.
    """
    with reading(engine).begin() as conn:
        if current(conn) == HEAD:
            return
    with engine.begin() as conn:  # on SQLite the only writer
        if conn.dialect.name == "postgresql":
            conn.execute(sa.select(sa.func.pg_advisory_xact_lock(LEDGER_LOCK)))
        revision = current(conn)
        if revision != HEAD:
            _run(conn, revision)


def _run(conn: sa.Connection, revision: str | None) -> None:
    # Here and not above: most processes find nothing to do, and it takes a quarter of a second.
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext, MigrationStep
    from alembic.script import ScriptDirectory

    pages = ScriptDirectory(_PAGES)
    known = [page.revision for page in pages.walk_revisions()]
    if revision is not None and revision not in known:
        raise RevisionError(
            f"the ledger {conn.engine.url.database} is of revision {revision}, and this hedged "
            f"knows those up to {HEAD}: upgrade hedged"
        )
    steps = [
        MigrationStep.upgrade_from_script(pages.revision_map, page)
        for page in reversed(list(pages.iterate_revisions(HEAD, revision or "base")))
    ]
    context = MigrationContext.configure(
        conn, opts={"fn": lambda *_: steps, "version_table": VERSION_TABLE}
    )
    context.run_migrations(op=Operations(context))
