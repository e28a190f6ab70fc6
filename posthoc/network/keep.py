"""Exports a torch program so that its dropouts, or its normalisations, stay nodes of the graph.

Exporters drop what does nothing at inference and fold a BatchNormalization into the convolution
before it. Here such nodes travel under another domain, which no rewrite knows, and get their own
names back at the end.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import onnx
from onnx import helper

from posthoc.contract import ModelError
from posthoc.network.dependence import STANDARD
from posthoc.network.sites import CHANNELS

_DOMAIN = "hedged.kept"
_KEPT = ("BatchNormalization", "Dropout")  # of other normalisations there are no rewrites
_UNSEEN = (
    "dropout inside scaled_dot_product_attention (and nn.MultiheadAttention), AlphaDropout, and "
    "dropout called only `if self.training` are not seen"
)


def captured(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> Any:
    """The ``torch.export.ExportedProgram`` of a module in evaluation mode."""
    import torch

    return torch.export.export(
        module, args, kwargs=kwargs or None, dynamic_shapes=dynamic_shapes, strict=False
    )


def mark_dropouts(program: Any) -> tuple[Any, list[str]]:
    """A copy of a program with an operator of ours at every dropout, and notes on what was not
    seen.

    Covers nn.Dropout, Dropout1d, 2d and 3d (whole channels), and torch.nn.functional's, whether
    active or not: a program in evaluation mode has them all, with their rates. Raises ModelError
    where there is none.
    """
    import torch

    aten, ours = torch.ops.aten, _operator()
    whole = {
        aten.dropout.default: False,
        aten.dropout_.default: False,
        aten.feature_dropout.default: True,
        aten.feature_dropout_.default: True,
    }
    program = copy.copy(program)
    program._graph_module = copy.deepcopy(program.graph_module)
    graph = program.graph_module.graph
    marked = 0
    for node in list(graph.nodes):
        if node.target not in whole or not float(node.args[1]):
            continue
        x, rate = node.args[:2]
        channels = whole[node.target]
        with graph.inserting_after(node):
            new = graph.call_function(ours, (x, float(rate), channels))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        if str(node.target).endswith("_.default"):  # in place: also who reads x after it
            later = set(_after(graph, new))
            x.replace_all_uses_with(new, delete_user_cb=lambda u, later=later: u in later)
        graph.erase_node(node)
        marked += 1
    program.graph_module.recompile()
    text = f"{graph} {[n.meta.get('nn_module_stack') for n in graph.nodes]}"
    unseen = ("scaled_dot_product_attention", "MultiheadAttention", "alpha_dropout")
    if not marked:
        raise ModelError(
            f"the module has no dropout that can be kept ({_UNSEEN}); use nn.Dropout, "
            "F.dropout(x, p, self.training), or mc_dropout at a named tensor"
        )
    count = "one dropout was" if marked == 1 else f"{marked} dropouts were"
    return program, [f"{count} found; {_UNSEEN}"] if any(u in text for u in unseen) else []


def translations() -> dict[Any, Any]:
    """How the exporter writes the operator of `mark_dropouts`."""
    from onnxscript import opset20 as op

    def dropout(x: Any, p: float, channels: bool) -> Any:
        # A seed means nothing at inference; it tells `optimised` which is which.
        rate: Any = op.Constant(value_float=p)
        return op.Dropout(x, rate, seed=int(channels))[0]

    # onnxscript reads types from the signature, where it wants no strings.
    dropout.__annotations__ = {"p": float, "channels": bool}
    return {_operator(): dropout}


def optimised(model: onnx.ModelProto) -> onnx.ModelProto:
    """What the exporter's own optimisation makes of its graph, but with every dropout and
    normalisation where it was; the dropouts do nothing (inference mode)."""
    from onnxscript import optimizer

    for node in model.graph.node:
        if node.op_type in _KEPT and node.domain in STANDARD:
            node.domain = _DOMAIN
    model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    model = optimizer.optimize(model)
    for node in model.graph.node:
        if node.domain != _DOMAIN:
            continue
        node.domain = ""
        seed = next((a for a in node.attribute if a.name == "seed"), None)
        if node.op_type == "Dropout" and seed is not None:
            node.name = f"{CHANNELS if seed.i else ''}{node.name or node.output[0]}"
            node.attribute.remove(seed)
            del node.output[1:]
    others = [o for o in model.opset_import if o.domain != _DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(others)
    return model


def _after(graph: Any, node: Any) -> list[Any]:
    nodes = list(graph.nodes)
    return nodes[nodes.index(node) + 1 :]


@cache
def _operator() -> Any:
    """``hedged::dropout(x, p, channels)``, which returns x: no decomposition removes it."""
    import torch

    def dropout(x: Any, p: float, channels: bool) -> Any:
        return x.clone()

    operator = torch.library.custom_op(
        "hedged::dropout",
        dropout,
        mutates_args=(),
        schema="(Tensor x, float p, bool channels) -> Tensor",
    )
    operator.register_fake(dropout)
    return torch.ops.hedged.dropout.default
