"""`SGLangBackend` against a simulated SGLang that crashes where the real one's source says it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

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
    LLMuxApp,
    ModelConfig,
    SGLangBackend,
    TimeoutsConfig,
)
from llmux_asgi.backends import build_backend
from tests.support.serve import free_port, serve
from tests.support.sglang import SimulatedSGLang

pytestmark = pytest.mark.anyio
MARK, RELEASE, RESUME = "/update_weight_version", "/release_memory_occupation", "/resume_memory_occupation"
ABORT, FLUSH, RELOAD = "/abort_request", "/flush_cache", "/update_weights_from_disk"


@pytest.fixture
def sglang() -> Iterator[SimulatedSGLang]:
    simulated = SimulatedSGLang()
    yield simulated
    assert not simulated.crashed


@pytest.fixture
def url(sglang: SimulatedSGLang) -> Iterator[str]:
    with serve(sglang) as url:
        yield url


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("backup", [True, False])
async def test_memory_is_released_and_resumed_and_no_mark_stays(old: bool, backup: bool) -> None:
    sglang = SimulatedSGLang(backup=backup, old=old)
    with serve(sglang) as url:
        backend = SGLangBackend(url + "/")
        assert str(backend) == url
        assert await backend.state() is BackendState.AWAKE
        for _ in range(2):
            await backend.sleep(1)
            assert sglang.released
            assert await backend.state() is BackendState.ASLEEP
            await backend.wake()
            await backend.ready()
            assert (sglang.released, sglang.weights_valid, sglang.version) == (False, True, "default")
            assert await backend.state() is BackendState.AWAKE
        await backend.aclose()
    assert not sglang.crashed
    sleep = [ABORT, FLUSH, MARK, RELEASE, MARK]
    wake = [MARK, RESUME, MARK] if backup else [MARK, RESUME, MARK, RELOAD, MARK]
    assert sglang.calls == 2 * (sleep + wake)
    steps = ["default#llmux:releasing", "default#llmux:asleep", "default#llmux:resuming"]
    assert sglang.versions == 2 * [*steps, *([] if backup else ["default#llmux:reloading"]), "default"]


async def test_running_requests_are_aborted_before_the_release_which_would_crash_the_server(
    sglang: SimulatedSGLang, url: str
) -> None:
    sglang.running = 3
    backend = SGLangBackend(url)
    await backend.sleep(1)
    assert sglang.released
    assert sglang.calls == [*(3 * [ABORT, FLUSH]), MARK, RELEASE, MARK]
    await backend.aclose()


async def test_a_server_that_does_not_become_idle_is_left_as_it_is(sglang: SimulatedSGLang, url: str) -> None:
    sglang.running = 10_000
    backend = SGLangBackend(url, timeouts=TimeoutsConfig(sleep=0.1))
    with anyio.fail_after(5), pytest.raises(BackendTimeoutError, match=r"releasing the memory took longer than 0\.1 s"):
        await backend.sleep(1)
    assert RELEASE not in sglang.calls
    assert await backend.state() is BackendState.AWAKE
    await backend.aclose()


async def test_neither_step_is_taken_twice_whoever_took_it(sglang: SimulatedSGLang, url: str) -> None:
    """Each would crash the server. The second object stands for a gateway that was started again."""
    first, second = SGLangBackend(url), SGLangBackend(url)
    await first.wake()
    await first.sleep(1)
    await first.sleep(1)
    assert await second.state() is BackendState.ASLEEP
    await second.sleep(1)
    await second.wake()
    await second.wake()
    await first.wake()
    assert await first.state() is BackendState.AWAKE
    assert (sglang.calls.count(RELEASE), sglang.calls.count(RESUME)) == (1, 1)
    await first.aclose()
    await second.aclose()


async def test_the_weight_version_of_the_server_is_kept(sglang: SimulatedSGLang, url: str) -> None:
    sglang.version = "step-7#b"
    backend = SGLangBackend(url)
    await backend.sleep(1)
    assert sglang.version == "step-7#b#llmux:asleep"
    await backend.wake()
    assert sglang.version == "step-7#b"
    await backend.aclose()


@pytest.mark.parametrize(("path", "left"), [(RELEASE, "releasing"), (RESUME, "resuming")])
async def test_after_a_step_that_failed_nothing_is_guessed(sglang: SimulatedSGLang, url: str, path: str, left: str) -> None:
    backend = SGLangBackend(url)
    if path == RESUME:
        await backend.sleep(1)
    sglang.faults[path] = 1
    with pytest.raises(BackendError, match=f"POST {path} answered 500: Internal Server Error"):
        await (backend.sleep(1) if path == RELEASE else backend.wake())
    calls = len(sglang.calls)
    for other in (backend, SGLangBackend(url)):
        for step in (other.state(), other.sleep(1), other.wake()):
            with pytest.raises(BackendError, match=f"left in the middle of {left}, .* Restart it"):
                await step
        await other.aclose()
    assert len(sglang.calls) == calls


async def test_a_crash_is_told_as_the_server_tells_it() -> None:
    """Somebody has released the memory by hand, which a backend cannot know."""
    sglang = SimulatedSGLang()
    sglang.released = True
    with serve(sglang) as url:
        backend = SGLangBackend(url)
        with pytest.raises(BackendError, match="answered 500: paused twice"):
            await backend.sleep(1)
        await backend.aclose()


async def test_a_reload_that_failed_is_done_again_or_its_memory_is_released(sglang: SimulatedSGLang, url: str) -> None:
    sglang.arguments["enable_weights_cpu_backup"] = False
    backend = SGLangBackend(url)
    await backend.sleep(1)
    for _ in range(2):
        sglang.faults[RELOAD] = 1
        with pytest.raises(BackendError, match=f"POST {RELOAD} answered 500"):
            await backend.wake()
        assert (sglang.released, sglang.weights_valid) == (False, False)
        assert await backend.state() is BackendState.ASLEEP
        with pytest.raises(BackendError, match="left in the middle of reloading"):
            await SGLangBackend(url).state()  # which has not done it
        await backend.sleep(1)
        assert sglang.released
    sglang.faults[RELOAD] = 1
    with pytest.raises(BackendError):
        await backend.wake()
    await backend.wake()
    assert (sglang.released, sglang.weights_valid) == (False, True)
    assert await backend.state() is BackendState.AWAKE
    assert sglang.calls.count(RESUME) == 3
    await backend.aclose()


async def test_of_a_reload_that_another_gateway_left_nothing_is_known(sglang: SimulatedSGLang) -> None:
    sglang.arguments["enable_weights_cpu_backup"] = False
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    backend, other = SGLangBackend(url), SGLangBackend(url)

    async def fails_to_reload(waking: SGLangBackend) -> None:
        sglang.faults[RELOAD] = 1
        with pytest.raises(BackendError, match=f"POST {RELOAD} answered 500"):
            await waking.wake()

    with serve(sglang, port=port):
        await backend.sleep(1)
        await fails_to_reload(backend)
        await backend.sleep(1)  # from here on it has left nothing
        await fails_to_reload(other)
        with pytest.raises(BackendError, match="left in the middle of reloading"):
            await backend.state()
        await other.sleep(1)
        await fails_to_reload(backend)
    assert await backend.state() is BackendState.UNREACHABLE  # nor in the process that is started now
    with serve(sglang, port=port), pytest.raises(BackendError, match="left in the middle of reloading"):
        await backend.state()
    await backend.aclose()
    await other.aclose()


@pytest.mark.parametrize("path", [MARK, ABORT, FLUSH, RELEASE])
async def test_a_route_that_does_not_exist_is_told_and_nothing_is_left_behind(
    sglang: SimulatedSGLang, url: str, path: str
) -> None:
    sglang.missing.add(path)
    backend = SGLangBackend(url)
    with pytest.raises(BackendUnsupportedError, match=f"POST {path} answered 404. Is it an SGLang server"):
        await backend.sleep(1)
    assert sglang.version == "default"
    assert await backend.state() is BackendState.AWAKE
    await backend.aclose()


async def test_ready_asks_until_the_server_is_healthy(sglang: SimulatedSGLang, url: str) -> None:
    sglang.unhealthy = 3
    backend = SGLangBackend(url)
    await backend.ready()
    assert sglang.unhealthy == 0
    await backend.aclose()
    sglang.unhealthy = 10_000
    backend = SGLangBackend(url, timeouts=TimeoutsConfig(wake=0.1))
    with anyio.fail_after(5), pytest.raises(BackendTimeoutError, match=r"not healthy within 0\.1 s: .* answered 503"):
        await backend.ready()
    await backend.aclose()


@pytest.mark.parametrize(
    ("argument", "value", "told"),
    [("enable_memory_saver", False, "--enable-memory-saver"), ("tokenizer_worker_num", 4, "--tokenizer-worker-num 1")],
)
async def test_a_server_that_was_started_wrongly_says_how_to_start_it(
    sglang: SimulatedSGLang, url: str, argument: str, value: object, told: str
) -> None:
    sglang.arguments[argument] = value
    backend = SGLangBackend(url)
    for step in (backend.state(), backend.sleep(1), backend.wake()):
        with pytest.raises(BackendUnsupportedError, match=f"Start SGLang with {told}"):
            await step
    assert sglang.calls == []
    await backend.aclose()


async def test_what_comes_back_on_an_address_is_another_process() -> None:
    port = free_port()
    backend = SGLangBackend(f"http://127.0.0.1:{port}")
    assert await backend.state() is BackendState.UNREACHABLE
    with pytest.raises(BackendUnreachableError):
        await backend.ready()
    for backup in (True, False):
        # The second server has other arguments, and no mark: it is awake.
        sglang = SimulatedSGLang(backup=backup)
        with serve(sglang, port=port):
            assert await backend.state() is BackendState.AWAKE
            await backend.sleep(1)
            await backend.wake()
            assert sglang.weights_valid
            await backend.sleep(1)
        assert await backend.state() is BackendState.UNREACHABLE
    await backend.aclose()


async def test_a_server_that_does_not_keep_the_mark_is_not_released(httpx_mock: HTTPXMock) -> None:
    base = "http://sglang.test"
    httpx_mock.add_response(url=f"{base}/server_info", json={"model_path": "m", "enable_memory_saver": True})
    httpx_mock.add_response(url=f"{base}/model_info", json={"weight_version": "default"}, is_reusable=True)
    for path in (ABORT, FLUSH, MARK):
        httpx_mock.add_response(url=base + path, json={})
    backend = SGLangBackend(base)
    with pytest.raises(BackendUnsupportedError, match="does not keep the weight version"):
        await backend.sleep(1)
    await backend.aclose()


@pytest.mark.parametrize(
    ("info", "told"),
    [
        ("no JSON", "no usable answer"),
        ("{}", "no usable answer"),
        ('{"weight_version": "a#llmux:dozing"}', "not a mark known here"),
    ],
)
async def test_no_clear_answer_is_no_state(httpx_mock: HTTPXMock, info: str, told: str) -> None:
    base = "http://sglang.test"
    httpx_mock.add_response(url=f"{base}/server_info", json={"model_path": "m", "enable_memory_saver": True})
    httpx_mock.add_response(url=f"{base}/model_info", text=info)
    backend = SGLangBackend(base)
    with pytest.raises(BackendError, match=told):
        await backend.state()
    await backend.aclose()


def test_a_gateway_switches_between_two_servers() -> None:
    servers = {"a": SimulatedSGLang(), "b": SimulatedSGLang(backup=False)}
    with ExitStack() as stack:
        urls = {name: stack.enter_context(serve(each)) for name, each in servers.items()}
        models = {name: {"url": url, "server": "sglang"} for name, url in urls.items()}
        app = LLMuxApp({"models": models, "policy": {"name": "fifo", "min_active_duration": 0}})
        client = stack.enter_context(httpx.Client(base_url=stack.enter_context(serve(app)), timeout=20))
        for model, other in ("ab", "ba", "ab"):
            answer = client.post("/v1/chat/completions", json={"model": model, "messages": []})
            assert answer.json()["choices"][0]["message"]["content"] == "hello"
            assert (servers[model].released, servers[other].released) == (False, True)
    assert not any(each.crashed for each in servers.values())


def test_the_configuration_chooses_it() -> None:
    built = build_backend("m", ModelConfig(url="http://a:1", server="sglang"), sleep_level=1)
    assert isinstance(built, SGLangBackend)
