"""What in rendered objects contradicts itself, the image, the settings or the pods' standard."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from service.access import OPEN
from service.metrics import METRIC_NAMES
from service.settings import Settings
from tests.deploy.image import read_image, setting, stop_seconds
from tests.deploy.kustomized import Object, containers, key, of, pods, variables

# Made by commands of the guide, not by us.
SECRETS = {"hedged-keys", "hedged-ledger", "hedged-metrics", "bundles-bucket"}
IMAGE = read_image()
TAG = re.compile(r"registry\.example/hedged(-ray)?:\d+\.\d+\.\d+(-cuda)?")


def faults(objects: Sequence[Object]) -> list[str]:
    """What is wrong, a line each, beginning with the object."""
    found = [
        f"{name}: {fault}"
        for name, labels, spec in pods(objects)
        for check in (_rights, _mounts, _ends)
        for fault in check(spec)
    ]
    found += [f"{name}: {x}" for name, _, spec in pods(objects) for x in _claims(objects, spec)]
    return found + list(_selected(objects)) + list(_scaled(objects))


def _rights(spec: Object) -> Iterator[str]:
    """The restricted pod security standard, and what else a pod of ours does not need."""
    if spec.get("automountServiceAccountToken") is not False:
        yield "it has a token of the cluster"
    if {"hostNetwork", "hostPID", "hostIPC"} & spec.keys():
        yield "it shares what is the node's"
    if spec["securityContext"].get("runAsNonRoot") is not True:
        yield "it may run as root"
    if spec["securityContext"].get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "its system calls are not filtered"
    user = [str(spec["securityContext"].get(k)) for k in ("runAsUser", "runAsGroup")]
    if not any(c["name"] == "ray" for c in containers(spec)) and ":".join(user) != IMAGE.user:
        yield f"the image's user is {IMAGE.user}"
    for container in containers(spec):
        name, rights = container["name"], container.get("securityContext", {})
        if rights.get("allowPrivilegeEscalation") is not False:
            yield f"{name} may gain privileges"
        if rights.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{name} has capabilities"
        if "ray" not in name and rights.get("readOnlyRootFilesystem") is not True:
            yield f"{name}: its root can be written to"
        if not TAG.fullmatch(container["image"]):
            yield f"{container['image']} names no one version"
        resources = container["resources"]
        asked, limit = (resources.get(k, {}).get("memory") for k in ("requests", "limits"))
        if asked is None or asked != limit:
            yield f"{name} asks for {asked} of memory and may take {limit}"
        for variable, value in variables(container).items():
            if re.search(r"PASSWORD|SECRET|TOKEN", variable) or re.search(r":[^/@]+@", value):
                yield f"{variable} is a secret in the open"


def _mounts(spec: Object) -> Iterator[str]:
    volumes = {v["name"] for v in spec.get("volumes", [])}
    mounted = {m["name"] for c in containers(spec) for m in c.get("volumeMounts", [])}
    for name in sorted(volumes ^ mounted):
        yield f"volume {name} is not {'mounted' if name in volumes else 'there'}"
    own = IMAGE.environment
    for container in spec["containers"]:
        paths = [m["mountPath"] for m in container["volumeMounts"]]
        words = [*container.get("args", []), *variables(container).values()]
        words += [own["HEDGED_DATA_DIR"], own["BENTOML_HOME"]] if _serves(container) else []
        for word in words:
            path = word.partition("=")[2] if word.startswith("--") else word
            there = any(path == p or path.startswith(f"{p}/") for p in paths)
            if path.startswith("/") and "\n" not in path and not there:
                yield f"{path} is not mounted"


def _serves(container: Object) -> bool:
    return "command" not in container and container["name"] != "ray"


def _ends(spec: Object) -> Iterator[str]:
    """Probes ask what answers without a key, and a pod that ends has the time that it needs."""
    for container in spec["containers"]:
        ports = {p.get("name"): p["containerPort"] for p in container.get("ports", [])}
        probes = {k: v for k, v in container.items() if k.endswith("Probe")}
        for name, probe in probes.items():
            ask = probe["httpGet"]
            if ports.get(ask["port"], ask["port"]) not in ports.values():
                yield f"{name} asks port {ask['port']}"
            if _serves(container) and ask["path"] not in OPEN:
                yield f"{name} asks {ask['path']}, which needs a key"
        if not _serves(container):
            continue
        if list(ports.values()) != [IMAGE.port]:
            yield f"the image listens on {IMAGE.port}"
        if spec.get("enableServiceLinks") is not False:
            yield "services of the namespace become HEDGED_ variables"
        if not {"startupProbe", "readinessProbe", "livenessProbe"} <= probes.keys():
            yield "not everything is probed"
            continue
        given = variables(container)
        stop = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        needed = stop + stop_seconds(given)
        if spec.get("terminationGracePeriodSeconds", 30) < needed + 5:
            yield f"it is killed before the {needed:g} s that preStop, drain and requests may take"
        ready = probes["readinessProbe"]
        if ready["periodSeconds"] * ready["failureThreshold"] >= setting(given, "drain_s"):
            yield "it is gone before anybody sees that it is not ready"


def _claims(objects: Sequence[Object], spec: Object) -> Iterator[str]:
    claims = {o["metadata"]["name"] for o in of(objects, "PersistentVolumeClaim")}
    for volume in spec.get("volumes", []):
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim is not None and claims and claim not in claims:
            yield f"no claim {claim}"
        secret = volume.get("secret", {}).get("secretName")
        if secret is not None and secret not in SECRETS:
            yield f"no secret {secret}"


def _selected(objects: Sequence[Object]) -> Iterator[str]:
    """Whatever selects pods or services selects some, and ports that it names are there."""
    running = [(labels, spec) for _, labels, spec in pods(objects)]
    for found in objects:
        spec = found.get("spec", {})
        match found["kind"]:
            case "Service":
                wanted = spec["selector"]
            case "NetworkPolicy":
                wanted = spec["podSelector"]["matchLabels"]
            case "Deployment" | "PodDisruptionBudget":
                wanted = spec["selector"]["matchLabels"]
            case "ServiceMonitor":
                yield from _scraped(objects, found)
                continue
            case _:
                continue
        chosen = [pod for labels, pod in running if wanted.items() <= labels.items()]
        if not chosen:
            yield f"{key(found)}: it selects no pod"
        named = {
            p.get("name") for pod in chosen for c in containers(pod) for p in c.get("ports", [])
        }
        asked = {p["targetPort"] for p in spec.get("ports", [])}
        asked |= {p["port"] for rule in spec.get("ingress", []) for p in rule["ports"]}
        if asked - named:
            yield f"{key(found)}: no port {sorted(asked - named)[0]}"


def _scraped(objects: Sequence[Object], monitor: Object) -> Iterator[str]:
    wanted = monitor["spec"]["selector"]["matchLabels"]
    services = [
        s for s in of(objects, "Service") if wanted.items() <= s["metadata"]["labels"].items()
    ]
    named = {p["name"] for s in services for p in s["spec"]["ports"]}
    for endpoint in monitor["spec"]["endpoints"]:
        if endpoint["port"] not in named:
            yield f"{key(monitor)}: no service has port {endpoint['port']}"


def _scaled(objects: Sequence[Object]) -> Iterator[str]:
    deployments = {o["metadata"]["name"]: o for o in of(objects, "Deployment")}
    for found in of(objects, "HorizontalPodAutoscaler"):
        target = deployments.get(found["spec"]["scaleTargetRef"]["name"])
        if target is None:
            yield f"{key(found)}: it scales nothing"
        elif "replicas" in target["spec"]:
            yield f"{key(found)}: every apply would undo it"
        for metric in found["spec"]["metrics"]:
            if metric["pods"]["metric"]["name"] not in METRIC_NAMES:
                yield f"{key(found)}: nobody exports {metric['pods']['metric']['name']}"
            full = str(Settings.model_fields["max_batch_rows"].default)
            if metric["pods"]["target"]["averageValue"] != full:
                yield f"{key(found)}: a full run of the model is {full} rows"
