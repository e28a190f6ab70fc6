"""``python -m bench dense``: modules on frozen networks whose output is a map.

For each set of `bench.dense_material` and each seeded split by photo, every method that applies
makes a bundle as ``hedged fit`` does, and the bundle is measured as ``hedged evaluate`` does, on
the images of test photos. The frozen model with one scale (classes: a temperature) fitted on the
same calibration images is the system to beat. Nothing is chosen on test images.

Beside the modules for image regression stand test-time augmentation and MC-dropout as users have
them (`bench.dense_peers`), with the figures that need no scale.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bench import dense_peers as peers
from bench.dense_material import INPUT, NAMES, DenseSet, load
from bench.heads import BASELINE, summarise
from bench.processes import each
from calibration import fit as fitting
from calibration.evaluate import evaluate
from calibration.evaluation.parts import HEDGED
from calibration.evaluation.records import Evaluation, Figure
from calibration.fit_options import FitOptions
from calibration.material import ROLES, Columns, Material, prepare, split
from calibration.network import at_network
from calibration.predictor import Predictor
from posthoc import registry
from posthoc.contract import Array, FitError, ModelError, Task
from posthoc.runtime import open_session

SPLITS, IMAGES = 3, 600
QUICK_SPLITS, QUICK_IMAGES = 1, 240
ALPHA = 0.1
SAMPLES = 8  # of a sampled network: the passes are what this benchmark spends its time on
STEPS, QUICK_STEPS = 600, 200  # of the cap of maps
ANNOTATIONS = "annotations"
FIGURES: dict[Task, tuple[str, ...]] = {
    "regression": ("nll", "uce", "pearson", "pearson_pooled", "ause", "ause_random"),
    "classification": ("nll", "debiased_ece", "class_ece", "accuracy", "ause", "ause_random"),
}


@dataclass(frozen=True, slots=True)
class Method:
    """A module and the model that it is fitted behind: an ONNX file, or module:function."""

    name: str
    model: str | Path
    settings: dict[str, Any] = field(default_factory=dict)


def run(quick: bool) -> dict[str, Any]:
    """One row a set and method: means over splits with their standard deviations, and the paired
    NLL difference to scaling alone."""
    splits, count = (QUICK_SPLITS, QUICK_IMAGES) if quick else (SPLITS, IMAGES)
    steps = QUICK_STEPS if quick else STEPS
    with TemporaryDirectory() as folder:
        sets = [sampled(load(name), count, Path(folder)) for name in NAMES]
        tasks = [(made, seed, steps) for seed in range(splits) for made in sets]
        records = [r for found in each(measure, tasks) for r in found]
    return {"splits": splits, "alpha": ALPHA, "samples": SAMPLES, **tables(sets, records)}


def tables(sets: list[DenseSet], records: list[dict[str, Any]]) -> dict[str, Any]:
    """``sets``, with the test images of a split (their mean over splits), and ``table``."""
    about = []
    for s in sets:
        tested = [r["images"] for r in records if (r["set"], r["module"]) == (s.name, BASELINE)]
        counts = {"images": s.images, "photos": s.photos, "test_images": float(np.mean(tested))}
        about.append({"set": s.name, "task": s.task, **counts})
    return {"sets": about, "table": summarise(records)}


def sampled(made: DenseSet, count: int, folder: Path) -> DenseSet:
    """The set with a table of at most so many of its images, drawn at random."""
    with np.load(made.table) as data:
        photo = data[made.group]
        rows = np.sort(np.random.default_rng(0).permutation(len(photo))[:count])
        table = folder / f"{made.name}.npz"
        np.savez(table, allow_pickle=False, **{k: v[rows] for k, v in data.items()})
    photos = len(np.unique(photo[rows]))
    return dataclasses.replace(made, table=table, images=len(rows), photos=photos)


def measure(made: DenseSet, seed: int, steps: int) -> list[dict[str, Any]]:
    """Every method on one split of one set, and the peers of an image regression; ``steps`` is
    for how long the cap of maps is trained."""
    found: list[dict[str, Any]] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        material = cached(made, made.model, _options(made, BASELINE, {}, seed), folder)
        for method in methods(made, material, steps):
            record: dict[str, Any] = {"set": made.name, "seed": seed, "module": method.name}
            try:
                record |= fitted(made, method, seed, material, folder)
            except (FitError, ModelError) as e:
                record["error"] = str(e)
            found.append(record)
        if made.task == "regression":
            x, y, _ = images(made, images_of(material, seed, "test"))
            error = y - frozen(made)(x)
            for peer, sigma in beside(made, x, seed).items():
                record = {"set": made.name, "seed": seed, "module": peer}
                found.append(record | peers.figures(error, sigma))
    base = next(r for r in found if r["module"] == BASELINE)
    for r in found:
        if "nll" in r:
            assert r["images"] == base["images"]
            r["nll_difference"] = r["nll"] - base["nll"]
    return found


def methods(made: DenseSet, material: Material, steps: int) -> list[Method]:
    """Scaling alone, the modules that work on the cached rows, and those inside the network."""
    have = {"labels"}
    if material.frozen.phi is not None:
        have.add("features")
    if material.linear is not None:
        have.add("linear_head")
    named = [BASELINE, *registry.applicable(registry.MODULES, made.task, have)]
    return [*(Method(n, made.model) for n in named), *network_methods(made, steps)]


def network_methods(made: DenseSet, steps: int) -> list[Method]:
    """What applies to the layers that the network has: its own dropout, or dropout before the last
    convolution but one; batch normalisations; for an image regression the cap of maps."""
    layers = [type(m).__name__ for m in network(made).modules()]
    samples = {"samples": SAMPLES}
    found = []
    if any(name.startswith("Dropout") for name in layers):
        found.append(Method("mc_dropout", made.factory, samples))
    else:
        place = {"at": last_but_one(made.model)}
        found.append(Method("mc_dropout", made.model, samples | place))
    if any(name.startswith("BatchNorm") for name in layers):
        found.append(Method("mc_batch_norm", made.factory, samples))
        if made.task == "classification":
            found.append(Method("abnn", made.factory, {"members": 2, "samples": SAMPLES // 2}))
    if made.task == "regression":
        found.append(Method("bayescap_image", made.model, {"steps": steps}))
    return found


def network(made: DenseSet) -> Any:
    """The frozen torch module of the set."""
    module, name = made.factory.split(":")
    return getattr(importlib.import_module(module), name)()


def last_but_one(model: Path) -> str:
    """Name of the tensor that the last convolution but one reads."""
    import onnx

    nodes = onnx.load(model).graph.node
    return str([n.input[0] for n in nodes if n.op_type == "Conv"][-2])


def fitted(
    made: DenseSet, method: Method, seed: int, material: Material, folder: Path
) -> dict[str, Any]:
    """Figures of one method: its bundle, written and evaluated on the table that it was fitted to,
    of which the evaluation keeps the images of test photos."""
    options = _options(made, method.name, method.settings, seed)
    started = time.perf_counter()
    if at_network(method.name):
        material = cached(made, method.model, options, folder)
    head, _, roles = fitting.fit_material(material, options)
    seconds = time.perf_counter() - started
    with TemporaryDirectory(dir=folder) as name:
        out = Path(name) / "bundle"
        predictor = Predictor(
            fitting.write(material, head, roles, out, options, made.table), threads=1
        )
        found = evaluate(predictor, made.table, threads=1)
        record = figures(found) | {"seconds": seconds, "strength": head.scaling.strength}
        if own_answer(method.name, made.task) or method.name == BASELINE:
            record |= _spread_of_annotators(made, predictor, folder)
    return record


def figures(found: Evaluation) -> dict[str, float]:
    """The figures of the table; NaN where there is none."""
    metrics = _hedged(found)
    record = {k: metrics[k].value if k in metrics else float("nan") for k in FIGURES[found.task]}
    (level,) = found.levels
    assert level.images is not None
    return record | {"uncovered": level.images.mean.value, "images": found.n}


def own_answer(method: str, task: Task) -> bool:
    """Whether the module's answer has to stand in place of the frozen model's."""
    if method == BASELINE:
        return False
    info = registry.info(method)
    return task in info.tasks and not (info.preserves or info.either)


def cached(made: DenseSet, model: str | Path, options: FitOptions, folder: Path) -> Material:
    """The model opened with the rows of the set's table."""
    # The input of a torch factory is called as the argument of its forward.
    inputs = made.inputs if isinstance(model, Path) else {"x": [INPUT]}
    columns = Columns(made.target, inputs, split_by=made.group, classes=None)
    return prepare(
        model,
        made.table,
        options=options,
        columns=columns,
        cache_dir=folder / "features",
        threads=1,
    )


