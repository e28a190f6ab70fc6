"""What the report shows of maps alone: uncovered pixels, classes and pictures, as HTML."""

from __future__ import annotations

from html import escape

from calibration.evaluation.records import Evaluation
from calibration.figures.panel import level_percent, percent
from calibration.figures.tables import NONE, cell, table


def uncovered_table(e: Evaluation) -> str:
    """How the uncovered pixels of a dense model are spread over images, level by level."""
    rows = []
    for v in e.levels:
        if v.images is None:
            return ""
        s = v.images
        cells = [cell(s.mean, "%"), percent(v.alpha), cell(s.above, "%")]
        cells += [percent(q) for q in s.quantiles]
        last = s.ambiguous if s.mask is None else s.excess
        cells += [cell(last, "%")] if e.task == "classification" else []
        rows.append((level_percent(v.alpha), cells))
    if not rows:
        return ""
    mask = e.levels[0].images.mask if e.levels[0].images is not None else None
    head = [
        "Level",
        "Uncovered" if mask is None else "Missed",
        "Promised at most",
        "Images above it",
    ]
    head += ["50 % of images", "90 %", "99 %"]
    if e.task == "classification":
        head.append("Ambiguous pixels" if mask is None else "Of other classes")
    if mask is not None:
        return (
            f"{table(head, rows)}<p>Missed: the share of an image's pixels of {escape(mask)} that "
            "lie outside its mask, mean over the images that show it; that mean is what is "
            "promised, over draws of calibration and test images. Of other classes: the share of "
            "a mask's pixels that are none of it.</p>"
        )
    several = " Ambiguous: several classes in the set." if e.task == "classification" else ""
    return (
        f"{table(head, rows)}<p>Uncovered: the share of an image's pixels whose truth lies "
        "outside, mean over images; that mean is what is promised, over draws of calibration and "
        f"test images.{several}</p>"
    )


def class_table(e: Evaluation) -> str:
    """Share, overlap and calibration error of each class of a segmentation."""
    if e.dense is None or not e.dense.classes:
        return ""
    names = list(e.dense.classes[0].ece)
    rows = [
        (
            escape(c.name),
            [
                percent(c.share, 2),
                NONE if c.iou is None else f"{c.iou:.4f}",
                *(percent(c.ece[n], 2) for n in names),
            ],
        )
        for c in e.dense.classes
    ]
    head = ["Class", "Share of pixels", "IoU", *(f"ECE, {n}" for n in names)]
    return (
        f"<section><h2>Class by class</h2>{table(head, rows)}<p>ECE of a class: does a "
        "probability of 30 % of it mean that 30 % of these pixels are of it? Plug-in, over all "
        "pixels.</p></section>"
    )


def picture_sections(e: Evaluation) -> str:
    """The chosen images with their maps, and what the colours of the classes mean."""
    if e.dense is None or not e.dense.pictures:
        return ""
    legend = "".join(
        f'<li><i style="background:{escape(colour)}"></i>{escape(name)}</li>'
        for name, colour in e.dense.swatches
    )
    parts = []
    for p in e.dense.pictures:
        maps = "".join(
            f'<figure><img alt="{escape(m.alt)}" src="data:image/png;base64,{escape(m.png)}">'
            f"<figcaption>{escape(m.title)}</figcaption></figure>"
            for m in p.maps
        )
        parts.append(
            f'<section><h2>{escape(p.title)}</h2><p>{escape(p.note)}</p><div class="maps">{maps}'
            "</div></section>"
        )
    legend = f'<ul class="legend">{legend}</ul>' if legend else ""
    return (
        f'<div class="stack">{"".join(parts)}{legend}<p>Dark is little and light is much, on one '
        "scale for maps of one kind; grey is where there is no truth.</p></div>"
    )
