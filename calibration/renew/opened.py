"""A bundle taken apart again: its calibrated head, and the frozen model in front of it.

A bundle keeps every number that its head was compiled from, and `posthoc.graph.append` only adds to
the frozen graph; so both can be had back. Nothing of this is believed unseen: the head must compile
to the bundle's own answers on its golden rows.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from calibration.bundle import GOLDEN, HEAD, PREDICTOR, STATE, Bundle, Manifest, OodRecord
from calibration.compile import TOLERANCE, compile_head
from calibration.conformal.cells import Cells, restored
from calibration.conformal.intervals import Interval
from calibration.families import Family
from calibration.fit_options import RANK, score_names
from calibration.head import Head, Member, Ood
from calibration.ranks import Ranks
from calibration.shift.weighted import Weighted
from calibration.shift.weighted import restored as weighted_again
from posthoc.contract import Array, BundleError, Features, State
from posthoc.logits import Link, to_logits
from posthoc.model.files import opset_of
from posthoc.runtime import open_session

_OF_INTERVALS = ("side", "margin")  # settings of a regression's conformal record


@dataclass(frozen=True, slots=True)
class Opened:
    """A bundle with what it was made of. ``z`` and ``phi`` are tensors of the ``frozen`` graph,
    ``rows`` the golden inputs by name and ``features`` their φ and logits."""

    bundle: Bundle
    head: Head
    frozen: bytes
    opset: int
    z: str
    phi: str | None
    link: Link
    rows: dict[str, Array]
    features: Features

    @property
    def manifest(self) -> Manifest:
        """The bundle's."""
        return self.bundle.manifest


def take_apart(bundle: Bundle) -> Opened:
    """The head and the frozen graph of a bundle.

    Raises BundleError for a bundle of maps, and for one whose head does not come out as it went in.
    """
    m = bundle.manifest
    if m.dense is not None:
        raise BundleError(
            f"{bundle.path} answers in maps: the ledger keeps a summary of an image and no label "
            "of its pixels; fit again on fresh images with `hedged fit`"
        )
    head = head_of(bundle)
    frozen, z, phi = cut(bundle)
    with np.load(io.BytesIO(bundle.files[GOLDEN]), allow_pickle=False) as golden:
        rows = {k[3:]: golden[k] for k in golden.files if k.startswith("in/")}
    link: Link = m.data.get("link", "identity")
    names = [z] if phi is None else [z, phi]
    values = open_session(_with_outputs(frozen, names)).run(names, rows)
    features = Features(None if phi is None else values[1], to_logits(values[0], link))
    _check(bundle, head, features)
    opset = opset_of(onnx.load_from_string(frozen))
    return Opened(bundle, head, frozen, opset, z, phi, link, rows, features)


def head_of(bundle: Bundle) -> Head:
    """The head that a bundle was compiled from, out of its manifest and tensors."""
    m, state, scores = bundle.manifest, bundle.tensors(STATE), bundle.conformal_scores
    classes = m.task == "classification"
    width = next(s.shape[1] for s in m.outputs if s.name == ("probs" if classes else "mean"))
    inputs = {i.name: i.shape for i in open_session(bundle.files[HEAD]).get_inputs()}
    conformal, own = m.conformal, scores["set" if classes else "interval"]
    cells: Cells | Weighted | None = None
    if conformal.given is not None:
        names = [c.name for c in conformal.guarantees[0].cells]
        cells = restored(conformal.given, names, scores, own)
    elif conformal.shift is not None:
        cells = weighted_again(conformal.shift, scores, own)
    first = conformal.guarantees[0]
    alone = math.inf if first.threshold is None else first.threshold
    module = None
    if m.module.name != "none":
        module = (m.module.name, State(_below(state, "module/"), dict(m.module.settings)))
    named = m.family is not None and m.family.name != "temperature"
    return Head(
        task=m.task,
        width=width,
        features=int(inputs["phi"][1]) if "phi" in inputs else None,
        module=module,
        temperature=m.scaling["temperature"],
        strength=m.scaling["strength"],
        noise=state.get("noise"),
        eps=state.get("eps"),
        predictive=m.predictive,  # type: ignore[arg-type]  # a text in the manifest
        prediction=m.prediction,
        conformal=conformal.method if classes else "lac",
        conformal_settings=dict(conformal.settings) if classes else {},
        family=Family(m.family.name, _below(state, "family/")) if named and m.family else None,
        sureness=None
        if m.confidence == "probs"
        else Family(m.confidence, _below(state, "sureness/")),
        interval=Interval() if classes else _interval(m, state),
        randomised=conformal.randomised,
        cells=cells,
        q_hat=alone if cells is None else cells.thresholds(first.alpha),
        quantile_factors=state.get("quantile_factors"),
        ood=None if m.ood is None else _ood(m.ood, state),
        abstain=None if m.abstain is None else m.abstain.threshold,
        abstains=m.abstain is not None,
    )


