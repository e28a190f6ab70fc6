"""Honest error bars for a model that is already deployed, without retraining it.

>>> import hedged                                                    # doctest: +SKIP
>>> bundle = hedged.fit("model.onnx", "data.parquet", "bundle", task="classification", target="y")
>>> predictor = hedged.load("bundle")
>>> predictor.predict({"x": rows}).set
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibration.bundle import Bundle
    from calibration.evaluation import Evaluation
    from calibration.predictor import Predictor
    from posthoc.contract import Task

__all__ = ["evaluate", "fit", "load"]
__version__ = "0.1.0"


def fit(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    task: Task,
    target: str,
    inputs: dict[str, list[str]] | None = None,
    classes: list[str] | None = None,
    split_by: str | None = None,
    id: str | None = None,
    name: str | None = None,
    version: str = "1",
    source: dict[str, Any] | None = None,
    **options: Any,
) -> Bundle:
    """Fit a bundle at ``out`` for a frozen model on labelled rows.

    ``options`` are those of `calibration.fit_options.FitOptions`; ``source`` what else is said of
    the model: checkpoint, preprocess, example, trust_pickle, output, head
    (`posthoc.opening.Source`), and laplace, sampling, train_data, pixels (`calibration.fit.fit`,
    `calibration.material.prepare`).
    Raises a HedgedError that names the object and the fix.
    """
    from calibration import fit as fitting
    from calibration.fit_options import FitOptions
    from calibration.material import Columns

    columns = Columns(
        target=target,
        inputs=inputs,
        split_by=split_by,
        id=id,
        classes=None if classes is None else tuple(classes),
    )
    return fitting.fit(
        model,
        data,
        out,
        FitOptions(task=task, **options),
        columns=columns,
        name=name,
        version=version,
        **(source or {}),
    )


def load(bundle: str | Path, *, device: str = "cpu", threads: int = 0) -> Predictor:
    """Open and verify a bundle. Raises BundleError for one that is damaged or altered."""
    from calibration.predictor import Predictor

    return Predictor(bundle, device=device, threads=threads)


def evaluate(
    bundle: str | Path,
    data: str | Path,
    *,
    ood: dict[str, str | Path] | None = None,
    data_range: float | None = None,
) -> Evaluation:
    """Measure a bundle on labelled rows (rows that the fit saw are dropped and counted) and,
    for OOD scores, on unlabelled strange rows by name. ``data_range`` is the range of image values,
    for PSNR."""
    from calibration.evaluate import evaluate as run

    return run(bundle, data, ood_data=ood or {}, data_range=data_range)
