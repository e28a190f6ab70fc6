"""The only list of modules and scores. Entries are imported on use."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from posthoc.contract import HedgedError, Info, Task

MODULES = {"laplace": "posthoc.methods.laplace"}
SCORES = {
    "gen": "posthoc.ood.gen",
    "rmds": "posthoc.ood.rmds",
    "mahalanobis": "posthoc.ood.mahalanobis",
}


def page(name: str) -> ModuleType:
    """The page of a module or score; HedgedError listing the names for an unknown one."""
    known = {**MODULES, **SCORES}
    if name not in known:
        raise HedgedError(f"unknown module or score {name!r}; there are {', '.join(sorted(known))}")
    return import_module(known[name])


def info(name: str) -> Info:
    """The registry record of a module or score."""
    found: Info = page(name).INFO
    return found


def applicable(kind: dict[str, str], task: Task, have: set[str]) -> list[str]:
    """Names of ``kind`` (MODULES or SCORES) that fit the task and need only what there is."""
    return [n for n in kind if task in info(n).tasks and info(n).needs <= have]