def cut(bundle: Bundle) -> tuple[bytes, str, str | None]:
    """(the frozen model, its tensor z, its tensor phi) of a bundle's fused graph."""
    m = bundle.manifest
    proto = onnx.load_from_string(bundle.files[PREDICTOR])
    graph = proto.graph
    fields = {m.output_names.get(s.name, s.name) for s in m.outputs}
    public = fields | ({m.frozen.logits} if m.frozen.logits is not None else set())
    added = {"q_hat", "ood_threshold"} if m.ood is not None else {"q_hat"}
    added |= {s.name for s in m.optional_inputs}
    prefix = _prefix(graph)

    def ours(name: str) -> bool:
        return name in public or name in added or name.startswith(prefix)

    nodes = [n for n in graph.node if any(map(ours, n.output))]
    makers = {name: node for node in nodes for name in node.output}
    edge = {i for n in nodes for i in n.input if i and not ours(i)}
    start = m.frozen.logits or m.output_names.get("mean", "mean")
    seen, stack, found = set(), [start], set()
    while stack:
        name = stack.pop()
        if name in edge:
            found.add(name)
        if name in makers and name not in seen:
            seen.add(name)
            stack += list(makers[name].input)
    if len(found) != 1 or len(edge) > 2:
        raise BundleError(f"{bundle.path}: the frozen model inside {PREDICTOR} is not found")
    (z,) = found
    rest = edge - found
    _keep(graph.node, [n for n in graph.node if not any(map(ours, n.output))])
    for values in (graph.initializer, graph.input, graph.output):
        _keep(values, [v for v in values if not ours(v.name)])
    return bytes(proto.SerializeToString()), z, next(iter(rest), None)


def _keep(field: Any, values: list[Any]) -> None:
    """Only some values of a repeated field of a protobuf."""
    del field[:]
    field.extend(values)


def _prefix(graph: Any) -> str:
    """The prefix of our tensors: the last of uq/, uq_uq/, … in a row that is in use; a frozen model
    that uses the first ones made ours longer."""
    names = {name for node in graph.node for name in (*node.input, *node.output)}
    names |= {i.name for i in graph.initializer}
    prefix = "uq/"
    while any(n.startswith("uq_" + prefix) for n in names):
        prefix = "uq_" + prefix
    return prefix


def _below(tensors: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def _interval(m: Manifest, state: Mapping[str, Array]) -> Interval:
    settings = m.conformal.settings
    return Interval(
        m.conformal.method,
        settings.get("side", "two"),
        settings.get("margin", 0.0),
        _below(state, "interval/"),
    )


def _ood(record: OodRecord, state: Mapping[str, Array]) -> Ood:
    members = []
    for name in score_names(record.score.name):
        settings = dict(record.score.settings[name])
        mean, scale = settings.pop("mean"), settings.pop("scale")
        tensors = _below(state, f"ood/{name}/")
        own = {k: v for k, v in tensors.items() if not k.startswith("ranks/")}
        ranks = None
        if record.score.name.startswith(RANK):
            ranks = Ranks(tensors["ranks/knots"], tensors["ranks/ranks"], 1 / scale)
        members.append(Member(name, State(own, settings), mean, scale, ranks))
    threshold = math.inf if record.threshold is None else record.threshold
    return Ood(tuple(members), state["ood/table"], state["ood/pvalues"], threshold)


def _with_outputs(frozen: bytes, names: list[str]) -> bytes:
    proto = onnx.load_from_string(frozen)
    have = {o.name for o in proto.graph.output}
    for name in names:
        if name not in have:
            proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return bytes(proto.SerializeToString())


def _check(bundle: Bundle, head: Head, rows: Features) -> None:
    """The restored head answers as the bundle's own does; BundleError naming the field if not."""
    try:
        again = compile_head(head)
    except (KeyError, TypeError, ValueError) as e:
        raise BundleError(f"{bundle.path}: its head cannot be restored ({e!r}); fit again") from e
    if again == bundle.files[HEAD]:
        return
    feed = {"z": np.asarray(rows.z, np.float32)}
    if head.features is not None:
        feed["phi"] = np.asarray(rows.phi, np.float32)
    sessions = [open_session(bytes_) for bytes_ in (bundle.files[HEAD], again)]
    names = [o.name for o in sessions[0].get_outputs()]
    old, new = (s.run(names, feed) for s in sessions)
    for name, a, b in zip(names, old, new, strict=True):
        if not np.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
            raise BundleError(
                f"{bundle.path}: its head cannot be restored, {name} differs; it is another "
                "version's: fit again"
            )
