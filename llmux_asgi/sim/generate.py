"""The routes that run the model: chat, completions, responses, messages, embeddings, scores."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Send

from . import text, wire
from .asgi import HttpError, read_body, send_body, send_json, wait_until_gone
from .engine import Engine, EngineDeadError
from .faults import Fault, FaultPlan
from .sequence import Sequence

__all__ = ["GENERATE_PATHS", "POOLING_PATHS", "check_model", "decode", "generate", "pool", "strike"]

_BATCH = 64  # tokens in one write at most, so that a fast stream can be aborted between two

_WIRES: dict[str, Callable[[str, int, bool], wire.Wire]] = {
    "/v1/chat/completions": wire.ChatWire,
    "/v1/completions": wire.CompletionWire,
    "/v1/responses": wire.ResponsesWire,
    "/v1/messages": wire.MessagesWire,
}
GENERATE_PATHS = frozenset(_WIRES)
POOLING_PATHS = frozenset(
    {
        "/v1/embeddings",
        "/pooling",
        "/classify",
        "/score",
        "/v1/score",
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
    }
)


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Request(msgspec.Struct):
    model: str | None = None
    prompt: Any = None
    messages: Any = None
    input: Any = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


class _PoolingRequest(msgspec.Struct):
    model: str | None = None
    input: Any = None
    query: Any = None
    documents: list[Any] | None = None
    text_1: Any = None
    text_2: Any = None


_Body = TypeVar("_Body", bound=msgspec.Struct)


def decode(body: bytes, kind: type[_Body]) -> _Body:
    """The body as `kind`, fields of no interest left out. Raises `HttpError` 400."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HttpError(400, f"1 validation error: {error}", param="body") from None


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
        raise HttpError(500, "EngineCore encountered an issue. See stack trace (above) for the root cause.")
    if fault.action == "fail":
        raise HttpError(int(fault.value), f"fault on demand: {kind}")
    if fault.action == "hang":
        await wait_until_gone(receive)
        raise HttpError(499, "client disconnected")
    if fault.action == "delay" and kind not in ("sleep", "wake"):
        await asyncio.sleep(fault.value)
        return None
    return fault


