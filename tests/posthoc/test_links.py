"""Each way from a spread to probabilities against its definition, written as a slow loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posthoc import links
from posthoc.contract import FitError
from posthoc.graph import Fragment, standalone
from posthoc.link_graph import emit_decomposition, emit_draws, emit_probs
from posthoc.links import Spread, SpreadNames
from posthoc.runtime import open_session

N, C, R, S = 7, 4, 3, 6
T, STRENGTH = 1.4, 0.6


def material(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(R, C))
    return {
        "z": rng.normal(size=(N, C)) * 3,
        "amplitude": rng.gamma(2.0, 1.0, (N, R)),
        "directions": directions - directions.mean(1, keepdims=True),
        "shift": rng.normal(size=(N, C)),
        "members": rng.normal(size=(N, S, C)),
        "eps": links.normal_draws(R, seed, S),
    }


def gaussian(m: dict[str, np.ndarray], shift: bool = False) -> Spread:
    g = m["amplitude"] ** 2
    return Spread(
        g @ links.per_difference(m["directions"]),
        m["amplitude"],
        m["directions"],
        shift=m["shift"] if shift else None,
    )


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def covariance(m: dict[str, np.ndarray], i: int) -> np.ndarray:
    root = m["amplitude"][i][:, None] * m["directions"]
    return root.T @ root


@pytest.mark.parametrize("shift", [False, True])
def test_probit_by_its_definition(shift: bool) -> None:
    m = material()
    got = links.log_probs(m["z"], gaussian(m, shift), T, STRENGTH)
    for i in range(N):
        cov = covariance(m, i)
        pairs = [
            cov[a, a] + cov[b, b] - 2 * cov[a, b] for a in range(C) for b in range(C) if a != b
        ]
        centre = m["z"][i] / T + (math.sqrt(STRENGTH) * m["shift"][i] if shift else 0.0)
        want = softmax(centre / math.sqrt(1 + math.pi / 8 * STRENGTH * np.mean(pairs)))
        np.testing.assert_allclose(np.exp(got[i]), want, rtol=1e-12)


def test_probit_with_a_variance_for_each_class() -> None:
    m = material()
    got = links.log_probs(m["z"], gaussian(m), T, STRENGTH, "probit_class")
    for i in range(N):
        z = (m["z"][i] - m["z"][i].mean()) / T
        want = softmax(z / np.sqrt(1 + math.pi / 8 * STRENGTH * np.diag(covariance(m, i))))
        np.testing.assert_allclose(np.exp(got[i]), want, rtol=1e-12)


def test_draws_are_averaged() -> None:
    m = material()
    got = np.exp(links.log_probs(m["z"], gaussian(m, True), T, STRENGTH, "mc", m["eps"]))
    for i in range(N):
        moved = [m["shift"][i] + (m["amplitude"][i] * e) @ m["directions"] for e in m["eps"]]
        want = np.mean([softmax(m["z"][i] / T + math.sqrt(STRENGTH) * d) for d in moved], axis=0)
        np.testing.assert_allclose(got[i], want, rtol=1e-12)


def test_many_draws_tend_to_the_integral() -> None:
    m = material()
    eps = links.normal_draws(R, 1, 200_000)
    got = np.exp(links.log_probs(m["z"][:1], cut(gaussian(m), 1), T, STRENGTH, "mc", eps))
    rng = np.random.default_rng(5)
    z = rng.multivariate_normal(m["z"][0] / T, STRENGTH * covariance(m, 0), 200_000)
    p = np.exp(z - z.max(1, keepdims=True))
    want = (p / p.sum(1, keepdims=True)).mean(0)
    np.testing.assert_allclose(got[0], want, atol=3e-3)


def test_a_mixture_is_the_mean_of_its_members() -> None:
    m = material()
    got = np.exp(links.log_probs(m["z"], Spread(None, draws=m["members"]), T, STRENGTH))
    for i in range(N):
        members = m["z"][i] / T + math.sqrt(STRENGTH) * m["members"][i]
        np.testing.assert_allclose(got[i], np.mean([softmax(z) for z in members], 0), rtol=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_bridge_by_its_definition(classes: int) -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(N, classes))
    directions = rng.normal(size=(R, classes))
    directions -= directions.mean(1, keepdims=True)
    amplitude = rng.gamma(2.0, 1.0, (N, R))
    spread = Spread(np.ones(N), amplitude, directions)
    got = np.exp(links.log_probs(z, spread, T, STRENGTH, "bridge"))
    for i in range(N):
        root = amplitude[i][:, None] * directions
        v = np.diag(root.T @ root)
        mu = (z[i] - z[i].mean()) / T
        alpha = (1 - 2 / classes + np.exp(mu) / classes**2 * np.exp(-mu).sum()) / v
        np.testing.assert_allclose(got[i], alpha / alpha.sum(), rtol=1e-10)


@pytest.mark.parametrize("predictive", ["probit", "probit_class", "mc", "bridge"])
def test_strength_zero_is_temperature_scaling(predictive: Any) -> None:
    m = material()
    for spread in (gaussian(m, True), Spread(None, draws=m["members"]), None):
        got = links.log_probs(m["z"], spread, T, 0.0, predictive, m["eps"])
        for i in range(N):
            np.testing.assert_allclose(np.exp(got[i]), softmax(m["z"][i] / T), rtol=1e-12)


def test_the_far_end_of_the_way_is_the_modules_own_head() -> None:
    """s = (1 / T)²: the members' logits themselves, at the same temperature."""
    m = material()
    spread = Spread(None, draws=m["members"] - m["z"][:, None, :])
    got = np.exp(links.log_probs(m["z"], spread, T, (1 / T) ** 2))
    for i in range(N):
        want = np.mean([softmax(z / T) for z in m["members"][i]], 0)
        np.testing.assert_allclose(got[i], want, rtol=1e-10)


