"""The families by name, and one that was fitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from calibration.families import beta, ets, isotonic, sms, svs
from posthoc.contract import F64, Array, FitError

if TYPE_CHECKING:
    from posthoc.graph import Fragment

FAMILIES: Mapping[str, ModuleType] = {
    "ets": ets,
    "svs": svs,
    "sms": sms,
    "beta": beta,
    "isotonic": isotonic,
}
BINARY = ("beta", "isotonic")  # of two classes only


@dataclass(frozen=True, slots=True)
class Family:
    """A fitted family: its name and tensors, which are a bundle's to keep."""

    name: str
    tensors: Mapping[str, Array]


def fit_family(name: str, log_p: Array, y: Array) -> Family:
    """The family fitted to log-probabilities N×C and classes y N of calibration rows.

    Raises FitError for an unknown name, a binary family of several classes, no rows, or
    log-probabilities that are no numbers.
    """
    if name not in FAMILIES:
        raise FitError(f"unknown scaling {name!r}; there are {', '.join(FAMILIES)}")
    log_p, y = np.asarray(log_p, np.float64), np.asarray(y, np.int64)
    if name in BINARY and log_p.shape[1] != 2:
        raise FitError(f"{name} is for two classes and the model has {log_p.shape[1]}")
    if len(y) == 0:
        raise FitError(f"no calibration rows to fit {name} on")
    if np.isnan(log_p).any():
        raise FitError("a probability is not a number on a calibration row")
    return Family(name, FAMILIES[name].fit(log_p, y))


def apply_family(family: Family, log_p: Array) -> F64:
    """Log-probabilities …×C of log-probabilities …×C."""
    made: F64 = FAMILIES[family.name].apply(family.tensors, np.asarray(log_p, np.float64))
    return made


def emit_family(family: Family, g: Fragment, log_p: str) -> tuple[str, str]:
    """(log-probabilities, probabilities) as a graph fragment."""
    made: str = FAMILIES[family.name].emit(g, family.tensors, log_p)
    return made, g.op("Exp", made)
