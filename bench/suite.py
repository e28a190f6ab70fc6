"""The developer suite: frozen models with cached rows, for every figure that spans data sets.

``python -m bench.suite [NAME …]`` prints what each set holds and how its frozen model does.
`bench.suite_sets` lists the sets.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from bench import networks
from bench import suite_tables as tables
from bench.assets import cached
from bench.material import Files, Known, open_known
from bench.suite_sets import SETS, Set, Trained
from calibration.material import Columns, parts_of, split
from calibration.scaling import fit_regression, fit_temperature, mean_nll, student_nll
from posthoc.contract import Features, HedgedError, Task


@dataclass(frozen=True, slots=True)
class Figures:
    """What a set holds, and its frozen model on the test rows of split 0: accuracy or R², mean
    NLL in nats as it stands (regression: Gaussian with the module rows' error variance) and with
    temperature (factor) fitted on calibration rows. ``groups`` and ``outside`` count them."""

    name: str
    task: Task
    rows: int
    groups: int
    outside: int
    features: int
    outputs: int
    score: float
    nll_frozen: float
    nll_scaled: float


def suite() -> tuple[Set, ...]:
    """Every set, classification first."""
    return SETS


def load(name: str, *, grouped: bool = True) -> Known:
    """A set's model and its cached rows, made on first use: `open_set` of the set of that name.

    Raises HedgedError for an unknown name, and saying what cannot be fetched.
    """
    return open_set(find(name), grouped=grouped)


def find(name: str) -> Set:
    """The set of that name, or HedgedError with the names there are."""
    for known in SETS:
        if known.name == name:
            return known
    raise HedgedError(
        f"no set is called {name!r}; there are {', '.join(known.name for known in SETS)}"
    )


def open_set(chosen: Set, *, grouped: bool = True) -> Known:
    """The set's model and its cached rows. A set with groups is split by them; ``grouped`` False
    splits it row by row, as sets without groups are."""
    files = files_of(chosen)
    inputs: dict[str, tuple[str, ...]] | None = None  # the model's inputs bear their columns' names
    if isinstance(chosen.origin, Trained):
        names = _columns(chosen, pq.read_schema(files.data).names)
        inputs = {_input(names): names}
    columns = Columns(
        target=chosen.target,
        inputs=inputs,
        split_by=chosen.group if grouped else None,
        classes=None if chosen.classes is None else chosen.classes(),
    )
    return open_known(files, chosen.task, columns)


def files_of(chosen: Set) -> Files:
    """The model and the tables, fetched and trained on first use."""
    origin = chosen.origin
    if not isinstance(origin, Trained):
        return origin()

    def make(folder: Path) -> None:
        _write(chosen, origin, folder)

    folder = cached(f"{chosen.name}-network-{origin.version}", make)
    return Files(
        folder / "model.onnx",
        folder / "data.parquet",
        None if origin.strange is None else folder / "strange.parquet",
        folder / "train.parquet",
    )


def _write(chosen: Set, origin: Trained, folder: Path) -> None:
    """Train the network and write ``model.onnx``, ``train``, ``data`` and ``strange.parquet``."""
    train, data = tables.share(origin.table(), origin.share, chosen.group)
    names = _columns(chosen, train.column_names)
    x = networks.matrix(train, names)
    y = np.array(train[chosen.target].to_numpy())
    network = networks.train(
        x, y if chosen.task == "classification" else y.reshape(-1, 1), origin.recipe
    )
    model = networks.export(network, x, _input(names))
    (folder / "model.onnx").write_bytes(model)
    pq.write_table(train, folder / "train.parquet", compression="zstd")
    pq.write_table(data, folder / "data.parquet", compression="zstd")
    if origin.strange is not None:
        strange = origin.strange().select(names)
        pq.write_table(strange, folder / "strange.parquet", compression="zstd")


def describe(chosen: Set) -> Figures:
    """What the set holds and how its frozen model does; groups are kept whole."""
    known = open_set(chosen)
    material = known.material
    parts, test = parts_of(material, split(material, 0))
    assert test.y is not None
    if chosen.task == "classification":
        score, frozen, scaled = _classifier(parts.calibration, test)
    else:
        score, frozen, scaled = _regressor(parts.module, parts.calibration, test)
    return Figures(
        name=chosen.name,
        task=chosen.task,
        rows=len(material.usable),
        groups=len(np.unique(material.cache.split_keys)) if chosen.group else 0,
        outside=0 if known.outside is None else len(known.outside),
        features=0 if test.phi is None else test.phi.shape[1],
        outputs=test.z.shape[1],
        score=score,
        nll_frozen=frozen,
        nll_scaled=scaled,
    )


def _classifier(calibration: Features, test: Features) -> tuple[float, float, float]:
    assert calibration.y is not None and test.y is not None
    temperature, _ = fit_temperature(calibration.z, calibration.y)
    accuracy = float((test.z.argmax(1) == test.y).mean())
    return accuracy, mean_nll(test.z, test.y), mean_nll(test.z / temperature, test.y)


def _regressor(
    module: Features, calibration: Features, test: Features
) -> tuple[float, float, float]:
    errors = [np.asarray(f.y, np.float64) - f.z for f in (module, calibration, test)]
    noise = (errors[0] ** 2).mean(0)
    factor = fit_regression(errors[1], noise, None).temperature
    explained = 1 - float((errors[2] ** 2).mean() / np.var(np.asarray(test.y), axis=0).mean())
    frozen, scaled = (student_nll(errors[2], noise * f**2, np.inf).mean() for f in (1.0, factor))
    return explained, float(frozen), float(scaled)


def _columns(chosen: Set, every: Sequence[str]) -> tuple[str, ...]:
    """The columns that the network reads."""
    return tuple(c for c in every if c not in (chosen.target, chosen.group))


def _input(names: tuple[str, ...]) -> str:
    """Name of the network's input: that of its one column, else ``features``."""
    return names[0] if len(names) == 1 else "features"


def main(names: list[str]) -> None:
    """Print a line for each set, as it is made."""
    heads = ("set", "rows", "groups", "outside", "D", "C", "acc. or R²", "NLL frozen", "scaled")
    print(f"{heads[0]:12}" + "".join(f"{h:>12}" for h in heads[1:]))
    for chosen in [find(name) for name in names] or suite():
        f = describe(chosen)
        counts = (f.rows, f.groups, f.outside, f.features, f.outputs)
        figures = (f.score, f.nll_frozen, f.nll_scaled)
        cells = [f"{c:12d}" for c in counts] + [f"{v:12.4f}" for v in figures]
        print(f"{f.name:12}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
