"""Two simulated servers on one simulated GPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmux_asgi.sim import GpuLedger, SimOptions, SimProcess, start_sims


@pytest.fixture(scope="session")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ledger of the GPU that the session's servers share."""
    return tmp_path_factory.mktemp("examples") / "gpu"


@pytest.fixture(scope="session")
def session_sims(gpu: Path) -> Iterator[list[SimProcess]]:
    asleep = (SimOptions(name=name, gpu=str(gpu), start_asleep=1, tokens_per_second=0) for name in ("qwen", "llama"))
    with start_sims(*asleep) as started:
        yield started


@pytest.fixture
def sims(session_sims: list[SimProcess], gpu: Path) -> Iterator[list[SimProcess]]:
    """The servers of the models qwen and llama. They never were awake at once, and saw no request while asleep."""
    yield session_sims
    assert GpuLedger(gpu).max_awake() <= 1
    assert [sim.state().requests_while_asleep for sim in session_sims] == [0, 0]


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Litestar sets up the logging of the whole process: undone, for the tests that follow."""
    loggers = logging.getLogger(), logging.getLogger("litestar")
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        for handler in set(logger.handlers) - set(handlers):
            logger.removeHandler(handler)
