"""Which model made which response: the routes that fetch or cancel one by its id name no model.

It is remembered in this process only, for as long as there is room; a server keeps its responses no longer than its process
runs. A client may name the model itself, see `llmux_asgi.app`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ._openai import split_events
from ._proxy import SCOPE_ADDRESS, SCOPE_LEASE
from ._routes import RESPONSES, is_id

__all__ = ["ResponseModels"]

_LONGEST = 4 << 20
"""Bytes of an answer, or of a stream's first event, that are kept to find its id in."""


class _Response(msgspec.Struct):
    id: str


class _Created(msgspec.Struct):
    response: _Response


_response = msgspec.json.Decoder(_Response)
_created = msgspec.json.Decoder(_Created)


class ResponseModels:
    """An ASGI app between the middleware and the relay that remembers the ids of the last `most` responses."""

    def __init__(self, app: ASGIApp, *, most: int = 10_000) -> None:
        self._app = app
        self._most = most
        self._models: OrderedDict[str, str] = OrderedDict()

    def get(self, response: str) -> str | None:
        """Return the model that made a response, `None` if it is not known."""
        if response in self._models:
            self._models.move_to_end(response)
        return self._models.get(response)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on, and note the id of its answer, before the client has it."""
        if scope[SCOPE_ADDRESS].path == RESPONSES:
            send = self._noting(scope[SCOPE_LEASE].model, send)
        return self._app(scope, receive, send)

    def _noting(self, model: str, send: Send) -> Send:
        reader: _IdReader | None = None

        async def note(message: Message) -> None:
            nonlocal reader
            if message["type"] == "http.response.start":
                reader = _IdReader(message)
            elif reader is not None and (found := reader.feed(message)) is not None:
                reader = None
                self._remember(found, model)
            await send(message)

        return note

    def _remember(self, response: str, model: str) -> None:
        if not is_id(response):
            return
        self._models[response] = model
        self._models.move_to_end(response)
        if len(self._models) > self._most:
            self._models.popitem(last=False)


class _IdReader:
    """Finds the id in an answer: in the JSON, or in the first event of a stream."""

    def __init__(self, start: Message) -> None:
        kinds = [value for name, value in start["headers"] if name == b"content-type"]
        self._streams = bool(kinds) and kinds[0].startswith(b"text/event-stream")
        self._data: bytes | None = b"" if start["status"] == 200 else None

    def feed(self, message: Message) -> str | None:
        """Read on. Returns the id, once, when it is there."""
        if self._data is None:
            return None
        self._data += message.get("body", b"")
        events = split_events(self._data)[0] if self._streams else b""
        over = bool(events) or not message.get("more_body", False)
        if not over:
            if len(self._data) > _LONGEST:
                self._data = None
            return None
        data, self._data = self._data, None
        try:
            return _created.decode(_data_of(events)).response.id if self._streams else _response.decode(data).id
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None  # an error, or another server's idea of a response


def _data_of(events: bytes) -> bytes:
    """The data of the first event that has any."""
    return next((line[5:] for line in events.splitlines() if line.startswith(b"data:")), b"")