def test_equal_amplitudes_may_be_one_column() -> None:
    m = material()
    one = Spread(np.ones(N), m["amplitude"][:, :1], m["directions"])
    same = np.repeat(m["amplitude"][:, :1], R, axis=1)
    all_of_them = Spread(np.ones(N), same, m["directions"])
    np.testing.assert_allclose(links.class_variance(one), links.class_variance(all_of_them))
    np.testing.assert_allclose(
        links.deviations(one, m["eps"]), links.deviations(all_of_them, m["eps"])
    )


def test_no_variance_of_single_classes_is_an_error() -> None:
    with pytest.raises(FitError, match="probit link"):
        links.class_variance(Spread(np.ones(3)))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    scale=st.floats(0.01, 30),
    strength=st.floats(0, 5),
    kind=st.sampled_from(["probit", "probit_class", "mc", "bridge", "mixture", "shifted"]),
)
def test_the_graph_gives_the_same(seed: int, scale: float, strength: float, kind: str) -> None:
    m = material(seed)
    z = (m["z"] * scale).astype(np.float32)
    spread = (
        Spread(None, draws=m["members"])
        if kind == "mixture"
        else gaussian(m, shift=kind == "shifted")
    )
    predictive: Any = kind if kind in ("probit", "probit_class", "mc", "bridge") else "probit"
    g = Fragment()
    feeds: dict[str, np.ndarray] = {"z": z}
    named: dict[str, str] = {}
    for key in ("variance", "amplitude", "draws", "shift"):
        value = getattr(spread, key)
        if value is not None:
            value = value[:, None] if value.ndim == 1 else value
            named[key] = g.input(key, "float32", ["N", *value.shape[1:]])
            feeds[key] = value.astype(np.float32)
    named.setdefault("variance", None)  # type: ignore[arg-type]
    names = SpreadNames(directions=spread.directions, **named)
    name = g.input("z", "float32", ["N", C])
    drawn = emit_draws(g, name, names, m["eps"], T, strength)
    log_p, p = emit_probs(g, name, names, T, strength, predictive, drawn, C)
    g.op("Identity", p, out="p")
    g.op("Identity", log_p, out="log_p")
    used = {i for node in g.nodes for i in node.input}
    g.inputs[:] = [i for i in g.inputs if i.name in used]
    session = open_session(
        standalone(g, {"p": ("float32", (-1, C)), "log_p": ("float32", (-1, C))})
    )
    got = session.run(["p"], {i.name: feeds[i.name] for i in session.get_inputs()})[0]
    want = np.exp(links.log_probs(z, spread, T, strength, predictive, m["eps"]))
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1.0])
@pytest.mark.parametrize(("draws", "classes"), [(16, 10), (64, 1000)])
def test_the_graph_decomposes_as_float64_does(spread: float, draws: int, classes: int) -> None:
    """Of rows that nothing is known of, too: all terms of their sums are alike."""
    rng = np.random.default_rng(0)
    z = (spread * rng.standard_normal((3, draws, classes))).astype(np.float32)
    g = Fragment()
    log_p = g.op("LogSoftmax", g.input("z", "float32", ["N", draws, classes]), axis=-1)
    found = emit_decomposition(g, (log_p, g.op("Exp", log_p)))
    session = open_session(standalone(g, dict.fromkeys(found, ("float32", (-1,)))))
    exact = z.astype(np.float64)
    want = links.decompose_drawn(exact - np.log(np.exp(exact).sum(-1, keepdims=True)))
    for got, expected in zip(session.run(list(found), {"z": z}), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=4e-6)


def test_spreads_of_blocks_join() -> None:
    m = material()
    whole = gaussian(m, True)
    parts = [cut(whole, slice(0, 3)), cut(whole, slice(3, None))]
    got = links.join(parts)
    for key in ("variance", "amplitude", "shift", "directions"):
        np.testing.assert_array_equal(getattr(got, key), getattr(whole, key))
    assert got.draws is None


def cut(spread: Spread, index: int | slice) -> Spread:
    index = slice(0, index) if isinstance(index, int) else index
    fields = {
        k: None if (v := getattr(spread, k)) is None else v[index]
        for k in ("variance", "amplitude", "draws", "class_variance", "shift")
    }
    return Spread(directions=spread.directions, **fields)
