"""Ledgers of every age are opened: new, from before there were revisions, older, and newer."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from service import migrations
from service.ledger import Ledger, LedgerError
from service.schema import ledger_url, make_engine, metadata
from tests.service.ledger.helpers import entry, join, labels, record, until
from tests.service.streams import IDENTITY, MODEL, VERSION, classification

NEXT = '''
"""A column more."""
import sqlalchemy as sa
revision, down_revision = "next", "{head}"
def upgrade(op):
    op.add_column("predictions", sa.Column("weight", sa.Double))
    {more}
'''


@pytest.fixture
def engine(url):
    found = ledger_url(url)
    if found.database and found.get_backend_name() == "sqlite":
        Path(found.database).parent.mkdir(parents=True, exist_ok=True)
    engine = make_engine(found)
    yield engine
    engine.dispose()


@pytest.fixture
def following(tmp_path, monkeypatch):
    """Makes the revision ``next``, which follows today's, known to this process."""

    def follow(more: str = "pass") -> None:
        pages = tmp_path / "pages"
        (pages / "versions").mkdir(parents=True, exist_ok=True)
        for page in (Path(migrations.__file__).parent / "versions").glob("r*.py"):
            (pages / "versions" / page.name).write_text(page.read_text())
        text = NEXT.format(head=migrations.HEAD, more=more)
        (pages / "versions" / "next.py").write_text(text)
        monkeypatch.setattr(migrations, "_PAGES", pages)
        monkeypatch.setattr(migrations, "HEAD", "next")

    return follow


def columns(engine: sa.Engine, table: str = "predictions") -> set[str]:
    return {column["name"] for column in sa.inspect(engine).get_columns(table)}


def revision(engine: sa.Engine) -> str | None:
    with engine.connect() as conn:
        return migrations.current(conn)


def test_the_revisions_make_what_the_code_says(engine):
    migrations.upgrade(engine)
    with engine.connect() as conn:
        options = {"version_table": migrations.VERSION_TABLE, "compare_type": True}
        context = MigrationContext.configure(conn, opts=options)
        assert compare_metadata(context, metadata) == []
    pages = ScriptDirectory(Path(migrations.__file__).parent)
    assert pages.get_heads() == [migrations.HEAD] == [revision(engine)]


def test_a_ledger_from_before_revisions_is_kept_and_stamped(url, engine, open_ledger):
    metadata.create_all(engine)
    with engine.begin() as conn:
        made = {"bundle": 1, "identity": IDENTITY, "model": MODEL, "version": VERSION}
        conn.execute(sa.insert(metadata.tables["bundles"]).values(made | {"task": "regression"}))
        metadata.tables["images"].drop(conn)  # the oldest had none
    ledger = open_ledger(url)
    assert revision(engine) == migrations.HEAD
    assert entry(ledger)["version"] == VERSION
    assert columns(engine, "images") == {c.name for c in metadata.tables["images"].columns}


def test_tables_of_somebody_else_are_refused_and_left_alone(url, engine):
    with engine.begin() as conn:
        conn.execute(sa.text("CREATE TABLE labels (id INTEGER, seq INTEGER, price INTEGER)"))
    with pytest.raises(LedgerError, match=r"table labels .* no joined, model, next_try"):
        Ledger.open(url)
    assert sa.inspect(engine).get_table_names() == ["labels"]


def test_an_older_ledger_is_upgraded_by_many_at_once(url, engine, open_ledger, following):
    ledger = open_ledger(url)
    stream = classification(20)
    record(ledger, stream)
    ledger.add_labels(labels(stream))
    ledger.flush()
    following()
    failed: list[Exception] = []

    def upgrade() -> None:
        own = make_engine(ledger_url(url))
        try:
            migrations.upgrade(own)
        except Exception as e:
            failed.append(e)
        finally:
            own.dispose()

    threads = [threading.Thread(target=upgrade) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    assert revision(engine) == "next" and "weight" in columns(engine)
    # Who opened it before goes on.
    assert record(ledger, classification(25), [*range(20, 25)])
    ledger.flush()
    assert len(join(ledger)) == 20
    assert (entry(ledger)["served"], entry(ledger)["labelled"]) == (25, 20)


def test_a_revision_that_fails_changes_nothing(url, engine, open_ledger, following):
    open_ledger(url).close()
    before = revision(engine)
    following("op.drop_table('no_such_table')")
    with pytest.raises(sa.exc.DBAPIError, match="no_such_table"):
        migrations.upgrade(engine)
    assert revision(engine) == before and "weight" not in columns(engine)


def restamp(engine: sa.Engine, text: str) -> None:
    with engine.begin() as conn:
        conn.execute(sa.text(f"UPDATE {migrations.VERSION_TABLE} SET version_num = '{text}'"))


def test_a_newer_ledger_is_refused(url, engine, open_ledger):
    open_ledger(url).close()
    restamp(engine, "9999")
    with pytest.raises(LedgerError, match=r"revision 9999, .* up to \d{4}: upgrade hedged"):
        Ledger.open(url)
    assert revision(engine) == "9999"


def test_what_a_newer_ledger_refuses_waits_in_the_spool(
    postgres, postgres_url, tmp_path, open_ledger
):
    engine = make_engine(ledger_url(postgres_url))
    open_ledger(postgres_url).close()
    restamp(engine, "9999")
    postgres.stop()
    ledger = open_ledger(postgres_url)  # nobody can say yet that it is newer
    record(ledger, classification(8))
    postgres.ensure_postgres_running()
    record(ledger, classification(12), [8, 9, 10, 11])
    ledger.flush()
    assert ledger.spooling
    restamp(engine, migrations.HEAD)
    until(lambda: not ledger.spooling)
    assert entry(ledger)["served"] == 12
    engine.dispose()


def test_a_ledger_of_today_is_opened_without_alembic(tmp_path):
    code = (
        "import sys\n"
        "from service.ledger import Ledger\n"
        "ledger = Ledger.open(sys.argv[1])\n"
        "ledger.close()\n"
        "print('alembic' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "l.sqlite")]
    said = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2)]
    assert [done.stdout.strip() for done in said] == ["True", "False"]
