"""Dropout before the last layer, against its definition as loops and against its moments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from calibration.compile import check_head, compile_head
from calibration.fit_options import FitOptions, check_options
from calibration.head import Head
from posthoc import links, registry
from posthoc import rows as blocks
from posthoc.contract import Features, FitError, LinearHead, State
from posthoc.graph import Fragment, standalone
from posthoc.methods import head_dropout as page
from posthoc.runtime import open_session

D, C = 40, 5
KINDS = pytest.mark.parametrize("kind", ["bernoulli", "gaussian"])


def head(c: int = C, d: int = D) -> LinearHead:
    rng = np.random.default_rng(0)
    return LinearHead(rng.normal(size=(c, d)) / 3, rng.normal(size=c))


def rows(n: int = 300, seed: int = 1, c: int = C, d: int = D, labels: bool = False) -> Features:
    rng = np.random.default_rng(seed)
    own = head(c, d)
    phi = np.maximum(rng.normal(size=(n, d)), 0.0).astype(np.float32)
    z = (phi.astype(np.float64) @ own.weight.T + own.bias).astype(np.float32)
    return Features(phi, z, z + rng.normal(size=z.shape) if labels else None)


def spread(state: State, some: Features) -> links.Spread:
    assert some.phi is not None
    return page.spread(state, some.phi, some.z)


def fitted(some: Features | None = None, task: Any = "classification", **given: Any) -> State:
    some = rows(labels=task == "regression") if some is None else some
    assert some.phi is not None
    own = head(some.z.shape[1], some.phi.shape[1])
    return registry.fit("head_dropout", own, task, blocks.of(some), given)


@KINDS
def test_members_are_the_head_on_masked_features(kind: str) -> None:
    some, own = rows(6), head()
    assert some.phi is not None
    state = fitted(rate=0.3, kind=kind, samples=8, seed=2)
    drawn = spread(state, some).draws
    assert drawn is not None
    for n in range(6):
        for s in range(8):
            mask = 1.0 + state.tensors["noise"][s]
            member = [
                sum(mask[j] * some.phi[n, j] * own.weight[c, j] for j in range(D)) for c in range(C)
            ]
            frozen = [sum(some.phi[n, j] * own.weight[c, j] for j in range(D)) for c in range(C)]
            away = np.asarray(member) - frozen
            np.testing.assert_allclose(drawn[n, s], away - away.mean(), atol=1e-5)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    rate=st.floats(0.05, 0.9),
    half=st.integers(8, 20),
    seed=st.integers(0, 100),
    kind=st.sampled_from(["bernoulli", "gaussian"]),
)
def test_masks_average_to_one_in_each_feature(rate: float, half: int, seed: int, kind: str) -> None:
    s = 2 * half
    noise = fitted(rate=rate, samples=s, seed=seed, kind=kind).tensors["noise"]
    np.testing.assert_allclose(noise.mean(0), 0.0, atol=1e-13)
    square = (noise**2).mean(0)
    if kind == "gaussian":
        np.testing.assert_allclose(square, rate / (1 - rate), rtol=1e-12)
        return
    dropped = (noise == -1.0).sum(0)  # pS rounded up or down
    assert np.abs(dropped - rate * s).max() < 1.0 + 1e-9
    np.testing.assert_allclose(square, dropped / (s - dropped), atol=1e-13)
    for j in range(D):  # two values: dropped, and kept by the share that keeps it
        kept = noise[noise[:, j] != -1.0, j]
        np.testing.assert_allclose(1.0 + kept, s / (s - dropped[j]), rtol=1e-12)


def test_a_bernoulli_mask_alone_is_an_ordinary_one() -> None:
    """Each entry is dropped with probability p, whatever the other features do."""
    p = 0.17
    alone = np.asarray(
        [fitted(rate=p, samples=4, seed=i).tensors["noise"][1] == -1.0 for i in range(500)]
    )
    n = alone.size
    assert abs(alone.mean() - p) < 4 * np.sqrt(p * (1 - p) / n)
    pairs = np.cov(alone.astype(float).T)[np.triu_indices(D, 1)]
    assert abs(pairs.mean()) < 4 * pairs.std() / np.sqrt(len(pairs))
    assert abs(pairs.std() * np.sqrt(len(alone)) / (p * (1 - p)) - 1) < 0.1


@KINDS
def test_the_variance_is_that_of_the_draws(kind: str) -> None:
    """p S is whole, so that one seed's draws lack only the products of different features, whose
    mean over seeds is zero."""
    some = rows(4)
    seeds, s, p = 100, 16, 0.25
    total = np.zeros((seeds, 4, C))
    for seed in range(seeds):
        found = spread(fitted(rate=p, kind=kind, samples=s, seed=seed), some)
        assert found.draws is not None and found.shift is None
        np.testing.assert_allclose(found.draws.mean(1), 0.0, atol=1e-12)
        total[seed] = (found.draws**2).mean(1)
    assert found.class_variance is not None and found.variance is not None
    error = total.std(0) / np.sqrt(seeds)
    assert (np.abs(total.mean(0) - found.class_variance) < 4 * error).all()
    assert some.phi is not None
    w = head().weight - head().weight.mean(0)
    exact = p / (1 - p) * some.phi.astype(np.float64) ** 2 @ w.T**2
    np.testing.assert_allclose(found.class_variance, exact, rtol=1e-5)
    pairs = [
        p / (1 - p) * some.phi.astype(np.float64) ** 2 @ (w[a] - w[b]) ** 2
        for a in range(C)
        for b in range(a)
    ]
    np.testing.assert_allclose(found.variance, np.mean(pairs, 0), rtol=1e-5)


def test_many_masks_have_the_moments_of_ordinary_dropout() -> None:
    some = rows(3)
    p, state = 0.23, fitted(rate=0.23, samples=4096)
    found = spread(state, some)
    assert found.draws is not None and found.class_variance is not None and some.phi is not None
    ordinary = np.random.default_rng(5).random((20_000, D)) >= p
    w = head().weight - head().weight.mean(0)
    for n in range(3):
        away = ((ordinary / (1 - p) - 1) * some.phi[n]) @ w.T
        np.testing.assert_allclose(away.var(0), found.class_variance[n], rtol=0.05)
        np.testing.assert_allclose(found.draws[n].var(0), found.class_variance[n], rtol=0.1)


@KINDS
@pytest.mark.parametrize("rate", [1e-6, 1e-9])
def test_a_rate_near_zero_is_the_frozen_model(kind: str, rate: float) -> None:
    some = rows(20)
    if kind == "bernoulli":
        with pytest.raises(FitError, match="no feature is dropped"):
            fitted(rate=rate)
        return
    found = spread(fitted(rate=rate, kind=kind), some)
    assert found.draws is not None and found.variance is not None
    assert np.abs(found.draws).max() < 40 * np.sqrt(rate)
    assert found.variance.max() < 100 * rate
    p = np.exp(links.log_probs(some.z, found, 1.0, 1.0, "mc"))
    np.testing.assert_allclose(p, links.softmax(some.z), atol=100 * rate)


def distances(state: State, some: Features) -> tuple[float, float]:
    """(total variation, flips) of the served mixture at temperature and strength one."""
    p = np.exp(links.log_probs(some.z, spread(state, some), 1.0, 1.0, "mc"))
    frozen = links.softmax(some.z)
    flips = (p.argmax(1) != some.z.argmax(1)).mean()
    return float(0.5 * np.abs(p - frozen).sum(1).mean()), float(flips)


@KINDS
@pytest.mark.parametrize("epsilon", [0.003, 0.01, 0.05])
@pytest.mark.parametrize("rule", ["both", "variation", "flips"])
def test_the_rule_is_kept_and_nearly_reached(kind: str, epsilon: float, rule: str) -> None:
    some = rows(1000)
    state = fitted(some, kind=kind, epsilon=epsilon, rule=rule)
    said = state.settings
    found = dict(zip(("variation", "flips"), distances(state, some), strict=True))
    np.testing.assert_allclose(
        [found["variation"], found["flips"]], [said["total_variation"], said["flips"]], atol=1e-5
    )
    assert said["uncalibrated"] and said["judges"] == 1000

    def judged(what: dict[str, float]) -> float:
        return max(what.values()) if rule == "both" else what[rule]

    assert judged(found) <= epsilon + 1e-6
    odds = np.exp(0.01) * said["rate"] / (1 - said["rate"])
    more = fitted(some, kind=kind, rate=odds / (1 + odds))
    beyond = dict(zip(("variation", "flips"), distances(more, some), strict=True))
    assert judged(beyond) > epsilon
    if kind == "gaussian" and judged(found) == found["variation"]:  # no steps
        assert judged(found) > 0.98 * epsilon


def test_where_one_dropped_feature_is_too_much_the_model_stays_frozen() -> None:
    some = rows()
    assert some.phi is not None
    far = Features(some.phi + 1000.0, some.z)
    state = fitted(far, epsilon=1e-4)
    assert state.settings["rate"] == 0.0 and state.settings["dropped"] == 0.0
    found = spread(state, far)
    assert found.draws is not None and found.variance is not None
    assert not found.draws.any() and not found.variance.any()
    smooth = fitted(far, epsilon=1e-4, kind="gaussian")  # which has no least step
    assert smooth.settings["rate"] > 0.0
    np.testing.assert_allclose(smooth.settings["total_variation"], 1e-4, rtol=0.05)


def test_a_rule_that_every_rate_meets_ends_at_the_largest() -> None:
    some = rows()
    faint = Features(np.asarray(some.phi) * 1e-3, some.z)
    state = fitted(faint)
    assert state.settings["rate_unlimited"]
    assert state.settings["rate"] == pytest.approx(page.LARGEST)
    few = fitted(faint, samples=2)
    assert few.settings["rate"] == pytest.approx(0.5)
    assert "rate_unlimited" not in fitted().settings


def test_no_label_is_read() -> None:
    some = rows()
    wrong = Features(some.phi, some.z, np.random.default_rng(0).integers(0, C, len(some)))
    a, b = fitted(some), fitted(wrong)
    np.testing.assert_array_equal(a.tensors["noise"], b.tensors["noise"])
    assert a.settings == b.settings


@KINDS
def test_the_seed_decides(kind: str) -> None:
    a, again, b = fitted(kind=kind), fitted(kind=kind), fitted(kind=kind, seed=1)
    np.testing.assert_array_equal(a.tensors["noise"], again.tensors["noise"])
    assert not np.array_equal(a.tensors["noise"], b.tensors["noise"])
    assert a.settings == again.settings


def test_at_most_so_many_rows_judge_and_always_the_same() -> None:
    some = rows(6000)
    a = fitted(some)
    assert a.settings["judges"] == page.ROWS and a.settings["rows"] == 6000
    order = np.random.default_rng(0).permutation(6000)
    mixed = blocks.take(some, order)
    b = registry.fit("head_dropout", head(), "classification", blocks.of(mixed, 700), {})
    assert a.settings["rate"] == pytest.approx(b.settings["rate"], rel=1e-12)
    np.testing.assert_array_equal(a.tensors["noise"], b.tensors["noise"])


@KINDS
@pytest.mark.parametrize("c", [8, 1100])  # one product of all members, or masked features
def test_both_fragments_are_the_definition(kind: str, c: int) -> None:
    some = rows(33, c=c, d=64)
    state = fitted(some, kind=kind, rate=0.2, samples=16)
    assert (16 * c * 64 > page.FUSED) == (c == 1100)
    g = Fragment(17)
    phi, z = g.input("phi", "float32", ["N", 64]), g.input("z", "float32", ["N", c])
    names = page.emit(g, state, phi, z)
    assert names.draws is not None and names.variance is not None
    g.op("Identity", names.draws, out="draws")
    g.op("Identity", names.variance, out="variance")
    g.inputs.pop()  # the outputs are not read
    outputs = {"draws": ("float32", (-1, 16, c)), "variance": ("float32", (-1, 1))}
    session = open_session(standalone(g, outputs))
    draws, variance = session.run(list(outputs), {"phi": some.phi})
    want = spread(state, some)
    assert want.draws is not None and want.variance is not None
    np.testing.assert_allclose(draws, want.draws, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(variance[:, 0], want.variance, rtol=1e-5, atol=1e-5)


@KINDS
def test_the_mean_over_masks_keeps_the_frozen_label(kind: str) -> None:
    some = rows(400)
    own = Head(
        task="classification",
        width=C,
        features=D,
        module=("head_dropout", fitted(some, rate=0.5, kind=kind)),
        strength=1.0,
        predictive="mc",
        q_hat=0.9,
    )
    assert check_head(own, compile_head(own), some.phi, some.z)["epistemic"] <= 1e-5
    session = open_session(compile_head(own))
    (label,) = session.run(["label"], {"phi": some.phi, "z": some.z})
    np.testing.assert_array_equal(label, some.z.argmax(1))


def test_a_frozen_answer_is_what_is_served_by_default() -> None:
    check_options(FitOptions(task="classification", method="head_dropout"))
    check_options(FitOptions(task="classification", method="head_dropout", predictive="mc"))
    check_options(FitOptions(task="regression", method="head_dropout"))
    with pytest.raises(FitError, match="keeps the frozen model's answer"):
        check_options(FitOptions(task="classification", method="head_dropout", prediction="module"))


def test_a_regression_has_the_exact_variance_of_all_masks() -> None:
    some, p = rows(200, c=2, labels=True), 0.3
    state = fitted(some, "regression", rate=p)
    found = spread(state, some)
    assert found.variance is not None and some.phi is not None and some.y is not None
    masks = (np.random.default_rng(3).random((20_000, D)) >= p) / (1 - p)
    for n in range(3):
        members = (masks * some.phi[n]) @ head(2).weight.T
        np.testing.assert_allclose(found.variance[n], members.var(0), rtol=0.05)
    np.testing.assert_allclose(
        state.settings["noise_variance"], ((some.y - some.z) ** 2).mean(0), rtol=1e-12
    )
    assert "noise" not in state.tensors and "samples" not in state.settings


def test_the_rule_of_a_regression_is_total_variation_too() -> None:
    some = rows(200, c=2, labels=True)
    state = fitted(some, "regression", epsilon=0.02)
    variance = spread(state, some).variance
    assert variance is not None
    noise = np.sqrt(state.settings["noise_variance"])
    total = 0.0
    for k in range(2):
        x = np.linspace(-12 * noise[k], 12 * noise[k], 6001)
        wide = norm.pdf(x, scale=np.sqrt(noise[k] ** 2 + variance[:, k, None]))
        gap = np.abs(wide - norm.pdf(x, scale=noise[k])).sum(1) * (x[1] - x[0])
        total += 0.5 * gap.mean() / 2
    assert 0.98 * 0.02 < total < 1.0001 * 0.02


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rate": 0.0}, "greater than 0"),
        ({"rate": 1.0}, "less than 1"),
        ({"rate": "often"}, "valid number"),
        ({"samples": 7}, "multiple of 2"),
        ({"samples": 0}, "greater than or equal to 2"),
        ({"epsilon": 0}, "greater than"),
        ({"kind": "uniform"}, "bernoulli"),
        ({"rule": "nll"}, "variation"),
        ({"rate": 0.2, "epsilon": 0.01}, "the rate is given"),
        ({"rate": 0.2, "rule": "flips"}, "the rate is given"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"masks": 3}, "no setting 'masks'"),
    ],
)
def test_bad_settings_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(FitError, match=message):
        fitted(**given)


def test_what_rows_and_head_cannot_support_is_an_error() -> None:
    with pytest.raises(FitError, match="in all of the 4 masks"):
        fitted(rate=0.99, samples=4)
    some = rows()
    same = LinearHead(np.ones((C, D)), np.zeros(C))
    with pytest.raises(FitError, match="predicts nothing"):
        registry.fit("head_dropout", same, "classification", blocks.of(some), {})
    values = rows(labels=True)
    flat = LinearHead(np.zeros((C, D)), np.zeros(C))
    with pytest.raises(FitError, match="predicts nothing"):
        registry.fit("head_dropout", flat, "regression", blocks.of(values), {})
    with pytest.raises(FitError, match="leave samples and seed out"):
        fitted(task="regression", samples=8, seed=1)
    with pytest.raises(FitError, match="no classes to flip"):
        fitted(task="regression", rule="flips")
    with pytest.raises(FitError, match="needs labels"):
        fitted(some, "regression")
    with pytest.raises(FitError, match="labels that are not finite"):
        fitted(Features(some.phi, some.z, np.full(some.z.shape, np.nan)), "regression")
    with pytest.raises(FitError, match="without error"):
        fitted(Features(some.phi, some.z, some.z), "regression")
    spoilt = np.asarray(some.phi).copy()
    spoilt[1, 1] = np.nan
    with pytest.raises(FitError, match="not finite"):
        fitted(Features(spoilt, some.z))
