"""A bundle that answers: the fused graph in ONNX Runtime behind the names of a prediction.

The service, batch scoring, evaluation and the demo all run this class, so what was evaluated is
what is served. It imports no torch and no onnx.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from calibration.bundle import (
    GOLDEN,
    PREDICTOR,
    Bundle,
    conformal_rank,
    load_bundle,
    threshold_at,
)
from calibration.conformal.cells import UNKNOWN, Cells, group_index, named_codes, restored
from calibration.conformal.randomise import uniforms
from calibration.shift.weighted import Weighted
from calibration.shift.weighted import restored as weighted_again
from posthoc.binding import choose_run
from posthoc.contract import (
    F64,
    PREDICTIONS,
    Array,
    BundleError,
    DataError,
    Prediction,
    TensorSpec,
    output_fields,
)
from posthoc.runtime import open_session
from posthoc.slices import MOST_BYTES, in_slices, most_rows


class Predictor:
    """One verified bundle in one ONNX Runtime session. Thread-safe; holds no request state.

    ``device`` is ``auto``, ``cpu``, ``cuda[:n]`` or ``tensorrt``, where inputs and answers go
    through pinned memory; ``threads`` is the number of intra-op threads on CPU (0: ONNX Runtime's
    default).
    """

    def __init__(self, bundle: Bundle | str | Path, *, device: str = "cpu", threads: int = 0):
        self.bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
        self.manifest = self.bundle.manifest
        sampled = "copies" in self.manifest.module.settings
        self.session = open_session(
            self.bundle.files[PREDICTOR], device=device, threads=threads, plan=not sampled
        )
        self.inputs: tuple[TensorSpec, ...] = self.manifest.inputs
        self.optional: tuple[TensorSpec, ...] = self.manifest.optional_inputs
        self.fields: tuple[str, ...] = tuple(
            f
            for f in output_fields(self.manifest.task)
            if f in {s.name for s in self.manifest.outputs}
        )
        memory = self.manifest.memory
        # Bytes inside of the graph for each value of an input.
        self._held = 0.0 if memory is None else memory.row_bytes / max(1, memory.values)
        self._graph_names = self.manifest.output_names
        by_row = {self._graph_names.get(f, f) for f in self.fields}
        self._run = choose_run(self.session, by_row)
        scores = self.bundle.conformal_scores
        self._scores = scores["set" if self.manifest.task == "classification" else "interval"]
        self._risks = self._scores.ndim == 2  # n images × pixels, and not n rows
        conformal = self.manifest.conformal
        self.cells: Cells | Weighted | None = None
        if conformal.shift is not None:
            self.cells = weighted_again(conformal.shift, scores, self._scores)
        if conformal.given is not None:
            names = [c.name for c in conformal.guarantees[0].cells]
            self.cells = restored(conformal.given, names, scores, self._scores)
        self._q_default: dict[float, float | F64] = {
            g.alpha: math.inf if g.threshold is None else g.threshold for g in conformal.guarantees
        }
        if self.cells is not None:
            self._q_default = {a: self.cells.thresholds(a) for a in self._q_default}

    def run(
        self,
        inputs: Mapping[str, Array],
        *,
        outputs: Sequence[str] | None = None,
        q_hat: Array | float | None = None,
        ood_threshold: Array | float | None = None,
    ) -> dict[str, Array]:
        """Prediction fields (and frozen outputs, by their own names) for N rows.

        ``inputs`` maps each of ``self.inputs`` to an array of its dtype, and may hold those of
        ``self.optional``; ``q_hat`` is what `q_hat` gives, or N rows of it, ``ood_threshold`` a
        scalar or N of them, both defaulting to the bundle's own.
        ``outputs`` defaults to every field. Raises DataError for a missing input or a wrong shape.
        """
        names = list(self.fields if outputs is None else outputs)
        feed = {s.name: _as_spec(inputs, s) for s in self.inputs}
        feed |= {s.name: _as_spec(inputs, s) for s in self.optional if s.name in inputs}
        for name, value, rank in (
            ("q_hat", q_hat, 1 if self.cells is None else 2),
            ("ood_threshold", ood_threshold, 1),
        ):
            if value is not None:
                given = np.asarray(value, dtype=np.float32)
                feed[name] = given if given.ndim == rank else given[None]
        return self.answer(feed, names)

    def answer(self, feed: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """`run` without its checks: ``feed`` holds what the graph takes and nothing else, each in
        the graph's own dtype and rank. In slices where all rows at once would fill the memory."""
        names = list(map(self._graph_names.get, outputs, outputs))
        if self._held * sum([v.size for v in feed.values()]) <= MOST_BYTES:
            return dict(zip(outputs, self._run(names, feed), strict=True))
        row = sum([feed[s.name][:1].size for s in self.inputs])
        found = in_slices(partial(self._run, names), feed, most_rows(self._held * row))
        return dict(zip(outputs, found, strict=True))

    def predict(self, inputs: Mapping[str, Array], *, alpha: float | None = None) -> Prediction:
        """The typed prediction for N rows, at level ``alpha`` (default: the bundle's first)."""
        q = None if alpha is None else self.q_hat(alpha)
        fields: dict[str, Any] = dict(self.run(inputs, q_hat=q))
        return PREDICTIONS[self.manifest.task](**fields)

    def q_hat(self, alpha: float) -> float | F64:
        """The conformal threshold for any ``alpha`` in (0, 1), from the sorted scores; with
        thresholds for classes or groups all of them, as the graph's input ``q_hat`` has them.

        Raises DataError when the bundle holds too few conformal rows for that level.
        """
        if not 0 < alpha < 1:
            raise DataError(f"alpha must lie strictly between 0 and 1, not {alpha}")
        if alpha in self._q_default:
            return self._q_default[alpha]
        n = len(self._scores)
        if conformal_rank(n, alpha) > n:
            # 1 / alpha may be infinite; as many rows nobody has.
            needed = math.ceil(round(min(1 / alpha, 1e15), 9)) - 1
            raise DataError(
                f"alpha {alpha} needs at least {needed} conformal "
                f"{'images' if self._risks else 'rows'} and this bundle holds {n}"
            )
        if self._risks:
            from calibration.conformal.risk import control_risk  # imports scipy

            return control_risk(self._scores, [alpha])[0].threshold
        if self.cells is not None:
            return self.cells.thresholds(alpha)
        return threshold_at(self._scores, alpha)

    def group_codes(self, groups: Array) -> Array:
        """The codes of a column of N groups, as a table has them; -1 for one that the bundle does
        not know."""
        if not isinstance(self.cells, Cells) or self.cells.by != "group":
            return np.full(len(groups), UNKNOWN)
        return named_codes(groups, self.cells.of, self.cells.names)

    def known_groups(self, codes: Array) -> Array:
        """Which of N codes of the input ``group`` have a threshold of their own."""
        if not isinstance(self.cells, Cells) or self.cells.by != "group":
            return np.zeros(len(codes), bool)
        return np.asarray(group_index(self.cells.of, codes) < len(self.cells.of))

    def beside(self, groups: Array | None, hashes: Array | None) -> dict[str, Array]:
        """The optional inputs of N rows from their column of groups and their content hashes, for
        a randomised score: those that the bundle takes."""
        found: dict[str, Array] = {}
        asked = {s.name for s in self.optional}
        if "group" in asked and groups is not None:
            found["group"] = self.group_codes(groups)
        if "u" in asked and hashes is not None:
            found["u"] = uniforms(hashes).astype(np.float32)
        return found

    def self_check(self) -> None:
        """Run the golden rows and compare; BundleError where an answer differs."""
        with np.load(io.BytesIO(self.bundle.files[GOLDEN]), allow_pickle=False) as golden:
            inputs = {k[3:]: golden[k] for k in golden.files if k.startswith("in/")}
            wanted = {k[4:]: golden[k] for k in golden.files if k.startswith("out/")}
        got = self.run(inputs, outputs=list(wanted))
        for name, want in wanted.items():
            exact = want.dtype.kind in "biu"
            # Another processor rounds differently; a changed answer is far outside 1e-3.
            if not (
                np.array_equal(got[name], want)
                if exact
                else np.allclose(got[name], want, rtol=1e-3, atol=1e-4)
            ):
                raise BundleError(
                    f"{self.bundle.path}: golden rows do not reproduce: {name} differs"
                )


def _as_spec(inputs: Mapping[str, Array], spec: TensorSpec) -> Array:
    """One input as its declared dtype; DataError naming it when missing or of another shape."""
    if spec.name not in inputs:
        raise DataError(f"input {spec.name!r} is missing")
    value = np.ascontiguousarray(inputs[spec.name], dtype=np.dtype(spec.dtype))
    if value.ndim != len(spec.shape) or any(
        want not in (-1, have) for want, have in zip(spec.shape[1:], value.shape[1:], strict=True)
    ):
        want = "×".join("N" if d == -1 else str(d) for d in spec.shape)
        raise DataError(f"input {spec.name!r} has shape {value.shape}; the model takes {want}")
    return value
