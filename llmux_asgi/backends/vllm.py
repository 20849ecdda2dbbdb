"""vLLM's sleep mode over HTTP, for the versions that free memory when they say so (0.17 and later, and before 0.14).

The control routes exist when the server runs with `VLLM_SERVER_DEV_MODE=1`. What is decided here rests on `/is_sleeping`;
the bodies of the other answers differ between versions and are not read.
Source: https://docs.vllm.ai/en/latest/features/sleep_mode/ and the behaviour of vLLM 0.32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import anyio
import httpx
import msgspec

from ..config import TimeoutsConfig
from ..exceptions import BackendError, BackendTimeoutError, BackendUnreachableError, BackendUnsupportedError
from ._protocol import BackendState

__all__ = ["VLLMBackend"]

_Version: TypeAlias = tuple[int, int]

_LEAKY = ((0, 14), (0, 17))
"""Versions from the first up to, not including, the second do not free the weights when they sleep."""
_STAGED_WAKE: _Version = (0, 24)
"""The first version that does not resume scheduling when only a part of the memory is awake."""
_POLL_FIRST, _POLL_LONGEST = 0.001, 0.1
"""Seconds between two questions whether the server is done: doubling from the first to the longest."""


class _IsSleeping(msgspec.Struct):
    is_sleeping: bool


class _VersionAnswer(msgspec.Struct):
    version: str


class VLLMBackend:
    """Controls one vLLM server at `url` (its root, without `/v1`).

    `sleep_level` is the level that a sleeper is taken to be at which this object did not put to sleep, unless the server's
    metrics say 2: waking from 2 reloads the weights, which is right for either level and costs time for level 1.
    """

    def __init__(self, url: str, *, sleep_level: int = 1, timeouts: TimeoutsConfig | None = None) -> None:
        self.url = url.rstrip("/")
        self._default_level = sleep_level
        self._timeouts = timeouts or TimeoutsConfig()
        self._client: httpx.AsyncClient | None = None
        self._version: _Version | None = None
        self._level: int | None = None
        self._half_woken = False

    def __str__(self) -> str:
        return self.url

    async def state(self) -> BackendState:
        """Ask `/is_sleeping`, and on first contact the version."""
        try:
            if self._version is None:
                self._version = await self._supported_version()
            return BackendState.ASLEEP if await self._is_sleeping() else BackendState.AWAKE
        except BackendUnreachableError:
            # Whatever comes back on this address is another process.
            self._version = self._level = None
            self._half_woken = False
            return BackendState.UNREACHABLE

    async def sleep(self, level: int) -> None:
        """Send `/sleep` and confirm it. Requests still running are aborted by the server."""
        if self._half_woken:
            # vLLM takes such a server for a sleeper: its /sleep would answer 200 and free nothing. Awake as a whole, it frees
            # everything. It stays without its weights if those had been discarded: the next wake has to reload them.
            level = max(level, self._level or level)
            with _limit(self._timeouts.wake, f"{self.url}: waking what an earlier wake has left half-woken"):
                await self._post("/wake_up")
        with _limit(self._timeouts.sleep, f"{self.url}: putting the model to sleep"):
            # mode=wait would let a call that timed out here put the engine to sleep after a later wake.
            await self._post("/sleep", {"level": str(level), "mode": "abort"})
            if not await self._is_sleeping():
                raise BackendUnsupportedError(
                    f"{self.url}: POST /sleep answered 200 but the server is still awake. Start vLLM with --enable-sleep-mode."
                )
        self._level, self._half_woken = level, False

    async def wake(self) -> None:
        """Wake the server: at once from level 1; from level 2 weights, reload, KV cache and prefix cache in turn."""
        with _limit(self._timeouts.wake, f"{self.url}: waking the model"):
            # Not put to sleep by this object: reload if there is any reason to. The metric alone is not enough, because a
            # second /sleep that has no effect changes it all the same (seen on 0.32).
            self._level = self._level or max(await self._level_from_metrics() or 1, self._default_level)
            self._half_woken = True
            if self._level < 2:
                await self._post("/wake_up")
            else:
                await self._wake_from_level_2()

    async def ready(self) -> None:
        """Poll `/is_sleeping` until it is false: normally the first answer."""
        with _limit(self._timeouts.wake, f"{self.url}: waiting for the woken model"):
            pause = _POLL_FIRST
            while await self._is_sleeping():
                await anyio.sleep(pause)
                pause = min(2 * pause, _POLL_LONGEST)
        self._level, self._half_woken = None, False

    async def aclose(self) -> None:
        """Close the HTTP client; the next call opens a new one."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _wake_from_level_2(self) -> None:
        staged = self._version is None or self._version >= _STAGED_WAKE
        await self._post("/wake_up", {"tags": "weights"} if staged else {})
        # Without this the model answers, in garbage.
        await self._post("/collective_rpc", json={"method": "reload_weights"})
        if staged:
            await self._post("/wake_up", {"tags": "kv_cache"})
        await self._post("/reset_prefix_cache")

    async def _is_sleeping(self) -> bool:
        response = await self._ask("/is_sleeping")
        try:
            return msgspec.json.decode(response.content, type=_IsSleeping).is_sleeping
        except msgspec.DecodeError as exc:
            raise BackendError(f"{self.url}: GET /is_sleeping gave no usable answer: {exc}") from None

    async def _supported_version(self) -> _Version:
        response = await self._ask("/version")
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
            text = (await self._call("GET", "/metrics", timeout=self._timeouts.probe)).text
        except BackendError:
            return None  # a hint only: without it the configured level is used
        for level, state in ((1, "weights_offloaded"), (2, "discard_all")):
            if re.search(rf'^vllm:engine_sleep_state\{{[^}}\n]*sleep_state="{state}"[^}}\n]*\}} 1(\.0)?$', text, re.M):
                return level
        return None

    async def _ask(self, path: str) -> httpx.Response:
        """Send a probe, and once more if its connection breaks: a process that is ending may accept one to the last."""
        try:
            return await self._call("GET", path, timeout=self._timeouts.probe)
        except BackendUnreachableError:
            raise
        except BackendError as exc:
            if not isinstance(exc.__cause__, (httpx.NetworkError, httpx.RemoteProtocolError)):
                raise
        await anyio.sleep(_POLL_LONGEST)
        return await self._call("GET", path, timeout=self._timeouts.probe)

    async def _post(self, path: str, params: dict[str, str] | None = None, *, json: object = None) -> None:
        # The step's own limit, set by the caller, is the one that counts.
        await self._call("POST", path, params=params, json=json, timeout=None)

    async def _call(
        self,
        method: str,
        path: str,
        *,
        timeout: float | None,
        params: dict[str, str] | None = None,
        json: object = None,
    ) -> httpx.Response:
        if self._client is None:
            # No connection is kept: switches are rarer than a server's keep-alive timeout, and a stale one would fail the
            # switch. trust_env is off so that a proxy of the environment never sees control calls.
            # To load the certificates takes 20 ms in which the event loop stands still: only where there is need to.
            limits = httpx.Limits(max_keepalive_connections=0)
            self._client = httpx.AsyncClient(trust_env=False, limits=limits, verify=self.url.startswith("https:"))
        timeouts = httpx.Timeout(None, connect=self._timeouts.connect)
        call = f"{method} {path}"
        try:
            with anyio.fail_after(timeout):
                response = await self._client.request(
                    method, self.url + path, params=params or None, json=json, timeout=timeouts
                )
        except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
            if isinstance(exc, httpx.ConnectTimeout) or not _refused(exc):
                raise BackendTimeoutError(f"{self.url}: no connection for {call}: {exc or 'timed out'}") from exc
            raise BackendUnreachableError(f"{self.url}: nothing listens there ({call}). Is the server running?") from exc
        except TimeoutError as exc:
            raise BackendTimeoutError(f"{self.url}: {call} was not answered in {timeout:.3g} s") from exc
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise BackendError(f"{self.url}: {call} failed: {exc or type(exc).__name__}") from exc
        if response.status_code == 404:
            raise BackendUnsupportedError(
                f"{self.url}: {call} answered 404. Start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment "
                "and with --enable-sleep-mode."
            )
        if not response.is_success:
            detail = " ".join(response.text.split())[:200]
            raise BackendError(f"{self.url}: {call} answered {response.status_code}: {detail}")
        return response


@contextmanager
def _limit(seconds: float, what: str) -> Iterator[None]:
    try:
        with anyio.fail_after(seconds):
            yield
    except TimeoutError:
        raise BackendTimeoutError(f"{what} took longer than {seconds:.3g} s") from None


def _refused(exc: BaseException) -> bool:
    """Say whether a failed connection was refused, which proves that no process listens, at every address tried."""
    if isinstance(exc, BaseExceptionGroup):
        return all(_refused(each) for each in exc.exceptions)
    if isinstance(exc, OSError) and exc.errno is not None:
        return isinstance(exc, ConnectionRefusedError)
    cause = exc.__cause__ or exc.__context__
    return cause is not None and _refused(cause)
