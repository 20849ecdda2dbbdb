"""`llmux-asgi validate`: cycles that are well pass, each kind of failure is told, and the server is left as it was found."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from typer.testing import CliRunner

from llmux_asgi import load_config
from llmux_asgi.backends import VLLMBackend
from llmux_asgi.cli import _cycles, _validate, app
from llmux_asgi.sim import GpuLedger, SimOptions, SimProcess, start_sims


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("validate") / "gpu"


@pytest.fixture(scope="module")
def module_sims(gpu: Path) -> Iterator[list[SimProcess]]:
    quick: dict[str, Any] = {
        "gpu": str(gpu),
        "sleep_seconds": 0.0,
        "sleep_l2_seconds": 0.0,
        "wake_seconds": 0.0,
        "wake_l2_seconds": 0.0,
        "tokens_per_second": 0.0,
    }
    asleep = SimOptions(name="b", start_asleep=1, **quick)
    with start_sims(SimOptions(name="a", **quick), asleep) as started:
        yield started


@pytest.fixture
def sims(module_sims: list[SimProcess], gpu: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, SimProcess]]:
    """Two servers on one simulated GPU, whose memory is read: a is awake, b asleep, before each test and after it."""
    monkeypatch.setattr(_validate, "_gauge", lambda config: GpuLedger(gpu))
    a, b = module_sims
    yield {"a": a, "b": b}
    for sim in (a, b):
        sim.clear_faults()
    assert (a.state().awake, a.state().weights_valid) == (True, True)
    assert (b.state().awake, b.state().level) == (False, 1)


@pytest.fixture
def config(sims: dict[str, SimProcess], tmp_path: Path) -> Path:
    path = tmp_path / "llmux.json"
    models = {name: {"url": sim.url, "timeouts": {"sleep": 1, "wake": 1}} for name, sim in sims.items()}
    models["a"]["aliases"] = ["gpt"]
    path.write_text(json.dumps({"models": models, "memory": {"settle": 0.1}}))
    return path


def validated(*arguments: object) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, ["validate", *map(str, arguments), "--yes", "--json"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, json.loads(result.stdout)


def test_cycles_that_are_well_pass_by_level_with_times_and_memory(config: Path) -> None:
    status, told = validated("gpt", "--config", config, "--cycles", 2)
    assert (status, told["passed"], told["error"]) == (0, True, None)
    assert [(each["level"], each["cycle"]) for each in told["cycles"]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for each in told["cycles"]:
        assert each["same_answer"] is True
        assert each["memory_awake"] == 12288 + 8192
        assert each["memory_asleep"] == 0
        assert 0 < each["sleep"] < 1
        assert 0 < each["wake"] < 1


@pytest.mark.parametrize(
    ("fault", "reason", "cycles"),
    [
        ("sleep:1:fail", "answered 500", 1),
        ("sleep:1:lie", "still awake", 1),
        ("sleep:1:leak", "frees nothing", 1),
        ("wake:2:fail", "answered 500", 2),
        ("reload:1:fail", "answered 500", 3),
        ("request:3:fail", "answered 500", 2),
    ],
)
def test_a_failure_ends_the_cycles_and_is_told(
    fault: str, reason: str, cycles: int, config: Path, sims: dict[str, SimProcess]
) -> None:
    sims["a"].add_faults(fault)
    status, told = validated("a", "--config", config)
    assert (status, told["passed"], len(told["cycles"])) == (1, False, cycles)
    assert reason in told["cycles"][-1]["error"]
    assert (told["found"], told["left"]) == ("awake", "awake")


def test_a_name_that_the_server_does_not_know_is_told(sims: dict[str, SimProcess], tmp_path: Path) -> None:
    path = tmp_path / "llmux.json"
    path.write_text(json.dumps({"models": {"a": {"url": sims["a"].url, "served_name": "other"}}}))
    status, told = validated("a", "--config", path)
    assert (status, told["left"]) == (1, "awake")
    assert "answered 404. Does it know the model as 'other'" in told["cycles"][0]["error"]


def test_a_model_that_has_lost_its_weights_does_not_pass_and_gets_them_back(
    config: Path, sims: dict[str, SimProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    reload = VLLMBackend._wake_from_level_2
    calls: list[int] = []

    async def forgetful(self: VLLMBackend) -> None:
        calls.append(1)
        await (self._step("/wake_up") if len(calls) == 1 else reload(self))

    monkeypatch.setattr(VLLMBackend, "_wake_from_level_2", forgetful)
    status, told = validated("a", "--config", config, "--level", 2)
    assert (status, len(told["cycles"])) == (1, 1)
    assert told["cycles"][0]["same_answer"] is False
    assert "weights have not come back" in told["cycles"][0]["error"]
    assert (told["left"], told["error"]) == ("awake", None)


def test_a_sleeper_is_not_woken_beside_another_model(config: Path, sims: dict[str, SimProcess]) -> None:
    wakes = sims["b"].state().wakes
    status, told = validated("b", "--config", config)
    assert (status, told["cycles"], sims["b"].state().wakes) == (1, [], wakes)
    assert told["error"].startswith("a may be in the GPU's memory")


def test_a_sleeper_is_woken_and_put_to_sleep_again(config: Path, sims: dict[str, SimProcess], tmp_path: Path) -> None:
    alone = tmp_path / "alone.json"
    models = {"b": {"url": sims["b"].url}}
    alone.write_text(json.dumps({"models": models}))
    sims["a"]._call("POST", "/sleep")
    status, told = validated("b", "--config", alone, "--level", 1, "--cycles", 1)
    sims["a"]._call("POST", "/wake_up")
    assert (status, told["found"], told["left"]) == (0, "asleep", "asleep")


@pytest.mark.anyio
async def test_a_server_is_left_as_it_was_found_when_the_command_is_interrupted(sims: dict[str, SimProcess]) -> None:
    asleep: list[bool] = []
    with anyio.CancelScope() as scope:

        def begun(step: str) -> None:
            if step.endswith("waking it"):
                asleep.append(not sims["a"].state().awake)
                scope.cancel()

        config = load_config({"models": {"a": {"url": sims["a"].url}}})
        await _cycles.validate_model(config, "a", [1], 1, None, begun)
    assert scope.cancelled_caught
    assert asleep == [True]
    assert sims["a"].state().awake


def test_nothing_is_done_unless_it_is_agreed_to(config: Path, sims: dict[str, SimProcess]) -> None:
    sleeps = sims["a"].state().sleeps
    result = CliRunner().invoke(app, ["validate", "a", "--config", str(config)], input="n\n")
    assert result.exit_code == 2
    assert "will not answer meanwhile" in result.stderr
    assert result.stdout.strip() == "n"  # the echo of the answer, nothing else
    assert sims["a"].state().sleeps == sleeps
    for arguments in (
        ["nobody", "--config", str(config)],
        ["a", "--config", str(config), "--level", "3"],
        ["a", "--config", "x"],
    ):
        assert CliRunner().invoke(app, ["validate", *arguments, "--yes"]).exit_code == 2


def test_a_server_that_the_gateway_starts_is_started_and_ended(sims: dict[str, SimProcess], tmp_path: Path) -> None:
    path = tmp_path / "llmux.json"
    command = [sys.executable, "-c", "from llmux_asgi.cli import main; main()", "sim-vllm", "--name", "c", "--port", "{port}"]
    path.write_text(json.dumps({"models": {"c": {"command": command}}, "memory": {"settle": 0.01}}))
    status, told = validated("c", "--config", path, "--level", 1, "--cycles", 1)
    assert told["cycles"][0]["sleep"] is not None, told
    assert (told["found"], told["left"]) == ("stopped", "stopped")
    assert status == 1  # it is on no GPU: nothing is freed


def test_the_command_prints_a_table(config: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from llmux_asgi.cli import main; main()",
        "validate",
        "a",
        "--config",
        str(config),
        "--yes",
    ]
    done = subprocess.run([*command, "--cycles", "1"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.strip()]
    assert lines[0] == ["level", "cycle", "sleep", "wake", "same", "answer"]
    assert [line[0] for line in lines[2:4]] == ["1", "2"]
    assert done.stdout.splitlines()[-1] == "a: passed; found awake, left awake"
    assert done.stderr == ""
