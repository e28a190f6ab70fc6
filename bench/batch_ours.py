"""The sides of `bench.batch`, each a task of a process of its own, one thread.

The loop is what one writes by hand: batches of a Parquet file, stacked, through the same graph, and
the answers into another Parquet file.
"""

from __future__ import annotations

import shutil
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pyarrow as pa
import pyarrow.parquet as pq

from bench.worker import most_bytes, serve
from calibration.predictor import Predictor
from service.scoring import score

BATCH = 256
GROUP = 64  # batches that the loop writes at once: small row groups would be slow


def ours(bundle: str, data: str, out: str, workers: int = 0) -> dict[str, float]:
    """Seconds of `score`, the opening of the bundle included; ``workers`` of Ray where not 0."""
    shutil.rmtree(out, ignore_errors=True)
    more: dict[str, Any] = {"engine": "ray", "workers": workers} if workers else {}
    started = time.perf_counter()
    summary = score(bundle, data, out, batch_size=BATCH, threads=1, **more)
    seconds = time.perf_counter() - started
    assert summary.good == summary.rows and not summary.failed, summary
    return {"seconds": seconds, "rows": summary.rows, "peak_mb": most_bytes() / 2**20}


def loop(bundle: str, data: str, out: str, write: bool, times: int = 1) -> dict[str, float]:
    """Seconds of a hand-written loop, the opening of the graph included; ``write`` or only run, so
    often over the same rows."""
    predictor = Predictor(bundle)  # tells which columns and outputs; not in the time
    columns = next(iter(predictor.manifest.mapping.inputs.values()))
    (spec,), fields = predictor.inputs, list(predictor.fields)
    names = [predictor.manifest.output_names[f] for f in fields]
    started = time.perf_counter()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(
        str(Path(bundle) / "predictor.onnx"), options, providers=["CPUExecutionProvider"]
    )
    rows, writer = 0, None
    held: list[pa.Table] = []
    for batch in chain.from_iterable(
        pq.ParquetFile(data).iter_batches(BATCH, columns=list(columns)) for _ in range(times)
    ):
        if len(columns) > 1:
            x = np.stack([batch.column(c).to_numpy() for c in columns], 1)
        else:
            x = _array(batch.column(columns[0]))
        found = session.run(names, {spec.name: x.astype(spec.dtype, copy=False)})
        rows += len(x)
        if write:
            held.append(pa.table({n: _column(v) for n, v in zip(fields, found, strict=True)}))
            writer = writer or pq.ParquetWriter(out, held[0].schema)
            if len(held) == GROUP:
                writer.write_table(pa.concat_tables(held))
                held.clear()
    if writer is not None:
        if held:
            writer.write_table(pa.concat_tables(held))
        writer.close()
    return {"seconds": time.perf_counter() - started, "rows": rows, "peak_mb": most_bytes() / 2**20}


def _array(column: pa.Array) -> np.ndarray:
    """A column of tensors or of lists of one length, whose first axis is the row."""
    if isinstance(column, pa.FixedShapeTensorArray):
        found: np.ndarray = column.to_numpy_ndarray()
    else:
        found = column.flatten().to_numpy().reshape(len(column), -1)
    return found


def _column(value: np.ndarray) -> pa.Array:
    if value.ndim == 1:
        return pa.array(value)
    return pa.FixedSizeListArray.from_arrays(pa.array(value.ravel()), value.shape[1])


if __name__ == "__main__":
    serve({"ours": ours, "loop": loop})
