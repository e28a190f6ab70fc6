"""Record batches as rows, for tests."""

import pyarrow as pa

from posthoc.contract import TensorSpec
from posthoc.data import infer_mapping, to_rows


def spec(name="x", dtype="float32", *tail):
    return TensorSpec(name=name, dtype=dtype, shape=(-1, *tail))


def rows_of(columns, specs, mapping=None, **kwargs):
    batch = columns if isinstance(columns, pa.RecordBatch) else pa.record_batch(columns)
    mapping = mapping or infer_mapping(batch.schema.names, specs, target=None)
    return to_rows(batch, mapping, specs, **kwargs)
