"""Flag before environment before file before default; and the command line as processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hedged
from tests.hedged.conftest import Call, assert_one_line
from tests.ports import held_port
from tests.service.helpers import poll

# Flag > environment > file > default


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], list[object]]:
    """The arguments that name a configuration of the given text."""

    def config(text: str) -> list[object]:
        (tmp_path / "hedged.toml").write_text(text)
        return ["--config", tmp_path / "hedged.toml"]

    return config


def test_flag_before_environment_before_file_before_default(
    call: Call,
    fit_arguments: list[object],
    config: Callable[[str], list[object]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def method(*before: object, after: tuple[object, ...] = ()) -> tuple[str, int, str]:
        shutil.rmtree(tmp_path / "bundle", ignore_errors=True)
        done = call(*before, *fit_arguments, *after, "--json")
        assert done.code == 0, done.err
        found = done.json
        return found["module"]["name"], found["splits"]["seed"], found["conformal"]["method"]

    assert method() == ("laplace", 0, "lac")
    file = config('[fit]\nmethod = "none"\nseed = 5\nconformal = "raps"\n')
    assert method(*file) == ("none", 5, "raps")
    monkeypatch.setenv("HEDGED_FIT_METHOD", "laplace")
    monkeypatch.setenv("HEDGED_FIT_SEED", "6")
    assert method(*file) == ("laplace", 6, "raps")
    assert method(*file, after=("--seed", "7")) == ("laplace", 7, "raps")
    monkeypatch.setenv("HEDGED_CONFIG", str(file[1]))
    assert method() == ("laplace", 6, "raps")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[fit]\nmetod = 'none'\n", "hedged fit has no option 'metod'; it has"),
        ("[fitt]\nmethod = 'none'\n", "no command 'fitt'; demo, fit"),
        ("method = 'none'\n", "no command 'method'"),
        ("[fit\n", "hedged.toml"),
    ],
)
def test_a_file_with_unknown_keys_is_refused(
    call: Call, config: Callable[[str], list[object]], text: str, message: str
) -> None:
    assert_one_line(call(*config(text), "modules"), message)


def test_a_misspelt_variable_of_the_command_is_refused(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEDGED_MODULES_JSN", "1")
    assert_one_line(
        call("modules"), "hedged modules has no option for the variable HEDGED_MODULES_JSN; it"
    )
    monkeypatch.delenv("HEDGED_MODULES_JSN")
    monkeypatch.setenv("HEDGED_SCORE_BATCHSIZE", "1")  # another command's business
    assert call("modules").code == 0


def test_a_file_that_is_not_there(call: Call, tmp_path: Path) -> None:
    assert_one_line(call("--config", tmp_path / "none.toml", "modules"), "none.toml")


def test_a_wrong_value_in_the_environment_is_wrong_usage(
    call: Call, fit_arguments: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEDGED_FIT_SEED", "many")
    done = call(*fit_arguments)
    assert (done.code, done.out) == (2, "") and "--seed" in done.err


# As processes


def process(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hedged", *map(str, arguments)],
        env=environment(**environ),
        capture_output=True,
        text=True,
        timeout=120,
    )


def environment(**environ: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HEDGED_")}
    return kept | environ


def test_a_process_keeps_stdout_for_json(
    fit_arguments: list[object], folder: Path, tmp_path: Path
) -> None:
    done = process(*fit_arguments, "--json", HEDGED_FIT_METHOD="none")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["module"]["name"] == "none"
    wrong = process("verify", folder)
    assert wrong.returncode == 1 and wrong.stdout == ""
    assert wrong.stderr.splitlines() == [
        f"hedged: {folder}: manifest.json cannot be read (No such file or directory)"
    ]
    script = Path(sys.executable).with_name("hedged")
    version = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.strip() == hedged.__version__


def test_a_server_starts_beside_variables_of_other_commands(
    classification_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "hedged.toml").write_text("[fit]\nseed = 1\n")
    others = {
        "HEDGED_FIT_METHOD": "none",
        "HEDGED_SCORE_BATCH_SIZE": "64",
        "HEDGED_EVALUATE_OUT": "elsewhere",
        "HEDGED_CONFIG": str(tmp_path / "hedged.toml"),
    }
    with held_port() as port:
        own = {"HEDGED_DATA_DIR": str(tmp_path), "HEDGED_PORT": str(port), "HEDGED_MAX_ROWS": "3"}
        log = (tmp_path / "server.log").open("wb")
        server = subprocess.Popen(
            [sys.executable, "-m", "hedged", "serve", str(classification_bundle)],
            env=environment(**others, **own),
            stdout=log,
            stderr=log,
        )
        url = f"http://127.0.0.1:{port}"
        try:
            poll(lambda: ready(url) or server.poll() is not None, bool, seconds=90)
            assert server.poll() is None, (tmp_path / "server.log").read_text()
            rows = [dict.fromkeys("abcd", 0.5)] * 4
            answer = post(f"{url}/v1/predict", {"rows": rows[:3]})
            assert len(answer["predictions"]) == 3
            # The setting that has no flag holds.
            with pytest.raises(urllib.error.HTTPError) as refused:
                post(f"{url}/v1/predict", {"rows": rows})
            assert 400 <= refused.value.code < 500
            refused.value.close()
        finally:
            server.terminate()
            server.wait(60)
            log.close()


def ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as e:
        e.close()
        return False
    except OSError:
        return False


def post(url: str, body: object) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


def test_a_server_still_refuses_a_misspelt_setting(
    classification_bundle: Path, tmp_path: Path
) -> None:
    done = process(
        "serve", classification_bundle, HEDGED_MAX_RWOS="5", HEDGED_DATA_DIR=str(tmp_path)
    )
    assert done.returncode == 1
    assert done.stderr.startswith("hedged: unknown setting HEDGED_MAX_RWOS; known are ")


@pytest.mark.parametrize(
    ("arguments", "name"), [(["--port", "70000"], "HEDGED_PORT"), (["--device", "tpu"], "HEDGED_")]
)
def test_a_server_names_a_setting_out_of_range(
    classification_bundle: Path, tmp_path: Path, arguments: list[str], name: str
) -> None:
    done = process("serve", classification_bundle, *arguments, HEDGED_DATA_DIR=str(tmp_path))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("hedged: ") and name in done.stderr
    assert len(done.stderr.splitlines()) == 1
