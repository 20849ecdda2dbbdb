"""The admin API: who reaches it, and what it tells."""

from __future__ import annotations

import json
import logging

import anyio
import anyio.lowlevel
import httpx
import pytest

from llmux_asgi import BackendError, LLMuxApp
from llmux_asgi.access import hash_key
from llmux_asgi.admin import _events
from llmux_asgi.admin._openapi import description
from llmux_asgi.exceptions import BackendStartError
from tests.admin.stage import CLIENT_KEY, KEY, LIMIT, Stage
from tests.security.conftest import MOUNTS, Fortress
from tests.security.wire import post

CALLS = [(method.upper(), path) for path, methods in description()["paths"].items() for method in methods]
SPELLINGS = (
    "/admin",
    "/admin/",
    "/admin/api/status",
    "/admin/api/models/a/wake",
    "//admin/api/status",
    "/ADMIN/api/status",
    "/%61dmin/api/status",
    "/admin%2fapi%2fstatus",
    "/v1/../admin/api/status",
    "/v1/models/../../admin/api/status",
    "/models/a/admin/api/status",
    "/admin;/api/status",
    "/admin\\api\\status",
)


def test_where_it_is_not_configured_no_spelling_finds_it(gateway: Fortress) -> None:
    for path in SPELLINGS:
        for method in (b"GET", b"POST") if path == "/admin/api/status" else (b"GET",):
            answer = gateway.send(post("/llm" + path, b"", b"authorization: Bearer " + KEY.encode(), method=method))
            assert answer.statuses in ([404], [400]), path
    for mount in MOUNTS:
        assert gateway.send(post(mount + "/admin/api/status", b"", method=b"GET")).statuses == [404]


