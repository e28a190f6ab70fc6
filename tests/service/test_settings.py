"""Settings from the environment, and the documentation of each."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.main import get_command

from hedged.cli import app
from service.keys import add_key
from service.settings import COMMANDS, Settings, SettingsError, load_settings


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    import os

    for name in list(os.environ):
        if name.startswith("HEDGED_"):
            monkeypatch.delenv(name)


def test_values_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("HEDGED_BUNDLES", "/srv/bundles")
    monkeypatch.setenv("HEDGED_MAX_ROWS", "7")
    monkeypatch.setenv("HEDGED_LEDGER", "")  # set and empty is not set
    settings = load_settings()
    assert settings.bundle_path == Path("/srv/bundles")
    assert settings.max_rows == 7
    assert settings.ledger_url == "hedged-ledger.sqlite"
    assert Settings(data_dir="/data").ledger_url == "/data/hedged-ledger.sqlite"
    assert Settings(ledger="postgresql://db/x").ledger_url == "postgresql://db/x"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HEDGED_MAX_ROWS", "0"),
        ("HEDGED_MAX_ROWS", "many"),
        ("HEDGED_DEVICE", "tpu"),
        ("HEDGED_REQUEST_TIMEOUT_S", "-1"),
        ("HEDGED_PORT", "70000"),
        ("HEDGED_MAX_RWOS", "5"),
    ],
)
def test_errors_name_the_variable(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name):
        load_settings()


def test_nothing_to_serve_says_what_to_set():
    with pytest.raises(SettingsError, match="HEDGED_BUNDLES"):
        _ = load_settings().bundle_path


def test_every_setting_is_documented():
    for name, field in Settings.model_fields.items():
        assert field.description, name


def test_variables_of_the_command_line_are_not_ours(monkeypatch):
    commands = get_command(app).commands
    assert set(commands) == set(COMMANDS)
    for name, command in commands.items():
        for option in command.params:
            if option.envvar is None:  # those that have one are settings of the service
                monkeypatch.setenv(f"HEDGED_{name}_{option.name}".upper(), "x")
    monkeypatch.setenv("HEDGED_CONFIG", "hedged.toml")
    monkeypatch.setenv("HEDGED_ASSETS", "/srv/assets")
    assert load_settings() == Settings()
    for typo in ("HEDGED_PROT", "HEDGED_FITS_NAME", "HEDGED_CONFIGS"):
        with monkeypatch.context() as m, pytest.raises(SettingsError, match=f"setting {typo};"):
            m.setenv(typo, "1")
            load_settings()


def test_beyond_this_machine_there_must_be_keys_or_the_word(monkeypatch, tmp_path):
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        monkeypatch.setenv("HEDGED_HOST", host)
        assert load_settings().host == host
    for host in ("0.0.0.0", "::", "10.0.0.1", "machine.example"):
        monkeypatch.setenv("HEDGED_HOST", host)
        with pytest.raises(SettingsError, match=r"HEDGED_HOST: .*HEDGED_KEYS .*HEDGED_OPEN"):
            load_settings()
        with monkeypatch.context() as m:
            m.setenv("HEDGED_OPEN", "true")
            assert load_settings().host == host
    monkeypatch.setenv("HEDGED_KEYS", str(tmp_path / "keys.json"))
    with pytest.raises(SettingsError, match=r"^HEDGED_KEYS: .*hedged keys add"):
        load_settings()
    add_key(tmp_path / "keys.json", "a", ["predict"])
    assert load_settings().host == "machine.example"
