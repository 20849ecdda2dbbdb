"""The relay: one request to an awake server, bytes in and bytes out, cancelled when its client leaves."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextvars import copy_context
from functools import partial
from typing import Any, cast

import anyio
from opentelemetry import trace
from starlette.types import Message, Receive, Scope, Send

from . import _names as names
from ._errors import error_event
from ._lease import Freeze, Lease
from ._openai import (
    AnswerHead,
    InterruptedAnswer,
    is_done,
    relayed_request_headers,
    split_events,
)
from ._payload import payload
from ._routes import Address, ErrorShape
from ._spawn import Later
from ._target import Target
from ._waiting import Cancellable, SendWatch
from .config import ModelConfig
from .exceptions import InterruptedRequestError, LLMuxError, QueueTimeoutError, UpstreamError
from .telemetry import failed, inject_headers
from .upstream import Http1Upstream, Upstream, UpstreamFault, UpstreamResponse
from .upstream._protocol import running_loop

logger = logging.getLogger(__name__)

__all__ = ["Proxy", "Target"]

SCOPE_LEASE = "llmux.lease"
"""Key of the ASGI scope under which the middleware hands the lease to the app that answers."""
SCOPE_ADDRESS = "llmux.address"
"""Key of the ASGI scope with the request's `Address`: its route, and its path below the gateway's mount point."""
SCOPE_NAMED = "llmux.named"
"""Key of the ASGI scope with the model that the body names; `None`: it has not been looked at."""
SCOPE_BODY = "llmux.body"
"""Key of the ASGI scope with the request's body, for the app that relays it; `receive` gives it too."""
SCOPE_LAST_TRY = "llmux.last_try"
"""Key of the ASGI scope that says whether a request is sent for the last time."""

