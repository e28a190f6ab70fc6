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
    from collections.abc import Mapping, Sequence

    from calibration.bundle import Bundle
    from calibration.conformal.losses import Order
    from calibration.conformal.risk_control import RiskControl
    from calibration.evaluation import Evaluation
    from calibration.predictor import Predictor
    from posthoc.contract import Array, Task
    from service.scoring.batches import batches_schema, score_batches

__all__ = ["batches_schema", "control_risk", "evaluate", "fit", "load", "score_batches", "show"]
__version__ = "0.1.0"


def fit(
    model: str | Path | None,
    data: str | Path,
    out: str | Path,
    *,
    task: Task,
    target: str,
    inputs: dict[str, list[str]] | None = None,
    classes: list[str] | None = None,
    split_by: str | None = None,
    group: str | None = None,
    id: str | None = None,
    production: str | Path | None = None,
    name: str | None = None,
    version: str = "1",
    source: dict[str, Any] | None = None,
    **options: Any,
) -> Bundle:
    """Fit a bundle at ``out`` for a frozen model on labelled rows.

    Without a ``model``, ``inputs`` are columns of what one answered: ``z`` (logits, probabilities
    or means) and, where there are some, its features ``phi``; there is no head for a module then,
    so ``method`` is "none" or one that needs outputs alone.
    ``group`` is the column that ``given="group"`` means, ``production`` the rows without labels
    that ``shift`` is learnt from.
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
        group=group,
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
        production=production,
        **(source or {}),
    )


def __getattr__(name: str) -> Any:
    """`score_batches` and `batches_schema`, imported when they are used."""
    if name in ("batches_schema", "score_batches"):
        from service.scoring import batches

        return getattr(batches, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(bundle: str | Path, *, device: str = "cpu", threads: int = 0) -> Predictor:
    """Open and verify a bundle. Raises BundleError for one that is damaged or altered."""
    from calibration.predictor import Predictor

    return Predictor(bundle, device=device, threads=threads)


def evaluate(
    bundle: str | Path,
    data: str | Path | Mapping[str, str | Path],
    *,
    ood: Mapping[str, str | Path] | None = None,
    corrupt: Sequence[str] = (),
    severities: Sequence[int] = (1, 3, 5),
    data_range: float | None = None,
) -> Evaluation:
    """Measure a bundle on labelled rows (rows that the fit saw are dropped and counted) and,
    for OOD scores, on unlabelled strange rows by name.

    ``data`` may be several labelled sets by name: every figure is of the first, and ``.sets`` has
    all of them beside each other, with those that ``corrupt`` (names, or ["all"]) makes of it at
    ``severities`` from 1 to 5. ``data_range`` is the range of image values, for PSNR.
    """
    from calibration.evaluate import evaluate as run

    return run(
        bundle,
        data,
        ood_data=ood or {},
        corrupt=corrupt,
        severities=severities,
        data_range=data_range,
    )


def show(evaluation: Evaluation) -> None:
    """Print what `evaluate` found, as ``hedged evaluate`` prints it."""
    from hedged.commands.evaluate import show as run

    run(evaluation)


def control_risk(
    losses: Array,
    level: float,
    *,
    delta: float | None = None,
    bound: float = 1.0,
    settings: Sequence[str] | None = None,
    cost: Sequence[float] | None = None,
    order: Order | None = None,
    binary: bool | None = None,
    monotonise: bool = False,
    seed: int = 0,
) -> RiskControl:
    """The settings whose risk is at most ``level``, from the losses n×L, in [0, ``bound``], of n
    exchangeable items at L settings fixed without them.

    Without ``delta`` conformal risk control, for losses that never rise from one setting to the
    next; ``monotonise`` is its own (`calibration.conformal.losses.conformal_risk_control`). With it
    learn-then-test, for any losses; ``order``, ``binary`` and ``seed`` are its own
    (`calibration.conformal.losses.learn_then_test`). The promise is ``.promise`` of the result;
    where nothing passes, ``.chosen`` is None. Raises DataError naming the item and the fix.
    """
    from calibration.conformal.losses import conformal_risk_control, learn_then_test
    from posthoc.contract import DataError

    if delta is None:
        if order is not None or binary is not None:
            raise DataError("an order and binary losses are for learn-then-test: give delta")
        return conformal_risk_control(
            losses, level, bound=bound, settings=settings, cost=cost, monotonise=monotonise
        )
    if monotonise:
        raise DataError("learn-then-test takes losses as they are: leave monotonise out")
    return learn_then_test(
        losses,
        level,
        delta,
        bound=bound,
        settings=settings,
        cost=cost,
        order=order,
        binary=binary,
        seed=seed,
    )
