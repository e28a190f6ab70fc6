"""A custom runtime of MLServer around the graph, in MLServer's own environment.

``mlserver start FOLDER``, whose files `bench.http_sides` writes. It answers the probabilities
alone, as BentoML's side does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Runtime(MLModel):  # type: ignore[misc]  # its environment is not the checker's
    """One graph."""

    async def load(self) -> bool:
        """Open the graph with one thread."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        path = str(Path(self.settings.parameters.uri))
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.names = self.settings.parameters.extra
        (only,) = self.session.get_inputs()
        self.dtype = {"tensor(float)": np.float32, "tensor(int32)": np.int32}[only.type]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Rows N×D → probabilities N×C."""
        x = np.asarray(NumpyCodec.decode_input(payload.inputs[0]), self.dtype)
        (probs,) = self.session.run([self.names["output"]], {self.names["feed"]: x})
        found = NumpyCodec.encode_output("probs", probs)
        return InferenceResponse(model_name=self.name, outputs=[found])
