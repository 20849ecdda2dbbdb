"""Faults on demand, and the engine's death."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
from pathlib import Path

import httpx
import pytest

from llmux_asgi.sim import Fault, SimError, SimProcess, start_sim
from llmux_asgi.sim.faults import FaultPlan
from tests.contract.driver import Driver
from tests.support.eventually import eventually


@pytest.mark.parametrize(
    ("spec", "wrong"),
    [
        ("sleep", "WHAT:NTH:ACTION"),
        ("nap:1:fail", "'nap' is none of"),
        ("sleep:0:fail", "'0' is neither"),
        ("sleep:1:break", "'break' is none of"),
        ("request:1:delay=soon", "'soon' is not a number"),
        ("request:1:200", "'200' is none of"),
    ],
)
def test_a_wrong_fault_is_refused_with_the_reason(spec: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        Fault.parse(spec)
    with pytest.raises(ValueError, match=wrong):
        start_sim("a", faults=[spec])


def test_a_fault_strikes_at_its_call() -> None:
    plan = FaultPlan()
    plan.add(Fault.parse("sleep:2:fail"))
    plan.add(Fault.parse("request:*:503"))
    sleeps = [plan.next("sleep") for _ in range(3)]
    assert [fault is not None for fault in sleeps] == [False, True, False]
    requests = [plan.next("request") for _ in range(2)]
    assert [fault.value if fault else None for fault in requests] == [503, 503]
    plan.clear()
    assert plan.next("request") is None


def test_fail_and_lie_change_nothing() -> None:
    with start_sim("a", faults=["sleep:1:fail", "sleep:2:lie", "wake:1:lie"]) as sim, Driver(sim.url, "a") as vllm:
        assert vllm.sleep().status_code == 500
        assert not vllm.is_sleeping()
        assert vllm.sleep().json()["status"] == "sleeping"
        assert not vllm.is_sleeping()
        vllm.sleep()
        assert vllm.wake().json()["status"] == "awake"
        assert vllm.is_sleeping()
        assert vllm.wake().json()["status"] == "awake"
        assert not vllm.is_sleeping()


def test_leak_sleeps_but_keeps_the_memory(tmp_path: Path) -> None:
    gpu = str(tmp_path / "gpu")
    with start_sim("a", gpu=gpu, faults=["sleep:*:leak"]) as sim, Driver(sim.url, "a") as vllm:
        vllm.sleep()
        assert vllm.is_sleeping()
        assert sim.state().memory_mib == 20480


def test_oom_leaves_the_engine_half_woken() -> None:
    with start_sim("a") as sim, Driver(sim.url, "a") as vllm:
        sim.add_faults("wake:1:oom")
        vllm.sleep()
        assert vllm.wake().status_code == 500
        assert vllm.is_sleeping()
        assert vllm.wake().json()["status"] == "awake"


def test_hang_never_answers_until_the_client_leaves() -> None:
    with start_sim("a", faults=["sleep:1:hang", "request:1:hang"]) as sim, Driver(sim.url, "a") as vllm:
        with pytest.raises(httpx.ReadTimeout):
            vllm.post("/sleep", timeout=0.1)
        with pytest.raises(httpx.ReadTimeout):
            vllm.post("/v1/completions", vllm.payload(3), timeout=0.1)
        assert not vllm.is_sleeping()
        assert vllm.complete()


def test_a_delayed_step_keeps_its_place_and_is_carried_out_though_nobody_waits_for_it() -> None:
    """An engine carries out one control call after the other."""
    with start_sim("a", faults=["sleep:1:delay=0.3", "wake:2:delay=0.3"]) as sim, Driver(sim.url, "a") as vllm:
        with pytest.raises(httpx.ReadTimeout):
            vllm.post("/sleep", timeout=0.1)
        assert vllm.wake().json()["status"] == "awake"
        assert (sim.state().sleeps, vllm.is_sleeping()) == (1, False)
        vllm.sleep()
        with pytest.raises(httpx.ReadTimeout):
            vllm.post("/wake_up", timeout=0.1)
        assert vllm.sleep().status_code == 200
        assert (sim.state().wakes, vllm.is_sleeping()) == (2, True)


@pytest.mark.parametrize("fault", ["sleep:1:die", "wake:1:die", "request:1:die"])
def test_die_ends_the_process_at_once(fault: str) -> None:
    path = {"sleep": "/sleep", "wake": "/wake_up", "request": "/v1/completions"}[fault.partition(":")[0]]
    with start_sim("a", faults=[fault]) as sim, Driver(sim.url, "a") as vllm:
        with pytest.raises(httpx.TransportError):
            vllm.post(path, vllm.payload(3))
        assert sim.wait() == 1


def test_an_engine_that_withers_over_a_call_never_answers_and_its_process_stays() -> None:
    with start_sim("a", tokens_per_second=100, crash_seconds=0.1) as sim:
        sim.add_faults("sleep:1:wither")
        with httpx.Client(base_url=sim.url) as client:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/sleep", timeout=0.05)
            host, port = sim.url.removeprefix("http://").split(":")

            def refuses() -> bool:
                with socket.socket() as probe:
                    return probe.connect_ex((host, int(port))) == errno.ECONNREFUSED

            eventually("nothing listens", refuses)
        os.kill(sim.pid, signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            sim.wait(0.3)
        sim.kill()


def test_a_crashed_engine_is_unhealthy_and_then_gone() -> None:
    with start_sim("a", tokens_per_second=100, crash_seconds=0.3) as sim, Driver(sim.url, "a") as vllm:
        stream = vllm.stream()
        assert stream.wait_for_events(2)
        sim.add_faults("sleep:1:crash")
        assert vllm.sleep().status_code == 500
        assert vllm.get("/health").status_code == 503
        assert stream.end().events[-1]["error"]["code"] == 500
        assert vllm.post("/v1/completions", vllm.payload(3)).status_code == 500
        assert sim.wait() == 1
        with pytest.raises(httpx.ConnectError):
            vllm.get("/health")


def test_break_cuts_the_connection_in_mid_stream() -> None:
    with start_sim("a", faults=["request:1:break=4", "request:2:break"]) as sim, Driver(sim.url, "a") as vllm:
        stream = vllm.stream(max_tokens=50).end()
        assert isinstance(stream.error, httpx.RemoteProtocolError)
        assert len(stream.events) == 4
        assert stream.finish_reason is None
        with pytest.raises(httpx.RemoteProtocolError):
            vllm.post("/v1/completions", vllm.payload(3))
        assert vllm.complete()


def test_stall_sends_some_tokens_and_then_nothing() -> None:
    with start_sim("a", faults=["request:1:stall=2"]) as sim, Driver(sim.url, "a") as vllm:
        stream = vllm.stream(max_tokens=50)
        assert stream.wait_for_events(2)
        stream.wait_until_quiet()
        assert (len(stream.events), stream.finished) == (2, False)


def test_statuses_are_answered_as_asked() -> None:
    with start_sim("a", faults=["health:1:503", "is_sleeping:1:500"]) as sim, Driver(sim.url, "a") as vllm:
        assert [vllm.get("/health").status_code for _ in range(2)] == [503, 200]
        assert vllm.get("/is_sleeping").status_code == 500
        sim.add_faults("request:1:429")
        sim.clear_faults()
        assert vllm.complete()


def test_a_disconnected_client_stops_its_request() -> None:
    with start_sim("a", tokens_per_second=10) as sim, Driver(sim.url, "a") as vllm:
        with pytest.raises(httpx.ReadTimeout):
            vllm.post("/v1/completions", vllm.payload(1000), timeout=0.3)
        eventually("the whole one stopped", lambda: sim.state().in_flight == 0)
        payload = {**vllm.payload(1000), "stream": True}
        with vllm.client.stream("POST", "/v1/completions", json=payload) as response:
            lines = response.iter_lines()  # dropping it would close the response
            assert next(lines).startswith("data: ")
            assert sim.state().in_flight == 1
        eventually("the stream stopped", lambda: sim.state().in_flight == 0)
        state = sim.state()
        assert (state.disconnected, state.requests, state.completed) == (2, 2, 0)


def test_a_server_stops_at_once_with_hanging_requests() -> None:
    with start_sim("a", start_asleep=1) as sim, Driver(sim.url, "a") as vllm:
        stream = vllm.stream()
        eventually("the request waits", lambda: sim.state().waiting == 1)
        sim.stop()
        assert stream.end(timeout=5).finish_reason is None


def test_a_server_that_cannot_start_says_why() -> None:
    with start_sim("a") as sim:
        port = int(sim.url.rpartition(":")[2])
        with pytest.raises(SimError, match=r"status 1: sim-vllm b: .*in use"):
            start_sim("b", port=port)
    assert isinstance(sim, SimProcess)
