"""Network-level modules: read module rows, put samples of the network into its graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from calibration.fit_options import FitOptions
from posthoc import registry
from posthoc.contract import Array, DataError, FitError, Task
from posthoc.data import split_roles, to_rows
from posthoc.export import Keep
from posthoc.frozen import Frozen
from posthoc.model.samples import Samples
from posthoc.network.attach import Attached, NetworkRows
from posthoc.pixels import target_shape

_READ = 256
_BYTES = 1 << 30  # of raw inputs


def kept(options: FitOptions) -> Keep | None:
    """What the export of a torch model has to leave in the graph for this method."""
    if not at_network(options.method):
        return None
    settings = registry.settings(options.method, options.settings)
    found: Keep | None = registry.page(options.method).keep(settings)
    return found


def at_network(method: str) -> bool:
    """Whether a method puts noise into the network itself."""
    return method != "none" and "network" in registry.info(method).needs


def attached_model(
    frozen: Frozen,
    samples: Samples,
    options: FitOptions,
    *,
    classes: tuple[str, ...] | None,
    fractions: Mapping[str, float],
) -> Attached:
    """The frozen model with the samples of a network-level method beside it, fitted on the rows
    that ``fractions`` and the seed make module rows.

    Raises what the method's page and `module_rows` raise.
    """
    page = registry.page(options.method)
    rows = module_rows(frozen, samples, page.ROWS, options.task, classes, fractions, options.seed)
    settings = registry.settings(options.method, options.settings)
    found: Attached = page.attach(frozen, rows, options.task, settings)
    return found


def module_rows(
    frozen: Frozen,
    samples: Samples,
    limit: int,
    task: Task,
    classes: tuple[str, ...] | None,
    fractions: Mapping[str, float],
    seed: int,
) -> NetworkRows:
    """Raw inputs and labels of the first module rows without a fault: at most ``limit``, and one
    gigabyte. Raises DataError without a target, FitError where there is none."""
    mapping = samples.mapping(frozen.inputs)
    if not mapping.target:
        raise DataError("a fit needs labels: name their column with --target")
    how: dict[str, Any] = {"task": task, "classes": classes, "n_classes": max(2, frozen.z_dim)}
    if frozen.dense is not None:
        how["maps"] = target_shape(frozen.dense, task, frozen.z_dim)
    inputs: dict[str, list[Array]] = {s.name: [] for s in frozen.inputs}
    labels: list[Array] = []
    size = 0
    for batch in samples.table.batches(_READ, mapping.columns(target=True)):
        read = to_rows(batch, mapping, frozen.inputs, **how)
        keep = split_roles(read.split_keys, fractions, seed) == list(fractions).index("module")
        keep[list(read.bad)] = False
        if keep.any() and read.y is not None:
            for name, parts in inputs.items():
                parts.append(read.inputs[name][keep])
                size += parts[-1].nbytes
            labels.append(np.asarray(read.y)[keep])
        if sum(map(len, labels)) >= limit or size > _BYTES:
            break
    if not labels:
        raise FitError("no module rows to sample the network on: give more data or another --split")
    return NetworkRows(
        {k: np.concatenate(v)[:limit] for k, v in inputs.items()}, np.concatenate(labels)[:limit]
    )
