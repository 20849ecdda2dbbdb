"""The admin API as an ASGI app: who asks, what is refused, how errors are told."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Router
from starlette.types import Message, Receive, Scope, Send

from .._errors import describe_to_operators, headers_before_the_body
from .._intake import Intake, Upload
from ..access import KeyRing, find_credential
from ..config import AdminConfig
from ..exceptions import (
    AuthenticationError,
    InvalidRequestError,
    LLMuxError,
    MethodNotAllowedError,
    UnknownRouteError,
)
from ..middleware import route_path
from ._api import NO_STORE, SCOPE_OPERATOR, AdminApi
from ._events import EventStreams
from ._gateway import Gateway
from ._static import StaticFiles

__all__ = ["AdminApp"]

logger = logging.getLogger("llmux_asgi.admin")

_LARGEST_BODY = 64 * 1024
"""Bytes. No call has a body that is read; what comes with one is taken in and dropped."""
_ASGI = ("type", "asgi", "http_version", "method", "scheme", "query_string", "headers", "client", "server", "extensions")
_NO_KEY = "No admin key came with the request. Send it as authorization: Bearer KEY, or as x-api-key: KEY."


class AdminApp:
    """The admin API of a gateway and its page, below `config.prefix`. Raises `ConfigError` if a key cannot be read."""

    def __init__(self, gateway: Gateway, config: AdminConfig) -> None:
        self._gateway = gateway
        self._prefix = config.prefix
        self._ring = KeyRing("admin.keys", config.keys)
        self._streams = EventStreams(gateway)
        self._files = StaticFiles()
        self._router = Router(AdminApi(gateway, self._streams).routes(), redirect_slashes=False, default=_not_found)

    def prepare(self, config: AdminConfig) -> Callable[[], None]:
        """Read the keys of another configuration. Raises `ConfigError`. What is returned changes over to them."""
        ring = KeyRing("admin.keys", config.keys)

        def change_over() -> None:
            self._ring = ring

        return change_over

    def reload_keys(self) -> None:
        """Read the keys anew. Raises `ConfigError`, and goes on with those that it had."""
        self._ring.reload()

    def end_streams(self) -> None:
        """Have the event streams end, because the gateway does: they have no end of their own. Does not wait."""
        self._streams.end()

    def owns(self, scope: Scope) -> bool:
        """Say whether an ASGI connection is the admin API's."""
        path: str = scope["path"]
        # First what is quick: each request of a client is asked about. Litestar may take the first slash away.
        if self._prefix[1:] not in path or scope["type"] != "http":
            return False
        below = route_path(scope)
        return below.startswith(self._prefix) and below[len(self._prefix) : len(self._prefix) + 1] in ("", "/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an HTTP request that it owns."""
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            if scope["method"] == "HEAD" and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._serve(scope, receive, watched)
        except LLMuxError as exc:
            if started:
                raise
            await _refuse(scope, watched, exc)
        except Exception:
            # Whatever it is, it is a bug, and operators are to get JSON all the same.
            if started:
                raise
            logger.exception("the admin API met an unexpected error")
            await _refuse(scope, watched, LLMuxError("The gateway met an unexpected error. It is in its log."))

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        limits = self._gateway.config.limits
        intake = Intake(limits.max_headers, limits.body_timeout, limits.max_buffered)
        intake.check(scope, dict(scope["headers"]))
        path = route_path(scope)[len(self._prefix) :]
        if path != "/api" and not path.startswith("/api/"):
            await self._serve_page(path, scope, receive, send)
            return
        operator = self._authenticate(scope)
        await _drop_body(scope, Upload(intake, receive))
        # Nothing that a host has put there: the handlers of errors of a Starlette around it would answer in their own way.
        inner: Scope = {name: scope[name] for name in _ASGI if name in scope}
        inner.update(path=path, root_path="", app=self, **{SCOPE_OPERATOR: operator})
        try:
            await self._router(inner, receive, send)
        except HTTPException as exc:
            allowed = (exc.headers or {}).get("Allow", "").split(", ")
            raise MethodNotAllowedError(scope["method"], path, sorted(allowed)) from None

    def _authenticate(self, scope: Scope) -> str:
        """Return the name of the operator. Raises `AuthenticationError`."""
        key = find_credential(scope["headers"])
        if key is None:
            raise AuthenticationError(_NO_KEY)
        self._ring.refresh(time.monotonic())
        identity = self._ring.find(key)
        if identity is None:
            raise AuthenticationError("The admin key is not valid.")
        if self._gateway.is_client_key(key):
            raise AuthenticationError("The key is one of the clients' too, so it opens no admin API: give operators their own.")
        return identity.name

    async def _serve_page(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        name = path.removeprefix("/static/") if path.startswith("/static/") else None
        answer = None
        if path in ("", "/") or name:
            if scope["method"] not in ("GET", "HEAD"):
                raise MethodNotAllowedError(scope["method"], path or "/", ("GET", "HEAD"))
            answer = self._files.answer(name or "", Request(scope))
        if answer is None:
            raise UnknownRouteError(scope["method"], self._prefix + path, "here its page only, and below /api what needs a key")
        if name is None and not _asks_for_folder(scope):
            # Relative: whatever prefix a host mounts it at, or a proxy strips.
            answer.status_code, answer.body = 302, b""
            answer.headers["location"] = self._prefix.rpartition("/")[2] + "/"
            answer.headers["content-length"] = "0"
        await answer(scope, receive, send)


def _asks_for_folder(scope: Scope) -> bool:
    """Say whether the client's own path ends in a slash, without which a browser resolves the page's links wrongly.

    Litestar adds one to `path`; `raw_path` is as the client has sent it.
    """
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    return raw.partition(b"?")[0].endswith(b"/")


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    raise UnknownRouteError(scope["method"], scope["path"], "here what GET /api/openapi.json describes")


async def _refuse(scope: Scope, send: Any, exc: LLMuxError) -> None:
    if isinstance(exc, AuthenticationError):
        client = scope.get("client")
        logger.info("refused a request to the admin API from %s: %s", client[0] if client else "an unknown address", exc)
    answer = describe_to_operators(exc)
    more = [(name.encode(), value.encode()) for name, value in NO_STORE.items()]
    headers = [*headers_before_the_body(answer, scope), *more]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


async def _drop_body(scope: Scope, upload: Upload) -> None:
    announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    try:
        if await upload.read(_LARGEST_BODY, announced) is None:
            raise InvalidRequestError("The client left before its request was complete.")
    finally:
        upload.close()
