"""The report: one HTML file that shows an evaluation, readable on a phone and without a network.

plotly's own JavaScript is inlined and a content security policy forbids every other load.
"""

from __future__ import annotations

import json
import os
from html import escape
from importlib.resources import files
from pathlib import Path

from calibration.evaluation.images import PIXELS
from calibration.evaluation.parts import HEDGED
from calibration.evaluation.records import Difference, Evaluation
from calibration.figures import Panel, panels
from calibration.figures.beside import retrieval_table, sets_table, worst_table
from calibration.figures.maps import class_table, picture_sections, uncovered_table
from calibration.figures.panel import level_percent, percent, unit
from calibration.figures.tables import cell, difference, items, parts, shown, table

# Metric: title, what it is and which way is better, and how many decimals (% for shares).
_METRICS = {
    "accuracy": ("Accuracy", "share of labels that are right; higher is better", "%"),
    "mean_iou": ("Mean IoU", "overlap with the truth, mean over classes; higher is better", ".4f"),
    "nll": ("NLL", "log loss in nats; lower is better", ".4f"),
    "nll_recalibrated": ("NLL, recalibrated", "the same of the recalibrated density", ".4f"),
    "brier": ("Brier score", "squared error of the probabilities; lower is better", ".4f"),
    "debiased_ece": ("ECE, debiased", "calibration error; a perfect model shows 0", "%"),
    "ece": ("ECE", "the same with its upward bias, as usually reported", "%"),
    "smooth_ece": ("ECE, smooth", "the same by a kernel instead of bins, biased upwards", "%"),
    "ks_error": ("KS error", "largest cumulated gap of confidence, without bins", "%"),
    "equal_mass_ece": ("ECE, equal mass", "the same over bins of as many rows each", "%"),
    "top_label_ece": ("ECE, top label", "the same within the rows of each label given", "%"),
    "aurc": ("AURC", "mean error over all shares answered; lower is better", ".4f"),
    "augrc": ("AUGRC", "the same with every error weighed alike; lower is better", ".4f"),
    "e_aurc": ("E-AURC", "AURC less that of the best order; lower is better", ".4f"),
    "error_at_80": ("Error at 80 %", "answering the surest 80 %; lower is better", "%"),
    "error_at_90": ("Error at 90 %", "answering the surest 90 %; lower is better", "%"),
    "error_auroc": ("AUROC of errors", "does low confidence find the errors? 0.5 is chance", ".3f"),
    "class_ece": ("ECE by class", "calibration error of each class's probability, mean", "%"),
    "brier_reliability": ("Brier: reliability", "its part that calibration could win", ".4f"),
    "brier_resolution": (
        "Brier: resolution",
        "its part that knowledge wins; higher is better",
        ".4f",
    ),
    "brier_uncertainty": (
        "Brier: uncertainty",
        "what the classes' shares alone would score",
        ".4f",
    ),
    "ged": ("GED²", "distance to the annotators' maps; lower is better", ".4f"),
    "disagreement": ("Disagreement", "mean distance between annotators", ".4f"),
    "rmse": ("RMSE", "in the target's units; lower is better", ".4g"),
    "mae": ("MAE", "in the target's units; lower is better", ".4g"),
    "crps": ("CRPS", "error of the whole distribution, target's units; lower is better", ".4g"),
    "psnr": ("PSNR", "peak signal to noise in dB, mean over images; higher is better", ".2f"),
    "uce": ("UCE", "calibration error of the variance, squared units; read with AUSE", ".3g"),
    "pearson": ("Pearson, σ with |error|", "within an image; higher is better", ".3f"),
    "spearman": ("Spearman, σ with |error|", "the same by ranks; higher is better", ".3f"),
    "pearson_pooled": ("Pearson, all pixels", "also tells hard from easy images", ".3f"),
    "ause": ("AUSE", "area to the oracle's sparsification; lower is better", ".4f"),
    "ause_random": ("AUSE of a random order", "what a useless map would have", ".4f"),
    "pce": ("PCE", "calibration error of the distribution; lower is better", "%"),
    "ence": (
        "ENCE",
        "calibration error of the error bar, relative to it; one bar for all has 0",
        "%",
    ),
    "sharpness": ("Sharpness", "mean error bar, target's units; lower says more", ".4g"),
}
# Of rows, what only some ask for: folded away below the others.
_FOLDED = (
    "ks_error",
    "equal_mass_ece",
    "top_label_ece",
    "class_ece",
    "e_aurc",
    "brier_reliability",
    "brier_resolution",
    "brier_uncertainty",
)


