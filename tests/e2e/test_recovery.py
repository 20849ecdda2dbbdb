"""The switcher over three simulated servers that share a GPU, some of whose steps go wrong. On asyncio and on trio."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import httpx
import msgspec
import pytest

from llmux_asgi import FifoPolicy, LLMuxError, ModelSwitcher, TimeoutsConfig, VLLMBackend
from llmux_asgi.sim import GpuLedger, SimOptions, SimProcess, start_sims

pytestmark = pytest.mark.anyio


@dataclass(frozen=True)
class Trio:
    """Three servers on one GPU."""

    sims: dict[str, SimProcess]
    ledger: GpuLedger


@contextmanager
def three_servers(path: Path) -> Iterator[Trio]:
    model = SimOptions(
        name="any", gpu=str(path), start_asleep=1, sleep_seconds=0.002, wake_seconds=0.002, wake_l2_seconds=0.002
    )
    with start_sims(*(msgspec.structs.replace(model, name=name) for name in "abc")) as sims:
        yield Trio({sim.name: sim for sim in sims}, GpuLedger(path))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    with three_servers(tmp_path_factory.mktemp("gpu") / "gpu") as servers:
        yield servers


def put_to_sleep(servers: Trio, level: int) -> None:
    """Have all asleep at `level` and whole, whatever was done to them before."""
    reload = {"method": "reload_weights"}
    with httpx.Client(timeout=10) as client:
        for sim in servers.sims.values():
            sim.clear_faults()
            client.post(f"{sim.url}/sleep").raise_for_status()
        for sim in servers.sims.values():
            for call, body in (("/wake_up", None), ("/collective_rpc", reload), (f"/sleep?level={level}", None)):
                client.post(sim.url + call, json=body).raise_for_status()


async def text_from(sim: SimProcess, client: httpx.AsyncClient) -> str:
    body = {"model": sim.name, "prompt": "who are you?", "max_tokens": 8}
    response = await client.post(f"{sim.url}/v1/completions", json=body)
    return str(response.raise_for_status().json()["choices"][0]["text"])


async def take_turns(servers: Trio, turns: str, level: int, timeouts: dict[str, float]) -> dict[str, list[str]]:
    """Ask the models one after the other through a new switcher; return what each answered, "" for an error."""
    backends = {name: VLLMBackend(sim.url, timeouts=TimeoutsConfig(**timeouts)) for name, sim in servers.sims.items()}
    switcher = ModelSwitcher(backends, FifoPolicy(min_active_duration=0, sleep_level=level), backoff=(0.0, 0.0))
    answers: dict[str, list[str]] = {name: [] for name in servers.sims}
    seen = len(servers.ledger.events())
    with anyio.fail_after(30):
        async with httpx.AsyncClient(timeout=10) as client:
            for name in turns:
                try:
                    async with switcher.lease(name):
                        answers[name].append(await text_from(servers.sims[name], client))
                except LLMuxError:
                    answers[name].append("")
        await switcher.aclose()
    events = servers.ledger.events()[seen:]
    assert max(len(event.awake) for event in events) <= 1
    assert not [event for event in events if event.event == "request_while_asleep"]
    return answers


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("level", "faults", "timeouts", "errors"),
    [
        (1, "wake:1:oom", {}, [0]),  # weights on the GPU, no KV cache: it says that it sleeps, and its /sleep frees nothing
        (1, "wake:1:oom wake:2:oom", {}, [1]),
        (1, "wake:1:fail", {}, [0]),
        (1, "wake:1:fail wake:2:fail", {}, [1]),
        (1, "wake:1:delay=1", {"wake": 0.5}, [1]),  # awake after all, when nobody waits for it any more
        (2, "reload:1:fail", {}, [0]),  # weights on the GPU, and nothing in them
        (2, "reload:1:fail reload:2:fail", {}, [1]),
        (2, "wake:2:oom", {}, [0]),
        (2, "wake:1:oom wake:2:oom", {}, [1]),
        (1, "sleep:1:delay=1", {"sleep": 0.5}, [0]),  # asleep after all, as it says itself
        (1, "sleep:1:delay=2.5", {"sleep": 1.7, "probe": 0.7}, [0]),  # ... in time for the second call
        (1, "sleep:1:delay=1.5", {"sleep": 0.5, "probe": 0.4}, range(1, 9)),  # ... when it can say so again
        (1, "sleep:1:hang", {"sleep": 0.5}, [0]),
        (1, "sleep:1:hang sleep:2:hang", {"sleep": 0.5}, [1]),
        (1, "sleep:1:fail", {}, [0]),
        (1, "sleep:1:fail sleep:2:fail", {}, [1]),
        (1, "is_sleeping:1:fail", {}, [0]),
    ],
)
async def test_a_fault_costs_a_request_at_most_and_nothing_else(
    shared: Trio, level: int, faults: str, timeouts: dict[str, float], errors: Collection[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Never two models in memory, no request on a sleeper, no garbage, and all three answer again."""
    put_to_sleep(shared, level)
    shared.sims["b"].add_faults(*faults.split())
    answers = await take_turns(shared, "abcabcbacbcab", level, timeouts)
    assert caplog.records, "the fault did not strike"
    # A model always says the same; garbage would be something else.
    assert {name: len(set(texts) - {""}) for name, texts in answers.items()} == {"a": 1, "b": 1, "c": 1}
    assert sum(texts.count("") for texts in answers.values()) in errors
    assert all(texts[-2:].count("") == 0 for texts in answers.values())


async def test_a_server_that_dies_while_it_is_put_to_sleep_costs_its_own_requests_only(tmp_path: Path) -> None:
    with three_servers(tmp_path / "gpu") as servers:
        servers.sims["b"].add_faults("sleep:1:die")
        answers = await take_turns(servers, "abcabc", 1, {})
    assert [name for name, texts in answers.items() if "" in texts] == ["b"]
    assert answers["b"][0] != ""
