"""OpenAI's API as the gateway touches it: headers, server-sent events. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from ._json_body import decode
from .exceptions import InvalidRequestError

__all__ = [
    "PRIORITY_HEADER",
    "AnswerHead",
    "Headers",
    "InterruptedAnswer",
    "is_done",
    "relayed_request_headers",
    "split_events",
    "without_credentials",
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
_NOT_SENT_UP = _HOP_BY_HOP | {b"host", b"content-length", b"expect", b"accept-encoding", b"x-llmux-model", PRIORITY_HEADER}
_CREDENTIALS = frozenset({b"authorization", b"x-api-key", b"api-key", b"cookie"})
# The ASGI server of the gateway writes its own date and server.
_NOT_SENT_DOWN = _HOP_BY_HOP | {b"date", b"server"}
_READ_OR_DROPPED = _NOT_SENT_DOWN | {b"content-length", b"content-type", b"content-encoding"}


# Headers


def relayed_request_headers(headers: Headers, authorization: bytes | None = None) -> Headers:
    """Drop what belongs to the client's connection; host and length are set anew for the backend.

    The names are in lower case already, as ASGI has them. `authorization` is the backend's own, in place of any credential of
    the client's.
    """
    kept: Headers = []
    named: set[bytes] = set()
    for pair in headers:
        name = pair[0]
        if name not in _NOT_SENT_UP:
            kept.append(pair)
        elif name == b"connection" and pair[1] not in (b"keep-alive", b"close"):
            named |= _tokens(pair[1])
    if named:
        kept = [pair for pair in kept if pair[0] not in named]
    kept.append((b"accept-encoding", b"identity"))
    if authorization is not None:
        kept = without_credentials(kept)
        kept.append((b"authorization", authorization))
    return kept


def without_credentials(headers: Headers) -> Headers:
    """Drop what may prove to somebody who the client is."""
    return [pair for pair in headers if pair[0].lower() not in _CREDENTIALS]


@dataclass(slots=True)
class AnswerHead:
    """What the headers of a server's answer say."""

    headers: Headers
    """The pairs that are relayed."""
    length: int | None
    """How many bytes of body they announce."""
    is_events: bool
    """Whether the body is server-sent events that can be read as they come."""

    @classmethod
    def of(cls, headers: Headers) -> AnswerHead:
        """Look through a server's headers. Drops what belongs to its connection, and what the gateway's own server sets."""
        kept: Headers = []
        length: int | None = None
        events = chunked = encoded = False
        named: set[bytes] = set()
        for raw, value in headers:
            name = raw.lower()
            if name not in _READ_OR_DROPPED:
                kept.append((name, value))
            elif name in _NOT_SENT_DOWN:
                if name == b"transfer-encoding":
                    chunked = True
                elif name == b"connection":
                    named |= _tokens(value)
            else:
                kept.append((name, value))
                if name == b"content-length":
                    length = int(value) if length is None and value.isdigit() else length
                elif name == b"content-type":
                    events = value.startswith(b"text/event-stream")
                else:
                    encoded = value != b"identity"  # although it was asked not to
        if chunked:  # by RFC 9112 a length beside it does not count
            named.add(b"content-length")
        if named:
            kept = [pair for pair in kept if pair[0] not in named]
        return cls(kept, None if chunked else length, events and not encoded)


def is_event_stream(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Say whether an answer with these headers is a stream of server-sent events."""
    return any(name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers)


def _tokens(value: bytes) -> set[bytes]:
    """Return the header names that a `Connection` header lists."""
    return {token.strip().lower() for token in value.split(b",")} - {b"keep-alive", b"close"}


# Server-sent events

_EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_ABORTED = re.compile(rb'"finish_reason"\s*:\s*"abort"')
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"(?!abort")')
_DONE = re.compile(rb"^data:\s*\[DONE\]", re.MULTILINE)
_SMALL = 64 * 1024
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
        self._asked: float | None = None
        if len(request) <= _SMALL:  # a larger one is read only if it must be
            self._asked = _choices(request) if self._believable else 0
            self._request = b""  # a stream that may take minutes need not hold it
        self._finished = 0

    def note(self, events: bytes) -> None:
        """Take note of further whole events of a stream, also before the interruption."""
        if self._believable:
            self._finished += len(_FINISHED.findall(events))

    @property
    def is_finished(self) -> bool:
        """Whether every choice of the stream has said that it is finished."""
        return self._believable and self._finished >= self._choices()

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
        return self._believable and _ABORTED.search(body) is None and finished >= self._choices()

    def _choices(self) -> float:
        return _choices(self._request) if self._asked is None else self._asked


class _ChoiceFields(msgspec.Struct):
    n: object = 1
    prompt: object = None


def _choices(request: bytes) -> float:
    """How many choices a request asks for: `n` for each of its prompts. Infinitely many if it cannot be read here."""
    try:
        fields = decode(request, _ChoiceFields)
    except InvalidRequestError:  # other parsers take more, half a surrogate for one
        return math.inf
    n = fields.n if isinstance(fields.n, int) else 1
    prompts = fields.prompt if isinstance(fields.prompt, list) else [fields.prompt]
    # A list of numbers is one prompt, in tokens.
    return n if all(isinstance(token, int) for token in prompts) else n * len(prompts)
