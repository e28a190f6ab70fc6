"""What design section 5.1 asks of every registered module and score."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load, save

from calibration.compile import check_head, compile_head
from calibration.head import Head, Member, Ood, reference
from calibration.threshold import pvalue_table
from posthoc import links, registry
from posthoc.contract import DataError, Features, FitError, State
from posthoc.graph import Fragment, standalone
from posthoc.runtime import open_session
from tests.conformance.cases import BUILDERS, CASES, PROMISED, Case, take

PARTS = ("variance", "amplitude", "draws", "class_variance", "shift")
every = pytest.mark.parametrize("case", CASES, ids=str)
modules = pytest.mark.parametrize("case", [c for c in CASES if c.module], ids=str)


def test_nothing_registered_escapes() -> None:
    assert set(registry.MODULES) | set(registry.SCORES) == BUILDERS
    for name in BUILDERS:
        info = registry.info(name)
        assert info.name == name
        assert info.kind == ("module" if name in registry.MODULES else "score")
        assert info.needs <= {"features", "linear_head", "labels", "weight_samples", "network"}
        assert info.paper.url.startswith("https://")
        assert info.paper.year > 1990
        assert info.tasks and info.summary and info.passes >= 1


def test_no_promised_module_or_task_is_missing() -> None:
    for name, tasks in PROMISED.items():
        assert name in registry.MODULES, f"{name} is not registered"
        assert tasks <= set(registry.info(name).tasks), f"{name} lacks a task"
        for task in tasks:
            assert any((c.name, c.task) == (name, task) for c in CASES)


@every
def test_batch_split_and_merge_do_not_change_the_fit(case: Case) -> None:
    rows = case.rows()
    whole = case.apply(case.fit(rows), rows)
    pieces = [take(rows, slice(i, i + 37)) for i in range(0, len(rows), 37)]
    split = case.apply(case.fit(*pieces), rows)
    np.testing.assert_allclose(split, whole, rtol=case.tolerance, atol=case.tolerance / 100)
    if not case.folds:
        return  # it iterates over the rows; there is nothing to merge
    page, left, right = case.page, case.empty(), case.empty()
    for piece in pieces[::2]:
        left = page.update(left, piece)
    for piece in pieces[1::2]:
        right = page.update(right, piece)
    merged = case.apply(case.finish(page.merge(left, right)), rows)
    np.testing.assert_allclose(merged, whole, rtol=2e-5, atol=1e-7)


@every
def test_rows_permute(case: Case) -> None:
    rows = case.rows()
    state = case.fit(rows)
    order = np.random.default_rng(3).permutation(len(rows))
    np.testing.assert_allclose(
        case.apply(state, take(rows, order)),
        case.apply(state, rows)[order],
        rtol=1e-12,
        atol=1e-12,
    )
    if case.ordered:
        return
    refit = case.apply(case.fit(take(rows, order)), rows)
    want = case.apply(state, rows)
    np.testing.assert_allclose(refit, want, rtol=case.tolerance, atol=case.tolerance / 100)


@every
def test_chunked_is_whole(case: Case) -> None:
    rows = case.rows()
    state = case.fit(rows)
    chunks = [case.apply(state, take(rows, slice(i, i + 1))) for i in range(20)]
    np.testing.assert_allclose(
        np.concatenate(chunks), case.apply(state, rows)[:20], rtol=1e-12, atol=1e-12
    )


@every
def test_saved_state_is_bit_equal(case: Case) -> None:
    state = case.fit(case.rows())
    back = load(save({k: np.ascontiguousarray(v) for k, v in state.tensors.items()}))
    assert set(back) == set(state.tensors)
    for key, value in state.tensors.items():
        assert back[key].dtype == value.dtype
        np.testing.assert_array_equal(back[key], value)
    rows = case.rows(seed=2)
    again = case.apply(State(dict(back), dict(state.settings)), rows)
    np.testing.assert_array_equal(again, case.apply(state, rows))


@every
@pytest.mark.parametrize("opset", [13, 17, 20])
def test_the_graph_is_the_reference(case: Case, opset: int) -> None:
    rows = case.rows()
    state, fresh = case.fit(rows), case.rows(seed=4)
    g = Fragment(opset)
    phi, z = (
        g.input("phi", "float32", ["N", case.features]),
        g.input("z", "float32", ["N", case.width()]),
    )
    if case.module:
        wanted, names = case.spread(state, fresh), case.page.emit(g, state, phi, z)
        want = {k: v for k in PARTS if (v := getattr(wanted, k)) is not None}
        made = {k: v for k in PARTS if (v := getattr(names, k)) is not None}
        np.testing.assert_array_equal(names.directions, wanted.directions)
    else:
        want = {"score": case.page.score(state, fresh.phi, fresh.z)}
        made = {"score": case.page.emit(g, state, phi, z)}
    assert made.keys() == want.keys()
    for key, name in made.items():
        g.op("Identity", name, out=key)
    # GEN reads outputs only; an input that nothing reads is left out of the graph.
    used = {name for node in g.nodes for name in node.input}
    g.inputs[:] = [i for i in g.inputs if i.name in used]
    if "variance" in want and want["variance"].ndim == 1:
        want["variance"] = want["variance"][:, None]  # N×1 in a graph
    shapes = {k: ("float32", (-1, *v.shape[1:])) for k, v in want.items()}
    session = open_session(standalone(g, shapes))
    feed = {"phi": fresh.phi, "z": fresh.z}
    got = session.run(list(want), {k: v for k, v in feed.items() if k in used})
    for value, exact in zip(got, want.values(), strict=True):
        assert value.shape == exact.shape
        assert np.max(np.abs(value - exact) / np.maximum(1.0, np.abs(exact))) <= 1e-5


@modules
@pytest.mark.parametrize("shift", [100.0, 3e3])
def test_features_far_from_zero_are_fitted_and_served(case: Case, shift: float) -> None:
    """A feature like the year varies by little beside its size, and float32 has 24 bits."""
    rows = case.rows()
    assert rows.phi is not None
    phi = rows.phi + np.float32(shift)
    if not registry.info(case.name).needs.isdisjoint({"network", "weight_samples"}):
        phi = rows.phi  # features are outputs of networks there
    far = Features(phi, rows.z, rows.y)
    wide = Features(phi.astype(np.float64), rows.z.astype(np.float64), rows.y)
    state = case.fit(far)
    got, want = case.apply(state, far), case.apply(case.fit(wide), wide)
    scale = max(1.0, float(np.abs(want).max()))
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-4 * scale)
    head = _head(case, state, strength=0.5)
    assert max(check_head(head, compile_head(head), far.phi, far.z).values()) <= 1e-5


@every
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_float_type_is_taken(case: Case, dtype: type) -> None:
    rows = case.rows(dtype=dtype)
    exact = Features(np.asarray(rows.phi, np.float64), np.asarray(rows.z, np.float64), rows.y)
    got = case.apply(case.fit(rows), rows)
    assert got.dtype == np.float64 and np.isfinite(got).all()
    want = case.apply(case.fit(exact), exact)
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=max(1e-5, case.tolerance))


@every
def test_the_same_rows_give_the_same_state(case: Case) -> None:
    a, b = case.fit(case.rows()), case.fit(case.rows())
    for key, value in a.tensors.items():
        np.testing.assert_array_equal(value, b.tensors[key])
    assert a.settings == b.settings


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_an_error(case: Case, bad: float) -> None:
    rows = case.rows()
    if not case.module and not registry.info(case.name).needs:
        assert case.fit(rows).tensors == {}  # outputs only: nothing is fitted to spoil
        return
    assert rows.phi is not None
    phi, z = rows.phi.copy(), rows.z.copy()
    phi[3, 1] = bad
    if "features" in registry.info(case.name).needs:
        with pytest.raises(FitError, match="not finite"):
            case.fit(Features(phi, rows.z, rows.y))
    reads_z = case.module or "features" not in registry.info(case.name).needs
    if reads_z and case.task == "classification":
        z[3, 1] = bad
        with pytest.raises(FitError, match="not finite"):
            case.fit(Features(rows.phi, z, rows.y))
    if case.task == "regression" and "labels" in registry.info(case.name).needs:
        y = rows.y.copy()
        y[5, 0] = bad
        with pytest.raises(FitError, match="not finite"):
            case.fit(Features(rows.phi, rows.z, y))


@every
def test_too_little_is_an_error_or_an_answer(case: Case) -> None:
    rows = case.rows()
    if not case.module and not registry.info(case.name).needs:
        assert np.isfinite(case.apply(case.fit(), rows)).all()
        return
    with pytest.raises(FitError, match="rows"):
        case.fit()
    if "features" in registry.info(case.name).needs:
        constant = Features(np.zeros_like(rows.phi), rows.z, rows.y)
        with pytest.raises(FitError, match=r"zero|constant"):
            case.fit(constant)
    try:
        state = case.fit(take(rows, slice(0, 1)))
    except FitError:
        return
    assert np.isfinite(case.apply(state, rows)).all()


@every
def test_one_class_only_is_an_error_or_an_answer(case: Case) -> None:
    if case.task == "regression":
        return
    rows = case.rows()
    alone = Features(rows.phi, rows.z, np.zeros(len(rows), np.int64))
    try:
        state = case.fit(alone)
    except FitError as e:
        assert "class" in str(e)
        return
    assert np.isfinite(case.apply(state, rows)).all()


@every
def test_labels_out_of_range_or_absent_are_an_error(case: Case) -> None:
    if "labels" not in registry.info(case.name).needs:
        return
    rows = case.rows()
    with pytest.raises(FitError, match="label"):
        case.fit(Features(rows.phi, rows.z, None))
    if case.task == "classification":
        with pytest.raises((FitError, DataError), match="label"):
            case.fit(Features(rows.phi, rows.z, np.asarray(rows.y) + 3))
    elif case.module:
        with pytest.raises(FitError, match="label"):
            case.fit(Features(rows.phi, rows.z, np.asarray(rows.y)[:, :1]))


@every
def test_a_singular_gram_matrix_is_taken(case: Case) -> None:
    rows = case.rows()
    assert rows.phi is not None
    phi = rows.phi.copy()
    phi[:, -2] = phi[:, 0]  # the same feature twice
    phi[:, 1] = 0.0
    phi[:, -1] = 3.0
    twice = Features(phi, rows.z, rows.y)
    assert np.isfinite(case.apply(case.fit(twice), twice)).all()


@every
def test_settings_are_documented_and_checked(case: Case) -> None:
    if not case.module:
        return
    kind = case.page.Settings
    assert kind.__doc__ and kind.model_config["frozen"] and kind.model_config["extra"] == "forbid"
    for key, field in kind.model_fields.items():
        assert not field.is_required(), f"{key} has no default"
        assert f"``{key}``" in kind.__doc__, f"the docstring of {case.name}'s settings omits {key}"
    with pytest.raises(FitError, match=f"{case.name} has no setting 'nothing'"):
        registry.settings(case.name, {"nothing": 1})


@every
def test_black_box_rows_are_refused_by_what_needs_features(case: Case) -> None:
    rows = case.rows()
    blind = Features(None, rows.z, rows.y)
    if "features" in registry.info(case.name).needs:
        with pytest.raises(FitError, match="black box"):
            case.fit(blind)
    else:
        assert np.isfinite(case.apply(case.fit(blind), blind)).all()


@modules
def test_strength_zero_is_the_frozen_model(case: Case) -> None:
    rows = case.rows()
    state = case.fit(rows)
    head = _head(case, state, strength=0.0)
    out = reference(head, rows.phi, rows.z)
    if case.task == "classification":
        np.testing.assert_array_equal(out["label"], rows.z.argmax(1))
        np.testing.assert_allclose(out["probs"], links.softmax(rows.z), rtol=1e-12)
        assert ("epistemic" in out) == case.spread(state, rows).decomposes
        assert out.get("epistemic", np.zeros(1)).max() < 1e-12
    else:
        np.testing.assert_array_equal(out["mean"], rows.z.astype(np.float64))
        if "epistemic_std" in out:
            assert out["epistemic_std"].max() == 0.0
            np.testing.assert_allclose(out["std"], out["aleatoric_std"])


@modules
def test_infinite_prior_precision_is_the_frozen_model(case: Case) -> None:
    if "prior_precision" not in case.page.Settings.model_fields:
        return
    rows = case.rows()
    state = case.fit(rows, prior_precision=1e12)
    spread = case.spread(state, rows)
    if spread.variance is None:
        assert np.abs(links.deviations(spread, None)).max() < 1e-4
        return
    assert spread.variance.max() < 1e-9
    if spread.shift is not None:
        assert np.abs(spread.shift).max() < 1e-4


@modules
def test_a_module_that_preserves_moves_nothing(case: Case) -> None:
    rows = case.rows()
    spread = case.spread(case.fit(rows), rows)
    info = registry.info(case.name)
    preserves = info.preserves or (info.either and case.task == "regression")
    assert preserves == (spread.shift is None and spread.variance is not None)
    if case.task == "regression":
        assert spread.variance is not None  # a mean and a variance are all that is served


@modules
@pytest.mark.parametrize("predictive", ["probit", "probit_class", "mc", "bridge"])
def test_every_link_compiles(case: Case, predictive: str) -> None:
    if case.task == "regression":
        return
    rows = take(case.rows(), slice(0, 60))
    state = case.fit(case.rows())
    spread = case.spread(state, rows)
    if not spread.decomposes and predictive != "probit":
        return
    head = _head(case, state, strength=0.4).with_(predictive=predictive)
    assert max(check_head(head, compile_head(head), rows.phi, rows.z).values()) <= 1e-5


@every
def test_the_compiled_head_keeps_the_prediction(case: Case) -> None:
    rows = case.rows()
    head = _head(case, case.fit(rows), strength=0.7)
    if head.prediction == "module":
        head = head.with_(strength=0.0)  # the frozen head's side of the way
    assert max(check_head(head, compile_head(head), rows.phi, rows.z).values()) <= 1e-5
    session = open_session(compile_head(head))
    field = "label" if case.task == "classification" else "mean"
    names = [i.name for i in session.get_inputs()]
    feed = {k: v for k, v in {"phi": rows.phi, "z": rows.z}.items() if k in names}
    (got,) = session.run([field], feed)
    want = rows.z.argmax(1) if case.task == "classification" else rows.z
    np.testing.assert_array_equal(got, want)


def _head(case: Case, state: State, strength: float) -> Head:
    """A head around the page under test."""
    rows = case.rows()
    module, ood = None, None
    if case.name in registry.MODULES:
        module = (case.name, state)
    else:
        scores = np.asarray(case.page.score(state, rows.phi, rows.z), np.float32)
        ood = Ood((Member(case.name, state),), *pvalue_table(scores), float(np.median(scores)))
    eps = None
    if module is not None and case.task == "classification":
        directions = case.spread(state, take(rows, slice(0, 2))).directions
        eps = None if directions is None else links.normal_draws(len(directions), 0)
    blind = module is None and "features" not in registry.info(case.name).needs
    return Head(
        task=case.task,
        width=case.width(),
        features=None if blind else case.features,
        module=module,
        prediction=case.prediction if module is not None else "frozen",
        strength=strength,
        noise=np.ones(2) if case.task == "regression" else None,
        eps=eps,
        q_hat=0.9,
        ood=ood,
    )
