"""The gateway in a Litestar app. Run it with `uvicorn --app-dir examples litestar_app:app`."""

from pathlib import Path

from litestar import Litestar, asgi, get

from llmux_asgi import LLMuxApp

llm = LLMuxApp(Path(__file__).with_name("llmux.yaml"))


@get("/")
async def hello() -> str:
    return "The host's own routes stay as they are."


app = Litestar(
    route_handlers=[hello, asgi("/llm", is_mount=True, copy_scope=True)(llm)],
    lifespan=[llm.lifespan],  # optional: closes connections when the host stops
)
