"""Types: ONNX's numbers for them, and arrays as tensors."""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from posthoc.contract import Array

DTYPES: dict[int, torch.dtype] = {
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.BOOL: torch.bool,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
}
# Stored in types that torch does little or nothing with, and read as wider ones (only
# DequantizeLinear takes these from a graph of floats).
_WIDER: dict[int, type] = {
    TensorProto.INT4: np.int8,
    TensorProto.UINT4: np.uint8,
    TensorProto.UINT16: np.int32,
}


def readable(stored: TensorProto) -> bool:
    """Whether `tensor` can read it."""
    return stored.data_type in DTYPES or stored.data_type in _WIDER


def array(stored: TensorProto) -> Array:
    """The numbers of a stored tensor, bfloat16 as float32 and small integers as wider ones."""
    found = numpy_helper.to_array(stored)
    if stored.data_type == TensorProto.BFLOAT16:
        return np.asarray(found.astype(np.float32))
    wider = _WIDER.get(stored.data_type)
    return found if wider is None else np.asarray(found.astype(wider))


def tensor(stored: TensorProto) -> Tensor:
    """A tensor of its own memory, in the type that the graph says."""
    found = torch.from_numpy(np.array(array(stored)))
    return found.to(DTYPES[stored.data_type]) if stored.data_type in DTYPES else found
