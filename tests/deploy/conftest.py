"""What several tests of deploy/ stand on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.composed import DEPLOY
from tests.deploy.kustomized import unpack_kubectl
from tests.service.ledger.conftest import postgres

__all__ = ["postgres"]

CRITICAL, WARNING = "http://127.0.0.1:9/critical", "http://127.0.0.1:9/warning"


def make_secrets(deploy: Path, critical: str = CRITICAL, warning: str = WARNING) -> str:
    """Run deploy/secrets.sh as somebody whose PATH has hedged; what it said."""
    done = subprocess.run(
        [deploy / "secrets.sh", critical, warning],
        env={"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stderr


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of deploy/ with its secrets."""
    folder = tmp_path_factory.mktemp("deployed") / "deploy"
    shutil.copytree(DEPLOY, folder, ignore=shutil.ignore_patterns("secrets", "bundles"))
    make_secrets(folder)
    return folder


@pytest.fixture(scope="session")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real kubectl."""
    return unpack_kubectl(tmp_path_factory.mktemp("kubectl"))
