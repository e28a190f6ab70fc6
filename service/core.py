"""The protocol-free core: validated tensors in, prediction fields and row ids out.

Front ends translate to and from this page; nothing here knows HTTP or JSON.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from calibration.conformal.cells import DEFAULTS
from posthoc.contract import Array, DataError, TensorSpec
from service import images, instruments, sizes
from service.batcher import Batcher, RowError, Work
from service.errors import ServiceError, invalid, shorten, unknown_model
from service.ids import row_ids
from service.ledger import Ledger
from service.models import Model, threshold_rows
from service.parsing import Parser
from service.settings import Settings
from service.shared import Shared
from service.tensors import cast, first_row

_MAP_LEVELS = 16  # in one request: of maps each is searched among the pixels of all images
_UNBOUNDED = frozenset({"lower", "upper", "quantiles"})  # infinite where a level needs more rows
_log = logging.getLogger("hedged.core")


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one request: N rows of fields and outputs, and an id for each row."""

    model: Model
    id: str
    ids: list[str]
    fields: dict[str, Array]

    @property
    def nbytes(self) -> int:
        """Bytes of the fields."""
        return sum(value.nbytes for value in self.fields.values())


class Core:
    """The models of one server process, their device's batcher, and the ledger."""

    def __init__(self, settings: Settings, models: Mapping[str, Model], ledger: Ledger) -> None:
        self.settings = settings
        self.models: Mapping[str, Model] = dict(models)  # replaced as a whole, never changed
        self.swap_errors: Mapping[str, str] = {}  # name → why its live version is not served
        self.ledger = ledger
        self.ready = False
        self.batcher = Batcher(
            max_batch_rows=settings.max_batch_rows,
            max_batch_bytes=settings.max_batch_bytes,
            max_queue_rows=settings.max_queue_rows,
            max_delay=settings.max_queue_delay_s,
        )
        self.parse = Parser()
        # It reads the whole ledger: open pages share one scan, and nothing waits behind it.
        self.calibration = Shared(ledger.calibration, seconds=2.0, name="hedged-calibration")

    def model(self, name: str | None = None, version: str | None = None) -> Model:
        """The model of that name, or the only one. Raises ServiceError 404, or 400 when several."""
        models = self.models
        if name is None:
            if len(models) != 1:
                raise invalid(f"several models are served; name one of {sorted(models)}")
            return next(iter(models.values()))
        if name not in models:
            raise unknown_model(name, models)
        model = models[name]
        if version is not None and version != model.version:
            raise ServiceError(
                404,
                "unknown_model",
                f"model {name!r} is served in version {model.version!r}, not {shorten(version)!r}",
            )
        return model

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
        given = sum(v.nbytes for v in inputs.values())
        with refusals(model, max((len(v) for v in inputs.values() if v.ndim), default=0)):
            specs, optional = model.predictor.inputs, model.predictor.optional
            most = self.settings.max_rows
            loose = self.settings.nonfinite == "allow"
            feed = await self.parse.beside(
                given, lambda: validate(inputs, specs, most, optional, loose)
            )
            rows = len(next(iter(feed.values())))
            names = _outputs(model, outputs)
            id, ids = row_ids(rows, id, ids)
            alphas = _alphas(model, alpha, rows)
            values, row_bytes = sizes.row_values(feed), sizes.row_bytes(feed)
            asked = self._fitting(model, rows, values, frozenset(names), frozenset(text))
            computed = frozenset((*model.recorded, *names))
            answer_bytes = model.sizes.answer_bytes(computed, values)
            if reserve is not None:
                reserve(asked + rows * answer_bytes)
            feed["q_hat"] = await self._thresholds(model, alphas, rows)
            work = self.batcher.submit(
                model.run,
                feed,
                computed,
                timeout=self.settings.request_timeout_s,
                row_bytes=row_bytes + answer_bytes,
            )
            fields = await _answer(work, disconnected)
            size = rows * answer_bytes
            await self.parse.beside(size, lambda: _check_finite(model, fields))
        kept = {name: fields[name] for name in model.recorded}
        await self._record(model, alphas, ids, kept, feed.get("group"))
        return Answer(model, id, ids, {name: fields[name] for name in names})

    async def close(self) -> None:
        """Stop answering."""
        self.ready = False
        await self.batcher.close()
        await asyncio.to_thread(self.parse.close)
        await asyncio.to_thread(self.calibration.close)

    def _fitting(
        self, model: Model, rows: int, values: int, names: frozenset[str], text: frozenset[str]
    ) -> int:
        """Bytes of the body that will hold the answer; ServiceError 413 for too many."""
        settings = self.settings
        plain = rows * model.sizes.answer_text(names & text, values)
        if plain > settings.max_json_bytes:
            raise ServiceError(
                413,
                "answer_too_large",
                f"the answer would take about {plain} bytes of JSON, and {settings.max_json_bytes} "
                "are the most; send fewer rows, name fewer outputs, or ask for binary tensors: "
                f"POST /v2/models/{model.name}/infer with binary_data_output",
            )
        binary = rows * model.sizes.answer_bytes(names - text, values)
        if binary > settings.max_answer_bytes:
            raise ServiceError(
                413,
                "answer_too_large",
                f"the answer would take {binary} bytes, and {settings.max_answer_bytes} are the "
                "most; send fewer rows or name fewer outputs",
            )
        return plain + binary

    async def _thresholds(self, model: Model, alphas: Sequence[float], rows: int) -> Array:
        own = frozenset(alphas) <= model.levels.keys()
        if model.dense is None or own:
            return _thresholds(model, alphas, rows)
        if len(set(alphas)) > _MAP_LEVELS:
            raise invalid(f"a request for maps may have {_MAP_LEVELS} different values of alpha")
        # Any other level of a risk is searched among the pixels of all images.
        return await asyncio.to_thread(_thresholds, model, alphas, rows)

    async def _record(
        self,
        model: Model,
        alphas: Sequence[float],
        ids: list[str],
        fields: Mapping[str, Array],
        group: Array | None,
    ) -> None:
        """Count and remember a prediction; whatever goes wrong here never reaches the answer."""
        try:
            if model.dense is not None:
                size, maps = sum(v.nbytes for v in fields.values()), fields
                fields = await self.parse.beside(
                    size, lambda: images.summary(model.task, maps, ids)
                )
            # Only the bundle's own levels are metric labels: callers may ask for any alpha.
            levels = [model.levels.get(alpha) for alpha in alphas]
            found = {level: n for n, level in enumerate(dict.fromkeys(levels))}
            codes = np.array([found[level] for level in levels])
            for level, code in found.items():
                chosen, named, of = fields, ids, {} if group is None else {"group": group}
                if len(found) > 1:
                    rows = np.flatnonzero(codes == code)
                    chosen = {name: value[rows] for name, value in fields.items()}
                    named = [ids[row] for row in rows.tolist()]
                    of = {name: value[rows] for name, value in of.items()}
                who = model.name, model.version, model.identity
                if model.dense is not None:
                    instruments.observe_images(*who[:2], chosen, level)
                    self.ledger.record_images(*who, named, chosen, level)
                    continue
                instruments.observe_prediction(*who[:2], chosen, level)
                if of:
                    known = model.predictor.known_groups(of["group"])
                    instruments.count_unknown_groups(*who[:2], int((~known).sum()))
                self.ledger.record(*who, named, chosen, level, group=of.get("group"))
        except Exception:
            _log.exception("a prediction of %s could not be recorded", model.name)


