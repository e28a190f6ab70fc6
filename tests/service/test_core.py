"""The core where a model, a client or the ledger lets it down."""

from __future__ import annotations

import asyncio
import dataclasses
import threading

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from service import friendly, instruments
from service.core import Core
from service.errors import ServiceError
from service.later import Later
from service.models import load_model
from service.settings import Settings
from tests.factory import rows
from tests.service.ledger.helpers import metric


class Notebook:
    """A ledger that keeps what it is told, or fails."""

    def __init__(self, fails=False):
        self.fails, self.calls, self.groups = fails, [], []

    def record(self, *call, group=None):
        if self.fails:
            raise OSError("disk full")
        self.calls.append(call)
        self.groups.append(group)

    def calibration(self, model):
        return {"models": [model]}


class Detour:
    """A real predictor whose ``answer`` goes somewhere else first."""

    def __init__(self, predictor, before):
        self._predictor, self._before = predictor, before

    def __getattr__(self, name):
        return getattr(self._predictor, name)

    def answer(self, inputs, outputs):
        return self._before(inputs) or self._predictor.answer(inputs, outputs)


@pytest.fixture(scope="module")
def model(classifier):
    return load_model(classifier, device="cpu", threads=1)


@pytest.fixture(scope="module")
def x():
    return rows("classification", 6, 2)[0]


def predict(model, x, *, before=None, ledger=None, **options):
    async def main():
        served = model
        if before is not None:
            served = dataclasses.replace(model, predictor=Detour(model.predictor, before))
        core = Core(Settings(), {"tiny": served}, ledger or Notebook())
        try:
            return await core.predict(served, {"x": x}, **options)
        finally:
            await core.close()

    return asyncio.run(main())


def test_what_is_recorded(model, x):
    ledger = Notebook()
    answer = predict(model, x, ledger=ledger, id="r", outputs=["label"])
    ((name, version, identity, ids, fields, level),) = ledger.calls
    assert (name, version, identity, level) == ("tiny", "1", model.identity, "0.9")
    assert ids == answer.ids == [f"r:{k}" for k in range(6)]
    assert list(answer.fields) == ["label"] and ledger.groups == [None]
    assert set(fields) == set(model.fields)  # the frozen outputs are not kept


def test_rows_of_several_levels_are_recorded_apart(model, x):
    ledger = Notebook()
    alphas = [0.1, 0.05, 0.2, 0.21, 0.05, 0.22]
    predict(model, x, ledger=ledger, alpha=alphas, id="r")
    found = {call[5]: call[3] for call in ledger.calls}
    # 0.2 and those after it are no levels of the bundle: they are kept without one, and together,
    # so that they make no metric series and cost no more than one more level.
    assert found == {"0.9": ["r:0"], "0.95": ["r:1", "r:4"], None: ["r:2", "r:3", "r:5"]}
    assert len(ledger.calls) == 3
    by_call = {call[5]: call[4]["set_size"] for call in ledger.calls}
    whole = predict(model, x, alpha=alphas).fields["set_size"]
    np.testing.assert_array_equal(by_call[None], whole[[2, 3, 5]])


def test_a_ledger_that_fails_fails_nobody(model, x, caplog):
    answer = predict(model, x, ledger=Notebook(fails=True))
    assert len(answer.ids) == 6
    assert "disk full" in caplog.text


@pytest.mark.parametrize("laid", [np.asfortranarray, lambda x: np.repeat(x, 2, axis=1)[:, ::2]])
def test_how_values_lie_in_memory_changes_nothing(model, x, laid):
    odd = laid(x)
    assert not odd.flags.c_contiguous
    want, got = predict(model, x), predict(model, odd)
    for name, value in want.fields.items():
        np.testing.assert_array_equal(got.fields[name], value, err_msg=name)


def gather_out_of_bounds(inputs):
    """What ONNX Runtime itself raises for an index that a row may hold and the model may not."""
    if (inputs["x"][:, 0] > 1e6).any():
        node = helper.make_node("Gather", ["table", "index"], ["y"])
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            [node],
            "g",
            [info("table", TensorProto.FLOAT, [2]), info("index", TensorProto.INT64, [1])],
            [info("y", TensorProto.FLOAT, [1])],
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        session = ort.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        session.run(None, {"table": np.zeros(2, np.float32), "index": np.array([7])})


def test_a_row_that_the_model_refuses_is_the_clients(model, x):
    bad = x.copy()
    bad[4, 0] = 1e7
    with pytest.raises(ServiceError, match=r"row 4 cannot be computed.*out of data bounds") as e:
        predict(model, bad, before=gather_out_of_bounds)
    assert e.value.status == 400


