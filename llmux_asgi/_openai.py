"""OpenAI's API as the gateway touches it: headers, server-sent events. Pure."""

from __future__ import annotations

import re

import msgspec

from ._json_body import decode

__all__ = [
    "PRIORITY_HEADER",
    "Headers",
    "InterruptedAnswer",
    "content_length",
    "is_done",
    "relayed_request_headers",
    "relayed_response_headers",
    "split_events",
]

Headers = list[tuple[bytes, bytes]]

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
_NOT_SENT_UP = _HOP_BY_HOP | {b"host", b"content-length", b"expect", b"accept-encoding", PRIORITY_HEADER}
# The ASGI server of the gateway writes its own date and server.
_NOT_SENT_DOWN = _HOP_BY_HOP | {b"date", b"server"}


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


class _ChoiceFields(msgspec.Struct):
    n: object = 1
    prompt: object = None


def _choices(request: bytes) -> int:
    """How many choices a request asks for: `n` for each of its prompts."""
    fields = decode(request, _ChoiceFields)
    n = fields.n if isinstance(fields.n, int) else 1
    prompts = fields.prompt if isinstance(fields.prompt, list) else [fields.prompt]
    # A list of numbers is one prompt, in tokens.
    return n if all(isinstance(token, int) for token in prompts) else n * len(prompts)
