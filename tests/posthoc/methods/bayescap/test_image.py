"""The cap of maps: windows, noise that is known, the frozen range, and its graph against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from posthoc.contract import FitError, State
from posthoc.graph import Fragment, standalone
from posthoc.methods.bayescap import generalised_gaussian as gg
from posthoc.methods.bayescap import image, network, windows
from posthoc.methods.bayescap.parameters import HALF, MIDDLE, bound_variance
from posthoc.runtime import open_session

H, W = 30, 26
SMALL = image.Settings(channels=8, blocks=1, crop=20, steps=250, learning_rate=5e-3)


def maps(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Smooth maps of two channels, targets with normal and Laplace noise that is larger where a
    map is steep, and its standard deviation."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 2, H, W))
    for _ in range(3):
        z = sum(np.roll(z, by, axis) for by in (-1, 1) for axis in (2, 3)) / 4
    z = 3 * z / z.std() + 1
    steep = np.abs(np.roll(z, 1, 3) - np.roll(z, -1, 3))
    sigma = 0.05 + 0.5 * steep / steep.mean()
    noise = np.stack([rng.normal(size=(n, H, W)), rng.laplace(size=(n, H, W)) / np.sqrt(2)], 1)
    return z.astype(np.float32), (z + noise * sigma).astype(np.float32), sigma


@pytest.fixture(scope="module")
def state() -> State:
    z, y, _ = maps(24, 0)
    return image.train_image_cap(z, y, SMALL)


def flat(x: np.ndarray) -> np.ndarray:
    """Pixels n×K."""
    return np.moveaxis(x, 1, -1).reshape(-1, x.shape[1])


def test_it_finds_the_noise_of_each_pixel(state: State) -> None:
    z, y, sigma = maps(8, 1)
    a, b = image.apply_image_cap(state, z)
    v = gg.variance(a, b)
    inner = np.s_[:, :, :, 2:-2]  # the maps of this test are steep across their left and right edge
    for k in range(2):
        assert spearmanr(v[inner][:, k].ravel(), sigma[inner][:, k].ravel()).statistic > 0.8
    assert np.median(b[:, 0]) > 1.2 > np.median(b[:, 1])
    train = maps(24, 0)
    constant = [p[:, None, None] for p in gg.fit(flat(train[1] - train[0]))]
    ours, theirs = gg.nll(y - z, a, b).mean(), gg.nll(y - z, *constant).mean()
    assert ours < theirs - 0.05
    assert (np.abs(y - z) <= gg.quantile(0.95, a, b)).mean() == pytest.approx(0.9, abs=0.03)
    said = state.settings
    assert np.all(np.less(said["held_out_nll"], said["held_out_nll_homoscedastic"]))


def test_the_graph_is_torchs_network(state: State) -> None:
    z, _, _ = maps(3, 2)
    z[0] *= 30  # beyond what an input may count
    g = Fragment(13)
    logs = image.cap_graph(g, state, g.input("z", "float32", ["N", 2, "H", "W"]))
    g.op("Identity", logs, out="logs")
    g.op("Identity", image.emit_log_variance(g, state, logs), out="log_variance")
    shapes = {"logs": ("float32", (-1, 4, -1, -1)), "log_variance": ("float32", (-1, 2, -1, -1))}
    session = open_session(standalone(g, shapes))
    for cut in (z, z[:, :, :9, :13]):
        got, log_v = session.run(["logs", "log_variance"], {"z": np.ascontiguousarray(cut)})
        a, b = image.apply_image_cap(state, cut)
        np.testing.assert_allclose(got[:, :2], np.log(a), atol=1e-5)
        np.testing.assert_allclose(got[:, 2:], np.log(b), atol=1e-5)
        np.testing.assert_allclose(log_v, np.log(image.variance(state, a, b)), atol=2e-5)


def test_the_variance_is_that_of_the_errors(state: State) -> None:
    z, y, _ = maps(8, 1)
    a, b = image.apply_image_cap(state, z)
    v, squared = image.variance(state, a, b), (y - z) ** 2
    for k in range(2):
        assert v[:, k].mean() == pytest.approx(squared[:, k].mean(), rel=0.15)
    own = gg.variance(a, b)
    most = np.exp(state.tensors["log_variance_most"])[:, None, None]
    scale = np.exp(state.tensors["log_variance_factor"])[:, None, None]
    np.testing.assert_allclose(v, scale * np.minimum(own, most))


def test_a_tail_that_nobody_saw_is_ended() -> None:
    rng = np.random.default_rng(0)
    true = np.exp(rng.normal(size=(20_000, 1)))
    squared = true * rng.chisquare(1, size=true.shape)
    said = np.log(np.where(true > np.quantile(true, 0.96), 50 * true, true))
    most, factor = bound_variance(said, squared)
    assert most[0] == pytest.approx(np.quantile(said, 0.95))
    kept = np.minimum(said, most) + factor
    assert np.exp(kept).mean() == pytest.approx(squared.mean())
    honest = bound_variance(np.log(true), squared)
    assert honest[0][0] >= np.quantile(np.log(true), 0.99) and abs(honest[1][0]) < 0.05


def test_the_network_is_the_one_it_says() -> None:
    rng = np.random.default_rng(0)
    tensors = network.start(3, 5, 2, rng)
    tensors["last.weight"] = rng.normal(size=tensors["last.weight"].shape)
    tensors |= {"mean": rng.normal(size=3), "scale": np.full(3, 0.5)}
    t = {k: torch.tensor(v, dtype=torch.float64) for k, v in tensors.items()}
    z = torch.tensor(rng.normal(size=(2, 3, 9, 7)))

    def layer(x: torch.Tensor, name: str) -> torch.Tensor:
        convolution = torch.nn.Conv2d(x.shape[1], len(t[f"{name}.bias"]), 3, padding=1).double()
        convolution.load_state_dict({"weight": t[f"{name}.weight"], "bias": t[f"{name}.bias"]})
        out = convolution(x)
        slope = t.get(f"{name}.slope")
        return out if slope is None else torch.where(out > 0, out, out * slope[:, None, None])

    x = layer((z - t["mean"][:, None, None]) / 2, "first")
    for i in range(2):
        x = x + layer(layer(x, f"block{i}.in"), f"block{i}.out")
    want = layer(layer(x, "head"), "last").detach()
    torch.testing.assert_close(network.forward(t, 2, z), want)
    near = network.forward(t, 2, z)[:, :, 0, 0]
    z[:, :, 8, :] += 5.0  # eight pixels away, where it sees seven
    torch.testing.assert_close(network.forward(t, 2, z)[:, :, 0, 0], near)
    z[:, :, 7, :] += 5.0
    assert not torch.allclose(network.forward(t, 2, z)[:, :, 0, 0], near)
    assert network.radius(2) == 7


def test_a_pixel_counts_only_where_its_window_is_the_image() -> None:
    (z,), (y,), _ = maps(1, 0)
    rng = np.random.default_rng(0)
    tensors = network.start(2, 4, 1, rng)
    tensors["last.weight"] = rng.normal(size=tensors["last.weight"].shape)
    tensors |= windows.scales([z])
    t = {k: torch.tensor(v, dtype=torch.float32) for k, v in tensors.items()}
    cutter = windows.Cutter(6, network.radius(1), (H, W), np.full(2, 1e-9))
    whole = network.forward(t, 1, torch.tensor(z[None]))[0].numpy()
    exact = np.log(np.abs(y.astype(np.float64) - z))
    seen = np.zeros((H, W))
    for _ in range(200):
        part, log_r, counts = cutter(z, y, rng)
        assert part.shape == (2, 16, 16)
        place = [
            (i, j)
            for i in range(H - 15)
            for j in range(W - 15)
            if np.array_equal(z[:, i : i + 16, j : j + 16], part)
        ]
        ((i, j),) = place
        here = network.forward(t, 1, torch.tensor(part[None]))[0].numpy()
        use = counts[0] > 0
        np.testing.assert_allclose(
            here[:, use], whole[:, i : i + 16, j : j + 16][:, use], atol=1e-5
        )
        np.testing.assert_allclose(log_r, exact[:, i : i + 16, j : j + 16], atol=1e-4)
        seen[i : i + 16, j : j + 16] += use
    assert seen.min() > 0
    assert seen[:5].mean() > 0.4 * seen[12:18].mean()  # edges are not forgotten


def test_pixels_without_a_target_do_not_count() -> None:
    z, y, _ = maps(8, 0)
    quick = SMALL.model_copy(update={"steps": 5})
    holes = y.copy()
    holes[:, :, 10:20] = np.nan
    wrong = np.where(np.isnan(holes), 1e9, y)
    (part, log_r, counts) = windows.Cutter(H, 5, (H, W), np.full(2, 1e-9))(
        z[0], holes[0], np.random.default_rng(0)
    )
    assert part.shape == counts.shape == log_r.shape == (2, H, W)
    np.testing.assert_array_equal(counts == 0, np.isnan(holes[0]))
    with_holes = image.train_image_cap(z, holes, quick)
    constants = image.train_image_cap(z, y, quick).tensors["last.bias"]
    np.testing.assert_allclose(with_holes.tensors["last.bias"], constants, atol=0.6)
    spoilt = image.train_image_cap(z, wrong, quick).tensors["last.bias"]
    assert np.abs(spoilt - constants).max() > 2


def test_the_twin_likelihood_is_the_density() -> None:
    rng = np.random.default_rng(0)
    log_r, log_alpha, u = rng.normal(size=(3, 40))
    u = MIDDLE + HALF * np.tanh(u)
    got = image.likelihood(*(torch.tensor(v) for v in (log_r, log_alpha, u))).numpy()
    below = np.exp(u) * (log_r - log_alpha) < np.log(10)
    want = gg.nll(np.exp(log_r), np.exp(log_alpha), np.exp(u))
    assert below.sum() > 20
    np.testing.assert_allclose(got[below], want[below], rtol=1e-12)
    assert (got <= want * (1 + 1e-12)).all()


def test_maps_of_several_sizes_and_the_same_seed() -> None:
    z, y, _ = maps(6, 0)
    quick = SMALL.model_copy(update={"steps": 10})
    zs, ys = [*z[:5], z[5, :, :20]], [*y[:5], y[5, :, :20]]
    first, again = (image.train_image_cap(zs, ys, quick) for _ in range(2))
    for name, value in first.tensors.items():
        np.testing.assert_array_equal(value, again.tensors[name])
    other = image.train_image_cap(zs, ys, quick.model_copy(update={"seed": 1}))
    assert not np.array_equal(first.tensors["first.weight"], other.tensors["first.weight"])


def test_the_default_size() -> None:
    own = image.Settings()
    tensors = network.start(3, own.channels, own.blocks, np.random.default_rng(0))
    assert 20_000 < sum(v.size for v in tensors.values()) < 40_000


def test_an_exact_model_and_too_little_are_named() -> None:
    z, y, _ = maps(3, 0)
    with pytest.raises(FitError, match="two images"):
        image.train_image_cap(z[:1], y[:1], SMALL)
    with pytest.raises(FitError, match="two images"):
        image.train_image_cap(z, y[:2], SMALL)
    with pytest.raises(FitError, match=r"image 1 .*\(2, 30, 25\)"):
        image.train_image_cap(list(z), [y[0], y[1, :, :, :-1], y[2]], SMALL)
    with pytest.raises(FitError, match="without error"):
        image.train_image_cap(z, z, SMALL)
    with pytest.raises(FitError, match="no pixel"):
        image.train_image_cap(z, np.full_like(y, np.nan), SMALL)
    with pytest.raises(FitError, match="fewer blocks"):
        image.train_image_cap([*z, z[0, :, :9]], [*y, y[0, :, :9]], SMALL)
    z[1, 0, 0, 0] = np.inf
    with pytest.raises(FitError, match="image 1 that is not finite"):
        image.train_image_cap(z, y, SMALL)
