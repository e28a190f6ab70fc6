"""What the tests of the live page share: tabs that look at a server, and what is fed to it."""

from __future__ import annotations

import contextlib
import json

import pytest

from tests.factory import CLASSES, COLUMNS, rows
from tests.service.browser import Browser
from tests.service.helpers import poll

# Timers of seconds run out at once, so that no test waits for the next refresh.
HURRY = """
window.timers = 0;
const slow = window.setTimeout;
window.setTimeout = (f, ms, ...rest) => {
  return slow((...a) => { window.timers += 1; f(...a); }, Math.min(ms || 0, 200), ...rest);
};
window.fetches = 0;
const plain = window.fetch;
window.fetch = (...a) => { window.fetches += 1; return plain(...a); };
"""
LIVE = "document.getElementById('state').textContent === 'Live'"
FORM = "document.querySelector('#try button.main')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One browser for the tests of a file."""
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def tab(browser):
    """Opens tabs, and closes them after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **looks: stack.enter_context(
            contextlib.closing(browser.page(*args, **looks))
        )


@pytest.fixture
def visit(tab):
    def visit(server, width=1400, wait=LIVE, **looks):
        page = tab(width, **looks)
        page.call("Page.addScriptToEvaluateOnNewDocument", {"source": HURRY})
        page.open(f"http://127.0.0.1:{server.port}/")
        page.wait(wait)
        return page

    return visit


def table(task, x):
    return [dict(zip(COLUMNS[task], row, strict=True)) for row in x.tolist()]


def feed(server, task, n, labelled, id="p"):
    """Predict n rows, label the first of them; the answers, the truth, and what was counted."""
    x, y = rows(task, n, 4)
    answers = server.client.post("/v1/predict", json={"rows": table(task, x), "id": id}).json()
    truth = [CLASSES[t] for t in y] if task == "classification" else y.tolist()
    labels = [{"id": f"{id}:{k}", "label": t} for k, t in enumerate(truth[:labelled])]
    if labels:
        assert server.client.post("/v1/labels", json=labels).status_code in (200, 202)
    (model,) = poll(
        lambda: server.client.get("/v1/calibration").json()["models"],
        lambda models: [(m["served"], m["labelled"]) for m in models] == [(n, labelled)],
    )
    return answers["predictions"], truth, model


def each(selector, expression):
    """JavaScript: the expression of each element ``e`` that the selector finds."""
    return f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => {expression})"


def overflow(page):
    return page.value("document.documentElement.scrollWidth - window.innerWidth")
