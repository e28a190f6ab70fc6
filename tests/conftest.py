"""Bundles that many tests read and none changes: fitted once a session by the real fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.factory import tiny_bundle


@pytest.fixture(scope="session")
def classification_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A three-class bundle over the columns a, b, c, d."""
    return tiny_bundle(tmp_path_factory.mktemp("classification") / "bundle")


@pytest.fixture(scope="session")
def regression_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of one output over the columns p, q, r."""
    return tiny_bundle(tmp_path_factory.mktemp("regression") / "bundle", "regression")
