"""The app's routes and errors, over real sockets."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import anyio
import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from llmux_asgi import ConfigError, LLMuxApp
from llmux_asgi._routes import INFERENCE_ROUTES
from llmux_asgi.upstream import Http1Upstream
from tests.gateway.conftest import Gateway, gateway
from tests.gateway.scripts import echo
from tests.support.serve import EventLoop, free_port, serve
from tests.support.upstream import Exchange


def error(response: httpx.Response) -> dict[str, Any]:
    """Return the OpenAI error object, whose keys are always these four."""
    content: dict[str, Any] = response.json()
    assert content["error"].keys() == {"message", "type", "param", "code"}
    error_: dict[str, Any] = content["error"]
    return error_


def test_models_are_listed_in_openais_shape(loop: EventLoop) -> None:
    with gateway(loop, a={"aliases": ["gpt", "org/gpt"]}) as served:
        listed = served.client.get("/v1/models").json()
        assert listed["object"] == "list"
        assert [card["id"] for card in listed["data"]] == ["a", "b"]
        assert listed["data"][0].keys() == {"id", "object", "created", "owned_by"}
        assert served.client.get("/v1/models/b").json()["id"] == "b"
        assert served.client.get("/v1/models/org/gpt").json()["id"] == "a"
        assert error(served.client.get("/v1/models/nobody"))["code"] == "model_not_found"
        assert served.client.head("/v1/models").status_code == 200
        assert served.client.delete("/v1/models/a").headers["allow"] == "GET, HEAD"
        assert served.a.controls == []  # no server is asked for that


@pytest.mark.parametrize("route", sorted(INFERENCE_ROUTES))
def test_every_inference_route_is_relayed_under_its_own_path(served: Gateway, route: str) -> None:
    served.a.script = echo
    assert served.client.post(route, json={"model": "a"}).status_code == 200
    assert served.a.requests[0].path == route


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/sleep",
        "/wake_up",
        "/is_sleeping",
        "/collective_rpc",
        "/metrics",
        "/openapi.json",
        "/v1/chat/completions/../../sleep",
        "/v1//chat/completions",
        "/V1/chat/completions",
        "/v1/load_lora_adapter",
        "/%73leep",
        "/v1/chat%2Fcompletions/x",
    ],
)
def test_nothing_else_reaches_a_backend(served: Gateway, path: str) -> None:
    response = served.client.post(path, json={"model": "a"})
    assert response.status_code == 404
    assert error(response)["code"] == "unknown_url"
    assert served.a.requests == []
    assert served.a.controls == []


def test_a_slash_at_the_end_makes_no_difference(served: Gateway) -> None:
    served.a.script = echo
    assert served.client.post("/v1/chat/completions/", json={"model": "a"}).status_code == 200
    assert served.a.requests[0].path == "/v1/chat/completions"


def test_a_wrong_method_is_a_405_that_says_which_is_right(served: Gateway) -> None:
    response = served.client.get("/v1/chat/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert error(response)["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b'{"model": "nobody"}', 404, "model_not_found", "model"),
        (b'{"messages": []}', 400, None, "model"),
        (b'{"model": 7}', 400, None, "model"),
        (b'{"model": ""}', 400, None, "model"),
        (b'{"model": "a"', 400, None, None),
        (b"[]", 400, None, None),
        (b"", 400, None, None),
        (b'{"model": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, None, None),
        (b'{"model": "\xff"}', 400, None, None),
    ],
)
def test_a_request_that_cannot_be_understood_says_why(
    served: Gateway, body: bytes, status: int, code: str | None, param: str | None
) -> None:
    response = served.client.post("/v1/chat/completions", content=body)
    assert response.status_code == status
    assert (error(response)["type"], error(response)["code"], error(response)["param"]) == (
        "invalid_request_error",
        code,
        param,
    )
    assert served.a.requests == []


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_a_413(loop: EventLoop, chunked: bool) -> None:
    with gateway(loop, limits={"max_body": 1000}) as served:
        served.a.script = echo
        body = b'{"model": "a", "x": "' + b"x" * 1000 + b'"}'
        content: Any = iter([body[:600], body[600:]]) if chunked else body
        response = served.client.post("/v1/chat/completions", content=content)
        assert (response.status_code, error(response)["code"]) == (413, "request_too_large")
        small = b'{"model": "a"}'
        content = iter([small[:3], small[3:]]) if chunked else small
        assert served.client.post("/v1/chat/completions", content=content).content == small


def test_the_queue_timeout_is_a_504_with_retry_after(loop: EventLoop) -> None:
    with gateway(loop, a={"timeouts": {"request": 0.05}}, policy={"min_active_duration": 60}) as served:
        served.a.script = served.b.script = echo
        assert served.chat("b").status_code == 200  # a was found awake: no cooldown is owed
        response = served.chat("a")  # b was just woken, and stays active for a minute
        assert (response.status_code, error(response)["code"]) == (504, "model_queue_timeout")
        assert response.headers["retry-after"] in ("60", "61")  # and the switch, which takes a moment
        assert "switching to 'a' from 'b' (0 in flight), in the phase 'cooldown'" in error(response)["message"]


def test_a_switch_that_fails_is_a_503_with_retry_after_and_the_active_model_goes_on(loop: EventLoop) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    with gateway(loop, b={"url": dead}) as served:
        served.a.script = echo
        assert served.chat("a").status_code == 200
        response = served.chat("b")
        assert (response.status_code, error(response)["code"]) == (503, "model_switch_failed")
        assert response.headers["retry-after"] == "1"
        assert "the server: nothing listens there" in error(response)["message"]
        assert served.chat("a").status_code == 200
        assert "/sleep" not in served.a.controls


def test_the_model_header_comes_before_the_body(served: Gateway) -> None:
    served.a.script = served.b.script = echo
    response = served.client.post("/v1/completions", json={"model": "a", "n": 1}, headers={"x-llmux-model": "b"})
    assert response.json() == {"model": "b", "n": 1}
    response = served.client.post("/v1/completions", json={"n": 1}, headers={"x-llmux-model": "b"})
    assert response.json() == {"model": "b", "n": 1}
    response = served.client.post("/v1/completions", content=b"nonsense", headers={"x-llmux-model": "b"})
    assert response.status_code == 400
    response = served.client.post("/v1/completions", json={}, headers={"x-llmux-model": "nobody"})
    assert response.status_code == 404


def test_the_app_serves_by_itself_with_its_own_lifespan(loop: EventLoop) -> None:
    with gateway(loop) as served:
        served.a.script = echo
        llm = LLMuxApp({"models": {"a": {"url": served.app.config.models["a"].url}}})
        with serve(llm, loop) as url, httpx.Client(base_url=url) as client:
            assert client.post("/v1/completions", json={"model": "a"}).status_code == 200
        assert isinstance(upstream := llm._proxy.upstream, Http1Upstream)
        assert upstream.idle == 0, "the lifespan must have closed them"


def test_the_app_serves_mounted_without_its_lifespan_being_run(loop: EventLoop) -> None:
    with gateway(loop) as served:

        async def script(exchange: Exchange) -> None:  # closes the connection, which nobody else does here
            await exchange.start("application/json", 200, (b"connection", b"close"))
            await exchange.chunk(exchange.body, last=True)

        served.a.script = script
        llm = LLMuxApp({"models": {"a": {"url": served.app.config.models["a"].url}}})
        with ExitStack() as stack:
            url = stack.enter_context(serve(Starlette(routes=[Mount("/deep/er", llm)]), loop))
            client = stack.enter_context(httpx.Client(base_url=url + "/deep/er"))
            assert client.post("/v1/completions", json={"model": "a"}).status_code == 200


def test_a_configuration_can_be_a_file_and_is_refused_with_the_path(tmp_path: Any) -> None:
    path = tmp_path / "llmux.json"
    path.write_text('{"models": {"a": {"url": "nonsense"}}}')
    with pytest.raises(ConfigError, match=r"llmux\.json: \$\.models\.a\.url: 'nonsense' is not a URL"):
        LLMuxApp(path)


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/realtime"])
async def test_a_websocket_that_cannot_be_served_is_closed_where_no_status_can_be_sent(path: str) -> None:
    llm = LLMuxApp({"models": {"a": {"url": "http://127.0.0.1:1"}}})
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await llm({"type": "websocket", "path": path, "headers": [], "query_string": b"model=b"}, receive, send)
    assert [(message["type"], message["code"]) for message in sent] == [("websocket.close", 1008)]


@pytest.mark.parametrize("close", [True, False])
def test_the_same_app_can_be_used_on_one_event_loop_after_another(served: Gateway, close: bool) -> None:
    """As a test client does that opens a loop a request."""
    served.a.script = echo
    url = served.app.config.models["a"].url
    llm = LLMuxApp({"models": {"a": {"url": url}}})

    async def send_one() -> None:
        transport = httpx.ASGITransport(llm)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            response = await client.post("/v1/completions", json={"model": "a"})
            assert response.status_code == 200
        if close:
            await llm.aclose()

    for backend in ("asyncio", "trio", "asyncio"):
        anyio.run(send_one, backend=backend)
