"""One stream: quiet while it is like its reference, loud when it is not, the same in any pieces."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from posthoc.contract import DataError
from service.monitor.stream import Options, Stream, feed, from_json, to_json

OPTIONS = Options(reference=1000, window=500)


def beta(n, seed, a=8.0):
    return np.random.default_rng(seed).beta(a, 2.0, n)


def fed(*parts, options=OPTIONS):
    stream = Stream()
    for part in parts:
        stream = feed(stream, part, options)
    return stream


def test_nothing_is_said_before_the_reference_is_full():
    stream = fed(beta(999, 0))
    assert stream.learning
    assert (stream.changes, stream.evidence, stream.distances()) == (0, None, {})
    assert not fed(beta(1000, 0)).learning


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_stream_is_quiet(seed):
    stream = fed(beta(6000, seed))
    assert stream.martingale.seen == 5000
    assert stream.martingale.log10_peak < 2
    assert stream.changes == 0
    assert stream.distances()["psi"] < 0.1


@pytest.mark.parametrize("seed", range(5))
def test_a_shift_is_seen_by_all_of_them(seed):
    before, after = beta(3000, seed), beta(1000, seed + 100, a=5.0)
    stream = fed(before, after)
    assert stream.martingale.log10_peak > 3
    assert stream.changes >= 1
    found = stream.distances()
    # The window holds values from after the shift alone.
    exact = stats.ks_2samp(before[:1000], after[-500:]).statistic
    assert exact - 0.05 <= found["ks"] <= exact + 1e-12  # at edges of bins it is at most that
    assert found["psi"] > found["psi_floor"] > 0
    assert found["ks"] > found["ks_floor"] > 0


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.lists(st.integers(0, 2500), max_size=6))
def test_pieces_do_not_matter(cuts):
    values = np.concatenate([beta(1800, 3), beta(700, 4, a=4.0)])
    edges = [0, *sorted(cuts), len(values)]
    whole = fed(values)
    assert fed(*(values[a:b] for a, b in itertools.pairwise(edges))) == whole


def test_what_is_saved_goes_on_as_it_would_have():
    first, second = beta(1703, 5), beta(900, 6, a=5.0)
    for cut in (500, 1000, 1703):
        stream = fed(first[:cut])
        again = from_json(json.loads(json.dumps(to_json(stream), allow_nan=False)))
        assert again == stream
        rest = np.concatenate([first[cut:], second])
        assert feed(again, rest, OPTIONS) == feed(stream, rest, OPTIONS)
    with pytest.raises(DataError, match="no saved stream"):
        from_json({"gathered": []})


def test_a_constant_reference_needs_no_scale():
    quiet = fed(np.ones(4000))
    assert quiet.detector is None
    assert quiet.martingale.log10_peak < 2
    loud = feed(quiet, np.full(300, 2.0), OPTIONS)
    assert loud.martingale.log10_peak > 3
    assert loud.distances()["ks"] > 0.5


def test_what_is_not_finite_is_left_out():
    values = beta(1500, 7)
    holes = np.insert(values, [3, 700, 1200], [np.nan, np.inf, -np.inf])
    assert fed(holes) == fed(values)
