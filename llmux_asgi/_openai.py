"""OpenAI's API as the gateway touches it: the model's name in a body, error objects, headers, server-sent events. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from .exceptions import (
    BodyTimeoutError,
    BodyTooLargeError,
    BuffersFullError,
    EncodedBodyError,
    HeadersTooLargeError,
    InterruptedRequestError,
    InvalidRequestError,
    LLMuxError,
    QueueFullError,
    QueueTimeoutError,
    SwitchError,
    UnknownModelError,
    UpstreamError,
)

__all__ = [
    "INFERENCE_ROUTES",
    "PRIORITY_HEADER",
    "ErrorAnswer",
    "Headers",
    "InterruptedAnswer",
    "RequestFields",
    "content_length",
    "describe",
    "error_answer",
    "error_event",
    "is_done",
    "model_of",
    "read_fields",
    "relayed_request_headers",
    "relayed_response_headers",
    "split_events",
    "with_model",
]

Headers = list[tuple[bytes, bytes]]

INFERENCE_ROUTES = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/responses",
        "/v1/score",
        "/v1/rerank",
        "/v2/rerank",
        "/classify",
        "/detokenize",
        "/pooling",
        "/rerank",
        "/score",
        "/tokenize",
    }
)
"""The POST routes of vLLM that take JSON with a `model`. Nothing else is ever sent to a backend for a client."""

_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
PRIORITY_HEADER = b"x-llmux-priority"
"""Request header that names the request's priority class."""
# Answers are looked into, event by event, so they must come as they are. A priority is the gateway's affair.
_NOT_SENT_UP = _HOP_BY_HOP | {b"host", b"content-length", b"expect", b"accept-encoding", b"x-llmux-model", PRIORITY_HEADER}
# The ASGI server of the gateway writes its own date and server.
_NOT_SENT_DOWN = _HOP_BY_HOP | {b"date", b"server"}


# The request's body


class RequestFields(msgspec.Struct):
    """The fields of a request's body that matter here; the rest is not looked at."""

    model: object = None
    stream: object = False


class _ChoiceFields(msgspec.Struct):
    n: object = 1
    prompt: object = None


_T = TypeVar("_T")
_fields = msgspec.json.Decoder(RequestFields)
_choice_fields = msgspec.json.Decoder(_ChoiceFields)
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])


def read_fields(body: bytes) -> RequestFields:
    """Read the fields of a JSON body. Raises `InvalidRequestError` if it is not a JSON object."""
    return _decode(_fields, body)


def model_of(fields: RequestFields) -> str:
    """Return the model that a request names. Raises `InvalidRequestError`."""
    if fields.model is None:
        raise InvalidRequestError("You must provide a model parameter.", param="model")
    if not isinstance(fields.model, str) or not fields.model:
        raise InvalidRequestError("The model must be a string that is not empty.", param="model")
    return fields.model


def with_model(body: bytes, model: str) -> bytes:
    """Return the JSON object `body` with `model` as its top-level model; all other values keep their bytes."""
    if read_fields(body).model == model:
        return body
    members = _decode(_members, body)
    members["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(members)


def _decode(decoder: msgspec.json.Decoder[_T], body: bytes) -> _T:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as exc:
        raise InvalidRequestError(f"The request body must be a JSON object: {exc}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise InvalidRequestError(f"The request body is not valid JSON: {exc}.") from None
    except RecursionError:
        raise InvalidRequestError("The request body is nested too deeply.") from None


# Errors

_ADDRESS = re.compile(r"https?://(?:\[[^\]\s]*\]|[^\s/:'\"]*)(?::\d+)?(?:/[^\s:'\"]*)?")


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """How an error is told to a client."""

    status: int
    body: bytes
    """OpenAI's error object as JSON."""
    retry_after: int | None
    """Seconds for the `Retry-After` header."""

    @property
    def headers(self) -> Headers:
        """The answer's header pairs."""
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(self.body)).encode())]
        if self.retry_after is not None:
            headers.append((b"retry-after", str(self.retry_after).encode()))
        return headers


def error_answer(
    status: int, message: str, kind: str, code: str | None, *, param: str | None = None, retry_after: float | None = None
) -> ErrorAnswer:
    """Put an error into OpenAI's shape. `retry_after` is in seconds."""
    body = msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})
    return ErrorAnswer(status, body, None if retry_after is None else max(1, math.ceil(retry_after)))


def describe(exc: LLMuxError) -> ErrorAnswer:
    """Choose status, type and code for an error: the one place where that is done."""
    text = _for_clients(str(exc))
    match exc:
        case UnknownModelError():
            return error_answer(404, text, "invalid_request_error", "model_not_found", param="model")
        case BodyTooLargeError():
            return error_answer(413, text, "invalid_request_error", "request_too_large")
        case BodyTimeoutError():
            return error_answer(408, text, "invalid_request_error", "request_timeout")
        case EncodedBodyError():
            return error_answer(415, text, "invalid_request_error", "unsupported_content_encoding")
        case HeadersTooLargeError():
            return error_answer(431, text, "invalid_request_error", "headers_too_large")
        case BuffersFullError():
            return error_answer(503, text, "server_error", "buffers_full", retry_after=exc.retry_after)
        case InvalidRequestError():
            return error_answer(400, text, "invalid_request_error", None, param=exc.param)
        case QueueFullError():
            return error_answer(429, text, "rate_limit_error", "rate_limit_exceeded", retry_after=exc.retry_after)
        case QueueTimeoutError():
            return error_answer(504, text, "server_error", "model_queue_timeout", retry_after=exc.retry_after)
        case SwitchError():
            return error_answer(503, text, "server_error", "model_switch_failed", retry_after=exc.retry_after)
        case InterruptedRequestError():
            return error_answer(503, text, "server_error", "request_interrupted", retry_after=exc.retry_after)
        case UpstreamError():
            return error_answer(502, text, "server_error", "upstream_error")
        case _:
            return error_answer(500, text, "server_error", "internal_error")


