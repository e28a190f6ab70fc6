"""A Laplace posterior over all weights of a torch module, through laplace-torch.

Last-layer posteriors are written out in this project; over all weights the curvature is
laplace-torch's (MIT). S weight sets drawn from it become one module that answers
``(z, members)``: the frozen outputs N×C, and the outputs N×(S·C) of the S copies.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from posthoc.contract import F64, Array, FitError, ModelError, Task

Which = Literal["all", "subnetwork"]
MAX_NUMBERS = 100_000_000  # of all copies together: 400 MB in the graph
SUBNETWORK = 500  # weights, the largest, under a full covariance
BATCH = 128


@dataclass(frozen=True, slots=True)
class Sampled:
    """``module`` answers (z, members); ``linearised`` is laplace-torch's own predictive of a block
    of inputs: probabilities N×C, or means and variances 2×N×K, noise included; ``facts`` are for
    the user."""

    module: Any
    linearised: Callable[[Array], F64]
    facts: dict[str, Any]


def sample_weights(
    module: Any,
    x: Array,
    y: Array,
    *,
    task: Task,
    weights: Which,
    samples: int = 10,
    curvature: Literal["kron", "diag", "full"] | None = None,
    seed: int = 0,
    max_numbers: int = MAX_NUMBERS,
) -> Sampled:
    """Fit laplace-torch on inputs x (N×…) and labels y, tune its prior precision by the marginal
    likelihood and draw ``samples`` weight sets with ``seed``.

    ``curvature`` defaults to kron for all weights (linear and convolutional layers) and to full for
    a subnetwork of the largest weights. Raises FitError where laplace-torch is not installed or
    cannot do it, saying why, and ModelError where the copies would hold more than ``max_numbers``
    weights or the module gives probabilities.
    """
    torch, laplace = _libraries()
    total = sum(p.numel() for p in module.parameters())
    if samples < 2:
        raise FitError("--samples must be at least 2")
    if samples * total > max_numbers:
        raise ModelError(
            f"{samples} samples of {total:,} weights are {samples * total:,} numbers, above the "
            f"limit of {max_numbers:,}; take fewer --samples, or a last-layer method"
        )
    base = copy.deepcopy(module).eval()
    inputs = torch.as_tensor(x)
    with torch.no_grad():
        z = np.asarray(base(inputs).numpy(force=True), np.float64)
    if z.ndim != 2:
        raise ModelError(f"weights of a module with outputs N×C only; this one gives {z.shape}")
    options: dict[str, Any] = {}
    if task == "regression":
        labels = torch.as_tensor(np.asarray(y, np.float32).reshape(len(y), -1))
        options["sigma_noise"] = float(np.sqrt(((labels.numpy() - z) ** 2).mean()))
    else:
        if (z >= 0).all() and np.allclose(z.sum(1), 1, atol=1e-3):
            raise ModelError("the module gives probabilities; give one that gives logits")
        labels = torch.as_tensor(np.asarray(y, np.int64))
    structure = curvature or ("kron" if weights == "all" else "full")
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, labels), batch_size=BATCH
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if weights == "subnetwork":
                count = min(SUBNETWORK, total)
                mask = laplace.utils.LargestMagnitudeSubnetMask(base, n_params_subnet=count)
                options["subnetwork_indices"] = mask.select()
            posterior = laplace.Laplace(
                base, task, subset_of_weights=weights, hessian_structure=structure, **options
            )
            posterior.fit(loader)
            posterior.optimize_prior_precision(method="marglik")
            drawn = posterior.sample(samples, generator=torch.Generator().manual_seed(seed))
        except Exception as e:  # its backends raise unrelated types
            raise FitError(
                f"laplace-torch cannot fit {structure} curvature over {weights} weights of this "
                f"module: {str(e).splitlines()[0] if str(e) else type(e).__name__}; "
                "try another --curvature, or a last-layer method"
            ) from e
    if not bool(torch.isfinite(drawn).all()):
        raise FitError("laplace-torch drew weights that are not finite; try another --curvature")
    copies = [_with_weights(torch, module, vector) for vector in drawn]
    facts = {
        "weights": weights,
        "curvature": structure,
        "samples": samples,
        "parameters": total,
        "prior_precision": float(posterior.prior_precision.mean()),
        "rows": len(x),
        "seed": seed,
    }
    return Sampled(
        _joined(torch, module, copies),
        lambda rows: _linearised(torch, posterior, task, rows),
        facts,
    )


def _libraries() -> tuple[Any, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its dependencies use what torch has deprecated
            import laplace
            import laplace.utils
            import torch
    except ImportError as e:
        raise FitError(
            f"--weights needs laplace-torch ({e}). Its own list would bring another torch, so: "
            "pip install --no-deps laplace-torch==0.3 asdfghjkl==0.1a4 "
            "backpack-for-pytorch==1.7.1 curvlinops-for-pytorch==3.0.1 unfoldNd==0.2.3; pip "
            "install einconv einops linear-operator opt-einsum torchmetrics tqdm"
        ) from None
    return torch, laplace


def _with_weights(torch: Any, module: Any, vector: Any) -> Any:
    made = copy.deepcopy(module).eval().requires_grad_(False)
    torch.nn.utils.vector_to_parameters(vector.to(torch.float32), made.parameters())
    return made


def _joined(torch: Any, module: Any, copies: list[Any]) -> Any:
    """One module that runs the original and every copy on the same input."""

    class Members(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.frozen = copy.deepcopy(module).eval().requires_grad_(False)
            self.copies = torch.nn.ModuleList(copies)

        def forward(self, x: Any) -> tuple[Any, Any]:
            return self.frozen(x), torch.cat([m(x) for m in self.copies], dim=1)

    return Members().eval()


def _linearised(torch: Any, posterior: Any, task: Task, rows: Array) -> F64:
    """laplace-torch's generalised-linear predictive: probit for classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = posterior(torch.as_tensor(rows), pred_type="glm", link_approx="probit")
    if task == "classification":
        return np.asarray(made.numpy(force=True), np.float64)
    mean, variance = (np.asarray(t.numpy(force=True), np.float64) for t in made)
    noise = float(posterior.sigma_noise) ** 2
    return np.stack([mean, np.diagonal(variance, axis1=1, axis2=2) + noise])
