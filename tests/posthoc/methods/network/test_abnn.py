"""ABNN against the torch network with other scales and shifts, one sample at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from posthoc import registry
from posthoc.contract import FitError, ModelError
from posthoc.links import softmax
from posthoc.methods.network import abnn, abnn_training
from posthoc.network.attach import NetworkRows
from posthoc.network.autograd import Network
from posthoc.network.sites import find_normalisations
from tests.posthoc.methods.network import nets

ALPHA = 0.1
QUICK = {"members": 2, "samples": 3, "epochs": 2, "batch": 32}
QUICK |= {"alpha": ALPHA, "prior": 3.0, "learning_rate": 5e-3}


@contextlib.contextmanager
def parameters(part: Any, gamma: np.ndarray, beta: np.ndarray) -> Iterator[None]:
    """A normalisation with another scale and shift."""
    own = {k: getattr(part, k) for k in ("weight", "bias") if getattr(part, k, None) is not None}
    gamma, beta = (torch.as_tensor(np.asarray(v, np.float32)) for v in (gamma, beta))
    hook = None
    if "bias" not in own:  # RMSNorm has none
        hook = part.register_forward_hook(lambda _m, _i, h: h + beta)
    try:
        for key, value in zip(own, (gamma, beta), strict=False):
            setattr(part, key, torch.nn.Parameter(value))
        yield
    finally:
        for key, value in own.items():
            setattr(part, key, value)
        if hook is not None:
            hook.remove()


def along(part: Any, values: np.ndarray) -> np.ndarray:
    """C numbers of noise on a row, back from how the graph has them."""
    return values.reshape(-1) if values.size == len(part.weight) else values


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No member is rejected: of a few rows a single one is more than half a point."""
    monkeypatch.setattr(abnn, "LOSS", 1.0)


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
