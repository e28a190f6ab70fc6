"""A model to practise on: ``python docs/practice.py`` writes it, and rows for it, into this folder.

Machines are ok, worn or broken; a small network says which from temperature (°C), vibration (mm/s)
and age (years). The data are simulated. The network is trained on 400 rows until it knows them by
heart, so it is far surer of itself than it should be, as deployed networks tend to be.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import nn

from posthoc.export import export_torch

CLASSES = ("ok", "worn", "broken")
NET = '''"""The practice model as a torch module, for `hedged fit net:make`."""

from torch import nn


def make() -> nn.Module:
    layers = [nn.BatchNorm1d(3), nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, 3))
'''
RNG = np.random.default_rng(0)


def machines(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Sensors N×3 (float32) and states N (indices into CLASSES)."""
    heat, shake, age = RNG.normal(size=(3, n))
    wear = 1.5 * shake + age + 0.7 * heat * shake + 0.5 * RNG.normal(size=n)
    sensors = np.stack([60 + 8 * heat, np.exp(0.7 + 0.4 * shake), 5 + 1.5 * age], axis=1)
    return sensors.astype(np.float32).round(2), np.digitize(wear, [0.5, 2.5])


def save(name: str, x: np.ndarray, y: np.ndarray) -> None:
    """Write rows as NAME.parquet."""
    table = {
        "id": [f"{name}-{i}" for i in range(len(x))],
        **dict(zip(("temperature", "vibration", "age"), x.T, strict=True)),
        "state": np.asarray(CLASSES)[y],
    }
    pq.write_table(pa.table(table), f"{name}.parquet")


def train(x: np.ndarray, y: np.ndarray) -> nn.Module:
    """The network, trained in float64 so that it comes out the same on every machine."""
    torch.manual_seed(0)
    model = made().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.tensor(x).double()), torch.tensor(y)).backward()
        optimizer.step()
    return model.float().eval()


def made() -> nn.Module:
    """What net.py makes."""
    Path("net.py").write_text(NET)
    sys.dont_write_bytecode = True
    sys.path.insert(0, ".")
    from net import make

    network: nn.Module = make()
    return network


def main() -> None:
    """Write model.onnx, the same as net.py with net.safetensors, classes.txt and the tables."""
    x, y = machines(400)
    model = train(x, y)
    save_file(model.state_dict(), "net.safetensors")
    exported = export_torch(model, (x,), input_names=["sensors"])
    Path("model.onnx").write_bytes(exported.model)
    Path("classes.txt").write_text("\n".join(CLASSES) + "\n")
    save("held-out", *machines(4000))
    save("fresh", *machines(1000))
    x, y = machines(200)
    x[:, 0] = x[:, 0] * 1.8 + 32  # a thermometer that speaks Fahrenheit
    save("fahrenheit", x, y)
    x, y = machines(16_000)
    kept = RNG.random(len(y)) < np.asarray([0.05, 0.2, 1.0])[y]  # a plant of worn machines
    save("old-plant", x[kept][:1000], y[kept][:1000])
    save("old-plant-later", x[kept][1000:2000], y[kept][1000:2000])


if __name__ == "__main__":
    main()
