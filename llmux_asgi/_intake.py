"""What is refused before a request is looked at, and how long and how much of it is taken in."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

from starlette.types import Receive, Scope

from ._openai import Headers
from ._waiting import within
from .exceptions import (
    BodyTimeoutError,
    BodyTooLargeError,
    BuffersFullError,
    EncodedBodyError,
    HeadersTooLargeError,
    InvalidRequestError,
)

__all__ = ["Intake", "Upload"]

# A server's parser lets none of these pass. Others that hand a request to the gateway may: HTTP/2, a host's own rewriting.
_BAD_QUERY = re.compile(rb"[^!-~]|#")
_AS_IT_IS = (b"", b"identity")
SCOPE_HEAD_BYTES = "llmux.head_bytes"
"""Key of the ASGI scope: how many bytes, at most, a request's target and headers have. Only a server sets it that lets no line
break and no null byte through."""


@dataclass(slots=True)
class Intake:
    """The limits, and the bytes of all bodies that are held at present."""

    max_headers: int
    """Bytes of the names and values of a request's headers and its query, together."""
    body_timeout: float
    """Seconds in which a body has to arrive whole."""
    max_buffered: int
    """Bytes of all bodies together, until their requests are over."""
    held: int = 0

    def check(self, scope: Scope, fields: Mapping[bytes, bytes]) -> None:
        """Raise `InvalidRequestError` if a request must not be passed on, or cannot be. `fields` are its headers by name."""
        headers: Headers = scope["headers"]
        query: bytes = scope.get("query_string", b"")
        if scope.get(SCOPE_HEAD_BYTES, self.max_headers + 1) > self.max_headers:
            raw = b"".join(chain.from_iterable(headers))
            if len(raw) + len(query) > self.max_headers:
                raise HeadersTooLargeError(self.max_headers)
            if raw.find(b"\n") >= 0 or raw.find(b"\r") >= 0 or raw.find(b"\0") >= 0:
                raise InvalidRequestError("A header has a line break or a null byte in it.")
        if query and _BAD_QUERY.search(query):
            raise InvalidRequestError("The query has characters in it that must be percent-encoded.")
        if b"content-encoding" in fields:
            for name, value in headers:
                if name == b"content-encoding" and value.strip().lower() not in _AS_IT_IS:
                    raise EncodedBodyError


class Upload:
    """The body of one request on its way in."""

    __slots__ = ("_began", "_held", "_intake", "_receive")

    def __init__(self, intake: Intake, receive: Receive) -> None:
        self._intake = intake
        self._receive = receive
        self._began = time.monotonic()
        self._held = 0

    async def read(self, limit: int, announced: bytes) -> bytes | None:
        """Return the body, `None` if the client left before it was whole. `announced` is its `Content-Length`.

        Raises `BodyTooLargeError` beyond `limit` bytes, `BodyTimeoutError` or `BuffersFullError`.
        """
        if announced.isdigit() and int(announced) > limit:
            raise BodyTooLargeError(limit)
        intake = self._intake
        whole: io.BytesIO | None = None
        while True:
            try:
                message = await within(self._began + intake.body_timeout - time.monotonic(), self._receive())
            except TimeoutError:
                raise BodyTimeoutError(intake.body_timeout) from None
            if message["type"] == "http.disconnect":
                return None
            part: bytes = message.get("body", b"")
            if intake.held + len(part) > intake.max_buffered:
                raise BuffersFullError(intake.max_buffered)
            intake.held += len(part)
            self._held += len(part)
            if self._held > limit:
                raise BodyTooLargeError(limit)
            last = not message.get("more_body", False)
            if whole is None and last:
                return part
            # Grows in place, and gives what it holds without a copy: joining the parts would hold everything twice.
            whole = whole or io.BytesIO()
            whole.write(part)
            if last:
                return whole.getvalue()

    def close(self) -> None:
        """The request is over, and its body not held any more."""
        self._intake.held -= self._held
        self._held = 0
