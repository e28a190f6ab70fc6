"""The live page in a real browser: what it shows, at two widths, without a console message."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.factory import CLASSES, rows

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or "chromium"


class Text(HTMLParser):
    """The text of a document, the names of its elements, and the attributes that were set."""

    def __init__(self):
        super().__init__()
        self.words, self.elements = [], []

    def handle_data(self, data):
        self.words.append(data)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))


def visit(url, profile, width=1200):
    """The page's text, its elements, and what its console said, after its first refresh."""
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-dev-shm-usage", f"--user-data-dir={profile}", f"--window-size={width},900",
         "--enable-logging=stderr", "--v=0", "--virtual-time-budget=4000", "--dump-dom", url],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    parsed = Text()
    parsed.feed(done.stdout)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return re.sub(r"\s+", " ", " ".join(parsed.words)), parsed.elements, console


def wait_for(ask):
    deadline = time.monotonic() + 30
    while not (value := ask()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert value
    return value


@pytest.mark.parametrize(("task", "width"), [("classification", 1200), ("regression", 390)])
def test_the_page_shows_what_is_served_and_what_labels_said(served, tmp_path, task, width):
    server = served(task)
    url = f"http://127.0.0.1:{server.port}/"
    text, elements, console = visit(url, tmp_path / "empty", width)
    assert console == []
    assert "tiny · version 1" in text
    assert "Predictions 0" in text
    assert "Ready · updated" in text
    x, y = rows(task, 200, 4)
    names = "abcd" if task == "classification" else "pqr"
    table = [dict(zip(names, row, strict=True)) for row in x.tolist()]
    answers = server.client.post("/v1/predict", json={"rows": table, "id": "p"}).json()
    truth = [CLASSES[t] for t in y] if task == "classification" else y.tolist()
    labels = [{"id": f"p:{k}", "label": t} for k, t in enumerate(truth[:150])]
    assert server.client.post("/v1/labels", json=labels).status_code in (200, 202)

    def all_counted():
        (model,) = server.client.get("/v1/calibration").json()["models"]
        return model if (model["served"], model["labelled"]) == (200, 150) else None

    model = wait_for(all_counted)
    text, elements, console = visit(url, tmp_path / "full", width)
    assert console == []
    assert "Predictions 200 150 labelled, 75.0 %" in text
    assert f"{100 * model['coverage']['0.9']['coverage']:.1f} %" in text
    bars = [a for tag, a in elements if tag == "rect" and a.get("class") == "bar"]
    if task == "classification":
        right = [a["label"] == t for a, t in zip(answers["predictions"], truth, strict=True)]
        assert f"Accuracy {100 * np.mean(right[:150]):.1f} %" in text
        heights = [float(a["height"]) / 240 for a in bars]
        for b in model["bins"]:
            if b["labelled"]:
                assert any(abs(h - b["accuracy"]) < 1e-9 for h in heights)
    else:
        assert f"RMSE {model['rmse']:.3f}" in text


def test_the_page_asks_nobody_else_and_carries_no_inline_code(served):
    server = served()
    page = server.client.get("/").text
    everything = page + server.client.get("/page.js").text + server.client.get("/page.css").text
    links = re.findall(r"https?://[^\s\"']+", everything)
    assert links == ["http://www.w3.org/2000/svg"]  # a namespace, not an address
    assert re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", page) is None
