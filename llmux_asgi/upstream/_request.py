"""The bytes of a request's head. Pure."""

from __future__ import annotations

import re

from .._openai import Headers
from ..exceptions import InvalidRequestError

__all__ = ["request_head"]

_is_token = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+").fullmatch
_is_target = re.compile(rb"[\x21-\x7e\x80-\xff]+").fullmatch
_WITHOUT_BODY = frozenset({b"GET", b"HEAD", b"DELETE", b"OPTIONS"})


def request_head(method: bytes, authority: bytes, target: bytes, headers: Headers, length: int) -> bytes:
    """Return the head of a request with a body of `length` bytes, the empty line included.

    Raises `InvalidRequestError` for what would be read as something else than was meant: a line end in a header, a space in the
    target.
    """
    fields = b"\r\n".join(map(b": ".join, headers))
    count = len(headers) + 3
    if length or method not in _WITHOUT_BODY:
        head = b"%b %b HTTP/1.1\r\nhost: %b\r\ncontent-length: %d\r\n%b\r\n\r\n" % (method, target, authority, length, fields)
        count += 1
    else:
        head = b"%b %b HTTP/1.1\r\nhost: %b\r\n%b\r\n\r\n" % (method, target, authority, fields)
    if not fields:
        head = head[:-2]
    if (
        head.count(b"\n") != count
        or head.count(b"\r") != count
        or b"\0" in head
        or _is_target(target) is None
        or _is_token(method) is None
    ):
        raise InvalidRequestError("The request's method, path, query or headers contain what HTTP does not allow.")
    return head
