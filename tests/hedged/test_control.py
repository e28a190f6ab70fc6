"""``hedged control`` and ``hedged.control_risk``: tables of every kind, promises, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

import hedged
from calibration.conformal.losses import conformal_risk_control, learn_then_test
from posthoc.contract import DataError
from tests.hedged.conftest import Call, assert_one_line

GRID = (0.5, 0.8, 0.9, 0.95, 1.0)
NAMES = tuple(map(str, GRID))


def losses(n: int, seed: int) -> np.ndarray:
    """Share of ten parts of an item above a threshold."""
    return (np.random.default_rng(seed).uniform(size=(n, 10, 1)) > GRID).mean(1)


def write(path: Path, x: np.ndarray) -> Path:
    table = pa.table({name: x[:, i] for i, name in enumerate(NAMES)})
    if path.suffix == ".csv":
        pacsv.write_csv(table, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: x[:, i] for i, name in enumerate(NAMES)})
    else:
        pq.write_table(table, path)
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv", "npz"])
def test_every_kind_of_table_gives_what_the_function_gives(
    call: Call, tmp_path: Path, kind: str
) -> None:
    x = losses(300, 0)
    path = write(tmp_path / f"losses.{kind}", x)
    done = call("control", path, "--level", ".15", "--json")
    assert done.code == 0, done.err
    want = conformal_risk_control(x, 0.15, settings=NAMES)
    assert done.json["settings"] == list(NAMES)
    assert (done.json["setting"], done.json["chosen"]) == (want.setting, want.chosen) == ("0.9", 2)
    assert done.json["risks"] == pytest.approx(want.risks)
    assert done.json["promise"] == want.promise
    some = call("control", path, "--level", ".3", "--columns", "0.8,1.0", "--json")
    assert some.json["settings"] == ["0.8", "1.0"] and some.json["setting"] == "0.8"


def test_learn_then_test_with_an_order_from_other_rows(call: Call, tmp_path: Path) -> None:
    x, other = losses(300, 0), losses(60, 1)
    path, others = write(tmp_path / "x.parquet", x), write(tmp_path / "other.csv", other)
    base = ("control", path, "--level", ".15", "--delta", ".1")
    for more, options in (
        ((), {}),
        (("--order", others), {"order": other}),
        (("--order", "auto", "--seed", "3"), {"order": "auto", "seed": 3}),
        (("--order", "falling"), {"order": "falling"}),
        (("--cost", "5,4,3,2,1"), {"cost": [5, 4, 3, 2, 1]}),
    ):  # fmt: skip
        done = call(*base, *more, "--json")
        assert done.code == 0, done.err
        want: Any = learn_then_test(x, 0.15, 0.1, settings=NAMES, **options)
        assert done.json["admissible"] == list(want.admissible) != []
        assert done.json["setting"] == want.setting and done.json["n"] == want.n
        assert done.json["order"] == (None if want.order is None else list(want.order))
    assert_one_line(call(*base, "--order", path), "these are the same rows")
    assert_one_line(call(*base, "--order", "rising"), "rising: no such file")


def test_a_person_is_told_the_promise(call: Call, tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", losses(300, 0))
    shown = call("control", path, "--level", ".15")
    assert shown.code == 0
    text = " ".join(shown.out.split())
    for part in ("conformal risk control", "300 items", "chosen", "expected to lose at most 0.15"):
        assert part in text
    sure = " ".join(call("control", path, "--level", ".15", "--delta", ".1").out.split())
    for part in ("Hoeffding-Bentkus p-values", "Bonferroni-Holm", "probability at least 0.9"):
        assert part in sure
    few = call("control", write(tmp_path / "few.csv", losses(5, 0)), "--level", ".1")
    assert few.code == 0
    assert "it takes at least 9 items and there are 5" in " ".join(few.out.split())
    assert call("control", tmp_path / "few.csv", "--level", ".1", "--json").json["setting"] is None


def test_one_column_of_lists_is_a_table_of_settings(call: Call, tmp_path: Path) -> None:
    x = losses(100, 0)
    np.savez(tmp_path / "x.npz", losses=x)
    done = call("control", tmp_path / "x.npz", "--level", ".2", "--json")
    assert done.json["settings"] == ["0", "1", "2", "3", "4"]
    assert done.json["risks"] == pytest.approx(list(x.mean(0)))
    np.savez(tmp_path / "grid.npz", losses=x[:, :, None].repeat(2, 2))
    assert_one_line(call("control", tmp_path / "grid.npz", "--level", ".2"), "losses")


def test_whole_numbers_are_binary_and_floats_only_if_it_is_said(call: Call, tmp_path: Path) -> None:
    x = (losses(200, 0) > 0.2).astype(int)
    base = ("--level", ".5", "--delta", ".1", "--json")
    whole = call("control", write(tmp_path / "x.csv", x), *base)
    assert whole.json["test"] == "exact binomial"
    floats = write(tmp_path / "y.parquet", x.astype(float))
    assert call("control", floats, *base).json["test"] == "Hoeffding-Bentkus"
    assert call("control", floats, *base, "--binary").json["pvalues"] == whole.json["pvalues"]


def test_losses_that_rise(call: Call, tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", losses(100, 0)[:, ::-1])
    done = call("control", path, "--level", ".6")
    assert_one_line(done, "its loss rises from 0 at setting 0.8 to 0.2 at 0.9")
    assert "learn-then-test" in done.err
    assert call("control", path, "--level", ".6", "--monotonise", "--json").json["chosen"] == 0


def test_what_a_user_can_mend_is_one_line(call: Call, tmp_path: Path) -> None:
    x = losses(20, 0)
    path = write(tmp_path / "x.parquet", x)
    for more, text in (
        (("--level", "1"), "level must lie strictly between 0 and the bound 1"),
        (("--level", ".1", "--delta", "1"), "delta must lie strictly between"),
        (("--level", ".1", "--bound", "0"), "bound"),
        (("--level", ".01", "--bound", ".02"), "is not in [0, 0.02]"),
        (("--level", ".1", "--columns", "0.5,nope"), "no column 'nope'"),
        (("--level", ".1", "--order", "auto"), "give delta"),
        (("--level", ".1", "--binary"), "give delta"),
        (("--level", ".1", "--delta", ".1", "--monotonise"), "leave monotonise out"),
        (("--level", ".1", "--cost", "1,2"), "cost is a number for each of 5 settings"),
    ):
        assert_one_line(call("control", path, *more), text)
    x[3, 2] = np.nan
    hole = write(tmp_path / "hole.parquet", x)
    assert_one_line(call("control", hole, "--level", ".1"), "column '0.9', row 3: is nan")
    pq.write_table(pa.table({"id": ["a", "b"], "0.5": [0.1, 0.2]}), tmp_path / "text.parquet")
    assert_one_line(call("control", tmp_path / "text.parquet", "--level", ".1"), "column 'id'")
    (tmp_path / "none.csv").write_text("a,b\n")
    assert_one_line(call("control", tmp_path / "none.csv", "--level", ".1"), "no rows")
    assert_one_line(call("control", tmp_path / "nowhere.csv", "--level", ".1"), "no such file")
    for usage in (("control", path), ("control", path, "--level", "x"), ("control",)):
        assert call(*usage).code == 2


def test_the_function_is_public() -> None:
    x = losses(300, 0)
    assert hedged.control_risk(x, 0.15) == conformal_risk_control(x, 0.15)
    assert hedged.control_risk(x, 0.15, delta=0.1, order="falling") == learn_then_test(
        x, 0.15, 0.1, order="falling"
    )
    with pytest.raises(DataError, match="give delta"):
        hedged.control_risk(x, 0.15, order="auto")
    with pytest.raises(DataError, match="leave monotonise out"):
        hedged.control_risk(x, 0.15, delta=0.1, monotonise=True)
