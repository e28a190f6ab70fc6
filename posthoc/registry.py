"""The only list of modules and scores. Entries are imported on use."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ValidationError

from posthoc.contract import Features, FitError, HedgedError, Info, LinearHead, State, Task
from posthoc.folds import Mapper
from posthoc.rows import Rows, check, fold, join

MODULES = {
    "laplace": "posthoc.methods.laplace.kron",
    "laplace_diag": "posthoc.methods.laplace.diag",
    "laplace_full": "posthoc.methods.laplace.full",
    "icla": "posthoc.methods.laplace.identity",
    "student_t": "posthoc.methods.student_t",
    "gaussian": "posthoc.methods.gaussian_head",
    "loss": "posthoc.methods.loss.predictor",
    "bayescap": "posthoc.methods.bayescap.vector",
    "bayescap_image": "posthoc.methods.bayescap.maps",
    "weights": "posthoc.methods.weights",
    "mc_dropout": "posthoc.methods.network.mc_dropout",
    "mc_batch_norm": "posthoc.methods.network.mc_batch_norm",
    "abnn": "posthoc.methods.network.abnn",
    "head_dropout": "posthoc.methods.head_dropout",
    "vbll": "posthoc.methods.vbll.layer",
    "vbll_generative": "posthoc.methods.vbll.generative",
    "vbll_t": "posthoc.methods.vbll.student",
    "bootstrap": "posthoc.methods.heads.bootstrap",
    "nptl": "posthoc.methods.heads.nptl",
    "mixup": "posthoc.methods.heads.mixup",
}
SCORES = {
    "gen": "posthoc.ood.gen",
    "msp": "posthoc.ood.msp",
    "max_logit": "posthoc.ood.max_logit",
    "max_logit_pnorm": "posthoc.ood.max_logit_pnorm",
    "energy": "posthoc.ood.energy",
    "react": "posthoc.ood.react",
    "scale": "posthoc.ood.scale",
    "rmds": "posthoc.ood.rmds",
    "mahalanobis": "posthoc.ood.mahalanobis",
    "knn": "posthoc.ood.knn",
    "flow": "posthoc.ood.flow",
    "expected_loss": "posthoc.ood.expected_loss",
    "gaussian_density": "posthoc.ood.gaussian_density",
    "mds": "posthoc.ood.mds",
    "mds_l2": "posthoc.ood.mds_l2",
    "rmds_l2": "posthoc.ood.rmds_l2",
    "vim": "posthoc.ood.vim",
    "fdbd": "posthoc.ood.fdbd",
    "nci": "posthoc.ood.nci",
}


def page(name: str) -> ModuleType:
    """The page of a module or score; HedgedError listing the names for an unknown one."""
    known = {**MODULES, **SCORES}
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise HedgedError(
            f"unknown module or score {name!r}; there are {', '.join(sorted(known))}{meant}"
        )
    return import_module(known[name])


def info(name: str) -> Info:
    """The registry record of a module or score."""
    found: Info = page(name).INFO
    return found


def applicable(kind: dict[str, str], task: Task, have: set[str]) -> list[str]:
    """Names of ``kind`` (MODULES or SCORES) that fit the task and need only what there is."""
    return [n for n in kind if task in info(n).tasks and info(n).needs <= have]


def settings(name: str, given: Mapping[str, Any]) -> BaseModel:
    """A module's settings from names and values (text as typed is converted); FitError for a name
    it does not have or a value out of range."""
    kind: type[BaseModel] = page(name).Settings
    try:
        return kind(**given)
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(p) for p in first["loc"])
        if key not in kind.model_fields:
            has = ", ".join(sorted(kind.model_fields)) or "none"
            raise FitError(f"{name} has no setting {key!r}; it has {has}") from None
        raise FitError(f"{name}, setting {key}: {first['msg'].lower()}") from None


def fit(
    name: str,
    head: LinearHead | None,
    task: Task,
    rows: Rows,
    given: Mapping[str, Any],
    train: Rows | None = None,
    mapper: Mapper | None = None,
) -> State:
    """Fit a module on rows: one pass of its fold, shared out by ``mapper``, or its own iterations,
    which stay in this process. ``train`` are rows that the network was trained on: their features,
    never their labels, give the curvature.

    Raises FitError where the module needs a linear head, where a setting is wrong, and for rows
    that `posthoc.rows.check` or the page cannot use.
    """
    module, chosen = page(name), settings(name, given)
    if head is None and "linear_head" in info(name).needs:
        raise FitError(f"{name} needs a linear head and this model is a black box")
    check(rows, info(name), task, mapper)
    if train is not None:
        _check_train(name, chosen, train, task, mapper)
    if hasattr(module, "fit"):
        done: State = module.fit(rows, head, task, chosen)
        return done
    held = None
    choosing = getattr(chosen, "needs_held_out", False)
    if train is not None and task == "classification":
        # The given rows are all fresh then: they judge, and have no part in the sums.
        held, rows = (join(list(rows)) if choosing else None), Rows(lambda: iter(()), 0)
    elif choosing:
        rows, held = rows.hold_out()
    parts = [rows] if train is None else [train.unlabelled(), rows]
    start = partial(module.init, head, task, chosen)
    stats = fold(partial(_started, start), module.update, module.merge, parts, mapper)
    state: State = module.finish(start() if stats is None else stats, head, chosen, held)
    if train is None:
        return state
    return State(state.tensors, {**state.settings, "training_rows": train.n})


def _started(start: Callable[[], Any], block: Features) -> Any:
    """The empty statistic of a module, which no block changes."""
    del block
    return start()


def _start_score(start: Callable[[int, int], Any], block: Features) -> Any:
    """The empty statistic of a score for rows like these."""
    return start(block.z.shape[1], 0 if block.phi is None else block.phi.shape[1])


def fit_score(
    name: str, head: LinearHead | None, rows: Rows, mapper: Mapper | None = None
) -> State:
    """Fit a score on rows: one pass of its fold, shared out by ``mapper``.

    Raises FitError where the score needs a linear head, for no rows, and for rows that the page
    cannot use.
    """
    score = page(name)
    if head is None and "linear_head" in info(name).needs:
        raise FitError(f"{name} needs a linear head and this model is a black box")
    start = partial(_start_score, score.init)
    stats = fold(start, score.update, score.merge, [rows], mapper)
    if stats is None:
        raise FitError(f"{name} was given no rows")
    state: State = score.finish(stats, head)
    return state


def _check_train(
    name: str, chosen: BaseModel, train: Rows, task: Task, mapper: Mapper | None
) -> None:
    """Only a curvature may come from rows that the network was trained on."""
    own = info(name)
    if hasattr(page(name), "fit") or "labels" in own.needs:
        raise FitError(
            f"{name} learns more than a curvature from its rows, which must be fresh ones; leave "
            "--train-data out"
        )
    if getattr(chosen, "fisher", "ggn") == "empirical":
        raise FitError("fisher=empirical needs labels, and those of training rows are not used")
    if getattr(chosen, "train_rows", None) is not None:
        raise FitError("--train-data and train_rows say the same twice; leave one out")
    check(train, own, task, mapper)
