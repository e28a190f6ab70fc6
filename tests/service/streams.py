"""Seeded streams of predictions with their truth, and what the definitions say about them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

MODEL, VERSION, IDENTITY, LEVEL = "m", "1", "a" * 64, "0.9"


@dataclass(frozen=True)
class Stream:
    """N predictions, their ids and their true labels (N ints, or N×K floats)."""

    ids: list[str]
    fields: dict[str, np.ndarray]
    y: np.ndarray

    def rows(self, index: slice | list[int]) -> dict[str, np.ndarray]:
        return {k: v[index] for k, v in self.fields.items()}

    def label(self, i: int) -> Any:
        return self.y[i].tolist()


def classification(n: int, *, classes: int = 7, seed: int = 0) -> Stream:
    """An over-confident classifier with sets, flags and abstentions."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, classes)) * 2
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    sharp = p**1.5 / (p**1.5).sum(axis=1, keepdims=True)
    probs = sharp.astype(np.float32)
    y = np.array([rng.choice(classes, p=row) for row in p])
    members = probs > 0.08
    fields = {
        "label": probs.argmax(axis=1).astype(np.int64),
        "probs": probs,
        "confidence": probs.max(axis=1),
        "entropy": -(probs * np.log(probs)).sum(axis=1),
        "set": members,
        "set_size": members.sum(axis=1).astype(np.int64),
        "ood_score": rng.normal(size=n).astype(np.float32),
        "ood_pvalue": rng.random(n).astype(np.float32),
        "ood": rng.random(n) < 0.05,
        "abstain": rng.random(n) < 0.2,
    }
    return Stream([f"row-{i}" for i in range(n)], fields, y)


def regression(n: int, *, outputs: int = 2, seed: int = 0) -> Stream:
    """A regressor whose intervals are a little too narrow."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(n, outputs)).astype(np.float32)
    std = rng.uniform(0.5, 2, size=(n, outputs)).astype(np.float32)
    fields = {
        "mean": mean,
        "std": std,
        "lower": mean - np.float32(1.5) * std,
        "upper": mean + np.float32(1.5) * std,
        "quantiles": np.stack([mean - std, mean, mean + std], axis=2),
        "ood": np.zeros(n, dtype=bool),
    }
    return Stream([f"row-{i}" for i in range(n)], fields, mean + std * rng.normal(size=mean.shape))


def by_definition(stream: Stream, rows: list[int]) -> dict[str, float]:
    """Accuracy, ECE, log loss, Brier, coverage and set size of some rows, one row at a time."""
    f = stream.fields
    gaps = [0.0] * 20
    right = log_loss = brier = covered = size = 0.0
    for i in rows:
        confidence, y = float(f["confidence"][i]), int(stream.y[i])
        hit = float(int(f["label"][i]) == y)
        b = next(k for k in range(20) if confidence <= (k + 1) / 20)
        gaps[b] += hit - confidence
        right += hit
        p = [float(v) for v in f["probs"][i]]
        log_loss -= math.log(p[y])
        brier += sum((v - (c == y)) ** 2 for c, v in enumerate(p))
        covered += bool(f["set"][i][y])
        size += int(f["set_size"][i])
    n = len(rows)
    return {
        "accuracy": right / n,
        "ece": sum(map(abs, gaps)) / n,
        "log_loss": log_loss / n,
        "brier": brier / n,
        "coverage": covered / n,
        "mean_size": size / n,
    }


class Exposition:
    """The samples of an exposition text, as Prometheus's own parser reads them."""

    def __init__(self, text: str) -> None:
        self.samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in text_string_to_metric_families(text):
            for s in family.samples:
                key = (s.name, frozenset(s.labels.items()))
                assert key not in self.samples, f"{key} is there twice"
                self.samples[key] = s.value

    def values(self, name: str, **labels: str) -> dict[frozenset[tuple[str, str]], float]:
        """Series of a name that carry these labels, by their other labels."""
        want = set(labels.items())
        return {k - want: v for (n, k), v in self.samples.items() if n == name and want <= k}

    def total(self, name: str, **labels: str) -> float:
        found = self.values(name, **labels)
        assert found, f"no series {name} {labels}"
        return math.fsum(found.values())


def from_counters(text: str, **labels: str) -> dict[str, float]:
    """The same figures as ``by_definition``, from raw counters."""
    x = Exposition(text)
    n = x.total("uq_labeled_predictions_total", **labels)
    correct = x.values("uq_labeled_correct_total", **labels)
    confidence = x.values("uq_labeled_confidence_sum_total", **labels)
    assert len(correct) == len(confidence) == 20
    level = {**labels, "level": LEVEL}
    return {
        "n": n,
        "accuracy": math.fsum(correct.values()) / n,
        "ece": math.fsum(abs(correct[b] - confidence[b]) for b in correct) / n,
        "log_loss": x.total("uq_log_loss_sum_total", **labels) / n,
        "brier": x.total("uq_brier_sum_total", **labels) / n,
        "coverage": x.total("uq_interval_covered_total", **level)
        / x.total("uq_interval_labeled_total", **level),
    }
