"""Input and output on an object store, which fails at times: the same bytes, or a clear error."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from hedged.cli import app
from service.scoring import ErrorRatioError, ScoringError, score
from service.scoring.output import open_output, write_file
from service.scoring.places import open_place
from tests.service.scoring.conftest import outputs, tree, write_input
from tests.service.scoring.store import Proxy, running_store

ROOT = Path(__file__).parents[3]
SETTINGS: dict[str, Any] = {"batch_size": 64, "threads": 1, "passthrough": ["day"]}
FILES = 4


def long(*values: Any) -> list[Any]:
    """Parameters that only the whole matrix has."""
    return [pytest.param(value, marks=pytest.mark.long) for value in values]


@pytest.fixture(scope="module")
def store() -> Iterator[Proxy]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with running_store() as proxy:
            yield proxy


def url(store: Proxy, path: str, user: str = "") -> str:
    options = f"scheme=http&endpoint_override=127.0.0.1:{store.port}&region=us-east-1"
    return f"s3://{user}{path}?{options}&allow_bucket_creation=true"


def objects(store: Proxy, path: str) -> dict[str, bytes]:
    """Every object below a prefix."""
    fs, _ = pafs.FileSystem.from_uri(url(store, "any"))
    found = fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    return {
        info.path[len(path) + 1 :]: fs.open_input_file(info.path).readall()
        for info in found
        if info.type == pafs.FileType.File
    }


@pytest.fixture(scope="module")
def source(store: Proxy, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of the store with Parquet files, in three of which some rows are bad."""
    folder = tmp_path_factory.mktemp("s3") / "input"
    write_input(folder, FILES, 200, bad={2: (5, 70), 3: (0,)})
    fs, _ = pafs.FileSystem.from_uri(url(store, "lake"))
    fs.create_dir("lake")
    fs.create_dir("out")
    pafs.copy_files(str(folder), "lake/in put", destination_filesystem=fs)
    return "lake/in put"


