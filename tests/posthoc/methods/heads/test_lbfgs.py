"""Batched L-BFGS against linear solves, scipy, and itself one problem at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize as scipy_minimize

from posthoc.contract import F64, I64, Array
from posthoc.methods.heads import lbfgs
from posthoc.methods.heads.curvature import Kronecker, Plain


def quadratics(seed: int, problems: int, size: int, condition: float) -> tuple[F64, F64]:
    """Positive definite matrices S×P×P and the solutions S×P."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(problems, size, size)))[0]
    bends = np.logspace(0, np.log10(condition), size)
    return basis @ (bends[:, None] * basis.swapaxes(1, 2)), rng.normal(size=(problems, size))


def quadratic(matrices: F64, solutions: F64) -> lbfgs.Objective:
    def objective(x: Array, who: I64) -> tuple[F64, Array]:
        off = x - solutions[who]
        g = np.einsum("spq,sq->sp", matrices[who], off)
        return 0.5 * (g * off).sum(1), g

    return objective


@given(
    seed=st.integers(0, 1000),
    problems=st.integers(1, 4),
    size=st.integers(1, 6),
    condition=st.sampled_from([1.0, 30.0, 1e3]),
)
@settings(deadline=None, derandomize=True, max_examples=25)
def test_quadratics_are_solved(seed: int, problems: int, size: int, condition: float) -> None:
    matrices, solutions = quadratics(seed, problems, size, condition)
    found = lbfgs.minimise(
        quadratic(matrices, solutions),
        np.zeros((problems, size)),
        Plain(),
        steps=300,
        tolerance=1e-14,
    )
    assert found.converged.all()
    np.testing.assert_allclose(found.x, solutions, atol=1e-5)


def convex(scales: F64) -> lbfgs.Objective:
    """log cosh of each problem's own stretch of a random map, and a small penalty."""
    a = np.random.default_rng(3).normal(size=(8, 5))
    b = np.random.default_rng(4).normal(size=8)

    def objective(x: Array, who: I64) -> tuple[F64, Array]:
        r = scales[who, None] * (x @ a.T - b)
        value = np.logaddexp(r, -r).sum(1) + 0.05 * (x**2).sum(1)
        return value, (scales[who, None] * np.tanh(r)) @ a + 0.1 * x

    return objective


def test_each_problem_ends_where_scipy_ends() -> None:
    scales = np.asarray([0.1, 1.0, 20.0])
    objective = convex(scales)
    found = lbfgs.minimise(objective, np.zeros((3, 5)), Plain(), steps=200, tolerance=1e-13)
    assert found.converged.all()
    for s in range(3):

        def alone(x: Array, s: int = s) -> tuple[float, Array]:
            value, g = objective(x[None], np.asarray([s]))
            return float(value[0]), g[0]

        best = scipy_minimize(alone, np.zeros(5), jac=True, options={"gtol": 1e-9})
        assert found.value[s] == pytest.approx(best.fun, rel=1e-10)
        np.testing.assert_allclose(found.x[s], best.x, atol=1e-6)


def test_problems_do_not_touch_each_other() -> None:
    scales = np.asarray([0.1, 1.0, 20.0, 3.0])
    objective = convex(scales)
    together = lbfgs.minimise(objective, np.zeros((4, 5)), Plain(), steps=25, tolerance=1e-9)
    assert len(set(together.value)) == 4
    for s in range(4):
        alone = lbfgs.minimise(
            lambda x, who, s=s: objective(x, who + s),
            np.zeros((1, 5)),
            Plain(),
            steps=25,
            tolerance=1e-9,
        )
        np.testing.assert_allclose(alone.x[0], together.x[s], rtol=1e-9, atol=1e-12)


def test_coordinates_change_the_way_and_not_the_end() -> None:
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (3, 2))
    scale = np.logspace(-1.5, 0, 6).reshape(3, 2)
    t = np.kron(left, right) * scale.ravel()
    matrix = np.linalg.inv(t @ t.T)
    solution = rng.normal(size=(1, 6))
    coordinates = Kronecker(left, right, scale)
    x = rng.normal(size=(2, 6))
    np.testing.assert_allclose(coordinates.forward(x), x @ t.T, atol=1e-12)
    np.testing.assert_allclose(coordinates.gradient(x), x @ t, atol=1e-12)
    ends = {}
    for name, how in (("as they are", Plain()), ("where round", coordinates)):
        found = lbfgs.minimise(
            quadratic(matrix[None], solution), np.zeros((1, 6)), how, steps=200, tolerance=1e-16
        )
        np.testing.assert_allclose(found.x, solution, atol=1e-6)
        ends[name] = found.steps
    assert ends["where round"] <= 2 < ends["as they are"]


def test_the_gradient_bounds_the_distance_from_the_minimum() -> None:
    matrices, solutions = quadratics(0, 1, 4, 1.0)
    objective = quadratic(matrices, solutions)
    found = lbfgs.minimise(objective, np.zeros((1, 4)), Plain(), steps=0, tolerance=1e-9)
    assert found.steps == 0 and not found.converged.any()
    assert 0.5 * found.gradient[0] ** 2 == pytest.approx(found.value[0])


def test_a_start_at_the_minimum_stays() -> None:
    matrices, solutions = quadratics(1, 2, 3, 10.0)
    found = lbfgs.minimise(
        quadratic(matrices, solutions), solutions, Plain(), steps=9, tolerance=0.0
    )
    assert found.steps == 0 and found.converged.all()
    np.testing.assert_array_equal(found.x, solutions)


def test_float32_ends_where_its_sums_end() -> None:
    matrices, solutions = quadratics(2, 2, 6, 100.0)
    objective = quadratic(matrices, solutions)

    def narrow(x: Array, who: I64) -> tuple[F64, Array]:
        value, g = objective(x.astype(np.float64), who)
        return (value + 1e4).astype(np.float32).astype(np.float64), g.astype(np.float32)

    found = lbfgs.minimise(
        narrow, np.zeros((2, 6), np.float32), Plain(), steps=100, tolerance=1e-10
    )
    assert found.x.dtype == np.float32
    assert found.converged.all()  # though no gain is seen in a value of 10,000
    np.testing.assert_allclose(found.x, solutions, atol=1e-4)


def test_long_products_are_summed_in_float64() -> None:
    rng = np.random.default_rng(0)
    a = rng.random((2, 3 * lbfgs.RUN + 5)).astype(np.float32)
    b = rng.random(a.shape).astype(np.float32)
    want = (a.astype(np.float64) * b).sum(1)
    np.testing.assert_allclose(lbfgs.dot(a, b), want, rtol=1e-6)
    np.testing.assert_allclose(lbfgs.dot(a[:, :3], b[:, :3]), (a * b)[:, :3].sum(1), rtol=1e-6)
