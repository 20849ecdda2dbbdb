"""Gateways over real servers: two by URL, `alpha` and `beta`, and `own`, which the gateway starts, with the model of alpha."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from llmux_asgi import LLMuxApp
from tests.contract.driver import Call, Stream
from tests.e2e.conftest import Prompt, text_of
from tests.real.fixtures import RealServers
from tests.real.server import GroupMember, RealServer, free_port, group_members, leader_on
from tests.support.serve import serve

PROMPT = Prompt(chat=True, stream=False, text="tell me of sleep", max_tokens=24)
PATIENCE = 240.0
"""Seconds in which a real server has certainly started, also on a busy machine."""


@dataclass
class Client:
    """Asks a gateway, and compares with what the servers themselves have answered."""

    url: str
    expected: dict[str, tuple[str, str]]

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url + "/llm/v1", timeout=PATIENCE, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def ask(self, model: str) -> httpx.Response:
        return self.http.post(PROMPT.path, json=PROMPT.body(model))

    def asking(self, model: str) -> Call:
        return Call(lambda: self.ask(model))

    def answers_whole(self, *models: str) -> None:
        """Each of the models gives the answer that its server gives when nobody is in between."""
        for model in models:
            response = self.ask(model)
            assert response.status_code == 200, (model, response.text)
            assert text_of(PROMPT, response.content) == self.expected[model], model

    def fails(self, model: str, status: int, *said: str) -> None:
        """The gateway refuses, in OpenAI's form and with a message that has `said` in it."""
        response = self.ask(model)
        assert response.status_code == status, response.text
        for part in said:
            assert part in response.json()["error"]["message"]

    def stream(self, model: str, tokens: int = 900) -> Stream:
        """A stream that takes seconds. It has begun."""
        body = {"model": model, "prompt": "go on", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        stream = Stream(self.http, "/completions", body)
        assert stream.wait_for_events(5), stream.events
        return stream


@dataclass
class Stage(Client):
    """A gateway in a thread of the tests."""

    llm: LLMuxApp

    @property
    def own_url(self) -> str:
        return self.llm.config.models["own"].address

    @property
    def own(self) -> OwnServer:
        return OwnServer.on(self.own_url)

    def state_of(self, model: str) -> str:
        return self.llm.switcher.statistics().servers[model]


@dataclass(frozen=True)
class OwnServer:
    """The processes of a server that a gateway has started."""

    leader: int

    @classmethod
    def on(cls, url: str) -> OwnServer:
        leader = leader_on(urlsplit(url).port or 0)
        assert leader is not None, "it does not run"
        return cls(leader)

    @property
    def engine(self) -> int:
        return process_of(self.leader, "EngineCore")

    @property
    def worker(self) -> int:
        return process_of(self.leader, "Worker")

    def members(self) -> list[GroupMember]:
        return group_members(self.leader)

    def calm(self) -> None:
        """Let the API server not fall behind its engine: a stream would be over before its middle is seen."""
        os.setpriority(os.PRIO_PROCESS, self.engine, 5)


def process_of(group: int, title: str) -> int:
    """The process with `title` of a server: "EngineCore" schedules, "Worker", a child of it, computes."""
    return next(member.pid for member in group_members(group) if title in member.title)


def config_of(servers: Iterable[RealServer], models: dict[str, Any], **limits: Any) -> dict[str, Any]:
    """A gateway's configuration: `models`, and `servers` by URL."""
    by_url = {server.name: {"url": server.url, "timeouts": {"sleep": 3, "probe": 2}} for server in servers}
    policy = {"name": "fifo", "min_active_duration": 0, "request_timeout": PATIENCE}
    return {"models": {**models, **by_url}, "policy": policy, "limits": {"health_interval": 0.2, **limits}}


def own_model(servers: RealServers, *, env: dict[str, str] | None = None, **timeouts: float) -> dict[str, Any]:
    """The configuration of a server that the gateway starts."""
    limits = {"sleep": 3, "probe": 2, "stop": 3, "start": PATIENCE, **timeouts}
    return {**servers.alpha.managed("own", **(env or {})), "timeouts": limits}


def at_a_port(model: dict[str, Any]) -> dict[str, Any]:
    """The same, at a port that the test knows: not all gateways can be asked."""
    return {**model, "url": f"http://127.0.0.1:{free_port()}"}


@contextmanager
def stage(servers: Iterable[RealServer], expected: dict[str, tuple[str, str]], own: dict[str, Any]) -> Iterator[Stage]:
    """A mounted gateway, its model `own` as configured; `servers` by URL."""
    llm = LLMuxApp(config_of(servers, {"own": own}))
    with serve(Starlette(routes=[Mount("/llm", llm)], lifespan=llm.lifespan)) as url, Stage(url, expected, llm) as running:
        yield running


@pytest.fixture(scope="module")
def expected(real_servers: RealServers) -> dict[str, tuple[str, str]]:
    """What the servers themselves answer."""
    answers = {}
    for server in real_servers:
        status, body = server.call("POST", "/v1" + PROMPT.path, json.dumps(PROMPT.body(server.name)).encode())
        assert status == 200, body
        answers[server.name] = text_of(PROMPT, body)
    assert answers["alpha"] != answers["beta"]
    return {**answers, "own": answers["alpha"]}
