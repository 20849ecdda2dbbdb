"""`VLLMBackend`: against simulated servers where they can show it, with canned answers where only a broken server could."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import anyio
import httpx
import pytest
from pytest_httpx import HTTPXMock

from llmux_asgi import (
    BackendError,
    BackendState,
    BackendTimeoutError,
    BackendUnreachableError,
    BackendUnsupportedError,
    TimeoutsConfig,
    VLLMBackend,
)
from llmux_asgi.exceptions import BackendDeadError
from llmux_asgi.sim import SimProcess, start_sim
from tests.support.serve import free_port

pytestmark = pytest.mark.anyio
URL = "http://vllm.test:8000"


@pytest.fixture(scope="module")
def shared() -> Iterator[SimProcess]:
    with start_sim("m") as process:
        yield process


@pytest.fixture
def sim(shared: SimProcess) -> Iterator[SimProcess]:
    """A simulated server, awake."""
    yield shared
    shared.clear_faults()
    httpx.post(shared.url + "/wake_up")


async def test_a_level_1_cycle_is_confirmed_at_every_step(sim: SimProcess) -> None:
    backend = VLLMBackend(sim.url + "/")
    assert str(backend) == sim.url
    assert await backend.state() is BackendState.AWAKE
    await backend.sleep(1)
    assert await backend.state() is BackendState.ASLEEP
    assert sim.state().level == 1
    reloads = sim.state().reloads
    await backend.wake()
    await backend.ready()
    assert await backend.state() is BackendState.AWAKE
    assert sim.state().reloads == reloads
    await backend.aclose()
    await backend.aclose()


async def test_waking_from_level_2_reloads_the_weights(sim: SimProcess) -> None:
    backend = VLLMBackend(sim.url)
    await backend.sleep(2)
    assert sim.state().level == 2
    await backend.wake()
    await backend.ready()
    assert sim.state().awake
    assert sim.state().weights_valid
    await backend.aclose()


async def test_a_level_counts_for_one_sleep_only(sim: SimProcess) -> None:
    backend = VLLMBackend(sim.url)
    for level in (2, 1):
        await backend.sleep(level)
        await backend.wake()
        await backend.ready()
    reloads = sim.state().reloads
    async with httpx.AsyncClient() as by_hand:
        await by_hand.post(sim.url + "/sleep?level=2")
    await backend.wake()
    assert sim.state().weights_valid
    assert sim.state().reloads == reloads + 1
    await backend.aclose()


@pytest.mark.parametrize("level", [1, 2])
async def test_a_half_woken_server_is_woken_whole_before_it_is_put_to_sleep(sim: SimProcess, level: int) -> None:
    """vLLM takes it for a sleeper: its /sleep alone would free nothing."""
    backend = VLLMBackend(sim.url)
    await backend.sleep(level)
    sim.add_faults("wake:1:oom" if level == 1 else "reload:1:fail")
    with pytest.raises(BackendError):
        await backend.wake()
    assert await backend.state() is BackendState.ASLEEP
    wakes = sim.state().wakes
    await backend.sleep(1)
    state = sim.state()
    assert (state.wakes, sorted(state.asleep_tags)) == (wakes + 1, ["kv_cache", "weights"])
    assert state.level == level  # weights that were not reloaded are not kept, and not forgotten either
    await backend.wake()
    await backend.ready()
    assert sim.state().awake
    assert sim.state().weights_valid
    await backend.aclose()


async def test_a_probe_is_limited_as_a_whole() -> None:
    """A server that sends its answer byte by byte is never silent for long."""
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 400\r\n\r\n" + b" " * 400
    stop = threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        with connection:
            for byte in answer:
                if stop.wait(0.02):
                    return
                with contextlib.suppress(OSError):
                    connection.sendall(bytes([byte]))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip)
        thread.start()
        backend = VLLMBackend(f"http://127.0.0.1:{listener.getsockname()[1]}", timeouts=TimeoutsConfig(probe=0.1))
        with anyio.fail_after(5), pytest.raises(BackendTimeoutError, match=r"not answered in 0\.1 s"):
            await backend.state()
        stop.set()
        thread.join()
        await backend.aclose()


async def test_what_comes_back_on_an_address_is_another_process_and_its_level_is_asked() -> None:
    port = free_port()
    backend = VLLMBackend(f"http://127.0.0.1:{port}")
    with start_sim("m", port=port):
        await backend.sleep(1)
    assert await backend.state() is BackendState.UNREACHABLE
    with start_sim("m", port=port, start_asleep=2) as second:
        await backend.wake()
        assert second.state().weights_valid
    await backend.aclose()


async def test_a_sleeper_that_somebody_else_put_to_level_2_is_reloaded_too(sim: SimProcess) -> None:
    other, backend = VLLMBackend(sim.url), VLLMBackend(sim.url)
    await other.sleep(2)
    await backend.wake()
    assert sim.state().weights_valid
    await other.aclose()
    await backend.aclose()


@pytest.mark.parametrize("metric", ["weights_offloaded", None])
async def test_a_sleeper_of_unknown_level_is_reloaded_if_the_configuration_says_2(
    httpx_mock: HTTPXMock, metric: str | None
) -> None:
    text = f'vllm:engine_sleep_state{{engine="0",sleep_state="{metric}"}} 1.0\n' if metric else "nothing"
    httpx_mock.add_response(url=f"{URL}/metrics", text=text)
    for path in ("/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache", "/reset_prefix_cache"):
        httpx_mock.add_response(url=URL + path, json={})
    backend = VLLMBackend(URL, sleep_level=2)
    await backend.wake()
    requests = httpx_mock.get_requests()
    assert [request.url.raw_path.decode() for request in requests] == [
        "/metrics",
        "/wake_up?tags=weights",
        "/collective_rpc",
        "/wake_up?tags=kv_cache",
        "/reset_prefix_cache",
    ]
    assert requests[2].content == b'{"method":"reload_weights"}'
    await backend.aclose()


async def test_no_metrics_mean_the_configured_level(httpx_mock: HTTPXMock) -> None:
    httpx_mock.add_response(url=f"{URL}/metrics", status_code=404)
    httpx_mock.add_response(url=f"{URL}/wake_up", text="")
    backend = VLLMBackend(URL)
    await backend.wake()
    await backend.aclose()


@pytest.mark.parametrize(
    ("version", "wakes"),
    [
        ("0.23.1", ["/wake_up", "/collective_rpc", "/reset_prefix_cache"]),
        ("0.24.0", ["/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache", "/reset_prefix_cache"]),
    ],
)
async def test_before_0_24_a_level_2_sleeper_is_woken_whole_and_then_reloaded(
    httpx_mock: HTTPXMock, version: str, wakes: list[str]
) -> None:
    httpx_mock.add_response(url=f"{URL}/version", json={"version": version})
    httpx_mock.add_response(url=f"{URL}/is_sleeping", json={"is_sleeping": True, "more": 1}, is_reusable=True)
    for path in ("/sleep?level=2&mode=abort", *wakes):
        httpx_mock.add_response(url=URL + path, text="")
    backend = VLLMBackend(URL)
    assert await backend.state() is BackendState.ASLEEP
    await backend.sleep(2)
    await backend.wake()
    paths = [request.url.raw_path.decode() for request in httpx_mock.get_requests()]
    assert paths[-len(wakes) :] == wakes
    await backend.aclose()


@pytest.mark.parametrize("version", ["0.14.0", "0.15.1", "v0.16.2.dev3"])
async def test_versions_that_do_not_free_the_weights_are_refused(httpx_mock: HTTPXMock, version: str) -> None:
    httpx_mock.add_response(url=f"{URL}/version", json={"version": version})
    backend = VLLMBackend(URL)
    with pytest.raises(BackendUnsupportedError, match=r"does not free the weights.*Upgrade it to 0\.17"):
        await backend.state()
    await backend.aclose()


@pytest.mark.parametrize("version", ["0.13.0", "0.17.0", "0.32.0+cpu", "1.0", "dev"])
async def test_all_other_versions_are_used(httpx_mock: HTTPXMock, version: str) -> None:
    httpx_mock.add_response(url=f"{URL}/version", json={"version": version})
    httpx_mock.add_response(url=f"{URL}/is_sleeping", json={"is_sleeping": False})
    backend = VLLMBackend(URL)
    assert await backend.state() is BackendState.AWAKE
    await backend.aclose()


async def test_dev_mode_off_says_how_to_mend_it() -> None:
    with start_sim("m", dev_mode=False) as sim:
        backend = VLLMBackend(sim.url)
        with pytest.raises(BackendUnsupportedError, match="VLLM_SERVER_DEV_MODE=1"):
            await backend.state()
        await backend.aclose()


async def test_a_server_that_stays_awake_after_a_200_says_how_to_mend_it(sim: SimProcess) -> None:
    sim.add_faults("sleep:1:lie")
    backend = VLLMBackend(sim.url)
    with pytest.raises(BackendUnsupportedError, match="--enable-sleep-mode"):
        await backend.sleep(1)
    await backend.aclose()


async def test_a_call_that_hangs_ends_with_its_limit_and_the_state_can_still_be_asked(sim: SimProcess) -> None:
    """Each step has its own limit, and no other one: the others are far too long or too short here."""
    with anyio.fail_after(10):
        sim.add_faults("sleep:1:hang")
        backend = VLLMBackend(sim.url, timeouts=TimeoutsConfig(sleep=0.05, wake=60))
        with pytest.raises(BackendTimeoutError, match=r"putting the model to sleep took longer than 0\.05 s"):
            await backend.sleep(1)
        assert await backend.state() is BackendState.AWAKE
        await backend.aclose()
        sim.add_faults("wake:1:hang")
        backend = VLLMBackend(sim.url, timeouts=TimeoutsConfig(sleep=60, wake=0.05))
        with pytest.raises(BackendTimeoutError, match=r"waking the model took longer than 0\.05 s"):
            await backend.wake()
        await backend.aclose()


async def test_a_server_that_does_not_wake_up_is_not_waited_for_for_ever(httpx_mock: HTTPXMock) -> None:
    httpx_mock.add_response(url=f"{URL}/is_sleeping", json={"is_sleeping": True}, is_reusable=True)
    backend = VLLMBackend(URL, timeouts=TimeoutsConfig(sleep=60, wake=0.05))
    with anyio.fail_after(5), pytest.raises(BackendTimeoutError, match=r"waiting for the woken model took longer"):
        await backend.ready()
    await backend.aclose()


async def test_a_step_takes_as_long_as_its_limit_says_and_no_other_timeout_cuts_it_short(httpx_mock: HTTPXMock) -> None:
    httpx_mock.add_response(url=f"{URL}/sleep?level=1&mode=abort", json={})
    httpx_mock.add_response(url=f"{URL}/is_sleeping", json={"is_sleeping": True})
    backend = VLLMBackend(URL, timeouts=TimeoutsConfig(probe=0.5, connect=0.25))
    await backend.sleep(1)
    for request in httpx_mock.get_requests():
        assert request.extensions["timeout"] == {"connect": 0.25, "read": None, "write": None, "pool": None}
    await backend.aclose()


async def test_a_probe_that_hangs_ends_with_its_limit(sim: SimProcess) -> None:
    sim.add_faults("is_sleeping:1:hang")
    backend = VLLMBackend(sim.url, timeouts=TimeoutsConfig(probe=0.05))
    with pytest.raises(BackendTimeoutError, match=r"GET /is_sleeping was not answered in 0\.05 s"):
        await backend.state()
    await backend.aclose()


async def test_an_error_status_is_told_with_what_the_server_said(sim: SimProcess) -> None:
    sim.add_faults("wake:1:fail")
    backend = VLLMBackend(sim.url)
    with pytest.raises(BackendError, match=r"POST /wake_up answered 500: \S"):
        await backend.wake()
    assert await backend.state() is BackendState.AWAKE  # on a connection of its own, although vLLM cut the last one
    await backend.aclose()


async def test_a_killed_server_is_gone_and_its_successor_is_asked_for_its_version_again() -> None:
    port = free_port()
    with start_sim("m", port=port) as first:
        backend = VLLMBackend(first.url)
        assert await backend.state() is BackendState.AWAKE
        first.kill()
        assert await backend.state() is BackendState.UNREACHABLE
        with pytest.raises(BackendUnreachableError, match="nothing listens there"):
            await backend.sleep(1)
    with start_sim("m", port=port, version="0.15.0"), pytest.raises(BackendUnsupportedError):
        await backend.state()
    await backend.aclose()


async def test_a_host_that_cannot_be_found_is_not_taken_for_a_dead_process() -> None:
    backend = VLLMBackend("http://no-such-host.invalid:1", timeouts=TimeoutsConfig(connect=2.0))
    with pytest.raises(BackendTimeoutError, match="no connection for GET /version"):
        await backend.state()
    await backend.aclose()


async def test_a_host_that_does_not_answer_is_not_taken_for_a_dead_process(httpx_mock: HTTPXMock) -> None:
    httpx_mock.add_exception(httpx.ConnectTimeout("timed out"), is_reusable=True)
    backend = VLLMBackend(URL)
    with pytest.raises(BackendTimeoutError, match="no connection for GET /version"):
        await backend.state()
    await backend.aclose()


async def test_every_address_must_refuse(httpx_mock: HTTPXMock) -> None:
    for errors, gone in (
        ([ConnectionRefusedError(111, "refused"), ConnectionRefusedError(111, "refused")], True),
        ([ConnectionRefusedError(111, "refused"), OSError(113, "no route")], False),
    ):
        cause = OSError("all attempts failed")
        cause.__cause__ = ExceptionGroup("", errors)
        error = httpx.ConnectError("failed")
        error.__cause__ = cause
        httpx_mock.add_exception(error, is_reusable=True)
        backend = VLLMBackend(URL)
        if gone:
            assert await backend.state() is BackendState.UNREACHABLE
        else:
            with pytest.raises(BackendTimeoutError):
                await backend.state()
        await backend.aclose()


@pytest.mark.parametrize(("path", "answer"), [("/version", "[]"), ("/version", "nonsense"), ("/is_sleeping", '{"x": 1}')])
async def test_an_answer_that_says_nothing_is_never_guessed_at(httpx_mock: HTTPXMock, path: str, answer: str) -> None:
    if path != "/version":
        httpx_mock.add_response(url=f"{URL}/version", json={"version": "0.32.0"})
    httpx_mock.add_response(url=URL + path, text=answer)
    httpx_mock.add_response(url=f"{URL}/health")
    backend = VLLMBackend(URL)
    with pytest.raises(BackendError, match=f"GET {path} gave no usable answer"):
        await backend.state()
    await backend.aclose()


async def test_a_probe_whose_connection_breaks_is_sent_once_more(httpx_mock: HTTPXMock) -> None:
    """A process that is ending breaks one connection and refuses the next."""
    httpx_mock.add_exception(httpx.RemoteProtocolError("server disconnected"))
    httpx_mock.add_exception(httpx.ReadError("reset"))
    httpx_mock.add_response(url=f"{URL}/health")
    backend = VLLMBackend(URL)
    with pytest.raises(BackendError, match="GET /version failed: reset"):
        await backend.state()
    refused = httpx.ConnectError("refused")
    refused.__cause__ = ConnectionRefusedError(111, "refused")
    httpx_mock.add_exception(httpx.ReadError("reset"))
    httpx_mock.add_exception(refused)
    assert await backend.state() is BackendState.UNREACHABLE
    await backend.aclose()


async def test_a_step_whose_connection_breaks_is_not_sent_again(httpx_mock: HTTPXMock) -> None:
    httpx_mock.add_exception(httpx.RemoteProtocolError("server disconnected"))
    backend = VLLMBackend(URL)
    with pytest.raises(BackendError, match="POST /sleep failed: server disconnected"):
        await backend.sleep(1)
    assert len(httpx_mock.get_requests()) == 1
    await backend.aclose()


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("step", ["/sleep?level=1&mode=abort", "/wake_up"])
async def test_a_step_that_the_engine_dies_over_is_not_waited_for(
    httpx_mock: HTTPXMock, monkeypatch: pytest.MonkeyPatch, step: str, gone: bool
) -> None:
    """vLLM does not answer it any more: `/health` says 503, a moment later nothing listens, and the call hangs on."""

    async def never(request: httpx.Request) -> httpx.Response:
        await anyio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr("llmux_asgi.backends.vllm._LOOK_SECONDS", 0.001)
    httpx_mock.add_response(url=f"{URL}/metrics", is_optional=True)
    httpx_mock.add_callback(never, url=URL + step)
    httpx_mock.add_response(url=f"{URL}/health")  # it has not noticed yet
    if gone:
        refused = httpx.ConnectError("refused")
        refused.__cause__ = ConnectionRefusedError(111, "refused")
        httpx_mock.add_exception(refused, url=f"{URL}/health")
    else:
        httpx_mock.add_response(url=f"{URL}/health", status_code=503)
    backend = VLLMBackend(URL)
    with anyio.fail_after(5), pytest.raises(BackendUnreachableError if gone else BackendDeadError):
        await (backend.wake() if step == "/wake_up" else backend.sleep(1))
    await backend.aclose()


async def test_a_probe_that_the_engine_dies_over_is_told_from_a_slow_one(httpx_mock: HTTPXMock) -> None:
    httpx_mock.add_response(url=f"{URL}/version", json={"version": "0.32.0"})
    httpx_mock.add_exception(TimeoutError("the probe's limit"), url=f"{URL}/is_sleeping", is_reusable=True)
    httpx_mock.add_response(url=f"{URL}/health", status_code=503)
    backend = VLLMBackend(URL)
    with pytest.raises(BackendDeadError):
        await backend.state()
    httpx_mock.add_response(url=f"{URL}/health")
    with pytest.raises(BackendTimeoutError):
        await backend.state()
    await backend.aclose()


async def test_ready_asks_until_the_server_is_awake(httpx_mock: HTTPXMock) -> None:
    for sleeping in (True, True, False):
        httpx_mock.add_response(url=f"{URL}/is_sleeping", json={"is_sleeping": sleeping})
    backend = VLLMBackend(URL)
    await backend.ready()
    assert len(httpx_mock.get_requests()) == 3
    await backend.aclose()


async def test_control_calls_do_not_go_through_a_proxy_of_the_environment(
    sim: SimProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        backend = VLLMBackend(sim.url, timeouts=TimeoutsConfig(probe=2.0))
        assert await backend.state() is BackendState.AWAKE
        await backend.aclose()
