"""How vLLM 0.32 writes generated tokens: one class for each API, whole answers and server-sent events.

Each event of a token is prefix + token as JSON + suffix, so that a stream costs no encoding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol
from uuid import uuid4

import msgspec

__all__ = ["ChatWire", "CompletionWire", "MessagesWire", "ResponsesWire", "Wire", "event"]

_encode: Callable[[object], bytes] = msgspec.json.encode
_DONE = b"data: [DONE]\n\n"
_FINGERPRINT = "vllm-sim"


def event(data: object, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + _encode(data) + b"\n\n"


class Wire(Protocol):
    """One request's format. `prefix` and `suffix` enclose a token's JSON string in an event."""

    eager: bool
    """Whether `first` is sent at once, even by a sleeping server, or with the first token."""
    prefix: bytes
    suffix: bytes

    def first(self) -> bytes:
        """What precedes the first token."""
        ...

    def last(self, token: bytes, reason: str, count: int) -> bytes:
        """The last token's event (`token` is a JSON string) and all that follows it."""
        ...

    def nothing(self) -> bytes:
        """The stream of a request that was aborted before its first token, but for an eager `first`."""
        ...

    def whole(self, text: str, reason: str, count: int) -> bytes:
        """The answer of a request that does not stream."""
        ...


class _OpenAIWire:
    """What chat and completions share. `model` is the served name, `include_usage` as in `stream_options`."""

    eager = False
    id_prefix = ""

    def __init__(self, model: str, prompt_tokens: int, include_usage: bool) -> None:
        self._model, self._prompt_tokens, self._include_usage = model, prompt_tokens, include_usage
        self._id = f"{self.id_prefix}-{uuid4().hex[:16]}"
        self._created = int(time.time())

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _usage(self, count: int) -> dict[str, int]:
        prompt = self._prompt_tokens
        return {"prompt_tokens": prompt, "total_tokens": prompt + count, "completion_tokens": count}

    def _tail(self, kind: str, count: int) -> bytes:
        if not self._include_usage:
            return _DONE
        return event({**self._head(kind), "choices": [], "usage": self._usage(count)}) + _DONE

    def _answer(self, kind: str, choice: dict[str, Any], reason: str, count: int) -> bytes:
        choice = {"index": 0, **choice, "logprobs": None, "finish_reason": reason, "stop_reason": None}
        details = {"prompt_tokens_details": None, "completion_tokens_details": None}
        return _encode(
            {
                **self._head(kind),
                "choices": [choice],
                "service_tier": None,
                "system_fingerprint": _FINGERPRINT,
                "usage": {**self._usage(count), **details},
            }
        )


