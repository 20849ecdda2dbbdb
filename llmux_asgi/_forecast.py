"""When a model is expected to be active next: what a client that has to come back later is told. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from ._state import Phase, SwitcherState

__all__ = ["Progress", "next_turn_in"]

_UNKNOWN_SLEEP, _UNKNOWN_WAKE = 1.0, 5.0
"""Seconds, while nothing was measured: a model of some ten GB whose weights wait in CPU memory."""


class Progress(NamedTuple):
    """What those who wait for a model wait for."""

    state: str
    """`queued`: for its turn; else the phase of the switch to it: `cooldown`, `drain`, `sleep`, `wake` or `ready`."""
    expected: float
    """In how many seconds it is expected to serve."""


def next_turn_in(
    state: SwitcherState,
    model: str,
    now: float,
    costs: tuple[Mapping[str, float], Mapping[str, float]],
    min_active: float,
    expected_turn: Callable[[float], float],
) -> float:
    """Estimate in how many seconds `model` will be active.

    It is what is left of the active model's turn, then a switch and a turn for each model whose longest wait is longer, and the
    switch to `model`. `costs` are those of sleep and of wake, `expected_turn` and `min_active` what the policy says. Drains are
    left out: nobody knows how long an answer becomes.
    """
    active, target = state.active, state.target
    if model == active and target is None:
        return 0.0  # it serves, or will do so once its server has been asked
    waiting = [each for each in state.waiting_models() if target is not None or each != active]
    ahead = waiting[: waiting.index(model)] if model in waiting else waiting
    order = [*([target] if target is not None else []), *(each for each in ahead if each not in (target, model))]
    if target != model:
        order.append(model)

    def switch(origin: str | None, to: str) -> float:
        sleep = costs[0].get(origin, _UNKNOWN_SLEEP) if origin is not None else 0.0
        return sleep + costs[1].get(to, _UNKNOWN_WAKE)

    seconds = 0.0
    if active is not None and state.phase in (None, Phase.COOLDOWN):
        # Once a switch is decided, only the cooldown is left of the turn.
        turn = min_active if target is not None else max(min_active, expected_turn(switch(active, order[0])))
        seconds = max(0.0, state.active_since + turn - now)
    for origin, to in zip([active, *order[:-1]], order, strict=True):
        cost = switch(origin, to)
        if origin != active:
            seconds += max(min_active, expected_turn(cost))
        seconds += cost
    return seconds
