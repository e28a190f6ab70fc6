"""Predictions as columns, against plain Python lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.bundle import Manifest, load_bundle
from posthoc.contract import DataError, Task, TensorSpec, output_fields
from posthoc.mapping import TableMapping
from service.scoring.schema import (
    DESCRIPTIONS,
    chosen_fields,
    field_types,
    kept_columns,
    output_schema,
    to_table,
)

SOURCE = pa.schema([("id", pa.string()), ("label", pa.int8()), ("uq_label", pa.int8())])


@pytest.fixture(scope="module")
def manifest(bundle: Any) -> Manifest:
    return load_bundle(bundle).manifest


def shaped(
    manifest: Manifest, task: Task, dims: dict[str, tuple[int, ...]], classes: Any
) -> Manifest:
    """The manifest with other outputs: each field's axes after the batch."""
    kinds = output_fields(task)
    specs = [TensorSpec(name=n, dtype=kinds[n][0], shape=(-1, *d)) for n, d in dims.items()]
    return manifest.model_copy(update={"task": task, "outputs": tuple(specs), "classes": classes})


def columns(manifest: Manifest, fields: dict[str, np.ndarray]) -> dict[str, list[Any]]:
    n = len(next(iter(fields.values())))
    kept = pa.RecordBatch.from_arrays([pa.array(["x"] * n)], names=["id"])
    schema = output_schema(manifest, SOURCE, ("id",))
    table = to_table(schema, manifest, kept, np.arange(n), fields)
    table.validate(full=True)
    assert table.schema.equals(schema)
    result: dict[str, list[Any]] = table.to_pydict()
    return result


@given(seed=st.integers(0, 99), n=st.integers(1, 9), c=st.integers(1, 6), named=st.booleans())
@settings(deadline=None, derandomize=True, max_examples=30)
def test_classification_columns(manifest: Manifest, seed: int, n: int, c: int, named: bool) -> None:
    names = tuple("ABCDEF"[:c]) if named else None
    rng = np.random.default_rng(seed)
    fields: dict[str, np.ndarray] = {
        "label": rng.integers(0, c, n),
        "probs": rng.random((n, c), np.float32),
        "set": rng.random((n, c)) < 0.4,
        "ood": rng.random(n) < 0.5,
    }
    dims = {"label": (), "probs": (c,), "set": (c,), "ood": ()}
    got = columns(shaped(manifest, "classification", dims, names), fields)
    show = (lambda i: names[i]) if names else int
    assert got["label"] == [show(i) for i in fields["label"]]
    assert got["set"] == [[show(j) for j in range(c) if row[j]] for row in fields["set"]]
    assert got["probs"] == fields["probs"].tolist()
    assert got["ood"] == fields["ood"].tolist()
    assert got["row"] == list(range(n))


@given(
    n=st.integers(1, 5),
    k=st.integers(1, 3),
    q=st.integers(1, 4),
    height=st.integers(1, 3),
    free=st.booleans(),
)
@settings(deadline=None, derandomize=True, max_examples=30)
def test_regression_columns_of_any_rank(
    manifest: Manifest, n: int, k: int, q: int, height: int, free: bool
) -> None:
    rng = np.random.default_rng(n)
    fields = {
        "mean": rng.random((n, k), np.float32),
        "std": rng.random((n, k, height, 2), np.float32),  # dense: spatial axes stay
        "quantiles": rng.random((n, k, q), np.float32),
    }
    dims = {"mean": (k,), "std": (k, -1 if free else height, 2), "quantiles": (k, q)}
    got = columns(shaped(manifest, "regression", dims, None), fields)
    single = k == 1
    assert got["mean"] == (fields["mean"][:, 0] if single else fields["mean"]).tolist()
    assert (
        got["quantiles"] == (fields["quantiles"][:, 0] if single else fields["quantiles"]).tolist()
    )
    assert got["std"] == fields["std"].tolist()


def test_every_field_has_a_type_and_a_description(manifest: Manifest) -> None:
    for task in ("classification", "regression"):
        named = set(output_fields(task))
        assert named <= set(DESCRIPTIONS)
    for field in output_schema(manifest, SOURCE, ("id",)):
        assert field.name == "id" or field.metadata[b"description"]
    assert field_types(manifest)["set"] == pa.list_(pa.string())


def test_what_is_written_and_what_is_copied() -> None:
    given = ("label", "probs", "ood")
    assert chosen_fields(given, ()) == given
    assert chosen_fields(given, ("ood", "label")) == ("label", "ood")  # in the contract's order
    with pytest.raises(DataError, match="gives no 'colour'; it gives label, probs, ood"):
        chosen_fields(given, ("ood", "colour"))
    mapping = TableMapping(inputs={"x": ("a",)}, id="id")
    assert kept_columns(mapping, ("label", "id"), SOURCE) == ("id", "label")
    assert kept_columns(mapping, ("label",), pa.schema([SOURCE.field("label")])) == ("label",)
    assert kept_columns(TableMapping(inputs={}), (), SOURCE) == ()


def test_names_that_clash_take_the_prefix(manifest: Manifest) -> None:
    schema = output_schema(manifest, SOURCE, ("label",))
    assert schema.field("label").type == pa.int8()
    assert schema.field("uq_label").type == pa.string()
    with pytest.raises(DataError, match="take names of the output's own"):
        output_schema(manifest, SOURCE, ("label", "uq_label"))
