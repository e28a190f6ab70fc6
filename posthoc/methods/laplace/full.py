"""Last-layer Laplace with the full curvature of the head, for small heads.

The curvature of all K = D + 1 parameters of C classes is the sum over rows of (diag(p) - p p') ⊗
phi~ phi~' with phi~ = [phi, 1], or of the outer products of gradients (Daxberger et al. 2021,
arXiv:2106.14806). It is summed by pairs of classes, each a Gram matrix of weighted features; no
Jacobian is made. The posterior keeps a factor of its covariance, from which variances are exact,
and S fixed draws of the head (`posthoc.methods.laplace.factored`). In a regression outputs do not
share curvature, and this is the form of `posthoc.methods.laplace.kron`, which is then exact.

Memory of a fit is some 6 (CK)² float64 numbers: 1.2 GB at the default limit of 5,000 parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from posthoc.contract import (
    F64,
    Array,
    Features,
    FitError,
    Info,
    LinearHead,
    Paper,
    State,
    Task,
)
from posthoc.links import N_DRAWS, Spread, SpreadNames
from posthoc.methods.laplace import factored, kron, sums
from posthoc.methods.laplace.criteria import choose_classification, finished
from posthoc.methods.laplace.prior import Spectrum
from posthoc.methods.laplace.settings import Curvature

if TYPE_CHECKING:
    from posthoc.graph import Fragment

INFO = Info(
    name="laplace_full",
    kind="module",
    tasks=("classification", "regression"),
    needs=frozenset({"features", "linear_head"}),
    summary="last-layer Laplace, full curvature of a small head",
    paper=Paper(
        "Laplace Redux: Effortless Bayesian Deep Learning", 2021, "https://arxiv.org/abs/2106.14806"
    ),
)


OF_CLASSES = {"draws", "seed", "max_parameters", "fold_bias"}


class Settings(Curvature):
    """``fisher``: the curvature is the generalised Gauss-Newton matrix (ggn, needs no labels) or
    the empirical Fisher matrix (empirical, classification with labels).

    ``prior_precision`` fixes the precision of the prior; else the rule ``prior`` finds it:
    evidence (MacKay's fixed point on the spectrum), heldout (the smallest precision within 0.0005
    nats of the best negative log-likelihood of the probit predictive on every fifth row, each
    precision with its own temperature), or epsilon, which needs no labels: the smallest precision
    at which that predictive differs from the frozen model's by at most ``epsilon`` in mean total
    variation (of such rows again; uncalibrated).

    ``train_rows`` rescales the curvature to the rows the network was trained on. The rest is of
    classifications only: ``fold_bias`` False leaves logits uncentred over classes, as
    laplace-torch does; ``draws`` is the number of fixed draws of the head, from the random
    ``seed``; ``max_parameters`` limits weights and biases, whose covariance is a dense matrix."""

    draws: int = Field(default=N_DRAWS, ge=2, le=4096, multiple_of=2)
    seed: int = Field(default=0, ge=0)
    max_parameters: int = Field(default=5_000, gt=0)


@dataclass(frozen=True, slots=True)
class Stats:
    """Sums over ``n`` rows of a classification: ``total`` D of features, and ``pairs`` K×K for each
    pair of classes c <= d in the order of `numpy.triu_indices`; those of c = d are zero under ggn,
    being minus the sum of the others of the class."""

    empirical: bool
    n: int
    total: F64
    pairs: F64


def init(head: LinearHead, task: Task, settings: Settings) -> Stats | kron.Stats:
    """The empty statistic; FitError for a head with too many parameters, for a setting that a
    regression has no use for, and for its empirical Fisher matrix."""
    settings.check(task)
    if task == "regression":
        for name in sorted(OF_CLASSES & settings.model_fields_set):
            raise FitError(f"laplace_full has no use for {name} in a regression; leave it out")
        return kron.init(head, task, settings)
    c, k = head.weight.shape[0], head.weight.shape[1] + 1
    if c * k > settings.max_parameters:
        raise FitError(
            f"laplace_full: the head has {c * k} parameters and the limit is "
            f"{settings.max_parameters} (max_parameters); use laplace (Kronecker) or laplace_diag"
        )
    pairs = np.zeros((c * (c + 1) // 2, k, k))
    return Stats(settings.fisher == "empirical", 0, np.zeros(k - 1), pairs)


def update(stats: Stats | kron.Stats, batch: Features) -> Stats | kron.Stats:
    """Add the rows of a batch. Labels are used in a regression and for the empirical Fisher."""
    return kron.update(stats, batch) if isinstance(stats, kron.Stats) else _add(stats, batch)


def _add(stats: Stats, batch: Features) -> Stats:
    for block in sums.blocks(batch):
        # All in float64: draws are differences of large numbers, and these heads are small.
        phi = sums.exact(sums.real(block.phi))
        block = replace(block, z=np.asarray(block.z, np.float64))
        of = sums.gradients(block) if stats.empirical else sums.probabilities(block.z)
        pairs = stats.pairs.copy()
        for at, (c, d) in enumerate(zip(*np.triu_indices(of.shape[1]), strict=True)):
            if stats.empirical:
                pairs[at] += (phi * of[:, c, None]).T @ (phi * of[:, d, None])
            elif c != d:
                weighted = phi * np.sqrt(of[:, c] * of[:, d])[:, None]
                pairs[at] += weighted.T @ weighted
        total = stats.total + phi[:, :-1].sum(0)
        stats = replace(stats, n=stats.n + len(block), total=total, pairs=pairs)
    return stats


def merge(a: Stats | kron.Stats, b: Stats | kron.Stats) -> Stats | kron.Stats:
    """The statistic of both sets of rows."""
    if isinstance(a, kron.Stats):
        assert isinstance(b, kron.Stats)
        return kron.merge(a, b)
    assert isinstance(b, Stats)
    return replace(a, n=a.n + b.n, total=a.total + b.total, pairs=a.pairs + b.pairs)


def finish(
    stats: Stats | kron.Stats,
    head: LinearHead,
    settings: Settings,
    heldout: Features | None = None,
) -> State:
    """The posterior. Rows held out for the choice of the prior join it afterwards.

    Raises FitError where labels are absent that a setting or a regression needs, for a regression
    without residuals, and where the evidence has no maximum.
    """
    if isinstance(stats, kron.Stats):
        return kron.finish(stats, head, settings, heldout)
    return finished(_posterior, _add, stats, head, settings, heldout)


def _posterior(
    stats: Stats, head: LinearHead, settings: Settings, heldout: Features | None
) -> State:
    c, k = head.weight.shape[0], head.weight.shape[1] + 1
    basis = _basis(c, settings)
    h, vectors = np.linalg.eigh(_curvature(stats, basis, settings))
    known = Spectrum(np.maximum(h, 0.0), sums.squared_norm(head, settings.fold_bias))
    vectors = vectors.reshape(len(basis), k, -1)
    contrasts = sums.centred_basis(c)

    def squares(phi: Array) -> F64:
        x, total = sums.exact(phi), np.zeros((len(phi), len(h)))
        for row in contrasts @ basis.T:
            total += (x @ np.tensordot(row, vectors, 1)) ** 2
        return total * 2.0 / len(contrasts)

    precision, said = choose_classification(
        settings, known, heldout, squares, lambda fixed, d: fixed @ (1.0 / (known.values + d))
    )
    lower = factored.triangle((vectors.reshape(len(h), -1) / np.sqrt(known.values + precision)).T)
    factor = np.tensordot(basis.T, lower.reshape(len(basis), k, -1), 1)
    centre = sums.centre(stats.total, stats.n)
    tensors = factored.tensors(factor, centre, settings.draws, settings.seed)
    more = {**settings.described(stats.n), "draws": settings.draws, "seed": settings.seed}
    return State(tensors, {"task": "classification", **said, **more})


def spectrum(stats: Stats, head: LinearHead, settings: Settings) -> Spectrum:
    """Of a classification: what `posthoc.methods.laplace.prior.log_evidence` takes."""
    curvature = _curvature(stats, _basis(len(head.bias), settings), settings)
    values = np.maximum(np.linalg.eigvalsh(curvature), 0.0)
    return Spectrum(values, sums.squared_norm(head, settings.fold_bias))


def spread(state: State, phi: Array, z: Array) -> Spread:
    """What the posterior adds to the outputs of N rows (float64 definition)."""
    if "factor" in state.tensors:
        return factored.spread(state, phi)
    return kron.spread(state, phi, z)


def emit(g: Fragment, state: State, phi: str, z: str) -> SpreadNames:
    """The same as a graph fragment."""
    if "factor" in state.tensors:
        return factored.emit(g, state, phi)
    return kron.emit(g, state, phi, z)


def joint(state: State, phi: Array) -> F64:
    """Covariance N×C×N×C of the outputs of N rows together."""
    if "factor" in state.tensors:
        return factored.joint(state, phi)
    return kron.joint(state, phi)


def _basis(classes: int, settings: Settings) -> F64:
    return sums.centred_basis(classes) if settings.fold_bias else np.eye(classes)


def _curvature(stats: Stats, basis: F64, settings: Settings) -> F64:
    """RK×RK over the rows R×C of ``basis``, on the scale of the training rows."""
    c, k = basis.shape[1], stats.pairs.shape[1]
    whole = np.zeros((c, c, k, k))
    upper = np.triu_indices(c)
    whole[upper] = stats.pairs
    whole[upper[::-1]] = stats.pairs.transpose(0, 2, 1)
    if not stats.empirical:
        total = whole.sum(1)
        whole *= -1.0
        whole[np.arange(c), np.arange(c)] = total
    half = np.tensordot(basis, whole, 1)  # R×C×K×K
    done = np.tensordot(half, basis.T, axes=(1, 0)).transpose(0, 3, 1, 2)  # R×R×K×K
    r = len(basis)
    done = done.transpose(0, 2, 1, 3).reshape(r * k, r * k)
    return np.asarray(done * settings.scale(stats.n))
