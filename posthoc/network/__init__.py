"""Noise inside a frozen network: where it can act, and the graph that draws its samples."""
