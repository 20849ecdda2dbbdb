"""The gateway in a FastAPI app. Run it with `uvicorn --app-dir examples fastapi_app:app`."""

from pathlib import Path

from fastapi import FastAPI

from llmux_asgi import LLMuxApp

llm = LLMuxApp(Path(__file__).with_name("llmux.yaml"))

app = FastAPI(lifespan=llm.lifespan)  # optional: closes connections when the host stops
app.mount("/llm", llm)


@app.get("/")
async def hello() -> str:
    return "The host's own routes stay as they are."
