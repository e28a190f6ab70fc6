"""The kind of shift of a bundle's latest rows: alike in pages of any size and after a restart."""

from __future__ import annotations

import json

import numpy as np
import pytest

from calibration.drift import shift_kind
from posthoc.contract import DataError
from service.monitor.following import Predicted
from service.monitor.kinds import Kinds, feed, from_json, statement, to_json
from service.monitor.stream import Options
from service.rows import Source
from tests.service.streams import classification, regression

OPTIONS = Options(reference=800, window=300)
SOURCE = Source("m", "1", "a" * 64, "classification", 7)


def page(stream, rows, **changed) -> Predicted:
    """As the ledger is read."""
    given = {k: v[rows] for k, v in (stream.fields | changed).items()}
    names = ("label", "confidence", "entropy", "ood_pvalue")
    fields = {k: given[k].astype(np.float64) for k in names if k in given}
    return Predicted(SOURCE, np.zeros(len(given["label"])), fields, given["probs"])


def fed(stream, size, *, n=None, start=None, **changed):
    state = start or Kinds()
    for first in range(0, n or len(stream.ids), size):
        state = feed(state, page(stream, slice(first, first + size), **changed), OPTIONS)
    return state


def test_pages_of_any_size_give_the_first_rows_as_reference_and_the_last_as_window():
    stream = classification(2000)
    whole = fed(stream, 2000)
    f = stream.fields
    cells = shift_kind.cells(f["label"], f["confidence"], f["ood_pvalue"])
    want = shift_kind.update(shift_kind.start(7), cells[:800], f["probs"][:800])
    assert whole.reference == want
    assert whole.latest == tuple(cells[-300:].tolist())
    for size in (1999, 310, 7):
        paged = fed(stream, size)
        assert paged.latest == whole.latest
        assert (paged.reference.n, paged.reference.strange) == (800, want.strange)
        np.testing.assert_allclose(paged.reference.labels, want.labels, atol=1e-9)
        assert statement(paged, OPTIONS).kind == statement(whole, OPTIONS).kind == "none"


def test_nothing_is_told_before_the_window_is_full_and_strange_rows_are_after_it():
    stream = classification(1400)
    assert statement(Kinds(), OPTIONS) is None
    assert statement(fed(stream, 100, n=1000), OPTIONS) is None
    strange = stream.fields["ood_pvalue"].copy()
    strange[-300:][::3] = 0.001  # a third of the latest window
    found = statement(fed(stream, 100, ood_pvalue=strange), OPTIONS)
    assert found.kind == "some_rows"
    assert found.low < 1 / 3 < found.high


def test_a_restart_goes_on_with_the_same():
    stream = classification(1400)
    for n in (0, 500, 1400):
        before = fed(stream, 100, n=n) if n else Kinds()
        after = from_json(json.loads(json.dumps(to_json(before))))
        assert after == before
        assert fed(stream, 100, start=after) == fed(stream, 100, start=before)
    for saved in ([], {}, {"reference": "{}", "pvalues": True, "latest": []}):
        with pytest.raises(DataError):
            from_json(saved)


def test_what_says_nothing_is_left_out():
    stream = classification(1200)
    part = slice(0, 1200)
    bare = page(stream, part)
    assert feed(Kinds(), Predicted(SOURCE, bare.time, bare.fields, None), OPTIONS) == Kinds()
    numbers = regression(10).fields["std"].astype(np.float64)
    of_regression = Predicted(SOURCE, np.zeros(10), {"std": numbers[:, 0]}, None)
    assert feed(Kinds(), of_regression, OPTIONS) == Kinds()
    known = feed(Kinds(), bare, OPTIONS)
    without = {k: v for k, v in bare.fields.items() if k != "ood_pvalue"}
    lacking = Predicted(SOURCE, bare.time, without, bare.probs)
    assert feed(known, lacking, OPTIONS) == known  # these had p-values before
    fewer = Predicted(SOURCE, bare.time, bare.fields, bare.probs[:, :5])
    assert feed(known, fewer, OPTIONS) == known
    spoilt = stream.fields["confidence"].copy()
    spoilt[[3, 1199]] = np.nan
    left = feed(Kinds(), page(stream, part, confidence=spoilt), OPTIONS)
    assert left.reference.n == 800
    f = stream.fields
    cells = shift_kind.cells(f["label"], f["confidence"], f["ood_pvalue"])
    assert left.latest == tuple(cells[-301:-1].tolist())
    wide = Predicted(SOURCE, bare.time, bare.fields, np.full((1200, 257), 1 / 257, np.float32))
    assert feed(Kinds(), wide, OPTIONS) == Kinds()
    plain = feed(Kinds(), lacking, OPTIONS)
    assert not plain.pvalues
    assert statement(plain, OPTIONS).kind == "none"
    assert feed(plain, bare, OPTIONS).latest[-300:] == plain.latest
