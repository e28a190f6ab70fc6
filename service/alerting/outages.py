"""The alerts on the service itself: there, answering, in time, with a ledger that keeps up."""

from __future__ import annotations

from service.alerting.options import Options
from service.alerting.rule import Alert

_PERCENT = "{{ $value | humanizePercentage }}"


def service_alerts(o: Options) -> list[Alert]:
    """The alerts on scraping, requests, queues and the ledger."""
    now, rate = o.windows[0], "uq_request_duration_seconds_count:rate"
    return [
        Alert(
            "UQTargetAbsent",
            f'absent(up{{job="{o.job}"}})',
            o.service_for,
            "critical",
            f"Prometheus has no target of job {o.job}",
            "Nothing is scraped, so no other alert here can fire.",
            "See the scrape configuration, service discovery, and that the service is deployed.",
        ),
        Alert(
            "UQTargetDown",
            f'up{{job="{o.job}"}} == 0',
            o.service_for,
            "critical",
            "{{ $labels.instance }} cannot be scraped",
            "The process is gone, does not answer, or refuses the key of Prometheus.",
            "See /readyz and the log of that process; where keys are set, the key's role metrics.",
        ),
        Alert(
            "UQModelUnavailable",
            f"max without ({o.gone}) (uq_model_unavailable) > 0",
            o.service_for,
            "critical",
            "{{ $labels.model }} is not served",
            "Its live bundle could not be loaded when the server started; other models answer.",
            "GET /v2 says why. Mend the bundle or activate another version: no restart is needed.",
        ),
        Alert(
            "UQMonitorDown",
            f'up{{job="{o.monitor_job}"}} == 0',
            o.service_for,
            "warning",
            "the monitor on {{ $labels.instance }} cannot be scraped",
            "hedged monitor is gone or does not answer: drift is not watched.",
            "See its log and start it again; what it knew is in its state file.",
        ),
        Alert(
            "UQSaturated",
            f"job:uq_rejected_full:ratio_rate{now} > {o.full_ratio:g}",
            o.service_for,
            "critical",
            f"{_PERCENT} of requests are turned away: the service is full",
            "Queues or buffers are full, or answers came too late for their deadline.",
            "Add replicas or workers, or slow the client down; the reason is in uq_rejected_total.",
        ),
        Alert(
            "UQQueueSlow",
            f'stage:uq_stage_duration_seconds:p99_rate{now}{{stage="queue"}} > {o.queue_seconds:g}',
            o.service_for,
            "warning",
            "requests wait {{ $value | humanizeDuration }} for the model (99th percentile)",
            "Rows come faster than the device works them off.",
            "Add replicas or workers before requests are turned away.",
        ),
        Alert(
            "UQRequestsFail",
            f'  sum without (route, code) (route_code:{rate}{now}{{code=~"5..",code!~"503|504"}})\n'
            "/\n"
            f"  (job:{rate}{now} > 0)\n"
            f"> {o.error_ratio:g}",
            o.service_for,
            "critical",
            f"{_PERCENT} of requests fail on the server's side",
            "Statuses of 500 and above, save 503 and 504, which say that the service is full.",
            "See the log: it names the request, the model and the row.",
        ),
        Alert(
            "UQLedgerBehind",
            f"  instance:uq_ledger_queue_rows:min{now} >= {o.ledger_rows}\n"
            "or\n"
            f"  instance:uq_ledger_spooled:increase{now} > 0\n"
            "or\n"
            f"  instance:uq_ledger_write_errors:increase{now} > 0",
            o.service_for,
            "warning",
            "the ledger of {{ $labels.instance }} does not keep up",
            "Its queue does not empty, or what should be written is spooled to local disk. "
            "Predictions are answered all the same; labels are joined later.",
            "See that the store answers and has room; a spool is written to it when it is back.",
        ),
        Alert(
            "UQLedgerLosing",
            f"instance:uq_ledger_dropped:increase{now} > 0",
            "0s",
            "critical",
            "the ledger of {{ $labels.instance }} lost predictions or labels",
            "Queue and spool were full. Rows that are lost cannot be joined with their labels.",
            "Bring the store back, or give the spool's disk room; then see why it fell behind.",
        ),
    ]
