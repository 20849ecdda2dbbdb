"""A simulated Ollama: loads and unloads as the real one does, a step at a time.

Source: ollama/ollama, `server/routes.go` (a request without a prompt loads, one with `keep_alive: 0` unloads and is answered
before that is done; a model that is not there is a 404) and `server/sched.go` (a model that is used is unloaded when its
requests are over; what is loading is in no list until its process runs; loads are served in turn).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

__all__ = ["SimulatedOllama"]


class SimulatedOllama:
    """An ASGI app. Models are named with their tags."""

    def __init__(self, *models: str) -> None:
        self.models = set(models)
        self.loaded: dict[str, float] = {}
        """What is in memory, with its keep-alive in seconds; below zero: for ever."""
        self.lingering = 0
        """How many times `/api/ps` still lists a model that is being unloaded."""
        self.late = 0
        """How many times `/api/ps` does not list a model yet that has been loaded."""
        self.faults: Counter[str] = Counter()
        """Models that fail to load, once each time."""
        self.hanging = 0
        """How many loads do not end until `release` says so."""
        self.asked: list[tuple[str, float]] = []
        self._leaving: set[str] = set()
        self._released = False
        self._lock: anyio.Lock | None = None
        routes = [
            Route("/api/ps", self._ps),
            Route("/api/generate", self._generate, methods=["POST"]),
            Route("/v1/models", self._list),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        self._app = Starlette(routes=routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def release(self) -> None:
        """Let a load that hangs end."""
        self._released = True

    async def _ps(self, request: Request) -> Response:
        if self.lingering:
            self.lingering -= 1
        else:
            for name in self._leaving:
                self.loaded.pop(name, None)
            self._leaving.clear()
        listed: list[dict[str, Any]] = [{"name": name, "model": name} for name in self.loaded]
        if self.late:
            self.late -= 1
            listed = []
        return JSONResponse({"models": listed})

    async def _generate(self, request: Request) -> Response:
        body = await request.json()
        assert body["stream"] is False
        assert "prompt" not in body
        name = self._tagged(body["model"])
        self.asked.append((body["model"], body["keep_alive"]))
        if name not in self.models:
            return JSONResponse({"error": f"model '{body['model']}' not found"}, 404)
        if body["keep_alive"] == 0:
            if name in self.loaded:
                self._leaving.add(name)
            return JSONResponse({"model": body["model"], "done": True, "done_reason": "unload"})
        self._lock = self._lock or anyio.Lock()
        async with self._lock:
            if self.hanging:
                self.hanging -= 1
                while not self._released:  # noqa: ASYNC110 - set by the test's thread
                    await anyio.sleep(0.002)
            if self.faults[name]:
                self.faults[name] -= 1
                return JSONResponse({"error": "llama runner process has terminated: cudaMalloc failed: out of memory"}, 500)
            self.loaded[name] = body["keep_alive"]
        return JSONResponse({"model": body["model"], "done": True, "done_reason": "load"})

    async def _list(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in sorted(self.models)]})

    async def _chat(self, request: Request) -> Response:
        model = (await request.json())["model"]
        assert self._tagged(model) in self.loaded
        message = {"role": "assistant", "content": f"I am {model}"}
        return JSONResponse({"object": "chat.completion", "choices": [{"index": 0, "message": message}]})

    @staticmethod
    def _tagged(name: str) -> str:
        return name if ":" in name else f"{name}:latest"
