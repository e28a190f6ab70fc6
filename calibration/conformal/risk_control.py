"""What risk control found among settings, and what exactly it promises."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True, slots=True)
class RiskControl:
    """What was found at L settings, and what exactly that promises.

    ``admissible`` are the indices of the settings that the promise holds for, ``chosen`` the one
    of them that costs least, None where there is none. ``risks`` are mean losses of the n items.
    """

    method: Literal["conformal risk control", "learn then test"]
    level: float
    delta: float | None
    bound: float
    n: int
    n_needed: int  # fewest items with which a setting that never loses is admissible
    settings: tuple[str, ...]
    risks: tuple[float, ...]
    admissible: tuple[int, ...]
    chosen: int | None
    pvalues: tuple[float, ...] | None = None
    test: Literal["exact binomial", "Hoeffding-Bentkus"] | None = None
    correction: Literal["Bonferroni-Holm", "fixed sequence"] | None = None
    order: tuple[int, ...] | None = None  # of the fixed sequence
    monotonised: bool = False

    @property
    def setting(self) -> str | None:
        """Name of the chosen setting."""
        return None if self.chosen is None else self.settings[self.chosen]

    @property
    def risk(self) -> float | None:
        """Mean loss of the n items at the chosen setting."""
        return None if self.chosen is None else self.risks[self.chosen]

    @property
    def promise(self) -> str:
        """What is promised, in a sentence."""
        if self.chosen is None:
            return f"Nothing is promised, no setting passes: {self._obstacle()}."
        given = "if items are exchangeable and the settings were fixed without them"
        if self.delta is None:
            return (
                f"At setting {self.setting} a new item is expected to lose at most {self.level:g}, "
                f"in the mean over draws of {self.n} such items and the new one, {given}; of the "
                "draw at hand the risk may be higher. Where no setting passes, do what loses "
                "nothing: that is counted."
            )
        which = f"setting {self.setting} has"
        if len(self.admissible) > 1:
            which = f"all {len(self.admissible)} admissible settings, {self.setting} too, have"
        return (
            f"With probability at least {1 - self.delta:g} over draws of {self.n} such items, "
            f"{which} a mean loss of at most {self.level:g} on new items, {given}."
        )

    def as_dict(self) -> dict[str, Any]:
        """Every field and what follows from them, as plain JSON."""
        more = {"setting": self.setting, "risk": self.risk, "promise": self.promise}
        return {**asdict(self), **more}

    def _obstacle(self) -> str:
        if self.n < self.n_needed:
            return f"it takes at least {self.n_needed} items and there are {self.n}"
        if self.order is not None and self.pvalues is not None:
            first = self.order[0]
            p = self.pvalues[first]
            return f"the first of the order, {self.settings[first]}, has p-value {p:.3g}"
        best = int(np.argmin(self.risks))
        return (
            f"the lowest mean loss is {self.risks[best]:.3g}, at {self.settings[best]}, which is "
            f"not far enough below {self.level:g}"
        )
