"""What a comparison holds: plain records that go to JSON and come back."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from calibration.evaluation.records import Figure
from posthoc.contract import Task


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Spread(_Record):
    """Mean and standard deviation of a figure over re-splits: these share rows, so that the
    deviation is no standard error."""

    mean: float
    sd: float


class Standing(_Record):
    """One module and scaling on the leaderboard.

    ``rank`` is None where a split failed (``errors``). ``to_best`` and ``to_baseline`` are paired
    differences of the ranked loss over rows, with 95 % intervals (of rows, or of the groups that
    they come in); ``p_value`` is that of no difference to the best, by Holm over all, and ``tied``
    says that it is at least .05. ``others`` are the figures on further labelled rows, shifted or
    corrupted, which rank nothing. ``keeps`` says that the frozen model's answer is served,
    ``ms_per_row`` is of the whole fused graph, on one thread.
    """

    rank: int | None
    name: str
    method: str
    scaling: str
    keeps: bool
    figures: dict[str, Spread] = {}
    others: dict[str, dict[str, Spread]] = {}
    to_best: Figure | None = None
    to_baseline: Figure | None = None
    p_value: float | None = None
    tied: bool = False
    fit_seconds: float | None = None
    ms_per_row: float | None = None
    errors: tuple[str, ...] = ()


class ScoreStanding(_Record):
    """One score that tells strange rows: AUROC over re-splits by the name of the strange set, and
    the mean by which scores are ranked: of the kinds of sets, the corrupted ones being one kind."""

    rank: int | None
    score: str
    mean: Spread | None = None
    auroc: dict[str, Spread] = {}
    errors: tuple[str, ...] = ()


class Final(_Record):
    """A system on the locked rows, which had no part in the choice; ``others`` are its figures on
    further labelled rows, of corrupted ones copies of locked rows."""

    name: str
    metrics: dict[str, Figure]
    to_baseline: Figure | None = None
    others: dict[str, dict[str, float]] = {}
    ood: dict[str, Figure] = {}  # AUROC of the chosen score by strange set


class Recommendation(_Record):
    """What to deploy, and why; ``options`` are those of ``hedged fit``."""

    name: str
    score: str | None
    reasons: tuple[str, ...]
    options: dict[str, str]


class Comparison(_Record):
    """Everything that ``hedged compare`` found. ``model_rows`` is how many rows the frozen model
    was run on, once each; 0 where the cache had them all."""

    task: Task
    about: dict[str, str] = {}
    by: str
    splits: int
    rows: int
    locked: int
    model_rows: int
    standings: tuple[Standing, ...]
    left_out: dict[str, str] = {}
    scores: tuple[ScoreStanding, ...] = ()
    proxies: dict[str, str] = {}  # strange or further set -> what it is
    final: tuple[Final, ...] = ()
    bare_ms_per_row: float | None = None
    recommendation: Recommendation
