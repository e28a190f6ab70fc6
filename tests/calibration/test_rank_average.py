"""Ranks of scores among clean rows, and their average as the out-of-distribution score."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from scipy.stats import rankdata

from calibration.bundle import GOLDEN, STATE, load_bundle
from calibration.compile import check_head, compile_head
from calibration.fit_ood import fit_ood
from calibration.fit_options import FitOptions, check_options
from calibration.head import Head, Member, Ood, reference
from calibration.predictor import Predictor
from calibration.ranks import KNOTS, Ranks, fit_ranks
from posthoc import registry
from posthoc.contract import Features, HedgedError, State
from posthoc.graph import Fragment, standalone
from posthoc.runtime import open_session
from tests.calibration import networks
from tests.calibration.conftest import Fit
from tests.calibration.heads import fitted, linear, rows

RANKED = "rank:gen+rmds+vim"


def in_graph(ranks: Ranks, x: np.ndarray, opset: int = 17) -> np.ndarray:
    g = Fragment(opset)
    g.op("Identity", ranks.emit(g, g.input("x", "float32", ["N"])), out="rank")
    session = open_session(standalone(g, {"rank": ("float32", (-1,))}))
    return np.asarray(session.run(["rank"], {"x": np.asarray(x, np.float32)})[0])


def ranks_of(clean: np.ndarray, steepest: float = math.inf) -> Ranks:
    return fit_ranks(clean, float(clean.std()) or 1.0, steepest)


def clean_scores(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.lognormal(size=n).astype(np.float32).astype(np.float64)


# Ranks of one score


@pytest.mark.parametrize("ties", [False, True])
def test_up_to_as_many_rows_as_knots_ranks_are_exact(ties: bool) -> None:
    clean = clean_scores(KNOTS)
    if ties:
        clean = np.round(clean)
    want = (rankdata(clean) - 0.5) / len(clean)
    np.testing.assert_allclose(ranks_of(clean).of(clean), want, rtol=1e-12)


def test_of_more_rows_no_rank_is_off_by_more_than_a_knot() -> None:
    clean, fresh = clean_scores(20_000), clean_scores(500, 1)
    ranks = ranks_of(clean)
    assert len(ranks.knots) == KNOTS
    for x, got in zip(fresh, ranks.of(fresh), strict=True):
        assert got == pytest.approx((clean < x).mean(), abs=1.01 / (KNOTS - 1))


def test_ties_count_half() -> None:
    ranks = ranks_of(np.repeat([0.0, 1.0, 5.0], [50, 30, 20]))
    np.testing.assert_allclose(ranks.of([0.0, 1.0, 5.0, 0.5]), [0.25, 0.65, 0.9, 0.45])


def test_a_constant_score_has_the_middle_rank_and_goes_on() -> None:
    ranks = fit_ranks(np.full(40, 3.0), 0.5, math.inf)
    np.testing.assert_allclose(ranks.of([3.0, 4.0, 1.0]), [0.5, 2.5, -3.5])
    np.testing.assert_allclose(in_graph(ranks, np.asarray([3.0, 4.0, 1.0])), [0.5, 2.5, -3.5])


def test_beyond_the_clean_rows_a_rank_is_a_standard_deviation() -> None:
    clean = clean_scores(3000)
    ranks, far = ranks_of(clean), np.asarray([1.0, 2.0, 10.0])
    end = ranks.of([clean.max()])[0]
    np.testing.assert_allclose(ranks.of(clean.max() + far), end + far / clean.std(), rtol=1e-6)
    start = ranks.of([clean.min()])[0]
    np.testing.assert_allclose(ranks.of(clean.min() - far), start - far / clean.std(), rtol=1e-6)
    assert 0 < start < 1e-3 and 1 - 1e-3 < end < 1


@pytest.mark.parametrize("n", [1, 2, 3, 255, 257, 3000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ranks_rise_with_the_score_everywhere(n: int, seed: int) -> None:
    ranks = ranks_of(np.round(clean_scores(n, seed), 2), 20.0)
    x = np.linspace(-20, 60, 20_001)
    assert (np.diff(ranks.of(x)) > 0).all()
    np.testing.assert_allclose(in_graph(ranks, x), ranks.of(x.astype(np.float32)), atol=1e-5)


def test_no_piece_is_steeper_than_asked() -> None:
    """Half the rows lie within 1e-6 of each other, which float32 tells apart as noise."""
    rng = np.random.default_rng(0)
    clean = np.concatenate([1 + rng.uniform(0, 1e-6, 500), rng.uniform(1, 3, 500)])
    ranks = ranks_of(clean, 30.0)
    slopes = [
        (b - a) / (y - x) for (x, a), (y, b) in pairwise(zip(ranks.knots, ranks.ranks, strict=True))
    ]
    assert max(slopes) <= 30.0
    assert ranks.of([2.0])[0] == pytest.approx((clean < 2).mean(), abs=0.01)
    np.testing.assert_allclose(in_graph(ranks, clean), ranks.of(clean), atol=1e-5)


@pytest.mark.parametrize("opset", [13, 17, 20])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
def test_the_graph_is_the_definition(opset: int, scale: float) -> None:
    clean = clean_scores(4000) * scale
    x = np.concatenate([clean[:2000], clean_scores(200, 1) * scale * 30, -clean[:200]])
    ranks = ranks_of(clean)
    want = ranks.of(x.astype(np.float32))
    off = np.abs(in_graph(ranks, x, opset) - want) / np.maximum(1, np.abs(want))
    assert off.max() <= 1e-5


# The average


@pytest.fixture(scope="module")
def made() -> tuple[Ood, Features]:
    head = linear(6)
    ood = fit_ood(
        head,
        rows(head, "classification", 600, 0),
        rows(head, "classification", 700, 1),
        task="classification",
        ood=RANKED,
    )
    return ood, rows(head, "classification", 400, 2)


def test_the_score_is_the_mean_of_ranks(made: tuple[Ood, Features]) -> None:
    ood, fresh = made
    assert [m.name for m in ood.members] == ["gen", "rmds", "vim"]
    clean = rows(linear(6), "classification", 700, 1)
    parts = []
    for m in ood.members:
        page = registry.page(m.name)
        seen, new = (page.score(m.state, r.phi, r.z) for r in (clean, fresh))
        assert m.ranks is not None and len(m.ranks.knots) > 200
        inside = (new > seen.min()) & (new < seen.max())
        share = np.asarray([(seen < v).mean() for v in new])
        np.testing.assert_allclose(m.ranks.of(new)[inside], share[inside], atol=2 / (KNOTS - 1))
        parts.append(m.ranks.of(new))
    want = [sum(row) / 3 for row in zip(*parts, strict=True)]
    np.testing.assert_allclose(ood.score(fresh.phi, fresh.z), want, rtol=1e-12)
    assert abs(np.mean(ood.score(clean.phi, clean.z)) - 0.5) < 0.01


def test_a_member_that_rises_lifts_the_score(made: tuple[Ood, Features]) -> None:
    """Everything else unchanged: its mean rank falls when the clean rows' scores move up."""
    ood, fresh = made
    before = ood.score(fresh.phi, fresh.z)
    for i, m in enumerate(ood.members):
        assert m.ranks is not None
        lower = Ranks(m.ranks.knots - 0.3 * m.scale, m.ranks.ranks, m.ranks.slope)
        others = [*ood.members]
        others[i] = Member(m.name, m.state, m.mean, m.scale, lower)
        raised = Ood(tuple(others), ood.table, ood.pvalues)
        assert (raised.score(fresh.phi, fresh.z) > before).all()


