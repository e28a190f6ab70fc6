"""Ground floor: a frozen model's outputs → a predictive distribution."""

import os

# ONNX Runtime, from 1.29 on, tells its maker of each model that it opens, unless this is set before
# it is loaded. Who sets it to 0 is heard.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
