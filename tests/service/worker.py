"""A worker process of the ledger tests: commands as JSON lines in, answers as JSON lines out.

    python -m tests.service.worker LEDGER ROWS CLAIM_ROWS DIE_AFTER

DIE_AFTER > 0: SIGKILL itself right after that claim was committed, before any counter moves.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import numpy as np

from service import instruments
from service.joiner import Joiner
from service.labels import Joined, LabelItem
from service.ledger import Ledger
from tests.service.streams import IDENTITY, LEVEL, MODEL, VERSION, Stream, classification

BATCH = 37


class Watched(Ledger):
    """A ledger that says when it has claimed, and dies there on demand."""

    die_after = 0
    claims = 0

    def claim(self, limit: int) -> list[Joined]:
        rows = super().claim(limit)
        if rows:
            self.claims += 1
            if self.claims == self.die_after:
                os.kill(os.getpid(), signal.SIGKILL)
        return rows


def record(ledger: Ledger, stream: Stream, rows: list[int]) -> None:
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        fields = stream.rows(part)
        instruments.observe_prediction(MODEL, VERSION, fields, LEVEL)
        ids = [stream.ids[i] for i in part]
        assert ledger.record(MODEL, VERSION, IDENTITY, ids, fields, LEVEL)


def answer(ledger: Watched, stream: Stream, joiner: Joiner, command: dict[str, Any]) -> Any:
    match command["do"]:
        case "record":
            record(ledger, stream, command["rows"])
            return ledger.flush()
        case "labels":
            return ledger.add_labels([LabelItem(MODEL, i, v) for i, v in command["items"]])
        case "start":
            return joiner.start()
        case "join":
            return joiner.step()
        case "calibration":
            return ledger.calibration()
        case "render":
            return instruments.render().decode()
        case "queue":
            return instruments.set_queue_rows([command["rows"]])
    raise ValueError(command)


def main(path: str, rows: str, claim_rows: str, die_after: str) -> None:
    ledger = Watched.open(path)
    ledger.die_after = int(die_after)
    instruments.register_model(MODEL, VERSION, IDENTITY, "laplace", [LEVEL], "classification")
    ledger.register(MODEL, VERSION, IDENTITY, task="classification", width=7)
    assert ledger.flush()
    joiner = Joiner(ledger, interval_s=0.01, claim_rows=int(claim_rows))
    stream = classification(int(rows))
    for line in sys.stdin:
        result = answer(ledger, stream, joiner, json.loads(line))
        print(json.dumps(result, default=np.ndarray.tolist), flush=True)
    joiner.stop()
    ledger.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
