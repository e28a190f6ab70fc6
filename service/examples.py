"""First requests that work, from the rows that a bundle keeps as its examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from calibration.bundle import EXAMPLES
from posthoc.contract import Array
from service.models import Model
from service.protocol import tensor_metadata


def example_request(model: Model) -> dict[str, Any]:
    """A body of ``POST /v1/models/{name}/predict`` for one row of the bundle's ``examples.json``.

    ``rows`` by column name where each column is one number of the row, else ``inputs``. Numbers
    are numpy's, so that a float32 keeps its short form in JSON.
    """
    first = _first_row(model)
    columns = model.predictor.manifest.mapping.inputs
    if all(v.ndim == 2 and v.shape[1] == len(columns.get(k, ())) for k, v in first.items()):
        row = {c: v for k, x in first.items() for c, v in zip(columns[k], x[0], strict=True)}
        return {"rows": [row]}
    return {"inputs": first}


def example_infer(model: Model) -> dict[str, Any]:
    """A body of ``POST /v2/models/{name}/infer`` for the same row, all in JSON."""
    first = _first_row(model)
    return {
        "inputs": [
            tensor_metadata(s) | {"shape": list(first[s.name].shape), "data": first[s.name]}
            for s in model.predictor.inputs
        ]
    }


def example_label(model: Model) -> dict[str, Any]:
    """A body of ``POST /v1/labels``, for a row that was asked about under the id ``first``."""
    label: Any = 0 if model.task == "classification" else [0.0] * model.width
    if model.classes is not None:
        label = model.classes[0]
    elif model.task == "regression" and model.width == 1:
        label = 0.0
    return {"id": "first:0", "label": label, "model": model.name}


def _first_row(model: Model) -> dict[str, Array]:
    stored = orjson.loads(model.predictor.bundle.files[EXAMPLES])["predict"]["inputs"]
    specs = model.predictor.inputs
    return {s.name: np.asarray(stored[s.name][:1], s.dtype) for s in specs}
