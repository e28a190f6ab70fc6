"""Options that several commands take of a frozen model and a table, and what they make of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hedged.commands import console
from hedged.commands.console import option

if TYPE_CHECKING:
    from calibration.material import Columns
    from posthoc.folds import Mapper

Model = Annotated[
    Path | None,
    typer.Argument(
        help="The frozen model: an ONNX file, module:factory (torch), or .pt2; none with --outputs"
    ),
]
Outputs = Annotated[
    str | None,
    option(
        help="In place of MODEL: columns a,b,c (or one of lists) of what it answered: logits, "
        "probabilities, means. The bundle takes them as input z"
    ),
]
Features = Annotated[
    str | None, option(help="With --outputs: columns of features, for scores; input phi")
]
Task = Annotated[str, option(help="classification or regression")]
Target = Annotated[str, option(help="Column of the labels; a,b for several outputs")]
Inputs = Annotated[
    list[str] | None,
    option(help="INPUT=col,col (repeatable): what fills it; default: all other columns"),
]
Classes = Annotated[Path | None, option(help="File of class names in output order, one a line")]
Id = Annotated[str | None, option("--id", help="Column of row ids")]
SplitBy = Annotated[
    str | None, option(help="Column whose equal values share a split; default: the row")
]
Head = Annotated[str | None, option(help="Graph node of the last linear layer; default: found")]
Output = Annotated[str | None, option(help="Graph output to use, where there are several")]
Checkpoint = Annotated[
    Path | None, option(help="Weights of module:factory: .safetensors, or a state_dict's .pt")
]
Example = Annotated[
    Path | None, option(help=".npz of input rows, where the table does not show their types")
]
Preprocess = Annotated[
    Path | None, option(help="ONNX file to run in front of the model, fused into the bundle")
]
TrustPickle = Annotated[
    bool, option("--trust-pickle", help="Load a .pt2 archive, which can run code")
]
CacheFolder = Annotated[
    Path | None, option(help="Folder of cached features; default: the XDG cache")
]
MaxCache = Annotated[float | None, option(help="Largest cache, in GB")]
BatchSize = Annotated[int, option(help="Rows in one run of the model")]
Device = Annotated[str, option(help="auto, cpu, cuda[:n] or tensorrt")]
Engine = Annotated[
    str, option(help="local (this process), or ray: workers here, or on the cluster of RAY_ADDRESS")
]
Workers = Annotated[
    int | None, option(min=1, help="Of --engine ray; default: one for each core (or device)")
]


def columns_of(
    model: Path | None,
    target: str,
    inputs: list[str] | None,
    *,
    outputs: str | None,
    features: str | None,
    split_by: str | None,
    group: str | None,
    id: str | None,
    classes: Path | None,
) -> Columns:
    """Which columns are what, as the options say it. A usage error where there is neither a model
    nor its outputs, or both."""
    from calibration.material import Columns

    if (model is None) == (outputs is None):
        raise typer.BadParameter(
            "give a MODEL, or --outputs with the columns of what it answered"
            + ", not both" * (model is not None)
        )
    if features is not None and outputs is None:
        raise typer.BadParameter("--features goes with --outputs; of a MODEL they are found")
    if outputs is not None and inputs:
        raise typer.BadParameter("--outputs and --features say what the inputs are; leave --inputs")
    given = {"z": outputs, "phi": features} if outputs else console.pairs(inputs or [], "--inputs")
    return Columns(
        target=target.split(","),
        inputs={k: v.split(",") for k, v in given.items() if v is not None} or None,
        split_by=split_by,
        group=group,
        id=id,
        classes=console.lines(classes),
    )


@contextmanager
def mapper_of(engine: str, workers: int | None, device: str) -> Iterator[Mapper | None]:
    """Who does the work that can be shared out; None: this process. A usage error for options that
    do not go together."""
    if engine not in ("local", "ray"):
        raise typer.BadParameter(f"--engine {engine} is unknown; there are local and ray")
    if engine == "local":
        if workers is not None:
            raise typer.BadParameter("--workers belongs to --engine ray")
        yield None
        return
    from posthoc.runtime import CPU, planned_provider
    from service.scoring.cluster import connect

    if ":" in device:
        raise typer.BadParameter(
            f"Ray chooses a worker's device; leave :n of --device {device} out"
        )
    with connect(workers, gpus=0 if planned_provider(device) == CPU else 1) as mapper:
        yield mapper


def record(model: Any, **values: Any) -> Any:
    """The options record; a usage error that names the option for a value out of range."""
    from pydantic import ValidationError

    try:
        return model(**values)
    except ValidationError as e:
        first = e.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise typer.BadParameter(f"--{option}: {first['msg']}") from None
