"""The recursion over run lengths against a dense one without pruning, and what pruning costs."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import norm

from calibration.drift import bocd, dsm
from posthoc.contract import F64

HAZARD = [0.3, 0.02, 0.15, 0.01, 0.2, 0.05, 0.004]
both = pytest.mark.parametrize("module", [dsm, bocd], ids=["dsm", "bocd"])


def dense(module: ModuleType, state: object, reference: F64, z: F64) -> list[dict[int, float]]:
    """Log weights by run length after each row of z, every segment's predictive from its rows.

    ``reference`` and ``z`` are standardised; nothing is pruned and nothing carried on.
    """
    model, s = state.model, state.settings  # type: ignore[attr-defined]

    def predictive(rows: list[F64], x: F64) -> float:
        stats = np.tile(model.prior(), (1, z.shape[1], 1))
        for i, row in enumerate(rows):
            stats = model.updated(stats, np.array([i]), row)
        own = model.log_density(stats, np.array([len(rows)]), x)[0]
        broad = norm.pdf(x, 0, s.broad)
        return float(np.log((1 - s.contamination) * np.exp(own) + s.contamination * broad).sum())

    def ends(length: int) -> float:
        return HAZARD[min(length, len(HAZARD)) - 1]

    weights, out = {len(reference): 0.0}, []
    rows = [*reference]
    for x in np.clip(z, -s.clip, s.clip):
        new: dict[int, float] = {}
        ended = []
        for length, w in weights.items():
            joint = w + predictive(rows[len(rows) - length :], x)
            new[length + 1] = joint + math.log(1 - ends(length + 1))
            ended.append(joint + math.log(ends(length + 1)))
        new[0] = float(logsumexp(ended))
        total = float(logsumexp(list(new.values())))
        weights = {length: w - total for length, w in new.items()}
        rows.append(x)
        out.append(weights)
    return out


@both
@pytest.mark.parametrize(("dims", "contamination"), [(1, 0.0), (1, 0.05), (2, 0.05)])
def test_without_pruning_it_is_the_dense_recursion(
    module: ModuleType, dims: int, contamination: float
) -> None:
    rng = np.random.default_rng(dims)
    reference, xs = rng.normal(size=(60, dims)), rng.normal(size=(40, dims))
    xs[20:] += 1.5
    xs[[5, 30]] = 9.0
    state = module.start(
        reference, hazard=HAZARD, keep=60, contamination=contamination, threshold=0.9999, clip=5.0
    )
    centre, spread = np.array(state.scale.centre), np.array(state.scale.spread)
    z0, z = np.clip((reference - centre) / spread, -5, 5), (xs - centre) / spread
    for x, want in zip(xs, dense(module, state, z0, z), strict=True):
        state, found = module.step(state, x)
        got = dict(zip(state.lengths.tolist(), state.log_weight.tolist(), strict=True))
        assert got.keys() == want.keys()
        assert max(abs(got[r] - want[r]) for r in want) < 1e-9
        recent = [math.exp(w) for r, w in want.items() if 5 <= r <= 50]
        if module is dsm:  # its least is 5
            assert found.evidence == pytest.approx(sum(recent), abs=1e-9)


@both
def test_the_hazard_is_looked_up_by_run_length(module: ModuleType) -> None:
    """Where segments can end only at 7 observations, changes come 7 apart."""
    hazard = np.full(400, 1e-12)
    hazard[[6, 13, 20]] = 0.5  # segments of 7, 14 and 21 observations
    state = module.start(norm.rvs(size=200, random_state=0), hazard=hazard, keep=300)
    state = module.step(state, 0.0)[0]  # the reference is longer: it does not end
    assert math.exp(state.log_weight[state.lengths == 201][0]) > 1 - 1e-9
    hazard[200] = 0.5  # of 201 observations: it ends with the first new one
    state = module.start(norm.rvs(size=200, random_state=0), hazard=hazard, keep=300)
    for n, x in enumerate(norm.rvs(size=28, random_state=1)):
        state, _ = module.step(state, x)
        weight = dict(zip(state.lengths.tolist(), np.exp(state.log_weight), strict=True))
        likely = {r for r, w in weight.items() if w > 1e-9}
        # r observations since a change after point 1, 8, 15, 22, or none since the reference.
        assert likely <= {201 + n, *(n - 7 * i for i in range(5))}
        assert (weight[0] > 1e-3) == (n in (0, 7, 14, 21))


@both
@pytest.mark.parametrize("dims", [1, 2])
def test_fifty_hypotheses_do_for_all(module: ModuleType, dims: int) -> None:
    rng = np.random.default_rng(3)
    reference, xs = rng.normal(size=(200, dims)), rng.normal(size=(400, dims))
    xs[385:] += 1
    few, all_ = module.start(reference), module.start(reference, keep=1000)
    gap = 0.0
    for x in xs:
        few, some = module.step(few, x)
        all_, every = module.step(all_, x)
        gap = max(gap, abs(some.evidence - every.evidence))
    assert len(few.lengths) == 50 and len(all_.lengths) == 401
    assert gap < 0.02


@both
def test_weights_are_probabilities_however_long_the_stream(module: ModuleType) -> None:
    rng = np.random.default_rng(4)
    state = module.start(rng.normal(size=200))
    for x in rng.normal(size=1500):
        state, _ = module.step(state, x)
    assert np.exp(state.log_weight).sum() == pytest.approx(1, abs=1e-12)
    assert len(set(state.lengths.tolist())) == 50 and 0 in state.lengths
    assert int(state.lengths[state.log_weight.argmax()]) == 1700
