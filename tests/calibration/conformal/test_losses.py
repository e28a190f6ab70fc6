"""Risk control of tables of losses: definitions in fractions and loops, promises by simulation."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import betainc
from scipy.stats import binom

from calibration.conformal.losses import conformal_risk_control, learn_then_test
from calibration.conformal.risk import control_risk, hoeffding_bentkus, image_losses
from calibration.threshold import neyman_pearson_rows
from posthoc.contract import DataError

modest = settings(deadline=None, derandomize=True, max_examples=150)
ALPHAS = ("0.05", "0.1", "0.2", "0.25", "0.3", "0.5")
EIGHTHS = 8


@st.composite
def tables(draw: Any, falling: bool = True, binary: bool = False) -> np.ndarray:
    """Losses in eighths, items × settings."""
    n, width = draw(st.integers(1, 40)), draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    top = 1 if binary else EIGHTHS
    x = rng.binomial(top, draw(st.sampled_from([0.02, 0.1, 0.4])), (n, width)) / top
    return -np.sort(-x, axis=1) if falling else x


# Conformal risk control


@modest
@given(tables(falling=False), st.sampled_from(ALPHAS), st.sampled_from([1, 2]), st.booleans())
def test_the_first_setting_that_keeps_the_inequality(
    x: np.ndarray, alpha: str, bound: int, monotonise: bool
) -> None:
    if not monotonise:
        x = -np.sort(-x, axis=1)
    n, width = x.shape
    want = None
    for j in reversed(range(width)):
        counted = [max(Fraction(v) for v in row[j:]) for row in x]  # of a falling row: its own
        mean = bound * sum(counted, Fraction(0)) / n
        if Fraction(n, n + 1) * mean + Fraction(bound, n + 1) > bound * Fraction(alpha):
            break
        want = j
    found = conformal_risk_control(
        x * bound, float(alpha) * bound, bound=bound, monotonise=monotonise
    )
    assert found.chosen == want
    assert found.admissible == (() if want is None else tuple(range(want, width)))
    assert found.n_needed == math.ceil(1 / Fraction(alpha) - 1)
    np.testing.assert_allclose(found.risks, bound * x.mean(0))


@modest
@given(st.integers(1, 80), st.sampled_from(ALPHAS), st.integers(0, 1000))
def test_pixels_and_tables_are_one_thing(n: int, alpha: str, seed: int) -> None:
    """The threshold of `risk.control_risk` is the first admissible one of the grid of scores."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 9, (n, 4)).astype(np.float32)
    grid = np.unique(scores)
    x = np.stack([image_losses(scores, t) for t in grid], axis=1)
    (pixels,) = control_risk(scores, [float(alpha)])
    found = conformal_risk_control(x, float(alpha))
    assert pixels.threshold == (math.inf if found.chosen is None else grid[found.chosen])
    if found.chosen is not None:
        assert found.risk == pytest.approx(pixels.risk)
    (sure,) = control_risk(scores, [float(alpha)], delta=0.1)
    tested = learn_then_test(x, float(alpha), 0.1, order="falling", binary=False)
    assert sure.threshold == (math.inf if tested.chosen is None else grid[tested.chosen])


def test_the_mean_loss_of_a_new_item_is_at_most_the_level_and_hardly_less() -> None:
    """Misses of 1 - u at threshold u: the risk is known, the level is kept to 2/(n+1)."""
    n, alpha, grid = 50, 0.1, np.linspace(0, 1, 401)
    rng = np.random.default_rng(0)
    risks = []
    for _ in range(500):
        found = conformal_risk_control(rng.uniform(size=(n, 1)) > grid, alpha)
        assert found.chosen is not None
        risks.append(1 - grid[found.chosen])
    error = np.std(risks) / math.sqrt(500)
    assert alpha - 2 / (n + 1) - 3 * error <= np.mean(risks) <= alpha + 3 * error
    assert np.mean(np.asarray(risks) > alpha) > 0.3  # it controls the mean and no more


def bumps(rng: np.random.Generator, n: int, width: int = 41) -> tuple[np.ndarray, np.ndarray]:
    """Losses that fall, then rise: misses above λ and half the false finds below; their risks."""
    grid = np.linspace(0, 1, width)
    misses = rng.beta(2, 5, (n, 1)) > grid
    finds = rng.beta(5, 2, (n, 1)) <= grid
    return misses / 2 + finds / 2, (1 - betainc(2, 5, grid)) / 2 + betainc(5, 2, grid) / 2


