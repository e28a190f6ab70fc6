"""The report: one HTML file that shows an evaluation, readable on a phone and without a network.

plotly's own JavaScript is inlined and a content security policy forbids every other load.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from pathlib import Path

from calibration.evaluation.parts import HEDGED
from calibration.evaluation.records import Difference, Evaluation, Figure
from calibration.figures import Panel, panels
from calibration.figures.panel import level_percent, number, percent

# Metric: title, what it is and which way is better, and how many decimals (% for shares).
_METRICS = {
    "accuracy": ("Accuracy", "share of labels that are right; higher is better", "%"),
    "nll": ("NLL", "log loss in nats; lower is better", ".4f"),
    "brier": ("Brier score", "squared error of the probabilities; lower is better", ".4f"),
    "debiased_ece": ("ECE, debiased", "calibration error; a perfect model shows 0", "%"),
    "ece": ("ECE", "the same with its upward bias, as usually reported", "%"),
    "aurc": ("AURC", "mean error over all shares answered; lower is better", ".4f"),
    "augrc": ("AUGRC", "the same with every error weighed alike; lower is better", ".4f"),
    "error_auroc": ("AUROC of errors", "does low confidence find the errors? 0.5 is chance", ".3f"),
    "rmse": ("RMSE", "in the target's units; lower is better", ".4g"),
    "mae": ("MAE", "in the target's units; lower is better", ".4g"),
    "crps": ("CRPS", "error of the whole distribution, target's units; lower is better", ".4g"),
    "pce": ("PCE", "calibration error of the distribution; lower is better", "%"),
}
_NONE = "–"


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

    shown = list(panels(evaluation))
    figures = [{"key": p.key, "data": p.data, "layout": p.layout} for p in shown]
    slots = {
        "title": escape(evaluation.about.get("model", f"the {evaluation.task}")),
        "about": _about(evaluation),
        "glance": _glance(evaluation),
        "comparison": _comparison(evaluation),
        "levels": _levels(evaluation),
        "figures": "\n".join(_section(p) for p in shown if not p.key.startswith("scores-")),
        "ood": _ood(evaluation),
        "scores": "\n".join(_section(p) for p in shown if p.key.startswith("scores-")),
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
    lines = {
        **{k[:1].upper() + k[1:]: v for k, v in e.about.items() if k != "model"},
        "Task": e.task,
        "Test rows": f"{e.n:,}",
        "Conformal rows": f"{e.n_conformal:,}",
    }
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
    keys = (
        ("accuracy", "nll", "debiased_ece")
        if e.task == "classification"
        else ("rmse", "nll", "pce")
    )
    tiles = []
    for key in keys:
        title, _, form = _METRICS[key]
        note = "" if first is hedged else f"{first.name}: {_number(first.metrics[key].value, form)}"
        tiles.append(_tile(title, _number(hedged.metrics[key].value, form), note))
    if e.levels:
        v = e.levels[0]
        note = f"chance allows {percent(v.band_low)} to {percent(v.band_high)}"
        tiles.append(_tile(f"Coverage at {level_percent(v.alpha)}", percent(v.coverage), note))
    if e.ood:
        score = e.ood[0].score
        mine = [r.auroc.value for r in e.ood if r.score == score]
        tiles.append(
            _tile("AUROC of strange rows", f"{sum(mine) / len(mine):.3f}", f"score “{score}”")
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
    rows = []
    for key in keys:
        title, note, form = _METRICS[key]
        cells = [_cell(s.metrics.get(key), form) for s in e.systems]
        cells += [_difference(by.get(key), form) for by in against.values()]
        rows.append((f"{escape(title)}<small>{escape(note)}</small>", cells))
    return _table(head, rows)


def _levels(e: Evaluation) -> str:
    sets = e.task == "classification"
    head = ["Level", "Coverage", "Chance, 99 %", "Mean set size" if sets else "Mean width"]
    rows = []
    for v in e.levels:
        size = "infinite" if v.mean_size is None else f"{v.mean_size:.4g}"
        cells = [
            percent(v.coverage, 2),
            f"{percent(v.band_low, 2)} to {percent(v.band_high, 2)}",
            size,
        ]
        rows.append(
            (level_percent(v.alpha), [*cells, percent(v.empty_share or 0)] if sets else cells)
        )
    text = _table([*head, "Empty sets"] if sets else head, rows)
    a = e.answered
    if a is None:
        return text
    said = f"Without what was flagged or abstained on, {percent(a.share)} of the rows are answered"
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
            f"{escape(r.out)}<small>{r.n_out:,} rows</small>",
            [escape(r.score), _cell(r.auroc, ".3f"), f"{r.aupr:.3f}", percent(r.fpr95)],
        )
        for r in e.ood
    ]
    table = _table(["Strange rows", "Score", "AUROC", "AUPR", "FPR95"], rows)
    return (
        f"<section><h2>Strange rows</h2>{table}<p>AUROC: how often a strange row scores above "
        "a test row. AUPR: precision averaged over the strange rows found. FPR95: the share of "
        "strange rows let through where 95 % of the test rows are.</p></section>"
    )


def _section(p: Panel) -> str:
    title = escape(p.title)
    return (
        f'<section><h2>{title}</h2><figure><div id="{p.key}" class="plot" role="img" '
        f'aria-label="{title}"></div><figcaption>{escape(p.meaning)}</figcaption></figure></section>'
    )


def _table(head: Iterable[str], rows: Iterable[tuple[str, list[str]]]) -> str:
    """A table of ready cells; ``head`` is escaped here."""
    labels = [escape(h) for h in head]
    top = "".join(f'<th scope="col">{label}</th>' for label in labels)
    body = []
    for name, cells in rows:
        tds = "".join(
            f'<td data-label="{label}"{" class=none" if cell == _NONE else ""}>{cell}</td>'
            for label, cell in zip(labels[1:], cells, strict=True)
        )
        body.append(f'<tr><th scope="row">{name}</th>{tds}</tr>')
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _number(value: float, form: str) -> str:
    return percent(value, 2) if form == "%" else number(value, form)


def _cell(f: Figure | None, form: str) -> str:
    if f is None:
        return _NONE
    text = _number(f.value, form)
    if f.low is None or f.high is None:
        return text
    span = f"{_number(f.low, form)} to {_number(f.high, form)}"
    return f"{text}<small>{'perfect: ' if f.range == 'perfect' else ''}{span}</small>"


def _difference(d: Difference | None, form: str) -> str:
    if d is None:
        return _NONE
    mark = "" if d.low <= 0 <= d.high else ' class="clear"'
    return (
        f"<span{mark}>{_signed(d.value, form)}</span>"
        f"<small>{_signed(d.low, form)} to {_signed(d.high, form)}</small>"
    )


def _signed(value: float, form: str) -> str:
    return f"{'+' if value >= 0 else '−'}{_number(abs(value), form)}"
