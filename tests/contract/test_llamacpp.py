"""`LlamaCppBackend` against llama.cpp's router: a simulated one, and the real one under the mark `vllm`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import anyio
import httpx
import pytest
from pytest_httpx import HTTPXMock

from llmux_asgi import (
    BackendError,
    BackendState,
    BackendTimeoutError,
    BackendUnsupportedError,
    LlamaCppBackend,
    LLMuxApp,
    ModelConfig,
    TimeoutsConfig,
)
from llmux_asgi.backends import build_backend
from tests.support.eventually import eventually
from tests.support.llamacpp import SimulatedRouter
from tests.support.serve import free_port, serve

pytestmark = pytest.mark.anyio
MODELS = ("alpha", "beta")
LIMITS = TimeoutsConfig(sleep=20, wake=20)
"""So that what would wait for ever fails."""


@pytest.fixture(scope="module", params=["sim", pytest.param("real", marks=pytest.mark.vllm)])
def shared_router(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a router with the models alpha and beta, and one that is broken: its process ends while it loads."""
    if request.param == "sim":
        simulated = SimulatedRouter(*MODELS, "broken")
        simulated.faults["broken"] = 1000
        with serve(simulated) as url:
            yield url
        return
    from tests.real.llama_cpp import missing_tools, running_router
    from tests.real.tiny_gguf import write_tiny_gguf

    if missing := missing_tools():
        pytest.skip(f"building the real llama-server needs {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("router")
    (models := folder / "models").mkdir()
    for seed, name in enumerate(MODELS):
        write_tiny_gguf(models / f"{name}.gguf", seed)
    (models / "broken.gguf").write_bytes(b"no model")
    with running_router(models, folder / "log") as url:
        yield url


def statuses(url: str) -> dict[str, Any]:
    return {model["id"]: model["status"]["value"] for model in httpx.get(url + "/models").json()["data"]}


@pytest.fixture
def router(shared_router: str) -> str:
    """The router with all models unloaded."""
    for name, status in statuses(shared_router).items():
        if status != "unloaded":
            httpx.post(shared_router + "/models/unload", json={"model": name}).raise_for_status()
    eventually("all models are unloaded", lambda: set(statuses(shared_router).values()) == {"unloaded"})
    return shared_router


# Both routers


async def test_a_model_is_loaded_and_unloaded_and_each_is_confirmed(router: str) -> None:
    backend = LlamaCppBackend(router + "/", "alpha", timeouts=LIMITS)
    assert str(backend) == f"{router} (alpha)"
    assert await backend.state() is BackendState.ASLEEP
    for _ in range(2):
        await backend.wake()
        assert await backend.state() is BackendState.AWAKE  # at once: it takes memory while it loads
        await backend.ready()
        assert statuses(router)["alpha"] == "loaded"
        await backend.sleep(1)
        assert statuses(router)["alpha"] == "unloaded"
        assert await backend.state() is BackendState.ASLEEP
    await backend.aclose()


async def test_each_step_may_be_taken_again(router: str) -> None:
    backend, other = LlamaCppBackend(router, "alpha", timeouts=LIMITS), LlamaCppBackend(router, "beta", timeouts=LIMITS)
    await backend.sleep(1)
    await backend.wake()
    await backend.wake()
    await backend.ready()
    await backend.wake()
    await backend.ready()
    assert await other.state() is BackendState.ASLEEP
    await backend.sleep(1)
    await backend.sleep(1)
    await other.aclose()
    await backend.aclose()


async def test_a_load_that_is_not_over_is_unloaded_too(router: str) -> None:
    backend = LlamaCppBackend(router, "alpha", timeouts=LIMITS)
    await backend.wake()
    await backend.sleep(1)
    assert statuses(router)["alpha"] == "unloaded"
    await backend.aclose()


async def test_a_load_that_fails_is_told_with_what_the_router_knows(router: str) -> None:
    backend = LlamaCppBackend(router, "broken", timeouts=LIMITS)
    for _ in range(2):
        await backend.wake()
        with pytest.raises(BackendError, match=r"the model's process ended with exit status 1 while it loaded"):
            await backend.ready()
        assert await backend.state() is BackendState.ASLEEP
        await backend.sleep(1)
    await backend.aclose()


async def test_a_name_that_the_router_does_not_have_is_told_with_those_that_it_has(router: str) -> None:
    backend = LlamaCppBackend(router, "gamma", timeouts=LIMITS)
    for step in (backend.state(), backend.wake(), backend.ready(), backend.sleep(1)):
        with pytest.raises(BackendError, match=r"no model 'gamma'\. It has: alpha, beta, broken\. Set served_name"):
            await step
    await backend.aclose()


def test_a_gateway_switches_between_two_models_of_one_router(router: str) -> None:
    models = {
        "alpha": {"url": router, "server": "llama.cpp"},
        "second": {"url": router, "server": "llama.cpp", "served_name": "beta"},
    }
    app = LLMuxApp({"models": models, "policy": {"name": "fifo", "min_active_duration": 0}})
    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=stack.enter_context(serve(app)), timeout=60))
        for model, inside, other in (("alpha", "alpha", "beta"), ("second", "beta", "alpha"), ("alpha", "alpha", "beta")):
            body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == inside
            assert answer.json()["choices"][0]["finish_reason"] == "length"
            assert (statuses(router)[inside], statuses(router)[other]) == ("loaded", "unloaded")