_ERROR_EVENT: dict[ErrorShape, bytes] = {"openai": b'data: {"error"', "anthropic": b"event: error\n"}
"""What a server sends in a stream that its engine does not go on with."""
_WATCH_AFTER = 0.05
"""Seconds from which on, or up to twice as many, a client is watched: who leaves earlier is noticed then, and an answer in
time costs neither a task nor a timer."""
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

    A client that does not take a part of its answer for `write_timeout` seconds is dropped and its lease given back: it must
    not hold up a switch.
    """

    def __init__(
        self,
        models: Mapping[str, ModelConfig],
        upstream: Upstream | None = None,
        *,
        heartbeat: float = 10.0,
        max_frozen: float = 0.0,
        write_timeout: float = 60.0,
    ) -> None:
        self.targets = self.targets_of(models, max_frozen)
        self.upstream = Http1Upstream() if upstream is None else upstream
        self.heartbeat = heartbeat
        self.write_timeout = write_timeout
        self.relays: set[_Relay] = set()
        """Those that are under way."""
        self.clients = _Clients()

    @staticmethod
    def targets_of(models: Mapping[str, ModelConfig], max_frozen: float) -> dict[str, Target]:
        """Where the requests for each model go. Raises `ConfigError` if a server's API key cannot be read."""
        return {name: Target.of(name, model, max_frozen) for name, model in models.items()}

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Relay. Raises `LLMuxError` only before the answer has begun; later errors are told in the stream."""
        # Not a coroutine of its own where the body is here, as it is for every request of the middleware's.
        body: bytes | None = scope.pop(SCOPE_BODY, None)
        if body is None:
            return self._read_and_relay(scope, receive, send)
        return _Relay(self, scope, receive, send, body).run()

    async def _read_and_relay(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (body := await _read_body(receive)) is not None:
            await _Relay(self, scope, receive, send, body).run()

    async def aclose(self) -> None:
        """End what is under way, with an error to its clients, and close the connections to the servers."""
        for relay in self.relays:
            relay.cancel()
        await self.upstream.aclose()


class _Clients:
    """Has the clients of those relays watched that have gone on for a while: one timer for all of them."""

    def __init__(self) -> None:
        self._unwatched: dict[_Relay, int] = {}
        """The turn of the timer in which each came, the oldest first."""
        self._turn = 0
        self._timer: Later | None = None
        self._loop: object = None

    def add(self, relay: _Relay) -> None:
        """Watch its client from some `_WATCH_AFTER` seconds on."""
        self._unwatched[relay] = self._turn
        if self._timer is None or self._loop is not running_loop():  # an event loop that has ended runs no timers
            self._loop = running_loop()
            self._timer = Later(self._look, _WATCH_AFTER)

    def discard(self, relay: _Relay) -> None:
        """It is over."""
        self._unwatched.pop(relay, None)

    async def _look(self) -> None:
        due = [relay for relay, turn in self._unwatched.items() if turn < self._turn]
        self._turn += 1
        for relay in due:
            del self._unwatched[relay]
            relay.watch()
        self._timer = Later(self._look, _WATCH_AFTER) if self._unwatched else None


class _Relay:
    """One request on its way."""

    _client_left = False
    _frozen_too_long: LLMuxError | None = None
    _started = False
    _beating: anyio.Event | None = None
    """Set when the heartbeat that is on its way to the client is out."""
    _streams_events = False
    _in_event = False
    """Whether the client has only a part of the present server-sent event: it is too long to be held back."""
    _ended = False
    """Whether the last byte of the answer is out, or on its way."""
    _done = False
    """Whether the client has all that it asked for: OpenAI's clients hang up after `[DONE]`, before the last byte."""

    def __init__(self, proxy: Proxy, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        self._proxy = proxy
        self._context = copy_context()
        self._scope: Scope | None = scope
        self._body = body
        """This and the scope are let go of when the answer begins: a stream may take minutes."""
        self._receive = receive
        self._beside: list[Later] = []
        """What runs beside the relay, and ends with it."""
        self._send = SendWatch(send, proxy.write_timeout, self._run_beside, self._drop_client)
        self._last_try: bool = scope[SCOPE_LAST_TRY]
        self._lease: Lease = scope[SCOPE_LEASE]
        self._address: Address = scope[SCOPE_ADDRESS]
        self._target = proxy.targets[self._lease.model]
        self._relaying = Cancellable()

    async def run(self) -> None:
        self._proxy.relays.add(self)
        self._proxy.clients.add(self)
        try:
            with self._relaying:
                self._lease.join(self)
                try:
                    while freeze := self._lease.freeze:  # its model fell asleep before the request was sent
                        await freeze.over.wait()
                    await self._relay()
                finally:
                    self._lease.leave(self)
            if self._relaying.cancelled_caught and not self._client_left:
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
        finally:
            for task in self._beside:
                task.stop()
            self._beside.clear()
            self._send.end()
            self._proxy.relays.discard(self)
            self._proxy.clients.discard(self)

    def cancel(self) -> None:
        """End the exchange; the client is told that its request was interrupted."""
        self._relaying.cancel()

    def watch(self) -> None:
        """From now on, end it when its client leaves."""
        self._context.run(self._run_beside, self._watch_client)

    def _run_beside(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._beside.append(Later(function, 0.0))

    async def _watch_client(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._done:
            self._lease.span.set_attribute(names.CLIENT_DISCONNECTED, True)
        if self._ended:
            # An ASGI server tells of a finished exchange in the same way. If it is the client, the last `send` may not return.
            self._lease.release()
        else:
            self._client_left = True
            self._relaying.cancel()

    def interrupt(self) -> None:
        """See `Exchange`."""
        self._relaying.cancel_after(INTERRUPTED_GRACE)

    def freeze(self, freeze: Freeze) -> None:
        """See `Exchange`."""
        self._run_beside(partial(self._bridge, freeze))

    async def _bridge(self, freeze: Freeze) -> None:
        """While the request is frozen, let its client know that the stream is alive; end it if that takes too long."""
        with anyio.move_on_after(freeze.limit):
            while not freeze.over.is_set():
                with anyio.move_on_after(self._proxy.heartbeat):
                    await freeze.over.wait()
                    return
                await self._beat()
        if not freeze.over.is_set():
            reason = "the request was frozen so that other models could serve, and its model's next turn did not come"
            self._frozen_too_long = QueueTimeoutError(self._lease.model, freeze.limit, reason)
            self._relaying.cancel()

    async def _beat(self) -> None:
        if self._streams_events and self._started and not (self._in_event or self._ended or self._send.busy):
            self._beating = beating = anyio.Event()
            try:
                await self._send({"type": "http.response.body", "body": _HEARTBEAT, "more_body": True})
            finally:
                self._beating = None
                beating.set()

    async def _relay(self) -> None:
        response = await self._ask()
        try:
            if response.status >= 500:
                self._lease.distrust()  # its engine may have died
                if self._target.retry and not self._last_try:
                    raise UpstreamFault(f"answered {response.status}.")
            head = AnswerHead.of(response.headers)
            self._streams_events = head.is_events
            start: Message = {"type": "http.response.start", "status": response.status, "headers": head.headers}
            self._scope = None
            # The answer is ended in here, not after the server's connection has been put away: the client is waiting.
            if head.is_events:
                await self._relay_events(start, response, self._interrupted_answer())
            elif self._lease.interrupted:
                await self._relay_checked(start, response, self._interrupted_answer())
            else:
                await self._relay_plain(start, response, head.length)
        finally:
            await response.aclose()

    def _ask(self) -> Awaitable[UpstreamResponse]:
        """Send the request. What it is made of ends with this function."""
        scope, target = cast(Scope, self._scope), self._target
        pieces = payload(self._address.route, scope["headers"], self._body, target.served_name, named=scope[SCOPE_NAMED])
        headers = relayed_request_headers(scope["headers"], target.authorization)
        if self._lease.context and self._lease.is_traced:
            inject_headers(headers, self._lease.context)
        path = target.prefix + self._address.path.encode("ascii")
        if query := scope.get("query_string"):
            path += b"?" + query
        method = scope["method"].encode("ascii")
        return self._proxy.upstream.request(method, target.origin, path, headers, pieces, target.timeouts)

    def _interrupted_answer(self) -> InterruptedAnswer:
        answer = InterruptedAnswer(self._address.route.path, self._body)
        self._body = b""
        return answer

    async def _relay_plain(self, start: Message, response: UpstreamResponse, left: int | None) -> None:
        await self._begin(start)
        # A client has its answer when it has as many bytes as it was promised, and may send the next request at once. By
        # then the lease must be on its way back, and the ASGI server must know that this answer is over.
        async for chunk in response:
            if left is not None:
                left -= len(chunk)
            elif self._lease.interrupted:  # nobody can tell whether it will be whole
                raise self._interrupted()
            await self._pass_on(chunk, last=left == 0)
        if not self._ended:
            await self._pass_on(b"", last=True)

    async def _relay_events(self, start: Message, response: UpstreamResponse, answer: InterruptedAnswer) -> None:
        await self._begin(start)
        rest = b""
        async for chunk in response:
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
                self._done = is_done(events)
                await self._pass_on(events)
        if self._lease.interrupted and not (self._done or answer.is_finished):
            raise self._interrupted()
        await self._pass_on(rest, last=True)

    async def _relay_checked(self, start: Message, response: UpstreamResponse, answer: InterruptedAnswer) -> None:
        """Relay an answer that came after the model was put to sleep: it may be cut short and look whole."""
        body = b"".join([chunk async for chunk in response])
        status: int = start["status"]
        if status >= 500 or (status < 400 and not answer.is_whole(body)):  # a 4xx is what the server thinks of the request
            raise self._interrupted()
        await self._begin(start)
        await self._pass_on(body, last=True)

    def _begin(self, start: Message) -> Awaitable[None]:
        self._started = True
        return self._send(start)

    def _pass_on(self, data: bytes, *, last: bool = False) -> Awaitable[None]:
        # Neither is a coroutine of its own: every part of an answer passes through here.
        if self._beating is not None:
            return self._pass_on_after(self._beating, data, last=last)
        self._done = self._done or last
        # Before it is sent: an ASGI server may tell of the exchange's end before `send` has returned, and has then still to
        # put its connection in order (hypercorn starts a timer), which must not be cancelled.
        self._ended = last
        return self._send({"type": "http.response.body", "body": data, "more_body": not last})

    async def _pass_on_after(self, beating: anyio.Event, data: bytes, *, last: bool) -> None:
        await beating.wait()
        await self._pass_on(data, last=last)

    def _drop_client(self) -> None:
        """The client does not read its answer: end the exchange. Nothing more can be told to it."""
        logger.warning("a client of the model %r does not read its answer: it is dropped", self._lease.model)
        failed(self._lease.span, TimeoutError("the client did not read its answer"))
        self._lease.release()  # at once: there are servers that shield the send that it hangs in
        self._client_left = True
        self._relaying.cancel()

    def _interrupted(self) -> LLMuxError:
        if error := self._frozen_too_long or self._lease.error:
            return error
        return InterruptedRequestError(self._lease.model, may_retry=self._target.retry and not self._started)

    async def _fail(self, error: LLMuxError) -> None:
        if not self._started:
            raise error
        logger.warning("%s", error)
        failed(trace.get_current_span(), error)
        self._lease.count_failure(error)
        if self._streams_events:
            await self._pass_on(error_event(error, self._address.route.errors), last=True)
        # Any other answer is left unfinished: the server then cuts the connection, which no client takes for a whole answer.


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