@contextmanager
def refusals(model: Model, rows: int) -> Iterator[None]:
    """Count ``rows`` of ``model`` as rejected when what is done inside refuses them."""
    try:
        yield
    except ServiceError as e:
        if e.status != 499:  # the client took its rows back
            instruments.count_rejected_rows(model.name, model.version, rows)
        raise


def validate(
    inputs: Mapping[str, Array],
    specs: Sequence[TensorSpec],
    max_rows: int,
    optional: Sequence[TensorSpec] = (),
    nonfinite: bool = False,
) -> dict[str, Array]:
    """The inputs in the model's dtypes, in the model's order, then the ``optional`` ones, at their
    defaults where they are not given.

    Raises ServiceError 400 for an unknown or missing input, another shape, inputs of different
    lengths, no row or more than ``max_rows``, a value that the dtype cannot hold, and a value that
    is not finite, naming its row, and a ``u`` outside [0, 1]. With ``nonfinite`` the model's own
    inputs may hold NaN and infinity, if they were sent as such.
    """
    names = [spec.name for spec in (*specs, *optional)]
    for name in inputs:
        if name not in names:
            raise invalid(f"the model has no input {shorten(name)!r}; it takes {', '.join(names)}")
    feed: dict[str, Array] = {}
    rows = -1
    for spec in (*specs, *optional):
        where = f"input {spec.name!r}"
        if spec in optional and spec.name not in inputs:
            feed[spec.name] = np.full(rows, DEFAULTS[spec.name], np.dtype(spec.dtype))
            continue
        if spec.name not in inputs:
            raise invalid(f"{where} is missing; the model takes {', '.join(names)}")
        value = inputs[spec.name]
        if value.ndim != len(spec.shape) or any(
            want not in (-1, have) for want, have in zip(spec.shape, value.shape, strict=True)
        ):
            tail = ("any" if d < 0 else str(d) for d in spec.shape[1:])
            wanted = ", ".join(("N", *tail) if spec.shape else ())
            raise invalid(f"{where} has shape {list(value.shape)}; the model takes [{wanted}]")
        if rows not in (-1, len(value)):
            raise invalid(f"{where} has {len(value)} rows and another input has {rows}")
        rows = len(value)
        if not 1 <= rows <= max_rows:
            raise invalid(f"{where} has {rows} rows; a request holds 1 to {max_rows}")
        sent, value = value, cast(value, np.dtype(spec.dtype), where)
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            bad = ~np.isfinite(value)
            if nonfinite and spec not in optional:
                bad &= np.isfinite(sent)  # too large for the dtype
            if bad.any():
                raise invalid(f"row {first_row(bad)} of {where} is not finite")
        if spec in optional and spec.name == "u":
            outside = (value < 0) | (value > 1)
            if outside.any():
                raise invalid(f"row {first_row(outside)} of {where} must lie between 0 and 1")
        feed[spec.name] = value
    return feed


