"""Figures that are kept: rounded, whole, and quoted as they are."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

import bench.__main__
from bench import figures, folds, heads, risk
from bench.__main__ import main
from bench.results import RESULTS, keep, kept, rounded


def test_numbers_keep_five_digits_and_everything_else_its_value() -> None:
    found = {"a": math.pi * 1e6, "b": [1e-9 / 3, True, None, "x", 7], 3: {"n": math.nan}}
    got = rounded(found)
    assert got["a"] == 3141600.0
    assert got["b"] == [3.3333e-10, True, None, "x", 7]
    assert math.isnan(got["3"]["n"])


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    keep({"a": [1.5, 2], "b": None}, tmp_path / "new" / "one.json")
    assert kept("one", tmp_path / "new") == {"a": [1.5, 2], "b": None}
    assert kept("two", tmp_path) is None
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["one.json"]


def test_a_value_that_is_no_json_leaves_what_was_kept(tmp_path: Path) -> None:
    keep({"a": 1}, tmp_path / "one.json")
    with pytest.raises(ValueError):
        loop: list[object] = []
        loop.append(loop)
        keep({"a": json.dumps(loop)}, tmp_path / "one.json")
    assert kept("one", tmp_path) == {"a": 1}


def test_every_kept_file_is_quoted_and_says_what_made_it() -> None:
    files = {p.stem for p in RESULTS.glob("*.json")}
    assert files <= {f.bench for f in figures.FIGURES}
    for name in files:
        found = kept(name)
        assert found is not None
        assert not found.get("quick"), f"{name} was measured with --quick"
        assert {"versions", "machine"} <= set(found)
    assert len(figures.rows()) == sum(f.bench in files for f in figures.FIGURES)


def test_a_benchmark_keeps_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folds, "run", lambda quick: {"pi": math.pi, "asked": quick})
    monkeypatch.setattr(sys, "argv", ["bench", "folds", "--quick", "--out", str(tmp_path)])
    main()
    found = kept("folds", tmp_path)
    assert found is not None and found["quick"] and found["asked"] and found["pi"] == 3.1416
    assert found == rounded(json.loads(capsys.readouterr().out))


def test_all_goes_on_where_it_was_cut_off_and_quick_leaves_the_slow_ones_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.__main__, "NAMES", ("folds", "heads", "risk"))
    asked = {"folds": folds, "heads": heads, "risk": risk}
    for name, module in asked.items():
        monkeypatch.setattr(module, "run", lambda quick, name=name: {"name": name})
    keep({"name": "kept"}, tmp_path / "folds.json")
    monkeypatch.setattr(sys, "argv", ["bench", "all", "--quick", "--out", str(tmp_path)])
    main()
    told = capsys.readouterr()
    assert list(json.loads(told.out)) == ["risk"]
    assert told.err.splitlines() == [
        "folds: kept already",
        "heads: left out, by name: python -m bench heads --quick",
        "risk: done",
    ]
    monkeypatch.setattr(sys, "argv", ["bench", "all", "--out", str(tmp_path)])
    main()
    assert list(json.loads(capsys.readouterr().out)) == ["heads"]
