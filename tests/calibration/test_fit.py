"""The whole fit on tiny real models: splits, promises, refusals, and every kind of output."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calibration.bundle import MANIFEST, REFERENCE, Bundle
from calibration.evaluate import evaluate
from calibration.fit import fit, fit_material
from calibration.fit_options import FitOptions
from calibration.material import Columns, Material, parts_of, prepare, split
from calibration.predictor import Predictor
from posthoc.contract import DataError, FitError, HedgedError, ModelError
from posthoc.data import open_table, to_rows
from tests import factory
from tests.calibration import networks
from tests.calibration.conftest import NAMES, Fit
from tests.calibration.networks import INPUTS, bare, black_box, inputs, log_probs, network, table

# Splits


def test_every_usable_row_has_one_role_and_seeds_draw_anew(pool: Material) -> None:
    roles = split(pool, 0)
    assert len(roles) == len(pool.usable) == 6000
    shares = np.bincount(roles, minlength=4) / len(roles)
    np.testing.assert_allclose(shares, [0.3, 0.2, 0.25, 0.25], atol=0.03)
    np.testing.assert_array_equal(roles, split(pool, 0))
    other = split(pool, 1)
    # Independent splits agree on sum of share² of the rows.
    assert np.mean(roles == other) == pytest.approx(0.3**2 + 0.2**2 + 2 * 0.25**2, abs=0.03)


def test_parts_hold_exactly_the_rows_of_their_roles(pool: Material) -> None:
    roles = split(pool, 3)
    parts, test = parts_of(pool, roles)
    for i, part in enumerate((parts.module, parts.calibration, parts.conformal, test)):
        np.testing.assert_array_equal(part.z, pool.cache.z[pool.usable[roles == i]])
        np.testing.assert_array_equal(part.phi, pool.cache.phi[pool.usable[roles == i]])
        np.testing.assert_array_equal(part.y, pool.cache.y[pool.usable[roles == i]])
    seen = [set(map(bytes, p.z)) for p in (parts.module, parts.calibration, parts.conformal, test)]
    assert not any(a & b for i, a in enumerate(seen) for b in seen[:i])


def test_rows_with_one_split_by_value_share_a_part(folder: Path) -> None:
    model = network(folder / "items.onnx")
    item = np.random.default_rng(0).integers(0, 500, 2000)
    data = table(model, seed=2, item=item)
    found = prepare(
        model,
        data,
        options=FitOptions(task="classification"),
        columns=networks.columns(model, split_by="item"),
        cache_dir=folder / "cache",
    )
    for seed in range(3):
        roles = split(found, seed)
        for value in np.unique(item):
            assert len(set(roles[item == value])) == 1
        assert len(set(roles)) == 4


def test_equal_rows_share_a_part(folder: Path) -> None:
    model = network(folder / "copies.onnx")
    whole = pq.read_table(table(model, 1000, seed=3))
    data = folder / "copies.parquet"
    pq.write_table(pa.concat_tables([whole, whole]), data)
    roles = split(networks.material(model, data), 0)
    np.testing.assert_array_equal(roles[:1000], roles[1000:])


# The bundle


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    model = network(folder / "twice.onnx")
    data = table(model)
    made = [
        fit(
            model,
            data,
            tmp_path / name,
            FitOptions(task="classification", seed=seed),
            name="model",
            columns=networks.columns(model),
            cache_dir=tmp_path / f"cache-{name}",
        )
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    ]
    a, b, c = (dict(m.files) for m in made)
    assert a == b
    assert all(a[name] != c[name] for name in a)
    manifests = [json.loads((m.path / MANIFEST).read_text()) for m in made[:2]]
    created = [m.pop("created") for m in manifests]
    assert all(created) and manifests[0] == manifests[1]


def test_the_label_is_the_frozen_argmax_row_by_row(classification_bundle: Path) -> None:
    x, _ = factory.rows("classification", 5000, 77)
    model = classification_bundle.with_name("bundle.onnx")
    got = Predictor(classification_bundle).run({"x": x})
    np.testing.assert_array_equal(got["label"], bare(model, x).argmax(1))
    picked = got["probs"][np.arange(len(x)), got["label"]]
    np.testing.assert_array_equal(got["confidence"], picked)


def test_faulty_rows_are_counted_and_used_for_nothing(folder: Path, run: Fit) -> None:
    model = network(folder / "faulty.onnx")
    whole = pq.read_table(table(model, 1500, seed=4))
    bad = np.arange(0, 1500, 10)
    a = whole["a"].to_numpy().copy()
    a[bad] = np.nan
    y: list[int | None] = whole["target"].to_pylist()
    y[1], y[2] = None, 3  # null, and an index beyond the classes
    data = folder / "faulty.parquet"
    pq.write_table(whole.set_column(0, "a", pa.array(a)).set_column(4, "target", pa.array(y)), data)
    bundle = run(model, data)
    assert bundle.manifest.data["rows"] == 1500
    assert bundle.manifest.data["bad_rows"] == 152
    assert sum(bundle.manifest.splits.rows.values()) == 1348
    kept = pq.read_table(io.BytesIO(bundle.files[REFERENCE]))["row_hash"].to_pylist()
    (batch,) = open_table(data).batches(1500)
    mapping = bundle.manifest.mapping.inputs_only()
    hashes = to_rows(batch, mapping, bundle.manifest.inputs).content_hashes
    good = np.setdiff1d(np.arange(1500), [*bad, 1, 2])
    assert sorted(kept) == sorted(hashes[good].tolist())


@pytest.mark.parametrize(
    ("out", "tail"),
    [
        (3, ("Softmax",)),
        (3, ()),
        (3, ("LogSoftmax",)),
        (1, ("Sigmoid",)),
        (1, ()),
    ],
)
def test_every_ending_is_fitted_end_to_end(
    folder: Path, run: Fit, out: int, tail: tuple[str, ...]
) -> None:
    """Probabilities, logits, log-probabilities, and one sigmoid with or without its operator."""
    model = network(folder / f"end-{out}-{''.join(tail)}.onnx", out=out, tail=tail)
    data = table(model, 3000)
    bundle = run(model, data)
    x = inputs(500, 9)
    log_p = log_probs(model, x)
    got = Predictor(bundle).run({"x": x})
    np.testing.assert_array_equal(got["label"], log_p.argmax(1))
    assert got["probs"].shape == log_p.shape
    # Labels came from the model at temperature 2, so it is over-confident and must be cooled.
    assert 1.5 < bundle.manifest.scaling["temperature_alone"] < 2.6
    found = evaluate(bundle, data)
    assert found.label_equal == 1.0
    nll = {s.name: s.metrics["nll"].value for s in found.systems}
    assert nll["hedged"] < nll["frozen"]
    assert abs(nll["hedged"] - nll["temperature scaled"]) < 0.01
    # The frozen column is the model's own log loss on the test rows.
    taken = fresh_rows(bundle, data)
    want = -log_probs(model, taken[0])[np.arange(found.n), taken[1]].mean()
    assert nll["frozen"] == pytest.approx(want, rel=1e-4)


def test_probabilities_that_are_only_handed_on_are_known_by_the_rows(tmp_path: Path) -> None:
    """A graph of one Identity, whose inputs are the answers of a model that nobody has."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet((0.7, 0.7, 0.7), 3000).astype(np.float32)
    y = np.array([rng.choice(3, p=row / row.sum()) for row in p.astype(np.float64)])
    names = ["a", "b", "c"]
    pq.write_table(
        pa.table({**dict(zip(names, p.T, strict=True)), "target": y}), tmp_path / "rows.parquet"
    )
    value = partial(onnx.helper.make_tensor_value_info, elem_type=1, shape=["N", 3])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["z"])], "on", [value("x")], [value("z")]
    )
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "on.onnx"
    )
    bundle = fit(
        tmp_path / "on.onnx",
        tmp_path / "rows.parquet",
        tmp_path / "bundle",
        FitOptions(task="classification", method="none"),
        columns=Columns(target="target", inputs={"x": names}),
        cache_dir=tmp_path,
    )
    found = evaluate(bundle, tmp_path / "rows.parquet")
    roles = pq.read_table(io.BytesIO(bundle.files[REFERENCE]))["role"].to_numpy()
    test = roles == "test"
    (frozen,) = (s for s in found.systems if s.name == "frozen")
    want = -np.log(p[test, y[test]].astype(np.float64)).mean()
    assert frozen.metrics["nll"].value == pytest.approx(want, rel=1e-4)
    assert bundle.manifest.scaling["temperature_alone"] == pytest.approx(1, abs=0.2)


