"""Images that a camera, a scaler or a hand spoilt: noise, blur, occlusion, contrast.

Images are N×C×H×W, N×H×W×C or N×H×W, of any float or integer dtype. Levels are shares of the range
of values and of the shorter side, so that they mean much the same for bytes, for [0, 1] and for
standardised pixels. Noise, blur and contrast follow Hendrycks & Dietterich 2019, "Benchmarking
neural network robustness to common corruptions and perturbations"; occlusion DeVries & Taylor 2017,
"Improved regularization of convolutional neural networks with cutout".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import DTypeLike

from calibration.corruption import streams
from calibration.corruption.streams import Inputs, Keys
from posthoc.contract import F64, Array, DataError

NOISE = (0.05, 0.1, 0.18, 0.28, 0.4)  # s.d., of the range of values
BLUR = (0.015, 0.025, 0.04, 0.055, 0.075)  # s.d. of the Gaussian, of the shorter side
OCCLUSION = (0.2, 0.3, 0.4, 0.5, 0.65)  # side of the square, of the shorter side
CONTRAST = (0.75, 0.55, 0.4, 0.27, 0.18)  # what is left of the distance to the mean


@dataclass(frozen=True, slots=True)
class Range:
    """Least and largest value over a whole data set, and the axis of the channels: 1, -1, or None
    where there is none."""

    low: float
    high: float
    channels: Literal[1, -1] | None


Reference = Mapping[str, Range]


def measure(
    inputs: Inputs,
    *,
    low: float | None = None,
    high: float | None = None,
    channels: Literal[1, -1] | None = None,
) -> dict[str, Range]:
    """The range of each tensor that holds images, or [``low``, ``high``] where that is known.

    Of four axes the channels are the shorter of axis 1 and the last, axis 1 where they are equal;
    ``channels`` says otherwise. Raises DataError, naming the input, for no images, no rows, a value
    that is not finite and integers beyond 2**53.
    """
    tensors = streams.named(inputs)
    images = {name: x for name, x in tensors.items() if fits(x.dtype, x.shape)}
    if not images:
        raise DataError(f"{', '.join(map(streams.called, tensors))}: no tensor is N×C×H×W or N×H×W")
    return {name: _range(name, x, low, high, channels) for name, x in images.items()}


def merge(a: Reference, b: Reference) -> dict[str, Range]:
    """The reference of the rows of both, exactly."""
    return {
        name: Range(min(r.low, b[name].low), max(r.high, b[name].high), r.channels)
        for name, r in a.items()
    }


def fits(dtype: DTypeLike, shape: tuple[int, ...]) -> bool:
    """Whether a tensor can be images: numbers with three or four axes."""
    return np.dtype(dtype).kind in "fiu" and len(shape) in (3, 4)


def noise(
    inputs: Inputs,
    severity: int,
    *,
    reference: Reference | None = None,
    keys: Array | None = None,
    seed: int = 0,
) -> Inputs:
    """Gaussian noise on every value, s.d. ``NOISE`` of the range.

    Like all functions here: ``reference`` is `measure` of the whole data set (None: of these rows),
    ``keys`` (N integers) name the rows (None: their content does). Returns the same shapes and
    dtypes within the range, integers rounded. Raises DataError for a severity that is none, for
    images unlike the reference's, for values that are not finite, and where the reference's are
    all equal.
    """
    share = streams.level(NOISE, severity)

    def act(x: F64, starts: Keys, span: Range) -> F64:
        drawn = streams.normals(starts, x[0].size).reshape(x.shape)
        return x + share * (span.high - span.low) * drawn

    return _each("noise", act, inputs, reference, keys, seed)


def blur(
    inputs: Inputs,
    severity: int,
    *,
    reference: Reference | None = None,
    keys: Array | None = None,
    seed: int = 0,
) -> Inputs:
    """A Gaussian filter over both sides, s.d. ``BLUR`` of the shorter one, images mirrored at
    their edges. Nothing is drawn: keys and seed change nothing."""
    from scipy.ndimage import gaussian_filter1d

    share = streams.level(BLUR, severity)

    def act(x: F64, starts: Keys, span: Range) -> F64:
        sigma = share * min(x.shape[-2:])
        rows: F64 = gaussian_filter1d(x, sigma, axis=-2, mode="reflect")
        both: F64 = gaussian_filter1d(rows, sigma, axis=-1, mode="reflect")
        return both

    return _each("blur", act, inputs, reference, keys, seed)


def occlusion(
    inputs: Inputs,
    severity: int,
    *,
    reference: Reference | None = None,
    keys: Array | None = None,
    seed: int = 0,
) -> Inputs:
    """A square anywhere within the image, side ``OCCLUSION`` of its shorter one (1 or more),
    filled in all channels with the middle of the range."""
    share = streams.level(OCCLUSION, severity)

    def act(x: F64, starts: Keys, span: Range) -> F64:
        height, width = x.shape[-2:]
        side = max(1, round(share * min(height, width)))
        at = streams.uniforms(starts, 2) * (height - side + 1, width - side + 1)
        first = np.floor(at).astype(np.int64)
        down, across = (
            (first[:, [axis]] <= np.arange(size)) & (np.arange(size) < first[:, [axis]] + side)
            for axis, size in enumerate((height, width))
        )
        square = (down[:, :, None] & across[:, None, :])[:, None]
        filled: F64 = np.where(square, span.low / 2 + span.high / 2, x)
        return filled

    return _each("occlusion", act, inputs, reference, keys, seed)


def contrast(
    inputs: Inputs,
    severity: int,
    *,
    reference: Reference | None = None,
    keys: Array | None = None,
    seed: int = 0,
) -> Inputs:
    """Every value drawn to the mean of its channel in its image, ``CONTRAST`` of the distance
    left. Nothing is drawn: keys and seed change nothing."""
    left = streams.level(CONTRAST, severity)

    def act(x: F64, starts: Keys, span: Range) -> F64:
        mean = x.reshape(*x.shape[:2], -1).mean(-1)[:, :, None, None]
        drawn: F64 = mean + left * (x - mean)
        return drawn

    return _each("contrast", act, inputs, reference, keys, seed)


def _each(
    what: str,
    act: Callable[[F64, Keys, Range], F64],
    inputs: Inputs,
    reference: Reference | None,
    keys: Array | None,
    seed: int,
) -> Inputs:
    """``act`` on blocks of each tensor of the reference, as float64 B×C×H×W."""
    spans = measure(inputs) if reference is None else reference
    tensors = streams.named(inputs)
    rows = streams.keys_of(tensors, keys)
    for name, span in spans.items():
        if name not in tensors or not fits(tensors[name].dtype, tensors[name].shape):
            raise DataError(f"{streams.called(name)} held images when it was measured")
        if not span.low < span.high:
            raise DataError(
                f"{streams.called(name)} has no range between {span.low:g} and {span.high:g}; "
                "give its least and largest value"
            )
        x, starts = tensors[name], streams.streams(rows, seed, what, name)
        out = np.empty_like(x)
        for part in streams.blocks(x):
            block = _channels_first(x[part], span).astype(np.float64, order="C")
            finite = np.isfinite(block).all((1, 2, 3))
            if not finite.all():
                bad = part.start + int(np.argmin(finite))
                raise DataError(f"{streams.called(name)}: row {bad} is not finite")
            done = act(block, starts[part], span) if block.size else block
            done = streams.held(done, x.dtype, span.low, span.high)
            last = x.ndim == 4 and span.channels == -1
            out[part] = np.moveaxis(done, 1, -1) if last else done.reshape(x[part].shape)
        tensors[name] = out
    return streams.like(inputs, tensors)


def _channels_first(x: Array, span: Range) -> Array:
    if x.ndim == 3:
        return x[:, None]
    return np.moveaxis(x, -1, 1) if span.channels == -1 else x


def _range(
    name: str,
    x: Array,
    low: float | None,
    high: float | None,
    channels: Literal[1, -1] | None,
) -> Range:
    if not x.size:
        raise DataError(f"{streams.called(name)} of shape {x.shape} holds no value to measure")
    with np.errstate(invalid="ignore"):
        least = float(x.min()) if low is None else float(low)
        most = float(x.max()) if high is None else float(high)
    if not np.isfinite(most - least):
        raise DataError(f"{streams.called(name)} holds a value that is not finite")
    if x.dtype.kind in "iu" and max(-least, most) > streams.EXACT:
        raise DataError(f"{streams.called(name)} holds integers beyond 2**53")
    if x.ndim == 3:
        return Range(least, most, None)
    found: Literal[1, -1] = -1 if x.shape[-1] < x.shape[1] else 1
    return Range(least, most, found if channels is None else channels)
