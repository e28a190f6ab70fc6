"""Stand-ins for strange rows: what a held-out class leaves behind, and the table of scores."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from calibration.fit_ood import fit_ood
from calibration.ood_choice import candidates
from calibration.proxies import FEWEST_CLASSES, GROUPS, Proxy, held_out_classes, table
from posthoc import rows as blocks_of
from posthoc.contract import Features, LinearHead

C, D = 7, 6


def material(n: int, seed: int) -> tuple[LinearHead, Features]:
    rng = np.random.default_rng(seed)
    head = LinearHead(np.eye(C, D) * 2, np.arange(C) / 10)
    y = rng.integers(0, C, n)
    phi = rng.normal(size=(n, D)) + 3 * np.eye(C, D)[y]
    return head, Features(phi, phi @ head.weight.T + head.bias, y)


def test_held_out_classes_leave_nothing_of_themselves() -> None:
    head, module = material(700, 0)
    _, calibration = material(500, 1)
    proxies = list(held_out_classes(head, module, calibration))
    assert len(proxies) == GROUPS
    seen: list[int] = []
    for p in proxies:
        assert p.linear is not None and p.module.y is not None
        width = len(p.linear.bias)
        assert p.module.z.shape[1] == p.inside.z.shape[1] == p.outside.z.shape[1] == width < C
        np.testing.assert_allclose(
            p.module.phi @ p.linear.weight.T + p.linear.bias, p.module.z, rtol=1e-12
        )
        kept = [int(np.flatnonzero(np.isclose(head.bias, b))[0]) for b in p.linear.bias]
        held = sorted(set(range(C)) - set(kept))
        seen += held
        own = [np.isin(np.asarray(r.y), held) for r in (module, calibration)]
        assert len(p.outside) == own[0].sum() + own[1].sum() and p.outside.y is None
        assert len(p.module) == (~own[0]).sum() and len(p.inside) == (~own[1]).sum()
        # The labels of the others are those of the classes that are left.
        np.testing.assert_array_equal(np.asarray(kept)[p.module.y], module.y[~own[0]])
    assert sorted(seen) == list(range(C))


def test_few_classes_or_rows_make_no_proxy() -> None:
    head, rows = material(600, 0)
    few = blocks_of.take(rows, np.asarray(rows.y) < FEWEST_CLASSES - 1)
    assert list(held_out_classes(head, few, few)) == []
    _, handful = material(30, 0)
    assert list(held_out_classes(head, handful, handful)) == []


def test_the_table_is_that_of_single_fits() -> None:
    head, module = material(600, 0)
    (_, calibration), (_, inside) = material(400, 1), material(300, 2)
    outside = Features(inside.phi + 2.0, inside.z + 1.0)
    proxy = Proxy("far", head, module, calibration, inside, outside)
    scores = ["gen", "mahalanobis", "gen+mahalanobis", "rank:gen+mahalanobis", "rmds"]
    found, failed = table(scores, [proxy], "classification")
    assert not failed
    for score in scores:
        ood = fit_ood(head, module, calibration, task="classification", ood=score)
        both = [ood.score(r.phi, r.z) for r in (inside, outside)]
        truth = np.repeat([0, 1], [len(inside), len(outside)])
        want = roc_auc_score(truth, np.concatenate(both))
        assert found[score]["far"] == pytest.approx(want, abs=1e-12)


def test_a_score_that_does_not_fit_is_told_of() -> None:
    _, module = material(600, 0)
    bare = Features(None, module.z, module.y)
    proxy = Proxy("far", None, bare, bare, bare, Features(None, -module.z))
    found, failed = table(["gen", "knn", "gen+knn"], [proxy], "classification")
    assert list(found) == ["gen"] and "does not fit this model" in failed["gen+knn"]


def test_candidates_are_what_the_model_has() -> None:
    head, _ = material(10, 0)
    bare = candidates("classification", False, None)
    assert "gen" in bare and not {"knn", "vim", "gen+mahalanobis"} & set(bare)
    assert {"vim", "react", "rmds+vim"} <= set(candidates("classification", True, head))
    assert "react" not in candidates("classification", True, None)
    assert "gen" not in candidates("regression", True, head)