class ChatWire(_OpenAIWire):
    """`/v1/chat/completions`."""

    id_prefix = "chatcmpl"
    _chunk = "chat.completion.chunk"

    def __init__(self, model: str, prompt_tokens: int, include_usage: bool) -> None:
        super().__init__(model, prompt_tokens, include_usage)
        head = _encode(self._head(self._chunk))[:-1]
        self.prefix = b"data: " + head + b',"choices":[{"index":0,"delta":{"content":'
        self.suffix = b'},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'

    def first(self) -> bytes:
        """The event that names the role."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        return event({**self._head(self._chunk), "choices": [choice], "prompt_token_ids": None})

    def last(self, token: bytes, reason: str, count: int) -> bytes:
        """With the finish reason, then usage if wanted, then `[DONE]`."""
        ending = b'},"logprobs":null,"finish_reason":"%b","stop_reason":null,"token_ids":null}]}\n\n' % reason.encode()
        return self.prefix + token + ending + self._tail(self._chunk, count)

    def nothing(self) -> bytes:
        """The role and `[DONE]`."""
        return self.first() + self._tail(self._chunk, 0)

    def whole(self, text: str, reason: str, count: int) -> bytes:
        """A `chat.completion`."""
        message = {"role": "assistant", "content": text, "refusal": None, "reasoning": None}
        return self._answer("chat.completion", {"message": message}, reason, count)


class CompletionWire(_OpenAIWire):
    """`/v1/completions`."""

    id_prefix = "cmpl"
    _kind = "text_completion"

    def __init__(self, model: str, prompt_tokens: int, include_usage: bool) -> None:
        super().__init__(model, prompt_tokens, include_usage)
        head = _encode(self._head(self._kind))[:-1]
        self.prefix = b"data: " + head + b',"choices":[{"index":0,"text":'
        self.suffix = b',"logprobs":null,"finish_reason":null,"stop_reason":null,"token_ids":null}]}\n\n'

    def first(self) -> bytes:
        """Nothing."""
        return b""

    def last(self, token: bytes, reason: str, count: int) -> bytes:
        """With the finish reason, then usage if wanted, then `[DONE]`."""
        ending = b',"logprobs":null,"finish_reason":"%b","stop_reason":null,"token_ids":null}]}\n\n' % reason.encode()
        return self.prefix + token + ending + self._tail(self._kind, count)

    def nothing(self) -> bytes:
        """Only `[DONE]`."""
        return self._tail(self._kind, 0)

    def whole(self, text: str, reason: str, count: int) -> bytes:
        """A `text_completion`."""
        return self._answer(self._kind, {"text": text}, reason, count)


class ResponsesWire:
    """`/v1/responses`, the simple case. An aborted answer says `completed`, as the real server's does."""

    eager = True

    def __init__(self, model: str, prompt_tokens: int, include_usage: bool) -> None:
        self._model, self._prompt_tokens = model, prompt_tokens
        self._id, self._item = f"resp_{uuid4().hex[:16]}", f"msg_{uuid4().hex[:16]}"
        self._created = int(time.time())
        fields = {"item_id": self._item, "output_index": 0, "content_index": 0, "type": "response.output_text.delta"}
        self.prefix = b"event: response.output_text.delta\ndata: " + _encode(fields)[:-1] + b',"delta":'
        self.suffix = b"}\n\n"

    def _response(self, status: str, output: list[Any], count: int | None = None) -> dict[str, Any]:
        usage = None
        if count is not None:
            total = self._prompt_tokens + count
            usage = {"input_tokens": self._prompt_tokens, "output_tokens": count, "total_tokens": total}
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        head = {"id": self._id, "object": "response", "created_at": self._created, "model": self._model}
        return {**head, "status": status, "incomplete_details": incomplete, "output": output, "usage": usage}

    def _final(self, text: str, reason: str, count: int) -> dict[str, Any]:
        content = [{"type": "output_text", "text": text, "annotations": []}]
        item = {"id": self._item, "type": "message", "role": "assistant", "status": "completed", "content": content}
        return self._response("incomplete" if reason == "length" else "completed", [item], count)

    def first(self) -> bytes:
        """`response.created`."""
        return event({"type": "response.created", "response": self._response("in_progress", [])}, "response.created")

    def last(self, token: bytes, reason: str, count: int) -> bytes:
        """The last delta and `response.completed`."""
        final = {"type": "response.completed", "response": self._final("", reason, count)}
        return self.prefix + token + self.suffix + event(final, "response.completed")

    def nothing(self) -> bytes:
        """Completed, it says."""
        final = {"type": "response.completed", "response": self._final("", "abort", 0)}
        return event(final, "response.completed")

    def whole(self, text: str, reason: str, count: int) -> bytes:
        """A `response`."""
        return _encode(self._final(text, reason, count))


class MessagesWire:
    """`/v1/messages` (Anthropic's). An aborted answer has no stop reason, as the real server's."""

    eager = False
    prefix = b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"type":"text_delta","text":'
    suffix = b'},"index":0}\n\n'

    def __init__(self, model: str, prompt_tokens: int, include_usage: bool) -> None:
        self._model, self._prompt_tokens = model, prompt_tokens

    def _message(self, content: list[Any], reason: str | None, count: int) -> dict[str, Any]:
        usage = {"input_tokens": self._prompt_tokens, "output_tokens": count}
        head = {"id": f"chatcmpl-{uuid4().hex[:16]}", "type": "message", "role": "assistant", "model": self._model}
        return {**head, "content": content, **({"stop_reason": reason} if reason else {}), "usage": usage}

    def first(self) -> bytes:
        """`message_start` and `content_block_start`."""
        start = event({"type": "message_start", "message": self._message([], None, 0)}, "message_start")
        block = {"type": "content_block_start", "content_block": {"type": "text", "text": ""}, "index": 0}
        return start + event(block, "content_block_start")

    def _end(self, reason: str | None, count: int) -> bytes:
        delta = {"stop_reason": reason, "stop_sequence": None}
        usage = {"input_tokens": self._prompt_tokens, "output_tokens": count}
        ending = event({"type": "message_delta", "delta": delta, "usage": usage}, "message_delta")
        return ending + event({"type": "message_stop"}, "message_stop")

    def last(self, token: bytes, reason: str, count: int) -> bytes:
        """The last delta and the closing events."""
        stop = event({"type": "content_block_stop", "index": 0}, "content_block_stop")
        return self.prefix + token + self.suffix + stop + self._end("max_tokens" if reason == "length" else None, count)

    def nothing(self) -> bytes:
        """Start and end, the latter with `end_turn`."""
        start = event({"type": "message_start", "message": self._message([], None, 0)}, "message_start")
        return start + self._end("end_turn", 0)

    def whole(self, text: str, reason: str, count: int) -> bytes:
        """A `message`."""
        content = [{"type": "text", "text": text}]
        return _encode(self._message(content, "max_tokens" if reason == "length" else None, count))
