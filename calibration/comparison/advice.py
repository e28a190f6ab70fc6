"""Which candidate and score to deploy, and why: words that the figures beside them bear out."""

from __future__ import annotations

from collections.abc import Sequence

from calibration.comparison.candidates import BASELINE
from calibration.comparison.records import Recommendation, ScoreStanding, Standing
from posthoc.contract import Task


def advise(
    standings: Sequence[Standing],
    scores: Sequence[ScoreStanding],
    task: Task,
    by: str,
    *,
    relabels: bool,
) -> Recommendation:
    """The best-ranked candidate that serves the frozen model's answer (``relabels``: or its own),
    unless scaling alone is not surely worse than it; and the best-ranked score."""
    ranked = [s for s in standings if s.rank is not None]
    able = [s for s in ranked if s.keeps or relabels]
    best = able[0]
    alone = next(s for s in ranked if s.name == BASELINE.name)
    reasons = []
    chosen = best
    if best.name == alone.name:
        reasons.append(f"no module that may be deployed has a lower {by} than scaling alone")
    else:
        found = best.to_baseline
        assert found is not None and found.low is not None and found.high is not None
        range_ = f"{found.value:+.4f} ({found.low:+.4f} to {found.high:+.4f})"
        if found.high < 0:
            reasons.append(f"{best.name} changes {by} by {range_} against scaling alone")
        else:
            chosen = alone
            reasons.append(
                f"the lowest {by} is that of {best.name}, but its difference to scaling alone, "
                f"{range_}, may be luck: the simpler one"
            )
    if ranked[0].name != best.name:
        reasons.append(
            f"{ranked[0].name} ranks higher and changes the model's answer; --prediction module "
            "lets it be recommended"
        )
    level = [s.name for s in able if s.tied and s.name != chosen.name and chosen.tied]
    if level:
        shown = ", ".join(level[:4]) + (f" and {len(level) - 4} more" if len(level) > 4 else "")
        reasons.append(f"not surely different from it: {shown}")
    score = next((s for s in scores if s.rank == 1), None)
    if score is not None:
        assert score.mean is not None
        reasons.append(
            f"the score {score.score} tells strange rows best: AUROC {score.mean.mean:.4f} in the "
            f"mean over {', '.join(score.auroc)}"
        )
    options = {"method": chosen.method}
    if task == "classification":
        options["scaling"] = chosen.scaling
    if not chosen.keeps:
        options["prediction"] = "module"
    if score is not None:
        options["ood"] = score.score
    return Recommendation(
        name=chosen.name,
        score=None if score is None else score.score,
        reasons=tuple(reasons),
        options=options,
    )
