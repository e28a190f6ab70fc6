"""Training of ABNN's members, against torch and by hand."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch

from posthoc.links import softmax
from posthoc.methods.network import abnn, abnn_training
from posthoc.network.attach import NetworkRows
from posthoc.network.autograd import Network
from posthoc.network.sites import find_normalisations
from tests.posthoc.methods.network import nets
from tests.posthoc.methods.network.scales import QUICK, parameters


def test_judging_by_hand() -> None:
    """Mean log loss over labelled pixels, classes weighted; of each image the share that is
    right."""
    given = nets.rows("maps", 9)
    assert given.y is not None
    y = np.where(np.random.default_rng(0).random(given.y.shape) < 0.5, -3, given.y)
    model = nets.frozen("maps", "normalisation")
    network = Network(model.model, [model.z])
    run = abnn_training._Run(network, model.z, 1, False, [], abnn.Settings(batch=4))
    weights = np.asarray([1.0, 5.0, 1.0], np.float32)
    rows = NetworkRows(given.inputs, y)
    loss, right = run.judged(rows, None, 0, torch.as_tensor(weights))
    p = softmax(np.moveaxis(nets.run(nets.network("maps"), given.inputs), 1, -1))
    known = y >= 0
    own = np.take_along_axis(p, np.maximum(y, 0)[..., None], -1)[..., 0]
    assert loss == pytest.approx(float((-np.log(own) * weights[y])[known].mean()), rel=1e-5)
    assert run.judged(rows, None)[0] == pytest.approx(float(-np.log(own)[known].mean()), rel=1e-5)
    hits = [float((p[i].argmax(-1) == y[i])[known[i]].mean()) for i in range(9)]
    np.testing.assert_allclose(right, hits, rtol=1e-6)


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("kind", ["maps", "table"])
def test_a_step_of_training_by_hand(kind: str) -> None:
    """One batch of all learners: the first Nesterov step from zero is 1.9 times the gradient."""
    given, net = nets.rows(kind, 60), nets.network(kind)
    assert given.y is not None
    y = given.y.copy()
    if kind == "maps":
        y[np.random.default_rng(0).random(y.shape) < 0.5] = -7  # no label there
    settings = {"members": 1, "samples": 2, "alpha": 0, "epochs": 1, "batch": 100}
    settings |= {"learning_rate": 1e-3, "prior": 5.0, "weight_decay": 0.1}
    model = nets.frozen(kind, "normalisation")
    made = nets.attach("abnn", model, NetworkRows(given.inputs, y), **settings).attached
    assert made.facts["epochs_taken"] == [1]
    learns = np.arange(60) % 5 != 4
    weights = abnn.class_weights(np.random.default_rng([0, 1, 0]), 3, 5.0)
    z = net(torch.as_tensor(given.inputs["x"][learns]))
    target = torch.as_tensor(np.where(y < 0, -1, y)[learns])
    own = torch.log_softmax(z, 1).gather(1, target.clamp(min=0)[:, None])[:, 0]
    eta = torch.as_tensor(weights)[target.clamp(min=0)] * (target >= 0)
    parts = nets.parts(net, nets.NORMALISATIONS)
    variables = [v for p in parts for v in (p.weight, p.bias)]
    gradients = torch.autograd.grad(-(eta * own).sum() / eta.sum(), variables)
    for i, part in enumerate(parts):
        scale, shift = [*made.tensors.values()][2 * i : 2 * i + 2]
        want = [gradients[2 * i] * part.weight.detach(), gradients[2 * i + 1]]
        for got, g in zip((scale, shift), want, strict=True):
            np.testing.assert_allclose(got[0], -1.9e-3 * g.numpy(), rtol=2e-3, atol=1e-8)


@pytest.mark.parametrize("kind", ["images", "norms", "single"])
def test_what_is_trained_is_what_is_served(kind: str) -> None:
    model, net, given = nets.frozen(kind, "normalisation"), nets.network(kind), nets.rows(kind, 12)
    sites = find_normalisations(model.model, given.inputs, output=model.z)
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(0, 0.3, s.channels), rng.normal(0, 0.3, s.channels)) for s in sites]
    member = [tuple(torch.as_tensor(v, dtype=torch.float32) for v in pair) for pair in pairs]

    def logits(drawn: Any, **settings: Any) -> np.ndarray:
        run = abnn_training._Run(
            Network(model.model, [model.z]), model.z, 1, kind == "single", sites,
            abnn.Settings(**settings),
        )  # fmt: skip
        with torch.no_grad():
            return run.logits(given, member, drawn).numpy()

    with contextlib.ExitStack() as stack:
        for part, (d, delta) in zip(nets.parts(net, nets.NORMALISATIONS), pairs, strict=True):
            gamma, beta = part.weight.detach().numpy(), getattr(part, "bias", None)
            beta = np.zeros_like(d) if beta is None else beta.detach().numpy()
            stack.enter_context(parameters(part, gamma * (1 + d), beta + delta))
        want = nets.run(net, given.inputs)
    if kind == "single":
        want = np.concatenate([np.zeros_like(want), want], 1)
    np.testing.assert_allclose(logits(None), want, atol=1e-4 * np.abs(want).max())
    drawn = torch.Generator().manual_seed(0)
    np.testing.assert_array_equal(logits(drawn, alpha=0), logits(None))
    kinds = ("channel", "element") * 2
    noisy = [logits(drawn, **{"alpha": 0.05, "noise": kind}) for kind in kinds]
    apart = [float(np.abs(z - want).mean()) for z in noisy]
    assert min(apart) > 0 and max(apart) < 0.3 * np.abs(want).max()
    assert np.abs(noisy[0] - noisy[2]).max() > 1e-3  # fresh at every pass


def weighted_loss(z: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    own = softmax(z)[np.arange(len(y)), y]
    return float((-np.log(own) * weights[y]).mean())


@pytest.mark.usefixtures("lenient")
def test_training_lowers_a_members_own_loss_and_keeps_its_best_epoch() -> None:
    model, given = nets.frozen("table", "normalisation"), nets.rows("table", 600)
    settings = {"members": 3, "samples": 1, "alpha": 0.0, "epochs": 4}
    settings |= {"prior": 5.0, "learning_rate": 0.005}
    made = nets.attach("abnn", model, given, **settings, batch=64)
    judges = given.take(np.arange(4, 600, 5))
    assert made.attached.facts["judges"] == len(judges) == 120
    z = nets.run(nets.network("table"), judges.inputs)
    members = made.members(judges.inputs)
    for m in range(3):
        weights = abnn.class_weights(np.random.default_rng([0, 1, m]), 3, 5.0)
        before, after = (weighted_loss(v, judges.y, weights) for v in (z, members[m]))
        assert after < before - 1e-3
        # One that stopped an epoch earlier or later is no better.
        at = made.attached.facts["epochs_taken"][m]
        assert 1 <= at <= 4
    shorter = nets.attach("abnn", model, given, **settings | {"epochs": 1}, batch=64)
    for m, at in enumerate(made.attached.facts["epochs_taken"]):
        weights = abnn.class_weights(np.random.default_rng([0, 1, m]), 3, 5.0)
        early = weighted_loss(shorter.members(judges.inputs)[m], judges.y, weights)
        late = weighted_loss(members[m], judges.y, weights)
        assert late <= early + 1e-9 and (at > 1 or late == pytest.approx(early, abs=1e-6))


@pytest.mark.usefixtures("lenient")
def test_the_seed_makes_the_members() -> None:
    model, given = nets.frozen("table", "normalisation"), nets.rows("table", 80)

    def made(**settings: Any) -> bytes:
        torch.manual_seed(len(settings))  # of which nothing depends
        return nets.attach("abnn", model, given, **QUICK, **settings).frozen.model

    assert made() == made(seed=0) != made(seed=1)


@pytest.mark.usefixtures("lenient")
def test_pixels_without_a_label_teach_nothing() -> None:
    model, given = nets.frozen("maps", "normalisation"), nets.rows("maps", 80)
    assert given.y is not None and given.y.shape == (80, 12, 12)
    rng = np.random.default_rng(0)
    hidden = rng.random(given.y.shape) < 0.4
    hidden[3] = hidden[7] = True  # two images without any

    def fitted(y: np.ndarray) -> Any:
        return nets.attach("abnn", model, NetworkRows(given.inputs, y), **QUICK).attached

    some = fitted(np.where(hidden, -1, given.y))
    other = fitted(np.where(hidden, -255, given.y))
    assert some.facts == other.facts and some.facts["judges"] == 78 // 5
    for key, value in some.tensors.items():
        np.testing.assert_array_equal(value, other.tensors[key])
    whole = fitted(given.y)
    assert any((v != whole.tensors[k]).any() for k, v in some.tensors.items())
