"""The scores that read outputs, or the head: definitions as loops, and identities."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from calibration.metrics.ranking import risk_coverage
from posthoc import logits, registry
from posthoc.contract import Features, FitError, LinearHead, State
from posthoc.graph import Fragment, standalone
from posthoc.links import softmax
from posthoc.ood import energy, max_logit, max_logit_pnorm, msp, outputs, react, sample, scale
from posthoc.runtime import open_session

N, D, C = 300, 20, 5
OUTPUTS = (msp, max_logit, energy)


def head(seed: int = 0) -> LinearHead:
    rng = np.random.default_rng(seed)
    return LinearHead(rng.normal(size=(C, D)), rng.normal(size=C))


def rows(seed: int = 0, *, relu: bool = False, n: int = N) -> Features:
    """Features with outliers, outputs of `head`, and labels that they tell of."""
    rng = np.random.default_rng(seed)
    phi = rng.normal(size=(n, D)) * np.exp(rng.normal(size=(n, 1)))
    phi = np.maximum(phi, 0.0) if relu else phi
    phi = phi.astype(np.float32).astype(np.float64)  # as cached
    z = phi @ head().weight.T + head().bias
    return Features(phi, z, (z / 3 + rng.gumbel(size=z.shape)).argmax(1))


def fitted(page: ModuleType, r: Features, linear: LinearHead | None = None) -> State:
    width = 0 if r.phi is None else r.phi.shape[1]
    stats = page.update(page.init(r.z.shape[1], width), r)
    state: State = page.finish(stats, linear)
    return state


def served(page: ModuleType, state: State, r: Features) -> np.ndarray:
    """What a graph of the score answers in float32."""
    g = Fragment()
    known: dict[str, Any] = {"phi": r.phi, "z": r.z}
    names = {k: g.input(k, "float32", ["N", v.shape[1]]) for k, v in known.items() if v is not None}
    g.op("Identity", page.emit(g, state, names.get("phi"), names["z"]), out="score")
    used = {name for node in g.nodes for name in node.input}
    g.inputs[:] = [i for i in g.inputs if i.name in used]
    session = open_session(standalone(g, {"score": ("float32", (-1,))}))
    feed = {k: np.asarray(known[k], np.float32) for k in names if k in used}
    return np.asarray(session.run(["score"], feed)[0])


def lse(values: Any) -> float:
    top = max(values)
    return float(top + math.log(sum(math.exp(v - top) for v in values)))


def test_scores_of_outputs_are_their_definitions() -> None:
    r = rows()
    for row, one, two, three in zip(
        r.z, *(p.score(fitted(p, r), None, r.z) for p in OUTPUTS), strict=True
    ):
        p = [math.exp(v - lse(row)) for v in row]
        assert one == pytest.approx(1 - max(p), abs=1e-12)
        assert two == -max(row)
        assert three == pytest.approx(-lse(row), rel=1e-12)


def test_msp_does_not_see_what_is_added_to_all_logits_and_the_others_do() -> None:
    r = rows()
    moved = r.z + 7.0
    np.testing.assert_allclose(
        msp.score(fitted(msp, r), None, moved), msp.score(fitted(msp, r), None, r.z), atol=1e-12
    )
    for page in (max_logit, energy):
        state = fitted(page, r)
        np.testing.assert_allclose(
            page.score(state, None, moved), page.score(state, None, r.z) - 7.0, atol=1e-9
        )


def test_msp_keeps_the_order_of_saturated_rows_in_float32() -> None:
    z = np.asarray([[40.0, 0, 0], [60.0, 0, 0], [0.0, 0, 0], [0.0, 30, 0], [-80.0, 0, -80]])
    r = Features(None, z)
    state = fitted(msp, r)
    for values in (msp.score(state, None, z), served(msp, state, r)):
        np.testing.assert_array_equal(np.argsort(values), [4, 1, 0, 3, 2])
        assert values.min() > 0


def test_msp_of_two_classes_ranks_like_the_entropy_of_either() -> None:
    z = np.random.default_rng(0).normal(size=(60, 2)) * 3
    p = softmax(z)
    order = np.argsort(msp.score(fitted(msp, Features(None, z)), None, z))
    np.testing.assert_array_equal(order, np.argsort(-(p * np.log(p)).sum(1)))


def test_energies_of_extreme_outputs_are_finite_and_served() -> None:
    z = np.asarray([[1e4, 0, -1e4], [-1e4, -1e4, -1e4], [0.0, 1e-4, 0.0]])
    r = Features(None, z)
    state = fitted(energy, r)
    want = energy.score(state, None, z)
    np.testing.assert_allclose(want, [-1e4, 1e4 - math.log(3), -lse(z[2])])
    np.testing.assert_allclose(served(energy, state, r), want, rtol=1e-6)


def test_one_sigmoid_logit_is_as_sure_of_either_class() -> None:
    raw = np.asarray([[-9.0], [9.0], [0.5], [-0.5]])
    z = logits.to_logits(raw, "sigmoid")
    for page in OUTPUTS:
        state = fitted(page, Features(None, z))
        values = page.score(state, None, z)
        np.testing.assert_allclose(values[[0, 2]], values[[1, 3]], rtol=1e-9)
        assert values[0] < values[2]
        np.testing.assert_allclose(served(page, state, Features(None, z)), values, atol=1e-5)
    # Two logits of which the first is not always 0 stay as they are.
    both = Features(None, np.concatenate([z, [[1.0, 2.0]]]))
    assert not fitted(energy, both).settings["centred"]
    halves = max_logit.merge(
        max_logit.update(max_logit.init(2, 0), Features(None, z)),
        max_logit.update(max_logit.init(2, 0), Features(None, z + 1)),
    )
    assert not max_logit.finish(halves).settings["centred"]


def test_the_energy_of_probabilities_is_refused() -> None:
    p = softmax(rows().z)
    for dtype in (np.float16, np.float32, np.float64):
        z = logits.to_logits(p.astype(dtype).astype(np.float32), "log")  # as cached
        with pytest.raises(
            FitError, match=r"energy is 0 for every row.*take gen, msp or max_logit"
        ):
            fitted(energy, Features(None, z))
    z = logits.to_logits(p[:, :1], "log_sigmoid")
    with pytest.raises(FitError, match="energy is 0"):
        fitted(energy, Features(None, z))
    order = np.argsort(max_logit.score(fitted(max_logit, Features(None, np.log(p))), None, p))
    np.testing.assert_array_equal(order, np.argsort(-p.max(1)))


@pytest.mark.parametrize("page", [max_logit, energy, max_logit_pnorm])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_refused(page: ModuleType, bad: float) -> None:
    r = rows()
    r.z[7, 2] = bad
    with pytest.raises(FitError, match=f"{page.INFO.name} met outputs that are not finite"):
        fitted(page, r)


def p_norm_confidence(row: Any, p: int) -> float:
    mean = sum(row) / len(row)
    c = [v - mean for v in row]
    return float(max(c) / sum(abs(v) ** p for v in c) ** (1 / p))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pnorm_chooses_by_aurc_what_is_its_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Logits whose scale says nothing of errors: what the norm takes out.
    clean = rng.normal(size=(2_000, 10))
    y = (clean * 2 + rng.gumbel(size=clean.shape)).argmax(1)
    z = (clean * np.exp(2 * rng.normal(size=(2_000, 1)))).astype(np.float32)  # as cached
    z = z.astype(np.float64)
    state = fitted(max_logit_pnorm, Features(None, z, y))
    wrong = (z.argmax(1) != y).astype(float)
    curves = {
        p: risk_coverage([p_norm_confidence(row, p) for row in z], wrong).aurc for p in range(1, 10)
    } | {0: risk_coverage(z.max(1), wrong).aurc}
    best = min(curves, key=curves.__getitem__)
    others = np.sort(softmax(z), axis=1)[:, :-1].sum(1)  # 1 - max would tie saturated rows
    base = risk_coverage(-others, wrong).aurc
    assert curves[best] < base and best > 0
    found = state.settings
    assert found["p"] == best and found["read"] == found["rows"] == 2_000
    assert found["aurc"] == pytest.approx(curves[best], abs=1e-12)
    assert found["aurc_msp"] == pytest.approx(base, abs=1e-12)
    got = max_logit_pnorm.score(state, None, z)
    np.testing.assert_allclose(got, [-p_norm_confidence(row, best) for row in z], rtol=1e-9)
    np.testing.assert_allclose(max_logit_pnorm.score(state, None, 3 * z - 5), got, rtol=1e-9)
    np.testing.assert_allclose(served(max_logit_pnorm, state, Features(None, z)), got, atol=1e-5)


def test_pnorm_is_served_for_every_power_and_rows_of_any_size() -> None:
    z = np.random.default_rng(0).normal(size=(50, 12)) * np.logspace(-1, 4, 50)[:, None]
    z[0], z[1] = 3.3, 0.0
    for p in (None, *max_logit_pnorm.POWERS):
        state = State({}, {"p": p, "classes": 12})
        want = max_logit_pnorm.score(state, None, z)
        got = served(max_logit_pnorm, state, Features(None, z))
        assert (np.abs(got - want) / np.maximum(1, np.abs(want))).max() < 1e-5
        if p:
            assert want[:2] == pytest.approx([0, 0], abs=1e-9) and want[2:].max() < 0


def test_pnorm_without_a_gain_is_maximum_softmax() -> None:
    r = rows()
    right = Features(None, r.z, r.z.argmax(1))  # nothing to gain without an error
    two = Features(None, r.z[:, :2], r.z[:, :2].argmin(1) * (np.arange(N) % 3 == 0))
    for given in (right, two):
        state = fitted(max_logit_pnorm, given)
        if state.settings["p"] is None:
            np.testing.assert_array_equal(
                max_logit_pnorm.score(state, None, given.z),
                msp.score(fitted(msp, given), None, given.z),
            )
    assert fitted(max_logit_pnorm, right).settings["p"] is None
    assert fitted(max_logit_pnorm, two).settings["p"] in (None, 0)


def test_aurc_of_ties_is_that_of_the_metrics() -> None:
    rng = np.random.default_rng(0)
    scores, wrong = rng.integers(0, 9, 200) / 4, rng.random(200) < 0.3
    want = risk_coverage(-scores, wrong.astype(float)).aurc
    assert max_logit_pnorm.aurc(scores, wrong) == pytest.approx(want, abs=1e-15)
    assert max_logit_pnorm.aurc(np.zeros(200), wrong) == pytest.approx(wrong.mean())


def test_pnorm_needs_rows_and_labels_that_are_classes() -> None:
    r = rows()
    with pytest.raises(FitError, match="no rows"):
        max_logit_pnorm.finish(max_logit_pnorm.init(C, D))
    with pytest.raises(FitError, match="class indices"):
        fitted(max_logit_pnorm, Features(None, r.z, r.z))
    with pytest.raises(FitError, match=r"a label outside 0\.\.4"):
        fitted(max_logit_pnorm, Features(None, r.z, np.full(N, -1)))


def test_react_is_its_definition() -> None:
    r, fresh, h = rows(), rows(1), head()
    state = fitted(react, r, h)
    values = sorted(v for row in r.phi for v in row)
    place = 0.9 * (len(values) - 1)
    low = math.floor(place)
    clip = values[low] + (place - low) * (values[low + 1] - values[low])
    assert state.settings["clip"] == pytest.approx(clip, rel=1e-12)
    want = [
        -lse([sum(min(v, clip) * w for v, w in zip(row, h.weight[c], strict=True)) + h.bias[c]
              for c in range(C)])
        for row in fresh.phi
    ]  # fmt: skip
    np.testing.assert_allclose(react.score(state, fresh.phi, fresh.z), want, rtol=1e-9)


def test_react_of_many_rows_reads_a_sample_that_no_order_changes() -> None:
    r = rows(n=react.ROWS + 3_000)
    state = fitted(react, r, head())
    assert state.settings["rows"] == len(r) and state.settings["read"] == react.ROWS
    share = (r.phi <= state.settings["clip"]).mean()
    assert share == pytest.approx(0.9, abs=0.01)
    order = np.random.default_rng(0).permutation(len(r))
    pieces = [Features(r.phi[i], r.z[i]) for i in np.array_split(order, 7)]
    stats = [react.update(react.init(C, D), p) for p in pieces]
    whole = stats[0]
    for s in stats[1:]:
        whole = react.merge(whole, s)
    assert react.finish(whole, head()).settings == state.settings


@pytest.mark.parametrize("relu", [True, False])
def test_scale_is_its_definition(relu: bool) -> None:
    r, h = rows(relu=relu), head()
    r.phi[4] = -np.abs(r.phi[4])  # no activation above 0
    r.phi[5] = 0.0
    state = fitted(scale, r, h)
    want = []
    for row in r.phi:
        active = sorted((max(v, 0.0) for v in row), reverse=True)
        top = sum(active[:3])  # 15 % of 20
        factor = math.exp(sum(active) / top) if top else math.e
        want.append(-lse([factor * float(row @ h.weight[c]) + h.bias[c] for c in range(C)]))
    np.testing.assert_allclose(scale.score(state, r.phi, r.z), want, rtol=1e-9)
    got = served(scale, state, r)
    assert (np.abs(got - want) / np.maximum(1, np.abs(want))).max() < 1e-5


def test_scale_of_all_activations_multiplies_features_by_e() -> None:
    r, h = rows(), head()
    state = fitted(scale, r, h)
    whole = State(state.tensors, {**state.settings, "top": D})
    np.testing.assert_allclose(
        scale.score(whole, r.phi, r.z),
        outputs.energy(math.e * r.phi @ h.weight.T + h.bias),
        rtol=1e-12,
    )


def test_scale_does_not_overflow() -> None:
    r = rows()
    state = fitted(scale, r, head())
    even = np.ones((1, D))  # s1 / s2 is largest where all activations are equal
    tiny = np.full((1, D), 1e-38)
    for phi in (even, even * 1e6, tiny, np.zeros((1, D)), -even):
        assert np.isfinite(scale.score(state, phi, r.z[:1])).all()
        assert np.isfinite(served(scale, state, Features(phi, r.z[:1]))).all()


@pytest.mark.parametrize("link", ["identity", "sigmoid"])
def test_unchanged_features_have_the_energy_of_the_outputs(link: logits.Link) -> None:
    """The head that ReAct and SCALE read gives the outputs that the energy reads."""
    r, h = rows(), head()
    if link == "sigmoid":
        h = LinearHead(h.weight[:1], h.bias[:1])
    raw = r.phi @ h.weight.T + h.bias
    if link == "sigmoid":
        h = logits.two_class_head(h)
    r = Features(r.phi, logits.to_logits(raw, link), None)
    want = energy.score(fitted(energy, r), None, r.z)
    clipped = fitted(react, r, h)
    never = State({**clipped.tensors, "clip": np.asarray(np.inf)}, clipped.settings)
    np.testing.assert_allclose(react.score(never, r.phi, r.z), want, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(served(react, never, r), want, rtol=1e-5, atol=1e-5)
    state = fitted(scale, r, h)
    whole = State(state.tensors, {**state.settings, "top": D})
    np.testing.assert_allclose(scale.score(whole, r.phi / math.e, r.z), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("page", [react, scale])
def test_a_black_box_and_features_that_say_nothing_are_refused(page: ModuleType) -> None:
    r, name = rows(), page.INFO.name
    with pytest.raises(FitError, match=f"{name} needs a linear head and this model is a black box"):
        fitted(page, r)
    with pytest.raises(FitError, match=f"{name} needs features; the model is a black box"):
        fitted(page, Features(None, r.z), head())
    with pytest.raises(FitError, match=f"{name}: every feature is constant"):
        fitted(page, Features(np.full((N, D), 2.0), r.z), head())
    with pytest.raises(FitError, match=f"{name} needs at least two rows and has 1"):
        fitted(page, Features(r.phi[:1], r.z[:1]), head())
    assert name not in registry.applicable(registry.SCORES, "classification", {"features"})


def test_a_sample_of_rows_keeps_no_outputs_that_react_does_not_read() -> None:
    stats = react.update(react.init(C, D), rows())
    assert isinstance(stats, sample.Sample) and stats.z.shape == (N, 0)