def fresh_rows(bundle: Bundle, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of the rows that the fit kept for testing."""
    roles = pq.read_table(io.BytesIO(bundle.files[REFERENCE]))["role"].to_pylist()
    whole = pq.read_table(data)
    test = np.asarray(roles) == "test"
    x = np.stack([whole[c].to_numpy() for c in INPUTS], 1)
    return x[test], whole["target"].to_numpy()[test]


def test_class_names_or_indices_make_the_same_fit(folder: Path, tmp_path: Path) -> None:
    model = network(folder / "named.onnx")
    data = table(model)
    whole = pq.read_table(data)
    named = folder / "named.parquet"
    text = pa.array(np.asarray(NAMES)[whole["target"].to_numpy()])
    pq.write_table(whole.set_column(4, "target", text), named)
    both = [
        fit(
            model,
            path,
            tmp_path / path.stem,
            FitOptions(task="classification"),
            columns=networks.columns(model, classes=classes),
            cache_dir=tmp_path,
        )
        for path, classes in ((data, None), (named, NAMES))
    ]
    assert both[0].files == both[1].files
    assert both[1].manifest.classes == NAMES


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "laplacee"}, "unknown module or score 'laplacee'; there are .*laplace"),
        ({"method": "gen"}, "'gen' is not a module for classification"),
        (
            {"conformal": "cqr"},
            "unknown conformal method 'cqr' for classification; .* lac, aps, raps",
        ),
        ({"conformal": "residual"}, "unknown conformal method 'residual'"),
        ({"ood": "energyy"}, "unknown module or score 'energyy'; there are .*rmds"),
        ({"alphas": (1.5,)}, "alpha must lie strictly between 0 and 1, not 1.5"),
        ({"alphas": (0.1, 0.0)}, "alpha must lie strictly between 0 and 1, not 0.0"),
    ],
)
def test_unknown_options_are_refused(pool: Material, options: dict[str, Any], message: str) -> None:
    with pytest.raises(HedgedError, match=message):
        fit_material(pool, FitOptions(task="classification", **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conformal": "lac"}, "unknown conformal method 'lac' for regression; there are residual"),
        ({"ood": "gen"}, "'gen' is not an OOD score for regression"),
        ({"alphas": (0.0001,)}, "interval at alpha 0.0001 needs at least 9999 .*there are"),
    ],
)
def test_options_of_the_other_task_are_refused(
    values: Material, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(FitError, match=message):
        fit_material(values, FitOptions(task="regression", **options))


@pytest.mark.parametrize(
    "wrong", [{"method": None}, {"ood_alpha": 0}, {"max_error": 1.0}, {"alphas": ()}, {"alfa": 1}]
)
def test_options_out_of_range_are_no_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FitOptions(task="classification", **wrong)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"target": None}, "name their column with --target"),
        ({"target": "nope"}, "no column 'nope'; the table has a, b, c, d, target"),
        ({"classes": ("a", "b")}, "names 2 classes and the model has 3 outputs"),
        ({"inputs": {"x": ("a", "b")}}, "takes 4 values a row and 2 columns fill it"),
        ({"inputs": {"y": INPUTS}}, "no input 'y'; it takes x"),
        ({"split_by": "nope"}, "no column 'nope'"),
        ({"target": ("a", "b")}, "takes one target column"),
    ],
)
def test_columns_that_do_not_fit_are_refused(
    folder: Path, run: Fit, columns: dict[str, Any], message: str
) -> None:
    model = network(folder / "columns.onnx")
    with pytest.raises(DataError, match=message):
        run(model, table(model, 200), replace(networks.columns(model), **columns))


def with_target(model: Path, name: str, y: object, n: int = 400) -> Path:
    """The table of a model with other labels."""
    whole = pq.read_table(table(model, n))
    path = model.with_name(f"{name}.parquet")
    pq.write_table(whole.set_column(4, "target", pa.array(y)), path)
    return path


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (
            np.full(400, 7),
            "400 of 400 rows are left out: row 0 and 399 like it: .* is 7, not a class",
        ),
        (np.arange(400) % 8, "250 of 400 rows are left out: row 3 and 49 like it: .* is 3, not a"),
        (["a"] * 400, "expected class indices .* found string; give the class names"),
        (np.zeros(400, np.int64), "at least two classes and has 1"),
        ([None] * 400, "expected one int64"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(
    folder: Path, run: Fit, y: object, message: str
) -> None:
    model = network(folder / "labels.onnx")
    with pytest.raises(HedgedError, match=message):
        run(model, with_target(model, "labels", y))


@pytest.mark.parametrize("n", [1, 3])
def test_too_few_rows_name_the_part_that_is_empty(folder: Path, run: Fit, n: int) -> None:
    model = network(folder / "one.onnx")
    with pytest.raises(FitError, match=r"no (module|calibration|conformal|test) rows"):
        run(model, table(model, n))


def test_a_black_box_needs_scaling_alone(folder: Path, run: Fit) -> None:
    model = black_box(folder / "box.onnx")
    data = table(model)
    with pytest.raises(FitError, match=r"laplace needs a linear head.*--method loss or none"):
        run(model, data)
    with pytest.raises(FitError, match="OOD score 'rmds' does not fit this model; these do: gen"):
        run(model, data, method="none", ood="rmds")
    bundle = run(model, data, method="none")
    assert bundle.manifest.frozen.head is None and bundle.manifest.frozen.features is None
    assert bundle.manifest.ood is not None and bundle.manifest.ood.score.name == "gen"
    fields = {s.name for s in bundle.manifest.outputs}
    assert not fields & {"epistemic", "aleatoric"}
    x = inputs(100, 3)
    got = Predictor(bundle).run({"x": x})
    np.testing.assert_array_equal(got["label"], bare(model, x).argmax(1))


def test_several_labels_a_row_are_refused(folder: Path, run: Fit) -> None:
    model = network(folder / "many.onnx", tail=("Sigmoid",))
    with pytest.raises(ModelError, match="multi-label models are not supported"):
        run(model, folder / "never-read.parquet")


def test_a_bundle_is_never_overwritten(folder: Path, run: Fit) -> None:
    model = network(folder / "again.onnx")
    data = table(model)
    first = run(model, data)
    with pytest.raises(FitError, match="exists already"):
        run(model, data)
    assert Predictor(first.path).bundle.identity == first.identity


def test_rows_that_are_left_out_are_told_of(folder: Path, run: Fit) -> None:
    model = network(folder / "some.onnx")
    bundle = run(model, with_target(model, "some", np.arange(400) % 4))
    told = "100 of 400 rows are left out: row 3 and 99 like it: column 'target': is 3, not a"
    assert any(note.startswith(told) for note in bundle.manifest.notes)
    assert (
        bundle.manifest.data["bad_rows"] == 100 and sum(bundle.manifest.splits.rows.values()) == 300
    )
