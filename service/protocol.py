"""The Open Inference Protocol (version 2), JSON and binary tensors: bytes to values and back.

Pure functions that know tensors and names, not models. Sources: open-inference-protocol,
specification/protocol/inference_rest.md; Triton, docs/protocol/extension_binary_data.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import orjson

from posthoc.contract import Array, TensorSpec
from service.errors import ServiceError, invalid, shorten
from service.tensors import MAX_RANK, cast, number_array, parse_object

HEADER_LENGTH = "Inference-Header-Content-Length"
EXTENSIONS = ("binary_tensor_data",)
_MAX_VALUES = 1 << 40
_NO_TAIL = memoryview(b"")

# Datatype name of the protocol -> numpy dtype, little-endian as the binary extension says.
DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    **{f"UINT{8 * n}": np.dtype(f"<u{n}") for n in (1, 2, 4, 8)},
    **{f"INT{8 * n}": np.dtype(f"<i{n}") for n in (1, 2, 4, 8)},
    **{f"FP{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)},
}
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
_NUMBERS = ", ".join(DATATYPES)


class InferRequest(NamedTuple):
    """An inference request: tensors by name, and how the answer shall look.

    ``outputs`` maps each requested output to whether it is wanted in binary; None asks for all,
    in binary where ``binary`` says so.
    """

    inputs: dict[str, Array]
    id: str | None = None
    outputs: dict[str, bool] | None = None
    binary: bool = False
    alpha: float | None = None


def parse_infer(
    body: bytes, header: str | None, specs: Sequence[TensorSpec], nulls: bool = False
) -> InferRequest:
    """An inference request from its body and ``Inference-Header-Content-Length``, if sent.

    ``specs`` are the model's inputs; they are used only for the raw form (header length 0), which
    carries neither name nor shape. With ``nulls``, null in JSON data is NaN. Raises ServiceError
    400 for anything that the protocol does not allow, naming the field.
    """
    length = header_length(header, len(body))
    if length == 0:
        return InferRequest(inputs=_raw_input(body, specs), binary=True)
    tail = _NO_TAIL if length is None else memoryview(body)[length:]
    request = parse_object(body if length is None else body[:length])
    parameters = _parameters(request, "the request")
    inputs, used = _inputs(request, tail, binary=length is not None, nulls=nulls)
    if used != len(tail):
        raise invalid(
            f"the body holds {len(tail)} bytes after its JSON and the binary_data_size of all "
            f"inputs add up to {used}"
        )
    binary = _flag(parameters, "binary_data_output", "the request", default=False)
    return InferRequest(
        inputs=inputs,
        id=_optional_string(request, "id"),
        outputs=_requested(request, binary),
        binary=binary,
        alpha=_alpha(parameters),
    )


def encode_infer(
    model: str,
    version: str,
    id: str,
    outputs: Mapping[str, Array],
    binary: Mapping[str, bool] | bool = False,
) -> tuple[bytes, int | None]:
    """The response to an inference, and the length of its JSON when tensors follow it in binary.

    ``outputs`` are written in their order, each with N rows. ``binary`` says for each (or for all)
    whether to write raw little-endian bytes instead of JSON numbers. Strict JSON has no infinity:
    an unbounded interval end is ``null`` there and ``inf`` in binary.
    """
    as_bytes = dict.fromkeys(outputs, binary) if isinstance(binary, bool) else binary
    described: list[dict[str, Any]] = []
    raw: list[memoryview] = []
    for name, value in outputs.items():
        dtype = value.dtype
        kind = _NAMES.get(dtype) or datatype(dtype)
        entry: dict[str, Any] = {"name": name, "datatype": kind, "shape": value.shape}
        if as_bytes[name]:
            raw.append(_little_endian(value))
            entry["parameters"] = {"binary_data_size": raw[-1].nbytes}
        elif dtype.isnative:
            entry["data"] = value.ravel()
        else:
            entry["data"] = value.ravel().astype(dtype.newbyteorder("="))
        described.append(entry)
    head = orjson.dumps(
        {"model_name": model, "model_version": version, "id": id, "outputs": described},
        option=orjson.OPT_SERIALIZE_NUMPY,
    )
    return (b"".join((head, *raw)), len(head)) if raw else (head, None)


def datatype(dtype: np.dtype[Any] | str) -> str:
    """The protocol's name of a numpy dtype; KeyError for one that it does not have."""
    dtype = np.dtype(dtype)
    return _NAMES.get(dtype) or _NAMES[dtype.newbyteorder("<")]


