"""What a renewal says of itself: what it changed, what it left, and what it cannot promise."""

from __future__ import annotations

from datetime import UTC, datetime

from calibration.bundle import Manifest
from calibration.metrics.totals import level_name
from calibration.renew.factor import Factor, sharper
from calibration.renew.opened import Opened
from calibration.renew.rows import Window
from calibration.renew.thresholds import Ranked

_ASSUMED = (
    "Renewed: its promises are for rows like the labelled ones. That rows to come are like them "
    "(exchangeable), and that which rows got a label does not depend on what the label is, is "
    "assumed; nothing here can test or correct either."
)
_ITEMS = (
    "Renewed: the ledger does not know which rows are of one {by}: they count as several, and what "
    "is promised holds as far as they are independent."
)
_OOD = (
    "Renewed: out-of-distribution score, p-values and flag are as they were, and promise what they "
    "do for clean rows like those of the first fit."
)
_ABSTENTION = (
    "Renewed: abstention answers the rows that it did, and promises what it did for rows like "
    "those of the first fit."
)


def changes(
    opened: Opened, made: Ranked, factor: Factor | None, abstention: bool, only: str | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What was renewed and what was kept."""
    m, head = opened.manifest, opened.head
    renewed: list[str] = []
    kept: list[str] = []
    noun = "temperature" if m.task == "classification" else "standard deviation"
    if factor is None:
        kept.append(f"scaling: asked for (--only {only})")
    elif factor.taken:
        how = sharper(factor.value)
        renewed.append(f"{noun}: times {factor.value:.4g} ({how}), gains {factor.gain:.4f} nats")
        new = made.head.family
        if head.family is None and new is not None:
            renewed.append("the factor is vector scaling with one for all classes, after the link")
    else:
        kept.append(
            f"{noun}: a factor of {factor.found:.4g} gains {factor.gain:.5f} nats a row, which "
            "luck explains"
        )
    levels = ", ".join(level_name(a) for a in m.alphas)
    renewed.append(f"thresholds of {m.conformal.method} at {levels}")
    if factor is not None and made.head.conformal_settings != head.conformal_settings:
        renewed.append(f"settings of {m.conformal.method}")
    if m.conformal.shift is not None:
        renewed.append("weights of --shift: dropped, labelled rows are of production themselves")
    if m.conformal.given == "cluster":
        kept.append("which classes are one cluster")
    if m.quantile_levels:
        renewed.append("quantiles")
    if head.sureness is not None:
        (renewed if factor is not None else kept).append(f"confidence: {head.sureness.name}")
    if m.abstain is not None:
        if abstention:
            renewed.append("abstention")
        elif m.task == "regression":
            kept.append("abstention: --tolerance (without --only) renews it")
        else:
            kept.append("abstention: the bundle remembers no confidences to try")
    if m.module.name != "none":
        kept.append(f"module {m.module.name} and its strength")
    if m.ood is not None:
        kept.append("out-of-distribution score, p-values and flag: of the first fit's rows")
    return tuple(renewed), tuple(kept)


def notes(
    m: Manifest, window: Window, used: int, *, abstains_as_before: bool = False
) -> tuple[str, ...]:
    """What a renewed bundle does not promise, beside what it never did; ``used`` rows."""
    sample = "" if used == window.labelled else f", a sample of {window.labelled:,}"
    found = [
        f"Renewed on {used:,} labelled predictions{sample}, of {window.served:,} made from "
        f"{stamp(window.since)} to {stamp(window.until)}.",
        _ASSUMED,
    ]
    if m.mapping.split_by is not None:
        found.append(_ITEMS.format(by=m.mapping.split_by))
    if m.ood is not None:
        found.append(_OOD)
    if abstains_as_before:
        found.append(_ABSTENTION)
    return tuple(found)


def stamp(seconds: float) -> str:
    """A time as the manifest has it: ISO 8601, UTC, whole seconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
