"""``hedged fit``: a frozen model and labelled rows in, a bundle out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hedged.commands import console

_EXAMPLES = """Examples:

  hedged fit model.onnx --data held-out.parquet --task classification --target label -o bundle

  hedged fit model.onnx --data d.parquet --task regression --target price --alpha .1,.05 -o bundle

  hedged fit boosted.onnx --data d.npz --task classification --target y --method none -o bundle
"""


def fit(
    model: Annotated[Path, typer.Argument(help="Frozen model, ONNX")],
    data: Annotated[Path, typer.Option(help="Labelled rows the model was not trained on")],
    task: Annotated[str, typer.Option(help="classification or regression")],
    target: Annotated[str, typer.Option(help="Column of labels; a,b for several outputs")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Bundle folder to write")],
    method: Annotated[str, typer.Option(help="Module, or none for scaling alone")] = "laplace",
    conformal: Annotated[
        str | None, typer.Option(help="lac or raps; residual for a regression")
    ] = None,
    alpha: Annotated[str, typer.Option(help="Miss rates; the first is the default")] = ".1,.05",
    ood: Annotated[str, typer.Option(help="auto, a score's name, or none")] = "auto",
    ood_alpha: Annotated[float, typer.Option(help="False-alarm rate of the flag")] = 0.05,
    ood_delta: Annotated[float, typer.Option(help="Chance that it is higher")] = 0.05,
    max_error: Annotated[float, typer.Option(help="Error among answered rows; 0: off")] = 0.05,
    tolerance: Annotated[
        float | None, typer.Option(help="Regression: an error beyond it is wrong")
    ] = None,
    inputs: Annotated[
        list[str] | None, typer.Option(help="input=col,col (repeatable); default: all others")
    ] = None,
    split_by: Annotated[
        str | None, typer.Option(help="Column whose equal values share a split")
    ] = None,
    id: Annotated[str | None, typer.Option("--id", help="Column of row ids")] = None,
    group: Annotated[str | None, typer.Option(help="Column of group ids")] = None,
    classes: Annotated[Path | None, typer.Option(help="File of class names, one a line")] = None,
    split: Annotated[str, typer.Option(help="Module, calibration, conformal, test shares")] = (
        ".3,.2,.25,.25"
    ),
    head: Annotated[str | None, typer.Option(help="Name of the last linear node")] = None,
    output: Annotated[str | None, typer.Option(help="Model output to use")] = None,
    train_rows: Annotated[
        int | None, typer.Option(help="Rows the network was trained on: rescales the curvature")
    ] = None,
    prior_precision: Annotated[float | None, typer.Option(help="Instead of the evidence's")] = None,
    name: Annotated[str | None, typer.Option(help="Model name in the bundle")] = None,
    version: Annotated[str, typer.Option(help="Version in the bundle")] = "1",
    seed: Annotated[int, typer.Option(help="Of the split and the fixed draws")] = 0,
    cache: Annotated[Path | None, typer.Option(help="Folder of cached features")] = None,
    max_cache: Annotated[float | None, typer.Option(help="Largest cache, in GB")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows a pass")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda[:n] or tensorrt")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="The manifest on stdout")] = False,
) -> None:
    """Fit post-hoc uncertainty for a frozen model and write one bundle."""
    from calibration import fit as fitting
    from calibration.fit_head import FitOptions

    shares = console.numbers(split, "--split")
    if len(shares) != len(fitting.ROLES) or abs(sum(shares) - 1) > 1e-6 or min(shares) <= 0:
        raise typer.BadParameter(f"--split takes four positive shares that sum to 1, not {split}")
    options = _options(
        FitOptions,
        task=task,
        method=method,
        conformal=conformal,
        alphas=console.numbers(alpha, "--alpha"),
        ood=ood,
        ood_alpha=ood_alpha,
        ood_delta=ood_delta,
        max_error=max_error or None,
        tolerance=tolerance,
        prior_precision=prior_precision,
        train_rows=train_rows,
        seed=seed,
    )
    named = console.pairs(inputs or [], "--inputs")
    columns = fitting.Columns(
        target=target.split(","),
        inputs={k: v.split(",") for k, v in named.items()} or None,
        group=group,
        split_by=split_by,
        id=id,
        classes=console.lines(classes),
    )
    with console.progress() as report:
        bundle = fitting.fit(
            model,
            data,
            out,
            options,
            name=name,
            version=version,
            fractions=dict(zip(fitting.ROLES, shares, strict=True)),
            columns=columns,
            cache_dir=cache,
            head=head,
            output=output,
            batch_size=batch_size,
            device=device,
            max_cache_bytes=None if max_cache is None else int(max_cache * 1e9),
            progress=report,
        )
    if json:
        console.print_json(bundle.manifest.model_dump(mode="json") | {"identity": bundle.identity})
    else:
        from hedged.commands.describe import describe

        describe(bundle)


fit.__doc__ = (fit.__doc__ or "") + "\n\n" + _EXAMPLES


def _options(model: Any, **values: Any) -> Any:
    """The options record; a usage error that names the option for a value out of range."""
    from pydantic import ValidationError

    try:
        return model(**values)
    except ValidationError as e:
        first = e.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise typer.BadParameter(f"--{option}: {first['msg']}") from None
