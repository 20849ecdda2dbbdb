"""`llmux-asgi validate` with a real vLLM: what it reports of the simulated one holds of that too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from llmux_asgi.cli import app
from tests.real.server import RealServer

pytestmark = pytest.mark.vllm


def validated(config: Path, *options: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, ["validate", "alpha", "--config", str(config), "--yes", "--json", *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, json.loads(result.stdout)


def is_asleep(server: RealServer) -> bool:
    asleep: bool = httpx.get(f"{server.url}/is_sleeping", timeout=30, trust_env=False).raise_for_status().json()["is_sleeping"]
    return asleep


def test_a_real_vllm_passes_at_both_levels_and_is_left_as_it_was_found(real_server: RealServer, tmp_path: Path) -> None:
    config = tmp_path / "llmux.json"
    config.write_text(json.dumps({"models": {"alpha": {"url": real_server.url}}}))
    status, told = validated(config)
    assert (status, told["error"], told["found"], told["left"]) == (0, None, "awake", "awake"), told
    assert [(each["level"], each["same_answer"]) for each in told["cycles"]] == [(1, True), (1, True), (2, True), (2, True)]
    assert all(each["sleep"] > 0 and each["wake"] > 0 for each in told["cycles"])
    assert not is_asleep(real_server)
    httpx.post(f"{real_server.url}/sleep?level=1", timeout=60, trust_env=False).raise_for_status()
    status, told = validated(config, "--level", "1", "--cycles", "1")
    assert (status, told["found"], told["left"]) == (0, "asleep", "asleep"), told
    assert is_asleep(real_server)
    httpx.post(f"{real_server.url}/wake_up", timeout=60, trust_env=False).raise_for_status()


def test_a_name_that_it_does_not_serve_is_told_and_nothing_is_put_to_sleep(real_server: RealServer, tmp_path: Path) -> None:
    config = tmp_path / "llmux.json"
    config.write_text(json.dumps({"models": {"alpha": {"url": real_server.url, "served_name": "another"}}}))
    status, told = validated(config, "--level", "1", "--cycles", "1")
    assert (status, told["passed"], told["left"]) == (1, False, "awake"), told
    assert "answered 404. Does it know the model as 'another'" in told["cycles"][0]["error"]
    assert not is_asleep(real_server)
