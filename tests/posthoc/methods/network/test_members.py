"""What copies add to the frozen outputs, against their definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from posthoc import links, registry
from posthoc.contract import Features, FitError, State, Task
from posthoc.graph import Fragment, standalone
from posthoc.methods.network import members
from posthoc.rows import Rows
from posthoc.runtime import open_session

NAMES = ("mc_dropout", "mc_batch_norm", "abnn")


def fitted(phi: np.ndarray, z: np.ndarray, task: Task, y: Any = None) -> State:
    blocks = [Features(phi[:7], z[:7], None if y is None else y[:7])]
    blocks += [Features(phi[7:], z[7:], None if y is None else y[7:])]
    return members.fit("mc_dropout", Rows(lambda: iter(blocks), len(z)), task)


def copies(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outputs N×C, of copies N×S×C, and these as features."""
    rng = np.random.default_rng(seed)
    each = rng.normal(size=shape)
    z = rng.normal(size=(shape[0], shape[2]))
    return z, each, each.reshape(shape[0], -1)


def in_graph(state: State, phi: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, Any]:
    g = Fragment(17)
    g.input("phi", "float32", ["N", phi.shape[1]])
    g.input("z", "float32", ["N", z.shape[1]])
    names = members.emit(g, state, "phi", "z")
    made = [n for n in (names.draws, names.variance) if n is not None]
    outputs = {}
    for name, out in zip(made, ("draws", "variance"), strict=False):
        g.publish(name, out)
        outputs[out] = ("float32", (-1,) * (3 if out == "draws" else 2))
    session = open_session(standalone(g, outputs))
    found = session.run(None, {"phi": phi.astype("f4"), "z": z.astype("f4")})
    return found[0], found[1] if len(found) > 1 else None


def test_a_classification_is_the_mixture_of_its_copies() -> None:
    z, each, phi = copies((9, 5, 4))
    state = fitted(phi, z, "classification")
    assert state.settings == {"task": "classification", "copies": 5, "single": False}
    assert not state.tensors
    spread = members.spread(state, phi, z)
    p = np.exp(links.log_probs(z, spread, 1.0, 1.0))
    np.testing.assert_allclose(p, links.softmax(each).mean(1), atol=1e-12)
    aleatoric, epistemic = links.decompose(z, spread, None, 1.0, 1.0)
    each_p = links.softmax(each)
    own = -(each_p * np.log(each_p)).sum(2).mean(1)
    total = -(each_p.mean(1) * np.log(each_p.mean(1))).sum(1)
    np.testing.assert_allclose(aleatoric, own, atol=1e-10)
    np.testing.assert_allclose(epistemic, total - own, atol=1e-10)
    draws, variance = in_graph(state, phi, z)
    np.testing.assert_allclose(draws, spread.draws, atol=1e-5)
    assert variance is None and spread.variance is None


@pytest.mark.parametrize("count", [2, 3, 10, 20])
def test_copies_of_one_logit_are_told_from_those_of_two(count: int) -> None:
    # ABNN may reject members, so that their number says nothing.
    _, each, phi = copies((11, count, 1))
    z = np.concatenate([np.zeros((11, 1)), np.random.default_rng(1).normal(size=(11, 1))], 1)
    state = fitted(phi, z, "classification")
    assert state.settings["copies"] == count and state.settings["single"] is True
    p = np.exp(links.log_probs(z, members.spread(state, phi, z), 1.0, 1.0))
    np.testing.assert_allclose(p[:, 1], (1 / (1 + np.exp(-each[:, :, 0]))).mean(1), atol=1e-12)
    np.testing.assert_allclose(
        in_graph(state, phi, z)[0], members.spread(state, phi, z).draws, atol=1e-5
    )
    z, each, phi = copies((11, count, 2))
    for zero in (False, True):  # a model may give such a zero itself
        if zero:
            z[:, 0] = each[:, :, 0] = 0.0
            phi = each.reshape(11, -1)
        state = fitted(phi, z, "classification")
        assert state.settings["copies"] == count and state.settings["single"] is False
        p = np.exp(links.log_probs(z, members.spread(state, phi, z), 1.0, 1.0))
        np.testing.assert_allclose(p, links.softmax(each).mean(1), atol=1e-12)


def test_a_regression_has_the_squared_distance_from_the_frozen_mean() -> None:
    z, each, phi = copies((12, 6, 2))
    y = z + np.random.default_rng(2).normal(size=z.shape)
    state = fitted(phi, z, "regression", y)
    np.testing.assert_allclose(state.settings["noise_variance"], ((y - z) ** 2).mean(0))
    spread = members.spread(state, phi, z)
    want = np.zeros_like(z)
    for n in range(12):
        for k in range(2):
            want[n, k] = sum((each[n, s, k] - z[n, k]) ** 2 for s in range(6)) / 6
    np.testing.assert_allclose(spread.variance, want)
    assert spread.shift is None  # the frozen mean stays
    draws, variance = in_graph(state, phi, z)
    np.testing.assert_allclose(variance, want, rtol=1e-5)
    np.testing.assert_allclose(draws, each - z[:, None], atol=1e-5)
    with pytest.raises(FitError, match="without error"):
        fitted(phi, z, "regression", z)


def test_features_that_are_no_outputs_of_copies() -> None:
    z, _, phi = copies((9, 5, 4))
    for wrong in (phi[:, :-1], phi[:, :4]):
        with pytest.raises(FitError, match="abnn needs the outputs of a sampled network"):
            rows = Rows(lambda w=wrong: iter([Features(w, z)]), 9)
            members.fit("abnn", rows, "classification")


@pytest.mark.parametrize("name", NAMES)
def test_the_pages_say_what_they_are(name: str) -> None:
    info = registry.info(name)
    assert info.either and not info.preserves and "network" in info.needs
    assert ("labels" in info.needs) == (name == "abnn")
    z, _, phi = copies((9, 5, 4))
    page = registry.page(name)
    rows = Rows(lambda: iter([Features(phi, z, np.arange(9) % 4)]), 9)
    state = page.fit(rows, None, "classification", page.Settings())
    assert state.settings["copies"] == 5
    np.testing.assert_array_equal(
        page.spread(state, phi, z).draws, members.spread(state, phi, z).draws
    )
