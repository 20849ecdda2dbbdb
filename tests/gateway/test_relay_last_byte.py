"""What becomes of the last byte's `send` when the ASGI server says, before it has returned, that the exchange is over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from llmux_asgi import LLMuxApp
from tests.support.serve import serve
from tests.support.upstream import Exchange, ScriptedServer

pytestmark = pytest.mark.anyio


async def answer(exchange: Exchange) -> None:
    if b'"stream":true' in exchange.body:
        await exchange.start()
        await exchange.chunk(b"data: one\n\ndata: [DONE]\n\n", last=True)
    else:
        await exchange.start("application/json", 200, (b"content-length", b"2"))
        await exchange.chunk(b"{}", last=True)


@pytest.fixture
def server() -> Iterator[str]:
    with serve(ScriptedServer(script=answer)) as url:
        yield url


@pytest.mark.parametrize("stream", [b"true", b"false"])
async def test_the_send_of_the_last_byte_is_not_cancelled(server: str, stream: bytes) -> None:
    """hypercorn tells `receive` of the end first, and then starts the connection's idle timer: cancelled there, it loses it."""
    llm = LLMuxApp({"models": {"a": {"url": server}}})
    over = anyio.Event()
    asked: list[bool] = []
    returned: list[str] = []

    async def receive() -> dict[str, Any]:
        if not asked:
            asked.append(True)
            return {"type": "http.request", "body": b'{"model":"a","stream":%b}' % stream, "more_body": False}
        await over.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            over.set()
            for _ in range(10):
                await anyio.lowlevel.checkpoint()
            returned.append("the last send")

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    with anyio.fail_after(10):
        async with llm.lifespan():
            await llm(scope, receive, send)
    assert returned == ["the last send"]
