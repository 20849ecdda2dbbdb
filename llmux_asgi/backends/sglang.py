"""SGLang's memory saver over HTTP: release and resume, without a question whether a server has released its memory.

Neither call may be repeated: a second one ends the server's process. So the backend writes down what it is about to do
and has done in the one text that a server keeps for others, its weight version, as a mark behind what stands there. Thus
another gateway, or this one after a restart, knows; a new process has no mark, and a server that is awake shows none.
Source: https://github.com/sgl-project/sglang, srt/entrypoints/http_server.py (routes), srt/managers/scheduler*.py
(`release_memory_occupation` asserts that nothing runs, `resume_memory_occupation` removes each tag from a set).
"""

from __future__ import annotations

import enum
from typing import TypeVar

import anyio
import msgspec

from ..config import TimeoutsConfig
from ..exceptions import BackendError, BackendTimeoutError, BackendUnreachableError, BackendUnsupportedError
from ._http import POLL_FIRST, POLL_LONGEST, ControlClient, limit
from ._protocol import BackendState

__all__ = ["SGLangBackend"]

_T = TypeVar("_T")
_MARK = "#llmux:"
_HINT = "Is it an SGLang server of version 0.5.1 or later?"


class _Step(enum.Enum):
    """What the mark tells. The order in which a server goes through them; awake it has no mark."""

    AWAKE = ""
    RELEASING = "releasing"
    ASLEEP = "asleep"
    RESUMING = "resuming"
    RELOADING = "reloading"
    """It holds its memory, and no weights in it."""


class _ServerInfo(msgspec.Struct):
    model_path: str
    enable_memory_saver: bool = False
    enable_weights_cpu_backup: bool = False
    tokenizer_worker_num: int = 1


class _ModelInfo(msgspec.Struct):
    weight_version: str


