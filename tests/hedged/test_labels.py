"""``hedged labels`` and ``hedged ledger``: every kind of file, what is said, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from service.joiner import Joiner
from service.ledger import Ledger
from tests.hedged.conftest import Call, assert_one_line

N = 2500
NAMES = ("ant", "bee", "cat")
IDENTITY = "c" * 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of N predictions of a classifier, named 0000 to 2499, and ten of a regressor."""
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger.open(path)
    ledger.register("pets", "1", IDENTITY, task="classification", classes=NAMES)
    ledger.register("size", "1", IDENTITY, task="regression", width=2)
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(3), N).astype(np.float32)
    fields = {"label": probs.argmax(1), "probs": probs, "confidence": probs.max(1)}
    ledger.record("pets", "1", IDENTITY, ids(N), fields, None)
    numbers = {"mean": rng.normal(size=(10, 2)), "std": np.ones((10, 2))}
    ledger.record("size", "1", IDENTITY, [f"s{i}" for i in range(10)], numbers, None)
    ledger.close()
    return path


def ids(n: int) -> list[str]:
    return [f"{i:04d}" for i in range(n)]


def truth(n: int = N) -> list[int]:
    return np.random.default_rng(1).integers(0, 3, n).tolist()


def write(path: Path, columns: dict[str, list[Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path, row_group_size=400)
    elif path.suffix == ".csv":
        pacsv.write_csv(pa.table(columns), path)
    else:
        rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def counted(path: Path, model: str = "pets") -> dict[str, Any]:
    """What the ledger says after a service's joiner has looked."""
    ledger = Ledger.open(path)
    Joiner(ledger).step()
    (found,) = ledger.calibration(model)["models"]
    ledger.close()
    return found


@pytest.mark.parametrize("kind", ["parquet", "csv", "ndjson", "jsonl"])
def test_every_kind_of_file_gives_the_same(call: Call, path: Path, kind: str) -> None:
    y = truth()
    names = [NAMES[v] if i % 2 else v for i, v in enumerate(y)]
    mixed = kind != "parquet"  # a column of Parquet has one type
    columns = {"id": ids(N), "label": names if mixed else y, "model": ["pets"] * N}
    if kind == "csv":
        columns["label"] = list(map(str, names))
    file = write(path.with_name(f"truth.{kind}"), columns)
    done = call("labels", path, file, "--json")
    assert done.code == 0, done.err
    assert done.json["rows"] == N
    assert done.json["counts"] == counts(accepted=N)
    again = call("labels", path, file, "--json")
    assert (again.code, again.json["counts"]) == (0, counts(duplicate=N))
    ledger = Ledger.open(path)
    assert {r.value for r in ledger.claim(10)} <= {0, 1, 2}
    ledger.close()
    found = counted(path)
    rng = np.random.default_rng(0)
    assert found["labelled"] == N
    assert found["accuracy"] == np.mean(rng.dirichlet(np.ones(3), N).argmax(1) == y)


def counts(**given: int) -> dict[str, int]:
    names = ("accepted", "pending", "duplicate", "conflict", "invalid")
    return dict.fromkeys(names, 0) | given


def test_a_file_that_was_stopped_half_way_is_gone_on_with(call: Call, path: Path) -> None:
    y = truth()
    half = write(path.with_name("half.parquet"), {"id": ids(1500), "label": y[:1500]})
    whole = write(path.with_name("whole.parquet"), {"id": ids(N), "label": y})
    assert call("labels", path, half, "--model", "pets").code == 0
    done = call("labels", path, whole, "--model", "pets", "--json")
    assert done.json["counts"] == counts(duplicate=1500, accepted=1000)


def test_columns_and_models_are_named(call: Call, path: Path) -> None:
    y = np.random.default_rng(2).normal(size=(10, 2))
    table = {"order": [f"s{i}" for i in range(10)], "size": y.tolist()}
    for name in ("a.parquet", "a.ndjson"):
        file = write(path.with_name(name), table | {"colour": ["red"] * 10})
        done = call("labels", path, file, "--id", "order", "--label", "size", "--json")
        assert done.json["counts"]["invalid"] == 0, done.out
    text = {"order": table["order"], "size": [str(v) for v in table["size"]]}
    file = write(path.with_name("a.csv"), text)
    done = call(
        "labels", path, file, "--id", "order", "--label", "size", "--model", "size", "--json"
    )
    assert done.json["counts"] == counts(duplicate=10)
    assert counted(path, "size")["labelled"] == 10
    missing = call("labels", path, file, "--label", "size")
    assert_one_line(missing, "no column 'id'; it has order, size")


def test_what_does_not_go_in_is_named(call: Call, path: Path) -> None:
    lines = [
        {"id": "0000", "label": "ant", "model": "pets"},
        {"id": "0000", "label": "bee", "model": "pets"},
        {"id": "0001", "label": "dog", "model": "pets"},
        {"id": "0 1", "label": 1, "model": "pets"},
        {"id": "0002", "label": None, "model": "pets"},
        {"id": "late", "label": 2, "model": "pets"},
        {"id": "nobody", "label": 1},
    ]
    file = path.with_name("mixed.ndjson")
    file.write_text("\n".join(map(json.dumps, lines)) + "\nnothing\n[1]\n")
    rejected = path.with_name("rejected.ndjson")
    done = call("labels", path, file, "--rejected", rejected, "--json")
    assert done.code == 1
    assert done.json["counts"] == counts(accepted=1, conflict=1, pending=1, invalid=6)
    found = [json.loads(line) for line in rejected.read_text().splitlines()]
    assert [(r["row"], r["result"]) for r in found] == [
        (2, "conflict"),
        *((n, "invalid") for n in (3, 4, 5, 7, 8, 9)),
    ]
    for r, word in zip(
        found,
        ("another label", "fits no", "the id", "no label", "which model", "not JSON", "no JSON"),
        strict=True,
    ):
        assert word in r["reason"], r
    assert (found[1]["id"], found[1]["label"], found[1]["model"]) == ("0001", "dog", "pets")
    shown = call("labels", path, file)
    assert shown.code == 1 and "conflict" in shown.out and "9 labels in" in shown.out
    assert call("labels", path, file, "--rejected", file).code == 2  # it would be overwritten
    assert len(file.read_text().splitlines()) == 9


def test_names_that_look_like_numbers_are_asked_about(call: Call, path: Path) -> None:
    ledger = Ledger.open(path)
    ledger.register("digits", "1", IDENTITY, task="classification", classes=("2", "1", "0"))
    fields = {"label": np.zeros(2), "confidence": np.ones(2)}
    ledger.record("digits", "1", IDENTITY, ["d0", "d1"], fields, None)
    ledger.close()
    file = write(path.with_name("d.csv"), {"id": ["d0", "d1"], "label": [2, 1]})
    base = ("labels", path, file, "--model", "digits")
    assert_one_line(call(*base), "has a class named '2'")
    assert call(*base, "--label-as", "name", "--json").json["counts"] == counts(accepted=2)
    as_number = call(*base, "--label-as", "number", "--json").json["counts"]
    assert as_number == counts(conflict=1, duplicate=1)  # index 2 is the name 0, 1 is 1
    parquet = write(path.with_name("d.parquet"), {"id": ["d0"], "label": ["2"]})
    assert call("labels", path, parquet, "--model", "digits").code == 0
    assert call("labels", path, parquet, "--label-as", "name").code == 2


def test_what_a_user_can_mend_is_one_line(call: Call, path: Path, tmp_path: Path) -> None:
    good = write(tmp_path / "good.csv", {"id": ["0001"], "label": [1]})
    assert_one_line(call("labels", tmp_path / "none.sqlite", good), "no such ledger")
    assert not (tmp_path / "none.sqlite").exists()
    assert_one_line(call("labels", path, tmp_path / "no.csv"), "no such file")
    (tmp_path / "x.txt").write_text("id,label\n")
    assert_one_line(call("labels", path, tmp_path / "x.txt"), "unknown extension")
    (tmp_path / "bad.parquet").write_text("no Parquet")
    assert_one_line(call("labels", path, tmp_path / "bad.parquet"), "cannot be read")
    odd = write(tmp_path / "odd.parquet", {"id": ["a"], "label": [True]})
    assert_one_line(call("labels", path, odd), "class names, numbers or lists of numbers")
    (tmp_path / "torn.csv").write_text("id,label\na,1\nb,2\nc,3,4\n")
    assert_one_line(call("labels", path, tmp_path / "torn.csv"), "torn.csv")
    assert_one_line(call("labels", "mysql://h/d", good), "mysql")
    away = call("labels", "postgresql://localhost:1/nowhere", good)
    assert_one_line(away, "run the same command again", code=75)


def test_what_a_ledger_holds_and_what_leaves_it(call: Call, path: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "y.csv", {"id": ids(20), "label": truth(20)})
    call("labels", path, file, "--model", "pets")
    found = call("ledger", "info", path, "--json").json
    assert (found["predictions"], found["labels"], found["pending"]) == (N + 10, 20, 20)
    assert [m["model"] for m in found["models"]] == ["pets", "size"]
    text = call("ledger", "info", path).out
    assert "2,510 predictions" in text and "pets" in text
    done = call("ledger", "forget", path, "0000", "nobody", "--model", "pets", "--json")
    assert done.code == 1 and done.json == {"forgotten": {"0000": 1, "nobody": 0}}
    assert "no such prediction: nobody" in done.err
    assert call("ledger", "forget", path, "s0").code == 0
    assert call("ledger", "purge", path, "--older-than", "1h", "--json").json["predictions"] == 0
    counted(path)
    gone = call("ledger", "purge", path, "--older-than", "0s", "--json").json
    assert gone == {"predictions": N + 8, "expired_labels": 0}
    assert "0 predictions removed" in call("ledger", "purge", path, "--older-than", "0s").out
    for usage in (
        ("info", path, "--older-than", "1d"),
        ("info", path, "an-id"),
        ("info", path, "--model", "pets"),
        ("purge", path),
        ("purge", path, "--older-than", "90"),
        ("purge", path, "--older-than", "d"),
        ("forget", path),
        ("mend", path),
    ):
        assert call("ledger", *usage).code == 2, usage
    assert_one_line(call("ledger", "info", tmp_path / "none"), "no such ledger")
