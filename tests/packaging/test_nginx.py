"""examples/nginx.conf in a real nginx, in front of `llmux-asgi serve` and two simulated servers."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import pytest
from websockets.sync.client import connect

from llmux_asgi import LimitsConfig, PolicyConfig
from llmux_asgi.sim import SimOptions, SimProcess, start_sims
from tests.benchmarks.relay.environment import nginx
from tests.cli.test_serve import served
from tests.support.eventually import eventually
from tests.support.serve import free_port

from .conftest import ROOT

pytestmark = pytest.mark.packaging

CONFIGURATION = (ROOT / "examples" / "nginx.conf").read_text()
LIMIT = 30.0
# As the file has no say in them: who nginx runs as, and where it puts its own files.
WRAPPER = """\
daemon off;
pid {folder}/pid;
error_log stderr error;
worker_processes 1;
{user}
events {{ worker_connections 256; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  include {folder}/llmux.conf;
}}
"""


@dataclass(frozen=True)
class Site:
    url: str
    sims: list[SimProcess]


@contextmanager
def running_nginx(folder: Path, gateway: str) -> Iterator[str]:
    """nginx with the example's file, its two addresses replaced; yields its URL."""
    port = free_port()
    text = CONFIGURATION
    for documented, here in (("server 127.0.0.1:8000;", f"server {gateway};"), ("listen 80;", f"listen 127.0.0.1:{port};")):
        assert text.count(documented) == 1
        text = text.replace(documented, here)
    (folder / "llmux.conf").write_text(text)
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(WRAPPER.format(folder=folder, user=user))
    command = [nginx(), "-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + LIMIT
        while True:
            try:
                httpx.get(url, trust_env=False, timeout=LIMIT)
                break
            except httpx.ConnectError:
                assert process.poll() is None, process.communicate()[1].decode()
                assert time.monotonic() < deadline, "nginx does not listen"
                time.sleep(0.02)
        yield url
    finally:
        process.terminate()
        errors = process.communicate(timeout=LIMIT)[1].decode()
    assert not re.search(r"\[(warn|emerg|alert|crit)\]", errors), errors


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("nginx")
    names = ("qwen", "org/llama")
    gpu = str(folder / "gpu")
    with start_sims(*(SimOptions(name=name, gpu=gpu, start_asleep=1, tokens_per_second=2) for name in names)) as sims:
        config = folder / "llmux.json"
        config.write_bytes(
            msgspec.json.encode({"models": {sim.name: {"url": sim.url} for sim in sims}, "limits": {"heartbeat": 0.5}})
        )
        with (
            served(str(config), "--port", "0") as (gateway, _),
            running_nginx(folder, gateway.removeprefix("http://").removesuffix("/v1")) as url,
        ):
            yield Site(f"{url}/ai", sims)


@pytest.fixture
def client(site: Site) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=site.url, trust_env=False, timeout=LIMIT) as opened:
        yield opened


def completion(model: str, tokens: int, **more: object) -> dict[str, object]:
    return {"model": model, "prompt": "one two", "max_tokens": tokens, **more}


def test_both_models_answer_below_the_prefix(client: httpx.Client) -> None:
    assert sorted(card["id"] for card in client.get("/v1/models").json()["data"]) == ["org/llama", "qwen"]
    for model in ("qwen", "org/llama"):
        answer = client.post("/v1/completions", json=completion(model, 1))
        assert (answer.status_code, answer.json()["model"]) == (200, model)
    by_path = client.post("/models/org/llama/v1/completions", json={"prompt": "one two", "max_tokens": 1})
    assert (by_path.status_code, by_path.json()["model"]) == (200, "org/llama")


def test_a_stream_comes_piece_by_piece_and_a_client_that_leaves_ends_it(site: Site, client: httpx.Client) -> None:
    (qwen,) = (sim for sim in site.sims if sim.name == "qwen")
    with client.stream("POST", "/v1/completions", json=completion("qwen", 4000, stream=True)) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        began = time.monotonic()
        lines = answer.iter_lines()
        assert next(line for line in lines if line and not line.startswith(":")).startswith("data: {")
        assert time.monotonic() - began < 5
        assert qwen.state().running == 1
    eventually("the server stops generating", lambda: qwen.state().running == 0)


def test_a_stream_has_its_end(client: httpx.Client) -> None:
    with client.stream("POST", "/v1/completions", json=completion("qwen", 2, stream=True)) as answer:
        assert [line for line in answer.iter_lines() if line][-1] == "data: [DONE]"


def test_signs_of_life_go_through_while_a_request_waits(client: httpx.Client) -> None:
    """It waits for the other model's answer, of three seconds."""
    with client.stream("POST", "/v1/completions", json=completion("qwen", 6, stream=True)) as running:
        lines = running.iter_lines()
        assert next(line for line in lines if line and not line.startswith(":")).startswith("data: {")
        with client.stream("POST", "/v1/completions", json=completion("org/llama", 1, stream=True)) as waiting:
            seen = [line for line in waiting.iter_lines() if line]
        assert "data: [DONE]" in list(lines)
    assert [line[0] for line in seen].count(":") >= 2
    assert seen[-1] == "data: [DONE]"


def test_a_websocket_goes_through(site: Site) -> None:
    address = site.url.replace("http", "ws") + "/v1/realtime?model=qwen"
    with connect(address, open_timeout=LIMIT, proxy=None) as socket:
        assert msgspec.json.decode(socket.recv(LIMIT))["type"] == "session.created"


def test_the_largest_body_is_the_gateways(client: httpx.Client) -> None:
    allowed = LimitsConfig().max_body
    (stated,) = re.findall(r"client_max_body_size (\d+)m;", CONFIGURATION)
    assert int(stated) << 20 == allowed
    fits = client.post("/v1/completions", json={**completion("qwen", 1), "ignored": "x" * (allowed - 1000)})
    assert fits.status_code == 200
    exceeds = client.post("/v1/completions", json={**completion("qwen", 1), "ignored": "x" * allowed})
    assert exceeds.status_code == 413


def test_nginx_waits_longer_than_the_gateway() -> None:
    (stated,) = re.findall(r"proxy_read_timeout (\d+)s;", CONFIGURATION)
    wait = PolicyConfig().request_timeout
    assert wait is not None
    assert int(stated) > 2 * wait


@pytest.mark.parametrize("path", ["/sleep?level=1", "/%73leep", "/v1/../sleep", "//sleep", "/v1/%2e%2e/wake_up", "/metrics"])
def test_no_way_through_nginx_leads_to_a_servers_control_routes(path: str, site: Site, client: httpx.Client) -> None:
    before = [(state.awake, state.sleeps, state.wakes) for state in (sim.state() for sim in site.sims)]
    target = httpx.URL(site.url).copy_with(raw_path=f"/ai{path}".encode())
    assert client.post(target, json={}).status_code == 404
    assert [(state.awake, state.sleeps, state.wakes) for state in (sim.state() for sim in site.sims)] == before


def test_the_gateways_errors_are_not_replaced(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json=completion("nobody", 1))
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
