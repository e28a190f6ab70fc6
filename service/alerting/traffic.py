"""Recording rules on what is served: predictions without labels, requests, queues, the ledger."""

from __future__ import annotations

from itertools import pairwise

from calibration.metrics.totals import BIN_EDGES, BIN_LABELS
from service.alerting.options import Options
from service.alerting.rule import Rule, increase, ratio

FULL = ("overloaded", "queue_full", "bodies_full", "answers_full", "timeout")
"""Reasons of ``uq_rejected_total`` that say the server cannot keep up."""
SERVED_ROWS = "model_version:uq_served_rows"
QUANTILES = (0.5, 0.95, 0.99)


def predictions(window: str, options: Options) -> list[Rule]:
    """What is known of served rows without a label, and how many of them got one."""
    gone, w = options.gone, window
    outcomes, served = (
        f"model_version_outcome:uq_predictions:increase{w}",
        f"{SERVED_ROWS}:increase{w}",
    )
    rules = [
        increase("model_version_outcome", "uq_predictions_total", w, gone),
        Rule(
            served,
            f'sum without (outcome) ({outcomes}{{outcome!="rejected"}})',
            "Rows that got an answer, abstentions among them.",
        ),
        ratio(
            f"model_version:uq_abstention:ratio_increase{w}",
            f'sum without (outcome) ({outcomes}{{outcome="abstained"}})',
            served,
        ),
        increase(
            "model_version",
            "uq_expected_correct_total",
            w,
            gone,
            "Mean confidence of all served rows: their expected accuracy, without any label. Only "
            "as good as the calibration; under a shift both may go wrong together.",
        ),
        ratio(
            f"model_version:uq_expected_accuracy:ratio_increase{w}",
            f"model_version:uq_expected_correct:increase{w}",
            served,
        ),
        increase(
            "model_version",
            "uq_expected_loss_sum_total",
            w,
            gone,
            "Mean loss that a loss head expects of served rows, without any label: beside the log "
            "loss of labelled rows, or for a regressor in mean squared errors of the fit. Learnt "
            "on rows like those of the fit, and no better than that on others.",
        ),
        ratio(
            f"model_version:uq_expected_loss:mean_increase{w}",
            f"model_version:uq_expected_loss_sum:increase{w}",
            served,
        ),
        increase("model_version", "uq_ood_total", w, gone),
        ratio(
            f"model_version:uq_ood:ratio_increase{w}", f"model_version:uq_ood:increase{w}", served
        ),
        ratio(
            f"model_version:uq_label_coverage:ratio_increase{w}",
            f"model_version:uq_labeled_predictions:increase{w}",
            served,
            "Labels that came over rows that were served, in the same window: with labels that "
            "are late these are not the same rows, so it may exceed 1 for a while.",
        ),
    ]
    if w == options.windows[-1]:
        rules += _label_coverage_by_bin(w, gone)
    return rules


def _label_coverage_by_bin(w: str, gone: str) -> list[Rule]:
    rows = f"model_version_bin:uq_served_rows:increase{w}"
    buckets = f"model_version_le:uq_confidence_bucket:increase{w}"
    why = (
        "Label coverage by confidence bin, over the longest window only, as labels are late. "
        "Whoever labels mostly what looks unsure measures another calibration than that of all "
        "rows. Rows in a bin are the difference of two buckets."
    )
    rules = [Rule(buckets, f"sum without ({gone}) (increase(uq_confidence_bucket[{w}]))", why)]
    edges = [f"{edge:g}" for edge in BIN_EDGES[:-1]] + ["1.0"]
    first = f'sum without (le) ({buckets}{{le="{edges[0]}"}})'
    rules.append(Rule(rows, first, labels={"bin": BIN_LABELS[0]}))
    for (below, edge), label in zip(pairwise(edges), BIN_LABELS[1:], strict=True):
        above = f'sum without (le) ({buckets}{{le="{edge}"}})'
        rules.append(
            Rule(
                rows,
                f'{above} - sum without (le) ({buckets}{{le="{below}"}})',
                labels={"bin": label},
            )
        )
    labeled = f"model_version_bin:uq_labeled_predictions:increase{w}"
    return [*rules, ratio(f"model_version_bin:uq_label_coverage:ratio_increase{w}", labeled, rows)]


