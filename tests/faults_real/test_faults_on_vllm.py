"""What breaks in practice, done to real vLLM servers: by `kill`, by control calls of strangers, by a wrong configuration.

Some tests of this file use up the server that they are given; each asserts that the next request of every model is answered
whole. What the simulated servers do in the same cases is to agree with what is seen here.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from llmux_asgi import Phase
from tests.contract.driver import Call
from tests.faults_real.conftest import (
    PATIENCE,
    Client,
    OwnServer,
    Stage,
    at_a_port,
    config_of,
    own_model,
    process_of,
    stage,
)
from tests.real.fixtures import RealServers
from tests.real.server import leader_on
from tests.support.eventually import eventually
from tests.support.gateway_process import GatewayProcess, gateway_process

pytestmark = pytest.mark.vllm

Expected = dict[str, tuple[str, str]]


@pytest.fixture(scope="module")
def gateway(real_servers: RealServers, expected: Expected) -> Iterator[Stage]:
    """One gateway for all faults that it survives, and that is all of them."""
    with stage(real_servers, expected, {**own_model(real_servers), "retry": True}) as running:
        yield running
    for server in real_servers:  # as the other tests of the session expect them
        server.call("POST", "/wake_up")


@pytest.fixture(scope="module")
def without_development_mode(real_servers: RealServers, expected: Expected) -> Iterator[tuple[Stage, Call]]:
    """A gateway whose only model lacks what it needs, and the request that has started it."""
    own = own_model(real_servers, env={"VLLM_SERVER_DEV_MODE": "0"})
    with stage((), expected, own) as gateway:
        yield gateway, gateway.asking("own")


@pytest.fixture(scope="module")
def to_be_stopped(real_servers: RealServers, expected: Expected) -> Iterator[tuple[GatewayProcess, Client, OwnServer]]:
    """A gateway as a process, and the server that it has begun to start."""
    own = at_a_port(own_model(real_servers))
    with gateway_process(config_of((), {"own": own}, shutdown=60)) as gateway, Client(gateway.url, expected) as client:
        client.asking("own")
        yield gateway, client, started_at(own["url"])


def started_at(url: str) -> OwnServer:
    """The server that is to listen there, as soon as it has a process."""
    eventually("the process is started", lambda: leader_on(int(url.rpartition(":")[2])) is not None)
    return OwnServer.on(url)


@pytest.fixture
def own(gateway: Stage) -> OwnServer:
    """The server that the gateway has started, awake and active."""
    gateway.answers_whole("own")
    server = gateway.own
    server.calm()
    return server


def all_is_well(gateway: Stage, old: OwnServer) -> None:
    """All models answer; `own` in a new process, and nothing is left of the old one."""
    gateway.answers_whole("beta", "own", "alpha")
    assert gateway.own.leader != old.leader
    assert old.members() == []


def is_asleep(url: str) -> bool:
    return bool(httpx.get(url + "/is_sleeping", timeout=10).json()["is_sleeping"])


# Three servers start side by side for the first three tests, which takes less time than one after the other.


@pytest.mark.usefixtures("without_development_mode", "to_be_stopped")
def test_the_first_request_starts_the_process_in_development_mode(gateway: Stage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llmux_asgi")
    gateway.answers_whole("own")
    assert "started the process of the model 'own'" in caplog.text
    lines = [record for record in caplog.records if record.name == "llmux_asgi.vllm"]
    assert any("Application startup complete" in record.getMessage() for record in lines)
    assert {record.__dict__["llmux_model"] for record in lines} == {"own"}
    first = gateway.own
    assert b"\0VLLM_SERVER_DEV_MODE=1\0" in Path(f"/proc/{first.leader}/environ").read_bytes()
    gateway.answers_whole("beta", "own", "alpha", "own")
    assert gateway.own == first  # it slept and woke, it was not started again


def test_development_mode_switched_off_is_told_and_the_process_ended(without_development_mode: tuple[Stage, Call]) -> None:
    gateway, asked = without_development_mode
    response = asked.response(PATIENCE)
    assert response.status_code == 503
    for part in ("GET /is_sleeping answered 404", "VLLM_SERVER_DEV_MODE=1"):
        assert part in response.json()["error"]["message"]
    assert leader_on(int(gateway.own_url.rpartition(":")[2])) is None


def test_a_gateway_that_is_told_to_stop_lets_its_streams_end_and_ends_its_processes(
    to_be_stopped: tuple[GatewayProcess, Client, OwnServer],
) -> None:
    gateway, client, own = to_be_stopped
    client.answers_whole("own")
    own.calm()
    stream = client.stream("own", tokens=120)  # the tests' host gives its connections 3 s
    gateway.kill(signal.SIGTERM)
    stream.end()
    assert stream.finish_reason == "length"
    assert stream.closed_with_done
    assert gateway.wait() == 0
    assert own.members() == []
    assert "the process of the model 'own' is gone" in gateway.log


# Strangers


def test_a_model_that_a_stranger_puts_to_sleep_is_woken_for_the_next_request(
    gateway: Stage, own: OwnServer, caplog: pytest.LogCaptureFixture
) -> None:
    httpx.post(gateway.own_url + "/sleep", params={"level": 1}, timeout=60).raise_for_status()
    eventually("the watch notices", lambda: gateway.llm.switcher.statistics().active_model is None)
    assert "the server of the active model 'own' is not awake any more" in caplog.text
    gateway.answers_whole("own", "beta", "own")
    assert gateway.own == own


def test_a_stranger_whose_sleep_waits_for_the_running_stream_cuts_it_off_aloud(gateway: Stage, own: OwnServer) -> None:
    stream = gateway.stream("own")
    stranger = Call(lambda: httpx.post(gateway.own_url + "/sleep", params={"mode": "wait"}, timeout=60))
    stream.end()
    assert stream.error is None
    if "error" in stream.events[-1]:
        assert stream.events[-1]["error"]["code"] == "request_interrupted"
    else:
        assert stream.finish_reason == "length"
        assert stream.closed_with_done
    gateway.answers_whole("own")
    assert stranger.response().status_code == 200
    gateway.answers_whole("own", "beta", "own")
    assert gateway.own == own


def test_a_model_that_a_stranger_wakes_is_put_to_sleep_at_the_next_switch(gateway: Stage, own: OwnServer) -> None:
    gateway.answers_whole("beta")
    assert is_asleep(gateway.own_url)
    httpx.post(gateway.own_url + "/wake_up", timeout=60).raise_for_status()
    assert not is_asleep(gateway.own_url)
    gateway.answers_whole("alpha")
    assert is_asleep(gateway.own_url)
    gateway.answers_whole("own", "beta")
    assert gateway.own == own


# The end of a process. Each of these costs a start.


def test_an_engine_killed_in_mid_stream_ends_the_stream_with_an_error(gateway: Stage, own: OwnServer) -> None:
    stream = gateway.stream("own")
    os.kill(own.engine, signal.SIGKILL)
    stream.end()
    assert stream.error is None
    assert stream.finish_reason is None
    assert "error" in stream.events[-1]
    gateway.answers_whole("beta")
    assert gateway.state_of("own") == "stopped"
    assert own.members() == []
    all_is_well(gateway, own)


def test_a_killed_api_server_ends_the_stream_with_an_error_and_takes_its_engine_along(gateway: Stage, own: OwnServer) -> None:
    stream = gateway.stream("own")
    os.kill(own.leader, signal.SIGKILL)
    stream.end()
    assert stream.error is None
    assert stream.finish_reason is None
    assert stream.events[-1]["error"]["code"] == "upstream_error"
    all_is_well(gateway, own)


def test_an_engine_killed_while_it_is_idle_costs_the_next_request_a_start(gateway: Stage, own: OwnServer) -> None:
    os.kill(own.engine, signal.SIGKILL)
    gateway.answers_whole("own")  # it is sent once more: `retry`
    all_is_well(gateway, own)


def test_an_engine_killed_in_its_sleep_is_started_again_in_place_of_woken(gateway: Stage, own: OwnServer) -> None:
    gateway.answers_whole("beta")
    os.kill(own.engine, signal.SIGKILL)
    gateway.answers_whole("own")
    all_is_well(gateway, own)


def test_an_engine_killed_while_it_wakes_is_started_again(gateway: Stage, own: OwnServer) -> None:
    gateway.answers_whole("beta")
    os.kill(own.worker, signal.SIGSTOP)  # the engine answers, and waits for it to wake up
    asked = gateway.asking("own")
    eventually("the wake is sent", lambda: gateway.llm.switcher.statistics().phase is Phase.WAKE)
    os.kill(own.engine, signal.SIGKILL)
    assert asked.response(PATIENCE).status_code == 200
    all_is_well(gateway, own)


def test_an_engine_that_hangs_is_ended_when_another_model_is_wanted(
    gateway: Stage, own: OwnServer, caplog: pytest.LogCaptureFixture
) -> None:
    os.kill(own.engine, signal.SIGSTOP)
    gateway.answers_whole("beta")
    assert "ending the process of the model 'own'" in caplog.text
    assert own.members() == []
    all_is_well(gateway, own)


def test_a_server_that_its_supervisor_restarts_is_served_again(gateway: Stage, real_servers: RealServers) -> None:
    alpha = real_servers.alpha
    gateway.answers_whole("alpha")
    alpha.stop()
    try:
        assert gateway.ask("alpha").status_code in (502, 503)  # whether the watch has seen it by then
        gateway.answers_whole("beta")
        gateway.fails("alpha", 503, "nothing listens there")
        gateway.answers_whole("beta")
    finally:
        alpha.start()
        alpha.wait_ready()
    eventually("alpha answers", lambda: gateway.ask("alpha").status_code == 200)
    gateway.answers_whole("alpha", "beta", "alpha")


# Starts that fail


def test_a_model_that_does_not_exist_is_told_in_vllms_own_words_in_the_log(
    real_servers: RealServers, expected: Expected, caplog: pytest.LogCaptureFixture
) -> None:
    own = own_model(real_servers)
    own["command"] = ["/no/such/model" if part == str(real_servers.alpha.model) else part for part in own["command"]]
    with stage(real_servers, expected, own) as gateway:
        gateway.fails("own", 503, "ended before it was ready: exit status 1", "in the gateway's log")
        assert "/no/such/model" in caplog.text
        nothing_is_left(gateway)


def test_a_start_that_takes_too_long_is_given_up(real_servers: RealServers, expected: Expected) -> None:
    with stage(real_servers, expected, own_model(real_servers, start=2)) as gateway:
        gateway.fails("own", 503, "was not ready in 2 s")
        nothing_is_left(gateway)


def test_a_port_that_is_taken_is_told(real_servers: RealServers, expected: Expected) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        own = {**own_model(real_servers), "url": f"http://127.0.0.1:{stranger.getsockname()[1]}"}
        with stage(real_servers, expected, own) as gateway:
            gateway.fails("own", 503, "another one listens there")
            nothing_is_left(gateway)


def nothing_is_left(gateway: Stage) -> None:
    """No process of `own` runs, and the other models are served."""
    port = int(gateway.own_url.rpartition(":")[2])
    assert leader_on(port) is None
    gateway.answers_whole("beta", "alpha")


# The end of a gateway


@pytest.mark.parametrize(("phase", "hung"), [("sleep", "alpha"), ("wake", "beta")])
def test_a_gateway_killed_in_a_switch_serves_again_after_its_restart(
    real_servers: RealServers, expected: Expected, phase: str, hung: str
) -> None:
    config = config_of(real_servers, {})
    worker = next(process_of(server.pid, "Worker") for server in real_servers if server.name == hung)
    try:
        with gateway_process(config) as first, Client(first.url, expected) as client:
            client.answers_whole("beta", "alpha")
            os.kill(worker, signal.SIGSTOP)  # which makes the phase as long as it needs to be
            asked = client.asking("beta")
            eventually("the switch has come so far", lambda: first.statistics()["phase"] == phase)
            first.kill()
            first.wait()
            with pytest.raises(httpx.HTTPError):
                asked.response()
    finally:
        os.kill(worker, signal.SIGCONT)
    with gateway_process(config) as second, Client(second.url, expected) as client:
        client.answers_whole("beta", "alpha", "beta")
        assert second.statistics()["failures"] == 0


def test_a_gateway_that_is_killed_leaves_no_process_behind(real_servers: RealServers, expected: Expected) -> None:
    config = config_of(real_servers, {"own": at_a_port(own_model(real_servers))})
    with gateway_process(config) as gateway, Client(gateway.url, expected) as client:
        asked = client.asking("own")
        own = started_at(config["models"]["own"]["url"])
        eventually("it has started its engine", lambda: "EngineCore" in str(own.members()), PATIENCE)
        gateway.kill()
        gateway.wait()
        eventually("nothing of it is left", lambda: own.members() == [])
        with pytest.raises(httpx.HTTPError):
            asked.response()