class SGLangBackend:
    """Controls one SGLang server at `url` (its root, without `/v1`). Sleep levels make no difference.

    The server needs `--enable-memory-saver`. With `--enable-weights-cpu-backup` its weights wait in CPU memory, without it
    they are read from disk again at each wake. Nothing but this backend may release or resume the server's memory.
    """

    def __init__(self, url: str, *, timeouts: TimeoutsConfig | None = None, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._timeouts = timeouts or TimeoutsConfig()
        self._client = ControlClient(self.url, self._timeouts, hint=_HINT, api_key=api_key)
        self._info: _ServerInfo | None = None
        self._half_woken = False
        """This object has left it without its weights."""

    def __str__(self) -> str:
        return self.url

    async def state(self) -> BackendState:
        """Read the mark, and on first contact how the server was started. Raises `BackendError` if a step was cut short."""
        try:
            await self._server_info()
            step, _ = await self._step()
        except BackendUnreachableError:
            # Whatever comes back on this address is another process.
            self._info = None
            self._half_woken = False
            return BackendState.UNREACHABLE
        if step is _Step.ASLEEP or (step is _Step.RELOADING and self._half_woken):
            return BackendState.ASLEEP
        if step is not _Step.AWAKE:
            raise self._unclear(step)
        return BackendState.AWAKE

    async def sleep(self, level: int) -> None:
        """Abort what runs, wait until the server is idle, and release its memory. Done already, it is not done again."""
        await self._server_info()
        with limit(self._timeouts.sleep, f"{self.url}: releasing the memory"):
            step, version = await self._step()
            if step is _Step.ASLEEP:
                return
            if step not in (_Step.AWAKE, _Step.RELOADING):
                raise self._unclear(step)
            await self._become_idle()
            await self._mark(version, _Step.RELEASING)
            try:
                await self._client.post("/release_memory_occupation", json={})
            except BackendUnsupportedError:  # 404: nothing was done
                await self._mark(version, step)
                raise
            await self._mark(version, _Step.ASLEEP)
        self._half_woken = False

    async def wake(self) -> None:
        """Resume the memory, and read the weights from disk if the server has kept no copy of them."""
        info = await self._server_info()
        with limit(self._timeouts.wake, f"{self.url}: resuming the memory"):
            step, version = await self._step()
            if step is _Step.ASLEEP:
                await self._mark(version, _Step.RESUMING)
                await self._client.post("/resume_memory_occupation", json={})
                self._half_woken = True
                step = _Step.RELOADING
                if not info.enable_weights_cpu_backup:
                    await self._mark(version, step)
            elif step not in (_Step.AWAKE, _Step.RELOADING):
                raise self._unclear(step)
            if step is _Step.RELOADING:
                if not info.enable_weights_cpu_backup:
                    await self._client.post("/update_weights_from_disk", json={"model_path": info.model_path})
                await self._mark(version, _Step.AWAKE)
        self._half_woken = False

    async def ready(self) -> None:
        """Poll `/health` until it answers 200."""
        last: BackendError | None = None
        pause = POLL_FIRST
        with anyio.move_on_after(self._timeouts.wake):
            while True:
                try:
                    await self._client.ask("/health")
                except (BackendUnreachableError, BackendUnsupportedError):
                    raise
                except BackendError as exc:
                    last = exc
                else:
                    return
                await anyio.sleep(pause)
                pause = min(2 * pause, POLL_LONGEST)
        raise BackendTimeoutError(f"{self.url}: the woken model was not healthy within {self._timeouts.wake:.3g} s: {last}")

    def retune(self, timeouts: TimeoutsConfig, *, freezes: bool) -> None:
        """Go by other time limits from the next call on."""
        self._timeouts = timeouts
        self._client.retune(timeouts)

    async def aclose(self) -> None:
        """Close the HTTP client; the next call opens a new one."""
        await self._client.aclose()

    def _unclear(self, step: _Step) -> BackendError:
        return BackendError(
            f"{self.url}: the server was left in the middle of {step.value}, and SGLang cannot tell whether it holds its "
            "memory. Restart it."
        )

    async def _become_idle(self) -> None:
        """Abort all requests until the server flushes its cache, which it does only when nothing runs or waits."""
        pause = POLL_FIRST
        while True:
            await self._client.post("/abort_request", json={"rid": "", "abort_all": True})
            try:
                await self._client.post("/flush_cache")
            except (BackendUnreachableError, BackendUnsupportedError):
                raise
            except BackendError as exc:
                if exc.__cause__ is not None:  # not an answer
                    raise
            else:
                return
            await anyio.sleep(pause)
            pause = min(2 * pause, POLL_LONGEST)

    async def _server_info(self) -> _ServerInfo:
        if self._info is None:
            info = await self._ask(_ServerInfo, "/server_info", "/get_server_info")
            if not info.enable_memory_saver:
                raise BackendUnsupportedError(f"{self.url}: it cannot sleep. Start SGLang with --enable-memory-saver.")
            if info.tokenizer_worker_num > 1:
                raise BackendUnsupportedError(
                    f"{self.url}: it has {info.tokenizer_worker_num} front ends, and what is written down in one of them is "
                    "not seen by the others. Start SGLang with --tokenizer-worker-num 1."
                )
            self._info = info
        return self._info

    async def _step(self) -> tuple[_Step, str]:
        """Return what the mark tells, and the weight version without it."""
        version, _, mark = (await self._ask(_ModelInfo, "/model_info", "/get_model_info")).weight_version.partition(_MARK)
        try:
            return _Step(mark), version
        except ValueError:
            raise BackendError(f"{self.url}: the weight version ends with {_MARK + mark!r}: not a mark known here") from None

    async def _mark(self, version: str, step: _Step) -> None:
        text = version + (_MARK + step.value if step.value else "")
        await self._client.post("/update_weight_version", json={"new_version": text, "abort_all_requests": False})
        if (await self._step())[0] is not step:
            raise BackendUnsupportedError(f"{self.url}: it does not keep the weight version that it is given. {_HINT}")

    async def _ask(self, kind: type[_T], path: str, older: str) -> _T:
        try:
            response = await self._client.ask(path)
        except BackendUnsupportedError:
            path = older
            response = await self._client.ask(path)
        try:
            return msgspec.json.decode(response.content, type=kind)
        except msgspec.DecodeError as exc:
            raise BackendError(f"{self.url}: GET {path} gave no usable answer: {exc}. {_HINT}") from None
