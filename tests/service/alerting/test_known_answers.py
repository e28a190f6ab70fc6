"""Every recorded series, over the windows that ship, against numpy on the same streams."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from calibration.drift.alert import coverage_threshold
from calibration.metrics.totals import BIN_LABELS
from service.alerting import Options, rules_text
from tests.service.alerting.promtool import all_rules, input_series, selector, unit_tests
from tests.service.alerting.segments import (
    DELAYS,
    EDGES,
    END,
    INSTANCES,
    MINUTES,
    SECONDS,
    SIZES,
    Labels,
    M,
    R,
    Streams,
    streams,
)


def quantile(q: float, bounds: tuple[str, ...], cumulated: list[float]) -> float:
    """By the definition: linear within the first bucket that reaches the rank, from 0; the last
    finite bound where only +Inf reaches it."""
    rank, below, low = q * cumulated[-1], 0.0, 0.0
    for bound, total in zip(bounds, cumulated, strict=True):
        if total >= rank:
            if bound == "+Inf":
                return low
            if float(bound) <= 0:
                return float(bound)
            return low + (float(bound) - low) * (rank - below) / (total - below)
        below, low = total, float(bound)
    raise AssertionError


class Answers:
    """What is expected: record → [(labels, value)]."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[Labels, float]]] = {}

    def add(self, record: str, labels: Labels, value: float, job: str = "hedged") -> None:
        self.found.setdefault(record, []).append(({"job": job, **labels}, value))


def answers(s: Streams) -> dict[str, list[tuple[Labels, float]]]:
    a = Answers()
    for labels in (M, R):
        a.add("model_version:uq_model_info:max", labels, 1)
        a.add("model_version:uq_conformal_rows:max", labels, 500)
    for labels, level in ((M, "0.9"), (M, "0.95"), (R, "0.9"), (R, "0.975")):
        a.add(
            "model_version_level:uq_interval_level:ratio", {**labels, "level": level}, float(level)
        )
        p = float(level)
        floor = p - 0.02 - 2 * (p * (1 - p) / 502) ** 0.5
        a.add("model_version_level:uq_interval_level:floor", {**labels, "level": level}, floor)
    for w in MINUTES:
        labelled(a, s, w)
        coverage(a, s, w)
        served(a, s, w)
        service(a, s, w)
        ledger(a, s, w)
        changes = s.increase("uq_changepoints_total", w)
        labels = {**M, "stream": "entropy"}
        a.add(
            f"model_version_stream:uq_changepoints:increase{w}", labels, changes, "hedged-monitor"
        )
    return a.found


def labelled(a: Answers, s: Streams, w: str) -> None:
    sums = {
        name: np.array([s.increase(f"uq_labeled_{name}_total", w, **M, bin=b) for b in BIN_LABELS])
        for name in ("predictions", "correct", "confidence_sum")
    }
    for name, values in sums.items():
        for b, value in zip(BIN_LABELS, values.tolist(), strict=True):
            a.add(f"model_version_bin:uq_labeled_{name}:increase{w}", {**M, "bin": b}, value)
        a.add(f"model_version:uq_labeled_{name}:increase{w}", M, float(values.sum()))
    n, right, claimed = (sums[k] for k in ("predictions", "correct", "confidence_sum"))
    total = float(n.sum())
    others = s.increase("uq_labeled_predictions_total", w, **R)
    a.add(f"model_version_bin:uq_labeled_predictions:increase{w}", {**R, "bin": "all"}, others)
    a.add(f"model_version:uq_labeled_predictions:increase{w}", R, others)
    a.add(f"model_version:uq_accuracy:ratio_increase{w}", M, right.sum() / total)
    a.add(f"model_version:uq_labeled_confidence:mean_increase{w}", M, claimed.sum() / total)
    gap = float(np.abs(right - claimed).sum())
    a.add(f"model_version:uq_calibration_gap:increase{w}", M, gap)
    a.add(f"model_version:uq_expected_calibration_error:ratio_increase{w}", M, gap / total)
    filled = n > 0
    mean = claimed[filled] / n[filled]
    variance = n[filled] * mean * (1 - mean)
    for b, value in zip(np.array(BIN_LABELS)[filled], variance, strict=True):
        a.add(f"model_version_bin:uq_labeled_correct:variance{w}", {**M, "bin": str(b)}, value)
    # The sum of independent |N(0, v)|: their means, and three times the root of their variances.
    floor = np.sqrt(2 * variance / np.pi).sum() + 3 * np.sqrt((variance * (1 - 2 / np.pi)).sum())
    a.add(f"model_version:uq_expected_calibration_error:noise_floor{w}", M, floor / total)
    for name, labels, of in (("log_loss", M, total), ("brier", M, total), ("crps", R, others)):
        value = s.increase(f"uq_{name}_sum_total", w)
        a.add(f"model_version:uq_{name}_sum:increase{w}", labels, value)
        a.add(f"model_version:uq_{name}:mean_increase{w}", labels, value / of)