def test_any_rising_change_of_a_score_within_the_knots_is_of_no_account() -> None:
    """What the mean of standardised scores is not."""
    clean, fresh = clean_scores(KNOTS), clean_scores(50, 1)
    fresh = fresh[(fresh > clean.min()) & (fresh < clean.max())]
    close = np.searchsorted(np.sort(clean), fresh)
    bent = ranks_of(np.exp(clean / 3)).of(np.exp(fresh / 3))
    np.testing.assert_allclose(bent, ranks_of(clean).of(fresh), atol=1 / KNOTS)
    np.testing.assert_allclose(bent, close / KNOTS, atol=1 / KNOTS)


@pytest.mark.parametrize("ood", [RANKED, "rank:gen", "rank:mds+fdbd+nci+mahalanobis"])
def test_a_compiled_head_agrees_with_its_definition(ood: str) -> None:
    done, parts, fresh = fitted(ood=ood, max_error=0.4)
    far = Features(fresh.phi * 8, fresh.z * 8, fresh.y)
    for r in (fresh, far, parts.conformal):
        assert check_head(done.head, compile_head(done.head), r.phi, r.z)["ood_score"] <= 1e-5
    assert done.ood is not None and done.ood.score.name == ood
    assert 0.01 < reference(done.head, fresh.phi, fresh.z)["ood"].mean() < 0.1


