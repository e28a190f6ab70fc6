"""One factor on what is served: a temperature after the probabilities, or on standard deviations.

The ledger has the probabilities p and no logits. ``softmax(log p / t)`` needs no more, and is the
bundle itself with other numbers in these cases:

- softmax of logits over a temperature T (no module, strength 0, or a probit link, of one variance a
  row or of each class, whose module does not move the outputs): T t in place of T. The strength s
  stays, and the draws of the decomposition are those of the head with T t.
- vector and matrix scaling: every weight and offset over t. Beta: a, b and c over t. Isotonic: the
  values at its knots over t, with a knot at either end of what log odds it can meet.
- any other link (Monte Carlo, bridge, a mixture of members, a head that is moved): vector scaling
  with one factor for all classes behind it, which is that temperature and nothing else.

Of an ensemble temperature (ets) it is none: the power of a mixture is no mixture. Of a regression
every module's standard deviation is a factor f times what it was fitted to be, so that f t is all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from calibration.families import Family
from calibration.families.smallest import LEAST as LEAST_LOG
from calibration.head import Head
from calibration.recalibration import base_of
from calibration.scaling import fit_regression, fit_temperature, mean_nll, student_nll
from posthoc.contract import F64, Array, Features, FitError
from posthoc.folds import PROBABILITY_FLOOR, log_softmax

SURE = 1.92  # nats over all rows: the 95 % point of the likelihood ratio of one parameter
_MIX = 1e-34  # of the uniform distribution, which vector scaling has a share of
_FAR = 1.0  # beyond the largest log odds that a family can meet


@dataclass(frozen=True, slots=True)
class Factor:
    """What was ``found`` and what it gains, nats a row, on the rows it was found on. It is 1, and
    nothing is changed, where luck explains the gain (a likelihood ratio at 95 %)."""

    found: float = 1.0
    gain: float = 0.0
    taken: bool = False

    @property
    def value(self) -> float:
        """The factor that is applied."""
        return self.found if self.taken else 1.0


def of_classes(probs: Array, y: Array) -> Factor:
    """The temperature t of probabilities N×C for classes y N; FitError for a single class."""
    y = np.asarray(y, np.int64)
    if len(np.unique(y)) < 2:
        raise FitError("a temperature needs labels of at least two classes and has 1")
    log_p = _logs(probs)
    t, nll = fit_temperature(log_p, y)
    return _factor(t, mean_nll(log_p, y) - nll, len(y))


def of_values(head: Head, y: Array, mean: Array, std: Array) -> Factor:
    """The factor on standard deviations N×K under which targets N×K are likeliest."""
    df = base_of(head).df
    r = (np.asarray(y, np.float64) - mean) / np.asarray(std, np.float64)
    found = fit_regression(r, np.ones(r.shape[1]), None, df)
    before = float(student_nll(r, np.ones_like(r), df).mean())
    return _factor(found.temperature, r.shape[1] * (before - found.nll), len(r))


def _factor(value: float, gain: float, n: int) -> Factor:
    return Factor(value, gain, n * gain > SURE)


def tempered_probs(probs: Array, t: float) -> Array:
    """softmax(log p / t) of N×C, float32; the same numbers at t = 1. A probability that float32
    has as 0 counts as its smallest normal number."""
    if t == 1.0:
        return np.asarray(probs, np.float32)
    return np.exp(log_softmax(_logs(probs) / t)).astype(np.float32)


def _logs(probs: Array) -> F64:
    return np.asarray(np.log(np.maximum(np.asarray(probs, np.float64), PROBABILITY_FLOOR)))


def check_scaling(head: Head) -> None:
    """FitError for a head whose probabilities no factor can renew."""
    if head.family is not None and head.family.name == "ets":
        raise FitError(
            "the scaling is ets, a mixture, which has no temperature after it: take --only "
            "conformal, or fit again on fresh rows with `hedged fit`"
        )


def scaled(head: Head, t: float, rows: Features) -> Head:
    """The head whose probabilities are softmax(log p / t), or whose standard deviations are t times
    what they were; ``rows`` are any that show what its module gives."""
    if t == 1.0:
        return head
    if head.task == "regression":
        return head.with_(temperature=head.temperature * t)
    check_scaling(head)
    if head.family is not None:
        return head.with_(family=Family(head.family.name, _over(head.family, t)))
    if _is_softmax(head, rows):
        return head.with_(temperature=head.temperature * t)
    c = head.width
    one = {"weight": np.full(c, 1 / t - 1), "bias": np.zeros(c), "mix": np.asarray([_MIX])}
    return head.with_(family=Family("svs", one))


def _is_softmax(head: Head, rows: Features) -> bool:
    """Whether log-probabilities are, but for a constant a row, proportional to 1 / T."""
    if head.module is None or head.strength == 0.0:
        return True
    spread = head.spread(rows.phi, np.asarray(rows.z, np.float64))
    assert spread is not None
    linear = head.predictive in ("probit", "probit_class")
    return linear and spread.variance is not None and spread.shift is None


def _over(family: Family, t: float) -> dict[str, Array]:
    """The tensors of a family whose log-probabilities are over t."""
    own = dict(family.tensors)
    if family.name in ("svs", "sms"):
        eye = np.eye(len(own["bias"])) if own["weight"].ndim == 2 else 1.0
        return {**own, "weight": (own["weight"] + eye) / t - eye, "bias": own["bias"] / t}
    if family.name == "beta":
        return {"weights": own["weights"] / t}
    x, y = own["x"], own["y"]
    far = -LEAST_LOG + _FAR
    if x[0] > -far:  # beyond the knots it has slope one
        x, y = np.append(-far, x), np.append(y[0] - (x[0] + far), y)
    if x[-1] < far:
        x, y = np.append(x, far), np.append(y, y[-1] + (far - x[-1]))
    return {"x": x, "y": y / t}


def sharper(t: float) -> str:
    """What a factor on probabilities or deviations does, in a word."""
    return "as it was" if math.isclose(t, 1.0) else "less sure" if t > 1 else "surer"
