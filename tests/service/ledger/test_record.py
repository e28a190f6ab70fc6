"""Predictions of many requests at once: what is counted and kept is what each request was told."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families

from service import instruments
from service.ledger import Ledger
from service.live import announce
from service.models import Model, load_model
from service.record import Row, kept, record
from service.schema import ledger_url, make_engine, predictions
from tests.factory import rows, tiny_bundle
from tests.service.ledger.helpers import metric

SIZES = (1, 1, 1, 4, 1, 2, 1, 1)  # rows of a request; those of one wait in another form
N = sum(SIZES) * 6
LEVELS = ("0.9", "0.95", None)
NAMES = itertools.count()


@pytest.fixture(scope="module", params=["classification", "regression"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tiny_bundle(tmp_path_factory.mktemp("record") / "m", request.param)
    return load_model(path, device="cpu", threads=1)


def answered(model: Model) -> dict[str, np.ndarray]:
    x, _ = rows(model.task, N, 3)
    q = np.full(N, np.float32(0.7))
    return model.run({"x": x, "q_hat": q}, model.fields)


def named(model: Model, ledger: Ledger) -> Model:
    """The model under a name that no other test counts under."""
    found = dataclasses.replace(model, name=f"recorded-{next(NAMES)}")
    announce(found, ledger)
    return found


def counted(name: str) -> dict[str, float]:
    """Every sample of a model, by its name and its other labels."""
    found = {}
    for family in text_string_to_metric_families(instruments.render().decode()):
        for sample in family.samples:
            if sample.labels.get("model") == name:
                others = sorted((k, v) for k, v in sample.labels.items() if k != "model")
                found[f"{sample.name} {others}"] = sample.value
    return found


def table(url: str, name: str) -> list[dict[str, Any]]:
    columns = [c for c in predictions.c if c.name not in ("bundle", "model", "time", "seq")]
    engine = make_engine(ledger_url(url))
    with engine.connect() as conn:
        found = conn.execute(sa.select(*columns).where(predictions.c.model == name)).mappings()
        all_rows = [dict(r) for r in found]
    engine.dispose()
    return sorted(all_rows, key=lambda r: int(r["id"]))


@pytest.mark.parametrize("grouped", [False, True])
def test_rows_one_by_one_are_recorded_as_a_whole_batch_is(
    model: Model, url: str, open_ledger: Any, grouped: bool
) -> None:
    ledger = open_ledger(url)
    one, other = named(model, ledger), named(model, ledger)
    fields = answered(model)
    group = np.arange(N) % 5 if grouped else None
    pieces, start = [], 0
    for i, n in enumerate(SIZES * 6):
        part = slice(start, start + n)
        ids = [str(k) for k in range(N)[part]]
        own = {name: value[part] for name, value in fields.items()}
        level = LEVELS[i % 3]
        pieces.append(kept(one, [level], ids, own, None if group is None else group[part]))
        for k in range(N)[part]:  # the reference: row by row, with arrays
            single = {name: value[k : k + 1] for name, value in fields.items()}
            instruments.observe_prediction(other.name, other.version, single, level)
            which = None if group is None else group[k : k + 1]
            # These bundles know no group.
            instruments.count_unknown_groups(other.name, other.version, int(grouped))
            ids = [str(k)]
            ledger.record(other.name, "1", model.identity, ids, single, level, which)
        start += n
    assert {isinstance(p, Row) for p in pieces} == {True, False}
    record(ledger, pieces)
    assert ledger.flush()
    found = table(url, one.name)
    assert len(found) == N and found == table(url, other.name)
    assert counted(one.name) == pytest.approx(counted(other.name), rel=1e-12)
    assert metric("uq_predictions_total", model=one.name) == N


def test_a_row_holds_nothing_but_its_own_bytes(model: Model) -> None:
    """A view would keep the arrays of its whole batch in memory for as long as it waits."""
    fields = answered(model)
    first = {name: value[:1] for name, value in fields.items()}
    row = kept(model, ["0.9"], ["a"], first, np.array([3]))
    assert isinstance(row, Row) and isinstance(row.fields, bytes)
    assert len(row.fields) == sum(fields[name][0].nbytes for name in model.recorded)
    assert row.group == 3


def test_rows_that_lost_bytes_are_not_recorded_as_others(
    model: Model, tmp_path: Path, open_ledger: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = open_ledger(str(tmp_path / "l.sqlite"))
    m = named(model, ledger)
    fields = {name: value[:1] for name, value in answered(model).items()}
    row = kept(m, ["0.9"], ["7"], fields, None)
    assert isinstance(row, Row)
    size = len(row.fields)
    record(ledger, [row._replace(fields=row.fields * 2), row])
    assert f"predictions of {m.name} could not be recorded" in caplog.text
    record(ledger, [row._replace(fields=row.fields[: size - 1])])
    assert ledger.flush()
    assert table(str(tmp_path / "l.sqlite"), m.name) == []
    record(ledger, [row])
    assert ledger.flush()
    assert [r["id"] for r in table(str(tmp_path / "l.sqlite"), m.name)] == ["7"]