def test_a_member_that_is_constant_moves_nothing() -> None:
    """Outputs all alike: GEN says the same of every row, and the others decide."""
    head = linear(6)
    clean, fresh = (rows(head, "classification", 300, s) for s in (1, 2))
    flat = Features(clean.phi, np.zeros_like(clean.z), clean.y)
    ood = fit_ood(head, flat, flat, task="classification", ood="rank:gen+rmds")
    got = ood.score(fresh.phi, np.zeros_like(fresh.z))
    alone = fit_ood(head, flat, flat, task="classification", ood="rank:rmds")
    assert alone is not None
    np.testing.assert_allclose(got, 0.25 + alone.score(fresh.phi, fresh.z) / 2, atol=1e-5)
    whole = Head(task="classification", width=6, features=12, module=None, ood=ood, q_hat=0.9)
    whole = whole.with_(ood=Ood(ood.members, np.zeros(1), np.ones(2), 0.5))
    zeros = np.zeros_like(fresh.z)
    assert check_head(whole, compile_head(whole), fresh.phi, zeros)["ood_score"] <= 1e-5


# Bundles and what is refused


def seen_in(model: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features and logits of a network of `tests.calibration.networks`."""
    known = {t.name: numpy_helper.to_array(t) for t in onnx.load(model).graph.initializer}
    phi = np.tanh(x @ known["w1"] + known["b1"])
    return phi, phi @ known["w2"] + known["b2"]


def test_a_bundle_keeps_all_of_it(folder: Path, run: Fit) -> None:
    model = networks.network(folder / "ranked.onnx")
    bundle = run(model, networks.table(model), method="none", ood=RANKED)
    again = load_bundle(bundle.path)
    record, kept = again.manifest.ood, again.tensors(STATE)
    assert record is not None and record.score.name == RANKED and record.threshold is not None
    members = []
    for name in ("gen", "rmds", "vim"):
        said = dict(record.score.settings[name])
        mean, scale = said.pop("mean"), said.pop("scale")
        own = {k.removeprefix(f"ood/{name}/"): v for k, v in kept.items() if f"/{name}/" in k}
        ranks = Ranks(own.pop("ranks/knots"), own.pop("ranks/ranks"), 1 / scale)
        members.append(Member(name, State(own, said), mean, scale, ranks))
    ood = Ood(tuple(members), kept["ood/table"], kept["ood/pvalues"], record.threshold)
    x = networks.inputs(300, 5)
    predictor = Predictor(again)
    got = predictor.run({"x": x})
    assert {"ood_score", "ood_pvalue", "ood"} <= set(got)
    np.testing.assert_array_equal(got["ood"], got["ood_score"] > np.float32(record.threshold))
    phi, z = seen_in(model, x)
    np.testing.assert_allclose(got["ood_score"], ood.score(phi, z), rtol=1e-4, atol=1e-4)
    with np.load(bundle.path / GOLDEN) as golden:
        fresh = predictor.run({"x": golden["in/x"]})
        np.testing.assert_allclose(fresh["ood_score"], golden["out/ood_score"], atol=1e-6)


def test_a_bundle_of_standardised_scores_is_as_it_was(folder: Path, run: Fit) -> None:
    model = networks.network(folder / "standardised.onnx")
    bundle = run(model, networks.table(model), method="none", ood="gen+rmds")
    assert bundle.manifest.ood is not None
    assert bundle.manifest.ood.score.name == "gen+rmds"
    assert not [k for k in bundle.tensors(STATE) if "ranks" in k]


def test_the_average_runs_in_the_oldest_opset(made: tuple[Ood, Features]) -> None:
    ood, fresh = made
    for opset in (13, 17, 20):
        g = Fragment(opset)
        phi, z = g.input("phi", "float32", ["N", 12]), g.input("z", "float32", ["N", 6])
        g.op("Identity", ood.emit(g, phi, z), out="score")
        session = open_session(standalone(g, {"score": ("float32", (-1,))}))
        (got,) = session.run(["score"], {"phi": fresh.phi, "z": fresh.z})
        np.testing.assert_allclose(got, ood.score(fresh.phi, fresh.z), atol=1e-5)


@pytest.mark.parametrize(
    ("ood", "message"),
    [
        ("rank:", "--ood rank: lacks a score; it is a, a.b or rank:a.b"),
        ("rank:gen+", "lacks a score"),
        ("rank:gen+energyy", "unknown module or score 'energyy'; there are .*rmds"),
        ("rank:gen+laplace", "'laplace' is not an OOD score for classification"),
        ("gen+rank:rmds", "unknown module or score 'rank:rmds'"),
        ("rank:gen+rmds+gen", "the same OOD score is named twice"),
    ],
)
def test_what_cannot_be_ranked_is_refused(ood: str, message: str) -> None:
    with pytest.raises(HedgedError, match=message):
        check_options(FitOptions(task="classification", ood=ood))


def test_a_black_box_says_which_scores_can_be_ranked() -> None:
    blind = Features(None, np.eye(4)[np.arange(40) % 4], np.arange(40) % 4)
    with pytest.raises(HedgedError, match="score 'rmds' does not fit this model; these do: gen"):
        fit_ood(None, blind, blind, task="classification", ood="rank:gen+rmds")
