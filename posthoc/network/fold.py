"""S samples of a network in one graph: what noise leaves alone once, the rest on S·N rows.

At every site the tensor h is replaced, in sample s, by g_s·h + c_s. What does not depend on a site
(the prefix) is the frozen model's own and computed once; what does (the suffix) is copied once, for
all samples together. The frozen outputs keep the nodes that they had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from posthoc.contract import Array, ModelError
from posthoc.graph import checked
from posthoc.model.probe import difference, with_outputs
from posthoc.model.renaming import tensor_names
from posthoc.network.batch import Layouts
from posthoc.network.suffix import Suffix
from posthoc.runtime import open_session, session_specs

_FIRM = {"float16": 5e-3}  # relative; other types: 1e-5
_AGAIN = 4  # nodes computed again, at most, so that frozen outputs keep every bit
_GROWS = 3.0  # noise may amplify what the batch size moves


@dataclass(frozen=True, slots=True)
class Noise:
    """g and c of S samples at one site: arrays S×… that broadcast against a row of the tensor (for
    N×C×H×W: S×C×1×1); None is 1 and 0."""

    gain: Array | None = None
    offset: Array | None = None

    def terms(self) -> dict[str, Array]:
        """What there is of gain and offset, by name."""
        both = {"gain": self.gain, "offset": self.offset}
        return {k: np.asarray(v) for k, v in both.items() if v is not None}

    def identity(self) -> Noise:
        """Noise of the same shapes that changes nothing."""
        g, c = self.gain, self.offset
        return Noise(
            None if g is None else np.ones_like(g), None if c is None else np.zeros_like(c)
        )


def sampled(
    model: bytes,
    output: str,
    noises: Mapping[str, Noise],
    members: str,
    *,
    inputs: bool = False,
    axis: int = 1,
    rows: Mapping[str, Array] | None = None,
) -> bytes:
    """The model with one more graph output: what ``output`` is in each of S samples.

    ``noises`` maps tensors of the graph (sites) to their noise, all with the same S. ``members``
    is N×(S·C), sample-major (column s·C + c), for an ``output`` N×C, N×(S·C)×H×W for N×C×H×W, and
    N×T×(S·C) for N×T×C with ``axis=2`` (-1 is the last); N×S for an output without classes. With
    ``inputs`` gains and offsets are not stored: they are graph inputs ``{tensor}/gain`` and
    ``{tensor}/offset`` of the given shapes and the site's type. ``rows`` are real rows by input,
    from which the axis of the rows is seen; without any, random ones are drawn.

    Raises ModelError for a tensor that is not there, has no rows, or does not lead to ``output``,
    for noise of a wrong shape, for names that are taken, and for a node whose result on S·N rows
    cannot be had from that on N.
    """
    proto = onnx.load_from_string(model)
    names = tensor_names(proto.graph)
    counts = {len(a) for noise in noises.values() for a in noise.terms().values()}
    if len(counts) != 1:
        raise ModelError(
            f"noise at {', '.join(map(repr, noises)) or 'no tensor'} has {sorted(counts)} samples;"
            " it needs one number of samples at all sites"
        )
    for name in (output, *noises):
        if name not in names:
            raise ModelError(f"the model has no tensor {name!r}")
    prefix = f"{members}/"
    while any(n.startswith(prefix) for n in names):
        prefix = f"uq_{prefix}"
    own = {f"{t}/{k}" for t, noise in noises.items() for k in noise.terms()} if inputs else set()
    for name in (own | {members}) & names:
        raise ModelError(f"the model has a tensor {name!r} already; choose another name")
    terms = {t: noise.terms() for t, noise in noises.items()}
    samples, layouts = counts.pop(), Layouts(proto, rows)

    def built(again: int) -> bytes:
        suffix = Suffix(proto, output, terms, samples, prefix, inputs, layouts, again)
        made = suffix.members(members, axis)
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        copy.graph.node.extend(suffix.new.nodes)
        copy.graph.initializer.extend(suffix.new.constants)
        copy.graph.input.extend(suffix.new.inputs)
        copy.graph.output.append(made)
        copy.ir_version = max(copy.ir_version, 8)
        return checked(copy)

    frozen = [o.name for o in proto.graph.output]
    feed = layouts.rows
    want = _Runner(model, frozen)(feed)
    first = built(0)
    for again in range(_AGAIN + 1):
        done = built(again) if again else first
        got = _Runner(done, frozen)({**feed, **_inputs(noises)})
        if all(_bits(got[n]) == _bits(want[n]) for n in frozen):
            return done
    return first  # differs by rounding


def believe(
    before: bytes,
    after: bytes,
    feed: Mapping[str, Array],
    *,
    output: str,
    members: str,
    noises: Mapping[str, Noise],
    axis: int = 1,
) -> float:
    """Run the rows ``feed`` through a model ``before`` and ``after`` `sampled` (the same arguments)
    and check that samples are samples. Returns the largest difference found, relative to the
    largest value.

    With noise that changes nothing, every member must be the frozen output; with the noise itself,
    the members of a row must be those of the row alone; and the graph's own outputs must be as they
    were. All within 1e-5 (float16: 5e-3) and what the bare model itself differs by between those
    numbers of rows. Raises ModelError, naming the output, where it is not so.
    """
    samples = next(len(a) for noise in noises.values() for a in noise.terms().values())
    n = len(next(iter(feed.values())))
    proto = onnx.load_from_string(before)
    bare = _Runner(with_outputs(proto, [output]), [*(o.name for o in proto.graph.output), output])
    whole = bare(feed)
    want = whole[output]
    many = bare({k: np.concatenate([v] * samples) for k, v in feed.items()})[output]
    moves = [difference(many[i * n : (i + 1) * n], want) for i in range(samples)]
    parts = (slice(0, 1), slice(n // 2, n))
    moves += [difference(bare(_part(feed, p))[output], want[p]) for p in parts]
    tolerance = _FIRM.get(str(want.dtype), 1e-5) + _GROWS * max(moves)

    same = {t: noise.identity() for t, noise in noises.items()}
    still = sampled(before, output, same, members, inputs=True, axis=axis, rows=feed)
    got = _Runner(still, [members])({**feed, **_inputs(same)})[members]
    worst = max(difference(m, want) for m in separate(got, samples, axis))
    if not worst <= tolerance:
        raise ModelError(
            f"{members!r}: without noise the samples differ from output {output!r} by {worst:.1e} "
            "of its largest value; noise cannot be put into this graph"
        )
    given = _inputs(noises)
    run = _Runner(after, [members, *(o.name for o in proto.graph.output)])
    done = run({**feed, **given})
    for name in (o.name for o in proto.graph.output):
        if not difference(done[name], whole[name]) <= tolerance:
            raise ModelError(f"output {name!r} is not what it was before the samples were added")
    for p in parts:
        moved = difference(run({**_part(feed, p), **given})[members], done[members][p])
        worst = max(worst, moved)
        if not moved <= tolerance:
            raise ModelError(
                f"{members!r}: the samples of a row of {output!r} change with the rows beside it, "
                f"by {moved:.1e} of the largest value; noise cannot be put into this graph"
            )
    return worst


def separate(members: Array, samples: int, axis: int = 1) -> Array:
    """Members N×…×(S·C)×… as S×N×…×C×…; those of an output without classes, N×S, as S×N×1."""
    axis %= members.ndim
    shape = members.shape
    split = members.reshape(*shape[:axis], samples, -1, *shape[axis + 1 :])
    return np.moveaxis(split, axis, 0)


def _inputs(noises: Mapping[str, Noise]) -> dict[str, Array]:
    return {f"{t}/{k}": v for t, noise in noises.items() for k, v in noise.terms().items()}


def _bits(value: Array) -> object:
    return value.tolist() if value.dtype.kind == "O" else value.tobytes()


def _part(feed: Mapping[str, Array], rows: slice) -> dict[str, Array]:
    return {k: v[rows] for k, v in feed.items()}


class _Runner:
    """A model's outputs by name, from what it takes of a feed."""

    def __init__(self, model: bytes, names: Sequence[str]):
        self._session, self._names = open_session(model), list(dict.fromkeys(names))
        self._inputs, _ = session_specs(self._session)

    def __call__(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        given = {s.name: np.asarray(feed[s.name], s.dtype) for s in self._inputs}
        found = self._session.run(self._names, given)
        return dict(zip(self._names, map(np.asarray, found), strict=True))
