"""The calls of the admin API over fake backends. On asyncio and on trio."""

from __future__ import annotations

import logging
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from llmux_asgi import BackendError, BackendTimeoutError
from tests.admin.stage import KEY, LIMIT, Stage

pytestmark = pytest.mark.anyio


async def test_the_status_tells_what_the_switcher_knows() -> None:
    stage = Stage()
    await stage.switcher.wake("a")
    async with stage.switcher.lease("a"):
        status = (await stage.ask("GET", "/api/status")).json
    assert (status["mode"], status["active"], status["in_flight"], status["policy"]) == ("active", "a", 1, "fifo")
    assert [each["name"] for each in status["models"]] == ["a", "b", "org/c"]
    a, b, _ = status["models"]
    assert (a["aliases"], a["server"], a["managed"], a["state"], a["sleep_level"]) == (["gpt-4o"], "vllm", False, "awake", 2)
    assert (a["active"], a["in_flight"], a["pinned"]) == (True, 1, False)
    assert (b["managed"], b["active"], b["sleep_level"], b["last_error"]) == (True, False, 1, None)
    assert sum(status["shares"].values()) == pytest.approx(status["time"] - status["started"], abs=1)


async def test_models_are_woken_put_to_sleep_and_stopped() -> None:
    stage = Stage()
    woken = (await stage.ask("POST", "/api/models/b/wake")).json
    assert (woken["name"], woken["state"], woken["active"]) == ("b", "awake", True)
    assert stage.gpu.awake == {"b"}
    assert (await stage.ask("POST", "/api/models/b/sleep")).json["state"] == "asleep"
    assert (await stage.ask("POST", "/api/models/b/sleep")).status == 200  # nothing is left to do
    assert (await stage.ask("POST", "/api/models/b/stop")).json["state"] == "stopped"
    assert "stop b" in stage.gpu.events
    assert stage.gpu.violations == []


async def test_a_model_is_found_by_its_alias_and_with_slashes_in_its_name() -> None:
    stage = Stage()
    assert (await stage.ask("GET", "/api/models/gpt-4o")).json["name"] == "a"
    assert (await stage.ask("GET", "/api/models/org/c")).json["name"] == "org/c"
    assert (await stage.ask("POST", "/api/models/org/c/wake")).json["active"] is True


async def test_a_pinned_model_stays_until_it_is_unpinned_or_another_one_is_pinned() -> None:
    stage = Stage()
    pinned = (await stage.ask("POST", "/api/models/b/pin")).json
    assert (pinned["name"], pinned["pinned"], pinned["active"]) == ("b", True, True)
    refused = await stage.ask("POST", "/api/models/a/wake")
    assert refused.status == 409
    assert "'b' is pinned" in refused.json["error"]["message"]
    assert (await stage.ask("DELETE", "/api/models/a/pin")).json["pinned"] is False  # it was not, and b still is
    assert stage.switcher.pinned == "b"
    assert (await stage.ask("POST", "/api/models/a/pin")).json["active"] is True
    assert (await stage.ask("GET", "/api/status")).json["pinned"] == "a"
    assert (await stage.ask("DELETE", "/api/models/a/pin")).json["pinned"] is False
    assert (await stage.ask("POST", "/api/models/b/wake")).status == 200


async def test_a_pin_that_cannot_wake_its_model_leaves_the_one_before() -> None:
    stage = Stage()
    await stage.ask("POST", "/api/models/a/pin")
    stage.backends["org/c"].fail("wake", BackendError("why"), times=2)
    assert (await stage.ask("POST", "/api/models/org/c/pin")).status == 503
    assert stage.switcher.pinned == "a"


async def test_what_cannot_be_done_has_its_status_and_says_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage()
    stop = await stage.ask("POST", "/api/models/a/stop")
    assert (stop.status, stop.error) == (409, "not_supported")
    assert "Put the model to sleep" in stop.json["error"]["message"]
    await stage.switcher.wake("a")
    for error, status, code in ((BackendError, 502, "backend_error"), (BackendTimeoutError, 504, "backend_timeout")):
        stage.backends["a"].fail("sleep", error("http://10.1.2.3:8001/sleep failed"), times=2)
        failed = await stage.ask("POST", "/api/models/a/sleep")
        assert (failed.status, failed.error) == (status, code)
        assert b"10.1.2.3" not in failed.body
        await stage.switcher.wake("a")
    stage.backends["org/c"].fail("wake", BackendError("why"), times=2)
    failed = await stage.ask("POST", "/api/models/org/c/wake")
    assert (failed.status, failed.error) == (503, "model_switch_failed")
    again = await stage.ask("POST", "/api/models/org/c/wake")  # backs off
    assert (again.status, again.headers["retry-after"]) == (503, "30")
    seen = (await stage.ask("GET", "/api/models/org/c")).json
    assert seen["retry_in"] == pytest.approx(30, abs=10)
    assert "why" in seen["last_error"]["message"]


