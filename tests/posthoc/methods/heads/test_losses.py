"""Losses, their gradients, the blocks they run over and the weights they draw."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp, softmax
from scipy.stats import kstest

from posthoc.contract import Features
from posthoc.methods.heads import bootstrap, mixup, nptl
from posthoc.methods.heads.blocks import BLOCK, blocks
from posthoc.methods.heads.losses import Loss, Penalised
from posthoc.methods.heads.weights import PILOT, dirichlet
from posthoc.rows import of
from tests.posthoc.methods.heads.material import C, D, N, classes, first_block, frozen

HEAD = frozen()
ROWS = classes(HEAD)
MEMBERS = 3
MIXED = mixup.Settings(seed=5, mixup_alpha=0.4, mixup_weight=0.7, mixup_share=2.5)
LOSSES: dict[str, Loss] = {
    "bootstrap": bootstrap.weighted(dirichlet(5, N, MEMBERS)),
    "nptl": nptl.weighted(dirichlet(5, N, MEMBERS, 40.0)),
    "mixup": mixup.mixed(MIXED),
}
every = pytest.mark.parametrize("name", LOSSES)


def objective(name: str, size: int = BLOCK, precision: float = 0.3, first: int = 0) -> Penalised:
    return Penalised(of(ROWS, size), (D + 1, C), LOSSES[name], precision, first)


def some_heads(members: int = MEMBERS) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(members, (D + 1) * C))


@every
def test_the_gradient_is_the_slope_of_the_value(name: str) -> None:
    x, who = some_heads(), np.arange(MEMBERS)
    _, gradient = objective(name)(x, who)
    for p in range(x.shape[1]):
        step = np.zeros_like(x)
        step[:, p] = 1e-6
        up, _ = objective(name)(x + step, who)
        down, _ = objective(name)(x - step, who)
        np.testing.assert_allclose((up - down) / 2e-6, gradient[:, p], rtol=1e-5, atol=1e-5)


@every
def test_the_value_is_the_definition(name: str) -> None:
    x = some_heads()
    value, _ = objective(name)(x, np.arange(MEMBERS))
    phi = np.concatenate([ROWS.phi, np.ones((N, 1))], 1)
    for m in range(MEMBERS):
        logits = ROWS.z + phi @ x[m].reshape(D + 1, C)
        log_p = logits - logsumexp(logits, axis=1, keepdims=True)
        want = 0.15 * (x[m] ** 2).sum()
        if name == "mixup":
            want -= log_p[np.arange(N), ROWS.y].sum()
            for i, j, t in mixup.pairs(MIXED, 0, N, m):
                for a, b, share in zip(i, j, t[:, 0], strict=True):
                    mean = share * phi[a] + (1 - share) * phi[b]
                    z = share * ROWS.z[a] + (1 - share) * ROWS.z[b] + mean @ x[m].reshape(D + 1, C)
                    q = z - logsumexp(z)
                    soft = share * q[ROWS.y[a]] + (1 - share) * q[ROWS.y[b]]
                    want -= MIXED.mixup_weight * soft
        else:
            alpha = 40.0 if name == "nptl" else 0.0
            w, v = dirichlet(5, N, MEMBERS, alpha).of(0, N, [m])
            want -= (w[:, 0] * log_p[np.arange(N), ROWS.y]).sum()
            want -= (v * softmax(ROWS.z, 1) * log_p).sum()
        assert value[m] == pytest.approx(want, rel=1e-10)


@every
def test_members_and_blocks_do_not_change_a_member(name: str) -> None:
    x = some_heads()
    value, gradient = objective(name)(x, np.arange(MEMBERS))
    split, slope = objective(name, size=7)(x, np.arange(MEMBERS))
    np.testing.assert_array_equal(split, value)
    np.testing.assert_array_equal(slope, gradient)
    for m in range(MEMBERS):
        alone, its = objective(name, first=1)(x[m : m + 1], np.asarray([m - 1]))
        assert alone[0] == pytest.approx(value[m], rel=1e-12)
        np.testing.assert_allclose(its[0], gradient[m], rtol=1e-9, atol=1e-12)


@every
def test_few_logits_at_a_time_are_as_good(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = some_heads()
    value, gradient = objective(name)(x, np.arange(MEMBERS))
    monkeypatch.setattr("posthoc.methods.heads.losses.WORK", 1)
    again, slope = objective(name)(x, np.arange(MEMBERS))
    np.testing.assert_allclose(again, value, rtol=1e-12)
    np.testing.assert_allclose(slope, gradient, rtol=1e-9, atol=1e-12)


def test_a_sure_row_keeps_its_small_loss_in_float32() -> None:
    logits = np.asarray([[[40.0, 28.0, 20.0]]], np.float32)
    want = logsumexp(logits.astype(np.float64), axis=2) - 40.0
    one = first_block(Features(np.ones((1, D)), np.zeros((1, C)), np.zeros(1, np.int64)))
    value, _ = LOSSES["bootstrap"](one, logits, np.asarray([PILOT]))
    assert value[0] == pytest.approx(want[0, 0], rel=0.02) and want < 1e-5


def test_blocks_are_cut_alike_whatever_comes() -> None:
    rows = classes(HEAD, BLOCK + 100)
    want = list(blocks(of(rows), np.dtype(np.float32)))
    assert [len(b) for b in want] == [BLOCK, 100]
    for size in (1000, BLOCK + 50, 10_000):
        got = list(blocks(of(rows, size), np.dtype(np.float32)))
        for a, b in zip(got, want, strict=True):
            assert a.index == b.index
            np.testing.assert_array_equal(a.phi, b.phi)
            np.testing.assert_array_equal(a.z, b.z)
            np.testing.assert_array_equal(a.y, b.y)
    assert want[0].phi.dtype == np.float32 and (want[0].phi[:, -1] == 1).all()


def test_weights_are_dirichlet() -> None:
    n, members = 50, 400
    w, v = dirichlet(0, n, members).of(0, n, range(members))
    assert v.max() == 0
    np.testing.assert_allclose(w.sum(0), n, rtol=1e-12)
    # One share of Dirichlet(1, ..., 1) is Beta(1, n - 1).
    assert kstest(w[3] / n, "beta", args=(1, n - 1)).pvalue > 0.01
    assert w.var() == pytest.approx((n - 1) / (n + 1), rel=0.05)
    assert abs(np.corrcoef(w[0], w[1])[0, 1] + 1 / (n - 1)) < 0.15


def test_the_base_measure_weighs_alpha_rows() -> None:
    n, members, alpha = 40, 500, 120.0
    w, v = dirichlet(1, n, members, alpha).of(0, n, range(members))
    np.testing.assert_allclose(w.sum(0) + v.sum(0), n + alpha, rtol=1e-12)
    assert v.sum(0).mean() == pytest.approx(alpha, rel=0.02)
    # The mass of the base measure is Beta(alpha, n).
    assert kstest(v.sum(0) / (n + alpha), "beta", args=(alpha, n)).pvalue > 0.01
    pilot = dirichlet(1, n, members, alpha).of(0, n, [PILOT])
    np.testing.assert_allclose(pilot[0], 1.0)
    np.testing.assert_allclose(pilot[1], alpha / n)


def test_weights_belong_to_rows_and_members() -> None:
    n = BLOCK + 60
    two, five = dirichlet(3, n, 2), dirichlet(3, n, 5)
    tail = two.of(1, 60, [1])[0]
    np.testing.assert_array_equal(tail, five.of(1, 60, [0, 1, 4])[0][:, 1:2])
    both = np.concatenate([two.of(0, BLOCK, [1])[0], tail])
    assert both.sum() == pytest.approx(n)
    assert len(np.unique(both)) == n
    assert not np.array_equal(tail, dirichlet(4, n, 2).of(1, 60, [1])[0])


def test_pairs_are_what_was_asked_for() -> None:
    rounds = list(mixup.pairs(MIXED, 0, N, 0))
    assert sum(len(i) for i, _, _ in rounds) == round(2.5 * N)
    for i, j, t in rounds:
        assert len(set(i)) == len(i) and len(set(j)) == len(j)
        assert t.shape == (len(i), 1) and t.min() >= 0 and t.max() <= 1
    shares = np.concatenate([t[:, 0] for _, _, t in rounds])
    assert kstest(shares, "beta", args=(0.4, 0.4)).pvalue > 0.01
    again, other = (next(mixup.pairs(MIXED, 0, N, m))[0] for m in (0, 1))
    np.testing.assert_array_equal(rounds[0][0], again)
    assert not np.array_equal(again, other)
    few = mixup.Settings(mixup_share=0.001)
    assert [len(i) for i, _, _ in mixup.pairs(few, 0, N, 0)] == [1]
