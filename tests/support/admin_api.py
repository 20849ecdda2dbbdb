"""A gateway's admin API as its documentation has it, whose state and answers a test decides."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import unquote

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

__all__ = ["KEY", "FakeAdmin", "model"]

KEY = "llmux-operator-key"


def model(name: str, **fields: Any) -> dict[str, Any]:
    """A model's object."""
    return {
        "name": name,
        "aliases": [],
        "server": "vllm",
        "managed": False,
        "state": "asleep",
        "active": False,
        "pinned": False,
        "sleep_level": 1,
        "in_flight": 0,
        "waiting": 0,
        "frozen": 0,
        "oldest_wait": None,
        "estimates": {"sleep": None, "wake": None},
        "retry_in": None,
        "last_error": None,
        **fields,
    }


class FakeAdmin:
    """An ASGI app. `calls` are what it was asked to do; `answers`, by `METHOD path`, take the place of its own."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew: two models, nothing has happened."""
        self.models = [
            model("qwen", aliases=["gpt-4o"], state="awake", active=True, in_flight=2),
            model("org/llama-8b", waiting=1, oldest_wait=2.5, estimates={"sleep": 0.4, "wake": 3.2}),
        ]
        self.fields: dict[str, Any] = {}
        self.answers: dict[str, tuple[int, Any]] = {}
        self.calls: list[str] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.redirect: str | None = None
        """Where all calls are sent to."""
        self.epoch = "e1"
        self.streams = 0
        self.asked_after: list[str | None] = []
        self.cut = False
        """Streams end after what there is."""
        self.held = threading.Event()
        self.held.set()
        """While it is not set, an operation takes its time."""

    def happens(self, kind: str, /, **data: Any) -> None:
        """Something happens."""
        self.events.append((kind, {"time": 1_000_000.0 + len(self.events), **data}))

    def status(self) -> dict[str, Any]:
        """The status object."""
        return {
            "version": "0.1.0",
            "time": 1_000_100.0,
            "started": 1_000_000.0,
            "epoch": self.epoch,
            "last_event": len(self.events),
            "policy": "gated_quantum",
            "mode": "active",
            "active": "qwen",
            "pinned": None,
            "draining": False,
            "drained": False,
            "in_flight": 2,
            "waiting": 1,
            "frozen": 0,
            "switch": None,
            "totals": {"switches": 12, "abandoned": 0, "failures": 1},
            "shares": {"serving": 80.0, "switching": 15.0, "idle": 5.0},
            "models": self.models,
            "errors": [],
            **self.fields,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        await (await self._answer(Request(scope, receive)))(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        path = request.url.path
        if self.redirect is not None:
            return Response(status_code=307, headers={"location": self.redirect})
        if not path.startswith("/admin/api/"):
            return _error(404, f"There is no route {path}.")
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return _error(401, "The admin key is missing or wrong.")
        raw = request.scope["raw_path"].decode().removeprefix("/admin/api/")
        call = f"{request.method} {unquote(raw)}"
        self.calls.append(call + (f"?{request.url.query}" if request.url.query else ""))
        if call in self.answers:
            code, content = self.answers[call]
            return Response(content, code) if isinstance(content, bytes) else JSONResponse(content, code)
        match call.split(" ", 1):
            case ["GET", "status"]:
                return JSONResponse(self.status())
            case ["GET", "models"]:
                return JSONResponse({"models": self.models})
            case ["GET", "events"]:
                return StreamingResponse(self._events(request), media_type="text/event-stream")
            case ["POST", ("drain" | "resume") as operation]:
                self.fields |= {"draining": operation == "drain"}
                return JSONResponse(self.status())
            case ["POST", "reload"]:
                return JSONResponse({"added": ["phi"], "changed": [], "removed": []})
            case [_, operation]:
                name, _, what = operation.removeprefix("models/").rpartition("/")
                return await self._operate(name, what, request.method)
        raise AssertionError(call)

    async def _operate(self, name: str, what: str, method: str) -> Response:
        found = [each for each in self.models if each["name"] == name]
        if not found:
            return _error(404, f"The model {name!r} does not exist.")
        await anyio.to_thread.run_sync(self.held.wait)
        match what:
            case "wake":
                found[0] |= {"state": "awake", "active": True}
            case "sleep" | "stop":
                found[0] |= {"state": "asleep" if what == "sleep" else "stopped", "active": False}
            case "pin":
                found[0] |= {"pinned": method == "POST"}
                self.fields["pinned"] = name if method == "POST" else None
        return JSONResponse(found[0])

    async def _events(self, request: Request) -> AsyncIterator[str]:
        after = request.headers.get("last-event-id")
        self.asked_after.append(after)
        told = 0
        seen: str | None = None
        if after is not None:
            epoch, _, number = after.rpartition("-")
            if epoch == self.epoch:
                told = int(number)
            else:
                yield "event: reset\ndata: {}\n\n"
        while True:
            if (now := json.dumps(self.status())) != seen:
                seen = now
                yield f": \n\nevent: status\ndata: {now}\n\n"
            for kind, data in self.events[told:]:
                told += 1
                yield f"id: {self.epoch}-{told}\nevent: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"
            if self.cut:
                return
            await anyio.sleep(0.01)


def _error(code: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}, code)
