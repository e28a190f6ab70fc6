"""Tables of the report: sets side by side, the worst rows, and what a doubt says of features."""

from __future__ import annotations

from html import escape

from calibration.evaluation.records import Evaluation, Level, SetSummary
from calibration.figures.panel import level_percent, number, percent
from calibration.figures.tables import NONE, cell, shown, signed, table

_COLUMNS = {
    "accuracy": ("Accuracy", "%"),
    "mean_iou": ("Mean IoU", ".4f"),
    "rmse": ("RMSE", ".4g"),
    "nll": ("NLL", ".4f"),
    "debiased_ece": ("ECE, debiased", "%"),
    "pce": ("PCE", "%"),
}


def sets_table(e: Evaluation) -> str:
    """Every labelled set as a row; empty for one set."""
    if not e.sets:
        return ""
    first = e.sets[0]
    keys = [k for k in _COLUMNS if k in first.metrics]
    size = "set size" if e.task == "classification" else "width"
    if any(v.images is not None and v.images.mask is not None for v in first.levels):
        size = "share of pixels"
    head = [
        "Set",
        *(_COLUMNS[k][0] for k in keys),
        *(f"Coverage at {level_percent(v.alpha)}" for v in first.levels),
    ]
    shares = {
        "Flagged OOD": [s.flagged for s in e.sets],
        "Abstained": [s.abstained for s in e.sets],
    }
    shares = {name: column for name, column in shares.items() if any(column)}
    held = any(s.answered for s in e.sets)
    rows = []
    for i, s in enumerate(e.sets):
        cells = [_metric(s, k) for k in keys]
        by_alpha = {v.alpha: v for v in s.levels}
        cells += [_level(by_alpha.get(v.alpha), size) for v in first.levels]
        cells += [cell(column[i], "%") for column in shares.values()]
        cells += [_answered(s, ".4g" if e.task == "regression" else "%")] * held
        rows.append((_name(s, e), cells))
    what = "rows" if e.dense is None else "images"
    bands = (
        f"Under a coverage: where it lies in 99 of 100 draws of {what} like those of the fit. "
        "Only for those is coverage promised; of every other set it is measured here, and outside "
        "its band the set is unlike the fit's."
        if all(v.banded for v in first.levels)
        else f"Coverage is promised for {what} like those of the fit (or the production rows that "
        "it was weighted for) alone; of every other set it is measured here."
    )
    changed = (
        f"Δ is the change from “{escape(first.name)}” with its 95 % interval, bold where that "
        f"leaves out zero; {what} that both sets have are compared in pairs. "
        if any(s.change for s in e.sets)
        else ""
    )
    # A number stays with its sign of per cent where a narrow column breaks.
    whole = table([*head, *shares, *["Error of answered"] * held], rows).replace(" %", "\u00a0%")
    return (
        '<section><h2>Sets side by side</h2><div class="many">'
        f"{whole}</div><p>All figures are "
        f"hedged's, with 95 % intervals over resampled {what}; for calibration errors, where a "
        f"perfectly calibrated model would lie. {changed}{bands} Read a row as a whole: accuracy "
        "may fall if calibration holds, or if what is still answered stays right.</p></section>"
    )


def _name(s: SetSummary, e: Evaluation) -> str:
    what = "rows" if e.dense is None else "images"
    more = f"{s.n:,} {what}"
    if s.dropped:
        more += f", {s.dropped:,} dropped"
    if s.refused:
        more += f", {s.refused:,} without a finite answer"
    return f"{escape(s.name)}<small>{more}</small>"


def _metric(s: SetSummary, key: str) -> str:
    form = _COLUMNS[key][1]
    text = cell(s.metrics.get(key), form)
    d = s.change.get(key)
    if d is None or d.low is None or d.high is None:
        return text
    mark = "" if d.low <= 0 <= d.high else ' class="clear"'
    return (
        f"{text}<small{mark}>Δ {signed(d.value, form)}</small>"
        f"<small>{signed(d.low, form)} to {signed(d.high, form)}</small>"
    )


def _answered(s: SetSummary, form: str) -> str:
    if s.answered is None:
        return NONE
    share = f"<small>{percent(s.answered.value)} answered</small>"
    return f"{NONE if s.answered_error is None else cell(s.answered_error, form)}{share}"


def _level(v: Level | None, size: str) -> str:
    if v is None:
        return NONE
    band = f"<small>{percent(v.band_low)} to {percent(v.band_high)}</small>" * v.banded
    mean = "infinite" if v.mean_size is None else number(v.mean_size, ".3g")
    return f"{percent(v.coverage)}{band}<small>{size} {mean}</small>"


def worst_table(e: Evaluation) -> str:
    """The rows that hedged was surest of and wrong about; empty without any."""
    if not e.worst:
        return ""
    sets = e.task == "classification"
    ids = any(w.id is not None for w in e.worst)
    flags = any(w.flagged is not None for w in e.worst)
    head = ["Row", *["Id"] * ids, "Truth", "Answer", "Confidence" if sets else "Error / error bar"]
    rows = []
    for w in e.worst:
        cells = [escape(w.id or "")] * ids
        cells += [escape(w.truth), escape(w.answer)]
        cells.append(percent(w.doubt) if sets else number(w.doubt, ".3g"))
        cells += ["yes" if w.flagged else "no"] * flags
        rows.append((f"{w.row:,}", cells))
    said = (
        "The wrong answers that were given the most confidence: look here first for labels that "
        "are wrong, and for kinds of rows that the model does not know."
        if sets
        else "The rows furthest off for their own error bar: look here first for targets that are "
        "wrong, and for kinds of rows that the model does not know."
    )
    title = "Confident and wrong" if sets else "Furthest off"
    return (
        f"<section><h2>{title}</h2>{table([*head, *['Held back'] * flags], rows)}<p>{said} Rows "
        "are counted from 0 in the table as given"
        f"{'; held back: flagged or abstained on' * flags}.</p></section>"
    )


def retrieval_table(e: Evaluation) -> str:
    """R-AUROC of each doubt; empty without features."""
    if e.retrieved is None:
        return ""
    r = e.retrieved
    named = {"confidence": "1 − confidence", "hedged": "OOD score"}
    rows = [
        (escape(named.get(name, name)), [shown(value, ".3f")]) for name, value in r.r_auroc.items()
    ]
    return (
        f"<section><h2>Does the doubt transfer?</h2>{table(['Doubt', 'R-AUROC'], rows)}<p>R-AUROC: "
        "how often a row whose nearest other row, by the cosine of the frozen features, is of "
        "another class is more doubtful than one whose nearest row shares its class; no "
        "classifier's weights come in, and 0.5 is a coin toss. "
        f"{percent(r.recall_at_1)} of {r.n:,} rows have such a neighbour (recall at 1).</p>"
        "</section>"
    )
