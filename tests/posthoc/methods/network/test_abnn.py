"""ABNN against the torch network with other scales and shifts, one sample at a time."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch

from posthoc import registry
from posthoc.contract import FitError, ModelError
from posthoc.methods.network import abnn, abnn_training
from posthoc.network.attach import NetworkRows
from tests.posthoc.methods.network import nets
from tests.posthoc.methods.network.scales import ALPHA, QUICK, parameters


def along(part: Any, values: np.ndarray) -> np.ndarray:
    """C numbers of noise on a row, back from how the graph has them."""
    return values.reshape(-1) if values.size == len(part.weight) else values


def sure(kind: str, n: int) -> NetworkRows:
    """Rows with the network's own labels, the surest half of 2n: no noise turns them."""
    given = nets.rows(kind, 2 * n)
    z = nets.run(nets.network(kind), given.inputs)
    z = np.concatenate([np.zeros_like(z), z], 1) if z.shape[1] == 1 else z
    top = np.sort(z, axis=1)
    margin = (top[:, -1] - top[:, -2]).reshape(2 * n, -1).min(1)
    chosen = np.sort(np.argsort(-margin)[:n])
    return NetworkRows({k: v[chosen] for k, v in given.inputs.items()}, z.argmax(1)[chosen])


@pytest.mark.parametrize("kind", ["images", "norms", "maps", "table", "single"])
@pytest.mark.usefixtures("lenient")
def test_copies_are_the_network_with_those_scales_and_shifts(kind: str) -> None:
    made = nets.attach("abnn", nets.frozen(kind, "normalisation"), nets.rows(kind, 120), **QUICK)
    net, x = nets.network(kind), nets.inputs(kind, 6, seed=2)
    norms = nets.parts(net, nets.NORMALISATIONS)
    facts, tensors = made.attached.facts, made.attached.tensors
    assert facts["sites"] == len(norms) == len(made.noises)
    assert facts["kept"] == 2 and facts["members"] == 2 and facts["samples"] == 3
    # Nothing but deltas is stored: two numbers for each channel and member.
    assert sum(t.size for t in tensors.values()) == 2 * 2 * sum(len(n.weight) for n in norms)
    out, noise_of = [], {}
    for copy in range(6):
        member = copy // 3
        with contextlib.ExitStack() as stack:
            for part, (tensor, noise) in zip(norms, made.noises.items(), strict=True):
                d, delta = (tensors[f"{k}/{tensor}"][member] for k in ("scale", "shift"))
                gain = along(part, noise.terms()["gain"][copy])
                eps = (gain / (1 + d) - 1) / ALPHA
                assert np.abs(eps).max() < 5
                noise_of[copy, tensor] = eps
                gamma = part.weight.detach().numpy() * (1 + d) * (1 + ALPHA * eps)
                beta = getattr(part, "bias", None)
                beta = np.zeros_like(d) if beta is None else beta.detach().numpy()
                stack.enter_context(parameters(part, gamma, beta + delta))
            out.append(nets.run(net, x))
    for tensor in made.noises:  # the noise about a member's own scale is antithetic
        for first in (0, 3):
            pair = noise_of[first, tensor] + noise_of[first + 1, tensor]
            np.testing.assert_allclose(pair, 0, atol=1e-4)
    np.testing.assert_allclose(made.members(x), out, atol=1e-4 * np.abs(out).max())
    assert np.abs(np.stack(out) - nets.run(net, x)).max() > 0.02 * np.abs(out).max()
    np.testing.assert_allclose(nets.both(made.frozen, x)[0], nets.run(net, x), atol=1e-4)
    assert facts["epochs_taken"] != [0, 0]
    assert all(np.abs(t).max() > 1e-4 for t in tensors.values())
    first = next(iter(tensors.values()))
    assert np.abs(first[0] - first[1]).max() > 1e-4  # members part


