"""The users of a Starlette app as the clients of the gateway: `uvicorn --app-dir examples access_starlette:app`."""

from __future__ import annotations

import hmac
import os
from pathlib import Path

from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, SimpleUser
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import HTTPConnection
from starlette.routing import Mount
from starlette.types import Scope

from llmux_asgi import Identity, LLMuxApp

TOKEN = os.environ.get("STAFF_TOKEN", "staff-token-of-the-example")


class StaffBackend(AuthenticationBackend):
    """Yours: sessions, JSON web tokens, LDAP."""

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser] | None:
        given = conn.headers.get("authorization", "")
        if hmac.compare_digest(given.encode(), f"Bearer {TOKEN}".encode()):
            return AuthCredentials(["authenticated"]), SimpleUser("staff")
        return None


# --8<-- [start:identify]
def identify(scope: Scope) -> Identity | None:
    user = scope["user"]  # AuthenticationMiddleware has put it there
    if not user.is_authenticated:
        return None  # 401, unless it has one of the configured keys
    return Identity(user.display_name, models=("qwen",), requests_per_minute=60, max_concurrent=4)


llm = LLMuxApp(Path(__file__).with_name("llmux.yaml"), identify=identify)
app = Starlette(
    routes=[Mount("/llm", app=llm)],
    middleware=[Middleware(AuthenticationMiddleware, backend=StaffBackend())],
    lifespan=llm.lifespan,
)
# --8<-- [end:identify]
