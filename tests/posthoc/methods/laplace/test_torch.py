"""Posterior, predictive and evidence against laplace-torch 0.3 in float64, and its import."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from posthoc import links, registry
from posthoc.contract import Features, FitError, LinearHead, State
from posthoc.folds import log_softmax
from posthoc.graph import Fragment, standalone
from posthoc.methods.laplace.importing import import_laplace
from posthoc.methods.laplace.prior import log_evidence
from posthoc.runtime import open_session
from tests.posthoc.methods.laplace.material import PAGES, fitted, material, summed

D, C, N = 5, 3, 60
CLASSES = {"kron": "KronLLLaplace", "diag": "DiagLLLaplace", "full": "FullLLLaplace"}
NAMES = {"kron": "laplace", "diag": "laplace_diag", "full": "laplace_full"}
structures = pytest.mark.parametrize("structure", CLASSES)
Peer = Callable[..., Any]


def problem(task: Any = "classification", c: int = C) -> tuple[LinearHead, Features]:
    """Rows whose outputs have mean zero over classes: our link of each class centres them."""
    head, rows = material(task, c=c, d=D, n=N)
    if task == "regression":
        return head, rows
    head = LinearHead(head.weight - head.weight.mean(0), head.bias - head.bias.mean())
    return head, Features(rows.phi, rows.z - rows.z.mean(1, keepdims=True), rows.y)


@pytest.fixture(scope="module")
def peer() -> Peer:
    """Fits laplace-torch's posterior to the same head and rows."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import laplace
        from laplace.curvature import BackPackEF, BackPackGGN, CurvlinopsEF

    def fit(
        structure: str,
        head: LinearHead,
        rows: Features,
        task: str = "classification",
        *,
        batch: int = N,
        empirical: bool = False,
        **options: Any,
    ) -> Any:
        torch.manual_seed(0)
        last = torch.nn.Linear(D, len(head.bias))
        net = torch.nn.Sequential(torch.nn.Identity(), last).double()
        with torch.no_grad():
            last.weight.copy_(torch.from_numpy(head.weight))
            last.bias.copy_(torch.from_numpy(head.bias))
        data = torch.utils.data.TensorDataset(torch.from_numpy(rows.phi), torch.from_numpy(rows.y))
        # Its default backend makes the diagonal of the empirical Fisher matrix zero, and takes
        # seconds to start on a full one; the other has no Kronecker form of it.
        if structure == "kron":
            options |= {"backend": CurvlinopsEF} if empirical else {}
        else:
            options["backend"] = BackPackEF if empirical else BackPackGGN
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = getattr(laplace, CLASSES[structure])(net, task, last_layer_name="1", **options)
            made.fit(torch.utils.data.DataLoader(data, batch_size=batch))
        return made

    return fit


def moments(la: Any, rows: Features) -> np.ndarray:
    """Its covariance of the outputs, N×C×C."""
    import torch

    _, covariance = la._glm_predictive_distribution(torch.from_numpy(rows.phi))
    return covariance.detach().numpy()


def probit(la: Any, rows: Features) -> np.ndarray:
    import torch

    found = la(torch.from_numpy(rows.phi), pred_type="glm", link_approx="probit")
    return found.detach().numpy()


def own(page: Any, state: State, rows: Features) -> np.ndarray:
    return np.einsum("ncnd->ncd", page.joint(state, rows.phi))


@structures
@pytest.mark.parametrize("fisher", ["ggn", "empirical"])
def test_classification_agrees(structure: str, fisher: str, peer: Peer) -> None:
    head, rows = problem()
    la = peer(structure, head, rows, prior_precision=1.7, empirical=fisher == "empirical")
    page = PAGES[structure]
    given = {"fold_bias": False, "fisher": fisher}
    state = fitted(page, head, rows, prior_precision=1.7, **given)
    np.testing.assert_allclose(own(page, state, rows), moments(la, rows), atol=1e-5)
    spread = page.spread(state, rows.phi, rows.z)
    got = np.exp(links.log_probs(rows.z, spread, 1.0, 1.0, "probit_class"))
    np.testing.assert_allclose(got, probit(la, rows), atol=1e-5)
    log_likelihood = float(log_softmax(rows.z)[np.arange(N), rows.y].sum())
    stats, settings = summed(page, head, rows, "classification", **given)
    spectrum = page.spectrum(stats, head, settings)
    for precision in (0.2, 1.7, 30.0):
        import torch

        want = float(la.log_marginal_likelihood(torch.tensor(precision)))
        assert log_evidence(spectrum, precision, log_likelihood) == pytest.approx(want, rel=1e-5)


