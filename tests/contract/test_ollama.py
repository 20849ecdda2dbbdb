"""`OllamaBackend` against a simulated Ollama that does what the real one's source says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import anyio
import httpx
import pytest
from pytest_httpx import HTTPXMock

from llmux_asgi import BackendError, BackendState, BackendTimeoutError, LLMuxApp, ModelConfig, OllamaBackend, TimeoutsConfig
from llmux_asgi.backends import build_backend
from tests.support.ollama import SimulatedOllama
from tests.support.serve import free_port, serve

pytestmark = pytest.mark.anyio
LIMITS = TimeoutsConfig(sleep=20, wake=20)
"""So that what would wait for ever fails."""


@pytest.fixture
def ollama() -> SimulatedOllama:
    return SimulatedOllama("qwen3:latest", "llama3.2:1b", "someone/model:latest")


@pytest.fixture
def url(ollama: SimulatedOllama) -> Iterator[str]:
    with serve(ollama) as url:
        yield url


@pytest.mark.parametrize("name", ["qwen3", "qwen3:latest", "Qwen3", "library/qwen3"])
async def test_a_model_is_loaded_for_ever_and_unloaded(ollama: SimulatedOllama, url: str, name: str) -> None:
    ollama.models.update({f"{name}:latest", name})  # the server knows it by each of these
    backend = OllamaBackend(url + "/", name, timeouts=LIMITS)
    assert str(backend) == f"{url} ({name})"
    assert await backend.state() is BackendState.ASLEEP
    await backend.wake()
    await backend.ready()
    assert await backend.state() is BackendState.AWAKE
    assert list(ollama.loaded.values()) == [-1]
    await backend.sleep(1)
    assert await backend.state() is BackendState.ASLEEP
    assert (ollama.asked, ollama.loaded) == ([(name, -1), (name, 0)], {})
    await backend.aclose()


@pytest.mark.parametrize(
    ("wanted", "listed", "awake"),
    [
        ("qwen3", "qwen3:latest", True),
        ("qwen3:4b", "qwen3:latest", False),
        ("qwen3", "qwen3:4b", False),
        ("qwen", "qwen3:latest", False),
        ("someone/model", "someone/model:latest", True),
        ("model", "someone/model:latest", False),
        ("localhost:5000/someone/model", "localhost:5000/someone/model:latest", True),
        ("hf.co/org/Model-GGUF:Q4_K_M", "hf.co/org/model-gguf:q4_k_m", True),
    ],
)
async def test_a_model_is_known_by_its_name_and_tag(httpx_mock: HTTPXMock, wanted: str, listed: str, awake: bool) -> None:
    httpx_mock.add_response(json={"models": [{"name": listed, "model": listed, "size": 1}]})
    backend = OllamaBackend("http://ollama.test", wanted)
    assert await backend.state() is (BackendState.AWAKE if awake else BackendState.ASLEEP)
    await backend.aclose()


async def test_an_unload_is_answered_at_once_and_confirmed_by_the_list(ollama: SimulatedOllama, url: str) -> None:
    backend = OllamaBackend(url, "qwen3", timeouts=LIMITS)
    await backend.wake()
    ollama.lingering = 3
    await backend.sleep(1)
    assert ollama.loaded == {}
    await backend.aclose()


async def test_a_model_that_stays_in_the_list_is_not_taken_for_unloaded(ollama: SimulatedOllama, url: str) -> None:
    backend = OllamaBackend(url, "qwen3", timeouts=TimeoutsConfig(sleep=0.1))
    await backend.wake()
    ollama.lingering = 10_000
    with anyio.fail_after(5), pytest.raises(BackendTimeoutError, match=r"unloading the model took longer than 0\.1 s"):
        await backend.sleep(1)
    assert await backend.state() is BackendState.AWAKE
    await backend.aclose()


async def test_ready_waits_for_the_list(ollama: SimulatedOllama, url: str) -> None:
    backend = OllamaBackend(url, "qwen3", timeouts=TimeoutsConfig(wake=5))
    await backend.wake()
    ollama.late = 3
    await backend.ready()
    assert ollama.late == 0
    ollama.late = 10_000
    hasty = OllamaBackend(url, "qwen3", timeouts=TimeoutsConfig(wake=0.05))
    with pytest.raises(BackendTimeoutError, match="waiting for the loaded model"):
        await hasty.ready()
    await hasty.aclose()
    await backend.aclose()


async def test_a_model_that_is_not_pulled_says_how_to_pull_it(url: str) -> None:
    backend = OllamaBackend(url, "mistral:7b")
    for step in (backend.wake(), backend.sleep(1)):
        with pytest.raises(BackendError, match=r"has no model 'mistral:7b'\. Run: ollama pull mistral:7b"):
            await step
    await backend.aclose()


async def test_a_load_that_fails_is_told_and_nothing_is_left(ollama: SimulatedOllama, url: str) -> None:
    backend = OllamaBackend(url, "qwen3", timeouts=LIMITS)
    ollama.faults["qwen3:latest"] = 1
    with pytest.raises(BackendError, match=r"answered 500: .*out of memory"):
        await backend.wake()
    await backend.sleep(1)
    assert ollama.asked == [("qwen3", -1), ("qwen3", 0)]
    await backend.aclose()


@pytest.mark.parametrize("ends", ["loaded", "failed"])
async def test_a_load_that_was_given_up_is_over_before_the_unload_is_believed(
    ollama: SimulatedOllama, url: str, ends: str
) -> None:
    """Until its process runs it is in no list: an unload would be confirmed, and the model be loaded after that."""
    backend = OllamaBackend(url, "qwen3", timeouts=TimeoutsConfig(wake=0.1))
    ollama.hanging = 1
    with pytest.raises(BackendTimeoutError, match=r"loading the model took longer than 0\.1 s"):
        await backend.wake()
    assert await backend.state() is BackendState.ASLEEP
    with pytest.raises(BackendTimeoutError, match="loading the model"):  # it goes on
        await backend.sleep(1)
    ollama.faults["qwen3:latest"] = 10 if ends == "failed" else 0
    ollama.release()
    backend._timeouts = TimeoutsConfig()
    await backend.sleep(1)
    assert ollama.loaded == {}
    assert ollama.asked[-1:] == [("qwen3", 0)]
    await backend.aclose()


async def test_nothing_listens() -> None:
    backend = OllamaBackend(f"http://127.0.0.1:{free_port()}", "qwen3")
    backend._loading = True
    assert await backend.state() is BackendState.UNREACHABLE
    assert vars(backend)["_loading"] is False  # what comes back is another process
    await backend.aclose()


@pytest.mark.parametrize("answer", ["no JSON", "[]", '{"models": "none"}'])
async def test_no_clear_answer_is_no_state(httpx_mock: HTTPXMock, answer: str) -> None:
    httpx_mock.add_response(text=answer)
    backend = OllamaBackend("http://ollama.test", "qwen3")
    with pytest.raises(BackendError, match="GET /api/ps gave no usable answer"):
        await backend.state()
    await backend.aclose()


async def test_no_models_may_be_written_as_null(httpx_mock: HTTPXMock) -> None:
    httpx_mock.add_response(json={"models": None})
    backend = OllamaBackend("http://ollama.test", "qwen3")
    assert await backend.state() is BackendState.ASLEEP
    await backend.aclose()


def test_a_gateway_switches_between_two_models_of_one_ollama(ollama: SimulatedOllama, url: str) -> None:
    models = {
        "small": {"url": url, "server": "ollama", "served_name": "llama3.2:1b"},
        "qwen3": {"url": url, "server": "ollama"},
    }
    app = LLMuxApp({"models": models, "policy": {"name": "fifo", "min_active_duration": 0}})
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=stack.enter_context(serve(app)), timeout=20))
        for model, known_as in (("small", "llama3.2:1b"), ("qwen3", "qwen3"), ("small", "llama3.2:1b")):
            answer = client.post("/v1/chat/completions", json={"model": model, "messages": []})
            assert answer.json()["choices"][0]["message"]["content"] == f"I am {known_as}"
            assert len(ollama.loaded) == 1
    assert ollama.asked == [("llama3.2:1b", -1), ("llama3.2:1b", 0), ("qwen3", -1), ("qwen3", 0), ("llama3.2:1b", -1)]


def test_the_configuration_chooses_it() -> None:
    built = build_backend("m", ModelConfig(url="http://a:1", server="ollama", served_name="n"), sleep_level=1)
    assert isinstance(built, OllamaBackend)
    assert str(built) == "http://a:1 (n)"
