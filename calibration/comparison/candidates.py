"""What there is to compare: every module that fits the model, with every scaling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from calibration.families.choice import candidates as families_for
from calibration.families.family import BINARY
from calibration.fit_options import FitOptions, Scale
from calibration.material import Material
from posthoc import registry
from posthoc.contract import FitError, Task

ALONE = "none"  # no module
TEMPERATURE: Scale = "temperature"  # a regression: one factor
SCALES: tuple[Scale, ...] = get_args(Scale)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A module (or none) and the family of probabilities after its temperature."""

    method: str
    scaling: Scale = TEMPERATURE

    @property
    def name(self) -> str:
        """As tables show it: ``laplace``, ``laplace + ets``."""
        return self.method if self.scaling == TEMPERATURE else f"{self.method} + {self.scaling}"

    @property
    def keeps(self) -> bool:
        """Whether the frozen model's answer is served."""
        if self.method == ALONE:
            return True
        found = registry.info(self.method)
        return found.preserves or found.either


BASELINE = Candidate(ALONE)


def options_of(candidate: Candidate, options: FitOptions, seed: int) -> FitOptions:
    """What a fit of the candidate is asked for; levels and settings are those of ``options``."""
    own: dict[str, Any] = {"prediction": "frozen" if candidate.keeps else "module"}
    return FitOptions(
        task=options.task,
        method=candidate.method,
        scaling=candidate.scaling,
        alphas=options.alphas,
        conformal=options.conformal,
        ood="none",
        max_error=None,
        seed=seed,
        **own,
    )


def applicable(material: Material, task: Task) -> tuple[list[str], dict[str, str]]:
    """(methods that fit the cached rows, none first; why others do not)."""
    have = {"labels"}
    have |= {"features"} if material.frozen.phi is not None else set()
    have |= {"linear_head"} if material.linear is not None else set()
    fitting = registry.applicable(registry.MODULES, task, have)
    left: dict[str, str] = {}
    for name in registry.MODULES:
        info = registry.info(name)
        if task not in info.tasks or name in fitting:
            continue
        if info.needs & {"network", "weight_samples"}:
            left[name] = "runs the network again with noise in it; fit it by itself"
        else:
            left[name] = f"needs {' and '.join(sorted(info.needs - have)).replace('_', ' ')}"
    return [ALONE, *fitting], left


def scalings(task: Task, rows: int, classes: int, asked: Sequence[str] | None) -> list[Scale]:
    """The families to try after each module on so many calibration rows, temperature first.

    Raises FitError for a family that is none, or of two classes where there are more.
    """
    for name in asked or ():
        if name not in SCALES:
            raise FitError(f"unknown scaling {name!r}; there are {', '.join(SCALES)}")
    if task == "regression":
        if asked and set(asked) != {TEMPERATURE}:
            raise FitError("--scaling is for classification; a regression has one factor")
        return [TEMPERATURE]
    for name in asked or ():
        if name in BINARY and classes != 2:
            raise FitError(f"--scaling {name} is for two classes and this model has {classes}")
    wanted = set(families_for(rows, classes) if asked is None else asked)
    return [TEMPERATURE, *(n for n in SCALES if n in wanted and n != TEMPERATURE)]
