"""Top floor: a bundle → answers."""

import posthoc  # noqa: F401  # before anything that loads ONNX Runtime: it has its telemetry off