@pytest.mark.anyio
async def test_without_its_key_no_call_is_answered() -> None:
    stage = Stage()
    strangers: list[dict[str, str]] = [
        {"authorization": ""},
        {"authorization": "Bearer llmux-admin-9876543210"},
        {"authorization": "Bearer"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": f"Bearer {KEY}", "x_api_key": "llmux-admin-9876543210"},
        {"authorization": "", "x_api_key": KEY[:-1]},
        {"authorization": "", "cookie": f"key={KEY}"},
        {"authorization": "", "sec_websocket_protocol": f"openai-insecure-api-key.{KEY}"},
    ]
    for method, path in [*CALLS, ("GET", "/api/nothing"), ("PUT", "/api/status"), ("HEAD", "/api/events"), ("GET", "/api")]:
        for headers in strangers if path == "/api/status" else strangers[:2]:
            refused = await stage.ask(method, path.replace("{model}", "a"), f"key={KEY}", **headers)
            assert refused.status == 401, (method, path, headers)
            assert refused.headers["www-authenticate"] == "Bearer"
    # Before a body is taken in.
    assert (await stage.ask("POST", "/api/drain", authorization="", content_length="65537")).status == 401
    assert stage.gpu.events == []
    assert not stage.switcher.draining


@pytest.mark.anyio
async def test_a_clients_key_opens_no_admin_api_and_an_operators_serves_no_client() -> None:
    both = "llmux-shared-0123456789"
    access = {"keys": {"client": {"hash": hash_key(CLIENT_KEY)}, "shared": {"hash": hash_key(both)}}}
    admin = {"keys": {"ops": {"hash": hash_key(KEY)}, "shared": {"hash": hash_key(both)}}}
    llm = LLMuxApp({"models": {"a": {"url": "http://127.0.0.1:9"}}, "access": access, "admin": admin})
    transport = httpx.ASGITransport(llm)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:

        async def status(path: str, key: str) -> int:
            return (await client.get(path, headers={"authorization": f"Bearer {key}"})).status_code

        assert [await status("/admin/api/status", key) for key in (KEY, CLIENT_KEY, both)] == [200, 401, 401]
        assert [await status("/v1/models", key) for key in (KEY, CLIENT_KEY, both)] == [401, 200, 200]
        for path in SPELLINGS[2:]:  # those before are the page, which is for all
            assert await status(path, CLIENT_KEY) in (401, 404, 405), path
    await llm.aclose()


@pytest.mark.anyio
async def test_neither_status_nor_events_nor_errors_tell_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    stage = Stage()
    stage.backends["org/c"].fail("wake", BackendError("http://10.1.2.3:8003/wake_up?token=swordfish failed"), times=2)
    output = "the process of 'b' ended:\nTraceback: swordfish in /home/operator/model"
    stage.backends["b"].fail("wake", BackendStartError(output), times=2)
    answers = [await stage.ask("POST", f"/api/models/{model}/wake") for model in ("org/c", "b", "a")]
    answers += [await stage.ask("GET", path) for path in ("/api/status", "/api/models", "/api/models/b", "/api/openapi.json")]
    async with stage.connected("GET", "/api/events") as client:
        await client.until(lambda body: b'"to":"a","outcome":"completed"' in body)
    told = b"".join([*(answer.body for answer in answers), client.body])
    assert b"event: error" in told
    for secret in (b"10.1.2.3", b"swordfish", b"/home/operator", KEY.encode(), hash_key(KEY).encode()):
        assert secret not in told, secret
    assert KEY not in caplog.text


@pytest.mark.anyio
async def test_a_call_with_a_large_or_a_slow_body_is_refused() -> None:
    stage = Stage(limits={"body_timeout": 0.05, "max_headers": 1024})
    announced = await stage.ask("POST", "/api/drain", content_length="65537")
    chunks = await stage.ask("POST", "/api/drain", "", *[b"x" * 30_000] * 3)
    assert (announced.status, chunks.status) == (413, 413)
    assert announced.headers["connection"] == "close"  # what is left of it is not the next request
    async with stage.connected("POST", "/api/drain") as slow:
        slow.incoming[0]["more_body"] = True
        await slow.until(lambda body: b"request_timeout" in body)
    assert (await stage.ask("POST", "/api/drain", x_filler="x" * 1024)).status == 431
    assert not stage.switcher.draining
    assert (await stage.ask("POST", "/api/drain", "", b"{}")).status == 200


@pytest.mark.anyio
async def test_an_event_stream_that_is_not_read_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage(limits={"write_timeout": 0.05})
    async with stage.connected("GET", "/api/events") as client:
        client.reads = anyio.Event()
        try:
            with anyio.fail_after(LIMIT):
                while not client.sent:  # and no more than this is taken
                    await anyio.lowlevel.checkpoint()
                for _ in range(10_000):  # nothing of it is kept for who does not read, beyond what the journal keeps
                    stage.switcher.journal.write("drain", draining=True)
                while stage.admin._streams.open:
                    await anyio.lowlevel.checkpoint()
        finally:
            client.reads.set()
    assert len(client.sent) == 1
    assert "is not read" in caplog.text


@pytest.mark.anyio
async def test_event_streams_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_events, "MOST_STREAMS", 2)
    stage = Stage()
    async with stage.connected("GET", "/api/events") as first, stage.connected("GET", "/api/events") as second:
        for client in (first, second):
            await client.until(lambda body: b"event: status" in body)
        refused = await stage.ask("GET", "/api/events")
        assert (refused.status, refused.headers["retry-after"]) == (429, "5")
    assert stage.admin._streams.open == set()  # and they are counted out
    async with stage.connected("GET", "/api/events") as third:
        await third.until(lambda body: b"event: status" in body)


@pytest.mark.anyio
async def test_no_site_is_invited_to_control_the_gateway() -> None:
    stage = Stage()
    asked = {"origin": "https://evil.example", "access_control_request_method": "POST"}
    answers = [await stage.ask("OPTIONS", "/api/models/a/wake", authorization="", **asked)]
    answers.append(await stage.ask("OPTIONS", "/api/models/a/wake", **asked))
    answers.append(await stage.ask("GET", "/api/status", origin="https://evil.example"))
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith("access-control-")]
        assert "set-cookie" not in answer.headers
    assert [answer.status for answer in answers] == [401, 405, 200]


@pytest.mark.anyio
async def test_a_name_from_the_path_is_told_escaped_and_cut() -> None:
    evil = "<script>\x1b[2J\r\nx: y" + "x" * 100_000
    for path in (f"/api/models/{evil}", f"/api/models/{evil}/wake", f"/api/{evil}", f"/static/{evil}"):
        answer = await Stage().ask("GET", path)
        assert answer.status in (404, 405)
        assert len(answer.body) < 1000
        assert b"\x1b" not in answer.body
        assert json.loads(answer.body)["error"]["message"].isprintable()
