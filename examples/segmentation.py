"""Maps: a class, a confidence and a set for every pixel, with promises that count images.

docs/maps.py makes the frozen model and 800 simulated scans of discs and boxes; the model blurs a
scan and asks of every pixel which brightness is nearest. Two bundles stand beside each other: the
first promises that on average at most 2 % of an image's pixels lie outside their sets, the second
that the pixels whose set holds `disc` miss on average at most 2 % of a disc.

    python examples/segmentation.py [--out FOLDER]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import shared

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
    shared.show_systems(found, "accuracy", "nll", "brier")
    shared.show_gain(found, "temperature scaling")
    shared.show_levels(found)
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
    shared.run(main, __doc__)
