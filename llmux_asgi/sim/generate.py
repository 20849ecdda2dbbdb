"""The routes that generate: chat, completions, responses, messages. What is common to all that run the model is here too."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Send

from . import text
from .asgi import HttpError, read_body, send_body, send_json, wait_until_gone
from .chat import CompletionWire, chat_wire
from .engine import Engine, EngineDeadError
from .faults import Fault, FaultPlan
from .messages import messages_wire
from .responses import ResponseStore, ResponsesWire
from .sequence import Sequence
from .tools import demanded
from .wire import Ask, Wire

__all__ = [
    "GENERATE_PATHS",
    "Generator",
    "answer",
    "check_model",
    "conversation",
    "dead",
    "decode",
    "flatten",
    "required",
    "run_whole",
    "strike",
    "submit",
    "tokens_of",
]

_BATCH = 64  # tokens in one write at most, so that a fast stream can be aborted between two
_DEFAULT_TOKENS = 16

GENERATE_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
_ECHOED = ("instructions", "metadata", "temperature", "top_p", "tools", "tool_choice", "background", "previous_response_id")


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Request(msgspec.Struct):
    model: str | None = None
    prompt: Any = None
    messages: Any = None
    input: Any = None
    system: Any = None
    instructions: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    tools: Any = None
    tool_choice: Any = None
    temperature: float | None = None
    top_p: float | None = None
    metadata: Any = None
    background: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None


_Body = TypeVar("_Body", bound=msgspec.Struct)


def decode(body: bytes, kind: type[_Body]) -> _Body:
    """The body as `kind`, fields of no interest left out. Raises `HttpError` 400."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HttpError(400, f"1 validation error: {error}", param="body") from None


def required(value: object, name: str) -> None:
    """Raise vLLM's 400 for the field `name` if it is left out."""
    if value is None:
        message = f"1 validation error:\n  {{'type': 'missing', 'loc': 'body.{name}', 'msg': 'Field required'}}"
        raise HttpError(400, message, param=f"body.{name}")


def check_model(engine: Engine, model: str | None) -> None:
    """Raise vLLM's 404 unless `model` is the served name or left out."""
    name = engine.options.name
    if model and model != name:
        message = f"The model `{model}` does not exist. Valid aliases: {name}."
        raise HttpError(404, message, kind="NotFoundError", param="model")


async def strike(engine: Engine, faults: FaultPlan, kind: str, receive: Receive) -> Fault | None:
    """Count a call of `kind` and commit what every kind of call knows; return a fault that the caller must commit.

    Raises `HttpError` for `fail`; after `hang` the client is gone and `HttpError` 499 says so.
    """
    fault = faults.next(kind)
    if fault is not None and fault.action == "wither":
        engine.wither()
    if engine.withered and kind != "health":
        await wait_until_gone(receive)
        raise HttpError(499, "client disconnected")
    if fault is None:
        return None
    if fault.action == "die":
        os._exit(1)
    if fault.action == "crash":
        engine.crash("on demand")
        raise dead()
    if fault.action == "fail":
        raise HttpError(int(fault.value), f"fault on demand: {kind}")
    if fault.action == "hang":
        await wait_until_gone(receive)
        raise HttpError(499, "client disconnected")
    if fault.action == "delay" and kind not in ("sleep", "wake"):
        await asyncio.sleep(fault.value)
        return None
    return fault


