"""A simulated SGLang server: the routes that switching needs, and the ways in which the real one ends.

Source: sgl-project/sglang, `srt/entrypoints/http_server.py` (routes, statuses) and `srt/managers/scheduler*.py`:
`release_memory_occupation` asserts that the server is idle, `resume_memory_occupation` removes tags from the set of
released ones (a KeyError if they are not in it), and an exception in the scheduler ends the server. `/flush_cache` answers
400 while anything runs. Without `--enable-weights-cpu-backup`, released weights are lost.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

__all__ = ["SimulatedSGLang"]


class SimulatedSGLang:
    """An ASGI app. `calls` are the control calls in their order, without the probes."""

    def __init__(self, *, backup: bool = True, memory_saver: bool = True, old: bool = False) -> None:
        self.arguments: dict[str, Any] = {
            "model_path": "org/model",
            "enable_memory_saver": memory_saver,
            "enable_weights_cpu_backup": backup,
            "tokenizer_worker_num": 1,
            "api_key": None,
        }
        self.version = "default"
        self.old = old
        """It has the routes by their older names only."""
        self.released = False
        self.weights_valid = True
        self.running = 0
        """Requests that run; each `/abort_request` ends one."""
        self.crashed = False
        """Its scheduler has ended. The process would end with it: nothing is answered any more."""
        self.unhealthy = 0
        """How many times `/health` says 503 before it says 200."""
        self.faults: Counter[str] = Counter()
        """Paths that answer 500 once each time, before they do anything."""
        self.missing: set[str] = set()
        self.calls: list[str] = []
        self.versions: list[str] = []
        routes: dict[str, Any] = {
            "/get_server_info" if old else "/server_info": self._server_info,
            "/get_model_info" if old else "/model_info": self._model_info,
            "/health": self._health,
            "/abort_request": self._abort,
            "/flush_cache": self._flush,
            "/update_weight_version": self._update_weight_version,
            "/release_memory_occupation": self._release,
            "/resume_memory_occupation": self._resume,
            "/update_weights_from_disk": self._update_weights,
            "/v1/chat/completions": self._chat,
        }
        self._app = Starlette(routes=[Route(path, route, methods=["GET", "POST"]) for path, route in routes.items()])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or break the connection after a crash."""
        path = scope.get("path", "")
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "POST" and path != "/v1/chat/completions":
            self.calls.append(path)
        if path in self.missing:
            await JSONResponse({"detail": "Not Found"}, 404)(scope, receive, send)
        elif self.faults[path]:
            self.faults[path] -= 1
            await PlainTextResponse("Internal Server Error", 500)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _server_info(self, request: Request) -> Response:
        return JSONResponse({**self.arguments, "weight_version": self.version, "internal_states": [{}]})

    async def _model_info(self, request: Request) -> Response:
        return JSONResponse({"model_path": self.arguments["model_path"], "weight_version": self.version})

    async def _health(self, request: Request) -> Response:
        if self.unhealthy:
            self.unhealthy -= 1
            return Response(status_code=503)
        return Response()

    async def _abort(self, request: Request) -> Response:
        assert await request.json() == {"rid": "", "abort_all": True}
        self.running = max(0, self.running - 1)
        return Response()

    async def _flush(self, request: Request) -> Response:
        return PlainTextResponse("Cache flushed.\n", 400 if self.running else 200)

    async def _update_weight_version(self, request: Request) -> Response:
        body = await request.json()
        assert body["abort_all_requests"] is False  # the default is True
        self.version = body["new_version"]
        self.versions.append(self.version)
        return JSONResponse({"success": True})

    async def _release(self, request: Request) -> Response:
        if self.running:
            return self._crash("release_memory_occupation should be called only when server is idle.")
        if self.released:
            return self._crash("paused twice")
        self.released = True
        self.weights_valid = self.weights_valid and bool(self.arguments["enable_weights_cpu_backup"])
        return JSONResponse(None)

    async def _resume(self, request: Request) -> Response:
        if not self.released:
            return self._crash("KeyError: 'kv_cache'")
        self.released = False
        return JSONResponse(None)

    async def _update_weights(self, request: Request) -> Response:
        if self.released:
            return self._crash("an illegal memory access was encountered")
        assert (await request.json())["model_path"] == self.arguments["model_path"]
        self.weights_valid = True
        return JSONResponse({"success": True})

    async def _chat(self, request: Request) -> Response:
        if self.released:
            return self._crash("an illegal memory access was encountered")
        content = "hello" if self.weights_valid else "!!!!"
        message = {"role": "assistant", "content": content}
        return JSONResponse({"object": "chat.completion", "choices": [{"index": 0, "message": message}]})

    def _crash(self, why: str) -> Response:
        self.crashed = True
        return PlainTextResponse(why, 500)
