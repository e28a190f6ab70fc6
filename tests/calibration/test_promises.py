"""What a fit promises of sets, intervals, quantiles, flags and answers, on rows it never saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from calibration.conformal.intervals import residual_scores
from calibration.fit import fit_material
from calibration.fit_head import fit_head
from calibration.fit_options import FitOptions, Parts
from calibration.fit_thresholds import run_head
from calibration.material import ROLES, Material
from calibration.metrics.coverage import coverage_band
from calibration.predictor import Predictor
from posthoc.contract import Features, LinearHead
from posthoc.folds import log_softmax
from tests.calibration import networks
from tests.calibration.conftest import SEEDS, Fit
from tests.calibration.heads import linear, rows
from tests.calibration.networks import inputs, network, table

# Promises


@pytest.mark.parametrize("method", ["lac", "raps", "aps", "saps"])
def test_sets_cover_inside_the_band(pool: Material, method: str) -> None:
    """Scores are untied but for those of each row's last class, which no threshold here reaches."""
    inside: dict[float, int] = {}
    empty = []
    for seed in SEEDS:
        done, test, _ = fit_material(
            pool, FitOptions(task="classification", conformal=method, seed=seed)
        )
        out = run_head(done.head, test)
        true = out["set_scores"][np.arange(len(test)), test.y]
        for g in done.conformal.guarantees:
            assert (done.scores["set"] == g.threshold).sum() == 1
            low, high = coverage_band(g.n, len(test), g.alpha)
            covered = float((true <= g.threshold).mean())
            inside[g.alpha] = inside.get(g.alpha, 0) + (low <= covered <= high)
        np.testing.assert_array_equal(out["set"], out["set_scores"] <= np.float32(done.head.q_hat))
        empty.append((out["set_size"] == 0).mean())
    assert inside.keys() == {0.1, 0.05}
    assert all(n >= 18 for n in inside.values()), inside
    assert max(empty) < 0.5


def test_intervals_cover_inside_the_band(values: Material) -> None:
    inside = {0.1: 0, 0.05: 0}
    for seed in SEEDS:
        done, test, _ = fit_material(values, FitOptions(task="regression", seed=seed))
        out = run_head(done.head, test)
        score = residual_scores(test.y, out["mean"], out["std"])
        for g in done.conformal.guarantees:
            low, high = coverage_band(g.n, len(test), g.alpha)
            inside[g.alpha] += low <= float((score <= g.threshold).mean()) <= high
        within = (out["lower"] <= test.y) & (test.y <= out["upper"])
        # Float32 bounds may round the rows that lie exactly on an end to the other side.
        assert abs(int(within.all(1).sum()) - int((score <= done.head.q_hat).sum())) <= 1
    assert all(n >= 18 for n in inside.values()), inside


def test_quantiles_are_met_by_their_share(values: Material) -> None:
    """Observed shares of fresh targets below each quantile, averaged over splits."""
    shares = []
    for seed in SEEDS:
        done, test, _ = fit_material(values, FitOptions(task="regression", seed=seed))
        q = run_head(done.head, test)["quantiles"]
        shares.append((test.y[:, :, None] <= q).mean((0, 1)))
    np.testing.assert_allclose(np.mean(shares, 0), [0.05, 0.25, 0.5, 0.75, 0.95], atol=0.01)


def test_the_module_costs_nothing_where_it_has_nothing_to_say(pool: Material) -> None:
    """Mean paired NLL difference to temperature scaling alone, over 20 splits."""
    differences = []
    for seed in SEEDS:
        done, test, _ = fit_material(pool, FitOptions(task="classification", seed=seed))
        at = np.arange(len(test)), test.y
        scaled = log_softmax(test.z / done.scaling.temperature_alone)[at]
        hedged = np.log(run_head(done.head, test)["probs"][at].astype(np.float64))
        differences.append(float((scaled - hedged).mean()))
    assert np.mean(differences) <= 0.002


