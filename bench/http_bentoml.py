"""BentoML's own batchable API around the graph: ``bentoml serve bench.http_bentoml:Peer``.

The fast path that its documentation gives: an array in, an array out (of the probabilities alone,
which is less than the others answer), adaptive batching, metrics as they come.
"""

from __future__ import annotations

import os

import bentoml
import numpy as np

from bench.http_floor import input_dtype, session


@bentoml.service(
    name="peer", workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}}
)
class Peer:
    """One graph, named by the environment as the other sides' are by arguments."""

    def __init__(self) -> None:
        self.model = session(os.environ["BENCH_GRAPH"])
        self.feed, self.output = os.environ["BENCH_FEED"], os.environ["BENCH_OUTPUT"]
        self.dtype = input_dtype(self.model, self.feed)

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=60_000)  # type: ignore[untyped-decorator]
    def predict(self, x: np.ndarray) -> np.ndarray:
        """Rows N×D → probabilities N×C."""
        (probs,) = self.model.run([self.output], {self.feed: np.asarray(x, self.dtype)})
        return np.asarray(probs)