def _for_clients(message: str) -> str:
    """Leave out what is for the log only: addresses of servers, and lines that a process wrote."""
    first, cut, _ = message.partition("\n")
    if cut:
        first = first.removesuffix(":") + " are in the gateway's log."
    return _ADDRESS.sub("the server", first)


def error_event(exc: LLMuxError) -> bytes:
    """Return the server-sent event that tells of an error in the middle of a stream."""
    return b"data: " + describe(exc).body + b"\n\n"


# Headers


def relayed_request_headers(headers: Headers) -> Headers:
    """Drop what belongs to the client's connection; host and length are set anew for the backend."""
    return [*_without(headers, _NOT_SENT_UP), (b"accept-encoding", b"identity")]


def relayed_response_headers(headers: Headers) -> Headers:
    """Drop what belongs to the backend's connection, and what the gateway's own server sets."""
    chunked = any(name.lower() == b"transfer-encoding" for name, _ in headers)
    # By RFC 9112 a length beside it does not count.
    return _without(headers, _NOT_SENT_DOWN | {b"content-length"} if chunked else _NOT_SENT_DOWN)


def content_length(headers: Headers) -> int | None:
    """Return how many bytes of body the headers announce, `None` if they do not say."""
    for name, value in headers:
        if name.lower() == b"content-length" and value.isdigit():
            return int(value)
    return None


def _without(headers: Headers, dropped: frozenset[bytes]) -> Headers:
    kept = [(lower, value) for name, value in headers if (lower := name.lower()) not in dropped]
    for name, value in headers:
        if name.lower() == b"connection":
            named = {token.strip().lower() for token in value.split(b",")}
            kept = [pair for pair in kept if pair[0] not in named]
    return kept


# Server-sent events

_EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_ABORTED = re.compile(rb'"finish_reason"\s*:\s*"abort"')
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"(?!abort")')
_DONE = re.compile(rb"^data:\s*\[DONE\]", re.MULTILINE)
_SAYS_ABORTED = frozenset({"/v1/chat/completions", "/v1/completions"})


def split_events(data: bytes) -> tuple[bytes, bytes]:
    """Split `data` behind its last complete event. An error can then be told between events, not in the middle of one."""
    if data.endswith((b"\n\n", b"\r\n\r\n")):
        return data, b""
    end = 0
    for found in _EVENT_END.finditer(data):
        end = found.end()
    return data[:end], data[end:]


def is_done(events: bytes) -> bool:
    """Say whether whole events end with the one that ends a stream of OpenAI's."""
    return events.endswith((b"data: [DONE]\n\n", b"data: [DONE]\r\n\r\n"))


class InterruptedAnswer:
    """Tells what an interrupted request was answered from what it would have been answered.

    A server that is put to sleep ends its running requests with status 200. Chat and completions mostly say so, by
    `finish_reason: "abort"`; a request that had not got its first token yet ends without any `finish_reason`; the answers
    of other routes cannot be told from whole ones (`/v1/responses` says `completed`), so none of them is believed.
    """

    def __init__(self, route: str, request: bytes) -> None:
        self._believable = route in _SAYS_ABORTED
        self._request = request
        self._finished = 0

    def note(self, events: bytes) -> None:
        """Take note of further whole events of a stream, also before the interruption."""
        if self._believable:
            self._finished += len(_FINISHED.findall(events))

    @property
    def is_finished(self) -> bool:
        """Whether every choice of the stream has said that it is finished."""
        return self._believable and self._finished >= _choices(self._request)

    def cut_at(self, events: bytes) -> int | None:
        """Find where, in events that were noted, the part begins that must not reach the client."""
        if not self._believable:
            return 0
        found = _ABORTED.search(events)
        if found is None and not self.is_finished:
            found = _DONE.search(events)
        if found is None:
            return None
        ends = [end.end() for end in _EVENT_END.finditer(events, 0, found.start())]
        return ends[-1] if ends else 0

    def is_whole(self, body: bytes) -> bool:
        """Say whether a plain answer is what the client asked for."""
        finished = len(_FINISHED.findall(body))
        return self._believable and _ABORTED.search(body) is None and finished >= _choices(self._request)


def _choices(request: bytes) -> int:
    """How many choices a request asks for: `n` for each of its prompts."""
    fields = _decode(_choice_fields, request)
    n = fields.n if isinstance(fields.n, int) else 1
    prompts = fields.prompt if isinstance(fields.prompt, list) else [fields.prompt]
    # A list of numbers is one prompt, in tokens.
    return n if all(isinstance(token, int) for token in prompts) else n * len(prompts)
