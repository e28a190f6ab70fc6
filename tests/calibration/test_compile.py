"""The compiled graphs: names, opsets, shapes, and the frozen model's own numbers inside."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from calibration.compile import Fused, check_head, compile_head, compile_predictor
from calibration.fit import fit_material
from calibration.fit_options import FitOptions
from calibration.fit_thresholds import Fitted, run_head
from calibration.head import Head, reference
from calibration.material import Material
from calibration.threshold import pvalues
from posthoc.contract import FitError, ModelError
from posthoc.links import softmax
from posthoc.logits import to_logits
from posthoc.runtime import open_session
from tests.calibration.heads import D, fitted
from tests.calibration.networks import bare, black_box, inputs, material, network, table

RANDOM = {"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike"}
RANDOM |= {"RandomUniform", "RandomUniformLike"}
DONE: dict[str, Fitted] = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def plain(folder: Path) -> tuple[Path, Material, Fitted]:
    """A frozen softmax classifier, its material, and a fit with RAPS."""
    return prepared(network(folder / "plain.onnx"))


def prepared(model: Path, **options: object) -> tuple[Path, Material, Fitted]:
    found = material(model, table(model))
    asked = {"task": "classification", "max_error": 0.4, "conformal": "raps", **options}
    return model, found, fit_material(found, FitOptions(**asked))[0]


def fuse(found: Material, head: Head) -> Fused:
    f = found.frozen
    return compile_predictor(head, f.model, opset=f.opset, phi=f.phi, z=f.z, link=found.link)


def answers(fused: Fused, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every field of the fused graph."""
    session = open_session(fused.model)
    names = [s.name for s in fused.outputs]
    got = session.run([fused.names[n] for n in names], feed)
    return dict(zip(names, got, strict=True))


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_the_frozen_outputs_are_kept_bit_for_bit(
    plain: tuple[Path, Material, Fitted], batch: int
) -> None:
    model, found, done = plain
    x = inputs(batch, 5)
    session = open_session(fuse(found, done.head).model)
    for names in (["y"], [o.name for o in session.get_outputs()]):
        got = dict(zip(names, session.run(names, {"x": x}), strict=True))
        np.testing.assert_array_equal(got["y"], bare(model, x))


