"""What a server tells about itself: models, version, health, metrics, OpenAPI, tokens."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from starlette.types import Receive, Send

from . import text
from .asgi import read_body, send_body, send_json
from .engine import Engine
from .faults import FaultPlan
from .generate import check_model, conversation, decode, required, strike, tokens_of
from .metrics import exposition
from .routes import Query, Table
from .wire import new_id

__all__ = ["Info"]

_MODES = ("abort", "wait", "keep")


class _Tokenize(msgspec.Struct):
    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    return_token_strs: bool | None = None
    tokens: list[int] | None = None
    system: Any = None


class Info:
    """Handlers of one server."""

    def __init__(self, engine: Engine, faults: FaultPlan) -> None:
        self._engine, self._faults, self._options = engine, faults, engine.options
        self._started = int(time.time())
        self.paths: list[tuple[str, str]] = []
        """Method and path of each route, for OpenAPI; set by who has the routes."""

    def public(self) -> Table:
        """What clients ask for: models and tokens."""
        return {
            ("GET", "/v1/models"): self._models,
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/detokenize"): self._detokenize,
            ("POST", "/v1/messages/count_tokens"): self._count_tokens,
        }

    def private(self) -> Table:
        """What no client should see."""
        return {
            ("GET", "/health"): self._health,
            ("GET", "/ping"): self._health,
            ("POST", "/ping"): self._health,
            ("GET", "/version"): self._version,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/openapi.json"): self._openapi,
            ("GET", "/docs"): self._docs,
            ("GET", "/redoc"): self._docs,
            ("GET", "/load"): self._load,
        }

    async def _health(self, query: Query, receive: Receive, send: Send) -> None:
        await strike(self._engine, self._faults, "health", receive)
        await send_body(send, 503 if self._engine.dead and not self._engine.withered else 200, b"", b"")

    async def _version(self, query: Query, receive: Receive, send: Send) -> None:
        await send_json(send, {"version": self._options.version})

    async def _load(self, query: Query, receive: Receive, send: Send) -> None:
        await send_json(send, {"server_load": sum(self._engine.running_and_waiting())})

    async def _docs(self, query: Query, receive: Receive, send: Send) -> None:
        await send_body(send, 200, b"text/html; charset=utf-8", b"<!DOCTYPE html><title>FastAPI - Swagger UI</title>")

    async def _models(self, query: Query, receive: Receive, send: Send) -> None:
        rights = {"allow_create_engine": False, "allow_sampling": True, "allow_logprobs": True, "allow_search_indices": False}
        rights |= {"allow_view": True, "allow_fine_tuning": False}
        permission = {"id": new_id("modelperm-"), "object": "model_permission", "created": self._started, **rights}
        permission |= {"organization": "*", "group": None, "is_blocking": False}
        card = {
            "id": self._options.name,
            "object": "model",
            "created": self._started,
            "owned_by": "vllm",
            "root": self._options.name,
            "parent": None,
            "max_model_len": self._options.max_model_len,
            "permission": [permission],
        }
        await send_json(send, {"object": "list", "data": [card]})

    async def _metrics(self, query: Query, receive: Receive, send: Send) -> None:
        text_format = b"text/plain; version=0.0.4; charset=utf-8"
        await send_body(send, 200, text_format, exposition(self._engine).encode())

    async def _openapi(self, query: Query, receive: Receive, send: Send) -> None:
        paths: dict[str, dict[str, object]] = {}
        for method, path in self.paths:
            paths.setdefault(path, {})[method.lower()] = {}
        if "/sleep" in paths and self._engine.behaviour.has_modes:
            level = {"type": "integer", "maximum": 2, "minimum": 0, "default": 1}
            mode = {"type": "string", "enum": list(_MODES), "default": "abort"}
            parameters = [
                {"name": name, "in": "query", "required": False, "schema": schema}
                for name, schema in (("level", level), ("mode", mode))
            ]
            paths["/sleep"]["post"] = {"parameters": parameters}
        info = {"title": "FastAPI", "version": "0.1.0"}
        await send_json(send, {"openapi": "3.1.0", "info": info, "paths": dict(sorted(paths.items()))})

    async def _tokenize(self, query: Query, receive: Receive, send: Send) -> None:
        request = decode(await read_body(receive), _Tokenize)
        if request.messages is None:
            required(request.prompt, "prompt")
        check_model(self._engine, request.model)
        ids = text.tokenize(conversation(request.messages) if request.prompt is None else request.prompt)
        strings = [text.detokenize([each]) for each in ids] if request.return_token_strs else None
        length = self._options.max_model_len
        await send_json(send, {"count": len(ids), "max_model_len": length, "tokens": ids, "token_strs": strings})

    async def _detokenize(self, query: Query, receive: Receive, send: Send) -> None:
        request = decode(await read_body(receive), _Tokenize)
        required(request.tokens, "tokens")
        check_model(self._engine, request.model)
        await send_json(send, {"prompt": text.detokenize(request.tokens or [])})

    async def _count_tokens(self, query: Query, receive: Receive, send: Send) -> None:
        request = decode(await read_body(receive), _Tokenize)
        required(request.messages, "messages")
        check_model(self._engine, request.model)
        count = tokens_of(conversation(request.messages, request.system))
        await send_json(send, {"input_tokens": count, "context_management": {"original_input_tokens": count}})
