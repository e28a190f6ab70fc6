"""A dense bundle that is served and watched: its images' summaries are streams like any other."""

from __future__ import annotations

import time

import numpy as np

from calibration.predictor import Predictor
from service.monitor.stream import Options
from service.monitor.watch import Watch, look
from service.settings import Settings
from service.upkeep import opened
from tests.service.conftest import Server
from tests.service.maps import SIZE, images

OPTIONS = Options(reference=300, window=100)
KEY = ("segmenter", "1")


def test_served_images_that_change_are_seen_without_labels(maps_root, tmp_path):
    usual = images(600, 0)
    bright = 2.5 * images(200, 1)
    settings = Settings(bundles=maps_root / KEY[0] / KEY[1], data_dir=tmp_path)
    with Server(settings) as server:
        for first in range(0, 800, 100):
            x = np.concatenate([usual, bright])[first : first + 100]
            body = {"inputs": {"x": x.tolist()}, "outputs": ["label"]}
            assert server.client.post("/v1/predict", json=body).status_code == 200
    state = Watch()  # the server has ended, and so everything is written
    with opened(settings.ledger_url) as ledger, ledger.reading() as conn:
        state, read = look(conn, state, OPTIONS, time.time() + 60)
        assert look(conn, state, OPTIONS, time.time() + 60) == (state, 0)
    assert read == state.rows[KEY] == 800
    streams = state.streams[KEY]
    names = {"confidence", "entropy", "set_size", "ood", "abstain", "ood_pvalue"}
    assert set(streams) == names
    for name in ("confidence", "entropy", "ood"):
        assert streams[name].martingale.seen == 500
        assert streams[name].martingale.log10_peak > 3, name
        assert streams[name].distances()["ks"] > 0.5, name
    want = Predictor(maps_root / KEY[0] / KEY[1]).run({"x": usual[:300]})["confidence"]
    assert want.shape == (300, SIZE, SIZE)
    counts, edges = streams["confidence"].reference, streams["confidence"].edges
    means = want.mean(axis=(1, 2), dtype=np.float64)
    at = np.searchsorted(edges, means, side="left")
    # A mean within float32's rounding of an edge may fall on either side.
    assert np.abs(np.bincount(at, minlength=len(counts)) - counts).sum() <= 4