def coverage(a: Answers, s: Streams, w: str) -> None:
    by_level = "model_version_level:uq_interval"
    for labels, level in ((M, "0.9"), (R, "0.9"), (R, "0.975"), (M, "0.95")):
        key = {**labels, "level": level}
        n = s.increase("uq_interval_labeled_total", w, **key)
        inside = s.increase("uq_interval_covered_total", w, **key)
        a.add(f"{by_level}_labeled:increase{w}", key, n)
        a.add(f"{by_level}_covered:increase{w}", key, inside)
        if not n:
            continue
        p = float(level)
        a.add(f"{by_level}_coverage:ratio_increase{w}", key, inside / n)
        a.add(f"{by_level}_coverage_gap:difference{w}", key, inside / n - p)
        a.add(f"{by_level}_coverage:margin{w}", key, p - coverage_threshold(p, n, 500))
        if labels is R:
            width = s.increase("uq_interval_width_sum_total", w, **key)
            a.add(f"{by_level}_width_sum:increase{w}", key, width)
            a.add(f"{by_level}_width:mean_increase{w}", key, width / n)
    sizes = "model_version_level:uq_set_size"
    key = {**M, "level": "0.9"}
    cumulated = [s.increase("uq_set_size_bucket", w, le=le) for le in SIZES]
    for le, value in zip(SIZES, cumulated, strict=True):
        a.add(f"model_version_level_le:uq_set_size_bucket:increase{w}", {**key, "le": le}, value)
    count, total = s.increase("uq_set_size_count", w), s.increase("uq_set_size_sum", w)
    a.add(f"{sizes}_count:increase{w}", key, count)
    a.add(f"{sizes}_sum:increase{w}", key, total)
    a.add(f"{sizes}:mean_increase{w}", key, total / count)
    a.add(f"{sizes}:empty_ratio_increase{w}", key, cumulated[0] / count)
    a.add(f"{sizes}:p90_increase{w}", key, quantile(0.9, SIZES, cumulated))


def served(a: Answers, s: Streams, w: str) -> None:
    for labels in (M, R):
        outcomes = {
            o: s.increase("uq_predictions_total", w, **labels, outcome=o)
            for o in ("answered", "abstained", "rejected")
        }
        for o, value in outcomes.items():
            key = {**labels, "outcome": o}
            a.add(f"model_version_outcome:uq_predictions:increase{w}", key, value)
        rows = outcomes["answered"] + outcomes["abstained"]
        a.add(f"model_version:uq_served_rows:increase{w}", labels, rows)
        a.add(
            f"model_version:uq_abstention:ratio_increase{w}", labels, outcomes["abstained"] / rows
        )
        ood = s.increase("uq_ood_total", w, **labels)
        a.add(f"model_version:uq_ood:increase{w}", labels, ood)
        a.add(f"model_version:uq_ood:ratio_increase{w}", labels, ood / rows)
        n = s.increase("uq_labeled_predictions_total", w, **labels)
        a.add(f"model_version:uq_label_coverage:ratio_increase{w}", labels, n / rows)
        if labels is M:
            expected = s.increase("uq_expected_correct_total", w)
            a.add(f"model_version:uq_expected_correct:increase{w}", M, expected)
            a.add(f"model_version:uq_expected_accuracy:ratio_increase{w}", M, expected / rows)
        loss = s.increase("uq_expected_loss_sum_total", w, **labels)
        a.add(f"model_version:uq_expected_loss_sum:increase{w}", labels, loss)
        a.add(f"model_version:uq_expected_loss:mean_increase{w}", labels, loss / rows)
    if w != "1d":
        return
    cumulated = [s.increase("uq_confidence_bucket", w, le=le) for le in EDGES]
    for le, value in zip(EDGES, cumulated, strict=True):
        a.add(f"model_version_le:uq_confidence_bucket:increase{w}", {**M, "le": le}, value)
    for b, rows in zip(BIN_LABELS, np.diff([0, *cumulated[:-1]]).tolist(), strict=True):
        a.add(f"model_version_bin:uq_served_rows:increase{w}", {**M, "bin": b}, rows)
        n = s.increase("uq_labeled_predictions_total", w, **M, bin=b)
        a.add(f"model_version_bin:uq_label_coverage:ratio_increase{w}", {**M, "bin": b}, n / rows)


