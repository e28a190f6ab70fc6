"""deploy/kubernetes, rendered by the real kubectl: valid for Kubernetes, and in agreement with the
image, the settings and the rules."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate as validator
import pytest

from service.alerting import Options
from service.settings import SettingsError, load_settings
from tests.deploy.clustered import faults
from tests.deploy.image import project_version
from tests.deploy.kustomized import (
    KUBERNETES,
    containers,
    key,
    kustomize,
    of,
    pods,
    variables,
    with_component,
)

# The oldest with what is used (the sleep of preStop), and the newest that the schemas know.
VERSIONS = ("1.30", ".".join(validator.latest_version().split(".")[:2]))
Objects = list[dict[str, Any]]
Change = Callable[[dict[str, dict[str, Any]]], object]


@pytest.fixture(scope="session")
def rendered(kubectl: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Objects]:
    bucket = with_component(tmp_path_factory.mktemp("bucket"), "bundles-from-bucket")
    return {
        "cpu": kustomize(kubectl, KUBERNETES / "overlays/cpu"),
        "gpu": kustomize(kubectl, KUBERNETES / "overlays/gpu"),
        "bucket": kustomize(kubectl, bucket),
    }


@pytest.fixture(params=["cpu", "gpu", "bucket"])
def objects(request: pytest.FixtureRequest, rendered: dict[str, Objects]) -> Objects:
    return rendered[request.param]


CUSTOM = {"ServiceMonitor", "PrometheusRule"}  # test_custom_resources.py


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_object(objects: Objects, version: str) -> None:
    plain = [o for o in objects if o["kind"] not in CUSTOM]
    assert len(objects) - len(plain) == 3
    for one in plain:
        assert validator.validate(one, version, strict=True) == version, key(one)


def changed(objects: Objects, change: Change) -> Objects:
    """A copy with one change, which works on objects by kind and name."""
    copied = copy.deepcopy(objects)
    change({key(o): o for o in copied})
    return copied


def pod(name: str) -> Callable[[dict[str, dict[str, Any]]], dict[str, Any]]:
    return lambda o: o[f"Deployment {name}"]["spec"]["template"]["spec"]


HEDGED, MONITOR = pod("hedged"), pod("hedged-monitor")


@pytest.mark.parametrize(
    "change",
    [
        lambda o: HEDGED(o).update(automountServiceAccountTokens=False),
        lambda o: HEDGED(o)["containers"][0]["startupProbe"].update(path="/readyz"),
        lambda o: o["Deployment hedged"]["spec"].pop("selector"),
        lambda o: o["Service hedged"]["spec"]["ports"][0].update(port="eighty"),
        lambda o: o["NetworkPolicy hedged"]["spec"].update(policyTypes="Ingress"),
        lambda o: o["HorizontalPodAutoscaler hedged"]["spec"]["metrics"][0].pop("type"),
    ],
)
def test_kubernetes_refuses_a_broken_copy(rendered: dict[str, Objects], change: Change) -> None:
    broken = changed(rendered["cpu"], change)
    with pytest.raises(validator.ValidationError):
        for one in broken:
            if one["kind"] not in CUSTOM:
                validator.validate(one, VERSIONS[0], strict=True)


def test_kustomize_refuses_a_path_that_is_not_there(kubectl: Path, tmp_path: Path) -> None:
    folder = with_component(tmp_path, "bundles-from-nowhere")
    with pytest.raises(AssertionError, match="bundles-from-nowhere"):
        kustomize(kubectl, folder)


def test_it_agrees_with_itself_the_image_and_the_settings(objects: Objects) -> None:
    assert faults(objects) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            lambda o: HEDGED(o).pop("automountServiceAccountToken"),
            "Deployment hedged: it has a token of the cluster",
        ),
        (lambda o: HEDGED(o).update(hostNetwork=True), "Deployment hedged: it shares"),
        (
            lambda o: MONITOR(o)["securityContext"].pop("runAsNonRoot"),
            "Deployment hedged-monitor: it may run as root",
        ),
        (
            lambda o: HEDGED(o)["securityContext"].update(runAsUser=1000),
            "Deployment hedged: the image's user is 10001:10001",
        ),
        (
            lambda o: MONITOR(o)["securityContext"].pop("seccompProfile"),
            "Deployment hedged-monitor: its system calls",
        ),
        (
            lambda o: HEDGED(o)["containers"][0]["securityContext"].pop("capabilities"),
            "Deployment hedged: hedged has capabilities",
        ),
        (
            lambda o: HEDGED(o)["containers"][0]["securityContext"].pop("readOnlyRootFilesystem"),
            "Deployment hedged: hedged: its root can be written to",
        ),
        (
            lambda o: HEDGED(o)["containers"][0].update(image="registry.example/hedged"),
            "Deployment hedged: registry.example/hedged names no one version",
        ),
        (
            lambda o: HEDGED(o)["containers"][0]["resources"]["limits"].pop("memory"),
            "Deployment hedged: hedged asks for 2Gi of memory",
        ),
        (
            lambda o: HEDGED(o)["containers"][0]["env"].append(
                {"name": "HEDGED_LEDGER", "value": "postgresql://a:b@c/d"}
            ),
            "Deployment hedged: HEDGED_LEDGER is a secret in the open",
        ),
        (
            lambda o: HEDGED(o)["volumes"].pop(0),
            "Deployment hedged: volume bundles is not there",
        ),
        (
            lambda o: HEDGED(o)["containers"][0].update(args=["/models"]),
            "Deployment hedged: /models is not mounted",
        ),
        (
            lambda o: HEDGED(o)["containers"][0]["volumeMounts"].pop(),
            "Deployment hedged: /tmp/bentoml is not mounted",
        ),
        (
            lambda o: HEDGED(o)["containers"][0]["readinessProbe"]["httpGet"].update(path="/v2"),
            "Deployment hedged: readinessProbe asks /v2, which needs a key",
        ),
        (
            lambda o: HEDGED(o)["containers"][0]["livenessProbe"]["httpGet"].update(port=80),
            "Deployment hedged: livenessProbe asks port 80",
        ),
        (
            lambda o: HEDGED(o)["containers"][0]["ports"][0].update(containerPort=8080),
            "Deployment hedged: the image listens on 3000",
        ),
        (
            lambda o: HEDGED(o).pop("enableServiceLinks"),
            "Deployment hedged: services of the namespace become",
        ),
        (
            lambda o: HEDGED(o)["containers"][0].pop("startupProbe"),
            "Deployment hedged: not everything is probed",
        ),
        (
            lambda o: HEDGED(o).update(terminationGracePeriodSeconds=45),
            "Deployment hedged: it is killed before the 45 s",
        ),
        (
            lambda o: HEDGED(o)["containers"][0]["readinessProbe"].update(failureThreshold=5),
            "Deployment hedged: it is gone before anybody sees",
        ),
        (
            lambda o: MONITOR(o)["volumes"][2]["persistentVolumeClaim"].update(claimName="x"),
            "Deployment hedged-monitor: no claim x",
        ),
        (
            lambda o: HEDGED(o)["volumes"][1]["secret"].update(secretName="x"),
            "Deployment hedged: no secret x",
        ),
        (
            lambda o: o["Service hedged"]["spec"].update(selector={"app": "x"}),
            "Service hedged: it selects no pod",
        ),
        (
            lambda o: o["Service hedged"]["spec"]["ports"][0].update(targetPort="web"),
            "Service hedged: no port web",
        ),
        (
            lambda o: o["PodDisruptionBudget hedged"]["spec"]["selector"].update(
                matchLabels={"app": "x"}
            ),
            "PodDisruptionBudget hedged: it selects no pod",
        ),
        (
            lambda o: o["NetworkPolicy hedged"]["spec"]["ingress"][0]["ports"][0].update(port="x"),
            "NetworkPolicy hedged: no port x",
        ),
        (
            lambda o: o["ServiceMonitor hedged"]["spec"]["endpoints"][0].update(port="x"),
            "ServiceMonitor hedged: no service has port x",
        ),
        (
            lambda o: o["HorizontalPodAutoscaler hedged"]["spec"]["scaleTargetRef"].update(
                name="x"
            ),
            "HorizontalPodAutoscaler hedged: it scales nothing",
        ),
        (
            lambda o: o["Deployment hedged"]["spec"].update(replicas=2),
            "HorizontalPodAutoscaler hedged: every apply would undo it",
        ),
        (
            lambda o: o["HorizontalPodAutoscaler hedged"]["spec"]["metrics"][0]["pods"][
                "metric"
            ].update(name="uq_queue_row"),
            "HorizontalPodAutoscaler hedged: nobody exports uq_queue_row",
        ),
    ],
)
def test_each_disagreement_is_found(
    rendered: dict[str, Objects], change: Change, fault: str
) -> None:
    found = faults(changed(rendered["cpu"], change))
    assert any(f.startswith(fault) for f in found), found


def test_everything_is_in_one_namespace_that_is_restricted(objects: Objects) -> None:
    (namespace,) = of(objects, "Namespace")
    labels = namespace["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {o["metadata"].get("namespace") for o in objects} - {None} == {"hedged"}


def test_the_settings_are_the_services(
    objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service itself reads the environment that its container has."""
    (tmp_path / "keys.json").write_text('{"keys": []}')
    for name in [k for k in os.environ if k.startswith("HEDGED_")]:
        monkeypatch.delenv(name)
    found = {name: variables(spec["containers"][0]) for name, _, spec in pods(objects)}
    assert not any(v.startswith("HEDGED_") for v in found["Deployment hedged-monitor"])
    given = found["Deployment hedged"]
    assert given.pop("HEDGED_KEYS") == "/keys/keys.json"
    monkeypatch.setenv("HEDGED_KEYS", str(tmp_path / "keys.json"))
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    settings = load_settings()
    assert settings.threads == 2 and settings.drain_s == 10
    monkeypatch.setenv("HEDGED_PORT", "tcp://10.0.0.1:80")  # what links to services would set
    with pytest.raises(SettingsError, match="HEDGED_PORT"):
        load_settings()


