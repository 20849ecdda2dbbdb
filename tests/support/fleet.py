"""A switcher built from a configuration, whose servers are fakes: one for each host of a URL, on one fake GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import anyio.lowlevel
import pytest

from llmux_asgi import LLMuxError, ModelConfig, ModelSwitcher, ReloadReport, SwitchPolicy, load_config
from tests.support.fakes import GPU, FakeBackend, StoppableFake
from tests.support.pool import Pool, Request

__all__ = ["Fleet", "until_settled"]


class Fleet(Pool):
    """Models by name with the host of their server, such as `qwen="a"`, or more of their settings.

    Hosts in `awake` are awake at the start; the processes of those in `stoppable` are the gateway's own.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        awake: str = "",
        stoppable: str = "",
        policy: SwitchPolicy | None = None,
        settings: Mapping[str, Any] | None = None,
        **models: str | dict[str, Any],
    ) -> None:
        self.gpu = GPU()
        self.gpu.awake.update(awake)
        self.built: list[FakeBackend] = []
        self._stoppable = stoppable

        def build(name: str, model: ModelConfig, *, sleep_level: int, freezes: bool = False) -> FakeBackend:
            host = urlsplit(model.address).hostname or ""
            kind = StoppableFake if host in self._stoppable else FakeBackend
            self.built.append(kind(host, self.gpu))
            return self.built[-1]

        monkeypatch.setattr("llmux_asgi._reload.build_backend", build)
        self.switcher = ModelSwitcher.from_config(load_config(self.config(settings, **models)), policy=policy)

    @staticmethod
    def config(settings: Mapping[str, Any] | None = None, **models: str | dict[str, Any]) -> dict[str, Any]:
        """The configuration of these models."""
        built = {name: {"url": f"http://{model}"} if isinstance(model, str) else model for name, model in models.items()}
        return {"models": built, "policy": {"name": "fifo", "min_active_duration": 0}, **(settings or {})}

    async def reload(self, settings: Mapping[str, Any] | None = None, **models: str | dict[str, Any]) -> ReloadReport:
        """Have these models from now on."""
        return await self.switcher.reload(self.config(settings, **models))

    def server(self, model: str) -> FakeBackend:
        """The server that a model has now."""
        backend = self.switcher._turnover.present[model].backend
        assert isinstance(backend, FakeBackend)
        return backend

    async def request(self, request: Request, model: str, timeout: float | None = None, priority: str | None = None) -> None:
        """Take a lease and hold it until the test says so. Its server must be the same, and awake, to the end."""
        with request.scope:
            try:
                async with self.switcher.lease(model, timeout=timeout, priority=priority) as lease:
                    request.lease = lease
                    server = self.server(lease.model)
                    request.server = server.name
                    server.forward()
                    request.granted.set()
                    await request.finish.wait()
                    request.interrupted = lease.interrupted
                    if not lease.interrupted and lease.freeze is None:
                        server.forward()
                        if self.server(lease.model) is not server:
                            self.gpu.violations.append(f"{server.name} was replaced under a request")
            except LLMuxError as exc:
                request.error = exc
        request.done.set()


async def until_settled(fleet: Fleet) -> None:
    """Let other tasks run until each model has the server that it is to have."""
    while fleet.switcher.statistics().unsettled:
        await anyio.lowlevel.checkpoint()
