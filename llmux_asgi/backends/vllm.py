"""vLLM's sleep mode over HTTP, for the versions that free memory when they say so (0.17 and later, and before 0.14).

The control routes exist when the server runs with `VLLM_SERVER_DEV_MODE=1`. What is decided here rests on `/is_sleeping`;
the bodies of the other answers differ between versions and are not read.
Source: https://docs.vllm.ai/en/latest/features/sleep_mode/ and the behaviour of vLLM 0.32.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TypeAlias

import anyio
import msgspec

from ..config import TimeoutsConfig
from ..exceptions import (
    BackendDeadError,
    BackendError,
    BackendUnreachableError,
    BackendUnsupportedError,
)
from ._http import POLL_FIRST, POLL_LONGEST, ControlClient, limit
from ._protocol import BackendState

__all__ = ["VLLMBackend"]

_Version: TypeAlias = tuple[int, int]

_LEAKY = ((0, 14), (0, 17))
"""Versions from the first up to, not including, the second do not free the weights when they sleep."""
_SLEEP_MODES: _Version = (0, 17)
"""The first version whose `/sleep` takes a mode. Older ones ignore it and abort."""
_STAGED_WAKE: _Version = (0, 24)
"""The first version that does not resume scheduling when only a part of the memory is awake."""
_LOOK_SECONDS = 1.0
"""Between two looks, while a step is under way, whether it can still be answered."""
_HINT = "Start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment and with --enable-sleep-mode."


class _IsSleeping(msgspec.Struct):
    is_sleeping: bool


class _VersionAnswer(msgspec.Struct):
    version: str


class _Parameter(msgspec.Struct):
    name: str = ""
    schema: msgspec.Raw = msgspec.Raw(b"{}")


class _Operation(msgspec.Struct):
    parameters: list[_Parameter] = []


class _Path(msgspec.Struct):
    post: _Operation | None = None


class _OpenApi(msgspec.Struct):
    paths: dict[str, _Path] = {}


class VLLMBackend:
    """Controls one vLLM server at `url` (its root, without `/v1`).

    `sleep_level` is the level that a sleeper is taken to be at which this object did not put to sleep, unless the server's
    metrics say 2: waking from 2 reloads the weights, which is right for either level and costs time for level 1. With
    `freezes` a server that cannot keep its requests while it sleeps is refused at first contact.
    """

    def __init__(
        self,
        url: str,
        *,
        sleep_level: int = 1,
        freezes: bool = False,
        timeouts: TimeoutsConfig | None = None,
        api_key: str | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._default_level = sleep_level
        self._freezes = freezes
        self._timeouts = timeouts or TimeoutsConfig()
        self._client = ControlClient(self.url, self._timeouts, hint=_HINT, api_key=api_key)
        self._version: _Version | None = None
        self._level: int | None = None
        self._half_woken = False
        self._has_modes = False
        """Whether `/sleep` is known to take the mode `keep`."""

    def __str__(self) -> str:
        return self.url

    async def state(self) -> BackendState:
        """Ask `/is_sleeping`, and on first contact the version."""
        try:
            return await self._ask_for_state()
        except BackendUnreachableError:
            # Whatever comes back on this address is another process.
            self._version = self._level = None
            self._half_woken = self._has_modes = False
            return BackendState.UNREACHABLE

    async def sleep(self, level: int) -> None:
        """Send `/sleep` and confirm it. Requests still running are aborted by the server."""
        await self._put_to_sleep(level, "abort")

    async def require_freezing(self) -> None:
        """Raise `BackendUnsupportedError` unless the server offers `mode=keep`, as vLLM does from 0.17 on.

        Its `/openapi.json` says so; where that is switched off, its version does.
        """
        if self._has_modes:
            return
        version = self._version or await self._supported_version()
        offers = version >= _SLEEP_MODES
        with suppress(BackendUnsupportedError):  # no such page
            document = (await self._client.ask("/openapi.json")).content
            offers = offers and _offers_keep(document)
        if not offers:
            raise BackendUnsupportedError(
                f"{self.url}: drain: preempt needs POST /sleep?mode=keep, which vLLM {version[0]}.{version[1]} does not "
                "offer here. Upgrade it to 0.17 or later, or choose drain: wait."
            )
        self._has_modes = True

    async def freeze(self, level: int) -> None:
        """Send `/sleep` and confirm it. The server keeps the requests that are running, for when it is woken."""
        await self._put_to_sleep(level, "keep")

    async def _put_to_sleep(self, level: int, mode: str) -> None:
        if self._half_woken:
            # vLLM takes such a server for a sleeper: its /sleep would answer 200 and free nothing. Awake as a whole, it frees
            # everything. It stays without its weights if those had been discarded: the next wake has to reload them.
            level = max(level, self._level or level)
            with limit(self._timeouts.wake, f"{self.url}: waking what an earlier wake has left half-woken"):
                await self._step("/wake_up")
        with limit(self._timeouts.sleep, f"{self.url}: putting the model to sleep"):
            # mode=wait would let a call that timed out here put the engine to sleep after a later wake.
            await self._step("/sleep", {"level": str(level), "mode": mode})
            if not await self._is_sleeping():
                raise BackendUnsupportedError(
                    f"{self.url}: POST /sleep answered 200 but the server is still awake. Start vLLM with --enable-sleep-mode."
                )
        self._level, self._half_woken = level, False

    async def wake(self) -> None:
        """Wake the server: at once from level 1; from level 2 weights, reload, KV cache and prefix cache in turn."""
        with limit(self._timeouts.wake, f"{self.url}: waking the model"):
            # Not put to sleep by this object: reload if there is any reason to. The metric alone is not enough, because a
            # second /sleep that has no effect changes it all the same (seen on 0.32).
            self._level = self._level or max(await self._level_from_metrics() or 1, self._default_level)
            self._half_woken = True
            if self._level < 2:
                await self._step("/wake_up")
            else:
                await self._wake_from_level_2()

    async def ready(self) -> None:
        """Poll `/is_sleeping` until it is false: normally the first answer."""
        with limit(self._timeouts.wake, f"{self.url}: waiting for the woken model"):
            pause = POLL_FIRST
            while await self._is_sleeping():
                await anyio.sleep(pause)
                pause = min(2 * pause, POLL_LONGEST)
        self._level, self._half_woken = None, False

    def retune(self, timeouts: TimeoutsConfig, *, freezes: bool) -> None:
        """Go by other time limits from the next call on; with `freezes` its requests have to survive its sleep."""
        self._timeouts = timeouts
        self._client.retune(timeouts)
        self._freezes = freezes

    async def aclose(self) -> None:
        """Close the HTTP client; the next call opens a new one."""
        await self._client.aclose()

    async def _ask_for_state(self) -> BackendState:
        try:
            if self._version is None:
                version = await self._supported_version()
                if self._freezes:
                    await self.require_freezing()
                self._version = version
            return BackendState.ASLEEP if await self._is_sleeping() else BackendState.AWAKE
        except (BackendUnreachableError, BackendUnsupportedError):
            raise
        except BackendError as exc:  # no answer too: vLLM gives none if the engine dies over the question
            if await self._engine_is_dead():
                raise BackendDeadError(f"{self.url}: the engine has died ({exc}); the process is about to end") from exc
            raise

    async def _wake_from_level_2(self) -> None:
        staged = self._version is None or self._version >= _STAGED_WAKE
        await self._step("/wake_up", {"tags": "weights"} if staged else {})
        # Without this the model answers, in garbage.
        await self._step("/collective_rpc", json={"method": "reload_weights"})
        if staged:
            await self._step("/wake_up", {"tags": "kv_cache"})
        await self._step("/reset_prefix_cache")

    async def _step(self, path: str, params: dict[str, str] | None = None, *, json: object = None) -> None:
        """Send a step. Raises `BackendDeadError` or `BackendUnreachableError` if the engine dies before it has answered.

        vLLM never answers a control call that its engine died over (seen on 0.32: the call hangs, and the process with it).
        """
        failure: BackendError | None = None

        async def look() -> None:
            nonlocal failure
            while failure is None:
                await anyio.sleep(_LOOK_SECONDS)
                try:
                    if await self._engine_is_dead():
                        failure = BackendDeadError(f"{self.url}: the engine has died over POST {path}")
                except BackendUnreachableError as exc:
                    failure = exc
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(look)
            try:
                await self._client.post(path, params, json=json)
                failure = None
            except BackendError as exc:  # raised again below, where no task group wraps it
                failure = exc
            tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _is_sleeping(self) -> bool:
        response = await self._client.ask("/is_sleeping")
        try:
            return msgspec.json.decode(response.content, type=_IsSleeping).is_sleeping
        except msgspec.DecodeError as exc:
            raise BackendError(f"{self.url}: GET /is_sleeping gave no usable answer: {exc}") from None

    async def _engine_is_dead(self) -> bool:
        """Whether `/health` says so, with 503, as long as the process that listens goes on.

        Raises `BackendUnreachableError` if nothing listens any more.
        """
        try:
            await self._client.call("GET", "/health", timeout=self._timeouts.probe)
        except BackendUnreachableError:
            raise
        except BackendError as exc:
            return "answered 503" in str(exc)
        return False

    async def _supported_version(self) -> _Version:
        response = await self._client.ask("/version")
        try:
            text = msgspec.json.decode(response.content, type=_VersionAnswer).version
        except msgspec.DecodeError as exc:
            raise BackendError(f"{self.url}: GET /version gave no usable answer: {exc}") from None
        found = re.match(r"v?(\d+)\.(\d+)", text)
        # A build from source may call itself anything, "dev" for one: such a server is taken to be new.
        version = (int(found[1]), int(found[2])) if found else _STAGED_WAKE
        if _LEAKY[0] <= version < _LEAKY[1]:
            raise BackendUnsupportedError(
                f"{self.url}: vLLM {text} does not free the weights when it sleeps (0.14 to 0.16 do not). "
                "Upgrade it to 0.17 or later."
            )
        return version

    async def _level_from_metrics(self) -> int | None:
        """The level at which the server sleeps, as its gauge `vllm:engine_sleep_state` says, if it has that."""
        try:
            text = (await self._client.call("GET", "/metrics", timeout=self._timeouts.probe)).text
        except BackendError:
            return None  # a hint only: without it the configured level is used
        for level, state in ((1, "weights_offloaded"), (2, "discard_all")):
            if re.search(rf'^vllm:engine_sleep_state\{{[^}}\n]*sleep_state="{state}"[^}}\n]*\}} 1(\.0)?$', text, re.M):
                return level
        return None


def _offers_keep(document: bytes) -> bool:
    """Say whether `/sleep` has the mode `keep` by the server's OpenAPI document. One that cannot be read says nothing."""
    try:
        sleep = msgspec.json.decode(document, type=_OpenApi).paths.get("/sleep")
    except msgspec.DecodeError:
        return True
    parameters = sleep.post.parameters if sleep is not None and sleep.post is not None else []
    return any(parameter.name == "mode" and b'"keep"' in bytes(parameter.schema) for parameter in parameters)