def write_report(path: Path, evaluation: Evaluation) -> None:
    """Write the report of ``evaluation`` to ``path``, whole or not at all (about 5 MB)."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        part.write_text(render(evaluation), encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def render(evaluation: Evaluation) -> str:
    """The report as one HTML document."""
    from plotly.offline import get_plotlyjs

    drawn = list(panels(evaluation))
    figures = [{"key": p.key, "data": p.data, "layout": p.layout} for p in drawn]
    slots = {
        "title": escape(evaluation.about.get("model", f"the {evaluation.task}")),
        "about": _about(evaluation),
        "pictures": picture_sections(evaluation),
        "classes": class_table(evaluation),
        "unit": items(evaluation),
        "glance": _glance(evaluation),
        "comparison": _comparison(evaluation),
        "levels": _levels(evaluation),
        "sets": sets_table(evaluation) + "".join(_section(p) for p in drawn if p.tall),
        "figures": "\n".join(
            _section(p) for p in drawn if not p.tall and not p.key.startswith("scores-")
        ),
        "ood": _ood(evaluation) + retrieval_table(evaluation),
        "worst": worst_table(evaluation),
        "scores": "\n".join(_section(p) for p in drawn if p.key.startswith("scores-")),
        "data": _script_json(figures),
        "plotly": get_plotlyjs().replace("</script", "<\\/script"),
    }
    page = files("calibration").joinpath("report.html").read_text(encoding="utf-8")
    head, *rest = page.split("{{")
    # One pass over the template's own slots, so that no value can smuggle in another.
    return head + "".join(
        slots[name] + text for name, _, text in (piece.partition("}}") for piece in rest)
    )


def _script_json(value: object) -> str:
    # "<" never appears inside a script element, so no value can close it.
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _about(e: Evaluation) -> str:
    unit = items(e)
    lines = {
        **{k[:1].upper() + k[1:]: v for k, v in e.about.items() if k != "model"},
        "Task": e.task,
        f"Test {unit}": f"{e.n:,}",
        f"Conformal {unit}": f"{e.n_conformal:,}",
    }
    if e.dense is not None:
        lines["Test pixels"] = f"{e.dense.pixels:,}"
    return "\n".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in lines.items()
    )


def _tile(name: str, value: str, note: str) -> str:
    return (
        f"<li><span>{escape(name)}</span><strong>{escape(value)}</strong>"
        f"<em>{escape(note)}</em></li>"
    )


def _glance(e: Evaluation) -> str:
    """A few figures in large type: the first baseline beside hedged."""
    first, hedged = e.systems[0], next(s for s in e.systems if s.name == HEDGED)
    keys: tuple[str, ...] = (
        ("accuracy", "nll", "debiased_ece")
        if e.task == "classification"
        else ("rmse", "nll", "pce")
    )
    if e.dense is not None:
        keys = (
            ("accuracy", "mean_iou", "nll", "debiased_ece")
            if e.task == "classification"
            else ("rmse", "nll", "uce", "ause")
        )
    tiles = []
    for key in keys:
        title, _, form = _METRICS[key]
        theirs = first.metrics.get(key)
        note = ""
        if first is not hedged and theirs is not None:
            note = f"{first.name}: {shown(theirs.value, form)}"
        tiles.append(_tile(title, shown(hedged.metrics[key].value, form), note))
    if e.levels:
        v = e.levels[0]
        note = f"chance allows {percent(v.band_low)} to {percent(v.band_high)}" * v.banded
        tiles.append(_tile(f"Coverage at {level_percent(v.alpha)}", percent(v.coverage), note))
    if e.ood:
        score = e.ood[0].score
        mine = [r.auroc.value for r in e.ood if r.score == score]
        tiles.append(
            _tile(
                f"AUROC of strange {items(e)}", f"{sum(mine) / len(mine):.3f}", f"score “{score}”"
            )
        )
    if e.label_equal is not None:
        tiles.append(
            _tile("Labels as before", percent(e.label_equal, 2), "equal to the frozen model's")
        )
    return "\n".join(tiles)


def _comparison(e: Evaluation) -> str:
    keys = [k for k in _METRICS if any(k in s.metrics for s in e.systems)]
    against: dict[str, dict[str, Difference]] = {}
    for d in e.differences:
        against.setdefault(d.to, {})[d.metric] = d
    head = [
        "Metric",
        *(s.name for s in e.systems),
        *(f"{HEDGED} − {to}" for to in against),
    ]
    rows: list[tuple[str, list[str]]] = []
    folded: list[tuple[str, list[str]]] = []
    for key in keys:
        title, note, form = _METRICS[key]
        cells = [cell(s.metrics.get(key), form) for s in e.systems]
        cells += [difference(by.get(key), form) for by in against.values()]
        into = folded if e.dense is None and key in _FOLDED else rows
        into.append((f"{escape(title)}<small>{escape(note)}</small>", cells))
    text = table(head, rows)
    if folded:
        text += f"<details><summary>More figures</summary>{table(head, folded)}</details>"
    return text


def _levels(e: Evaluation) -> str:
    sets = e.task == "classification"
    masks = any(v.images is not None and v.images.mask is not None for v in e.levels)
    size = "Mean share of pixels" if masks else "Mean set size" if sets else "Mean width"
    head = ["Level", "Coverage", "Chance, 99 %", size]
    sets = sets and not masks
    scored = any(v.interval_score is not None for v in e.levels)
    violated = any(v.size_violation is not None for v in e.levels)
    more = ["Empty sets"] * sets + ["Interval score"] * scored + ["Off by set size"] * violated
    rows = []
    for v in e.levels:
        size = "infinite" if v.mean_size is None else f"{v.mean_size:.4g}"
        cells = [
            percent(v.coverage, 2),
            f"{percent(v.band_low, 2)} to {percent(v.band_high, 2)}" if v.banded else "no one band",
            size,
        ]
        cells += [percent(v.empty_share or 0)] * sets
        cells += [cell(v.interval_score, ".4g")] * scored
        cells += [cell(v.size_violation, "%")] * violated
        rows.append((level_percent(v.alpha), cells))
    text = table([*head, *more], rows)
    if violated:
        text += (
            "<p>Off by set size: how far the coverage of sets of 0–1, 2–3, 4–10, 11–100 or more "
            "classes is from the level, at most.</p>"
        )
    if scored:
        text += (
            "<p>Interval score: width, and 2/(1 − level) times the distance of the targets that "
            "lie outside; lower is better.</p>"
        )
    text += parts(e)
    text += uncovered_table(e)
    a = e.answered
    if a is None:
        return text
    what = unit(e)
    said = (
        f"Without what was flagged or abstained on, {percent(a.share)} of the {what} are answered"
    )
    if a.error is not None:
        said += f", {percent(a.error, 2)} of them wrongly"
    if a.coverage is not None and a.level is not None:
        said += (
            f"; their coverage at level {a.level} is {percent(a.coverage, 2)}, "
            "which is measured here and not promised"
        )
    return f"{text}<p>{said}.</p>"


def _ood(e: Evaluation) -> str:
    if not e.ood:
        return ""
    rows = [
        (
            f"{escape(r.out)}<small>{r.n_out:,} {_of(e, r.score)}</small>",
            [escape(r.score), cell(r.auroc, ".3f"), f"{r.aupr:.3f}", percent(r.fpr95)],
        )
        for r in e.ood
    ]
    what = "rows" if e.dense is None else "images and pixels"
    row = "row" if e.dense is None else "image (by the mean of its map), or pixel,"
    found = table([f"Strange {what}", "Score", "AUROC", "AUPR", "FPR95"], rows)
    return (
        f"<section><h2>Strange {what}</h2>{found}<p>AUROC: how often a strange {row} scores above "
        f"one of the test {items(e)}. AUPR: precision averaged over the strange ones found. FPR95: "
        "the share of strange ones let through where 95 % of the test ones are."
        f"{_drawn(e)}</p></section>"
    )


def _of(e: Evaluation, score: str) -> str:
    return "pixels" if score.endswith(PIXELS.format("")) else items(e)


def _drawn(e: Evaluation) -> str:
    if e.dense is None:
        return ""
    return f" Of each image {e.dense.sampled} pixels at most were drawn for ranks of single pixels."


def _section(p: Panel) -> str:
    title, kind = escape(p.title), "plot tall" if p.tall else "plot"
    return (
        f'<section><h2>{title}</h2><figure><div id="{p.key}" class="{kind}" role="img" '
        f'aria-label="{title}"></div><figcaption>{escape(p.meaning)}</figcaption></figure></section>'
    )
