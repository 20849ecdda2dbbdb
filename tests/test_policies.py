"""The policies that come with the gateway: each rule at its edges, by contexts made by hand. No event loop, no clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from llmux_asgi import (
    ConfigError,
    FifoPolicy,
    GatedQuantumPolicy,
    ModelSwitcher,
    PolicyContext,
    PolicyDecision,
    PressurePolicy,
    Stay,
    SwitchNow,
    SwitchPolicy,
    ThroughputPolicy,
    load_config,
)

SLEEP = {"a": 1.0, "b": 2.0, "c": 1.0}
WAKE = {"a": 4.0, "b": 4.0, "c": 9.0}
"""From a to b it is 5 s, to c 10 s."""


def context(target: str = "b", *, waits: dict[str, list[float]] | None = None, **more: Any) -> PolicyContext:
    """The model a is active and busy since 100; it is 110 now. `waits`: how long each request has waited, by model."""
    queues = waits or {target: [1.0]}
    ordered = dict(sorted(queues.items(), key=lambda each: -each[1][0]))
    values: dict[str, Any] = {
        "active_model": "a",
        "active_in_flight": 1,
        "now": 110.0,
        "active_since": 100.0,
        "queued_at_activation": 1,
        "queue_depths": {model: len(queue) for model, queue in ordered.items()},
        "oldest_waits": {model: queue[0] for model, queue in ordered.items()},
        "total_waits": {model: sum(queue) for model, queue in ordered.items()},
        "sleep_costs": SLEEP,
        "wake_costs": WAKE,
        **more,
    }
    if not values["active_in_flight"]:
        values.setdefault("idle_for", 0.0)
    return PolicyContext(
        target_model=target, target_queue_depth=len(queues[target]), oldest_waiting=queues[target][0], **values
    )


TURNS = [GatedQuantumPolicy, PressurePolicy]
ALL = [*TURNS, ThroughputPolicy]


@pytest.mark.parametrize("policy", ALL)
def test_nobody_is_awake_so_there_is_nothing_to_wait_for(policy: type[SwitchPolicy]) -> None:
    assert policy().on_pending_request(context(active_model=None, active_in_flight=0)) == SwitchNow()


@pytest.mark.parametrize("policy", [FifoPolicy, *ALL])
def test_a_context_of_the_small_vocabulary_is_enough(policy: type[SwitchPolicy]) -> None:
    answer = policy().on_pending_request(PolicyContext("b", "a", 1, 40.0, 1))
    assert answer == SwitchNow()


# When the turn ends


@pytest.mark.parametrize("policy", TURNS)
@pytest.mark.parametrize(
    ("now", "answer"),
    [
        (100.0, Stay(until=120.0)),
        (119.99, Stay(until=120.0)),
        (120.0, SwitchNow()),
        (500.0, SwitchNow()),
    ],
)
def test_a_busy_models_turn_is_four_times_the_switch(policy: type[SwitchPolicy], now: float, answer: PolicyDecision) -> None:
    assert policy().on_pending_request(context(now=now)) == answer


@pytest.mark.parametrize("policy", TURNS)
def test_the_dearer_the_switch_the_longer_the_turn(policy: type[SwitchPolicy]) -> None:
    assert policy().on_pending_request(context("c")) == Stay(until=140.0)
    assert policy().on_pending_request(context("c", sleep_costs={}, wake_costs={})) == SwitchNow()


@pytest.mark.parametrize("policy", [GatedQuantumPolicy(quantum=2), PressurePolicy(quantum=2)])
def test_the_quantum_can_be_chosen(policy: SwitchPolicy) -> None:
    assert policy.on_pending_request(context(now=109.0)) == Stay(until=110.0)
    assert policy.on_pending_request(context(now=110.0)) == SwitchNow()


@pytest.mark.parametrize("policy", [GatedQuantumPolicy(quantum=0), PressurePolicy(quantum=0)])
def test_a_quantum_of_zero_leaves_at_once(policy: SwitchPolicy) -> None:
    assert policy.on_pending_request(context(now=100.0)) == SwitchNow()


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize(
    ("idle_for", "answer"),
    [
        (0.0, Stay(until=110.5)),
        (0.25, Stay(until=110.25)),
        (0.5, SwitchNow()),
        (math.inf, SwitchNow()),
    ],
)
def test_an_idle_model_is_left_after_a_short_while(policy: type[SwitchPolicy], idle_for: float, answer: PolicyDecision) -> None:
    assert policy().on_pending_request(context(active_in_flight=0, idle_for=idle_for)) == answer


@pytest.mark.parametrize("policy", TURNS)
def test_a_turn_ends_in_time_for_who_would_give_up(policy: Callable[..., SwitchPolicy]) -> None:
    def dear(waited: float) -> PolicyContext:
        return context(waits={"b": [waited]}, sleep_costs={"a": 4.0}, wake_costs={"b": 16.0})

    assert policy(request_timeout=None).on_pending_request(dear(10.0)) == Stay(until=180.0)
    assert policy(request_timeout=60.0).on_pending_request(dear(10.0)) == Stay(until=110.0 + 60.0 - 10.0 - 1.5 * 20.0)
    assert policy(request_timeout=60.0).on_pending_request(dear(30.0)) == SwitchNow()
    assert policy(request_timeout=600.0).on_pending_request(dear(30.0)) == Stay(until=180.0)


@pytest.mark.parametrize("policy", TURNS)
def test_a_time_limit_goes_by_the_real_wait_and_frozen_requests_have_none(policy: Callable[..., SwitchPolicy]) -> None:
    dear: dict[str, Any] = {"sleep_costs": {"a": 4.0}, "wake_costs": {"b": 16.0}, "waits": {"b": [40.0]}}
    dear |= {"head_starts": {"b": 30.0}, "served_until": {30.0: math.inf}}  # the active model serves the same class
    chosen = policy(request_timeout=60.0)
    assert chosen.on_pending_request(context(**dear)) == SwitchNow()
    assert chosen.on_pending_request(context(**dear, real_waits={"b": 10.0})) == Stay(until=110.0 + 60.0 - 10.0 - 1.5 * 20.0)
    assert chosen.on_pending_request(context(**dear, real_waits={})) == Stay(until=180.0)


@pytest.mark.parametrize("policy", TURNS)
def test_lingering_does_not_make_a_turn_longer(policy: type[SwitchPolicy]) -> None:
    idle = context(active_in_flight=0, idle_for=0.0, now=119.75)
    assert policy().on_pending_request(idle) == Stay(until=120.0)


@pytest.mark.parametrize("policy", TURNS)
def test_a_model_that_was_found_awake_owes_no_turn(policy: type[SwitchPolicy]) -> None:
    assert policy().on_pending_request(context(active_since=-math.inf)) == SwitchNow()


def test_throughput_stays_with_a_busy_model_until_somebody_has_waited_for_the_cap() -> None:
    policy = ThroughputPolicy(max_wait=20)
    assert policy.on_pending_request(context(waits={"b": [5.0]})) == Stay(until=125.0)
    assert policy.on_pending_request(context(waits={"b": [19.5]})) == Stay(until=110.5)
    assert policy.on_pending_request(context(waits={"b": [20.0]})) == SwitchNow()
    assert policy.on_pending_request(context(waits={"b": [20.0]}, active_since=110.0)) == SwitchNow()
    assert policy.on_pending_request(context(waits={"b": [19.75]}, active_in_flight=0)) == Stay(until=110.25)


# Which is next


@pytest.mark.parametrize("policy", [GatedQuantumPolicy, ThroughputPolicy])
def test_the_longest_wait_is_next_whatever_the_queues(policy: type[SwitchPolicy]) -> None:
    waits = {"b": [9.0] * 50, "c": [10.0]}
    over = {"now": 200.0, "active_in_flight": 0, "idle_for": 5.0}
    assert policy().on_pending_request(context("c", waits=waits, **over)) == SwitchNow()
    assert policy().on_pending_request(context("b", waits=waits, **over)) == Stay()


def test_of_equal_waits_either_is_next() -> None:
    waits = {"b": [9.0], "c": [9.0]}
    for target in "bc":
        assert GatedQuantumPolicy().on_pending_request(context(target, waits=waits, now=200.0)) == SwitchNow()


@pytest.mark.parametrize(
    ("waits", "chosen"),
    [
        ({"b": [6.0], "c": [10.0]}, "b"),  # 6 / 6 against 10 / 11
        ({"b": [6.0], "c": [11.0]}, "c"),  # 6 / 6 against 11 / 11: the longest wait
        ({"b": [6.0], "c": [6.5, 5.5]}, "c"),  # 6 / 6 against 12 / 11
        ({"b": [9.0] * 50, "c": [29.9]}, "b"),
        ({"b": [9.0] * 50, "c": [30.0]}, "c"),  # it has waited for `max_wait`
        ({"b": [31.0] * 50, "c": [30.0]}, "b"),  # both have: the longest wait
    ],
)
def test_pressure_weighs_the_waits_against_the_costs(waits: dict[str, list[float]], chosen: str) -> None:
    for target in "bc":
        answer = PressurePolicy().on_pending_request(context(target, waits=waits, now=200.0))
        assert answer == (SwitchNow() if target == chosen else Stay())


def test_pressure_has_itself_asked_again_about_each_when_its_turn_could_come() -> None:
    waits = {"b": [1.0], "c": [9.0]}  # c is next, and its quantum is the longer one
    assert PressurePolicy().on_pending_request(context("c", waits=waits)) == Stay(until=140.0)
    assert PressurePolicy().on_pending_request(context("b", waits=waits)) == Stay(until=120.0)


# Chosen in the configuration


def configured(**policy: object) -> SwitchPolicy:
    return ModelSwitcher.from_config(load_config({"models": {"a": {"url": "http://x:1"}}, "policy": policy}))._policy


COMMON = {
    "sleep_level": 1,
    "request_timeout": 60.0,
    "drain": "wait",
    "drain_timeout": None,
    "max_freezes": 16,
    "max_frozen": 300.0,
}


@pytest.mark.parametrize(
    ("policy", "kind", "settings"),
    [
        ({}, GatedQuantumPolicy, {"min_active_duration": 0.0, "quantum": 4.0, "linger": 0.5}),
        ({"name": "fifo"}, FifoPolicy, {"min_active_duration": 5.0}),
        ({"name": "fifo", "min_active_duration": 0}, FifoPolicy, {"min_active_duration": 0.0}),
        ({"name": "gated_quantum"}, GatedQuantumPolicy, {"min_active_duration": 0.0, "quantum": 4.0, "linger": 0.5}),
        (
            {"name": "gated_quantum", "quantum": 2, "linger": 0, "min_active_duration": 3},
            GatedQuantumPolicy,
            {"min_active_duration": 3.0, "quantum": 2.0, "linger": 0.0},
        ),
        (
            {"name": "pressure", "max_wait": 10},
            PressurePolicy,
            {"min_active_duration": 0.0, "quantum": 4.0, "linger": 0.5, "max_wait": 10.0, "base": 1.0},
        ),
        ({"name": "throughput"}, ThroughputPolicy, {"min_active_duration": 0.0, "linger": 0.5, "max_wait": 30.0}),
    ],
)
def test_the_configuration_chooses_the_policy_and_its_parameters(
    policy: dict[str, object], kind: type[SwitchPolicy], settings: dict[str, object]
) -> None:
    chosen = configured(**policy)
    assert type(chosen) is kind
    assert vars(chosen) == {**COMMON, **settings}


def test_each_policy_takes_the_settings_that_all_have() -> None:
    common = {"sleep_level": 2, "request_timeout": None, "drain_timeout": 7.0, "max_freezes": 3, "max_frozen": 9.0}
    for name in ("fifo", "gated_quantum", "pressure", "throughput"):
        assert vars(configured(name=name, drain="preempt", **common)).items() >= common.items()


@pytest.mark.parametrize(("drain", "mode"), [(True, "wait"), (False, "abort"), ("preempt", "preempt")])
def test_what_becomes_of_running_requests_has_a_name(drain: object, mode: str) -> None:
    policy = configured(drain=drain)
    assert isinstance(policy, GatedQuantumPolicy)
    assert policy.drain == mode


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (
            {"name": "fifo", "quantum": 4},
            r"\$\.policy\.quantum: has no effect with the policy fifo: it belongs to gated_quantum, pressure",
        ),
        (
            {"name": "gated_quantum", "max_wait": 4},
            r"\$\.policy\.max_wait: has no effect with the policy gated_quantum: it belongs to pressure, throughput",
        ),
        ({"name": "throughput", "quantum": 4}, r"\$\.policy\.quantum: has no effect with the policy throughput"),
        ({"name": "gated_quantum", "quantum": -1}, r"\$\.policy\.quantum: expected `float` >= 0"),
        ({"name": "lifo"}, r"'lifo' \(one of: fifo, gated_quantum, pressure, throughput\)"),
    ],
)
def test_a_parameter_without_effect_is_an_error(policy: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        configured(**policy)
