"""``hedged fit --engine ray``: the bundle of one process, by one worker and by two."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import calibration.fit
import posthoc.features
import posthoc.filling
from calibration.bundle import Bundle, load_bundle
from calibration.fit import fit
from calibration.fit_options import FitOptions
from calibration.material import Columns
from posthoc import rows as blocks_of
from posthoc.folds import Mapper
from service.scoring.cluster import connect
from tests import factory
from tests.hedged.conftest import Call

ROWS = 6000
# What is fitted: each module that is a sum over rows in some form, and scores of every kind of sum.
FITS: list[dict[str, Any]] = [
    {"task": "classification", "method": "laplace", "ood": "mahalanobis+rmds+knn"},
    {"task": "classification", "method": "laplace_full", "ood": "vim", "given": "class"},
    {"task": "classification", "method": "laplace_diag", "ood": "rank:gen+nci", "seed": 1},
    {"task": "regression", "method": "laplace", "ood": "mahalanobis", "recalibration": "kde"},
]


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fits")
    for task in ("classification", "regression"):
        factory.frozen_model(folder / f"{task}.onnx", task)
        factory.data(folder / f"{task}.parquet", task, n=ROWS)
    return folder


@pytest.fixture(scope="module", params=[1, 2])
def mapper(cluster: None, request: pytest.FixtureRequest) -> Iterator[Mapper]:
    with connect(request.param) as found:
        yield found


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six shards of the cache, and shares of the rows that are a few hundred long."""
    monkeypatch.setattr(posthoc.features, "_SHARD_ROWS", 1024)
    monkeypatch.setattr(blocks_of, "SHARE", 700)
    monkeypatch.setattr(calibration.fit, "SHARE", 700)


def fitted(fits: Path, name: str, mapper: Mapper | None, asked: dict[str, Any]) -> Bundle:
    task, out = asked["task"], fits / name
    if out.exists():
        return load_bundle(out)
    columns = Columns(
        target="target",
        inputs={"x": factory.COLUMNS[task]},
        classes=factory.CLASSES if task == "classification" else None,
    )
    return fit(
        fits / f"{task}.onnx", fits / f"{task}.parquet", out, FitOptions(**asked),
        columns=columns, cache_dir=fits / f"{name}.cache", threads=1, mapper=mapper,
    )  # fmt: skip


def numbers(value: Any) -> Any:
    """What two manifests are compared by: all but when they were written and the files' hashes."""
    if isinstance(value, dict):
        return {k: numbers(v) for k, v in value.items() if k not in ("created", "files")}
    return value


# Before the tests below, whose two workers take all the room there is.
def test_the_command_runs_the_model_on_workers_alone(
    call: Call,
    fit_arguments: list[object],
    tmp_path: Path,
    cluster: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a shard was filled in this process")

    monkeypatch.setattr(posthoc.filling.Filler, "fill", never)  # of this process, not of theirs
    # The path as users give it: workers find it from the folder that the command was called in.
    monkeypatch.chdir(tmp_path)
    i = fit_arguments.index("--cache") + 1
    fit_arguments[i] = "cache"
    done = call(*fit_arguments, "--engine", "ray", "--workers", "1", "--ood", "gen", "--json")
    assert done.code == 0, done.err
    assert done.json["identity"] == load_bundle(tmp_path / "bundle").identity
    assert [p.name for p in (tmp_path / "cache").glob("*/z.npy")] == ["z.npy"]


@pytest.mark.parametrize("index", range(len(FITS)))
def test_the_bundle_is_that_of_one_process(fits: Path, mapper: Mapper, index: int) -> None:
    here = fitted(fits, f"{index}-here", None, FITS[index])
    there = fitted(fits, f"{index}-{mapper.workers}", mapper, FITS[index])
    caches = [next((fits / f"{index}-{n}.cache").iterdir()) for n in ("here", mapper.workers)]
    for name in ("z.npy", "phi.npy", "meta.parquet"):
        assert (caches[0] / name).read_bytes() == (caches[1] / name).read_bytes()
    mine, theirs = (x.tensors("state.safetensors") for x in (here, there))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        scale = np.abs(tensor[np.isfinite(tensor)]).max(initial=0)
        np.testing.assert_allclose(theirs[name], tensor, rtol=1e-6, atol=1e-6 * scale)
    a, b = (json.loads(x.manifest.model_dump_json()) for x in (here, there))
    assert a["splits"] == b["splits"]
    close(numbers(a), numbers(b))


def close(a: Any, b: Any, at: str = "") -> None:
    """Two JSON documents with the same words, and numbers within 1e-6."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            close(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            close(x, y, f"{at}[{i}]")
    elif isinstance(a, float):
        assert b == pytest.approx(a, rel=1e-6, abs=1e-9), at
    else:
        assert a == b, at


def test_the_number_of_workers_does_not_show(fits: Path, cluster: None) -> None:
    """Bit for bit, where both have been fitted above."""
    for index in range(len(FITS)):
        one, two = (load_bundle(fits / f"{index}-{n}") for n in (1, 2))
        assert one.files.keys() == two.files.keys()
        differ = {name for name, data in one.files.items() if two.files[name] != data}
        assert differ <= {"manifest.json"}
        assert numbers(json.loads(one.manifest.model_dump_json())) == numbers(
            json.loads(two.manifest.model_dump_json())
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "2"], "--workers belongs to --engine ray"),
        (["--engine", "dask"], "--engine dask is unknown; there are local and ray"),
        (["--engine", "ray", "--workers", "0"], "--workers"),
        (["--engine", "ray", "--device", "cuda:1"], "Ray chooses a worker's device"),
    ],
)
def test_options_that_do_not_go_together(
    call: Call, fit_arguments: list[object], options: list[str], message: str
) -> None:
    done = call(*fit_arguments, *options)
    assert done.code == 2 and message in " ".join(done.err.split()), done.err
