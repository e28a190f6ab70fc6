"""``python -m bench dropout``: what Monte-Carlo dropout costs.

``ratio_head_s32``: throughput of the fused graph with 32 masks before the head, every output, over
the bare graph, as `bench.overhead` measures it; the least of three models. ``cost_over_ideal_s10``:
a predictor with every output whose S = 10 masks begin at a dropout inside the network, over the
time of the prefix once and the suffix ten times, each of them a graph of its own on the same rows;
the largest over the depths. ``cost_of_samples_s10`` is that of the ten samples alone, without the
frozen network's own outputs, an eleventh suffix that the ideal does not have, and without what is
made of the samples.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
from onnx import shape_inference

from bench import normed, resnet
from bench.assets import cache_folder, cached
from bench.material import magika, mnist_net
from bench.overhead import BATCH, RESNET_ROWS, measure
from bench.timing import in_turn, per_call
from calibration.compile import behind
from calibration.fit import fit_material
from calibration.fit_head import fit_head
from calibration.fit_options import FitOptions, Parts
from calibration.fit_thresholds import Fitted
from calibration.material import Columns, prepare
from posthoc.contract import Array
from posthoc.data import open_table, to_rows
from posthoc.export import export_torch
from posthoc.frozen import Frozen, open_frozen
from posthoc.network.sites import find_dropouts
from posthoc.runtime import open_session

HEAD = FitOptions(
    task="classification",
    method="head_dropout",
    settings={"samples": 32, "rate": 0.2},
    predictive="mc",
)
SAMPLES = 10
THREADS = 2
ROWS = 2_000  # that the inner predictors are fitted on; more make a better fit, not another speed


def run(quick: bool) -> dict[str, Any]:
    """Both figures with what they are the worst of."""
    head = before_head(quick)
    inside = [at_depth(sites, quick) for sites in depths()]
    return {
        "ratio_head_s32": min(f["ratio"] for f in head.values()),
        "cost_over_ideal_s10": max(f["cost_over_ideal"] for f in inside),
        "cost_of_samples_s10": max(f["cost_of_samples"] for f in inside),
        "head": head,
        "inside": inside,
    }


def before_head(quick: bool) -> dict[str, dict[str, float]]:
    """Ratios at batch 32 by model."""
    found = {}
    for name, known, inner in (("magika", magika(), 2), ("mnistnet", mnist_net(), 200)):
        material = known.material
        fitted, _, _ = fit_material(material, HEAD)
        first = next(iter(open_table(known.data).batches(BATCH)))
        rows = to_rows(first, material.mapping.inputs_only(), material.frozen.inputs)
        inputs = {k: np.asarray(v) for k, v in rows.inputs.items()}
        found[name] = _measured(material.frozen, fitted, inputs, quick, inner)
    frozen = open_frozen(resnet.model(), task="classification")
    assert frozen.head is not None
    module, calibration, conformal = (resnet.rows(frozen.head, RESNET_ROWS, s) for s in range(3))
    fitted = fit_head(frozen.head, Parts(module, calibration, conformal), HEAD)
    images = {"image": resnet.images(BATCH)}
    return {**found, "resnet18": _measured(frozen, fitted, images, quick, 1)}


def depths() -> list[tuple[str, ...]]:
    """The network's dropouts from the first on, from the second on, and so forth."""
    found = [s.tensor for s in find_dropouts(model().read_bytes())]
    return [tuple(found[i:]) for i in range(len(found))]


def at_depth(sites: tuple[str, ...], quick: bool) -> dict[str, Any]:
    """The predictor with S masks at each of ``sites``, beside prefix and suffix of the first."""
    frozen = open_frozen(model(), task="classification")
    prefix, suffix = cut(frozen.model, sites[0], frozen.z)
    x = {"image": normed.as_input(normed.rows("test")[0][:BATCH]).numpy()}
    whole, samples = predictor(sites)
    graphs = {"predictor": whole, "samples": samples, "prefix": prefix, "suffix": suffix}
    sessions = {n: open_session(g, threads=THREADS) for n, g in graphs.items()}
    (middle,) = sessions["prefix"].run(None, x)
    feeds = {"predictor": x, "samples": x, "prefix": x, "suffix": {sites[0]: middle}}

    def side(name: str) -> Callable[[], float]:
        run_once = partial(sessions[name].run, None, feeds[name])
        run_once()
        return lambda: per_call(run_once)

    times = dict(zip(graphs, in_turn([side(n) for n in graphs], 5 if quick else 15), strict=True))
    ideal = [
        before + SAMPLES * behind
        for before, behind in zip(times["prefix"].seconds, times["suffix"].seconds, strict=True)
    ]
    costs, alone = (
        [spent / least for spent, least in zip(times[n].seconds, ideal, strict=True)]
        for n in ("predictor", "samples")
    )
    before, behind = times["prefix"].median, times["suffix"].median
    return {
        "sites": list(sites),
        "cost_over_ideal": median(costs),
        "cost_low": min(costs),
        "cost_high": max(costs),
        "cost_of_samples": median(alone),
        "prefix_share": before / (before + behind),
        **{name: t.record() for name, t in times.items()},
    }


def cut(graph: bytes, tensor: str, output: str) -> tuple[bytes, bytes]:
    """A graph from its inputs to ``tensor``, and one from ``tensor`` to ``output``."""
    return upto(graph, tensor), _extracted(graph, [tensor], output)


def upto(graph: bytes, tensor: str) -> bytes:
    """A graph from its inputs to ``tensor``."""
    inputs = [i.name for i in onnx.load_from_string(graph).graph.input]
    return _extracted(graph, inputs, tensor)


def _extracted(graph: bytes, inputs: list[str], output: str) -> bytes:
    tool = onnx.utils.Extractor(shape_inference.infer_shapes(onnx.load_from_string(graph)))
    return bytes(tool.extract_model(inputs, [output]).SerializeToString())


def predictor(sites: tuple[str, ...]) -> tuple[bytes, bytes]:
    """The fused graph of a fit with S masks at ``sites``, every output; and that of its samples."""
    options = FitOptions(
        task="classification",
        method="mc_dropout",
        settings={"at": sites, "samples": SAMPLES, "rate": 0.2},
    )
    material = prepare(
        model(),
        normed.table("fresh", ROWS),
        options=options,
        columns=Columns(target="label"),
        cache_dir=cache_folder() / "features",
    )
    fitted, _, _ = fit_material(material, options)
    frozen = material.frozen
    fused = behind(fitted.head, frozen)
    assert frozen.phi is not None  # the samples are what the module has for features
    return fused.model, upto(frozen.model, frozen.phi)


def model() -> Path:
    """The network with batch normalisation as ONNX, its dropouts nodes of the graph."""

    def make(folder: Path) -> None:
        sample = normed.as_input(normed.rows("test")[0][:64])
        exported = export_torch(
            normed.fashion_batch(), (sample,), input_names=["image"], keep="dropout"
        )
        (folder / "model.onnx").write_bytes(exported.model)

    return cached(f"{normed.weights('batch').parent.name}-dropout", make) / "model.onnx"


def _measured(
    frozen: Frozen, fitted: Fitted, inputs: dict[str, Array], quick: bool, inner: int
) -> dict[str, float]:
    return measure(frozen, fitted, inputs, runs=7 if quick else 21, inner=inner)