@structures
def test_regression_agrees(structure: str, peer: Peer) -> None:
    head, rows = problem("regression", c=1)
    page = PAGES[structure]
    given = {} if structure == "full" else {"fold_bias": False}
    state = fitted(page, head, rows, "regression", prior_precision=1.7, **given)
    noise = state.settings["noise_variance"][0]
    options = {"prior_precision": 1.7, "sigma_noise": float(np.sqrt(noise))}
    la = peer(structure, head, rows, "regression", **options)
    want = moments(la, rows)[:, :, 0]
    np.testing.assert_allclose(page.spread(state, rows.phi, rows.z).variance, want, rtol=1e-5)


OPTIONS: list[tuple[str, str, dict[str, Any]]] = [
    ("kron", "classification", {"prior_precision": 0.7, "temperature": 0.4}),
    ("kron", "classification", {"prior_precision": [0.3, 4.0], "batch": 17}),
    ("kron", "regression", {"prior_precision": [0.3, 4.0], "sigma_noise": 0.6}),
    ("diag", "classification", {"prior_precision": 0.7, "temperature": 0.4, "batch": 17}),
    ("diag", "classification", {"prior_precision": "each"}),
    ("diag", "regression", {"prior_precision": 2.0, "sigma_noise": 0.6}),
    ("full", "classification", {"prior_precision": 0.7, "temperature": 0.4}),
    ("full", "classification", {"prior_precision": "each", "batch": 17}),
    ("full", "regression", {"prior_precision": 2.0, "sigma_noise": 0.6, "temperature": 0.8}),
]


@pytest.mark.parametrize(("structure", "task", "options"), OPTIONS, ids=str)
def test_an_imported_posterior_is_the_library_s_own(
    structure: str, task: Any, options: dict[str, Any], peer: Peer, tmp_path: Path
) -> None:
    import torch

    head, rows = problem(task)
    prior = options["prior_precision"]
    if prior == "each":
        prior = np.linspace(0.3, 3.0, C * (D + 1))
    given = {**options, "prior_precision": torch.as_tensor(np.asarray(prior), dtype=torch.float64)}
    la = peer(structure, head, rows, task, **given)
    torch.save(la.state_dict(), tmp_path / "posterior.pt")
    name, state = import_laplace(tmp_path / "posterior.pt", head, task)
    assert name == NAMES[structure]
    assert state.settings["task"] == task and state.settings["rows"] == N
    page, want = registry.page(name), moments(la, rows)
    np.testing.assert_allclose(own(page, state, rows), want, atol=1e-10)
    spread = page.spread(state, rows.phi, rows.z)
    own_variance = np.einsum("ncc->nc", want)
    if task == "regression":
        np.testing.assert_allclose(spread.variance, own_variance, rtol=1e-8)
        assert state.settings["noise_variance"] == pytest.approx([0.36] * C)
    else:
        got = np.exp(links.log_probs(rows.z, spread, 1.0, 1.0, "probit_class"))
        np.testing.assert_allclose(got, probit(la, rows), atol=1e-5)
    _compiles(page, state, rows, spread)


def _compiles(page: Any, state: State, rows: Features, spread: links.Spread) -> None:
    g = Fragment()
    phi, z = g.input("phi", "float32", ["N", D]), g.input("z", "float32", ["N", C])
    g.op("Identity", page.emit(g, state, phi, z).variance, out="variance")
    g.inputs[:] = g.inputs[:1]
    want = np.reshape(spread.variance, (N, -1))
    session = open_session(standalone(g, {"variance": ("float32", (-1, want.shape[1]))}))
    (got,) = session.run(None, {"phi": rows.phi.astype(np.float32)})
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def state_dict(peer: Peer, structure: str = "kron") -> tuple[LinearHead, Features, dict[str, Any]]:
    head, rows = problem()
    return head, rows, dict(peer(structure, head, rows, prior_precision=1.7).state_dict())


def test_a_bias_with_eigenvectors_of_its_own(peer: Peer) -> None:
    head, rows, found = state_dict(peer)
    half = np.random.default_rng(0).normal(size=(C, C))
    (b, a), _ = ([f.numpy() for f in block] for block in found["H"])
    found["H"] = [[b, a], [half @ half.T]]
    name, state = import_laplace(found, head)
    page = registry.page(name)
    weights = np.linalg.inv(np.kron(b, a) + 1.7 * np.eye(C * D))
    biases = np.linalg.inv(half @ half.T + 1.7 * np.eye(C))
    for i in range(4):
        jacobian = np.kron(np.eye(C), rows.phi[i])
        want = jacobian @ weights @ jacobian.T + biases
        np.testing.assert_allclose(own(page, state, rows)[i], want, atol=1e-10)
    _compiles(page, state, rows, page.spread(state, rows.phi, rows.z))