def has_datatype(dtype: np.dtype[Any] | str) -> bool:
    """Whether tensors of this numpy dtype can be carried."""
    try:
        return np.dtype(dtype).newbyteorder("<") in _NAMES
    except TypeError:  # a dtype that numpy cannot name, such as bfloat16
        return False


def tensor_metadata(spec: TensorSpec) -> dict[str, Any]:
    """One entry of ``inputs`` or ``outputs`` in a model's metadata."""
    return {"name": spec.name, "datatype": datatype(spec.dtype), "shape": list(spec.shape)}


def header_length(header: str | None, size: int) -> int | None:
    """The length of the JSON in a body of ``size`` bytes; None where it is all JSON.

    ``header`` is ``Inference-Header-Content-Length``. Raises ServiceError 400 for a wrong one.
    """
    if header is None:
        return None
    if not (header.isascii() and header.isdigit() and len(header) <= 20):
        raise invalid(f"{HEADER_LENGTH} is {shorten(header)!r}, not a number of bytes")
    if int(header) > size:
        raise invalid(f"{HEADER_LENGTH} is {header} and the body holds {size} bytes")
    return int(header)


def _raw_input(body: bytes, specs: Sequence[TensorSpec]) -> dict[str, Array]:
    if len(specs) != 1 or any(d < 0 for d in specs[0].shape[1:]):
        raise invalid(f"{HEADER_LENGTH} 0 needs a model with one input of fixed row shape")
    (spec,) = specs
    dtype = np.dtype(spec.dtype).newbyteorder("<")
    per_row = dtype.itemsize * math.prod(spec.shape[1:])
    if not per_row or len(body) % per_row:
        raise invalid(f"{len(body)} bytes are no whole number of rows of {per_row} bytes")
    shape = (len(body) // per_row, *spec.shape[1:])
    return {spec.name: _from_buffer(memoryview(body), dtype, shape, spec.name)}


def _inputs(
    request: Mapping[str, Any], tail: memoryview, *, binary: bool, nulls: bool
) -> tuple[dict[str, Array], int]:
    entries = request.get("inputs")
    if not isinstance(entries, list) or not entries:
        raise invalid("'inputs' must be a list of at least one tensor")
    inputs: dict[str, Array] = {}
    at = 0
    for entry in entries:
        name = _name(entry, "inputs")
        if name in inputs:
            raise invalid(f"input {shorten(name)!r} is given twice")
        kind = entry.get("datatype")
        dtype = DATATYPES.get(kind) if isinstance(kind, str) else None
        if dtype is None:
            raise _no_datatype(kind, name)
        shape = _shape(entry, name)
        size = None
        if "parameters" in entry:
            size = _parameters(entry, f"input {shorten(name)!r}").get("binary_data_size")
        if size is None:
            inputs[name] = _from_json(entry, dtype, shape, name, nulls)
            continue
        where = f"input {shorten(name)!r}"
        if not binary:
            raise invalid(f"{where} has binary_data_size but {HEADER_LENGTH} was not sent")
        if "data" in entry:
            raise invalid(f"{where} has both 'data' and binary_data_size")
        if not _is_int(size) or size < 0 or at + size > len(tail):
            raise invalid(f"{where}: binary_data_size does not fit the body's {len(tail)} bytes")
        inputs[name] = _from_buffer(tail[at : at + size], dtype, shape, where)
        at += size
    return inputs, at


def _from_json(
    entry: Mapping[str, Any],
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    name: str,
    nulls: bool,
) -> Array:
    where = f"input {shorten(name)!r}"
    data = entry.get("data")
    if type(data) is not list:
        if "data" not in entry:
            raise invalid(f"{where} has neither 'data' nor the parameter binary_data_size")
        raise invalid(f"{where}: 'data' must be a list")
    value = number_array(data, where, nulls)
    if value.size != math.prod(shape) or (value.ndim != 1 and value.shape != shape):
        raise invalid(
            f"{where}: 'data' of shape {list(value.shape)} does not fill shape {list(shape)}"
        )
    return cast(value.reshape(shape), dtype, where)


def _from_buffer(
    data: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], where: str
) -> Array:
    needed = math.prod(shape) * dtype.itemsize
    if len(data) != needed:
        raise invalid(f"{where}: {len(data)} bytes sent, shape {list(shape)} takes {needed}")
    if dtype.kind == "b":
        bits = np.frombuffer(data, np.uint8)
        if bits.size and bits.max() > 1:
            raise invalid(f"{where}: a BOOL byte must be 0 or 1")
        return bits.view(np.bool_).reshape(shape)
    return np.frombuffer(data, dtype).reshape(shape)


