"""Ray workers against one process: the same bytes, the same ends, whoever is lost on the way."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posthoc.contract import DataError
from service.scoring import ErrorRatioError, Interrupted, Progress, ScoringError, ray_engine, score
from service.scoring.cluster import ATTEMPTS
from service.scoring.engine import Engine
from service.scoring.fragments import Fragment
from service.scoring.job import Job
from service.scoring.manifest import versions
from service.scoring.ray_engine import Scorer
from tests.service.scoring.conftest import outputs, table, tree, write_input
from tests.service.scoring.moments import Deadly, Watched

FILES = 8
SETTINGS: dict[str, Any] = {"batch_size": 64, "passthrough": ["day"]}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bad rows, a file whose pages are damaged, and one without a footer."""
    folder = tmp_path_factory.mktemp("ray") / "input"
    write_input(folder, FILES, 120, bad={0: (3,), 1: (5, 70), 4: (0,), 7: (126,)})
    cut = folder / "half=1" / "part-03.parquet"
    cut.write_bytes(cut.read_bytes()[:-20])
    flipped = folder / "half=0" / "part-02.parquet"
    data = bytearray(flipped.read_bytes())
    start = pq.read_metadata(flipped).row_group(0).column(1).data_page_offset
    data[start : start + 300] = bytes(300)
    flipped.write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def local(
    bundle: Path, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What one process makes of it: the summary without what passes, and the bytes."""
    output = tmp_path_factory.mktemp("ray") / "local"
    return told(score(bundle, source, output, **SETTINGS)), tree(output)


def told(summary: Any) -> dict[str, Any]:
    passing = ("seconds", "rows_per_s", "output", "resumed")
    return {k: v for k, v in summary.as_dict().items() if k not in passing}


def stop_after(fragments: int) -> Callable[[Progress], None]:
    def stop(progress: Progress) -> None:
        if progress.fragments_done == fragments:
            raise ZeroDivisionError

    return stop


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_write_the_bytes_of_one_process(
    bundle: Path, source: Path, local: Any, tmp_path: Path, workers: int
) -> None:
    seen: list[Progress] = []
    summary = score(
        bundle, source, tmp_path / "out", engine="ray", workers=workers, progress=seen.append,
        **SETTINGS,
    )  # fmt: skip
    assert (told(summary), tree(tmp_path / "out")) == local
    assert len(summary.failed) == 2 and summary.errors == 5
    rows = [p.rows_done for p in seen]
    assert rows == sorted(rows) and rows[-1] == summary.rows
    assert seen[-1].fragments_done == seen[-1].fragments == FILES


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("first", "then"), [("local", "ray"), ("ray", "local")])
def test_one_engine_goes_on_with_what_the_other_began(
    bundle: Path, source: Path, local: Any, tmp_path: Path, first: str, then: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError):
        score(bundle, source, out, engine=first, progress=stop_after(4), **SETTINGS)
    committed = outputs(out)
    assert 0 < len(committed) < FILES - 2
    assert not [name for name in tree(out) if ".part-" in name]
    summary = score(bundle, source, out, engine=then, **SETTINGS)
    assert summary.resumed == len(committed)
    assert (told(summary), tree(out)) == local


def test_without_work_no_cluster_is_asked(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_input(tmp_path / "input", 2, 10)
    score(bundle, source, tmp_path / "out")
    monkeypatch.delattr(ray_engine, "connect")
    assert score(bundle, source, tmp_path / "out", engine="ray").resumed == 2


@pytest.mark.usefixtures("cluster")
def test_too_many_bad_rows_stop_the_run_which_may_go_on(bundle: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "input", 6, 100, bad={1: tuple(range(30)), 3: (7,)})
    out, whole = tmp_path / "out", tmp_path / "whole"
    score(bundle, source, whole, max_error_ratio=0.5)
    with pytest.raises(ErrorRatioError, match=r"more than 30 of 615 rows.*ratio is 0\.0489"):
        score(bundle, source, out, engine="ray", max_error_ratio=0.0489)
    assert "_SUCCESS" not in tree(out) and not [n for n in tree(out) if ".part-" in n]
    score(bundle, source, out, max_error_ratio=0.5)
    assert tree(out) == tree(whole)


@pytest.mark.usefixtures("cluster")
def test_bad_rows_of_several_workers_are_added_up(bundle: Path, tmp_path: Path) -> None:
    bad = dict.fromkeys(range(6), (1, 2, 3))  # no fragment alone has too many
    source = write_input(tmp_path / "input", 6, 100, bad=bad)
    with pytest.raises(ErrorRatioError, match="more than 12 of 615 rows"):
        score(bundle, source, tmp_path / "out", engine="ray", workers=2, max_error_ratio=0.02)
    assert 0 < len(outputs(tmp_path / "out")) <= 5


@pytest.mark.usefixtures("cluster")
def test_a_fragment_that_ends_every_worker_is_named(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_input(tmp_path / "input", 4, 100)
    name = "half=0/part-02.parquet"
    monkeypatch.setattr(ray_engine, "Scorer", lambda *a: Deadly(Scorer(*a), name))
    message = rf"part-02\.parquet, rows 0 to 102: {ATTEMPTS} workers were lost over one piece"
    with pytest.raises(ScoringError, match=message):
        score(bundle, source, tmp_path / "out", engine="ray")
    left = tree(tmp_path / "out")
    assert name not in left and not [n for n in left if ".part-" in n]


@pytest.mark.usefixtures("cluster")
def test_sigterm_finishes_the_fragments_in_hand(bundle: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "input", 12, 100)
    out, whole = tmp_path / "out", tmp_path / "whole"
    score(bundle, source, whole)
    before = signal.getsignal(signal.SIGTERM)
    at: list[int] = []

    def stop(progress: Progress) -> None:
        if progress.fragments_done == 3 and not at:
            at.append(len(list(out.rglob("part-*.parquet"))))
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match=r"after \d of 12 fragments") as caught:
        score(bundle, source, out, engine="ray", workers=2, progress=stop)
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is before
    committed = outputs(out)
    assert 3 <= len(committed) <= at[0] + 2
    assert not [name for name in tree(out) if ".part-" in name]
    assert score(bundle, source, out).resumed == len(committed)
    assert tree(out) == tree(whole)


@pytest.mark.usefixtures("cluster")
def test_errors_of_a_worker_arrive_as_they_are(bundle: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "input", 4, 100)
    last = source / "half=1" / "part-03.parquet"

    def pull(progress: Progress) -> None:
        last.unlink(missing_ok=True)

    with pytest.raises(ScoringError, match=r"part-03\.parquet vanished during the run"):
        score(bundle, source, tmp_path / "out", engine="ray", workers=1, progress=pull)
    words = table(10, 0).set_column(0, "a", pa.array(["x"] * 10))
    (tmp_path / "words").mkdir()
    pq.write_table(words, tmp_path / "words" / "w.parquet")
    with pytest.raises(DataError, match=r"column 'a': expected .*float32.*, found string"):
        score(bundle, tmp_path / "words", tmp_path / "no", engine="ray")


@pytest.mark.usefixtures("cluster")
def test_workers_import_nothing_that_fits(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_input(tmp_path / "input", 2, 10)
    note = tmp_path / "note"
    monkeypatch.setattr(ray_engine, "Scorer", lambda *a: Watched(Scorer(*a), note))
    score(bundle, source, tmp_path / "out", engine="ray", workers=1)
    modules = set(json.loads(note.read_text())["modules"])
    assert {"onnxruntime", "service.scoring.task"} <= modules
    assert not {"torch", "onnx", "sklearn", "plotly"} & modules


@pytest.fixture
def handed(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Scorer, Fragment]:
    """What a worker is sent, on its way to another machine."""
    job: list[Job] = []
    monkeypatch.setattr(ray_engine, "run_ray", lambda j, *_, **__: job.append(j))
    shutil.copytree(bundle, tmp_path / "bundle")
    source = write_input(tmp_path / "input", 1, 10)
    score(tmp_path / "bundle", source, tmp_path / "out", engine="ray")
    scorer = Scorer(job[0].plan, tmp_path / "bundle", "cpu", 1, versions())
    sent: tuple[Scorer, Fragment] = pickle.loads(pickle.dumps((scorer, job[0].pending[0])))
    return sent


def test_a_machine_needs_to_see_what_the_driver_sees(
    handed: tuple[Scorer, Fragment], tmp_path: Path
) -> None:
    scorer, fragment = handed
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    with pytest.raises(ScoringError, match=r"worker on .* does not see this run in .*out; use"):
        scorer((fragment, 0))
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "out")
    (tmp_path / "out" / "_run.json").write_text("{}")  # of another run
    with pytest.raises(ScoringError, match=r"does not see this run"):
        scorer((fragment, 0))
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "out", dirs_exist_ok=True)
    (tmp_path / "input").rename(tmp_path / "input-there")
    with pytest.raises(ScoringError, match=r"does not see the input .*part-00\.parquet; use"):
        scorer((fragment, 0))
    assert not outputs(tmp_path / "out")
    (tmp_path / "input-there").rename(tmp_path / "input")
    assert scorer((fragment, 0)).good == 10


def test_a_machine_needs_the_same_bundle_and_software(
    handed: tuple[Scorer, Fragment], tmp_path: Path
) -> None:
    scorer, fragment = handed
    other = replace(scorer, versions={**scorer.versions, "onnxruntime": "1.0"})
    with pytest.raises(ScoringError, match=r"onnxruntime is \d\S+ there and 1\.0 where"):
        other((fragment, 0))
    manifest = tmp_path / "bundle" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"created"', ' "created"', 1))
    with pytest.raises(ScoringError, match=r"is bundle [0-9a-f]+, and the run was begun with"):
        scorer((fragment, 0))
    manifest.write_text("{")
    with pytest.raises(ScoringError, match=r"the worker on .*: .*manifest"):
        scorer((fragment, 0))
    assert not outputs(tmp_path / "out")
    manifest.write_text(text)
    assert scorer((fragment, 0)).good == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "spark"}, "engine 'spark' is unknown; use local or ray"),
        ({"name": "local", "workers": 2}, "workers belongs to the engine ray"),
        ({"name": "local", "num_gpus": 1}, "num_gpus belongs to the engine ray"),
        ({"workers": 0}, "at least 1, not 0"),
        ({"threads": 0}, "give a number of threads"),
        ({"num_gpus": 1}, "num_gpus 1 does not go with the device cpu"),
        ({"device": "cuda", "num_gpus": 0}, "num_gpus 0 does not go with the device cuda"),
        ({"device": "cuda", "num_gpus": float("nan")}, "num_gpus nan does not"),
        ({"device": "cuda:1"}, "the engine ray has no device cuda:1: use auto"),
        ({"device": "cuda", "num_gpus": 1.5}, "a share of one GPU or a whole number, not 1.5"),
        ({"device": "cuda", "num_gpus": float("inf")}, "a whole number, not inf"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Engine(**{"name": "ray", "device": "cpu", "threads": 1} | settings)
