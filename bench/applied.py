"""Our side of the Laplace benchmarks, as a process of its own: the same tasks as the peer's.

Prediction is timed as it is served: tables factorised in float64 and applied in float32 by one
ONNX graph from features to probabilities, in ONNX Runtime. Of a bundle's head it keeps what the
peer computes too: the linear layer, the variance of each logit and the probit link of each class.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from bench.timing import per_call
from bench.worker import peak_bytes, serve
from posthoc import registry, rows
from posthoc.contract import Array, Features, LinearHead, State
from posthoc.graph import Fragment, standalone
from posthoc.link_graph import emit_probs
from posthoc.links import log_probs, softmax
from posthoc.runtime import open_session

PAGES = {"kron": "laplace", "diag": "laplace_diag"}
# The form that laplace-torch has: a block of its own for the bias, nothing centred.
FORM = {"fold_bias": False}


class Side:
    """The data of a run, the posterior fitted last and the sessions that apply it."""

    head: LinearHead
    data: Features
    structure: str
    state: State
    sessions: dict[str, Any]

    def load(self, path: str, dtype: str) -> None:
        """Features, labels and the head from an ``.npz``; outputs are the head's."""
        with np.load(path, allow_pickle=False) as found:
            self.head = LinearHead(found["weight"], found["bias"])
            z = found["phi"] @ found["weight"].T + found["bias"]
            self.data = Features(found["phi"].astype(dtype), z.astype(dtype), found["y"])

    def fit(self, structure: str, prior_precision: float | None) -> float:
        """Fit by the registry; seconds. With a prior precision it is the peer's posterior, without
        one it is what a user gets who sets nothing."""
        data = rows.of(self.data)
        given = {} if prior_precision is None else {"prior_precision": prior_precision, **FORM}
        started = time.perf_counter()
        state = registry.fit(PAGES[structure], self.head, "classification", data, given)
        seconds = time.perf_counter() - started
        self.structure, self.state, self.sessions = structure, state, {}
        return seconds

    def predict(self, what: str, rows: int) -> float:
        """Seconds a point of one way to predict, on the first rows as one batch."""
        phi = np.ascontiguousarray(self.data.phi[:rows])  # type: ignore[index]
        session = self._session(what)
        session.run(None, {"phi": phi})
        return per_call(lambda: session.run(None, {"phi": phi})) / rows

    def answer(self, what: str, rows: int, path: str) -> None:
        """What is predicted for the first rows, into an ``.npz``: by the float64 definition for
        float64 data (probabilities only), else by the graph that is served."""
        data = self.data
        assert data.phi is not None
        if data.phi.dtype == np.float32:
            value = self._session(what).run(None, {"phi": data.phi[:rows]})[0]
        else:
            page = registry.page(PAGES[self.structure])
            spread = page.spread(self.state, data.phi[:rows], data.z[:rows])
            value = np.exp(log_probs(data.z[:rows], spread, 1.0, 1.0, "probit_class"))
        np.savez(path, value=value)

    def peak(self, what: str, rows: int) -> int:
        """Bytes by which memory rises while the graph is loaded and predicts once: unlike the
        peer's posterior, our tables are counted."""
        model = self._model(what)
        phi = np.ascontiguousarray(self.data.phi[:rows])  # type: ignore[index]

        def work() -> None:
            open_session(model, threads=1).run(None, {"phi": phi})

        return peak_bytes(work)

    def floor(self) -> float:
        """Seconds of the sums and decompositions that no Kronecker fit can do without: the Gram
        matrices of features and probabilities, float32 blocks summed in float64, and eigh of
        both."""
        assert self.data.phi is not None
        phi, p = self.data.phi, softmax(self.data.z).astype(self.data.phi.dtype)
        started = time.perf_counter()
        a, b = np.zeros((phi.shape[1],) * 2), np.zeros((p.shape[1],) * 2)
        for i in range(0, len(phi), rows.BLOCK):
            part, probs = phi[i : i + rows.BLOCK], p[i : i + rows.BLOCK]
            a += part.T @ part
            b += probs.T @ probs
        np.linalg.eigh(a)
        np.linalg.eigh(b)
        return time.perf_counter() - started

    def _session(self, what: str) -> Any:
        if what not in self.sessions:
            self.sessions[what] = open_session(self._model(what), threads=1)
        return self.sessions[what]

    def _model(self, what: str) -> bytes:
        return model(self.structure, self.state, self.head, what)


def model(structure: str, state: State, head: LinearHead, what: str) -> bytes:
    """The graph from ``phi`` N×D to ``probs`` N×C, or to ``covariance`` N×C×C."""
    c, d = head.weight.shape
    g = Fragment()
    phi = g.input("phi", "float32", ["N", d])
    z = g.op("Gemm", phi, g.const(head.weight), g.const(head.bias), transB=1)
    names = registry.page(PAGES[structure]).emit(g, state, phi, z)
    if what == "covariance":
        variance = g.op("Mul", names.amplitude, names.amplitude)
        scaled = g.op("Mul", g.unsqueeze(variance, 1), g.const(_transposed(names.directions)))
        g.publish(g.op("MatMul", scaled, g.const(names.directions)), what)
        return standalone(g, {what: ("float32", (-1, c, c))})
    _, probs = emit_probs(g, z, names, 1.0, 1.0, "probit_class")
    g.publish(probs, "probs")
    return standalone(g, {"probs": ("float32", (-1, c))})


def _transposed(directions: Array) -> Array:
    return np.ascontiguousarray(directions.T)[None]


if __name__ == "__main__":
    side = Side()
    serve({n: getattr(side, n) for n in ("load", "fit", "predict", "answer", "peak", "floor")})
