"""``python -m bench abnn``: ABNN of a real network against torch-uncertainty 0.13.

Both sides turn the same frozen network with batch normalisation (`bench.normed`) into M = 3 members
of S = 10 samples, on the same module rows of the 20,000 images that it never saw, and predict the
10,000 test images; two threads each. ``ratio_speed``: seconds for REQUEST images at once, each side
in the batches in which it is fastest, in turn. ``ratio_memory``: the most memory that a fresh
process has while it opens the fitted model and predicts them; ``ratio_memory_rise`` leaves out what
was there before, above all imported libraries. Ours is a bundle's predictor with every output.

Beside the two stand the frozen network and its temperature; the peer knows no calibration rows, so
it is shown with a temperature too.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench import normed
from bench.assets import cache_folder
from bench.peers import Worker, environment, exchange
from bench.timing import compared, in_turn, ratio
from calibration import fit as fitting
from calibration.fit_options import FitOptions
from calibration.material import ROLES, Columns, prepare, split
from calibration.metrics.bootstrap import paired_difference
from calibration.metrics.calibration_error import debiased_ece
from calibration.metrics.proper import brier_score
from calibration.quality import classification_totals
from calibration.scaling import fit_temperature
from posthoc.contract import F64, I64, Array, HedgedError
from posthoc.folds import log_loss_of_probs
from posthoc.links import softmax
from posthoc.runtime import open_session

MEMBERS, SAMPLES = 3, 10
SEED = 0
THREADS = 2
REQUEST = 128  # images asked for at once
PEER_BATCHES = (32, 128)
OUR_BATCHES = (8, 32)
# Of the module rows a fifth judges members, which takes 3,200; the test images are others.
FRACTIONS = {"module": 0.82, "calibration": 0.1, "conformal": 0.05, "test": 0.03}
COLUMNS = Columns(target="label")
PEER_CALIBRATION = 1_000  # rows that its temperature is fitted on
TOLERANCE = 1e-4  # between the two sides' frozen networks, in probability
OURS = FitOptions(
    task="classification",
    method="abnn",
    settings={"members": MEMBERS, "samples": SAMPLES, "epochs": 2},
    prediction="module",
    seed=SEED,
)
SCALED = FitOptions(task="classification", method="none", seed=SEED)


def run(quick: bool) -> dict[str, Any]:
    """The ratios, and accuracy, NLL and ECE of the frozen network, of its temperature and of both
    sides; ``--quick`` lets the slow peer answer fewer images."""
    images, labels = normed.rows("test")
    if quick:
        images, labels = images[:2_000], labels[:2_000]
    with exchange() as folder, ExitStack() as stack:
        weights = str(normed.weights("batch"))
        np.savez(folder / "test.npz", images=images)
        parts = fresh_rows()
        for role in ("module", "calibration"):
            x, y = parts[role]
            np.savez(folder / f"{role}.npz", images=x, labels=y)
        peer = stack.enter_context(
            Worker(environment("torch-uncertainty"), "bench.abnn_peer", threads=THREADS)
        )
        ours = stack.enter_context(Worker.here("bench.abnn_ours", threads=THREADS))
        peer.call("load", weights=weights, images=str(folder / "test.npz"), threads=THREADS)
        peer_seconds = float(
            peer.call(
                "fit",
                rows=str(folder / "module.npz"),
                members=MEMBERS,
                samples=SAMPLES,
                seed=SEED,
            )
        )
        peer.call("save", path=str(folder / "members.safetensors"))
        our_seconds = fit_ours(folder / "abnn")
        ours.call(
            "load",
            bundle=str(folder / "abnn"),
            images=str(folder / "test.npz"),
            threads=THREADS,
        )
        found = _speed(peer, ours, 2 if quick else 5)
        found |= _memory(folder, weights, found["ours_batch"])
        probs = _answers(folder, peer, ours, weights)
        found["peer_versions"] = peer.call("versions")
        found["settings"] = {"peer": peer.call("said"), "ours": dict(OURS.settings)}
    found["fit_s"] = {"peer": peer_seconds, "ours": our_seconds}
    return {**quality(probs, labels), **found}


def fresh_rows() -> dict[str, tuple[Array, Array]]:
    """Images and labels of each role: the split of the bundles that are fitted here."""
    material = prepare(
        normed.model("batch"),
        normed.table("fresh"),
        options=SCALED,
        columns=COLUMNS,
        cache_dir=cache_folder() / "features",
    )
    roles = split(material, SEED, FRACTIONS)
    images, labels = normed.rows("fresh")
    chosen = {role: material.usable[roles == i] for i, role in enumerate(ROLES)}
    return {role: (images[rows], labels[rows]) for role, rows in chosen.items()}


def fit_ours(out: Path, options: FitOptions = OURS) -> float:
    """A bundle of the torch network on the fresh rows; seconds, the cache's pass included."""
    started = time.perf_counter()
    fitting.fit(
        "bench.normed:fashion_batch",
        normed.table("fresh"),
        out,
        options,
        fractions=FRACTIONS,
        columns=COLUMNS,
    )
    return time.perf_counter() - started


