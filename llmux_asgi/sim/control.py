"""The routes that steer a server. A gateway calls some of them and lets nobody else near any."""

from __future__ import annotations

import msgspec
from starlette.types import Receive, Send

from .asgi import HttpError, read_body, send_body, send_json
from .engine import Engine
from .faults import FaultPlan
from .generate import dead, decode, required, strike
from .gpu import GpuOutOfMemoryError
from .routes import Handler, Query, Table

__all__ = ["Control"]

_MODES = ("abort", "wait", "keep")
_SIMPLE: dict[tuple[str, str], dict[str, object] | None] = {
    ("POST", "/init_weight_transfer_engine"): {"message": "Weight transfer initialized"},
    ("POST", "/shutdown_weight_transfer_engine"): {"message": "Weight transfer shut down"},
    ("POST", "/start_weight_update"): {"message": "Weight update started"},
    ("POST", "/start_draft_weight_update"): {"message": "Draft weight update started"},
    ("POST", "/finish_weight_update"): {"message": "Weight update finished"},
    ("GET", "/weight_info"): {"weight_version": "default"},
    ("POST", "/weight_checker"): {"checksums": {}},
    ("GET", "/get_world_size"): {"world_size": 1},
    ("POST", "/release_kv_cache_memory"): {"status": "kv_cache_released"},
    ("POST", "/reset_mm_cache"): None,
    ("POST", "/reset_encoder_cache"): None,
}
"""Routes of the development mode that change nothing here, with their answers: they are there to be refused by a gateway."""
_ALWAYS: dict[tuple[str, str], dict[str, object] | None] = {
    ("POST", "/scale_elastic_ep"): {"message": "Scaled to 1 data parallel engines"},
    ("POST", "/is_scaling_elastic_ep"): {"is_scaling_elastic_ep": False},
    ("GET", "/kv_event_sources"): {},
    ("POST", "/invocations"): {},
}


class _Rpc(msgspec.Struct):
    method: str | None = None


class _Update(msgspec.Struct):
    update_info: dict[str, object] | None = None
    new_version: str | None = None


