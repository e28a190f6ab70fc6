"""CSV and NDJSON: rows that others wrote come back as they were, and bad ones are found exactly."""

from __future__ import annotations

import csv
import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.scoring.formats import lines
from tests.service.scoring.files import FLOAT, INTEGER, look, rows_of

SETTINGS = settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
TEXT = st.text(
    st.one_of(st.sampled_from(list('a,"\n\r ;\té’😀0')), st.characters(exclude_categories=["C"])),
    max_size=6,
)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False, width=64)
WHOLE = st.integers(-(1 << 63), (1 << 63) - 1)
NO_NUMBER = ["abc", "1,5", "0x10", "1_000", "--1", "１", "1 2", "None"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and groups of a few lines."""
    monkeypatch.setattr(lines, "BLOCK_BYTES", 32)
    monkeypatch.setattr(lines, "GROUP_ROWS", 2)


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@given(
    rows=st.lists(st.tuples(NUMBERS, WHOLE, TEXT), max_size=12),
    ends=st.sampled_from(["\r\n", "\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    bom=st.booleans(),
    packed=st.booleans(),
    faults=st.dictionaries(st.integers(0, 11), st.sampled_from(["number", "few", "many", "utf8"])),
)
@SETTINGS
def test_what_pythons_csv_wrote_is_read(
    tmp_path: Path,
    rows: list[tuple[float, int, str]],
    ends: str,
    quoting: int,
    bom: bool,
    packed: bool,
    faults: dict[int, str],
) -> None:
    path = tmp_path / ("rows.csv.gz" if packed else "rows.csv")
    part = tmp_path / "part.csv"
    data = b"\xef\xbb\xbf" if bom else b""
    names = ["x", "name, of it", "n"]
    for k, (x, n, text) in enumerate([("x", "n", "name, of it"), *rows]):
        fields = [repr(x) if k else "x", text, str(n)]
        fault = faults.get(k - 1) if k else None
        if fault == "number":
            fields[0] = NO_NUMBER[k % len(NO_NUMBER)]
        if fault == "few":
            fields = fields[:2]
        if fault == "many":
            fields.append("")
        with part.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator=ends, quoting=quoting).writerow(fields)
        data += part.read_bytes().replace(b"e", b"\xe9") if fault == "utf8" else part.read_bytes()
    put(path, data)
    there = {k: v for k, v in faults.items() if k < len(rows)}
    utf8 = {k for k, v in there.items() if v == "utf8"}
    no_e = {k for k in utf8 if "e" not in f"{rows[k][0]!r}{rows[k][2]}"}
    assert tuple(look(path).schema.names) == ("x", "name, of it", "n")
    inputs = {"x": FLOAT, "n": INTEGER}
    for cut in (False, True):
        got, bad = rows_of(path, names, inputs, cut=cut)
        assert set(bad) == set(there) - no_e
        for k, (x, n, text) in enumerate(rows):
            if k not in bad:
                # An empty field in quotes is a text, one without is none.
                empty = "" if quoting == csv.QUOTE_ALL else None
                assert got[k] == {"x": x, "n": n, "name, of it": text or empty}
    for k, fault in there.items():
        if k in bad:
            wanted = {
                "number": f"column 'x': is {NO_NUMBER[(k + 1) % len(NO_NUMBER)]!r}, which is no",
                "few": "has 2 fields, and the first line 3",
                "many": "has 4 fields, and the first line 3",
                "utf8": "is no text in UTF-8 (byte 0xe9",
            }[fault]
            assert bad[k].startswith(wanted)


@given(
    rows=st.lists(st.tuples(NUMBERS, WHOLE, st.one_of(TEXT, st.none(), st.booleans(), NUMBERS))),
    packed=st.booleans(),
    faults=st.dictionaries(st.integers(0, 11), st.sampled_from(["number", "list", "cut", "nan"])),
)
@SETTINGS
def test_what_pythons_json_wrote_is_read(
    tmp_path: Path, rows: list[tuple[float, int, Any]], packed: bool, faults: dict[int, str]
) -> None:
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.ndjson")
    text = '{"x": 0, "n": 0, "it": null}\n\n'
    for k, (x, n, it) in enumerate(rows):
        row: dict[str, Any] = {"x": x, "n": n, "it": it}
        fault = faults.get(k)
        if fault == "number":
            row["x"] = NO_NUMBER[k % len(NO_NUMBER)]
        line = json.dumps([row] if fault == "list" else row, ensure_ascii=bool(k % 2))
        line = line.replace(f'"n": {n}', '"n": NaN') if fault == "nan" else line
        text += (line[:-1] if fault == "cut" else line) + ("\r\n" if k % 3 else "\n")
    put(path, text.encode())
    there = {k + 1: v for k, v in faults.items() if k < len(rows)}
    for cut in (False, True):
        got, bad = rows_of(path, ["it", "x", "n"], {"x": FLOAT, "n": INTEGER}, cut=cut)
        assert set(bad) == set(there)
        for k, (x, n, it) in enumerate(rows, 1):
            if k not in bad:
                shown = it if it is None or isinstance(it, str) else got[k]["it"]
                assert got[k] == {"x": x, "n": n, "it": shown}
                assert shown is it or shown == it or json.loads(shown) == it
    wanted = {
        "number": "column 'x': is '",
        "list": "is no JSON object",
        "cut": "is no JSON (",
        "nan": "is no JSON (",
    }
    for k, fault in there.items():
        assert bad[k].startswith(wanted[fault])


@pytest.mark.parametrize("name", ["rows.csv", "rows.ndjson"])
def test_numbers_are_read_as_python_reads_them(name: str, tmp_path: Path) -> None:
    texts = [
        "1",
        " 2.5 ",
        "+3",
        "-4e-3",
        ".5",
        "6.",
        "true",
        "False",
        "1e400",
        "nan",
        "-inf",
        "7.0",
    ]
    texts += ["9007199254740993", "-9223372036854775808", "9223372036854775808", "1e3", "8.5"]
    if name == "rows.csv":
        data = "f,i\n" + "".join(f'"{t}","{t}"\n' for t in texts)
    else:
        data = "".join(json.dumps({"f": t, "i": t}) + "\n" for t in texts)
    path = put(tmp_path / name, data.encode())
    got, bad = rows_of(path, ["f", "i"], {"f": FLOAT, "i": INTEGER}, at_once=1)
    at_once, same_bad = rows_of(path, ["f", "i"], {"f": FLOAT, "i": INTEGER}, at_once=99)
    assert same_bad == bad
    for k, text in enumerate(texts):
        number = {"true": 1.0, "false": 0.0}.get(text.lower(), 0.0 if k in (6, 7) else None)
        want = float(text) if number is None else number
        assert got[k]["f"] == want or (math.isnan(got[k]["f"]) and math.isnan(want)), text
        assert at_once[k]["f"] == want or math.isnan(want)
        assert at_once[k]["i"] == got[k]["i"]
        exact = int(want) if math.isfinite(want) and want.is_integer() else None
        if text.lstrip("-").isdigit():
            exact = int(text)
        fits = exact is not None and -(1 << 63) <= exact < 1 << 63
        assert (k in bad) == (not fits), text
        assert got[k]["i"] == (exact if fits else None)
        assert fits or bad[k] == f"column 'i': is {text!r}, which int64 cannot hold"


def test_other_columns_are_text_as_it_stands(tmp_path: Path) -> None:
    path = put(tmp_path / "r.csv", b'x,id,e,t\n1,007, a ,TRUE\n2,"",,1.50\n')
    got, bad = rows_of(path, ["id", "e", "t"], {})
    assert not bad
    assert got == [{"id": "007", "e": " a ", "t": "TRUE"}, {"id": "", "e": None, "t": "1.50"}]
    path = put(tmp_path / "r.jsonl", b'{"id":"007","v":[1, {"a":null}],"n":7}\n{"n":true}\n')
    got, bad = rows_of(path, ["id", "v", "n"], {})
    assert not bad
    assert got == [
        {"id": "007", "v": '[1,{"a":null}]', "n": "7"},
        {"id": None, "v": None, "n": "true"},
    ]


def test_lists_of_numbers_and_what_is_wrong_in_them(tmp_path: Path) -> None:
    values = [[1, 2.5], [True, "3"], [1, "x"], [1, None], 7, [[1]], None, [1, 2, 3], {"a": 1}]
    text = "".join(json.dumps({"v": v}) + "\n" for v in values)
    path = put(tmp_path / "r.ndjson", text.encode())
    got, bad = rows_of(path, ["v"], {"v": FLOAT}, at_once=99)
    # Nulls and lengths are told by the reader of tensors, as for any other format.
    assert [row["v"] for row in got] == [
        [1.0, 2.5],
        [1.0, 3.0],
        None,
        [1.0, None],
        None,
        None,
        None,
        [1.0, 2.0, 3.0],
        None,
    ]
    assert bad == {
        2: "column 'v': holds a value that is 'x', which is no number",
        4: "column 'v': holds 7 where a list is expected",
        5: "column 'v': holds a value that is [1], which is no number",
        8: "column 'v': holds {'a': 1} where a list is expected",
    }
    path = put(tmp_path / "w.ndjson", b'{"v":[[9007199254740993,1.0]]}\n{"v":[[1.5,2]]}\n')
    got, bad = rows_of(path, ["v"], {"v": INTEGER}, at_once=99)
    assert got == [{"v": [[9007199254740993, 1]]}, {"v": None}]
    assert list(bad) == [1] and "is 1.5, which int64 cannot hold" in bad[1]


def test_a_quote_that_is_never_closed_is_told(tmp_path: Path) -> None:
    path = put(tmp_path / "r.csv", b'x,t\n1,a\n2,"b\n3,c\n4,d\n')
    got, bad = rows_of(path, ["x", "t"], {"x": FLOAT}, at_once=99)
    assert got[0] == {"x": 1.0, "t": "a"}
    assert bad == {1: "its last quote is never closed"}
    long = put(tmp_path / "long.csv", b'x,t\n1,"' + b"b" * 140_000 + b"\n3,c\n")
    with pytest.raises(OSError, match="a quote is not closed within 131,072 characters"):
        look(long)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("r.csv", b"", "the file is empty"),
        ("r.csv", b"\n\r\n", "the file is empty"),
        ("r.csv", "x,é\n1,2\n".encode("latin-1"), "first line is no text in UTF-8 .byte 0xe9"),
        ("r.csv", "x,y\n1,2\n".encode("utf-16"), "UTF-16.*iconv"),
        ("r.csv", "x,y\n1,2\n".encode("utf-16-le"), "UTF-16.*iconv"),
        ("r.csv", b"x,y\r1,2\r3,4\r", "carriage returns alone"),
        ("r.ndjson", b"", "none of its first 0 lines is a JSON object"),
        ("r.ndjson", b"[\n1,\n2]\n", "none of its first . lines is a JSON object"),
        ("r.ndjson", '{"a":1}'.encode("utf-16"), "UTF-16"),
    ],
)
def test_files_that_are_something_else(
    name: str, data: bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match=message):
        look(put(tmp_path / name, data))


def test_damaged_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(b"x,y\n" + b"".join(b"%d,%d\n" % (k, k * k) for k in range(999)))
    for data in (whole[:-100], whole[:60] + b"\x00" * 30 + whole[90:], b"x,y\n1,2\n"):
        path = tmp_path / "r.csv.gz"
        path.write_bytes(data)
        with pytest.raises(OSError):
            look(path)


def test_a_file_without_rows(tmp_path: Path) -> None:
    layout = look(put(tmp_path / "r.csv", b"x,y\n"))
    assert layout.groups == () and layout.schema.names == ["x", "y"]
    assert rows_of(tmp_path / "r.csv", ["x"], {"x": FLOAT}) == ([], {})


def test_groups_follow_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", 64)
    monkeypatch.setattr(lines, "GROUP_ROWS", 10)
    data = b"x,y\n" + b"".join(b'%d,"a\nb"\n\n' % k for k in range(100))
    layout = look(put(tmp_path / "r.csv", data))
    assert sum(layout.groups) == 100 and len(layout.groups) > 5
    for start, first in zip(layout.starts, layout.groups, strict=True):
        assert first > 0 and data[start - 1 : start] == b"\n"
    packed = look(put(tmp_path / "r.csv.gz", data))
    assert packed.groups == (100,)
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 100)
    with pytest.raises(OSError, match="a line has more than 100 bytes"):
        look(put(tmp_path / "r.ndjson", b'{"a":"' + b"b" * 500))
