"""Pictures of README and guides: ``python docs/take_pictures.py demo`` after ``make demo`` and the
README's walk in demo/practice.

The report is the demo's own, that of maps the walk's. For the live page a server answers the demo's
fresh rows, half of their labels arrive, and a headless Chromium looks at it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from calibration.evaluate import seen_hashes
from calibration.predictor import Predictor
from hedged.demo.server import Server
from posthoc.data import open_table, to_rows

PICTURES = Path(__file__).parent / "pictures"
BATCH = 32
SCALE = 0.8


def shoot(url: str, name: str, width: int, height: int, scale: float = SCALE) -> None:
    """Save what a browser window of that size shows of a page, charts drawn, as NAME.png."""
    browser = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--disable-background-networking", f"--user-data-dir={profile}",
             f"--force-device-scale-factor={scale}", f"--window-size={width},{height}",
             "--virtual-time-budget=20000", f"--screenshot={PICTURES / f'{name}.png'}", url],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip


def fresh_rows(predictor: Predictor, table: Path) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and classes of the rows that the fit never used."""
    seen = seen_hashes(predictor.bundle)
    manifest = predictor.manifest
    found = []
    for batch in open_table(table).batches(1024):
        rows = to_rows(
            batch,
            manifest.mapping,
            manifest.inputs,
            task=manifest.task,
            classes=manifest.classes,
        )
        assert rows.y is not None
        keep = ~np.isin(rows.content_hashes, seen)
        found.append((rows.inputs["bytes"][keep], rows.y[keep]))
    return np.concatenate([x for x, _ in found]), np.concatenate([y for _, y in found])


def traffic(server: Server, predictor: Predictor, x: np.ndarray, y: np.ndarray) -> None:
    """Predict every row, label every second one, and wait until the labels count."""
    for i in range(0, len(x), BATCH):
        part = {"bytes": x[i : i + BATCH]}
        server.infer(predictor.manifest.name, part, predictor.inputs, f"row-{i // BATCH}")
    wanted = range(0, len(y), 2)
    server.label({f"row-{i // BATCH}:{i % BATCH}": int(y[i]) for i in wanted})
    deadline = time.monotonic() + 60
    while sum(server.counters("uq_labeled_predictions_total").values()) < len(wanted):
        if time.monotonic() > deadline:
            raise SystemExit("the labels did not reach the counters")
        time.sleep(0.2)


def main(demo: Path) -> None:
    """Take the pictures of a finished demo and walk."""
    PICTURES.mkdir(exist_ok=True)
    maps = demo / "practice" / "report-maps" / "report.html"
    shoot(maps.resolve().as_uri(), "maps", 1200, 3260, 0.7)
    shoot((demo / "report.html").resolve().as_uri(), "report", 1200, 2124)
    predictor = Predictor(demo / "bundle")
    x, y = fresh_rows(predictor, demo / "data" / "train.parquet")
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(demo / "bundle", Path(folder), threads=2) as server,
    ):
        traffic(server, predictor, x, y)
        shoot(server.url, "page", 1200, 850)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
