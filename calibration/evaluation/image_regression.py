"""Evaluate maps of values with error bars (restoration, depth, …), image by image.

Errors, scores, correlations and what is uncovered are means over images of each image's own
figure, intervals resample images; the UCE, PIT and quantiles add up all pixels. With K outputs a
pixel is covered when all K are, and every output of every pixel counts in the other figures.
Pixels without a truth (NaN in any output) count nowhere, except in score maps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from calibration.evaluation.images import (
    SAMPLED,
    Columns,
    Curves,
    ScoreMaps,
    drawn_pixels,
    image_figures,
    image_level,
    ood_maps,
)
from calibration.evaluation.parts import HEDGED, IN_ROWS, Resampling, differences, histogram
from calibration.evaluation.records import (
    Answered,
    Dense,
    Evaluation,
    Figure,
    Histogram,
    Quantiles,
    System,
    WidthGroup,
)
from calibration.evaluation.regression import CONSTANT, by_width
from calibration.evaluation.variances import VarianceSums
from calibration.metrics.correlation import Moments, image_correlations, pooled_moments
from calibration.metrics.proper import gaussian_crps, gaussian_log_loss
from calibration.metrics.regression import gaussian_pit, observed_quantiles, pit_totals
from calibration.metrics.sparsification import sparsification
from calibration.metrics.totals import level_name
from posthoc.contract import F64, Array, DataError


@dataclass(frozen=True, slots=True)
class Mapped:
    """A batch of N images of P pixels and K outputs: what was said of them and what they are.

    ``mean`` and ``std`` N×P×K by system, ``half`` by alpha how many ``std`` an interval reaches,
    ``quantiles`` N×P×K×Q, ``held`` N×P where flagged or abstained on, ``scores`` N×P by name, ``y``
    N×P×K with NaN where there is no truth, ``keys`` and ``groups`` N hashes.
    """

    mean: Mapping[str, Array]
    std: Mapping[str, Array]
    half: Mapping[float, float]
    y: Array
    keys: Array
    groups: Array
    quantiles: Array | None = None
    scores: Mapping[str, Array] = field(default_factory=dict)
    held: Array | None = None

    def __len__(self) -> int:
        return len(self.y)


class _System:
    """Running sums of one system."""

    def __init__(self) -> None:
        self.columns, self.curves = Columns(), Curves()
        self.variances = VarianceSums()
        self.pit = pit_totals.init()
        self.moments = Moments()

    def add(self, mean: Array, std: Array, y: F64, spread: float | None) -> None:
        """One image: mean, std and truth of its known pixels, P×K; ``spread``: range of values."""
        error = y - mean.astype(np.float64)
        sigma = np.broadcast_to(std, error.shape).astype(np.float64)
        squared, size = error**2, np.abs(error)
        mse = float(squared.mean())
        columns = {
            "squared_error": mse,
            "mae": float(size.mean()),
            "crps": float(gaussian_crps(error, sigma).mean()),
            "nll": float(gaussian_log_loss(error, sigma).mean()),
        }
        if spread is not None:
            # An image without any error has no finite ratio.
            columns["psnr"] = 10 * math.log10(spread**2 / mse) if mse else math.nan
        rank = image_correlations(size[None], sigma[None])
        columns |= {name: float(r[0]) for name, r in rank.items()}
        columns |= self.curves.add(sparsification(size, sigma))
        self.columns.add(columns)
        self.variances.add(squared, sigma**2)
        self.moments = pooled_moments.update(self.moments, {"error": size, "uncertainty": sigma})
        self.pit = pit_totals.update(self.pit, gaussian_pit(mean, sigma, y))


class ImageRegression:
    """The figures of maps of values, from batches; it holds a few hundred numbers an image."""

    def __init__(
        self,
        alphas: Sequence[float],
        *,
        quantile_levels: Sequence[float] = (),
        data_range: float | None = None,
        per: int = SAMPLED,
    ):
        if data_range is not None and not (data_range > 0 and math.isfinite(data_range)):
            raise DataError(f"the range of the target's values must be above 0, not {data_range}")
        self.alphas, self.quantile_levels = tuple(alphas), tuple(quantile_levels)
        self.data_range = data_range
        self.systems: dict[str, _System] = {}
        self.levels = {a: Columns() for a in self.alphas}
        self.scores = ScoreMaps(per)
        self.known = 0
        self.below = np.zeros(len(self.quantile_levels))
        self.drawn: list[Array] = []  # width, and whether covered, 2×pixels of each image
        self.kept: F64 | None = None

    @property
    def n(self) -> int:
        """Images seen."""
        return len(self.scores.groups)

    @property
    def error(self) -> F64:
        """Mean squared error of each image, N."""
        return self.systems[HEDGED].columns["squared_error"]

    def uncovered(self, alpha: float) -> F64:
        """Share of uncovered pixels of each image, N."""
        return self.levels[alpha]["uncovered"]

    def add(self, batch: Mapped) -> None:
        """Take in a batch; DataError for an image without any truth."""
        for i in range(len(batch)):
            self._add(batch, i)

    def _add(self, batch: Mapped, i: int) -> None:
        known = np.isfinite(batch.y[i]).all(1)
        if not known.any():
            raise DataError(f"image {self.n} has no pixel with a truth")
        y = np.asarray(batch.y[i][known], np.float64)
        self.known += len(y)
        for name in batch.mean:
            mean, std = batch.mean[name][i][known], batch.std[name][i][known]
            self.systems.setdefault(name, _System()).add(mean, std, y, self.data_range)
        mean, std = batch.mean[HEDGED][i][known], batch.std[HEDGED][i][known]
        covered = {}
        for alpha in self.alphas:
            # In the dtype of the graph, as it is served.
            half = np.asarray(batch.half[alpha], std.dtype) * std
            covered[alpha] = ((mean - half <= y) & (y <= mean + half)).all(1)
            self.levels[alpha].add(
                {"uncovered": 1 - covered[alpha].mean(), "size": 2 * half.mean(dtype=np.float64)}
            )
        first = next((a for a in self.alphas if math.isfinite(batch.half[a])), None)
        if first is not None:
            index = drawn_pixels(int(batch.keys[i]), len(y), self.scores.per)
            width = 2 * batch.half[first] * std[index].mean(1, dtype=np.float64)
            self.drawn.append(np.stack([width, covered[first][index]]))
        if batch.quantiles is not None:
            seen = observed_quantiles(batch.quantiles[i][known], self.quantile_levels, y)
            self.below = self.below + seen * len(y)
        if batch.held is not None:
            kept = ~batch.held[i][known]
            inside = covered[self.alphas[0]][kept].sum() if self.alphas else 0
            sums = np.array([kept.sum(), inside], dtype=np.float64)
            self.kept = sums if self.kept is None else self.kept + sums
        scores = {name: s[i] for name, s in batch.scores.items()}
        self.scores.add(scores, int(batch.keys[i]), int(batch.groups[i]))

    def result(
        self,
        *,
        n_conformal: int,
        everything: Iterable[float] = (),
        strange: Mapping[str, ScoreMaps] | None = None,
        grouped: bool = False,
        about: Mapping[str, str] | None = None,
        n_boot: int = 1000,
        seed: int = 0,
    ) -> Evaluation:
        """The evaluation; arguments as for `segmentation.Segmentation.result`."""
        groups = np.asarray(self.scores.groups, np.uint64) if grouped else None
        how = Resampling(groups, n_boot, seed)
        columns = {n: s.columns.arrays() for n, s in self.systems.items()}
        hedged = self.systems[HEDGED]
        ood, scores = ood_maps(self.scores, strange or {}, grouped)
        widths: Histogram | None = None
        within: tuple[WidthGroup, ...] = ()
        if self.drawn:
            width, inside = np.concatenate(self.drawn, axis=1)
            first = next(a for a in self.alphas if np.isfinite(self.levels[a]["size"]).all())
            widths = histogram(f"width at level {level_name(first)}", {IN_ROWS: width})
            within = by_width(width, inside)
        return Evaluation(
            task="regression",
            about=dict(about or {}),
            n=self.n,
            n_conformal=n_conformal,
            systems=tuple(_record(n, s, how) for n, s in self.systems.items()),
            differences=tuple(differences(columns, ("nll", "crps"), CONSTANT, how))
            if CONSTANT in columns
            else (),
            levels=tuple(
                image_level(
                    a,
                    c["uncovered"],
                    n_conformal,
                    c["size"],
                    how,
                    everything=a in set(everything),
                )
                for a, c in self.levels.items()
            ),
            widths=widths,
            width_groups=within,
            quantiles=Quantiles(
                level=self.quantile_levels, observed=tuple((self.below / self.known).tolist())
            )
            if self.quantile_levels
            else None,
            answered=self._answered(),
            ood=ood,
            scores=scores,
            dense=Dense(
                pixels=self.known,
                sampled=self.scores.per,
                sparsification=hedged.curves.record(HEDGED),
                variance=tuple(s.variances.record(n) for n, s in self.systems.items()),
            ),
        )

    def _answered(self) -> Answered | None:
        if self.kept is None:
            return None
        kept, covered = self.kept.tolist()
        if not kept:
            return Answered(share=0.0)
        return Answered(
            share=kept / self.known,
            level=level_name(self.alphas[0]) if self.alphas else None,
            coverage=covered / kept if self.alphas else None,
        )


def _record(name: str, s: _System, how: Resampling) -> System:
    found = image_figures(s.columns.arrays(), how)
    squared = found.pop("squared_error")
    rmse = Figure(
        value=math.sqrt(squared.value),
        low=math.sqrt(squared.low or 0.0),
        high=math.sqrt(squared.high or 0.0),
    )
    metrics = {
        "rmse": rmse,
        **{k: found.pop(k) for k in ("mae", "psnr", "crps", "nll") if k in found},
        "uce": Figure(value=s.variances.uce),
        "pce": Figure(value=s.pit.pce),
        **found,
    }
    if math.isfinite(pooled := s.moments.pearson):
        metrics["pearson_pooled"] = Figure(value=pooled)
    return System(name=name, metrics=metrics, pit=tuple(s.pit.count.tolist()))
