"""The gateway in a Starlette app. Run it with `uvicorn --app-dir examples starlette_app:app`."""

from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from llmux_asgi import LLMuxApp

llm = LLMuxApp(Path(__file__).with_name("llmux.yaml"))


async def hello(request: Request) -> PlainTextResponse:
    return PlainTextResponse("The host's own routes stay as they are.")


app = Starlette(
    routes=[Route("/", hello), Mount("/llm", app=llm)],
    lifespan=llm.lifespan,  # optional: closes connections when the host stops
)
