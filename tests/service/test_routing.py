"""What the router remembers: the routes that Starlette finds, however often they are asked for."""

from __future__ import annotations

import asyncio

import pytest
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route, Router

from service.later import Later
from service.routes import service_routes
from service.routing import _LONGEST_KNOWN, _MOST_KNOWN, Direct, Reply, Routes

PATHS = (
    *("/v2/models/a/infer", "/v2/models/b/infer", "/v2/models/a/versions/1/infer", "/v1/predict"),
    *("/v2/models/a", "/v2/models/a/ready", "/v2", "/", "/page/x", "/page/x/y", "/nothing", "/v2/"),
    *("/v2/models//infer", "/v2/models/a%2Fb/infer", "/v1/predictions/i", "/v1/labels"),
)
METHODS = ("GET", "HEAD", "POST", "DELETE", "PUT")


def nobody():
    raise AssertionError("nothing is asked")


def scope(path, method="GET", root=""):
    return {"type": "http", "method": method, "path": path, "root_path": root, "app": None}


def starlette(routes, asked):
    """By Starlette's own rule: the first route that matches in full, and what it adds."""
    for route in routes:
        match, added = route.matches(asked)
        if match is Match.FULL:
            return route, added["path_params"]
    return None, None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("root", ["", "/v2"])
def test_the_route_is_the_one_that_starlette_finds(method, root):
    routes = service_routes(nobody, Later())
    router = Routes(routes)
    seen = set()
    for _ in range(3):
        for path in PATHS:
            wanted, params = starlette(routes, scope(path, method, root))
            assert router.find(scope(path, method, root)) is wanted
            found = router._find(scope(path, method, root))
            assert (None if found is None else found[1]["path_params"]) == params
            seen.add(None if wanted is None else wanted.path)
    assert any(seen) == (method != "PUT")


def ask(router, asked):
    """Status and body of an answer, and the scope that its handler saw."""

    async def main():
        async def receive():
            raise AssertionError("nothing is received")

        async def send(message):
            sent.append(message)

        await router(asked, receive, send)

    sent = []
    asyncio.run(main())
    return sent


async def echo(request):
    kept = request.path_params
    return Reply(str(kept).encode(), "text/plain", 201, {"x-a": "b"})


def test_answers_and_refusals_are_starlettes():
    routes = [Route("/a/{name}", Direct(echo), methods=["GET"])]
    ours, theirs = Routes(routes, redirect_slashes=False), Router(routes, redirect_slashes=False)
    for _ in range(2):
        for path in ("/a/1", "/a/2"):
            one, other = scope(path), scope(path)
            assert ask(ours, one) == ask(theirs, other)
            assert {k: v for k, v in one.items() if k != "router"} == {
                k: v for k, v in other.items() if k != "router"
            }
        for path, method in (("/b", "GET"), ("/a/1", "POST"), ("/a/1/", "GET")):
            refusals = []
            for router in (ours, theirs):
                with pytest.raises(HTTPException) as refused:
                    ask(router, scope(path, method))
                refusals.append((refused.value.status_code, refused.value.headers))
            assert refusals[0] == refusals[1]


def test_a_reply_has_its_length_type_and_headers():
    start, body = ask(Direct(echo), {**scope("/"), "path_params": {"p": "q"}})
    assert (start["status"], body["body"]) == (201, b"{'p': 'q'}")
    assert dict(start["headers"]) == {
        b"content-length": b"10",
        b"content-type": b"text/plain",
        b"x-a": b"b",
    }


def test_few_paths_are_remembered_and_no_long_ones():
    router = Routes([Route("/a/{name}", Direct(echo))])
    for i in range(3 * _MOST_KNOWN):
        assert router.find(scope(f"/a/{i}")) is router.routes[0]
        assert router.find(scope(f"/b/{i}")) is None
        assert len(router._known) <= _MOST_KNOWN
    before = len(router._known)
    assert router.find(scope("/a/" + "x" * _LONGEST_KNOWN)) is router.routes[0]
    assert len(router._known) == before
