"""deploy/kubernetes/bundles-from-bucket: its init container, run against a real object store."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from service.bundles import find_bundles, write_active
from service.models import load_live
from tests.deploy.kustomized import read
from tests.factory import version_of
from tests.service.scoring.store import running_store

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing"}


def test_the_init_container_copies_bundles_that_are_served(
    classification_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (deployment,) = read("bundles-from-bucket/copy.yaml")
    spec = deployment["spec"]["template"]["spec"]
    (container,) = spec["initContainers"]
    assert container["command"] == ["python", "-c"]
    (code,) = container["args"]
    assert code.count('"/bundles"') == 1
    root, copied = tmp_path / "root", tmp_path / "copied"
    for version in ("1", "2"):
        version_of(classification_bundle, root, "tiny", version)
    write_active(root / "tiny", "2")
    copied.mkdir()  # as the mounted volume is there
    environment = {"PATH": os.environ["PATH"], "AWS_EC2_METADATA_DISABLED": "true", **CREDENTIALS}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with running_store() as store:
        at = f"scheme=http&endpoint_override=127.0.0.1:{store.port}"
        (bucket,) = [e["value"] for e in container["env"] if e["name"] == "BUCKET"]
        assert bucket.startswith("s3://") and "?region=" in bucket
        url = f"{bucket}&{at}"
        pafs.copy_files(str(root), f"{url}&allow_bucket_creation=true")
        subprocess.run(
            [sys.executable, "-c", code.replace("/bundles", str(copied))],
            env=environment | {"BUCKET": url},
            check=True,
            timeout=60,
        )
    assert files_of(copied) == files_of(root)
    (folder,) = find_bundles(copied).values()
    assert load_live("tiny", folder, device="cpu", threads=1).version == "2"


def files_of(folder: Path) -> dict[str, bytes]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}
