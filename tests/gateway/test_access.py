"""API keys as a client sees them, over real sockets."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from llmux_asgi import ConfigError
from llmux_asgi.access import hash_key
from tests.gateway.conftest import Gateway, gateway
from tests.gateway.keys import as_new, ask, bearer, key_of, left
from tests.gateway.scripts import echo
from tests.gateway.test_app import error
from tests.support.eventually import eventually
from tests.support.serve import EventLoop

SERVERS_KEY = "the-servers-own-key"
SPANS = InMemorySpanExporter()


LIMITS: dict[str, dict[str, Any]] = {
    "open": {},
    "only-a": {"models": ["gpt"]},
    "anthropic": {"requests_per_minute": 1},
    "batch": {"priority": "batch"},
    "urgent": {"priority": "urgent"},
}


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    path.write_text(f"filed: {{hash: '{hash_key(key_of('filed'))}'}}\n")
    return path


@pytest.fixture(scope="module")
def secret_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("secrets") / "key"
    path.write_text(f"{key_of('old')}\n{hash_key(key_of('new'))}\n")
    return path


@pytest.fixture(scope="module")
def request_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs") / "requests.jsonl"


@pytest.fixture(scope="module")
def guarded(loop: EventLoop, keys_file: Path, secret_file: Path, request_log: Path) -> Iterator[Gateway]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(SPANS))
    keys: dict[str, Any] = {name: {"hash": hash_key(key_of(name)), **limits} for name, limits in LIMITS.items()}
    keys["env"] = {"env": "LLMUX_TEST_KEY"}
    keys["rotated"] = {"file": str(secret_file)}
    access = {"keys": keys, "keys_file": str(keys_file)}
    classes = {"urgent": 30, "batch": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMUX_TEST_KEY", key_of("env"))
        patch.setenv("LLMUX_TEST_SERVERS_KEY", SERVERS_KEY)
        b = {"api_key": {"env": "LLMUX_TEST_SERVERS_KEY"}}
        app = {"tracer_provider": provider}
        a = {"aliases": ["gpt"]}
        with gateway(loop, access=access, priorities=classes, a=a, b=b, app=app, request_log=str(request_log)) as running:
            yield running


@pytest.fixture
def served(guarded: Gateway) -> Gateway:
    as_new(guarded)
    return guarded


# Who is it


@pytest.mark.parametrize("name", ["open", "env", "old", "new", "filed"])
@pytest.mark.parametrize("form", ["Authorization", "x-api-key", "both"])
def test_a_key_is_taken_from_either_header_and_no_credential_reaches_a_server(served: Gateway, name: str, form: str) -> None:
    headers = {"Cookie": "session=1", "api-key": "azure", "x-other": "1"}
    if form != "x-api-key":
        headers["Authorization"] = f"bearer {key_of(name)}"
    if form != "Authorization":
        headers["X-API-Key"] = key_of(name)
    assert ask(served, headers).status_code == 200
    got = dict(served.a.requests[-1].headers)
    assert b"x-other" in got
    assert not got.keys() & {b"authorization", b"x-api-key", b"api-key", b"cookie"}
    assert key_of(name).encode() not in b"".join(got.values())


@pytest.mark.parametrize(
    ("headers", "model", "status"),
    [({}, "a", 401), (bearer("wrong"), "a", 401), (bearer("only-a"), "b", 403), (bearer("only-a"), "no-such-model", 403)],
    ids=["no key", "wrong key", "not its model", "no model"],
)
def test_a_websocket_needs_a_key_that_may_use_its_model(
    served: Gateway, headers: dict[str, str], model: str, status: int
) -> None:
    url = served.url.replace("http", "ws") + f"/v1/realtime?model={model}"
    with pytest.raises(InvalidStatus) as refused, connect(url, additional_headers=headers, open_timeout=10):
        pass
    assert refused.value.response.status_code == status


def test_a_server_gets_its_own_key_with_relayed_and_with_control_calls(served: Gateway) -> None:
    assert ask(served, bearer("open"), "b").status_code == 200
    own = (b"authorization", f"Bearer {SERVERS_KEY}".encode())
    assert [pair for pair in served.b.requests[-1].headers if pair[0] == b"authorization"] == [own]
    assert served.b.control_headers
    assert all(own in headers for headers in served.b.control_headers)
    assert all(b"authorization" not in dict(headers) for headers in served.a.control_headers)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "Bearer")],
        [("authorization", "Bearer nobody's-key-0123456789")],
        [("authorization", key_of("open"))],
        [("authorization", f"Basic {key_of('open')}")],
        [("x-api-key", hash_key(key_of("open")))],
        [("x-api-key", key_of("open")), ("authorization", f"Bearer {key_of('env')}")],
        [("x-api-key", key_of("open")), ("x-api-key", key_of("open"))],
        [("authorization", f"Bearer {key_of('open')}"), ("authorization", f"Bearer {key_of('env')}")],
        [("authorization", f"Bearer {key_of('open')}"), ("authorization", f"Bearer {key_of('open')}")],
        [("x-api-key", b"\xff\xfe-not-ascii-0123456789")],
    ],
)
def test_who_has_no_valid_key_is_refused(served: Gateway, headers: list[tuple[str, str]]) -> None:
    for response in (
        served.client.post("/v1/completions", json={"model": "a"}, headers=headers),
        served.client.get("/v1/models", headers=headers),
        served.client.post("/nowhere", headers=headers),
    ):
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        told = error(response)
        assert (told["type"], told["code"]) == ("invalid_request_error", "invalid_api_key")
        assert "0123456789" not in response.text
        assert not any(name.startswith("x-ratelimit") for name in response.headers)
    assert served.a.requests == []
    assert served.a.controls == []


def test_a_stranger_is_refused_before_the_body_is_sent(served: Gateway) -> None:
    # The headers announce more than is sent: an answer that comes all the same has not waited for it.
    request = b"POST /llm/v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n"
    url = httpx.URL(served.url)
    with socket.create_connection((url.host, url.port), timeout=5) as connection:
        connection.sendall(request)
        assert b" 401 " in connection.recv(65536)


# What may it use


def test_a_key_for_some_models_learns_nothing_of_the_others(served: Gateway) -> None:
    assert ask(served, bearer("only-a"), "a").status_code == 200
    assert ask(served, bearer("only-a"), "gpt").status_code == 200
    answers = [ask(served, bearer("only-a"), model) for model in ("b", "c")]
    for model, response in zip("bc", answers, strict=True):
        assert response.status_code == 403
        told = error(response)
        assert (told["type"], told["code"], told["param"]) == ("permission_error", "model_not_allowed", "model")
        assert f"may not use the model '{model}'" in told["message"]
    assert answers[0].text.replace("'b'", "'c'") == answers[1].text
    assert ask(served, bearer("open"), "c").status_code == 404
    assert served.b.requests == []


@pytest.mark.parametrize("path", ["v1/models", "v1/completions", "v1/nothing"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_path_that_names_a_model_tells_nothing_of_the_others_either(served: Gateway, path: str, method: str) -> None:
    answers = [
        served.client.request(method, f"/models/{model}/{path}", json={}, headers=bearer("only-a")) for model in ("b", "c")
    ]
    assert answers[0].status_code == answers[1].status_code == 404
    assert answers[0].text.replace("'b'", "'c'") == answers[1].text
    assert served.client.get("/models/gpt/v1/models", headers=bearer("only-a")).json()["data"][0]["id"] == "a"


def test_the_models_that_a_key_may_use_are_listed(served: Gateway) -> None:
    def listed(name: str) -> list[str]:
        return [card["id"] for card in served.client.get("/v1/models", headers=bearer(name)).json()["data"]]

    assert (listed("only-a"), listed("open")) == (["a"], ["a", "b"])
    assert served.client.get("/v1/models/gpt", headers=bearer("only-a")).json()["id"] == "a"
    for name in ("b", "c"):
        assert served.client.get(f"/v1/models/{name}", headers=bearer("only-a")).status_code == 404


@pytest.mark.parametrize(
    ("name", "asked", "status"),
    [
        ("batch", None, 200),
        ("batch", "batch", 200),
        ("batch", "urgent", 403),
        ("urgent", "batch", 200),
        ("open", "urgent", 200),
    ],
)
def test_a_keys_class_is_the_highest_that_it_may_ask_for(served: Gateway, name: str, asked: str | None, status: int) -> None:
    SPANS.clear()
    headers = bearer(name) | ({"x-llmux-priority": asked} if asked else {})
    response = ask(served, headers)
    assert response.status_code == status
    if status == 403:
        assert error(response)["code"] == "priority_not_allowed"
    else:
        assert request_span(name)["llmux.priority"] == (asked or name)


def request_span(name: str) -> dict[str, Any]:
    """The attributes of the span of a request by this key. One of the test before may end later than its answer."""

    def ended() -> list[dict[str, Any]]:
        spans = [dict(span.attributes or {}) for span in SPANS.get_finished_spans() if span.name == "llmux.request"]
        return [attributes for attributes in spans if attributes.get("enduser.id") == name]

    eventually("the span has ended", lambda: bool(ended()))
    return ended()[-1]


# In the shape of the client's API


def test_anthropics_clients_are_refused_in_their_own_shape(served: Gateway) -> None:
    def refused(key: str, model: str) -> tuple[int, str]:
        response = served.client.post("/v1/messages", json={"model": model}, headers={"x-api-key": key})
        told = response.json()
        assert told["type"] == "error"
        return response.status_code, told["error"]["type"]

    assert refused("nobody's-key-0123456789", "a") == (401, "authentication_error")
    assert refused(key_of("only-a"), "b") == (403, "permission_error")
    assert ask(served, bearer("anthropic")).status_code == 200
    assert refused(key_of("anthropic"), "a") == (429, "rate_limit_error")


# Keys change


def look_again(served: Gateway) -> None:
    """As if a second had passed."""
    assert served.app._access is not None
    served.app._access._ring._looked = float("-inf")


def test_keys_are_read_again_when_their_file_changes(
    served: Gateway, keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = keys_file.read_text()

    def write(text: str) -> None:
        keys_file.write_text(text)
        look_again(served)

    try:
        write(f"{before}guest: {{hash: '{hash_key(key_of('guest'))}', requests_per_minute: 5}}\n")
        assert left(ask(served, bearer("guest"))) == 4
        for broken in ("guest: {", "guest: {hash: sha256:1}\n", before + "x: {file: /nowhere/at/all}\n"):
            caplog.clear()
            write(broken)
            assert ask(served, bearer("guest")).status_code == 200  # those known before stay
            look_again(served)
            assert ask(served, bearer("filed")).status_code == 200
            errors = [record for record in caplog.records if record.levelno == logging.ERROR]
            assert len(errors) == 1  # and not at each look
            assert str(keys_file) in errors[0].getMessage()
            with pytest.raises(ConfigError, match=r"keys\.yaml|nowhere"):
                served.app.reload_keys()
        write(before)
        assert ask(served, bearer("guest")).status_code == 401
        assert ask(served, bearer("filed")).status_code == 200
        os.utime(keys_file)
        served.app.reload_keys()
    finally:
        write(before)


# Secrets


def test_no_key_is_in_any_log_span_or_error(served: Gateway, request_log: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    SPANS.clear()
    served.a.script = None
    wrong = "wrong-key-987654321"
    with served.client.stream("POST", "/v1/completions", json={"model": "a"}, headers=bearer("open")) as response:
        assert response.status_code >= 500  # the server breaks off
        texts = [response.read().decode()]
    texts += [ask(served, {"authorization": f"Bearer {wrong}"}).text, ask(served, {"authorization": f"Basic {wrong}"}).text]
    served.b.script = echo
    assert ask(served, bearer("open"), "b").status_code == 200
    assert request_span("open")["llmux.model"] in ("a", "b")
    texts += [record.getMessage() for record in caplog.records if record.name.startswith("llmux")]
    texts += [str(record.exc_info) for record in caplog.records]
    texts += [span.to_json() for span in SPANS.get_finished_spans()]
    eventually("it is logged", lambda: '"key":"open"' in request_log.read_text())
    texts += [request_log.read_text()]
    texts += [repr(served.app.config), repr(served.app._proxy.targets)]
    assert any("refused a request from 127.0.0.1" in text for text in texts)
    for secret in (key_of("open"), "987654321", SERVERS_KEY, key_of("env")):
        assert [text for text in texts if secret in text] == []
