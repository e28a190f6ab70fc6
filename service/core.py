"""The protocol-free core: validated tensors in, prediction fields and row ids out.

Front ends translate to and from this page; nothing here knows HTTP or JSON.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from posthoc.contract import Array, DataError
from service import images, instruments, sizes
from service.batcher import Batcher, Work
from service.errors import ServiceError, invalid, shorten, unavailable_model, unknown_model
from service.ids import row_ids
from service.inputs import validate
from service.later import Later
from service.ledger import Ledger
from service.models import Model, NotFiniteError, Plan, threshold_rows
from service.parsing import Parser
from service.record import Predicted, Row, kept, record
from service.settings import Settings
from service.shared import Shared
from service.solve import RowError

_MAP_LEVELS = 16  # in one request: of maps each is searched among the pixels of all images
_log = logging.getLogger("hedged.core")


class Answer(NamedTuple):
    """The answer to one request: N rows of fields and outputs, and an id for each row."""

    model: Model
    id: str
    ids: list[str]
    fields: dict[str, Array]

    @property
    def nbytes(self) -> int:
        """Bytes of the fields."""
        return sum(map(attrgetter("nbytes"), self.fields.values()))


class Core:
    """The models of one server process, their device's batcher, and the ledger."""

    def __init__(
        self,
        settings: Settings,
        models: Mapping[str, Model],
        ledger: Ledger,
        later: Later | None = None,
    ) -> None:
        self.settings = settings
        self.models: Mapping[str, Model] = dict(models)  # replaced as a whole, never changed
        self.swap_errors: Mapping[str, str] = {}  # name → why its live version is not served
        self.ledger = ledger
        self.nulls = settings.nonfinite == "allow"  # whether an input may be missing: NaN, or null
        self.later = later or Later()  # counts and keeps what was answered
        self.ready = False
        self.batcher = Batcher(
            max_batch_rows=settings.max_batch_rows,
            max_batch_bytes=settings.max_batch_bytes,
            max_queue_rows=settings.max_queue_rows,
            max_delay=settings.max_queue_delay_s,
            later=self.later,
        )
        self.parse = Parser()
        # It reads the whole ledger: open pages share one scan, and nothing waits behind it.
        self.calibration = Shared(ledger.calibration, seconds=2.0, name="hedged-calibration")

    def model(self, name: str | None = None, version: str | None = None) -> Model:
        """The model of that name, or the only one. Raises ServiceError 404, 400 when several, and
        503 for one that is `unavailable`."""
        errors = self.swap_errors  # read first: what is switched meanwhile is in one of the two
        models = self.models
        if name is None:
            # One that is broken is a model all the same: who names none must not get the other.
            if len(models) != 1 or not errors.keys() <= models.keys():
                known = sorted({*models, *errors})
                raise invalid(f"several models are served; name one of {known}")
            return next(iter(models.values()))
        if name not in models:
            if name in errors:
                raise unavailable_model(name, errors[name], self.settings.poll_s)
            raise unknown_model(name, models)
        model = models[name]
        if version is not None and version != model.version:
            raise ServiceError(
                404,
                "unknown_model",
                f"model {name!r} is served in version {model.version!r}, not {shorten(version)!r}",
            )
        return model

    def known(self, name: str | None = None) -> str:
        """The name of a model that is served or `unavailable`, or of the only one: for what asks
        the ledger and not the model. Raises as `model` does otherwise."""
        if name is not None and name in self.unavailable:
            return name
        return self.model(name).name

    @property
    def unavailable(self) -> dict[str, str]:
        """Why each name that is there has no version that can be served."""
        return {name: why for name, why in self.swap_errors.items() if name not in self.models}

    def switch(self, model: Model) -> None:
        """Serve ``model`` under its name from the next request on; what has begun ends on the
        model it began with. From any thread, but one at a time."""
        self.models = {**self.models, model.name: model}

    def explain(self, name: str, error: str | None) -> None:
        """Say why the live version of ``name`` is not served; None where it is. As `switch`."""
        others = {n: text for n, text in self.swap_errors.items() if n != name}
        self.swap_errors = others if error is None else {**others, name: error}

    async def predict(
        self,
        model: Model,
        inputs: Mapping[str, Array],
        *,
        outputs: Sequence[str] | None = None,
        alpha: float | Sequence[float] | None = None,
        id: str | None = None,
        ids: Sequence[str] | None = None,
        text: Collection[str] = (),
        reserve: Callable[[int], None] | None = None,
        disconnected: Callable[[], Awaitable[None]] | None = None,
    ) -> Answer:
        """Predict rows. ``inputs`` maps every input name to an array with rows along axis 0.

        ``outputs`` names what the answer holds (default: every field), ``text`` those that will
        leave as JSON; ``alpha`` is one level for the request or one per row (default: the bundle's
        first). Rows are called ``ids``, or ``{id}:{row}``. ``reserve`` is told the answer's bytes
        beforehand and may refuse them. The work is dropped before it is computed when
        ``disconnected()`` returns. Raises ServiceError, naming the input and row at fault.
        """
        given = sum(map(attrgetter("nbytes"), inputs.values()))
        with Refusals(model, most_rows(inputs)):
            feed = await self.parse.beside(given, lambda: self._validated(model, inputs))
            rows = len(next(iter(feed.values())))
            plan = model.plan(outputs, text)
            id, ids = row_ids(rows, id, ids)
            alphas = _alphas(model, alpha, rows)
            values, row_bytes = sizes.row_values(feed), sizes.row_bytes(feed)
            asked = self._fitting(model, rows, values, plan)
            answer_bytes = model.sizes.answer_bytes(plan.computed, values)
            if reserve is not None:
                reserve(asked + rows * answer_bytes)
            feed["q_hat"] = await self._thresholds(model, alphas, rows)
            watch = _Watch(self.batcher, disconnected)
            work = self.batcher.submit(
                model.run,
                feed,
                plan.computed,
                timeout=self.settings.request_timeout_s,
                row_bytes=row_bytes + answer_bytes,
                most=model.run_rows,
                pace=model.pace,
                waits=watch.begin,
            )
            fields = await self._answer(work, watch)
        await self._remember(model, alphas, ids, fields, feed.get("group"), rows * answer_bytes)
        return Answer(model, id, ids, {name: fields[name] for name in plan.names})

    async def _answer(self, work: Work, watch: _Watch) -> dict[str, Array]:
        """The work's answer; its failure as a ServiceError; dropped once the client has gone."""
        try:
            return await work.future
        except RowError as e:
            if isinstance(e.cause, NotFiniteError):
                raise ServiceError(422, "no_finite_answer", f"row {e.row}: {e.cause}") from None
            if isinstance(e.cause, InvalidArgument | DataError):
                raise invalid(shorten(str(e), 400)) from None
            _log.error("row %d could not be computed", e.row, exc_info=e.cause)
            raise ServiceError(500, "model_failed", f"the model failed on row {e.row}") from None
        except asyncio.CancelledError:
            if watch.gone:
                raise ServiceError(499, "client_gone", "the client closed the connection") from None
            self.batcher.drop(work)
            raise
        finally:
            watch.end()

    async def close(self) -> None:
        """Stop answering."""
        self.ready = False
        await self.batcher.close()
        self.later.flush()
        await asyncio.to_thread(self.parse.close)
        await asyncio.to_thread(self.calibration.close)

    def _validated(self, model: Model, inputs: Mapping[str, Array]) -> dict[str, Array]:
        specs, optional = model.predictor.inputs, model.predictor.optional
        return validate(inputs, specs, self.settings.max_rows, optional, self.nulls)

    def _fitting(self, model: Model, rows: int, values: int, plan: Plan) -> int:
        """Bytes of the body that will hold the answer; ServiceError 413 for too many."""
        settings = self.settings
        plain = rows * model.sizes.answer_text(plan.text, values)
        if plain > settings.max_json_bytes:
            raise ServiceError(
                413,
                "answer_too_large",
                f"the answer would take about {plain} bytes of JSON, and {settings.max_json_bytes} "
                "are the most; send fewer rows, name fewer outputs, or ask for binary tensors: "
                f"POST /v2/models/{model.name}/infer with binary_data_output",
            )
        binary = rows * model.sizes.answer_bytes(plan.binary, values)
        if binary > settings.max_answer_bytes:
            raise ServiceError(
                413,
                "answer_too_large",
                f"the answer would take {binary} bytes, and {settings.max_answer_bytes} are the "
                "most; send fewer rows or name fewer outputs",
            )
        return plain + binary

    async def _thresholds(self, model: Model, alphas: Sequence[float], rows: int) -> Array:
        if model.dense is None or all(alpha in model.levels for alpha in alphas):
            return _thresholds(model, alphas, rows)
        if len(set(alphas)) > _MAP_LEVELS:
            raise invalid(f"a request for maps may have {_MAP_LEVELS} different values of alpha")
        # Any other level of a risk is searched among the pixels of all images.
        return await asyncio.to_thread(_thresholds, model, alphas, rows)

    async def _remember(
        self,
        model: Model,
        alphas: Sequence[float],
        ids: list[str],
        fields: dict[str, Array],
        group: Array | None,
        size: int,
    ) -> None:
        """Count and keep a prediction of ``size`` bytes, soon; whatever goes wrong here never
        reaches the answer."""
        if model.dense is not None:
            try:
                maps = fields
                fields = await self.parse.beside(
                    size, lambda: images.summary(model.task, maps, ids)
                )
            except Exception:
                _log.exception("a prediction of %s could not be recorded", model.name)
                return
        # Only the bundle's own levels are metric labels: callers may ask for any alpha.
        levels = [model.levels.get(alpha) for alpha in alphas]
        self.later.add(self._record, kept(model, levels, ids, fields, group), size)

    def _record(self, answered: Sequence[Predicted | Row]) -> None:
        record(self.ledger, answered)


