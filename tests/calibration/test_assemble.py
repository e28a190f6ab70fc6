"""What a written bundle remembers, and that nothing is written when the graph is not the head."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest

from calibration import assemble
from calibration.bundle import (
    EXAMPLES,
    GOLDEN,
    HEAD,
    REFERENCE,
    STATE,
    Bundle,
    conformal_rank,
    load_bundle,
    write_bundle,
)
from calibration.fit import fit_material, write
from calibration.fit_options import FitOptions
from calibration.fit_thresholds import run_head
from calibration.material import ROLES, Material, split
from calibration.predictor import Predictor
from posthoc.contract import Array, BundleError, FitError
from posthoc.model.memory import row_bytes
from posthoc.runtime import open_session
from posthoc.slices import MOST_BYTES
from tests.calibration import networks
from tests.calibration.networks import INPUTS, network, table

OPTIONS = FitOptions(task="classification", seed=4, max_error=0.4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("assemble")


@pytest.fixture(scope="module")
def material(folder: Path) -> Material:
    model = network(folder / "model.onnx")
    return networks.material(model, table(model))


@pytest.fixture(scope="module")
def bundle(folder: Path, material: Material) -> Bundle:
    return written(material, folder / "bundle")


def written(material: Material, out: Path) -> Bundle:
    fitted, _, roles = fit_material(material, OPTIONS)
    data = material.cache.path.parent.parent / "model-2000-1.parquet"
    return write(material, fitted, roles, out, OPTIONS, data, name="named", version="7")


# Refusals

Reference = Callable[..., dict[str, Array]]


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("probs", lambda v: v + 2e-3, "fused graph's probs is off by 2.0e-03"),
        ("confidence", lambda v: v * 1.1, "fused graph's confidence is off"),
        ("epistemic", lambda v: v + 0.01, "fused graph's epistemic is off"),
        ("ood_score", lambda v: -v, "fused graph's ood_score is off"),
        ("set", lambda v: ~v, "fused graph's set is not its reference's"),
        ("ood", lambda v: ~v, "fused graph's ood is not its reference's"),
    ],
)
def test_a_graph_that_is_not_its_reference_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    material: Material,
    tmp_path: Path,
    field: str,
    change: Callable[[Array], Array],
    message: str,
) -> None:
    honest: Reference = assemble.reference

    def other(*args: object, **more: object) -> dict[str, Array]:
        found = honest(*args, **more)
        return {**found, field: change(found[field])}

    monkeypatch.setattr(assemble, "reference", other)
    with pytest.raises(FitError, match=message):
        written(material, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_features_of_other_rows_are_found_out(material: Material, tmp_path: Path) -> None:
    """A cache that is not this model's on this table: the head fits it, the model does not."""
    shifted = replace(
        material.cache, phi=np.roll(material.cache.phi, 1, 0), z=np.roll(material.cache.z, 1, 0)
    )
    with pytest.raises(FitError, match="the fused graph's"):
        written(replace(material, cache=shifted), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_written_once(material: Material, bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="exists already"):
        written(material, bundle.path)


# What is written


def test_the_manifest_names_the_model_the_split_and_the_promises(
    material: Material, bundle: Bundle
) -> None:
    m = bundle.manifest
    own = (bundle.path.parent / "model.onnx").read_bytes()
    assert (m.name, m.version, m.task) == ("named", "7", "classification")
    assert m.frozen.sha256 == hashlib.sha256(own).hexdigest() and m.frozen.size == len(own)
    assert (m.frozen.features, m.frozen.output) == (networks.HIDDEN, "y")
    assert m.splits.seed == 4 and m.splits.by is None and m.splits.uses.keys() == set(ROLES)
    counts = np.bincount(split(material, 4), minlength=4)
    assert m.splits.rows == dict(zip(ROLES, counts.tolist(), strict=True))
    scores = bundle.conformal_scores["set"]
    assert (np.diff(scores) >= 0).all() and len(scores) == m.splits.rows["conformal"]
    for g in m.conformal.guarantees:
        assert g.n == len(scores) and g.rank == math.ceil((g.n + 1) * (1 - g.alpha))
        assert g.rank == conformal_rank(g.n, g.alpha)
        assert g.threshold == scores[g.rank - 1]
    assert m.alphas == (0.1, 0.05)
    assert m.data["rows"] == 2000 and m.data["bad_rows"] == 0
    assert max(m.data["head_max_difference"].values()) < 1e-5
    assert {"hedged", "numpy", "onnx", "python"} <= m.versions.keys()
    assert m.inputs[0].shape == (-1, 4) and m.frozen_outputs[0].name == "y"


def test_golden_rows_are_test_rows_with_the_graphs_own_answers(
    material: Material, bundle: Bundle
) -> None:
    with np.load(io.BytesIO(bundle.files[GOLDEN]), allow_pickle=False) as golden:
        x = golden["in/x"]
        got = Predictor(bundle).run({"x": x})
        assert {k[4:] for k in golden.files if k.startswith("out/")} == set(got)
        for name, value in got.items():
            np.testing.assert_array_equal(golden[f"out/{name}"], value)
    whole = pq.read_table(bundle.path.parent / "model-2000-1.parquet")
    test = np.flatnonzero(split(material, 4) == ROLES.index("test"))[: len(x)]
    np.testing.assert_array_equal(x, np.stack([whole[c].to_numpy()[test] for c in INPUTS], 1))


@pytest.mark.parametrize("field", ["label", "probs", "set", "ood_score"])
def test_golden_rows_that_do_not_reproduce_are_found(
    bundle: Bundle, tmp_path: Path, field: str
) -> None:
    with np.load(io.BytesIO(bundle.files[GOLDEN]), allow_pickle=False) as golden:
        arrays = {k: golden[k] for k in golden.files}
    value = arrays[f"out/{field}"]
    arrays[f"out/{field}"] = ~value if value.dtype == bool else value + 1
    sink = io.BytesIO()
    np.savez(sink, allow_pickle=False, **arrays)
    files = {**bundle.files, GOLDEN: sink.getvalue()}
    other = write_bundle(tmp_path / "other", bundle.manifest, files)
    with pytest.raises(BundleError, match=f"golden rows do not reproduce: {field} differs"):
        Predictor(other).self_check()


def test_the_reference_holds_roles_hashes_and_what_traffic_is_held_against(
    material: Material, bundle: Bundle
) -> None:
    reference = pq.read_table(io.BytesIO(bundle.files[REFERENCE]))
    roles = np.asarray(reference["role"].to_pylist())
    np.testing.assert_array_equal(roles, np.asarray(ROLES)[split(material, 4)])
    whole = pq.read_table(bundle.path.parent / "model-2000-1.parquet")
    x = np.stack([whole[c].to_numpy() for c in INPUTS], 1)
    by_hand = [
        int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little")
        for row in x
    ]
    assert reference["row_hash"].to_pylist() == by_hand
    conformal = roles == "conformal"
    fitted, _, _ = fit_material(material, OPTIONS)
    made = run_head(fitted.head, material.features(material.usable[conformal]))
    for name in ("confidence", "entropy", "ood_score", "ood_pvalue", "set_size"):
        column = reference[name].to_numpy()
        assert np.isnan(column[~conformal]).all()
        np.testing.assert_array_equal(column[conformal], made[name])
    np.testing.assert_array_equal(
        np.sort(reference["ood_score"].to_numpy()[conformal]), bundle.conformal_scores["ood"]
    )


def test_the_bundle_knows_what_a_row_takes(bundle: Bundle) -> None:
    predictor, memory = Predictor(bundle), bundle.manifest.memory
    assert memory is not None
    rows = {s.name: np.zeros((2, *s.shape[1:]), s.dtype) for s in predictor.inputs}
    graph = onnx.load_from_string(bundle.files["predictor.onnx"])
    assert memory.row_bytes == row_bytes(graph, rows) > 4 * memory.values
    assert memory.values == sum(v[0].size for v in rows.values())


@pytest.mark.parametrize("known", [True, False])
def test_no_run_has_more_rows_than_memory_holds(
    bundle: Bundle, material: Material, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bundle.manifest.memory is not None
    large = bundle.manifest.memory.model_copy(update={"row_bytes": MOST_BYTES // 3})
    manifest = bundle.manifest.model_copy(update={"memory": large if known else None})
    predictor = Predictor(replace(bundle, manifest=manifest))
    rng = np.random.default_rng(0)
    rows = {s.name: rng.random((10, *s.shape[1:])).astype(s.dtype) for s in predictor.inputs}
    seen: list[int] = []
    run, one = predictor._run, predictor.inputs[0].name

    def watched(names: Sequence[str], feed: Mapping[str, Array]) -> list[Array]:
        seen.append(len(feed[one]))
        return run(names, feed)

    monkeypatch.setattr(predictor, "_run", watched)
    for q in (None, predictor.q_hat(0.2), np.linspace(0.1, 0.9, 10, dtype=np.float32)):
        got, want = predictor.run(rows, q_hat=q), Predictor(bundle).run(rows, q_hat=q)
        for name, value in want.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert seen == ([3, 3, 3, 1] if known else [10]) * 3


def test_the_examples_are_a_request_that_works(bundle: Bundle) -> None:
    request = json.loads(bundle.files[EXAMPLES])["predict"]
    x = np.asarray(request["inputs"]["x"], np.float32)
    assert x.shape == (2, 4)
    with np.load(io.BytesIO(bundle.files[GOLDEN]), allow_pickle=False) as golden:
        np.testing.assert_array_equal(x, golden["in/x"][:2])
    assert Predictor(bundle).predict({"x": x}).label.shape == (2,)


def test_state_is_named_tensors_as_they_were_fitted(material: Material, bundle: Bundle) -> None:
    fitted, _, _ = fit_material(material, OPTIONS)
    tensors = bundle.tensors(STATE)
    name, state = fitted.head.module
    assert name == bundle.manifest.module.name
    for key, value in state.tensors.items():
        assert tensors[f"module/{key}"].dtype == np.float64
        np.testing.assert_array_equal(tensors[f"module/{key}"], value)
    assert tensors["scaling"].tolist() == [fitted.head.temperature, fitted.head.strength]
    np.testing.assert_array_equal(tensors["eps"], fitted.head.eps)
    assert bundle.manifest.module.settings == state.settings


def test_the_head_alone_gives_what_the_predictor_gives(material: Material, bundle: Bundle) -> None:
    """``head.onnx`` on cached features of rows, ``predictor.onnx`` on the rows themselves."""
    rows = np.arange(64)
    cached = material.features(rows)
    session = open_session(bundle.files[HEAD])
    names = [o.name for o in session.get_outputs()]
    alone = dict(zip(names, session.run(names, {"phi": cached.phi, "z": cached.z}), strict=True))
    whole = pq.read_table(bundle.path.parent / "model-2000-1.parquet").slice(0, 64)
    x = np.stack([whole[c].to_numpy() for c in INPUTS], 1)
    got = Predictor(bundle).run({"x": x})
    assert got.keys() == alone.keys()
    for name, value in got.items():
        np.testing.assert_allclose(value, alone[name], rtol=1e-5, atol=1e-5)
    assert load_bundle(bundle.path).identity == bundle.identity