async def test_a_client_that_leaves_gives_its_wake_up() -> None:
    stage = Stage()
    await stage.switcher.wake("a")
    async with stage.switcher.lease("a"):  # the switch waits for it
        async with stage.connected("POST", "/api/models/b/wake") as client:
            with anyio.fail_after(LIMIT):
                while not stage.switcher.statistics().waiting["b"]:
                    await anyio.lowlevel.checkpoint()
        assert client.sent == []
        assert stage.switcher.statistics().waiting["b"] == 0
    assert "wake b" not in stage.gpu.events


async def test_draining_refuses_what_is_new_and_waits_for_the_rest() -> None:
    stage = Stage()
    await stage.switcher.wake("a")
    async with stage.switcher.lease("a"):
        at_once = (await stage.ask("POST", "/api/drain")).json
        assert (at_once["draining"], at_once["drained"], at_once["in_flight"]) == (True, False, 1)
        assert (await stage.ask("POST", "/api/drain", "wait=0.01")).json["drained"] is False
        async with stage.connected("POST", "/api/drain", "wait=60") as left:
            await anyio.lowlevel.checkpoint()
        assert left.sent == []
    assert (await stage.ask("POST", "/api/drain", "wait=60")).json["drained"] is True
    assert (await stage.ask("POST", "/api/resume")).json["draining"] is False
    async with stage.switcher.lease("a"):
        pass
    for wrong in ("wait=-1", "wait=x", "wait=nan", "wait=1e9"):
        refused = await stage.ask("POST", "/api/drain", wrong)
        assert (refused.status, refused.json["error"]["param"]) == (400, "wait")
    assert not stage.switcher.draining


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/api", 404, None),
        ("GET", "/api/nothing", 404, None),
        ("GET", "/api/models/nobody", 404, None),
        ("POST", "/api/models/nobody/wake", 404, None),
        ("DELETE", "/api/models/nobody/pin", 404, None),
        ("POST", "/api/models/a", 405, "GET, HEAD"),
        ("GET", "/api/models/a/wake", 405, "POST"),
        ("GET", "/api/models/a/pin", 405, "POST, DELETE"),
        ("PUT", "/api/models/a/pin", 405, "DELETE, POST"),
        ("POST", "/api/events", 405, "GET, HEAD"),
        ("OPTIONS", "/api/drain", 405, "POST"),
        ("POST", "/", 405, "GET, HEAD"),
        ("GET", "/elsewhere", 404, None),
        ("GET", "/static/nothing.js", 404, None),
    ],
)
async def test_what_there_is_not_is_told_in_json(method: str, path: str, status: int, allow: str | None) -> None:
    answer = await Stage().ask(method, path)
    assert (answer.status, answer.headers.get("allow")) == (status, allow)
    assert answer.headers["content-type"] == "application/json"
    assert answer.json["error"]["message"]


async def test_head_has_the_headers_only() -> None:
    stage = Stage()
    for path in ("/api/status", "/api/models/a", "/api/openapi.json", "/api/events", "/api/models/nobody"):
        answer = await stage.ask("HEAD", path)
        assert answer.body == b""
        assert answer.headers["cache-control"] == "no-store"


async def test_it_is_told_who_did_what(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llmux_asgi.admin")
    stage = Stage()
    for call in ("models/b/wake", "models/b/sleep", "models/b/pin", "models/b/stop", "drain", "resume"):
        await stage.ask("POST", f"/api/{call}")
    await stage.ask("DELETE", "/api/models/b/pin")
    lines = [record.getMessage() for record in caplog.records if record.name == "llmux_asgi.admin"]
    assert [line.removeprefix("the operator 'ops' ").split(" ")[0] for line in lines] == [
        "wakes", "puts", "pins", "stops", "drains", "resumes", "unpins",
    ]  # fmt: skip
    assert KEY not in caplog.text


async def test_an_unexpected_error_is_a_500_in_json(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage()

    def broken(*arguments: Any) -> Any:
        raise ValueError("secret")

    monkeypatch.setattr(stage.switcher, "statistics", broken)
    answer = await stage.ask("GET", "/api/status")
    assert (answer.status, answer.error) == (500, "internal_error")
    assert b"secret" not in answer.body
    assert "ValueError: secret" in caplog.text
