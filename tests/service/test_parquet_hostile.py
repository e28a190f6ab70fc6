"""Parquet files that say less than they hold: refused by the headers of their pages, undecoded."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.errors import ServiceError
from service.labeltable import parse_table
from service.media import PARQUET
from service.parquet import _pages
from tests.service.helpers import healthy

MANY = 4_000_037  # a number that a file holds once
POOLS = []  # what a traceback still holds goes back to its pool, which must be there then
LIMIT, BYTES = 10_000, 1 << 20


def written(columns, **options):
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, **options)
    return sink.getvalue()


def varint(value, size):
    """``value`` as a zigzag varint of so many bytes; 0: of as few as it takes."""
    value, out = value << 1, []
    while value or not out or len(out) < size:
        out.append(value & 0x7F)
        value >>= 7
    return bytes([*(b | 0x80 for b in out[:-1]), out[-1]])


def lie(body, lies):
    """The file with other numbers in its footer, each in as many bytes as the true one took."""
    at = len(body) - 8 - int.from_bytes(body[-8:-4], "little")
    footer = body[at:]
    for true, told in lies.items():
        found = varint(true, 0)
        assert found in footer
        footer = footer.replace(found, varint(told, len(found)))
    return body[:at] + footer


@contextlib.contextmanager
def counted():
    """The memory that Arrow takes meanwhile, as a pool that knows its peak."""
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    POOLS.append(pool)
    pa.set_memory_pool(pool)
    try:
        yield pool
    finally:
        pa.set_memory_pool(before)


def parse(body):
    return list(parse_table(body, PARQUET, LIMIT, BYTES))


def bomb(version="1.0", codec="zstd"):
    """One row with one number by its footer, with 32 MB in a page of a few kB in truth."""
    label = pa.ListArray.from_arrays([0, MANY], np.zeros(MANY))
    body = written(
        {"id": ["a"], "label": label},
        use_dictionary=False,
        compression=codec,
        data_page_size=1 << 30,
        data_page_version=version,
        write_statistics=False,
    )
    group = pq.ParquetFile(io.BytesIO(body)).metadata.row_group(0)
    size = group.column(1).total_uncompressed_size
    return lie(body, {MANY: 1, size: 100, group.total_byte_size: 200})


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["zstd", "gzip", "brotli"])
def test_a_page_that_is_larger_than_the_footer_says_is_not_decoded(version, codec):
    body = bomb(version, codec)
    assert len(body) < BYTES
    found = pq.ParquetFile(io.BytesIO(body)).metadata
    told = found.row_group(0).column(1)
    assert (told.num_values, told.total_uncompressed_size) == (1, 100)
    with counted() as pool:  # what Arrow does with it
        with contextlib.suppress(pa.ArrowException, OSError):
            pq.ParquetFile(pa.BufferReader(body)).read()
        assert pool.max_memory() > 8 * MANY
    with counted() as pool:
        with pytest.raises(ServiceError, match=f"unpack to .* and {BYTES} are the most") as refused:
            parse(body)
        assert refused.value.status == 413
        assert pool.max_memory() < 4 * BYTES


def test_a_page_that_says_2_gb_is_refused_over_http(served):
    server = served(max_body_bytes=BYTES)
    body = written({"id": ["a"], "label": [1.5]}, use_dictionary=False, write_statistics=False)
    at = pq.ParquetFile(io.BytesIO(body)).metadata.row_group(0).column(1).data_page_offset
    # Field 1 of the header is the type, 0; field 2 the size when unpacked.
    assert body[at : at + 3] == b"\x15\x00\x15"
    size = 1 + next(k for k, b in enumerate(body[at + 3 :]) if b < 0x80)
    body = body[: at + 3] + varint(2**31 - 1, 0) + body[at + 3 + size :]
    for _ in range(3):
        answer = server.client.post("/v1/labels", content=body, headers={"content-type": PARQUET})
        assert answer.status_code == 413, answer.text
        assert "unpack to 2147483" in answer.json()["error"]["message"]
    assert healthy(server)


def test_texts_that_share_their_beginnings_are_decoded_a_few_at_a_time():
    rows, width = 3000, 40_000
    texts = ["x" * width + f"{n:05d}" for n in range(rows)]
    body = written(
        {"id": np.arange(rows), "label": texts},
        use_dictionary=False,
        column_encoding={"id": "PLAIN", "label": "DELTA_BYTE_ARRAY"},
        write_statistics=False,
    )
    del texts
    assert len(body) < BYTES // 4
    with counted() as pool:
        with pytest.raises(ServiceError) as refused:
            parse(body)
        assert refused.value.status == 413
        assert pool.max_memory() < 8 * BYTES  # of 120 MB


ENCODINGS = {0: "PLAIN", 6: "DELTA_LENGTH_BYTE_ARRAY", 7: "DELTA_BYTE_ARRAY", 8: "RLE_DICTIONARY"}
TEXTS = [f"name-{n % 7}" for n in range(500)]
KINDS = {
    "texts": pa.array(TEXTS),
    "nulls": pa.array([None if n % 3 else t for n, t in enumerate(TEXTS)]),
    "numbers": pa.array(np.arange(500) % 9),
    "lists": pa.array([[float(n)] * (n % 3 + 1) for n in range(500)]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "none", "use_dictionary": False, "data_page_size": 64},
        {"compression": "zstd", "row_group_size": 70, "dictionary_pagesize_limit": 20},
        {"compression": "gzip", "data_page_size": 100, "write_page_checksum": True},
        {"use_dictionary": False, "column_encoding": {"id": "DELTA_BYTE_ARRAY"}},
        {"use_dictionary": False, "column_encoding": {"id": "DELTA_LENGTH_BYTE_ARRAY"}},
    ],
    ids=["default", "plain", "groups", "pages", "shared", "lengths"],
)
def test_the_pages_of_any_file_add_up_to_its_footer(kind, version, options):
    """The footer of an honest file says what its pages and their headers take."""
    columns = {"id": [f"row-{n}" for n in range(500)], "label": KINDS[kind]}
    if "column_encoding" in options:
        options = {**options, "column_encoding": {**options["column_encoding"]}}
        plain = "label.list.element" if kind == "lists" else "label"
        options["column_encoding"][plain] = "PLAIN"
    body = written(columns, data_page_version=version, **options)
    found = pq.ParquetFile(io.BytesIO(body)).metadata
    for group in range(found.num_row_groups):
        for c in range(found.num_columns):
            chunk = found.row_group(group).column(c)
            pages = list(_pages(body, chunk))
            assert sum(p.values for p in pages if not p.dictionary) == chunk.num_values
            headers = chunk.total_uncompressed_size - sum(p.size for p in pages)
            assert 10 * len(pages) <= headers <= 100 * len(pages)
            assert any(p.dictionary for p in pages) == chunk.has_dictionary_page
            told = {ENCODINGS[p.encoding] for p in pages if not p.dictionary}
            assert told <= {*chunk.encodings}
    assert parse(body) == [
        {"id": i, **({} if label is None else {"label": label})}
        for i, label in zip(columns["id"], KINDS[kind].to_pylist(), strict=True)
    ]


def test_damaged_files_are_labels_or_refused():
    whole = [
        written({"id": [f"z{k}" for k in range(50)], "label": list("abc" * 16 + "ab")}, **options)
        for options in ({}, {"data_page_version": "2.0", "compression": "zstd"})
    ]
    with counted() as pool:
        for seed in range(400):
            rng = np.random.default_rng(seed)
            body = bytearray(whole[seed % 2])
            # The pages and not the footer, whose damage others test.
            pages = len(body) - 8 - int.from_bytes(body[-8:-4], "little")
            for at in rng.integers(4, pages, size=rng.integers(1, 5)):
                body[at] = rng.integers(256)
            try:
                labels = parse(bytes(body))
            except ServiceError as e:
                assert e.status in (400, 413)
            else:
                assert len(labels) == 50
        assert pool.max_memory() < 8 * BYTES


def test_many_small_pages_are_refused():
    rows = 9000
    body = written({"id": np.arange(rows), "label": np.arange(rows)}, row_group_size=1)
    with pytest.raises(ServiceError, match="more than 16384 pages; write larger ones") as refused:
        parse(body)
    assert refused.value.status == 400
