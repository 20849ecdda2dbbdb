"""Requests whose answers have a recorded shape; `python -m tests.contract.inference URL MODEL` records that of a real server.

A shape is an answer without what differs from run to run: names and types are left, and the values that clients look at.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import httpx
import msgspec

RECORDED = Path(__file__).with_name("recorded.json")
TOLD = {"object", "type", "role", "code", "param", "finish_reason", "stop_reason", "status", "owned_by"}
"""Fields whose values belong to the shape."""

_CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "the fox"}]}
_USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
# More arguments than tokens are asked for, so that both servers are cut short: the tiny model never ends a call.
_SCHEMA = {"type": "object", "properties": {name: {"type": "string"} for name in "abcdefghijklmnop"}}
_TOOL = {"type": "function", "function": {"name": "go", "parameters": _SCHEMA}}
_CALL: dict[str, Any] = {**_CHAT, "max_tokens": 60, "temperature": 0, "tools": [_TOOL], "tool_choice": "required"}
_NAMED = {"type": "function", "function": {"name": "no"}}
_FLAT = {"type": "function", "name": "go", "parameters": _SCHEMA}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {**_CHAT, "max_tokens": 3, "temperature": 0}),
    "chat, streamed": ("/v1/chat/completions", {**_CHAT, "max_tokens": 3, "temperature": 0, "stream": True}),
    "chat, streamed with usage": ("/v1/chat/completions", {**_CHAT, "max_tokens": 3, "temperature": 0, **_USAGE}),
    "chat, a tool, streamed": ("/v1/chat/completions", {**_CALL, **_USAGE}),
    "chat, an unknown tool": ("/v1/chat/completions", {**_CALL, "tool_choice": _NAMED}),
    "chat, no tools": ("/v1/chat/completions", {**_CHAT, "tool_choice": "required"}),
    "chat, no messages": ("/v1/chat/completions", {}),
    "chat, empty": ("/v1/chat/completions", {"messages": []}),
    "chat, another model": ("/v1/chat/completions", {**_CHAT, "model": "another"}),
    "chat, no tokens": ("/v1/chat/completions", {**_CHAT, "max_tokens": 0}),
    "completion": ("/v1/completions", {"prompt": "the", "max_tokens": 3, "temperature": 0}),
    "completion, streamed": ("/v1/completions", {"prompt": "the", "max_tokens": 3, "temperature": 0, **_USAGE}),
    "completion, no prompt": ("/v1/completions", {}),
    "response": ("/v1/responses", {"input": "the fox", "max_output_tokens": 3, "temperature": 0}),
    "response, streamed": ("/v1/responses", {"input": "the fox", "max_output_tokens": 3, "temperature": 0, "stream": True}),
    "response, a tool, streamed": (
        "/v1/responses",
        {"input": "x", "max_output_tokens": 60, "temperature": 0, "tools": [_FLAT], "tool_choice": "required", "stream": True},
    ),
    "response, another model": ("/v1/responses", {"input": "x", "model": "another"}),
    "response, no input": ("/v1/responses", {}),
    "response, cancelled though unknown": ("/v1/responses/resp_unknown/cancel", {}),
    "message": ("/v1/messages", {**_CHAT, "max_tokens": 3, "temperature": 0}),
    "message, streamed": ("/v1/messages", {**_CHAT, "max_tokens": 3, "temperature": 0, "stream": True}),
    "message, a tool, streamed": (
        "/v1/messages",
        {
            **_CHAT,
            "max_tokens": 60,
            "temperature": 0,
            "tools": [{"name": "go", "input_schema": _SCHEMA}],
            "tool_choice": {"type": "any"},
            "stream": True,
        },
    ),
    "message, another model": ("/v1/messages", {**_CHAT, "max_tokens": 3, "temperature": 0, "model": "another"}),
    "message, no limit": ("/v1/messages", _CHAT),
    "message, empty": ("/v1/messages", {"messages": [], "max_tokens": 3, "temperature": 0}),
    "count of tokens": ("/v1/messages/count_tokens", _CHAT),
    "count of tokens, another model": ("/v1/messages/count_tokens", {**_CHAT, "model": "another"}),
    "tokens": ("/tokenize", {"prompt": "the fox"}),
    "tokens of a chat": ("/tokenize", {**_CHAT, "return_token_strs": True}),
    "tokens of nothing": ("/tokenize", {}),
    "tokens, another model": ("/tokenize", {"prompt": "x", "model": "another"}),
    "text of tokens": ("/detokenize", {"tokens": [40, 41]}),
    "text of nothing": ("/detokenize", {}),
}


def shape(value: Any, name: str = "") -> Any:
    """The shape of a JSON value: a list has that of its first item."""
    if isinstance(value, dict):
        # Tools come back as they were sent: what vLLM adds to them is no concern here.
        return {key: shape(each, key) for key, each in value.items() if key not in ("tools", "properties")}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    if name in TOLD:
        return value
    return None if value is None else "number" if isinstance(value, int | float) else type(value).__name__


def shape_of(answer: httpx.Response) -> dict[str, Any]:
    """The shape of an answer: of each kind of event, in their order, if it is a stream. A kind is told once in a row."""
    head = {"status": answer.status_code, "content_type": answer.headers.get("content-type", "")}
    if not head["content_type"].startswith("text/event-stream"):
        return {**head, "body": shape(answer.json())}
    events: list[Any] = []
    for block in answer.text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        data = lines.get("data", "")
        event = {**lines, "data": shape(msgspec.json.decode(data)) if data.startswith("{") else data}
        if block and event not in events[-1:]:
            events.append(event)
    return {**head, "events": events}


def ask(client: httpx.Client, model: str, case: str) -> dict[str, Any]:
    """The shape of what a server answers."""
    path, body = CASES[case]
    return shape_of(client.post(path, json={"model": model, **body}))


def main() -> None:
    """Record."""
    url, model = sys.argv[1:]
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        recorded = {case: ask(client, model, case) for case in CASES}
    RECORDED.write_bytes(msgspec.json.format(msgspec.json.encode(recorded), indent=1) + b"\n")


if __name__ == "__main__":
    main()
