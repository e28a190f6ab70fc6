"""Network-level modules: read module rows, put samples of the network into its graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    width = max(2, frozen.z_dim)
    if classes is not None and len(classes) != width:  # before anything is trained
        raise DataError(f"--classes names {len(classes)} classes and the model has {width} outputs")
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
    """Raw inputs and labels of at most ``limit`` module rows without a fault, and one gigabyte:
    those with the smallest hashes of their content, so that they are a random sample however the
    table is ordered. Where the sizes of rows are free, those of the first row's sizes.

    Raises DataError without a target, FitError where there is no such row.
    """
    mapping = samples.mapping(frozen.inputs)
    if not mapping.target:
        raise DataError("a fit needs labels: name their column with --target")
    how: dict[str, Any] = {"task": task, "classes": classes, "n_classes": max(2, frozen.z_dim)}
    if frozen.dense is not None:
        how["maps"] = target_shape(frozen.dense, task, frozen.z_dim)
    names = [s.name for s in frozen.inputs]
    held: list[tuple[Array, NetworkRows]] = []
    largest = np.iinfo(np.uint64).max  # that a hash may be
    for batch in samples.table.batches(_READ, mapping.columns(target=True)):
        read = to_rows(batch, mapping, frozen.inputs, **how)
        keep = split_roles(read.split_keys, fractions, seed) == list(fractions).index("module")
        keep[list(read.bad)] = False
        keep &= read.content_hashes <= largest
        if not keep.any() or read.y is None:
            continue
        part = NetworkRows({n: read.inputs[n][keep] for n in names}, np.asarray(read.y)[keep])
        if held and _sizes(part) != _sizes(held[0][1]):
            continue
        held.append((read.content_hashes[keep], part))
        limit = min(limit, max(1, _BYTES * len(part) // _bytes(part)))
        if sum(len(k) for k, _ in held) > limit + limit // 4:
            held = [_smallest(held, limit)]
            largest = held[0][0][-1]
    if not held:
        raise FitError("no module rows to sample the network on: give more data or another --split")
    return _smallest(held, limit)[1]


def _smallest(held: Sequence[tuple[Array, NetworkRows]], limit: int) -> tuple[Array, NetworkRows]:
    """The rows with the ``limit`` smallest hashes, in their order."""
    hashes = np.concatenate([k for k, _ in held])
    order = np.argsort(hashes, kind="stable")[:limit]
    inputs = {n: np.concatenate([p.inputs[n] for _, p in held])[order] for n in held[0][1].inputs}
    labels = np.concatenate([p.y for _, p in held if p.y is not None])[order]
    return hashes[order], NetworkRows(inputs, labels)


def _sizes(rows: NetworkRows) -> list[tuple[int, ...]]:
    labels = () if rows.y is None else (rows.y,)
    return [a.shape[1:] for a in (*rows.inputs.values(), *labels)]


def _bytes(rows: NetworkRows) -> int:
    return max(1, sum(a.nbytes for a in rows.inputs.values()))
