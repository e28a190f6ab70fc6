"""The u of a randomised conformal score, a number in [0, 1) a row, drawn from the row's content.

A row's set must not depend on its batch, nor on which of two equal runs it is asked in; so u is a
hash of the row and a seed, which is uniform and independent of the scores for all that ranks ask.
"""

from __future__ import annotations

import numpy as np

from posthoc.contract import F64, Array


def uniforms(hashes: Array, seed: int = 0) -> F64:
    """u of N rows from their content hashes (uint64): the upper 24 bits, so that float32 holds them
    exactly and never rounds to 1 (mixed as in Steele, Lea & Flood 2014, SplitMix)."""
    x = np.asarray(hashes, np.uint64) ^ np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(40)).astype(np.float64) / 2.0**24
