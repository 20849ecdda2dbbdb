"""A simulated router of llama.cpp, for what the real one does too quickly to be caught in the middle of, or not at will.

Source: ggml-org/llama.cpp, `tools/server/server-models.cpp`: `/models/load` answers when the model's process is started,
`/models/unload` when it is told to end; each refuses (400) a model that is in that state already, with a message of its own
for a name that is unknown (404 and 400). A failed load leaves `failed` and the `exit_code` in the model's status.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

__all__ = ["SimulatedRouter"]


@dataclass
class _Instance:
    aliases: list[str] = field(default_factory=list)
    status: str = "unloaded"
    exit_code: int | None = None
    """Of a load that failed."""
    steps: int = 0
    """How many questions it stays on its way for; below zero: for ever."""
    goal: str = ""


class SimulatedRouter:
    """An ASGI app with `models` by name. `slow` is how many times a model is seen on its way before it arrives."""

    def __init__(self, *models: str, slow: int = 2) -> None:
        self.models = {name: _Instance() for name in models}
        self.slow = slow
        self.faults: Counter[str] = Counter()
        """Models whose process ends while it loads, once each time."""
        self.calls: list[tuple[str, str]] = []
        self.single = False
        """It is no router but a server with one model: its models have no status, and the other routes do not exist."""
        routes = [
            Route("/models", self._list),
            Route("/models/load", self._load, methods=["POST"]),
            Route("/models/unload", self._unload, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        self._app = Starlette(routes=routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def _begin(self, instance: _Instance, status: str, goal: str) -> None:
        instance.status, instance.goal, instance.steps = status, goal, self.slow

    async def _list(self, request: Request) -> Response:
        data: list[dict[str, Any]] = []
        for name, each in self.models.items():
            if each.goal and each.steps == 0:
                each.status, each.goal = each.goal, ""
                if each.status == "loaded" and self.faults[name]:
                    self.faults[name] -= 1
                    each.status, each.exit_code = "unloaded", 1
            each.steps -= bool(each.goal)
            model: dict[str, Any] = {"id": name, "aliases": each.aliases, "object": "model"}
            if not self.single:
                model["status"] = {"value": each.status, "args": ["llama-server"]}
                if each.status == "unloaded" and each.exit_code:
                    model["status"] |= {"failed": True, "exit_code": each.exit_code}
            data.append(model)
        return JSONResponse({"data": data, "object": "list"})

    async def _load(self, request: Request) -> Response:
        name = (await request.json())["model"]
        self.calls.append(("load", name))
        if self.single:
            return _error(404, "File Not Found")
        if (instance := self._find(name)) is None:
            return _error(404, "model is not found")
        if instance.status != "unloaded":
            return _error(400, "model is already running")
        instance.exit_code = None
        self._begin(instance, "loading", "loaded")
        return JSONResponse({"success": True})

    async def _unload(self, request: Request) -> Response:
        name = (await request.json())["model"]
        self.calls.append(("unload", name))
        if (instance := self._find(name)) is None:
            return _error(400, "model is not found")
        if instance.status == "unloaded":
            return _error(400, "model is not running")
        self._begin(instance, instance.status, "unloaded")
        return JSONResponse({"success": True})

    async def _chat(self, request: Request) -> Response:
        name = (await request.json())["model"]
        instance = self._find(name)
        assert instance is not None
        assert instance.status in ("loaded", "sleeping")
        choice = {"index": 0, "message": {"role": "assistant", "content": f"I am {name}"}, "finish_reason": "length"}
        return JSONResponse({"object": "chat.completion", "model": name, "choices": [choice]})

    def _find(self, name: str) -> _Instance | None:
        for known, instance in self.models.items():
            if name == known or name in instance.aliases:
                return instance
        return None


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"code": status, "message": message, "type": "invalid_request_error"}}, status)