def flatten(value: object) -> str:
    """A prompt as one text: strings, lists of parts, lists of token ids, messages."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        if all(isinstance(item, int) for item in value):
            return text.detokenize(value)
        return "".join(flatten(item) for item in value)
    if isinstance(value, dict):
        if "role" in value:
            return f"{value['role']}: {flatten(value.get('content'))}\n"
        return flatten(value.get("text", ""))
    return ""


def conversation(messages: object, *before: object) -> str:
    """A conversation as one text, a system prompt and the like first. Raises `HttpError` 400 if it is empty."""
    if messages == []:
        message = "Cannot apply chat template to an empty conversation. Provide at least one message."
        raise HttpError(400, message, kind="BadRequestError")
    return "".join(flatten(each) for each in (*before, messages))


def tokens_of(prompt: str) -> int:
    """How many tokens `text.tokenize` makes of a prompt."""
    return len(prompt.encode("utf-8", "surrogatepass"))


def submit(engine: Engine, prompt: str, total: int) -> Sequence:
    """Take a request in. Raises `HttpError` if the engine is dead."""
    try:
        return engine.submit(prompt, total)
    except EngineDeadError:
        raise dead() from None


def dead() -> HttpError:
    """What is answered when the engine has died."""
    return HttpError(500, "EngineCore encountered an issue. See stack trace (above) for the root cause.")


@dataclass
class Generator:
    """Answers generation requests of one server. `store` is None if the server keeps no responses."""

    engine: Engine
    faults: FaultPlan
    store: ResponseStore | None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def __call__(self, path: str, receive: Receive, send: Send) -> None:
        """Answer one request, streaming or whole. Raises `HttpError`."""
        request = decode(await read_body(receive), _Request)
        check_model(self.engine, request.model)
        if path == "/v1/messages":
            required(request.max_tokens, "max_tokens")
        prompt = _prompt(path, request)
        call = demanded(request.tools, request.tool_choice) if path != "/v1/completions" else None
        total = request.max_completion_tokens or request.max_output_tokens or request.max_tokens
        if total is None:
            total = _DEFAULT_TOKENS if call is None else len(call.pieces())
        if total < 1:
            raise HttpError(400, f"max_tokens must be at least 1, got {total}.", kind="BadRequestError", param="max_tokens")
        fault = await strike(self.engine, self.faults, "request", receive)
        usage = bool(request.stream_options and request.stream_options.include_usage)
        echo = {name: value for name in _ECHOED if (value := getattr(request, name)) is not None}
        ask = Ask(self.engine.options.name, tokens_of(prompt), total, usage, call, echo)
        store = self.store if request.store is not False else None
        if path == "/v1/responses" and request.background:
            await self._background(ask, prompt, store, send)
            return
        sequence = submit(self.engine, prompt, total if call is None else min(total, len(call.pieces())))
        wires: dict[str, Callable[[Ask], Wire]] = {
            "/v1/chat/completions": chat_wire,
            "/v1/completions": CompletionWire,
            "/v1/messages": messages_wire,
        }
        wire = ResponsesWire(ask, store) if path == "/v1/responses" else wires[path](ask)
        await answer(self.engine, sequence, wire, bool(request.stream), fault, receive, send)

    async def _background(self, ask: Ask, prompt: str, store: ResponseStore | None, send: Send) -> None:
        if store is None:
            message = "This vLLM engine does not support `store=True` and therefore does not support the background mode."
            raise HttpError(400, message, kind="invalid_request_error", param="background")
        pieces = ask.tool.pieces() if ask.tool is not None else []
        sequence = submit(self.engine, prompt, min(ask.max_tokens, len(pieces)) if pieces else ask.max_tokens)
        wire = ResponsesWire(ask, store)
        queued = wire.response("queued", [])
        store.keep(queued)
        task = asyncio.create_task(store.run(wire, sequence, lambda ready: _words(sequence, wire, ready)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await send_json(send, queued)


def _prompt(path: str, request: _Request) -> str:
    if path == "/v1/completions":
        if request.prompt in (None, "", []):
            message = "Either prompt or prompt_embeds must be provided and non-empty."
            raise HttpError(400, message, kind="BadRequestError", param="prompt")
        return flatten(request.prompt)
    name = "input" if path == "/v1/responses" else "messages"
    source = getattr(request, name)
    required(source, name)
    return conversation(source, request.system, request.instructions)


def _words(sequence: Sequence, wire: Wire, ready: int) -> str:
    if wire.ask.tool is not None:
        return "".join(wire.ask.tool.pieces()[:ready])
    return "".join([text.TOKENS[token] for token in sequence.tokens[:ready]])


async def run_whole(engine: Engine, sequence: Sequence, receive: Receive) -> bool:
    """Run what cannot be cut short to its end; False if its client has left. Raises `HttpError` if it was aborted."""
    watch = asyncio.ensure_future(wait_until_gone(receive))
    watch.add_done_callback(lambda task: None if task.cancelled() else engine.drop(sequence))
    try:
        await engine.produced(sequence, sequence.total)
    finally:
        watch.cancel()
    if sequence.finish not in ("length", "gone"):
        raise dead()
    return sequence.finish == "length"


async def answer(
    engine: Engine, sequence: Sequence, wire: Wire, stream: bool, fault: Fault | None, receive: Receive, send: Send
) -> None:
    """Send what the engine makes of `sequence`; end it when the client leaves. Raises `HttpError`."""
    # The watch ends the sequence the moment its client leaves; without it the engine would generate for nobody.
    watch = asyncio.ensure_future(wait_until_gone(receive))
    watch.add_done_callback(lambda task: None if task.cancelled() else engine.drop(sequence))
    try:
        if stream:
            await _stream(engine, sequence, wire, fault, send)
        else:
            await _whole(engine, sequence, wire, fault, send)
        if fault is not None and fault.action == "stall":
            await watch
    finally:
        watch.cancel()
        engine.drop(sequence)  # no-op but for a broken or stalled answer


async def _whole(engine: Engine, sequence: Sequence, wire: Wire, fault: Fault | None, send: Send) -> None:
    if fault is not None and fault.action == "stall":
        return
    ready = await engine.produced(sequence, sequence.total)
    if sequence.finish == "gone":
        return
    if sequence.finish == "error":
        raise dead()
    body = wire.whole(_words(sequence, wire, ready), sequence.finish or "length", ready)
    if fault is None:
        await send_body(send, 200, b"application/json", body)
        return
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})


def _as_json(sequence: Sequence, wire: Wire) -> list[bytes]:
    if wire.ask.tool is not None:
        return [msgspec.json.encode(piece) for piece in wire.ask.tool.pieces()]
    return [text.JSON_TOKENS[token] for token in sequence.tokens]


async def _stream(engine: Engine, sequence: Sequence, wire: Wire, fault: Fault | None, send: Send) -> None:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    # As in vLLM the headers go out before the first token, even while the engine sleeps.
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    limit = sequence.total + 1 if fault is None else int(fault.value)
    sent = 0
    tokens: list[bytes] = []
    if opening := wire.opening():
        await send({"type": "http.response.body", "body": opening, "more_body": True})
    while True:
        ready = await engine.produced(sequence, sent + 1)
        finish = sequence.finish
        if finish == "gone":
            return
        if finish == "error":
            await send({"type": "http.response.body", "body": wire.failed(dead())})
            return
        if not ready and finish is not None:
            await send({"type": "http.response.body", "body": wire.nothing()})
            return
        chunk = b""
        if ready and not tokens:
            tokens, chunk = _as_json(sequence, wire), wire.first()
        stop = min(ready, sent + _BATCH, limit)
        # The last token goes with the finish reason, unless the sequence was aborted: then that event is empty.
        plain = stop - 1 if stop == sequence.total else stop
        chunk += wire.middle(sent, tokens[sent:plain])
        ended = finish is not None and stop == ready
        if ended:
            last = tokens[stop - 1] if stop == sequence.total else b'""'
            chunk += wire.last(last, _words(sequence, wire, ready), finish or "length", ready)
        await send({"type": "http.response.body", "body": chunk, "more_body": not ended})
        sent = stop
        if ended or sent >= limit:
            return  # at the limit the answer is incomplete: the server cuts the connection, unless it stalls
        if sent < ready:
            await asyncio.sleep(0)
