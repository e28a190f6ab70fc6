"""What is watched of a real bundle, and what of a bundle that promises something else."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import beta

from calibration.bundle import load_bundle
from calibration.metrics.totals import ClassificationTotals, update_classification
from calibration.predictor import Predictor
from posthoc.contract import DataError
from service.monitor.promises import ERROR, Promises, from_json, promises_of, to_json, with_labels
from tests.factory import rows


@pytest.fixture(scope="module")
def bundle(classification_bundle):
    return load_bundle(classification_bundle)


@pytest.fixture(scope="module")
def served(classification_bundle):
    """Answers to 3,000 fresh rows, at the bundle's own level, and their truth."""
    x, y = rows("classification", 3000, 21)
    return Predictor(classification_bundle).run({"x": x}), y


def totals(fields, y, level="0.9"):
    return update_classification(
        ClassificationTotals(),
        confidence=fields["confidence"],
        label=fields["label"],
        y=y,
        covered=fields["set"][np.arange(len(y)), y],
        set_size=fields["set_size"],
        level=level,
    )


def test_floors_are_those_of_the_bundles_own_rows(bundle):
    found = promises_of(bundle.manifest, bundle.identity)
    assert found.identity == bundle.identity
    guarantees = bundle.manifest.conformal.guarantees
    assert set(found.levels) == {f"{1 - g.alpha:g}" for g in guarantees}
    for g in guarantees:
        one = found.levels[f"{1 - g.alpha:g}"]
        law = beta(g.rank, g.n + 1 - g.rank)
        assert one.floor == pytest.approx(law.ppf(ERROR / 2) - 0.02)
        assert one.error == ERROR / 2
        assert found.conformal_rows[f"{1 - g.alpha:g}"] == g.n
    evaluation = bundle.manifest.evaluation
    n, share = evaluation["rows"], evaluation["hedged"]["accuracy"]
    hits = round(n * share)
    assert found.accuracy is not None
    assert found.accuracy.floor == pytest.approx(beta(hits, n + 1 - hits).ppf(ERROR / 2) - 0.02)


def test_a_healthy_bundle_is_quiet_and_spoilt_labels_are_an_alarm(bundle, served):
    fields, y = served
    begin = promises_of(bundle.manifest, bundle.identity)
    fine = begin
    for part in np.array_split(np.arange(len(y)), 30):
        fine = with_labels(fine, totals({k: v[part] for k, v in fields.items()}, y[part]))
    assert fine.accuracy is not None and fine.accuracy.n == fine.levels["0.9"].n == len(y)
    assert fine.levels["0.95"].n == 0
    assert not fine.accuracy.alarm and not fine.levels["0.9"].alarm
    wrong = np.where(np.arange(len(y)) % 3 == 0, (y + 1) % 3, y)
    bad = with_labels(begin, totals(fields, wrong))
    assert bad.accuracy is not None
    assert bad.accuracy.alarm and bad.levels["0.9"].alarm and not bad.levels["0.95"].alarm
    # A level that is not the bundle's own moves none.
    assert with_labels(begin, totals(fields, wrong, "0.8")).levels == begin.levels
    assert from_json(to_json(bad)) == bad
    for text in ({}, {"identity": "f", "levels": [], "accuracy": None, "conformal_rows": {}}):
        with pytest.raises(DataError):
            from_json(text)


def changed(manifest, **parts):
    """The manifest with other values at paths such as ``conformal__given``."""
    for path, value in parts.items():
        outer, _, inner = path.partition("__")
        part = getattr(manifest, outer)
        new = (
            part | {inner: value}
            if isinstance(part, dict)
            else part.model_copy(update={inner: value})
        )
        manifest = manifest.model_copy(update={outer: new})
    return manifest


@pytest.mark.parametrize(
    ("parts", "levels", "accuracy"),
    [
        ({"conformal__given": "class"}, 0, True),  # depends on the mix of classes
        ({"conformal__shift": "target"}, 0, False),
        ({"splits__by": "subject"}, 2, False),  # test rows are not independent
        ({"evaluation__rows": 0}, 2, False),
        ({"evaluation__hedged": {"accuracy": 0.7771}}, 2, False),  # of no number of rows
        ({"evaluation__hedged": {}}, 2, False),
    ],
)
def test_what_is_not_promised_is_not_watched(bundle, parts, levels, accuracy):
    found = promises_of(changed(bundle.manifest, **parts), "f")
    assert (len(found.levels), found.accuracy is not None) == (levels, accuracy)


def test_of_maps_nothing_is_watched(maps_root):
    manifest = load_bundle(maps_root / "segmenter" / "1").manifest
    assert promises_of(manifest, "f") == Promises("f")


def test_of_a_regressor_coverage_alone(regressor):
    found = promises_of(load_bundle(regressor).manifest, "f")
    assert found.accuracy is None
    assert all(math.isfinite(one.floor) for one in found.levels.values()) and found.levels
