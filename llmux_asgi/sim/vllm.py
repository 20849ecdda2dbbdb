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
from collections.abc import Awaitable, Callable
from contextlib import suppress
from urllib.parse import parse_qs

import msgspec
import uvicorn
from starlette.types import Receive, Scope, Send

from . import text
from .asgi import HttpError, read_body, send_body, send_error, send_json
from .engine import Engine
from .faults import Fault, FaultPlan
from .generate import GENERATE_PATHS, POOLING_PATHS, check_model, decode, generate, pool, strike
from .gpu import GpuLedger, GpuOutOfMemoryError
from .options import SimOptions

try:
    import uvloop

    _new_event_loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
except ImportError:  # comes with the extra `server`, but not on every platform
    _new_event_loop = asyncio.new_event_loop

__all__ = ["SimVLLM", "serve"]

_Handler = Callable[[dict[str, list[str]], Receive, Send], Awaitable[None]]
_MODES = ("abort", "wait", "keep")


class _Rpc(msgspec.Struct):
    method: str | None = None


class _Tokenize(msgspec.Struct):
    model: str | None = None
    prompt: str = ""
    tokens: list[int] = []


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
        self._options = options
        self._started = int(time.time())
        self._faults = FaultPlan()
        for spec in options.faults:
            self._faults.add(Fault.parse(spec))
        self._routes: dict[tuple[str, str], _Handler] = {
            ("GET", "/health"): self._health,
            ("GET", "/ping"): self._health,
            ("POST", "/ping"): self._health,
            ("GET", "/version"): self._version,
            ("GET", "/v1/models"): self._models,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/openapi.json"): self._openapi,
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/detokenize"): self._detokenize,
            ("GET", "/sim/state"): self._state,
            ("POST", "/sim/faults"): self._add_faults,
            ("DELETE", "/sim/faults"): self._clear_faults,
        }
        if options.dev_mode:
            self._routes |= {
                ("POST", "/sleep"): self._sleep,
                ("POST", "/wake_up"): self._wake_up,
                ("GET", "/is_sleeping"): self._is_sleeping,
                ("GET", "/server_info"): self._server_info,
                ("POST", "/collective_rpc"): self._collective_rpc,
                ("POST", "/reset_prefix_cache"): self._reset_prefix_cache,
            }
            if self.engine.behaviour.has_modes:
                self._routes |= {
                    ("POST", "/pause"): self._pause,
                    ("POST", "/resume"): self._resume,
                    ("GET", "/is_paused"): self._is_paused,
                }
        self._paths = {path for _, path in self._routes} | GENERATE_PATHS | POOLING_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        path, method = scope["path"], scope["method"]
        try:
            if method == "POST" and path in GENERATE_PATHS:
                await generate(self.engine, self._faults, path, receive, send)
            elif method == "POST" and path in POOLING_PATHS:
                await pool(self.engine, self._faults, path, receive, send)
            elif (handler := self._routes.get((method, path))) is not None:
                query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
                await handler(query, receive, send)
            elif path in self._paths:
                await send_json(send, {"detail": "Method Not Allowed"}, 405)
            else:
                await send_json(send, {"detail": "Not Found"}, 404)
        except HttpError as error:
            await send_error(send, error)

    # Control

    async def _sleep(self, query: dict[str, list[str]], receive: Receive, send: Send) -> None:
        behaviour = self.engine.behaviour
        raw_level = query.get("level", ["1"])[-1]
        if raw_level not in ("0", "1", "2"):
            raise HttpError(400, f"1 validation error: level must be 0, 1 or 2, not {raw_level!r}", param="query.level")
        level = int(raw_level)
        mode = self._mode(query) if behaviour.has_modes else "abort"
        fault = await strike(self.engine, self._faults, "sleep", receive)
        self._check_alive()
        action, value = (fault.action, fault.value) if fault is not None else ("", 0.0)
        if action != "lie":
            await self.engine.sleep(level, mode, leak=action == "leak", extra=value)
        if behaviour.sleep_answers_json:
            await send_json(send, {"status": "sleeping", "level": level})
        else:
            await send_body(send, 200, b"", b"")

    async def _wake_up(self, query: dict[str, list[str]], receive: Receive, send: Send) -> None:
        tags = query.get("tags")
        fault = await strike(self.engine, self._faults, "wake", receive)
        self._check_alive()
        action, value = (fault.action, fault.value) if fault is not None else ("", 0.0)
        awake = True
        if action != "lie":
            try:
                awake = await self.engine.wake_up(tags, oom=action == "oom", extra=value)
            except GpuOutOfMemoryError as error:
                raise HttpError(500, f"Call to wake_up method failed: {error}") from None
        if self.engine.behaviour.sleep_answers_json:
            await send_json(send, {"status": "awake" if awake else "sleeping", "tags": tags})
        else:
            await send_body(send, 200, b"", b"")

    async def _is_sleeping(self, query: dict[str, list[str]], receive: Receive, send: Send) -> None:
        await strike(self.engine, self._faults, "is_sleeping", receive)
        self._check_alive()
        await send_json(send, {"is_sleeping": await self.engine.is_sleeping()})

    async def _pause(self, query: dict[str, list[str]], receive: Receive, send: Send) -> None:
        mode = self._mode(query)
        self._check_alive()
        await self.engine.pause(mode)
        await send_json(send, {"status": "paused"})

    async def _resume(self, query: dict[str, list[str]], receive: Receive, send: Send) -> None:
        self._check_alive()
        self.engine.resume()
        await send_json(send, {"status": "resumed"})

    async def _is_paused(self, query: dict[str, list[str]], receive: Receive, send: Send) -> None:
        await send_json(send, {"is_paused": self.engine.paused})

    async def _collective_rpc(self, query: dict[str, list[str]], receive: Receive, send: Send) -> None:
        rpc = decode(await read_body(receive), _Rpc)
        if rpc.method is None:
            raise HttpError(400, "Missing 'method' in request body")
        self._check_alive()
        if rpc.method != "reload_weights":
            raise HttpError(500, f"Call to collective_rpc method failed: 'Worker' object has no attribute {rpc.method!r}")
        await strike(self.engine, self._faults, "reload", receive)
        try:
            await self.engine.reload_weights()
        except RuntimeError as error:
            raise HttpError(500, f"Call to collective_rpc method failed: {error}") from None
        await send_json(send, {"results": [None]})

    async def _reset_prefix_cache(self, query: dict[str, list[str]], receive: Receive, send: Send) -> None:
        self._check_alive()
        if self.engine.behaviour.sleep_answers_json:
            await send_json(send, {"success": self.engine.running_and_waiting()[0] == 0})
        else:
            await send_body(send, 200, b"", b"")

    @staticmethod
    def _mode(query: dict[str, list[str]]) -> str:
        mode = query.get("mode", ["abort"])[-1]
        if mode not in _MODES:
            message = f"1 validation error: mode must be 'abort', 'wait' or 'keep', not {mode!r}"
            raise HttpError(400, message, param="query.mode")
        return mode

    def _check_alive(self) -> None:
        if self.engine.dead:
            raise HttpError(500, "EngineCore encountered an issue. See stack trace (above) for the root cause.")

    # Information

    async def _health(self, query: dict[str, list[str]], receive: Receive, send: Send) -> None:
        await strike(self.engine, self._faults, "health", receive)
        await send_body(send, 503 if self.engine.dead and not self.engine.withered else 200, b"", b"")

    async def _version(self, query: dict[str, list[str]], receive: Receive, send: Send) -> None:
        await send_json(send, {"version": self._options.version})

    async def _server_info(self, query: dict[str, list[str]], receive: Receive, send: Send) -> None:
        enabled = self._options.sleep_mode
        told: object = {"model_config": {"model": self._options.name, "enable_sleep_mode": enabled}}
        if query.get("config_format", ["text"])[-1] != "json":
            told = f"model='{self._options.name}'"
        await send_json(send, {"vllm_config": told, "vllm_env": {}, "system_env": {}})

    async def _models(self, query: dict[str, list[str]], receive: Receive, send: Send) -> None:
        card = {
            "id": self._options.name,
            "object": "model",
            "created": self._started,
            "owned_by": "vllm",
            "root": self._options.name,
            "parent": None,
            "max_model_len": self._options.max_model_len,
        }
        await send_json(send, {"object": "list", "data": [card]})

    async def _metrics(self, query: dict[str, list[str]], receive: Receive, send: Send) -> None:
        name = self._options.name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        labels = f'engine="0",model_name="{name}"'
        running, waiting = self.engine.running_and_waiting()
        if self.engine.paused and not running:
            waiting = 0  # vLLM writes these when the engine steps: requests that came since then are not seen
        lines = [
            "# TYPE vllm:num_requests_running gauge",
            f"vllm:num_requests_running{{{labels}}} {running}.0",
            "# TYPE vllm:num_requests_waiting gauge",
            f"vllm:num_requests_waiting{{{labels}}} {waiting}.0",
            "# TYPE vllm:engine_sleep_state gauge",
        ]
        states = ("awake", "weights_offloaded", "discard_all")
        for state, value in zip(states, self.engine.sleep_metric(), strict=True):
            lines.append(f'vllm:engine_sleep_state{{{labels},sleep_state="{state}"}} {value}.0')
        await send_body(send, 200, b"text/plain; version=0.0.4; charset=utf-8", "\n".join([*lines, ""]).encode())

    async def _openapi(self, query: dict[str, list[str]], receive: Receive, send: Send) -> None:
        paths: dict[str, dict[str, object]] = {path: {"post": {}} for path in sorted(GENERATE_PATHS | POOLING_PATHS)}
        for method, path in self._routes:
            if not path.startswith("/sim/"):
                paths.setdefault(path, {})[method.lower()] = {}
        if "/sleep" in paths and self.engine.behaviour.has_modes:
            level = {"type": "integer", "maximum": 2, "minimum": 0, "default": 1}
            mode = {"type": "string", "enum": list(_MODES), "default": "abort"}
            parameters = [
                {"name": name, "in": "query", "required": False, "schema": schema}
                for name, schema in (("level", level), ("mode", mode))
            ]
            paths["/sleep"]["post"] = {"parameters": parameters}
        info = {"title": "FastAPI", "version": "0.1.0"}
        await send_json(send, {"openapi": "3.1.0", "info": info, "paths": paths})

    async def _tokenize(self, query: dict[str, list[str]], receive: Receive, send: Send) -> None:
        request = decode(await read_body(receive), _Tokenize)
        check_model(self.engine, request.model)
        ids = text.tokenize(request.prompt)
        await send_json(send, {"count": len(ids), "max_model_len": self._options.max_model_len, "tokens": ids})

    async def _detokenize(self, query: dict[str, list[str]], receive: Receive, send: Send) -> None:
        request = decode(await read_body(receive), _Tokenize)
        check_model(self.engine, request.model)
        await send_json(send, {"prompt": text.detokenize(request.tokens)})

    # For tests

    async def _state(self, query: dict[str, list[str]], receive: Receive, send: Send) -> None:
        await send_json(send, self.engine.state())

    async def _add_faults(self, query: dict[str, list[str]], receive: Receive, send: Send) -> None:
        specs = decode(await read_body(receive), _Faults).faults
        try:
            faults = [Fault.parse(spec) for spec in specs]
        except ValueError as error:
            raise HttpError(400, str(error), param="faults") from None
        for fault in faults:
            self._faults.add(fault)
        await send_json(send, {"faults": specs})

    async def _clear_faults(self, query: dict[str, list[str]], receive: Receive, send: Send) -> None:
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


def serve(options: SimOptions) -> None:
    """Run a simulated server until SIGTERM or SIGINT. Prints one ready line with its address to standard output.

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
            runner.run(_serve(options, listener))


async def _serve(options: SimOptions, listener: socket.socket) -> None:
    app = SimVLLM(options)
    host, port = listener.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        access_log=False,
        log_level="critical",
        timeout_graceful_shutdown=0,  # hanging requests are part of the game: cut them
    )
    await _Server(config, f"sim-vllm {options.name} ready on http://{address}", app.engine).serve([listener])
