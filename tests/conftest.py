"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib.util
import signal

import pytest
from hypothesis import HealthCheck, settings

# How long something takes says nothing of whether it is right: six workers share two cores.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So it is where a shell has started this in the background, for all processes too. Tests press Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.real.fixtures"]
# They need what is in a dependency group of their own; `make test` does without it.
collect_ignore = [
    folder
    for folder, package in {"packaging": "kubernetes_validate", "ui": "playwright"}.items()
    if importlib.util.find_spec(package) is None
]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Both event loops, for every test marked `anyio`."""
    return str(request.param)


@pytest.fixture
def uncovered_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that the test starts are not measured for coverage, which costs more than half of a short life like theirs.

    For tests that start hundreds, and whose lines others cover.
    """
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
