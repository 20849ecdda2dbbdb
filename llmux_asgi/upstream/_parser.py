"""HTTP/1.1 answers out of the bytes of a connection. Does no I/O; both transports feed it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, Self, cast

import httptools

from .._openai import Headers
from ._protocol import UpstreamFault

__all__ = ["MAX_HEAD", "MAX_HEADERS", "MAX_INTERIM", "Connection", "Http1Response", "ResponseParser", "silence"]

MAX_HEADERS = 256
"""Header fields that an answer may have."""
MAX_HEAD = 65536
"""Bytes of an answer's header fields; also what may come in a row without a byte of body: heads, interim answers, trailers."""
MAX_INTERIM = 32
"""Interim answers that may come before the answer."""

_TOO_LARGE = "its headers are too large"
_FRAMING = (b"content-length", b"transfer-encoding")
_CODING_LENGTH = len(b"transfer-encoding")
_INTERIM = (100, 102, 103)
"""Interim answers that are passed over. Any other of them means something that was not asked for."""


class Connection(Protocol):
    """What an answer needs of the connection that it comes over."""

    def advance(self) -> Awaitable[None]:
        """Return when the answer has got further, is whole or has failed."""
        ...

    def close(self) -> None:
        """Close at once, whatever is under way."""
        ...


class Http1Response:
    """An answer on its way (an `UpstreamResponse`). A `ResponseParser` fills it, the relay empties it."""

    __slots__ = ("_connection", "chunks", "fault", "headers", "sent", "size", "status", "whole")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.status = 0
        """0 until the headers are there."""
        self.headers: Headers = []
        self.chunks: list[bytes] = []
        """What of the body has come and has not been taken."""
        self.size = 0
        """At least the bytes in `chunks`."""
        self.whole = False
        """Whether the last byte is here. The connection may serve another request by then."""
        self.fault = ""
        """Why no more will come, if it is not whole."""
        self.sent = True
        """Whether any of the request may have reached the server."""

    @property
    def ended(self) -> bool:
        """Whether the answer is whole and all of it has been taken."""
        return self.whole and not self.chunks

    async def head(self) -> Self:
        """Return the answer once its headers are there. Raises `UpstreamFault`."""
        while not self.status:
            if self.fault:
                raise UpstreamFault(self.fault, sent=self.sent)
            await self._connection.advance()
        return self

    def __aiter__(self) -> Self:
        """Return the one iterator over the body."""
        return self

    async def __anext__(self) -> bytes:
        """Return all of the body that has come since the last call."""
        while not (chunks := self.chunks):
            if self.whole:
                raise StopAsyncIteration
            if self.fault:
                raise UpstreamFault(self.fault)
            await self._connection.advance()
        self.size = 0
        if len(chunks) == 1:
            return chunks.pop()
        self.chunks = []
        return b"".join(chunks)

    async def aclose(self) -> None:
        """End the exchange; see `UpstreamResponse`."""
        if not self.whole:
            self._connection.close()


class _Refused(Exception):
    """Raised within httptools to stop it."""


