"""The output of a run: begun, resumed, or cleared."""

from __future__ import annotations

from posthoc.contract import DataError
from service.scoring.errors import ScoringError
from service.scoring.manifest import RUN, RunManifest, check_same_run, read_manifest
from service.scoring.measures import DRIFT, EVALUATION
from service.scoring.output import Output, has, write_file
from service.scoring.places import Place, overlap

SUCCESS = "_SUCCESS"
SUMMARY = "_summary.json"
DONE = (SUCCESS, SUMMARY, EVALUATION, DRIFT)  # what a run ends with


def check_apart(source: Place, output: Place) -> None:
    """Raise DataError where an output would be taken for input, or written over it."""
    if overlap(source, output):
        raise DataError(f"input {source} and output {output} overlap; give another output folder")


def begin(output: Output, run: RunManifest, *, overwrite: bool) -> None:
    """Make ``output`` this run's own: new, resumed without its unfinished parts, or cleared.

    Raises ScoringError for a folder that holds anything but a run, and for another run's folder
    unless ``overwrite``.
    """
    if not has(output, RUN) and not output.bare():
        raise ScoringError(f"{output.text} is not an output of scoring; give a new or empty folder")
    output.tidy()
    if overwrite:
        clear(output)
    if has(output, RUN):
        check_same_run(output.text, read_manifest(output), run)
    else:
        write_file(output, RUN, run.text())


def clear(output: Output) -> None:
    """Remove what a run wrote; its manifest last, so that a killed clearing can be repeated."""
    output.remove(*DONE, *(n for n in output.names() if n.endswith(".parquet")))
    output.tidy()
    output.remove(RUN)
