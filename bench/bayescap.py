"""``python -m bench bayescap``: whether the generalised Gaussian that is fitted is the right one.

``beta_error`` and ``variance_error``: the cap on 20,000 errors that have nothing to do with the
outputs, normal and Laplace; the relative error of what it says on the average, the median over
seeds, the larger of the two noises. ``released`` is the same for the loss that the authors
released, whose product makes it blind to beta. ``table``: real regressors, negative log-likelihood
of the cap less that of the homoscedastic generalised Gaussian of the same rows, over splits.

``uce_ratio`` and ``dense``: the cap of maps behind a super-resolution network that others trained,
on photos, beside the released loss; trained on the module photos of a split, measured on the test
photos, beside test-time augmentation and dropout left on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import gammaln

from bench.dense import beside, cached, frozen, images, images_of, sampled
from bench.dense_material import DenseSet
from bench.dense_material import load as load_dense
from bench.suite import load
from calibration.fit_options import FitOptions
from calibration.material import parts_of, split
from calibration.metrics.bootstrap import mean_estimates
from calibration.metrics.correlation import pearson
from calibration.metrics.sparsification import sparsification
from calibration.metrics.uce import uncertainty_calibration_error
from posthoc import registry
from posthoc.contract import F64, Array, Features, State
from posthoc.methods.bayescap import generalised_gaussian as gg
from posthoc.methods.bayescap import image, vector
from posthoc.rows import of

if TYPE_CHECKING:
    from torch import Tensor

SEEDS = 5
DRAWS = 20_000
SETS = ("diamonds", "deliveries")
DENSE = "super-resolution"
IMAGES, QUICK_IMAGES = (900, 600), (240, 150)  # and steps of training
SPLIT = 0
BLOCK = 32  # images at once, in float64
SMALLEST, LARGEST = 1e-4, 1e3  # between which the released loss keeps an error
# beta and variance of the standard noises
NOISES: dict[str, tuple[Callable[[np.random.Generator, int], F64], float, float]] = {
    "normal": (lambda rng, n: rng.normal(size=n), 2.0, 1.0),
    "laplace": (lambda rng, n: rng.laplace(size=n), 1.0, 2.0),
}


def run(quick: bool) -> dict[str, Any]:
    """The figures above, with everything that they are the worst or the median of."""
    seeds = range(SEEDS)
    noises = {name: recovered(name, seeds) for name in NOISES}
    count, steps = QUICK_IMAGES if quick else IMAGES
    maps = on_images(load_dense(DENSE), count, image.Settings(steps=steps))
    return {
        "uce_ratio": maps["uce_ratio"],
        "beta_error": max(n["beta_error"] for n in noises.values()),
        "variance_error": max(n["variance_error"] for n in noises.values()),
        "noises": noises,
        "released": {name: released_constants(name) for name in NOISES},
        "table": [on_set(name, range(2 if quick else SEEDS)) for name in SETS],
        "dense": maps,
    }


def recovered(noise: str, seeds: Sequence[int]) -> dict[str, Any]:
    """What the cap says of the noise, the mean over rows, for each seed."""
    draw, beta, variance = NOISES[noise]
    betas, variances = [], []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        z = rng.normal(size=(DRAWS, 1))
        rows = Features(None, z, z + draw(rng, DRAWS)[:, None])
        state = registry.fit("bayescap", None, "regression", of(rows), {})
        found = vector.parameters(state, None, z)
        betas.append(float(found[1].mean()))
        variances.append(float(gg.variance(*found).mean()))
    return {
        "beta_error": median(abs(b / beta - 1) for b in betas),
        "variance_error": median(abs(v / variance - 1) for v in variances),
        "betas": betas,
        "variances": variances,
    }


def released_constants(noise: str) -> dict[str, float]:
    """beta that the released loss gives to the noise, and its variance over the true one."""
    draw, _, variance = NOISES[noise]
    size = np.abs(draw(np.random.default_rng(0), DRAWS))

    def cost(x: F64) -> float:
        log_alpha, u = x
        product = np.clip(size * np.exp(u - log_alpha), SMALLEST, LARGEST)
        return float(product.mean() - u + log_alpha + gammaln(np.exp(-u)))

    alpha, beta = np.exp(minimize(cost, np.zeros(2), method="Nelder-Mead").x)
    return {"beta": float(beta), "variance_ratio": float(gg.variance(alpha, beta)) / variance}


def on_set(name: str, seeds: Sequence[int]) -> dict[str, Any]:
    """NLL on test rows in nats, an output each: cap less homoscedastic, mean and standard deviation
    over splits."""
    known, differences, betas = load(name, grouped=False), [], []
    for seed in seeds:
        parts, test = parts_of(known.material, split(known.material, seed))
        state = registry.fit("bayescap", None, "regression", of(parts.module), {})
        error = np.asarray(test.y, np.float64) - test.z
        alpha, beta = vector.parameters(state, test.phi, test.z)
        constant = gg.fit(np.asarray(parts.module.y, np.float64) - parts.module.z)
        differences.append(float((gg.nll(error, alpha, beta) - gg.nll(error, *constant)).mean()))
        betas.append(float(np.median(beta)))
    return {
        "set": name,
        "nll_difference": float(np.mean(differences)),
        "nll_difference_sd": float(np.std(differences)),
        "median_beta": float(np.mean(betas)),
        "splits": len(differences),
    }


def on_images(made: DenseSet, count: int, settings: image.Settings) -> dict[str, Any]:
    """`dense` on so many images of a set, split by photo; ``beside`` has the correlation and AUSE
    of the peers."""
    with TemporaryDirectory() as folder:
        made = sampled(made, count, Path(folder))
        options = FitOptions(task="regression", method="none", seed=SPLIT)
        material = cached(made, made.model, options, Path(folder))
        module, test = (images_of(material, SPLIT, role) for role in ("module", "test"))
        predict = frozen(made, threads=0)
        x, y, _ = images(made, module)
        train = list(predict(x)), list(y.astype(np.float32))
        x, y, photos = images(made, test)
        z = predict(x)
        found = dense(train, (z, y.astype(np.float32)), settings, photos)
        size = np.abs(y - z)
        peers = {
            name: {"correlation": pearson(size, s), "ause": sparsification(size, s).ause}
            for name, s in beside(made, x, SPLIT).items()
        }
    return {"set": made.name, "trained_on": len(module), **found, "beside": peers}


def dense(
    train: tuple[Sequence[Array], Sequence[Array]],
    test: tuple[Array, Array],
    settings: image.Settings,
    photos: Array | None = None,
) -> dict[str, Any]:
    """The cap on maps beside the released loss in the same network, trained on the same images:
    (outputs, targets), K×H×W each; ``test`` N×K×H×W, ``photos`` what each of them is cut from.

    ``uce_ratio`` is ours over theirs, ``nll_difference`` cap less homoscedastic with its 95 %
    interval over photos (or images), ``ause`` of sigma for |error| beside that of a random order.
    """
    error = np.asarray(test[1], np.float64) - test[0]
    cap = image.train_image_cap(*train, settings)
    ours = _applied(cap, test[0])
    theirs = _applied(train_released(*train, settings), test[0])
    pairs = zip(*train, strict=True)
    errors = [(np.asarray(y, np.float64) - z).reshape(len(z), -1) for z, y in pairs]
    constant = (v[:, None, None] for v in gg.fit(np.concatenate(errors, 1).T))
    difference = (gg.nll(error, *ours) - gg.nll(error, *constant)).mean((1, 2, 3))
    variances = image.variance(cap, *ours), gg.variance(*theirs)
    uce, uce_released = (uncertainty_calibration_error(error**2, v) for v in variances)
    curve = sparsification(np.abs(error), np.sqrt(variances[0]))
    interval = mean_estimates({"nll": difference}, groups=photos)["nll"]
    return {
        "uce": uce,
        "uce_released": uce_released,
        "uce_ratio": uce / uce_released,
        "nll_difference": interval.value,
        "nll_difference_interval": [interval.low, interval.high],
        "ause": curve.ause,
        "ause_random": curve.random,
        "correlation": pearson(np.abs(error), np.sqrt(variances[0])),
        "images": len(error),
        "photos": None if photos is None else len(np.unique(photos)),
    }


def _applied(state: State, z: Array) -> tuple[F64, F64]:
    parts = [image.apply_image_cap(state, z[i : i + BLOCK]) for i in range(0, len(z), BLOCK)]
    alpha, beta = zip(*parts, strict=True)
    return np.concatenate(alpha), np.concatenate(beta)


def train_released(
    z_maps: Sequence[Array], y_maps: Sequence[Array], settings: image.Settings
) -> State:
    """The image cap with the loss that the authors released, without recalibration."""
    trained = image.train_network(z_maps, y_maps, settings, released)
    k = len(trained.fixed) // 2
    return image.finish(trained, np.ones(k), np.zeros(k), settings.model_dump())


def released(log_r: Tensor, log_alpha: Tensor, log_beta: Tensor) -> Tensor:
    """ExplainableML/BayesCap, src/losses.py: |r| / alpha *times* beta where the density has a
    power."""
    import torch

    product = (log_r + log_beta - log_alpha).clamp(math.log(SMALLEST), math.log(LARGEST)).exp()
    return product - log_beta + log_alpha + torch.lgamma(torch.exp(-log_beta))
