"""What one writes first: Starlette's classes, one `httpx.AsyncClient`, nothing set."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

__all__ = ["build"]

_NOT_RELAYED = ("connection", "transfer-encoding")


def build(upstream: str) -> Starlette:
    """A relay to the URL `upstream`."""
    client = httpx.AsyncClient(base_url=upstream)

    async def relay(request: Request) -> StreamingResponse:
        headers = [(name, value) for name, value in request.headers.raw if name != b"host"]
        sent = client.build_request("POST", request.url.path, headers=headers, content=request.stream())
        answer = await client.send(sent, stream=True)
        kept = {name: value for name, value in answer.headers.items() if name not in _NOT_RELAYED}
        return StreamingResponse(answer.aiter_raw(), answer.status_code, kept, background=BackgroundTask(answer.aclose))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    return Starlette(routes=[Route("/v1/chat/completions", relay, methods=["POST"])], lifespan=lifespan)
