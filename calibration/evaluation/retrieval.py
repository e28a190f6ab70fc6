"""R-AUROC of a bundle's doubts: its frozen features are read from inside the fused graph."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calibration.bundle import GOLDEN, PREDICTOR
from calibration.evaluation.records import Retrieved
from calibration.evaluation.row_pass import Progress, RowPass
from calibration.metrics.r_auroc import retrieval
from calibration.predictor import Predictor
from posthoc.contract import Array, DataError, HedgedError

ROWS = 5000  # neighbours are searched among all pairs


def retrieved(
    predictor: Predictor,
    run: RowPass,
    data: str | Path,
    y: Array,
    hashes: Array,
    doubts: Mapping[str, Array],
    progress: Progress | None = None,
) -> Retrieved | None:
    """R-AUROC of each of ``doubts`` (N each, larger is less certain) on the N usable rows of
    ``data``, or on 5,000 of them that their content ``hashes`` choose.

    None where there are no features: a black box, a graph in which they are not found again, an
    installation without onnx, rows that are all right or all wrong.
    """
    session = _features(predictor)
    if session is None:
        return None
    chosen = np.zeros(len(y), bool)
    chosen[np.argsort(hashes, kind="stable")[:ROWS]] = True
    parts, at = [], 0
    for batch in run.over(data, "features", labelled=True, progress=progress, run=False):
        keep = chosen[at : at + len(batch.places)]
        at += len(keep)
        if keep.any():
            feed = {s.name: batch.inputs[s.name][keep] for s in predictor.inputs}
            parts.append(np.reshape(session[0].run([session[1]], feed)[0], (int(keep.sum()), -1)))
    phi = np.concatenate(parts)
    try:
        found = {name: retrieval(d[chosen], phi, y[chosen]) for name, d in doubts.items()}
    except DataError:
        return None
    recall = next(iter(found.values())).recall_at_1
    return Retrieved(
        n=len(phi), recall_at_1=recall, r_auroc={name: r.r_auroc for name, r in found.items()}
    )


def _features(predictor: Predictor) -> tuple[Any, str] | None:
    """A session that gives the frozen features, and the name of its output."""
    frozen = predictor.manifest.frozen
    if frozen.features is None or frozen.output is None:
        return None
    try:
        from onnx import load_from_string
        from onnx.utils import Extractor

        from posthoc.frozen import expose, open_frozen
        from posthoc.runtime import open_session
    except ModuleNotFoundError:
        return None
    fused = load_from_string(predictor.bundle.files[PREDICTOR])
    part = Extractor(fused).extract_model([s.name for s in predictor.inputs], [frozen.output])
    with np.load(io.BytesIO(predictor.bundle.files[GOLDEN]), allow_pickle=False) as golden:
        rows = {s.name: golden[f"in/{s.name}"] for s in predictor.inputs}
    try:
        opened = open_frozen(
            part.SerializeToString(), task=predictor.manifest.task, head=frozen.head, sample=rows
        )
    except HedgedError:
        return None
    if opened.phi is None or opened.width != frozen.features:
        return None
    return open_session(expose(opened)), opened.phi