def service(a: Answers, s: Streams, w: str) -> None:
    every = 60 * MINUTES[w]  # seconds

    def rate(name: str, **labels: str) -> float:
        return s.increase(name, w, **labels) / every

    requests = "uq_request_duration_seconds"
    for route, codes in (("/a", ("200", "500", "404")), ("/b", ("200",))):
        for code in codes:
            value = rate(f"{requests}_count", route=route, code=code)
            a.add(f"route_code:{requests}_count:rate{w}", {"route": route, "code": code}, value)
        of, key = rate(f"{requests}_count", route=route), {"route": route}
        a.add(f"route:{requests}_count:rate{w}", key, of)
        failed = rate(f"{requests}_count", route=route, code="500") if route == "/a" else 0.0
        a.add(f"route:uq_request_errors:ratio_rate{w}", key, failed / of)
        quantiles(a, s, w, requests, key, "route", f"rate{w}", every, (0.5, 0.95, 0.99))
    total = rate(f"{requests}_count")
    a.add(f"job:{requests}_count:rate{w}", {}, total)
    for stage in ("queue", "model"):
        key = {"stage": stage}
        quantiles(
            a, s, w, "uq_stage_duration_seconds", key, "stage", f"rate{w}", every, (0.5, 0.95, 0.99)
        )
    rows, runs = rate("uq_batch_rows_sum"), rate("uq_batch_rows_count")
    a.add(f"job:uq_batch_rows_sum:rate{w}", {}, rows)
    a.add(f"job:uq_batch_rows_count:rate{w}", {}, runs)
    a.add(f"job:uq_batch_rows:mean_rate{w}", {}, rows / runs)
    a.add(f"job:uq_queue_rows:max{w}", {}, 7 + (0 if w == "5m" else 90))
    for reason in ("queue_full", "timeout", "invalid_request"):
        value = rate("uq_rejected_total", reason=reason)
        a.add(f"reason:uq_rejected:rate{w}", {"reason": reason}, value)
    full = rate("uq_rejected_total", reason="queue_full") + rate(
        "uq_rejected_total", reason="timeout"
    )
    a.add(f"job:uq_rejected_full:rate{w}", {}, full)
    a.add(f"job:uq_rejected_full:ratio_rate{w}", {}, full / total)
    for result in ("joined", "conflict"):
        value = s.increase("uq_feedback_total", w, result=result)
        key = {"model": "m", "result": result}
        a.add(f"model_result:uq_feedback:increase{w}", key, value)
    key = {"model": "m"}
    quantiles(a, s, w, "uq_feedback_delay_seconds", key, "model", f"increase{w}", 1, (0.5, 0.95))


def quantiles(
    a: Answers,
    s: Streams,
    w: str,
    name: str,
    key: Labels,
    level: str,
    operation: str,
    every: float,
    qs: tuple[float, ...],
) -> None:
    bounds = DELAYS if "delay" in name else SECONDS
    cumulated = [s.increase(f"{name}_bucket", w, **key, le=le) / every for le in bounds]
    for le, value in zip(bounds, cumulated, strict=True):
        a.add(f"{level}_le:{name}_bucket:{operation}", {**key, "le": le}, value)
    for q in qs:
        a.add(f"{level}:{name}:p{100 * q:g}_{operation}", key, quantile(q, bounds, cumulated))


