"""Images into tensor columns: the predictor's numbers, bounded, resumed to the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from calibration.predictor import Predictor
from hedged.cli import app
from posthoc.contract import DataError
from service.scoring import images as limits
from service.scoring import score
from service.scoring.images import images_of
from tests.service.maps import SIZE, images
from tests.service.scoring.conftest import outputs, tree

ROOT = Path(__file__).parents[3]


def write(path: Path, seeds: range, bad: tuple[int, ...] = ()) -> Path:
    """One Parquet file for each seed, of 20 images as tensors; ``bad`` ones hold a NaN."""
    path.mkdir(parents=True)
    for seed in seeds:
        x = images(20, seed)
        x[list(bad), 1, 2, 3] = np.nan
        tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(x)
        ids = pa.array([f"{seed}-{k}" for k in range(20)])
        pq.write_table(
            pa.table({"x": tensors, "scan": ids}), path / f"part-{seed}.parquet", row_group_size=8
        )
    return path


def test_tensor_columns_equal_the_predictor(maps_root: Path, tmp_path: Path) -> None:
    bundle = maps_root / "segmenter/1"
    source = write(tmp_path / "in", range(2), bad=(3, 11))
    summary = score(bundle, source, tmp_path / "out", batch_size=8, passthrough=["scan"], alpha=0.1)
    assert (summary.good, summary.errors, summary.fragments) == (36, 4, 2)
    predictor = Predictor(bundle, threads=1)
    for seed in range(2):
        x = images(20, seed)
        x[[3, 11]] = x[[0, 8]]  # a bad row's place is taken by the first good one of its batch
        q = predictor.q_hat(0.1)
        parts = [predictor.run({"x": x[at : at + 8]}, q_hat=q) for at in (0, 8, 16)]
        good = [k for k in range(20) if k not in (3, 11)]
        got = pq.read_table(tmp_path / "out" / f"part-{seed}.parquet")
        assert got["row"].to_pylist() == good
        assert got["scan"].to_pylist() == [f"{seed}-{k}" for k in good]
        for name in predictor.fields:
            want = np.concatenate([part[name] for part in parts])[good]
            maps = got[name].combine_chunks().to_numpy_ndarray()
            assert maps.dtype == (np.uint8 if want.dtype == bool else want.dtype), name
            np.testing.assert_array_equal(maps, want)
    assert got["label"].type.shape == [SIZE, SIZE]
    assert got["probs"].type.shape == [3, SIZE, SIZE]
    bad = pq.read_table(tmp_path / "out/_errors/part-0.parquet").to_pylist()
    assert [row["row"] for row in bad] == [3, 11]
    assert "column 'x'" in bad[0]["reason"]
    assert "nan" in bad[0]["reason"]


def test_images_of_free_sizes_become_nested_lists(maps_root: Path, tmp_path: Path) -> None:
    bundle = maps_root / "restorer/1"
    sizes = [(3 + k % 4, 9 - k % 3) for k in range(30)]
    x = [images(1, k, size)[0] for k, size in enumerate(sizes)]
    x[4][0, 0, 0] = np.inf
    nested = pa.array([v.tolist() for v in x], pa.list_(pa.list_(pa.list_(pa.float32()))))
    pq.write_table(pa.table({"x": nested}), tmp_path / "in.parquet")
    names = ("mean", "quantiles", "ood")
    summary = score(bundle, tmp_path / "in.parquet", tmp_path / "out", outputs=names)
    assert (summary.good, summary.errors) == (29, 1)
    got = pq.read_table(tmp_path / "out/in.parquet")
    assert got.column_names == ["row", *names]
    predictor = Predictor(bundle, threads=1)
    for row in got.to_pylist():
        want = predictor.run({"x": x[row["row"]][None]}, outputs=names)
        for name in names:
            np.testing.assert_array_equal(np.asarray(row[name], want[name].dtype), want[name][0])


def test_bytes_bound_what_is_read_run_and_committed_together(
    maps_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = maps_root / "segmenter/1"
    predictor = Predictor(bundle, threads=1)
    found = images_of(predictor, ["label", "confidence"])
    assert found is not None
    one = SIZE * SIZE * (2 * 4 + 8 + 4)  # two channels of float32, int64, float32
    assert found.nbytes(found.values) == one
    monkeypatch.setattr(limits, "BATCH_BYTES", 3 * one + 1)
    monkeypatch.setattr(limits, "BLOCK_BYTES", 7 * one)
    monkeypatch.setattr(limits, "FRAGMENT_BYTES", 9 * one)
    seen = []

    def run(self: Predictor, inputs: Any, **options: Any) -> Any:
        seen.append(len(inputs["x"]))
        return plain(self, inputs, **options)

    plain = Predictor.run
    monkeypatch.setattr(Predictor, "run", run)
    source = write(tmp_path / "in", range(1))
    score(bundle, source, tmp_path / "out", outputs=["confidence", "label"])
    # Row groups of 8, 8 and 4 are a file each; blocks of six are two runs of three.
    assert seen[-8:] == [3, 3, 2, 3, 3, 2, 3, 1]
    files = [pq.ParquetFile(tmp_path / "out" / name) for name in outputs(tmp_path / "out")]
    groups = [[f.metadata.row_group(k).num_rows for k in range(f.num_row_groups)] for f in files]
    assert groups == [[6, 2], [6, 2], [4]]
    assert files[0].schema_arrow.names == ["row", "label", "confidence"]


def test_the_mean_of_free_sizes_comes_from_the_footer(
    maps_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = images_of(Predictor(maps_root / "restorer/1"), ["mean"])
    assert found is not None
    big = 2 * 20 * 20
    assert found.nbytes(big) == big * 4 + big // 2 * 4
    monkeypatch.setattr(limits, "BLOCK_BYTES", 5 * found.nbytes(big))
    x = [images(1, k, (20, 20))[0].tolist() for k in range(12)]
    table = pa.table({"x": pa.array(x, pa.list_(pa.list_(pa.list_(pa.float32()))))})
    pq.write_table(table, tmp_path / "in.parquet")
    score(maps_root / "restorer/1", tmp_path / "in.parquet", tmp_path / "out", outputs=["mean"])
    file = pq.ParquetFile(tmp_path / "out/in.parquet")
    assert [file.metadata.row_group(k).num_rows for k in range(3)] == [5, 5, 2]


def test_an_unknown_output_is_refused(maps_root: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in", range(1))
    with pytest.raises(DataError, match="no 'lable'; it gives label, probs"):
        score(maps_root / "segmenter/1", source, tmp_path / "out", outputs=["lable"])
    command = ["score", str(maps_root / "segmenter/1"), str(source), str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--outputs", "label,ood", "--json"])
    assert done.exit_code == 0, done.output
    read = pq.read_table(tmp_path / "out/part-0.parquet")
    assert read.column_names == ["row", "label", "ood"]


def child(**request: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.service.scoring.child", json.dumps(request)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_killed_run_of_images_resumes_to_the_same_bytes(
    maps_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in", range(4), bad=(7,))
    monkeypatch.setattr(limits, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(limits, "FRAGMENT_BYTES", 60_000)

    def arguments(output: str) -> dict[str, Any]:
        return {
            "bundle": str(maps_root / "segmenter/1"),
            "input": str(source),
            "output": str(tmp_path / output),
            "batch_size": 4,
        }

    score(**arguments("unbroken"))
    reference = tree(tmp_path / "unbroken")
    assert len(outputs(tmp_path / "unbroken")) > 4
    for phase, index in (("scoring", 21), ("writing", 22), ("renaming", 33)):
        killed = child(
            score=arguments(phase),
            block_bytes=20_000,
            fragment_bytes=60_000,
            watch=True,
            kill=(phase, index),
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        committed = outputs(tmp_path / phase)
        assert 0 < len(committed) < len(outputs(tmp_path / "unbroken"))
        assert score(**arguments(phase)).resumed == len(committed)
        assert tree(tmp_path / phase) == reference
