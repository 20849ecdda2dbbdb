"""`/v1/responses`: OpenAI's newer API, and the store that keeps its answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from .asgi import HttpError
from .engine import Engine
from .sequence import Sequence as EngineSequence
from .wire import Ask, Wire, encode, event, new_id

__all__ = ["ResponseStore", "ResponsesWire"]

_KEPT = 1000
_DEFAULTS: dict[str, Any] = {
    "incomplete_details": None,
    "instructions": None,
    "metadata": None,
    "object": "response",
    "parallel_tool_calls": True,
    "temperature": 1.0,
    "tool_choice": "none",
    "tools": [],
    "top_p": 1.0,
    "background": False,
    "max_tool_calls": None,
    "previous_response_id": None,
    "prompt": None,
    "reasoning": None,
    "service_tier": "auto",
    "text": None,
    "top_logprobs": None,
    "truncation": "disabled",
    "user": None,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "kv_transfer_params": None,
    "ec_transfer_params": None,
    "input_messages": None,
    "output_messages": None,
}
_INPUT_DETAILS = {"cached_tokens": 0, "cache_write_tokens": 0, "input_tokens_per_turn": [], "cached_tokens_per_turn": []}
_OUTPUT_DETAILS = {
    "reasoning_tokens": 0,
    "tool_output_tokens": 0,
    "output_tokens_per_turn": [],
    "tool_output_tokens_per_turn": [],
}


class ResponseStore:
    """The answers that can be had again, the last thousand of them; `VLLM_ENABLE_RESPONSES_API_STORE=1` in a real server."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._kept: dict[str, dict[str, Any]] = {}
        self._running: dict[str, EngineSequence] = {}

    def keep(self, response: dict[str, Any]) -> None:
        """Keep an answer, or its next state."""
        self._kept[response["id"]] = response
        if len(self._kept) > _KEPT:
            del self._kept[next(iter(self._kept))]

    def retrieve(self, name: str) -> dict[str, Any]:
        """The answer with this id. Raises `HttpError` 404."""
        if name not in self._kept:
            message = f"Response with id '{name}' not found."
            raise HttpError(404, message, kind="invalid_request_error", param="response_id")
        return self._kept[name]

    def cancel(self, name: str) -> dict[str, Any]:
        """Stop an answer that is made in the background. Raises `HttpError` 404, or 400 if it is not."""
        response = self.retrieve(name)
        if response["status"] not in ("queued", "in_progress"):
            message = "Cannot cancel a synchronous response."
            raise HttpError(400, message, kind="invalid_request_error", param="response_id")
        response["status"] = "cancelled"
        if name in self._running:
            self._engine.drop(self._running[name])
        return response

    async def run(self, wire: ResponsesWire, sequence: EngineSequence, words: Any) -> None:
        """Make an answer in the background; `words` gives the text of so many tokens. `wire` keeps it when it is done."""
        name = wire.id
        self._running[name] = sequence
        try:
            await self._engine.produced(sequence, 1)
            if self._kept[name]["status"] == "queued":
                self._kept[name]["status"] = "in_progress"
            ready = await self._engine.produced(sequence, sequence.total)
        finally:
            del self._running[name]
        if sequence.finish == "error":
            self._kept[name]["status"] = "failed"
        elif sequence.finish != "gone":
            wire.whole(words(ready), sequence.finish or "length", ready)


