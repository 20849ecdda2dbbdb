"""How vLLM 0.32 writes what it generates: a `Wire` is one request's format, whole or as server-sent events.

The APIs are in `chat`, `responses`, `messages` and `audio`. What they send was recorded from a real server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import msgspec

from .asgi import HttpError
from .tools import ToolCall

__all__ = ["DONE", "Ask", "Wire", "encode", "event", "new_id", "usage_of"]

encode: Callable[[object], bytes] = msgspec.json.encode
DONE = b"data: [DONE]\n\n"


def event(data: object, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + encode(data) + b"\n\n"


def new_id(prefix: str) -> str:
    """`prefix` and 16 hexadecimal digits, as vLLM makes its ids."""
    return prefix + uuid4().hex[:16]


def usage_of(prompt: int, completion: int) -> dict[str, int]:
    """The `usage` of OpenAI's older APIs, in tokens."""
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}


@dataclass(frozen=True)
class Ask:
    """What a wire must know of its request. `model` is the served name; counts are in tokens."""

    model: str
    prompt_tokens: int
    max_tokens: int
    include_usage: bool = False
    tool: ToolCall | None = None
    """The call that answers the request, if it demands one."""
    echo: dict[str, Any] | None = None
    """Fields that the answer repeats."""


class Wire:
    """One request's format. An event of a token is `prefix`, the token as a JSON string, `suffix`."""

    prefix = b""
    suffix = b""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask

    def opening(self) -> bytes:
        """What is sent at once, even by a server that sleeps."""
        return b""

    def first(self) -> bytes:
        """What precedes the first token, and comes with it."""
        return b""

    def middle(self, start: int, tokens: Sequence[bytes]) -> bytes:
        """The events of `tokens` (JSON strings); `start` tokens were sent before them."""
        prefix, suffix = self.prefix, self.suffix
        return b"".join([part for token in tokens for part in (prefix, token, suffix)])

    def last(self, token: bytes, text: str, reason: str, count: int) -> bytes:
        """The event of the last token (a JSON string, empty if there is none) and what follows; `text` is the whole."""
        raise NotImplementedError

    def nothing(self) -> bytes:
        """The stream of a request that was aborted before its first token, but for `opening`."""
        raise NotImplementedError

    def failed(self, error: HttpError) -> bytes:
        """The end of a stream whose engine has died."""
        return event(error.body()) + DONE

    def whole(self, text: str, reason: str, count: int) -> bytes:
        """The answer of a request that does not stream."""
        raise NotImplementedError
