"""A coarser grid for the bounds: what they say is true on any, and the finest takes seconds."""

from __future__ import annotations

import pytest

from llmux_asgi.simulate import _grid, relaxation


@pytest.fixture(autouse=True)
def coarse_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_grid, "_MOST", 5_000)
    monkeypatch.setattr(relaxation, "_STEPS", 60_000)
