"""The live page in a real browser: what it shows, what it sends, and whom it asks for a key."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.keys import add_key
from service.ledger import Ledger
from service.settings import Settings
from tests.factory import COLUMNS, rows
from tests.service import streams
from tests.service.conftest import Server
from tests.service.helpers import poll
from tests.service.pages import FORM, HURRY, LIVE, browser, feed, overflow, tab, table, visit

__all__ = ["browser", "tab", "visit"]


def samples(server, name):
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    return [s for f in families for s in f.samples if s.name == name]


def counter(server, name, **labels):
    return sum(s.value for s in samples(server, name) if labels.items() <= s.labels.items())


def percent(v):
    return f"{100 * v:.1f} %"


@pytest.mark.parametrize(
    ("task", "width"), [("classification", 1400), ("regression", 390)], ids=["classes", "values"]
)
def test_the_page_shows_what_is_served_and_follows_the_labels(served, visit, task, width):
    server = served(task)
    meta = server.client.get("/v2/models/tiny").json()
    page = visit(server, width, phone=width == 390)
    text = page.text("#panel")
    for said in ("tiny Version 1", "Method laplace", "90 %, 95 %", "Runs on CPU", "N, "):
        assert said in text, said
    assert meta["parameters"]["identity"][:12] in text
    assert "Predictions 0" in text and "No predictions yet" in text
    assert "No labelled predictions yet" in text
    answers, truth, model = feed(server, task, 200, 150)
    page.shows("Predictions 200 150 labelled, 75.0 %")
    at_90 = model["coverage"]["0.9"]
    page.shows(f"Coverage {percent(at_90['coverage'])}")
    if task == "classification":
        right = [a["label"] == t for a, t in zip(answers, truth, strict=True)]
        expected = np.mean([a["confidence"] for a in answers])
        page.shows(f"Accuracy {percent(np.mean(right[:150]))} expected {percent(expected)}")
        page.shows(f"Calibration error (ECE) {model['ece']:.3f}")
        page.shows(f"up to {model['ece_noise_floor']:.3f}")
        assert len(model["bins"]) == 20 and "Epistemic" not in page.text("#panel")
        heights = page.value(
            "[...document.querySelectorAll('.accuracy')].map(r => +r.getAttribute('height') / 210)"
        )
        found = [b["accuracy"] for b in model["bins"] if b["labelled"]]
        assert heights == pytest.approx(found)
        page.click("#panel summary")
        last = "(r) => parseInt(r.cells[5].innerText)"
        lines = page.value(f"[...document.querySelector('#panel tbody').rows].map({last})")
        shares = [100 * b["label_coverage"] for b in model["bins"] if b["served"]]
        assert lines == pytest.approx(shares, abs=0.5)
    else:
        assert f"RMSE {model['rmse']:.4g}" in page.text("#panel")
        assert "Reliability" not in page.text("#panel")  # a regression has no confidence
    flagged, answered, abstained = (
        counter(server, name, model="tiny", **labels)
        for name, labels in (
            ("uq_ood_total", {}),
            ("uq_predictions_total", {"outcome": "answered"}),
            ("uq_predictions_total", {"outcome": "abstained"}),
        )
    )
    page.shows(f"Out of distribution {percent(flagged / (answered + abstained))}")
    assert page.console == []


def test_an_open_table_stays_open_and_focused_while_figures_change(served, visit):
    server = served()
    feed(server, "classification", 40, 30)
    page = visit(server)
    page.shows("30 labelled")
    page.value("document.querySelector('#panel summary').focus()")
    page.press("Enter")
    before = page.value("document.querySelector('#updated').textContent, window.fetches")
    page.wait(f"window.fetches > {before} + 8")
    assert page.value("document.querySelector('#panel details').open")
    assert page.value("document.activeElement === document.querySelector('#panel summary')")


def test_traffic_is_that_of_the_counters(served, visit):
    server = served()
    page = visit(server)
    feed(server, "classification", 30, 0)
    bad = server.client.post("/v1/predict", json={"rows": [{"a": "much"}]})
    assert bad.status_code == 400
    requests = samples(server, "uq_request_duration_seconds_count")
    sent = sum(s.value for s in requests if re.search("/(infer|predict)$", s.labels["route"]))
    page.shows(f"last minute; {sent:,.0f} since the start", "#traffic")
    page.shows(f"{counter(server, 'uq_rejected_total'):,.0f}", "#traffic")
    most = max(samples(server, "uq_rejected_total"), key=lambda s: s.value)
    page.shows(most.labels["reason"].replace("_", " "), "#traffic")
    page.shows("Queue 0", "#traffic")
    page.shows("up to date", "#traffic")
    page.click("#traffic summary")
    page.shows("rows answered", "#traffic")
    # The last minute is this page's own: one request answered and one refused since it opened.
    cells = (
        "[...document.querySelectorAll('#traffic tbody tr')].map((r) => r.innerText.split('\\t'))"
    )
    page.wait(f"{cells}[0][2] === '2' && {cells}[1][2] === '1' && {cells}[3][2] === '30'")
    p50 = page.value(f"{cells}[4][2]")
    assert re.fullmatch(r"[\d.]+\s(ms|s)", p50), p50
    assert page.console == []


def test_a_quantile_is_read_from_differences_of_buckets(served, visit):
    page = visit(served())
    found = page.value("""
    import("/page/metrics.js").then(({ History, quantile, read, snapshot }) => {
      const bucket = ([le, n]) =>
        `uq_request_duration_seconds_bucket{code="200",le="${le}",route="/v1/predict"} ${n}`;
      const text = (counts, rows) => counts.map(bucket).join("\\n")
        + `\\nuq_request_duration_seconds_count{code="200",route="/v1/predict"} ${counts.at(-1)[1]}`
        + `\\nuq_request_duration_seconds_bucket{code="200",le="+Inf",route="/metrics"} 99`
        + `\\nuq_predictions_total{model="a\\\\"b",version="1",outcome="answered"} ${rows}`
        + `\\nuq_predictions_total{model="a\\\\"b",version="1",outcome="rejected"} 7`;
      const h = new History();
      h.add(snapshot(read(text([["0.001", 50], ["0.01", 50], ["+Inf", 50]], 5)), 0));
      h.add(snapshot(read(text([["0.001", 50], ["0.01", 90], ["+Inf", 150]], 25)), 10000));
      const late = h.since(60000);
      const restarted = new History();
      restarted.add(snapshot(read(text([["0.001", 9], ["+Inf", 9]], 9)), 0));
      restarted.add(snapshot(read(text([["0.001", 1], ["+Inf", 1]], 1)), 1000));
      return [late.requests, late.rows, late.seconds, quantile(late.edges, 0.2),
              quantile(late.edges, 0.9) === Infinity, quantile([], 0.5), restarted.since(60000)];
    })""")
    assert found == [100, 20, 10, pytest.approx(0.001 + 0.009 * 20 / 40), True, None, None]


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_try_is_what_the_server_answers(served, visit, task):
    server = served(task)
    page = visit(server, wait=FORM)
    x = rows(task, 3, 9)[0][:1]
    (row,) = table(task, x)
    for k, name in enumerate(COLUMNS[task]):
        assert page.value(f"document.querySelector('label[for=try-{k}]').textContent") == name
        page.fill(f"#try-{k}", repr(row[name]))
    page.value("document.querySelector('#try-level').value = '0.95'")
    page.click("#try button.main")
    page.wait("document.querySelector('.answer')")
    body = {"rows": [row], "alpha": 0.05}
    (same,) = server.client.post("/v1/predict", json=body).json()["predictions"]
    shown = json.loads(page.value("document.querySelector('#try pre').textContent"))
    assert {**shown, "id": 0} == {**same, "id": 0}
    text = page.text(".answer")
    if task == "classification":
        assert f"{same['label']} with {percent(same['confidence'])} confidence" in text
        assert f"Set at 95 % {' '.join(same['set'])}" in text
        assert f"Epistemic {same['epistemic']:.4g} nats" in text
        assert ("abstain" in text) == same["abstain"]
    else:
        assert f"{same['mean']:.4g} ± {same['std']:.4g}" in text
        assert f"Interval at 95 % {same['lower']:.4g} to {same['upper']:.4g}" in text
        assert f"Epistemic {same['epistemic_std']:.4g}" in text
    assert ("out of distribution" in text) == same["ood"]
    page.fill("#try-0", "much")
    page.click("#try button.main")
    refused = server.client.post("/v1/predict", json={"rows": [{**row, COLUMNS[task][0]: "much"}]})
    page.shows(refused.json()["error"]["message"], "#try .refusal")
    assert not page.value("document.querySelector('.answer')")
    page.console.clear()  # the browser names the refused request
    page.click("#try button[type=button]")
    example = server.client.get("/v1/models/tiny/example").json()
    assert page.value("document.querySelector('#try-0').value") == json.dumps(
        example["rows"][0][COLUMNS[task][0]]
    )
    page.click("#try button.main")
    page.wait("document.querySelector('.answer')")
    assert page.console == []


def test_maps_and_several_models(served, maps_root, visit):
    server = served(bundles=maps_root)
    page = visit(server, 390, wait=FORM, phone=True)
    assert page.value("[...document.querySelectorAll('#model option')].map((o) => o.value)") == [
        "restorer",
        "segmenter",
    ]
    assert "Task Regression, maps" in page.text("#panel")
    page.value("""(() => {
      const select = document.querySelector("#model");
      select.value = "segmenter";
      select.dispatchEvent(new Event("change"));
    })()""")
    page.shows("segmenter Version 1", "#panel")
    page.wait("document.querySelector('#try-json')")
    example = server.client.get("/v1/models/segmenter/example").json()
    assert json.loads(page.value("document.querySelector('#try-json').value")) == example["inputs"]
    page.click("#try button.main")
    page.shows("A map of 8 × 8", "#try")
    (same,) = server.client.post("/v1/models/segmenter/predict", json=example).json()["predictions"]
    assert f"Confidence {percent(np.mean(same['confidence']))}" in page.text("#try")
    page.shows("Predictions 2 images", "#panel")
    page.shows("no label can join a map", "#panel")
    assert "Reliability" not in page.text("#panel .charts") and overflow(page) <= 0
    page.fill("#try-json", '{"x": [[')
    page.click("#try button.main")
    refused = server.client.post(
        "/v1/models/segmenter/predict",
        content=b'{"inputs":{"x": [[}',
        headers={"content-type": "application/json"},
    )
    page.shows(refused.json()["error"]["message"], "#try .refusal")
    page.call("Page.reload")
    page.wait(LIVE)
    page.shows("segmenter Version 1", "#panel")  # the address names it


def test_the_example_is_a_request_that_works(served, maps_root):
    for task in ("classification", "regression"):
        server = served(task)
        example = server.client.get("/v1/models/tiny/example").json()
        assert [list(r) for r in example["rows"]] == [list(COLUMNS[task])]
        assert server.client.post("/v1/models/tiny/predict", json=example).status_code == 200
    server = served(bundles=maps_root)
    for name in ("segmenter", "restorer"):
        example = server.client.get(f"/v1/models/{name}/example").json()
        assert np.shape(example["inputs"]["x"]) == (1, 2, 8, 8)
        assert server.client.post(f"/v1/models/{name}/predict", json=example).status_code == 200
    assert server.client.get("/v1/models/nobody/example").status_code == 404


def test_where_keys_are_wanted_the_page_asks_for_one(served, tab, tmp_path):
    file = tmp_path / "keys.json"
    tokens = {n: add_key(file, n, [n])[1] for n in ("predict", "metrics", "admin")}
    server = served(keys=file)
    assert server.client.get("/v1/calibration").status_code == 401
    page = tab()
    page.call("Page.addScriptToEvaluateOnNewDocument", {"source": HURRY})
    page.answer_login(tokens["predict"])  # opens the page itself, and not its figures
    page.open(f"http://127.0.0.1:{server.port}/")
    page.shows("Locked", "#state")
    page.wait("!document.querySelector('#key').hidden")
    assert page.value("document.querySelector('#key-value').type") == "password"
    page.shows("this needs", "#key-why")
    page.shows("tiny Version 1", "#panel")  # what the first key does open is shown
    page.fill("#key-value", "hedged_nobody")
    page.click("#key button")
    page.shows("no such key", "#key-why")
    page.fill("#key-value", tokens["metrics"])
    page.click("#key button")
    page.shows("this needs predict", "#key-why")
    page.fill("#key-value", tokens["admin"])
    page.click("#key button")
    page.wait(LIVE)
    assert page.value("document.querySelector('#key').hidden")
    page.wait(FORM)
    page.click("#try button.main")
    page.wait("document.querySelector('.answer')")
    kept = page.value(
        "[Object.values(sessionStorage), Object.values(localStorage), document.cookie]"
    )
    assert kept == [[tokens["admin"]], [], ""]
    page.click("#forget")
    page.shows("Locked", "#state")
    assert page.value("sessionStorage.length") == 0


def test_the_page_says_when_the_server_is_away_and_rests_when_nobody_looks(
    classifier, visit, tmp_path
):
    settings = Settings(bundles=classifier, data_dir=tmp_path)
    with Server(settings) as server:
        feed(server, "classification", 20, 0)
        page = visit(server)
        page.shows("Predictions 20")
        page.click("#pause")
        page.shows("Paused", "#state")
        assert page.value("document.querySelector('#pause').ariaPressed") == "true"

        def rests():
            # A request that was on its way may still end; then timers go by and nothing is asked.
            page.value("new Promise((done) => setTimeout(done, 1000))")
            asked = page.value("window.fetches")
            page.wait(f"window.timers > {page.value('window.timers')} + 5")
            return page.value("window.fetches") == asked

        poll(rests, bool)
        page.click("#pause")
        page.shows("Live", "#state")
        page.value("Object.defineProperty(document, 'hidden', { value: true, configurable: true })")
        poll(rests, bool)
        page.value("Object.defineProperty(document, 'hidden', { value: false })")
        page.value("document.dispatchEvent(new Event('visibilitychange'))")
        asked = page.value("window.fetches")
        page.wait(f"window.fetches > {asked} + 3")
    page.shows("Not reachable", "#state")
    page.shows("These figures are of", "#stale")
    assert "Predictions 20" in page.text("#panel")


def test_earlier_versions_are_named(classifier, visit, tmp_path):
    stream = streams.classification(30, classes=3)
    ledger = Ledger.open(tmp_path / "hedged-ledger.sqlite", spool_dir=tmp_path / "spool")
    try:
        ledger.register("tiny", "0", "b" * 64, task="classification", width=3, levels=["0.9"])
        assert ledger.record("tiny", "0", "b" * 64, stream.ids, stream.fields, "0.9")
    finally:
        ledger.close()
    with Server(Settings(bundles=classifier, data_dir=tmp_path)) as server:
        page = visit(server)
        page.shows("Earlier versions", "#panel")
        page.shows("0 30 0", "#panel")