def test_monotonised_losses_keep_the_promise_for_losses_as_they_are() -> None:
    rng = np.random.default_rng(0)
    level, risks = 0.55, []
    for _ in range(300):
        x, risk = bumps(rng, 60)
        x = x[:, :20]  # rising beyond would never come back under the level
        found = conformal_risk_control(x, level, monotonise=True)
        assert found.monotonised
        risks.append(0.0 if found.chosen is None else risk[found.chosen])
    assert np.mean(risks) <= level + 3 * np.std(risks) / math.sqrt(300)


# Learn then test


@modest
@given(
    st.booleans().flatmap(lambda b: tables(falling=False, binary=b)),
    st.sampled_from(ALPHAS),
    st.sampled_from([0.05, 0.3]),
    st.booleans(),
)
def test_p_values_and_the_step_down_are_their_definitions(
    x: np.ndarray, alpha: str, delta: float, binary: bool
) -> None:
    binary = binary and bool(np.isin(x, (0, 1)).all())
    n, width = x.shape
    found = learn_then_test(x, float(alpha), delta, binary=binary)
    want = []
    for j in range(width):
        if binary:
            p, k = Fraction(alpha), int(x[:, j].sum())
            tail = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))
            want.append(float(tail))
        else:
            want.append(hoeffding_bentkus(float(x[:, j].mean()), n, float(alpha)))
    assert found.pvalues is not None
    np.testing.assert_allclose(found.pvalues, want, rtol=1e-9)
    passed: set[int] = set()
    for rest in range(width, 0, -1):
        left = [j for j in range(width) if j not in passed]
        best = min(left, key=lambda j: found.pvalues[j])
        if found.pvalues[best] > delta / rest:
            break
        passed.add(best)
    assert found.admissible == tuple(sorted(passed))
    plain = {j for j in range(width) if found.pvalues[j] <= delta / width}
    assert plain <= passed  # Holm's form admits all that Bonferroni's does
    assert found.n_needed == neyman_pearson_rows(float(alpha), delta / width)