@pytest.mark.parametrize("kind", ["images", "norms", "single"])
def test_without_noise_and_training_it_is_the_frozen_network(kind: str) -> None:
    model, given = nets.frozen(kind, "normalisation"), nets.rows(kind, 60)
    made = nets.attach("abnn", model, given, alpha=0.0, epochs=0, members=2, samples=2)
    for noise in made.noises.values():
        assert (noise.terms()["gain"] == 1).all() and (noise.terms()["offset"] == 0).all()
    assert not any(t.any() for t in made.attached.tensors.values())
    x = nets.inputs(kind, 9, seed=3)
    z, _ = nets.both(made.frozen, x)
    scale = np.abs(z).max()
    np.testing.assert_allclose(made.members(x), np.stack([z] * 4), atol=1e-5 * scale)


@pytest.mark.usefixtures("lenient")
def test_noise_per_element() -> None:
    model, given = nets.frozen("images", "normalisation"), nets.rows("images", 60)
    made = nets.attach(
        "abnn", model, given, noise="element", epochs=0, members=1, samples=4, alpha=0.1
    )
    gains = [n.terms()["gain"] for n in made.noises.values()]
    assert [g.shape for g in gains] == [(4, 6, 12, 12), (4, 8, 4, 4)]
    net, x = nets.network("images"), nets.inputs("images", 5, seed=2)
    norms = nets.parts(net, nets.NORMALISATIONS)
    out = []
    for s in range(4):
        changes = []
        for part, gain in zip(norms, gains, strict=True):
            beta, g = part.bias.detach()[:, None, None], torch.as_tensor(gain[s])
            changes.append(lambda h, b=beta, g=g: (h - b) * g + b)
        with nets.hooked(norms, changes):
            out.append(nets.run(net, x))
    np.testing.assert_allclose(made.members(x), out, atol=1e-4)


@pytest.mark.parametrize(("members", "samples"), [(3, 10), (2, 5), (4, 1)])
def test_draws_are_antithetic_within_each_member(members: int, samples: int) -> None:
    found = abnn.draws(np.random.default_rng(0), (6, 1, 1), members, samples)
    assert found.shape == (members * samples, 6, 1, 1)
    by_member = found.reshape(members, samples, 6)
    even = samples - samples % 2
    np.testing.assert_array_equal(by_member[:, :even].sum(1), 0)
    np.testing.assert_array_equal(by_member[:, 0:even:2], -by_member[:, 1:even:2])
    halves = by_member[:, ::2].reshape(-1, 6)
    assert len(np.unique(halves, axis=0)) == len(halves)  # members have draws of their own
    big = abnn.draws(np.random.default_rng(0), (2000,), 2, 4)
    assert abs(big.std() - 1) < 0.05 and abs(np.mean(big**4) - 3) < 0.3


def test_the_guard_by_hand() -> None:
    frozen, member = np.zeros(100, bool), np.zeros(100, bool)
    frozen[:80], member[2:80], member[90] = True, True, True
    bound, rejected = abnn.guard(frozen, member)
    # Two lost, one won: mean .01, variance .03 - .0001.
    assert bound == pytest.approx(0.01 + 1.6448536 * np.sqrt(0.0299) / 10)
    assert not rejected  # by luck, perhaps
    assert not abnn.guard(frozen, frozen)[1]
    # Few rows: the lower bound decides. Many: the upper one does.
    few = np.zeros(1000)
    for lost, worse in ((9, False), (12, True)):  # lower bounds .0041 and .0063
        few[:lost] = 1.0
        assert abnn.guard(few, np.zeros(1000))[1] == worse
    many = np.zeros(4000)
    many[:16] = 1.0
    bound, rejected = abnn.guard(many, np.zeros(4000))
    assert many.mean() < 0.005 < bound and rejected
    many[8:] = 0.0
    assert not abnn.guard(many, np.zeros(4000))[1]
    assert abnn.guard(np.full(9, 0.75), np.full(9, 0.5))[0] == pytest.approx(0.25)  # of images


@pytest.mark.parametrize(("classes", "favoured"), [(2, 1), (3, 1), (4, 2), (10, 3), (100, 10)])
def test_class_weights(classes: int, favoured: int) -> None:
    weights = [abnn.class_weights(np.random.default_rng(i), classes, 7.0) for i in range(6)]
    for w in weights:
        assert sorted(w) == [1.0] * (classes - favoured) + [7.0] * favoured
    assert len({w.tobytes() for w in weights}) > 1


