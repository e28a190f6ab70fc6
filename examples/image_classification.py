"""Handwritten digits: how far to trust each answer of a small convolutional network.

It learns 300 of scikit-learn's digits and becomes an ONNX file: the frozen model. Error bars are
fitted on 1,000 others, and 497 more tell what they are worth. Strange images are the same digits
with dark and light exchanged, and pieces of photographs.

    python examples/image_classification.py [--out FOLDER]
"""
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import shared
import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import nn

import hedged


def images() -> dict[str, dict[str, np.ndarray]]:
    """Images N×1×8×8 from 0 to 1, and which digits they show, by the name of the set."""
    digits = load_digits()
    pixels = (digits.images / 16).astype(np.float32)[:, None]
    rng = np.random.default_rng(0)
    parts = np.split(rng.permutation(len(pixels)), [300, 1300])
    sets = {
        name: {"image": pixels[rows], "digit": digits.target[rows]}
        for name, rows in zip(("train", "held-out", "fresh"), parts, strict=True)
    }
    pieces = [
        photograph[row : row + 8, column : column + 8].mean(axis=2) / 255
        for photograph in load_sample_images().images
        for row, column in rng.integers(0, 400, (150, 2))
    ]
    sets["inverted"] = {"image": 1 - sets["fresh"]["image"]}
    sets["photographs"] = {"image": np.asarray(pieces, np.float32)[:, None]}
    return sets


def train(rows: dict[str, np.ndarray]) -> nn.Module:
    """The network, from scratch; in float64, so that it comes out alike on every machine."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
    ).double()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    x, y = torch.tensor(rows["image"]).double(), torch.tensor(rows["digit"])
    for _ in range(30):
        for batch in torch.randperm(len(y)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
    return network.float().eval()


def export(network: nn.Module, example: np.ndarray, path: Path) -> None:
    """The network as an ONNX file that takes any number of images."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # the exporter is talkative
    warnings.simplefilter("ignore", FutureWarning)
    torch.onnx.export(
        network,
        (torch.tensor(example),),
        path,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        external_data=False,
        verbose=False,
    )


def main(out: Path) -> None:
    """Make the frozen model, fit error bars for it, and tell what they are worth."""
    sets = images()
    for name, rows in sets.items():
        np.savez(out / f"{name}.npz", allow_pickle=False, **rows)
    export(train(sets["train"]), sets["train"]["image"][:2], out / "model.onnx")

    hedged.fit(
        out / "model.onnx",
        out / "held-out.npz",
        out / "bundle",
        task="classification",
        target="digit",
        classes=list("0123456789"),
        name="digits",
        source={"cache_dir": out / "cache"},
    )
    tell(out, sets)


def tell(out: Path, sets: dict[str, dict[str, np.ndarray]]) -> None:
    """Print what the error bars are worth on images that neither they nor the network have seen."""
    strange: dict[str, str | Path] = {n: out / f"{n}.npz" for n in ("inverted", "photographs")}
    found = hedged.evaluate(out / "bundle", out / "fresh.npz", ood=strange)
    print(f"{found.n} fresh digits, 95 % intervals")
    shared.show_systems(found, "accuracy", "nll", "brier")
    shared.show_gain(found, "temperature scaling")
    shared.show_levels(found)
    predictor = hedged.load(out / "bundle")
    for name in ("fresh", *strange):
        flags = predictor.run({"image": sets[name]["image"]}, outputs=["ood"])["ood"]
        print(f"{name}: {flags.mean():.4f} flagged as strange")
    for told in found.ood:
        print(f"{told.out}: AUROC {told.auroc.value:.4f} ({told.score})")


if __name__ == "__main__":
    shared.run(main, __doc__)
