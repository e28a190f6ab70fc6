"""Rows, heads and dense algebra that the Laplace pages are held against."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from posthoc.contract import Features, LinearHead, State, Task
from posthoc.links import Spread, softmax
from posthoc.methods.laplace import diag, full, identity, kron
from posthoc.rows import of

D, C, N = 6, 4, 300
PAGES: dict[str, ModuleType] = {"kron": kron, "diag": diag, "full": full, "identity": identity}


def material(
    task: Task = "classification", c: int = C, d: int = D, n: int = N, seed: int = 0
) -> tuple[LinearHead, Features]:
    """A head and the rows of a model that it suits."""
    rng = np.random.default_rng(seed)
    head = LinearHead(rng.normal(size=(c, d)), rng.normal(size=c))
    phi = rng.normal(size=(n, d)) + 0.3
    z = phi @ head.weight.T + head.bias
    y = (z + rng.gumbel(size=z.shape)).argmax(1)
    return head, Features(phi, z, y if task == "classification" else z + rng.normal(size=z.shape))


def summed(page: ModuleType, head: LinearHead, rows: Features, task: Task, **given: Any) -> Any:
    """The statistic of the rows and the settings."""
    settings = page.Settings(**given)
    return page.update(page.init(head, task, settings), rows), settings


def fitted(
    page: ModuleType,
    head: LinearHead,
    rows: Features,
    task: Task = "classification",
    **given: Any,
) -> State:
    """The state on all rows."""
    if page is identity:
        found: State = page.fit(of(rows), head, task, page.Settings(**given))
        return found
    stats, settings = summed(page, head, rows, task, **given)
    state: State = page.finish(stats, head, settings)
    return state


def lambdas(rows: Features, fisher: str) -> np.ndarray:
    """The curvature C×C of each row's loss in its logits."""
    p = softmax(rows.z)
    if fisher == "empirical":
        g = p - np.eye(p.shape[1])[rows.y]
        return np.stack([np.outer(v, v) for v in g])
    return np.stack([np.diag(q) - np.outer(q, q) for q in p])


def with_one(phi: np.ndarray) -> np.ndarray:
    return np.concatenate([phi, np.ones((len(phi), 1))], 1)


def dense_curvature(structure: str, rows: Features, fisher: str, folded: bool) -> np.ndarray:
    """CK×CK by its definition, one row after the other."""
    phi, of_rows = with_one(rows.phi), lambdas(rows, fisher)
    if structure == "kron":
        gram = phi.T @ phi
        if not folded:
            gram[-1, :-1] = gram[:-1, -1] = 0
        return np.kron(of_rows.mean(0), gram)
    exact = sum(np.kron(a, np.outer(x, x)) for a, x in zip(of_rows, phi, strict=True))
    return np.diag(np.diag(exact)) if structure == "diag" else np.asarray(exact)


def dense_covariance(
    structure: str, rows: Features, precision: float, fisher: str = "ggn", folded: bool = True
) -> np.ndarray:
    """Of all weights and biases, CK×CK."""
    size = rows.z.shape[1] * (rows.phi.shape[1] + 1)
    if structure == "identity":
        return np.eye(size) / precision
    curvature = dense_curvature(structure, rows, fisher, folded)
    return np.linalg.inv(curvature + precision * np.eye(size))


def outputs(sigma: np.ndarray, phi: np.ndarray, c: int, centred: bool) -> np.ndarray:
    """Covariance N×C×N×C of outputs."""
    centring = np.eye(c) - centred / c
    jacobian = np.concatenate([centring @ np.kron(np.eye(c), x) for x in with_one(phi)])
    return (jacobian @ sigma @ jacobian.T).reshape(len(phi), c, len(phi), c)


def covariance(spread: Spread) -> np.ndarray:
    """Output covariance N×C×C of a spread with directions."""
    root = spread.amplitude[:, :, None] * spread.directions[None]
    return np.einsum("nri,nrj->nij", root, root)


def mean_difference(covariance: np.ndarray) -> float:
    """Mean over pairs of classes of the variance of their difference, as a slow loop."""
    c = len(covariance)
    pairs = [(a, b) for a in range(c) for b in range(c) if a != b]
    return float(
        np.mean([covariance[a, a] + covariance[b, b] - 2 * covariance[a, b] for a, b in pairs])
    )
