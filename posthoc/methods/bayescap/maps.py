"""BayesCap on maps: a small convolutional network over the frozen output map.

Pixels of one image tell of one another: where an edge lies, the error is larger along all of it.
The cap sees the frozen map around a pixel and gives alpha and beta of a generalised Gaussian for
every pixel and channel (Upadhyay et al. 2022, arXiv:2207.06873); see
`posthoc.methods.bayescap.image` for how it is trained. It is written behind the frozen graph, and
what other modules call features are its maps of log variance, K channels, that this page reads. The
frozen map stays the mean, exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from posthoc.contract import Array, FitError, Info, LinearHead, ModelError, Paper, State, Task
from posthoc.links import Spread, SpreadNames
from posthoc.methods.bayescap.image import Settings
from posthoc.rows import Rows

if TYPE_CHECKING:
    from posthoc.frozen import Frozen
    from posthoc.graph import Fragment
    from posthoc.network.attach import Attached, NetworkRows

INFO = Info(
    name="bayescap_image",
    kind="module",
    tasks=("regression",),
    needs=frozenset({"features", "network", "labels"}),
    summary="a small convolutional network that gives the error of each pixel a generalised "
    "Gaussian",
    paper=Paper(
        "BayesCap: Bayesian Identity Cap for Calibrated Uncertainty in Frozen Neural Networks",
        2022,
        "https://arxiv.org/abs/2207.06873",
    ),
)
ROWS = 2_000  # images that are read, at most
CAP = "hedged/cap/"
PHI = f"{CAP}log_variance"
RUN = 8  # images in one run of the model

__all__ = ["INFO", "ROWS", "Settings", "attach", "emit", "fit", "keep", "spread"]


def keep(settings: Settings) -> None:
    """Nothing: the network is a black box to it."""
    del settings


def attach(frozen: Frozen, rows: NetworkRows, task: Task, settings: Settings) -> Attached:
    """The frozen model with the cap behind its map, trained on module rows.

    Raises ModelError for outputs that are no images N×K×H×W (or N×H×W×K, N×H×W), and what
    `posthoc.methods.bayescap.image.train_image_cap` raises.
    """
    import dataclasses

    from posthoc.graph import Fragment, append
    from posthoc.methods.bayescap.image import cap_graph, emit_log_variance, train_image_cap
    from posthoc.network.attach import Attached

    del task
    dense = frozen.dense
    if dense is None or len(dense.spatial) != 2:
        raise ModelError(
            "bayescap_image is for models whose output is an image; take --method bayescap"
        )
    if rows.y is None:
        raise FitError("bayescap_image needs labels: name their column with --target")
    z = _first(_maps(frozen, rows), dense.axis)
    y = _first(rows.y, dense.out_axis if rows.y.ndim == 4 else None)
    state = train_image_cap(list(z), list(y), settings)
    g = Fragment(frozen.opset, CAP)
    name = frozen.z
    if dense.axis is None:
        name = g.unsqueeze(name, 1)
    elif dense.axis == -1:
        name = g.op("Transpose", name, perm=[0, 3, 1, 2])
    phi = emit_log_variance(g, state, cap_graph(g, state, name))
    # A fragment writes only what an output needs.
    g.op("Identity", phi, out=PHI)
    k = frozen.z_dim
    outputs = {PHI: ("float32", (-1, k, -1, -1))}
    model = _hidden(append(frozen.model, g, outputs), PHI)
    said = {key: v for key, v in state.settings.items() if key != "seed"}
    made = dataclasses.replace(
        frozen,
        model=model,
        phi=PHI,
        phi_dim=k,
        head=None,
        head_node=None,
        notes=(*frozen.notes, f"a cap of maps was trained on {said['images']} images"),
        dense=dataclasses.replace(dense, phi_axis=1),
    )
    return Attached(made, dict(state.tensors), {**said, "seed": settings.seed})


def fit(rows: Rows, head: LinearHead | None, task: Task, settings: Settings) -> State:
    """The mean squared error of each output (one pass), beside which the strength sets the cap.

    Raises FitError where the features are not a cap's.
    """
    del head, settings
    total, n = np.zeros(1), 0
    for block in rows:
        assert block.phi is not None and block.y is not None
        if block.phi.shape[1] != block.z.shape[1]:
            raise FitError("bayescap_image needs the maps of its cap as features")
        error = np.asarray(block.y, np.float64) - block.z
        total, n = total + (error**2).sum(0), n + len(block)
    if not np.all(total > 0):
        raise FitError("bayescap_image: the model predicts the labels without error")
    return State({}, {"task": task, "noise_variance": (total / n).tolist()})


def spread(state: State, phi: Array, z: Array) -> Spread:
    """The variances N×K of N pixels (float64 definition)."""
    del state, z
    return Spread(np.exp(np.asarray(phi, np.float64)))


def emit(g: Fragment, state: State, phi: str, z: str) -> SpreadNames:
    """The same as a graph fragment."""
    del state, z
    return SpreadNames(g.op("Exp", phi))


def _maps(frozen: Frozen, rows: NetworkRows) -> Array:
    """The frozen maps of the rows."""
    from posthoc.frozen import expose
    from posthoc.runtime import open_session

    session = open_session(expose(frozen))
    parts = []
    for i in range(0, len(rows), RUN):
        (z,) = session.run([frozen.z], rows.take(slice(i, i + RUN)).inputs)
        parts.append(np.asarray(z))
    return np.concatenate(parts)


def _first(maps: Array, axis: int | None) -> Array:
    """Maps with their channels first."""
    return maps[:, None] if axis is None else np.moveaxis(maps, axis, 1)


def _hidden(model: bytes, output: str) -> bytes:
    """The model with one output fewer; its tensor stays."""
    import onnx

    proto = onnx.load_from_string(model)
    kept = [o for o in proto.graph.output if o.name != output]
    del proto.graph.output[:]
    proto.graph.output.extend(kept)
    return bytes(proto.SerializeToString())
