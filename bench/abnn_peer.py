"""The peer's side of the ABNN benchmark: torch-uncertainty 0.13 in its own environment.

Only `bench.peers` starts this module, with the interpreter of that environment. The library is used
as its class is written (``fit`` on a loader, then a call in evaluation mode), under inference mode,
and with one pass for each sample of a member: those through the original network, which it adds by
default, would slow it down. Where it had to be helped, the reason stands beside it.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import tempfile
import time
import warnings
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from bench.normed import CLASSES, as_input, load
from bench.timing import per_call
from bench.worker import most_bytes, peak_bytes, serve

# It imports torchvision, whose usual build was compiled for a CUDA torch and does not load beside
# a CPU one unless somebody declares the two operators that its compiled part would bring.
if not torch.cuda.is_available():
    _operators = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for _name in ("nms", "qnms"):
        _operators.define(  # type: ignore[no-untyped-call]
            f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )

warnings.filterwarnings("ignore")

# Nothing public exports the class.
from torch_uncertainty.methods import deep_ensembles  # noqa: E402
from torch_uncertainty.post_processing.abnn import ABNN, _replace_bn_layers  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # importing it sets another level

# Those of the authors' first published script; the class has no defaults for them.
SETTINGS: dict[str, Any] = {"random_prior": 7.0, "alpha": 0.01, "base_lr": 0.005, "max_epochs": 2}
FIT_BATCH = 128


class Side:
    """The frozen network, the images of a run, and the ABNN fitted last."""

    net: nn.Module
    x: Tensor
    fitted: nn.Module
    settings: dict[str, Any]

    def load(self, weights: str, images: str, threads: int) -> None:
        """The network with batch normalisation, and images N×28×28 from an ``.npz``."""
        torch.set_num_threads(threads)
        self.net = load("batch", weights)
        with np.load(images, allow_pickle=False) as data:
            self.x = as_input(data["images"])

    def fit(self, rows: str, members: int, samples: int, seed: int) -> float:
        """Fit members on the labelled images of an ``.npz``; seconds."""
        with np.load(rows, allow_pickle=False) as data:
            labelled = TensorDataset(as_input(data["images"]), torch.from_numpy(data["labels"]))
        # Rows gathered a batch at a time: what torch's loader costs per row is not the peer's.
        order = BatchSampler(RandomSampler(labelled), FIT_BATCH, drop_last=False)
        loader = DataLoader(labelled, sampler=order, batch_size=None)
        torch.manual_seed(seed)  # it draws members from torch's own generator
        net = copy.deepcopy(self.net).requires_grad_(True)
        self.settings = {"members": members, "samples": samples, **SETTINGS}
        abnn = ABNN(
            CLASSES,
            num_models=members,
            num_samples=samples,
            device="cpu",
            use_original_model=False,
            model=net,
            **SETTINGS,
        )
        # Its trainer leaves logs in the working directory.
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            started = time.perf_counter()
            abnn.fit(loader)
            seconds = time.perf_counter() - started
        # The layers that it puts in are in training mode until they are told.
        self.fitted = abnn.eval().requires_grad_(False)
        return seconds

    def save(self, path: str) -> None:
        """The weights of each member once, as safetensors."""
        copies: Any = self.fitted.final_model
        samples = self.settings["samples"]
        members = list(copies.core_models)[::samples]
        tensors = {f"{i}/{k}": v for i, m in enumerate(members) for k, v in m.state_dict().items()}
        save_file({k: v.clone() for k, v in tensors.items()}, path)

    def predict(self, rows: int, batch: int) -> float:
        """Seconds a row, on the first rows in batches."""
        x = self.x[:rows]
        with torch.inference_mode():
            self._probs(x[:batch])
            return per_call(lambda: self._batched(x, batch)) / rows

    def answer(self, path: str, batch: int) -> None:
        """Probabilities of every image, and those of the frozen network, into an ``.npz``."""
        with torch.inference_mode():
            probs = self._batched(self.x, batch).numpy()
            frozen = torch.cat([self.net(x).softmax(1) for x in _parts(self.x, batch)]).numpy()
        np.savez(path, probs=probs, frozen=frozen)

    def said(self) -> dict[str, Any]:
        """The settings of the fit."""
        return self.settings

    def peak(
        self, members: str, samples: int, rows: int, batch: int, shared: bool
    ) -> dict[str, int]:
        """Memory while saved members are restored and the first rows are predicted: by how many
        bytes it rises, and the most that the process had.

        The library cannot load what it fitted, so this repeats the end of its ``fit``: a copy of
        the network for each sample. ``shared``: one copy a member, which gives the same answers
        as the noise is drawn anew in every pass; it is what a careful user could do.
        """
        x = self.x[:rows]
        with torch.inference_mode():
            self.net(x[:batch])  # what any torch network needs

            def work() -> None:
                self.fitted = _restored(self.net, members, samples, shared)
                self._batched(x, batch)

            return {"rise": peak_bytes(work), "process": most_bytes()}

    def versions(self) -> dict[str, str]:
        """Of the peer and of what it computes with."""
        from importlib.metadata import version

        return {name: version(name) for name in ("torch-uncertainty", "lightning", "torch")}

    def _batched(self, x: Tensor, batch: int) -> Tensor:
        return torch.cat([self._probs(part) for part in _parts(x, batch)])

    def _probs(self, x: Tensor) -> Tensor:
        """Mean of the softmax over all passes, N×C, as its evaluation routine forms it."""
        found: Tensor = self.fitted(x)  # passes·N×C
        return found.view(-1, len(x), found.shape[1]).softmax(-1).mean(0)


def _parts(x: Tensor, batch: int) -> list[Tensor]:
    return [x[i : i + batch] for i in range(0, len(x), batch)]


def _restored(net: nn.Module, path: str, samples: int, shared: bool) -> nn.Module:
    source = copy.deepcopy(net)
    _replace_bn_layers(source, SETTINGS["alpha"])
    tensors = load_file(path)
    models: list[nn.Module] = []
    for i in range(1 + max(int(k.split("/")[0]) for k in tensors)):
        member = copy.deepcopy(source)
        start = f"{i}/"
        member.load_state_dict(
            {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        )
        models += [member if shared else copy.deepcopy(member) for _ in range(samples)]
    made: nn.Module = deep_ensembles(models)
    return made.eval().requires_grad_(False)


if __name__ == "__main__":
    side = Side()
    names = ("load", "fit", "save", "predict", "answer", "peak", "said", "versions")
    serve({n: getattr(side, n) for n in names})
