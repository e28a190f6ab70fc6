"""Bundles → models that answer: verified, checked on golden rows, warmed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibration.bundle import DenseRecord
from calibration.metrics.totals import level_name
from calibration.predictor import Predictor
from posthoc.contract import Array, BundleError, Task, TensorSpec, output_fields
from service.bundles import check_place, find_bundles, is_bundle
from service.images import summarised
from service.protocol import has_datatype
from service.sizes import Sizes, measure

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """One bundle that is being served."""

    name: str
    version: str
    predictor: Predictor
    frozen_outputs: tuple[TensorSpec, ...]  # those that are served beside the fields
    levels: dict[float, str]  # alpha -> its level as metrics write it, for the bundle's own alphas
    sizes: Sizes  # of a row's answer

    @property
    def identity(self) -> str:
        """sha256 of the manifest."""
        return self.predictor.bundle.identity

    @property
    def task(self) -> Task:
        """``classification`` or ``regression``."""
        return self.predictor.manifest.task

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names, where the bundle has them."""
        return self.predictor.manifest.classes

    @property
    def fields(self) -> tuple[str, ...]:
        """The prediction fields that this bundle gives."""
        return self.predictor.fields

    @property
    def dense(self) -> DenseRecord | None:
        """How fields are maps; None where a row has a single answer."""
        return self.predictor.manifest.dense

    @property
    def recorded(self) -> tuple[str, ...]:
        """The fields that the metrics and the ledger need."""
        if self.dense is None:
            return self.fields
        return tuple(name for name in summarised(self.task) if name in self.fields)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Everything that can be asked for: the fields, then the frozen model's own outputs."""
        return (*self.predictor.manifest.outputs, *self.frozen_outputs)

    @property
    def width(self) -> int:
        """Number of classes, or of regression outputs."""
        field = "probs" if self.task == "classification" else "mean"
        shape = next(s.shape for s in self.predictor.manifest.outputs if s.name == field)
        if self.dense is None:
            return shape[1]
        if len(shape) == 1 + len(self.dense.spatial):
            return 1
        return shape[-1] if self.dense.channels == -1 else shape[1]

    def run(self, feed: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """One run of the graph: the inputs, and ``q_hat`` with one threshold per row."""
        return self.predictor.run(feed, outputs=outputs, q_hat=feed["q_hat"])


def load_models(path: Path, *, device: str, threads: int) -> dict[str, Model]:
    """Every live model at ``path``, by name. Raises BundleError or ModelError, see `load_model`."""
    found = find_bundles(path)
    if is_bundle(path):
        return {name: load_model(path, device=device, threads=threads) for name in found}
    return {
        name: load_live(name, folder, device=device, threads=threads)
        for name, folder in found.items()
    }


def load_live(name: str, folder: Path, *, device: str, threads: int) -> Model:
    """The model in ``ROOT/<name>/<version>/``, which must be what its place says.

    Raises what `check_place` and `load_model` raise.
    """
    model = load_model(folder, device=device, threads=threads)
    check_place(name, folder, model.predictor.manifest)
    return model


def load_model(path: Path, *, device: str, threads: int) -> Model:
    """Verify and open a bundle, reproduce its golden rows, and measure and warm it on one.

    Raises BundleError or ModelError when it cannot be served, saying why.
    """
    predictor = Predictor(path, device=device, threads=threads)
    manifest = predictor.manifest
    for what, text in (("name", manifest.name), ("version", manifest.version)):
        if not _NAME.fullmatch(text):
            raise BundleError(f"{path}: {what} {text!r} cannot stand in an address")
    for spec in (*manifest.inputs, *manifest.outputs):
        if not has_datatype(spec.dtype):
            raise BundleError(f"{path}: {spec.name!r} is {spec.dtype}; the service takes numbers")
    predictor.self_check()
    frozen_outputs = tuple(
        spec
        for spec in manifest.frozen_outputs
        # A frozen output that shares a field's name cannot be asked for by that name.
        if spec.name not in output_fields(manifest.task)
        and spec.shape[:1] == (-1,)
        and has_datatype(spec.dtype)
    )
    return Model(
        name=manifest.name,
        version=manifest.version,
        predictor=predictor,
        frozen_outputs=frozen_outputs,
        levels={alpha: level_name(alpha) for alpha in manifest.alphas},
        sizes=measure(predictor, (*manifest.outputs, *frozen_outputs)),
    )


def threshold_rows(model: Model, alpha: float, rows: int) -> Array:
    """The conformal threshold at ``alpha`` for each of ``rows`` rows, as the graph takes it."""
    q = np.asarray(model.predictor.q_hat(alpha), np.float32)
    return np.ascontiguousarray(np.broadcast_to(q, (rows, *q.shape)))
