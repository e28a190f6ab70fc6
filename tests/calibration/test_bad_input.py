"""Ties, rounding, saturation and rows that are too few: never less coverage than was promised."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibration.bundle import Bundle, conformal_rank
from calibration.compile import check_head, compile_head
from calibration.conformal.cells import Cells
from calibration.conformal.intervals import INTERVALS, interval_scores
from calibration.conformal.scores import METHODS, choose
from calibration.fit import fit
from calibration.fit_head import fit_head
from calibration.fit_options import FitOptions, Parts
from calibration.fit_thresholds import Fitted, run_head
from calibration.material import Columns, parts_of, prepare, split
from calibration.metrics.coverage import coverage_band
from calibration.predictor import Predictor
from calibration.quality import Piece, summary
from posthoc.contract import Features, FitError
from posthoc.links import softmax
from posthoc.rows import of
from tests.calibration import heads

# Targets of a regression that tie or lie far from nought


def prices(n: int, seed: int) -> Features:
    """A constant answer, and targets on a grid that float32 does not hold."""
    rng = np.random.default_rng(seed)
    y = 12.3 + 0.1 * rng.integers(-5, 6, (n, 1))
    return Features(None, np.full((n, 1), 12.35, np.float32), y)


def counts(n: int, seed: int) -> Features:
    """Whole numbers that answer for whole numbers."""
    rng = np.random.default_rng(seed)
    z = rng.integers(0, 200, (n, 1))
    return Features(None, z.astype(np.float32), z + rng.integers(-3, 4, (n, 1)).astype(np.float64))


def far(n: int, seed: int) -> Features:
    """Errors of a few steps of float32, which are an eighth each at a million."""
    rng = np.random.default_rng(seed)
    z = (1e6 + rng.normal(size=(n, 1)) * 100).astype(np.float32)
    return Features(None, z, z + rng.normal(size=(n, 1)) * 1.5)


def fitted(rows: Any, n: int = 400, **options: Any) -> Fitted:
    asked = {"method": "none", "ood": "none", "max_error": None, **options}
    parts = Parts(rows(300, 1), rows(400, 2), rows(n, 3))
    return fit_head(None, parts, FitOptions(**asked))


@pytest.mark.parametrize("method", INTERVALS)
@pytest.mark.parametrize("side", ["two", "lower", "upper"])
@pytest.mark.parametrize("rows", [prices, counts, far])
def test_targets_that_tie_at_an_end_are_inside(rows: Any, method: str, side: Any) -> None:
    """A tenth of the rows may lie on an end exactly; float32 must not round it past all of them."""
    test = rows(1000, 4)
    for alpha in (0.1, 0.3, 0.4):
        done = fitted(rows, task="regression", conformal=method, side=side, alphas=(alpha,))
        out = run_head(done.head, test)
        score = interval_scores(done.head.interval, test.y, out["mean"], out["std"])
        inside = (out["lower"] <= test.y) & (test.y <= out["upper"])
        covered = score <= done.head.q_hat
        assert inside[:, 0][covered].all()
        assert covered.mean() > 1 - alpha - 0.06


@pytest.mark.parametrize("rows", [prices, counts])
def test_targets_that_tie_at_a_quantile_are_below_it(rows: Any) -> None:
    levels = np.arange(1, 20) / 20
    done = fitted(rows, 2000, task="regression", quantile_levels=tuple(levels))
    test = rows(2000, 4)
    q = run_head(done.head, test)["quantiles"]
    assert ((test.y[:, :, None] <= q).mean((0, 1)) > levels - 0.04).all()


def test_a_unit_that_float32_does_not_hold_is_named() -> None:
    def tiny(n: int, seed: int) -> Features:
        rng = np.random.default_rng(seed)
        z = (rng.normal(size=(n, 1)) * 1e-30).astype(np.float32)
        return Features(None, z, z + rng.normal(size=(n, 1)) * 1e-30)

    with pytest.raises(FitError, match="rescale the targets"):
        fitted(tiny, task="regression")


# The row of the rank is inside


@pytest.mark.parametrize("given", [None, "class", "cluster", "group"])
@pytest.mark.parametrize("method", METHODS)
def test_the_row_at_the_threshold_is_covered(method: str, given: Any) -> None:
    """Of n conformal rows, or of those of a cell, the served graph covers the first k, no fewer;
    without ties no more."""
    rows = classes(403, 3)
    assert rows.y is not None
    groups, u = np.arange(403) % 3 * 5, np.random.default_rng(0).uniform(size=403).astype("f4")
    options = FitOptions(
        task="classification",
        method="none",
        conformal=method,
        given=given,
        randomised=METHODS[method].RANDOMISES,
        ood="none",
    )
    parts = Parts(classes(300, 1), classes(400, 2), rows, groups=groups, u=u)
    done = fit_head(None, parts, options)
    sets = run_head(done.head, rows, group=groups, u=u)["set"]
    inside = sets[np.arange(403), rows.y]
    cells = done.head.cells
    member = np.zeros(403, int)
    if isinstance(cells, Cells):
        member = groups // 5 if given == "group" else cells.of[rows.y]
    for cell in range(int(member.max()) + 1):
        n = int((member == cell).sum())
        found = int(inside[member == cell].sum())
        assert found == conformal_rank(n, 0.1)
    # The figures of the manifest are those of the served sets.
    fresh, v = classes(300, 4), u[:300] / 2
    sets = run_head(done.head, fresh, group=groups[:300], u=v)["set"]
    said = summary(done, [Piece(of(fresh).blocks, groups[:300], v)])["levels"]["0.9"]
    assert said["coverage"] == sets[np.arange(300), fresh.y].mean()
    assert said["mean_set_size"] == sets.sum(1).mean()


# What is chosen is chosen on calibration rows


def classes(n: int, seed: int, c: int = 5) -> Features:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, c)) * 2
    true = z * (1 + 0.3 * np.arange(c)) + rng.gumbel(size=(n, c)) * 1.5
    return Features(None, z.astype(np.float32), true.argmax(1))


def targets(n: int, seed: int) -> Features:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 2)).astype(np.float32)
    return Features(None, z, z + rng.gamma(2.0, size=(n, 2)))


def kept(done: Fitted) -> dict[str, Any]:
    """All of a head but what conformal rows may say: thresholds."""
    head = done.head.with_(q_hat=0.0, quantile_factors=None, abstain=None)
    found = dataclasses.asdict(head.with_(ood=None))
    found["cells"] = None if head.cells is None else np.asarray(head.cells.of).tolist()
    for m in () if head.ood is None else head.ood.members:
        found[m.name] = (m.mean, m.scale)
    return found


CHOICES: list[tuple[Any, dict[str, Any]]] = [
    (classes, {"conformal": "raps", "scaling": "auto", "confidence": "isotonic"}),
    (classes, {"conformal": "saps", "scaling": "svs", "confidence": "beta"}),
    (classes, {"given": "cluster", "scaling": "ets"}),
    (targets, {"conformal": "cdf"}),
    (targets, {"conformal": "cqr", "side": "upper"}),
]


@pytest.mark.parametrize(("rows", "options"), CHOICES)
def test_conformal_rows_say_nothing_but_thresholds(rows: Any, options: dict[str, Any]) -> None:
    task = "classification" if rows is classes else "regression"
    asked = FitOptions(**{"task": task, "method": "none", "alphas": (0.2, 0.1), **options})
    one, other, calibration = (rows(600, s) for s in (3, 4, 5))
    first = fit_head(None, Parts(rows(300, 1), rows(600, 2), one), asked)
    second = fit_head(None, Parts(rows(300, 1), rows(600, 2), other), asked)
    np.testing.assert_equal(kept(first), kept(second))
    assert not np.array_equal(first.head.q_hat, second.head.q_hat)
    third = fit_head(None, Parts(rows(300, 1), calibration, one), asked)
    assert third.head.temperature != first.head.temperature
    if task == "classification":
        p = run_head(first.head, rows(600, 2))["probs"].astype(np.float64)
        method = first.head.conformal
        want = choose(method, p, np.asarray(rows(600, 2).y), 0.2)
        assert first.head.conformal_settings == want
    else:
        assert not np.array_equal(
            [*third.head.interval.tensors.values()][-1], [*first.head.interval.tensors.values()][-1]
        ) or third.head.interval.margin == pytest.approx(0.8416, abs=1e-3)


def test_calibration_rows_know_their_items(tmp_path: Path) -> None:
    """Folds and standard errors of a choice are those of items, which share a split key."""
    x = np.random.default_rng(0).normal(size=(600, 3)).astype(np.float32)
    items = np.arange(600) // 20
    material = prepare(
        bare(tmp_path / "m.onnx", 3, "Softmax"),
        table(tmp_path / "data.parquet", x, x.argmax(1), item=items),
        options=FitOptions(task="classification"),
        columns=Columns(target="target", inputs={"x": ["x0", "x1", "x2"]}, split_by="item"),
        cache_dir=tmp_path / "cache",
    )
    parts, _ = parts_of(material, split(material, 0))
    assert parts.keys is not None and len(parts.keys) == len(parts.calibration)
    assert 0 < len(np.unique(parts.keys)) == len(parts.keys) // 20


def test_a_shift_of_features_is_weighed_without_a_module() -> None:
    """Nothing else in the head reads features, and the weights do."""
    linear = heads.linear(3)
    *three, new, test = (heads.rows(linear, "classification", 500, i) for i in range(5))
    unseen = np.linalg.svd(linear.weight)[2][-1]  # outputs do not move along it
    assert new.phi is not None
    production = Features((new.phi + unseen).astype(np.float32), new.z)
    options = FitOptions(task="classification", method="none", ood="none", shift="covariate")
    done = fit_head(linear, Parts(*three, production=production), options)
    assert done.head.features == 12
    check_head(done.head, compile_head(done.head), test.phi, test.z)


# Models and tables that are odd, through a whole fit


def bare(path: Path, c: int, *tail: str, scale: float = 1.0) -> Path:
    """A model whose outputs are its inputs times ``scale``, then the operators of ``tail``."""
    nodes = [helper.make_node("Mul", ["x", "s"], ["h0"])]
    for i, kind in enumerate(tail or ("Identity",)):
        out = "y" if i == len(tail or ("",)) - 1 else f"h{i + 1}"
        nodes.append(helper.make_node(kind, [f"h{i}"], [out]))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", c]) for n in "xy"]
    constant = numpy_helper.from_array(np.float32(scale), "s")
    graph = helper.make_graph(nodes, "frozen", ends[:1], ends[1:], [constant])
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    return path


def table(path: Path, x: np.ndarray, y: np.ndarray, **more: Any) -> Path:
    columns = {f"x{i}": x[:, i] for i in range(x.shape[1])}
    pq.write_table(pa.table({**columns, "target": y, "row": np.arange(len(y)), **more}), path)
    return path


def whole(
    folder: Path, model: Path, x: np.ndarray, y: np.ndarray, group: Any = None, **options: Any
) -> Bundle:
    """Rows may be equal: each is an item of its own."""
    more = {} if group is None else {"group": group}
    return fit(
        model,
        table(folder / "data.parquet", x, y, **more),
        folder / "bundle",
        FitOptions(**{"task": "classification", "method": "none", **options}),
        columns=Columns(
            target="target",
            inputs={"x": [f"x{i}" for i in range(x.shape[1])]},
            split_by="row",
            group=None if group is None else "group",
        ),
        cache_dir=folder / "cache",
    )


def odd(kind: str, n: int = 2400) -> tuple[float, tuple[str, ...], np.ndarray, np.ndarray]:
    """(scale, tail, inputs, labels)."""
    rng = np.random.default_rng(0)
    z = (rng.normal(size=(n, 4)) * 2).astype(np.float32)
    y = (z + rng.gumbel(size=z.shape)).argmax(1)
    if kind == "saturated":
        return 60.0, ("Softmax",), z, y
    if kind == "hard":
        return 1.0, (), np.eye(4, dtype=np.float32)[z.argmax(1)], y
    if kind == "sums":  # rows of positive numbers that sum to anything between .3 and 1.5
        return 1.0, (), (softmax(z) * rng.uniform(0.3, 1.5, (n, 1))).astype(np.float32), y
    return 1.0, ("Softmax",), np.ones((n, 4), np.float32), y  # constant


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["saturated", "hard", "sums", "constant"])
def test_odd_probabilities_are_covered(tmp_path: Path, kind: str, method: str) -> None:
    """Of ties, zeros and ones, and of rows that sum to no one: the lower edge of the band; and the
    label is the frozen argmax."""
    scale, tail, x, y = odd(kind)
    scaling = {"lac": "none", "aps": "auto", "raps": "sms", "saps": "ets", "topk": "svs"}[method]
    model = bare(tmp_path / "m.onnx", 4, *tail, scale=scale)
    bundle = whole(tmp_path, model, x, y, conformal=method, scaling=scaling, max_error=None)
    for g in bundle.manifest.conformal.guarantees:
        found = bundle.manifest.evaluation["levels"][f"{1 - g.alpha:g}"]
        assert found["coverage"] >= coverage_band(g.n, 500, g.alpha)[0]
    out = Predictor(bundle).run({"x": x})
    np.testing.assert_array_equal(out["label"], x.argmax(1))
    for name in ("probs", "confidence", "entropy"):
        assert np.isfinite(out[name]).all() and (out[name] >= 0).all()
    assert (out["confidence"] <= 1 + 1e-6).all()


def test_a_class_without_rows_is_in_every_set(tmp_path: Path) -> None:
    _, tail, x, y = odd("saturated", 1500)
    y[y == 3] = 0
    model = bare(tmp_path / "m.onnx", 4, *tail)
    bundle = whole(tmp_path, model, x, y, given="class")
    first = bundle.manifest.conformal.guarantees[0]
    assert (first.cells[3].n, first.cells[3].threshold, first.n_needed) == (0, None, 9)
    assert Predictor(bundle).run({"x": x})["set"][:, 3].all()
    assert "promised of each class by itself" in bundle.manifest.notes[0]


def test_classes_without_a_cluster_are_said(tmp_path: Path) -> None:
    _, tail, x, y = odd("saturated", 1500)
    y[y == 3] = 0
    bundle = whole(tmp_path, bare(tmp_path / "m.onnx", 4, *tail), x, y, given="cluster")
    assert any("1 of 4 classes have too few calibration rows" in s for s in bundle.manifest.notes)
    q = Predictor(bundle).q_hat(0.1)
    assert isinstance(q, np.ndarray)
    assert q[3] == bundle.manifest.conformal.guarantees[0].threshold


def test_a_cluster_needs_rows_for_the_strictest_level() -> None:
    """Thirty rows of a class are enough for .1 and too few for .02."""
    few = classes(400, 2)
    keep = np.concatenate([np.flatnonzero(few.y != 4), np.flatnonzero(few.y == 4)[:30]])
    assert few.y is not None
    few = Features(None, few.z[keep], few.y[keep])
    for alphas, known in (((0.1, 0.05), True), ((0.1, 0.02), False)):
        options = FitOptions(task="classification", method="none", given="cluster", alphas=alphas)
        done = fit_head(None, Parts(classes(300, 1), few, classes(400, 3)), options)
        assert isinstance(done.head.cells, Cells) and (done.head.cells.of[4] >= 0) == known


def test_one_conformal_row_gives_everything() -> None:
    options = FitOptions(task="classification", method="none")
    done = fit_head(None, Parts(classes(100, 1), classes(100, 2), classes(1, 3)), options)
    said = [(g.n, g.n_needed, g.threshold) for g in done.conformal.guarantees]
    assert said == [(1, 9, None), (1, 19, None)]
    out = run_head(done.head, classes(50, 4))
    assert out["set"].all() and out["abstain"].all() and not out["ood"].any()
    options = FitOptions(task="regression", method="none", recalibration="linear")
    with pytest.raises(FitError, match="needs at least 9 conformal rows; there are 1"):
        fit_head(None, Parts(targets(100, 1), targets(100, 2), targets(1, 3)), options)


@pytest.mark.parametrize("alpha", [1e-15, 1e-6, 0.1, 0.999, 1 - 1e-15])
def test_a_rank_is_one_of_n_or_the_next(alpha: float) -> None:
    for n in (1, 5, 10, 1000, 10_000_000):
        rank = conformal_rank(n, alpha)
        assert 1 <= rank <= n + 1
        assert rank == n + 1 or rank / (n + 1) >= 1 - alpha - 1e-9


def test_labels_of_one_class_are_refused(tmp_path: Path) -> None:
    _, tail, x, y = odd("saturated", 300)
    with pytest.raises(FitError, match="at least two classes"):
        whole(tmp_path, bare(tmp_path / "m.onnx", 4, *tail), x, y * 0)


def test_groups_of_texts_are_never_codes(tmp_path: Path) -> None:
    """A table that has whole numbers where the bundle learnt texts means the texts."""
    _, tail, x, y = odd("saturated", 2400)
    names = np.asarray(["2", "10", "7"])[np.arange(2400) % 3]
    model = bare(tmp_path / "m.onnx", 4, *tail)
    bundle = whole(tmp_path, model, x, y, names, given="group")
    predictor = Predictor(bundle)
    assert [c.name for c in bundle.manifest.conformal.guarantees[0].cells] == ["10", "2", "7"]
    assert predictor.group_codes(np.asarray([2, 10, 7, 0, 1])).tolist() == [1, 0, 2, -1, -1]
    assert predictor.known_groups(np.asarray([0, 2, 3, -1])).tolist() == [True, True, False, False]


def test_the_tail_of_a_central_interval_is_half() -> None:
    for side, level in (("two", 0.95), ("upper", 0.9)):
        done = fitted(targets, task="regression", conformal="cqr", side=side, alphas=(0.1,))
        assert done.head.interval.margin == pytest.approx({0.95: 1.644854, 0.9: 1.281552}[level])
