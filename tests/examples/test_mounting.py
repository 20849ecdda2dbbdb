"""The gateway mounted in Starlette, FastAPI and Litestar, at a prefix, nested and at the root, with OpenAI's own client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from litestar import Litestar, Router, asgi
from starlette.applications import Starlette
from starlette.routing import Mount

from llmux_asgi import LLMuxApp
from llmux_asgi.sim import SimProcess

from .hosting import ask, check_both_models, client, configuration, post, serving

Host = Callable[[LLMuxApp], Callable[..., Any]]


def starlette_at(prefix: str) -> Host:
    return lambda llm: Starlette(routes=[Mount(prefix, app=llm)])


def starlette_nested(llm: LLMuxApp) -> Starlette:
    return Starlette(routes=[Mount("/a", routes=[Mount("/b", app=llm)])])


def fastapi_at(prefix: str) -> Host:
    def host(llm: LLMuxApp) -> FastAPI:
        app = FastAPI()
        app.mount(prefix, llm)
        return app

    return host


def fastapi_nested(llm: LLMuxApp) -> FastAPI:
    outer, inner = FastAPI(), FastAPI()
    inner.mount("/b", llm)
    outer.mount("/a", inner)
    return outer


def litestar_at(prefix: str) -> Host:
    return lambda llm: Litestar([asgi(prefix, is_mount=True, copy_scope=True)(llm)], logging_config=None)


def litestar_nested(llm: LLMuxApp) -> Litestar:
    inner = Router("/a", route_handlers=[asgi("/b", is_mount=True, copy_scope=True)(llm)])
    return Litestar([inner], logging_config=None)


def litestar_in_starlette(llm: LLMuxApp) -> Starlette:
    return Starlette(routes=[Mount("/a", app=litestar_at("/b")(llm))])


HOSTS: list[Any] = [
    pytest.param(starlette_at("/llm"), "/llm", id="starlette at /llm"),
    pytest.param(starlette_at("/"), "", id="starlette at the root"),
    pytest.param(starlette_at("/v1"), "/v1", id="starlette at a prefix that is also in the path"),
    pytest.param(starlette_nested, "/a/b", id="starlette nested"),
    pytest.param(fastapi_at("/llm"), "/llm", id="fastapi at /llm"),
    pytest.param(fastapi_at("/"), "", id="fastapi at the root"),
    pytest.param(fastapi_nested, "/a/b", id="fastapi nested"),
    pytest.param(litestar_at("/llm"), "/llm", id="litestar at /llm"),
    pytest.param(litestar_at("/"), "", id="litestar at the root"),
    pytest.param(litestar_at("/a/b"), "/a/b", id="litestar at a prefix of two parts"),
    pytest.param(litestar_nested, "/a/b", id="litestar nested"),
    pytest.param(litestar_in_starlette, "/a/b", id="litestar in starlette"),
    pytest.param(lambda llm: llm, "", id="standalone"),
]


@pytest.mark.parametrize(("host", "prefix"), HOSTS)
def test_both_models_are_served_without_the_lifespan(host: Host, prefix: str, sims: list[SimProcess]) -> None:
    llm = LLMuxApp(configuration(sims))
    with serving(host(llm), closing=llm) as url:
        check_both_models(url + prefix)
    # Litestar copies the handlers of a router. A copy of the gateway would be a second owner of the same servers.
    assert llm.switcher.statistics().switches >= 2


@pytest.mark.parametrize(("host", "prefix"), HOSTS)
def test_errors_of_the_gateway_reach_the_client_through_the_host(host: Host, prefix: str, sims: list[SimProcess]) -> None:
    llm = LLMuxApp(configuration(sims))
    with serving(host(llm), closing=llm) as url, client(url + prefix) as gateway:
        with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
            ask(gateway, "gpt-5")
        assert caught.value.code == "model_not_found"
        assert post(f"{url}{prefix}/sleep").json()["error"]["code"] == "unknown_url"
        assert post(f"{url}{prefix}/v1/chat/completions", []).status_code == 400


@pytest.mark.parametrize(
    ("host", "prefix"),
    [
        pytest.param(starlette_at("/llm"), "/llm", id="starlette"),
        pytest.param(fastapi_at("/llm"), "/llm", id="fastapi"),
        pytest.param(litestar_at("/llm"), "/llm", id="litestar"),
        pytest.param(lambda llm: llm, "", id="standalone"),
    ],
)
def test_a_server_told_that_a_proxy_strips_a_prefix(host: Host, prefix: str, sims: list[SimProcess]) -> None:
    llm = LLMuxApp(configuration(sims))
    with serving(host(llm), root_path="/api", closing=llm) as url:
        check_both_models(url + prefix)


@pytest.mark.parametrize("framework", ["starlette", "fastapi", "litestar"])
def test_the_lifespan_closes_what_the_gateway_has_opened(framework: str, sims: list[SimProcess]) -> None:
    closed: list[str] = []

    class Watched(LLMuxApp):
        async def aclose(self) -> None:
            await super().aclose()
            closed.append(framework)

    llm = Watched(configuration(sims))
    hosts: dict[str, Callable[[], Callable[..., Any]]] = {
        "starlette": lambda: Starlette(routes=[Mount("/llm", app=llm)], lifespan=llm.lifespan),
        "fastapi": lambda: _mounted(FastAPI(lifespan=llm.lifespan), llm),
        "litestar": lambda: Litestar(
            [asgi("/llm", is_mount=True, copy_scope=True)(llm)], lifespan=[llm.lifespan], logging_config=None
        ),
    }
    with serving(hosts[framework]()) as url:
        check_both_models(url + "/llm")
        assert closed == []
    assert closed == [framework]


def _mounted(app: FastAPI, llm: LLMuxApp) -> FastAPI:
    app.mount("/llm", llm)
    return app
