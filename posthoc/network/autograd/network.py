"""An ONNX graph as a differentiable function of its inputs, for fitting only.

ABNN trains the affine parameters of normalisation layers and MC-batch-norm needs the statistics
of a batch; both work on any frozen graph, whatever wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import onnx
import torch
from torch import Tensor

from posthoc.contract import ModelError
from posthoc.network.autograd.dtypes import tensor
from posthoc.network.autograd.node import Node
from posthoc.network.autograd.operators import OPERATORS
from posthoc.network.autograd.reading import Reading, apply, read, refused

Hook = Callable[[Tensor], Tensor]
_NO_HOOKS: Mapping[str, Hook] = MappingProxyType({})


def unsupported(model: bytes | onnx.ModelProto, outputs: Sequence[str]) -> list[tuple[str, str]]:
    """(operator, node) of what ``outputs`` need and `Network` has no translation for.

    Empty where `Network` takes the model. Raises ModelError for a tensor that the graph has not.
    """
    reading = read(model)
    return refused(_known(reading, outputs))


class Network:
    """The part of a frozen ONNX graph (opset 13 or newer) that ``outputs`` need.

    ``outputs`` may name any tensor of the graph. Stored tensors are converted once and never
    change; Dropout is the identity and BatchNormalization takes its running statistics. Types are
    those of the graph. Raises ModelError for a tensor that the graph has not, and for operators
    that have no translation, naming them.
    """

    inputs: tuple[str, ...]  # the graph inputs that are needed, in the graph's order
    outputs: tuple[str, ...]

    def __init__(
        self,
        model: bytes | onnx.ModelProto,
        outputs: Sequence[str],
        *,
        device: str | torch.device = "cpu",
    ):
        reading = read(model)
        nodes = _known(reading, outputs)
        if missing := refused(nodes):
            named = ", ".join(f"{kind} (node {name!r})" for kind, name in missing)
            raise ModelError(
                f"no gradients or batch statistics through {named}: abnn and mc_batch_norm need "
                "them; mc_dropout and the modules on the last layer do not"
            )
        self.outputs = tuple(outputs)
        self._device = torch.device(device)
        self._nodes = nodes
        self._last = _last_uses(nodes, self.outputs)
        read_here = {i for n in nodes for i in n.inputs} | set(outputs)
        self.inputs = tuple(i for i in reading.inputs if i in read_here and i not in reading.stored)
        self._inputs = frozenset(reading.inputs)
        on_device = _data(nodes, outputs)
        self._constants: dict[str, Tensor] = {}
        for name in sorted(read_here & reading.stored.keys()):
            value = tensor(reading.stored[name])
            # Integers are mostly shapes and axes, which are read as numbers.
            moves = value.is_floating_point() and name in on_device
            self._constants[name] = value.to(self._device) if moves else value
        made = {o for n in nodes for o in n.outputs if o}
        self._names = made | set(self.inputs) | set(self._constants)

    def __call__(
        self, feed: Mapping[str, Tensor], hooks: Mapping[str, Hook] = _NO_HOOKS
    ) -> dict[str, Tensor]:
        """``outputs`` by name, on the device.

        ``feed`` holds the graph's inputs; those with a default, and those that ``outputs`` do not
        need, may be left out. A hook replaces the tensor that it is named after, for all who read
        it. Tensors are dropped after their last use; within ``torch.no_grad()`` that frees them.
        Raises ModelError for a missing input, for a name that is not of this part of the graph,
        and for an operator that fails on the given shapes, naming it.
        """
        self._check(feed, hooks)
        values = dict(self._constants)
        values.update((k, v.to(self._device)) for k, v in feed.items())
        for name, hook in hooks.items():
            if name in values:
                values[name] = hook(values[name])
        for node, last in zip(self._nodes, self._last, strict=True):
            results = self._run(node, values)
            for name, result in zip(node.outputs, results, strict=False):
                if name:
                    values[name] = hooks[name](result) if name in hooks else result
            for name in last:
                values.pop(name, None)
        return {name: values[name].to(self._device) for name in self.outputs}

    def _run(self, node: Node, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        arguments = [values[i] if i else None for i in node.inputs]
        if self._device.type != "cpu":
            arguments = self._together(node, arguments)
        try:
            return apply(node, arguments)
        except (torch.OutOfMemoryError, ModelError):
            raise
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as e:
            shapes = ", ".join("none" if a is None else str(tuple(a.shape)) for a in arguments)
            raise ModelError(f"{node.kind} (node {node.name!r}) on shapes {shapes}: {e}") from e

    def _together(self, node: Node, arguments: list[Tensor | None]) -> list[Tensor | None]:
        """What is computed with on one device, if any of it is there; numbers stay where they
        are."""
        host = OPERATORS[node.kind].host
        moved = [i for i, a in enumerate(arguments) if a is not None and i not in host]
        if all(arguments[i].device.type == "cpu" for i in moved):  # type: ignore[union-attr]
            return arguments
        return [
            a.to(self._device) if a is not None and i in moved else a
            for i, a in enumerate(arguments)
        ]

    def _check(self, feed: Mapping[str, Tensor], hooks: Mapping[str, Hook]) -> None:
        if missing := [i for i in self.inputs if i not in feed]:
            raise ModelError(f"inputs that are missing: {', '.join(map(repr, missing))}")
        if strange := sorted(feed.keys() - self._inputs):
            raise ModelError(
                f"{', '.join(map(repr, strange))}: not an input; the inputs are "
                f"{', '.join(map(repr, self.inputs))}"
            )
        if strange := sorted(hooks.keys() - self._names):
            raise ModelError(
                f"hooks on {', '.join(map(repr, strange))}, of which the outputs "
                f"{', '.join(map(repr, self.outputs))} make no use"
            )


def _known(reading: Reading, outputs: Sequence[str]) -> list[Node]:
    """The nodes that ``outputs`` need, when all of these are tensors of the graph."""
    made = {o for n in reading.nodes for o in n.outputs}
    strange = [o for o in outputs if o not in made | {*reading.inputs, *reading.stored} or not o]
    if strange:
        raise ModelError(
            f"the graph has no tensor {', '.join(map(repr, strange))}; its outputs are "
            f"{', '.join(map(repr, reading.outputs))}"
        )
    return reading.needed(outputs)


def _last_uses(nodes: Sequence[Node], kept: Sequence[str]) -> list[tuple[str, ...]]:
    """For each node, what nobody reads after it (its own unread outputs too)."""
    seen, lasts = set(kept) | {""}, []
    for node in reversed(nodes):
        last = {*node.inputs, *node.outputs} - seen
        seen |= last
        lasts.append(tuple(sorted(last)))
    return lasts[::-1]


def _data(nodes: Sequence[Node], outputs: Sequence[str]) -> set[str]:
    """Tensors that ``outputs`` are computed from, other than as shapes and the like."""
    found = set(outputs)
    for node in reversed(nodes):
        if found.intersection(node.outputs):
            host = OPERATORS[node.kind].host
            found.update(name for i, name in enumerate(node.inputs) if name and i not in host)
    return found