def wild(monkeypatch: pytest.MonkeyPatch, member: int) -> None:
    """One member's training throws the network away."""
    real = abnn_training._member
    calls: list[int] = []

    def train(*given: Any) -> Any:
        found, steps = real(*given)
        calls.append(len(calls))
        if calls[-1] == member:
            found = [(d - 1.0, s + 3.0) for d, s in found]
        return found, steps

    monkeypatch.setattr(abnn_training, "_member", train)


def test_a_bad_member_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = nets.frozen("single", "normalisation"), sure("single", 150)
    whole = nets.attach("abnn", model, given, **QUICK)
    wild(monkeypatch, 0)
    made = nets.attach("abnn", model, given, **QUICK)
    facts = made.attached.facts
    assert facts["rejected"] == 1 and facts["kept"] == 1 and facts["members"] == 2
    assert facts["accuracy_loss_bound"][0] > 0.05
    assert {len(t) for t in made.attached.tensors.values()} == {1}
    for key, value in made.attached.tensors.items():
        np.testing.assert_array_equal(value[0], whole.attached.tensors[key][1])
    x = nets.inputs("single", 4)
    assert made.members(x).shape == (3, 4, 1)
    notes = made.frozen.notes[-1]
    assert "1 lost more than half a point" in notes and "it takes 3,200" in notes
    assert facts["guard"] in notes


def test_too_large_a_learning_rate_leaves_no_member_or_the_frozen_one() -> None:
    model, given = nets.frozen("table", "normalisation"), nets.rows("table", 150)
    made = nets.attach("abnn", model, given, **QUICK | {"learning_rate": 1e6})
    # Every epoch is worse than the beginning, which is kept.
    assert made.attached.facts["epochs_taken"] == [0, 0]
    assert not any(t.any() for t in made.attached.tensors.values())
    with pytest.raises(FitError, match=r"all 2 members lose more than half a point.*smaller alpha"):
        nets.attach("abnn", model, given, **QUICK | {"alpha": 30.0, "epochs": 0})


def test_what_cannot_be_done_is_said() -> None:
    model, given = nets.frozen("table", "normalisation"), nets.rows("table", 60)
    with pytest.raises(FitError, match="at least 50 labelled module rows and has 40"):
        nets.attach("abnn", model, given.take(slice(0, 40)))
    with pytest.raises(FitError, match="labelled module rows and has 0"):
        nets.attach("abnn", model, NetworkRows(given.inputs, None))
    with pytest.raises(FitError, match="two samples or more"):
        nets.attach("abnn", model, given, members=1, samples=1)
    with pytest.raises(ModelError, match="above the limit of 50,000,000"):
        nets.attach("abnn", model, given, samples=10**7)
    with pytest.raises(ModelError, match=r"no normalisation.*module:factory"):
        nets.attach("abnn", nets.frozen("plain", None), given)
    with pytest.raises(ModelError, match=r"fold BatchNormalization.*mc_dropout at a named"):
        nets.attach("abnn", nets.frozen("images", None), nets.rows("images", 60))
    with pytest.raises(FitError, match="has no setting 'lr'; it has alpha, batch, epochs"):
        registry.settings("abnn", {"lr": 1})


@pytest.mark.usefixtures("lenient")
def test_maps_of_any_size_have_noise_per_channel_only() -> None:
    net = nets.network("maps")
    x = torch.as_tensor(nets.inputs("maps", 8)["x"])
    import io
    import warnings

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, (x,), file, dynamo=False, opset_version=17, input_names=["x"],
            output_names=["y"], training=torch.onnx.TrainingMode.PRESERVE,
            dynamic_axes={k: {0: "n", 2: "h", 3: "w"} for k in ("x", "y")},
            do_constant_folding=False,
        )  # fmt: skip
    from posthoc.frozen import open_frozen

    given = nets.rows("maps", 60)
    model = open_frozen(file.getvalue(), task="classification", sample=given.inputs)
    with pytest.raises(ModelError, match=r"maps of one size.*noise=channel"):
        nets.attach("abnn", model, given, noise="element")
    made = nets.attach("abnn", model, given, **QUICK)
    assert made.members({"x": given.inputs["x"][:2, :, :5, :7]}).shape == (6, 2, 3, 5, 7)
