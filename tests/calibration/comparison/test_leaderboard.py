"""The ranking against loops, and what is said of it."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.comparison.advice import advise
from calibration.comparison.candidates import BASELINE, Candidate, scalings
from calibration.comparison.contest import _apart
from calibration.comparison.leaderboard import standings
from calibration.comparison.measure import Measured
from calibration.comparison.scores import Told, ranked
from posthoc.contract import FitError

LAPLACE, ETS, REFIT = Candidate("laplace"), Candidate("none", "ets"), Candidate("mixup")


def splits(effects: dict[Candidate, float], n: int = 300, seeds: int = 3) -> list[Measured]:
    """Losses of rows that several splits test, each candidate's by its effect and noise."""
    rng = np.random.default_rng(0)
    hard = rng.exponential(size=n)
    found = []
    for seed in range(seeds):
        rows = np.sort(rng.choice(n, n // 3, replace=False))
        for candidate, effect in effects.items():
            losses = {"nll": hard[rows] + effect + 0.1 * rng.normal(size=len(rows))}
            figures = {"nll": float(losses["nll"].mean())}
            found.append(Measured(candidate, seed, figures, rows, losses))
    return found


def test_a_row_counts_once_however_often_it_was_tested() -> None:
    runs = splits({BASELINE: 0.0, LAPLACE: -0.05, ETS: 0.2})
    table = standings(runs, "nll")
    means: dict[str, list[float]] = {}
    for row in range(300):
        for c in (BASELINE, LAPLACE, ETS):
            seen = [
                float(m.losses["nll"][list(m.rows).index(row)])
                for m in runs
                if m.candidate == c and m.rows is not None and row in m.rows
            ]
            if seen:
                means.setdefault(c.name, []).append(sum(seen) / len(seen))
    order = sorted(means, key=lambda k: float(np.mean(means[k])))
    assert [s.name for s in table] == order == ["laplace", "none", "none + ets"]
    assert [s.rank for s in table] == [1, 2, 3]
    for s in table:
        assert s.to_best is not None
        apart = np.mean(means[s.name]) - np.mean(means[order[0]])
        assert s.to_best.value == pytest.approx(apart)
        if s.name != "none":
            assert s.to_baseline is not None
            assert s.to_baseline.value == pytest.approx(
                np.mean(means[s.name]) - np.mean(means["none"])
            )
    losses = [m.figures["nll"] for m in runs if m.candidate == ETS]
    assert table[2].figures["nll"].mean == pytest.approx(np.mean(losses))
    assert table[2].figures["nll"].sd == pytest.approx(np.std(losses, ddof=1))


def test_what_is_not_surely_worse_is_tied() -> None:
    table = {
        s.name: s for s in standings(splits({BASELINE: 0.0, LAPLACE: -0.001, ETS: 1.0}), "nll")
    }
    assert table["laplace"].tied and table["none"].tied and not table["none + ets"].tied


def test_rows_of_one_group_are_no_independent_evidence() -> None:
    runs = splits({BASELINE: 0.0, LAPLACE: -0.03})
    apart = {}
    for name, keys in (("rows", None), ("groups", np.arange(300) // 100)):
        found = next(s for s in standings(runs, "nll", keys) if s.name == "laplace").to_baseline
        assert found is not None and found.low is not None and found.high is not None
        apart[name] = found.high - found.low
    assert apart["groups"] != pytest.approx(apart["rows"])


def test_a_candidate_that_fails_on_a_split_has_no_rank() -> None:
    runs = splits({BASELINE: 0.0, LAPLACE: -0.5})
    runs = [m for m in runs if not (m.candidate == LAPLACE and m.seed == 1)]
    runs.append(Measured(LAPLACE, 1, error="too few rows"))
    table = standings(runs, "nll")
    assert [(s.name, s.rank) for s in table] == [("none", 1), ("laplace", None)]
    assert table[1].errors == ("too few rows",)
    with pytest.raises(FitError, match="baseline cannot be fitted: no rows"):
        standings([Measured(BASELINE, 0, error="no rows")], "nll")
    with pytest.raises(FitError, match="no loss is called 'crps'"):
        standings(splits({BASELINE: 0.0}), "crps")


def test_the_simplest_is_advised_unless_another_is_surely_better() -> None:
    luck = advise(
        standings(splits({BASELINE: 0.0, LAPLACE: -0.01}), "nll"),
        (),
        "classification",
        "nll",
        relabels=False,
    )
    assert luck.options == {"method": "none", "scaling": "temperature"}
    assert "may be luck" in luck.reasons[0]
    sure = advise(
        standings(splits({BASELINE: 0.0, LAPLACE: -0.5}), "nll"),
        (),
        "regression",
        "nll",
        relabels=False,
    )
    assert sure.options == {"method": "laplace"} and "against scaling alone" in sure.reasons[0]


def test_what_changes_the_answer_is_advised_only_when_asked() -> None:
    table = standings(splits({BASELINE: 0.0, LAPLACE: -0.2, REFIT: -0.6}), "nll")
    assert table[0].name == "mixup" and not table[0].keeps
    kept = advise(table, (), "classification", "nll", relabels=False)
    assert kept.name == "laplace" and "mixup ranks higher" in kept.reasons[1]
    free = advise(table, (), "classification", "nll", relabels=True)
    assert free.options["prediction"] == "module"


def test_scores_are_ranked_by_their_mean_over_sets() -> None:
    runs = [
        Told(0, {"gen": {"a": 0.9, "b": 0.7}, "knn": {"a": 0.8, "b": 0.9}}),
        Told(1, {"gen": {"a": 0.8, "b": 0.6}, "knn": {"a": 0.8, "b": 0.7}}, {"vim": "no head"}),
        Told(0, {"vim": {"a": 1.0, "b": 1.0}}),
    ]
    knn, gen, vim = ranked(runs, {"a": "a", "b": "b"})
    assert (knn.score, gen.score, vim.score, vim.rank) == ("knn", "gen", "vim", None)
    assert knn.mean is not None and knn.mean.mean == pytest.approx(0.8)
    assert gen.mean is not None and gen.mean.sd == pytest.approx(np.std([0.8, 0.7], ddof=1))
    assert gen.auroc["b"].mean == pytest.approx(0.65) and vim.errors == ("no head",)


def test_corrupted_sets_are_one_kind() -> None:
    told = {"far": 0.6, "noise 3": 0.9, "blur 3": 0.7}
    kinds = {"noise 3": "corrupted", "blur 3": "corrupted"}
    (only,) = ranked([Told(0, {"gen": told})], kinds)
    assert only.mean is not None and only.mean.mean == pytest.approx((0.6 + (0.9 + 0.7) / 2) / 2)


def test_mixtures_are_fitted_beside_their_members() -> None:
    every = ["gen", "knn", "mds", "flow", "gen+mds", "rank:gen+vim", "vim"]
    assert _apart(every) == [
        ["gen", "mds", "gen+mds", "rank:gen+vim", "vim"],
        ["knn"],
        ["flow"],
    ]
    assert _apart(["gen", "knn"]) == [["gen"], ["knn"]]


def test_families_are_those_that_the_classes_allow() -> None:
    assert scalings("classification", 500, 2, None) == [
        "temperature",
        "ets",
        "svs",
        "beta",
        "isotonic",
    ]
    assert scalings("classification", 500, 2, ["beta"]) == ["temperature", "beta"]
    assert "sms" in scalings("classification", 500, 3, None)
