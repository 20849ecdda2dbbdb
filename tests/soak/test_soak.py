"""A short soak, on both event loops. The long one is `make soak`."""

from __future__ import annotations

import asyncio

import pytest

from tests.soak.__main__ import describe
from tests.soak.run import Size, soak
from tests.support.serve import EventLoop


@pytest.mark.parametrize(("loop", "seed", "preempts"), [("asyncio", 1, False), ("trio", 2, True)])
def test_every_request_has_its_answer_or_an_error_and_nothing_is_left_over(loop: EventLoop, seed: int, preempts: bool) -> None:
    size = Size(150, 15, faults=4, concurrency=16, minutes=3, preempts=preempts, memory_is_judged=False)
    report = asyncio.run(soak(size, loop, seed))
    assert not report.violations, describe(report)
    # How many clients leave, and how many meet a fault, depends on the machine: these only say that it was no empty run.
    assert report.outcomes["whole answer"] > 35
    assert report.outcomes["whole stream"] > 35
