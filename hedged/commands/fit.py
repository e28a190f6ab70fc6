"""``hedged fit``: a frozen model and labelled rows in, a bundle out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hedged.commands import console, options
from hedged.commands.console import option

_MORE = """The rows must be labelled and must not be those that the model was trained on. They are
split four ways by a hash: to fit the module, to calibrate it, for the conformal ranks, to measure.

\b
Examples:
  hedged fit model.onnx --data held-out.parquet --task classification \\
      --target label --classes names.txt -o bundle
  hedged fit model.onnx --data held-out.parquet --task regression \\
      --target price --alpha .1,.05 --tolerance 500 -o bundle
  hedged fit boosted.onnx --data held-out.npz --task classification \\
      --target y --method none -o bundle
  hedged fit mine:make_net --checkpoint net.safetensors --data held-out.npz \\
      --task classification --target y --method vbll --prediction module \\
      -o bundle
  hedged fit --outputs score_a,score_b,score_c --features embedding \\
      --data answered.parquet --task classification --target label -o bundle
  hedged fit model.onnx --data rows/ --task classification --target label \\
      --engine ray --cache /shared/cache -o bundle

\b
With --engine ray the model runs on workers, which write into one cache: on
several machines give --cache a folder that all of them have. Sums over rows
(Laplace, Gaussian and Student-t heads, every score, the figures of the test
rows) are taken there too; what iterates, thresholds and the choice of a score
stay in the command's own process. The bundle is that of one process, up to
rounding.

