"""One pass of a dense bundle's fused graph over a table of images, a few images at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibration.bundle import Manifest
from calibration.evaluation.row_pass import LOGITS, Progress, Spoil
from calibration.predictor import Predictor
from calibration.unseen import Unseen
from posthoc import pixels
from posthoc.contract import Array, DataError, output_fields
from posthoc.data import Rows, columns_there, open_table, to_rows
from posthoc.pixels import Layout
from posthoc.tables import Table

_NUMBERS = 2_000_000  # pixels times channels of a batch; the head holds 16 draws of each or so
_IMAGES = 64


@dataclass(frozen=True, slots=True)
class Images:
    """N usable images: their places in the table, inputs, and every map as pixels.

    ``made`` holds the fields asked for as N×P, N×P×C or N×P×K×Q, ``set@alpha`` for further levels,
    and ``logits``; ``y`` N×P classes (-1: none) or N×P×K values (NaN: none), ``annotations`` N×A×P
    where the target has an axis of annotators.
    """

    rows: Array
    inputs: dict[str, Array]
    made: dict[str, Array]
    y: Array | None
    annotations: Array | None
    keys: Array
    groups: Array
    spatial: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, keep: Array) -> Images:
        """The images of a mask."""
        return dataclasses.replace(
            self,
            rows=self.rows[keep],
            inputs={k: v[keep] for k, v in self.inputs.items()},
            made={k: v[keep] for k, v in self.made.items()},
            y=None if self.y is None else self.y[keep],
            annotations=None if self.annotations is None else self.annotations[keep],
            keys=self.keys[keep],
            groups=self.groups[keep],
        )


class MapPass:
    """A dense bundle over tables. ``dropped`` counts the images of the last table that the fit saw,
    that are faulty, or that have no label; ``annotated`` says whether it has several annotators."""

    def __init__(self, predictor: Predictor, levels: Mapping[float, float]):
        assert predictor.manifest.dense is not None
        self.predictor, self.levels = predictor, levels
        record = predictor.manifest.dense
        self.layout = Layout(record.channels, record.channels, record.spatial)
        self.width = channels(predictor.manifest)
        self.unseen = Unseen(predictor.bundle)
        self.dropped = 0
        self.annotated = False

    def over(
        self,
        data: str | Path,
        what: str,
        fields: Sequence[str],
        *,
        labelled: bool,
        progress: Progress | None,
        start: int = 0,
        count: int | None = None,
        spoil: Spoil | None = None,
    ) -> Iterator[Images]:
        """The usable images of a table with the maps of ``fields`` (those the bundle has).

        Rows ``start`` … ``start + count - 1`` of it, by default all; ``spoil`` changes the inputs
        after the images were told apart. Raises DataError for a table that the mapping does not
        fit, or a target of another size than the outputs.
        """
        table = open_table(data)
        read, size = self._reader(table, labelled)
        self.dropped, done = 0, start
        end = table.n_rows if count is None else start + count
        mapping = self.predictor.manifest.mapping
        columns = columns_there(table, mapping if labelled else mapping.inputs_only())
        size = min(size, max(1, end - start))
        for batch in table.batches(size, columns, start):
            rows = read(batch)
            usable = self.unseen.usable(rows, labelled)
            if spoil is not None and usable.any():
                spoilt = dict(spoil(rows.inputs, rows.content_hashes))
                rows = dataclasses.replace(rows, inputs=spoilt)
            found = self._images(rows, usable, done, fields)
            self.dropped += len(rows) - len(found)
            done += len(rows)
            if progress is not None:
                progress(what, done, table.n_rows)
            if len(found):
                yield found
            if done >= end:
                return

    def _reader(self, table: Table, labelled: bool) -> tuple[Callable[[object], Rows], int]:
        """How a batch becomes rows, and how many images make a batch, from the first row."""
        manifest = self.predictor.manifest
        task = manifest.task
        shape = pixels.target_shape(self.layout, task, self.width)
        mapping = manifest.mapping if labelled else manifest.mapping.inputs_only()

        def reader(maps: tuple[int, ...]) -> Callable[[object], Rows]:
            def read(batch: object) -> Rows:
                return to_rows(
                    batch,
                    mapping,
                    manifest.inputs,
                    task=task,
                    classes=manifest.classes,
                    need_target=labelled,
                    n_classes=self.width if task == "classification" else None,
                    maps=maps,
                )

            return read

        batches = table.batches(1, columns_there(table, mapping))
        first = next(iter(batches), None)
        if first is None:
            raise DataError(f"{table.path} has no rows")
        read, annotated = reader(shape), False
        row = read(first)
        if labelled and task == "classification":
            # One map an image, or one of each annotator.
            several = reader((-1, *shape))
            with contextlib.suppress(DataError):
                found = several(first)
                if found.y is not None and found.y.shape[1] > 1:
                    read, row, annotated = several, found, True
        if labelled:
            self.annotated = annotated
        known = pixels.size(self.layout.spatial)
        each = known or max(math.prod(x.shape[1:]) for x in row.inputs.values())
        return read, min(_IMAGES, max(1, _NUMBERS // (each * self.width)))

    def _images(self, rows: Rows, keep: Array, at: int, fields: Sequence[str]) -> Images:
        """The rows of a mask, without those that have no label or no finite answer."""
        y, annotations = None, None
        if rows.y is not None:
            y = rows.y
            if self.annotated:
                annotations = y.reshape(*y.shape[:2], -1)
                y = pixels.drawn_annotator(annotations, rows.content_hashes)
            keep = keep & self._labelled(y)
        made: dict[str, Array] = {}
        spatial: tuple[int, ...] = ()
        inputs = {k: v[keep] for k, v in rows.inputs.items()}
        if keep.any():
            made, spatial = self._run(inputs, fields)
        if y is not None and keep.any():
            count = math.prod(spatial)
            y = pixels.target_pixels(y[keep], self.layout, self.predictor.manifest.task, count)
            if annotations is not None and annotations.shape[2] != count:
                raise DataError(
                    f"the annotators' maps have {annotations.shape[2]:,} pixels and the model's "
                    f"outputs {count:,}"
                )
        found = Images(
            rows=at + np.flatnonzero(keep),
            inputs=inputs,
            made=made,
            y=y,
            annotations=None if annotations is None else annotations[keep],
            keys=rows.content_hashes[keep],
            groups=rows.split_keys[keep],
            spatial=spatial,
        )
        numbers = [v for k, v in made.items() if v.dtype.kind == "f" and k not in ("quantiles",)]
        whole = [np.isfinite(v.reshape(len(v), -1)).all(1) for v in numbers]
        return found if not whole or np.all(whole) else found.of(np.logical_and.reduce(whole))

    def _labelled(self, y: Array) -> Array:
        """Images with a pixel whose truth is known."""
        if self.predictor.manifest.task == "classification":
            return np.asarray((y.reshape(len(y), -1) >= 0).any(1))
        axis = self.layout.out_axis if y.ndim > len(self.layout.spatial) + 1 else None
        finite = np.asarray(np.isfinite(pixels.pixels(y, axis)).all(axis=2))
        return np.asarray(finite.any(axis=1))

    def _run(
        self, inputs: Mapping[str, Array], fields: Sequence[str]
    ) -> tuple[dict[str, Array], tuple[int, ...]]:
        """Maps as pixels, and the sizes of the spatial axes."""
        manifest, logits = self.predictor.manifest, self.predictor.manifest.frozen.logits
        asked = [f for f in fields if f in self.predictor.fields]
        out = self.predictor.run(inputs, outputs=[*asked, *([] if logits is None else [logits])])
        axes = {f: a for f, (_, a) in output_fields(manifest.task).items()}
        if logits is not None:
            out[LOGITS] = out.pop(logits)
        wide = "C" if manifest.task == "classification" else "K"
        for alpha, q in list(self.levels.items())[1:] if "set" in asked else ():
            # The first level is the graph's default: no second run for it.
            out[f"set@{alpha}"] = self.predictor.run(inputs, outputs=["set"], q_hat=q)["set"]
        whole = next(iter(out.values()))
        named = asked[0] if asked else LOGITS
        spatial = self._spatial(whole, axes.get(named, wide))
        return {
            name: self._pixels(value, axes.get(name.partition("@")[0], wide))
            for name, value in out.items()
        }, spatial

    def _axis(self, value: Array, tail: int) -> int | None:
        """Axis of the channels of a field that has ``tail`` axes after them."""
        none = value.ndim - tail == 1 + len(self.layout.spatial)
        return None if none else -1 if self.layout.out_axis == -1 else 1

    def _spatial(self, value: Array, axes: str) -> tuple[int, ...]:
        shape = value.shape[: value.ndim - len(axes[1:])]
        axis = self._axis(value, len(axes[1:])) if axes else None
        return shape[1:] if axis is None else shape[2:] if axis == 1 else shape[1:-1]

    def _pixels(self, value: Array, axes: str) -> Array:
        if not axes:
            return value.reshape(len(value), -1)
        if len(axes) == 2:
            parts = [self._pixels(value[..., i], axes[:1]) for i in range(value.shape[-1])]
            return np.stack(parts, -1)
        return pixels.pixels(value, self._axis(value, 0))


def channels(manifest: Manifest) -> int:
    """Classes or outputs of a dense bundle."""
    assert manifest.dense is not None
    first = "probs" if manifest.task == "classification" else "mean"
    shape = next(s.shape for s in manifest.outputs if s.name == first)[1:]
    if len(shape) == len(manifest.dense.spatial):
        return 1
    return shape[-1] if manifest.dense.channels == -1 else shape[0]