def test_a_model_that_breaks_is_ours_and_says_little(model, x, caplog):
    def broken(_inputs):
        raise RuntimeError("a secret of the inside")

    with pytest.raises(ServiceError, match="failed on row 0") as e:
        predict(model, x, before=broken)
    assert e.value.status == 500
    assert "secret" not in e.value.message
    assert "secret" in caplog.text


def test_no_nan_leaves(model, x):
    marked = np.where(np.arange(6)[:, None] == 3, np.float32(77), x)

    def poisoned(inputs):
        fields = model.predictor.run(inputs)
        odd = inputs["x"][:, 0] == 77
        fields["confidence"] = np.where(odd, np.nan, fields["confidence"])
        return fields

    with pytest.raises(ServiceError, match="row 3: the model's confidence is not finite") as e:
        predict(model, marked, before=poisoned)
    assert e.value.status == 422


def test_work_of_a_client_that_left_is_not_computed(model, x):
    begun, go = threading.Event(), threading.Event()
    computed = []

    def slow(inputs):
        computed.append(len(inputs["x"]))
        begun.set()
        assert go.wait(30)

    async def main():
        served = dataclasses.replace(model, predictor=Detour(model.predictor, slow))
        ledger = Notebook()
        core = Core(Settings(), {"tiny": served}, ledger, Later(seconds=3600))
        first = asyncio.ensure_future(core.predict(served, {"x": x[:1]}))
        await asyncio.sleep(0)  # it joins the queue
        await asyncio.to_thread(begun.wait, 30)
        left = asyncio.Event()
        second = asyncio.ensure_future(core.predict(served, {"x": x[:2]}, disconnected=left.wait))
        third = asyncio.ensure_future(core.predict(served, {"x": x[:3]}))
        await asyncio.sleep(0)
        left.set()
        with pytest.raises(ServiceError) as gone:
            await second
        assert gone.value.status == 499
        go.set()
        await first
        await third
        assert computed == [1, 3]
        await core.close()
        assert [len(call[3]) for call in ledger.calls] == [4]

    asyncio.run(main())


def rejected():
    return metric("uq_predictions_total", model="counted", version="1", outcome="rejected")


def test_rows_that_get_no_answer_are_counted(model, x):
    served = dataclasses.replace(model, name="counted")
    instruments.register_model("counted", "1", "a" * 64, "x", ["0.9"], "classification")
    begun, go = threading.Event(), threading.Event()

    def slow(_inputs):
        begun.set()
        assert go.wait(30)

    async def refused(core, model, x, status):
        before = rejected()
        with pytest.raises(ServiceError) as e:
            await core.predict(model, {"x": x})
        assert e.value.status == status
        return rejected() - before

    async def main():
        late = dataclasses.replace(served, predictor=Detour(model.predictor, slow))
        core = Core(Settings(max_queue_rows=5, request_timeout_s=0.05), {}, Notebook())
        nan = np.where(np.arange(6)[:, None] == 3, np.nan, x)
        assert await refused(core, served, nan, 400) == 6
        first = asyncio.ensure_future(refused(core, late, x[:2], 504))
        await asyncio.sleep(0)
        await asyncio.to_thread(begun.wait, 30)
        assert await refused(core, served, x, 503) == 6  # more than may wait
        assert await first in (2, 8)  # the refusal above lies within its own time
        go.set()
        await core.close()

    asyncio.run(main())
    before = rejected()
    table = [{"a": 1, "b": 1, "c": 1, "d": None}, {"a": 1, "b": 1, "c": 1, "d": 1}]
    for request in ({"rows": table}, {"inputs": {"x": [[1, 2], [1]]}}):
        with pytest.raises(ServiceError):
            friendly.read_predict(request, served)
    assert rejected() == before + 4


def test_one_scan_of_the_ledger_serves_everybody_and_holds_up_nobody(model):
    go = threading.Event()

    class Slow(Notebook):
        def calibration(self, model):
            self.calls.append(model)
            assert go.wait(30)
            return {"models": []}

    async def main():
        ledger = Slow()
        core = Core(Settings(), {"tiny": model}, ledger)
        asked = [asyncio.ensure_future(core.calibration.get(None)) for _ in range(100)]
        # Metrics and labels run in the default threads, which must all be free.
        assert await asyncio.gather(*(asyncio.to_thread(lambda: 1) for _ in range(9))) == [1] * 9
        go.set()
        assert await asyncio.gather(*asked) == [{"models": []}] * 100
        assert ledger.calls == [None]
        await core.close()

    asyncio.run(main())
