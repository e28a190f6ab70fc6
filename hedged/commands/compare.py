"""``hedged compare``: which module, scaling and score to deploy for this model and data."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from hedged.commands import console, options
from hedged.commands.console import option

if TYPE_CHECKING:
    from calibration.comparison.records import Comparison, Standing

_SHOWN = {
    "classification": ("nll", "brier", "ece", "accuracy", "set_size"),
    "regression": ("nll", "crps", "rmse", "width"),
}
_ELSEWHERE = {
    "classification": ("accuracy", "nll", "ece", "coverage", "set_size"),
    "regression": ("rmse", "nll", "coverage", "width"),
}
_BEST_SCORES = 10
_MORE = """A part of the items is locked away; the rest is split again and again, and every
candidate is fitted and measured on each split. What is not surely worse than the best is marked ~.
The recommended one is fitted once more and measured on the locked rows. Labelled rows must not be
those that the model was trained on.

\b
Examples:
  hedged compare model.onnx --data held-out.parquet --task classification \\
      --target label --classes names.txt -o comparison
  hedged compare model.onnx --data held-out.parquet --task classification \\
      --target label --corrupt all --ood-data fonts=fonts.parquet
  hedged compare model.onnx --data mild=summer.parquet \\
      --data cold=winter.parquet --task classification --target label
  hedged compare model.onnx --data held-out.parquet --task regression \\
      --target price --methods laplace,student_t --by crps --splits 10

