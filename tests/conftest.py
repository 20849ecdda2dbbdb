"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Generator, Iterator

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


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """In a worker of xdist pytest-cov begins twice, and by its mark `no_cover` it pauses only the second of these."""
    if not item.get_closest_marker("no_cover"):
        return (yield)
    trace = sys.gettrace()
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(trace)


_MEASURED = {"cli", "contract", "sim"}
"""Folders whose tests are about what runs in processes of its own."""


@pytest.fixture(autouse=True, scope="module")
def _few_processes_are_measured(request: pytest.FixtureRequest) -> Iterator[None]:
    """Coverage costs more than half of a short life like that of most processes, and what most run is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name not in _MEASURED:
            patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        yield
