"""The switching around any ASGI app: find the model's name, hold a lease on it until the app has sent its last byte."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Collection, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

from opentelemetry.trace import INVALID_SPAN
from starlette.types import ASGIApp, Receive, Scope, Send

from . import _names as names
from ._intake import Intake
from ._notice import Notices
from ._parameters import Parameters
from ._request_log import RequestLog
from ._responder import MODEL_HEADER, Responder
from ._routes import INFERENCE_ROUTES, Address, Route, address_of
from .config import LoadingNotice, ModelConfig, Task
from .exceptions import UnservedRouteError
from .switcher import ModelSwitcher

__all__ = ["MODEL_HEADER", "LLMuxMiddleware", "route_path"]


class LLMuxMiddleware:
    """Makes sure that the model a request names is awake while `app` answers it.

    It acts on POST requests whose path, below any mount prefix, is one of `paths`; everything else (other paths and
    methods, websockets, lifespan) reaches `app` untouched. The body is read up to `max_body` bytes and handed on whole; the
    model is named by the header `x-llmux-model`, else by the JSON in the body (on the routes of audio and image files: the
    form). Requests for models that the switcher does not know are answered with a 404, or with `unknown="pass"` go to `app`
    without a lease; so are requests for what is not among the `tasks` of the model, if it has any. The header
    `x-llmux-priority` names the request's priority class.

    The inner app finds the lease as `scope["llmux.lease"]`: `lease.model` is the configured name.
    A request with more than `max_headers` bytes of headers and query, with a compressed body, or whose body takes longer than
    `body_timeout` seconds to arrive is refused, and so is one whose body would make it more than `max_buffered` bytes of all
    requests together.
    `request_log` is the path of a JSONL file that gets a line for each request that named a known model. With
    `timing_headers` answers tell in their headers what the request has waited for.
    `models` gives the models that are configured with `parameters`: `app` gets bodies that have them.
    With `loading_notice` other than `none`, requests for a stream on OpenAI's and Anthropic's routes get a sign of life every
    `heartbeat` seconds while they wait. `app` must answer those by server-sent events; what else it answers becomes an error
    event, and its headers are lost.
    """

    def __init__(
        self,
        app: ASGIApp,
        switcher: ModelSwitcher,
        *,
        paths: Collection[str] = INFERENCE_ROUTES,
        unknown: Literal["reject", "pass"] = "reject",
        max_body: int = 32 * 1024 * 1024,
        max_headers: int = 64 * 1024,
        max_buffered: int = 1024 * 1024 * 1024,
        body_timeout: float = 60.0,
        request_log: str | os.PathLike[str] | None = None,
        timing_headers: bool = False,
        tasks: Mapping[str, Collection[Task]] | None = None,
        models: Mapping[str, ModelConfig] | None = None,
        loading_notice: LoadingNotice = "none",
        heartbeat: float = 10.0,
    ) -> None:
        self.app = app
        self.switcher = switcher
        self.addresses = {path: address_of(path) or Address(Route(path, task=None), path) for path in paths}
        self.tasks = tasks or {}
        self.parameters = Parameters.of(models or {})
        self.notices = Notices(loading_notice, heartbeat)
        self.unknown = unknown
        self.max_body = max_body
        self.intake = Intake(max_headers, body_timeout, max_buffered)
        self.request_log = RequestLog(request_log) if request_log is not None else None
        self.timing_headers = timing_headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        address = self.addresses.get(route_path(scope)) if scope["type"] == "http" and scope["method"] == "POST" else None
        if address is None:
            await self.app(scope, receive, send)
        else:
            await self.serve(scope, receive, send, address)

    def serve(self, scope: Scope, receive: Receive, send: Send, address: Address) -> Awaitable[None]:
        """Serve an HTTP request whose route is known, whatever its path and method are."""
        if self.switcher.telemetry.is_traced:
            return self._serve_traced(scope, receive, send, address)
        return Responder(self, scope, receive, send, address, INVALID_SPAN).run()

    async def _serve_traced(self, scope: Scope, receive: Receive, send: Send, address: Address) -> None:
        attributes = _attributes(scope["method"], address.route.path)
        with self.switcher.telemetry.request(scope["headers"], attributes) as span:
            await Responder(self, scope, receive, send, address, span).run()

    def require_task(self, model: str, address: Address) -> None:
        """Raise `UnservedRouteError` if the model is configured not to do what a request asks for."""
        tasks = self.tasks.get(model)
        if tasks is not None and address.route.task is not None and address.route.task not in tasks:
            raise UnservedRouteError(model, address.path, tasks)


@lru_cache(maxsize=128)
def _attributes(method: str, route: str) -> Mapping[str, str]:
    """What a span says of its request from the start."""
    attributes = {names.HTTP_REQUEST_METHOD: method, names.HTTP_ROUTE: route}
    if operation := names.OPERATIONS.get(route):
        attributes |= {names.GEN_AI_OPERATION_NAME: operation, names.GEN_AI_PROVIDER_NAME: "vllm"}
    return MappingProxyType(attributes)


def route_path(scope: Scope) -> str:
    """Return the request's path below the mount point, with a slash before and none after it.

    Litestar adds one at the end of what it hands to a mounted app, and at its root takes the first one away.
    """
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        path = path[len(root) :]
    return "/" + path.removeprefix("/").removesuffix("/")
