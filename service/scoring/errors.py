"""How a scoring run can end other than well."""

from __future__ import annotations

from posthoc.contract import HedgedError


class ScoringError(HedgedError):
    """A run that cannot start or go on. What it committed stays, and the same command resumes."""


class ErrorRatioError(ScoringError):
    """More rows are bad than the allowed share of all rows."""


class DamageError(ScoringError):
    """A fragment whose bytes cannot be decoded; it is reported and the others are scored."""


class Interrupted(ScoringError):  # noqa: N818  (nothing went wrong)
    """SIGTERM came and the fragment in hand was finished; the same command goes on from there."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: schedulers start the job again


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type when it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
