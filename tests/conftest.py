"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest

pytest_plugins = ["tests.real.fixtures"]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Both event loops, for every test marked `anyio`."""
    return str(request.param)