def test_an_imported_regression_with_outputs_that_are_correlated() -> None:
    head, rows = material("regression", c=C, d=D, n=N)
    half, wide = np.random.default_rng(0).normal(size=(2, D, D))
    b, a = half[:C, :C] @ half[:C, :C].T, wide @ wide.T
    found = {
        "cls_name": "KronLLLaplace",
        "likelihood": "regression",
        "mean": np.concatenate([head.weight.ravel(), head.bias]),
        "H": [[b, a], [b]],
        "prior_precision": [0.3, 4.0],
        "sigma_noise": 0.6,
        "temperature": 1.0,
    }
    name, state = import_laplace(found, head)
    page = registry.page(name)
    spread = page.spread(state, rows.phi, rows.z)
    weights = np.linalg.inv(np.kron(b, a) / 0.36 + 0.3 * np.eye(C * D))
    biases = np.linalg.inv(b / 0.36 + 4.0 * np.eye(C))
    for i in range(4):
        jacobian = np.kron(np.eye(C), rows.phi[i])
        want = np.diag(jacobian @ weights @ jacobian.T + biases)
        np.testing.assert_allclose(spread.variance[i], want, rtol=1e-9)
    _compiles(page, state, rows, spread)


@structures
def test_safetensors_of_the_same_tensors(structure: str, peer: Peer, tmp_path: Path) -> None:
    head, _, found = state_dict(peer, structure)
    tensors = {k: found[k].numpy() for k in ("mean", "prior_precision", "sigma_noise")}
    if structure == "kron":
        blocks = enumerate(found["H"])
        tensors |= {f"H.{i}.{j}": f.numpy() for i, b in blocks for j, f in enumerate(b)}
    else:
        tensors["H"] = found["H"].numpy()
    text = {k: str(found[k]) for k in ("cls_name", "likelihood", "temperature", "n_data")}
    path = tmp_path / "posterior.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, text)
    (name, state), (_, want) = import_laplace(str(path), head), import_laplace(found, head)
    assert name == NAMES[structure] and state.settings == want.settings
    for key, value in want.tensors.items():
        np.testing.assert_array_equal(state.tensors[key], value)


def test_what_cannot_be_imported_is_named(peer: Peer, tmp_path: Path) -> None:
    import torch

    head, _, found = state_dict(peer)
    other = LinearHead(np.zeros((C + 1, D)), np.zeros(C + 1))
    moved = LinearHead(head.weight + 0.1, head.bias)
    cases: list[tuple[dict[str, Any], LinearHead, str]] = [
        ({"cls_name": "KronLaplace"}, head, "a KronLaplace cannot be imported"),
        ({"cls_name": "LowRankLaplace"}, head, "there are KronLLLaplace"),
        ({"likelihood": "reward_modeling"}, head, "for reward_modeling"),
        ({"H": [found["H"][0][::-1], found["H"][1]]}, head, "Kronecker factors of shapes"),
        ({"cls_name": "DiagLLLaplace", "H": np.ones(4)}, head, r"diagonal curvature of shape \(4"),
        ({"cls_name": "FullLLLaplace", "H": np.eye(4)}, head, "full curvature of shape"),
        ({"prior_precision": np.ones(18)}, head, "one a layer"),
        ({"sigma_noise": "much"}, head, "'much' where numbers belong"),
        ({}, other, "18 parameters and the head 4×5"),
        ({}, moved, "other weights"),
    ]
    for change, target, message in cases:
        with pytest.raises(FitError, match=message):
            import_laplace({**found, **change}, target)
    with pytest.raises(FitError, match="is for classification and the fit for regression"):
        import_laplace(found, head, "regression")
    with pytest.raises(FitError, match="lacks cls_name"):
        import_laplace({"mean": found["mean"]}, head)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for file, message in (
        ("module.pt", "cannot be read safely"),
        ("none.pt", "cannot be read safely"),
        ("list.pt", "holds a list"),
        ("broken.safetensors", "no safetensors file"),
    ):
        with pytest.raises(FitError, match=message):
            import_laplace(tmp_path / file, head)
