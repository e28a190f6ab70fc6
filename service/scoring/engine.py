"""Who scores: this process, or the workers of a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calibration.predictor import Predictor
from posthoc.contract import DataError
from posthoc.runtime import CPU, CUDA, TENSORRT, planned_provider, provider_name
from service.scoring.job import Job
from service.scoring.local import run_local

LOCAL = "local"
RAY = "ray"
_PROVIDERS = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}


@dataclass(frozen=True, slots=True)
class Engine:
    """``name`` is ``local`` or ``ray``, which has ``workers`` processes (None: as many as there is
    room for) of ``threads`` cores and ``num_gpus`` devices each (None: one, where ``device`` is no
    CPU). No answer depends on which, so it is no part of the run's manifest.

    Raises DataError for settings that do not go together.
    """

    name: str
    device: str
    threads: int
    workers: int | None = None
    num_gpus: float | None = None

    def __post_init__(self) -> None:
        if self.name not in (LOCAL, RAY):
            raise DataError(f"engine {self.name!r} is unknown; use {LOCAL} or {RAY}")
        if self.threads < 0:
            raise DataError(f"the number of threads must be at least 0, not {self.threads}")
        if self.name == LOCAL:
            for what, given in (("workers", self.workers), ("num_gpus", self.num_gpus)):
                if given is not None:
                    raise DataError(f"{what} belongs to the engine ray")
            return
        if self.workers is not None and self.workers < 1:
            raise DataError(f"the number of workers must be at least 1, not {self.workers}")
        if self.threads == 0:
            raise DataError("Ray places workers by their cores: give a number of threads, not 0")
        device = self._of_worker()
        if device not in _PROVIDERS:
            raise DataError(
                f"the engine ray has no device {self.device}: use auto, cpu, cuda or tensorrt, and "
                "it chooses which GPU"
            )
        if self.num_gpus is not None:
            self._check_gpus(self.num_gpus, device)

    @staticmethod
    def _check_gpus(gpus: float, device: str) -> None:
        if device == "cpu" or not gpus > 0:
            raise DataError(
                f"num_gpus {gpus:g} does not go with the device {device}; give a share of a GPU "
                "with cuda, or neither"
            )
        if gpus > 1 and not gpus.is_integer():
            raise DataError(f"num_gpus is a share of one GPU or a whole number, not {gpus:g}")

    def open(self, bundle: str | Path) -> Predictor:
        """The bundle in this process, which needs no device where others score."""
        device = "cpu" if self.name == RAY else self.device
        return Predictor(bundle, device=device, threads=self.threads)

    def provider(self, predictor: Predictor) -> str:
        """The execution provider that answers come from."""
        if self.name == LOCAL:
            return provider_name(predictor.session)
        return _PROVIDERS[self._of_worker()]

    def run(self, job: Job, predictor: Predictor) -> None:
        """Score what the job still has to do."""
        if self.name == LOCAL:
            run_local(job, predictor)
            return
        from service.scoring.ray_engine import run_ray

        device = self._of_worker()
        run_ray(
            job,
            predictor.bundle.path,
            device=device,
            threads=self.threads,
            workers=self.workers,
            gpus=0 if device == "cpu" else self.num_gpus or 1,
        )

    def _of_worker(self) -> str:
        """What a worker loads the model on: workers are alike, so ``auto`` is decided here."""
        if self.device != "auto":
            return self.device
        return "cuda" if planned_provider("auto") == CUDA else "cpu"
