"""Paths, patterns and URLs: what is found, what is refused, and what is never shown."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from posthoc.contract import DataError
from service.scoring import score
from service.scoring.places import files_below, open_place, overlap, shown_url
from tests.service.scoring.conftest import table, tree

ODD = ["plain", "with space", "é ü 名", "a#b", "50%", "a%20b", "q?m", "x=1", "[1]", "semi;colon+&"]


def names(place: str | Path) -> list[str]:
    return [f.name for f in files_below(open_place(place))]


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/x.csv", "a/y.csv", "a/b/x.csv", "a/b/c/z.csv", "d/x.csv", "a/_h.csv")
    touch(tmp_path, "a/.git/x.csv", "x.csv")
    for pattern, found in {
        "a/*.csv": ["x.csv", "y.csv"],
        "*/x.csv": ["a/x.csv", "d/x.csv"],
        "a/**/*.csv": ["b/c/z.csv", "b/x.csv", "x.csv", "y.csv"],
        "**/[yz].csv": ["a/b/c/z.csv", "a/y.csv"],
        "a/?.csv": ["x.csv", "y.csv"],
        "**": ["a/b/c/z.csv", "a/b/x.csv", "a/x.csv", "a/y.csv", "d/x.csv", "x.csv"],
        "a": ["b/c/z.csv", "b/x.csv", "x.csv", "y.csv"],
        "a/x.csv": ["x.csv"],
        "a/_h.csv": ["_h.csv"],  # whoever names a file means it
    }.items():
        assert names(tmp_path / pattern) == found, pattern
        assert names(f"file://{tmp_path}/{pattern}") == found or "?" in pattern
        monkeypatch.chdir(tmp_path)
        assert names(pattern) == found
    for missing, message in (("b/*.csv", "no file has such a name"), ("nope", "no such file")):
        with pytest.raises(DataError, match=message):
            names(tmp_path / missing)


@pytest.mark.parametrize("name", ODD)
def test_odd_names(name: str, bundle: Path, tmp_path: Path) -> None:
    source = tmp_path / name / "in"
    file = source / name / f"{name}.parquet"
    file.parent.mkdir(parents=True)
    pq.write_table(table(5, 0), file)
    out = tmp_path / name / "out"
    score(bundle, source, out)
    assert f"{name}/{name}.parquet" in tree(out)
    score(bundle, file, tmp_path / "o2")
    assert f"{name}.parquet" in tree(tmp_path / "o2")
    if "?" not in name:
        shown = str(file).replace("a%20b", "a%2520b")
        score(bundle, f"file://{shown}", f"file://{tmp_path}/o 3")
        assert tree(tmp_path / "o 3") == tree(tmp_path / "o2")


def test_urls_that_cannot_be_opened_tell_no_secrets() -> None:
    for url, shown in {
        "http://host/x": "http://host/x",
        "s3://AKIA:secret@bucket/x?scheme=ftp": "s3://bucket/x",
        "s3://AKIA:sec/ret@bucket/x": "s3://bucket/x",
        "s3://AKIA:sec/ret@bucket/x?region=z&no=p%40ss": "s3://bucket/x",
        "s3://bucket/x?secret_key=secret": "s3://bucket/x",
    }.items():
        with pytest.raises(DataError, match=f"^{re.escape(shown)}: this URL") as caught:
            open_place(url)
        error: BaseException | None = caught.value
        while error is not None:
            assert not re.search("AKIA|secret|sec/ret|p%40ss", str(error)), str(error)
            error = error.__cause__


def test_what_is_shown_of_a_url() -> None:
    for url, shown in {
        "s3://bucket/a@b/c": "s3://bucket/a@b/c",
        "s3://u:p@bucket/a@b?x=y": "s3://bucket/a@b",
        "abfs://container@account.dfs.core.windows.net/p": None,
        "abfs://container:pass@account/p": "abfs://container@account/p",
        "file:///a/b": None,
        "s3://host:9000/a@b": None,
    }.items():
        assert shown_url(url) == (url if shown is None else shown)


def test_places_travel_and_keep_their_settings_to_themselves() -> None:
    url = "s3://AKIA:secret@bucket/a%20b/x?endpoint_override=127.0.0.1:9&scheme=http&region=eu-x"
    place = pickle.loads(pickle.dumps(open_place(url)))
    assert (str(place), place.path, place.local) == ("s3://bucket/a%20b/x", "bucket/a b/x", None)
    assert place.fs.region == "eu-x"
    assert "secret" not in repr(place) + repr(place.below("y")) + str(place.below("y"))


def test_what_overlaps(tmp_path: Path) -> None:
    for source, output, found in (
        ("in", "out", False),
        ("in", "in", True),
        ("in", "in/out", True),
        ("in/sub", "in", True),
        ("in", "in2", False),
        ("in/*.csv", "in/out", False),
        ("in/**/*.csv", "in/out", True),
        ("in/*/x.csv", "in/out", True),
        ("in/a*/x.csv", "in/out", False),
        ("in/*.csv", "in", True),
        ("*/x.csv", "out/y", False),
    ):
        a, b = open_place(tmp_path / source), open_place(tmp_path / output)
        assert overlap(a, b) == found, (source, output)
    assert overlap(open_place("s3://b/in?region=x"), open_place("s3://b/in/out?region=y"))
    assert not overlap(open_place("s3://b/in?region=x"), open_place(tmp_path))
