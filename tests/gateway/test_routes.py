"""The routes that are relayed, how each names its model, and whose errors it speaks. Over real sockets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from llmux_asgi._routes import INFERENCE_ROUTES, ROUTES
from tests.gateway.conftest import Gateway, gateway
from tests.gateway.scripts import echo
from tests.gateway.test_app import error
from tests.support.serve import EventLoop
from tests.support.upstream import Exchange

FORMS = sorted(route.path for route in ROUTES if route.body == "form")
SOUND = {"file": ("a.wav", b"RIFF\r\n--\x00" * 1000)}


@pytest.fixture(scope="module")
def named(loop: EventLoop) -> Iterator[Gateway]:
    """A gateway whose servers know their models by other names than its clients."""
    models: dict[str, Any] = {
        "a": {"served_name": "A", "aliases": ["org/a", "org"], "tasks": ["generate", "transcription"]},
        "b": {"served_name": "B", "aliases": ["org/a/b"]},
    }
    with gateway(loop, **models) as running:
        running.a.script = running.b.script = echo
        yield running


@pytest.fixture(autouse=True)
def forget(named: Gateway) -> None:
    for server in (named.a, named.b):
        server.requests.clear()
        server.script = echo


def sent(named: Gateway) -> list[tuple[str, str, str]]:
    """What has reached the servers: method, path, body."""
    return [(each.method, each.path, each.body.decode()) for each in relayed(named)]


def relayed(named: Gateway) -> list[Exchange]:
    """The requests that have reached the servers for a client; a switch asks for metrics."""
    return [each for server in (named.a, named.b) for each in server.requests if each.path != "/metrics"]


@pytest.mark.parametrize("route", FORMS)
def test_a_form_names_the_model_in_a_field_and_keeps_the_rest(named: Gateway, route: str) -> None:
    request = named.client.build_request("POST", route, data={"model": "b", "prompt": "x"}, files=SOUND)
    content = request.read()
    assert named.client.send(request).status_code == 200
    (exchange,) = relayed(named)
    assert exchange.body == content.replace(b"\r\nb\r\n", b"\r\nB\r\n", 1)
    assert dict(exchange.headers)[b"content-length"] == str(len(exchange.body)).encode()


def test_a_form_that_could_be_read_in_two_ways_is_refused(named: Gateway) -> None:
    response = named.client.post("/v1/audio/transcriptions", data={"model": ["a", "b"]}, files=SOUND)
    assert (response.status_code, error(response)["param"]) == (400, "model")
    assert sent(named) == []


def test_a_form_on_another_route_and_two_content_types_are_refused(named: Gateway) -> None:
    assert named.client.post("/v1/chat/completions", data={"model": "a"}, files=SOUND).status_code == 400
    headers = [("content-type", "application/json"), ("content-type", "multipart/form-data; boundary=b")]
    assert named.client.post("/v1/audio/translations", content=b'{"model": "a"}', headers=headers).status_code == 400
    assert sent(named) == []


def test_a_body_that_names_two_models_is_refused(named: Gateway) -> None:
    response = named.client.post("/v1/completions", content=b'{"model": "a", "mod\\u0065l": "b"}')
    assert (response.status_code, error(response)["param"]) == (400, "model")
    assert sent(named) == []


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/models/a/v1/completions", "A"),
        ("/models/b/v1/completions", "B"),
        ("/models/org/v1/completions", "A"),
        ("/models/org/a/v1/completions", "A"),
        ("/models/org%2Fa/v1/completions", "A"),
        ("/models/org/a/b/v1/completions", "B"),
    ],
)
@pytest.mark.parametrize("body", ['{"prompt":"x"}', '{"model":"other","prompt":"x"}', '{"model":"a","prompt":"x"}'])
def test_the_path_names_the_model_whatever_the_body_says(named: Gateway, path: str, expected: str, body: str) -> None:
    assert named.client.post(path, content=body, headers={"x-llmux-model": "nobody"}).status_code == 200
    assert sent(named) == [("POST", "/v1/completions", f'{{"model":"{expected}","prompt":"x"}}')]


def test_a_form_behind_a_path_with_a_model_gets_one(named: Gateway) -> None:
    assert named.client.post("/models/b/v1/audio/transcriptions", files=SOUND).status_code == 200
    assert b'name="model"\r\n\r\nB\r\n' in relayed(named)[0].body


def test_models_are_listed_behind_a_path_with_a_model(named: Gateway) -> None:
    listed = named.client.get("/models/org/a/v1/models").json()
    assert [card["id"] for card in listed["data"]] == ["a"]
    assert named.client.get("/models/a/v1/models/org%2Fa").json()["id"] == "a"
    assert error(named.client.get("/models/a/v1/models/b"))["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/models/nobody/v1/completions", 404, "model_not_found"),
        ("/models/no/body/v1/completions", 404, "model_not_found"),
        ("/models/a", 404, "unknown_url"),
        ("/models/a/sleep", 404, "unknown_url"),
        ("/models/a/v1/load_lora_adapter", 404, "unknown_url"),
        ("/models/a/models/a/v1/completions", 404, "unknown_url"),
        ("/models/a/../../sleep", 404, "unknown_url"),
        ("/models//v1/completions", 404, "model_not_found"),
    ],
)
def test_a_path_with_a_model_opens_nothing_else(named: Gateway, path: str, status: int, code: str) -> None:
    response = named.client.post(path, json={"model": "a"})
    assert (response.status_code, error(response)["code"]) == (status, code)
    assert sent(named) == []


@pytest.mark.parametrize("route", ["/v1/embeddings", "/v1/audio/speech", "/pooling"])
def test_a_task_that_a_model_does_not_have_is_refused_without_a_switch(named: Gateway, route: str) -> None:
    assert named.client.post("/v1/completions", json={"model": "b"}).status_code == 200
    switches = named.app.switcher.statistics().switches
    response = named.client.post(route, json={"model": "a"})
    assert (response.status_code, error(response)["code"]) == (404, "route_not_served")
    assert "generate, transcription" in error(response)["message"]
    assert named.app.switcher.statistics().switches == switches
    assert named.client.post(route, json={"model": "b"}).status_code == 200


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE"])
@pytest.mark.parametrize(
    ("path", "allowed"),
    [("/v1/completions", "POST"), ("/models/a/v1/messages", "POST"), ("/v1/responses/resp_1/cancel", "POST")],
)
def test_other_methods_are_answered_with_those_that_exist(named: Gateway, method: str, path: str, allowed: str) -> None:
    response = named.client.request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allowed)


# Responses


def answering(identifier: str, *, stream: bool = False) -> Any:
    async def script(exchange: Exchange) -> None:
        response = {"id": identifier, "object": "response"}
        if stream:
            event = {"type": "response.created", "response": response}
            data = f"event: response.created\ndata: {json.dumps(event)}\n\nevent: x\ndata: {{}}\n\n".encode()
            await exchange.start()
            await exchange.chunk(data[:60])
            await exchange.chunk(data[60:], last=True)
        else:
            data = json.dumps(response).encode()
            await exchange.start("application/json")
            await exchange.chunk(data[:5])
            await exchange.chunk(data[5:], last=True)

    return script


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_is_fetched_and_cancelled_where_it_was_made(named: Gateway, stream: bool) -> None:
    for model, server in (("a", named.a), ("b", named.b)):
        server.script = answering(f"resp_{model}{stream}", stream=stream)
        assert named.client.post("/v1/responses", json={"model": model}).status_code == 200
    named.a.script = named.b.script = echo
    forget_requests(named)
    assert named.client.get(f"/v1/responses/resp_a{stream}?stream=false").status_code == 200
    assert named.client.post(f"/v1/responses/resp_b{stream}/cancel").status_code == 200
    assert sent(named) == [
        ("GET", f"/v1/responses/resp_a{stream}", ""),
        ("POST", f"/v1/responses/resp_b{stream}/cancel", ""),
    ]
    assert relayed(named)[0].query == b"stream=false"


def forget_requests(named: Gateway) -> None:
    named.a.requests.clear()
    named.b.requests.clear()


def test_a_response_that_is_not_known_is_a_404_unless_its_model_is_named(named: Gateway) -> None:
    response = named.client.get("/v1/responses/resp_x")
    assert (response.status_code, error(response)["code"]) == (404, "response_not_found")
    assert sent(named) == []
    assert named.client.get("/v1/responses/resp_x?model=b").status_code == 200
    assert named.client.get("/v1/responses/resp_x", headers={"x-llmux-model": "b"}).status_code == 200
    assert named.client.get("/models/b/v1/responses/resp_x").status_code == 200
    assert [path for _, path, _ in sent(named)] == ["/v1/responses/resp_x"] * 3
    assert error(named.client.get("/v1/responses/resp_x?model=nobody"))["code"] == "model_not_found"
    assert named.client.get("/v1/responses/resp_x?model=a&model=b").status_code == 400


@pytest.mark.parametrize("identifier", ["", ".", "..", "a%2Fb", "..%2F..%2Fsleep", "a b", "a%0d%0ab", "x" * 257, "%C3%BC"])
def test_an_id_that_could_mean_another_path_is_no_route(named: Gateway, identifier: str) -> None:
    url = httpx.URL(named.url).copy_with(raw_path=f"/llm/v1/responses/{identifier}?model=a".encode())
    response = named.client.get(url)
    assert response.status_code in (404, 405)
    assert sent(named) == []


@pytest.mark.parametrize("answer", [b"{", b"[]", b'{"id": 7}', b'{"id": "../x"}'])
def test_an_answer_without_an_id_is_passed_on_and_forgotten(named: Gateway, answer: bytes) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start("application/json")
        await exchange.chunk(answer, last=True)

    named.a.script = script
    assert named.client.post("/v1/responses", json={"model": "a"}).content == answer


# Anthropic


@pytest.mark.parametrize("route", [path for path, route in INFERENCE_ROUTES.items() if route.errors == "anthropic"])
def test_anthropics_clients_are_told_of_errors_in_their_own_shape(named: Gateway, route: str) -> None:
    response = named.client.post(route, json={"model": "nobody"})
    assert response.status_code == 404
    assert response.json()["type"] == "error"
    assert response.json()["error"].keys() == {"type", "message"}
    assert response.json()["error"]["type"] == "not_found_error"
    refused = named.client.get(route)
    assert (refused.status_code, refused.json()["error"]["type"]) == (405, "invalid_request_error")


def test_an_error_in_anthropics_stream_is_an_event_of_theirs(named: Gateway) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.chunk(b'event: message_start\ndata: {"type":"message_start"}\n\n')
        raise RuntimeError("breaks off")

    named.a.script = script
    events = named.client.post("/v1/messages", json={"model": "a", "stream": True}).text.split("\n\n")
    name, _, data = events[1].partition("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["type"] == "api_error"
