"""Bundles of models of maps: every field is a map of what its pixels alone would get, and the
promise is about images."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto

from calibration.bundle import HEAD, Bundle
from calibration.conformal.risk import image_losses
from calibration.fit import fit, fit_material
from calibration.fit_head import fit_head
from calibration.fit_options import FitOptions, Parts
from calibration.fit_thresholds import run_head
from calibration.material import ROLES, Columns, parts_of, prepare, split
from calibration.predictor import Predictor
from posthoc.contract import DataError, Features, FitError, Task
from posthoc.data import Rows
from posthoc.logits import to_logits
from posthoc.pixels import Layout, sampled
from tests.posthoc.dense_nets import BODY, CONV, LAST_BODY, dense_model, images, looped, node

H, W, PER = 6, 7, 12
ONE = {"one": np.array([1]), "flat": np.array([0, 4, -1])}
TURN = node("Transpose", ["z"], ["t"], perm=[0, 2, 3, 1])


@dataclass(frozen=True)
class Net:
    """A network, its classes or outputs, where the fields' channels are (None: in axis 1), and the
    shape of its output."""

    nodes: list[Any]
    classes: int
    task: Task
    channels: int | None
    method: str = "laplace"
    how: dict[str, Any] = field(default_factory=dict)
    flat: bool = False


NETS = {
    "N×C×H×W": Net([*BODY, *CONV, node("Softmax", ["z"], ["y"], axis=1)], 4, "classification", 1),
    "N×H×W×C": Net([*LAST_BODY, *CONV, TURN, node("Softmax", ["t"], ["y"], axis=-1)],
                   4, "classification", -1, how={"last": True}),
    "labels": Net([*BODY, *CONV, node("ArgMax", ["z"], ["y"], axis=1, keepdims=0)],
                  4, "classification", None, how={"types": {"y": TensorProto.INT64}}),
    "labels, axis kept": Net([*BODY, *CONV, node("ArgMax", ["z"], ["y"], axis=1, keepdims=1)],
                             4, "classification", 1, how={"types": {"y": TensorProto.INT64}}),
    "N×C×(HW)": Net([*BODY, *CONV, node("Softmax", ["z"], ["r"], axis=1),
                     node("Reshape", ["r", "flat"], ["y"])], 4, "classification", 1, flat=True),
    "one sigmoid": Net([*BODY, *CONV, node("Sigmoid", ["z"], ["y"])], 1, "classification", 1),
    "one sigmoid, no axis": Net(
        [*BODY, *CONV, node("Squeeze", ["z", "one"], ["q"]), node("Sigmoid", ["q"], ["y"])],
        1, "classification", None),
    "a black box": Net(
        [*LAST_BODY, *CONV, TURN, node("Tanh", ["t"], ["u"]), node("Softmax", ["u"], ["y"])],
        4, "classification", -1, method="none", how={"last": True}),
    "half precision": Net([*BODY, *CONV, node("Identity", ["z"], ["y"])], 4, "classification", 1,
                          how={"dtype": TensorProto.FLOAT16}),
    "values": Net([*BODY, *CONV, node("Squeeze", ["z", "one"], ["y"])], 1, "regression", None),
    "values N×1×H×W": Net([*BODY, *CONV, node("Identity", ["z"], ["y"])], 1, "regression", 1),
    "three values": Net([*BODY, *CONV, node("Identity", ["z"], ["y"])], 3, "regression", 1),
    "three values, last": Net([*LAST_BODY, *CONV, TURN, node("Identity", ["t"], ["y"])],
                              3, "regression", -1, how={"last": True}),
}  # fmt: skip


def targets(net: Net, z: np.ndarray, seed: int = 3) -> np.ndarray:
    """Labels drawn at a temperature, some missing; values with noise, some missing. z N×H×W×C."""
    rng = np.random.default_rng(seed)
    missing = rng.random(z.shape[:3]) < 0.2
    if net.task == "regression":
        y = z + 0.4 * rng.normal(size=z.shape)
        y[missing] = np.nan
        if net.channels is None:
            return y[..., 0]
        return y if net.channels == -1 else np.moveaxis(y, -1, 1)
    if net.classes == 1:
        z = np.concatenate([np.zeros_like(z), z], -1)
    y = (z / 2 + rng.gumbel(size=z.shape)).argmax(-1)
    y[missing] = -1
    return y.reshape(len(y), -1) if net.flat else y


def fitted(folder: Path, net: Net, n: int = 160, size: Any = ("H", "W"), **how: Any) -> Bundle:
    model = dense_model(net.nodes, classes=net.classes, size=size, extra=ONE, **net.how)
    (folder / "m.onnx").write_bytes(model)
    x = images(n, H, W)
    given = np.moveaxis(x, 1, -1) if net.how.get("last") else x
    y = targets(net, looped(x, net.classes)[1])
    np.savez(folder / "t.npz", x=given, y=y, group=how.pop("group", np.arange(n)))
    options = {"task": net.task, "method": net.method, "alphas": (0.2, 0.1),
               **({"tolerance": 1.0} if net.task == "regression" else {})}  # fmt: skip
    columns = Columns(target="y", inputs={"x": ["x"]}, split_by=how.pop("split_by", None))
    return fit(
        folder / "m.onnx",
        folder / "t.npz",
        folder / "b",
        FitOptions(**{**options, **how.pop("options", {})}),
        columns=columns,
        cache_dir=folder / "cache",
        pixels=PER,
        **how,
    )


def by_place(value: np.ndarray, net: Net, shape: tuple[int, ...]) -> np.ndarray:
    """A field's map as N×(HW)×its axes, channels read where they should be."""
    single = net.channels is None and net.task == "regression"  # one value, and no axis for it
    if len(shape) > 2 and net.channels != -1 and not single:
        value = np.moveaxis(value, 1, 2 - len(shape))
    return value.reshape(len(value), H * W, *shape[2:])