def quality(probs: dict[str, Array], labels: I64) -> dict[str, Any]:
    """Accuracy, NLL, Brier score and ECE of probabilities N×C by name, the accuracy of the frozen
    network and of ours, and the interval of their paired difference (95 %, over rows)."""
    right = {k: np.asarray(p.argmax(1) == labels, np.float64) for k, p in probs.items()}
    change = paired_difference(right["abnn"], right["frozen"])
    table = {}
    for name, p in probs.items():
        losses = log_loss_of_probs(np.asarray(p, np.float64), labels)
        table[name] = {
            "accuracy": float(right[name].mean()),
            "nll": float(losses.mean()),
            "brier": float(brier_score(np.asarray(p, np.float64), labels).mean()),
            "ece": debiased_ece(classification_totals(p, p.argmax(1), labels)),
        }
    return {
        "accuracy_frozen": table["frozen"]["accuracy"],
        "accuracy_abnn": table["abnn"]["accuracy"],
        "accuracy_difference": {"value": change.value, "low": change.low, "high": change.high},
        "rows": len(labels),
        "table": table,
    }


def tempered(probs: Array, temperature: float) -> F64:
    """Probabilities N×C at another temperature of their logarithms."""
    logits = np.log(np.maximum(np.asarray(probs, np.float64), 1e-30))
    return softmax(logits / temperature)


def _speed(peer: Worker, ours: Worker, rounds: int) -> dict[str, Any]:
    def seconds(side: Worker, batch: int) -> float:
        return float(side.call("predict", rows=REQUEST, batch=batch))

    ours.call("open")
    peer_batch = min(PEER_BATCHES, key=lambda b: seconds(peer, b))
    our_batch = min(OUR_BATCHES, key=lambda b: seconds(ours, b))
    theirs, own = in_turn(
        (lambda: seconds(peer, peer_batch), lambda: seconds(ours, our_batch)), rounds
    )
    return {
        "ratio_speed": ratio(theirs, own),
        "speed": compared(theirs, own),
        "seconds_1000": {"peer": 1000 * theirs.median, "ours": 1000 * own.median},
        "peer_batch": peer_batch,
        "ours_batch": our_batch,
    }


def _memory(folder: Path, weights: str, our_batch: int) -> dict[str, Any]:
    """Peaks of fresh processes; the peer in the batch in which it needs less."""
    images = str(folder / "test.npz")
    found: dict[str, dict[str, int]] = {}
    for shared in (False, True):
        with Worker(environment("torch-uncertainty"), "bench.abnn_peer", threads=THREADS) as peer:
            peer.call("load", weights=weights, images=images, threads=THREADS)
            found["peer_shared" if shared else "peer"] = peer.call(
                "peak",
                members=str(folder / "members.safetensors"),
                samples=SAMPLES,
                rows=REQUEST,
                batch=min(PEER_BATCHES),
                shared=shared,
            )
    with Worker.here("bench.abnn_ours", threads=THREADS) as ours:
        ours.call("load", bundle=str(folder / "abnn"), images=images, threads=THREADS)
        found["ours"] = ours.call("peak", rows=REQUEST, batch=our_batch)
    theirs, own = found["peer"], found["ours"]
    return {
        "ratio_memory": theirs["process"] / own["process"],
        "ratio_memory_rise": theirs["rise"] / max(own["rise"], 1),
        "memory_bytes": found,
    }


def _answers(folder: Path, peer: Worker, ours: Worker, weights: str) -> dict[str, Array]:
    """Probabilities of the test images by name; labels are their largest."""
    fit_ours(folder / "scaled", SCALED)
    images = str(folder / "test.npz")
    with Worker.here("bench.abnn_ours", threads=THREADS) as scaled:
        scaled.call("load", bundle=str(folder / "scaled"), images=images, threads=THREADS)
        scaled.call("open")
        scaled.call("answer", path=str(folder / "scaled.npz"), batch=REQUEST)
    ours.call("answer", path=str(folder / "ours.npz"), batch=min(OUR_BATCHES))
    peer.call("answer", path=str(folder / "peer.npz"), batch=REQUEST)
    with np.load(folder / "calibration.npz", allow_pickle=False) as rows:
        y = rows["labels"][:PEER_CALIBRATION]
        np.savez(folder / "some.npz", images=rows["images"][:PEER_CALIBRATION])
    peer.call("load", weights=weights, images=str(folder / "some.npz"), threads=THREADS)
    peer.call("answer", path=str(folder / "known.npz"), batch=REQUEST)
    probs = {n: _value(folder / f"{n}.npz") for n in ("scaled", "ours", "peer", "known")}
    _same_network(_value(folder / "peer.npz", "frozen"), folder / "test.npz")
    temperature, _ = fit_temperature(np.log(np.maximum(probs["known"], 1e-30)), y)
    return {
        "frozen": _value(folder / "peer.npz", "frozen"),
        "temperature": probs["scaled"],
        "abnn": probs["ours"],
        "peer": probs["peer"],
        "peer_temperature": tempered(probs["peer"], temperature),
    }


def _same_network(theirs: Array, images: Path) -> None:
    """HedgedError unless the peer's copy of the frozen network predicts what our graph does."""
    with np.load(images, allow_pickle=False) as data:
        x = normed.as_input(data["images"][:REQUEST]).numpy()
    session = open_session(normed.model("batch"), threads=THREADS)
    apart = float(np.abs(softmax(session.run(None, {"image": x})[0]) - theirs[: len(x)]).max())
    if apart > TOLERANCE:
        raise HedgedError(f"the two frozen networks differ: {apart:.1e}")


def _value(path: Path, name: str = "probs") -> Array:
    with np.load(path, allow_pickle=False) as data:
        return np.asarray(data[name], np.float64)
