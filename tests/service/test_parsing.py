"""Where bodies are parsed, and which are refused before."""

from __future__ import annotations

import asyncio
import threading

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posthoc.contract import TensorSpec
from service.errors import ServiceError
from service.parsing import LARGE, Parser, check_values, most_labels, most_values

TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab", max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3)
    ),
    max_leaves=20,
)


def size(tree):
    """Values inside of a tree."""
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return sum(1 + size(value) for value in inner)


def refused(body, limit, end=None):
    try:
        check_values(body, limit, end)
    except ServiceError as e:
        assert e.status == 413
        return True
    return False


@settings(deadline=None, derandomize=True, max_examples=200)
@given(TREES)
def test_values_are_never_undercounted(tree):
    n = size(tree)
    body = orjson.dumps(tree)
    assert n == 0 or refused(body, n - 1)
    # An empty list or object counts as one value, and nothing counts as more than that.
    empty = body.count(b"[]") + body.count(b"{}")
    assert not refused(body, n + empty)
    assert not refused(body + b"," * 9, n + empty, len(body))


@pytest.mark.parametrize("tail", [(), (4,), (2, 3), (2, 1, 3)])
def test_requests_of_the_most_rows_are_never_too_long(tail):
    def full(shape):
        return 0.5 if not shape else [full(shape[1:])] * shape[0]

    n = 200
    limit = most_values([TensorSpec(name="x", dtype="float32", shape=(-1, *tail))], n, 1)
    options = {"ids": ["i"] * n, "alpha": [0.1] * n}
    table = {f"c{k}": 1 for k in range(4)} | {"x": full(tail)}
    for request in (
        {"inputs": {"x": full((n, *tail))}, **options},
        {"rows": [table] * n, **options},
    ):
        check_values(orjson.dumps(request), limit)
    assert refused(orjson.dumps({"inputs": {"x": full((100 * n, *tail))}}), limit)


def test_rows_of_any_length_and_labels_have_a_limit():
    limit = most_values([TensorSpec(name="x", dtype="float32", shape=(-1, -1))], 10, 1 << 20)
    check_values(orjson.dumps([[0.12345] * 1000] * 100), limit)  # fills eight tenths of a MiB
    assert refused(b"0," * (1 << 19), limit)
    items = [{"id": "a", "label": [1.5, 2.5], "model": "m"}] * 1000
    check_values(orjson.dumps(items), most_labels(1000, 2))
    assert refused(orjson.dumps(items * 100), most_labels(1000, 2))


def test_large_bodies_are_parsed_beside_the_loop():
    async def main():
        parse = Parser()
        here = threading.current_thread()
        assert await parse(b"[]", lambda: 0, threading.current_thread) is here
        large = b"[" + b" " * LARGE + b"]"
        assert await parse(large, lambda: 9, threading.current_thread) is not here
        assert await parse(large, lambda: 1, threading.current_thread) is not here
        with pytest.raises(ServiceError, match="more than 0 values"):
            await parse(large, lambda: 0, threading.current_thread)
        # What follows the JSON of a binary request is not text.
        assert await parse(large, lambda: 0, threading.current_thread, 0) is not here
        parse.close()

    asyncio.run(main())
