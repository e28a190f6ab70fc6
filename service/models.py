"""Bundles → models that answer: verified, checked on golden rows, warmed."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from calibration.bundle import DenseRecord
from calibration.metrics.totals import level_name
from calibration.predictor import Predictor
from calibration.signing import load_signed
from posthoc.contract import Array, BundleError, HedgedError, Task, TensorSpec, output_fields
from service.bundles import check_place
from service.errors import invalid, shorten
from service.images import summarised
from service.pace import Pace
from service.protocol import has_datatype
from service.run_rows import measure_rows
from service.sizes import Sizes, golden_row, measure, row_bytes, row_values
from service.tensors import surely_finite

_MAX_PLANS = 256
_UNBOUNDED = frozenset({"lower", "upper", "quantiles"})  # infinite where a level needs more rows
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class NotFiniteError(HedgedError):
    """A row's answer holds NaN, or infinity where none may be."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request for some outputs comes to: their names in the order that was asked for, those
    among them that leave as JSON and the others, and all that are computed for it."""

    names: tuple[str, ...]
    text: frozenset[str]
    binary: frozenset[str]
    computed: frozenset[str]


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """One bundle that is being served."""

    name: str
    version: str
    predictor: Predictor
    frozen_outputs: tuple[TensorSpec, ...]  # those that are served beside the fields
    levels: dict[float, str]  # alpha -> its level as metrics write it, for the bundle's own alphas
    sizes: Sizes  # of a row's answer
    run_rows: int | None = None  # requests share a run up to so many; None: as the server allows
    pace: Pace = field(default_factory=Pace)
    _plans: dict[tuple[object, ...], Plan] = field(default_factory=dict)

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

    def plan(self, outputs: Sequence[str] | None, text: Collection[str] = ()) -> Plan:
        """The plan for ``outputs`` (default: every field), of which ``text`` will leave as JSON.

        Raises ServiceError 400 for an output that is not there.
        """
        key = (None if outputs is None else tuple(outputs), tuple(text))
        found = self._plans.get(key)
        if found is None:
            found = self._planned(self.fields if outputs is None else outputs, text)
            if len(self._plans) >= _MAX_PLANS:  # clients choose what they ask for
                self._plans.clear()
            self._plans[key] = found
        return found

    def _planned(self, outputs: Sequence[str], text: Collection[str]) -> Plan:
        known = [spec.name for spec in self.outputs]
        for name in outputs:
            if name not in known:
                raise invalid(f"there is no output {shorten(name)!r}; there are {', '.join(known)}")
        plain = frozenset(outputs) & frozenset(text)
        return Plan(
            names=tuple(outputs),
            text=plain,
            binary=frozenset(outputs) - plain,
            computed=frozenset((*self.recorded, *outputs)),
        )

    def run(self, feed: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """One run of the graph: validated inputs, and ``q_hat`` with one threshold per row.

        Raises NotFiniteError: no NaN leaves the server, and infinity only where a level needs more
        rows than there are.
        """
        fields = self.predictor.answer(feed, outputs)
        if surely_finite(fields.values()):
            return fields
        for name, value in fields.items():
            if value.dtype.kind == "f":
                unbounded = name in _UNBOUNDED or name not in self.fields
                good = ~np.isnan(value) if unbounded else np.isfinite(value)
                if not good.all():
                    raise NotFiniteError(f"the model's {name} is not finite for this input")
        return fields


def load_live(
    name: str, folder: Path, *, device: str, threads: int, signed_by: Path | None = None
) -> Model:
    """The model in ``ROOT/<name>/<version>/``, which must be what its place says.

    Raises what `check_place` and `load_model` raise.
    """
    model = load_model(folder, device=device, threads=threads, signed_by=signed_by)
    check_place(name, folder, model.predictor.manifest)
    return model


def load_model(path: Path, *, device: str, threads: int, signed_by: Path | None = None) -> Model:
    """Verify and open a bundle, reproduce its golden rows, and measure and warm it on one.

    ``signed_by``: a file of public keys, one of which must have signed it. Raises BundleError or
    ModelError when it cannot be served, saying why.
    """
    predictor = Predictor(load_signed(path, signed_by), device=device, threads=threads)
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
    model = Model(
        name=manifest.name,
        version=manifest.version,
        predictor=predictor,
        frozen_outputs=frozen_outputs,
        levels={alpha: level_name(alpha) for alpha in manifest.alphas},
        sizes=measure(predictor, (*manifest.outputs, *frozen_outputs)),
    )
    return replace(model, run_rows=_run_rows(model))


def _run_rows(model: Model) -> int | None:
    """`best_rows` of a model, for every field of its first golden row."""
    row = golden_row(model.predictor)
    size = row_bytes(row) + model.sizes.answer_bytes(model.fields, row_values(row))
    row["q_hat"] = threshold_rows(model, next(iter(model.levels)), 1)

    def run(feed: Mapping[str, Array]) -> object:
        return model.predictor.answer(feed, model.fields)

    return measure_rows(run, row, size)


def threshold_rows(model: Model, alpha: float, rows: int) -> Array:
    """The conformal threshold at ``alpha`` for each of ``rows`` rows, as the graph takes it."""
    one = np.asarray(model.predictor.q_hat(alpha), np.float32)[None]
    return one if rows == 1 else np.repeat(one, rows, axis=0)