class ResponsesWire(Wire):
    """The format of `/v1/responses`. An aborted answer says `completed`, as the real server's does."""

    def __init__(self, ask: Ask, store: ResponseStore | None) -> None:
        super().__init__(ask)
        self.id = new_id("resp_")
        self._store = store
        self._item_id = new_id("fc_" if ask.tool is not None else "msg_")
        self._created = int(time.time())
        fixed = {"item_id": self._item_id, "output_index": 0}
        if ask.tool is None:
            name, fixed = "response.output_text.delta", {"content_index": 0, **fixed, "logprobs": []}
        else:
            name = "response.function_call_arguments.delta"
        self.prefix = f"event: {name}\ndata: ".encode() + encode({"type": name, **fixed})[:-1] + b',"delta":'

    # An item is what the answer consists of: a message or a call

    def _item(self, text: str, status: str) -> dict[str, Any]:
        if (tool := self.ask.tool) is not None:
            call = {"arguments": text, "call_id": tool.id, "name": tool.name, "type": "function_call", "id": self._item_id}
            return {**call, "async": None, "caller": None, "namespace": None, "status": status}
        content = [self._part(text)] if status == "completed" else []
        head = {"id": self._item_id, "content": content, "role": "assistant", "status": status}
        return {**head, "type": "message", "phase": None}

    @staticmethod
    def _part(text: str) -> dict[str, Any]:
        return {"annotations": [], "text": text, "type": "output_text", "logprobs": None}

    def response(self, status: str, output: list[Any], count: int | None = None) -> dict[str, Any]:
        """The whole object; `count` tokens of output, None while it is being made."""
        usage = None
        if count is not None:
            prompt = self.ask.prompt_tokens
            usage = {
                "input_tokens": prompt,
                "input_tokens_details": _INPUT_DETAILS,
                "output_tokens": count,
                "output_tokens_details": _OUTPUT_DETAILS,
                "total_tokens": prompt + count,
            }
        told = {"id": self.id, "created_at": self._created, "model": self.ask.model, "max_output_tokens": self.ask.max_tokens}
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        state = {"incomplete_details": incomplete, "output": output, "status": status, "usage": usage}
        return {**_DEFAULTS, **(self.ask.echo or {}), **told, **state}

    def _final(self, output: list[Any], reason: str, count: int) -> dict[str, Any]:
        tool = self.ask.tool
        cut = reason == "length" and not (tool is not None and tool.complete(reason, count))
        final = self.response("incomplete" if cut else "completed", output, count)
        if self._store is not None:
            self._store.keep(final)
        return final

    # The stream numbers its events: two of the opening, one or two before the first token, one a token

    @property
    def _before(self) -> int:
        return 4 if self.ask.tool is None else 3

    @staticmethod
    def _event(name: str, number: int, fields: dict[str, Any]) -> bytes:
        return event({**fields, "sequence_number": number, "type": name}, name)

    def opening(self) -> bytes:
        """`response.created` and `response.in_progress`."""
        started = {"response": self.response("in_progress", [])}
        return self._event("response.created", 0, started) + self._event("response.in_progress", 1, started)

    def first(self) -> bytes:
        """The item, and the part of it that the text is."""
        item = {"item": self._item("", "in_progress"), "output_index": 0}
        added = self._event("response.output_item.added", 2, item)
        if self.ask.tool is not None:
            return added
        part = {"content_index": 0, "item_id": self._item_id, "output_index": 0, "part": {**self._part(""), "logprobs": []}}
        return added + self._event("response.content_part.added", 3, part)

    def middle(self, start: int, tokens: Sequence[bytes]) -> bytes:
        """A delta for each token."""
        number = self._before + start
        chunks = [
            b'%b%b,"sequence_number":%d}\n\n' % (self.prefix, token, number + index) for index, token in enumerate(tokens)
        ]
        return b"".join(chunks)

    def last(self, token: bytes, text: str, reason: str, count: int) -> bytes:
        """The last delta, then what closes the part, the item and the answer."""
        written = b"" if token == b'""' else self.middle(count - 1, [token])
        number = self._before + count
        place = {"item_id": self._item_id, "output_index": 0}
        if self.ask.tool is not None:
            done = {"arguments": text, "name": self.ask.tool.name, **place}
            chunks = [self._event("response.function_call_arguments.done", number, done)]
        else:
            place = {"content_index": 0, **place}
            chunks = [
                self._event("response.output_text.done", number, {**place, "logprobs": [], "text": text}),
                self._event("response.content_part.done", number + 1, {**place, "part": self._part(text)}),
            ]
        number += len(chunks)
        item = self._item(text, "completed")
        chunks.append(self._event("response.output_item.done", number, {"item": item, "output_index": 0}))
        final = {"response": self._final([item], reason, count)}
        return written + b"".join(chunks) + self._event("response.completed", number + 1, final)

    def nothing(self) -> bytes:
        """Completed, it says."""
        return self._event("response.completed", 2, {"response": self._final([], "abort", 0)})

    def whole(self, text: str, reason: str, count: int) -> bytes:
        """A `response`."""
        return encode(self._final([self._item(text, "completed")], reason, count))