class ResponseParser:
    """Reads the answers that come over one connection, one after the other.

    What two readers could understand in two ways is a fault: lengths that differ or are given beside chunks, any coding but
    `chunked`, bare line ends, folded headers. After a fault, or bytes behind an answer, `reusable` is False for ever.
    """

    __slots__ = (
        "_http",
        "_interim",
        "_method",
        "_pending",
        "_pieces",
        "_refusal",
        "_response",
        "_silent",
        "on_body",
        "reusable",
    )

    def __init__(self) -> None:
        self._method = b""
        self._response: Http1Response | None = None
        self._pending: Headers = []
        self._pieces: list[bytes] = []
        self.on_body: Callable[[bytes], None] = self._pieces.append
        self._http = httptools.HttpResponseParser(self)  # looks for its callbacks now
        self._silent = 0
        """Bytes since the last one of a body."""
        self._interim = 0
        self._refusal = ""
        self.reusable = True
        """Whether another answer may follow the present one."""

    def expect(self, method: bytes, response: Http1Response) -> None:
        """Have the answer to a request that is about to be sent put into `response`."""
        self._method = method
        self._response = response
        self._silent = self._interim = 0
        self._pending = []

    def feed(self, data: bytes) -> None:
        """Take what has been received. Sets `whole` or `fault` of the response when it comes to its end."""
        response = self._response
        if response is None:
            self.reusable = False  # nothing was asked
            return
        try:
            self._http.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self.reusable = False
            if not response.whole:
                response.fault = f"sent what is not a valid answer: {self._refusal or exc}."
        pieces = self._pieces
        if pieces:
            response.chunks.append(pieces[0] if len(pieces) == 1 else b"".join(pieces))
            pieces.clear()
            response.size += len(data)
            self._silent = 0
        else:
            self._silent += len(data)
            if self._silent > MAX_HEAD and not (response.whole or response.fault):
                response.fault = f"sent what is not a valid answer: {_TOO_LARGE}."
        if response.whole:
            self._response = None
        elif response.fault:
            self.reusable = False

    def end(self, error: Exception | None = None) -> None:
        """The connection is at its end: closed in order by the server, or by `error`."""
        self.reusable = False
        response = self._response
        if response is None or response.fault:
            return
        self._response = None
        if error is not None:
            response.fault = f"broke off: {str(error).rstrip('.') or type(error).__name__}."
        elif response.status and not any(name.lower() in _FRAMING for name, _ in response.headers):
            response.whole = True
        else:
            response.fault = "broke off: the connection was closed before the answer was complete."

    def fail(self, fault: str) -> None:
        """Give the answer up."""
        self.reusable = False
        if self._response is not None and not self._response.fault:
            self._response.fault = fault

    # What httptools calls

    def on_message_begin(self) -> None:
        """Stop at what comes behind a whole answer."""
        if self._response is None or self._response.whole:
            raise _Refused

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header field, or a trailer, which is dropped."""
        self._pending.append((name, value))

    def on_headers_complete(self) -> None:
        """Judge the head."""
        response = cast(Http1Response, self._response)  # else `on_message_begin` would have stopped it
        http = self._http
        headers, self._pending = self._pending, []
        status = http.get_status_code()
        version = http.get_http_version()
        size = codings = 0
        for name, value in headers:
            size += len(name) + len(value)
            if len(name) == _CODING_LENGTH and name.lower() == b"transfer-encoding":
                codings += 1 if value.lower() == b"chunked" else 2
        if size > MAX_HEAD or len(headers) > MAX_HEADERS:
            self._refuse(_TOO_LARGE)
        if version not in ("1.1", "1.0"):
            self._refuse(f"it is of HTTP/{version}")
        if codings > 1 or (codings and version == "1.0"):
            self._refuse("its transfer coding is not just chunked")
        if status < 200:
            if status not in _INTERIM:
                self._refuse(f"status {status} was not asked for")
            self._interim += 1
            if self._interim > MAX_INTERIM:
                self._refuse("too many interim answers")
            return
        response.headers, response.status = headers, status
        if self._method == b"HEAD":
            # httptools cannot be told that no body follows, whatever the length says.
            response.whole = True
            raise _Refused

    def on_message_complete(self) -> None:
        """Note the end of the answer."""
        response = self._response
        if response is not None and response.status:
            response.whole = True
            # vLLM closes the connection after a 5xx without saying so: the next request would meet that.
            if response.status >= 500 or not self._http.should_keep_alive():
                self.reusable = False

    def _refuse(self, reason: str) -> None:
        self._refusal = reason
        raise _Refused


def silence(limit: float, *, reads: bool) -> str:
    """Say that the server has done nothing for `limit` seconds although it had to send, or to read."""
    return f"was silent for {limit:.3g} s." if reads else f"did not read the request for {limit:.3g} s."
