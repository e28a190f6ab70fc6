"""deploy/compose.yaml as it is, and what in it contradicts itself, the image or the settings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.image import Image, project_version, read_image, stop_seconds

DEPLOY = Path(__file__).parents[2] / "deploy"
Service = Mapping[str, Any]
SECRETS = "/run/secrets"
UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def read_compose(path: Path = DEPLOY / "compose.yaml") -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def seconds(text: str) -> float:
    """A duration such as 1m30s."""
    parts = re.findall(r"(\d+)(ms|[smh])", text)
    assert "".join(n + unit for n, unit in parts) == text, text
    return sum(int(n) * UNITS[unit] for n, unit in parts)


def is_ours(service: Service) -> bool:
    """Whether it runs the image of the Dockerfile."""
    return str(service["image"]).startswith("hedged:")


def argv(service: Service, image: Image) -> list[str]:
    """The words that the container runs."""
    entrypoint = service.get("entrypoint", image.entrypoint if is_ours(service) else [])
    return [*entrypoint, *service.get("command", image.command if is_ours(service) else [])]


def environment(service: Service, image: Image) -> dict[str, str]:
    """The environment of the container, the image's own included."""
    return (image.environment if is_ours(service) else {}) | dict(service.get("environment", {}))


def mounts(compose: Mapping[str, Any], service: Service) -> dict[str, str]:
    """Where in the container what of the host lies; ``""`` for volumes and tmpfs."""
    found = dict.fromkeys(service.get("tmpfs", []), "")
    for name in service.get("secrets", []):
        found[f"{SECRETS}/{name}"] = compose["secrets"][name]["file"]
    for volume in service.get("volumes", []):
        if isinstance(volume, str):
            source, target = volume.split(":")[:2]
        else:
            source, target = volume["source"], volume["target"]
        found[target] = source if source.startswith((".", "$")) else ""
    return found


def faults(compose: Mapping[str, Any]) -> list[str]:
    """What is wrong, a line each, beginning with the service."""
    image = read_image()
    return [
        f"{name}: {fault}"
        for name, service in compose["services"].items()
        for check in (_hardened, _pinned, _loopback, _declared, _paths, _order, _stop, _cores)
        for fault in check(compose, service, image)
    ]


def _hardened(_: Any, service: Service, image: Image) -> Iterator[str]:
    if service.get("read_only") is not True:
        yield "its root can be written to"
    if service.get("cap_drop") != ["ALL"] or "cap_add" in service or "privileged" in service:
        yield "it has capabilities"
    if "no-new-privileges:true" not in service.get("security_opt", []):
        yield "it may gain privileges"
    if service.get("restart") != "unless-stopped":
        yield "it is not started again"
    if "max-size" not in service.get("logging", {}).get("options", {}):
        yield "its log grows without bound"
    limits = service.get("deploy", {}).get("resources", {}).get("limits", {})
    if not {"cpus", "memory", "pids"} <= limits.keys():
        yield "it has no limits"
    if not (service.get("healthcheck") or (is_ours(service) and image.health)):
        yield "nobody asks whether it is well"
    for key, value in service.get("environment", {}).items():
        if re.search("PASSWORD|SECRET|TOKEN", key) and not key.endswith("_FILE"):
            yield f"{key} is a secret in the open"
        if re.search(r"://[^/@]*:[^/@]+@", str(value)):
            yield f"{key} has a password in it"


def _pinned(_: Any, service: Service, __: Image) -> Iterator[str]:
    name, _, tag = str(service["image"]).rpartition(":")
    if not name or not re.fullmatch(r"v?\d+\.\d+(\.\d+)?(-\w+)?", tag):
        yield f"{service['image']} names no one version"
    if is_ours(service) and tag != project_version():
        yield f"{service['image']} is not version {project_version()}"
    if "build" in service and service["build"] != {"context": "..", "target": "cpu"}:
        yield "it is not built from the Dockerfile's target cpu"


def _loopback(_: Any, service: Service, image: Image) -> Iterator[str]:
    for port in service.get("ports", []):
        host, _, inside = str(port).rpartition(":")
        if not host.startswith("127.0.0.1:"):
            yield f"{port} can be reached from other machines"
        if is_ours(service) and inside != str(image.port):
            yield f"{port}: the image listens on {image.port}"


def _declared(compose: Mapping[str, Any], service: Service, _: Image) -> Iterator[str]:
    for kind in ("networks", "secrets"):
        for name in service.get(kind, []):
            if name not in compose.get(kind, {}):
                yield f"no {kind} {name}"
    for volume in service.get("volumes", []):
        source = volume.split(":")[0] if isinstance(volume, str) else volume["source"]
        if not source.startswith((".", "$")):
            if source not in compose["volumes"]:
                yield f"no volume {source}"
        elif source.startswith("./") and not source.startswith("./secrets/"):
            if not (DEPLOY / source).exists():
                yield f"no {source} to mount"
            if isinstance(volume, str) and not volume.endswith(":ro"):
                yield f"{source} can be written to"
        elif volume.get("bind") != {"create_host_path": False} or not volume.get("read_only"):
            yield f"{source} would be made where it is missing, or can be written to"
    for name in service.get("secrets", []):
        file = compose["secrets"].get(name, {}).get("file", "")
        if not file.startswith("./secrets/"):
            yield f"secret {name} is no file of ./secrets"


def _paths(compose: Mapping[str, Any], service: Service, image: Image) -> Iterator[str]:
    """Whatever names a file of the container names one that is there."""
    if not is_ours(service) and "environment" not in service:
        words = argv(service, image)
    else:
        own = {k: v for k, v in environment(service, image).items() if k != "PATH"}
        words = [*argv(service, image), *own.values()]
    there = mounts(compose, service)
    for word in map(str, words):
        path = word.partition("=")[2] if word.startswith("--") else word
        if path.startswith("/") and not any(
            path == target or path.startswith(f"{target}/") for target in there
        ):
            yield f"{path} is not mounted"


def _order(compose: Mapping[str, Any], service: Service, _: Image) -> Iterator[str]:
    for name, how in service.get("depends_on", {}).items():
        other = compose["services"].get(name)
        if other is None or how.get("condition") != "service_healthy":
            yield f"it does not wait until {name} is well"
        elif not set(service["networks"]) & set(other["networks"]):
            yield f"it cannot reach {name}"


def _stop(_: Any, service: Service, image: Image) -> Iterator[str]:
    if not is_ours(service) or "entrypoint" in service:
        return
    needed = stop_seconds(environment(service, image))
    if seconds(service.get("stop_grace_period", "10s")) < needed + 5:
        yield f"it is killed before the {needed:g} s that its drain and requests may take"


def _cores(_: Any, service: Service, image: Image) -> Iterator[str]:
    if not is_ours(service) or "entrypoint" in service:
        return
    given = environment(service, image)
    threads = int(given.get("HEDGED_THREADS", "0")) * int(given.get("HEDGED_WORKERS", "1"))
    cores = float(service.get("deploy", {}).get("resources", {}).get("limits", {}).get("cpus", 0))
    if not 0 < threads <= cores:
        yield f"{threads} threads on {cores:g} cores"
