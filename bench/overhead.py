"""``python -m bench overhead``: throughput of the fused graph with every output over the bare one.

Both run in one process, in turn, on the same rows; 1 means that the error bars are free.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.material import Known, magika, mnist_net
from calibration.compile import compile_predictor
from calibration.fit import fit_material
from calibration.fit_head import FitOptions
from hedged.demo.overhead import throughput_ratio
from posthoc.data import open_table, to_rows

BATCH = 32


def run(quick: bool) -> dict[str, Any]:
    """Ratios at batch 32 for both models, and at batch 1 beside them."""
    found: dict[str, Any] = {}
    # A turn lasts long enough that the other session's threads, which spin for a while after
    # their last run, have given the cores back.
    for name, known, inner in (("magika", magika(), 2), ("mnistnet", mnist_net(), 200)):
        for batch in (BATCH, 1):
            figures = measure(known, batch, runs=7 if quick else 21, inner=inner)
            suffix = "" if batch == BATCH else f"_b{batch}"
            found[f"ratio_{name}{suffix}"] = figures.pop("ratio")
            found[f"{name}{suffix}"] = figures
    return found


def measure(known: Known, batch: int, *, runs: int, inner: int) -> dict[str, float]:
    """`throughput_ratio` of a model on its first rows."""
    material = known.material
    fitted, _, _ = fit_material(material, FitOptions(task="classification"))
    frozen = material.frozen
    fused = compile_predictor(
        fitted.head, frozen.model, opset=frozen.opset, phi=frozen.phi, z=frozen.z
    )
    first = next(iter(open_table(known.data).batches(batch)))
    mapping = material.mapping.inputs_only()
    inputs = {k: np.asarray(v) for k, v in to_rows(first, mapping, frozen.inputs).inputs.items()}
    names = [*fused.names.values(), *(s.name for s in frozen.outputs)]
    return throughput_ratio(
        frozen.model, fused.model, inputs, names, runs=runs, inner=inner if batch > 1 else 5 * inner
    )