def test_links_to_services_would_break_the_monitor() -> None:
    """Why `enableServiceLinks` is false there, too."""
    done = subprocess.run(
        [sys.executable, "-m", "hedged", "monitor", "ledger.sqlite", "--once"],
        env={"PATH": os.environ["PATH"], "HEDGED_MONITOR_PORT": "tcp://10.0.0.1:9464"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "--port" in done.stderr


def test_the_monitor_is_alone_and_keeps_what_it_knows(objects: Objects) -> None:
    (monitor,) = [o for o in objects if key(o) == "Deployment hedged-monitor"]
    assert monitor["spec"]["replicas"] == 1
    assert monitor["spec"]["strategy"] == {"type": "Recreate"}
    spec = monitor["spec"]["template"]["spec"]
    (state,) = [w for w in spec["containers"][0]["args"] if w.startswith("--state=")]
    (mount,) = [m for m in spec["containers"][0]["volumeMounts"] if m["mountPath"] == "/data"]
    (volume,) = [v for v in spec["volumes"] if v["name"] == mount["name"]]
    assert state.startswith("--state=/data/") and "persistentVolumeClaim" in volume
    assert spec["enableServiceLinks"] is False


def test_services_are_called_as_the_jobs_of_the_rules(objects: Objects) -> None:
    jobs = {o["spec"]["jobLabel"] for o in of(objects, "ServiceMonitor")}
    assert jobs == {"app.kubernetes.io/name"}
    names = {s["metadata"]["labels"]["app.kubernetes.io/name"] for s in of(objects, "Service")}
    assert names == {Options().job, Options().monitor_job}


def test_the_overlays_differ_in_what_they_say(rendered: dict[str, Objects]) -> None:
    version = project_version()

    def served(name: str) -> dict[str, Any]:
        (found,) = [spec for n, _, spec in pods(rendered[name]) if n == "Deployment hedged"]
        return dict(found)

    def images(name: str) -> list[str]:
        return [c["image"] for _, _, spec in pods(rendered[name]) for c in containers(spec)]

    plain = f"registry.example/hedged:{version}"
    assert images("cpu") == [plain] * 2
    assert images("gpu") == [f"{plain}-cuda", plain]
    assert images("bucket") == [plain] * 4
    gpu = served("gpu")["containers"][0]
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert variables(gpu)["HEDGED_DEVICE"] == "cuda"
    assert "HEDGED_DEVICE" not in variables(served("cpu")["containers"][0])
    assert not any(o["metadata"]["name"] == "bundles" for o in rendered["bucket"])