@pytest.mark.parametrize("opset", [13, 15, 17, 18, 20])
def test_every_opset_gives_the_same_answers(folder: Path, opset: int) -> None:
    model, found, done = prepared(network(folder / f"opset{opset}.onnx", opset=opset))
    fused = fuse(found, done.head)
    made = onnx.load_from_string(fused.model)
    assert [o.version for o in made.opset_import if o.domain == ""] == [opset]
    x = inputs(200, 5)
    got = answers(fused, {"x": x})
    np.testing.assert_array_equal(got["label"], bare(model, x).argmax(1))
    phi, z = exposed(found, x)
    want = reference(done.head, phi, z)
    for name in ("probs", "entropy", "aleatoric", "epistemic", "ood_score"):
        np.testing.assert_allclose(got[name], want[name], atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(got["set_size"], got["set"].sum(1))


def exposed(found: Material, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(features, logits) of the frozen graph for inputs N×4."""
    from posthoc.frozen import expose

    session = open_session(expose(found.frozen))
    phi, z = session.run([found.frozen.phi, found.frozen.z], {found.frozen.inputs[0].name: x})
    return phi, to_logits(z, found.link)


@pytest.mark.parametrize(
    ("names", "renamed"),
    [
        ({"y": "label"}, {"label": "uq_label"}),
        ({"y": "probs", "h1": "uq_probs"}, {"probs": "uq_uq_probs"}),
        ({"x": "set", "w1": "uq/0", "o1": "uq_uq/const/0"}, {"set": "uq_set"}),
        ({"h0": "phi", "o1": "z", "w2": "ood", "h1": "u"}, {"ood": "uq_ood"}),
    ],
)
def test_clashing_names_take_a_prefix(
    folder: Path,
    plain: tuple[Path, Material, Fitted],
    names: dict[str, str],
    renamed: dict[str, str],
) -> None:
    """The same network under other names gives the same numbers, its own output included."""
    model, found, done = prepared(network(folder / f"{'-'.join(names)}.onnx", names=names))
    fused = fuse(found, done.head)
    assert {k: v for k, v in fused.names.items() if k != v} == renamed
    x = inputs(32, 5)
    feed = {names.get("x", "x"): x}
    own = open_session(fused.model).run([names.get("y", "y")], feed)[0]
    np.testing.assert_array_equal(own, bare(model, x))
    got, want = answers(fused, feed), answers(fuse(plain[1], plain[2].head), {"x": x})
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)


@pytest.mark.parametrize("taken", ["q_hat", "ood_threshold"])
@pytest.mark.parametrize("tensor", ["x", "h2", "w2"])
def test_a_tensor_named_like_an_added_input_is_refused(
    folder: Path, taken: str, tensor: str
) -> None:
    model = network(folder / f"{taken}-{tensor}.onnx", names={tensor: taken})
    _, found, done = prepared(model)
    with pytest.raises(ModelError, match=f"tensor '{taken}'.*rename it in the model"):
        fuse(found, done.head)


@pytest.mark.parametrize("name", ["R", "U", "C", "uq/0", "batch"])
def test_the_name_of_the_batch_axis_is_free(folder: Path, name: str) -> None:
    """Our optional inputs have axes of their own, which must not be taken for the model's batch."""
    model, found, done = prepared(network(folder / f"axis-{ord(name[0])}.onnx", batch=name))
    fused = fuse(found, done.head)
    x = inputs(33, 5)
    got = answers(fused, {"x": x})
    np.testing.assert_array_equal(got["label"], bare(model, x).argmax(1))
    each = {k: np.full(33, v, np.float32) for k, v in (("q_hat", np.inf), ("ood_threshold", 0))}
    got = answers(fused, {"x": x, **each})
    assert got["set"].shape == (33, 3) and got["set"].all()
    np.testing.assert_array_equal(got["ood"], got["ood_score"] > 0)


def test_no_random_operator_and_nothing_outside_the_standard(
    plain: tuple[Path, Material, Fitted],
) -> None:
    _, found, done = plain
    for data in (fuse(found, done.head).model, compile_head(done.head, scores=True)):
        model = onnx.load_from_string(data)
        onnx.checker.check_model(model, full_check=True)
        assert not {n.op_type for n in model.graph.node} & RANDOM
        assert {n.domain for n in model.graph.node} == {""}
        assert not model.functions
    session = open_session(fuse(found, done.head).model)
    x = inputs(50, 5)
    for a, b in zip(session.run(None, {"x": x}), session.run(None, {"x": x}), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_batch_axis_is_symbolic(plain: tuple[Path, Material, Fitted]) -> None:
    _, found, done = plain
    fused = fuse(found, done.head)
    model = onnx.load_from_string(fused.model)
    for value in (*model.graph.input, *model.graph.output):
        first = value.type.tensor_type.shape.dim[0]
        assert first.dim_param and not first.HasField("dim_value")
    x = inputs(40, 5)
    whole = answers(fused, {"x": x})
    for n in (0, 1, 2, 39):
        got = answers(fused, {"x": x[:n]})
        for spec in fused.outputs:
            assert got[spec.name].shape == (n, *spec.shape[1:])
            assert got[spec.name].dtype == spec.dtype
            if spec.dtype == "float32":
                np.testing.assert_allclose(got[spec.name], whole[spec.name][:n], atol=1e-5)


def test_thresholds_broadcast_over_rows(plain: tuple[Path, Material, Fitted]) -> None:
    _, found, done = plain
    fused = fuse(found, done.head)
    x = inputs(60, 5)
    rng = np.random.default_rng(0)
    default = answers(fused, {"x": x})
    scores = run_head(done.head, found.features(np.arange(60)))["set_scores"]
    q = rng.choice(np.quantile(scores, [0.3, 0.6, 0.9]).astype(np.float32), 60)
    t = np.float32(rng.normal(size=60))
    mixed = answers(fused, {"x": x, "q_hat": q, "ood_threshold": t})
    for value in np.unique(q):
        alone = answers(fused, {"x": x, "q_hat": np.array([value])})
        for name in ("set", "set_size"):
            np.testing.assert_array_equal(mixed[name][q == value], alone[name][q == value])
    np.testing.assert_array_equal(mixed["ood"], default["ood_score"] > t)
    assert mixed["set_size"].std() > 0
    for name in set(default) - {"set", "set_size", "ood"}:
        np.testing.assert_array_equal(mixed[name], default[name])
    same = answers(fused, {"x": x, "q_hat": np.array([done.head.q_hat], np.float32)})
    np.testing.assert_array_equal(same["set"], default["set"])


def test_the_pvalue_in_the_graph_is_its_definition() -> None:
    """(1 + #{conformal score >= s}) / (n + 1), exactly, while the table holds every score."""
    done, parts, fresh = fitted(n=600)
    clean = run_head(done.head, parts.conformal)["ood_score"]
    np.testing.assert_array_equal(np.sort(clean), done.scores["ood"])
    for rows in (parts.conformal, fresh):
        got = run_head(done.head, rows)
        want = [(1 + (clean >= s).sum()) / (len(clean) + 1) for s in got["ood_score"]]
        np.testing.assert_array_equal(got["ood_pvalue"], np.float32(want))
        np.testing.assert_array_equal(got["ood"], got["ood_score"] > done.ood.threshold)


def test_the_pvalue_of_many_rows_is_exact_where_it_matters() -> None:
    done, _, fresh = fitted(n=3000)
    clean = done.scores["ood"]
    got = run_head(done.head, fresh)
    want = np.array([(1 + (clean >= s).sum()) / (len(clean) + 1) for s in got["ood_score"]])
    assert (got["ood_pvalue"] >= np.float32(want)).all()  # rounded up, so the test stays valid
    tail = want < 512 / len(clean)
    assert tail.sum() > 100
    np.testing.assert_array_equal(got["ood_pvalue"][tail], np.float32(want[tail]))
    assert np.abs(got["ood_pvalue"] - want).max() < 0.01
    constants = onnx.load_from_string(compile_head(done.head)).graph.initializer
    assert max(math.prod(c.dims) for c in constants) <= 1056  # a table of 1,024, padded


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    z=st.lists(
        st.lists(st.floats(-15, 15, width=32), min_size=6, max_size=6), min_size=1, max_size=8
    ),
    seed=st.integers(0, 1000),
    method=st.sampled_from(["lac", "raps"]),
)
def test_the_graph_is_the_reference(z: list[list[float]], seed: int, method: str) -> None:
    """Outputs far from anything the fit saw, saturated rows and ties among them."""
    done = DONE.setdefault(method, fitted(conformal=method, max_error=0.4)[0])
    phi = np.random.default_rng(seed).normal(size=(len(z), D)).astype(np.float32) * 3
    check_head(done.head, compile_head(done.head), phi, np.array(z, np.float32))


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("method", ["laplace", "none"])
def test_the_graph_is_the_reference_for_values(outputs: int, method: str) -> None:
    done, _, fresh = fitted("regression", width=outputs, method=method, tolerance=1.0)
    worst = check_head(done.head, compile_head(done.head), fresh.phi, fresh.z)
    assert max(worst.values()) < 1e-5
    assert {"mean", "std", "lower", "upper", "quantiles", "ood_score"} <= worst.keys()
    assert ("epistemic_std" in worst) == (method == "laplace")


def test_a_black_box_compiles_without_features(folder: Path) -> None:
    model, found, done = prepared(black_box(folder / "box.onnx"), method="none")
    fused = fuse(found, done.head)
    x = inputs(50, 5)
    got = answers(fused, {"x": x})
    assert not {"epistemic", "aleatoric"} & got.keys()
    p = bare(model, x).astype(np.float64)
    np.testing.assert_allclose(got["probs"], softmax(np.log(p) / done.head.temperature), atol=1e-5)
    assert [i.name for i in onnx.load_from_string(compile_head(done.head)).graph.input] == [
        "z",
        "q_hat",
        "ood_threshold",
    ]


def test_one_sigmoid_becomes_two_classes(folder: Path) -> None:
    for tail in (("Sigmoid",), ()):
        name = f"sigmoid{len(tail)}.onnx"
        model, found, done = prepared(network(folder / name, out=1, tail=tail), conformal="lac")
        x = inputs(300, 5)
        got = answers(fuse(found, done.head), {"x": x})
        assert got["probs"].shape == (300, 2)
        own = bare(model, x)[:, 0]
        np.testing.assert_array_equal(got["label"], own > (0.5 if tail else 0))
        np.testing.assert_allclose(got["probs"].sum(1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 1.001}, "probs is off"),
        ({"q_hat": -1.0}, "set differs from float64 away from its threshold"),
        ({"abstain": 0.0}, "abstain differs"),
    ],
)
def test_a_graph_of_another_head_is_refused(change: dict[str, float], message: str) -> None:
    done, _, fresh = fitted(max_error=0.4)
    other = compile_head(done.head.with_(**change))
    with pytest.raises(FitError, match=message):
        check_head(done.head, other, fresh.phi, fresh.z)


