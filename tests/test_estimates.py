"""What sleep and wake are estimated to take: the averages, what is measured and what is not, and the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmux_asgi import (
    BackendError,
    ModelCosts,
    ModelSwitcher,
    PolicyContext,
    PolicyDecision,
    SwitchNow,
    SwitchPolicy,
    load_config,
)
from llmux_asgi._estimates import Estimates
from llmux_asgi._estimates_file import EstimatesFile
from tests.support.clock import Clock, slowly
from tests.support.pool import LIMIT, Pool, running


def test_the_first_measurement_is_the_estimate_and_each_further_one_moves_it_by_three_tenths() -> None:
    estimates = Estimates("ab")
    assert estimates.of("a", 1) == ModelCosts(None, None)
    estimates.sleep_took("a", 1, 10.0)
    estimates.wake_took("a", 1, 4.0)
    assert estimates.of("a", 1) == ModelCosts(10.0, 4.0)
    estimates.sleep_took("a", 1, 0.0)
    assert estimates.of("a", 1) == ModelCosts(7.0, 4.0)
    assert estimates.of("a", 2) == ModelCosts(None, None)


def test_a_seed_counts_as_a_measurement() -> None:
    estimates = Estimates("ab")
    estimates.seed("a", 1, ModelCosts(sleep=10.0))
    estimates.seed("a", 1, ModelCosts(wake=2.0))
    estimates.sleep_took("a", 1, 20.0)
    assert estimates.of("a", 1) == ModelCosts(13.0, 2.0)


def test_a_model_that_was_never_measured_is_as_the_mean_of_the_others() -> None:
    estimates = Estimates("abc")
    levels = {"a": 1, "b": 1, "c": 2}
    assert estimates.sleep_costs(levels) == {}
    estimates.sleep_took("a", 1, 2.0)
    estimates.sleep_took("b", 1, 4.0)
    estimates.sleep_took("c", 1, 100.0)  # not the level that it sleeps at
    assert estimates.sleep_costs(levels) == {"a": 2.0, "b": 4.0, "c": 3.0}
    assert estimates.wake_costs(levels) == {}


def test_what_was_written_down_is_taken_over_by_model_and_level() -> None:
    estimates = Estimates("ab")
    estimates.sleep_took("a", 1, 2.0)
    estimates.wake_took("a", 3, 60.0)
    estimates.wake_took("b", 1, 4.0)
    restored = Estimates("ac")
    restored.seed("a", 1, ModelCosts(9.0, 9.0))
    restored.restore(estimates.dump())
    assert restored.of("a", 1) == ModelCosts(2.0, 9.0)
    assert restored.of("a", 3) == ModelCosts(None, 60.0)
    assert "b" not in json.loads(restored.dump())["costs"]  # there is no such model any more


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"{}",
        b'{"costs": {"a": {"1": {"sleep": -1}}}}',
        b'{"costs": {"a": {"1": {"sleep": NaN}}}}',
        b'{"costs": {"a": {"one": {"sleep": 1}}}}',
        b'{"costs": {"a": {"1": {"sleep": 1}}}',
    ],
)
def test_what_something_else_has_written_is_refused_as_a_whole(data: bytes) -> None:
    estimates = Estimates("a")
    with pytest.raises(ValueError):  # noqa: PT011 - the message is msgspec's
        estimates.restore(data)
    assert estimates.of("a", 1) == ModelCosts()


# Measured in a switch


@pytest.mark.anyio
async def test_sleep_and_wake_are_measured_apart_and_seen_in_the_statistics_and_by_the_policy() -> None:
    clock = Clock()
    seen: list[PolicyContext] = []

    class Watching(SwitchPolicy):
        min_active_duration = 0.0

        def on_pending_request(self, context: PolicyContext) -> PolicyDecision:
            seen.append(context)
            return SwitchNow()

    pool = Pool(Watching(), clock=clock, awake="a")
    slowly(pool, clock, sleep=2.0, wake=5.0, ready=0.5, state=0.25)
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        assert pool.switcher.statistics().costs == dict.fromkeys("abc", ModelCosts())
        (await run.served("b")).finish.set()
        costs = pool.switcher.statistics().costs
        assert costs == {"a": ModelCosts(sleep=2.0), "b": ModelCosts(wake=5.5), "c": ModelCosts()}
        (await run.served("c")).finish.set()
    assert seen[0].switch_cost("a", "b") == 0.0
    assert seen[1].sleep_costs == {"a": 2.0, "b": 2.0, "c": 2.0}
    assert seen[1].wake_costs == {"a": 5.5, "b": 5.5, "c": 5.5}
    assert seen[1].switch_cost("b", "c") == 7.5
    assert seen[1].switch_cost(None, "c") == 5.5


@pytest.mark.anyio
@pytest.mark.parametrize("step", ["sleep", "wake", "ready"])
async def test_a_call_that_fails_is_not_measured_nor_is_its_repetition(step: str) -> None:
    clock = Clock()
    pool = Pool(clock=clock, awake="a")
    slowly(pool, clock, sleep=2.0, wake=5.0)
    pool.backends["a" if step == "sleep" else "b"].fail(step, BackendError("no"))
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        (await run.served("b")).finish.set()
        costs = pool.switcher.statistics().costs
    assert (costs["a"].sleep is None) == (step == "sleep")
    assert (costs["b"].wake is None) == (step != "sleep")


@pytest.mark.anyio
async def test_starting_a_process_is_not_taken_for_waking_it() -> None:
    clock = Clock()
    pool = Pool(clock=clock, stoppable="ab", costs={"a": ModelCosts(wake=1.0), "b": ModelCosts(wake=3.0)})
    pool.backends["a"].die()
    seen: list[float] = []
    slowly(pool, clock, wake=60.0)
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        assert pool.switcher._estimates.of("a", 3).wake == 60.0
        assert pool.switcher.statistics().costs["a"].wake == 1.0
        seen.append(pool.switcher._driver._steps.costs()[1]["a"])
        pool.backends["a"].die()
        await pool.switcher.reconcile()
        seen.append(pool.switcher._driver._steps.costs()[1]["a"])
    assert seen == [1.0, 60.0]


def test_the_configuration_gives_the_first_estimates(tmp_path: Path) -> None:
    config = load_config(
        {
            "models": {
                "a": {"url": "http://x:1", "sleep_level": 2, "costs": {"sleep": 1, "wake": 2}},
                "b": {"url": "http://x:2"},
            },
            "policy": {"estimates": str(tmp_path / "none.json")},
        }
    )
    costs = ModelSwitcher.from_config(config).statistics().costs
    assert costs == {"a": ModelCosts(1.0, 2.0), "b": ModelCosts()}


# The file


def names(folder: Path) -> list[str]:
    return [each.name for each in folder.iterdir()]


@pytest.mark.anyio
async def test_the_estimates_are_kept_over_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "estimates.json"
    clock = Clock()
    pool = Pool(clock=clock, awake="a", estimates=path)
    slowly(pool, clock, sleep=2.0, wake=5.0)
    async with running(pool) as run:
        for model in ("a", "b", "a", "c"):
            (await run.served(model)).finish.set()
    assert path.read_bytes() == pool.switcher._estimates.dump()
    assert names(tmp_path) == ["estimates.json"]
    again = Pool(estimates=path).switcher.statistics().costs
    assert again == pool.switcher.statistics().costs
    assert again["a"] == ModelCosts(2.0, 5.0)


@pytest.mark.anyio
async def test_estimates_that_change_while_they_are_written_are_written_again(tmp_path: Path) -> None:
    path = tmp_path / "estimates.json"
    estimates, file = Estimates("a"), EstimatesFile(path)
    estimates.sleep_took("a", 1, 2.0)
    file.save(estimates)
    estimates.wake_took("a", 1, 5.0)
    file.save(estimates)
    await file.wait(LIMIT)
    again = Estimates("a")
    file.load_into(again)
    assert again.of("a", 1) == ModelCosts(2.0, 5.0)
    assert names(tmp_path) == ["estimates.json"]


def test_a_broken_file_is_a_warning_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "estimates.json"
    path.write_text("{")
    costs = Pool(estimates=path, costs={"a": ModelCosts(sleep=1.0)}).switcher.statistics().costs
    assert costs["a"] == ModelCosts(sleep=1.0)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith(f"the estimates in {path} are ignored: ")


@pytest.mark.anyio
async def test_a_file_that_cannot_be_written_is_one_warning_and_switches_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "estimates.json"
    pool = Pool(estimates=path, awake="a")
    path.mkdir()
    async with running(pool) as run:
        for model in ("a", "b", "a"):
            (await run.served(model)).finish.set()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"cannot be written to {path}" in caplog.text
    assert names(tmp_path) == ["estimates.json"]
