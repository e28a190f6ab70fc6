"""``python -m bench overhead``: throughput of the fused graph with every output over the bare one.

Both run in one process, in turn, on the same rows; 1 means that the error bars are free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bench import resnet
from bench.material import Known, magika, mnist_net
from calibration.compile import behind
from calibration.fit import fit_material
from calibration.fit_head import fit_head
from calibration.fit_options import FitOptions, Parts
from calibration.fit_thresholds import Fitted
from hedged.demo.overhead import throughput_ratio
from posthoc.contract import Array
from posthoc.data import open_table, to_rows
from posthoc.frozen import Frozen, open_frozen

BATCH = 32
OPTIONS = FitOptions(task="classification")
RESNET_ROWS = 1_000  # of each part; more make a better fit, not another speed


def run(quick: bool) -> dict[str, Any]:
    """Ratios at batch 32 for three models, and at batch 1 beside them."""
    found: dict[str, Any] = {}
    # A turn lasts long enough that the other session's threads, which spin for a while after
    # their last run, have given the cores back.
    for name, subject, inner in (
        ("magika", _known(magika()), 2),
        ("mnistnet", _known(mnist_net()), 200),
        ("resnet18", _resnet18(), 1),
    ):
        frozen, fitted, rows = subject
        for batch in (BATCH, 1):
            figures = measure(
                frozen,
                fitted,
                {name: value[:batch] for name, value in rows.items()},
                runs=7 if quick else 21,
                inner=inner if batch > 1 else 5 * inner,
            )
            suffix = "" if batch == BATCH else f"_b{batch}"
            found[f"ratio_{name}{suffix}"] = figures.pop("ratio")
            found[f"{name}{suffix}"] = figures
    return found


def measure(
    frozen: Frozen, fitted: Fitted, inputs: Mapping[str, Array], *, runs: int, inner: int
) -> dict[str, float]:
    """`throughput_ratio` of a model on the given rows, every output of both graphs asked for."""
    fused = behind(fitted.head, frozen)
    names = [*fused.names.values(), *(s.name for s in frozen.outputs)]
    return throughput_ratio(frozen.model, fused.model, inputs, names, runs=runs, inner=inner)


def _known(known: Known) -> tuple[Frozen, Fitted, dict[str, Array]]:
    """A real model, its head fitted on its cached rows, and the first rows of its data."""
    material = known.material
    fitted, _, _ = fit_material(material, OPTIONS)
    first = next(iter(open_table(known.data).batches(BATCH)))
    rows = to_rows(first, material.mapping.inputs_only(), material.frozen.inputs)
    return material.frozen, fitted, {k: np.asarray(v) for k, v in rows.inputs.items()}


def _resnet18() -> tuple[Frozen, Fitted, dict[str, Array]]:
    """The random network with 1,000 classes, its head fitted on made-up rows."""
    frozen = open_frozen(resnet.model(), task="classification")
    assert frozen.head is not None
    module, calibration, conformal = (resnet.rows(frozen.head, RESNET_ROWS, s) for s in range(3))
    fitted = fit_head(frozen.head, Parts(module, calibration, conformal), OPTIONS)
    return frozen, fitted, {"image": resnet.images(BATCH)}