def test_answered_rows_are_as_right_as_promised(folder: Path) -> None:
    """P(error among answered > level) <= delta over calibrations: a count of 20 splits."""
    level, delta = 0.1, 0.1
    model = network(folder / "sharp.onnx")
    pool = networks.material(model, table(model, 5000, temperature=0.7))
    exceeded, answered = 0, []
    for seed in SEEDS:
        options = FitOptions(
            task="classification", seed=seed, max_error=level, error_delta=delta, ood="gen"
        )
        done, _, roles = fit_material(pool, options)
        # The pool is the population here: the rows that set the threshold are drawn from it.
        everything = pool.features(pool.usable)
        out = run_head(done.head, everything)
        assert done.abstain is not None and done.abstain.threshold is not None
        limit = np.float32(done.abstain.threshold)
        np.testing.assert_array_equal(out["abstain"], ~(out["confidence"] > limit))
        kept = ~out["abstain"]
        exceeded += (out["label"] != everything.y)[kept].mean() > level
        answered.append(kept.mean())
        own = kept[roles == ROLES.index("conformal")].mean()
        assert done.abstain.answered == pytest.approx(own, abs=1e-3)
    assert exceeded <= binom.ppf(0.999, len(SEEDS), delta)
    assert 0.3 < np.mean(answered) < 0.99  # the level binds, and is not met by silence


def test_abstention_of_a_regression_has_no_unit() -> None:
    """The same rows are answered whether their error bars lie below one, around it or above."""
    for tolerance, least in ((2.0, 1.0), (0.45, 0.0)):
        found = []
        for unit in (1.0, 2.0, 1024.0):
            head = linear(1)
            scaled = LinearHead(head.weight * unit, head.bias * unit)
            four = [rows(head, "regression", 400, i) for i in range(4)]
            four = [Features(f.phi, f.z * np.float32(unit), f.y * unit) for f in four]
            options = FitOptions(task="regression", tolerance=tolerance * unit)
            done = fit_head(scaled, Parts(*four[:3]), options)
            assert done.abstain is not None
            found.append((done.abstain.answered, run_head(done.head, four[3])["abstain"]))
        for answered, abstain in found:
            assert answered == found[0][0] == least
            np.testing.assert_array_equal(abstain, found[0][1])
            assert abstain.all() if least == 0 else not abstain.any()


def test_a_loose_promise_answers_every_row_and_an_impossible_one_none(pool: Material) -> None:
    def fitted(max_error: float | None) -> tuple[float | None, np.ndarray | None]:
        done, test, _ = fit_material(pool, FitOptions(task="classification", max_error=max_error))
        answered = None if done.abstain is None else done.abstain.answered
        return answered, run_head(done.head, test).get("abstain")

    share, abstain = fitted(0.9)
    assert share == 1.0 and not abstain.any()
    share, abstain = fitted(1e-4)
    assert share == 0.0 and abstain.all()
    assert fitted(None) == (None, None)


def test_the_flag_keeps_its_false_alarms(pool: Material) -> None:
    """False-alarm rate above alpha in at most delta of the calibrations."""
    exceeded = 0
    for seed in SEEDS:
        options = FitOptions(task="classification", seed=seed, ood_alpha=0.1, ood_delta=0.1)
        done, _, roles = fit_material(pool, options)
        rest = pool.features(pool.usable[roles != ROLES.index("conformal")])
        exceeded += run_head(done.head, rest)["ood"].mean() > 0.1
    assert exceeded <= binom.ppf(0.999, len(SEEDS), 0.1)


def test_too_few_rows_for_a_set_give_everything_and_say_so(folder: Path, run: Fit) -> None:
    model = network(folder / "few.onnx")
    bundle = run(model, table(model, 60), alphas=(0.2, 0.01))
    promised, hopeless = bundle.manifest.conformal.guarantees
    assert promised.threshold is not None
    assert (hopeless.threshold, hopeless.n_needed, hopeless.rank) == (None, 99, hopeless.n + 1)
    got = Predictor(bundle).run({"x": inputs(20, 1)}, q_hat=np.inf)
    assert got["set"].all()
    assert bundle.manifest.ood is not None and bundle.manifest.ood.threshold is None
    assert not got["ood"].any()
