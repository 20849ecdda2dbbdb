"""The simulated vLLM server: vLLM's routes over a simulated engine, as an ASGI app and as a process.

What a real 0.32 server answers was recorded and is pinned by `tests/contract`, which runs against both. Beside vLLM's
routes there are `GET /sim/state`, and `POST` and `DELETE /sim/faults`, for tests only.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import parse_qs

import msgspec
from starlette.types import Receive, Scope, Send

from .asgi import HttpError, read_body, send_error, send_json
from .audio import AUDIO_PATHS, transcribe
from .control import Control
from .engine import Engine
from .faults import Fault, FaultPlan
from .generate import GENERATE_PATHS, Generator, decode
from .gpu import GpuLedger
from .info import Info
from .messages import anthropic_body
from .omni import OMNI_PATHS, make
from .options import SimOptions
from .pooling import POOLING_PATHS, pool
from .realtime import realtime
from .responses import ResponseStore
from .routes import Query

try:
    import uvicorn
except ImportError as error:
    raise ImportError(f"the simulated vLLM needs the extra server: pip install 'llmux-asgi[server]' ({error})") from error

try:
    import uvloop

    _new_event_loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
except ImportError:  # comes with the extra `server`, but not on every platform
    _new_event_loop = asyncio.new_event_loop

__all__ = ["SimVLLM", "ready_line", "serve"]


class _Faults(msgspec.Struct, forbid_unknown_fields=True):
    faults: list[str]


class SimVLLM:
    """The ASGI app of one simulated server. Build it inside the event loop that serves it.

    Raises `GpuOutOfMemoryError` when the GPU's ledger has no room for the model.
    """

    def __init__(self, options: SimOptions) -> None:
        ledger = None
        if options.gpu is not None:
            ledger = GpuLedger(options.gpu, total_mib=options.gpu_memory_mib, model=options.name)
        self.engine = Engine(options, ledger)
        self.engine.boot()
        self._faults = FaultPlan()
        for spec in options.faults:
            self._faults.add(Fault.parse(spec))
        self._store = ResponseStore(self.engine)
        self._generate = Generator(self.engine, self._faults, self._store if options.responses_store else None)
        info, control = Info(self.engine, self._faults), Control(self.engine, self._faults)
        private = info.private() | control.always() | (control.development() if options.dev_mode else {})
        self._private_paths = {path for _, path in private}
        self._routes = info.public() | private
        posts = GENERATE_PATHS | POOLING_PATHS | OMNI_PATHS | AUDIO_PATHS
        self._paths = {path for _, path in self._routes} | posts
        self._json_paths = self._paths - self._private_paths - AUDIO_PATHS - {"/v1/images/edits"}
        stored = [("GET", "/v1/responses/{response_id}"), ("POST", "/v1/responses/{response_id}/cancel")]
        info.paths = [*self._routes, *(("POST", path) for path in posts), *stored]
        self._routes |= {
            ("GET", "/sim/state"): self._state,
            ("POST", "/sim/faults"): self._add_faults,
            ("DELETE", "/sim/faults"): self._clear_faults,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request, or serve one WebSocket."""
        path = scope["path"]
        if scope["type"] == "websocket":
            if path == "/v1/realtime":
                await realtime(self.engine, receive, send)
            else:
                await send({"type": "websocket.close"})
            return
        if (private := path.removesuffix("/")) in self._private_paths:
            self.engine.control_calls[private] += 1
        try:
            await self._answer(scope, scope["method"], path, receive, send)
        except HttpError as error:
            if path.startswith("/v1/messages") and error.param != "body" and error.kind != "Bad Request":
                await send_json(send, anthropic_body(error), error.status)
            else:
                await send_error(send, error)

    async def _answer(self, scope: Scope, method: str, path: str, receive: Receive, send: Send) -> None:
        content_type = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1")
        if method == "POST" and path in self._json_paths and content_type.partition(";")[0].lower() != "application/json":
            message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
            raise HttpError(400, message)
        if method == "POST" and path in GENERATE_PATHS:
            await self._generate(path, receive, send)
        elif method == "POST" and path in POOLING_PATHS:
            await pool(self.engine, self._faults, path, receive, send)
        elif method == "POST" and path in AUDIO_PATHS:
            await transcribe(self.engine, self._faults, path, content_type, receive, send)
        elif method == "POST" and path in OMNI_PATHS:
            await make(self.engine, self._faults, path, content_type, receive, send)
        elif (handler := self._routes.get((method, path))) is not None:
            query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
            await handler(query, receive, send)
        elif path.endswith("/") and path[:-1] in self._paths:
            host = dict(scope["headers"]).get(b"host", b"")
            location = b"http://" + host + path[:-1].encode()
            await send({"type": "http.response.start", "status": 307, "headers": [(b"location", location)]})
            await send({"type": "http.response.body"})
        elif path.startswith("/v1/responses/"):
            await self._stored(method, path.removeprefix("/v1/responses/"), send)
        elif path in self._paths:
            await send_json(send, {"detail": "Method Not Allowed"}, 405)
        else:
            await send_json(send, {"detail": "Not Found"}, 404)

    async def _stored(self, method: str, rest: str, send: Send) -> None:
        name, slash, action = rest.partition("/")
        if (method, slash) == ("GET", ""):
            await send_json(send, self._store.retrieve(name))
        elif (method, action) == ("POST", "cancel"):
            await send_json(send, self._store.cancel(name))
        elif action in ("", "cancel"):
            await send_json(send, {"detail": "Method Not Allowed"}, 405)
        else:
            await send_json(send, {"detail": "Not Found"}, 404)

    # For tests

    async def _state(self, query: Query, receive: Receive, send: Send) -> None:
        await send_json(send, self.engine.state())

    async def _add_faults(self, query: Query, receive: Receive, send: Send) -> None:
        specs = decode(await read_body(receive), _Faults).faults
        try:
            faults = [Fault.parse(spec) for spec in specs]
        except ValueError as error:
            raise HttpError(400, str(error), param="faults") from None
        for fault in faults:
            self._faults.add(fault)
        await send_json(send, {"faults": specs})

    async def _clear_faults(self, query: Query, receive: Receive, send: Send) -> None:
        self._faults.clear()
        await send_json(send, {"faults": []})


