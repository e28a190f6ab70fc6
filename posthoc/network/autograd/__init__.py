"""An ONNX graph as a differentiable torch function, for fitting only; serving never imports it."""

from posthoc.network.autograd.network import Hook, Network, unsupported

__all__ = ["Hook", "Network", "unsupported"]
