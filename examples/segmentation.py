"""Maps: a class, a confidence and a set for every pixel, with promises that count images.

docs/maps.py makes the frozen model and 800 simulated scans of discs and boxes; the model blurs a
scan and asks of every pixel which brightness is nearest. Two bundles stand beside each other: the
first promises that on average at most 2 % of an image's pixels lie outside their sets, the second
that the pixels whose set holds `disc` miss on average at most 2 % of a disc.

    python examples/segmentation.py [--out FOLDER]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

import hedged

CLASSES = ["ground", "disc", "box"]
MAPS = Path(__file__).resolve().parents[1] / "docs" / "maps.py"


def pixels(column: str, path: Path) -> np.ndarray:
    """A column of tensors as one array, images first."""
    values = pq.read_table(path)[column].combine_chunks()
    array: np.ndarray = values.to_numpy_ndarray()
    return array


def main(out: Path) -> None:
    """Make model and scans, fit error bars in two ways, and tell what they are worth."""
    subprocess.run([sys.executable, MAPS], cwd=out, check=True)
    for bundle, mask in (("bundle", None), ("bundle-disc", CLASSES.index("disc"))):
        hedged.fit(
            out / "segment.onnx",
            out / "scans.parquet",
            out / bundle,
            task="classification",
            target="mask",
            classes=CLASSES,
            mask=mask,
            alphas=(0.02, 0.1),
            source={"pixels": 128, "cache_dir": out / "cache"},
        )
    fresh = out / "fresh-scans.parquet"
    found = hedged.evaluate(out / "bundle", fresh)
    print(f"{found.n} fresh scans, 95 % intervals that resample images")
    for system in found.systems:
        figures = ((name, system.metrics[name]) for name in ("accuracy", "nll", "brier"))
        cells = [f"{name} {f.value:.4f} ({f.low:.4f}–{f.high:.4f})" for name, f in figures]
        print(f"{system.name:18}", *cells, sep="  ")
    gain = next(d for d in found.differences if (d.metric, d.to) == ("nll", "temperature scaled"))
    verdict = "better" if gain.high < 0 else "worse" if gain.low > 0 else "no sure difference"
    interval = f"{gain.low:+.4f} to {gain.high:+.4f}"
    print(f"nll beside temperature scaling: {gain.value:+.4f} ({interval}), {verdict}")
    for level in found.levels:
        luck = f"luck allows {level.band_low:.4f}–{level.band_high:.4f}"
        size = f"mean size {level.mean_size:.2f}"
        print(f"level {level.level}: coverage {level.coverage:.4f} ({luck}), {size}")
    for level in hedged.evaluate(out / "bundle-disc", fresh).levels:
        if level.images is not None:
            print(
                f"discs, at most {level.alpha} to be missed: {level.images.mean.value:.4f} missed"
            )

    scans, truth = pixels("scan", fresh), pixels("mask", fresh)
    answer = hedged.load(out / "bundle").run({"scan": scans}, outputs=["label", "set_size"])
    wrong, sizes = answer["label"] != truth, answer["set_size"]
    for size in np.unique(sizes):
        there = sizes == size
        print(f"sets of {size}: {wrong[there].mean():.4f} wrong, {there.mean():.4f} of all pixels")
    median = int(wrong.mean(axis=(1, 2)).argsort()[len(wrong) // 2])
    print("one scan: the number of classes at each pixel beside what is wrong")
    for row, errors in zip(sizes[median], wrong[median], strict=True):
        print("".join(" .:#"[size] for size in row), "|", "".join(" x"[int(e)] for e in errors))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="new folder; default: a temporary one")
    folder = parser.parse_args().out or Path(tempfile.mkdtemp(prefix="hedged-"))
    folder.mkdir(parents=True, exist_ok=True)
    main(folder)
    print(f"everything made is in {folder}")
