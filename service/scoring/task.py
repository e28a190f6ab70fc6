"""One fragment, scored and committed: the same task for every engine.

An output is done when it exists and its footer names this run, this source as it is now, and as
many rows as it holds; nothing else records progress, so nothing can disagree with the files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from calibration.predictor import Predictor
from service.scoring.answers import Answers, answer
from service.scoring.commit import writing
from service.scoring.errors import DamageError, ErrorRatioError
from service.scoring.fragments import Fragment
from service.scoring.measures import Measures
from service.scoring.output import Output
from service.scoring.reading import Block, Reader, check_damaged
from service.scoring.schema import error_table, to_table

ERRORS_FOLDER = "_errors"
STAMP = b"hedged"


@dataclass(frozen=True, slots=True)
class Plan:
    """What every fragment of a run is scored with: ``alpha`` None is the bundle's own level,
    ``fields`` are those that are written, ``measures`` what is measured beside them."""

    output: Output
    run: str
    bundle: str
    reader: Reader
    schema: pa.Schema
    alpha: float | None
    fields: tuple[str, ...]
    measures: Measures = Measures()


@dataclass(frozen=True, slots=True)
class Outcome:
    """Rows of a committed fragment that have a prediction, and those that have none; ``measured``
    is what `Measures.to_text` keeps of the good ones."""

    good: int
    bad: int
    measured: str = "{}"


def committed(fragment: Fragment, plan: Plan) -> Outcome | None:
    """What an earlier process committed for this fragment in this run; None when it is to do."""
    footer = _footer(plan.output, fragment.name)
    stamp = _stamp(footer)
    good, bad, kept = (stamp.pop(name, None) for name in ("good", "bad", "measured"))
    if stamp != _identity(fragment, plan) or not isinstance(good, int) or not isinstance(bad, int):
        return None
    if good + bad != fragment.rows or footer is None or footer.num_rows != good:
        return None
    if bad:
        errors = _footer(plan.output, errors_name(fragment))
        if errors is None or errors.num_rows != bad:
            return None
    if not isinstance(kept, str) or plan.measures.from_text(kept) is None:
        return None
    return Outcome(good, bad, kept)


def errors_name(fragment: Fragment) -> str:
    """Where the rows without a prediction go, below the output."""
    return f"{ERRORS_FOLDER}/{fragment.name}"


def score_fragment(
    predictor: Predictor,
    fragment: Fragment,
    plan: Plan,
    blocks: Iterator[Block],
    *,
    allowed_bad: int,
    pool: Executor,
    on_rows: Callable[[int], None],
) -> Outcome:
    """Score ``blocks``, write the output and the bad rows, and commit both, the output last.

    ``pool`` writes one block while the next is scored; ``on_rows`` hears of each block's rows.
    Raises ErrorRatioError beyond ``allowed_bad``, DamageError when the source cannot be
    decoded, ScoringError when it changed meanwhile or the output cannot be written; nothing is
    committed then.
    """
    q_hat = None if plan.alpha is None else predictor.q_hat(plan.alpha)
    needed = tuple(dict.fromkeys((*plan.fields, *plan.measures.fields)))
    run = partial(predictor.run, outputs=needed, q_hat=q_hat)
    good, measured = 0, plan.measures.start()
    bad: dict[int, str] = {}
    with Writer(plan.output, fragment.name, plan.schema, pool) as writer:
        try:
            for block in blocks:
                tables, at = [], 0
                for rows in block.parts:
                    hashes = rows.content_hashes if plan.reader.randomised else None
                    inputs = rows.inputs | predictor.beside(rows.groups, hashes)
                    size = plan.reader.batch_size
                    answers = answer(run, inputs, rows.bad, size, plan.fields)
                    first = block.first_row + at
                    bad.update({first + r: why for r, why in answers.bad.items()})
                    if len(bad) > allowed_bad:
                        row, why = next(iter(bad.items()))
                        raise ErrorRatioError(f"first in {fragment.source.name}: row {row}: {why}")
                    if len(answers.rows):
                        kept = _good(block.kept.slice(at, len(rows)), answers)
                        tables.append(_table(plan, predictor, first, kept, answers))
                        beside = _good(block.beside.slice(at, len(rows)), answers)
                        found = rows.content_hashes[answers.rows], beside, answers.fields
                        measured = plan.measures.add(measured, *found)
                    good += len(answers.rows)
                    at += len(rows)
                if tables:
                    writer.write(pa.concat_tables(tables))
                on_rows(at)
        except DamageError:
            fragment.source.check_unchanged()  # a file that was replaced is not a damaged one
            fragment.source.check_readable()  # nor is one that cannot be fetched
            check_damaged(fragment, plan.reader)
            raise
        fragment.source.check_unchanged()
        _commit_errors(fragment, plan, bad)
        outcome = Outcome(good, len(bad), plan.measures.to_text(measured))
        writer.commit({**_identity(fragment, plan), **asdict(outcome)})
    return outcome


def _table(
    plan: Plan, predictor: Predictor, first_row: int, kept: pa.RecordBatch, answers: Answers
) -> pa.Table:
    """The output rows of a part of a block."""
    rows = first_row + answers.rows
    fields = {name: answers.fields[name] for name in plan.fields}
    return to_table(plan.schema, predictor.manifest, kept, rows, fields)


def _good(columns: pa.RecordBatch, answers: Answers) -> pa.RecordBatch:
    """The rows that were answered."""
    return columns.take(pa.array(answers.rows)) if answers.bad else columns


class Writer:
    """One Parquet file in the making: a row group for each table, the stamp in its footer.

    The writing settings are pinned, since a resumed run must give the bytes of an unbroken one.
    """

    def __init__(self, output: Output, name: str, schema: pa.Schema, pool: Executor):
        self._output = output
        self._name = name
        self._path = f"{output.text}/{name}"
        self._pool = pool
        self._stack = ExitStack()
        self._pending: Future[None] | None = None
        self._schema = schema

    def __enter__(self) -> Writer:
        with ExitStack() as stack:
            file = stack.enter_context(self._output.new_file(self._name))
            with writing(self._path):
                self._writer = pq.ParquetWriter(
                    file,
                    self._schema,
                    version="2.6",
                    compression="zstd",
                    compression_level=1,
                    use_dictionary=_text_columns(self._schema),
                    write_page_checksum=True,
                )
            self._stack = stack.pop_all()
        return self

    def write(self, table: pa.Table) -> None:
        """Write a table in the pool, after the one before; its failure shows at the next call."""
        self._settle()
        self._pending = self._pool.submit(self._write, table)

    def commit(self, stamp: dict[str, Any]) -> None:
        """Close the file with ``stamp`` in its footer and give it its final name."""
        self._settle()
        with writing(self._path):
            self._writer.add_key_value_metadata({STAMP: json.dumps(stamp, sort_keys=True)})
            self._writer.close()
        self._stack.close()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            if self._pending is not None:
                self._pending.exception()
            with suppress(Exception):
                self._writer.close()
            self._writer.is_open = False  # else it tries once more when it is collected
            self._stack.__exit__(kind, error, trace)

    def _write(self, table: pa.Table) -> None:
        with writing(self._path):
            self._writer.write_table(table, row_group_size=max(1, table.num_rows))

    def _settle(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None


def _identity(fragment: Fragment, plan: Plan) -> dict[str, Any]:
    """What a footer says of a fragment beside its counts."""
    source = fragment.source
    return {
        "run": plan.run,
        "bundle": plan.bundle,
        "source": source.name,
        "source_size": source.size,
        "source_mtime_ns": source.mtime_ns,
        "first_row": fragment.first_row,
        "rows": fragment.rows,
    }


def _commit_errors(fragment: Fragment, plan: Plan, bad: dict[int, str]) -> None:
    name = errors_name(fragment)
    if not bad:
        plan.output.remove(name)
        return
    table = error_table(fragment.source.name, list(bad), list(bad.values()))
    with plan.output.new_file(name) as file, writing(f"{plan.output.text}/{name}"):
        pq.write_table(table, file, version="2.6", compression="zstd", compression_level=1)


def _stamp(footer: pq.FileMetaData | None) -> dict[str, Any]:
    """What `Writer.commit` left in a footer; empty when it left nothing."""
    metadata = (footer.metadata if footer is not None else None) or {}
    try:
        stamp = json.loads(metadata.get(STAMP, b"{}"))
    except ValueError:
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _footer(output: Output, name: str) -> pq.FileMetaData | None:
    try:
        with output.open(name) as file:
            return pq.read_metadata(file)
    except (OSError, pa.ArrowException):
        return None


def _text_columns(schema: pa.Schema) -> list[str]:
    """Parquet paths of text columns: only there is a dictionary worth its time."""
    paths = []
    for field in schema:
        path, kind = field.name, field.type
        while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
            path, kind = f"{path}.list.element", kind.value_type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            paths.append(path)
    return paths
