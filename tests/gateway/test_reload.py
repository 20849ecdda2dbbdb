"""A configuration that is read anew by a gateway under traffic, over real sockets, on both event loops."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from llmux_asgi import ConfigError, LLMuxApp
from llmux_asgi._notice import Notices
from llmux_asgi.sim import GpuLedger, SimOptions, SimProcess, start_sims
from tests.support.eventually import eventually, is_at_rest
from tests.support.serve import EventLoop, serve
from tests.support.upstream import Exchange, ScriptedServer, wait_for

POLICY = {"name": "fifo", "min_active_duration": 0}


@contextmanager
def reloadable(llm: LLMuxApp, loop: EventLoop) -> Iterator[httpx.Client]:
    """Serve the gateway at /llm. `POST /reload` has it go by the configuration in its body, or by its file."""

    async def reload(request: Request) -> Response:
        try:
            report = await llm.reload(await request.json() if await request.body() else None)
        except ConfigError as exc:
            return JSONResponse({"error": str(exc)}, 422)
        names = {"added": report.added, "changed": report.changed, "removed": report.removed, "settings": report.settings}
        return JSONResponse(names)

    host = Starlette(routes=[Route("/reload", reload, methods=["POST"]), Mount("/llm", llm)], lifespan=llm.lifespan)
    with serve(host, loop) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def sims(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[GpuLedger, dict[str, SimProcess]]]:
    path = str(tmp_path_factory.mktemp("gpu") / "ledger.json")
    with start_sims(*(SimOptions(name=name, gpu=path, start_asleep=1, tokens_per_second=400) for name in "xyz")) as started:
        yield GpuLedger(path), {sim.name: sim for sim in started}


def test_no_request_is_lost_while_models_come_go_and_change(
    sims: tuple[GpuLedger, dict[str, SimProcess]], loop: EventLoop
) -> None:
    ledger, servers = sims
    for server in servers.values():  # one that no model has yet is not the gateway's business
        httpx.post(f"{server.url}/sleep", params={"level": "1"}, timeout=30).raise_for_status()

    def config(**models: str) -> dict[str, Any]:
        built = {name: {"url": servers[sim].url, "served_name": sim} for name, sim in models.items()}
        return {"models": built, "policy": POLICY}

    steps = [
        {"one": "x", "two": "y"},
        {"one": "x", "two": "y", "three": "z"},  # added
        {"one": "x", "zwei": "y", "three": "z"},  # renamed
        {"one": "z", "zwei": "y", "three": "x"},  # swapped
        {"one": "z"},  # removed
        {"one": "y", "two": "z", "three": "x"},  # each another one
    ]
    llm = LLMuxApp(config(**steps[0]))
    answers: list[tuple[str, int, str]] = []

    async def main(client: httpx.AsyncClient) -> None:
        names, over, answered = list(steps[0]), False, anyio.Event()
        under_way: Counter[str] = Counter()

        async def ask(number: int) -> None:
            nonlocal answered
            while not over:
                name = names[number % len(names)]
                number += 1
                body = {"model": name, "prompt": "go", "max_tokens": 6, "stream": True}
                under_way[name] += 1
                response = await client.post("/llm/v1/completions", json=body)
                under_way[name] -= 1
                answers.append((name, response.status_code, response.text[-14:] if response.is_success else response.text))
                answered.set()
                answered = anyio.Event()

        async def until_answered(count: int) -> None:
            goal = len(answers) + count
            while len(answers) < goal:
                await answered.wait()

        async def until_arrived(name: str) -> None:
            def there() -> int:
                statistics = llm.switcher.statistics()
                return statistics.in_flight[name] + statistics.waiting[name]

            while there() != under_way[name]:
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as tasks:
            for number in range(5):
                tasks.start_soon(ask, number)
            for step in steps[1:]:
                await until_answered(8)
                # Who has asked under a name that goes is served; nobody asks under it from now on.
                gone = [name for name in names if name not in step]
                names[:] = [name for name in names if name in step]
                for name in gone:
                    await until_arrived(name)
                answer = await client.post("/reload", json=config(**step))
                assert answer.status_code == 200
                names[:] = step
            await until_answered(8)
            over = True

    async def run(url: httpx.URL) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            await main(client)

    with reloadable(llm, loop) as host:
        anyio.run(run, host.base_url)
        assert [answer for answer in answers if answer[1:] != (200, "data: [DONE]\n\n")] == []
        assert {name for name, _, _ in answers} == {name for step in steps for name in step}
        eventually("all servers are the new ones", lambda: llm.switcher.statistics().unsettled == ())
        eventually("nothing is under way", lambda: is_at_rest(llm))
        assert llm.switcher.statistics().failures == 0
    assert ledger.max_awake() == 1
    assert not [event for event in ledger.events() if event.event == "request_while_asleep"]


async def answer(exchange: Exchange) -> None:
    await exchange.start("application/json")
    await exchange.chunk(b"{}", last=True)


def ask(client: httpx.Client, model: str, key: str = "", path: str = "completions", **body: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return client.post(f"/llm/v1/{path}", json={"model": model, "prompt": "", **body}, headers=headers)


def test_keys_limits_and_tasks_hold_from_the_next_request_on(loop: EventLoop, tmp_path: Path) -> None:
    first, second = "first-key-of-a-client", "second-key-of-a-client"
    for number, key in enumerate((first, second)):
        (tmp_path / f"key{number}").write_text(key)
    log = tmp_path / "requests.jsonl"
    server = ScriptedServer(answer)
    with serve(server) as url:
        model: dict[str, Any] = {"url": url}

        def config(*keys: int, **more: Any) -> dict[str, Any]:
            access = {"keys": {f"client{number}": {"file": str(tmp_path / f"key{number}")} for number in keys}}
            return {"models": {"qwen": model}, "policy": POLICY, **({"access": access} if keys else {}), **more}

        app = LLMuxApp(config(0))
        with reloadable(app, loop) as client:
            assert ask(client, "qwen", first).status_code == 200
            assert ask(client, "qwen", second).status_code == 401
            assert client.post("/reload", json=config(1)).json()["settings"] == ["access"]
            assert ask(client, "qwen", first).status_code == 401
            assert ask(client, "qwen", second).status_code == 200
            assert client.post("/reload", json=config(loading_notice="none", limits={"heartbeat": 3})).status_code == 200
            assert app._inference.notices == Notices("none", 3)
            limits = {"max_body": 100, "max_buffered": 100}
            assert client.post("/reload", json=config(limits=limits, request_log=str(log))).status_code == 200
            assert ask(client, "qwen").status_code == 200
            assert ask(client, "qwen", user="x" * 100).status_code == 413
            eventually("the request is in the log", lambda: log.exists() and log.read_text().count("\n") == 1)
            model |= {"tasks": ["embed"], "aliases": ["gpt-4o"], "served_name": "inside"}
            model |= {"parameters": {"forced": {"user": "me"}}}
            assert client.post("/reload", json=config()).json()["changed"] == ["qwen"]
            assert ask(client, "gpt-4o").status_code == 404
            assert ask(client, "gpt-4o", path="embeddings").status_code == 200
            assert b'"inside"' in server.requests[-1].body
            assert b'"user":"me"' in server.requests[-1].body.replace(b" ", b"")


def test_what_runs_goes_on_to_its_server_and_what_comes_goes_to_the_new_one(loop: EventLoop) -> None:
    begun, go_on = threading.Event(), threading.Event()

    async def slowly(exchange: Exchange) -> None:
        await exchange.start()
        begun.set()
        await wait_for(go_on)
        await exchange.chunk(b"data: [DONE]\n\n", last=True)

    old, new = ScriptedServer(slowly), ScriptedServer(answer, asleep=True)
    with serve(old) as old_url, serve(new) as new_url:
        llm = LLMuxApp({"models": {"qwen": {"url": old_url}}, "policy": POLICY})
        with reloadable(llm, loop) as client:
            with client.stream("POST", "/llm/v1/completions", json={"model": "qwen", "stream": True}) as response:
                assert begun.wait(10)
                config = {"models": {"qwen": {"url": new_url, "timeouts": {"read": 5}}}, "policy": POLICY}
                assert client.post("/reload", json=config).json()["changed"] == ["qwen"]
                late: list[int] = []
                thread = threading.Thread(target=lambda: late.append(ask(client, "qwen").status_code))
                thread.start()
                eventually("it waits", lambda: llm.switcher.statistics().waiting["qwen"] == 1)
                assert (old.asleep, new.asleep) == (False, True)
                go_on.set()
                assert response.read() == b"data: [DONE]\n\n"
            thread.join(30)
        assert late == [200]
        assert [[each.path for each in server.requests].count("/v1/completions") for server in (old, new)] == [1, 1]
        assert (old.asleep, new.asleep) == (True, False)


def test_its_file_is_read_anew_and_a_bad_one_changes_nothing(loop: EventLoop, tmp_path: Path) -> None:
    file = tmp_path / "llmux.yaml"
    with serve(ScriptedServer(answer)) as url:
        file.write_text(f"models: {{qwen: {{url: '{url}'}}}}")
        with reloadable(LLMuxApp(file), loop) as client:
            assert client.post("/reload").json() == {"added": [], "changed": [], "removed": [], "settings": []}
            file.write_text(f"models: {{qwen: {{url: '{url}', aliases: [gpt-4o]}}}}")
            assert client.post("/reload").json()["changed"] == ["qwen"]
            assert ask(client, "gpt-4o").status_code == 200
            file.write_text("models: {qwen: {url: no}}")
            refused = client.post("/reload")
            assert refused.status_code == 422
            assert "$.models.qwen.url" in refused.json()["error"]
            file.write_text(f"models: {{qwen: {{url: '{url}'}}}}\nmemory: {{settle: 1}}")
            assert "restart it" in client.post("/reload").json()["error"]
            file.unlink()
            assert "No such file" in client.post("/reload").json()["error"]
            assert ask(client, "gpt-4o").status_code == 200


def test_reloads_at_the_same_time_come_one_after_the_other(loop: EventLoop) -> None:
    with serve(ScriptedServer(answer)) as url:
        configs = [{"models": {name: {"url": url}}, "policy": POLICY} for name in ("qwen", "llama")]
        llm = LLMuxApp(configs[0])
        with reloadable(llm, loop) as client:

            async def both() -> None:
                async def one(config: dict[str, Any]) -> None:
                    assert (await other.post("/reload", json=config)).status_code == 200

                async with httpx.AsyncClient(base_url=client.base_url, timeout=30) as other, anyio.create_task_group() as tasks:
                    for config in configs * 3:
                        tasks.start_soon(one, config)

            anyio.run(both)
            eventually("it is settled", lambda: llm.switcher.statistics().unsettled == ())
            (name,) = llm.config.models
            assert ask(client, name).status_code == 200
