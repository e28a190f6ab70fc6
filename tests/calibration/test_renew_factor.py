"""A factor after the probabilities is the bundle itself with other numbers, or is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import t as student

from calibration.compile import check_head, compile_head
from calibration.families import Family
from calibration.fit_thresholds import run_head
from calibration.head import Head, reference
from calibration.renew.factor import (
    SURE,
    check_scaling,
    of_classes,
    of_values,
    scaled,
    tempered_probs,
)
from posthoc.contract import Features, FitError, State
from posthoc.folds import log_softmax
from tests.calibration.heads import fitted

FACTORS = (0.4, 1.7, 5.0)
LINKS: list[tuple[str, dict[str, Any]]] = [
    ("T", {"method": "none"}),
    ("T", {"method": "none", "scaling": "none"}),
    ("T", {"predictive": "probit"}),
    ("T", {"predictive": "probit_class"}),
    ("svs", {"predictive": "mc"}),
    ("svs", {"predictive": "bridge"}),
    ("T", {"method": "laplace_full"}),
    ("T", {"method": "loss"}),
    ("svs", {"method": "bootstrap", "prediction": "module"}),
    ("svs", {"method": "gaussian", "prediction": "module"}),
    ("svs", {"method": "vbll_generative", "prediction": "module"}),
    ("svs", {"method": "nptl", "prediction": "module"}),
]


def bare(head: Head) -> Head:
    return head.with_(ood=None, abstains=False)


def agrees(head: Head, new: Head, rows: Features, t: float) -> None:
    """The new head serves softmax(log p / t) of the old one, in float64 and as a graph, and says
    the same label."""
    old, now = (reference(h, rows.phi, rows.z) for h in (head, new))
    want = np.exp(log_softmax(np.log(old["probs"]) / t))
    np.testing.assert_allclose(now["probs"], want, atol=1e-9)
    np.testing.assert_array_equal(now["label"], old["label"])
    picked = want[np.arange(len(want)), old["label"]]
    np.testing.assert_allclose(now["confidence"], picked, atol=1e-9)
    few = slice(0, 100)
    phi = None if rows.phi is None else rows.phi[few]
    check_head(new, compile_head(new), phi, rows.z[few])  # float32 within 1e-5


@pytest.mark.parametrize(("how", "options"), LINKS)
def test_every_link(how: str, options: dict[str, Any]) -> None:
    done, _, test = fitted(ood="none", **options)
    head = bare(done.head)
    if head.module is not None:
        head = head.with_(strength=0.3)  # whatever the fit made of it
    for t in FACTORS:
        new = scaled(head, t, test)
        agrees(head, new, test, t)
        assert (new.family is None) == (how == "T")
        assert (new.strength, new.module) == (head.strength, head.module)
        expected = head.temperature * t if how == "T" else head.temperature
        assert new.temperature == pytest.approx(expected)
        if new.family is not None:
            assert (
                np.ptp(new.family.tensors["weight"]) == 0 and not new.family.tensors["bias"].any()
            )


@pytest.mark.parametrize("family", ["svs", "sms"])
def test_vector_and_matrix_scaling(family: Any) -> None:
    done, _, test = fitted(ood="none", scaling=family)
    for t in FACTORS:
        new = scaled(bare(done.head), t, test)
        agrees(bare(done.head), new, test, t)
        assert new.family is not None and new.family.name == family
        assert new.temperature == done.head.temperature


@pytest.mark.parametrize("family", ["beta", "isotonic"])
def test_families_of_two_classes(family: Any) -> None:
    done, _, test = fitted(width=2, ood="none", scaling=family)
    wide = Features(test.phi, np.concatenate([test.z[:300], test.z[300:] * 8]))  # beyond the knots
    head = bare(done.head)
    once = scaled(head, 1.7, wide)
    agrees(head, once, wide, 1.7)
    agrees(once, scaled(once, 0.5, wide), wide, 0.5)
    assert once.family is not None and once.family.name == family


def test_a_decomposition_is_that_of_the_new_head() -> None:
    """T t in place of T, the same draws: entropy still is what its parts sum to under mc."""
    done, _, test = fitted(ood="none", predictive="mc")
    new = scaled(bare(done.head).with_(strength=0.3), 1.7, test)
    out = run_head(new, test)
    assert (out["epistemic"] >= 0).all() and out["epistemic"].max() > 0.01
    probit, _, _ = fitted(ood="none")
    moved = scaled(bare(probit.head).with_(strength=0.3), 1.7, test)
    direct = bare(probit.head).with_(strength=0.3, temperature=probit.head.temperature * 1.7)
    np.testing.assert_array_equal(
        run_head(moved, test)["aleatoric"], run_head(direct, test)["aleatoric"]
    )


def test_ets_is_refused() -> None:
    done, _, test = fitted(ood="none", method="none", scaling="ets")
    with pytest.raises(FitError, match="the scaling is ets"):
        scaled(done.head, 1.2, test)
    assert scaled(done.head, 1.0, test) is done.head
    check_scaling(done.head.with_(family=Family("svs", {})))


@pytest.mark.parametrize("method", ["none", "laplace", "laplace_diag", "icla", "bayescap"])
def test_standard_deviations_of_every_module(method: str) -> None:
    done, _, test = fitted("regression", 2, ood="none", method=method)
    head = bare(done.head)
    if head.module is not None:
        head = head.with_(strength=0.7)
    new = scaled(head, 1.7, test)
    old, now = (reference(h, test.phi, test.z) for h in (head, new))
    np.testing.assert_allclose(now["std"], 1.7 * old["std"], rtol=1e-12)
    np.testing.assert_array_equal(now["mean"], old["mean"])
    for part in ("aleatoric_std", "epistemic_std"):
        if part in old:
            np.testing.assert_allclose(now[part], 1.7 * old[part], rtol=1e-12)


# The factor itself


@pytest.mark.parametrize("seed", range(5))
def test_the_temperature_is_the_likeliest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(800, 4)) * 3
    p = np.exp(log_softmax(z)).astype(np.float32)
    y = (z / 1.6 + rng.gumbel(size=z.shape)).argmax(1)
    found = of_classes(p, y)

    def nll(log_t: float) -> float:
        return -float(
            log_softmax(np.log(p.astype(float)) / math.exp(log_t))[np.arange(800), y].mean()
        )

    best = minimize_scalar(nll, bounds=(-3, 3), method="bounded", options={"xatol": 1e-9})
    assert found.found == pytest.approx(math.exp(best.x), rel=1e-3)
    assert found.gain == pytest.approx(nll(0.0) - best.fun, abs=1e-5)
    assert found.taken and found.value == found.found


@pytest.mark.parametrize("df", [math.inf, 5.0])
def test_the_factor_of_deviations_is_the_likeliest(df: float) -> None:
    rng = np.random.default_rng(1)
    mean, std = rng.normal(size=(900, 2)), rng.uniform(0.5, 2, size=(900, 2))
    unit = math.sqrt((df - 2) / df) if math.isfinite(df) else 1.0
    noise = rng.normal(size=mean.shape) if math.isinf(df) else rng.standard_t(df, mean.shape) * unit
    y = mean + 1.8 * std * noise
    done, _, _ = fitted("regression", 2, ood="none", method="none")
    head = done.head
    if math.isfinite(df):
        head = head.with_(module=("student_t", State({}, {"df": df})))
    found = of_values(head, y, mean, std)

    def nll(f: float) -> float:
        r, scale = (y - mean) / std, f * unit
        if math.isinf(df):
            return float((0.5 * (r / f) ** 2 + math.log(f)).mean())
        return float((math.log(scale) - student.logpdf(r / scale, df)).mean())

    best = minimize_scalar(nll, bounds=(0.2, 6), method="bounded", options={"xatol": 1e-9})
    assert found.found == pytest.approx(float(best.x), rel=5e-3)
    assert found.gain == pytest.approx(2 * (nll(1.0) - best.fun), abs=1e-4)
    assert found.taken


def test_luck_alone_is_seldom_taken_for_a_gain() -> None:
    """The likelihood ratio at 95 %: of 400 samples that need no factor about 20 take one."""
    rng = np.random.default_rng(0)
    taken = 0
    for _ in range(400):
        z = rng.normal(size=(300, 3)) * 1.5
        y = (z + rng.gumbel(size=z.shape)).argmax(1)
        found = of_classes(np.exp(log_softmax(z)), y)
        taken += found.taken
        assert found.taken == (300 * found.gain > SURE)
        assert found.value == (found.found if found.taken else 1.0)
    assert 7 <= taken <= 36  # the central 99.9 % of Binomial(400, .05)


def test_probabilities_that_float32_has_as_zero() -> None:
    p = np.asarray([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], np.float32)
    made = tempered_probs(p, 3.0)
    assert np.isfinite(made).all() and (made > 0).all()
    np.testing.assert_allclose(made.sum(1), 1, atol=1e-6)
    found = of_classes(np.repeat(p, 50, 0), np.repeat([0, 2], 50))
    assert math.isfinite(found.found) and found.found > 1


def test_one_class_has_no_temperature() -> None:
    with pytest.raises(FitError, match="at least two classes"):
        of_classes(np.full((9, 2), 0.5), np.zeros(9, np.int64))
