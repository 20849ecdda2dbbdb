"""`/v1/chat/completions` and `/v1/completions`: OpenAI's older APIs."""

from __future__ import annotations

import time
from typing import Any

from .wire import DONE, Ask, Wire, encode, event, new_id, usage_of

__all__ = ["CompletionWire", "chat_wire"]

_FINGERPRINT = "vllm-sim"
_PROMPT = {"prompt_logprobs": None, "prompt_token_ids": None}
_ENDING = {"kv_transfer_params": None, "ec_transfer_params": None, "metrics": None}


class _OpenAIWire(Wire):
    """What chat and completions share."""

    id_prefix = ""
    chunk = ""
    kind = ""

    def __init__(self, ask: Ask) -> None:
        super().__init__(ask)
        self._id = new_id(self.id_prefix)
        self._created = int(time.time())

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.ask.model}

    def _choice(self, choice: dict[str, Any], **more: object) -> bytes:
        return event({**self._head(self.chunk), "choices": [{"index": 0, **choice, "logprobs": None, **more}]})

    def _tail(self, count: int) -> bytes:
        if not self.ask.include_usage:
            return DONE
        usage = usage_of(self.ask.prompt_tokens, count)
        return event({**self._head(self.chunk), "choices": [], "usage": usage, "system_fingerprint": _FINGERPRINT}) + DONE

    def _answer(self, choice: dict[str, Any], reason: str, count: int, **more: object) -> bytes:
        ending = {"logprobs": None, "finish_reason": reason, "stop_reason": None, "token_ids": None, "routed_experts": None}
        details = {"prompt_tokens_details": None, "completion_tokens_details": None}
        return encode(
            {
                **self._head(self.kind),
                "choices": [{"index": 0, **choice, **ending}],
                "service_tier": None,
                "system_fingerprint": _FINGERPRINT,
                "usage": {**usage_of(self.ask.prompt_tokens, count), **details},
                **more,
                **_ENDING,
            }
        )


class _ChatWire(_OpenAIWire):
    """A text in a chat."""

    id_prefix = "chatcmpl-"
    chunk = "chat.completion.chunk"
    kind = "chat.completion"

    def __init__(self, ask: Ask) -> None:
        super().__init__(ask)
        head = encode(self._head(self.chunk))[:-1]
        self.prefix = b"data: " + head + b',"choices":[{"index":0,"delta":{"content":'
        self.suffix = b'},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'

    def _role(self) -> bytes:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        return event({**self._head(self.chunk), "choices": [choice], "prompt_token_ids": None, "prompt_text": None})

    def first(self) -> bytes:
        return self._role()

    def last(self, token: bytes, text: str, reason: str, count: int) -> bytes:
        ending = b'},"logprobs":null,"finish_reason":"%b","stop_reason":null,"token_ids":null}]' % reason.encode()
        fingerprint = b"" if self.ask.include_usage else b',"system_fingerprint":"%b"' % _FINGERPRINT.encode()
        return self.prefix + token + ending + fingerprint + b"}\n\n" + self._tail(count)

    def nothing(self) -> bytes:
        return self._role() + self._tail(0)

    def whole(self, text: str, reason: str, count: int) -> bytes:
        return self._answer({"message": self._message(text)}, reason, count, **_PROMPT, prompt_text=None)

    @staticmethod
    def _message(text: str, **more: object) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None, "annotations": None, "audio": None}
        return {**message, "function_call": None, **more, "reasoning": None}


class _ChatToolWire(_ChatWire):
    """A call of a tool in a chat. It ends with `stop` if the request named the tool, as OpenAI's does, or `tool_calls`."""

    def __init__(self, ask: Ask) -> None:
        super().__init__(ask)
        head = encode(self._head(self.chunk))[:-1]
        delta = b',"choices":[{"index":0,"delta":{"content":null,"tool_calls":[{"index":0,"function":{"arguments":'
        self.prefix = b"data: " + head + delta
        self.suffix = b'}}]},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'

    def first(self) -> bytes:
        assert self.ask.tool is not None  # noqa: S101 (for the type)
        call = {"id": self.ask.tool.id, "type": "function", "index": 0, "function": {"name": self.ask.tool.name}}
        delta = {"content": None, "tool_calls": [call]}
        return self._role() + self._choice({"delta": delta}, finish_reason=None, token_ids=None)

    def last(self, token: bytes, text: str, reason: str, count: int) -> bytes:
        delta = b"" if token == b'""' else self.prefix + token + self.suffix
        reason = self._reason(reason, count)
        return delta + self._choice({"delta": {}}, finish_reason=reason, stop_reason=None, token_ids=None) + self._tail(count)

    def whole(self, text: str, reason: str, count: int) -> bytes:
        assert self.ask.tool is not None  # noqa: S101 (for the type)
        call = {"id": self.ask.tool.id, "type": "function", "function": {"name": self.ask.tool.name, "arguments": text}}
        message = self._message("", tool_calls=[call])
        return self._answer({"message": message}, self._reason(reason, count), count, **_PROMPT, prompt_text=None)

    def _reason(self, reason: str, count: int) -> str:
        tool = self.ask.tool
        if tool is None or not tool.complete(reason, count):
            return reason
        return "stop" if tool.named else "tool_calls"


def chat_wire(ask: Ask) -> Wire:
    """The format of `/v1/chat/completions`."""
    return _ChatToolWire(ask) if ask.tool is not None else _ChatWire(ask)


class CompletionWire(_OpenAIWire):
    """The format of `/v1/completions`."""

    id_prefix = "cmpl-"
    chunk = kind = "text_completion"
    _ids = b',"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}\n\n'

    def __init__(self, ask: Ask) -> None:
        super().__init__(ask)
        head = encode(self._head(self.kind))[:-1]
        self.prefix = b"data: " + head + b',"choices":[{"index":0,"text":'
        self.suffix = (
            b',"logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}\n\n'
        )

    def last(self, token: bytes, text: str, reason: str, count: int) -> bytes:
        """With the finish reason, then usage if wanted, then `[DONE]`."""
        ending = (
            b',"logprobs":null,"finish_reason":"%b","stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}\n\n'
            % reason.encode()
        )
        return self.prefix + token + ending + self._tail(count)

    def nothing(self) -> bytes:
        """Only `[DONE]`."""
        return self._tail(0)

    def whole(self, text: str, reason: str, count: int) -> bytes:
        """A `text_completion`."""
        return self._answer({"text": text, **_PROMPT}, reason, count)