def _requested(request: Mapping[str, Any], binary: bool) -> dict[str, bool] | None:
    entries = request.get("outputs")
    if entries is None:
        return None
    if not isinstance(entries, list):
        raise invalid("'outputs' must be a list")
    # Mostly names and nothing else: looked at together they cost a quarter.
    if set(map(type, entries)) == {dict} and set(map(len, entries)) == {1}:
        names: list[Any] = list(map(dict.get, entries, repeat("name")))
        if set(map(type, names)) == {str} and len(set(names)) == len(names):
            return dict.fromkeys(names, binary)
    wanted: dict[str, bool] = {}
    for entry in entries:
        name = _name(entry, "outputs")
        if name in wanted:
            raise invalid(f"output {shorten(name)!r} is asked for twice")
        wanted[name] = binary if len(entry) == 1 else _in_binary(entry, name, binary)
    return wanted or None


def _in_binary(entry: Mapping[str, Any], name: str, default: bool) -> bool:
    where = f"output {shorten(name)!r}"
    parameters = _parameters(entry, where)
    if "classification" in parameters:
        raise invalid(f"{where}: the classification extension is not supported")
    return _flag(parameters, "binary_data", where, default=default)


def _name(entry: Any, group: str) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise invalid(f"each of '{group}' must be an object with a 'name'")
    name: str = entry["name"]
    return name


def _no_datatype(found: Any, name: str) -> ServiceError:
    where = f"input {shorten(name)!r}"
    if found == "BYTES":  # what numpy clients send for an array of objects or texts
        return invalid(f"{where}: BYTES are texts, and models here take numbers; send {_NUMBERS}")
    return invalid(f"{where}: datatype {shorten(str(found))!r} is not one of {_NUMBERS}")


def _shape(entry: Mapping[str, Any], name: str) -> tuple[int, ...]:
    shape = entry.get("shape")
    if (
        type(shape) is list
        and len(shape) <= MAX_RANK
        and set(map(type, shape)) <= {int}
        and min(shape, default=0) >= 0
        # Beside a 0 the others count too: numpy refuses an array whose strides overflow.
        and math.prod(filter(None, shape)) <= _MAX_VALUES
    ):
        return tuple(shape)
    raise invalid(
        f"input {shorten(name)!r}: 'shape' must be a list of at most {MAX_RANK} sizes, of at most "
        "2^40 values"
    )


def _parameters(entry: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    parameters = entry.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise invalid(f"{where}: 'parameters' must be an object")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, where: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise invalid(f"{where}: parameter {name} must be true or false")
    return value


def _alpha(parameters: Mapping[str, Any]) -> float | None:
    value = parameters.get("alpha")
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise invalid("the request's parameter alpha must be a number")
    return float(value)


def _optional_string(request: Mapping[str, Any], name: str) -> str | None:
    value = request.get(name)
    if value is not None and not isinstance(value, str):
        raise invalid(f"'{name}' must be a string")
    return value or None


def _little_endian(value: Array) -> memoryview:
    """The bytes of an array, not copied where they are as they should be."""
    plain = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    return plain.reshape(-1).view(np.uint8).data


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
