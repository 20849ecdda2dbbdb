"""The calls of the admin API."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable

import anyio
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..exceptions import InvalidRequestError, LLMuxError, MethodNotAllowedError, UnknownModelError
from ..switcher import ModelSwitcher
from ._events import EventStreams, until_gone
from ._gateway import Gateway
from ._openapi import description
from ._status import ModelList, ModelStatus, model_statuses, status_of

__all__ = ["NO_STORE", "SCOPE_OPERATOR", "AdminApi"]

logger = logging.getLogger("llmux_asgi.admin")

SCOPE_OPERATOR = "llmux.operator"
"""Key of the ASGI scope with the name of the key that a call came with."""
NO_STORE = {"cache-control": "no-store", "x-content-type-options": "nosniff"}

_LONGEST_WAIT = 3600.0
"""Seconds that a call may wait for the drain's end."""
_LOOK = 0.1
"""Seconds from one look at the drain to the next."""
_ACTIONS = ("wake", "sleep", "stop", "pin")

_Action = Callable[[ModelSwitcher, str], Awaitable[None]]


class AdminApi:
    """What operators may ask for."""

    def __init__(self, gateway: Gateway, streams: EventStreams) -> None:
        self._gateway = gateway
        self._streams = streams

    def routes(self) -> list[Route]:
        """Return the routes below the admin API's prefix. Their answers raise `LLMuxError` where something is wrong."""
        model = "/api/models/{model:path}"
        return [
            Route("/api/status", self._status),
            Route("/api/models", self._models),
            Route(model + "/wake", self._wake, methods=["POST"]),
            Route(model + "/sleep", self._sleep, methods=["POST"]),
            Route(model + "/stop", self._stop, methods=["POST"]),
            Route(model + "/pin", self._pin, methods=["POST", "DELETE"]),
            Route(model, self._model),
            Route("/api/drain", self._drain, methods=["POST"]),
            Route("/api/resume", self._resume, methods=["POST"]),
            Route("/api/reload", self._reload, methods=["POST"]),
            Route("/api/events", self._events),
            Route("/api/openapi.json", self._openapi),
        ]

    async def _status(self, request: Request) -> Response:
        return _json(status_of(self._gateway))

    async def _models(self, request: Request) -> Response:
        return _json(ModelList(model_statuses(self._gateway)))

    async def _model(self, request: Request) -> Response:
        named: str = request.path_params["model"]
        action = named.rpartition("/")[2]
        if action in _ACTIONS and self._gateway.switcher.resolve(named) is None:
            allowed = ("POST", "DELETE") if action == "pin" else ("POST",)
            raise MethodNotAllowedError(request.method, request.scope["path"], allowed)
        return _json(self._status_of(self._resolve(named)))

    async def _wake(self, request: Request) -> Response:
        return await self._act(request, "wakes", lambda switcher, model: switcher.wake(model))

    async def _sleep(self, request: Request) -> Response:
        return await self._act(request, "puts to sleep", lambda switcher, model: switcher.sleep(model))

    async def _stop(self, request: Request) -> Response:
        return await self._act(request, "stops", lambda switcher, model: switcher.stop(model))

    async def _pin(self, request: Request) -> Response:
        if request.method == "POST":
            return await self._act(request, "pins", _pin_and_wake)
        model, switcher = self._resolve(request.path_params["model"]), self._gateway.switcher
        if switcher.pinned == model:
            _note(request, f"unpins the model {model!r}")
            switcher.unpin()
        return _json(self._status_of(model))

    async def _act(self, request: Request, what: str, action: _Action) -> Response:
        """Do something to a model, and answer when it is done; it is given up if the client leaves."""
        model, switcher = self._resolve(request.path_params["model"]), self._gateway.switcher
        _note(request, f"{what} the model {model!r}")
        return await _unless_gone(request, lambda: action(switcher, model), lambda: self._status_of(model))

    async def _drain(self, request: Request) -> Response:
        seconds = _seconds(request, "wait")
        switcher = self._gateway.switcher
        _note(request, "drains the gateway")
        switcher.drain()

        async def wait() -> None:
            with anyio.move_on_after(seconds):
                # Looked at again and again: a request that ends tells nobody but its switcher.
                while switcher.draining and not switcher.statistics().drained:  # noqa: ASYNC110
                    await anyio.sleep(_LOOK)

        return await _unless_gone(request, wait, lambda: status_of(self._gateway))

    async def _resume(self, request: Request) -> Response:
        _note(request, "resumes the gateway")
        self._gateway.switcher.resume()
        return _json(status_of(self._gateway))

    async def _reload(self, request: Request) -> Response:
        _note(request, "has the configuration read anew")
        return _json(await self._gateway.reload())

    async def _events(self, request: Request) -> Response:
        if request.method == "HEAD":
            return Response(headers=NO_STORE, media_type="text/event-stream")
        last = request.headers.get("last-event-id") or request.query_params.get("last_event_id")
        return _Stream(self._streams, request.scope[SCOPE_OPERATOR], last)

    async def _openapi(self, request: Request) -> Response:
        return _json(description())

    def _resolve(self, name: str) -> str:
        if (model := self._gateway.switcher.resolve(name)) is None:
            raise UnknownModelError(name)
        return model

    def _status_of(self, model: str) -> ModelStatus:
        for each in model_statuses(self._gateway):
            if each.name == model:
                return each
        raise UnknownModelError(model)  # a reload has removed it meanwhile


class _Stream(Response):
    """The answer that does not end by itself."""

    def __init__(self, streams: EventStreams, operator: str, last_event_id: str | None) -> None:
        super().__init__()
        self._streams, self._operator, self._last_event_id = streams, operator, last_event_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._streams.serve(self._operator, self._last_event_id, receive, send)


class _Nothing(Response):
    """The answer to a client that has left."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Nobody is there."""


async def _pin_and_wake(switcher: ModelSwitcher, model: str) -> None:
    """Pin a model in place of the one that is pinned, if there is one, and wake it. If that fails, all is as before."""
    before = switcher.pinned
    switcher.pin(model)  # first: once it is awake, nothing may come in between
    try:
        await switcher.wake(model)
    except BaseException:
        if switcher.pinned == model and before is None:
            switcher.unpin()
        elif switcher.pinned == model and before is not None and switcher.resolve(before) is not None:
            switcher.pin(before)
        raise


async def _unless_gone(request: Request, do: Callable[[], Awaitable[None]], answer: Callable[[], object]) -> Response:
    """Answer when `do` is done. If the client leaves before, `do` is cancelled."""
    error: LLMuxError | None = None
    gone = False

    async def watch() -> None:
        nonlocal gone
        await until_gone(request.receive)
        gone = True
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        try:
            await do()
        except LLMuxError as exc:  # not out of the task group, which would wrap it
            error = exc
        tasks.cancel_scope.cancel()
    if gone:
        return _Nothing()
    if error is not None:
        raise error
    return _json(answer())


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), headers=NO_STORE, media_type="application/json")


def _seconds(request: Request, name: str) -> float:
    """Return a parameter of the query that is a time in seconds, 0.0 if it is not there. Raises `InvalidRequestError`."""
    text = request.query_params.get(name, "0")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.0 <= seconds <= _LONGEST_WAIT:
        raise InvalidRequestError(f"The parameter {name} is a time in seconds, from 0 to {_LONGEST_WAIT:g}.", param=name)
    return seconds


def _note(request: Request, what: str) -> None:
    logger.info("the operator %r %s", request.scope[SCOPE_OPERATOR], what)