def most_rows(inputs: Mapping[str, Array]) -> int:
    """Rows of the longest input, before it is known whether they fit together."""
    return max([len(value) for value in inputs.values() if value.ndim], default=0)


class Refusals:
    """Counts ``rows`` of ``model`` as rejected when what is done inside refuses them."""

    __slots__ = ("_model", "_rows")

    def __init__(self, model: Model, rows: int) -> None:
        self._model = model
        self._rows = rows

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # 499: the client took its rows back.
        if isinstance(error, ServiceError) and error.status != 499:
            instruments.count_rejected_rows(self._model.name, self._model.version, self._rows)


def _alphas(model: Model, alpha: float | Sequence[float] | None, rows: int) -> Sequence[float]:
    """One α for all rows, or one per row."""
    if alpha is None:
        return (next(iter(model.levels)),)
    if isinstance(alpha, float | int):
        return (float(alpha),)
    if len(alpha) != rows:
        raise invalid(f"{len(alpha)} values of alpha were given for {rows} rows")
    return [float(a) for a in alpha]


def _thresholds(model: Model, alphas: Sequence[float], rows: int) -> Array:
    try:
        if len(alphas) == 1:
            return threshold_rows(model, alphas[0], rows)
        found = {alpha: model.predictor.q_hat(alpha) for alpha in set(alphas)}
    except DataError as e:
        raise invalid(str(e)) from None
    return np.array([found[alpha] for alpha in alphas], np.float32)


class _Watch:
    """Waits for a client to go while its work has to wait, and takes the work back then."""

    def __init__(
        self, batcher: Batcher, disconnected: Callable[[], Awaitable[None]] | None
    ) -> None:
        self._batcher = batcher
        self._disconnected = disconnected
        self._task: asyncio.Future[None] | None = None

    def begin(self, work: Work) -> None:
        # Only work that has to wait is watched: what already runs cannot be called back.
        if self._disconnected is not None:
            self._task = asyncio.ensure_future(self._disconnected())
            self._task.add_done_callback(lambda _: self._batcher.drop(work))

    @property
    def gone(self) -> bool:
        return self._task is not None and self._task.done() and not self._task.cancelled()

    def end(self) -> None:
        if self._task is not None:
            self._task.cancel()
