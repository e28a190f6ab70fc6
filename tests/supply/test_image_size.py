"""deploy/image_size.py in other environments: no size where a package of the lock is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.supply.dockerfile import ROOT


def told(site: Path, lock: str, *options: str) -> subprocess.CompletedProcess[str]:
    """The command, for a folder of packages and a lock file of that text."""
    (site.parent / "lock.txt").write_text(lock)
    return subprocess.run(
        [
            *(sys.executable, ROOT / "deploy/image_size.py", "--site", site),
            *("--lock", site.parent / "lock.txt", *options),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with one package, `small` 1.0, of 1,000 bytes and a few of its records."""
    info = tmp_path / "site/small-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: small\nVersion: 1.0\n")
    (info.parent / "small.py").write_text("#" * 1000)
    (info / "RECORD").write_text("small.py,,\nsmall-1.0.dist-info/METADATA,,\n")
    return info.parent


def test_what_is_there_is_counted(site: Path) -> None:
    done = told(site, "small==1.0 \\\n    --hash=sha256:00\n", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["missing"] == [] and 1000 < found["bytes"] < 1100
    assert "in all, 1 packages" in told(site, "small==1.0\n").stdout


@pytest.mark.parametrize("lacking", ["large==2.0", "small==1.1"])
def test_what_is_missing_is_named_and_nothing_is_summed(site: Path, lacking: str) -> None:
    done = told(site, f"small==1.0\n{lacking}\n" if "large" in lacking else f"{lacking}\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"not there: {lacking}\n" in done.stderr
    assert "pip install --require-hashes" in done.stderr
    as_json = told(site, f"{lacking}\n", "--json")
    assert (as_json.returncode, json.loads(as_json.stdout)) == (1, {"missing": [lacking]})
