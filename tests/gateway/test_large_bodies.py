"""What a body of 20 MB costs a gateway in memory, from its arrival to the server."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.support.gateway_process import GatewayProcess, gateway_process
from tests.support.serve import serve
from tests.support.upstream import Exchange, ScriptedServer

SIZE = 15_000_000


async def count(exchange: Exchange) -> None:
    await exchange.start("application/json")
    await exchange.chunk(b"%d" % len(exchange.body), last=True)


@pytest.fixture(scope="module")
def running() -> Iterator[GatewayProcess]:
    with ExitStack() as stack:
        model = {"url": stack.enter_context(serve(ScriptedServer(count))), "aliases": ["other"]}
        process = stack.enter_context(gateway_process({"models": {"a": model}}))
        post(process, "chat/completions", b'{"model": "a"}', {})  # what the first request takes is not counted
        yield process


def post(process: GatewayProcess, route: str, content: bytes, headers: dict[str, str]) -> int:
    response = httpx.post(f"{process.url}/llm/v1/{route}", content=content, headers=headers, timeout=60, trust_env=False)
    return int(response.raise_for_status().content)


def memory(process: GatewayProcess, key: str) -> int:
    """In bytes, of the process: `VmRSS` now, `VmHWM` the most since it was reset."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def image(model: str) -> tuple[bytes, dict[str, str]]:
    url = "data:image/png;base64," + base64.b64encode(random.Random(1).randbytes(SIZE)).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    return json.dumps({"messages": [{"role": "user", "content": [part]}], "model": model}).encode(), {}


def sound(model: str) -> tuple[bytes, dict[str, str]]:
    request = httpx.Request(
        "POST", "http://x", data={"model": model}, files={"file": ("a.wav", random.Random(1).randbytes(SIZE + 5_000_000))}
    )
    return request.read(), {"content-type": request.headers["content-type"]}


@pytest.mark.parametrize(
    ("route", "make", "model", "most"),
    [
        ("chat/completions", image, "a", 1.5),
        ("chat/completions", image, "other", 2.2),  # rewritten
        ("audio/transcriptions", sound, "other", 2.2),
    ],
    ids=["as it came", "rewritten", "form"],
)
def test_20_mb_pass_with_at_most_2_2_times_their_size(
    running: GatewayProcess, route: str, make: Callable[[str], tuple[bytes, dict[str, str]]], model: str, most: float
) -> None:
    content, headers = make(model)
    assert len(content) > 20_000_000
    Path(f"/proc/{running.pid}/clear_refs").write_text("5")  # resets the peak, see proc(5)
    before = memory(running, "VmRSS")
    # Its own name is one letter and `other` four more.
    assert len(content) - post(running, route, content, headers) in (0, 4)
    assert memory(running, "VmHWM") - before < most * len(content)