class _Server(uvicorn.Server):
    """Says where it listens once it does."""

    def __init__(self, config: uvicorn.Config, ready: str, engine: Engine) -> None:
        super().__init__(config)
        self._ready, self._engine = ready, engine

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._engine.stop_listening = self._stop_listening
        sys.stdout.write(self._ready + "\n")
        sys.stdout.flush()

    def _stop_listening(self) -> None:
        for server in self.servers:
            server.close()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self._engine.close()  # here, because uvicorn ends the process by the signal it caught as soon as it has stopped


def _exit_with_stdin() -> None:
    """End the process when standard input is closed, as it is when the parent has gone."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def serve(options: SimOptions, *, as_json: bool = False) -> None:
    """Run a simulated server until SIGTERM or SIGINT. Prints one ready line (or JSON) with its address to standard output.

    Raises `OSError` when the address cannot be had, `GpuOutOfMemoryError` when the model does not fit the GPU.
    """
    # Bound but not listening while it starts: connections are refused, as by a server that loads its weights.
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
        if options.exit_with_stdin:
            _exit_with_stdin()
        time.sleep(options.start_seconds)
        with asyncio.Runner(loop_factory=_new_event_loop) as runner, suppress(KeyboardInterrupt):
            runner.run(_serve(options, listener, as_json))


def ready_line(name: str, host: str, port: int, *, as_json: bool = False) -> str:
    """What is printed when the server listens. The URL is the last word."""
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    if as_json:
        return msgspec.json.encode({"name": name, "url": url}).decode()
    return f"sim-vllm {name} ready on {url}"


async def _serve(options: SimOptions, listener: socket.socket, as_json: bool) -> None:
    app = SimVLLM(options)
    host, port = listener.getsockname()[:2]
    ready = ready_line(options.name, host, port, as_json=as_json)
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="websockets-sansio",
        access_log=False,
        log_level="critical",
        timeout_graceful_shutdown=0,  # hanging requests are part of the game: cut them
    )
    await _Server(config, ready, app.engine).serve([listener])
