"""Nothing of a server but inference can be reached, however its path is spelled."""

from __future__ import annotations

import h2.config
import h2.connection
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.security.conftest import CHAT, MOUNTS, Fortress
from tests.security.wire import opened, post
from tests.support.eventually import eventually

CONTROLS = [
    "/sleep",
    "/wake_up",
    "/is_sleeping",
    "/collective_rpc",
    "/pause",
    "/resume",
    "/is_paused",
    "/update_weights",
    "/init_weight_transfer_engine",
    "/get_world_size",
    "/abort_requests",
    "/reset_prefix_cache",
    "/reset_mm_cache",
    "/server_info",
    "/scale_elastic_ep",
    "/load",
    "/version",
    "/ping",
    "/health",
    "/metrics",
    "/docs",
    "/redoc",
    "/openapi.json",
    "/invocations",
    "/inference/v1/generate",
    "/start_profile",
    "/stop_profile",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/sim/state",
]

SPELLINGS = [
    "/sleep",
    "/sleep/",
    "/sleep//",
    "/SLEEP",
    "/Sleep",
    "//sleep",
    "///sleep",
    "/./sleep",
    "/../sleep",
    "/.././sleep",
    "/v1/../sleep",
    "/v1/..//sleep",
    "/v1/chat/completions/../../../sleep",
    "/v1/chat/completions/..%2f..%2f..%2fsleep",
    "/v1/chat/completions%2f..%2f..%2f..%2fsleep",
    "/v1/chat/completions/%2e%2e/%2e%2e/%2e%2e/sleep",
    "/v1/chat/completions/.%2e/.%2e/.%2e/sleep",
    "/v1/chat/completions/..;/..;/..;/sleep",
    "/v1/chat/completions;/../../../sleep",
    "/v1/chat/completions/..\\..\\..\\sleep",
    "/v1/chat/completions%5c..%5c..%5c..%5csleep",
    "/v1/chat/completions%00/../../../sleep",
    "/v1/chat/completions%0d%0a/sleep",
    "/v1/chat/completions%20HTTP/1.1%0d%0aX:%20/sleep",
    "/v1/chat/completions%3f/../../../sleep",
    "/v1/chat/completions%23/../../../sleep",
    "/v1/models/../../sleep",
    "/v1/models/..%2f..%2fsleep",
    "/models/a/sleep",
    "/models/a/../../sleep",
    "/models/a/v1/../../../sleep",
    "/models/a%2fsleep",
    "/models/a/%2e%2e/sleep",
    "/models/..%2fsleep/v1/chat/completions",
    "/%73leep",
    "/%73%6c%65%65%70",
    "/%2573leep",
    "/%2fsleep",
    "/%2Fsleep",
    "%2fsleep",
    "/%252fsleep",
    "/%c0%afsleep",
    "/%ef%bc%8fsleep",
    "/\\sleep",
    "/%5csleep",
    "/sleep%00",
    "/sleep%20",
    "/sleep%09",
    "/sleep;",
    "/sleep;v1/chat/completions",
    "/sleep.",
    "/sleep.json",
    "/sleep?level=1",
    "/sleep?/v1/chat/completions",
    "/sleep#/v1/chat/completions",
    "/sleep%3flevel=1",
    "/sleep?x=/../v1/chat/completions",
    "*",
    "sleep",
    "?",
    "#",
]


@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_a_control_route_is_not_found(gateway: Fortress, method: bytes) -> None:
    for route in CONTROLS:
        for mount in MOUNTS:
            answer = gateway.send(post(mount + route, method=method))
            assert answer.statuses == [404], (mount, route)
            assert answer.error["code"] in ("unknown_url", "model_not_found")
    assert gateway.asked == []


@pytest.mark.parametrize("mount", MOUNTS)
def test_no_spelling_of_a_control_route_reaches_a_server(gateway: Fortress, mount: str) -> None:
    for spelling in SPELLINGS:
        answer = gateway.send(post(mount + spelling))
        # The server in front refuses what is not HTTP; Starlette redirects to its mounts.
        assert all(300 <= status < 500 for status in answer.statuses), (spelling, answer.raw[:200])
        assert answer.closed
    assert gateway.asked == []


def test_a_route_is_asked_for_in_one_spelling(gateway: Fortress) -> None:
    for spelling in ("/v1/%63hat/completions", "/v1%2fchat%2fcompletions", "/v1/chat/completions/", "/%76%31/chat/completions"):
        gateway.send(post("/llm" + spelling))
    assert {each.target for each in gateway.asked} == {"/v1/chat/completions"}


