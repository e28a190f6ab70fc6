"""The developer suite: frozen models with cached rows for every figure that spans data sets.

``python -m bench.suite [NAME …]`` prints what each set holds. A set is one record below: who
trained the model, on what, and where its rows and its strange rows come from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench import networks
from bench import suite_tables as tables
from bench import suite_texts as texts
from bench.assets import cached
from bench.material import Files, Known, magika_files, mnist_files, open_known, usps_files
from bench.networks import Recipe
from bench.regressor import TARGET, regressor
from calibration.fit import Columns, parts_of, split
from calibration.scaling import fit_regression, fit_temperature, mean_nll, student_nll
from hedged.demo.corpus import magika_labels
from posthoc.contract import Features, HedgedError, Task

FEATURES = "features"  # input of a network that reads a table's columns


@dataclass(frozen=True, slots=True)
class Trained:
    """A network trained here, once, on a share of ``table`` that hedged then never sees (whole
    groups of it, where the set has groups); ``strange`` makes the rows out of distribution.

    Raise ``version`` when the rows or the training change: it names the cache folder.
    """

    table: Callable[[], pa.Table]
    recipe: Recipe
    share: float = 0.4
    strange: Callable[[], pa.Table] | None = None
    version: int = 1


@dataclass(frozen=True, slots=True)
class Set:
    """A frozen model with labelled data. ``origin`` is how the files come: a network of ours, or
    a function that gives a model trained by others; ``group`` is the column whose equal values
    belong together; ``classes`` gives the names of text labels in output order."""

    name: str
    task: Task
    about: str
    origin: Trained | Callable[[], Files]
    target: str = "label"
    group: str | None = None
    classes: Callable[[], tuple[str, ...]] | None = None


_OVERFIT = Recipe(epochs=150)
_SMALL = Recipe(epochs=300, batch=64)
_HEAD = Recipe(hidden=(), epochs=100)
_HELD_OUT = "EJOTY"

_SETS = (
    Set(
        "magika",
        "classification",
        "file types by magika, a deployed model; strange: types that it does not know",
        magika_files,
        classes=magika_labels,
    ),
    Set(
        "mnistnet",
        "classification",
        "MNIST's test digits by a network of others; strange: Fashion-MNIST",
        mnist_files,
    ),
    Set(
        "uspsnet",
        "classification",
        "MNIST's digits, cropped and scaled, by a network of others for USPS; strange: Fashion",
        usps_files,
    ),
    Set(
        "magic",
        "classification",
        "gamma rays or hadrons in a telescope",
        Trained(lambda: tables.keel("magic"), _OVERFIT),
    ),
    Set(
        "letter",
        "classification",
        "21 printed letters; strange: five letters held out",
        Trained(
            lambda: tables.letters(_HELD_OUT),
            _OVERFIT,
            strange=lambda: tables.letters(_HELD_OUT, strange=True),
        ),
    ),
    Set(
        "satimage",
        "classification",
        "soil in satellite pictures",
        Trained(lambda: tables.keel("satimage"), _OVERFIT),
    ),
    Set(
        "wa_churn",
        "classification",
        "customers who leave",
        Trained(tables.churn, Recipe(epochs=40)),
        target="churn",
    ),
    Set(
        "newsgroups",
        "classification",
        "20 Newsgroups; the model is a linear head over MiniLM's embeddings; strange: Reuters R8",
        Trained(texts.newsgroups, _HEAD, share=1 / 3, strange=texts.reuters),
    ),
    Set(
        "reuters",
        "classification",
        "Reuters R8; the model is a linear head over MiniLM's embeddings; strange: 20 Newsgroups",
        Trained(texts.reuters, _HEAD, share=1 / 3, strange=texts.newsgroups),
    ),
    Set(
        "diamonds",
        "regression",
        "log price of diamonds",
        lambda: _diamonds(),
        target=TARGET,
    ),
    Set(
        "deliveries",
        "regression",
        "minutes until a meal arrived",
        Trained(tables.deliveries, Recipe(epochs=60)),
        target="time_to_delivery",
    ),
    Set(
        "hotel_rates",
        "regression",
        "price of a hotel room",
        Trained(tables.hotel_rates, Recipe(epochs=60)),
        target="avg_price_per_room",
    ),
    Set(
        "weather",
        "regression",
        "hourly temperature at three airports, by date",
        Trained(tables.weather, Recipe(epochs=60)),
        target="temp",
        group="date",
    ),
    Set(
        "storms",
        "regression",
        "air pressure of storms, by storm",
        Trained(tables.storms, Recipe(epochs=60)),
        target="pressure",
        group="storm",
    ),
    Set(
        "nox",
        "regression",
        "nitrogen oxides beside a motorway",
        Trained(tables.nox, Recipe(epochs=100)),
        target="LNOx",
    ),
    Set(
        "bikeshare",
        "regression",
        "bicycles hired in an hour",
        Trained(tables.bikeshare, Recipe(epochs=100)),
        target="bikers",
    ),
    Set(
        "concrete",
        "regression",
        "strength of concrete",
        Trained(tables.concrete, _SMALL),
        target="compressive_strength",
    ),
)
