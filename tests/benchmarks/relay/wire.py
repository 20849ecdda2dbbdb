"""The bytes on the wire: one request of each kind, the answer to it, and how an answer is checked."""

from __future__ import annotations

import json
from typing import Literal, TypeAlias

__all__ = ["BURST_EVENTS", "END", "EVENT_SECONDS", "MODEL", "Kind", "answer", "body_of", "events", "head", "kind_of", "request"]

Kind: TypeAlias = Literal["plain", "burst", "slow"]
"""plain: 1 KB of JSON; burst: all events of a stream at once; slow: an event each `EVENT_SECONDS`."""
MODEL = "m"
BURST_EVENTS = 100
EVENT_SECONDS = 0.05
END = b"0\r\n\r\n"
"""The last bytes of a chunked body."""

_BODY_BYTES = 1024
_HEADERS = """\
accept: application/json
accept-encoding: gzip, deflate
user-agent: OpenAI/Python 3.54.0
x-stainless-lang: python
x-stainless-package-version: 3.54.0
x-stainless-os: Linux
x-stainless-arch: x64
x-stainless-runtime: CPython
x-stainless-runtime-version: 3.11.7
x-stainless-async: async:asyncio
x-stainless-retry-count: 0
x-stainless-read-timeout: 600
authorization: Bearer sk-no-key-required
content-type: application/json
"""
"""What the `openai` client sends beside the host and the length."""


def request(kind: Kind, port: int) -> bytes:
    """A chat request with a body of 1 KB, to the server at `port`."""
    content = {"model": MODEL, "messages": [{"role": "user", "content": ""}], "user": kind, "stream": kind != "plain"}
    content["messages"] = [{"role": "user", "content": "x" * (_BODY_BYTES - len(json.dumps(content)))}]
    body = json.dumps(content).encode()
    top = f"POST /v1/chat/completions HTTP/1.1\nhost: 127.0.0.1:{port}\n{_HEADERS}content-length: {len(body)}\n\n"
    return top.replace("\n", "\r\n").encode() + body


def kind_of(body: bytes) -> Kind:
    """What a request asks for. A router may have written its body anew, so no place in it is known."""
    if b'"burst"' in body:
        return "burst"
    return "slow" if b'"slow"' in body else "plain"


def body_of(kind: Kind, count: int) -> bytes:
    """The body of the answer, without its transfer coding; `count` events if it is a stream."""
    return _PLAIN if kind == "plain" else b"".join(events(count))


def head(content_type: str, length: int | None = None) -> bytes:
    """The head of an answer; without a length its body is chunked."""
    framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    top = f"HTTP/1.1 200 OK\ndate: Mon, 01 Jan 2024 00:00:00 GMT\nserver: uvicorn\n{framing}\ncontent-type: {content_type}\n\n"
    return top.replace("\n", "\r\n").encode()


def answer(content: bytes, content_type: str = "application/json") -> bytes:
    """A whole answer with a length."""
    return head(content_type, len(content)) + content


def events(count: int) -> list[bytes]:
    """The events of a stream, all different; the last is `[DONE]`."""
    found = []
    for index in range(count - 1):
        choice = {"index": 0, "delta": {"content": f" token{index}"}, "logprobs": None, "finish_reason": None}
        chunk = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 0, "model": MODEL, "choices": [choice]}
        found.append(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    return [*found, b"data: [DONE]\n\n"]


def _plain() -> bytes:
    message: dict[str, object] = {"role": "assistant", "content": "", "refusal": None, "tool_calls": []}
    usage = {"prompt_tokens": 9, "total_tokens": 21, "completion_tokens": 12}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    content = {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [choice],
        "usage": usage,
    }
    message["content"] = "y" * (_BODY_BYTES - len(json.dumps(content)))
    return json.dumps(content).encode()


_PLAIN = _plain()
