"""The OpenAPI document against the router, a validator, the served models, and schemathesis."""

from __future__ import annotations

import contextlib
import subprocess

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.errors import Unsatisfiable
from openapi_spec_validator import validate
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.routing import Route

from service.access import OPEN
from service.core import Core
from service.later import Later
from service.live import open_models
from service.openapi import document
from service.routes import service_routes
from service.settings import Settings
from tests.service.browser import Browser
from tests.service.conftest import Server
from tests.service.helpers import healthy
from tests.service.test_page_for_all import FAINT


@pytest.fixture(scope="module")
def server(served):
    return served(max_rows=50, max_body_bytes=1 << 20)


@pytest.fixture(scope="module")
def several(maps_root, tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    with Server(Settings(bundles=maps_root, data_dir=data)) as running:
        yield running


def fetch(server):
    answer = server.client.get("/openapi.json")
    assert answer.status_code == 200
    return answer.json()


def checker(found, name):
    """A validator of one of the document's schemas, by the rules of JSON Schema 2020-12."""
    whole = {"$ref": f"#/components/schemas/{name}", "components": found["components"]}
    return jsonschema.Draft202012Validator(whole)


def operations(found):
    return [(path, method) for path, item in found["paths"].items() for method in item]


def test_every_route_is_described_and_no_other(server):
    def nobody() -> Core:
        raise AssertionError

    routed = {
        (method.lower(), route.path)
        for route in service_routes(nobody, Later())
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    described = {(method, path) for path, item in fetch(server)["paths"].items() for method in item}
    assert described == routed


@pytest.mark.parametrize("task", ["classification", "regression", "maps"])
def test_the_document_is_valid_and_its_examples_work(served, several, task):
    server = several if task == "maps" else served(task)
    found = fetch(server)
    validate(found)
    names = sorted(server.client.get("/v2").json()["models"])
    examples = found["paths"]["/v1/models/{name}/predict"]["post"]["requestBody"]["content"]
    examples = examples["application/json"]["examples"]
    assert sorted(examples) == names
    infer = found["paths"]["/v2/models/{name}/infer"]["post"]["requestBody"]["content"]
    for name in names:
        example = examples[name]["value"]
        checker(found, f"PredictRequest.{name}").validate(example)
        assert server.client.get(f"/v1/models/{name}/example").json() == example
        every = [o["name"] for o in server.client.get(f"/v2/models/{name}").json()["outputs"]]
        for more in ({}, {"outputs": every, "alpha": 0.2, "id": "first"}):
            answer = server.client.post(f"/v1/models/{name}/predict", json={**example, **more})
            assert answer.status_code == 200
            checker(found, f"PredictResponse.{name}").validate(answer.json())
        asked = infer["application/json"]["examples"][name]["value"]
        checker(found, "InferRequest").validate(asked)
        answer = server.client.post(f"/v2/models/{name}/infer", json=asked)
        checker(found, "InferResponse").validate(answer.json())
    labels = found["paths"]["/v1/labels"]["post"]["requestBody"]["content"]["application/json"]
    assert ("examples" in labels) is (task != "maps")
    for example in labels.get("examples", {}).values():
        answer = server.client.post("/v1/labels", json=example["value"])
        (result,) = answer.json()["results"]
        assert result["id"] == "first:0"
        assert result["result"] in ("accepted", "pending")  # as soon as its prediction is written
        checker(found, "LabelResults").validate(answer.json())
    checker(found, "Calibration").validate(server.client.get("/v1/calibration").json())


def test_a_request_that_is_refused_does_not_fit_its_schema(server):
    refused = checker(fetch(server), "PredictRequest.tiny")
    row = dict.fromkeys("abcd", 0.5)
    assert refused.is_valid({"rows": [row], "alpha": 0.1})
    for wrong in (
        {},
        {"rows": []},
        {"rows": [row], "inputs": {"x": [[0, 0, 0, 0]]}},
        {"rows": [{"a": 1}]},
        {"rows": [{**row, "a": "x"}]},
        {"rows": [{**row, "e": 1}]},
        {"rows": [row], "alpha": 1.5},
        {"rows": [row], "ids": ["a b"]},
        {"rows": [row], "outputs": ["speed"]},
        {"rows": [row], "alhpa": 0.1},
        {"inputs": {"x": [[0, 0, 0]]}},
    ):
        assert not refused.is_valid(wrong), wrong
        assert server.client.post("/v1/predict", json=wrong).status_code == 400


def test_with_keys_the_document_says_which_role(classifier, tmp_path):
    models = open_models(classifier, device="cpu", threads=1).models
    plain = Settings(bundles=classifier, data_dir=tmp_path)
    open_one = document(models, plain, version="1", parts=("docs.js",))
    assert "securitySchemes" not in open_one["components"]
    (tmp_path / "keys").write_text("")
    locked = plain.model_copy(update={"keys": tmp_path / "keys"})
    found = document(models, locked, version="1", parts=("docs.js",))
    for path, item in found["paths"].items():
        for operation in item.values():
            assert ("security" in operation) is (path not in OPEN)
    assert "the role metrics" in found["paths"]["/metrics"]["get"]["description"]
    assert "the role labels" in found["paths"]["/v1/labels"]["post"]["description"]


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_the_page_is_readable(several, tmp_path, width, dark):
    with Browser(tmp_path) as browser:
        page = browser.page(width, dark=dark, phone=width == 390)
        page.open(f"http://127.0.0.1:{several.port}/docs")
        page.wait("document.querySelectorAll('article').length && !state.textContent.includes('…')")
        page.value("document.querySelectorAll('details').forEach((d) => (d.open = true))")
        found = fetch(several)
        ids = page.value("[...document.querySelectorAll('article')].map((a) => a.id)")
        described = [o["operationId"] for item in found["paths"].values() for o in item.values()]
        assert sorted(ids) == sorted(described)
        text = page.text()
        for word in (*found["paths"], "PredictRequest.segmenter", "objects by column name"):
            assert word in text
        assert page.value("document.documentElement.scrollWidth <= innerWidth")
        assert page.value(FAINT)[1] == []
        assert page.console == []


def test_the_commands_that_the_page_shows_work(served, several, tmp_path):
    script = "[...document.querySelectorAll('.command code')].map((c) => c.textContent)"
    for server in (served(), several):
        with Browser(tmp_path / str(server.port)) as browser:
            page = browser.page()
            page.open(f"http://127.0.0.1:{server.port}/docs")
            page.wait("document.querySelectorAll('article').length")
            commands = page.value(script)
        assert sum("-d '" in command for command in commands) >= 3
        for command in commands:
            asked = ["bash", "-c", f"{command} -o /dev/null -w '%{{http_code}}'"]
            done = subprocess.run(asked, capture_output=True, text=True, check=True)
            # A prediction of that name was never asked for.
            allowed = {"200", "202"} | ({"404"} if "DELETE" in command else set())
            assert done.stdout in allowed, command


CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
)


def explore(server, examples):
    """Ask every operation with requests that fit the document, and with some that do not."""
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
    asked = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in GenerationMode:

            @seed(0)
            @settings(
                max_examples=examples,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(operation.as_strategy(generation_mode=mode))
            def check(case):
                answer = case.call()
                case.validate_response(answer, checks=CHECKS)
                asked.add((case.operation.label, case.media_type, answer.status_code))

            with contextlib.suppress(Unsatisfiable):  # nothing to say wrongly where nothing is said
                check()
    return asked


@pytest.mark.parametrize("examples", [5, pytest.param(100, marks=pytest.mark.long)])
def test_nothing_within_or_beside_the_document_is_answered_otherwise(server, several, examples):
    for asked in (explore(server, examples), explore(several, examples)):
        every = {f"{m.upper()} {path}" for path, m in operations(fetch(server))}
        # The document itself is what was read before anything else.
        assert {label for label, _, _ in asked} == every - {"GET /openapi.json"}
        fine = {label for label, _, status in asked if status < 300}
        assert fine >= {label for label in every if label.startswith("GET /v2")}
        # What no schema can say refuses most of what fits it: as many ids as rows, float32 values.
        assert examples < 100 or "POST /v1/models/{name}/predict" in fine
    assert healthy(server)
