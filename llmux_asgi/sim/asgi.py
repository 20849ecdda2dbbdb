"""Answering in raw ASGI: bodies in, JSON and errors out, in vLLM's shapes."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.types import Receive, Send

__all__ = ["HttpError", "read_body", "send_body", "send_error", "send_json", "wait_until_gone"]

_PHRASES = {400: "Bad Request", 404: "Not Found", 500: "InternalServerError", 503: "ServiceUnavailableError"}


class HttpError(Exception):
    """Becomes an error object with `status`; `kind` is its `type`, `param` the offending field."""

    def __init__(self, status: int, message: str, *, kind: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.kind = kind or _PHRASES.get(status, "InternalServerError")

    def body(self) -> dict[str, Any]:
        """The error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}}


async def read_body(receive: Receive) -> bytes:
    """The whole request body. Raises `HttpError` when the client leaves before its end."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise HttpError(499, "client disconnected")
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def wait_until_gone(receive: Receive) -> None:
    """Wait until the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_body(send: Send, status: int, content_type: bytes, body: bytes) -> None:
    """A whole answer."""
    headers = [(b"content-length", str(len(body)).encode())]
    if content_type:
        headers.append((b"content-type", content_type))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def send_json(send: Send, content: object, status: int = 200) -> None:
    """A JSON answer."""
    await send_body(send, status, b"application/json", msgspec.json.encode(content))


async def send_error(send: Send, error: HttpError) -> None:
    """An error object. Raises `error` again if its status is 500: the server then closes the connection.

    So does vLLM, whose error handler for unforeseen exceptions answers and re-raises: the connection ends without a
    `connection: close`, and a client that reuses it finds it reset.
    """
    await send_json(send, error.body(), error.status)
    if error.status == 500:
        raise error
