"""Recording rules on labelled predictions: calibration error, scores, coverage, sets, widths."""

from __future__ import annotations

from calibration.drift.alert import lean
from service.alerting.options import Options
from service.alerting.rule import Rule, increase, ratio

ECE = "model_version:uq_expected_calibration_error"
COVERAGE = "model_version_level:uq_interval_coverage"
LEVEL = "model_version_level:uq_interval_level:ratio"
FLOOR = "model_version_level:uq_interval_level:floor"
ROWS = "model_version:uq_conformal_rows:max"
SERVED = "model_version:uq_model_info:max"


def current(options: Options) -> list[Rule]:
    """What is true now, whatever the window: who is served, with how many conformal rows, and the
    levels as numbers."""
    gone, now = options.gone, options.windows[0]
    level = f"0 * sum without ({gone}) (uq_interval_labeled_total) + 1"
    return [
        Rule(
            SERVED,
            f"max without ({gone}, sha256, method, task) (max_over_time(uq_model_info[{now}]))",
            "Which versions are served. A retired one may get labels for weeks, and nobody can "
            f"mend it: alerts join with this. A restart within {now} does not break them off.",
        ),
        Rule(
            ROWS,
            f"max without ({gone}) (max_over_time(uq_conformal_rows[{now}]))",
            "Rows that its thresholds were found on.",
        ),
        Rule(
            LEVEL,
            "histogram_quantile(\n"
            "  1,\n"
            f'    label_replace({level}, "le", "$1", "level", "(.+)")\n'
            "  or\n"
            f'    label_replace({level}, "le", "+Inf", "", "")\n'
            ")",
            "The label `level` as a number, which PromQL reads nowhere but in the `le` of a "
            "histogram: one observation, all of it in the bucket that ends at the level, has its "
            "greatest quantile there. So no level that a bundle is fitted for goes unwatched.",
        ),
        Rule(
            FLOOR,
            f"  {LEVEL} - {options.coverage_tolerance:g}\n"
            "-\n"
            f"  2 * sqrt({LEVEL} * (1 - {LEVEL}) / ignoring (level) group_left () ({ROWS} + 2))",
            "What the coverage of a bundle that is still healthy lies above: its own is a draw "
            "with a standard deviation of sqrt(p (1-p) / (n+2)), for n conformal rows, of which "
            "two are allowed; and a tolerance.",
        ),
    ]


def calibration(window: str, options: Options) -> list[Rule]:
    """Calibration error, accuracy and scores of the labels that came within ``window``."""
    gone, w = options.gone, window
    labeled = f"model_version:uq_labeled_predictions:increase{w}"
    gap, variance = f"model_version:uq_calibration_gap:increase{w}", variance_of(w)
    bins = "model_version_bin:uq_labeled"
    rules = [
        increase("model_version_bin", "uq_labeled_predictions_total", w, gone),
        increase("model_version_bin", "uq_labeled_correct_total", w, gone),
        increase("model_version_bin", "uq_labeled_confidence_sum_total", w, gone),
    ]
    for name in ("predictions", "correct", "confidence_sum"):
        record = f"model_version:uq_labeled_{name}:increase{w}"
        rules.append(Rule(record, f"sum without (bin) ({bins}_{name}:increase{w})"))
    rules += [
        ratio(
            f"model_version:uq_accuracy:ratio_increase{w}",
            f"model_version:uq_labeled_correct:increase{w}",
            labeled,
            "How often labelled rows were right, and how often they claimed to be.",
        ),
        ratio(
            f"model_version:uq_labeled_confidence:mean_increase{w}",
            f"model_version:uq_labeled_confidence_sum:increase{w}",
            labeled,
        ),
        Rule(
            gap,
            "sum without (bin) (\n"
            "  abs(\n"
            f"      {bins}_confidence_sum:increase{w}\n"
            "    -\n"
            f"      {bins}_correct:increase{w}\n"
            "  )\n"
            ")",
            "Expected calibration error: sum over bins of |confidence - correct|, over all labels. "
            "A regressor has no confidence, hence no series here.",
        ),
        ratio(f"{ECE}:ratio_increase{w}", gap, labeled),
        Rule(
            variance,
            "clamp_min(\n"
            f"    {bins}_confidence_sum:increase{w}\n"
            "  -\n"
            f"    {bins}_confidence_sum:increase{w} ^ 2\n"
            "  /\n"
            f"    ({bins}_predictions:increase{w} > 0),\n"
            "  0\n"
            ")",
            "What a perfectly calibrated model would show. With n labels of mean confidence c in a "
            "bin, correct - confidence is about normal with variance n c (1 - c); its absolute "
            "value has mean sqrt(2/pi) and variance 1 - 2/pi in units of that. The floor is "
            f"the mean plus {options.margin:g} standard deviations of the sum over bins, over all "
            "labels.",
        ),
        ratio(
            f"{ECE}:noise_floor{w}",
            "(\n"
            f"      sum without (bin) (sqrt(2 / pi() * {variance}))\n"
            "    +\n"
            f"      {options.margin:g} * sqrt((1 - 2 / pi()) * sum without (bin) ({variance}))\n"
            "  )",
            labeled,
        ),
    ]
    scores = (
        ("log_loss", "Scores of the labelled rows, as means. A model whose probabilities are not "
         "kept has no log loss and no Brier score."),
        ("brier", ""),
        ("crps", ""),
    )  # fmt: skip
    for name, why in scores:
        rules.append(increase("model_version", f"uq_{name}_sum_total", w, gone, why))
        total = f"model_version:uq_{name}_sum:increase{w}"
        rules.append(ratio(f"model_version:uq_{name}:mean_increase{w}", total, labeled))
    return rules


