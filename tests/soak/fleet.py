"""The models of the soak: four whose servers the gateway runs itself, and one by URL that the soak keeps running."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from llmux_asgi.backends._build import free_port
from llmux_asgi.sim import SimError, SimProcess, start_sim

__all__ = ["BY_URL", "MODELS", "Fleet", "HandCall", "Model"]

BY_URL = "url"
_SIM: dict[str, Any] = {
    # Room for all of them at once: two awake models are then seen in the ledger, where else one would run out of memory.
    "gpu_memory_mib": 1 << 20,
    "tokens_per_second": 4000,
    "start_seconds": 0.0,
    "sleep_seconds": 0.002,
    "sleep_l2_seconds": 0.002,
    "wake_seconds": 0.002,
    "wake_l2_seconds": 0.002,
    "crash_seconds": 0.2,
}
_RESTART_SECONDS = 0.2
"""From the end of the server by URL until whoever runs it starts it again."""
_HAND_SECONDS = 2.0


@dataclass(frozen=True)
class Model:
    """A model and how often it is asked for. The order is that in which all are asked one after the other: see `soak`."""

    name: str
    share: float
    options: dict[str, Any]


MODELS = (
    Model("stopped", 0.015, {"sleep_level": 3, "retry": True}),  # a start costs half a second of processor time
    Model("light", 0.27, {"sleep_level": 1, "aliases": ["lite"], "retry": True}),
    Model("deep", 0.24, {"sleep_level": 2, "probe": "fingerprint", "retry": True}),
    Model("plain", 0.23, {"sleep_level": 1}),
    Model(BY_URL, 0.23, {"sleep_level": 2}),
)
_TIMEOUTS = {"connect": 1.0, "probe": 1.0, "sleep": 1.0, "wake": 1.0, "start": 20.0, "stop": 0.5, "read": 1.5}
_PREEMPTS = {"drain": "preempt", "min_active_duration": 0.02, "max_frozen": 3.0}
"""A turn is long enough for most answers. Who is frozen for too long gets an error; who waits for a server that has fallen
silent gets one later by `max_frozen`."""


@dataclass
class HandCall:
    """A `/sleep` or `/wake_up` that did not come from the gateway. Times are monotonic seconds; it took effect in between."""

    path: str
    model: str
    begun: float
    ended: float = math.inf
    """Infinity while it is under way: what it aborts may be over before it is."""


@dataclass
class Fleet:
    """Where the servers listen, and what was done to them by hand."""

    gpu: Path
    preempts: bool = False
    """Whether a switch freezes the running requests. Sleep level 3 cannot, so the model that has it sleeps at level 1 then."""
    ports: dict[str, int] = field(default_factory=lambda: {model.name: free_port() for model in MODELS})
    by_hand: list[HandCall] = field(default_factory=list)
    restarts: int = 0
    _server: SimProcess | None = None

    def config(self) -> dict[str, Any]:
        """The gateway's configuration."""
        return {
            "models": {model.name: self._model(model) for model in MODELS},
            "policy": {
                "name": "fifo",
                "min_active_duration": 0,
                "request_timeout": 10,
                **(_PREEMPTS if self.preempts else {"drain_timeout": 1.0}),
            },
            "limits": {
                "heartbeat": 0.05,
                "max_body": 65536,
                "backoff_initial": 0.05,
                "backoff_max": 0.4,
                "health_interval": 0.5,
                "shutdown": 5,
            },
        }

    def _model(self, model: Model) -> dict[str, Any]:
        where: dict[str, Any] = {"url": self.url(model.name)}
        if model.name != BY_URL:
            options = json.dumps({"name": model.name, "gpu": str(self.gpu), **_SIM})
            where["command"] = [sys.executable, "-m", "llmux_asgi.sim", options[:-1] + ', "port": {port}}']
        levels = {"sleep_level": 1} if self.preempts and model.options["sleep_level"] == 3 else {}
        return {**where, "timeouts": _TIMEOUTS, **model.options, **levels}

    def url(self, model: str) -> str:
        return f"http://127.0.0.1:{self.ports[model]}"

    @staticmethod
    def is_server_of(model: str, command: str) -> bool:
        """Say whether a command line is that of a server of `model`, or of its guardian."""
        return f'"name": "{model}"' in command

    @property
    def server(self) -> SimProcess:
        """The server by URL."""
        assert self._server is not None
        return self._server

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep the server by URL running while in the block. It starts asleep: a starting one must not take memory."""
        await self._start()
        keeper = asyncio.create_task(self._keep())
        try:
            yield
        finally:
            keeper.cancel()
            with suppress(asyncio.CancelledError):
                await keeper
            await asyncio.to_thread(self.server.stop)

    async def _start(self) -> None:
        options = {"port": self.ports[BY_URL], "gpu": str(self.gpu), "start_asleep": 2, **_SIM}
        self._server = await asyncio.shield(asyncio.to_thread(start_sim, BY_URL, **options))

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(_RESTART_SECONDS)
            if self.server.returncode is not None:
                self.server.kill()
                with suppress(SimError):
                    await self._start()
                    self.restarts += 1

    async def add_fault(self, client: httpx.AsyncClient, model: str, spec: str) -> bool:
        """Have the server of `model` commit a fault. Returns whether it runs and took note."""
        try:
            answer = await client.post(f"{self.url(model)}/sim/faults", json={"faults": [spec]}, timeout=1)
        except httpx.HTTPError:
            return False
        return answer.is_success

    async def clear_faults(self, client: httpx.AsyncClient) -> None:
        """Have all servers behave."""
        for model in self.ports:
            with suppress(httpx.HTTPError):
                await client.delete(f"{self.url(model)}/sim/faults", timeout=2)

    async def call_by_hand(self, client: httpx.AsyncClient, model: str, path: str) -> bool:
        """Send a control call past the gateway. Returns whether the server took it."""
        call = HandCall(path, model, time.monotonic())
        self.by_hand.append(call)
        try:
            answer = await client.post(self.url(model) + path, timeout=_HAND_SECONDS)
        except httpx.ConnectError:
            return False
        except httpx.HTTPError:
            pass  # it may take effect all the same
        else:
            if not answer.is_success:
                return False
        finally:
            call.ended = time.monotonic()
        return True