Each option is also a variable: HEDGED_COMPARE_SPLITS for --splits.
"""


def compare(
    data: Annotated[
        list[str],
        option(
            help="Labelled rows: .parquet, a folder of them, .csv or .npz. Further ones, "
            "name=PATH, are measured beside them and rank nothing"
        ),
    ],
    task: options.Task,
    target: options.Target,
    out: Annotated[
        Path, option("--out", "-o", help="Folder of comparison.json, modules.csv and scores.csv")
    ] = Path("comparison"),
    model: options.Model = None,
    outputs: options.Outputs = None,
    features: options.Features = None,
    methods: Annotated[
        str | None, option(help="Modules to compare, a,b,c; default: all that fit the model")
    ] = None,
    scaling: Annotated[
        str | None,
        option(help="Families after each module, a,b; default: all that the rows support"),
    ] = None,
    scores: Annotated[
        str | None, option(help="Scores to compare, a,b+c; default: all; none: no scores")
    ] = None,
    by: Annotated[
        str, option(help="Loss that ranks: nll or brier; of a regression nll or crps")
    ] = "nll",
    splits: Annotated[int, option(min=2, help="Re-splits")] = 5,
    locked: Annotated[float, option(help="Share of the items that is locked away")] = 0.2,
    ood_data: Annotated[
        list[str] | None,
        option(help="name=PATH of strange rows (repeatable): half choose a score, half test it"),
    ] = None,
    corrupt: Annotated[
        str | None,
        option(help="Corrupted copies of your rows, for scores and beside them: all, or kinds a,b"),
    ] = None,
    prediction: Annotated[
        str, option(help="frozen, or module: one that changes the answer may be recommended")
    ] = "frozen",
    inputs: options.Inputs = None,
    classes: options.Classes = None,
    group: Annotated[str | None, option(help="Column of groups: not an input")] = None,
    id: options.Id = None,
    split_by: options.SplitBy = None,
    alpha: Annotated[str, option(help="Miss rate of the sets or intervals that are measured")] = (
        ".1"
    ),
    conformal: Annotated[
        str | None, option(help="What sets or intervals are made of, see hedged fit")
    ] = None,
    checkpoint: options.Checkpoint = None,
    preprocess: options.Preprocess = None,
    example: options.Example = None,
    trust_pickle: options.TrustPickle = False,
    output: options.Output = None,
    head: options.Head = None,
    seed: Annotated[int, option(help="Of the first re-split; the others follow")] = 0,
    workers: Annotated[int | None, option(min=1, help="Processes; default: one a core")] = None,
    cache: options.CacheFolder = None,
    max_cache: options.MaxCache = None,
    batch_size: options.BatchSize = 256,
    device: options.Device = "cpu",
    json: Annotated[bool, option("--json", help="Print everything as JSON")] = False,
) -> None:
    """Rank every module, scaling and score for a frozen model, and recommend one."""
    from calibration.compare import compare as run
    from calibration.comparison.contest import Asked
    from calibration.comparison.tables import write_tables
    from calibration.fit_options import FitOptions
    from hedged.commands.evaluate import named_sets

    settings = options.record(
        FitOptions,
        task=task,
        method="none",
        conformal=conformal,
        alphas=console.numbers(alpha, "--alpha"),
        seed=seed,
    ).model_copy(update={"prediction": _one_of(prediction, "--prediction", "frozen", "module")})
    first, *others = named_sets(data).items()
    asked = Asked(
        methods=_names(methods),
        scalings=_names(scaling),
        scores=() if scores == "none" else _names(scores),
        by=by,
        splits=splits,
        locked=locked,
        labelled=dict(others),
        ood_data=console.pairs(ood_data or [], "--ood-data"),
        corrupt=corrupt == "all" or _names(corrupt) or False,
        workers=workers,
    )
    with console.progress() as report:
        found = run(
            model,
            first[1],
            settings,
            asked,
            columns=options.columns_of(
                model,
                target,
                inputs,
                outputs=outputs,
                features=features,
                split_by=split_by,
                group=group,
                id=id,
                classes=classes,
            ),
            checkpoint=checkpoint,
            preprocess=preprocess,
            example=example,
            trust_pickle=trust_pickle,
            output=output,
            head=head,
            cache_dir=cache,
            max_cache_bytes=None if max_cache is None else int(max_cache * 1e9),
            batch_size=batch_size,
            device=device,
            progress=report,
        )
    write_tables(out, found)
    if json:
        console.print_json(found.model_dump(mode="json"))
    else:
        words: dict[str, object] = {
            "data": first[1],
            "task": task,
            "target": target,
            "inputs": inputs,
            "outputs": outputs,
            "features": features,
            "classes": classes,
            "group": group,
            "id": id,
            "split-by": split_by,
            "output": output,
            "head": head,
            "checkpoint": checkpoint,
            "preprocess": preprocess,
            "example": example,
            "trust-pickle": trust_pickle,
        }
        show(found, _command(model, words))
        console.out.print(f"tables: {out}")


def _command(model: Path | None, words: Mapping[str, object]) -> str:
    """What of the command that was typed a fit needs, too."""
    found = ["hedged", "fit", *([] if model is None else [str(model)])]
    for name, value in words.items():
        for one in value if isinstance(value, list) else [value]:
            if one is True:
                found.append(f"--{name}")
            elif one is not None and one is not False:
                found += [f"--{name}", str(one)]
    return shlex.join(found)


compare.__doc__ = f"{compare.__doc__}\n\n{_MORE}"


def show(found: Comparison, fit: str) -> None:
    """The leaderboards, the locked figures and the recommendation: ``fit`` and further options."""
    say = console.out.print
    say(_modules(found))
    if found.scores:
        say(_scores(found))
    for name, about in found.proxies.items():
        say(f"  {name}: {about}", markup=False)
    failed = [(s.name, s.errors) for s in found.standings]
    failed += [(s.score, s.errors) for s in found.scores]
    for name, errors in failed:
        for why in errors:
            say(f"✗ {name}: {why}", markup=False)
    if told := found.about.get("rows"):
        say(told, style="yellow", markup=False)
    if found.left_out:
        say("not compared: " + "; ".join(f"{k} {v}" for k, v in found.left_out.items()))
    say(f"\n[bold]on {found.locked:,} locked rows[/], which chose nothing (95 % intervals)")
    for f in found.final:
        loss = f.metrics[found.by]
        beside = ""
        if f.to_baseline is not None:
            d = f.to_baseline
            beside = f", to scaling alone {d.value:+.4f} ({d.low:+.4f} to {d.high:+.4f})"
        say(f"  {f.name}: {found.by} {loss.value:.4f} ({loss.low:.4f} to {loss.high:.4f}){beside}")
        for name, a in f.ood.items():
            if name in f.others:
                continue  # in the table below
            say(f"    tells {name}: AUROC {a.value:.4f} ({a.low:.4f} to {a.high:.4f})")
    if any(f.others for f in found.final):
        say(_elsewhere(found))
    advice = found.recommendation
    flags = " ".join(f"--{k} {v}" for k, v in advice.options.items())
    say("\n[bold]recommended:[/]", escape(f"{fit} {flags} -o bundle"), soft_wrap=True)
    for reason in advice.reasons:
        say(f"  because {reason}", soft_wrap=True, markup=False)


def _modules(found: Comparison) -> Table:
    table = Table(
        title=(
            f"{found.rows:,} rows, {found.splits} re-splits, ranked by {found.by}, mean ± s.d. "
            "over splits (~: not surely worse than the best)"
        ),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    losses = {"nll", "brier", "crps"} - {found.by}  # the others are in modules.csv
    columns = [
        c
        for c in _SHOWN[found.task]
        if c not in losses and any(c in s.figures for s in found.standings)
    ]
    for name in ("", "module", *columns, "to scaling alone", "ms/row"):
        table.add_column(name, no_wrap=True)
    for s in found.standings:
        mark = "✗" if s.rank is None else f"{s.rank}{'~' * (s.tied and s.rank > 1)}"
        name = s.name + ("" if s.keeps else " *")
        if s.rank is None:
            table.add_row(mark, name)
            continue
        figures = (_figure(s, c, spread=c == found.by) for c in columns)
        table.add_row(mark, name, *figures, *_beside(s))
    table.caption = "* changes the model's answer"
    if found.bare_ms_per_row is not None:
        table.caption += f"; the model alone takes {found.bare_ms_per_row:.3f} ms a row"
    return table


def _beside(s: Standing) -> tuple[str, str]:
    d = s.to_baseline
    apart = "" if d is None else f"{d.value:+.4f} ({d.low:+.4f}, {d.high:+.4f})"
    spent = "" if s.ms_per_row is None else f"{s.ms_per_row:.3f}"
    return apart, spent


def _scores(found: Comparison) -> Table:
    table = Table(
        title="scores: AUROC, mean ± s.d. over splits",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    sets = list(dict.fromkeys(name for s in found.scores for name in s.auroc))
    table.add_column("")
    table.add_column("score", no_wrap=True)
    table.add_column("mean", no_wrap=True)
    for name in sets:
        table.add_column(name)
    for s in found.scores:
        if s.rank is None or s.mean is None:
            continue
        if s.rank <= _BEST_SCORES:
            cells = (f"{s.auroc[name].mean:.3f}" if name in s.auroc else "" for name in sets)
            mean = f"{s.mean.mean:.3f} ± {s.mean.sd:.3f}"
            table.add_row(str(s.rank), s.score, mean, *cells)
    if len(found.scores) > _BEST_SCORES:
        table.caption = f"the best {_BEST_SCORES} of {len(found.scores)}; all are in scores.csv"
    return table


def _elsewhere(found: Comparison) -> Table:
    """What the systems of the locked rows do on corrupted copies of these, and on further sets."""
    table = Table(
        title="the same on further rows, where nothing is promised",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    columns = [c for c in _ELSEWHERE[found.task] if c in found.final[0].metrics]
    for name in ("rows", "system", *columns, "told apart, AUROC"):
        table.add_column(name, no_wrap=True)
    for name in ("locked rows", *dict.fromkeys(n for f in found.final for n in f.others)):
        for f in found.final:
            figures = f.others.get(name) or {k: v.value for k, v in f.metrics.items()}
            auroc = f"{f.ood[name].value:.3f}" if name in f.ood else ""
            cells = (f"{figures[c]:.4f}" if c in figures else "" for c in columns)
            table.add_row(name, f.name, *cells, auroc)
    return table


def _figure(s: Standing, name: str, *, spread: bool) -> str:
    if name not in s.figures:
        return ""
    found = s.figures[name]
    return f"{found.mean:.4f}" + f" ± {found.sd:.4f}" * spread


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(t for t in text.split(",") if t)


def _one_of(value: str, flag: str, *known: str) -> Any:
    if value not in known:
        raise typer.BadParameter(f"{flag} is {' or '.join(known)}, not {value}")
    return value