@pytest.mark.parametrize("size", [("H", "W"), (H, W)], ids=["free", "fixed"])
@pytest.mark.parametrize("name", NETS)
def test_every_field_is_a_map_of_what_its_pixels_get_alone(
    name: str, size: Any, tmp_path: Path
) -> None:
    net = NETS[name]
    bundle = fitted(tmp_path, net, size=size)
    predictor = Predictor(bundle)
    predictor.self_check()
    record = bundle.manifest.dense
    assert record is not None and record.pixels == PER and record.channels == net.channels
    x = images(5, H, W, seed=9)
    half = net.how.get("dtype") == TensorProto.FLOAT16
    given = np.moveaxis(x, 1, -1) if net.how.get("last") else x
    feed = {"x": given.astype(np.float16 if half else np.float32)}
    phi, z = looped(x, net.classes)
    if name == "a black box":
        z = np.tanh(z)
    link = "sigmoid" if net.classes == 1 and net.task == "classification" else "identity"
    phi, z = phi.reshape(-1, phi.shape[-1]), to_logits(z.reshape(-1, z.shape[-1]), link)  # type: ignore[arg-type]
    head = ort.InferenceSession(bundle.files[HEAD], providers=["CPUExecutionProvider"])
    rows = {"phi": phi.astype(np.float32), "z": z.astype(np.float32)}
    rows = {i.name: rows[i.name] for i in head.get_inputs() if i.name in rows}
    names = list(predictor.fields)
    levels = np.float32([0.3, 0.5, 0.7, 0.9, 2.0])
    tolerance = 2e-2 if half else 2e-4  # the features are float64 here
    for q in (None, levels):
        got = predictor.run(feed, q_hat=q)
        level = {} if q is None else {"q_hat": q.repeat(H * W)}
        want = dict(zip(names, head.run(names, rows | level), strict=True))
        for key, value in got.items():
            spec = next(s for s in bundle.manifest.outputs if s.name == key)
            fits = [d in (-1, v) for d, v in zip(spec.shape, value.shape, strict=True)]
            assert all(fits) and value.dtype == spec.dtype
            if size == (H, W):
                assert spec.shape[1:] == value.shape[1:]
            exact = want[key].reshape(5, H * W, *want[key].shape[1:])
            made = by_place(value, net, exact.shape)
            assert made.shape == exact.shape
            if exact.dtype.kind in "bi":  # a score may lie at its threshold
                assert (made == exact).mean() > (0.97 if half else 0.998), key
            elif key != "ood_pvalue":
                np.testing.assert_allclose(made, exact, rtol=tolerance, atol=tolerance, err_msg=key)
        for images_ in (slice(0, 1), slice(1, 5)):  # batches
            part = predictor.run({"x": feed["x"][images_]}, q_hat=None if q is None else q[images_])
            for key, value in part.items():
                if value.dtype.kind == "f" and key != "ood_pvalue":
                    np.testing.assert_allclose(
                        value, got[key][images_], rtol=tolerance, atol=tolerance
                    )
    alone = ort.InferenceSession(
        (tmp_path / "m.onnx").read_bytes(), providers=["CPUExecutionProvider"]
    )
    (own,) = predictor.run(feed, outputs=["y"]).values()
    np.testing.assert_array_equal(own, alone.run(["y"], feed)[0])


