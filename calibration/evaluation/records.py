"""What an evaluation holds: plain records that go to JSON and come back."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from posthoc.contract import Task


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Figure(_Record):
    """A number and a range: a 95 % ``interval`` of it, or where a ``perfect`` model's would lie."""

    value: float
    low: float | None = None
    high: float | None = None
    range: Literal["interval", "perfect"] = "interval"


class Difference(_Record):
    """Metric of ``of`` less that of ``to`` on the same rows; below zero, ``of`` is better."""

    metric: str
    of: str
    to: str
    value: float
    low: float
    high: float


class Reliability(_Record):
    """The filled confidence bins: rows, mean confidence, accuracy, and the 95 % band of the
    accuracy that a perfectly calibrated model would show there."""

    count: tuple[int, ...]
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


class Curve(_Record):
    """A line: risk (y) against coverage (x), both as shares."""

    x: tuple[float, ...]
    y: tuple[float, ...]


class System(_Record):
    """One column of the comparison: the frozen model, a baseline, or the hedged model."""

    name: str
    metrics: dict[str, Figure]
    reliability: Reliability | None = None
    risk_coverage: Curve | None = None
    pit: tuple[int, ...] | None = None  # counts in 20 equal bins of 0…1


class Histogram(_Record):
    """Shares of rows per bin, by the name of the set of rows; edges are one longer."""

    name: str
    edges: tuple[float, ...]
    shares: dict[str, tuple[float, ...]]


class ImageShares(_Record):
    """How the share of uncovered pixels is spread over the images of a dense model.

    ``mean`` is what risk control promises to be at most alpha in expectation; ``above`` is the
    share of images with more than alpha uncovered, ``quantiles`` the shares that 50, 90 and 99 %
    of the images do not exceed, ``ambiguous`` the share of pixels whose set holds several classes:
    these are measured, not promised. Intervals resample images.

    With ``mask``, the name of a class, they are the shares of the class's pixels that its mask
    misses, of the ``n`` images that show the class; ``excess`` is the share of a mask's pixels that
    are of another class.
    """

    n: int
    mask: str | None = None
    excess: Figure | None = None
    mean: Figure
    above: Figure
    quantiles: tuple[float, float, float]
    ambiguous: Figure | None = None
    histogram: Histogram


class Part(_Record):
    """Coverage of a part of the rows, a group or a slice, beside the 99 % band that luck allows
    its ``n`` rows."""

    name: str
    n: int
    coverage: float
    band_low: float
    band_high: float


class Level(_Record):
    """Coverage at one level beside the 99 % band that luck allows; size is a set size or width.

    ``mean_size`` is None where too few conformal rows made an interval infinite. Of a dense model
    coverage is one less the mean over ``images`` of their share of uncovered pixels; of a mask the
    size is its share of an image's pixels.

    ``interval_score`` is of intervals, mean over rows and outputs. ``size_violation`` is of sets:
    the largest difference of coverage to the level over strata of set sizes. ``groups`` hold the
    least covered groups of rows, where the table names groups, and ``worst_slice`` the slice along
    the model's outputs that covers least on rows that did not choose it.

    ``banded`` is False where the band is not one of these rows: classes, clusters or groups have
    thresholds of their own, or conformal rows were weighted for production.
    """

    level: str
    alpha: float
    coverage: float
    band_low: float
    band_high: float
    banded: bool = True
    mean_size: float | None
    empty_share: float | None = None
    images: ImageShares | None = None
    interval_score: Figure | None = None
    size_violation: Figure | None = None
    groups: tuple[Part, ...] = ()
    worst_slice: Part | None = None


class SetSizes(_Record):
    """The sizes that occur at one level, how often, and the coverage within each."""

    level: str
    size: tuple[int, ...]
    count: tuple[int, ...]
    coverage: tuple[float, ...]


class OodResult(_Record):
    """How well one score tells one strange set from the test rows."""

    score: str
    out: str
    n_out: int
    auroc: Figure
    aupr: float
    fpr95: float


class Answered(_Record):
    """The rows that were neither flagged nor abstained on: coverage here is not promised."""

    share: float
    error: float | None = None
    level: str | None = None
    coverage: float | None = None


class Quantiles(_Record):
    """Predicted quantile levels and the shares of targets that were at most them."""

    level: tuple[float, ...]
    observed: tuple[float, ...]


class WidthGroup(_Record):
    """A fifth of the rows by interval width: their mean width, coverage and count."""

    mean_width: float
    coverage: float
    count: int


class ClassFigures(_Record):
    """One class of a segmentation: its share of the pixels, intersection over union of hedged's
    labels (None where it neither occurs nor is said), calibration error by system."""

    name: str
    share: float
    iou: float | None
    ece: dict[str, float]


