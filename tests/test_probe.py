"""The probe after a wake, against a simulated server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest

from llmux_asgi import BackendError, BackendState, VLLMBackend, WarmUpConfig
from llmux_asgi.backends import ProbedBackend
from llmux_asgi.sim import SimProcess, start_sim

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def sim() -> Iterator[SimProcess]:
    with start_sim("m", tokens_per_second=0, sleep_seconds=0, wake_seconds=0) as process:
        yield process


def probed(sim: SimProcess, kind: Literal["token", "fingerprint"]) -> ProbedBackend:
    sim.clear_faults()
    return ProbedBackend(VLLMBackend(sim.url), sim.url, "m", kind)


async def wake(backend: ProbedBackend) -> None:
    await backend.wake()
    await backend.ready()


async def test_one_token_is_asked_for_after_each_wake(sim: SimProcess) -> None:
    backend = probed(sim, "token")
    await backend.sleep(1)
    before = sim.state().tokens
    await wake(backend)
    assert sim.state().tokens == before + 1
    assert await backend.state() is BackendState.AWAKE
    await backend.aclose()


async def test_a_model_that_does_not_answer_is_not_ready(sim: SimProcess) -> None:
    backend = probed(sim, "token")
    await backend.sleep(1)
    sim.add_faults("request:1:fail")
    with pytest.raises(BackendError, match="POST /v1/completions answered 500"):
        await wake(backend)
    await wake(backend)
    await backend.aclose()


async def test_lost_weights_are_read_again_by_the_next_wake(sim: SimProcess) -> None:
    backend = probed(sim, "fingerprint")
    await backend.sleep(1)  # the fingerprint is taken before
    await wake(backend)
    another = VLLMBackend(sim.url)
    await another.sleep(2)
    await another._client.post("/wake_up")  # without the weights, as a server does that is woken wrongly
    assert not sim.state().weights_valid
    await backend.sleep(1)
    with pytest.raises(BackendError, match=r"its weights have not come back\. It said '.*' instead of '.*'\."):
        await wake(backend)
    assert await backend.state() is BackendState.ASLEEP
    await wake(backend)
    assert sim.state().weights_valid
    await backend.aclose()
    await another.aclose()


async def test_without_a_reference_the_first_answer_is_it(sim: SimProcess) -> None:
    backend = probed(sim, "fingerprint")
    await VLLMBackend(sim.url).sleep(1)
    await wake(backend)
    await backend.sleep(1)
    await wake(backend)
    await backend.aclose()


async def test_what_is_in_no_state_to_be_asked_before_it_sleeps_is_put_to_sleep_all_the_same(
    sim: SimProcess, caplog: pytest.LogCaptureFixture
) -> None:
    backend = probed(sim, "fingerprint")
    sim.add_faults("request:1:fail")
    await backend.sleep(1)
    assert "no fingerprint was taken of 'm'" in caplog.text
    assert await backend.state() is BackendState.ASLEEP
    await wake(backend)
    await backend.aclose()


async def test_an_answer_that_is_no_completion_says_so(sim: SimProcess) -> None:
    backend = ProbedBackend(VLLMBackend(sim.url), sim.url, "another", "token")
    with pytest.raises(BackendError, match="A probe needs a model that serves /v1/completions"):
        await backend.ready()
    await backend.aclose()


def warmed(sim: SimProcess, warm_up: WarmUpConfig, kind: Literal["none", "token"] = "none") -> ProbedBackend:
    sim.clear_faults()
    return ProbedBackend(VLLMBackend(sim.url), sim.url, "m", kind, warm_up=warm_up)


@pytest.mark.parametrize(("kind", "tokens"), [("none", 1), ("token", 2)])
async def test_a_model_is_warmed_up_after_each_wake_and_after_the_probe(
    sim: SimProcess, kind: Literal["none", "token"], tokens: int
) -> None:
    backend = warmed(sim, WarmUpConfig(), kind)
    await backend.sleep(1)
    before = sim.state().tokens
    await wake(backend)
    assert sim.state().tokens == before + tokens
    await backend.aclose()


async def test_a_warm_up_may_be_any_request(sim: SimProcess) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "ignore_eos": True}
    backend = warmed(sim, WarmUpConfig(path="/v1/chat/completions", body=body))
    before = sim.state().tokens
    await wake(backend)
    assert sim.state().tokens == before + 5
    await backend.aclose()


@pytest.mark.parametrize(
    ("warm_up", "fault", "says"),
    [
        (WarmUpConfig(), "request:1:fail", "answered 500"),
        (WarmUpConfig(path="/v1/nothing", body={"x": 1}), None, "answered 404"),
        (WarmUpConfig(body={"model": "another", "prompt": "x"}), None, "answered 404"),
    ],
)
async def test_a_warm_up_that_fails_is_logged_and_the_model_serves(
    sim: SimProcess, caplog: pytest.LogCaptureFixture, warm_up: WarmUpConfig, fault: str | None, says: str
) -> None:
    backend = warmed(sim, warm_up)
    if fault is not None:
        sim.add_faults(fault)
    await wake(backend)
    assert "the warm-up of 'm' failed" in caplog.text
    assert says in caplog.text
    await backend.aclose()