def _outputs(model: Model, wanted: Sequence[str] | None) -> Sequence[str]:
    if wanted is None:
        return model.fields
    known = [spec.name for spec in model.outputs]
    for name in wanted:
        if name not in known:
            raise invalid(f"there is no output {shorten(name)!r}; there are {', '.join(known)}")
    return wanted


def _alphas(model: Model, alpha: float | Sequence[float] | None, rows: int) -> Sequence[float]:
    """One α for all rows, or one per row."""
    if alpha is None:
        return model.predictor.manifest.alphas[:1]
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


async def _answer(
    work: Work, disconnected: Callable[[], Awaitable[None]] | None
) -> dict[str, Array]:
    """The work's answer; its failure as a ServiceError; cancelled once the client has gone."""
    watch: asyncio.Future[None] | None = None
    # Only work that has to wait is watched: what already runs cannot be called back.
    if disconnected is not None and work.waiting:
        watch = asyncio.ensure_future(disconnected())
        watch.add_done_callback(lambda _: work.future.cancel())
    try:
        return await work.future
    except RowError as e:
        if isinstance(e.cause, InvalidArgument | DataError):
            raise invalid(shorten(str(e), 400)) from None
        _log.error("row %d could not be computed", e.row, exc_info=e.cause)
        raise ServiceError(500, "model_failed", f"the model failed on row {e.row}") from None
    except asyncio.CancelledError:
        if watch is not None and watch.done() and not watch.cancelled():
            raise ServiceError(499, "client_gone", "the client closed the connection") from None
        work.future.cancel()
        raise
    finally:
        if watch is not None:
            watch.cancel()


def _check_finite(model: Model, fields: Mapping[str, Array]) -> None:
    """No NaN leaves the server, and infinity only where a level needs more rows than there are."""
    for name, value in fields.items():
        if value.dtype.kind != "f":
            continue
        infinite_allowed = name in _UNBOUNDED or name not in model.fields
        good = ~np.isnan(value) if infinite_allowed else np.isfinite(value)
        if not good.all():
            raise ServiceError(
                422,
                "no_finite_answer",
                f"row {first_row(~good)}: the model's {name} is not finite for this input",
            )
