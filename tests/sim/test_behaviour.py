"""What only the simulated server can show: memory that is really gone, and vLLM's older versions."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest

from llmux_asgi.sim import GpuLedger, SimOptions, start_sim, start_sims
from llmux_asgi.sim.text import detokenize, tokenize
from llmux_asgi.sim.version import Behaviour
from tests.contract.driver import Driver
from tests.support.eventually import eventually


def test_text_depends_on_the_model_and_the_prompt_alone() -> None:
    with (
        start_sims(SimOptions(name="a"), SimOptions(name="a"), SimOptions(name="b")) as sims,
        Driver(sims[0].url, "a") as one,
        Driver(sims[1].url, "a") as same,
        Driver(sims[2].url, "b") as other,
    ):
        assert one.complete() == one.complete() == same.complete() != other.complete()
        assert one.complete(20).startswith(one.complete(5))


def test_level_2_without_reload_gives_garbage_until_reloaded() -> None:
    with start_sim("a") as sim, Driver(sim.url, "a") as vllm:
        good = vllm.complete()
        vllm.sleep("level=2")
        assert vllm.reload_weights().status_code == 500  # no memory to load them into
    with start_sim("a") as sim, Driver(sim.url, "a") as vllm:
        vllm.sleep("level=2")
        vllm.wake()
        garbage = vllm.complete()
        assert garbage == vllm.complete() != good
        vllm.sleep("level=1")  # level 1 keeps what there is
        vllm.wake()
        assert vllm.complete() == garbage
        assert vllm.reload_weights().json() == {"results": [None]}
        assert vllm.complete() == good


def test_dummy_weights_cannot_be_reloaded() -> None:
    with start_sim("a", dummy_weights=True) as sim, Driver(sim.url, "a") as vllm:
        vllm.sleep("level=2")
        vllm.wake("weights")
        assert vllm.reload_weights().status_code == 500
        assert vllm.wake("kv_cache").json()["status"] == "awake"
        assert not sim.state().weights_valid


def test_a_request_after_resume_kills_the_sleeping_engine() -> None:
    with start_sim("a", start_asleep=1, crash_seconds=0.1) as sim, Driver(sim.url, "a") as vllm:
        vllm.post("/resume")
        assert vllm.is_sleeping()
        assert vllm.post("/v1/completions", vllm.payload(3)).status_code == 500
        assert sim.wait() == 1


def test_without_dev_mode_there_are_no_control_routes() -> None:
    with start_sim("a", dev_mode=False) as sim, Driver(sim.url, "a") as vllm:
        paths = ["/sleep", "/wake_up", "/collective_rpc", "/reset_prefix_cache", "/pause", "/resume"]
        assert {vllm.post(path).status_code for path in paths} == {404}
        assert vllm.get("/is_sleeping").status_code == 404
        assert "/sleep" not in vllm.get("/openapi.json").json()["paths"]
        assert vllm.complete()


def test_versions_have_their_traits() -> None:
    traits = {version: Behaviour.of(version) for version in ("0.13.0", "0.14.1", "0.16.0", "0.17.0", "0.23.9", "0.24.0")}
    assert [v for v, t in traits.items() if not t.frees_weights] == ["0.14.1", "0.16.0"]
    assert [v for v, t in traits.items() if not t.has_modes] == ["0.13.0", "0.14.1", "0.16.0"]
    assert [v for v, t in traits.items() if not t.partial_wake_resumes] == ["0.24.0"]
    assert not Behaviour.of("0.31.0").sleep_answers_json
    assert Behaviour.of("1.0.0").sleep_answers_json


def test_before_0_32_sleep_answers_nothing() -> None:
    with start_sim("a", version="0.31.1") as sim, Driver(sim.url, "a") as vllm:
        for answer in (vllm.sleep(), vllm.wake()):
            assert (answer.status_code, answer.content) == (200, b"")


def test_before_0_17_modes_are_ignored_and_a_request_kills_the_sleeper(tmp_path: object) -> None:
    gpu = f"{tmp_path}/gpu"
    with start_sim("a", version="0.16.0", crash_seconds=0.1, gpu=gpu) as sim, Driver(sim.url, "a") as vllm:
        parameters = vllm.get("/openapi.json").json()["paths"]["/sleep"]["post"].get("parameters", [])
        assert "mode" not in [p["name"] for p in parameters]
        stream = vllm.stream()
        assert stream.wait_for_events(3)
        vllm.sleep("mode=keep")
        assert stream.end().finish_reason == "abort"
        assert sim.state().memory_mib == 12288  # the weights stay
        assert vllm.post("/v1/completions", vllm.payload(3)).status_code == 500
        assert sim.wait() == 1
        assert "crash" in [event.event for event in GpuLedger(gpu).events()]


def test_up_to_0_23_a_partial_wake_lets_requests_hit_missing_memory() -> None:
    with start_sim("a", version="0.23.0", crash_seconds=0.1) as sim, Driver(sim.url, "a") as vllm:
        vllm.sleep()
        vllm.wake("weights")
        assert vllm.post("/v1/completions", vllm.payload(3)).status_code == 500
        assert sim.wait() == 1


def test_times_are_as_set() -> None:
    seconds = {"sleep_seconds": 0.2, "wake_seconds": 0.1, "sleep_l2_seconds": 0.05, "wake_l2_seconds": 0.3}
    with start_sim("a", **seconds) as sim, Driver(sim.url, "a") as vllm:
        vllm.is_sleeping()
        taken = []
        steps: list[Callable[[], object]] = [
            vllm.sleep,
            vllm.wake,
            lambda: vllm.sleep("level=2"),
            vllm.wake,
            vllm.reload_weights,
        ]
        for step in steps:
            start = time.monotonic()
            step()
            taken.append(time.monotonic() - start)
        assert all(t >= at_least for t, at_least in zip(taken, (0.2, 0.1, 0.05, 0, 0.3), strict=True))


def test_while_the_executor_is_busy_is_sleeping_does_not_answer() -> None:
    with start_sim("a", sleep_seconds=1.0) as sim, Driver(sim.url, "a") as vllm:
        call = vllm.post_later("/sleep")
        eventually("it goes to sleep", lambda: sim.state().pause == "paused_new")
        with pytest.raises(httpx.ReadTimeout):
            vllm.client.get("/is_sleeping", timeout=0.2)
        assert vllm.get("/health").status_code == 200
        assert call.response().status_code == 200
        assert vllm.is_sleeping()


def test_requests_beyond_max_num_seqs_wait() -> None:
    with start_sim("a", max_num_seqs=1, tokens_per_second=100) as sim, Driver(sim.url, "a") as vllm:
        streams = [vllm.stream(max_tokens=20) for _ in range(3)]
        eventually("one runs, two wait", lambda: (sim.state().running, sim.state().waiting) == (1, 2))
        assert vllm.metric("vllm:num_requests_waiting") == 2
        assert {stream.end().completion_tokens for stream in streams} == {20}


def test_embeddings_scores_and_ranks_are_answered_and_deterministic() -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/embeddings": {"input": ["x", "y"]},
        "/pooling": {"input": "x"},
        "/classify": {"input": "x"},
        "/score": {"text_1": "x", "text_2": ["y", "z"]},
        "/rerank": {"query": "x", "documents": ["y", "z"]},
        "/v1/rerank": {"query": "x", "documents": ["y", "z"]},
        "/v2/rerank": {"query": "x", "documents": ["y", "z"]},
    }
    with start_sim("a") as sim, Driver(sim.url, "a") as vllm:
        for path, body in bodies.items():
            first, second = (vllm.post(path, {"model": "a", **body}).json() for _ in range(2))
            results = first.get("data") or first["results"]
            assert results == (second.get("data") or second["results"])
            assert len(results) == (1 if body.get("input") == "x" else 2)
            assert vllm.post(path, {"model": "b", **body}).status_code == 404


def test_tokens_of_any_text_turn_back() -> None:
    assert detokenize(tokenize("naïve 模型 🦙")) == "naïve 模型 🦙"


def test_five_hundred_streams_at_once_all_end_whole() -> None:
    async def one(client: httpx.AsyncClient) -> int:
        payload = {"model": "a", "prompt": "x", "max_tokens": 10, "stream": True}
        response = await client.post("/v1/completions", json=payload)
        return response.text.count("data: ")

    async def all_of_them(url: str) -> list[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60, trust_env=False) as client:
            return await asyncio.gather(*[one(client) for _ in range(500)])

    with start_sim("a", tokens_per_second=20) as sim:
        assert set(asyncio.run(all_of_them(sim.url))) == {11}
        assert sim.state().completed == 500


def test_a_server_ends_when_its_parent_has_gone() -> None:
    options = msgspec.json.encode(SimOptions(name="a", exit_with_stdin=True)).decode()
    command = [sys.executable, "-m", "llmux_asgi.sim", options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert b"ready on http://127.0.0.1:" in process.stdout.readline()
        process.stdin.close()
        assert process.wait(10) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "a", "--fault", "x"], "must be WHAT:NTH:ACTION"),
        (["--name", "a", "--version", "new"], "version: must look like 0.32.0"),
        (["--name", "a", "--port", "-1"], "port: must not be negative"),
        (["--name", "a", "--host", "no.such.host.invalid"], "sim-vllm a: "),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(arguments: list[str], message: str) -> None:
    code = "from llmux_asgi.cli import main; main()"
    command = [sys.executable, "-c", code, "sim-vllm", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode != 0
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_command_runs_a_server_and_prints_the_schema() -> None:
    code = "from llmux_asgi.cli import main; main()"
    schema = subprocess.run([sys.executable, "-c", code, "schema"], capture_output=True, check=True)
    assert "$schema" in msgspec.json.decode(schema.stdout)
    command = [sys.executable, "-c", code, "sim-vllm", "--name", "a", "--no-dev-mode", "--tokens-per-second", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        url = process.stdout.readline().decode().split()[-1]
        with Driver(url, "a") as vllm:
            assert vllm.stream(max_tokens=300).end().completion_tokens == 300
            assert vllm.post("/sleep").status_code == 404
        process.terminate()
        process.wait(10)


def test_without_its_extra_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; from llmux_asgi.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install '.[cli]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
