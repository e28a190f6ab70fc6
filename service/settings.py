"""Every setting of the service, in one typed object read from ``HEDGED_*``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from posthoc.contract import HedgedError, ModelError
from posthoc.runtime import CPU, CUDA, TENSORRT, choose_providers, core_count
from service.addresses import is_loopback
from service.keys import KeysError, read_keys

PREFIX = "HEDGED_"
LEDGER_FILE = "hedged-ledger.sqlite"
# Variables that are not ours: HEDGED_<COMMAND>_<OPTION>, and the paths of other tools.
COMMANDS = (
    *("compare", "control", "demo", "fit", "evaluate"),
    *("inspect", "verify", "sign", "modules", "serve", "activate", "score", "keys", "labels"),
    *("ledger", "monitor", "alerting", "recalibrate"),
)
_TOOLS = frozenset({"CONFIG", "ASSETS"})


class SettingsError(HedgedError):
    """An unknown setting, or a value that a setting cannot take. The message names it."""


def _device(value: str) -> str:
    try:
        choose_providers(value, (CPU, CUDA, TENSORRT))
    except ModelError as e:
        raise ValueError(str(e)) from None
    return value


def _keys(path: Path | None) -> Path | None:
    if path is not None:
        try:
            read_keys(path)
        except KeysError as e:
            raise ValueError(str(e)) from None
    return path


def _public_keys(path: Path | None) -> Path | None:
    if path is not None:
        from calibration.signing import read_public_keys

        try:
            read_public_keys(path)
        except HedgedError as e:
            raise ValueError(str(e)) from None
    return path


class Settings(BaseSettings):
    """Settings of one server; each field is ``HEDGED_<NAME>`` in the environment."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, env_ignore_empty=True
    )

    bundles: Path | None = Field(
        default=None,
        description="One bundle, or ROOT of ROOT/<name>/<version>/ and ROOT/<name>/active.json",
    )
    poll_s: float = Field(
        default=2.0,
        gt=0,
        le=3600,
        description="Seconds between two looks at a ROOT for other live versions",
    )
    signed_by: Annotated[Path | None, AfterValidator(_public_keys)] = Field(
        default=None,
        description="PEM file of public keys: only bundles that one of them signed are served "
        "(hedged sign); the signature lies beside the bundle, BUNDLE.sig",
    )
    device: Annotated[str, AfterValidator(_device)] = Field(
        default="cpu", description="auto, cpu, cuda, cuda:N or tensorrt"
    )
    threads: int = Field(
        default=0, ge=0, description="Intra-op threads of a worker; 0 shares the cores out"
    )
    workers: int = Field(default=1, ge=1, le=256, description="Server processes, a model copy each")
    data_dir: Path = Field(
        default=Path(), description="Folder of what the server writes (the SQLite ledger)"
    )
    ledger: str | None = Field(
        default=None,
        description=f"SQLAlchemy URL or file path of the ledger; default DATA_DIR/{LEDGER_FILE}",
    )
    keys: Annotated[Path | None, AfterValidator(_keys)] = Field(
        default=None,
        description="File of API keys (hedged keys add); with it every request needs one",
    )
    open: bool = Field(
        default=False, description="Without keys: answer other machines, too, whoever they are"
    )
    retention_days: float = Field(
        default=90.0,
        ge=0,
        le=36_500,
        description="Days for which the ledger keeps predictions and their labels; 0 is for ever",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on")
    port: int = Field(default=3000, ge=0, le=65535, description="Port to listen on")
    max_header_bytes: int = Field(
        default=64 << 10, ge=1024, description="Largest first line and headers of a request, bytes"
    )
    max_body_bytes: int = Field(default=64 << 20, ge=1, description="Largest request body, bytes")
    max_answer_bytes: int = Field(
        default=256 << 20, ge=1, description="Largest answer in binary tensors, bytes"
    )
    max_json_bytes: int = Field(
        default=16 << 20, ge=1, description="Largest answer in JSON, bytes, about"
    )
    max_rows: int = Field(default=4096, ge=1, description="Most rows in one prediction request")
    max_labels: int = Field(default=100_000, ge=1, description="Most labels in one request")
    max_batch_rows: int = Field(default=256, ge=1, description="Most rows in one run of the model")
    max_batch_bytes: int = Field(
        default=32 << 20,
        ge=1,
        description="Most bytes in one run of the model, of rows and answers; one row always runs",
    )
    max_queue_rows: int = Field(
        default=16_384, ge=1, description="Most rows waiting for a device; beyond it 503"
    )
    max_queue_delay_s: float = Field(
        default=0.0, ge=0, le=10, description="Seconds an idle device waits for a fuller batch"
    )
    request_timeout_s: float = Field(
        default=30.0,
        gt=0,
        le=86_400,
        description="Seconds to receive a body, and seconds from then to the answer",
    )
    send_timeout_s: float = Field(
        default=60.0,
        gt=0,
        le=86_400,
        description="Seconds in which a client must take its whole answer, else it is cut off",
    )
    nonfinite: Literal["reject", "allow"] = Field(
        default="reject",
        description="NaN, infinity and JSON's null (as NaN) in inputs: reject, or allow for "
        "models that take them",
    )
    log_requests: Literal["errors", "all", "none"] = Field(
        default="errors",
        description="Requests logged on stderr: errors (failed or slow), all or none",
    )
    log_slow_s: float = Field(
        default=1.0, ge=0, description="Seconds from which a request counts as slow in the log"
    )

    drain_s: float = Field(
        default=5.0,
        ge=0,
        le=3600,
        description="Seconds for which `hedged serve` answers on after SIGTERM, no longer ready",
    )

    @field_validator("host")
    @classmethod
    def _guarded(cls, host: str, info: ValidationInfo) -> str:
        """Beyond this machine there must be keys, or the word that there need be none."""
        if "keys" not in info.data or "open" not in info.data:
            return host  # wrong themselves, and named
        if is_loopback(host) or info.data["keys"] is not None or info.data["open"]:
            return host
        raise ValueError(
            f"{host} can be reached from other machines and there are no keys: set {PREFIX}KEYS "
            f"to a file of them (hedged keys add FILE NAME), or {PREFIX}OPEN=true to answer anybody"
        )

    @property
    def model_threads(self) -> int:
        """Threads of the model in each worker; 0 is ONNX Runtime's own choice, one per core."""
        if self.threads or self.workers == 1:
            return self.threads
        # Workers that each had a thread per core would wait for one another.
        return max(1, core_count() // self.workers)

    @property
    def max_body_bytes_total(self) -> int:
        """Most bytes of request bodies held at once; beyond it 503."""
        return 4 * self.max_body_bytes

    @property
    def max_answer_bytes_total(self) -> int:
        """Most bytes of answers that are computed, written or sent at once; beyond it 503."""
        return 4 * self.max_answer_bytes

    @property
    def retain_s(self) -> float | None:
        """Seconds for which the ledger keeps a prediction; None is for ever."""
        return self.retention_days * 86_400 or None

    @property
    def ledger_url(self) -> str:
        """The ledger as SQLAlchemy URL or path, with the default filled in."""
        return self.ledger or str(self.data_dir / LEDGER_FILE)

    @property
    def bundle_path(self) -> Path:
        """The bundle or root to serve; raises SettingsError when none is set."""
        if self.bundles is None:
            raise SettingsError(
                f"nothing to serve: set {PREFIX}BUNDLES to a bundle, or to a folder of bundles"
            )
        return self.bundles


def load_settings() -> Settings:
    """Settings from the environment. Raises SettingsError naming each wrong or unknown variable.

    Variables of the command line's options are not the service's, and are left alone.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    # pydantic-settings looks its own fields up and so never meets an unknown variable.
    given = (k for k in os.environ if k.upper().startswith(PREFIX))
    if unknown := sorted(k for k in given if k.upper() not in known and not _elsewhere(k.upper())):
        raise SettingsError(
            f"unknown setting {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    try:
        return Settings()
    except ValidationError as e:
        raise SettingsError(
            "; ".join(f"{PREFIX}{_name(p)}: {p['msg']}" for p in e.errors())
        ) from None


def _elsewhere(variable: str) -> bool:
    name = variable.removeprefix(PREFIX)
    return name in _TOOLS or name.startswith(tuple(f"{c.upper()}_" for c in COMMANDS))


def _name(problem: ErrorDetails) -> str:
    return ".".join(map(str, problem["loc"])).upper()