def ledger(a: Answers, s: Streams, w: str) -> None:
    for instance in INSTANCES:
        key = {"instance": instance}
        for name in ("written", "dropped", "spooled", "write_errors"):
            value = s.increase(f"uq_ledger_{name}_total", w, instance)
            a.add(f"instance:uq_ledger_{name}:increase{w}", key, value)
        a.add(f"instance:uq_ledger_queue_rows:min{w}", key, 7 if instance == "a" else 1)


def equals(record: str, labels: Labels, value: float) -> dict[str, Any]:
    series, value = selector(record, labels), float(value)
    return {
        "expr": f"abs({series} - {value!r}) <= bool {1e-9 * max(1.0, abs(value))!r}",
        "eval_time": f"{END}m",
        "exp_samples": [{"labels": selector("", labels), "value": 1}],
    }


def test_every_recorded_series_is_numpys(tmp_path):
    text, s = rules_text(), streams()
    expected = answers(s)
    assert set(expected) == {rule["record"] for rule in all_rules(text) if "record" in rule}
    tests = [equals(record, *one) for record, many in expected.items() for one in many]
    # As many series as are expected, and no other.
    tests += [
        {
            "expr": f"count({record})",
            "eval_time": f"{END}m",
            "exp_samples": [{"labels": "{}", "value": len(many)}],
        }
        for record, many in expected.items()
    ]
    assert len(tests) > 700
    suite = {"interval": "1m", "input_series": input_series(s.series()), "promql_expr_test": tests}
    unit_tests(tmp_path, text, [suite], f"{END // 50}m")


def test_a_wrong_answer_is_found(tmp_path):
    """The same check with an answer that is off by a part in a million."""
    record = "model_version:uq_expected_calibration_error:ratio_increase1h"
    s = streams()
    ((labels, value),) = answers(s)[record]
    test = equals(record, labels, value * (1 + 1e-6))
    suite = {"interval": "1m", "input_series": input_series(s.series()), "promql_expr_test": [test]}
    with pytest.raises(AssertionError, match="ratio_increase1h"):
        unit_tests(tmp_path, rules_text(), [suite], f"{END // 50}m")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ece_of_labels_that_come_in_bursts_is_within_two_percent_of_numpys(seed, tmp_path):
    """Labels come by the second, in bursts, and are scraped every 14 seconds, so that scrapes miss
    both ends of the window; the process restarts once. numpy has the labels of that very hour."""
    rng = np.random.default_rng(seed)
    every, end, restart = 14, 7200, 4200  # seconds
    n = rng.poisson(rng.gamma(0.02, 5.0, size=(20, end)))
    claimed = (np.arange(20) + 0.5) / 20
    right = rng.binomial(n, np.clip(claimed - 0.15, 0, 1)[:, None])
    confidence = n * claimed[:, None]
    series = {}
    for name, steps in (("predictions", n), ("correct", right), ("confidence_sum", confidence)):
        for b, row in zip(BIN_LABELS, steps.astype(float), strict=True):
            before, after = np.cumsum(row[:restart]), np.cumsum(row[restart:])
            scraped = [0.0, *before.tolist(), *after.tolist()][::every]
            key = selector(f"uq_labeled_{name}_total", {**M, "bin": b, "instance": "a"})
            series[key] = " ".join(map(repr, scraped))
    last = slice(end - 3600, end)
    gaps = np.abs(right[:, last].sum(1) - confidence[:, last].sum(1))
    ece = float(gaps.sum() / n[:, last].sum())
    record = "model_version:uq_expected_calibration_error:ratio_increase1h"
    test = {
        "expr": f"abs({record} / {ece!r} - 1) <= bool 0.02",
        "eval_time": f"{end}s",
        "exp_samples": [{"labels": selector("", M), "value": 1}],
    }
    suite = {
        "interval": f"{every}s",
        "input_series": input_series(series),
        "promql_expr_test": [test],
    }
    unit_tests(tmp_path, rules_text(Options()), [suite], "1m")
