"""Every error as a client of each API is told of it."""

from __future__ import annotations

import json

import pytest

from llmux_asgi import (
    BackendError,
    BodyTooLargeError,
    DrainingError,
    InterruptedRequestError,
    InvalidRequestError,
    LLMuxError,
    OperationError,
    PolicyError,
    QueueFullError,
    QueueTimeoutError,
    SwitchError,
    UnknownModelError,
    UpstreamError,
)
from llmux_asgi._errors import _anthropic_type, describe, error_event
from llmux_asgi.exceptions import MethodNotAllowedError, UnknownResponseError, UnknownRouteError, UnservedRouteError

ERRORS = pytest.mark.parametrize(
    ("error", "status", "code", "retry_after", "anthropic"),
    [
        (UnknownRouteError("GET", "/x"), 404, "unknown_url", None, "not_found_error"),
        (MethodNotAllowedError("PUT", "/x", ("GET", "HEAD")), 405, "method_not_allowed", None, "invalid_request_error"),
        (UnknownModelError("x"), 404, "model_not_found", None, "not_found_error"),
        (UnservedRouteError("x", "/y", ("embed",)), 404, "route_not_served", None, "not_found_error"),
        (UnknownResponseError("x"), 404, "response_not_found", None, "not_found_error"),
        (InvalidRequestError("x", param="model"), 400, None, None, "invalid_request_error"),
        (BodyTooLargeError(5), 413, "request_too_large", None, "request_too_large"),
        (QueueFullError("x", "why", retry_after=70.5), 429, "rate_limit_exceeded", 71, "rate_limit_error"),
        (QueueTimeoutError("x", 1.0, "why", retry_after=2.1), 504, "model_queue_timeout", 3, "timeout_error"),
        (SwitchError("x", "why", retry_after=0.2), 503, "model_switch_failed", 1, "overloaded_error"),
        (DrainingError(), 503, "gateway_draining", 10, "overloaded_error"),
        (OperationError("x"), 409, "operation_not_possible", None, "invalid_request_error"),
        (InterruptedRequestError("x"), 503, "request_interrupted", 1, "overloaded_error"),
        (UpstreamError("x", "broke off."), 502, "upstream_error", None, "api_error"),
        (PolicyError("x"), 500, "internal_error", None, "api_error"),
        (BackendError("x"), 500, "internal_error", None, "api_error"),
    ],
)


@ERRORS
def test_every_error_has_its_status_and_code(
    error: LLMuxError, status: int, code: str | None, retry_after: int | None, anthropic: str
) -> None:
    answer = describe(error)
    content = json.loads(answer.body)["error"]
    assert (answer.status, content["code"], answer.retry_after) == (status, code, retry_after)
    assert content["message"] == str(error)
    kind = "rate_limit_error" if status == 429 else "invalid_request_error"
    assert content["type"] == (kind if status < 500 else "server_error")
    headers = dict(answer.headers)
    assert headers[b"content-length"] == str(len(answer.body)).encode()
    assert headers.get(b"retry-after") == (str(retry_after).encode() if retry_after else None)
    assert error_event(error) == b"data: " + answer.body + b"\n\n"


@ERRORS
def test_anthropics_clients_get_the_same_status_in_their_own_shape(
    error: LLMuxError, status: int, code: str | None, retry_after: int | None, anthropic: str
) -> None:
    answer = describe(error, "anthropic")
    assert json.loads(answer.body) == {"type": "error", "error": {"type": anthropic, "message": str(error)}}
    assert (answer.status, answer.retry_after) == (status, retry_after)
    assert error_event(error, "anthropic") == b"event: error\ndata: " + answer.body + b"\n\n"


@pytest.mark.parametrize("status", [401, 403])
def test_anthropic_has_a_type_for_every_refusal(status: int) -> None:
    assert _anthropic_type(status) in ("authentication_error", "permission_error")


def test_an_error_may_bring_headers_of_its_own() -> None:
    assert (b"allow", b"GET, HEAD") in describe(MethodNotAllowedError("PUT", "/x", ("GET", "HEAD"))).headers
