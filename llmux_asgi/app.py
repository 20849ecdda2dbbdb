"""The gateway as an app: mount it, or run it by itself."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self

import anyio
import msgspec
from starlette.types import Receive, Scope, Send

from ._memory import MemoryGauge
from ._openai import INFERENCE_ROUTES, ErrorAnswer, Headers, describe, error_answer
from ._proxy import Proxy
from ._spawn import beside
from .backends import with_ports
from .config import ConfigSource, load_config
from .exceptions import UnknownModelError, quoted
from .middleware import LLMuxMiddleware, route_path
from .policy import SwitchPolicy
from .switcher import ModelSwitcher
from .telemetry import Telemetry

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

__all__ = ["LLMuxApp"]

_MODELS = "/v1/models"


class LLMuxApp:
    """An ASGI app that speaks OpenAI's API for all models of `config` and keeps one of them awake.

        app.mount("/llm", LLMuxApp("llmux.yaml"))

    `config` is a `Config`, a dict, or the path of a YAML, TOML or JSON file; `ConfigError` says what is wrong with it.
    `policy` and `memory` (what reads the GPU) replace those of the configuration.
    The providers are OpenTelemetry's, by default the global ones.

    A mounted app's lifespan is not run by its host. It is not needed for serving: connections open when they are first
    used. A host that wants them closed at its end enters `lifespan`: `Starlette(lifespan=llm.lifespan, …)`.
    """

    def __init__(
        self,
        config: ConfigSource,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        policy: SwitchPolicy | None = None,
        memory: MemoryGauge | None = None,
    ) -> None:
        self.config = with_ports(load_config(config))
        self.switcher = ModelSwitcher.from_config(
            self.config, policy=policy, memory=memory, telemetry=Telemetry(tracer_provider, meter_provider)
        )
        self._proxy = Proxy(
            self.config.models,
            heartbeat=self.config.limits.heartbeat,
            max_frozen=self.switcher.max_frozen,
            write_timeout=self.config.limits.write_timeout,
        )
        self._inference = LLMuxMiddleware(
            self._proxy,
            self.switcher,
            max_body=self.config.limits.max_body,
            max_headers=self.config.limits.max_headers,
            max_buffered=self.config.limits.max_buffered,
            body_timeout=self.config.limits.body_timeout,
            request_log=self.config.request_log,
        )
        self._created = int(time.time())

    def __deepcopy__(self, memo: object) -> Self:
        """Return this very object: Litestar's routers copy what they mount, and the servers have one owner."""
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        match scope["type"]:
            case "http":
                await self._serve(scope, receive, send)
            case "lifespan":
                await _run_lifespan(self.lifespan, scope, receive, send)
            case "websocket":
                await receive()
                await send({"type": "websocket.close", "code": 1000, "reason": "no websocket is served here"})

    @asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """Preload models and watch the active one while in the block; on leaving it, `aclose`. For the host's `lifespan`.

        With `drain: preempt` raises `BackendUnsupportedError` if a server that answers cannot freeze its requests.
        """
        try:
            if self.config.policy.drain == "preempt":
                await self.switcher.require_freezing()
            async with beside(self._watch, "llmux_asgi watch"), beside(self._preload, "llmux_asgi preload"):
                yield
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Answer new and waiting requests with 503, give running ones `limits.shutdown` seconds, end all processes.

        A switch step that is on the wire is waited for. Connections are closed.
        """
        try:
            await self.switcher.aclose(drain=self.config.limits.shutdown)
        finally:
            await self._proxy.aclose()

    async def _watch(self) -> None:
        while (interval := self.config.limits.health_interval) is not None:
            await anyio.sleep(interval)
            await self.switcher.check()

    async def _preload(self) -> None:
        # The first of the configuration comes last, and stays.
        await self.switcher.preload([name for name, model in reversed(self.config.models.items()) if model.preload])

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = route_path(scope), scope["method"]
        if path in INFERENCE_ROUTES:
            if method == "POST":
                await self._inference(scope, receive, send)
            else:
                await _refuse(send, _not_allowed(method, path), [(b"allow", b"POST")])
        elif path == _MODELS or path.startswith(_MODELS + "/"):
            if method in ("GET", "HEAD"):
                await self._list_models(path.removeprefix(_MODELS).removeprefix("/"), send)
            else:
                await _refuse(send, _not_allowed(method, path), [(b"allow", b"GET, HEAD")])
        else:
            asked = f"{method[:20]} {quoted(path)}"
            message = f"Unknown request URL: {asked}. The gateway serves the inference routes of OpenAI's API only."
            await _refuse(send, error_answer(404, message, "invalid_request_error", "unknown_url"))

    async def _list_models(self, name: str, send: Send) -> None:
        cards = {
            model: {"id": model, "object": "model", "created": self._created, "owned_by": "llmux_asgi"}
            for model in self.switcher.models
        }
        if not name:
            await _answer_json(send, {"object": "list", "data": list(cards.values())})
        elif (model := self.switcher.resolve(name)) is not None:
            await _answer_json(send, cards[model])
        else:
            await _refuse(send, describe(UnknownModelError(name)))


def _not_allowed(method: str, path: str) -> ErrorAnswer:
    return error_answer(405, f"Method {method[:20]} is not allowed for {path}.", "invalid_request_error", "method_not_allowed")


async def _answer_json(send: Send, content: object) -> None:
    body = msgspec.json.encode(content)
    headers: Headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _refuse(send: Send, answer: ErrorAnswer, headers: Headers | None = None) -> None:
    await send({"type": "http.response.start", "status": answer.status, "headers": [*answer.headers, *(headers or [])]})
    await send({"type": "http.response.body", "body": answer.body})


async def _run_lifespan(
    lifespan: Callable[[Any], Any], scope: Scope, receive: Receive, send: Callable[[dict[str, Any]], Awaitable[None]]
) -> None:
    await receive()
    async with lifespan(scope.get("app")):
        await send({"type": "lifespan.startup.complete"})
        await receive()
    await send({"type": "lifespan.shutdown.complete"})
