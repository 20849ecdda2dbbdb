"""The memory check: a model that says that it sleeps has to have given its GPU memory back, or nothing else is woken."""

from __future__ import annotations

from typing import Any, Protocol

import anyio

from .exceptions import BackendError, ConfigError

__all__ = ["MemoryCheck", "MemoryGauge", "NvmlGauge"]

_SHARE = 0.5
"""Of what its wake took, a sleeping model has to give back this share: the rest is what others on the GPU may have taken."""
_POLL_FIRST, _POLL_LONGEST = 0.002, 0.1


class MemoryGauge(Protocol):
    """Reads one GPU. `llmux_asgi.sim.GpuLedger` is one too."""

    def used_mib(self) -> int:
        """Memory in use on the GPU in MiB, whoever uses it."""
        ...


class NvmlGauge:
    """Reads an NVIDIA GPU, by its index. Needs the extra `nvml`; raises `ConfigError` if it cannot be read.

    Source: https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html
    """

    def __init__(self, device: int = 0) -> None:
        try:
            import pynvml
        except ImportError:
            raise ConfigError("$.memory.check: nvml needs the extra nvml: pip install 'llmux-asgi[nvml]'") from None
        self._nvml: Any = pynvml
        try:
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByIndex(device)
        except self._nvml.NVMLError as exc:
            raise ConfigError(f"$.memory.device: the GPU {device} cannot be read: {exc}") from exc

    def used_mib(self) -> int:
        """Memory in use in MiB. Raises `BackendError` if the driver does not tell."""
        try:
            return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used) >> 20
        except self._nvml.NVMLError as exc:
            raise BackendError(f"the GPU's memory cannot be read: {exc}") from exc


class MemoryCheck:
    """Learns from each wake what a model takes, and confirms after each sleep that it has given it back.

    `settle` is the time in seconds that the driver may take for that: it gives the memory of a killed process back late.
    """

    def __init__(self, gauge: MemoryGauge, settle: float) -> None:
        self._gauge = gauge
        self._settle = settle
        self._before = 0
        self._most: dict[str, float] = {}

    def before_wake(self) -> None:
        """Everything is out of memory, and a model is about to be woken."""
        self._before = self._gauge.used_mib()

    def after_wake(self, model: str) -> None:
        """`model`, for which `before_wake` was called, is awake."""
        if (footprint := self._gauge.used_mib() - self._before) > 0:
            self._most[model] = self._before + (1 - _SHARE) * footprint

    def forget(self, model: str) -> None:
        """Know nothing of `model` any more: it has another server, or is gone."""
        self._most.pop(model, None)

    async def confirm_freed(self, model: str) -> None:
        """Return once the memory of `model` is free. Raises `BackendError` if it is not in `settle` seconds.

        A model that was not seen waking is not checked: what it takes is not known.
        """
        most = self._most.get(model)
        if most is None:
            return
        pause = _POLL_FIRST
        with anyio.move_on_after(self._settle):
            while self._gauge.used_mib() > most:
                await anyio.sleep(pause)
                pause = min(2 * pause, _POLL_LONGEST)
            return
        raise BackendError(
            f"the model {model!r} is said to be out of memory, and the GPU still has {self._gauge.used_mib()} MiB in use, "
            f"where at most {most:.0f} were expected"
        )
