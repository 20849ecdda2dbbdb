"""The WebSocket of `/v1/realtime`: relayed message by message, under a lease that is held while it is open.

vLLM's protocol, as of 0.32: `vllm/entrypoints/speech_to_text/realtime/api_router.py` in its source.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from functools import partial

import anyio
import msgspec
from anyio.abc import TaskGroup
from opentelemetry.trace import Span
from starlette.types import Receive, Scope, Send

from . import _names as names
from ._errors import describe
from ._json_body import read_json, with_json_model
from ._lease import Freeze, Lease, leased
from ._openai import PRIORITY_HEADER, relayed_request_headers
from ._request_log import RequestTimes
from ._routes import Address, model_in_query
from ._target import Target
from ._websocket import SocketClosed, UpstreamSocket, connect_websocket
from .access import SCOPE_GRANT, Grant
from .exceptions import InvalidRequestError, LLMuxError, UnknownModelError, UpstreamError
from .middleware import MODEL_HEADER, LLMuxMiddleware
from .switcher import ModelSwitcher
from .telemetry import failed, inject_headers
from .upstream import UpstreamFault

__all__ = ["Realtime"]

logger = logging.getLogger(__name__)

# Close codes by RFC 6455 section 7.4 and the registry of IANA.
_GOING_AWAY, _POLICY, _TOO_BIG, _FAILED, _RESTART, _TRY_LATER = 1001, 1008, 1009, 1011, 1012, 1013
_NOT_SENT = {1004: 1000, 1005: 1000, 1006: _GOING_AWAY, 1015: _GOING_AWAY}
"""Codes that stand for something and are never sent, with what is sent in their place."""
_LONGEST_REASON = 123
"""Bytes: a close frame has no more room."""


_SWITCHING_PROTOCOLS = 101
"""The status of a WebSocket that was accepted."""


class _Event(msgspec.Struct):
    type: str = ""


class Realtime:
    """Serves the WebSockets. `max_message` is in bytes; one that is silent both ways for `idle` seconds is closed."""

    def __init__(self, middleware: LLMuxMiddleware, targets: Mapping[str, Target], *, max_message: int, idle: float) -> None:
        self.middleware = middleware
        self.switcher: ModelSwitcher = middleware.switcher
        self.targets = targets
        self.max_message = max_message
        self.idle = idle

    async def serve(self, scope: Scope, receive: Receive, send: Send, address: Address) -> None:
        """Serve one WebSocket. It is refused, with the status of the error, before it is accepted."""
        await receive()  # websocket.connect
        attributes = {names.HTTP_REQUEST_METHOD: "GET", names.HTTP_ROUTE: address.route.path}
        with self.switcher.telemetry.request(scope["headers"], attributes) as span:
            session = _Session(self, scope, receive, send, span)
            grant: Grant | None = scope.get(SCOPE_GRANT)
            times, telemetry = RequestTimes(), self.switcher.telemetry
            model, priority, status, lease = "", None, 0, None
            try:
                self.middleware.intake.check(scope, dict(scope["headers"]))
                model = self._find_model(scope, address, grant)
                span.set_attributes({names.GEN_AI_REQUEST_MODEL: model, names.MODEL: model})
                asked = _header(scope, PRIORITY_HEADER)
                priority = self.switcher.priority(model, asked if grant is None else grant.priority(asked))
                if grant is not None:
                    span.set_attribute(names.ENDUSER_ID, grant.identity.name)
                    grant.admit(b"")
                lease = self.switcher.try_acquire(model, priority=priority) or await self._wait(receive, model, priority)
                if lease is not None:
                    times.admitted(lease.waited)
                    if lease.waited:
                        telemetry.queued(model, lease.waited)
                    try:
                        if grant is not None:
                            grant.reach()
                        await session.run(lease, address)
                    finally:
                        lease.release()
            except LLMuxError as exc:
                failed(span, exc)
                telemetry.request_failed(model, exc)
                status = describe(exc).status
                await refuse_websocket(scope, send, exc)
            finally:
                status = _SWITCHING_PROTOCOLS if session.accepted else status
                telemetry.answered(model, status)
                if model and self.middleware.request_log is not None:
                    key = grant.identity.name if grant is not None else None
                    frozen = lease.frozen_time if lease is not None else 0.0
                    self.middleware.request_log.write(times.entry(model, status, priority=priority, frozen=frozen, key=key))

    def _find_model(self, scope: Scope, address: Address, grant: Grant | None) -> str:
        named = address.model or _header(scope, MODEL_HEADER.encode("ascii")) or model_in_query(scope["query_string"])
        if not named:
            raise InvalidRequestError("Name the model in the query: ?model=NAME.", param="model")
        if grant is not None:
            grant.require(named)
        if (model := self.switcher.resolve(named)) is None:
            raise UnknownModelError(named)
        self.middleware.require_task(model, address)
        return model

    async def _wait(self, receive: Receive, model: str, priority: str | None) -> Lease | None:
        """Queue for the model, as long as the client stays. Returns `None` if it left."""

        async def gone() -> None:
            while (await receive())["type"] != "websocket.disconnect":
                pass

        return await leased(partial(self.switcher.acquire, model, priority=priority), gone)


class _Session:
    """One WebSocket that has its lease."""

    def __init__(self, realtime: Realtime, scope: Scope, receive: Receive, send: Send, span: Span) -> None:
        self._realtime = realtime
        self._scope = scope
        self._receive = receive
        self._send = send
        self._span = span
        self._end = SocketClosed(_GOING_AWAY, f"no message for {realtime.idle:g} s")
        """Why it is over; while it runs, why it is if nothing comes any more."""
        self._client_left = False
        self._frozen = False
        self.accepted = False

    async def run(self, lease: Lease, address: Address) -> None:
        """Relay until one of both sides closes. Raises `LLMuxError` only before it is accepted."""
        target = self._realtime.targets[lease.model]
        headers = relayed_request_headers(self._scope["headers"], target.authorization)
        if lease.is_traced:
            inject_headers(headers, lease.context)
        path = target.prefix + address.path.encode("ascii")
        if query := self._scope.get("query_string"):
            path += b"?" + query
        error: LLMuxError | None = None
        try:
            async with connect_websocket(
                target.origin.url,
                path,
                headers,
                self._scope.get("subprotocols", []),
                timeout=target.timeouts.connect,
                max_message=self._realtime.max_message,
            ) as socket:
                await self._send({"type": "websocket.accept", "subprotocol": socket.subprotocol})
                self.accepted = True
                await self._relay(lease, socket, target.served_name)
        except UpstreamFault as exc:
            lease.distrust()
            error = UpstreamError(lease.model, str(exc))
            error.__cause__ = exc
        if error is not None:
            raise error

    async def _relay(self, lease: Lease, socket: UpstreamSocket, served_name: str) -> None:
        async with anyio.create_task_group() as tasks:
            scope = tasks.cancel_scope
            self._touch(scope)
            freeze = partial(self._pause, tasks)
            interrupt = partial(self._stop, scope, SocketClosed(_RESTART, "the model was put to sleep, or ended"))
            with lease.exchange(interrupt, freeze):
                tasks.start_soon(self._upwards, scope, socket, served_name)
                await self._downwards(scope, socket)
        code, reason = _NOT_SENT.get(self._end.code, self._end.code), _shortened(self._end.reason)
        if self._end.code == 1006:
            lease.distrust()
            code, reason = _FAILED, "the server of the model broke off"
            logger.warning("The server of the model %r broke off a WebSocket.", lease.model)
        with anyio.move_on_after(1.0, shield=True):
            if not self._client_left:
                with suppress(OSError):  # it may have gone in this moment
                    await self._send({"type": "websocket.close", "code": code, "reason": reason})
            await socket.close(code, reason)

    async def _upwards(self, scope: anyio.CancelScope, socket: UpstreamSocket, served_name: str) -> None:
        """Pass on what the client sends."""
        try:
            while True:
                message = await self._receive()
                if message["type"] == "websocket.disconnect":
                    self._client_left = True
                    code = int(message.get("code") or 1005)
                    raise SocketClosed(_NOT_SENT.get(code, code), message.get("reason") or "")
                self._touch(scope)
                text: str | None = message.get("text")
                data = message["bytes"] if text is None else text
                if len(data) > self._realtime.max_message:
                    raise SocketClosed(_TOO_BIG, f"a message is larger than {self._realtime.max_message} bytes")
                await socket.send(_addressed(data, served_name) if isinstance(data, str) else data)
        except SocketClosed as exc:
            self._stop(scope, exc)

    async def _downwards(self, scope: anyio.CancelScope, socket: UpstreamSocket) -> None:
        """Pass on what the server sends."""
        try:
            while True:
                data = await socket.receive()
                self._touch(scope)
                kind = "text" if isinstance(data, str) else "bytes"
                await self._send({"type": "websocket.send", kind: data})
        except SocketClosed as exc:
            self._stop(scope, exc)
        except OSError:  # how an ASGI server tells that its client is gone
            self._client_left = True
            self._stop(scope, SocketClosed(_GOING_AWAY, "the client has gone"))

    def _stop(self, scope: anyio.CancelScope, end: SocketClosed) -> None:
        if not scope.cancel_called:
            self._end = end
            scope.cancel()

    def _touch(self, scope: anyio.CancelScope) -> None:
        if not self._frozen:
            scope.deadline = anyio.current_time() + self._realtime.idle

    def _pause(self, tasks: TaskGroup, freeze: Freeze) -> None:
        tasks.start_soon(self._bridge, tasks.cancel_scope, freeze)

    async def _bridge(self, scope: anyio.CancelScope, freeze: Freeze) -> None:
        """While the model sleeps and its server keeps the session, silence is no idleness."""
        self._frozen, scope.deadline = True, math.inf
        with anyio.move_on_after(freeze.limit):
            await freeze.over.wait()
        self._frozen = False
        self._touch(scope)
        if not freeze.over.is_set():
            self._stop(scope, SocketClosed(_TRY_LATER, "the model's next turn did not come"))


async def refuse_websocket(scope: Scope, send: Send, exc: LLMuxError) -> None:
    """Refuse a WebSocket before it is accepted: with the error's status and body, if the ASGI server can send them."""
    if "websocket.http.response" in scope.get("extensions", {}):
        answer = describe(exc)
        await send({"type": "websocket.http.response.start", "status": answer.status, "headers": answer.headers})
        await send({"type": "websocket.http.response.body", "body": answer.body})
    else:
        await send({"type": "websocket.close", "code": _POLICY, "reason": _shortened(str(exc))})


def _addressed(text: str, served_name: str) -> str:
    """Let a `session.update` name the model as its server knows it. Raises `SocketClosed` if it names several."""
    try:
        if msgspec.json.decode(text, type=_Event).type != "session.update":
            return text
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return text  # it is the server that says what is wrong
    body = text.encode()
    try:
        named, _ = read_json(body)
    except InvalidRequestError as exc:
        raise SocketClosed(_POLICY, str(exc)) from None
    return text if named == served_name else b"".join(with_json_model(body, served_name)).decode()


def _header(scope: Scope, name: bytes) -> str | None:
    value: bytes | None = dict(scope["headers"]).get(name)
    return None if value is None else value.decode("latin-1")


def _shortened(reason: str) -> str:
    return reason.encode()[:_LONGEST_REASON].decode(errors="ignore")
