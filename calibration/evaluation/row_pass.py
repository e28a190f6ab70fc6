"""One pass of a bundle's fused graph over a table of rows, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibration.predictor import Predictor
from calibration.unseen import Unseen
from posthoc.contract import Array
from posthoc.data import columns_there, open_table, to_rows
from posthoc.folds import log_softmax

Progress = Callable[[str, int, int], None]
Spoil = Callable[[Mapping[str, Array], Array], Mapping[str, Array]]  # inputs, content hashes
BATCH = 256
LOGITS = "logits"  # what the frozen model itself says, beside the fields


@dataclass(frozen=True, slots=True)
class Batch:
    """N usable rows: their places in the table, inputs, and what the graph made of them.

    ``made`` holds the fields, ``set@alpha`` or ``lower@alpha`` and ``upper@alpha``, and the frozen
    ``logits`` (or mean); ``y`` labels (none where they were not asked for), ``hashes`` of the
    contents, ``keys`` those of the split, ``groups`` the values of the mapping's group column.
    """

    places: Array
    inputs: Mapping[str, Array]
    made: dict[str, Array]
    y: Array | None
    hashes: Array
    keys: Array
    groups: Array | None
    ids: Array | None


class RowPass:
    """A bundle over tables. Of the last table ``faulty`` counts the rows that are, and ``seen`` the
    others that the fit used, or whose equals or siblings it used; ``dropped`` is both."""

    def __init__(self, predictor: Predictor, levels: Mapping[float, float | Array]):
        self.predictor, self.levels = predictor, levels
        self.unseen = Unseen(predictor.bundle)
        self.faulty = self.seen = 0

    @property
    def dropped(self) -> int:
        """Rows of the last table that nothing is made of."""
        return self.faulty + self.seen

    def over(
        self,
        data: str | Path,
        what: str,
        *,
        labelled: bool,
        progress: Progress | None = None,
        spoil: Spoil | None = None,
        run: bool = True,
    ) -> Iterator[Batch]:
        """The usable rows of a table. ``spoil`` changes the inputs after the rows were told apart,
        so that the same rows stay; without ``run`` nothing is made of them. Raises DataError for a
        table that the mapping does not fit."""
        manifest = self.predictor.manifest
        table = open_table(data)
        mapping = manifest.mapping if labelled else manifest.mapping.inputs_only()
        columns = columns_there(table, mapping)
        self.faulty = self.seen = done = 0
        for batch in table.batches(BATCH, columns):
            rows = to_rows(
                batch,
                mapping,
                manifest.inputs,
                task=manifest.task,
                classes=manifest.classes,
                need_target=labelled,
                n_classes=width(self.predictor),
            )
            keep = self.unseen.usable(rows, labelled)
            self.faulty += len(rows.bad)
            self.seen += int((~keep).sum()) - len(rows.bad)
            if keep.any():
                hashes = rows.content_hashes[keep]
                inputs: Mapping[str, Array] = {k: v[keep] for k, v in rows.inputs.items()}
                if spoil is not None:
                    inputs = spoil(inputs, hashes)
                groups = None if rows.groups is None else rows.groups[keep]
                beside = self.predictor.beside(groups, hashes)
                yield Batch(
                    places=done + np.flatnonzero(keep),
                    inputs=inputs,
                    made=self._run({**inputs, **beside}) if run else {},
                    y=None if rows.y is None else rows.y[keep],
                    hashes=hashes,
                    keys=rows.split_keys[keep],
                    groups=groups,
                    ids=None if rows.ids is None else np.asarray(rows.ids)[keep],
                )
            done += len(keep)
            if progress is not None:
                progress(what, done, table.n_rows)

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        logits = self.predictor.manifest.frozen.logits
        beside = [] if logits is None else [logits]
        out = self.predictor.run(inputs, outputs=[*self.predictor.fields, *beside])
        if logits is not None:
            out[LOGITS] = out.pop(logits)
        names = ["set"] if "set" in out else ["lower", "upper"]
        for i, (alpha, q) in enumerate(self.levels.items()):
            # The first level is the graph's default: no second run for it.
            found = out if i == 0 else self.predictor.run(inputs, outputs=names, q_hat=q)
            out |= {f"{name}@{alpha}": found[name] for name in names}
        return out


def width(predictor: Predictor) -> int | None:
    """Classes of a classifier."""
    found = [s.shape[1] for s in predictor.manifest.outputs if s.name == "probs"]
    return found[0] if found else None


def strangeness(predictor: Predictor, made: Mapping[str, Array]) -> dict[str, Array]:
    """What tells strange rows (N) or pixels (N×P): the bundle's score, maximum softmax of the
    frozen model, and the epistemic part."""
    out: dict[str, Array] = {}
    if "ood_score" in made:
        out["hedged"] = made["ood_score"]
    if LOGITS in made and predictor.manifest.task == "classification":
        out["msp"] = -np.exp(log_softmax(made[LOGITS])).max(-1)
    if "epistemic" in made:
        out["epistemic"] = made["epistemic"]
    elif "epistemic_std" in made:
        out["epistemic"] = made["epistemic_std"].max(-1)
    return out