class Sparsified(_Record):
    """Error left, over that of all pixels, once the share x of the least certain pixels is gone.

    Mean over the images; ``oracle`` removes by the error itself, and a random order leaves 1.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    oracle: tuple[float, ...]


class VarianceBins(_Record):
    """Pixels in bins of about equal count by predicted variance: bin b ends at ``upper[b]``.

    Mean variance and mean squared error of each bin; equal where the variance is honest.
    """

    name: str
    upper: tuple[float, ...]
    count: tuple[int, ...]
    variance: tuple[float, ...]
    squared_error: tuple[float, ...]


class PictureMap(_Record):
    """One map of one image as a base64 PNG, what it shows and, as text, what is in it."""

    title: str
    alt: str
    png: str


class Picture(_Record):
    """A test image with its maps; ``row`` is its place in the table."""

    title: str
    note: str
    row: int
    maps: tuple[PictureMap, ...]


class WorstRow(_Record):
    """A row that hedged was surest of and wrong about, or the furthest off in its own error bars.

    ``row`` is its place in the table; ``doubt`` the confidence of the answer, or the error over the
    error bar; ``flagged`` whether it was flagged or abstained on.
    """

    row: int
    id: str | None = None
    truth: str
    answer: str
    doubt: float
    flagged: bool | None = None


class Spread(_Record):
    """Sizes of sets, or widths of intervals, within one part of the rows: their mean, the sizes
    that 5, 25, 50, 75 and 95 % do not exceed, and the coverage there."""

    name: str
    n: int
    coverage: float
    mean: float
    quantiles: tuple[float, float, float, float, float]


class Spreads(_Record):
    """``by``: what the rows are parted by, at one level."""

    by: str
    level: str
    parts: tuple[Spread, ...]


class Retrieved(_Record):
    """R-AUROC of each doubt on ``n`` rows with classes, and recall at 1 of the features."""

    n: int
    recall_at_1: float
    r_auroc: dict[str, float]


class SetSummary(_Record):
    """One labelled set beside the others; all figures are hedged's.

    ``refused`` rows had no finite answer and count for nothing here. ``change`` is a metric less
    that of the first set, resampled over rows, or items, of both at once: one that both have is
    drawn for both. ``levels`` hold the band that luck allows rows like those of the fit.
    ``answered`` is the share that was neither flagged nor abstained on, ``answered_error`` the
    share of these that is wrong, or their RMSE.
    """

    name: str
    n: int  # rows, or images
    dropped: int = 0
    refused: int = 0
    corruption: str | None = None
    severity: int | None = None
    metrics: dict[str, Figure]
    change: dict[str, Figure] = {}
    levels: tuple[Level, ...] = ()
    flagged: Figure | None = None
    abstained: Figure | None = None
    answered: Figure | None = None
    answered_error: Figure | None = None


class Dense(_Record):
    """What only maps have. ``sampled`` pixels of each image stand for all of them in the figures
    that need every pixel at once (widths, ranks of single pixels' scores)."""

    pixels: int  # with a truth
    sampled: int
    classes: tuple[ClassFigures, ...] = ()
    sparsification: tuple[Sparsified, ...] = ()
    variance: tuple[VarianceBins, ...] = ()
    swatches: tuple[tuple[str, str], ...] = ()  # class name and colour, as in the pictures
    pictures: tuple[Picture, ...] = ()


class Evaluation(_Record):
    """Everything that the report shows, from ``evaluate_classification`` or ``_regression``.

    ``about`` holds the header's lines as the caller wrote them (bundle, splits, …); "model" is the
    report's title. ``sets`` are all labelled sets, these rows first, where there are several.
    """

    task: Task
    about: dict[str, str] = {}
    n: int  # rows, or images
    n_conformal: int
    label_equal: float | None = None  # share of rows whose label is the frozen argmax
    systems: tuple[System, ...]
    differences: tuple[Difference, ...]
    levels: tuple[Level, ...]
    set_sizes: tuple[SetSizes, ...] = ()
    width_groups: tuple[WidthGroup, ...] = ()
    widths: Histogram | None = None
    quantiles: Quantiles | None = None
    pce_floor: float | None = None
    answered: Answered | None = None
    ood: tuple[OodResult, ...] = ()
    scores: tuple[Histogram, ...] = ()
    dense: Dense | None = None
    confidences: Histogram | None = None  # or error bars, of the test rows and the strange ones
    spreads: Spreads | None = None
    worst: tuple[WorstRow, ...] = ()
    retrieved: Retrieved | None = None
    sets: tuple[SetSummary, ...] = ()
