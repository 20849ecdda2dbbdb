"""One request in the middleware: its body read ahead, its lease, how far its answer has come."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable
from functools import partial
from typing import TYPE_CHECKING

from opentelemetry.trace import Span
from opentelemetry.util.types import AttributeValue
from starlette.types import Message, Receive, Scope, Send

from . import _names as names
from ._errors import describe
from ._intake import Upload
from ._json_body import named_model
from ._lease import Lease, leased
from ._notice import Notice
from ._openai import PRIORITY_HEADER, Headers, is_event_stream
from ._payload import read_payload
from ._proxy import SCOPE_ADDRESS, SCOPE_BODY, SCOPE_LAST_TRY, SCOPE_LEASE, SCOPE_NAMED
from ._request_log import RequestTimes
from ._routes import Address
from ._timing import with_times
from .access import SCOPE_GRANT, Grant
from .exceptions import (
    BodyTimeoutError,
    InterruptedRequestError,
    InvalidRequestError,
    LLMuxError,
    PermissionDeniedError,
    PolicyError,
    RateLimitError,
    SwitchError,
    UnknownModelError,
    UnservedRouteError,
    UpstreamError,
)
from .telemetry import failed

if TYPE_CHECKING:
    from .middleware import LLMuxMiddleware

__all__ = ["MODEL_HEADER", "Responder"]

MODEL_HEADER = "x-llmux-model"
"""Request header that names the model in place of the body."""
_MODEL_HEADER = MODEL_HEADER.encode("ascii")

_LONGEST_NAME = 200
"""Characters of a model's name, as the client wrote it, that a span gets."""

logger = logging.getLogger("llmux_asgi.middleware")  # whose part this is

_NOT_LOGGED = (
    # A failed switch is logged once, by the switcher; the rest is what the client has done.
    InvalidRequestError,
    UnknownModelError,
    UnservedRouteError,
    PermissionDeniedError,
    RateLimitError,
    SwitchError,
    PolicyError,
)


