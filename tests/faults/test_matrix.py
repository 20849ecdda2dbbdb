"""Each row of docs/faults.md, played against real processes, with the gateway on asyncio and on trio."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.serve import EventLoop

from .__main__ import PAGE, table
from .matrix import FAULTS
from .stage import stage_for

# Each row on both event loops: on one of them, in turn, by `make test`, on the other by `make test-faults`. CI runs both.
CASES = [
    pytest.param(name, loop, marks=[] if (at % 2 == 0) == (loop == "asyncio") else [pytest.mark.second_loop])
    for at, name in enumerate(FAULTS)
    for loop in ("asyncio", "trio")
]


@pytest.mark.parametrize(("name", "loop"), CASES)
def test_a_fault_has_a_known_end(name: str, loop: EventLoop, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fault = FAULTS[name]
    with stage_for(fault.setting, loop, tmp_path, caplog) as stage:
        fault.play(stage)
        stage.check()


def test_the_page_of_the_documentation_has_these_faults() -> None:
    assert len(FAULTS) >= 30
    page = PAGE.read_text()
    assert page.partition("| fault |")[2] == table().partition("| fault |")[2], "make it anew: python -m tests.faults"
