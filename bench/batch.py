"""``python -m bench batch``: scoring of files beside a loop written by hand, and how it grows.

``ratio_vs_ort_loop`` is the time of a hand-written loop over the same Parquet file (256 rows at a
time through the same graph, every field, into another Parquet file) over that of `hedged score`, on
the small tabular model of `bench.http`; ``ratio_vs_ort_loop_image`` the same on MNISTNet's digits.
``without_writing`` stands beside it: the loop that keeps nothing. Each run is a process of its own
with one thread of the model; opening and checking the bundle is in the time of `hedged score`.

``memory_ratio`` is the most resident memory of a run over the largest table over that of 100,000
rows; ``seconds_per_million`` by number of rows, of which ``cost_ratio`` is the largest over that of
100,000 rows. ``ratio_two_workers`` is the time of one Ray worker over that of two on magika, where
the model is the bottleneck, one thread each. The start, which is the time that one row takes (of
Ray, one row for each worker), is taken off these figures; ``with_start`` has it in.
``ratio_two_bare`` is what the machine allows: rows a second of two processes of the bare loop over
those of one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.http_sides import magika, tabular
from bench.material import magika_files, mnist_files
from bench.peers import Worker
from bench.timing import compared, in_turn, ratio
from calibration.fit import fit
from calibration.fit_options import FitOptions
from calibration.material import Columns
from calibration.predictor import Predictor

GROUP = 100_000  # rows of a row group
SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
REPEATS = 3  # of a table that is done in seconds, where the start is the larger part
# Tens of seconds of one worker, in more files than workers by far; the loop reads one so often.
RAY_FILES, RAY_ROWS, BARE = 24, 120, 8


def run(quick: bool) -> dict[str, Any]:
    """All figures; smaller tables and fewer rounds where it is to be quick."""
    sizes = SIZES[:-1] if quick else SIZES
    rounds = 3 if quick else 5
    with tempfile.TemporaryDirectory(prefix="hedged-bench-") as name:
        folder = Path(name)
        small, image = tabular(folder), _digits(folder)
        tables = {n: _table(small, folder / f"{n}.parquet", n) for n in sizes}
        digits = _repeated(mnist_files().data, folder / "digits.parquet", 2 if quick else 6)
        return {
            **_beside_loop("", small, tables[1_000_000], folder, rounds),
            **_beside_loop("_image", image, digits, folder, rounds),
            **_growth(small, tables, folder),
            **_workers(magika(folder), folder, 1 if quick else 3),
        }


def _beside_loop(name: str, bundle: Path, data: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Ours, the loop, and the loop that does not write, in turn."""
    given = {"bundle": str(bundle), "data": str(data)}
    sides: tuple[Callable[[], float], ...] = (
        partial(_seconds, "ours", **given, out=str(folder / "ours")),
        partial(_seconds, "loop", **given, out=str(folder / "loop.parquet"), write=True),
        partial(_seconds, "loop", **given, out="", write=False),
    )
    ours, loop, bare = in_turn(sides, rounds)
    return {
        f"ratio_vs_ort_loop{name}": ratio(loop, ours),
        f"loop{name}": {
            **compared(loop, ours),
            "without_writing": bare.record(),
            "ratio_without_writing": ratio(bare, ours),
            "rows": pq.read_metadata(data).num_rows,
        },
    }


def _growth(bundle: Path, tables: dict[int, Path], folder: Path) -> dict[str, Any]:
    """Memory and time on each table, smallest first; medians of `REPEATS` runs but of the largest,
    whose start is a small part."""
    row = _table(bundle, folder / "row.parquet", 1)
    given = {"bundle": str(bundle), "out": str(folder / "grown")}
    start = median(_seconds("ours", data=str(row), **given) for _ in range(REPEATS))
    found = {}
    for rows, data in tables.items():
        times = 1 if rows == max(tables) else REPEATS
        runs = [_call("ours", data=str(data), **given) for _ in range(times)]
        found[rows] = {key: median(run[key] for run in runs) for key in ("seconds", "peak_mb")}
    cost = {n: 1e6 * (one["seconds"] - start) / n for n, one in found.items()}
    return {
        "memory_ratio": found[max(found)]["peak_mb"] / found[100_000]["peak_mb"],
        "cost_ratio": cost[max(cost)] / cost[100_000],
        "start_s": start,
        "peak_mb": {str(n): one["peak_mb"] for n, one in found.items()},
        "seconds_per_million": {str(n): c for n, c in cost.items()},
    }


