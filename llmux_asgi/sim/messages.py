"""`/v1/messages`: Anthropic's API, as vLLM serves it over its chat."""

from __future__ import annotations

from typing import Any

import msgspec

from .asgi import HttpError
from .wire import Ask, Wire, encode, event, new_id

__all__ = ["anthropic_body", "messages_wire"]


def anthropic_body(error: HttpError) -> dict[str, Any]:
    """An error in Anthropic's shape, with vLLM's types in it. Errors of validation keep OpenAI's shape, as in vLLM."""
    return {"type": "error", "error": {"type": error.kind, "message": error.message}}


class _MessagesWire(Wire):
    """A text. An aborted answer has no stop reason, as the real server's."""

    prefix = b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"type":"text_delta","text":'
    suffix = b'},"index":0}\n\n'

    def _message(self, content: list[Any], count: int, **more: object) -> dict[str, Any]:
        usage = {"input_tokens": self.ask.prompt_tokens, "output_tokens": count}
        head = {"id": new_id("chatcmpl-"), "type": "message", "role": "assistant", "content": content, "model": self.ask.model}
        return {**head, **more, "usage": usage}

    def _start(self) -> bytes:
        message = self._message([], 0, stop_reason=None, stop_sequence=None)
        return event({"type": "message_start", "message": message}, "message_start")

    def _block(self) -> dict[str, Any]:
        return {"type": "text", "text": ""}

    def first(self) -> bytes:
        block = {"type": "content_block_start", "content_block": self._block(), "index": 0}
        return self._start() + event(block, "content_block_start")

    def _end(self, reason: str | None, count: int) -> bytes:
        delta = {"stop_reason": reason, "stop_sequence": None}
        usage = {"input_tokens": self.ask.prompt_tokens, "output_tokens": count}
        ending = event({"type": "message_delta", "delta": delta, "usage": usage}, "message_delta")
        return ending + event({"type": "message_stop"}, "message_stop")

    def last(self, token: bytes, text: str, reason: str, count: int) -> bytes:
        delta = b"" if token == b'""' else self.prefix + token + self.suffix
        stop = event({"type": "content_block_stop", "index": 0}, "content_block_stop")
        return delta + stop + self._end(self._reason(reason, count), count)

    def nothing(self) -> bytes:
        return self._start() + self._end("end_turn", 0)

    def failed(self, error: HttpError) -> bytes:
        body = {"type": "error", "error": {"type": "internal_error", "message": error.message}}
        return event(body, "error")

    def _reason(self, reason: str, count: int) -> str | None:
        return "max_tokens" if reason == "length" else None

    def whole(self, text: str, reason: str, count: int) -> bytes:
        why = self._reason(reason, count)
        return encode(self._message([self._content(text)], count, **({"stop_reason": why} if why else {})))

    def _content(self, text: str) -> dict[str, Any]:
        return {"type": "text", "text": text}


class _MessagesToolWire(_MessagesWire):
    """A call of a tool."""

    prefix = _MessagesWire.prefix.replace(b'"text_delta","text"', b'"input_json_delta","partial_json"')

    def _block(self) -> dict[str, Any]:
        assert self.ask.tool is not None  # noqa: S101 (for the type)
        return {"type": "tool_use", "id": self.ask.tool.id, "name": self.ask.tool.name, "input": {}}

    def _reason(self, reason: str, count: int) -> str | None:
        if self.ask.tool is not None and self.ask.tool.complete(reason, count):
            return "tool_use"
        return super()._reason(reason, count)

    def _content(self, text: str) -> dict[str, Any]:
        try:
            return {**self._block(), "input": msgspec.json.decode(text)}
        except msgspec.DecodeError as error:  # cut short; vLLM fails in the same place
            raise HttpError(400, str(error), kind="BadRequestError") from None


def messages_wire(ask: Ask) -> Wire:
    """The format of `/v1/messages`."""
    return _MessagesToolWire(ask) if ask.tool is not None else _MessagesWire(ask)
