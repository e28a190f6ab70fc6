"""How PostgreSQL is reached: what libpq's users write down, passwords, encryption, silence.

The server is real. It is built without TLS, so a relay that ends TLS stands before it.
"""

from __future__ import annotations

import pwd
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from service import libpq
from service.ledger import Ledger
from service.schema import LedgerError, is_away, ledger_url, make_engine, short
from tests.supply.keys import certificate, make_pair


def asked(text: str, **environment: str) -> dict[str, str]:
    """The keywords that a URL and an environment come to, without those nobody asked for."""
    return libpq.parameters(sa.make_url(text), {"PGPASSFILE": "/nowhere", **environment})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for files of libpq; the environment says nothing of PostgreSQL."""
    for name in (*libpq.VARIABLES.values(), "PGSERVICEFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_url_goes_before_the_service_and_that_before_the_variables(folder: Path) -> None:
    file = folder / "services"
    file.write_text("# ours\n[books]\nhost=shelf\nport=5433\nuser=reader\npassword=p%q#1=x\n")
    found = asked(
        "postgresql://writer@/ledger?service=books&sslmode=require",
        PGSERVICEFILE=str(file),
        PGHOST="elsewhere",
        PGAPPNAME="me",
    )
    assert found["host"] == "shelf" and found["port"] == "5433"
    assert found["user"] == "writer" and found["dbname"] == "ledger"
    assert found["password"] == "p%q#1=x" and found["sslmode"] == "require"
    assert found["application_name"] == "me" and found["connect_timeout"] == "5"
    by_variable = asked("postgresql://", PGSERVICE="books", PGSERVICEFILE=str(file))
    assert (by_variable["host"], by_variable["dbname"]) == ("shelf", "reader")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("target_session_attrs=any", r"'target_session_attrs' is no keyword.*known are host, port"),
        ("sslmode=maybe", "sslmode is one of disable, prefer.*not 'maybe'"),
        ("connect_timeout=soon", "connect_timeout is a number, not 'soon'"),
        ("service=none", r"there is no service \[none\] in .*services"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_opened(
    query: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "services").write_text("[books]\nhost=shelf\n")
    monkeypatch.setenv("PGSERVICEFILE", str(folder / "services"))
    with pytest.raises(LedgerError, match=message):
        Ledger.open(f"postgresql://there/books?{query}")


def test_a_service_file_that_is_none_is_refused(folder: Path) -> None:
    with pytest.raises(libpq.ParameterError, match="cannot be read"):
        asked("postgresql:///x?service=a", PGSERVICEFILE=str(folder / "missing"))
    (folder / "bad").write_bytes(b"host=\xff\n")
    with pytest.raises(libpq.ParameterError, match="cannot be read"):
        asked("postgresql:///x?service=a", PGSERVICEFILE=str(folder / "bad"))


def test_a_user_without_a_name_and_a_home_needs_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container, where a process runs under a number."""

    def nobody(number: int) -> None:
        raise KeyError(number)

    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    url = sa.make_url("postgresql://writer@shelf/books")
    assert libpq.parameters(url, {})["user"] == "writer"
    with pytest.raises(libpq.ParameterError, match="say as which user"):
        libpq.parameters(sa.make_url("postgresql://shelf/books"), {})


FIELD = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1)


