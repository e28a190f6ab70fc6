"""One split of a set of the developer suite, as the coverage benchmarks see it.

Probabilities are those of temperature scaling alone, standard deviations those of ``bayescap``. The
groups of rows are a column's where the set has one that a user would name, else thirds of the
length of the features, cut on calibration rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from bench.material import Known
from calibration.conformal.cells import group_codes
from calibration.fit_head import fit_head
from calibration.fit_options import FitOptions
from calibration.fit_thresholds import run_head
from calibration.material import ROLES, one_per_key, parts_of, split
from calibration.scaling import fit_temperature
from posthoc.contract import F64, I64, Array, Features, Task
from posthoc.links import softmax

COLUMNS = {
    "wa_churn": "contract",
    "diamonds": "cut",
    "deliveries": "day",
    "weather": "origin",
    "storms": "status",
    "bikeshare": "weathersit",
}


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one part: frozen features ``phi`` N×D and outputs ``z`` N×C, true classes N or
    targets N×K, their groups; and what is predicted: probabilities N×C, or means and standard
    deviations N×K."""

    phi: Array
    z: Array
    y: Array
    group: I64
    p: F64
    mean: Array
    std: Array

    def __len__(self) -> int:
        return len(self.z)

    def take(self, rows: Array) -> Rows:
        """Some of them."""
        return Rows(
            phi=self.phi[rows],
            z=self.z[rows],
            y=self.y[rows],
            group=self.group[rows],
            p=self.p[rows],
            mean=self.mean[rows],
            std=self.std[rows],
        )


@dataclass(frozen=True, slots=True)
class Split:
    """The four parts, the noise variance K of a regression and the temperature of a classifier."""

    task: Task
    module: Rows
    calibration: Rows
    conformal: Rows
    test: Rows
    noise: F64
    temperature: float | None = None


def split_rows(name: str, known: Known, task: Task, seed: int) -> Split:
    """The rows of a set in their parts, predicted."""
    material = known.material
    roles = split(material, seed)
    parts, test = parts_of(material, roles)
    features = (parts.module, parts.calibration, parts.conformal, test)
    indices = [material.usable[roles == i] for i in range(len(ROLES))]
    if material.mapping.split_by is not None:
        indices[2] = one_per_key(material.cache, indices[2])
    groups = _groups(name, known, features, indices)
    if task == "classification":
        assert parts.calibration.y is not None
        t, _ = fit_temperature(parts.calibration.z, parts.calibration.y)
        made = []
        for f, g in zip(features, groups, strict=True):
            assert f.phi is not None
            none, y = np.zeros((len(f), 0)), np.asarray(f.y, np.int64)
            made.append(Rows(f.phi, f.z, y, g, softmax(f.z / t), none, none))
        module, calibration, conformal, new = made
        return Split(task, module, calibration, conformal, new, np.zeros(0), t)
    fitted = fit_head(None, parts, FitOptions(task=task, method="bayescap", ood="none"))
    assert fitted.head.noise is not None
    made = []
    for f, g in zip(features, groups, strict=True):
        assert f.phi is not None
        out, y = run_head(fitted.head, f), np.asarray(f.y, np.float64)
        made.append(Rows(f.phi, f.z, y, g, np.zeros((len(f), 0)), out["mean"], out["std"]))
    module, calibration, conformal, new = made
    noise = np.asarray(fitted.head.noise, np.float64)
    return Split(task, module, calibration, conformal, new, noise)


def _groups(
    name: str, known: Known, features: tuple[Features, ...], indices: list[Array]
) -> list[I64]:
    if name in COLUMNS:
        codes, _, _ = group_codes(column(known, COLUMNS[name]))
        return [codes[rows] for rows in indices]
    length = [np.sqrt((np.asarray(f.phi, np.float64) ** 2).sum(1)) for f in features]
    cuts = np.quantile(length[1], [1 / 3, 2 / 3])
    return [np.searchsorted(cuts, v).astype(np.int64) for v in length]


def column(known: Known, name: str) -> Array:
    """A column of the set's table, put together again from columns of 0 and 1 where it was one of
    texts (`bench.suite_tables`); a level too rare for a column of its own is the last."""
    names = pq.read_schema(known.data).names
    if name in names:
        whole = np.asarray(pq.read_table(known.data, columns=[name])[name].to_numpy())
        return np.unique(whole, return_inverse=True)[1].astype(np.int64)
    levels = [n for n in names if n.startswith(f"{name}=")]
    table = pq.read_table(known.data, columns=levels)
    flags = np.stack([table[level].to_numpy() for level in levels], axis=1)
    return np.where(flags.any(1), flags.argmax(1), len(levels)).astype(np.int64)
