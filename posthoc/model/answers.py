"""A model of which only what it answered is known: a graph that hands on columns of a table.

Its inputs are ``z`` (N×K logits, probabilities or means) and, where features were kept too, ``phi``
(N×D). No linear layer lies between them, so what reads one does not apply, but scores of
strangeness in feature space do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper

from posthoc.contract import ModelError, Task, TensorSpec
from posthoc.frozen import Frozen, open_frozen
from posthoc.model.probe import Sample

Z, PHI = "z", "phi"
NAME = "outputs"  # of such a model, where the user gives none
_OPSET, _IR = 20, 10


def open_answers(specs: Sequence[TensorSpec], *, task: Task, sample: Sample = None) -> Frozen:
    """The model that hands on ``z`` and, if the specs have it, ``phi``.

    Raises ModelError for other inputs, or rows that are no vectors of numbers.
    """
    widths = {s.name: s.shape[1:] for s in specs}
    if Z not in widths or widths.keys() - {Z, PHI}:
        raise ModelError(
            f"columns of a model's outputs fill {Z!r}, those of its features {PHI!r}; "
            f"there are {', '.join(widths) or 'none'}"
        )
    for name, width in widths.items():
        if len(width) != 1 or width[0] < 1:
            raise ModelError(f"{name!r} takes a vector of numbers a row, not shape {width}")
    model = _graph({n: int(w[0]) for n, w in widths.items()})
    frozen = open_frozen(model, task=task, sample=sample)
    if PHI not in widths:
        return dataclasses.replace(frozen, file=NAME)
    return dataclasses.replace(
        frozen,
        file=NAME,
        phi=_handed(PHI),
        phi_dim=int(widths[PHI][0]),
        notes=("features are columns; the linear head that read them is not known", *frozen.notes),
    )


def _graph(widths: dict[str, int]) -> bytes:
    def info(name: str, width: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width])

    graph = helper.make_graph(
        [helper.make_node("Identity", [n], [_handed(n)], name=_handed(n)) for n in widths],
        NAME,
        [info(n, w) for n, w in widths.items()],
        [info(_handed(Z), widths[Z])],
    )
    opset = [helper.make_opsetid("", _OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=_IR, producer_name="hedged")
    return bytes(model.SerializeToString())


def _handed(name: str) -> str:
    return f"{name}_given"
