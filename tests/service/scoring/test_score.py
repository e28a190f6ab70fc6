"""`score` against a plain loop over `Predictor.run`, and what it refuses, reports and survives."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calibration.predictor import Predictor
from posthoc.contract import BundleError, DataError, Task
from service.scoring import (
    ErrorRatioError,
    Interrupted,
    Progress,
    ScoringError,
    score,
)
from service.scoring.commit import locked
from tests.factory import COLUMNS
from tests.service.scoring.conftest import outputs, table, tree, write_input

BATCH = 64


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_input(tmp_path / "input", 4, 150)


def batches(predictor: Predictor, x: np.ndarray, **options: Any) -> Iterator[dict[str, Any]]:
    """The independent answer: one `Predictor.run` for each batch."""
    for at in range(0, len(x), BATCH):
        yield predictor.run({"x": x[at : at + BATCH]}, **options)


def inputs(file: Path, task: Task) -> np.ndarray:
    read = pq.read_table(file, partitioning=None)
    return np.stack([read[c].to_numpy() for c in COLUMNS[task]], axis=1)


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_classification_equals_the_predictor_bit_for_bit(
    bundle: Path, source: Path, tmp_path: Path, alpha: float | None
) -> None:
    score(bundle, source, tmp_path / "out", batch_size=BATCH, alpha=alpha, passthrough=["day"])
    predictor = Predictor(bundle, threads=1)
    names = predictor.manifest.classes
    assert names is not None
    q_hat = None if alpha is None else predictor.q_hat(alpha)
    for name in outputs(source):
        got = pq.read_table(tmp_path / "out" / name, partitioning=None).to_pydict()
        x = inputs(source / name, "classification")
        parts = list(batches(predictor, x, q_hat=q_hat))
        want = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        assert list(got) == ["row", "id", "day", *predictor.fields]
        assert got["row"] == list(range(len(x)))
        seed = int(name.split("-")[1][:2])
        assert got["id"] == [f"{seed}-{i}" for i in range(len(x))]
        assert got["day"] == [i % 7 for i in range(len(x))]
        assert got["label"] == [names[i] for i in want["label"]]
        assert got["set"] == [
            [c for c, inside in zip(names, row, strict=True) if inside] for row in want["set"]
        ]
        for field in set(predictor.fields) - {"label", "set"}:
            np.testing.assert_array_equal(np.array(got[field], want[field].dtype), want[field])


def test_regression_equals_the_predictor_bit_for_bit(regressor: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "input", 3, 150, "regression")
    score(regressor, source, tmp_path / "out", batch_size=BATCH)
    predictor = Predictor(regressor, threads=1)
    for name in outputs(source):
        got = pq.read_table(tmp_path / "out" / name, partitioning=None)
        parts = list(batches(predictor, inputs(source / name, "regression")))
        for field in predictor.fields:
            want = np.concatenate([p[field] for p in parts])
            have = np.array(got[field].to_pylist(), want.dtype)
            np.testing.assert_array_equal(have.reshape(want.shape), want)
        assert got.schema.field("mean").type == pa.float32()


def test_the_output_is_a_data_set_of_its_own(bundle: Path, source: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    summary = score(bundle, source, tmp_path / "out", batch_size=BATCH, progress=seen.append)
    whole = pq.read_table(tmp_path / "out")
    assert summary.rows == summary.good == whole.num_rows == 150 + 151 + 152 + 153
    assert (summary.errors, summary.fragments, summary.failed) == (0, 4, ())
    assert whole["half"].to_pylist().count(0) == 150 + 152
    assert seen[-1] == Progress(4, 4, summary.rows, summary.rows)
    assert [p.rows_done for p in seen] == sorted(p.rows_done for p in seen)
    stored = json.loads((tmp_path / "out" / "_summary.json").read_text())
    assert stored["good"] == summary.rows and "seconds" not in stored
    footer = json.loads(pq.read_metadata(tmp_path / "out" / outputs(source)[0]).metadata[b"hedged"])
    assert footer["run"] == summary.run and footer["bundle"] == summary.bundle
    assert footer["source"] == outputs(source)[0]


def test_a_large_file_is_cut_by_row_groups(bundle: Path, tmp_path: Path) -> None:
    pq.write_table(table(1000, 0), tmp_path / "one.parquet", row_group_size=130)
    score(bundle, tmp_path / "one.parquet", tmp_path / "out", fragment_rows=300, batch_size=BATCH)
    assert outputs(tmp_path / "out") == [f"one-0000{i}-of-00004.parquet" for i in range(4)]
    whole = pq.read_table(tmp_path / "out")
    assert whole["row"].to_pylist() == list(range(1000))
    assert whole["id"].to_pylist() == [f"0-{i}" for i in range(1000)]


def test_an_empty_file_has_an_empty_output(bundle: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "input", 1, 0)
    summary = score(bundle, source, tmp_path / "out")
    assert (summary.rows, summary.fragments) == (0, 1)
    assert pq.read_table(tmp_path / "out" / outputs(source)[0]).num_rows == 0


def test_bad_rows_are_set_apart_and_their_neighbours_answered(bundle: Path, tmp_path: Path) -> None:
    bad = {0: (0, 3, 149), 2: (64,)}
    source = write_input(tmp_path / "input", 3, 150, bad=bad)
    summary = score(bundle, source, tmp_path / "out", batch_size=BATCH)
    assert (summary.good, summary.errors) == (150 + 151 + 152 - 4, 4)
    predictor = Predictor(bundle, threads=1)
    for file, rows in bad.items():
        name = f"half=0/part-{file:02d}.parquet"
        errors = pq.read_table(tmp_path / "out" / "_errors" / name, partitioning=None).to_pydict()
        assert errors["row"] == list(rows)
        assert errors["source"] == [name] * len(rows)
        assert all("'a'" in why and "nan" in why for why in errors["reason"])
        got = pq.read_table(tmp_path / "out" / name, partitioning=None)
        x = inputs(source / name, "classification")
        good = [r for r in range(len(x)) if r not in rows]
        assert got["row"].to_pylist() == good
        for row in rows:
            start = row - row % BATCH
            x[row] = x[next(r for r in good if r >= start)]
        want = np.concatenate([p["probs"] for p in batches(predictor, x)])[good]
        np.testing.assert_array_equal(np.array(got["probs"].to_pylist(), np.float32), want)
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_too_many_bad_rows_stop_the_run_which_may_go_on(bundle: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "input", 4, 100, bad={1: tuple(range(30)), 3: (7,)})
    whole = tmp_path / "whole"
    score(bundle, source, whole, max_error_ratio=0.5)
    with pytest.raises(ErrorRatioError, match=r"more than 20 of 406 rows.*ratio is 0\.05"):
        score(bundle, source, tmp_path / "out", max_error_ratio=0.05)
    left = tree(tmp_path / "out")
    assert "_SUCCESS" not in left and "half=1/part-01.parquet" not in left
    assert score(bundle, source, tmp_path / "out", max_error_ratio=0.5).resumed == 2
    assert tree(tmp_path / "out") == tree(whole)
    with pytest.raises(ErrorRatioError, match="more than 20 of 406"):
        score(bundle, source, tmp_path / "out", max_error_ratio=0.05)


def test_damaged_files_are_reported_and_the_rest_is_scored(
    bundle: Path, source: Path, tmp_path: Path
) -> None:
    cut = source / "half=1" / "part-01.parquet"
    cut.write_bytes(cut.read_bytes()[:-20])
    flipped = source / "half=0" / "part-02.parquet"
    data = bytearray(flipped.read_bytes())
    start = pq.read_metadata(flipped).row_group(0).column(1).data_page_offset
    data[start : start + 300] = bytes(300)
    flipped.write_bytes(data)
    summary = score(bundle, source, tmp_path / "out")
    assert [(f.source, f.rows) for f in summary.failed] == [
        ("half=0/part-02.parquet", 152),
        ("half=1/part-01.parquet", None),
    ]
    assert all(f.reason for f in summary.failed)
    assert (summary.fragments, summary.good, summary.rows) == (4, 150 + 153, 150 + 152 + 153)
    left = tree(tmp_path / "out")
    assert "_SUCCESS" not in left
    assert len(json.loads(left["_summary.json"])["failed"]) == 2
    assert outputs(tmp_path / "out") == ["half=0/part-00.parquet", "half=1/part-03.parquet"]
    again = score(bundle, source, tmp_path / "out")
    assert again.resumed == 2 and again.failed == summary.failed
    assert tree(tmp_path / "out") == left


def test_a_missing_column_stops_before_anything_is_written(
    bundle: Path, source: Path, tmp_path: Path
) -> None:
    late = source / "half=1" / "part-03.parquet"
    pq.write_table(pq.read_table(late, partitioning=None).drop_columns(["c"]), late)
    with pytest.raises(DataError, match=r"part-03\.parquet: column 'c' is needed"):
        score(bundle, source, tmp_path / "out")
    with pytest.raises(DataError, match="column 'nope' is needed"):
        score(bundle, source / "half=0", tmp_path / "out", passthrough=["nope"])
    assert not (tmp_path / "out").exists()


def test_a_column_of_text_where_numbers_go_stops_the_run(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    words = table(10, 0).set_column(0, "a", pa.array(["x"] * 10))
    pq.write_table(words, tmp_path / "input" / "w.parquet")
    with pytest.raises(DataError, match=r"column 'a': expected .*float32.*, found string"):
        score(bundle, tmp_path / "input", tmp_path / "out")
    assert not outputs(tmp_path / "out")


def test_another_run_is_not_resumed(
    bundle: Path, source: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path / "out"
    score(bundle, source, out, batch_size=BATCH)
    before = tree(out)
    settings: list[tuple[dict[str, Any], str]] = [
        ({"batch_size": 32}, "settings batch_size was 64, is 32"),
        ({"batch_size": BATCH, "threads": 2}, "settings threads was 1, is 2"),
        ({"batch_size": BATCH, "alpha": 0.3}, "settings alpha was .*, is 0.3"),
        ({"batch_size": BATCH, "passthrough": ["day"]}, r"passthrough was \(\), is \('day',\)"),
        ({"batch_size": BATCH, "fragment_rows": 7}, "fragment_rows was 100000, is 7"),
    ]
    for changed, message in settings:
        with pytest.raises(ScoringError, match=f"holds another run: .*{message}.*--overwrite"):
            score(bundle, source, out, **changed)
    altered = shutil.copytree(bundle, tmp_path / "altered")
    manifest = altered / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"created"', ' "created"', 1))
    with pytest.raises(ScoringError, match=r"bundle identity was [0-9a-f]+, is [0-9a-f]+"):
        score(altered, source, out, batch_size=BATCH)
    with (altered / "head.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match=r"head\.onnx was changed"):
        score(altered, source, out, batch_size=BATCH)
    assert tree(out) == before
    pq.write_table(table(5, 9), source / "new.parquet")
    os.utime(source / "half=0" / "part-00.parquet", ns=(1, 1))
    with pytest.raises(ScoringError, match=r"part-00\.parquet was changed.*new\.parquet is new"):
        score(bundle, source, out, batch_size=BATCH)
    (source / "new.parquet").unlink()
    (source / "half=1" / "part-01.parquet").unlink()
    with pytest.raises(ScoringError, match=r"part-01\.parquet is gone"):
        score(bundle, source, out, batch_size=BATCH)
    score(bundle, source, out, batch_size=32, overwrite=True)
    fresh = tmp_path_factory.mktemp("fresh") / "out"
    score(bundle, source, fresh, batch_size=32)
    assert tree(out) == tree(fresh)


def test_outputs_that_were_damaged_or_lost_are_made_again(bundle: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "input", 4, 100, bad={0: (1,), 1: (2,)})
    out = tmp_path / "out"
    score(bundle, source, out)
    before = tree(out)
    other = tmp_path / "other"
    score(bundle, source, other, batch_size=BATCH)
    first, second, *_ = outputs(out)
    (out / first).write_bytes(before[first][:-4])
    (out / "_errors" / "half=1" / "part-01.parquet").unlink()
    (out / second).write_bytes((other / second).read_bytes())  # well formed, of another run
    summary = score(bundle, source, out)
    assert summary.resumed == 1
    assert tree(out) == before


def test_success_is_withdrawn_while_something_is_missing(
    bundle: Path, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    score(bundle, source, out)
    before = tree(out)
    (out / outputs(out)[3]).unlink()

    def fail(progress: Progress) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        score(bundle, source, out, progress=fail)
    gone = {outputs(source)[3], "_SUCCESS", "_summary.json", "_drift.json"}
    assert set(before) - set(tree(out)) == gone
    score(bundle, source, out)
    assert tree(out) == before


def test_folders_that_are_not_ours_are_left_alone(
    bundle: Path, source: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.parquet").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ScoringError, match="not an output of scoring"):
            score(bundle, source, mine, overwrite=overwrite)
    (tmp_path / "plans" / "for" / "later").mkdir(parents=True)
    with pytest.raises(ScoringError, match="not an output of scoring"):
        score(bundle, source, tmp_path / "plans")
    assert (tmp_path / "plans" / "for" / "later").is_dir()
    (mine / "_run.json").write_text("{}")
    with pytest.raises(ScoringError, match="not the manifest of a run of this version"):
        score(bundle, source, mine)
    for a, b in ((source, source), (source, source / "out"), (source / "half=0", source)):
        with pytest.raises(DataError, match="overlap"):
            score(bundle, a, b)
    assert (mine / "thesis.parquet").read_text() == "years of work"


def test_two_runs_do_not_share_an_output(bundle: Path, source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(ScoringError, match="another run is writing"):
        score(bundle, source, tmp_path / "out")


def test_sigterm_finishes_the_fragment_in_hand(bundle: Path, source: Path, tmp_path: Path) -> None:
    score(bundle, source, tmp_path / "whole")
    before = signal.getsignal(signal.SIGTERM)

    def stop(progress: Progress) -> None:
        if progress.fragments_done == 1 and progress.rows_done > 150:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="after 2 of 4 fragments") as caught:
        score(bundle, source, tmp_path / "out", progress=stop)
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(outputs(tmp_path / "out")) == 2
    assert score(bundle, source, tmp_path / "out").resumed == 2
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="no sysfs: nothing else refuses root")
def test_a_place_that_cannot_be_written_is_said(bundle: Path, source: Path) -> None:
    with pytest.raises(ScoringError, match="cannot write /sys/kernel/scored"):
        score(bundle, source, "/sys/kernel/scored")


def test_a_bundle_that_is_replaced_midway_is_not_mixed_in(
    bundle: Path, regressor: Path, source: Path, tmp_path: Path
) -> None:
    """What answers was verified and opened before the first row; the next start meets the other."""
    mine = tmp_path / "bundle"
    shutil.copytree(bundle, mine)
    score(bundle, source, tmp_path / "whole", batch_size=BATCH)

    def replace(progress: Progress) -> None:
        if progress.fragments_done == 1 and not (tmp_path / "old").exists():
            mine.rename(tmp_path / "old")
            shutil.copytree(regressor, mine)

    score(mine, source, tmp_path / "out", batch_size=BATCH, progress=replace)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    with pytest.raises(DataError):
        score(mine, source, tmp_path / "out", batch_size=BATCH)
    shutil.rmtree(mine)
    (tmp_path / "old").rename(mine)
    (mine / "manifest.json").write_bytes((regressor / "manifest.json").read_bytes())
    with pytest.raises(BundleError):
        score(mine, source, tmp_path / "out", batch_size=BATCH)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("what", ["vanished", "changed"])
def test_an_input_that_moves_under_the_run_stops_it(
    bundle: Path, source: Path, tmp_path: Path, what: str
) -> None:
    last = source / "half=1" / "part-03.parquet"

    def pull(progress: Progress) -> None:
        if progress.fragments_done == 1 and last.exists():
            last.unlink() if what == "vanished" else os.utime(last, ns=(1, 1))

    with pytest.raises(ScoringError, match=rf"part-03\.parquet {what} during the run"):
        score(bundle, source, tmp_path / "out", progress=pull)
    assert "half=1/part-03.parquet" not in outputs(tmp_path / "out")
    assert not (tmp_path / "out" / "_SUCCESS").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch size must be at least 1"),
        ({"threads": -1}, "number of threads must be at least 0"),
        ({"fragment_rows": 0}, "fragment size must be at least 1"),
        ({"max_error_ratio": 1.5}, "between 0 and 1, not 1.5"),
        ({"max_error_ratio": float("nan")}, "between 0 and 1, not nan"),
        ({"alpha": 1.0}, "strictly between 0 and 1"),
        ({"alpha": 1e-9}, "conformal rows"),
    ],
)
def test_settings_that_cannot_be_meant(
    bundle: Path, source: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        score(bundle, source, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
