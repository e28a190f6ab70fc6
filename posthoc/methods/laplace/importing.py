"""A posterior fitted with laplace-torch, as the state of one of our modules.

Read is what `la.state_dict()` of laplace-torch 0.3 holds for KronLLLaplace, DiagLLLaplace and
FullLLLaplace: curvature, prior precision (scalar, by layer, by parameter), observation noise and
temperature. The bias stays as that library has it and nothing is centred over classes, so that the
covariance of the logits is the library's own. A file is either ``torch.save(la.state_dict(),
path)``, read with ``weights_only=True``, or safetensors of the same tensors: names as the keys of
the state_dict, the Kronecker factors as ``H.0.0``, ``H.0.1``, ``H.1.0``, and text and numbers in
the metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from posthoc.contract import F64, Array, FitError, LinearHead, State, Task
from posthoc.links import N_DRAWS
from posthoc.methods.laplace import factored

MODULES = {
    "KronLLLaplace": "laplace",
    "DiagLLLaplace": "laplace_diag",
    "FullLLLaplace": "laplace_full",
}
NEEDED = ("cls_name", "likelihood", "mean", "H", "prior_precision", "sigma_noise", "temperature")


def import_laplace(
    source: str | Path | Mapping[str, Any], head: LinearHead, task: Task | None = None
) -> tuple[str, State]:
    """(name of the module, its state) of a posterior fitted with laplace-torch for ``head``.

    ``source`` is a file or a state_dict. Raises FitError for a file that is no such thing, another
    class of posterior, a likelihood that is neither classification nor regression or not ``task``,
    and for a posterior of another head (shape or weights).
    """
    found = source if isinstance(source, Mapping) else _read(Path(source))
    missing = [k for k in NEEDED if k not in found]
    if missing:
        raise FitError(f"no state_dict of a laplace-torch posterior: it lacks {', '.join(missing)}")
    kind = str(found["cls_name"])
    likelihood = str(getattr(found["likelihood"], "value", found["likelihood"]))
    if kind not in MODULES:
        raise FitError(f"a {kind} cannot be imported; there are {', '.join(MODULES)}")
    if likelihood not in ("classification", "regression"):
        raise FitError(f"a posterior for {likelihood} cannot be imported")
    if task is not None and likelihood != task:
        raise FitError(f"the posterior is for {likelihood} and the fit for {task}")
    _check_head(_numbers(found["mean"]).ravel(), head)
    noise = float(_numbers(found["sigma_noise"]).ravel()[0]) ** 2
    temperature = float(_numbers(found["temperature"]).ravel()[0])
    precision = _numbers(found["prior_precision"]).ravel()
    read = {"KronLLLaplace": _kron, "DiagLLLaplace": _diag, "FullLLLaplace": _full}[kind]
    tensors = read(found["H"], 1.0 / (noise * temperature), precision, head)
    said: dict[str, Any] = {
        "task": likelihood,
        "imported": kind,
        "prior": "given",
        "temperature": temperature,
        "fold_bias": False,
    }
    if len(precision) == 1:
        said["prior_precision"] = float(precision[0])
    if "n_data" in found:
        said["rows"] = said["curvature_rows"] = int(_numbers(found["n_data"]))
    if likelihood == "regression":
        said["noise_variance"] = [noise] * len(head.bias)
    return MODULES[kind], State(tensors, said)


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise FitError(
            f"{path} cannot be read safely ({str(e).splitlines()[0]}); write it with "
            "torch.save(la.state_dict(), path), without other objects"
        ) from e
    if not isinstance(found, Mapping):
        raise FitError(f"{path} holds a {type(found).__name__} and no state_dict")
    return found


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        with safe_open(path, framework="numpy") as f:
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118  no mapping
            found: dict[str, Any] = {**(f.metadata() or {}), **tensors}
    except (SafetensorError, OSError) as e:
        raise FitError(f"{path} is no safetensors file: {e}") from e
    factors = sorted(k for k in found if k.startswith("H."))
    if factors:
        blocks = sorted({k.split(".")[1] for k in factors})
        found["H"] = [[found[k] for k in factors if k.split(".")[1] == b] for b in blocks]
    return found


def _check_head(mean: F64, head: LinearHead) -> None:
    c, d = head.weight.shape
    if len(mean) not in (c * d, c * d + c):
        raise FitError(
            f"the posterior has {len(mean)} parameters and the head {c}×{d} weights and {c} biases"
        )
    ours = np.concatenate([head.weight.ravel(), head.bias])
    theirs = np.concatenate([mean, np.zeros(len(ours) - len(mean))])
    # The head may have been through float32.
    if not np.allclose(theirs, ours, rtol=1e-4, atol=1e-5 * np.abs(ours).max()):
        raise FitError("the posterior is that of other weights than this model's head has")


def _kron(factors: Any, scale: float, precision: F64, head: LinearHead) -> dict[str, Array]:
    """Where the bias has the eigenvectors of the weights they share directions."""
    c, d = head.weight.shape
    blocks = [[_numbers(f) for f in block] for block in factors]
    shapes = [[f.shape for f in block] for block in blocks]
    if shapes not in ([[(c, c), (d, d)], [(c, c)]], [[(c, c), (d, d)]]):
        raise FitError(f"Kronecker factors of shapes {shapes} for a head {c}×{d}")
    if len(precision) not in (1, 2):
        raise FitError("a Kronecker posterior has one prior precision, or one a layer")
    mu, basis = np.linalg.eigh(blocks[0][1])
    lam, vectors = np.linalg.eigh(blocks[0][0])
    h = scale * np.multiply.outer(np.maximum(mu, 0.0), np.maximum(lam, 0.0))
    shrink, directions = 1.0 / (h + precision[0]), vectors.T
    offset = np.zeros((1, c))
    if len(blocks) == 2:
        turned = vectors.T @ blocks[1][0] @ vectors
        along = np.diag(turned)
        if not np.allclose(turned, np.diag(along), rtol=0, atol=1e-12 * np.abs(along).max()):
            along, own = np.linalg.eigh(blocks[1][0])
            directions = np.concatenate([directions, own.T])
            shrink, offset = np.pad(shrink, ((0, 0), (0, c))), np.zeros((1, 2 * c))
        offset[0, -c:] = 1.0 / (scale * np.maximum(along, 0.0) + precision[-1])
    return {
        "centre": np.zeros(d),
        "basis": np.pad(basis, ((0, 0), (0, 1))),
        "offset": np.eye(d + 1)[-1],
        "shrink": np.concatenate([shrink, offset]),
        "directions": np.ascontiguousarray(directions),
    }


def _diag(curvature: Any, scale: float, precision: F64, head: LinearHead) -> dict[str, Array]:
    c, d = head.weight.shape
    h = _numbers(curvature)
    if h.shape not in ((c * d,), (c * d + c,)):
        raise FitError(f"a diagonal curvature of shape {h.shape} for a head {c}×{d}")
    v = 1.0 / (scale * h + _by_parameter(precision, len(h)))
    offset = v[c * d :] if len(h) > c * d else np.zeros(c)
    return {"shrink": np.ascontiguousarray(v[: c * d].reshape(c, d).T), "offset": offset}


def _full(curvature: Any, scale: float, precision: F64, head: LinearHead) -> dict[str, Array]:
    c, d = head.weight.shape
    h = _numbers(curvature)
    p = len(h)
    if h.shape != (p, p) or p not in (c * d, c * d + c):
        raise FitError(f"a full curvature of shape {h.shape} for a head {c}×{d}")
    lower = np.linalg.cholesky(scale * h + np.diag(_by_parameter(precision, p)))
    root = np.linalg.solve(lower, np.eye(p)).T
    factor = np.zeros((c, d + 1, p))
    factor[:, :d] = root[: c * d].reshape(c, d, p)
    if p > c * d:
        factor[:, d] = root[c * d :]
    return factored.tensors(factor, np.zeros(d), N_DRAWS, 0)


def _by_parameter(precision: F64, parameters: int) -> F64:
    if len(precision) not in (1, parameters):
        raise FitError(f"{len(precision)} prior precisions for {parameters} parameters")
    return np.broadcast_to(precision, parameters)


def _numbers(value: Any) -> F64:
    """A tensor of torch or numpy, a number or its text, in float64."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError) as e:
        raise FitError(f"the state_dict holds {value!r} where numbers belong") from e
