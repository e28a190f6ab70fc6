"""Batch scoring: fragment by fragment, each committed once, resumable after any kill."""

from service.scoring.errors import ErrorRatioError, Interrupted, ScoringError
from service.scoring.schema import output_schema
from service.scoring.score import score
from service.scoring.summary import Failure, Progress, Summary

__all__ = [
    "ErrorRatioError",
    "Failure",
    "Interrupted",
    "Progress",
    "ScoringError",
    "Summary",
    "output_schema",
    "score",
]