def service(window: str, options: Options) -> list[Rule]:
    """Rate, errors and duration of requests; use and saturation of the device; the ledger."""
    gone, w = options.gone, window
    requests, duration = (
        "uq_request_duration_seconds",
        f"route_le:uq_request_duration_seconds_bucket:rate{w}",
    )
    stages = f"stage_le:uq_stage_duration_seconds_bucket:rate{w}"
    by_code, by_route = f"route_code:{requests}_count:rate{w}", f"route:{requests}_count:rate{w}"
    total, full = f"job:{requests}_count:rate{w}", f"job:uq_rejected_full:rate{w}"
    delays = f"model_le:uq_feedback_delay_seconds_bucket:increase{w}"
    rules = [
        Rule(
            by_code,
            f"sum without ({gone}) (rate({requests}_count[{w}]))",
            "Requests a second, those that failed on our side, and how long they took.",
        ),
        Rule(by_route, f"sum without (code) ({by_code})"),
        Rule(total, f"sum without (route) ({by_route})"),
        # `or`: without a single failure there is no series of a failure.
        ratio(
            f"route:uq_request_errors:ratio_rate{w}",
            f'(sum without (code) ({by_code}{{code=~"5.."}}) or 0 * {by_route})',
            by_route,
        ),
        Rule(duration, f"sum without ({gone}, code) (rate({requests}_bucket[{w}]))"),
        *_quantiles("route:uq_request_duration_seconds", f"rate{w}", duration, QUANTILES),
        Rule(
            stages,
            f"sum without ({gone}) (rate(uq_stage_duration_seconds_bucket[{w}]))",
            "Seconds in the queue and in the model.",
        ),
        *_quantiles("stage:uq_stage_duration_seconds", f"rate{w}", stages, QUANTILES),
        Rule(
            f"job:uq_batch_rows_sum:rate{w}", f"sum without ({gone}) (rate(uq_batch_rows_sum[{w}]))"
        ),
        Rule(
            f"job:uq_batch_rows_count:rate{w}",
            f"sum without ({gone}) (rate(uq_batch_rows_count[{w}]))",
        ),
        ratio(
            f"job:uq_batch_rows:mean_rate{w}",
            f"job:uq_batch_rows_sum:rate{w}",
            f"job:uq_batch_rows_count:rate{w}",
        ),
        Rule(
            f"job:uq_queue_rows:max{w}", f"sum without ({gone}) (max_over_time(uq_queue_rows[{w}]))"
        ),
        Rule(f"reason:uq_rejected:rate{w}", f"sum without ({gone}) (rate(uq_rejected_total[{w}]))"),
        Rule(
            full,
            f'sum without (reason) (reason:uq_rejected:rate{w}{{reason=~"{"|".join(FULL)}"}})',
            "Requests that were turned away because the server could not keep up.",
        ),
        ratio(f"job:uq_rejected_full:ratio_rate{w}", full, total),
        increase(
            "model_result",
            "uq_feedback_total",
            w,
            gone,
            "What became of labels, and how late they were.",
        ),
        Rule(delays, f"sum without ({gone}) (increase(uq_feedback_delay_seconds_bucket[{w}]))"),
        *_quantiles("model:uq_feedback_delay_seconds", f"increase{w}", delays, (0.5, 0.95)),
    ]
    for i, name in enumerate(("written", "dropped", "spooled", "write_errors")):
        why = "" if i else "The ledger, by replica, since each has its own queue and spool."
        rule = f"increase(uq_ledger_{name}_total[{w}])"
        rules.append(Rule(f"instance:uq_ledger_{name}:increase{w}", rule, why))
    rules.append(
        Rule(
            f"instance:uq_ledger_queue_rows:min{w}",
            f"min_over_time(uq_ledger_queue_rows[{w}])",
            "What never left the queue meanwhile: a burst that is worked off is no backlog.",
        )
    )
    return rules


def _quantiles(name: str, operation: str, buckets: str, levels: tuple[float, ...]) -> list[Rule]:
    return [
        Rule(f"{name}:p{100 * q:g}_{operation}", f"histogram_quantile({q:g}, {buckets})")
        for q in levels
    ]


def drift(window: str, options: Options) -> list[Rule]:
    """Change points that ``hedged monitor`` found within ``window``."""
    return [increase("model_version_stream", "uq_changepoints_total", window, options.gone)]
