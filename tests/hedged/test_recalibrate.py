"""``hedged recalibrate``: from a ledger's labels to a live version, and what is never written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.bundle import load_bundle
from calibration.metrics.coverage import coverage_band
from calibration.predictor import Predictor
from posthoc.contract import Task
from service.labels import LabelItem
from service.ledger import Ledger
from service.settings import Settings
from tests.calibration.renewals import covered, truth
from tests.factory import CLASSES, rows, tiny_bundle, version_of
from tests.hedged.conftest import Call, assert_one_line
from tests.service.conftest import Server
from tests.service.helpers import poll

N = 3000


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[Task, Path]:
    """A root of a classifier and a root of a regression, both ``tiny`` version 1."""
    folder = tmp_path_factory.mktemp("bundles")
    made = {t: tiny_bundle(folder / t, t) for t in ("classification", "regression")}  # type: ignore[arg-type]
    return {
        t: version_of(path, folder / f"{t}-root", "tiny", "1")  # type: ignore[misc]
        for t, path in made.items()
    }


def ledger_of(
    path: Path, bundle: Path, spread: float, n: int = N, labelled: int | None = None
) -> Path:
    """A ledger of n predictions, all labelled unless told otherwise, whose truth has a spread."""
    predictor, ledger = Predictor(bundle), Ledger.open(path)
    m = predictor.manifest
    x, _ = rows(m.task, n, 40)
    y = truth(m.task, x, spread, 41)
    width = 3 if m.task == "classification" else 1
    identity = predictor.bundle.identity
    ledger.register(m.name, m.version, identity, task=m.task, width=width, classes=m.classes)
    out = predictor.run({"x": x})
    ids = [f"r{i}" for i in range(n)]
    for start in range(0, n, 500):
        part = slice(start, start + 500)
        fields = {k: v[part] for k, v in out.items()}
        ledger.record(m.name, m.version, identity, ids[part], fields, "0.9")
    known = range(n if labelled is None else labelled)
    ledger.add_labels([LabelItem("tiny", ids[i], y[i].tolist()) for i in known])
    ledger.close()
    return path


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_coverage_returns_with_the_new_version(
    call: Call, bundles: dict[Task, Path], tmp_path: Path, task: Task
) -> None:
    old, spread = bundles[task], 5.0 if task == "classification" else 0.6
    ledger = ledger_of(tmp_path / "ledger.sqlite", old, spread)
    root = tmp_path / "root"
    version_of(old, root, "tiny", "1")
    arguments = ["recalibrate", root / "tiny" / "1", "--ledger", ledger, "--since", "1h"]
    done = call(*arguments, "-o", root / "tiny" / "2", "--json")
    assert done.code == 0, done.err
    assert done.json["published"]["version"] == "2"
    assert done.json["comparison"]["publish"] and done.json["comparison"]["rows"] > 900
    assert sum(done.json["rows"].values()) == N
    assert call("verify", root / "tiny" / "2").code == 0
    assert call("activate", root, "tiny", "2", "--json").json["version"] == "2"
    new = load_bundle(root / "tiny" / "2")
    first = new.manifest.conformal.guarantees[0]
    low, high = coverage_band(first.n, 4000, first.alpha)
    assert low <= covered(new.path, task, spread) <= high
    assert not low <= covered(old, task, spread) <= high
    shown = call(*arguments, "-o", tmp_path / "shown", "--version", "9")
    assert shown.code == 0
    for text in (
        "3,000 of 3,000 predictions have a label (100.0%)",
        "What it takes",
        "coverage 0.95",
        "renewed: thresholds of",
        "kept: module laplace and its strength",
        "labelled rows used for nothing else",
        "outside",
        "exchangeable",
        "version 9, identity",
    ):
        assert text.lower() in " ".join(shown.out.lower().split()), text
    described = call("inspect", tmp_path / "shown")
    assert "labelled predictions, of 3,000" in " ".join(described.out.split())


def test_a_service_gets_its_coverage_back(
    call: Call, bundles: dict[Task, Path], tmp_path: Path
) -> None:
    """Over HTTP all the way: predictions, labels, the renewal beside the running service, the
    switch, and coverage of what it then answers."""
    root, data = tmp_path / "root", tmp_path / "data"
    version_of(bundles["classification"], root, "tiny", "1")
    x, _ = rows("classification", N, 60)
    y = truth("classification", x, 5.0, 61)
    settings = Settings(bundles=root, data_dir=data, poll_s=0.05)
    with Server(settings) as server:

        def ask(seed: str, part: slice) -> list[dict[str, Any]]:
            ids = [f"{seed}-{i}" for i in range(len(x))[part]]
            body = {"inputs": {"x": x[part].tolist()}, "ids": ids}
            found = server.client.post("/v1/predict", json=body).raise_for_status().json()
            made: list[dict[str, Any]] = found["predictions"]
            return made

        for start in range(0, N, 1000):
            ask("a", slice(start, start + 1000))
        lines = [{"model": "tiny", "id": f"a-{i}", "label": CLASSES[c]} for i, c in enumerate(y)]
        text = "\n".join(map(json.dumps, lines))
        kind = {"content-type": "application/x-ndjson"}
        server.client.post("/v1/labels", content=text, headers=kind).raise_for_status()

        def counted() -> int:
            models = server.client.get("/v1/calibration").json()["models"]
            return sum(m["labelled"] for m in models)

        poll(counted, lambda n: n == N)
        done = call(
            "recalibrate", root / "tiny" / "1", "--ledger", data / "hedged-ledger.sqlite",
            "-o", root / "tiny" / "2", "--json",
        )  # fmt: skip
        assert done.code == 0, done.err
        assert call("activate", root, "tiny", "2").code == 0
        poll(lambda: server.client.get("/v2/models/tiny").json()["versions"], lambda v: v == ["2"])
        x = rows("classification", 2000, 62)[0]
        y = truth("classification", x, 5.0, 63)
        sets = [p["set"] for part in (slice(1000), slice(1000, 2000)) for p in ask("b", part)]
    share = np.mean([CLASSES[c] in s for c, s in zip(y, sets, strict=True)])
    first = load_bundle(root / "tiny" / "2").manifest.conformal.guarantees[0]
    low, high = coverage_band(first.n, 2000, first.alpha)
    assert low <= share <= high


def test_what_is_not_better_is_not_written(
    call: Call, bundles: dict[Task, Path], tmp_path: Path
) -> None:
    ledger = ledger_of(tmp_path / "ledger.sqlite", bundles["classification"], 2.0)
    out = tmp_path / "new"
    arguments = ["recalibrate", bundles["classification"], "--ledger", ledger, "-o", out]
    done = call(*arguments, "--json")
    assert done.code == 3
    assert done.json["published"] is None and not done.json["comparison"]["publish"]
    assert (not out.exists() and list(tmp_path.iterdir()) == [ledger]) or not out.exists()
    shown = call(*arguments)
    assert (shown.code, out.exists()) == (3, False)
    assert "not written: nothing is surely better" in shown.err
    assert "used for nothing else" in shown.out
    assert "after less before" in shown.out


def test_only_conformal(call: Call, bundles: dict[Task, Path], tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path / "ledger.sqlite", bundles["classification"], 5.0)
    done = call(
        "recalibrate", bundles["classification"], "--ledger", ledger, "--only", "conformal",
        "-o", tmp_path / "new", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["factor"] is None and set(done.json["rows"]) == {"conformal", "measured"}
    assert done.json["kept"][0] == "scaling: asked for (--only conformal)"


def test_some_labels_only(call: Call, bundles: dict[Task, Path], tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path / "ledger.sqlite", bundles["classification"], 5.0, labelled=1500)
    shown = call(
        "recalibrate", bundles["classification"], "--ledger", ledger, "-o", tmp_path / "new"
    )
    assert shown.code == 0
    assert "1,500 of 3,000 predictions have a label (50.0%)" in shown.out
    assert "by confidence: from" in shown.out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--since", "5s"], "no predictions of tiny"),
        (["--only", "scaling"], None),
        (["--since", "tomorrow"], None),
        (["--version", "1"], "version '1' of tiny is the bundle that is renewed"),
        (["--tolerance", "1"], "--tolerance is for regression"),
        (["--ledger", "none.sqlite"], "no such ledger"),
    ],
)
def test_what_is_refused(
    call: Call, bundles: dict[Task, Path], tmp_path: Path, change: list[str], message: str | None
) -> None:
    bundle = bundles["classification"]
    other = bundles["regression"] if "5s" in change else bundle
    ledger = ledger_of(tmp_path / "ledger.sqlite", other, 5.0, n=700)
    out = tmp_path / "new"
    done = call("recalibrate", bundle, "--ledger", ledger, "-o", out, *change)
    if message is None:
        assert done.code == 2
    else:
        assert_one_line(done, message)
    assert not out.exists()


def test_too_few_labels_say_how_many_it_takes(
    call: Call, bundles: dict[Task, Path], tmp_path: Path
) -> None:
    ledger = ledger_of(tmp_path / "ledger.sqlite", bundles["classification"], 5.0, labelled=60)
    arguments = ["recalibrate", bundles["classification"], "--ledger", ledger]
    done = call(*arguments, "-o", tmp_path / "new")
    assert_one_line(done, "too few labelled rows: scaling takes 100 rows and has")
    assert "and there are 60: take a longer --since" in done.err
    taken = tmp_path / "taken"
    taken.mkdir()
    assert_one_line(call(*arguments, "-o", taken), "exists already")
