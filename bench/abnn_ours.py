"""Our side of the ABNN benchmark, a process of its own: a bundle's predictor, as it is served."""

from __future__ import annotations

import numpy as np

from bench.timing import per_call
from bench.worker import most_bytes, peak_bytes, serve
from calibration.predictor import Predictor
from posthoc.contract import Array

RUNS = 3  # before memory is read: ONNX Runtime plans it on the first run and takes it on the second


class Side:
    """The bundle and the images of a run."""

    bundle: str
    threads: int
    x: Array
    predictor: Predictor

    def load(self, bundle: str, images: str, threads: int) -> None:
        """A bundle's folder, and images N×28×28 from an ``.npz``."""
        self.bundle, self.threads = bundle, threads
        with np.load(images, allow_pickle=False) as data:
            self.x = data["images"][:, None] / np.float32(255)

    def open(self) -> None:
        """The bundle, verified, and its session."""
        self.predictor = Predictor(self.bundle, threads=self.threads)

    def predict(self, rows: int, batch: int) -> float:
        """Seconds a row, on the first rows in batches, every output of the bundle."""
        x = self.x[:rows]
        self._batched(x[:batch], batch)
        return per_call(lambda: self._batched(x, batch)) / rows

    def answer(self, path: str, batch: int) -> None:
        """Probabilities and labels of every image into an ``.npz``."""
        found = self._batched(self.x, batch)
        probs, label = (np.concatenate([f[k] for f in found]) for k in ("probs", "label"))
        np.savez(path, probs=probs, label=label)

    def peak(self, rows: int, batch: int) -> dict[str, int]:
        """Memory while the bundle is opened and the first rows are predicted: by how many bytes it
        rises, and the most that the process had."""

        def work() -> None:
            self.open()
            for _ in range(RUNS):
                self._batched(self.x[:rows], batch)

        return {"rise": peak_bytes(work), "process": most_bytes()}

    def _batched(self, x: Array, batch: int) -> list[dict[str, Array]]:
        name = self.predictor.inputs[0].name
        return [self.predictor.run({name: x[i : i + batch]}) for i in range(0, len(x), batch)]


if __name__ == "__main__":
    side = Side()
    serve({n: getattr(side, n) for n in ("load", "open", "predict", "answer", "peak")})
