"""The memory that simulated servers share: who fits, who does not, and what the ledger remembers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from llmux_asgi.sim import GpuLedger, GpuOutOfMemoryError, SimError, SimOptions, start_sim, start_sims
from tests.contract.driver import Driver


@pytest.fixture
def gpu(tmp_path: Path) -> str:
    return str(tmp_path / "gpu.json")


def test_what_does_not_fit_is_refused_and_takes_nothing(gpu: str) -> None:
    ledger = GpuLedger(gpu, total_mib=100, model="a")
    ledger.allocate("weights", 60)
    with pytest.raises(GpuOutOfMemoryError, match=r"allocate 50 MiB for kv_cache.*40 MiB is free"):
        ledger.allocate("kv_cache", 50)
    assert ledger.used_mib() == 60
    ledger.allocate("weights", 60)  # held already
    ledger.release("weights")
    assert ledger.used_mib() == 0


def test_the_memory_of_a_dead_process_is_free(gpu: str) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        GpuLedger(gpu, total_mib=100, model="a", pid=process.pid).allocate("weights", 100)
        ledger = GpuLedger(gpu, total_mib=100, model="b")
        assert ledger.awake() == ("a",)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
        assert ledger.used_mib() == 0
        ledger.allocate("weights", 100)


def test_two_models_take_turns(gpu: str) -> None:
    a, b = SimOptions(name="a", gpu=gpu), SimOptions(name="b", gpu=gpu, start_asleep=1)
    with start_sims(a, b) as (first, second), Driver(first.url, "a") as one, Driver(second.url, "b") as two:
        ledger = GpuLedger(gpu)
        assert (ledger.awake(), ledger.used_mib()) == (("a",), 20480)
        one.sleep()
        assert (ledger.awake(), ledger.used_mib()) == ((), 0)
        two.wake()
        assert ledger.awake() == ("b",)
        assert ledger.max_awake() == 1
        story = [(event.model, event.event) for event in ledger.events() if event.event not in ("start", "exit")]
        assert story == [("a", "sleep_begin"), ("a", "sleep_end"), ("b", "wake_begin"), ("b", "wake_end")]
        assert first.state().memory_mib == 0
        assert second.state().memory_mib == 20480
    assert ledger.used_mib() == 0
    assert [event.event for event in ledger.events()][-2:] == ["exit", "exit"]


def test_a_server_without_room_does_not_start(gpu: str) -> None:
    with start_sim("a", gpu=gpu), pytest.raises(SimError, match=r"simulated server b: ended with status 1: .*out of mem"):
        start_sim("b", gpu=gpu)


def test_a_wake_without_room_leaves_the_engine_half_woken_until_it_is_retried(gpu: str) -> None:
    # Weights fit beside the other model, the KV cache does not.
    a = SimOptions(name="a", gpu=gpu, gpu_memory_mib=100, model_memory_mib=40, kv_memory_mib=20)
    b = msgspec.structs.replace(a, name="b", start_asleep=1)
    with start_sims(a, b) as (first, second), Driver(first.url, "a") as one, Driver(second.url, "b") as two:
        ledger = GpuLedger(gpu)
        failed = two.wake()
        assert failed.status_code == 500
        assert "out of memory" in failed.json()["error"]["message"]
        assert two.client.get("/is_sleeping").json() == {"is_sleeping": True}
        assert ledger.used_mib() == 100
        assert ledger.max_awake() == 2  # the history shows the overlap
        assert two.sleep().status_code == 200
        assert ledger.used_mib(second.pid) == 40, "sleeping frees nothing now"
        one.sleep()
        assert two.wake().json()["status"] == "awake"
        assert ledger.awake() == ("b",)
        assert two.complete()


def test_without_sleep_mode_sleeping_frees_nothing(gpu: str) -> None:
    with start_sim("a", gpu=gpu, sleep_mode=False) as sim, Driver(sim.url, "a") as vllm:
        assert vllm.sleep().json() == {"status": "sleeping", "level": 1}
        assert vllm.is_sleeping()
        assert sim.state().memory_mib == 20480


def test_a_process_keeps_its_context_while_asleep(gpu: str) -> None:
    with start_sim("a", gpu=gpu, context_memory_mib=500, start_asleep=1) as sim:
        assert sim.state().memory_mib == 500
        assert GpuLedger(gpu).awake() == ()


def test_a_request_that_reaches_a_sleeper_is_recorded(gpu: str) -> None:
    with start_sim("a", gpu=gpu) as sim, Driver(sim.url, "a") as vllm:
        vllm.complete()
        assert sim.state().requests_while_asleep == 0
        vllm.sleep()
        stream = vllm.stream(max_tokens=3)
        assert not stream.wait_for_events(1, timeout=0.1)
        vllm.wake()
        stream.end()
        assert sim.state().requests_while_asleep == 1
        assert [e.event for e in GpuLedger(gpu).events()].count("request_while_asleep") == 1
