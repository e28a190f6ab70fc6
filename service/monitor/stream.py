"""One stream of numbers of one bundle: its reference, and whether it still looks like that.

The first values are the reference. After them each value bets in a conformal test martingale,
means of `BLOCK` of them go to a change-point detector, and the latest window is compared with the
reference bin by bin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from calibration.drift import martingale
from calibration.drift.detector import DEFAULT, Found, detector
from calibration.drift.distance import distance
from calibration.drift.martingale import Martingale
from posthoc.contract import F64, DataError

BLOCK = 10  # values of one observation of the detector: means are nearly normal
_BINS = 20


@dataclass(frozen=True, slots=True)
class Options:
    """``reference``: values that say what is normal; ``window``: values that are compared with
    them; ``detector``: a name of `calibration.drift.detector.DETECTORS`."""

    reference: int = 2000
    window: int = 1000
    detector: str = DEFAULT


@dataclass(frozen=True, slots=True)
class Stream:
    """What is known of one stream. ``gathered`` holds the reference until it is full; then there
    are the ``martingale``, the ``detector``'s state as its JSON (None where the reference is
    constant), the ``block`` that is not full yet, inner ``edges`` and counts of the ``reference``
    in the bins between, and the bins of the ``latest`` values."""

    gathered: tuple[float, ...] = ()
    martingale: Martingale | None = None
    detector: str | None = None
    block: tuple[float, ...] = ()
    edges: tuple[float, ...] = ()
    reference: tuple[int, ...] = ()
    latest: tuple[int, ...] = ()
    evidence: float | None = None
    changes: int = 0

    @property
    def learning(self) -> bool:
        """Whether the reference is not full yet."""
        return self.martingale is None

    def distances(self) -> dict[str, float]:
        """KS distance and PSI of the latest window from the reference, and the floors that they
        stay below by chance (see `calibration.drift.distance`); empty without a window."""
        if not self.latest:
            return {}
        now = np.bincount(self.latest, minlength=len(self.reference))
        found = distance(np.asarray(self.reference), now)
        return {name: getattr(found, name) for name in ("ks", "psi", "ks_floor", "psi_floor")}


def feed(stream: Stream, values: F64, options: Options) -> Stream:
    """The stream after N more finite values; NaN and infinity are left out."""
    values = values[np.isfinite(values)]
    if stream.martingale is None:
        room = options.reference - len(stream.gathered)
        gathered = (*stream.gathered, *values[:room].tolist())
        if len(gathered) < options.reference:
            return replace(stream, gathered=gathered)
        stream, values = _started(np.array(gathered), options), values[room:]
    if not len(values) or stream.martingale is None:
        return stream
    bet, _ = martingale.run(stream.martingale, values)
    bins = np.searchsorted(stream.edges, values, side="left")
    latest = (*stream.latest, *bins.tolist())[-options.window :]
    return _watched(replace(stream, martingale=bet, latest=latest), values, options)


def to_json(stream: Stream) -> dict[str, Any]:
    """Plain JSON values, from which `from_json` makes an equal stream."""
    saved = {name: getattr(stream, name) for name in Stream.__slots__}
    return saved | {
        "martingale": None if stream.martingale is None else martingale.to_json(stream.martingale)
    }


def from_json(saved: Mapping[str, Any]) -> Stream:
    """The stream that was saved. Raises DataError for anything else."""
    try:
        parts: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()
        }
        if parts["martingale"] is not None:
            parts["martingale"] = martingale.from_json(parts["martingale"])
        return Stream(**parts)
    except (KeyError, TypeError, AttributeError) as e:
        raise DataError(f"this is no saved stream ({e!r})") from e


def _started(reference: F64, options: Options) -> Stream:
    edges = np.unique(np.quantile(reference, np.arange(1, _BINS) / _BINS))
    bins = np.searchsorted(edges, reference, side="left")
    blocks = reference[: len(reference) // BLOCK * BLOCK].reshape(-1, BLOCK).mean(axis=1)
    using = detector(options.detector)
    try:
        state = using.to_json(using.start(blocks))
    except DataError:  # constant: there is no scale, and the martingale sees any change of it
        state = None
    return Stream(
        martingale=martingale.start(reference),
        detector=state,
        edges=tuple(edges.tolist()),
        reference=tuple(np.bincount(bins, minlength=len(edges) + 1).tolist()),
    )


def _watched(stream: Stream, values: F64, options: Options) -> Stream:
    """The stream after its detector has seen the means of whole blocks."""
    if stream.detector is None:
        return stream
    waiting = np.concatenate([stream.block, values])
    whole = len(waiting) // BLOCK * BLOCK
    using = detector(options.detector)
    state = using.from_json(stream.detector)
    found: list[Found] = []
    for mean in waiting[:whole].reshape(-1, BLOCK).mean(axis=1).tolist():
        state, one = using.step(state, mean)
        found.append(one)
    return replace(
        stream,
        detector=using.to_json(state),
        block=tuple(waiting[whole:].tolist()),
        evidence=found[-1].evidence if found else stream.evidence,
        changes=stream.changes + sum(one.alarm for one in found),
    )
