"""The output of a run: begun, resumed, or cleared."""

from __future__ import annotations

from collections.abc import Collection

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


def begin(
    output: Output, run: RunManifest, outputs: Collection[str], *, overwrite: bool
) -> RunManifest:
    """Make ``output`` this run's own: new, resumed without its unfinished parts, or cleared.

    Returns the run as it was begun, which a file that was mended since does not change; nothing is
    left then but ``outputs``, the names of all that the run makes. Raises ScoringError for a folder
    that holds anything but a run, and for another run's folder unless ``overwrite``.
    """
    if not has(output, RUN) and not output.bare():
        raise ScoringError(f"{output.text} is not an output of scoring; give a new or empty folder")
    output.tidy()
    if overwrite:
        clear(output)
    if not has(output, RUN):
        write_file(output, RUN, run.text())
        return run
    begun = read_manifest(output)
    check_same_run(output.text, begun, run)
    if begun != run:
        # A file that was mended twice may have been cut into other fragments in between.
        output.remove(*(n for n in _tables(output) if n not in outputs))
    return begun


def clear(output: Output) -> None:
    """Remove what a run wrote; its manifest last, so that a killed clearing can be repeated."""
    output.remove(*DONE, *_tables(output))
    output.tidy()
    output.remove(RUN)


def _tables(output: Output) -> list[str]:
    return [n for n in output.names() if n.endswith(".parquet")]
