"""The memory check, with a gauge that the test turns."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import anyio
import pytest

from llmux_asgi import BackendError, ConfigError, LLMuxApp
from llmux_asgi._memory import MemoryCheck, NvmlGauge

pytestmark = pytest.mark.anyio


class Gauge:
    def __init__(self) -> None:
        self.readings = [0]

    def used_mib(self) -> int:
        return self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]


def checked(before: int, awake: int) -> tuple[MemoryCheck, Gauge]:
    gauge = Gauge()
    check = MemoryCheck(gauge, settle=0.05)
    gauge.readings = [before, awake]
    check.before_wake()
    check.after_wake("m")
    return check, gauge


async def test_half_of_what_the_wake_took_has_to_be_free_again() -> None:
    check, gauge = checked(1000, 21000)
    gauge.readings = [11000]
    await check.confirm_freed("m")
    gauge.readings = [11001]
    with pytest.raises(BackendError, match=r"the GPU still has 11001 MiB in use, where at most 11000 were expected"):
        await check.confirm_freed("m")


async def test_the_driver_may_take_its_time() -> None:
    check, gauge = checked(0, 20000)
    gauge.readings = [20000, 20000, 20000, 500]
    with anyio.fail_after(5):
        await check.confirm_freed("m")


async def test_what_was_not_seen_waking_or_took_nothing_is_not_checked() -> None:
    check, gauge = checked(5000, 5000)
    gauge.readings = [90000]
    await check.confirm_freed("m")
    await check.confirm_freed("another")


async def test_without_a_driver_the_error_says_where() -> None:
    config = {"models": {"a": {"url": "http://127.0.0.1:1"}}, "memory": {"check": "nvml", "device": 3}}
    with pytest.raises(ConfigError, match=r"^\$\.memory\.device: the GPU 3 cannot be read: NVML Shared Library Not Found"):
        LLMuxApp(config)


async def test_nvml_is_read_in_mib_and_its_errors_are_the_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    # There is no NVIDIA driver where these tests run: the module that speaks to it is replaced.
    class NVMLError(Exception):
        pass

    used = [7 << 30]

    def info(handle: int) -> SimpleNamespace:
        assert handle == 12
        if not used:
            raise NVMLError("GPU is lost")
        return SimpleNamespace(used=used.pop())

    fake = ModuleType("pynvml")
    fake.__dict__.update(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda i: 10 + i, nvmlDeviceGetMemoryInfo=info
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    gauge = NvmlGauge(2)
    assert gauge.used_mib() == 7168
    with pytest.raises(BackendError, match="the GPU's memory cannot be read: GPU is lost"):
        gauge.used_mib()


async def test_without_the_extra_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ConfigError, match=r"pip install 'llmux-asgi\[nvml\]'"):
        NvmlGauge()
