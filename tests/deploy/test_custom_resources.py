"""Objects of operators in deploy/kubernetes, and the jobs.

Whatever in them is a pod is checked by the schemas of Kubernetes. For the rest there is no schema
that installs: of KServe the SDK says which fields there are; of the Prometheus operator and of
KubeRay the fields that are used stand here, as their authors document them.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Mapping
from importlib.metadata import files
from pathlib import Path
from typing import Any

import kubernetes_validate as validator
import pytest
import yaml

from service.access import OPEN
from tests.deploy.clustered import faults
from tests.deploy.composed import DEPLOY
from tests.deploy.image import project_version
from tests.deploy.kustomized import KUBERNETES, containers, pod_of_predictor, pods, read

Fields = Mapping[str, Any]
OBJECT = {"apiVersion": str, "kind": str, "metadata": dict}
JOBS = [*read("jobs/cronjob.yaml"), *read("jobs/rayjob.yaml")]
SERVICE = read("kserve/inferenceservice.yaml")

# Field → its type, or the fields of an object, or those of each member of a list.
SERVICE_MONITOR: Fields = OBJECT | {
    "spec": {
        "jobLabel": str,
        "selector": {"matchLabels": dict},
        "endpoints": [
            {
                "port": str,
                "path": str,
                "interval": str,
                "authorization": {"credentials": {"name": str, "key": str}},
            }
        ],
    }
}
PROMETHEUS_RULE: Fields = OBJECT | {
    "spec": {
        "groups": [
            {
                "name": str,
                "interval": str,
                "rules": [
                    {
                        "record": str,
                        "alert": str,
                        "expr": str,
                        "for": str,
                        "keep_firing_for": str,
                        "labels": dict,
                        "annotations": dict,
                    }
                ],
            }
        ]
    }
}
GROUP = {"rayStartParams": dict, "template": dict}
RAY_JOB: Fields = OBJECT | {
    "spec": {
        "submissionMode": str,
        "entrypoint": str,
        "backoffLimit": int,
        "activeDeadlineSeconds": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "rayClusterSpec": {
            "headGroupSpec": GROUP,
            "workerGroupSpecs": [
                GROUP | {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int}
            ],
        },
    }
}


def misfits(value: Any, fields: Any, at: str = "") -> list[str]:
    """Where a value has what is none of the fields, or not of the type."""
    if isinstance(fields, type):
        return [] if isinstance(value, fields) else [f"{at}: {value!r}"]
    if isinstance(fields, list):
        if not isinstance(value, list) or not value:
            return [f"{at}: {value!r}"]
        return [x for i, one in enumerate(value) for x in misfits(one, fields[0], f"{at}[{i}]")]
    if not isinstance(value, dict):
        return [f"{at}: {value!r}"]
    found = [f"{at}.{name}" for name in value.keys() - fields.keys()]
    return found + [
        x for k, v in value.items() if k in fields for x in misfits(v, fields[k], f"{at}.{k}")
    ]


def test_what_the_prometheus_operator_takes() -> None:
    monitors = read("monitoring/servicemonitor.yaml")
    assert {m["apiVersion"] for m in monitors} == {"monitoring.coreos.com/v1"}
    for monitor in monitors:
        assert misfits(monitor, SERVICE_MONITOR) == []
    broken = copy.deepcopy(monitors[0])
    broken["spec"]["endpoints"][0]["intervall"] = "15s"
    broken["spec"]["jobLabel"] = 1
    assert misfits(broken, SERVICE_MONITOR) == [".spec.jobLabel: 1", ".spec.endpoints[0].intervall"]


def test_the_rules_of_the_cluster_are_those_of_prometheus() -> None:
    (found,) = read("monitoring/prometheusrule.yaml")
    assert found["apiVersion"] == "monitoring.coreos.com/v1"
    assert misfits(found, PROMETHEUS_RULE) == []
    assert found["spec"] == yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())
    # kubectl apply keeps the last object in an annotation, which holds no more than that.
    assert len((KUBERNETES / "monitoring/prometheusrule.yaml").read_bytes()) < 256 << 10


def test_what_kuberay_takes() -> None:
    (job,) = read("jobs/rayjob.yaml")
    assert job["apiVersion"] == "ray.io/v1"
    assert misfits(job, RAY_JOB) == []
    broken = copy.deepcopy(job)
    broken["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 8
    assert misfits(broken, RAY_JOB) == [".spec.rayClusterSpec.workerGroupSpecs[0].maxReplica"]


def sdk_fields(model: str) -> set[str]:
    """The names of a model's fields in KServe's SDK, read without importing it: its package is
    installed without the forty that it needs."""
    (file,) = [f for f in files("kserve") or [] if f.name == f"{model}.py"]
    tree = ast.parse(Path(str(file.locate())).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "attribute_map":
            return set(ast.literal_eval(node.value).values())
    raise AssertionError(model)


def test_what_kserve_takes() -> None:
    (service,) = SERVICE
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    assert service.keys() <= sdk_fields("v1beta1_inference_service")
    assert service["spec"].keys() <= sdk_fields("v1beta1_inference_service_spec")
    known = sdk_fields("v1beta1_predictor_spec")
    assert service["spec"]["predictor"].keys() <= known
    assert "minReplica" not in known and "model" in known


def test_kserve_is_told_the_protocol_the_port_and_the_probes() -> None:
    (container,) = SERVICE[0]["spec"]["predictor"]["containers"]
    assert container["name"] == "kserve-container"  # else KServe does not take it for the model
    assert {"name": "PROTOCOL", "value": "v2"} in container["env"]
    assert len(container["ports"]) == 1  # the port of KServe's Service
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        path = container[probe]["httpGet"]["path"]
        assert path in OPEN and path.startswith("/v2/")
    assert container["image"] == f"registry.example/hedged:{project_version()}"


def test_jobs_suit_the_namespace_that_they_are_for() -> None:
    """They mount claims of the namespace `hedged`, whose standard, restricted, admits no folder of
    the node, and no pod that KubeRay makes by itself."""
    (namespace,) = read("base/namespace.yaml")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    (bundles,), (textfile,) = read("base/bundles.yaml"), read("jobs/textfile.yaml")
    validator.validate(textfile, "1.30", strict=True)
    claims = {claim["metadata"]["name"] for claim in (bundles, textfile)}
    for _, _, spec in pods(JOBS):
        for volume in spec["volumes"]:
            assert volume.keys() - {"name"} <= {"persistentVolumeClaim", "emptyDir"}
            assert volume.get("persistentVolumeClaim", {}).get("claimName", "bundles") in claims
    (job,) = read("jobs/rayjob.yaml")
    assert job["spec"]["submissionMode"] == "HTTPMode"
    assert "enableInTreeAutoscaling" not in job["spec"]["rayClusterSpec"]
    for file in ("cronjob.yaml", "rayjob.yaml"):
        text = (KUBERNETES / "jobs" / file).read_text()
        assert re.search(r"hedged score /bundles/churn/1\s", text)  # ROOT/<name>/<version>
        commands = re.findall(r"^#   kubectl .*", text, re.M)
        assert commands and all("--namespace hedged" in command for command in commands)


def test_what_is_a_predictors_is_no_pods() -> None:
    own = SERVICE[0]["spec"]["predictor"]
    assert own.keys() - pod_of_predictor(own).keys() == {
        *("minReplicas", "maxReplicas", "scaleMetric", "scaleTarget")
    }


def as_pod(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": dict(spec)}


@pytest.mark.parametrize("one", [*JOBS, *SERVICE], ids=lambda o: o["kind"])
def test_their_pods_are_pods_of_kubernetes(one: dict[str, Any]) -> None:
    found = list(pods([one]))
    assert found
    for _, _, spec in found:
        validator.validate(as_pod(spec), "1.30", strict=True)
        broken = copy.deepcopy(dict(spec))
        containers(broken)[0]["resources"]["limit"] = {}
        with pytest.raises(validator.ValidationError):
            validator.validate(as_pod(broken), "1.30", strict=True)


def test_the_cron_job_is_one_of_kubernetes() -> None:
    (job,) = read("jobs/cronjob.yaml")
    validator.validate(job, "1.30", strict=True)
    with pytest.raises(validator.ValidationError):
        validator.validate(job | {"spec": job["spec"] | {"timezone": "UTC"}}, "1.30", strict=True)


def test_they_agree_with_themselves_the_image_and_the_settings() -> None:
    assert faults(JOBS) == []
    assert faults(SERVICE) == []
    rooted = copy.deepcopy(SERVICE)
    rooted[0]["spec"]["predictor"]["securityContext"].pop("runAsNonRoot")
    assert faults(rooted) == ["InferenceService hedged-kserve: it may run as root"]
