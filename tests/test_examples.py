"""Each script of examples/ runs as a reader runs it, and what it prints is counted again: labels
by the frozen model alone, coverage by the bundle's graph in plain ONNX Runtime."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from scipy.stats import betabinom

from tests.documentation import ROOT
from tests.test_readme import FENCE, numbers, pattern

EXAMPLES = ROOT / "examples"
GUIDE = ROOT / "docs" / "guides" / "examples.md"
MARK = "EXAMPLE_RUN"  # of the processes of one run, in their environment
DEADLINE_S = 400.0
LEVEL = re.compile(
    r"level 0\.9: coverage (\S+) \(luck allows (\S+?)–(\S+?)\), mean \w+ (\S+)$", re.M
)
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Ran:
    """What a script made and printed."""

    out: Path
    printed: str

    def level(self, which: int = 0) -> tuple[float, float, float]:
        """Coverage at level 0.9, and what luck allows, as printed."""
        coverage, low, high, _ = LEVEL.findall(self.printed)[which]
        return float(coverage), float(low), float(high)

    def says(self, words: str, value: float, within: float = 1e-4) -> None:
        """The number that stands behind some words at the beginning of a line is this one."""
        begins = r"\s+".join(map(re.escape, words.split()))
        found = re.search(rf"^{begins}\s+(-?\d[\d.]*\d)", self.printed, re.M)
        assert found is not None, words
        assert abs(float(found[1]) - value) <= within, (words, found[1], value)


def environment(folder: Path, run: str = "") -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HEDGED_")}
    scripts = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ours = {"PATH": scripts, "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "110", MARK: run}
    ours["PYTHONUNBUFFERED"] = "1"
    return kept | ours | {"HEDGED_DRAIN_S": "0"}  # the only client is the one that stops the server


def run(name: str, folder: Path, mark: str = "") -> Ran:
    """Run a script in a folder of its own; it must succeed, and print what the guide shows."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--out", str(folder / "made")]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(folder, mark),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
    assert differs(shown(name), done.stdout) is None
    assert not (folder / "cache" / "hedged").exists()  # it leaves nothing but its folder
    return Ran(folder / "made", done.stdout)


def shown(name: str) -> str:
    """What the guide says that a script prints."""
    blocks = [(m[2], m[3]) for m in FENCE.finditer(GUIDE.read_text("utf-8"))]
    (at,) = [i for i, (_, text) in enumerate(blocks) if text == f"python examples/{name}.py\n"]
    assert blocks[at + 1][0] == "text"
    return blocks[at + 1][1]


def differs(shown: str, printed: str) -> str | None:
    """The first line shown that is not printed in its turn; None: all are. Numbers may be off by
    0.05 or 5 %: they come from networks that were trained here, and machines round differently."""
    lines = iter(line.strip() for line in printed.splitlines())
    wanted = (line.strip() for line in shown.splitlines() if line.strip() != "…")
    return next((want for want in wanted if not any(alike(want, line) for line in lines)), None)


def alike(want: str, line: str) -> bool:
    """Numbers within a twentieth, small ones within 0.02, and of one sign: what trains does so a
    little differently on every machine."""
    got = pattern(want).fullmatch(line)
    if got is None:
        return False
    pairs = zip(numbers(want), (float(b.replace(",", "")) for b in got.groups()), strict=True)
    return all(abs(a - b) <= 0.05 * max(0.4, abs(a)) and a * b >= 0 for a, b in pairs)


def answers(bundle: Path, inputs: Arrays, outputs: tuple[str, ...]) -> Arrays:
    """The bundle's graph by itself, at its own first level."""
    return session(bundle / "predictor.onnx", inputs, outputs)


def session(model: Path, inputs: Arrays, outputs: tuple[str, ...]) -> Arrays:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # thresholds are inputs with a default, which it warns of
    opened = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return dict(zip(outputs, opened.run(list(outputs), inputs), strict=True))


def luck(bundle: Path, n: int) -> tuple[float, float]:
    """Where the coverage of n rows lies in 99 of 100 draws of conformal rows and of these."""
    promise = json.loads((bundle / "manifest.json").read_text())["conformal"]["guarantees"][0]
    assert promise["alpha"] == 0.1
    rank = int(np.ceil((promise["n"] + 1) * 0.9))
    law = betabinom(n, rank, promise["n"] + 1 - rank)
    return float(law.ppf(0.005)) / n, float(law.ppf(0.995)) / n


def check_coverage(
    ran: Ran, held: np.ndarray, bundle: str = "bundle", which: int = 0, items: int = 0
) -> None:
    """Coverage is what was printed, within the luck that was printed, which is that of its law.

    ``held`` says of every row whether its truth is inside, ``items`` is how many rows count as
    independent. Rows whose content the fit saw are left out by evaluate, and not here: a few.
    """
    coverage, low, high = ran.level(which)
    assert abs(held.mean() - coverage) < 0.01
    assert low <= coverage <= high
    wanted = luck(ran.out / bundle, items or len(held))
    assert np.allclose((low, high), wanted, atol=0.01), wanted


