"""Two servers, simulated or real, and a gateway over them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from llmux_asgi import LLMuxApp, SwitchPolicy
from llmux_asgi.sim import GpuLedger, SimOptions, start_sims
from tests.support.serve import EventLoop, serve

Kind = Literal["sim", "real"]


@dataclass(frozen=True)
class Server:
    """One inference server: where it listens and what it calls its model."""

    name: str
    url: str

    def control(self, path: str, **params: str) -> None:
        """Send a control call."""
        httpx.post(self.url + path, params=params, timeout=60).raise_for_status()

    def sleeps(self) -> bool:
        """Ask the server."""
        answer: bool = httpx.get(self.url + "/is_sleeping", timeout=10).json()["is_sleeping"]
        return answer

    def metric(self, name: str) -> float:
        """Read a metric of the server."""
        for line in httpx.get(self.url + "/metrics", timeout=10).text.splitlines():
            if line.startswith(name + "{"):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no metric {name}")


@dataclass(frozen=True)
class Pair:
    """Two servers that share a GPU: only one of them may be awake."""

    kind: Kind
    servers: dict[str, Server]
    ledger: GpuLedger | None = None

    def only(self, name: str) -> Server:
        """Have the server `name` awake and the other asleep, by their own control calls."""
        for other, server in self.servers.items():
            if other != name:
                server.control("/sleep", level="1", mode="abort")
        self.servers[name].control("/wake_up")
        return self.servers[name]

    def config(self, **options: Any) -> dict[str, Any]:
        """Return a gateway's configuration; the models are called `first` and `second` there. `second` is for that alone."""
        second = options.pop("second", {})
        policy = {"name": "fifo", "min_active_duration": 0, **options.pop("policy", {})}
        models = {
            alias: {"url": server.url, "served_name": server.name, **options}
            for alias, server in zip(("first", "second"), self.servers.values(), strict=True)
        }
        models["second"] |= second
        return {"models": models, "policy": policy}


@pytest.fixture(scope="module", params=["sim", pytest.param("real", marks=pytest.mark.vllm)])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two servers of one kind, the first one awake."""
    if request.param == "real":
        real = request.getfixturevalue("real_servers")
        yield Pair("real", {server.name: Server(server.name, server.url) for server in real})
        for server in real:  # as the other tests of the session expect them
            Server(server.name, server.url).control("/wake_up")
        return
    path: Path = tmp_path_factory.mktemp("gpu") / "ledger.json"
    options = [
        SimOptions(name=name, gpu=str(path), start_asleep=level, tokens_per_second=2000)
        for name, level in (("alpha", 0), ("beta", 1))
    ]
    with start_sims(*options) as processes:
        yield Pair("sim", {p.name: Server(p.name, p.url) for p in processes}, GpuLedger(str(path)))


@contextmanager
def gateway_over(
    pair: Pair, loop: EventLoop = "asyncio", switches: SwitchPolicy | None = None, **options: Any
) -> Iterator[tuple[LLMuxApp, str]]:
    """Serve a gateway over the pair; yields the app and the base URL for an OpenAI client. `switches` is its policy."""
    llm = LLMuxApp(pair.config(**options), policy=switches)
    with serve(Starlette(routes=[Mount("/llm", llm)], lifespan=llm.lifespan), loop) as url:
        yield llm, url + "/llm/v1"


@dataclass(frozen=True)
class Prompt:
    """One request, as a client would send it, without the model."""

    chat: bool
    stream: bool
    text: str
    max_tokens: int = 24

    @property
    def path(self) -> str:
        return "/chat/completions" if self.chat else "/completions"

    def body(self, model: str) -> dict[str, Any]:
        prompt: dict[str, Any] = {"messages": [{"role": "user", "content": self.text}]} if self.chat else {"prompt": self.text}
        return {"model": model, "temperature": 0, "max_tokens": self.max_tokens, "stream": self.stream, **prompt}


def text_of(prompt: Prompt, content: bytes) -> tuple[str, str]:
    """Return what was generated and why it ended. Ids, times and the borders of the chunks differ from run to run."""
    if not prompt.stream:
        choice = json.loads(content)["choices"][0]
        return choice["message"]["content"] if prompt.chat else choice["text"], choice["finish_reason"]
    text, reason, done = "", "", False
    for event in content.decode().split("\n\n"):
        data = event.removeprefix("data: ")
        if data == "[DONE]":
            done = True
        elif data:
            choice = json.loads(data)["choices"][0]
            text += (choice["delta"].get("content") or "") if prompt.chat else choice["text"]
            reason = choice["finish_reason"] or reason
    assert done, content[-200:]
    return text, reason


def directly(pair: Pair, name: str, prompts: list[Prompt]) -> list[tuple[str, str]]:
    """Ask the server itself: a real one for one answer after the other, so that none of them depends on another."""
    server, at_once = pair.only(name), 8 if pair.kind == "sim" else 1
    with httpx.Client(base_url=server.url + "/v1", timeout=60) as client, ThreadPoolExecutor(at_once) as threads:
        answers = list(threads.map(lambda prompt: client.post(prompt.path, json=prompt.body(name)), prompts))
    return [text_of(prompt, answer.content) for prompt, answer in zip(prompts, answers, strict=True)]
