"""Switching around a gateway of your own. Run it with `uvicorn --app-dir examples middleware_app:app`.

The gateway below forwards by itself. The middleware makes sure that the model is awake from before the gateway sees the
request until it has sent its last byte.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from llmux_asgi import LLMuxMiddleware, ModelSwitcher, load_config

config = load_config(Path(__file__).with_name("llmux.yaml"))
switcher = ModelSwitcher.from_config(config)
client = httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None, keepalive_expiry=2))


async def chat(request: Request) -> Response:
    lease = request.scope["llmux.lease"]  # the model is awake for as long as this is held
    body = await request.json() | {"model": lease.model}  # an alias has become the configured name
    url = f"{config.models[lease.model].url}/v1/chat/completions"
    try:
        answer = await client.send(client.build_request("POST", url, json=body), stream=True)
    except httpx.HTTPError as exc:
        lease.distrust()  # have every server asked for its state before the next request
        return JSONResponse({"error": {"message": f"The model's server failed: {exc!r}"}}, 502)

    async def relay() -> AsyncIterator[bytes]:
        try:
            async for chunk in answer.aiter_raw():
                yield chunk
        finally:
            await answer.aclose()

    return StreamingResponse(relay(), answer.status_code, media_type=answer.headers["content-type"])


async def health(request: Request) -> PlainTextResponse:
    return PlainTextResponse("ok")  # not among the middleware's paths: never waits for a model


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    yield
    await switcher.aclose()
    await client.aclose()


gateway = Starlette(
    routes=[Route("/v1/chat/completions", chat, methods=["POST"]), Route("/health", health)],
    lifespan=lifespan,
)
app = LLMuxMiddleware(gateway, switcher)
