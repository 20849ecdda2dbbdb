"""The relay: one request to an awake server, bytes in and bytes out, cancelled when its client leaves."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

import anyio
import msgspec
from anyio.abc import TaskGroup
from opentelemetry import trace
from starlette.types import Message, Receive, Scope, Send

from . import telemetry as names
from ._errors import error_event
from ._lease import Freeze, Lease
from ._openai import (
    InterruptedAnswer,
    content_length,
    is_done,
    relayed_request_headers,
    relayed_response_headers,
    split_events,
)
from ._payload import payload
from ._routes import Address, ErrorShape
from ._upstream import HttpxUpstream, Upstream, UpstreamFault, UpstreamResponse
from .config import ModelConfig, TimeoutsConfig
from .exceptions import InterruptedRequestError, LLMuxError, QueueTimeoutError, UpstreamError
from .telemetry import failed, inject_headers

logger = logging.getLogger(__name__)

__all__ = ["Proxy", "Target"]

SCOPE_LEASE = "llmux.lease"
"""Key of the ASGI scope under which the middleware hands the lease to the app that answers."""
SCOPE_ADDRESS = "llmux.address"
"""Key of the ASGI scope with the request's `Address`: its route, and its path below the gateway's mount point."""
SCOPE_NAMED = "llmux.named"
"""Key of the ASGI scope with the model that the body names; `None`: it has not been looked at."""
SCOPE_LAST_TRY = "llmux.last_try"
"""Key of the ASGI scope that says whether a request is sent for the last time."""

_ERROR_EVENT: dict[ErrorShape, bytes] = {"openai": b'data: {"error"', "anthropic": b"event: error\n"}
"""What a server sends in a stream that its engine does not go on with."""
INTERRUPTED_GRACE = 1.0
"""Seconds that the answer of an interrupted request has to arrive in, once its model is asleep."""
_HEARTBEAT = b": the model makes way for another one; the answer goes on at its next turn\n\n"
"""A comment: who reads server-sent events passes over it."""
_LONGEST_EVENT = 1 << 20
"""Bytes of an unfinished server-sent event that are held back at most."""


class Proxy:
    """The ASGI app behind the middleware: relays the request to the server of the model that it holds a lease on.

    While a request is frozen its client gets a comment in the stream every `heartbeat` seconds. `max_frozen` seconds of that
    are allowed for beside the silence that `timeouts.read` allows a server.
    """

    def __init__(
        self,
        models: Mapping[str, ModelConfig],
        upstream: Upstream | None = None,
        *,
        heartbeat: float = 10.0,
        max_frozen: float = 0.0,
    ) -> None:
        self.targets = {name: Target.of(name, model, max_frozen) for name, model in models.items()}
        self._upstream = upstream or HttpxUpstream()
        self._heartbeat = heartbeat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Relay. Raises `LLMuxError` only before the answer has begun; later errors are told in the stream."""
        body = await _read_body(receive)
        if body is None:
            return
        async with anyio.create_task_group() as tasks:
            relay = _Relay(scope, send, self.targets[scope[SCOPE_LEASE].model], self._upstream, tasks, self._heartbeat)
            tasks.start_soon(_watch_client, receive, relay, tasks.cancel_scope)
            await relay.run(body)
            tasks.cancel_scope.cancel()
        # An error is raised here and not above, where the task group would wrap it.
        if relay.error is not None:
            raise relay.error

    async def aclose(self) -> None:
        """Close idle connections to the servers."""
        await self._upstream.aclose()


@dataclass(frozen=True, slots=True)
class Target:
    """Where the requests for one model go."""

    url: str
    prefix: bytes
    served_name: str
    timeouts: TimeoutsConfig
    retry: bool

    @classmethod
    def of(cls, name: str, model: ModelConfig, max_frozen: float) -> Target:
        parts = urlsplit(model.address)
        prefix = parts.path.rstrip("/").encode("ascii")
        timeouts = model.timeouts
        if timeouts.read is not None:
            timeouts = msgspec.structs.replace(timeouts, read=timeouts.read + max_frozen)
        return cls(f"{parts.scheme}://{parts.netloc}", prefix, model.served_name or name, timeouts, model.retry)