def test_labels_and_means_lie_where_the_loop_says(tmp_path: Path) -> None:
    """One pixel, by hand."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    x = images(2, H, W, seed=4)
    label = Predictor(fitted(tmp_path / "a", NETS["N×C×H×W"])).run({"x": x}, outputs=["label"])
    z = looped(x, 4)[1]
    mean = Predictor(fitted(tmp_path / "b", NETS["three values"])).run({"x": x}, outputs=["mean"])
    values = looped(x, 3)[1]
    for i, r, c in ((0, 0, 6), (1, 5, 0), (1, 2, 3)):
        assert label["label"][i, r, c] == z[i, r, c].argmax()
        np.testing.assert_allclose(mean["mean"][i, :, r, c], values[i, r, c], atol=1e-5)


@pytest.mark.parametrize("name", ["N×C×H×W", "three values"])
def test_levels_are_those_of_the_promise(name: str, tmp_path: Path) -> None:
    """The threshold of any level: the smallest at which the mean share of uncovered pixels of the
    conformal images, one more image counted as all uncovered, is within the level."""
    net = NETS[name]
    bundle = fitted(tmp_path, net)
    predictor = Predictor(bundle)
    key = "set" if net.task == "classification" else "interval"
    scores = bundle.conformal_scores[key]
    n = bundle.manifest.conformal.guarantees[0].n
    assert scores.shape == (n, PER) and scores.dtype == np.float32
    assert n == bundle.manifest.splits.rows["conformal"]
    for alpha in (0.2, 0.1, 0.3, 0.15):
        q = predictor.q_hat(alpha)
        found = [t for t in np.unique(scores) if (scores > t).mean(1).sum() + 1 <= alpha * (n + 1)]
        assert q == min(found)
        assert image_losses(scores, q).mean() * n + 1 <= alpha * (n + 1)
    assert [g.kind for g in bundle.manifest.conformal.guarantees] == ["risk", "risk"]
    with pytest.raises(DataError, match=f"needs at least 199 conformal images and .* {n}"):
        predictor.q_hat(0.005)


def test_too_few_images_are_said_to_be_too_few(tmp_path: Path) -> None:
    """Not pixels: 40 images have thousands of them."""
    net = NETS["values"]
    with pytest.raises(FitError, match="needs at least 99 conformal images; there are"):
        fitted(tmp_path, net, n=40, options={"alphas": (0.01,)})


# ---- the unit is the image


@pytest.mark.parametrize("by", [None, "group"])
def test_the_conformal_part_is_one_image_of_each_group(by: str | None, tmp_path: Path) -> None:
    net, n = NETS["N×C×H×W"], 160
    group = np.repeat(np.arange(n // 4), 4)
    bundle = fitted(tmp_path, net, n=n, split_by=by, group=group)
    options = FitOptions(task="classification", alphas=(0.2,))
    columns = Columns(target="y", inputs={"x": ["x"]}, split_by=by)
    material = prepare(
        tmp_path / "m.onnx", tmp_path / "t.npz", options=options, columns=columns,
        cache_dir=tmp_path / "cache", pixels=PER,
    )  # fmt: skip
    roles = split(material, 0)
    # All pixels of an image, and all images of a group, have one role.
    of_image = roles.reshape(n, PER)
    assert (of_image == of_image[:, :1]).all()
    owner = group if by else np.arange(n)
    for item in np.unique(owner):
        assert len(np.unique(of_image[owner == item])) == 1
    parts, test = parts_of(material, roles)
    items = len(np.unique(owner[of_image[:, 0] == ROLES.index("conformal")]))
    assert len(parts.conformal) == items * PER and parts.per == PER
    assert bundle.manifest.conformal.guarantees[0].n == items
    images_of = {}
    assert material.cache.pixels is not None
    for i in range(n):  # which image a block of conformal rows is
        rows = material.features(np.arange(i * PER, (i + 1) * PER))
        images_of[rows.z.tobytes()] = i
    chosen = [
        images_of[parts.conformal.z[k : k + PER].tobytes()]
        for k in range(0, len(parts.conformal), PER)
    ]
    assert len(set(owner[chosen].tolist())) == items
    others = sum(len(p) for p in (parts.module, parts.calibration, test))
    assert others == (of_image[:, 0] != ROLES.index("conformal")).sum() * PER
    done, _, _ = fit_material(material, options)
    assert done.ood is not None and done.abstain is not None
    assert done.abstain.n == items and len(done.scores["ood"]) == items


def difficult(n: int, task: Task, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Outputs N×C×8×8 and targets of images of which some are easy and some next to noise."""
    hard = rng.beta(0.3, 0.3, (n, 1, 1, 1))
    if task == "classification":
        z = 3 * rng.normal(size=(n, 3, 8, 8))
        y = (z / (1 + 8 * hard) + rng.gumbel(size=z.shape)).argmax(1)
        y[rng.random(y.shape) < rng.choice([0, 0.5, 0.97], (n, 1, 1))] = -1  # differs by image
        y[:, 0, 0] = np.maximum(y[:, 0, 0], 0)
        return z.astype(np.float32), y
    z = rng.normal(size=(n, 1, 8, 8))
    return z.astype(np.float32), z + (0.1 + 3 * hard) * rng.normal(size=z.shape)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_mean_share_of_uncovered_pixels_is_controlled(task: Task) -> None:
    """Over 120 splits the mean over all labelled pixels of new images is within the level, though
    few are drawn of each, and within the 2/(n+1) that the theorem leaves below it."""
    levels, n, layout = (0.1, 0.2), 40, Layout(1, 1, (8, 8))
    options = FitOptions(task=task, method="none", ood="none", max_error=None, alphas=levels)
    shares: dict[float, list[float]] = {a: [] for a in levels}
    for seed in range(120):
        rng = np.random.default_rng(seed)
        parts = []
        for count in (12, 12, n):
            z, y = difficult(count, task, rng)
            keys = rng.integers(0, 2**63, count).astype(np.uint64)
            given = Rows({}, y, {}, None, None, keys, keys)
            rows, values, _ = sampled(given, {"z": z}, layout, task, 8)
            parts.append(Features(None, values["z"], rows.y))
        done = fit_head(None, Parts(*parts, per=8), options)
        z, y = difficult(60, task, rng)
        flat = np.moveaxis(z, 1, -1).reshape(60 * 64, -1)
        out = run_head(done.head, Features(None, flat))
        if task == "classification":
            labels = y.ravel()
            score = out["set_scores"][np.arange(len(labels)), np.maximum(labels, 0)]
        else:
            labels = np.zeros(len(flat))
            error = np.abs(np.moveaxis(y, 1, -1).reshape(flat.shape) - out["mean"])
            score = (error / out["std"]).max(1)
        known = (labels >= 0).reshape(60, 64)
        for promise in done.conformal.guarantees:
            assert promise.n == n and promise.kind == "risk" and promise.threshold is not None
            outside = (score > promise.threshold).reshape(60, 64) & known
            shares[promise.alpha].append(float((outside.sum(1) / known.sum(1)).mean()))
    for alpha, found in shares.items():
        error = np.std(found, ddof=1) / np.sqrt(len(found))
        assert np.mean(found) <= alpha + 3 * error
        assert np.mean(found) >= alpha - 2 / (n + 1) - 3 * error
