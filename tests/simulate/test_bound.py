"""The lower bounds against brute force: every schedule of a small load is tried."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from functools import cache

import pytest

from llmux_asgi import FifoPolicy, GatedQuantumPolicy, ModelCosts, PressurePolicy, SwitchPolicy, ThroughputPolicy
from llmux_asgi.simulate import Arrival, Script, Workload, lower_bound, relaxation, simulate
from llmux_asgi.simulate.bound import two_model_cost
from llmux_asgi.simulate.relaxation import relaxed_cost

Arrivals = dict[str, list[float]]


def brute_force(
    arrivals: Arrivals,
    costs: Mapping[str, ModelCosts],
    active: str | None,
    *,
    holds: Arrivals | None = None,
    anticipating: bool,
) -> float:
    """The least sum of waits over all schedules whose switches begin at whole seconds; all times are whole seconds.

    A schedule is followed second by second: stay, or leave for another model, as soon as those are answered who had waited for
    the present one. With all times whole no other ones are better.
    """
    models = tuple(arrivals)
    last = int(max((max(times, default=0.0) for times in arrivals.values()), default=0.0))
    longest = int(max((max(times, default=0.0) for times in (holds or {}).values()), default=0.0))
    end = last + 1 + len(models) * (longest + int(max((c.sleep or 0) + (c.wake or 0) for c in costs.values())))

    def wanted(model: str, left: int, now: int) -> bool:
        return anticipating or any(left < time <= now for time in arrivals[model])

    @cache
    def least(now: int, serving: str | None, until: int, left: tuple[int, ...]) -> float:
        """From `now` on; `serving` is not left before `until`; `left`: when each of the others was left."""
        away = dict(zip(models, left, strict=True))
        if not any(time > away[model] for model in models if model != serving for time in arrivals[model]):
            return 0.0
        if now > end:
            return math.inf
        best = least(now + 1, serving, until, left)
        for target in models if now >= until else ():
            if target != serving and wanted(target, away[target], now):
                sleep = costs[serving].sleep or 0.0 if serving is not None else 0.0
                back = int(now + sleep + (costs[target].wake or 0.0))
                after = tuple(now if model == serving else away[model] for model in models)
                held = holds[target] if holds is not None else [0.0] * len(arrivals[target])
                waiting = [each for each in zip(arrivals[target], held, strict=True) if away[target] < each[0] <= back]
                free = back + int(max((hold for _, hold in waiting), default=0.0))
                best = min(best, sum(back - time for time, _ in waiting) + least(back, target, free, after))
        return best

    return least(0, active, 0, (-1,) * len(models))


def small(seed: int, models: str) -> tuple[Arrivals, dict[str, ModelCosts], str | None]:
    rng = random.Random(seed)
    arrivals: Arrivals = {model: [] for model in models}
    for _ in range(rng.randint(2, 9)):
        arrivals[rng.choice(models)].append(float(rng.randint(0, 14)))
    costs = {model: ModelCosts(float(rng.randint(0, 2)), float(rng.randint(1, 4))) for model in models}
    return arrivals, costs, rng.choice([None, models[0]])


@pytest.mark.no_cover
@pytest.mark.parametrize("anticipating", [True, False])
@pytest.mark.parametrize("models", ["ab", "a"])
def test_the_programme_for_two_models_is_exact_but_for_the_grid(models: str, anticipating: bool) -> None:
    positive = 0
    for seed in range(60):
        arrivals, costs, active = small(seed, models)
        exact = brute_force(arrivals, costs, active, anticipating=anticipating)
        bound = two_model_cost(arrivals, costs, active, anticipating=anticipating, slots=1000)
        count = sum(map(len, arrivals.values()))
        assert bound <= exact + 1e-9, seed
        # Each wait may be short by a slot, of 0.02 s at most; without anticipation a request of the slot in which a model was
        # left may count as one that waits for it.
        if anticipating:
            assert bound >= exact - 0.02 * count, seed
        positive += bound > 0
    assert positive > 8


@pytest.mark.no_cover
def test_without_anticipation_the_programme_is_mostly_exact_too() -> None:
    ratios = []
    for seed in range(60):
        arrivals, costs, active = small(seed, "ab")
        if exact := brute_force(arrivals, costs, active, anticipating=False):
            ratios.append(two_model_cost(arrivals, costs, active, anticipating=False, slots=1000) / exact)
    assert sum(ratio > 0.98 for ratio in ratios) > 0.85 * len(ratios)


@pytest.mark.no_cover
@pytest.mark.parametrize("anticipating", [True, False])
@pytest.mark.parametrize("models", ["ab", "abc"])
def test_a_part_of_the_drain_is_counted(models: str, anticipating: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaxation, "_ROUNDS", 20)
    gains = 0
    for seed in range(40) if models == "ab" else (2, 3, 4):
        arrivals, costs, active = small(seed, models)
        rng = random.Random(seed)
        holds = {model: [float(rng.randint(0, 7)) for _ in times] for model, times in arrivals.items()}
        if seed % 2:  # short absences, before which others were served
            costs = dict.fromkeys(models, ModelCosts(0.0, 1.0))
        exact = brute_force(arrivals, costs, active, holds=holds, anticipating=anticipating)
        if models == "ab":
            bound = two_model_cost(arrivals, costs, active, holds=holds, anticipating=anticipating, slots=1000)
            without = two_model_cost(arrivals, costs, active, anticipating=anticipating, slots=1000)
        else:
            bound = relaxed_cost(arrivals, costs, active, holds=holds, anticipating=anticipating, slots=100)
            without = relaxed_cost(arrivals, costs, active, anticipating=anticipating, slots=100)
        assert bound <= exact + 1e-9, seed
        gains += bound > without + 0.5
    assert gains > (3 if models == "ab" else 0)


@pytest.mark.parametrize("anticipating", [True, False])
@pytest.mark.parametrize("models", ["ab", "abc"])
def test_the_relaxation_is_a_bound_and_not_an_idle_one(models: str, anticipating: bool) -> None:
    ratios = []
    for seed in range(10 if models == "ab" else 4):
        arrivals, costs, active = small(seed, models)
        exact = brute_force(arrivals, costs, active, anticipating=anticipating)
        bound = relaxed_cost(arrivals, costs, active, anticipating=anticipating, slots=100)
        assert bound <= exact + 1e-9, seed
        if exact:
            ratios.append(bound / exact)
    assert sum(ratios) / len(ratios) > 0.6


def load(arrivals: Arrivals) -> Workload:
    return Workload("load", [Script([[Arrival(time, model, 0.0) for model, times in arrivals.items() for time in times]])])


@pytest.mark.no_cover
def test_of_three_models_the_better_of_two_bounds_is_taken_and_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaxation, "_ROUNDS", 8)
    for seed in range(4):
        arrivals, costs, active = small(seed, "abc")
        bound = lower_bound(load(arrivals), costs, active=active)
        count = sum(map(len, arrivals.values()))
        assert bound is not None
        assert bound.clairvoyant * count <= brute_force(arrivals, costs, active, anticipating=True) + 1e-9, seed
        assert bound.non_anticipating * count <= brute_force(arrivals, costs, active, anticipating=False) + 1e-9, seed


@pytest.mark.no_cover
@pytest.mark.parametrize(("models", "rates"), [("ab", (0.05, 2.0)), ("abc", (0.5,))])
def test_no_policy_is_better_than_the_bound(models: str, rates: Sequence[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaxation, "_ROUNDS", 8)
    rng = random.Random(5)
    costs = {model: ModelCosts(rng.uniform(0.5, 2), rng.uniform(0.5, 5)) for model in models}
    policies: list[SwitchPolicy] = [
        FifoPolicy(request_timeout=None, min_active_duration=0),
        GatedQuantumPolicy(request_timeout=None, linger=0.0, quantum=1.0),
        PressurePolicy(request_timeout=None),
        ThroughputPolicy(request_timeout=None, linger=0.0),
    ]
    for rate in rates:
        times = [rng.expovariate(rate) for _ in range(60)]
        longest = rng.choice([0.5, 9.0])
        services = [rng.uniform(0, longest) for _ in times]
        arrivals = [Arrival(sum(times[: index + 1]), rng.choice(models), services[index]) for index in range(60)]
        workload = Workload("load", [Script([arrivals])])
        for active in (None, "b"):
            bound = lower_bound(workload, costs, active=active)
            assert bound is not None
            assert bound.non_anticipating > 0
            for policy in policies:
                waited = simulate(workload, policy, costs, active=active, seeds=costs).figures().mean_wait
                assert waited >= bound.non_anticipating >= bound.clairvoyant


def test_a_closed_load_has_no_bound_and_an_empty_one_the_bound_0() -> None:
    costs = {"a": ModelCosts(1, 1)}
    assert lower_bound(Workload("loop", [Script([[Arrival(0, "a", 1)], [Arrival(0, "a", 1)]])]), costs) is None
    empty = lower_bound(Workload("empty", [Script([[]])]), costs, active="a")
    assert empty is not None
    assert empty.clairvoyant == 0


def test_switches_that_take_no_time_are_bounded_by_nothing() -> None:
    costs = dict.fromkeys("ab", ModelCosts(0.0, 0.0))
    assert two_model_cost({"a": [0.0, 2.0], "b": [1.0]}, costs) == 0.0
