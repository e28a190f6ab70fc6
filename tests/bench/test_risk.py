"""The bench of risk control: the risks that it calls true, and that it finds what is wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from bench import risk, risk_cases
from posthoc.contract import Array
from posthoc.links import softmax


@pytest.fixture(scope="module")
def magika() -> tuple[list[risk_cases.Case], list[risk_cases.Answers]]:
    return risk_cases.pool("magika")


def check_risks(case: risk_cases.Case) -> None:
    """The mean of many drawn losses, at every setting, is the risk."""
    x = np.asarray(case.draw(np.random.default_rng(0), 10_000), float)
    assert x.shape == (10_000, len(case.risk)) and x.min() >= 0 and x.max() <= 1
    error = np.sqrt(np.maximum(x.var(axis=0), 1e-4) / 10_000)
    assert np.abs((x.mean(axis=0) - case.risk) / error).max() < 5
    assert case.falls == bool((np.diff(x, axis=1) <= 0).all())
    assert not case.binary or set(np.unique(x)) == {0, 1}


def check_answers(answers: risk_cases.Answers) -> None:
    sure, wrong = answers.draw(np.random.default_rng(0), 20_000)
    for t in (-1.0, 0.5, 0.9):
        above = wrong[sure > t]
        want = answers.error(t)
        assert above.mean() == pytest.approx(want, abs=5 * math.sqrt(0.25 / len(above)))


def test_the_risks_of_the_generator_are_true() -> None:
    cases, answers = risk_cases.generator()
    for case in cases:
        check_risks(case)
    for a in answers:
        check_answers(a)


def test_the_risks_of_a_pool_are_true(
    magika: tuple[list[risk_cases.Case], list[risk_cases.Answers]],
) -> None:
    for case in magika[0]:
        check_risks(case)
    for a in magika[1]:
        check_answers(a)


def test_f1_of_a_set_by_its_definition(
    magika: tuple[list[risk_cases.Case], list[risk_cases.Answers]],
) -> None:
    material = risk_cases.load("magika", grouped=False).material
    rows = material.features(material.usable)
    p, y = softmax(rows.z), np.asarray(rows.y, int)
    least = risk_cases.PROBABILITIES[risk_cases.LEAST["magika"] <= risk_cases.PROBABILITIES]
    f1 = next(c for c in magika[0] if c.loss == "f1")
    for j in (0, 40, len(least) - 1):
        losses = []
        for i in range(len(y)):
            chosen = set(np.flatnonzero(p[i] >= least[j]).tolist())
            hit = len(chosen & {int(y[i])})
            losses.append(1 - 2 * hit / (len(chosen) + 1))
        assert f1.risk[j] == pytest.approx(np.mean(losses))


def test_each_procedure_is_measured_and_a_wrong_risk_is_found() -> None:
    (case, *_), _ = risk_cases.generator()
    rows = risk.losses(case, 40)
    assert [r["procedure"] for r in rows] == list(risk.WAYS)
    for r in rows:
        assert r["passes"] == 1 and 0 < r["mean_risk"] < 0.11
        assert r["exceeds"] <= (1 if r["delta"] is None else r["allowed"])
    worse = replace(case, risk=case.risk + 0.05)  # items that are not drawn like new ones
    found = {r["procedure"]: r for r in risk.losses(worse, 40)}
    assert found["conformal risk control"]["excess"] > 3
    falling = found["learn then test, order falling"]
    assert falling["exceeds"] > falling["allowed"] == binom.ppf(0.999, 40, 0.1) / 40


def test_abstention_and_pixels_are_measured() -> None:
    _, (answers,) = risk_cases.generator()
    row = risk.abstention(answers, True, 30)
    assert row["exceeds"] <= row["allowed"] and row["loss"] == "wrong, of answered"

    def careless(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
        return rng.uniform(size=n), np.zeros(n, bool)

    wrong = risk.abstention(replace(answers, draw=careless), True, 30)
    assert wrong["exceeds"] == 1.0
    mean, sure = (risk.pixels(delta, 30) for delta in (None, 0.1))
    assert mean["excess"] < 3 and sure["exceeds"] <= sure["allowed"]
    assert sure["mean_risk"] < mean["mean_risk"] < 0.11