def test_a_graph_with_another_pvalue_table_is_refused() -> None:
    done, _, fresh = fitted()
    model = onnx.load_from_string(compile_head(done.head))
    assert done.head.ood is not None
    tables = {n.input[0] for n in model.graph.node if n.op_type == "Gather"}
    size = [len(done.head.ood.pvalues)]
    (stored,) = (c for c in model.graph.initializer if c.name in tables and list(c.dims) == size)
    p = numpy_helper.to_array(stored) * np.float32(0.999)
    stored.CopyFrom(numpy_helper.from_array(p, stored.name))
    with pytest.raises(FitError, match="ood_pvalue"):
        check_head(done.head, model.SerializeToString(), fresh.phi, fresh.z)


def test_the_pvalue_table_and_the_definition_agree_at_ties() -> None:
    done = fitted()[0]
    ood = done.head.ood
    assert ood is not None
    at = pvalues(ood.table, ood.pvalues, ood.table)
    want = [(1 + (ood.table >= s).sum()) / (len(ood.table) + 1) for s in ood.table]
    np.testing.assert_allclose(at, want)


def test_a_bound_near_zero_keeps_the_digits_that_float32_has() -> None:
    """77.7 - 1.95 · 39 is small, and its rounding is that of 77.7."""
    head = Head(
        task="regression",
        width=1,
        features=None,
        module=None,
        noise=np.asarray([39.0**2]),
        temperature=0.9973,
        q_hat=1.9517,
        quantile_factors=np.asarray([[-1.9517, 0.0, 1.3]]),
    )
    z = np.linspace(60, 95, 5001, dtype=np.float32)[:, None]
    differences = check_head(head, compile_head(head), None, z)
    assert np.abs(reference(head, None, z)["lower"]).min() < 0.01
    assert max(differences.values()) <= 1e-6
