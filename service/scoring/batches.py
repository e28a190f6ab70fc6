"""Record batches in, predictions out: for Spark, Dask, DuckDB and whatever else speaks Arrow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from calibration.bundle import MANIFEST, sha256
from calibration.predictor import Predictor
from posthoc.contract import BundleError, DataError
from posthoc.data import TableMapping, to_rows
from service.scoring.answers import Answers, answer
from service.scoring.schema import chosen_fields, field_columns, kept_columns, output_schema

ERROR = "uq_error"


def score_batches(
    bundle: str | Path,
    batches: Iterable[pa.RecordBatch],
    *,
    batch_size: int = 256,
    threads: int = 1,
    device: str = "cpu",
    alpha: float | None = None,
    passthrough: Sequence[str] = (),
    outputs: Sequence[str] = (),
) -> Iterator[pa.RecordBatch]:
    """Predictions for record batches, one for each that comes, row for row.

    Columns are those of `batches_schema`: as in the files of `service.scoring.score`, but without
    ``row``, with lists of one size as plain lists, which more engines read, and at the end
    ``uq_error``, null for a good row. A row without a prediction stays in
    its place, with nulls in every prediction field and the reason in ``uq_error``, so what comes
    out can be set beside what went in. Rows run in batches of ``batch_size`` counted from the start
    of each record batch; other arguments are those of `score`. The bundle is opened once in a
    process, and again when another one lies at its path.

    On Spark (``df`` a DataFrame, bundle on a path that every executor sees), with ``mapInArrow``::

        import hedged

        def predict(batches):
            yield from hedged.score_batches("/bundles/churn", batches, passthrough=["customer"])

        schema = hedged.batches_schema("/bundles/churn", example, passthrough=["customer"])
        scored = df.mapInArrow(predict, from_arrow_schema(schema))

    ``example`` is the schema of the input, as ``to_arrow_schema(df.schema)`` gives it; both
    functions are in ``pyspark.sql.pandas.types``. A task that Spark runs twice gives the same rows.

    Raises DataError for a column that cannot be used and a dense bundle, whose maps `score` takes,
    BundleError for a bundle that cannot be trusted, ModelError as `answer` does.
    """
    predictor = _predictor(str(bundle), _identity(Path(bundle)), device, threads)
    if batch_size < 1:
        raise DataError(f"the batch size must be at least 1, not {batch_size}")
    fields = chosen_fields(predictor.fields, outputs)
    q_hat = None if alpha is None else predictor.q_hat(alpha)
    run = partial(predictor.run, outputs=fields, q_hat=q_hat)
    for batch in batches:
        kept = _kept(predictor, passthrough, batch.schema)
        schema = output_schema(predictor.manifest, batch.schema, kept, fields)
        rows = to_rows(
            batch,
            _mapping(predictor, batch.schema),
            predictor.inputs,
            hashed="u" in {s.name for s in predictor.optional},
        )
        inputs = rows.inputs | predictor.beside(rows.groups, rows.content_hashes)
        answers = answer(run, inputs, rows.bad, batch_size)
        yield _aligned(predictor, batch, kept, schema, answers)


def batches_schema(
    bundle: str | Path,
    source: pa.Schema,
    *,
    passthrough: Sequence[str] = (),
    outputs: Sequence[str] = (),
) -> pa.Schema:
    """Columns of `score_batches` for record batches of the schema ``source``, with a description in
    each field's metadata."""
    predictor = _predictor(str(bundle), _identity(Path(bundle)), "cpu", 1)
    kept = _kept(predictor, passthrough, source)
    fields = chosen_fields(predictor.fields, outputs)
    return _schema(output_schema(predictor.manifest, source, kept, fields), kept)


def _kept(predictor: Predictor, passthrough: Sequence[str], source: pa.Schema) -> tuple[str, ...]:
    for name in passthrough:
        if source.names.count(name) != 1:
            raise DataError(f"column {name!r} is to be passed through; there are {source.names}")
    return kept_columns(predictor.manifest.mapping, passthrough, source)


def _schema(schema: pa.Schema, kept: Sequence[str]) -> pa.Schema:
    """That of `output_schema` without its first column, the row's index, and with the error."""
    if ERROR in kept:
        raise DataError(f"the passed-through column {ERROR!r} takes a name of the output's own")
    first = 1 + len(kept)
    made = [schema.field(i) for i in range(first, len(schema))]
    error = pa.field(ERROR, pa.string(), metadata={"description": "why there is no prediction"})
    return pa.schema(
        [*[schema.field(i) for i in range(1, first)]]
        + [f.with_type(_plain(f.type)) for f in made]
        + [error]
    )


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain(kind.value_type))
    return kind


def _aligned(
    predictor: Predictor,
    batch: pa.RecordBatch,
    kept: Sequence[str],
    schema: pa.Schema,
    answers: Answers,
) -> pa.RecordBatch:
    """Answers in the places of their rows."""
    told = _schema(schema, kept)
    kinds = told.types[len(kept) : -1]
    columns: list[pa.Array] = [batch.column(name) for name in kept]
    if answers.fields:
        places = np.full(batch.num_rows, -1)
        places[answers.rows] = np.arange(len(answers.rows))
        at = pa.array(places, mask=places < 0)
        made = field_columns(predictor.manifest, answers.fields).values()
        columns += [c.cast(kind).take(at) for c, kind in zip(made, kinds, strict=True)]
    else:
        columns += [pa.nulls(batch.num_rows, kind) for kind in kinds]
    errors = [answers.bad.get(row) for row in range(batch.num_rows)]
    columns.append(pa.array(errors, pa.string()))
    return pa.RecordBatch.from_arrays(columns, schema=told)


def _mapping(predictor: Predictor, source: pa.Schema) -> TableMapping:
    """The inputs, and the groups where the bundle has thresholds for them and the rows name any."""
    mapping = predictor.manifest.mapping
    asked = "group" in {s.name for s in predictor.optional} and mapping.group in source.names
    return TableMapping(inputs=mapping.inputs, group=mapping.group if asked else None)


def _identity(bundle: Path) -> str:
    """The bundle that lies at a path now: the hash of its manifest."""
    try:
        return sha256((bundle / MANIFEST).read_bytes())
    except OSError as e:
        raise BundleError(f"{bundle} is not a bundle: {e.strerror}") from e


@lru_cache(maxsize=4)
def _predictor(bundle: str, identity: str, device: str, threads: int) -> Predictor:
    """The bundle, opened once in a process: a task of a few rows must not pay for that."""
    predictor = Predictor(bundle, device=device, threads=threads)
    if predictor.bundle.identity != identity:
        raise BundleError(f"{bundle} was replaced while it was opened; try again")
    if predictor.manifest.dense is not None:
        raise DataError(f"{bundle} makes maps: use hedged score, which takes images")
    predictor.self_check()
    return predictor
