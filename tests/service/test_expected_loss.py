"""The expected loss in /metrics of real workers, against numpy on their answers and against the
head's own definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from calibration.bundle import STATE, Bundle, DenseRecord, FittedRecord, load_bundle
from calibration.predictor import Predictor
from hedged.demo.server import Server
from posthoc.contract import State, Task
from posthoc.ood import expected_loss
from service.expected_loss import LossScale, loss_scale
from tests.factory import rows, tiny_bundle, weights
from tests.service.helpers import poll
from tests.service.streams import Exposition

N, BATCH = 800, 40


@pytest.mark.parametrize(("task", "workers"), [("classification", 2), ("regression", 1)])
def test_the_mean_of_a_window_is_numpys_on_its_answers(
    task: Task, workers: int, tmp_path: Path
) -> None:
    folder = tiny_bundle(tmp_path / "bundle", task, ood="expected_loss")
    bundle, specs = load_bundle(folder), Predictor(folder).inputs
    x, _ = rows(task, N, 41)
    with Server(folder, tmp_path / "server", threads=1, workers=workers) as server:
        assert sums(server) == (0.0, 0.0)  # a series of 0 before the first row
        scores, window = [], (0.0, 0.0)
        for i in range(0, N, BATCH):
            if i == N // 2:
                window = poll(lambda: sums(server), lambda found: found[1] == N // 2)
            asked = server.infer("tiny", {"x": x[i : i + BATCH]}, specs, f"b{i}")
            scores.append(asked["ood_score"].astype(np.float64))
        total, n = poll(lambda: sums(server), lambda found: found[1] == N)
    scale = loss_scale(bundle.manifest)
    assert scale is not None
    losses = scale.mean + scale.scale * np.concatenate(scores)
    assert total / n == pytest.approx(losses.mean(), abs=1e-9)
    # Of the second half alone, as an increase over a window has it.
    later = (total - window[0]) / (n - window[1])
    assert later == pytest.approx(losses[N // 2 :].mean(), abs=1e-9)
    # They are the head's own losses, in its units.
    t = weights(task)
    phi = np.tanh(x @ t["w1"] + t["b1"])
    own = expected_loss.score(head_of(bundle), phi, phi @ t["w2"] + t["b2"])
    np.testing.assert_allclose(losses, own, rtol=1e-4, atol=1e-5)
    assert own.min() > 0


def sums(server: Server) -> tuple[float, float]:
    """The sum of expected losses over all workers, and the rows that were answered."""
    x = Exposition(server.request("/metrics").decode())
    told = {"model": "tiny", "version": "1"}
    rows_of = [
        x.total("uq_predictions_total", outcome=o, **told) for o in ("answered", "abstained")
    ]
    return x.total("uq_expected_loss_sum_total", **told), sum(rows_of)


def head_of(bundle: Bundle) -> State:
    """The loss head as it was fitted."""
    assert bundle.manifest.ood is not None
    tensors = bundle.tensors(STATE)
    found = {
        k.rsplit("/", 1)[1]: v for k, v in tensors.items() if k.startswith("ood/expected_loss")
    }
    return State(found, bundle.manifest.ood.score.settings["expected_loss"])


@pytest.mark.parametrize("name", ["gen", "expected_loss+gen", "rank:expected_loss"])
def test_of_other_scores_there_is_no_loss(classifier: Path, name: str) -> None:
    manifest = load_bundle(classifier).manifest
    assert manifest.ood is not None
    settings = {"expected_loss": {"mean": 0.5, "scale": 0.1}}
    score = FittedRecord(name=name, settings=settings)
    other = manifest.model_copy(update={"ood": manifest.ood.model_copy(update={"score": score})})
    assert loss_scale(other) is None
    assert loss_scale(manifest.model_copy(update={"ood": None})) is None
    alone = score.model_copy(update={"name": "expected_loss"})
    own = manifest.model_copy(update={"ood": manifest.ood.model_copy(update={"score": alone})})
    assert loss_scale(own) == LossScale(0.5, 0.1)
    assert (
        loss_scale(
            own.model_copy(update={"dense": DenseRecord(channels=1, spatial=(2,), pixels=3)})
        )
        is None
    )


def test_a_loss_is_never_below_nought() -> None:
    """float32 may leave the score of a certain row a hair under that of no loss."""
    scale = LossScale(0.5, 0.1)
    assert scale.total(np.full(3, -5.0000001, np.float32)) == 0
    assert scale.total(np.array([-4.0, 1.0], np.float32)) == pytest.approx(0.7)
