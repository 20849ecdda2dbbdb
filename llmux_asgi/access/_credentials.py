"""Where clients put their API key, and how it is taken out. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from .._openai import Headers
from ..exceptions import AuthenticationError

__all__ = ["SUBPROTOCOL", "find_credential", "without_subprotocol"]

SUBPROTOCOL = "openai-insecure-api-key."
"""Browsers cannot set headers on a WebSocket: OpenAI's clients put the key behind this, as a subprotocol."""


def find_credential(headers: Headers, subprotocols: Sequence[str] = ()) -> str | None:
    """Return the API key that came with a request, `None` if there is none.

    It is in `authorization: Bearer …`, in `x-api-key`, or in a WebSocket's subprotocol. Raises `AuthenticationError` if it
    cannot be told which one is meant.
    """
    bearers = [value for name, value in headers if name == b"authorization"]
    keys = [value for name, value in headers if name == b"x-api-key"]
    protocols = [each.removeprefix(SUBPROTOCOL) for each in subprotocols if each.startswith(SUBPROTOCOL)]
    if len(bearers) > 1 or len(keys) > 1 or len(protocols) > 1:
        raise AuthenticationError("The request has several API keys.")
    found = {*protocols, *(value.decode("latin-1").strip() for value in keys)}
    for value in bearers:
        scheme, _, token = value.decode("latin-1").strip().partition(" ")
        if scheme.lower() != "bearer":
            raise AuthenticationError("The header authorization must be: Bearer, a blank, the API key.")
        found.add(token.strip())
    if len(found) > 1:
        raise AuthenticationError("The request has several API keys that differ.")
    return next(iter(found), None) or None


def without_subprotocol(headers: Headers) -> Headers:
    """Take the key out of the subprotocols that a WebSocket's client offers."""
    kept: Headers = []
    for name, value in headers:
        if name == b"sec-websocket-protocol":
            offered = [each.strip() for each in value.split(b",")]
            value = b", ".join(each for each in offered if not each.startswith(SUBPROTOCOL.encode("ascii")))
            if not value:
                continue
        kept.append((name, value))
    return kept
