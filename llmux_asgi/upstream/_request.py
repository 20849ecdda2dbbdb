"""The bytes of a request's head. Pure."""

from __future__ import annotations

import re
from functools import lru_cache

from .._openai import Headers
from ..exceptions import InvalidRequestError

__all__ = ["request_head"]

_is_token = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+").fullmatch
_is_target = re.compile(rb"[\x21-\x7e\x80-\xff]+").fullmatch
_NOT_ALLOWED = "The request's method, path, query or headers contain what HTTP does not allow."
_WITHOUT_BODY = frozenset({b"GET", b"HEAD", b"DELETE", b"OPTIONS"})


def request_head(method: bytes, authority: bytes, target: bytes, headers: Headers, length: int) -> bytes:
    """Return the head of a request with a body of `length` bytes, the empty line included.

    Raises `InvalidRequestError` for what would be read as something else than was meant: a line end in a header, a space in
    the target.
    """
    fields = list(map(b": ".join, headers))
    raw = b"".join(fields)
    # Not by `in`, which makes an error of bytes, and forgets it, before it looks for them.
    if raw.find(b"\n") >= 0 or raw.find(b"\r") >= 0 or raw.find(b"\0") >= 0:
        raise InvalidRequestError(_NOT_ALLOWED)
    line = (_kept_line if len(target) < _SHORT else _request_line)(method, authority, target)
    if length or method not in _WITHOUT_BODY:
        fields.append(b"content-length: %d" % length)
    return b"%b%b\r\n\r\n" % (line, b"\r\n".join(fields)) if fields else line + b"\r\n"


def _request_line(method: bytes, authority: bytes, target: bytes) -> bytes:
    if _is_token(method) is None or _is_target(target) is None or _is_target(authority) is None:
        raise InvalidRequestError(_NOT_ALLOWED)
    return b"%b %b HTTP/1.1\r\nhost: %b\r\n" % (method, target, authority)


_SHORT = 256
_kept_line = lru_cache(maxsize=128)(_request_line)
"""Most requests have one of a few targets."""