@pytest.fixture(scope="module")
def want(
    store: Proxy, source: str, bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The output of a run over the store's files into a folder of this machine."""
    out = tmp_path_factory.mktemp("s3") / "want"
    score(bundle, url(store, source), out, **SETTINGS)
    return tree(out)


def test_an_object_store_holds_the_bytes_of_a_folder(
    store: Proxy, source: str, bundle: Path, want: dict[str, bytes], tmp_path: Path
) -> None:
    summary = score(bundle, url(store, source), url(store, "out/whole"), **SETTINGS)
    assert objects(store, "out/whole") == want
    assert summary.output == "s3://out/whole"
    assert {n for n in want if n.startswith("_errors/")} == {
        "_errors/half=0/part-02.parquet",
        "_errors/half=1/part-03.parquet",
    }
    again = score(bundle, url(store, source), url(store, "out/whole"), **SETTINGS)
    assert again.resumed == FILES
    # The same rows on this machine have the same answers.
    local = tmp_path / "in"
    for name, data in objects(store, source).items():
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes(data)
    score(bundle, local, tmp_path / "out", **SETTINGS)
    for name in outputs(tmp_path / "out"):
        (tmp_path / "s3.parquet").write_bytes(want[name])
        mine = pq.read_table(tmp_path / "out" / name, partitioning=None)
        assert mine.equals(pq.read_table(tmp_path / "s3.parquet"))
    some = score(bundle, url(store, f"{source}/**/*-0[1-3].parquet"), tmp_path / "some", **SETTINGS)
    assert (some.rows, some.fragments) == (201 + 202 + 203, 3)


def test_another_run_and_overwrite(
    store: Proxy, source: str, bundle: Path, want: dict[str, bytes]
) -> None:
    place = url(store, "out/twice")
    score(bundle, url(store, source), place, **{**SETTINGS, "batch_size": 32})
    with pytest.raises(ScoringError, match=r"s3://out/twice holds another run: .*batch_size"):
        score(bundle, url(store, source), place, **SETTINGS)
    score(bundle, url(store, source), place, overwrite=True, **SETTINGS)
    assert objects(store, "out/twice") == want
    with pytest.raises(ErrorRatioError):
        score(bundle, url(store, source), url(store, "out/few"), max_error_ratio=0.001, **SETTINGS)
    assert "_SUCCESS" not in objects(store, "out/few")
    score(bundle, url(store, source), url(store, "out/few"), **SETTINGS)
    assert objects(store, "out/few") == want


@pytest.mark.parametrize("phase", ["writing", *long("scoring", "manifest")])
def test_a_killed_run_resumes_to_the_same_bytes(
    store: Proxy, source: str, bundle: Path, want: dict[str, bytes], phase: str
) -> None:
    place = url(store, f"out/killed-{phase}")
    arguments = {"bundle": str(bundle), "input": url(store, source), "output": place, **SETTINGS}
    request = {"score": arguments, "watch": True, "kill": [phase, 2 if phase == "manifest" else 15]}
    killed = subprocess.run(
        [sys.executable, "-m", "tests.service.scoring.child", json.dumps(request)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = objects(store, f"out/killed-{phase}")
    done = [n for n in left if n.endswith(".parquet") and not n.startswith("_")]
    assert all(want[n] == left[n] for n in left)
    assert phase == "manifest" or 0 < len(done) < FILES
    assert score(**arguments).resumed == len(done)
    assert objects(store, f"out/killed-{phase}") == want


@pytest.mark.parametrize("seed", [0, *long(1, 2, 3)])
def test_a_store_that_fails_and_dawdles_at_times_does_no_harm(
    store: Proxy, source: str, bundle: Path, want: dict[str, bytes], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    kinds = rng.choice(3, size=5000, p=[0.85, 0.1, 0.05])
    kinds[1:][kinds[:-1] == 1] = 0  # never twice in a row: a retry gets through
    store.rule(lambda n, method, target: (None, 500, 0.2)[kinds[n]])
    try:
        score(bundle, url(store, source), url(store, f"out/flaky-{seed}"), **SETTINGS)
        count = len(store.seen)
    finally:
        store.rule()
    assert (kinds[1 : count + 1] == 1).sum() > 3 and (kinds[1 : count + 1] == 2).any()
    assert objects(store, f"out/flaky-{seed}") == want


BROKEN = {
    "listing": ("GET", r"/lake\?.*list-type", r"s3://lake/in put: cannot be listed"),
    "writing": ("PUT|POST", r"/out/.*part-03", r"cannot write s3://out/.*part-03"),
    "resuming": ("GET|HEAD", r"_run.json", r"s3://out/.*/_run.json cannot be read"),
    "reading": ("GET", r"part-03", r"input s3://lake/in put/.*part-03.parquet cannot be fetched"),
    "asking": ("HEAD", r"part-03", r"part-03.parquet cannot be (fetched|asked for)"),
    "manifest": ("PUT|POST", r"_run.json", r"cannot write s3://out/.*/_run.json"),
}


@pytest.mark.parametrize("what", ["writing", *long(*(k for k in BROKEN if k != "writing"))])
def test_a_store_that_is_down_ends_the_run_and_nothing_is_lost(
    store: Proxy, source: str, bundle: Path, want: dict[str, bytes], what: str
) -> None:
    method, target, message = BROKEN[what]
    place = f"out/down-{what}"
    if what == "resuming":
        score(bundle, url(store, source), url(store, place), **SETTINGS)
    store.rule(lambda n, m, t: 500 if re.fullmatch(method, m) and re.search(target, t) else None)
    try:
        with pytest.raises(ScoringError, match=message):
            score(bundle, url(store, source), url(store, place), **SETTINGS)
    finally:
        store.rule()
    left = objects(store, place)
    assert what == "resuming" or "_SUCCESS" not in left
    assert all(want[n] == data for n, data in left.items())
    score(bundle, url(store, source), url(store, place), **SETTINGS)
    assert objects(store, place) == want


@pytest.mark.parametrize("count", [34, *long(31, 37, 999)])  # 31 in a row fail one read
def test_a_store_that_goes_down_while_a_file_is_read_is_no_damaged_file(
    store: Proxy, source: str, bundle: Path, want: dict[str, bytes], count: int
) -> None:
    asked = []

    def later(number: int, method: str, target: str) -> int | None:
        """The footer can be read, the rows cannot, for so many requests."""
        if method == "GET" and "part-01" in target:
            asked.append(number)
            return 500 if 1 < len(asked) <= 1 + count else None
        return None

    name = f"out/later-{count}"
    store.rule(later)
    try:
        with pytest.raises(ScoringError, match=r"part-01.parquet (cannot|could not) be fetched"):
            score(bundle, url(store, source), url(store, name), **SETTINGS)
    finally:
        store.rule()
    left = objects(store, name)
    assert "half=0/part-02.parquet" in left and "_summary.json" not in left
    score(bundle, url(store, source), url(store, name), **SETTINGS)
    assert objects(store, name) == want


def test_an_upload_that_is_interrupted_leaves_all_or_nothing(store: Proxy, source: str) -> None:
    output = open_output(open_place(url(store, "out/interrupted")))
    data = np.random.default_rng(0).bytes(24 << 20)

    def stop(number: int, method: str, target: str) -> None:
        if method == "PUT" and "partNumber=1" in target:
            os.kill(os.getpid(), signal.SIGINT)

    # What a shell runs in the background ignores SIGINT, and so would this.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    store.rule(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            write_file(output, "big", data)
            raise AssertionError("nobody interrupted")
    finally:
        store.rule()
        signal.signal(signal.SIGINT, before)
    left = objects(store, "out/interrupted")
    assert left in ({}, {"big": data})
    write_file(output, "big", data)
    assert objects(store, "out/interrupted") == {"big": data}


def test_credentials_in_a_url_are_written_nowhere(
    store: Proxy, source: str, bundle: Path, want: dict[str, bytes]
) -> None:
    user = "AKIAME:hush%2Fhush@"
    secret = re.compile(rb"AKIAME|hush|endpoint_override")
    command = ["score", str(bundle), url(store, source, user), url(store, "out/secret", user)]
    options = ["--batch-size", "64", "--passthrough", "day", "--json"]
    done = CliRunner().invoke(app, [*command, *options])
    assert done.exit_code == 0, done.output
    assert not secret.search(done.output.encode())
    found = objects(store, "out/secret")
    assert found == want
    assert not any(secret.search(data) for data in found.values())
    other = CliRunner().invoke(app, [*command, "--batch-size", "32"])
    assert other.exit_code == 1 and "holds another run" in str(other.exception)
    store.rule(lambda n, method, target: 403)
    try:
        refused = CliRunner().invoke(app, [*command, *options])
    finally:
        store.rule()
    assert refused.exit_code == 1 and "cannot be listed" in str(refused.exception)
    for result in (other, refused):
        assert result.exc_info is not None
        told = "".join(traceback.format_exception(*result.exc_info, chain=True))
        assert not secret.search((result.output + told.replace(repr(command), "")).encode())
