"""Our side of the benchmark of nearest neighbours, a process of its own."""

from __future__ import annotations

import time
from functools import partial

import numpy as np

from bench.timing import per_call
from bench.worker import serve
from posthoc.contract import Array, Features, State
from posthoc.graph import Fragment, standalone
from posthoc.ood import knn, sample
from posthoc.ood.neighbours import unit
from posthoc.runtime import open_session


class Side:
    """A fitted score, its queries and their scores."""

    state: State
    bank: Array
    queries: Array
    found: Array

    def fit(self, path: str, k: int) -> float:
        """Seconds of making a bank of every row of an ``.npz``: at length one, as the page does."""
        with np.load(path, allow_pickle=False) as data:
            self.bank, self.queries = data["bank"], data["queries"]
        started = time.perf_counter()
        self.state = State({"bank": unit(self.bank).astype(np.float32)}, {"k": k})
        return time.perf_counter() - started

    def predict(self) -> float:
        """Seconds of the scores of all queries."""
        started = time.perf_counter()
        self.found = knn.score(self.state, self.queries, self.queries)
        return time.perf_counter() - started

    def answer(self, path: str) -> None:
        """Distances at length one, as the peer's scores, into an ``.npz``."""
        np.savez(path, scores=np.sqrt(np.maximum(2 + 2 * self.found, 0.0)))

    def graph(self, rows: int, batches: list[int], threads: int) -> list[float]:
        """Microseconds a row of the served graph with a bank of ``rows``, by size of batch."""
        stats = sample.add(sample.empty(rows), Features(self.bank, self.bank[:, :0]))
        state = knn.finish(stats)
        g = Fragment()
        phi = g.input("phi", "float32", ["N", self.bank.shape[1]])
        g.op("Identity", knn.emit(g, state, phi, phi), out="score")
        session = open_session(standalone(g, {"score": ("float32", (-1,))}), threads=threads)
        found = []
        for n in batches:
            call = partial(session.run, None, {"phi": self.queries[:n]})
            call()
            found.append(1e6 * per_call(call, 0.3) / n)
        return found


if __name__ == "__main__":
    side = Side()
    serve({n: getattr(side, n) for n in ("fit", "predict", "answer", "graph")})
