"""Where an ONNX file says its weights lie, read from the protobuf wire format alone.

The service must refuse a bundle whose graph points outside itself, and it does not import onnx:
so this page walks the few messages of onnx.proto that can hold a tensor and skips the rest. The
walk keeps an explicit stack and looks at every byte at most once, so hostile nesting costs
neither recursion nor more than linear time.

Source: onnx/onnx.proto (field numbers), https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from posthoc.contract import BundleError

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5

_Message = Literal[
    "model", "training", "function", "graph", "node", "attribute", "sparse", "tensor", "entry"
]

# message -> {field number: message of the field}; only fields below which a tensor can lie.
_CHILDREN: dict[_Message, dict[int, _Message]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor",
        6: "graph",
        10: "tensor",
        11: "graph",
        22: "sparse",
        23: "sparse",
    },
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {},
}
_DATA_LOCATION = 14  # TensorProto.data_location; 1 is EXTERNAL
_KEY, _VALUE = 1, 2  # StringStringEntryProto


def external_data(onnx_bytes: bytes) -> list[str]:
    """Locations of every external tensor of a serialised ONNX model, in file order.

    A tensor that is marked external and gives no location appears as the empty string. Raises
    BundleError when the bytes are not protobuf wire data of an ONNX model (truncated, group wire
    types, a message field of another wire type) or are in ONNX Runtime's own ORT format.
    """
    if onnx_bytes[4:8] == b"ORTM":
        raise BundleError("the model is in ORT format; a bundle holds ONNX")
    found: dict[int, str] = {}  # start of the tensor -> location
    stack: list[tuple[_Message, int, int, int]] = [("model", 0, len(onnx_bytes), 0)]
    while stack:
        kind, start, end, tensor = stack.pop()
        children = _CHILDREN[kind]
        key = value = b""
        for number, wire, low, high in _fields(onnx_bytes, start, end):
            if number in children:
                if wire != _LENGTH:
                    raise _malformed(low, f"field {number} of {kind} is not a message")
                child = children[number]
                stack.append((child, low, high, low if child == "tensor" else tensor))
                if child == "entry":
                    found.setdefault(tensor, "")
            elif kind == "tensor" and number == _DATA_LOCATION and wire == _VARINT:
                # A later 0 would win in a real parser; a tensor that ever says 1 is refused. An
                # enum keeps the low 32 bits of what was sent.
                if _varint(onnx_bytes, low, high)[0] & 0xFFFFFFFF == 1:
                    found.setdefault(start, "")
            elif kind == "entry" and wire == _LENGTH:
                if number == _KEY:
                    key = onnx_bytes[low:high]
                elif number == _VALUE:
                    value = onnx_bytes[low:high]
        if kind == "entry" and key == b"location":
            found[tensor] = value.decode("utf-8", "replace")
    return [found[at] for at in sorted(found)]


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Fields of one message: (number, wire type, start and end of the payload)."""
    at = start
    while at < end:
        tag, low = _varint(data, at, end)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise _malformed(at, f"field number {number}")
        if wire == _VARINT:
            high = _varint(data, low, end)[1]
        elif wire == _LENGTH:
            size, low = _varint(data, low, end)
            high = low + size
        elif wire in (_FIXED64, _FIXED32):
            high = low + (8 if wire == _FIXED64 else 4)
        else:
            raise _malformed(at, f"wire type {wire}")
        if high > end:
            raise _malformed(at, "a field that ends after its message")
        yield number, wire, low, high
        at = high


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A base-128 varint and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise _malformed(at, "a number that is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _malformed(at, "a number longer than 10 bytes")


def _malformed(at: int, what: str) -> BundleError:
    return BundleError(f"the model is not a readable ONNX file: {what} at byte {at}")
