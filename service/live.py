"""What is live: versions of a root are switched while requests are answered."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from calibration.bundle import MANIFEST, ConformalRecord, sha256
from calibration.signing import signature_path
from posthoc.contract import BundleError, HedgedError
from posthoc.runtime import provider_name
from service import instruments
from service.bundles import (
    ACTIVE,
    UndecidedError,
    is_bundle,
    live_version,
    model_folders,
    none_of,
)
from service.core import Core
from service.errors import shorten
from service.expected_loss import loss_scale
from service.ledger import Ledger
from service.models import Model, load_live, load_model
from service.rows import MAX_STORED_CLASSES

_MAX_ERROR = 400  # characters of it that clients are told
_log = logging.getLogger("hedged.live")

Stamp = tuple[tuple[str, int, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Found:
    """The folder of one name as it was seen; a new one differs when any of its files did."""

    live: Path | None  # the bundle that is to be served
    problem: str  # why there is none
    asked: bool  # False where there is no active.json: nobody asked for what is not there
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class Opened:
    """What there is to serve at the start: models by name, what is wrong with each other name, and
    how the folder of every name was found."""

    models: Mapping[str, Model]
    problems: Mapping[str, Exception] = field(default_factory=dict)
    seen: Mapping[str, Found] = field(default_factory=dict)


def open_models(path: Path, *, device: str, threads: int, signed_by: Path | None = None) -> Opened:
    """Open, verify and check every live model at ``path``, a bundle or a root of them.

    ``signed_by``: as `load_model`. One broken model of several keeps none of the others from being
    served. Raises BundleError or ModelError, with every reason, where no model can be.
    """
    if is_bundle(path):
        model = load_model(path, device=device, threads=threads, signed_by=signed_by)
        return Opened({model.name: model})
    models: dict[str, Model] = {}
    problems: dict[str, Exception] = {}
    seen = {name: look(folder) for name, folder in model_folders(path).items()}
    for name, found in seen.items():
        try:
            models[name] = load_live(
                name, _live(found), device=device, threads=threads, signed_by=signed_by
            )
        except Exception as e:  # whatever it is, the other models must not suffer from it
            if not isinstance(e, HedgedError):
                _log.exception("%s cannot be opened", name)
            problems[name] = e.with_traceback(None)  # its frames hold what was opened
    if not models:
        raise none_of(path, problems)
    return Opened(models, problems, seen)


class Watcher:
    """Looks at the root of ``core`` every ``poll_s`` seconds, in a thread of its own, and serves
    what became live there.

    A bundle is verified, checked on its golden rows and warmed beside the one that serves, then
    takes its place between two requests. One that fails is refused: what was served stays, the
    reason goes to the log, to ``uq_swaps_total`` and to the model's metadata, and it is tried
    again when a file of its name changes. Nothing is taken down because it is gone from disk.
    A name of which nothing could be served at the start, or since it is there, is unavailable and
    taken up in the same way. ``seen`` is how folders were found when what they hold was opened.
    """

    def __init__(self, core: Core, seen: Mapping[str, Found] | None = None) -> None:
        self._core = core
        self._root = core.settings.bundle_path
        self._seen: dict[str, Found] = dict(seen or {})
        self._gone: frozenset[str] = frozenset()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look."""
        self._thread = threading.Thread(target=self._run, name="hedged-live", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Finish the load in progress, switch no more, and end the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def step(self) -> None:
        """One look at the root, and the switches that it asks for."""
        try:
            folders = model_folders(self._root)
        except (OSError, BundleError) as e:
            self._miss(frozenset(self._core.models), f"the root cannot be read ({e})")
            return
        self._miss(frozenset(self._core.models) - folders.keys(), "its folder is gone")
        for name in self._core.unavailable.keys() - folders.keys():  # nobody asks for it any more
            self._core.explain(name, None)
            instruments.mark_unavailable(name, False)
            self._seen.pop(name, None)
        for name, folder in folders.items():
            if self._stop.is_set():
                return
            found = look(folder)
            if found != self._seen.get(name):
                self._seen[name] = found
                self._meet(name, found)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.step()
            except Exception:
                # A thread that dies would leave every later deploy without effect or word.
                _log.exception("looking for live versions failed; the next look tries again")
            self._stop.wait(self._core.settings.poll_s)

    def _miss(self, gone: frozenset[str], why: str) -> None:
        for name in sorted(gone - self._gone):
            _log.warning("%s: %s; what is served stays", name, why)
        self._gone = gone

    def _meet(self, name: str, found: Found) -> None:
        """Serve what was found, or say why not."""
        serving = self._core.models.get(name)
        try:
            live = _live(found)
            if serving is None or not _same(serving, live):
                model = self._load(name, live)
                if self._stop.is_set():
                    return
                announce(model, self._core.ledger)
                self._core.switch(model)
                if serving is not None:
                    _retire(serving)
                instruments.count_swap(name, "ok")
            self._core.explain(name, None)
        except Exception as e:  # whatever it is, the model that serves must not suffer from it
            explain(self._core, name, e)
            if found.asked:
                instruments.count_swap(name, "failed")

    def _load(self, name: str, folder: Path) -> Model:
        settings = self._core.settings
        return load_live(
            name,
            folder,
            device=settings.device,
            threads=settings.model_threads,
            signed_by=settings.signed_by,
        )


def explain(core: Core, name: str, error: Exception) -> None:
    """Say why the live version of ``name`` is not served: to the log, to clients and, where no
    other version is, as a metric."""
    serving = core.models.get(name)
    known = isinstance(error, HedgedError)
    text = str(error) if known else f"{type(error).__name__}: {error}"
    if serving is None:
        _log.warning("%s is not served: %s", name, text, exc_info=None if known else error)
        instruments.mark_unavailable(name, True)
    else:
        stays = f"; version {serving.version} stays"
        _log.warning(
            "%s is not switched: %s%s", name, text, stays, exc_info=None if known else error
        )
    # Clients are told what is wrong, and not where the server keeps its files.
    root = core.settings.bundle_path
    told = text.replace(f"{root}/", "").replace(str(root), "ROOT")
    core.explain(name, shorten(told, _MAX_ERROR))


def look(folder: Path) -> Found:
    """What is to be served of one name, and a stamp of the files that this depends on."""
    live, problem, asked = None, "", True
    try:
        live = folder / live_version(folder)
    except BundleError as e:
        problem, asked = str(e), not isinstance(e, UndecidedError)
    files = [] if live is None else [*sorted(live.glob("*")), signature_path(live)]
    return Found(live, problem, asked, _stamp([folder / ACTIVE, *files]))


def announce(model: Model, ledger: Ledger) -> None:
    """Tell the ledger how to read the model's labels, and start its series at 0.

    Raises LedgerError where the ledger refuses it.
    """
    manifest, levels = model.predictor.manifest, list(model.levels.values())
    ledger.register(
        model.name,
        model.version,
        model.identity,
        task=model.task,
        width=model.width,
        classes=model.classes,
        levels=levels,
    )
    instruments.set_provider(provider_name(model.predictor.session))
    instruments.register_model(
        model.name,
        model.version,
        model.identity,
        manifest.module.name,
        levels,
        model.task,
        scored=model.task == "classification" and model.width <= MAX_STORED_CLASSES,
        labels=model.dense is None,
        conformal_rows=conformal_rows(manifest.conformal),
        loss=loss_scale(manifest),
    )
    most = "" if model.run_rows is None else f", joining requests up to {model.run_rows} row(s)"
    _log.info("serving %s %s (%s)%s", model.name, model.version, model.identity[:12], most)


def conformal_rows(record: ConformalRecord) -> float:
    """The rows that thresholds were found on: images of a dense bundle, and the effective number
    of rows where they have weights."""
    return record.weights.get("effective_rows", record.guarantees[0].n)


def _live(found: Found) -> Path:
    if found.live is None:
        raise BundleError(found.problem)
    return found.live


def _retire(model: Model) -> None:
    method = model.predictor.manifest.module.name
    instruments.retire_model(model.name, model.version, model.identity, method, model.task)


def _same(model: Model, folder: Path) -> bool:
    """Whether the bundle in ``folder`` is the one that is served."""
    bundle = model.predictor.bundle
    return bundle.path == folder and bundle.identity == sha256((folder / MANIFEST).read_bytes())


def _stamp(files: Iterable[Path]) -> Stamp:
    """Path, times, size and inode of each file that is there."""
    found = []
    for path in files:
        with suppress(OSError):  # there is none, or no more
            s = path.stat()
            # The second time moves with the rights of a file too.
            found.append((str(path), s.st_mtime_ns, s.st_ctime_ns, s.st_size, s.st_ino))
    return tuple(found)