class Control:
    """Handlers of one server."""

    def __init__(self, engine: Engine, faults: FaultPlan) -> None:
        self._engine, self._faults = engine, faults

    def always(self) -> Table:
        """What is there without the development mode."""
        return {route: _answering(content) for route, content in _ALWAYS.items()}

    def development(self) -> Table:
        """What `VLLM_SERVER_DEV_MODE=1` adds."""
        table: Table = {
            ("POST", "/sleep"): self._sleep,
            ("POST", "/wake_up"): self._wake_up,
            ("GET", "/is_sleeping"): self._is_sleeping,
            ("POST", "/collective_rpc"): self._collective_rpc,
            ("POST", "/reset_prefix_cache"): self._reset_prefix_cache,
            ("GET", "/server_info"): self._server_info,
            ("POST", "/update_weights"): self._update_weights,
            ("POST", "/update_weight_version"): self._update_weight_version,
            ("POST", "/abort_requests"): self._abort_requests,
        }
        if self._engine.behaviour.has_modes:
            table |= {
                ("POST", "/pause"): self._pause,
                ("POST", "/resume"): self._resume,
                ("GET", "/is_paused"): self._is_paused,
            }
        return table | {route: _answering(content) for route, content in _SIMPLE.items()}

    async def _server_info(self, query: Query, receive: Receive, send: Send) -> None:
        name, enabled = self._engine.options.name, self._engine.options.sleep_mode
        told: object = {"model_config": {"model": name, "enable_sleep_mode": enabled}}
        if query.get("config_format", ["text"])[-1] != "json":
            told = f"model='{name}'"
        await send_json(send, {"vllm_config": told, "vllm_env": {}, "system_env": {}})

    async def _sleep(self, query: Query, receive: Receive, send: Send) -> None:
        behaviour = self._engine.behaviour
        raw_level = query.get("level", ["1"])[-1]
        if raw_level not in ("0", "1", "2"):
            raise HttpError(400, f"1 validation error: level must be 0, 1 or 2, not {raw_level!r}", param="query.level")
        level = int(raw_level)
        mode = self._mode(query) if behaviour.has_modes else "abort"
        fault = await strike(self._engine, self._faults, "sleep", receive)
        self._check_alive()
        action, value = (fault.action, fault.value) if fault is not None else ("", 0.0)
        if action != "lie":
            await self._engine.sleep(level, mode, leak=action == "leak", extra=value)
        if behaviour.sleep_answers_json:
            await send_json(send, {"status": "sleeping", "level": level})
        else:
            await send_body(send, 200, b"", b"")

    async def _wake_up(self, query: Query, receive: Receive, send: Send) -> None:
        tags = query.get("tags")
        fault = await strike(self._engine, self._faults, "wake", receive)
        self._check_alive()
        action, value = (fault.action, fault.value) if fault is not None else ("", 0.0)
        awake = True
        if action != "lie":
            try:
                awake = await self._engine.wake_up(tags, oom=action == "oom", extra=value)
            except GpuOutOfMemoryError as error:
                raise HttpError(500, f"Call to wake_up method failed: {error}") from None
        if self._engine.behaviour.sleep_answers_json:
            await send_json(send, {"status": "awake" if awake else "sleeping", "tags": tags})
        else:
            await send_body(send, 200, b"", b"")

    async def _is_sleeping(self, query: Query, receive: Receive, send: Send) -> None:
        await strike(self._engine, self._faults, "is_sleeping", receive)
        self._check_alive()
        await send_json(send, {"is_sleeping": await self._engine.is_sleeping()})

    async def _pause(self, query: Query, receive: Receive, send: Send) -> None:
        mode = self._mode(query)
        self._check_alive()
        await self._engine.pause(mode)
        await send_json(send, {"status": "paused"})

    async def _resume(self, query: Query, receive: Receive, send: Send) -> None:
        self._check_alive()
        self._engine.resume()
        await send_json(send, {"status": "resumed"})

    async def _is_paused(self, query: Query, receive: Receive, send: Send) -> None:
        await send_json(send, {"is_paused": self._engine.paused})

    async def _abort_requests(self, query: Query, receive: Receive, send: Send) -> None:
        await read_body(receive)
        count = self._engine.abort_all()
        await send_json(send, {"status": "aborted", "aborted": count})

    async def _collective_rpc(self, query: Query, receive: Receive, send: Send) -> None:
        rpc = decode(await read_body(receive), _Rpc)
        if rpc.method is None:
            raise HttpError(400, "Missing 'method' in request body")
        self._check_alive()
        if rpc.method != "reload_weights":
            raise HttpError(500, f"Call to collective_rpc method failed: 'Worker' object has no attribute {rpc.method!r}")
        await strike(self._engine, self._faults, "reload", receive)
        try:
            await self._engine.reload_weights()
        except RuntimeError as error:
            raise HttpError(500, f"Call to collective_rpc method failed: {error}") from None
        await send_json(send, {"results": [None]})

    async def _reset_prefix_cache(self, query: Query, receive: Receive, send: Send) -> None:
        self._check_alive()
        if self._engine.behaviour.sleep_answers_json:
            await send_json(send, {"success": self._engine.running_and_waiting()[0] == 0})
        else:
            await send_body(send, 200, b"", b"")

    async def _update_weights(self, query: Query, receive: Receive, send: Send) -> None:
        required(decode(await read_body(receive), _Update).update_info, "update_info")
        await send_json(send, {"message": "Weights updated"})

    async def _update_weight_version(self, query: Query, receive: Receive, send: Send) -> None:
        version = decode(await read_body(receive), _Update).new_version
        required(version, "new_version")
        await send_json(send, {"success": True, "new_version": version})

    @staticmethod
    def _mode(query: Query) -> str:
        mode = query.get("mode", ["abort"])[-1]
        if mode not in _MODES:
            message = f"1 validation error: mode must be 'abort', 'wait' or 'keep', not {mode!r}"
            raise HttpError(400, message, param="query.mode")
        return mode

    def _check_alive(self) -> None:
        if self._engine.dead:
            raise dead()


def _answering(content: dict[str, object] | None) -> Handler:
    async def handler(query: Query, receive: Receive, send: Send) -> None:
        if content is None:
            await send_body(send, 200, b"", b"")
        else:
            await send_json(send, content)

    return handler
