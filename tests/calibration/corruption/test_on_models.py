"""What corruptions do to frozen models that others trained, or that raw columns reach."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench import networks
from bench.assets import mnist, mnist_input
from bench.material import Files, magika_files, mnist_files
from bench.suite import files_of, find
from calibration.corruption import CORRUPTIONS, corrupt, kind_of, measure
from hedged.demo.corpus import magika_labels
from posthoc.runtime import open_session

SOME = 1500
Rows = tuple[Files, dict[str, np.ndarray], np.ndarray]


def accuracies(rows: Rows, name: str, **options: int) -> list[float]:
    """Without corruption and at each severity."""
    files, x, y = rows
    session = open_session(files.model.read_bytes())
    known = measure(x)
    severities = [
        corrupt(x, name, s, known, keys=np.arange(len(y)), **options) for s in range(1, 6)
    ]
    return [float((session.run(None, i)[0].argmax(1) == y).mean()) for i in (x, *severities)]


@pytest.fixture(scope="module")
def digits() -> Rows:
    images, y = mnist()
    return mnist_files(), {"image": mnist_input(images[:SOME])}, y[:SOME]


@pytest.fixture(scope="module")
def letters() -> Rows:
    chosen = find("letter")
    files = files_of(chosen)
    data = pq.read_table(files.data).slice(0, SOME)
    names = [c for c in data.column_names if c not in (chosen.target, chosen.group)]
    return files, {"features": networks.matrix(data, names)}, data[chosen.target].to_numpy()


@pytest.fixture(scope="module")
def documents() -> Rows:
    files = magika_files()
    data = pq.read_table(files.data)
    every = np.sort(np.random.default_rng(0).permutation(len(data))[:80])
    data = data.take(pa.array(every)).combine_chunks()
    x = np.array(data["bytes"].combine_chunks().flatten(), np.int32).reshape(len(data), -1)
    names = list(magika_labels())
    return files, {"bytes": x}, np.array([names.index(v) for v in data["label"].to_pylist()])


@pytest.mark.parametrize("name", CORRUPTIONS["images"])
def test_digits_are_read_worse_and_worse(digits: Rows, name: str) -> None:
    assert kind_of(digits[1]) == "images"
    found = accuracies(digits, name)
    # One digit in a hundred is misread to begin with, so a first severity may not show.
    assert all(b <= a + 0.003 for a, b in pairwise(found)), found
    assert found[5] < found[0] - 0.1, found


@pytest.mark.parametrize("name", CORRUPTIONS["tables"])
def test_letters_are_told_worse_and_worse(letters: Rows, name: str) -> None:
    assert kind_of(letters[1]) == "tables"
    found = accuracies(letters, name)
    assert all(b < a for a, b in pairwise(found)), found
    assert found[5] < found[0] / 2, found


def test_file_types_are_told_worse_with_other_bytes(documents: Rows) -> None:
    assert kind_of(documents[1]) == "tokens"
    found = accuracies(documents, "tokens")
    assert all(b <= a + 0.03 for a, b in pairwise(found)), found
    assert found[5] < found[0] - 0.2, found