Each option is also a variable: HEDGED_FIT_METHOD for --method.
"""


def fit(
    data: Annotated[Path, option(help="Labelled rows: .parquet, a folder of them, .csv or .npz")],
    task: options.Task,
    target: options.Target,
    out: Annotated[Path, option("--out", "-o", help="Bundle folder to write")],
    model: options.Model = None,
    outputs: options.Outputs = None,
    features: options.Features = None,
    inputs: options.Inputs = None,
    classes: options.Classes = None,
    group: Annotated[
        str | None, option(help="Column of groups that are known beforehand: --given group")
    ] = None,
    id: options.Id = None,
    split_by: options.SplitBy = None,
    split: Annotated[
        str, option(help="Shares of module, calibration, conformal and test rows")
    ] = ".3,.2,.25,.25",
    method: Annotated[
        str | None,
        option(
            help="Module (see hedged modules), or none: scaling alone; default: laplace, with "
            "--outputs none"
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        option("--set", help="KEY=VALUE (repeatable): the module's own, see hedged modules NAME"),
    ] = None,
    prediction: Annotated[
        str, option(help="Whose answer is served: frozen, or module (where it refits the head)")
    ] = "frozen",
    predictive: Annotated[
        str, option(help="Logits to probabilities: probit, probit_class, mc or bridge")
    ] = "probit",
    scaling: Annotated[
        str,
        option(
            help="After the temperature: temperature (nothing), ets, svs, sms; two classes: beta, "
            "isotonic; auto: what surely gains; none: the frozen model"
        ),
    ] = "temperature",
    confidence: Annotated[
        str,
        option(help="Of the label: probs (its probability), or beta, isotonic (top against all)"),
    ] = "probs",
    draws: Annotated[int | None, option(help="Fixed logit draws; default 16, with mc 64")] = None,
    import_laplace: Annotated[
        Path | None,
        option(help="Posterior fitted with laplace-torch (its state_dict) in place of --method"),
    ] = None,
    weights: Annotated[
        str | None,
        option(help="Torch models: all or subnetwork, sampled through laplace-torch"),
    ] = None,
    samples: Annotated[
        int | None, option(help="Weight sets that --weights draws; default 10")
    ] = None,
    curvature: Annotated[
        str | None, option(help="Of --weights: kron, diag or full; default kron, subnetwork full")
    ] = None,
    conformal: Annotated[
        str | None,
        option(
            help="Sets: lac (default), aps, raps, saps, topk; intervals: residual (default), "
            "absolute, cqr, cdf"
        ),
    ] = None,
    side: Annotated[str, option(help="Ends of an interval: two, lower or upper")] = "two",
    recalibration: Annotated[
        str, option(help="Of quantiles: emp (exact ranks), linear or kde (smooth)")
    ] = "emp",
    quantiles: Annotated[
        str, option(help="Levels of the quantiles that are served")
    ] = ".05,.25,.5,.75,.95",
    given: Annotated[
        str | None,
        option(help="Thresholds of their own, and a promise, for each class, cluster or group"),
    ] = None,
    shift: Annotated[
        str | None,
        option(help="Weigh rows for production that differs in target (classes) or covariate"),
    ] = None,
    production: Annotated[
        Path | None, option(help="Rows without labels that --shift is learnt from")
    ] = None,
    randomised: Annotated[
        bool, option("--randomised", help="Sets by randomised scores: smaller, by a number a row")
    ] = False,
    mask: Annotated[
        str | None,
        option(help="Segmentation: class whose pixels the sets are to hold; alpha is their share"),
    ] = None,
    pixels: Annotated[
        int | None, option(min=2, help="Dense models: pixels drawn from each image; default 256")
    ] = None,
    alpha: Annotated[
        str, option(help="Miss rates of sets or intervals; the first is the default")
    ] = ".1,.05",
    ood: Annotated[
        str,
        option(help="Strangeness: auto, a score, a+b (their mean), rank:a+b (of ranks), or none"),
    ] = "auto",
    ood_data: Annotated[
        list[str] | None,
        option(help="name=PATH of strange rows (repeatable) that --ood auto is chosen by too"),
    ] = None,
    corrupt: Annotated[
        str | None,
        option(help="Corrupted copies of your rows help to choose --ood auto: all, or kinds a,b"),
    ] = None,
    ood_alpha: Annotated[float, option(help="Share of clean rows that may be flagged")] = 0.05,
    ood_delta: Annotated[float, option(help="Chance that more are flagged")] = 0.05,
    max_error: Annotated[
        float | None,
        option(help="Share of answered rows that may be wrong; default .05, 0: never abstain"),
    ] = None,
    error_delta: Annotated[float, option(help="Chance that more are wrong")] = 0.05,
    tolerance: Annotated[
        float | None, option(help="Regression: a larger error is wrong; without it none abstain")
    ] = None,
    train_data: Annotated[
        Path | None,
        option(help="Rows the network was trained on, for the curvature only; labels not needed"),
    ] = None,
    train_rows: Annotated[
        int | None, option(help="Rows the network was trained on; short for --set train_rows=N")
    ] = None,
    prior_precision: Annotated[
        float | None, option(help="Of the posterior; short for --set prior_precision=P")
    ] = None,
    head: options.Head = None,
    output: options.Output = None,
    checkpoint: options.Checkpoint = None,
    example: options.Example = None,
    preprocess: options.Preprocess = None,
    trust_pickle: options.TrustPickle = False,
    name: Annotated[str | None, option(help="Model name; default: that of the file")] = None,
    version: Annotated[str, option(help="Version of the bundle")] = "1",
    seed: Annotated[
        int, option(help="Of the split and of fixed logit draws; a module's own: --set seed")
    ] = 0,
    cache: options.CacheFolder = None,
    max_cache: options.MaxCache = None,
    batch_size: options.BatchSize = 256,
    device: options.Device = "cpu",
    engine: options.Engine = "local",
    workers: options.Workers = None,
    json: Annotated[bool, option("--json", help="Print the manifest as JSON")] = False,
) -> None:
    """Fit error bars for a frozen model and write one bundle."""
    from calibration import fit as fitting
    from calibration.fit_options import FitOptions
    from calibration.material import ROLES
    from calibration.sampling import Sampling

    shares = console.numbers(split, "--split")
    if len(shares) != len(ROLES) or abs(sum(shares) - 1) > 1e-6 or min(shares) <= 0:
        raise typer.BadParameter(f"--split takes four positive shares that sum to 1, not {split}")
    own = dict(console.pairs(settings or [], "--set"))
    for key, value in (("prior_precision", prior_precision), ("train_rows", train_rows)):
        if value is not None and key in own:
            raise typer.BadParameter(
                f"--{key.replace('_', '-')} and --set {key} say the same twice"
            )
        if value is not None:
            own[key] = str(value)
    _together(
        method=method, weights=weights, samples=samples, curvature=curvature, of=import_laplace
    )
    levels = console.numbers(alpha, "--alpha")
    if max(levels) > 0.5:
        console.err.print(
            f"[yellow]--alpha is the share that is missed: {max(levels):g} promises a coverage of "
            f"{1 - max(levels):.3g}[/]"
        )
    if task == "regression" and max_error and tolerance is None:
        raise typer.BadParameter("--max-error of a regression needs --tolerance: what is wrong")
    asked = options.record(
        FitOptions,
        task=task,
        method=method or _method(outputs, weights),
        settings=own,
        prediction=prediction,
        predictive=predictive,
        scaling=scaling,
        confidence=confidence,
        draws=draws,
        conformal=conformal,
        side=side,
        recalibration=recalibration,
        quantile_levels=console.numbers(quantiles, "--quantiles"),
        given=given,
        shift=shift,
        randomised=randomised,
        mask=_class(mask, console.lines(classes)),
        alphas=levels,
        ood=ood,
        ood_alpha=ood_alpha,
        ood_delta=ood_delta,
        max_error=0.05 if max_error is None else max_error or None,
        error_delta=error_delta,
        tolerance=tolerance,
        seed=seed,
    )
    sampling = None
    if weights is not None:
        drawn = {} if samples is None else {"samples": samples}
        sampling = options.record(Sampling, weights=weights, curvature=curvature, **drawn)
    columns = options.columns_of(
        model,
        target,
        inputs,
        outputs=outputs,
        features=features,
        split_by=split_by,
        group=group,
        id=id,
        classes=classes,
    )
    with options.mapper_of(engine, workers, device) as mapper, console.progress() as report:
        bundle = fitting.fit(
            model,
            data,
            out,
            asked,
            name=name,
            version=version,
            fractions=dict(zip(ROLES, shares, strict=True)),
            columns=columns,
            cache_dir=cache,
            head=head,
            output=output,
            checkpoint=checkpoint,
            example=example,
            preprocess=preprocess,
            trust_pickle=trust_pickle,
            laplace=import_laplace,
            train_data=train_data,
            production=production,
            sampling=sampling,
            ood_data=console.pairs(ood_data or [], "--ood-data"),
            corrupt=corrupt == "all" or (tuple(corrupt.split(",")) if corrupt else False),
            pixels=pixels,
            batch_size=batch_size,
            device=device,
            threads=0 if mapper is None else 1,
            mapper=mapper,
            max_cache_bytes=None if max_cache is None else int(max_cache * 1e9),
            progress=report,
        )
    if json:
        console.print_json(bundle.manifest.model_dump(mode="json") | {"identity": bundle.identity})
    else:
        from hedged.commands.describe import describe

        describe(bundle)


fit.__doc__ = f"{fit.__doc__}\n\n{_MORE}"


def _method(outputs: str | None, weights: str | None) -> str:
    """The module where none was asked for: without a model nothing has a head."""
    if weights is not None:
        return "weights"
    return "laplace" if outputs is None else "none"


def _together(
    *,
    method: str | None,
    weights: str | None,
    samples: int | None,
    curvature: str | None,
    of: Path | None,
) -> None:
    """A usage error for options that would be ignored beside the others."""
    for name, given in (("--samples", samples), ("--curvature", curvature)):
        if given is not None and weights is None:
            raise typer.BadParameter(f"{name} belongs to --weights")
    if weights is not None and method not in (None, "weights"):
        raise typer.BadParameter(f"--weights stands in place of --method {method}; leave one out")
    if of is not None and (method is not None or weights is not None):
        raise typer.BadParameter(
            "--import-laplace stands in place of --method and --weights; leave them out"
        )


def _class(text: str | None, names: tuple[str, ...] | None) -> int | None:
    """The index of a class given by its name or index."""
    if text is None:
        return None
    if names and text in names:
        return names.index(text)
    if not text.isdigit():
        known = f"; there are {', '.join(names)}" if names else " (names need --classes)"
        raise typer.BadParameter(f"--mask {text} is no class{known}")
    return int(text)
