"""The routes of models that do not generate: embeddings, pooling, classification, scores, ranks."""

from __future__ import annotations

import base64
import struct
import time
from typing import Any

import msgspec
from starlette.types import Receive, Send

from . import text
from .asgi import HttpError, read_body, send_json
from .engine import Engine
from .faults import FaultPlan
from .generate import decode, flatten, required, run_whole, strike, submit, tokens_of
from .wire import new_id

__all__ = ["POOLING_PATHS", "pool"]

_RERANK = ("/rerank", "/v1/rerank", "/v2/rerank")
_SCORE = ("/score", "/v1/score")
_COHERE = "/v2/embed"
POOLING_PATHS = frozenset({"/v1/embeddings", _COHERE, "/pooling", "/classify", *_SCORE, *_RERANK})
_PREFIX = {"/v1/embeddings": "embd-", "/pooling": "pool-", "/classify": "classify-"}


class _Request(msgspec.Struct):
    model: str | None = None
    input: Any = None
    messages: Any = None
    query: Any = None
    documents: list[Any] | None = None
    top_n: int = 0
    text_1: Any = None
    text_2: Any = None
    queries: Any = None
    encoding_format: str = "float"
    dimensions: int | None = None
    texts: list[str] | None = None
    embedding_types: tuple[str, ...] = ("float",)

    def inputs(self, path: str) -> tuple[str, list[str]]:
        """The query (empty if there is none), and the texts that are embedded, classified or compared with it."""
        query: Any = ""
        if path in _RERANK:
            query, inputs = self.query, self.documents
            required(query, "query")
            required(inputs, "documents")
        elif path in _SCORE:
            query = self.text_1 if self.text_1 is not None else self.queries
            inputs = self.text_2 if self.text_2 is not None else self.documents
            required(query, "queries")
            required(inputs, "documents")
        elif path == _COHERE:
            inputs = self.texts
            required(inputs, "texts")
        else:
            inputs = [self.messages] if self.input is None and self.messages is not None else self.input
            required(inputs, "input")
        if not isinstance(inputs, list) or (inputs and all(isinstance(each, int) for each in inputs)):
            inputs = [inputs]  # a text, or one as token ids
        return flatten(query), [flatten(each) for each in inputs]


async def pool(engine: Engine, faults: FaultPlan, path: str, receive: Receive, send: Send) -> None:
    """Answer one request: one step of the engine. Raises `HttpError`."""
    request = decode(await read_body(receive), _Request)
    query, texts = request.inputs(path)
    if request.model not in (None, engine.options.name):
        raise HttpError(404, f"The model `{request.model}` does not exist.", kind="NotFoundError")
    if {request.encoding_format, *request.embedding_types} - {"float", "base64"}:
        raise HttpError(400, "1 validation error: 'float' or 'base64'", param="body.encoding_format")
    if request.dimensions is not None:
        message = f"Model {engine.options.name!r} does not support Matryoshka embeddings; dimensions must be unset."
        raise HttpError(400, message, kind="BadRequestError")
    await strike(engine, faults, "request", receive)
    sequence = submit(engine, query + "".join(texts), 1)
    if not await run_whole(engine, sequence, receive):
        return
    model = engine.options.name
    count = sum(tokens_of(item) for item in [query, *texts])
    usage: dict[str, Any] = {"prompt_tokens": count, "total_tokens": count}
    if path in _RERANK:
        ranked = sorted(((_score(model, query, item), index) for index, item in enumerate(texts)), reverse=True)
        results = [
            {"index": index, "document": {"text": texts[index], "multi_modal": None}, "relevance_score": score}
            for score, index in ranked[: request.top_n or len(texts)]
        ]
        await send_json(send, {"id": new_id("rerank-"), "model": model, "usage": usage, "results": results})
        return
    if path == _COHERE:
        vectors = {kind: [_vector(model, item, kind) for item in texts] for kind in request.embedding_types}
        meta = {"api_version": {"version": "2"}, "billed_units": {"input_tokens": count, "image_tokens": 0}}
        told = {"id": new_id("embd-"), "embeddings": vectors, "texts": texts, "meta": meta}
        await send_json(send, {**told, "response_type": "embeddings_by_type"})
        return
    usage |= {"completion_tokens": 0, "prompt_tokens_details": None, "completion_tokens_details": None}
    data = [_entry(path, model, query, item, index, request.encoding_format) for index, item in enumerate(texts)]
    head = {"id": new_id(_PREFIX.get(path, "score-")), "object": "list", "created": int(time.time()), "model": model}
    await send_json(send, {**head, "data": data, "usage": usage})


def _score(model: str, query: str, item: str) -> float:
    return text.vector(model, query + item, 1)[0]


def _vector(model: str, item: str, encoding: str) -> list[float] | str:
    vector = text.vector(model, item)
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if encoding == "base64" else vector


def _entry(path: str, model: str, query: str, item: str, index: int, encoding: str) -> dict[str, Any]:
    if path in _SCORE:
        return {"index": index, "object": "score", "score": _score(model, query, item)}
    if path == "/classify":
        return {"index": index, "label": "LABEL_0", "probs": [0.5, 0.5], "num_classes": 2}
    vector = _vector(model, item, encoding)
    if path == "/pooling":
        return {"index": index, "object": "pooling", "data": vector}
    return {"index": index, "object": "embedding", "embedding": vector}
