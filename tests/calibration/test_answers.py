"""Error bars for columns of what a model answered: the same as for the model itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hedged
from calibration.bundle import Bundle
from calibration.fit import fit
from calibration.fit_options import FitOptions
from calibration.material import Columns
from calibration.predictor import Predictor
from posthoc.contract import HedgedError, ModelError, Task
from tests.factory import CLASSES, COLUMNS, HIDDEN, frozen_model, rows, weights

LOGITS = [f"logit_{c}" for c in CLASSES]
FEATURES = [f"feature_{i}" for i in range(HIDDEN)]


def answered(task: Task, n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, outputs and labels, by the definition of the network."""
    t = weights(task)
    x, y = rows(task, n, seed)
    phi = np.tanh(x @ t["w1"] + t["b1"])
    return phi, (phi @ t["w2"] + t["b2"]).astype(np.float32), y


def table(path: Path, task: Task, n: int = 3000, seed: int = 1) -> Path:
    """Inputs of the network, what it makes of them, and a column that both splits go by."""
    x, y = rows(task, n, seed)
    phi, z, _ = answered(task, n, seed)
    names = LOGITS if task == "classification" else ["answer"]
    columns = {c: x[:, i] for i, c in enumerate(COLUMNS[task])}
    columns |= dict(zip(FEATURES, phi.T, strict=True)) | dict(zip(names, z.T, strict=True))
    columns |= {"all": pa.array(list(z)), "item": np.arange(n)}
    target = np.asarray(CLASSES)[y] if task == "classification" else y
    pq.write_table(pa.table({**columns, "target": target}), path)
    return path


@pytest.fixture(scope="module", params=["classification", "regression"])
def task(request: pytest.FixtureRequest) -> Task:
    return request.param


def fitted(folder: Path, task: Task, model: Path | None, inputs: dict[str, list[str]]) -> Bundle:
    columns = Columns(
        target="target",
        inputs=inputs,
        split_by="item",
        classes=CLASSES if task == "classification" else None,
    )
    name = "model" if model else "answers"
    asked = FitOptions(task=task, method="none", ood="mahalanobis", alphas=(0.1,))
    return fit(
        model, folder / "rows.parquet", folder / name, asked,
        columns=columns, cache_dir=folder / "cache",
    )  # fmt: skip


@pytest.fixture(scope="module")
def both(task: Task, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """The bundle of the model, and that of its answers on the same rows."""
    folder = tmp_path_factory.mktemp(task)
    table(folder / "rows.parquet", task)
    model = frozen_model(folder / "frozen.onnx", task, softmax=False)
    names = LOGITS if task == "classification" else ["answer"]
    return (
        fitted(folder, task, model, {"x": list(COLUMNS[task])}),
        fitted(folder, task, None, {"z": names, "phi": FEATURES}),
    )


def test_what_was_fitted_is_the_same(both: tuple[Bundle, Bundle]) -> None:
    of_model, of_answers = (b.manifest for b in both)
    assert of_answers.scaling == pytest.approx(of_model.scaling, rel=1e-4)
    for ours, theirs in zip(
        of_answers.conformal.guarantees, of_model.conformal.guarantees, strict=True
    ):
        assert ours.n == theirs.n and ours.threshold == pytest.approx(theirs.threshold, rel=1e-4)
    assert of_answers.name == "outputs" and of_answers.version == "1"
    assert {s.name for s in of_answers.inputs} == {"z", "phi"}
    assert {s.name for s in of_answers.outputs} == {s.name for s in of_model.outputs}


def test_what_is_served_is_the_same(both: tuple[Bundle, Bundle], task: Task) -> None:
    x, _ = rows(task, 500, 9)
    phi, z, _ = answered(task, 500, 9)
    of_model, of_answers = map(Predictor, both)
    want, got = of_model.run({"x": x}), of_answers.run({"z": z, "phi": phi})
    assert want.keys() == got.keys() and "ood_score" in got
    for name, value in want.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(got[name], value, rtol=2e-3, atol=2e-3, err_msg=name)
        else:
            assert np.mean(got[name] == value) > 0.995, name


def test_one_column_of_lists_and_probabilities_are_read_too(tmp_path: Path) -> None:
    source = table(tmp_path / "rows.parquet", "classification", 2000)
    z = np.asarray(pq.read_table(source)["all"].to_pylist())
    probs = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    whole = pq.read_table(source).append_column("probs", pa.array(list(probs)))
    pq.write_table(whole, source)
    options = {
        "task": "classification", "target": "target", "classes": list(CLASSES), "method": "none"
    }  # fmt: skip
    made = [
        hedged.fit(
            None, source, tmp_path / f"by-{column}", inputs={"z": [column]}, split_by="item",
            source={"cache_dir": tmp_path / "cache"}, **options,
        )
        for column in ("all", "probs")
    ]  # fmt: skip
    logits, probabilities = (
        hedged.load(b.path).run({"z": v}) for b, v in zip(made, (z, probs), strict=True)
    )
    for name in ("probs", "confidence"):
        np.testing.assert_allclose(probabilities[name], logits[name], atol=1e-4)
    assert made[1].manifest.frozen.file == "outputs"


@pytest.mark.parametrize(
    ("inputs", "source", "message"),
    [
        (None, {}, "give inputs 'z' and, of features, 'phi'"),
        ({"x": ["a"]}, {}, r"outputs fill 'z'.*there are x"),
        ({"phi": FEATURES}, {}, r"outputs fill 'z'.*there are phi"),
        ({"z": LOGITS}, {"output": "y"}, "leave output out"),
        ({"z": LOGITS}, {"trust_pickle": True}, "leave trust_pickle out"),
        ({"z": ["maps"]}, {}, r"'z' takes a vector of numbers a row, not shape \(2, 2\)"),
    ],
)
def test_what_is_no_answer_is_refused(
    inputs: dict[str, list[str]] | None, source: dict[str, object], message: str, tmp_path: Path
) -> None:
    file = table(tmp_path / "rows.parquet", "classification", 100)
    maps = pa.array([[[0.0, 1.0], [2.0, 3.0]]] * 100)
    pq.write_table(pq.read_table(file).append_column("maps", maps), file)
    with pytest.raises(ModelError, match=message):
        hedged.fit(
            None, file, tmp_path / "out", inputs=inputs, source=source,
            task="classification", target="target", method="none",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_module_that_needs_a_head_says_so(tmp_path: Path) -> None:
    file = table(tmp_path / "rows.parquet", "classification", 200)
    for method in ("laplace", "mc_dropout"):
        with pytest.raises(HedgedError, match=r"head|dropout"):
            hedged.fit(
                None, file, tmp_path / "out", inputs={"z": LOGITS, "phi": FEATURES},
                task="classification", target="target", classes=list(CLASSES), method=method,
            )  # fmt: skip
