"""What cannot be sampled is refused before anything is computed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from posthoc.contract import ModelError
from posthoc.network.attach import NetworkRows, channel_axis, check_room
from posthoc.pixels import Layout
from tests.posthoc.methods.network import nets


def test_the_axis_of_the_channels() -> None:
    model = nets.frozen("plain", None)
    assert channel_axis(model) == 1
    maps = Layout(-1, -1, (12, 12))
    assert channel_axis(dataclasses.replace(model, dense=maps)) == -1
    with pytest.raises(ModelError, match=r"without an axis of channels; export it as N×1×H×W"):
        channel_axis(dataclasses.replace(model, dense=dataclasses.replace(maps, axis=None)))
    with pytest.raises(ModelError, match=r"gives probabilities.*name an output of logits"):
        channel_axis(dataclasses.replace(model, z_is_probs=True))


def test_noise_has_a_limit() -> None:
    check_room({"a": 20_000_000, "b": 30_000_000})
    with pytest.raises(ModelError, match=r"50,000,001 numbers.*largest is at 'b'.*fewer samples"):
        check_room({"a": 20_000_000, "b": 30_000_001})


def test_some_rows_of_all_inputs() -> None:
    rows = nets.rows("pair", 10)
    some = rows.take(np.asarray([3, 1]))
    assert len(rows) == 10 and len(some) == 2
    assert some.y is not None and rows.y is not None
    np.testing.assert_array_equal(some.y, rows.y[[3, 1]])
    for key, value in rows.inputs.items():
        np.testing.assert_array_equal(some.inputs[key], value[[3, 1]])
    assert NetworkRows(rows.inputs, None).take(slice(0, 4)).y is None