def _workers(bundle: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """One Ray worker beside two, on equal files, and one process of the bare loop beside two."""
    data = folder / "files"
    data.mkdir()
    rows = pq.read_table(magika_files().data).slice(0, RAY_ROWS)
    for file in range(RAY_FILES):
        pq.write_table(rows, data / f"{file:02d}.parquet")
    given = {"bundle": str(bundle), "out": str(folder / "on-ray")}
    sides: list[Callable[[], float]] = []
    for n in (1, 2):
        row = folder / f"row-{n}"  # one for each worker
        row.mkdir()
        for file in range(n):
            pq.write_table(rows.slice(file, 1), row / f"{file}.parquet")
        sides.append(partial(_seconds, "ours", data=str(row), **given, workers=n))
        sides.append(partial(_seconds, "ours", data=str(data), **given, workers=n))
        sides.append(partial(_bare, n, str(bundle), str(data / "00.parquet")))
    start_one, one, bare_one, start_two, two, bare_two = in_turn(sides, rounds)
    return {
        "ratio_two_workers": (one.median - start_one.median) / (two.median - start_two.median),
        "workers": {
            **compared(one, two),
            "start_one": start_one.record(),
            "start_two": start_two.record(),
            "with_start": ratio(one, two),
            "ratio_two_bare": 2 * ratio(bare_one, bare_two),
            "rows": RAY_FILES * len(rows),
        },
    }


def _bare(n: int, bundle: str, data: str) -> float:
    """Seconds until the last of ``n`` processes has run the loop that keeps nothing."""
    loop = partial(_seconds, "loop", bundle=bundle, data=data, out="", write=False, times=BARE)
    with ThreadPoolExecutor(n) as pool:
        return max(pool.map(lambda _: loop(), range(n)))


def _seconds(task: str, **given: Any) -> float:
    seconds: float = _call(task, **given)["seconds"]
    return seconds


def _call(task: str, **given: Any) -> dict[str, Any]:
    with Worker.here("bench.batch_ours", environ={"RAY_USAGE_STATS_ENABLED": "0"}) as worker:
        found: dict[str, Any] = worker.call(task, **given)
    return found


def _digits(folder: Path) -> Path:
    files = mnist_files()
    options = FitOptions(task="classification")
    fit(
        files.model,
        files.data,
        folder / "digits",
        options,
        columns=Columns(target="label"),
        cache_dir=folder / "cache",
    )
    return folder / "digits"


def _table(bundle: Path, file: Path, rows: int) -> Path:
    """A table of that many rows like the golden ones, which every model accepts."""
    mapping = Predictor(bundle).manifest.mapping
    ((_, columns),) = mapping.inputs.items()
    with np.load(bundle / "golden.npz", allow_pickle=False) as golden:
        (x,) = (golden[name] for name in golden.files if name.startswith("in/"))
    rng = np.random.default_rng(0)
    writer: pq.ParquetWriter | None = None
    for start in range(0, rows, GROUP):
        n = min(GROUP, rows - start)
        values = x[rng.integers(len(x), size=n)] * rng.normal(1, 0.1, (n, x.shape[1]))
        values = values.astype(x.dtype)
        table = pa.table({c: values[:, i] for i, c in enumerate(columns)})
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table, row_group_size=GROUP)
    assert writer is not None
    writer.close()
    return file


def _repeated(data: Path, file: Path, times: int) -> Path:
    table = pq.read_table(data)
    with pq.ParquetWriter(file, table.schema) as writer:
        for _ in range(times):
            writer.write_table(table)
    return file