def holding(sets: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Of N sets N×C, whether each holds its truth."""
    return np.asarray(sets[np.arange(len(truth)), truth])


def classes(bundle: Path) -> list[str]:
    found: list[str] = json.loads((bundle / "manifest.json").read_text())["classes"]
    return found


def numbered(names: Iterable[str], classes: list[str]) -> np.ndarray:
    return np.array([classes.index(one) for one in names])


def npz(path: Path) -> Arrays:
    with np.load(path) as found:
        return {name: found[name] for name in found.files}


def columns(path: Path, names: list[str]) -> np.ndarray:
    table = pq.read_table(path)
    return np.stack([table[name].to_numpy() for name in names], 1).astype(np.float32)


def forward(weights: Arrays, x: np.ndarray) -> np.ndarray:
    """A torch.nn.Sequential of linear layers, ReLU between them and perhaps a normalisation first,
    from what was saved of it."""
    x = x.astype(np.float64)
    if "0.running_mean" in weights:
        x = (x - weights["0.running_mean"]) / np.sqrt(weights["0.running_var"] + 1e-5)
        x = x * weights["0.weight"] + weights["0.bias"]
    layers = sorted({int(k.split(".")[0]) for k, v in weights.items() if v.ndim == 2})
    for layer in layers:
        x = x @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]
        x = x if layer == layers[-1] else np.maximum(x, 0)
    return x


@pytest.mark.long
def test_image_classification(tmp_path: Path) -> None:
    ran = run("image_classification", tmp_path)
    rows = npz(ran.out / "fresh.npz")
    images, digits = {"image": rows["image"]}, rows["digit"]
    found = answers(ran.out / "bundle", images, ("label", "set", "ood"))
    frozen = session(ran.out / "model.onnx", images, ("logits",))["logits"]
    assert np.array_equal(found["label"], frozen.argmax(1))
    ran.says("frozen accuracy", (frozen.argmax(1) == digits).mean())
    check_coverage(ran, holding(found["set"], digits))
    at_random = np.random.default_rng(0).permutation(digits)
    assert holding(found["set"], at_random).mean() < ran.level()[1]
    for name in ("fresh", "inverted", "photographs"):
        strange = {"image": npz(ran.out / f"{name}.npz")["image"]}
        flagged = answers(ran.out / "bundle", strange, ("ood",))["ood"].mean()
        ran.says(f"{name}:", flagged)
        assert (flagged > 0.5) == (name != "fresh")


@pytest.mark.long
def test_text_classification(tmp_path: Path) -> None:
    ran = run("text_classification", tmp_path)
    parts = [npz(ran.out / f"{name}.npz") for name in ("train", "held-out", "fresh")]
    messages = [set(part["message"]) for part in parts]
    assert len(set.union(*messages)) == sum(map(len, messages))  # none in two parts
    found = answers(ran.out / "bundle", {"input": parts[-1]["grams"]}, ("label", "set"))
    frozen = forward(load_file(ran.out / "network.safetensors"), parts[-1]["grams"])
    assert np.array_equal(found["label"], frozen.argmax(1))
    truth = numbered(parts[-1]["language"], classes(ran.out / "bundle"))
    check_coverage(ran, holding(found["set"], truth), items=len(messages[-1]))


def test_tabular_regression(tmp_path: Path) -> None:
    ran = run("tabular_regression", tmp_path)
    table = pq.read_table(ran.out / "fresh.parquet")
    inputs = [name for name in table.column_names if name not in ("idcode", "ln_wage")]
    x, wage = columns(ran.out / "fresh.parquet", inputs), table["ln_wage"].to_numpy()
    frozen = forward(load_file(ran.out / "network.safetensors"), x)
    women = len(np.unique(table["idcode"].to_numpy()))
    widths: list[np.ndarray] = []
    for bundle in ("one-width", "own-error-bars"):
        made = answers(ran.out / bundle, {"input": x}, ("mean", "lower", "upper"))
        assert np.allclose(made["mean"], frozen, atol=1e-4)
        lower, upper = made["lower"][:, 0], made["upper"][:, 0]
        check_coverage(ran, (lower <= wage) & (wage <= upper), bundle, len(widths), women)
        widths.append(upper - lower)
    assert np.ptp(widths[0]) < 1e-4 < 0.1 < np.ptp(widths[1])


@pytest.mark.long
def test_segmentation(tmp_path: Path) -> None:
    ran = run("segmentation", tmp_path)
    table = pq.read_table(ran.out / "fresh-scans.parquet")
    scans, truth = (table[name].combine_chunks().to_numpy_ndarray() for name in ("scan", "mask"))
    found = answers(ran.out / "bundle", {"scan": scans}, ("label", "set", "set_size"))
    frozen = session(ran.out / "segment.onnx", {"scan": scans}, ("classes",))["classes"]
    assert np.array_equal(found["label"], frozen.argmax(1))
    inside = np.take_along_axis(found["set"], truth[:, None], axis=1).mean(axis=(1, 2, 3))
    ran.says("level 0.98: coverage", inside.mean())
    assert inside.mean() > 0.98 - 3 * inside.std() / len(inside) ** 0.5
    wrong = found["label"] != truth
    for size in (1, 2):
        ran.says(f"sets of {size}:", wrong[found["set_size"] == size].mean())
    mask = answers(ran.out / "bundle-disc", {"scan": scans}, ("set",))["set"][:, 1]
    shows = (truth == 1).any(axis=(1, 2))
    pairs = zip(mask[shows], truth[shows] == 1, strict=True)
    ran.says(
        "discs, at most 0.02 to be missed:", 1 - np.mean([m[disc].mean() for m, disc in pairs])
    )


def test_black_box(tmp_path: Path) -> None:
    ran = run("black_box", tmp_path)
    grades = classes(ran.out / "bundle")
    for name in ("fresh", "inches"):
        asked = columns(ran.out / f"{name}.parquet", grades)
        truth = numbered(pq.read_table(ran.out / f"{name}.parquet")["cut"].to_pylist(), grades)
        found = answers(ran.out / "bundle", {"z": asked}, ("label", "set"))
        assert np.array_equal(found["label"], asked.argmax(1))  # the box's own answer
        ran.says(f"{name}: accuracy", (asked.argmax(1) == truth).mean(), within=0.01)
        if name == "fresh":
            check_coverage(ran, holding(found["set"], truth))
    assert (ran.out / "evaluation" / "report.html").stat().st_size > 10_000


def test_delayed_labels(tmp_path: Path) -> None:
    mark = str(uuid.uuid4())
    ran = run("delayed_labels", tmp_path, mark)
    assert marked(mark) == []
    lines = {
        words[0]: words[1] for words in re.findall(r"^(\w+): evidence.*?:(.*)", ran.printed, re.M)
    }
    evidence = {
        k: [float(v) for v in re.findall(r" (-?[\d.]+)(?:,|$)", line)] for k, line in lines.items()
    }
    assert max(evidence["before"]) < 3 <= max(evidence["since"])
    assert ran.printed.index("alert: ") < ran.printed.index("since: labels")  # no label was needed
    assert re.search("^alert: .* is no longer like the reference", ran.printed, re.M)
    frozen = load_file(ran.out / "network.safetensors")
    species = classes(ran.out / "bundle")
    for period in ("before", "since"):
        x = columns(ran.out / f"{period}.parquet", ["weight", "hindfoot_length", "female"])
        caught = pq.read_table(ran.out / f"{period}.parquet")["species_id"].to_pylist()
        found = answers(ran.out / "bundle", {"input": x}, ("label", "set", "ood"))
        assert (found["label"] == forward(frozen, x).argmax(1)).mean() > 0.999  # float32 or float64
        ran.says(f"{period}:", found["ood"].mean(), within=0.001)
        labelled = [i for i in range(0, len(x), 2) if caught[i] in species]
        held = holding(found["set"][labelled], numbered([caught[i] for i in labelled], species))
        ran.says(f"{period}: labels accepted", len(held))
        ran.says(f"{period}: coverage at level 0.9", held.mean(), within=0.002)
        low, high = luck(ran.out / "bundle", len(held))
        assert (low <= held.mean() <= high) == (period == "before")


def test_nothing_is_left_of_delayed_labels_when_it_is_stopped(tmp_path: Path) -> None:
    mark = str(uuid.uuid4())
    script = [sys.executable, str(EXAMPLES / "delayed_labels.py"), "--out", str(tmp_path / "made")]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            script, cwd=tmp_path, env=environment(tmp_path, mark), stdout=log, stderr=log
        )
    try:
        until(lambda: b"before: " in (tmp_path / "log").read_bytes(), process)
        assert len(marked(mark)) >= 3  # the script, hedged serve, BentoML
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
        assert marked(mark) == []
    finally:
        for one in [process, *marked(mark)]:
            one.kill()
        process.wait()


def marked(mark: str) -> list[psutil.Process]:
    """The processes that run in an environment with that mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def until(true: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)  # only how often to look


def test_every_script_is_in_the_guide() -> None:
    text = GUIDE.read_text("utf-8")
    scripts = sorted(p.name for p in EXAMPLES.glob("*.py"))
    assert len(scripts) >= 7
    assert [name for name in scripts if f"`examples/{name}`" not in text] == []
    assert set(re.findall(r"`examples/(\w+\.py)`", text)) == set(scripts)


def test_what_the_guide_shows_is_compared() -> None:
    printed = "level 0.9: coverage 0.9000\nx\nlast 12\n"
    assert differs("level 0.9: coverage 0.9100\n…\nlast 12", printed) is None
    assert differs("level 0.9: coverage 0.7", printed) == "level 0.9: coverage 0.7"
    assert differs("last 12\nx", printed) == "x"
    assert differs("another", printed) == "another"