def test_no_method_opens_a_control_route(gateway: Fortress) -> None:
    for method in (b"HEAD", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"TRACE", b"PROPFIND", b"PURGE"):
        for route in ("/sleep", "/llm/wake_up", "/llm/models/a/sleep"):
            assert all(400 <= status < 500 for status in gateway.send(post(route, method=method)).statuses)
    for name in (b"x-http-method-override", b"x-method-override", b"x-http-method"):
        gateway.send(post("/llm/sleep", b"", name + b": POST", method=b"GET"))
    for name in (b"x-original-url", b"x-rewrite-url", b"x-forwarded-path", b"x-forwarded-prefix", b"x-forwarded-uri"):
        assert gateway.post(b'{"model": "a"}', name + b": /sleep").statuses == [200]
    assert {each.target for each in gateway.asked} == {"/v1/chat/completions"}


def test_a_target_in_absolute_or_authority_form_reaches_no_other_route_or_host(gateway: Fortress) -> None:
    for host in (gateway.server.url, "http://gateway", "https://gateway"):
        for route in ("/sleep", "/llm/sleep", "/llm/v1/../sleep", "//sleep", "?/sleep"):
            answer = gateway.send(post(host + route))
            assert all(400 <= status < 500 for status in answer.statuses), (host, route, answer.raw[:200])
    for method in (b"CONNECT", b"POST"):
        authority = gateway.server.url.removeprefix("http://")
        assert all(400 <= status < 500 for status in gateway.send(post(authority, method=method)).statuses)
    assert gateway.asked == []


def test_a_query_is_passed_on_and_chooses_nothing(gateway: Fortress) -> None:
    for query in ("?a=1", "?/../../sleep", "?x=%0d%0aPOST%20/sleep%20HTTP/1.1", "?x=http://127.0.0.1/sleep", "??", "?%00"):
        assert gateway.post(target=CHAT + query).statuses == [200]
        assert gateway.asked[-1].target == "/v1/chat/completions" + query


PIECES = [
    *("/", "//", "\\", "..", ".", ";", "?", "#", "@", ":", "%2f", "%2F", "%5c", "%2e%2e", "%00", "%0d%0a", "%20", "%25", "%"),
    *("sleep", "wake_up", "SLEEP", "%73leep", "metrics", "docs", "v1", "v2", "chat", "completions", "models", "a", "responses"),
    *("/llm", "/outer/inner", "/rooted", "/v1/chat/completions", "/models/a", "http://127.0.0.1", "é", "\x7f"),
]


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    path=st.lists(st.sampled_from(PIECES), min_size=1, max_size=9).map("".join),
    method=st.sampled_from([b"POST", b"POST", b"GET", b"DELETE"]),
)
def test_whatever_the_path_a_server_is_asked_for_inference_only(gateway: Fortress, path: str, method: bytes) -> None:
    answer = gateway.send(post(path, method=method))
    assert all(status < 500 for status in answer.statuses), answer.raw[:300]
    gateway.is_closed()


def http_2(path: str) -> bytes:
    """A whole request in HTTP/2, the connection's preface included."""
    connection = h2.connection.H2Connection(h2.config.H2Configuration(validate_outbound_headers=False))
    connection.initiate_connection()
    connection.send_headers(1, [(":method", "POST"), (":path", path), (":scheme", "http"), (":authority", "gateway")])
    connection.send_data(1, b'{"model": "a"}', end_stream=True)
    return connection.data_to_send()


@pytest.mark.parametrize("loop", ["trio"], indirect=True)  # hypercorn speaks it without TLS, uvicorn does not
def test_no_path_of_http_2_reaches_a_control_route(gateway: Fortress) -> None:
    """Its path is bytes that no parser of request lines has seen."""
    injections = ["/v1/chat/completions?x HTTP/1.1\r\nx: y", "/v1/chat/completions\r\nx: y", "/v1/chat/completions?#"]
    for spelling in (*SPELLINGS[::4], *injections):
        gateway.send(http_2("/llm" + spelling), patience=0.02)
    assert gateway.asked == []
    with opened(gateway.url, http_2(CHAT)):
        eventually("what is allowed gets through", lambda: len(gateway.asked) == 1)
