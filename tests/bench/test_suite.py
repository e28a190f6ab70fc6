"""The developer suite: its list, a real set, and made-up sets with groups and strange rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.special import softmax
from scipy.stats import norm
from sklearn.metrics import accuracy_score, log_loss, r2_score

from bench import suite
from bench.networks import Recipe
from bench.suite_sets import Set, Trained
from calibration.fit import fit_material
from calibration.fit_options import FitOptions
from calibration.fit_thresholds import run_head
from calibration.material import parts_of, split
from posthoc.contract import HedgedError

CLASSIFICATION = {
    "magika", "mnistnet", "uspsnet", "magic", "letter", "satimage", "wa_churn", "newsgroups",
    "reuters",
}  # fmt: skip
REGRESSION = {
    "diamonds", "deliveries", "hotel_rates", "weather", "storms", "nox", "bikeshare", "concrete",
}  # fmt: skip


def test_the_list() -> None:
    found = suite.suite()
    assert len(found) == len(CLASSIFICATION | REGRESSION)
    assert {s.name for s in found if s.task == "classification"} == CLASSIFICATION
    assert {s.name for s in found if s.task == "regression"} == REGRESSION
    with pytest.raises(HedgedError, match="no set is called 'imagenet'; there are magika, mnist"):
        suite.load("imagenet")


def test_concrete() -> None:
    known = suite.load("concrete")
    assert known.strange is None
    assert known.outside is None
    material = known.material
    assert material.linear is not None
    assert material.linear.weight.shape == (1, 64)
    assert known.train is not None
    train, data = pq.read_table(known.train), pq.read_table(known.data)
    assert (train.num_rows, data.num_rows) == (402, 603)
    rows = [set(zip(*t.to_pydict().values(), strict=True)) for t in (train, data)]
    assert not rows[0] & rows[1]
    test = material.features(material.usable)
    assert test.y is not None
    assert r2_score(test.y, test.z) > 0.85
    fitted, _, _ = fit_material(material, FitOptions(task="regression"))
    assert run_head(fitted.head, test)["std"].shape == (603, 1)


def test_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    suite.main(["concrete"])
    heads, line = capsys.readouterr().out.splitlines()
    assert heads.split()[:6] == ["set", "rows", "groups", "outside", "D", "C"]
    material = suite.load("concrete").material
    parts, test = parts_of(material, split(material, 0))
    assert test.y is not None and parts.module.y is not None and parts.calibration.y is not None
    sigma = np.sqrt(np.mean((parts.module.y - parts.module.z) ** 2))
    best = np.sqrt(np.mean((parts.calibration.y - parts.calibration.z) ** 2))
    want = [
        r2_score(test.y, test.z),
        *(-norm.logpdf(test.y, test.z, s).mean() for s in (sigma, best)),
    ]
    assert line.split()[:6] == ["concrete", "603", "0", "0", "64", "1"]
    assert [float(v) for v in line.split()[6:]] == pytest.approx(want, abs=1e-4)


def _table(n: int, seed: int, far: float = 0.0) -> pa.Table:
    rng = np.random.default_rng(seed)
    x = rng.normal(far, 1, (n, 3)).astype(np.float32)
    y = (x[:, 0] + rng.logistic(size=n) > 0).astype(np.int64)
    columns = {f"x{i}": pa.array(x[:, i]) for i in range(3)}
    owner = pa.array([f"g{i}" for i in rng.integers(0, 60, n)])
    return pa.table({**columns, "owner": owner, "sick": pa.array(y)})


MADE = Set(
    "made",
    "classification",
    "drawn here",
    Trained(
        lambda: _table(600, 0),
        Recipe(hidden=(8,), epochs=30),
        share=0.5,
        strange=lambda: _table(50, 1, far=9.0),
    ),
    target="sick",
    group="owner",
)


def test_groups_and_strange_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEDGED_ASSETS", str(tmp_path))
    known = suite.open_set(MADE)
    assert {p.name for p in tmp_path.iterdir()} == {"made-network-1", "features"}
    assert known.train is not None and known.strange is not None and known.outside is not None
    train, data = pq.read_table(known.train), pq.read_table(known.data)
    assert not set(train["owner"].to_pylist()) & set(data["owner"].to_pylist())
    assert train.num_rows + data.num_rows == 600
    assert known.material.mapping.inputs == {"features": ("x0", "x1", "x2")}
    assert pq.read_schema(known.strange).names == ["x0", "x1", "x2"]
    assert known.outside.z.shape == (50, 2)
    assert known.outside.phi is not None and known.outside.phi.shape == (50, 8)
    assert known.outside.y is None
    owners = len(set(data["owner"].to_pylist()))
    assert len(np.unique(known.material.cache.split_keys)) == owners
    rows = suite.open_set(MADE, grouped=False).material
    assert rows.mapping == known.material.mapping.model_copy(update={"split_by": None})
    assert len(np.unique(rows.cache.split_keys)) == data.num_rows
    figures = suite.describe(MADE)
    assert (figures.rows, figures.groups, figures.outside) == (data.num_rows, owners, 50)
    assert (figures.features, figures.outputs) == (8, 2)
    _, test = parts_of(known.material, split(known.material, 0))
    p = softmax(test.z.astype(np.float64), axis=1)
    assert figures.score == accuracy_score(test.y, p.argmax(1))
    assert figures.nll_frozen == pytest.approx(log_loss(test.y, p), abs=1e-6)


def test_one_column_of_lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEDGED_ASSETS", str(tmp_path))

    def table() -> pa.Table:
        x = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 4)
        return pa.table({"embedding": vectors, "label": pa.array((x[:, 0] > 0).astype(np.int64))})

    origin = Trained(table, Recipe(hidden=(), epochs=40, batch=16, rate=0.02), version=3)
    made = replace(MADE, name="vectors", origin=origin, target="label", group=None)
    known = suite.open_set(made)
    assert known.data.parent.name == "vectors-network-3"
    assert known.material.mapping.inputs == {"embedding": ("embedding",)}
    assert known.material.linear is not None
    assert known.material.linear.weight.shape == (2, 4)
    assert suite.describe(made).score > 0.7
