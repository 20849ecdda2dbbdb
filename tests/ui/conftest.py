"""A browser, three simulated servers for one GPU, and a gateway over them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser

from llmux_asgi.sim import SimOptions, start_sims
from tests.ui.browser import chromium
from tests.ui.gateways import MANAGED, Gateway, simulated

NAMES = ("qwen", "meta/llama", "<img src=x onerror=window.xss=1>")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="session")
def models() -> Iterator[dict[str, dict[str, Any]]]:
    """As a configuration has them. One name is markup."""
    options = [SimOptions(name="sim", sleep_seconds=0.2, wake_seconds=0.3, tokens_per_second=40, start_asleep=1) for _ in NAMES]
    with start_sims(*options) as sims:
        yield simulated({name: sim.url for name, sim in zip(NAMES, sims, strict=True)})


@pytest.fixture(scope="module")
def gateway(models: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Mounted at /llm, with a process of its own beside the three servers."""
    folder = tmp_path_factory.mktemp("gateway")
    with Gateway(folder, {**models, "managed": {"command": MANAGED}}, prefix="/llm").running() as started:
        yield started


@pytest.fixture
def asleep(models: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The models, all asleep, for a gateway of the test's own."""
    for model in models.values():
        httpx.post(f"{model['url']}/sleep", params={"level": "1"}, timeout=30, trust_env=False).raise_for_status()
    return models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path
