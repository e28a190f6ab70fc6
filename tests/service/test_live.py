"""The watcher of a root, looked over one look at a time: what it takes up, refuses and keeps."""

from __future__ import annotations

import asyncio
import shutil

import numpy as np
import pytest

from calibration.bundle import ConformalRecord, Guarantee
from calibration.predictor import Predictor
from service import instruments
from service.bundles import write_active
from service.core import Core
from service.ledger import Ledger
from service.live import Watcher, announce, conformal_rows, open_models
from service.settings import Settings
from tests.factory import rows, version_of
from tests.service.streams import Exposition

X = rows("classification", 20, 3)[0]


@pytest.fixture
def watched(versions, tmp_path):
    """A root, and a core over it whose watcher looks when the test says so."""
    opened = []

    def make(name):
        where = versions(name)
        settings = Settings(bundles=where, data_dir=tmp_path)
        ledger = Ledger.open(settings.ledger_url)
        opened.append(ledger)
        models = open_models(where, device="cpu", threads=1).models
        for model in models.values():
            announce(model, ledger)
        core = Core(settings, models, ledger)
        return where, core, Watcher(core)

    yield make
    for ledger in opened:
        ledger.close()


def swaps(name):
    x = Exposition(instruments.render().decode())
    return tuple(
        x.total("uq_swaps_total", model=name, result=result) for result in ("ok", "failed")
    )


def test_what_was_begun_ends_on_the_version_it_began_with(watched):
    name = "begun"
    where, core, watcher = watched(name)
    old = core.model(name)
    want = {v: Predictor(where / name / v).run({"x": X})["probs"] for v in ("1", "2")}

    async def run():
        begun = [asyncio.create_task(core.predict(old, {"x": X[i : i + 1]})) for i in range(20)]
        await asyncio.sleep(0)
        write_active(where / name, "2")
        await asyncio.to_thread(watcher.step)
        later = [
            asyncio.create_task(core.predict(core.model(name), {"x": X[i : i + 1]}))
            for i in range(20)
        ]
        return await asyncio.gather(*begun), await asyncio.gather(*later)

    try:
        begun, later = asyncio.run(run())
    finally:
        asyncio.run(core.close())
    for version, answers in (("1", begun), ("2", later)):
        assert {answer.model.version for answer in answers} == {version}
        got = np.concatenate([answer.fields["probs"] for answer in answers])
        np.testing.assert_allclose(got, want[version][:20], atol=1e-5)


def test_conformal_rows_are_what_they_are_worth():
    promise = Guarantee(alpha=0.1, n=500, rank=451, threshold=1.0, n_needed=9)
    record = ConformalRecord(method="lac", guarantees=(promise,))
    assert conformal_rows(record) == 500
    weights = {"effective_rows": 61.25, "production_rows": 2000.0}
    weighted = record.model_copy(update={"shift": "covariate", "weights": weights})
    assert conformal_rows(weighted) == 61.25


def damaged(where, name):
    version_of(where / name / "2", where, name, "bad")
    (where / name / "bad" / "head.onnx").write_bytes(b"changed")


def lying(where, name):
    version_of(where / name / "2", where, name, "bad", golden=False)


def misplaced(where, name):
    shutil.copytree(where / name / "2", where / name / "bad")


def missing(where, name):
    pass


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (damaged, "{name}/bad: head.onnx was changed"),
        (lying, "{name}/bad: golden rows do not reproduce"),
        (misplaced, "{name}/bad is version '2' of '{name}'; rename the folder to that"),
        (missing, "names version 'bad'; there are 1, 2"),
        ("[1]", 'must be {{"version": "…"}}'),
        ('{"version"', 'must be {{"version": "…"}}'),
    ],
    ids=["damaged", "lying", "misplaced", "missing", "list", "half"],
)
def test_what_fails_its_check_is_refused_and_tried_again_when_its_files_change(
    watched, make, says, request, caplog
):
    name = f"refused-{request.node.callspec.id}"
    where, core, watcher = watched(name)
    serving, says = core.model(name), says.format(name=name)
    watcher.step()
    if callable(make):
        make(where, name)
        write_active(where / name, "bad")
    else:
        (where / name / "active.json").write_text(make)
    for _ in range(3):  # said and counted once
        watcher.step()
        assert core.model(name) is serving
        assert says in core.swap_errors[name]
        assert str(where) not in core.swap_errors[name]
        assert swaps(name) == (0, 1)
    assert [r for r in caplog.records if says in r.message and "version 1 stays" in r.message]
    assert len(caplog.records) == 1
    # Mended in place, or as a new version.
    if make is damaged:
        shutil.copy(where / name / "2" / "head.onnx", where / name / "bad" / "head.onnx")
    elif make is missing:
        version_of(where / name / "2", where, name, "bad")
    else:
        write_active(where / name, "2")
    watcher.step()
    assert core.model(name).version in ("2", "bad")
    assert core.swap_errors == {}
    assert swaps(name) == (1, 1)


def test_a_refused_version_that_is_taken_back_is_forgotten(watched):
    where, core, watcher = watched("back")
    serving = core.model("back")
    write_active(where / "back", "9")
    watcher.step()
    assert "back" in core.swap_errors
    write_active(where / "back", "1")
    watcher.step()
    assert core.swap_errors == {}
    assert core.model("back") is serving
    assert swaps("back") == (0, 1)


def test_what_is_gone_from_disk_stays_and_what_is_new_is_served(watched, classifier, caplog):
    where, core, watcher = watched("stays")
    watcher.step()
    version_of(classifier, where, "fresh", "7")  # the only version is live
    (where / "empty").mkdir()
    watcher.step()
    assert {n: m.version for n, m in core.models.items()} == {"stays": "1", "fresh": "7"}
    assert swaps("fresh") == (1, 0)
    before = dict(core.models)
    # A second version without active.json asks for nothing: what is served stays.
    version_of(classifier, where, "fresh", "8")
    shutil.rmtree(where / "stays")
    for _ in range(2):
        watcher.step()
    where.rename(where.with_name("away"))
    for _ in range(2):
        watcher.step()
    assert core.models == before
    assert (swaps("stays"), swaps("fresh")) == ((0, 0), (1, 0))
    said = [r.message for r in caplog.records]
    assert sum("stays: its folder is gone" in m for m in said) == 1
    assert sum("fresh: the root cannot be read" in m for m in said) == 1
    assert sum("2 versions and no active.json" in m for m in said) == 1
    where.with_name("away").rename(where)
    watcher.step()
    assert core.models == before
