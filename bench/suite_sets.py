"""The sets of the developer suite, one record each: who trained the model, on what, and where its
rows and its strange rows come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from bench import suite_tables as tables
from bench import suite_texts as texts
from bench.material import Files, magika_files, mnist_files, usps_files
from bench.networks import Recipe
from bench.regressor import TARGET, regressor
from hedged.demo.corpus import magika_labels
from posthoc.contract import Task


@dataclass(frozen=True, slots=True)
class Trained:
    """A network trained here, once, on a share of ``table`` that hedged then never sees (whole
    groups, where the set has groups); ``strange`` makes the rows out of distribution.

    Raise ``version`` when the rows or the training change: it names the cache folder.
    """

    table: Callable[[], pa.Table]
    recipe: Recipe
    share: float = 0.4
    strange: Callable[[], pa.Table] | None = None
    version: int = 1


@dataclass(frozen=True, slots=True)
class Set:
    """A frozen model with labelled data.

    ``origin`` is where the files come from: a network of ours, or a function for a model that was
    trained elsewhere. ``group`` is the column whose equal values belong together; ``classes``
    gives the names of text labels in the order of the outputs.
    """

    name: str
    task: Task
    about: str
    origin: Trained | Callable[[], Files]
    target: str = "label"
    group: str | None = None
    classes: Callable[[], tuple[str, ...]] | None = None


def _diamonds() -> Files:
    made = regressor()
    return Files(made.model, made.data, train=made.train)


# Long enough to know the rows by heart: sure of more than they get right on others.
_LONG = Recipe(epochs=300)
_PLAIN = Recipe(epochs=60)
_FINE = Recipe(epochs=100, batch=64)
_HEAD = Recipe(hidden=(), epochs=100)
_HELD_OUT = "EJOTY"

SETS = (
    Set(
        "magika",
        "classification",
        "file types by a deployed model; strange: types that it does not know",
        magika_files,
        classes=magika_labels,
    ),
    Set(
        "mnistnet",
        "classification",
        "digits by a network that others trained; strange: Fashion-MNIST",
        mnist_files,
    ),
    Set(
        "uspsnet",
        "classification",
        "MNIST's digits by a network that others trained for USPS's; strange: Fashion-MNIST",
        usps_files,
    ),
    Set(
        "magic",
        "classification",
        "gamma rays or hadrons in a telescope (KEEL)",
        Trained(lambda: tables.keel("magic"), _LONG),
    ),
    Set(
        "letter",
        "classification",
        "21 printed letters (KEEL); strange: the five others",
        Trained(
            lambda: tables.letters(_HELD_OUT),
            _LONG,
            strange=lambda: tables.letters(_HELD_OUT, strange=True),
        ),
    ),
    Set(
        "satimage",
        "classification",
        "kinds of soil in satellite pictures (KEEL)",
        Trained(lambda: tables.keel("satimage"), _LONG),
    ),
    Set(
        "wa_churn",
        "classification",
        "customers who leave (modeldata)",
        Trained(tables.churn, Recipe(epochs=80)),
        target="churn",
    ),
    Set(
        "newsgroups",
        "classification",
        "20 Newsgroups; the model is a linear head over MiniLM's vectors; strange: Reuters R8",
        Trained(texts.newsgroups, _HEAD, share=1 / 3, strange=texts.reuters),
    ),
    Set(
        "reuters",
        "classification",
        "Reuters R8; the model is a linear head over MiniLM's vectors; strange: 20 Newsgroups",
        Trained(texts.reuters, _HEAD, share=1 / 3, strange=texts.newsgroups),
    ),
    Set("diamonds", "regression", "log price of diamonds (ggplot2)", _diamonds, target=TARGET),
    Set(
        "deliveries",
        "regression",
        "minutes until a meal arrived (modeldata)",
        Trained(tables.deliveries, _PLAIN),
        target="time_to_delivery",
    ),
    Set(
        "hotel_rates",
        "regression",
        "price of a hotel room (modeldata)",
        Trained(tables.hotel_rates, _PLAIN),
        target="avg_price_per_room",
    ),
    Set(
        "weather",
        "regression",
        "hourly temperature at three airports (nycflights13), by date",
        Trained(tables.weather, _PLAIN),
        target="temp",
        group="date",
    ),
    Set(
        "storms",
        "regression",
        "air pressure in storms (dplyr), by storm",
        Trained(tables.storms, _PLAIN),
        target="pressure",
        group="storm",
    ),
    Set(
        "nox",
        "regression",
        "nitrogen oxides beside a motorway (robustbase)",
        Trained(tables.nox, _PLAIN),
        target="LNOx",
    ),
    Set(
        "bikeshare",
        "regression",
        "bicycles hired in an hour (ISLP)",
        Trained(tables.bikeshare, _FINE),
        target="bikers",
    ),
    Set(
        "concrete",
        "regression",
        "strength of concrete (modeldata)",
        Trained(tables.concrete, _FINE),
        target="compressive_strength",
    ),
)
