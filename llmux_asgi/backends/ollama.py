"""Ollama: a model is loaded by a request without a prompt, and unloaded by one that keeps it alive for no time.

An unloaded model is gone from `/api/ps` when its process has ended.
Source: https://github.com/ollama/ollama/blob/main/docs/api.md and server/routes.go, server/sched.go.
"""

from __future__ import annotations

import anyio
import msgspec

from ..config import TimeoutsConfig
from ..exceptions import BackendError, BackendTimeoutError, BackendUnreachableError, BackendUnsupportedError
from ._http import POLL_FIRST, POLL_LONGEST, ControlClient, limit
from ._protocol import BackendState

__all__ = ["OllamaBackend"]

_FOREVER, _NO_TIME = -1, 0
_HINT = "Is it an Ollama of version 0.1.38 or later?"


class _Running(msgspec.Struct):
    name: str = ""
    model: str = ""


class _Processes(msgspec.Struct):
    models: list[_Running] | None


class OllamaBackend:
    """Loads and unloads `model` in the Ollama at `url` (its root, without `/v1`). Sleep levels make no difference."""

    def __init__(self, url: str, model: str, *, timeouts: TimeoutsConfig | None = None, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.model = model
        self._timeouts = timeouts or TimeoutsConfig()
        self._client = ControlClient(self.url, self._timeouts, hint=_HINT, api_key=api_key)
        self._loading = False
        """A load was sent whose end is not known. It is in no list before its process runs."""

    def __str__(self) -> str:
        return f"{self.url} ({self.model})"

    async def state(self) -> BackendState:
        """Ask for the running models."""
        try:
            return BackendState.AWAKE if await self._runs() else BackendState.ASLEEP
        except BackendUnreachableError:
            self._loading = False
            return BackendState.UNREACHABLE

    async def sleep(self, level: int) -> None:
        """Unload the model and wait until it is gone. Ollama lets requests that still run finish first."""
        if self._loading:
            # Loads are served in turn, so this one is answered when the other is over, whichever way.
            try:
                await self.wake()
            except (BackendTimeoutError, BackendUnreachableError):
                raise
            except BackendError:
                if self._loading:
                    raise
        with limit(self._timeouts.sleep, f"{self}: unloading the model"):
            await self._keep_alive(_NO_TIME)
            pause = POLL_FIRST
            while await self._runs():
                await anyio.sleep(pause)
                pause = min(2 * pause, POLL_LONGEST)

    async def wake(self) -> None:
        """Load the model, to stay until it is unloaded. Answered when it is loaded."""
        self._loading = True
        with limit(self._timeouts.wake, f"{self}: loading the model"):
            try:
                await self._keep_alive(_FOREVER)
            except BackendError as exc:
                # What the server itself has refused is over; a connection that broke (the cause) tells nothing.
                self._loading = exc.__cause__ is not None
                raise
        self._loading = False

    async def ready(self) -> None:
        """Ask for the running models until this is one of them: normally the first answer."""
        with limit(self._timeouts.wake, f"{self}: waiting for the loaded model"):
            pause = POLL_FIRST
            while not await self._runs():
                await anyio.sleep(pause)
                pause = min(2 * pause, POLL_LONGEST)

    def retune(self, timeouts: TimeoutsConfig, *, freezes: bool) -> None:
        """Go by other time limits from the next call on."""
        self._timeouts = timeouts
        self._client.retune(timeouts)

    async def aclose(self) -> None:
        """Close the HTTP client; the next call opens a new one."""
        await self._client.aclose()

    async def _keep_alive(self, duration: int) -> None:
        try:
            await self._client.post("/api/generate", json={"model": self.model, "keep_alive": duration, "stream": False})
        except BackendUnsupportedError:  # 404
            raise BackendError(f"{self.url}: it has no model {self.model!r}. Run: ollama pull {self.model}") from None

    async def _runs(self) -> bool:
        response = await self._client.ask("/api/ps")
        try:
            running = msgspec.json.decode(response.content, type=_Processes).models or []
        except msgspec.DecodeError as exc:
            raise BackendError(f"{self.url}: GET /api/ps gave no usable answer: {exc}") from None
        wanted = _full_name(self.model)
        return any(wanted in (_full_name(each.name), _full_name(each.model)) for each in running)


def _full_name(name: str) -> str:
    """Return a name with its tag and without what Ollama leaves out of its lists. Names are compared without case."""
    name = name.lower().removeprefix("registry.ollama.ai/").removeprefix("library/")
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"
