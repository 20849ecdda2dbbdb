"""What the app answers by itself, in ASGI's messages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from ._errors import describe, headers_before_the_body
from ._openai import Headers
from ._routes import ErrorShape
from .exceptions import LLMuxError

__all__ = ["answer_json", "refuse", "run_lifespan"]


async def answer_json(send: Send, content: object) -> None:
    """Answer with JSON."""
    body = msgspec.json.encode(content)
    headers: Headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def refuse(scope: Scope, send: Send, exc: LLMuxError, shape: ErrorShape) -> None:
    """Answer with an error before the request's body was read."""
    answer = describe(exc, shape)
    headers = headers_before_the_body(answer, scope)
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


async def run_lifespan(
    lifespan: Callable[[Any], Any], scope: Scope, receive: Receive, send: Callable[[dict[str, Any]], Awaitable[None]]
) -> None:
    """Serve an ASGI lifespan by an async context manager."""
    await receive()
    async with lifespan(scope.get("app")):
        await send({"type": "lifespan.startup.complete"})
        await receive()
    await send({"type": "lifespan.shutdown.complete"})