def _flatten(value: object) -> str:
    """A prompt as one text: strings, lists of parts, lists of token ids, messages."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        if all(isinstance(item, int) for item in value):
            return text.detokenize(value)
        return "".join(_flatten(item) for item in value)
    if isinstance(value, dict):
        if "role" in value:
            return f"{value['role']}: {_flatten(value.get('content'))}\n"
        return _flatten(value.get("text", ""))
    return ""


async def generate(engine: Engine, faults: FaultPlan, path: str, receive: Receive, send: Send) -> None:
    """Answer one generation request, streaming or whole."""
    request = decode(await read_body(receive), _Request)
    check_model(engine, request.model)
    source = {"/v1/completions": request.prompt, "/v1/responses": request.input}.get(path, request.messages)
    field = {"/v1/completions": "prompt", "/v1/responses": "input"}.get(path, "messages")
    if source is None or source == [] or source == "":
        raise HttpError(400, f"{field} must be provided and non-empty.", kind="BadRequestError", param=field)
    total = request.max_completion_tokens or request.max_output_tokens
    if total is None:
        total = 16 if request.max_tokens is None else request.max_tokens
    if total < 1:
        raise HttpError(400, f"max_tokens must be at least 1, got {total}.", kind="BadRequestError", param="max_tokens")
    prompt = _flatten(source)
    fault = await strike(engine, faults, "request", receive)
    sequence = _submit(engine, prompt, total)
    usage = bool(request.stream_options and request.stream_options.include_usage)
    answer = _WIRES[path](engine.options.name, len(prompt.encode("utf-8", "surrogatepass")), usage)
    # The watch ends the sequence the moment its client leaves; without it the engine would generate for nobody.
    watch = asyncio.ensure_future(wait_until_gone(receive))
    watch.add_done_callback(lambda task: None if task.cancelled() else engine.drop(sequence))
    try:
        if request.stream:
            await _stream(engine, sequence, answer, fault, send)
        else:
            await _whole(engine, sequence, answer, fault, send)
        if fault is not None and fault.action == "stall":
            await watch
    finally:
        watch.cancel()
        engine.drop(sequence)  # no-op but for a broken or stalled answer


def _submit(engine: Engine, prompt: str, total: int) -> Sequence:
    try:
        return engine.submit(prompt, total)
    except EngineDeadError:
        raise _dead() from None


def _dead() -> HttpError:
    return HttpError(500, "EngineCore encountered an issue. See stack trace (above) for the root cause.")


async def _whole(engine: Engine, sequence: Sequence, answer: wire.Wire, fault: Fault | None, send: Send) -> None:
    if fault is not None and fault.action == "stall":
        return
    ready = await engine.produced(sequence, sequence.total)
    if sequence.finish == "gone":
        return
    if sequence.finish == "error":
        raise _dead()
    words = "".join([text.TOKENS[token] for token in sequence.tokens[:ready]])
    body = answer.whole(words, sequence.finish or "length", ready)
    if fault is None:
        await send_body(send, 200, b"application/json", body)
        return
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})


async def _stream(engine: Engine, sequence: Sequence, answer: wire.Wire, fault: Fault | None, send: Send) -> None:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    # As in vLLM the headers go out before the first token, even while the engine sleeps.
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    limit = sequence.total + 1 if fault is None else int(fault.value)
    prefix, suffix, json_tokens = answer.prefix, answer.suffix, text.JSON_TOKENS
    sent = 0
    first = answer.first()
    if answer.eager:
        await send({"type": "http.response.body", "body": first, "more_body": True})
        first = b""
    while True:
        ready = await engine.produced(sequence, sent + 1)
        finish = sequence.finish
        if finish == "gone":
            return
        if finish == "error":
            await send({"type": "http.response.body", "body": wire.event(_dead().body()) + b"data: [DONE]\n\n"})
            return
        if not ready and finish is not None:
            await send({"type": "http.response.body", "body": answer.nothing()})
            return
        stop = min(ready, sent + _BATCH, limit)
        # The last token goes with the finish reason, unless the sequence was aborted: then that event is empty.
        plain = stop - 1 if stop == sequence.total else stop
        chunks = [first] if ready else []
        for token in sequence.tokens[sent:plain]:
            chunks += (prefix, json_tokens[token], suffix)
        ended = finish is not None and stop == ready
        if ended:
            last = json_tokens[sequence.tokens[-1]] if stop == sequence.total else b'""'
            chunks.append(answer.last(last, finish or "length", ready))
        if ready:
            first = b""
        await send({"type": "http.response.body", "body": b"".join(chunks), "more_body": not ended})
        sent = stop
        if ended or sent >= limit:
            return  # at the limit the answer is incomplete: the server cuts the connection, unless it stalls
        if sent < ready:
            await asyncio.sleep(0)


async def pool(engine: Engine, faults: FaultPlan, path: str, receive: Receive, send: Send) -> None:
    """Answer one embedding, classification, score or rerank request: one step of the engine."""
    request = decode(await read_body(receive), _PoolingRequest)
    check_model(engine, request.model)
    await strike(engine, faults, "request", receive)
    inputs = request.input if isinstance(request.input, list) else [request.input]
    if request.documents is not None:
        inputs = request.documents
    elif request.text_2 is not None:
        inputs = request.text_2 if isinstance(request.text_2, list) else [request.text_2]
    query = _flatten(request.query if request.query is not None else request.text_1)
    texts = [_flatten(item) for item in inputs]
    sequence = _submit(engine, query + "".join(texts), 1)
    watch = asyncio.ensure_future(wait_until_gone(receive))
    watch.add_done_callback(lambda task: None if task.cancelled() else engine.drop(sequence))
    try:
        await engine.produced(sequence, 1)
    finally:
        watch.cancel()
    if sequence.finish == "gone":
        return
    if sequence.finish != "length":
        raise _dead()  # a pooling answer cannot be cut short
    model = engine.options.name
    count = sum(len(item.encode("utf-8", "surrogatepass")) for item in [query, *texts])
    usage = {"prompt_tokens": count, "total_tokens": count}
    if "rerank" in path:
        scored = [(text.vector(model, query + item, 1)[0], index) for index, item in enumerate(texts)]
        results: list[dict[str, Any]] = [
            {"index": index, "document": {"text": texts[index]}, "relevance_score": score}
            for score, index in sorted(scored, reverse=True)
        ]
        await send_json(send, {"id": "rerank-sim", "model": model, "usage": usage, "results": results})
        return
    data: list[dict[str, Any]] = []
    for index, item in enumerate(texts):
        entry: dict[str, Any] = {"index": index}
        if "score" in path:
            entry |= {"object": "score", "score": text.vector(model, query + item, 1)[0]}
        elif path == "/classify":
            entry |= {"label": "LABEL_0", "probs": [0.5, 0.5], "num_classes": 2}
        elif path == "/pooling":
            entry |= {"object": "pooling", "data": text.vector(model, item)}
        else:
            entry |= {"object": "embedding", "embedding": text.vector(model, item)}
        data.append(entry)
    await send_json(send, {"id": "pool-sim", "object": "list", "model": model, "data": data, "usage": usage})