@given(fields=st.lists(FIELD, min_size=5, max_size=5), other=FIELD)
def test_a_password_file_says_what_was_written(
    fields: list[str], other: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("pass") / "file"
    host, _, database, user, password = fields
    lines = [[host, "1", "*", user, "another port"], ["*", "5432", database, user, password]]
    written = [[f.replace("\\", r"\\").replace(":", r"\:") for f in line] for line in lines]
    file.write_text("# a comment\nno line\n" + "\n".join(map(":".join, written)) + "\n")
    wanted = {"host": host, "port": "5432", "dbname": database, "user": user}
    found = libpq._kept_password(wanted | {"passfile": str(file)})
    # A star stands for all, and a line that begins like a comment is one.
    assert found == password
    if "*" not in (database, user) and other != user:
        assert libpq._kept_password(wanted | {"user": other, "passfile": str(file)}) is None


@pytest.fixture(scope="module")
def guarded(postgres) -> str:
    """The socket folder of a server that asks the user `guarded` for a password."""
    postgres.psql("CREATE USER guarded PASSWORD 'first'")
    postgres.psql("CREATE DATABASE guarded OWNER guarded")
    rules = Path(postgres.pgdata) / "pg_hba.conf"
    rules.write_text("local all guarded scram-sha-256\n" + rules.read_text())
    postgres.psql("SELECT pg_reload_conf()")
    return str(sa.make_url(postgres.get_uri()).query["host"])


def who(url: str) -> str:
    engine = make_engine(ledger_url(url))
    try:
        with engine.connect() as conn:
            return str(conn.execute(sa.text("SELECT current_user")).scalar_one())
    finally:
        engine.dispose()


def test_passwords_of_every_kind_open_the_door(
    guarded: str, postgres, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(url: str) -> str:
        with pytest.raises(sa.exc.DBAPIError) as caught:
            who(url)
        assert is_away(caught.value), "it may be renewed, so that rows have to wait"
        return short(caught.value)

    bare = f"postgresql://guarded@/guarded?host={guarded}"
    assert "the server asks for a password, and there is none" in refused(bare)
    assert who(bare.replace("guarded@", "guarded:first@")) == "guarded"
    told = refused(bare.replace("guarded@", "guarded:wrong@"))
    assert told == 'password authentication failed for user "guarded"'
    monkeypatch.setenv("PGPASSWORD", "first")
    assert who(bare) == "guarded"
    monkeypatch.delenv("PGPASSWORD")
    (folder / ".pgpass").write_text("*:*:*:guarded:first\n")
    assert who(bare) == "guarded"
    (folder / ".pgpass").unlink()
    service = folder / "services"
    service.write_text(f"[s]\nhost={guarded}\nuser=guarded\ndbname=guarded\npassword=first\n")
    monkeypatch.setenv("PGSERVICEFILE", str(service))
    assert who("postgresql:///?service=s") == "guarded"


def test_a_renewed_password_needs_no_restart(
    guarded: str, postgres, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    postgres.psql("ALTER USER guarded PASSWORD 'first'")
    (folder / ".pgpass").write_text("*:*:*:guarded:first\n")
    engine = make_engine(ledger_url(f"postgresql://guarded@/guarded?host={guarded}"))
    for password in ("first", "second", "first"):
        postgres.psql(f"ALTER USER guarded PASSWORD '{password}'")
        (folder / ".pgpass").write_text(f"*:*:*:guarded:{password}\n")
        engine.dispose()
        with engine.connect() as conn:
            assert conn.execute(sa.text("SELECT 1")).scalar_one() == 1
    engine.dispose()


def issue(folder: Path, host: str, name: str) -> tuple[Path, Path, Path]:
    """An authority of that name, and the certificate and key of a server that it signed for."""
    above, below = make_pair(folder, name), make_pair(folder, f"{name}-server")
    root, own = folder / f"{name}.crt", folder / f"{name}-server.crt"
    root.write_bytes(certificate(name, above.key, name, above.key, authority=True))
    own.write_bytes(certificate(host, below.key, name, above.key, authority=False, host=host))
    return root, own, below.private


def pipe(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


@contextmanager
def relay(inside: str, context: ssl.SSLContext | None) -> Iterator[int]:
    """A port of 127.0.0.1 where a client finds the server of a Unix socket, behind TLS if there is
    a context. Eight bytes ask for TLS, and a letter answers (PostgreSQL's protocol, SSLRequest)."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def serve(client: socket.socket) -> None:
            with client, suppress(OSError):
                if context is None:
                    meet(client)
                    return
                client.recv(8, socket.MSG_WAITALL)
                client.sendall(b"S")
                with context.wrap_socket(client, server_side=True) as hidden:
                    meet(hidden)

        def meet(client: socket.socket) -> None:
            with socket.socket(socket.AF_UNIX) as server:
                server.connect(inside)
                back = threading.Thread(target=pipe, args=(server, client))
                back.start()
                pipe(client, server)
                back.join()

        def accept() -> None:
            threads = []
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    threads.append(threading.Thread(target=serve, args=(client,)))
                    threads[-1].start()
            for thread in threads:
                thread.join()

        taking = threading.Thread(target=accept)
        taking.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            taking.join()


@pytest.fixture(scope="module")
def inside(postgres) -> str:
    return f"{sa.make_url(postgres.get_uri()).query['host']}/.s.PGSQL.5432"


@pytest.mark.parametrize(
    ("query", "signed", "name", "trouble"),
    [
        ("sslmode=verify-full&sslrootcert={ours}", "ours", "localhost", None),
        ("sslmode=verify-full&sslrootcert={ours}", "ours", "elsewhere", "certificate is not valid"),
        ("sslmode=verify-ca&sslrootcert={ours}", "ours", "elsewhere", None),
        ("sslmode=verify-ca&sslrootcert={ours}", "theirs", "localhost", "verify failed"),
        ("sslmode=require&sslrootcert={ours}", "theirs", "localhost", "verify failed"),
        ("sslmode=require", "theirs", "elsewhere", None),
        ("sslmode=verify-full&sslrootcert=system", "ours", "localhost", "verify failed"),
        ("sslmode=prefer", "theirs", "elsewhere", None),
        ("sslmode=prefer", None, "", None),
        ("sslmode=disable", None, "", None),
        ("sslmode=require", None, "", "refuses SSL"),
        ("sslmode=verify-full&sslrootcert={ours}.none", "ours", "localhost", "No such file"),
    ],
)
def test_encryption_is_as_strict_as_asked(
    query: str, signed: str | None, name: str, trouble: str | None, inside: str, folder: Path
) -> None:
    ours, *server = issue(folder, name or "nobody", "ours")
    context = None
    if signed is not None:
        if signed == "theirs":
            _, *server = issue(folder, name, "theirs")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*server)
    with relay(inside, context) as port:
        query = query.format(ours=ours)
        url = f"postgresql://postgres@localhost:{port}/postgres?{query}"
        if trouble is None:
            assert who(url) == "postgres"
            return
        with pytest.raises(sa.exc.DBAPIError, match=trouble) as caught:
            who(url)
        assert is_away(caught.value)


def test_a_server_that_says_nothing_is_given_up(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://a@127.0.0.1:{silent.getsockname()[1]}/a"
        with pytest.raises(sa.exc.DBAPIError) as caught:
            who(f"{url}?connect_timeout=1&sslmode=disable")
        assert is_away(caught.value)
        with pytest.raises(sa.exc.DBAPIError, match="timed out"):
            who(f"{url}?connect_timeout=1")


def test_a_statement_may_take_longer_than_connecting(postgres_url: str) -> None:
    engine = make_engine(ledger_url(f"{postgres_url}&connect_timeout=1"))
    with engine.connect() as conn:
        assert conn.execute(sa.text("SELECT 1 FROM pg_sleep(1.5)")).scalar_one() == 1
    engine.dispose()


def test_rows_at_fault_are_told_from_a_store_that_is_away(postgres_url: str) -> None:
    engine = make_engine(ledger_url(postgres_url))
    faults = {
        "SELECT 1 / 0": False,  # 22012
        "CREATE TABLE t (a int PRIMARY KEY); INSERT INTO t VALUES (1), (1)": False,  # 23505
        "SELECT * FROM nowhere": True,  # 42P01: the tables may be made yet
        "SELECT pg_terminate_backend(pg_backend_pid())": True,  # 57P01
    }
    for statement, away in faults.items():
        with pytest.raises(sa.exc.DBAPIError) as caught, engine.begin() as conn:
            for one in statement.split(";"):
                conn.exec_driver_sql(one)
        assert is_away(caught.value) is away, statement
        assert "\n" not in short(caught.value) and "{" not in short(caught.value)
    engine.dispose()


def test_without_the_driver_the_extra_is_named(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['pg8000'] = None\n"
        "from service.ledger import Ledger\n"
        "Ledger.open('postgresql://127.0.0.1:1/x')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode and "pip install 'hedged[postgres]'" in done.stderr