@modest
@given(tables(falling=False), st.sampled_from(ALPHAS), st.integers(0, 1000))
def test_a_fixed_sequence_stops_at_the_first_failure(x: np.ndarray, alpha: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    order = rng.permutation(x.shape[1])[: rng.integers(1, x.shape[1] + 1)]
    found = learn_then_test(x, float(alpha), 0.2, order=order)
    assert found.pvalues is not None
    fails = [found.pvalues[j] > 0.2 for j in order]
    until = fails.index(True) if True in fails else len(order)
    assert found.admissible == tuple(sorted(order[:until]))
    assert found.order == tuple(order)
    assert found.n_needed == neyman_pearson_rows(float(alpha), 0.2)


@modest
@given(tables(falling=False), st.integers(0, 1000), st.sampled_from(["falling", "auto", None]))
def test_items_may_come_in_any_order_and_losses_in_any_unit(
    x: np.ndarray, seed: int, order: Any
) -> None:
    shuffled = x if order == "auto" else np.random.default_rng(seed).permutation(x)
    if len(x) == 1:
        return
    one = learn_then_test(x, 0.3, 0.2, order=order)
    other = learn_then_test(4 * shuffled, 1.2, 0.2, bound=4, order=order)
    assert one.admissible == other.admissible and one.order == other.order
    np.testing.assert_allclose(one.pvalues or (), other.pvalues or (), rtol=1e-9)


def test_other_rows_give_the_order_and_auto_sets_rows_aside() -> None:
    rng = np.random.default_rng(0)
    x, other = rng.uniform(0, 0.2, (200, 5)), rng.uniform(0, 1, (30, 5))
    found = learn_then_test(x, 0.3, 0.05, order=other)
    assert found.order == tuple(np.argsort(other.mean(0), kind="stable"))
    assert found.n == 200 and found.correction == "fixed sequence"
    auto = learn_then_test(x, 0.3, 0.05, order="auto", seed=1)
    assert auto.n == 150 and sorted(auto.order or ()) == list(range(5))
    aside = np.random.default_rng(1).permutation(200) < 50
    assert auto.risks == pytest.approx(x[~aside].mean(0))
    assert auto.order == tuple(np.argsort(x[aside].mean(0)))
    assert auto == learn_then_test(x, 0.3, 0.05, order="auto", seed=1)


@pytest.mark.parametrize("order", [None, "auto", "falling"])
def test_the_confident_promise_fails_in_few_calibrations(order: Any) -> None:
    """The costliest choice for the promise: of all that is admissible, what is truly worst."""
    level, delta, exceeded, answered = 0.45, 0.2, 0, 0
    rng = np.random.default_rng(0)
    for _ in range(300):
        x, risk = bumps(rng, 200)
        found = learn_then_test(x, level, delta, order=order, cost=-risk)
        answered += found.chosen is not None
        exceeded += found.chosen is not None and risk[found.chosen] > level
        if found.chosen is not None:
            assert risk[found.chosen] == max(risk[list(found.admissible)])
    assert exceeded <= binom.ppf(0.999, 300, delta)
    assert answered > 270 or order == "falling"  # its first setting is the worst of all


def test_binary_by_nature_is_tested_exactly() -> None:
    """Five losses of a hundred pass the exact test at .06; Hoeffding-Bentkus is wider."""
    x = np.zeros((100, 2), bool)
    x[:5, 0] = True
    exact = learn_then_test(x, 0.1, 0.06, order=[1, 0])
    assert exact.test == "exact binomial" and exact.admissible == (0, 1)
    assert exact.pvalues == pytest.approx(binom.cdf([5, 0], 100, 0.1))
    assert learn_then_test(x.astype(int), 0.1, 0.06, order=[1, 0]).pvalues == exact.pvalues
    # What merely happens to be whole is not binary: the choice of test may not follow the data.
    wide = learn_then_test(x.astype(float), 0.1, 0.06, order=[1, 0])
    assert wide.test == "Hoeffding-Bentkus" and wide.admissible == (1,)
    said = learn_then_test(3.0 * x, 0.3, 0.06, bound=3, order=[1, 0], binary=True)
    assert said.pvalues == pytest.approx(exact.pvalues)
    with pytest.raises(DataError, match=r"item 0: its loss 0\.5 at setting 0 is neither 0 nor 1"):
        learn_then_test(x / 2, 0.1, 0.05, binary=True)


# What is said


def test_the_record_says_what_it_promises() -> None:
    rng = np.random.default_rng(0)
    x = (rng.uniform(size=(400, 1)) > [0.5, 0.95, 0.99, 1]).astype(float)
    names = ["half", "more", "most", "all"]
    crc = conformal_risk_control(x, 0.1, settings=names)
    assert (crc.setting, crc.n, crc.delta, crc.pvalues) == ("more", 400, None, None)
    for text in ("setting more", "at most 0.1", "400 such items", "in the mean over draws"):
        assert text in crc.promise
    ltt = learn_then_test(x, 0.1, 0.05, settings=names, order="falling")
    assert ltt.setting == "more" and ltt.risk == x.mean(0)[1]
    for text in ("probability at least 0.95", "all 3 admissible", "more too", "at most 0.1"):
        assert text in ltt.promise
    assert learn_then_test(x, 0.1, 0.05, cost=[0, 3, 2, 9]).setting == "2"
    assert conformal_risk_control(x, 0.1, cost=[0, 3, 2, 2]).chosen == 3  # of equals the safer
    said = ltt.as_dict()
    assert said["setting"] == "more" and said["promise"] == ltt.promise


def test_nothing_passes_and_it_says_why() -> None:
    few = conformal_risk_control(np.zeros((8, 3)), 0.1)
    assert (few.chosen, few.setting, few.risk, few.n_needed) == (None, None, None, 9)
    assert (
        "Nothing is promised" in few.promise and "at least 9 items and there are 8" in few.promise
    )
    assert conformal_risk_control(np.zeros((9, 3)), 0.1).chosen == 0
    bad = conformal_risk_control(np.ones((50, 2)) * [1.0, 0.4], 0.1, settings=["a", "b"])
    assert bad.chosen is None and "0.4, at b" in bad.promise
    none = learn_then_test(np.full((500, 2), 0.4), 0.3, 0.1, order="falling")
    assert none.admissible == () and "the first of the order, 1, has p-value 1" in none.promise
    late = learn_then_test(np.zeros((58, 1)), 0.05, 0.05)
    assert late.chosen is None and "at least 59 items" in late.promise
    assert learn_then_test(np.zeros((59, 1)), 0.05, 0.05).chosen == 0
    assert learn_then_test(np.zeros((59, 2)), 0.05, 0.05).chosen is None  # two are tested


def test_one_item_and_one_setting() -> None:
    assert conformal_risk_control(np.zeros((1, 1)), 0.5).chosen == 0
    assert conformal_risk_control(np.zeros((1, 1)), 0.49).chosen is None
    assert learn_then_test(np.zeros((1, 1)), 0.9, 0.1).chosen == 0
    assert learn_then_test(np.zeros((1, 1)), 0.89, 0.1).chosen is None
    with pytest.raises(DataError, match="needs at least two"):
        learn_then_test(np.zeros((1, 1)), 0.9, 0.1, order="auto")


# Bad input


def test_losses_that_rise_are_refused_by_name() -> None:
    x = np.tile([0.5, 0.25, 0.0], (6, 1))
    x[4] = [0.5, 0.25, 0.75]
    with pytest.raises(DataError, match=r"item 4: its loss rises from 0\.25 at setting b to 0\.75"):
        conformal_risk_control(x, 0.3, settings=["a", "b", "c"])
    with pytest.raises(DataError, match="learn-then-test"):
        conformal_risk_control(x, 0.3)
    assert conformal_risk_control(x - 1e-12 * np.arange(3)[::-1], 0.9, monotonise=True).chosen == 0
    x[4] = [0.5, 0.25, 0.25 + 1e-12]  # rounding is no rise
    assert conformal_risk_control(x, 0.4).chosen == 1


either = pytest.mark.parametrize(
    "call", [conformal_risk_control, lambda *a, **k: learn_then_test(*a, 0.1, **k)]
)


@either
@pytest.mark.parametrize(
    ("value", "said"), [(math.nan, "nan"), (math.inf, "inf"), (-0.1, "-0.1"), (1.5, "1.5")]
)
def test_a_loss_outside_its_bounds_is_named(call: Any, value: float, said: str) -> None:
    x = np.zeros((20, 3))
    x[7, 1] = value
    with pytest.raises(
        DataError, match=rf"item 7: its loss {said} at setting 1 is not in \[0, 1\]"
    ):
        call(x, 0.2)


@either
def test_levels_bounds_and_shapes(call: Any) -> None:
    x = np.zeros((20, 3))
    for level in (0.0, 1.0, -1.0, 2.0, math.nan):
        with pytest.raises(DataError, match="level must lie strictly between 0 and the bound 1"):
            call(x, level)
    for bound in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(DataError, match="bound"):
            call(x, 0.1, bound=bound)
    for shape in ((0, 3), (20, 0)):
        with pytest.raises(DataError, match="no losses"):
            call(np.zeros(shape), 0.1)
    for bad in (x[0], x[None], x.astype(str), x.astype(object)):
        with pytest.raises(DataError, match="items × settings"):
            call(bad, 0.1)
    with pytest.raises(DataError, match="2 names for 3 settings"):
        call(x, 0.1, settings=["a", "b"])
    for cost in ([1.0], [1.0, 2.0, math.nan]):
        with pytest.raises(DataError, match="cost is a number for each of 3 settings"):
            call(x, 0.1, cost=cost)


def test_deltas_and_orders() -> None:
    x = np.zeros((50, 3))
    for delta in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(DataError, match="delta must lie strictly between"):
            learn_then_test(x, 0.1, delta)
    for order in ([], [0, 0], [3], [-1], [0.5], "rising", np.zeros((1, 1, 1))):
        with pytest.raises(DataError, match="order"):
            learn_then_test(x, 0.1, 0.1, order=order)
    with pytest.raises(DataError, match="2 settings where there are 3"):
        learn_then_test(x, 0.1, 0.1, order=np.zeros((5, 2)))
    with pytest.raises(DataError, match=r"item 0: its loss 7"):
        learn_then_test(x, 0.1, 0.1, order=np.full((5, 3), 7.0))
