"""A frozen model with S noisy samples of itself beside it: what network-level modules make."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from posthoc.contract import Array, ModelError
from posthoc.frozen import Frozen
from posthoc.network.fold import Noise, believe, sampled
from posthoc.network.sites import Site

MEMBERS = "hedged/members"
PROBE = 8  # rows that a graph is checked on
MAX_NUMBERS = 50_000_000  # of stored noise: 200 MB in the graph


@dataclass(frozen=True, slots=True)
class NetworkRows:
    """Raw inputs of module rows by name, and their labels: classes (N, or maps below 0 where a
    pixel has none) or values."""

    inputs: dict[str, Array]
    y: Array | None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def take(self, index: Array | slice) -> NetworkRows:
        """Some of the rows."""
        return NetworkRows(
            {k: v[index] for k, v in self.inputs.items()}, None if self.y is None else self.y[index]
        )


@dataclass(frozen=True, slots=True)
class Attached:
    """The model whose features are its members' outputs, what was fitted, and facts for the
    user."""

    frozen: Frozen
    tensors: dict[str, Array]
    facts: dict[str, Any]


def channel_axis(frozen: Frozen) -> int:
    """The axis of z that holds the channels. Raises ModelError for a model whose outputs cannot be
    sampled: probabilities without logits, and maps without a channel axis."""
    if frozen.z_is_probs:
        raise ModelError(
            f"output {frozen.output!r} gives probabilities and the logits behind them were not "
            "found; name an output of logits with --output"
        )
    if frozen.dense is None:
        return 1
    if frozen.dense.axis is None:
        raise ModelError(
            f"output {frozen.output!r} is a map without an axis of channels; export it as N×1×H×W"
        )
    return frozen.dense.axis


def attach(
    frozen: Frozen,
    sites: Mapping[str, Site],
    noises: Mapping[str, Noise],
    rows: NetworkRows,
    *,
    note: str,
) -> Frozen:
    """The frozen model with the samples that ``noises`` make, checked on a few rows.

    Raises ModelError where the noise takes too much room, and where a sample does not do in the
    graph what it should: see `posthoc.network.fold`.
    """
    axis = channel_axis(frozen)
    check_room({sites[t].node: sum(x.size for x in noises[t].terms().values()) for t in noises})
    probe = rows.take(slice(0, PROBE)).inputs
    model = sampled(frozen.model, frozen.z, noises, MEMBERS, axis=axis, rows=probe)
    believe(frozen.model, model, probe, output=frozen.z, members=MEMBERS, noises=noises, axis=axis)
    samples = next(len(t) for n in noises.values() for t in n.terms().values())
    proto = onnx.load_from_string(model)
    kept = [o for o in proto.graph.output if o.name != MEMBERS]
    del proto.graph.output[:]
    proto.graph.output.extend(kept)
    dense = frozen.dense
    return dataclasses.replace(
        frozen,
        model=proto.SerializeToString(),
        phi=MEMBERS,
        phi_dim=samples * frozen.z_dim,
        head=None,
        head_node=None,
        notes=(*frozen.notes, note),
        dense=None if dense is None else dataclasses.replace(dense, phi_axis=axis),
    )


def check_room(numbers: Mapping[str, int]) -> None:
    """ModelError where so many numbers of stored noise, by site, are too many."""
    total = sum(numbers.values())
    if total > MAX_NUMBERS:
        raise ModelError(
            f"the stored noise would be {total:,} numbers, above the limit of {MAX_NUMBERS:,}; "
            f"the largest is at {max(numbers, key=lambda t: numbers[t])!r}: take fewer samples, "
            "noise for whole channels, or tensors further back"
        )


def stored(values: Array) -> Array:
    """Noise as it is kept in a graph."""
    return np.ascontiguousarray(values, np.float32)
