"""A FastAPI app's dependency as the gateway's authentication: `uvicorn --app-dir examples access_fastapi:app`."""

from __future__ import annotations

import hmac
import os
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import Scope

from llmux_asgi import Identity, LLMuxApp

TOKEN = os.environ.get("STAFF_TOKEN", "staff-token-of-the-example")
bearer = HTTPBearer()


# --8<-- [start:identify]
async def current_user(credentials: Annotated[HTTPAuthorizationCredentials, Depends(bearer)]) -> str:
    """The dependency that the app's own routes have too."""
    if not hmac.compare_digest(credentials.credentials.encode(), TOKEN.encode()):
        raise HTTPException(403, "Who are you?")
    return "staff"


async def identify(scope: Scope) -> Identity | None:
    if scope["type"] != "http":
        return None
    credentials = await bearer(Request(scope))  # FastAPI runs no dependencies for what is mounted: this does it
    if credentials is None:
        return None
    return Identity(await current_user(credentials), models=("qwen",), tokens_per_minute=100_000)


llm = LLMuxApp(Path(__file__).with_name("llmux.yaml"), identify=identify)
app = FastAPI(lifespan=llm.lifespan)
app.mount("/llm", llm)


@app.get("/me")
async def me(user: Annotated[str, Depends(current_user)]) -> str:
    return user


# --8<-- [end:identify]