def images_of(material: Material, seed: int, role: str) -> Array:
    """Places in the table of the images whose photos have a role, ascending."""
    mine = split(material, seed) == ROLES.index(role)
    return np.asarray(material.usable[mine][:: material.per] // material.per)


def images(made: DenseSet, rows: Array) -> tuple[Array, Array, Array]:
    """Inputs (float32), targets and photos of some images of the table."""
    with np.load(made.table) as data:
        x, y, photo = (data[name][rows] for name in (INPUT, made.target, made.group))
    return x.astype(np.float32), y, photo


def frozen(made: DenseSet, threads: int = 1) -> Callable[[Array], Array]:
    """The frozen outputs of images, a few at a time."""
    session = open_session(made.model, threads=threads)

    def predict(x: Array) -> Array:
        starts = range(0, len(x), peers.BATCH)
        parts = [session.run(None, {INPUT: x[i : i + peers.BATCH]})[0] for i in starts]
        return np.concatenate(parts)

    return predict


def beside(made: DenseSet, x: Array, seed: int) -> dict[str, Array]:
    """What the peers say of images, by name: their standard deviations."""
    net = network(made)
    layer = [m for m in net.modules() if type(m).__name__ == "Conv2d"][-2]
    return {
        "test-time augmentation": peers.augmented(frozen(made), x),
        "dropout left on": peers.dropped(net, layer, x, samples=SAMPLES, seed=seed),
    }


def _options(made: DenseSet, method: str, settings: dict[str, Any], seed: int) -> FitOptions:
    return FitOptions(
        task=made.task,
        method=method,
        settings=settings,
        prediction="module" if own_answer(method, made.task) else "frozen",
        alphas=(ALPHA,),
        ood="none",
        max_error=None,
        seed=seed,
    )


def _spread_of_annotators(made: DenseSet, predictor: Predictor, folder: Path) -> dict[str, float]:
    """GED² of the label maps to those of all annotators, where the table has any."""
    with np.load(made.table) as data:
        if ANNOTATIONS not in data:
            return {}
        table = folder / "annotated.npz"
        if not table.exists():
            columns = {INPUT: data[INPUT], made.group: data[made.group]}
            np.savez(table, allow_pickle=False, **columns, **{made.target: data[ANNOTATIONS]})
    return {"ged": _hedged(evaluate(predictor, table, threads=1))["ged"].value}


def _hedged(found: Evaluation) -> dict[str, Figure]:
    return next(s.metrics for s in found.systems if s.name == HEDGED)