# What only a simulated one shows


@pytest.fixture
def simulated() -> SimulatedRouter:
    return SimulatedRouter(*MODELS)


@pytest.fixture
def url(simulated: SimulatedRouter) -> Iterator[str]:
    with serve(simulated) as url:
        yield url


async def test_unloading_is_asked_for_once_and_waited_for(simulated: SimulatedRouter, url: str) -> None:
    simulated.slow = 5
    backend = LlamaCppBackend(url, "alpha", timeouts=LIMITS)
    await backend.wake()
    await backend.ready()
    await backend.sleep(1)
    assert simulated.models["alpha"].status == "unloaded"
    assert simulated.calls == [("load", "alpha"), ("unload", "alpha")]
    await backend.aclose()


async def test_a_model_is_found_by_an_alias(simulated: SimulatedRouter, url: str) -> None:
    simulated.models["alpha"].aliases.append("first")
    backend = LlamaCppBackend(url, "first", timeouts=LIMITS)
    await backend.wake()
    await backend.ready()
    assert simulated.models["alpha"].status == "loaded"
    await backend.sleep(1)
    await backend.aclose()


async def test_what_does_not_end_is_ended_by_its_limit(simulated: SimulatedRouter, url: str) -> None:
    simulated.slow = -1
    backend = LlamaCppBackend(url, "alpha", timeouts=TimeoutsConfig(sleep=0.05, wake=0.1))
    await backend.wake()
    with anyio.fail_after(5), pytest.raises(BackendTimeoutError, match=r"loading the model took longer than 0\.1 s"):
        await backend.ready()
    with anyio.fail_after(5), pytest.raises(BackendTimeoutError, match=r"unloading the model took longer than 0\.05 s"):
        await backend.sleep(1)
    assert await backend.state() is BackendState.AWAKE
    await backend.aclose()


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("sleeping", BackendState.AWAKE),
        ("loading", BackendState.AWAKE),
        ("downloading", BackendState.ASLEEP),
        ("downloaded", BackendState.ASLEEP),
    ],
)
async def test_every_status_that_the_router_knows_has_a_meaning(
    simulated: SimulatedRouter, url: str, status: str, state: BackendState
) -> None:
    """A model that sleeps by itself comes back by itself: it has to be unloaded before another one is woken."""
    simulated.models["alpha"].status = status
    backend = LlamaCppBackend(url, "alpha", timeouts=LIMITS)
    assert await backend.state() is state
    if status == "sleeping":
        await backend.ready()
        await backend.sleep(1)
        assert simulated.models["alpha"].status == "unloaded"
    await backend.aclose()


async def test_a_status_that_is_not_known_is_no_state(simulated: SimulatedRouter, url: str) -> None:
    simulated.models["alpha"].status = "hibernating"
    backend = LlamaCppBackend(url, "alpha", timeouts=LIMITS)
    with pytest.raises(BackendError, match="calls the model 'hibernating'"):
        await backend.state()
    await backend.aclose()


async def test_a_model_whose_process_ends_by_itself_is_unloaded(httpx_mock: HTTPXMock) -> None:
    def listed(status: str) -> dict[str, Any]:
        return {"data": [{"id": "alpha", "status": {"value": status}}]}

    base = "http://router.test"
    httpx_mock.add_response(url=f"{base}/models", json=listed("loaded"))
    httpx_mock.add_response(url=f"{base}/models/unload", status_code=400, json={"error": "not running"}, is_reusable=True)
    httpx_mock.add_response(url=f"{base}/models", json=listed("unloaded"), is_reusable=False)
    httpx_mock.add_response(url=f"{base}/models", json=listed("unloaded"))
    backend = LlamaCppBackend(base, "alpha")
    await backend.sleep(1)
    httpx_mock.add_response(url=f"{base}/models", json=listed("loaded"), is_reusable=True)
    with pytest.raises(BackendError, match="answered 400"):
        await backend.sleep(1)
    await backend.aclose()


async def test_a_server_with_a_single_model_says_how_to_start_a_router(simulated: SimulatedRouter, url: str) -> None:
    simulated.single = True
    backend = LlamaCppBackend(url, "alpha", timeouts=LIMITS)
    with pytest.raises(BackendUnsupportedError, match=r"has a single model\. Start llama-server as a router: without -m"):
        await backend.state()
    await backend.aclose()


async def test_nothing_listens() -> None:
    backend = LlamaCppBackend(f"http://127.0.0.1:{free_port()}", "alpha")
    assert await backend.state() is BackendState.UNREACHABLE
    await backend.aclose()


async def test_no_clear_answer_is_no_state(httpx_mock: HTTPXMock) -> None:
    httpx_mock.add_response(text="<html>")
    backend = LlamaCppBackend("http://router.test", "alpha")
    with pytest.raises(BackendError, match="GET /models gave no usable answer"):
        await backend.state()
    await backend.aclose()


def test_the_configuration_chooses_it() -> None:
    built = build_backend("m", ModelConfig(url="http://a:1", server="llama.cpp", served_name="n"), sleep_level=1)
    assert isinstance(built, LlamaCppBackend)
    assert str(built) == "http://a:1 (n)"