def variance_of(window: str) -> str:
    """The series that holds each bin's variance of ``correct`` under perfect calibration."""
    return f"model_version_bin:uq_labeled_correct:variance{window}"


def coverage(window: str, options: Options) -> list[Rule]:
    """Coverage and size of sets and intervals whose labels, or rows, came within ``window``."""
    gone, w, by_level = options.gone, window, "model_version_level"
    labeled = f"{by_level}:uq_interval_labeled:increase{w}"
    width = f"{by_level}:uq_interval_width_sum:increase{w}"
    sizes = f"{by_level}:uq_set_size_count:increase{w}"
    buckets = f"{by_level}_le:uq_set_size_bucket:increase{w}"
    return [
        increase(
            by_level,
            "uq_interval_labeled_total",
            w,
            gone,
            "Coverage of prediction sets and intervals, by the level they were asked for.",
        ),
        increase(by_level, "uq_interval_covered_total", w, gone),
        ratio(
            f"{COVERAGE}:ratio_increase{w}", f"{by_level}:uq_interval_covered:increase{w}", labeled
        ),
        Rule(
            f"{COVERAGE}_gap:difference{w}",
            f"{COVERAGE}:ratio_increase{w} - {LEVEL}",
            "Below 0: fewer truths lie inside than was asked for.",
        ),
        Rule(
            f"{COVERAGE}:margin{w}",
            f"  {options.margin:g} * sqrt(\n"
            f"      {LEVEL} * (1 - {LEVEL})\n"
            "    *\n"
            f"      (1 / ({labeled} > 0) + ignoring (level) group_left () (1 / ({ROWS} + 2)))\n"
            "  )\n"
            "+\n"
            f"  {lean(options.margin):.9g} * (2 * {LEVEL} - 1)\n"
            "  *\n"
            f"    (1 / ({labeled} > 0) + ignoring (level) group_left () (2 / ({ROWS} + 2)))",
            "How far a healthy bundle may lie off: labels are m draws, and the coverage of one "
            "bundle is itself a draw, Beta(k, n+1-k) for n conformal rows. That is a standard "
            f"deviation of sqrt(p (1-p) (1/m + 1/(n+2))); the margin is {options.margin:g} such, "
            "and what the law leans, as misses are rare: Cornish and Fisher's first term, "
            "(z^2-1)/6 (2p-1) (1/m + 2/(n+2)), in which a healthy bundle lies below as often as "
            "a normal law has it.",
        ),
        increase(
            by_level,
            "uq_interval_width_sum_total",
            w,
            gone,
            "Mean width of intervals over labelled rows, in target units. Unbounded ones add "
            "nothing, so where a level has some this is too small.",
        ),
        ratio(f"{by_level}:uq_interval_width:mean_increase{w}", width, labeled),
        Rule(
            buckets,
            f"sum without ({gone}) (increase(uq_set_size_bucket[{w}]))",
            "Set sizes of all served rows, labelled or not: histogram, mean, share of empty sets.",
        ),
        increase(by_level, "uq_set_size_sum", w, gone),
        increase(by_level, "uq_set_size_count", w, gone),
        ratio(
            f"{by_level}:uq_set_size:mean_increase{w}",
            f"{by_level}:uq_set_size_sum:increase{w}",
            sizes,
        ),
        ratio(
            f"{by_level}:uq_set_size:empty_ratio_increase{w}",
            f'sum without (le) ({buckets}{{le=~"0|0.0"}})',
            sizes,
        ),
        Rule(f"{by_level}:uq_set_size:p90_increase{w}", f"histogram_quantile(0.9, {buckets})"),
    ]
