"""The contract's server: simulated by default, the real vLLM under the mark `vllm`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from llmux_asgi.sim import start_sim

from .driver import Driver


@dataclass(frozen=True)
class ContractServer:
    url: str
    name: str
    kind: str
    """`sim` or `real`."""
    supports_reload: bool
    """False when started with dummy weights."""


@pytest.fixture(scope="module", params=["sim", pytest.param("real", marks=pytest.mark.vllm)])
def server(request: pytest.FixtureRequest) -> Iterator[ContractServer]:
    if request.param == "real":
        real = request.getfixturevalue("real_server")
        yield ContractServer(real.url, real.name, "real", getattr(real, "supports_reload", True))
        return
    with start_sim("contract", tokens_per_second=1000, max_num_seqs=16, max_model_len=1024) as sim:
        yield ContractServer(sim.url, sim.name, "sim", True)


@pytest.fixture(scope="module")
def driver(server: ContractServer) -> Iterator[Driver]:
    with Driver(server.url, server.name) as driver:
        yield driver


@pytest.fixture
def vllm(driver: Driver) -> Iterator[Driver]:
    """A driver for the server, which is awake and idle before and after the test."""
    driver.reset()
    yield driver
    driver.reset()
