"""How large an answer will be, before it is computed: bytes and characters of its rows."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np

from calibration.bundle import GOLDEN
from calibration.predictor import Predictor
from posthoc.contract import Array, TensorSpec

# Characters of one value in JSON with its comma, about: a float32, a mask, a class index.
_TEXT = {"f": 12, "b": 6}
_TEXT_OF_INTEGERS = 4


@dataclass(frozen=True, slots=True)
class Output:
    """One output: values of a row, bytes and characters of a value; ``free`` where the row grows
    with the inputs, and ``values`` is that of the row that was measured."""

    values: int
    itemsize: int
    text: int
    free: bool


@dataclass(frozen=True, eq=False)
class Sizes:
    """The outputs of a bundle, measured on a row with ``inputs`` values and ``input_bytes`` bytes
    in all inputs together."""

    inputs: int
    input_bytes: int
    outputs: Mapping[str, Output]

    def answer_bytes(self, names: Collection[str], values: int) -> int:
        """Bytes of ``names`` for a row whose inputs hold so many values."""
        return _total(self, frozenset(names), values)[0]

    def answer_text(self, names: Collection[str], values: int) -> int:
        """Characters of ``names`` in JSON, about, for a row whose inputs hold so many values."""
        return _total(self, frozenset(names), values)[1]

    def values(self, name: str, values: int) -> int:
        """Values of one output for a row whose inputs hold so many values."""
        output = self.outputs[name]
        if not output.free:
            return output.values
        return ceil(output.values * values / max(1, self.inputs))


@lru_cache(maxsize=256)  # requests ask for the same again and again
def _total(sizes: Sizes, names: frozenset[str], values: int) -> tuple[int, int]:
    held = [(sizes.values(name, values), sizes.outputs[name]) for name in names]
    return sum(n * o.itemsize for n, o in held), sum(n * o.text for n, o in held)


def measure(predictor: Predictor, outputs: Sequence[TensorSpec]) -> Sizes:
    """Run a golden row for ``outputs`` (fields, and frozen outputs by their names) and look."""
    row = golden_row(predictor)
    q_hat = np.asarray(predictor.q_hat(predictor.manifest.alphas[0]), np.float32)
    answer = predictor.run(row, outputs=[s.name for s in outputs], q_hat=q_hat[None])
    return Sizes(
        inputs=row_values(row),
        input_bytes=row_bytes(row),
        outputs={s.name: _output(s, answer[s.name]) for s in outputs},
    )


def golden_row(predictor: Predictor) -> dict[str, Array]:
    """The inputs of the first golden row."""
    with np.load(io.BytesIO(predictor.bundle.files[GOLDEN]), allow_pickle=False) as golden:
        return {s.name: golden[f"in/{s.name}"][:1] for s in predictor.inputs}


def row_values(inputs: Mapping[str, Array]) -> int:
    """Values of one row in all inputs together."""
    return sum([value.size // len(value) for value in inputs.values()])


def row_bytes(inputs: Mapping[str, Array]) -> int:
    """Bytes of one row in all inputs together."""
    return sum([value.nbytes // len(value) for value in inputs.values()])


def _output(spec: TensorSpec, value: Array) -> Output:
    return Output(
        values=value.size,
        itemsize=value.itemsize,
        text=_TEXT.get(value.dtype.kind, _TEXT_OF_INTEGERS),
        free=-1 in spec.shape[1:],
    )
