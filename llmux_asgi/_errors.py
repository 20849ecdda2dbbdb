"""Errors as the clients of OpenAI's and Anthropic's APIs understand them. Pure.

Sources: https://platform.openai.com/docs/guides/error-codes and https://docs.anthropic.com/en/api/errors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from ._openai import Headers
from ._routes import ErrorShape
from .exceptions import (
    AuthenticationError,
    BackendError,
    BackendTimeoutError,
    BackendUnsupportedError,
    BodyTimeoutError,
    BodyTooLargeError,
    BuffersFullError,
    ConfigError,
    DrainingError,
    EncodedBodyError,
    HeadersTooLargeError,
    InterruptedRequestError,
    InvalidRequestError,
    LLMuxError,
    MethodNotAllowedError,
    OperationError,
    PermissionDeniedError,
    QueueFullError,
    QueueTimeoutError,
    RateLimitError,
    SwitchError,
    UnknownModelError,
    UnknownResponseError,
    UnknownRouteError,
    UnservedRouteError,
    UpstreamError,
)

_ADDRESS = re.compile(r"https?://(?:\[[^\]\s]*\]|[^\s/:'\"]*)(?::\d+)?(?:/[^\s:'\"]*)?")

_ANNOUNCE_A_BODY = (b"content-length", b"transfer-encoding")

__all__ = ["ErrorAnswer", "describe", "describe_to_operators", "error_event", "for_clients", "headers_before_the_body"]


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """How an error is told to a client."""

    status: int
    body: bytes
    """The error object of the client's API as JSON."""
    retry_after: int | None
    """Seconds for the `Retry-After` header."""
    more: tuple[tuple[bytes, bytes], ...] = ()
    """Further header pairs."""

    @property
    def headers(self) -> Headers:
        """The answer's header pairs."""
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(self.body)).encode())]
        if self.retry_after is not None:
            headers.append((b"retry-after", str(self.retry_after).encode()))
        return [*headers, *self.more]


class _Facts(NamedTuple):
    """What there is to tell, but for the message. `type` is OpenAI's; Anthropic's follows from the status."""

    status: int
    type: str
    code: str | None
    param: str | None = None
    retry_after: float | None = None
    """In seconds."""


def describe(exc: LLMuxError, shape: ErrorShape = "openai") -> ErrorAnswer:
    """Put an error into the client's shape, with its status and headers."""
    return _answer(_facts_of(exc), exc, shape)


def describe_to_operators(exc: LLMuxError) -> ErrorAnswer:
    """The same for the admin API, which tells more kinds of errors from each other."""
    return _answer(_facts_for_operators(exc), exc, "openai")


def _answer(facts: _Facts, exc: LLMuxError, shape: ErrorShape) -> ErrorAnswer:
    message = for_clients(str(exc))
    if shape == "anthropic":
        content: object = {"type": "error", "error": {"type": _anthropic_type(facts.status), "message": message}}
    else:
        content = {"error": {"message": message, "type": facts.type, "param": facts.param, "code": facts.code}}
    wait = None if facts.retry_after is None else max(1, math.ceil(facts.retry_after))
    return ErrorAnswer(facts.status, msgspec.json.encode(content), wait, tuple(exc.headers))


def headers_before_the_body(answer: ErrorAnswer, scope: Mapping[str, Any]) -> Headers:
    """Return the headers of an answer to a request of ASGI's `scope` whose body, if it has one, has not been read."""
    headers = answer.headers
    if scope.get("http_version", "").startswith("1") and any(name in _ANNOUNCE_A_BODY for name, _ in scope["headers"]):
        # The connection cannot be used again, and not every server tells the client by itself.
        headers.append((b"connection", b"close"))
    return headers


def error_event(exc: LLMuxError, shape: ErrorShape = "openai") -> bytes:
    """Return the server-sent event that tells of an error in the middle of a stream."""
    name = b"event: error\n" if shape == "anthropic" else b""
    return name + b"data: " + describe(exc, shape).body + b"\n\n"


def for_clients(message: str) -> str:
    """Leave out what is for the log only: addresses of servers, and lines that a process wrote."""
    first, cut, _ = message.partition("\n")
    if cut:
        first = first.removesuffix(":") + " are in the gateway's log."
    return _ADDRESS.sub("the server", first)


def _facts_for_operators(exc: LLMuxError) -> _Facts:
    match exc:
        case BackendUnsupportedError():
            return _Facts(409, "invalid_request_error", "not_supported")
        case BackendTimeoutError():
            return _Facts(504, "server_error", "backend_timeout")
        case BackendError():
            return _Facts(502, "server_error", "backend_error")
        case ConfigError():
            return _Facts(422, "invalid_request_error", "invalid_configuration")
        case _:
            return _facts_of(exc)


def _facts_of(exc: LLMuxError) -> _Facts:
    """Choose status, type and code: this is the one place where that is done."""
    match exc:
        case UnknownRouteError():
            return _Facts(404, "invalid_request_error", "unknown_url")
        case MethodNotAllowedError():
            return _Facts(405, "invalid_request_error", "method_not_allowed")
        case UnknownModelError():
            return _Facts(404, "invalid_request_error", "model_not_found", "model")
        case UnservedRouteError():
            return _Facts(404, "invalid_request_error", "route_not_served", "model")
        case UnknownResponseError():
            return _Facts(404, "invalid_request_error", "response_not_found", "response_id")
        case BodyTooLargeError():
            return _Facts(413, "invalid_request_error", "request_too_large")
        case BodyTimeoutError():
            return _Facts(408, "invalid_request_error", "request_timeout")
        case EncodedBodyError():
            return _Facts(415, "invalid_request_error", "unsupported_content_encoding")
        case HeadersTooLargeError():
            return _Facts(431, "invalid_request_error", "headers_too_large")
        case BuffersFullError():
            return _Facts(503, "server_error", "buffers_full", retry_after=exc.retry_after)
        case AuthenticationError():
            return _Facts(401, "invalid_request_error", "invalid_api_key")
        case PermissionDeniedError():
            return _Facts(403, "permission_error", exc.code, exc.param)
        case InvalidRequestError():
            return _Facts(400, "invalid_request_error", None, exc.param)
        case QueueFullError() | RateLimitError():
            return _Facts(429, "rate_limit_error", "rate_limit_exceeded", retry_after=exc.retry_after)
        case QueueTimeoutError():
            return _Facts(504, "server_error", "model_queue_timeout", retry_after=exc.retry_after)
        case SwitchError():
            return _Facts(503, "server_error", "model_switch_failed", retry_after=exc.retry_after)
        case DrainingError():
            return _Facts(503, "server_error", "gateway_draining", retry_after=exc.retry_after)
        case OperationError():
            return _Facts(409, "invalid_request_error", "operation_not_possible")
        case InterruptedRequestError():
            return _Facts(503, "server_error", "request_interrupted", retry_after=exc.retry_after)
        case UpstreamError():
            return _Facts(502, "server_error", "upstream_error")
        case _:
            return _Facts(500, "server_error", "internal_error")


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def _anthropic_type(status: int) -> str:
    return _ANTHROPIC_TYPES.get(status, "api_error")
