"""The gateway under granian, whose `receive` and `send` give awaitables that are no generators."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.gateway.scripts import EVENTS, echo
from tests.support.eventually import eventually
from tests.support.serve import free_port, serve
from tests.support.upstream import Exchange, ScriptedServer, wait_for

_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def servers() -> tuple[ScriptedServer, ScriptedServer]:
    return ScriptedServer(), ScriptedServer(asleep=True)


@pytest.fixture(scope="module")
def client(servers: tuple[ScriptedServer, ScriptedServer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    log = tmp_path_factory.mktemp("granian") / "log"
    with ExitStack() as stack:
        models = {name: {"url": stack.enter_context(serve(server))} for name, server in zip("ab", servers, strict=True)}
        port = free_port()
        command = [sys.executable, "-m", "granian", "--interface", "asgi", "--port", str(port), "tests.gateway.granian_app:app"]
        environment = {**os.environ, "LLMUX_TEST_MODELS": json.dumps(models)}
        out = stack.enter_context(log.open("wb"))
        process = subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=out, stderr=out)
        stack.callback(process.wait, 10)
        stack.callback(process.terminate)
        running = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10, trust_env=False))

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            try:
                return running.get("/v1/models").is_success
            except httpx.TransportError:
                return False

        eventually("granian answers", answers)
        yield running


def test_a_request_is_answered_and_another_model_awoken(
    client: httpx.Client, servers: tuple[ScriptedServer, ScriptedServer]
) -> None:
    for server in servers:
        server.script = echo
    for model in "ab":
        answer = client.post("/v1/chat/completions", json={"model": model, "messages": []})
        assert (answer.status_code, answer.json()["model"]) == (200, model)
    assert client.post("/v1/chat/completions", json={"model": "c", "messages": []}).status_code == 404


def test_a_body_that_comes_in_parts_arrives_whole(client: httpx.Client, servers: tuple[ScriptedServer, ScriptedServer]) -> None:
    servers[0].script = echo
    body = json.dumps({"model": "a", "messages": [], "padding": "x" * 3_000_000}).encode()
    assert client.post("/v1/chat/completions", content=body).content == body


def test_events_are_passed_on_as_they_come_and_a_client_that_leaves_is_noticed(
    client: httpx.Client, servers: tuple[ScriptedServer, ScriptedServer]
) -> None:
    seen, left = threading.Event(), threading.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.chunk(EVENTS[0])
        await wait_for(seen)
        await exchange.chunk(EVENTS[1])
        await exchange.client_left()
        left.set()

    servers[0].script = script
    with client.stream("POST", "/v1/chat/completions", json={"model": "a", "stream": True}) as response:
        parts = response.iter_raw()
        assert next(parts) == EVENTS[0]
        seen.set()
        assert next(parts) == EVENTS[1]
    assert left.wait(5)
