"""What design section 5.1 asks of every registered module and score."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load, save

from calibration.compile import check_head, compile_head
from calibration.head import Head, Member, Ood, reference
from calibration.threshold import pvalue_table
from posthoc import links, registry
from posthoc.contract import Features, FitError, State
from posthoc.graph import Fragment, standalone
from posthoc.runtime import open_session
from tests.conformance.cases import BUILDERS, CASES, Case, take

every = pytest.mark.parametrize("case", CASES, ids=str)


def test_nothing_registered_escapes() -> None:
    assert set(registry.MODULES) | set(registry.SCORES) == BUILDERS
    for name in BUILDERS:
        info = registry.info(name)
        assert info.name == name
        assert info.kind == ("module" if name in registry.MODULES else "score")
        assert info.needs <= {"features", "linear_head", "labels"}
        assert info.paper.url.startswith("https://")
        assert info.paper.year > 1990
        assert info.tasks and info.summary and info.passes >= 1


@every
def test_batch_split_and_merge_do_not_change_the_fit(case: Case) -> None:
    rows = case.rows()
    whole = case.apply(case.fit(rows), rows)
    pieces = [take(rows, slice(i, i + 37)) for i in range(0, len(rows), 37)]
    np.testing.assert_allclose(case.apply(case.fit(*pieces), rows), whole, rtol=2e-5, atol=1e-7)
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
        case.apply(state, take(rows, order)), case.apply(state, rows)[order], rtol=1e-12
    )
    refit = case.apply(case.fit(take(rows, order)), rows)
    np.testing.assert_allclose(refit, case.apply(state, rows), rtol=2e-5, atol=1e-7)


@every
def test_chunked_is_whole(case: Case) -> None:
    rows = case.rows()
    state = case.fit(rows)
    chunks = [case.apply(state, take(rows, slice(i, i + 1))) for i in range(20)]
    np.testing.assert_allclose(np.concatenate(chunks), case.apply(state, rows)[:20], rtol=1e-12)


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
    phi, z = g.input("phi", "float32", ["N", 12]), g.input("z", "float32", ["N", case.width()])
    if case.name in registry.SCORES:
        made = case.page.emit(g, state, phi, z)
        want = case.page.score(state, fresh.phi, fresh.z)
        shape: tuple[int, ...] = (-1,)
    else:
        made = case.page.emit(g, state, phi).variance
        want = case.page.spread(state, fresh.phi).variance.reshape(len(fresh), -1)
        shape = (-1, want.shape[1])
    g.op("Identity", made, out="result")
    # GEN reads outputs only; an input that nothing reads is left out of the graph.
    used = {name for node in g.nodes for name in node.input}
    g.inputs[:] = [i for i in g.inputs if i.name in used]
    session = open_session(standalone(g, {"result": ("float32", shape)}))
    feed = {"phi": fresh.phi, "z": fresh.z}
    (got,) = session.run(None, {k: v for k, v in feed.items() if k in used})
    scale = np.maximum(1.0, np.abs(want))
    assert np.max(np.abs(got - want) / scale) <= 1e-5


@every
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_float_type_is_taken(case: Case, dtype: type) -> None:
    rows = case.rows(dtype=dtype)
    exact = Features(np.asarray(rows.phi, np.float64), np.asarray(rows.z, np.float64), rows.y)
    got = case.apply(case.fit(rows), rows)
    assert got.dtype == np.float64 and np.isfinite(got).all()
    np.testing.assert_allclose(got, case.apply(case.fit(exact), exact), rtol=2e-3, atol=1e-5)


@every
def test_the_same_rows_give_the_same_state(case: Case) -> None:
    a, b = case.fit(case.rows()), case.fit(case.rows())
    for key, value in a.tensors.items():
        np.testing.assert_array_equal(value, b.tensors[key])
    assert a.settings == b.settings


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_an_error(case: Case, bad: float) -> None:
    if "features" not in registry.info(case.name).needs:
        assert case.fit(case.rows()).tensors == {}  # outputs only: nothing is fitted to spoil
        return
    rows = case.rows()
    assert rows.phi is not None
    phi = rows.phi.copy()
    phi[3, 2] = bad
    with pytest.raises(FitError, match="not finite"):
        case.fit(Features(phi, rows.z, rows.y))


@every
def test_too_little_is_an_error_or_an_answer(case: Case) -> None:
    fitted = registry.info(case.name).needs & {"features"}
    if not fitted:
        assert np.isfinite(case.apply(case.fit(), case.rows())).all()
        return
    with pytest.raises(FitError):
        case.fit()
    rows = case.rows()
    constant = Features(np.zeros_like(rows.phi), rows.z, rows.y)
    with pytest.raises(FitError, match=r"zero|constant"):
        case.fit(constant)


@every
def test_black_box_rows_are_refused_by_what_needs_features(case: Case) -> None:
    rows = case.rows()
    blind = Features(None, rows.z, rows.y)
    if "features" in registry.info(case.name).needs:
        with pytest.raises(FitError, match="black box"):
            case.fit(blind)
    else:
        assert np.isfinite(case.page.score(case.fit(blind), None, rows.z)).all()


@pytest.mark.parametrize("case", [c for c in CASES if c.name in registry.MODULES], ids=str)
def test_strength_zero_is_the_frozen_model(case: Case) -> None:
    rows = case.rows()
    state = case.fit(rows)
    head = _head(case, state, strength=0.0)
    out = reference(head, rows.phi, rows.z)
    if case.task == "classification":
        np.testing.assert_array_equal(out["label"], rows.z.argmax(1))
        np.testing.assert_allclose(out["probs"], links.softmax(rows.z), rtol=1e-12)
        assert out["epistemic"].max() < 1e-12
    else:
        np.testing.assert_array_equal(out["mean"], rows.z.astype(np.float64))
        assert out["epistemic_std"].max() == 0.0
        np.testing.assert_allclose(out["std"], out["aleatoric_std"])


@pytest.mark.parametrize("case", [c for c in CASES if c.name in registry.MODULES], ids=str)
def test_infinite_prior_precision_is_the_frozen_model(case: Case) -> None:
    rows = case.rows()
    stats = case.page.update(case.empty(), rows)
    state = case.page.finish(stats, case.head(), prior_precision=1e12)
    assert case.page.spread(state, rows.phi).variance.max() < 1e-9


@every
def test_the_compiled_head_keeps_the_prediction(case: Case) -> None:
    rows = case.rows()
    head = _head(case, case.fit(rows), strength=0.7)
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
        eps = links.normal_draws(len(state.tensors["directions"]), 0)
    blind = module is None and "features" not in registry.info(case.name).needs
    return Head(
        task=case.task,
        width=case.width(),
        features=None if blind else 12,
        module=module,
        strength=strength,
        noise=np.ones(2) if case.task == "regression" else None,
        eps=eps,
        q_hat=0.9,
        ood=ood,
    )
