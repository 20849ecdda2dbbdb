"""The gateway as an app: mount it, or run it by itself."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import anyio
from starlette.types import Receive, Scope, Send

from ._answers import answer_json, refuse, run_lifespan
from ._memory import MemoryGauge
from ._notice import Notices
from ._parameters import Parameters
from ._proxy import Proxy
from ._realtime import Realtime, refuse_websocket
from ._request_log import RequestLog
from ._responses import ResponseModels
from ._routes import (
    Address,
    address_of,
    find_route,
    methods_of,
    model_in_query,
    response_id,
    shape_of,
    split_model_path,
)
from ._spawn import beside
from ._target import Target
from .access import SCOPE_GRANT, AccessControl, Grant, Identify
from .config import Config, ConfigSource, ReloadReport, Task, load_config
from .exceptions import (
    ConfigError,
    LLMuxError,
    MethodNotAllowedError,
    UnknownModelError,
    UnknownResponseError,
    UnknownRouteError,
)
from .middleware import MODEL_HEADER, LLMuxMiddleware, route_path
from .policy import SwitchPolicy
from .switcher import ModelSwitcher
from .telemetry import Telemetry
from .upstream import Upstream

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

    from .admin import AdminApp
    from .exposition import MetricsEndpoint

__all__ = ["LLMuxApp"]

_MODELS = "/v1/models"

logger = logging.getLogger(__name__)


class LLMuxApp:
    """An ASGI app that speaks OpenAI's API for all models of `config` and keeps one of them awake.

        app.mount("/llm", LLMuxApp("llmux.yaml"))

    `config` is a `Config`, a dict, or the path of a YAML, TOML or JSON file; `ConfigError` says what is wrong with it.
    `policy` and `memory` (what reads the GPU) replace those of the configuration.
    `upstream` is the HTTP client that carries the requests to the servers, by default an `Http1Upstream`. `identify` is
    the host's own authentication: called with the ASGI scope of each connection, it returns an `Identity`, or `None`; it may
    be async.
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
        upstream: Upstream | None = None,
        identify: Identify | None = None,
    ) -> None:
        # The host may change its working folder before the file is read again.
        self._source = Path(config).absolute() if isinstance(config, (str, os.PathLike)) else config
        given = load_config(config)
        self._metrics = _metrics_endpoint(given)
        exposition = self._metrics.provider if self._metrics is not None else None
        telemetry = Telemetry(tracer_provider, meter_provider, exposition=exposition)
        self.switcher = ModelSwitcher.from_config(given, policy=policy, memory=memory, telemetry=telemetry)
        self.config = self.switcher.reloader.config or given
        self._proxy = Proxy(
            self.config.models,
            upstream,
            heartbeat=self.config.limits.heartbeat,
            max_frozen=self.switcher.max_frozen,
            write_timeout=self.config.limits.write_timeout,
        )
        if self._metrics is not None:
            self._metrics.first_bytes = telemetry.first_bytes
            self._metrics.scrape(self._scraped, self._proxy.upstream)
        self._responses = ResponseModels(self._proxy)
        self._inference = LLMuxMiddleware(
            self._responses,
            self.switcher,
            max_body=self.config.limits.max_body,
            max_headers=self.config.limits.max_headers,
            max_buffered=self.config.limits.max_buffered,
            body_timeout=self.config.limits.body_timeout,
            request_log=self.config.request_log,
            timing_headers=self.config.timing_headers,
            tasks=_tasks(self.config),
            models=self.config.models,
            loading_notice=self.config.loading_notice,
            heartbeat=self.config.limits.heartbeat,
        )
        self._request_log = self.config.request_log
        self._identify = identify
        self._access = self._access_control(self.config)
        self._realtime = Realtime(
            self._inference,
            self._proxy.targets,
            max_message=self.config.limits.max_message,
            idle=self.config.limits.websocket_idle,
        )
        self._created = int(time.time())
        self._reloading: anyio.Lock | None = None
        self._reloaded = anyio.Event()
        self._targets = dict(self._proxy.targets)
        """The targets that the configuration says, where those in use may be of servers that are being replaced."""
        self.switcher.reloader.settled = self._retarget
        self._policy_name = type(policy).__name__ if policy is not None else None
        self._admin = _admin_app(self)
        self._guarded = any(each is not None for each in (self._access, self._admin, self._metrics))

    def __deepcopy__(self, memo: object) -> Self:
        """Return this very object: Litestar's routers copy what they mount, and the servers have one owner."""
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            await run_lifespan(self.lifespan, scope, receive, send)
        elif self._guarded:
            await self._guard(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    @property
    def policy_name(self) -> str:
        """What the policy is called: by the configuration, or the name of the class of one's own."""
        return self._policy_name or self.config.policy.name

    def is_client_key(self, key: str) -> bool:
        """Whether `key` is one of the clients' API keys."""
        return self._access is not None and self._access.knows(key)

    def reload_keys(self) -> None:
        """Read all API keys anew from environment and files. Raises `ConfigError`, and goes on with those it had.

        Files that change are read anew by themselves, within about a second.
        """
        if self._access is not None:
            self._access.reload()
        if self._admin is not None:
            self._admin.reload_keys()
        if self._metrics is not None:
            self._metrics.reload_keys()

    async def reload(self, config: ConfigSource | None = None) -> ReloadReport:
        """Go by another configuration from now on, without losing a request; `None`: what the app was built from, read anew.

        Raises `ConfigError` if it cannot be used, or not without a restart, and `BackendUnsupportedError` if it has `drain:
        preempt` and a server that answers cannot freeze its requests: nothing has changed then. Calls at the same time come
        one after the other. Servers that are replaced or removed go to sleep when their requests are over, which this does
        not wait for: see `switcher.statistics().unsettled`.
        """
        if self._reloading is None or not self._reloading.locked():
            self._reloading = anyio.Lock()  # one that was used in another event loop does not work in this one
        async with self._reloading:
            given = load_config(self._source if config is None else config)
            plan = self.switcher.reloader.plan(given)
            targets = self._proxy.targets_of(plan.config.models, self.switcher.max_frozen_with(plan.policy))
            change_over: list[Callable[[], None]] = []
            access = self._access
            if access is not None and (plan.config.access is not None or self._identify is not None):
                change_over.append(access.prepare(plan.config))
            else:
                access = self._access_control(plan.config)
            if self._admin is not None and plan.config.admin is not None:
                change_over.append(self._admin.prepare(plan.config.admin))
            await self.switcher.reloader.check(plan)
            # From here on nothing waits, and nothing fails.
            self.config, self._access, self._targets = plan.config, access, targets
            for change in change_over:
                change()
            self._guarded = any(each is not None for each in (self._access, self._admin, self._metrics))
            report = self.switcher.reloader.adopt(plan)
            self._go_by(plan.config)
            self._reloaded.set()
            logger.info(
                "the configuration was read anew: added %s, changed %s, removed %s, settings changed %s",
                *map(list, astuple(report)),
            )
            return report

    def _go_by(self, config: Config) -> None:
        """Take over the settings that are kept outside the switcher."""
        limits = config.limits
        self._proxy.heartbeat, self._proxy.write_timeout = limits.heartbeat, limits.write_timeout
        unsettled = self.switcher.statistics().unsettled
        self._proxy.targets.update({name: target for name, target in self._targets.items() if name not in unsettled})
        intake = self._inference.intake
        intake.max_headers, intake.max_buffered = limits.max_headers, limits.max_buffered
        intake.body_timeout, self._inference.max_body = limits.body_timeout, limits.max_body
        self._inference.tasks, self._inference.parameters = _tasks(config), Parameters.of(config.models)
        self._inference.timing_headers = config.timing_headers
        self._inference.notices = Notices(config.loading_notice, limits.heartbeat)
        if config.request_log != self._request_log:
            self._request_log = config.request_log
            self._inference.request_log = RequestLog(config.request_log) if config.request_log is not None else None
        self._realtime.max_message, self._realtime.idle = limits.max_message, limits.websocket_idle

    def _retarget(self, model: str) -> None:
        """A model's new server has come in, or the model is gone."""
        if model in self._targets:
            self._proxy.targets[model] = self._targets[model]
        else:
            self._proxy.targets.pop(model, None)

    def _access_control(self, config: Config) -> AccessControl | None:
        if config.access is None and self._identify is None:
            return None
        return AccessControl(config, self.switcher.resolve, self._identify)

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
            if self._admin is not None:
                self._admin.end_streams()
            await self._proxy.aclose()

    async def _watch(self) -> None:
        while True:
            self._reloaded = anyio.Event()
            with anyio.move_on_after(self.config.limits.health_interval) as pause:
                await self._reloaded.wait()
            if pause.cancelled_caught:
                await self.switcher.check()

    async def _preload(self) -> None:
        # The first of the configuration comes last, and stays.
        await self.switcher.preload([name for name, model in reversed(self.config.models.items()) if model.preload])

    async def _guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve what has to show a key, or is not for the clients."""
        if self._admin is not None and self._admin.owns(scope):
            await self._admin(scope, receive, send)
        elif self._metrics is not None and self._metrics.is_asked_for(scope):
            if self._metrics.has_key or self._access is None:
                await self._metrics(scope, receive, send)
            else:
                await self._access.serve(self._metrics, scope, receive, send)
        elif self._access is not None:
            await self._access.serve(self._serve, scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    def _scraped(self) -> dict[str, Target]:
        """The servers that tell metrics of their own. A router is not asked: it would load a model for it."""
        return {
            name: target
            for name, target in self._proxy.targets.items()
            if name in self.config.models and self.config.models[name].server in ("vllm", "sglang")
        }

    def _serve(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "websocket":
            return self._serve_websocket(scope, receive, send)
        path = route_path(scope)
        if scope["method"] == "POST" and (address := address_of(path)) is not None:
            return self._inference.serve(scope, receive, send, address)
        return self._serve_other(scope, receive, send, path)

    async def _serve_other(self, scope: Scope, receive: Receive, send: Send, path: str) -> None:
        """Serve what is not one of the plain routes of inference."""
        grant: Grant | None = scope.get(SCOPE_GRANT)
        resolve = self.switcher.resolve if grant is None else grant.resolve
        try:
            model, path = split_model_path(path, resolve) or (None, path)
            if path == _MODELS or path.startswith(_MODELS + "/"):
                content = self._models(scope, model, path.removeprefix(_MODELS).removeprefix("/"))
            else:
                address = self._address(scope, model, path)
                await self._inference.serve(scope, receive, send, address)
                return
        except LLMuxError as exc:
            await refuse(scope, send, exc, shape_of(path))
        else:
            await answer_json(send, content)

    async def _serve_websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            grant: Grant | None = scope.get(SCOPE_GRANT)
            resolve = self.switcher.resolve if grant is None else grant.resolve
            model, path = split_model_path(path := route_path(scope), resolve) or (None, path)
            if (route := find_route("WEBSOCKET", path)) is None:
                raise UnknownRouteError("WEBSOCKET", path)
        except LLMuxError as exc:
            await receive()
            await refuse_websocket(scope, send, exc)
        else:
            await self._realtime.serve(scope, receive, send, Address(route, path, model))

    def _models(self, scope: Scope, only: str | None, asked: str) -> object:
        """Return the list of the models, or one of them. `only` one exists for whom names it in the path."""
        if scope["method"] not in ("GET", "HEAD"):
            raise MethodNotAllowedError(scope["method"], _MODELS, ("GET", "HEAD"))
        grant: Grant | None = scope.get(SCOPE_GRANT)
        cards = {
            model: {"id": model, "object": "model", "created": self._created, "owned_by": "llmux_asgi"}
            for model in self.switcher.models
            if (only is None or model == self.switcher.resolve(only)) and (grant is None or grant.allows(model))
        }
        if not asked:
            return {"object": "list", "data": list(cards.values())}
        if (model := self.switcher.resolve(asked)) not in cards:
            raise UnknownModelError(asked)
        return cards[model]

    def _address(self, scope: Scope, model: str | None, path: str) -> Address:
        """Find the route of a request that is not one of the plain ones. Raises `LLMuxError`."""
        method = scope["method"]
        if (route := find_route(method, path)) is None:
            if allowed := methods_of(path):
                raise MethodNotAllowedError(method, path, allowed)
            raise UnknownRouteError(method, path)
        address = Address(route, path, model)
        if model is not None or (response := response_id(address)) is None:
            return address
        header = dict(scope["headers"]).get(MODEL_HEADER.encode("ascii"), b"").decode("latin-1")
        model = header or model_in_query(scope["query_string"]) or self._responses.get(response)
        if model is None:
            raise UnknownResponseError(response)
        return replace(address, model=model)


def _tasks(config: Config) -> dict[str, tuple[Task, ...]]:
    return {name: model.tasks for name, model in config.models.items() if model.tasks is not None}


def _admin_app(app: LLMuxApp) -> AdminApp | None:
    if app.config.admin is None:
        return None
    from .admin import AdminApp  # most gateways do without: it takes memory and time to start

    return AdminApp(app, app.config.admin)


def _metrics_endpoint(config: Config) -> MetricsEndpoint | None:
    if config.metrics is None:
        return None
    try:
        from .exposition import MetricsEndpoint
    except ImportError:
        raise ConfigError("$.metrics: needs the extra prometheus: pip install 'llmux-asgi[prometheus]'") from None
    return MetricsEndpoint(config.metrics)