class Responder:
    """One request: its body read ahead, its lease, how far its answer has come."""

    _body: bytes | None = None
    _named: str | None = None
    """The model that the body names, if it was looked at."""
    _replayed = False
    _waited = 0.0
    _priority: str | None = None
    _disconnected = False
    _lease: Lease | None = None
    _notice: Notice | None = None
    """Present once it has waited, if it is told of that."""
    _wire: Send | None = None
    """Where a send goes that notes the first byte; `None`: there is none."""
    _status = 0
    _refused = False
    """Whether the answer is an error of the gateway's own."""
    _admitted_at = 0.0
    """When its server was asked, on the monotonic clock; known if the headers are to tell."""

    def __init__(
        self, middleware: LLMuxMiddleware, scope: Scope, receive: Receive, send: Send, address: Address, span: Span
    ) -> None:
        self._middleware = middleware
        self._switcher = middleware.switcher
        self._scope = scope
        # uvicorn adds the trailers to this list, when the body is there: what was not checked must not be passed on.
        self._headers: Headers = list(scope["headers"])
        self._fields = dict(self._headers)
        """The same by name: of several values the last one."""
        self._noted: dict[str, AttributeValue] = {}
        """Attributes for the span, which takes all at once for the price of one."""
        self._receive = receive
        self._upload = Upload(middleware.intake, receive)
        watches = middleware.timing_headers or middleware.switcher.telemetry.is_measured
        self._send = self._watching(send) if watches else send
        self._address = address
        self._span = span
        self._times = RequestTimes() if middleware.request_log is not None else None
        self._grant: Grant | None = scope.get(SCOPE_GRANT)
        """What the client may do; `None`: there is no access control."""

    async def run(self) -> None:
        model = ""
        try:
            self._middleware.intake.check(self._scope, self._fields)
            # Read whole in any case: a client that takes its time to send it must not hold a lease meanwhile.
            self._body = await self._upload.read(self._middleware.max_body, self._fields.get(b"content-length", b""))
            if self._body is None:
                self._note_disconnect()
                return
            named = self._find_name(self._body)
            self._noted[names.GEN_AI_REQUEST_MODEL] = named[:_LONGEST_NAME]
            if self._grant is not None:
                self._noted[names.ENDUSER_ID] = self._grant.identity.name
                self._grant.require(named)
            if (resolved := self._switcher.resolve(named)) is not None:
                model = resolved
                self._noted[names.MODEL] = model
                self._middleware.require_task(model, self._address)
                if self._times is not None:
                    self._times.arrived()
                asked = self._field(PRIORITY_HEADER)
                if self._grant is not None:
                    asked = self._grant.priority(asked)
                self._priority = self._switcher.priority(model, asked)
                if self._priority is not None:
                    self._noted[names.PRIORITY] = self._priority
                if self._middleware.parameters:
                    self._set_parameters(named)
                if self._grant is not None:
                    self._grant.admit(self._body or b"")
                await self._answer(model)
            elif self._middleware.unknown == "pass":
                await self._middleware.app(self._scope, self._replay, self._watch_answer)
            else:
                raise UnknownModelError(named)
        except LLMuxError as exc:
            if self._status:
                raise
            failed(self._span, exc)
            self._switcher.telemetry.request_failed(model, exc)
            if isinstance(exc, SwitchError) and exc.switch is not None:
                self._span.add_link(exc.switch)
            if not isinstance(exc, _NOT_LOGGED):
                logger.warning("%s", exc)
            await self._refuse(exc)
        finally:
            self._upload.close()
            if self._notice is not None:
                self._notice.stop()
            if self._span.is_recording():
                self._span.set_attributes(self._noted)
            self._switcher.telemetry.answered(model, self._status)
            if model and self._times is not None and self._middleware.request_log is not None:
                frozen = self._lease.frozen_time if self._lease is not None else 0.0
                key = self._grant.identity.name if self._grant is not None else None
                entry = self._times.entry(model, self._status, priority=self._priority, frozen=frozen, key=key)
                self._middleware.request_log.write(entry)

    async def _answer(self, model: str) -> None:
        last = False
        while True:
            lease = self._switcher.try_acquire(model, priority=self._priority) or await self._wait_for_lease(model)
            if lease is None:
                return
            self._lease = lease
            try:
                self._admitted(lease)
                await self._middleware.app(self._scope_for(lease, last=last), self._replay, self._watch_answer)
                return
            except (InterruptedRequestError, UpstreamError) as exc:
                if last or self._status or not exc.may_retry:
                    raise
                logger.warning("%s The request is sent once more.", exc)
                self._span.record_exception(exc)
                self._replayed, last = False, True
            finally:
                lease.release()

    def _scope_for(self, lease: Lease, *, last: bool) -> Scope:
        return {
            **self._scope,
            "headers": self._headers,
            SCOPE_ADDRESS: self._address,
            SCOPE_BODY: self._body,
            SCOPE_LAST_TRY: last,
            SCOPE_LEASE: lease,
            SCOPE_NAMED: self._named,
        }

    def _admitted(self, lease: Lease) -> None:
        self._waited += lease.waited
        if self._times is not None:
            self._times.admitted(self._waited)
        if self._waited:
            self._noted[names.QUEUE_TIME] = self._waited
        if self._middleware.timing_headers:
            self._admitted_at = time.monotonic()
        if lease.waited:
            self._switcher.telemetry.queued(lease.model, lease.waited)
        if lease.switch is not None:
            self._span.add_link(lease.switch)
        if self._grant is not None:
            self._grant.reach()

    async def _wait_for_lease(self, model: str) -> Lease | None:
        """Queue for the model, as long as the client stays. Returns `None` if it left."""
        if (notice := self._notice or self._make_notice(model)) is not None:
            notice.start()
        # What it has waited for the first time counts, if it is sent once more.
        limit = self._switcher.request_timeout(model)
        timeout = limit and max(0.0, limit - self._waited)
        acquire = partial(self._switcher.acquire, model, timeout=timeout, priority=self._priority)
        begun = time.monotonic()
        try:
            lease = await leased(acquire, self._client_gone)
        except LLMuxError:
            self._waited += time.monotonic() - begun
            raise
        if notice is not None:
            notice.admitted()
        return lease

    def _make_notice(self, model: str) -> Notice | None:
        """Have the client told that its request waits, if it asked for a stream."""
        notices, route = self._middleware.notices, self._address.route
        if not notices.fit(route) or not self._asks_for_a_stream():
            return None
        progress, grant = partial(self._switcher.progress, model), self._grant
        # What looks at the answer on its way, to measure it or to charge for it, is not to see the notices.
        if grant is not None:
            self._notice = Notice(notices, route, model, grant.send, progress, grant.headers)
            grant.send = self._notice.send
        elif self._wire is not None:
            self._notice = Notice(notices, route, model, self._wire, progress)
            self._wire = self._notice.send
        else:
            self._notice = Notice(notices, route, model, self._send, progress)
            self._send = self._notice.send
        return self._notice

    def _asks_for_a_stream(self) -> bool:
        if self._named is not None:
            return bool(self._noted.get(names.GEN_AI_REQUEST_STREAM))
        try:
            return read_payload(self._address.route, self._headers, self._body or b"")[1]
        except InvalidRequestError:
            return False

    def _find_name(self, body: bytes) -> str:
        if (named := self._address.model or self._field(_MODEL_HEADER)) is not None:
            return named
        named, streams = read_payload(self._address.route, self._headers, body)
        if streams:
            self._noted[names.GEN_AI_REQUEST_STREAM] = True
        if self._times is not None:
            self._times.stream = streams
        self._named = named_model(named)
        return self._named

    def _set_parameters(self, named: str) -> None:
        parameters = self._middleware.parameters.get(named)
        if parameters is None or not self._body:
            return
        self._body = parameters.apply(self._address.route, self._headers, self._body)
        length = str(len(self._body)).encode()
        self._headers = [(name, length if name == b"content-length" else value) for name, value in self._headers]

    def _field(self, name: bytes) -> str | None:
        value = self._fields.get(name)
        return None if value is None else value.decode("latin-1")

    async def _client_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._note_disconnect()

    def _note_disconnect(self) -> None:
        self._disconnected = True
        self._noted[names.CLIENT_DISCONNECTED] = True

    async def _replay(self) -> Message:
        if self._body is not None and not self._replayed:
            self._replayed = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        if self._disconnected:
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._upload.close()
        return message

    def _watch_answer(self, message: Message) -> Awaitable[None]:
        # Not a coroutine of its own: every message passes through here.
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._body, self._fields = None, {}  # they are not needed any more
            self._noted[names.HTTP_RESPONSE_STATUS_CODE] = self._status
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._upload.close()  # not after it: some servers never return from a `send` to a client that has gone
            return self._send_last(message)
        return self._send(message)

    async def _send_last(self, message: Message) -> None:
        await self._send(message)
        if self._lease is not None:
            # The last byte is out: what the app does from here on (background tasks) needs no awake model.
            self._lease.release()
            if self._times is not None:
                self._times.ended()

    def _watching(self, send: Send) -> Send:
        """Tell the times in the headers, and note how long the first byte of a server's answer takes. The rest passes by."""
        begun, streamed = time.monotonic(), False
        self._wire = send

        def watched(message: Message) -> Awaitable[None]:
            nonlocal streamed
            wire = self._wire or send
            if message["type"] == "http.response.start":
                streamed = is_event_stream(message["headers"])
                if self._middleware.timing_headers:
                    message = {**message, "headers": self._timed(message["headers"])}
            elif self._lease is not None and message.get("body"):
                self._send = wire
                if not self._refused:
                    seconds = time.monotonic() - begun
                    self._switcher.telemetry.first_byte(self._lease.model, seconds, streamed=streamed)
            return wire(message)

        return watched

    def _timed(self, headers: Headers) -> Headers:
        """Add what is known of the request's times; nothing if it has no model."""
        model, lease = self._noted.get(names.MODEL), self._lease
        if model is None:
            return headers
        if lease is None:
            return with_times(headers, str(model), queue=self._waited if self._refused else None)
        upstream = None if self._refused else time.monotonic() - self._admitted_at
        return with_times(headers, str(model), queue=self._waited, switch=lease.switch_time, upstream=upstream)

    async def _refuse(self, exc: LLMuxError) -> None:
        self._refused = True
        answer = describe(exc, self._address.route.errors)
        headers = answer.headers
        if isinstance(exc, BodyTimeoutError) and self._scope.get("http_version", "1.1").startswith("1"):
            headers.append((b"connection", b"close"))  # the rest of the body is not waited for
        self._upload.close()
        await self._watch_answer({"type": "http.response.start", "status": answer.status, "headers": headers})
        await self._watch_answer({"type": "http.response.body", "body": answer.body, "more_body": False})
