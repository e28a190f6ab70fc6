"""ONNX Runtime tells its maker of nothing, wherever of ours it is first loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OPEN = "import sys, onnxruntime; onnxruntime.InferenceSession(sys.argv[1])"


def kept(tmp_path: Path, first: str, model: Path, **environ: str) -> list[str]:
    """What ONNX Runtime keeps for its telemetry when a model is opened after ``first``."""
    home = tmp_path / "home"
    home.mkdir()
    # Where CI or a test says that it is one, it tells nothing by itself.
    names = ("ORT_", "CI", "XDG_", "HEDGED_", "GITHUB_", "TF_BUILD")
    outside = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    subprocess.run(
        [sys.executable, "-c", f"{first}; {OPEN}", model],
        env=outside | {"HOME": str(home)} | environ,
        capture_output=True,
        timeout=120,
        check=True,
    )
    return [p.name for p in home.rglob("deviceid")]


@pytest.mark.parametrize(
    "module", ["posthoc.runtime", "posthoc.binding", "posthoc.features", "service.core", "hedged"]
)
def test_nothing_is_told(tmp_path: Path, classification_bundle: Path, module: str) -> None:
    first = f"import {module}"
    if module == "hedged":
        first += f"; hedged.load({str(classification_bundle)!r})"
    assert kept(tmp_path, first, classification_bundle / "head.onnx") == []


def test_alone_it_tells(tmp_path: Path, classification_bundle: Path) -> None:
    assert kept(tmp_path, "pass", classification_bundle / "head.onnx") == ["deviceid"]


def test_who_wants_it_told_is_heard(tmp_path: Path, classification_bundle: Path) -> None:
    model = classification_bundle / "head.onnx"
    found = kept(tmp_path, "import posthoc.runtime", model, ORT_DISABLE_TELEMETRY="0")
    assert found == ["deviceid"]
