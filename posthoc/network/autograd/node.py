"""What a translation is given: a node without its graph, and the tensors that come in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Node:
    """One node: names of its tensors ("" where an optional one is left out) and its attributes
    as Python values (text decoded, tensors as numpy arrays, graphs left out)."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    opset: int

    def get(self, name: str, default: Any) -> Any:
        """The attribute, or what the operator's definition takes in its place."""
        return self.attributes.get(name, default)

    def makes(self, position: int) -> bool:
        """Whether the node gives its output ``position``."""
        return len(self.outputs) > position and bool(self.outputs[position])


def _nothing(node: Node) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Operator:
    """The translation of one operator.

    ``run(node, *inputs)`` returns the first outputs of the node; an input that is left out is
    None. ``host`` are the positions of the inputs that are read as numbers (shapes, axes), which
    stay in main memory, or not read at all. ``refuses`` says that a node asks for what the
    translation does not do.
    """

    run: Callable[..., Tensor | tuple[Tensor, ...]]
    host: tuple[int, ...] = ()
    refuses: Callable[[Node], bool] = _nothing


Table = Mapping[str, Operator]


def plain(function: Callable[..., Any]) -> Operator:
    """An operator without attributes that torch has under some name."""
    return Operator(lambda node, *inputs: function(*inputs))


def ints(tensor: Tensor) -> list[int]:
    """The numbers of an integer tensor."""
    return [int(v) for v in tensor.reshape(-1).tolist()]


def axes_of(node: Node, given: Tensor | None, rank: int) -> list[int] | None:
    """Axes from the input or the attribute ``axes``, counted from the front; None for neither."""
    axes = node.get("axes", None) if given is None else ints(given)
    return None if axes is None else [int(a) % max(rank, 1) for a in axes]
