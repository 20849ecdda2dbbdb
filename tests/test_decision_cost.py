"""A decision does not walk through the queues. How long it takes is `make bench-decision`'s business."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import pytest

from llmux_asgi._state import SwitcherState, Ticket
from tests.benchmarks.decision import POLICIES, decider_of, queue_up


class CountedQueue(OrderedDict[Ticket, None]):
    """Counts the tickets that somebody looks at."""

    seen = 0

    def __iter__(self) -> Iterator[Ticket]:
        for ticket in super().__iter__():
            CountedQueue.seen += 1
            yield ticket


def tickets_seen(policy: str, depth: int) -> int:
    state = SwitcherState("abc")
    state._queues = {model: CountedQueue() for model in "abc"}
    queue_up(state, depth)
    CountedQueue.seen = 0
    decider = decider_of(POLICIES[policy](), state)
    decider.choose()
    return CountedQueue.seen


@pytest.mark.parametrize("policy", POLICIES)
def test_a_decision_looks_at_as_many_tickets_of_a_long_queue_as_of_a_short_one(policy: str) -> None:
    assert 0 < tickets_seen(policy, 10) == tickets_seen(policy, 1000) < 10