class _Relay:
    """One request on its way."""

    def __init__(
        self, scope: Scope, send: Send, target: Target, upstream: Upstream, tasks: TaskGroup, heartbeat: float
    ) -> None:
        self._scope = scope
        self._send = send
        self._sending = anyio.Lock(fast_acquire=True)
        self._tasks = tasks
        self._heartbeat = heartbeat
        self._frozen_too_long: LLMuxError | None = None
        self._target = target
        self._upstream = upstream
        self._lease: Lease = scope[SCOPE_LEASE]
        self._address: Address = scope[SCOPE_ADDRESS]
        self._started = False
        self._streams_events = False
        self._in_event = False
        """Whether the client has only a part of the present server-sent event: it is too long to be held back."""
        self.ended = False
        """Whether the last byte of the answer is out, or on its way."""
        self.done = False
        """Whether the client has all that it asked for: OpenAI's clients hang up after `[DONE]`, before the last byte."""
        self.error: Exception | None = None

    async def run(self, body: bytes) -> None:
        try:
            with anyio.CancelScope() as scope, self._lease.exchange(partial(_limit, scope), partial(self._freeze, scope)):
                while freeze := self._lease.freeze:  # its model fell asleep before the request was sent
                    await freeze.over.wait()
                await self._relay(body)
            if scope.cancelled_caught:
                raise self._interrupted()
        except UpstreamFault as exc:
            if self._lease.interrupted:  # that is why
                await self._fail(self._interrupted())
                return
            self._lease.distrust()
            may_retry = not self._started and (self._target.retry or not exc.sent)
            error = UpstreamError(self._lease.model, str(exc), may_retry=may_retry)
            error.__cause__ = exc
            await self._fail(error)
        except LLMuxError as exc:
            await self._fail(exc)
        except Exception as exc:  # noqa: BLE001 - raised again, where no task group wraps it
            self.error = exc

    def _freeze(self, relaying: anyio.CancelScope, freeze: Freeze) -> None:
        self._tasks.start_soon(self._bridge, relaying, freeze)

    async def _bridge(self, relaying: anyio.CancelScope, freeze: Freeze) -> None:
        """While the request is frozen, let its client know that the stream is alive; end it if that takes too long."""
        with anyio.move_on_after(freeze.limit):
            while not freeze.over.is_set():
                with anyio.move_on_after(self._heartbeat):
                    await freeze.over.wait()
                    return
                await self._beat()
        if not freeze.over.is_set():
            reason = "the request was frozen so that other models could serve, and its model's next turn did not come"
            self._frozen_too_long = QueueTimeoutError(self._lease.model, freeze.limit, reason)
            relaying.cancel()

    async def _beat(self) -> None:
        async with self._sending:
            if self._streams_events and self._started and not (self._in_event or self.ended):
                await self._send({"type": "http.response.body", "body": _HEARTBEAT, "more_body": True})

    async def _relay(self, body: bytes) -> None:
        route, given = self._address.route, self._scope["headers"]
        pieces = payload(route, given, body, self._target.served_name, named=self._scope[SCOPE_NAMED])
        headers = relayed_request_headers(given)
        inject_headers(headers)
        target = self._target.prefix + self._address.path.encode("ascii")
        if query := self._scope.get("query_string"):
            target += b"?" + query
        method = self._scope["method"].encode("ascii")
        exchange = self._upstream.request(method, self._target.url, target, headers, b"".join(pieces), self._target.timeouts)
        async with exchange as response:
            if response.status >= 500:
                self._lease.distrust()  # its engine may have died
                if self._target.retry and not self._scope[SCOPE_LAST_TRY]:
                    raise UpstreamFault(f"answered {response.status}.")
            kinds = {name.lower(): value for name, value in response.headers}
            streams = kinds.get(b"content-type", b"").startswith(b"text/event-stream")
            encoded = kinds.get(b"content-encoding", b"identity") != b"identity"  # although it was asked not to
            self._streams_events = streams and not encoded
            start: Message = {
                "type": "http.response.start",
                "status": response.status,
                "headers": relayed_response_headers(response.headers),
            }
            # The answer is ended in here, not after the server's connection has been put away: the client is waiting.
            if self._streams_events:
                await self._relay_events(start, response.chunks, InterruptedAnswer(route.path, body))
            elif self._lease.interrupted:
                await self._relay_checked(start, response.chunks, InterruptedAnswer(route.path, body))
            else:
                await self._relay_plain(start, response)

    async def _relay_plain(self, start: Message, response: UpstreamResponse) -> None:
        await self._begin(start)
        # A client has its answer when it has as many bytes as it was promised, and may send the next request at once. By
        # then the lease must be on its way back, and the ASGI server must know that this answer is over.
        left = content_length(response.headers)
        async for chunk in response.chunks:
            if left is not None:
                left -= len(chunk)
            elif self._lease.interrupted:  # nobody can tell whether it will be whole
                raise self._interrupted()
            await self._pass_on(chunk, last=left == 0)
        if not self.ended:
            await self._pass_on(b"", last=True)

    async def _relay_events(self, start: Message, chunks: AsyncIterator[bytes], answer: InterruptedAnswer) -> None:
        await self._begin(start)
        rest = b""
        async for chunk in chunks:
            events, rest = split_events(rest + chunk)
            self._in_event = len(rest) > _LONGEST_EVENT
            if self._in_event:
                events, rest = events + rest, b""
            answer.note(events)
            if _ERROR_EVENT[self._address.route.errors] in events:
                self._lease.distrust()
            if self._lease.interrupted and (cut := answer.cut_at(events)) is not None:
                await self._pass_on(events[:cut])
                raise self._interrupted()
            if events:
                self.done = is_done(events)
                await self._pass_on(events)
        if self._lease.interrupted and not (self.done or answer.is_finished):
            raise self._interrupted()
        await self._pass_on(rest, last=True)

    async def _relay_checked(self, start: Message, chunks: AsyncIterator[bytes], answer: InterruptedAnswer) -> None:
        """Relay an answer that came after the model was put to sleep: it may be cut short and look whole."""
        body = b"".join([chunk async for chunk in chunks])
        status: int = start["status"]
        if status >= 500 or (status < 400 and not answer.is_whole(body)):  # a 4xx is what the server thinks of the request
            raise self._interrupted()
        await self._begin(start)
        await self._pass_on(body, last=True)

    async def _begin(self, start: Message) -> None:
        async with self._sending:
            self._started = True
            await self._send(start)

    async def _pass_on(self, data: bytes, *, last: bool = False) -> None:
        async with self._sending:
            self.done = self.done or last
            # Before it is sent: an ASGI server may tell of the exchange's end before `send` has returned, and has then still to
            # put its connection in order (hypercorn starts a timer), which must not be cancelled.
            self.ended = last
            await self._send({"type": "http.response.body", "body": data, "more_body": not last})

    def _interrupted(self) -> LLMuxError:
        if error := self._frozen_too_long or self._lease.error:
            return error
        return InterruptedRequestError(self._lease.model, may_retry=self._target.retry and not self._started)

    async def _fail(self, error: LLMuxError) -> None:
        if not self._started:
            self.error = error
            return
        logger.warning("%s", error)
        failed(trace.get_current_span(), error)
        if self._streams_events:
            await self._pass_on(error_event(error, self._address.route.errors), last=True)
        # Any other answer is left unfinished: the server then cuts the connection, which no client takes for a whole answer.


def _limit(exchange: anyio.CancelScope) -> None:
    exchange.deadline = anyio.current_time() + INTERRUPTED_GRACE


async def _read_body(receive: Receive) -> bytes | None:
    """Return the request's body, `None` if the client left before it was complete."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def _watch_client(receive: Receive, relay: _Relay, relaying: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    if not relay.done:
        trace.get_current_span().set_attribute(names.CLIENT_DISCONNECTED, True)
    if not relay.ended:  # else it is not the client: an ASGI server tells of a finished exchange in the same way
        relaying.cancel()
