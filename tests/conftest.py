"""Bundles that many tests read and none changes, fitted once a session by the real fit; and the
order in which several processes take the tests."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.factory import tiny_bundle

# Files whose tests take minutes, the longest first: begun last, one process would end long after
# the others.
LONGEST = (
    "test_readme.py",
    "test_examples.py",
    "service/scoring/test_ray_nodes.py",
    "service/scoring/test_ray_kill.py",
    "service/scoring/test_ray.py",
    "walks/test_magika.py",
    "walks/test_demo.py",
    "bench/test_dense.py",
    "service/test_drain.py",
    "bench/test_bayescap.py",
    "walks/test_incident.py",
    "service/test_page.py",
    "hedged/test_compare.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of LONGEST first; all others as they were found."""
    root = Path(__file__).parent
    order = {root / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="session")
def classification_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A three-class bundle over the columns a, b, c, d."""
    return tiny_bundle(tmp_path_factory.mktemp("classification") / "bundle")


@pytest.fixture(scope="session")
def regression_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of one output over the columns p, q, r."""
    return tiny_bundle(tmp_path_factory.mktemp("regression") / "bundle", "regression")


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A Ray cluster of this machine with room for two workers; `connect` finds it."""
    from service.scoring.cluster import connect

    with ExitStack() as stack:
        with warnings.catch_warnings():
            # A start that Ray gave up, on a busy machine, leaves processes until this one ends.
            warnings.simplefilter("ignore", ResourceWarning)
            stack.enter_context(connect(2))
            gc.collect()
        yield
