"""llama.cpp's router: one `llama-server` without a model of its own, which runs a process for each model it loads.

A model is out of memory when its process has ended, and only then does the router call it unloaded.
Source: https://github.com/ggml-org/llama.cpp/tree/master/tools/server, README.md and server-models.cpp.
"""

from __future__ import annotations

import anyio
import msgspec

from ..config import TimeoutsConfig
from ..exceptions import BackendError, BackendUnreachableError, BackendUnsupportedError
from ._http import POLL_FIRST, POLL_LONGEST, ControlClient, limit
from ._protocol import BackendState

__all__ = ["LlamaCppBackend"]

_HINT = "Start llama-server as a router: without -m, with --models-dir."
_LOADED = ("loaded", "sleeping")
"""A model that sleeps (--sleep-idle-seconds) loads itself again at any request: the router alone cannot keep it asleep."""
_UNLOADED = ("unloaded", "downloading", "downloaded")


class _Status(msgspec.Struct):
    value: str
    failed: bool = False
    exit_code: int | None = None


class _Model(msgspec.Struct):
    id: str
    aliases: list[str] = []
    status: _Status | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class LlamaCppBackend:
    """Loads and unloads `model` in the router at `url` (its root, without `/v1`). Sleep levels make no difference."""

    def __init__(self, url: str, model: str, *, timeouts: TimeoutsConfig | None = None, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.model = model
        self._timeouts = timeouts or TimeoutsConfig()
        self._client = ControlClient(self.url, self._timeouts, hint=_HINT, api_key=api_key)

    def __str__(self) -> str:
        return f"{self.url} ({self.model})"

    async def state(self) -> BackendState:
        """Ask the router for the model's status. One that is being loaded counts as awake: it takes memory."""
        try:
            status = await self._status()
        except BackendUnreachableError:
            return BackendState.UNREACHABLE
        return BackendState.ASLEEP if status.value in _UNLOADED else BackendState.AWAKE

    async def sleep(self, level: int) -> None:
        """Unload the model, in the middle of its loading too, and wait until its process has ended."""
        with limit(self._timeouts.sleep, f"{self}: unloading the model"):
            pause = POLL_FIRST
            asked = False
            while (await self._status()).value not in _UNLOADED:
                if not asked:
                    await self._unload()
                    asked = True
                    continue
                await anyio.sleep(pause)
                pause = min(2 * pause, POLL_LONGEST)

    async def wake(self) -> None:
        """Have the model loaded. The router answers before it has begun; `ready` waits for the end."""
        with limit(self._timeouts.wake, f"{self}: loading the model"):
            if (await self._status()).value in _UNLOADED:
                await self._client.post("/models/load", json={"model": self.model})

    async def ready(self) -> None:
        """Wait until the model is loaded. Raises `BackendError` as soon as its process has ended instead."""
        with limit(self._timeouts.wake, f"{self}: loading the model"):
            pause = POLL_FIRST
            while (status := await self._status()).value not in _LOADED:
                if status.value in _UNLOADED:
                    code = "" if status.exit_code is None else f" with exit status {status.exit_code}"
                    raise BackendError(
                        f"{self}: the model's process ended{code} while it loaded. The router has written why to its output."
                    )
                await anyio.sleep(pause)
                pause = min(2 * pause, POLL_LONGEST)

    def retune(self, timeouts: TimeoutsConfig, *, freezes: bool) -> None:
        """Go by other time limits from the next call on."""
        self._timeouts = timeouts
        self._client.retune(timeouts)

    async def aclose(self) -> None:
        """Close the HTTP client; the next call opens a new one."""
        await self._client.aclose()

    async def _unload(self) -> None:
        try:
            await self._client.post("/models/unload", json={"model": self.model})
        except BackendUnreachableError:
            raise
        except BackendError:
            # It is refused if the model's process has just ended by itself.
            if (await self._status()).value not in _UNLOADED:
                raise

    async def _status(self) -> _Status:
        response = await self._client.ask("/models")
        try:
            models = msgspec.json.decode(response.content, type=_Models).data
        except msgspec.DecodeError as exc:
            raise BackendError(f"{self.url}: GET /models gave no usable answer: {exc}") from None
        for model in models:
            if self.model == model.id or self.model in model.aliases:
                if model.status is None:
                    raise BackendUnsupportedError(f"{self.url}: this llama-server has a single model. {_HINT}")
                if model.status.value not in (*_LOADED, *_UNLOADED, "loading"):
                    raise BackendError(f"{self}: the router calls the model {model.status.value!r}, which is not known here")
                return model.status
        names = ", ".join(model.id for model in models) or "none"
        raise BackendError(
            f"{self.url}: the router has no model {self.model!r}. It has: {names}. Set served_name to one of these."
        )
