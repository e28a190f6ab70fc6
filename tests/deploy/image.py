"""What the Dockerfile says of every container: what it runs, as whom, and in which environment."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from service.settings import PREFIX, Settings
from tests.supply.dockerfile import ROOT, read


@dataclass(frozen=True)
class Image:
    """The last word of one target on each of these."""

    environment: dict[str, str]
    entrypoint: list[str]
    command: list[str]
    health: list[str]
    port: int
    user: str


def read_image(target: str = "cpu") -> Image:
    """What the Dockerfile says of a target."""
    made = read()
    check, *health = made.last(target, "HEALTHCHECK").words
    assert check == "CMD"
    return Image(
        environment=made.environment(target),
        entrypoint=list(made.last(target, "ENTRYPOINT").words),
        command=list(made.last(target, "CMD").words),
        health=health,
        port=int(made.last(target, "EXPOSE").words[0]),
        user=made.last(target, "USER").words[0],
    )


def project_version() -> str:
    """The version that the package has."""
    found = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert found is not None
    return found[1]


def setting(environment: Mapping[str, str], name: str) -> float:
    """A setting in seconds, as the environment or its default has it."""
    given = environment.get(PREFIX + name.upper())
    return float(Settings.model_fields[name].default if given is None else given)


def stop_seconds(environment: Mapping[str, str]) -> float:
    """How long `hedged serve` may take to end: its drain, then what hedged/commands/serve.py
    leaves requests that have begun."""
    request = math.ceil(max(30, setting(environment, "request_timeout_s")))
    return setting(environment, "drain_s") + request
