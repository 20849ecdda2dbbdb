"""The stream of events over fake backends. On asyncio and on trio."""

from __future__ import annotations

import signal
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from llmux_asgi._journal import Journal
from llmux_asgi.admin import Status, _events
from llmux_asgi.admin._status import status_of
from tests.admin.stage import LIMIT, Client, Stage, events_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at the status often, and sends heartbeats often."""
    monkeypatch.setattr(_events, "_STATUS_INTERVAL", 0.01)
    monkeypatch.setattr(_events, "_HEARTBEAT", 0.05)


def kinds(client: Client) -> list[str]:
    return [kind for _, kind, _ in events_of(client.body)]


def ids(client: Client) -> list[int]:
    return [int(each.rpartition("-")[2]) for each, _, _ in events_of(client.body) if each is not None]


async def test_it_begins_with_the_status_and_what_was_before_and_goes_on() -> None:
    stage = Stage()
    await stage.switcher.wake("a")
    async with stage.connected("GET", "/api/events") as client:
        await client.until(lambda body: b"event: switched" in body or b'"state":"awake"' in body)
        assert kinds(client)[0] == "status"
        assert "reset" not in kinds(client)
        before = len(ids(client))
        await stage.switcher.wake("b")
        await client.until(lambda body: b'"to":"b","outcome":"completed"' in body)
    assert ids(client) == list(range(1, stage.switcher.journal.last_id + 1))
    assert len(ids(client)) > before
    _, _, status = events_of(client.body)[0]
    assert status["epoch"] == stage.switcher.journal.epoch
    assert status["models"][0]["state"] == "awake"
    start = dict(client.sent[0]["headers"])
    assert start[b"content-type"].startswith(b"text/event-stream")
    assert start[b"cache-control"] == b"no-store"


@pytest.mark.parametrize("how", ["header", "query"])
async def test_who_comes_back_gets_what_it_has_missed(how: str) -> None:
    stage = Stage()
    await stage.switcher.wake("a")
    journal = stage.switcher.journal
    last = journal.last_id
    await stage.switcher.wake("b")
    named = f"{journal.epoch}-{last}"
    headers, query = ({"last_event_id": named}, "") if how == "header" else ({}, f"last_event_id={named}")
    async with stage.connected("GET", "/api/events", query, **headers) as client:
        await client.until(lambda body: b'"outcome":"completed"' in body)
    assert ids(client) == list(range(last + 1, journal.last_id + 1))
    assert "reset" not in kinds(client)


@pytest.mark.parametrize("last", ["other-1", "{}-99999999", "{}-1", "{}-x", "{}-" + "9" * 400, "nonsense", "{}--1"])
async def test_who_asks_for_what_is_not_kept_begins_anew(last: str) -> None:
    stage = Stage()
    stage.switcher.journal = journal = Journal(size=5)
    for number in range(10):
        journal.write("drain", draining=bool(number % 2))
    async with stage.connected("GET", "/api/events", last_event_id=last.format(journal.epoch)) as client:
        await client.until(lambda body: b"event: drain" in body)
    assert kinds(client)[:2] == ["reset", "status"]
    assert ids(client) == [6, 7, 8, 9, 10]


async def test_a_reader_who_is_too_slow_for_the_journal_is_told_that_something_is_missing() -> None:
    stage = Stage()
    stage.switcher.journal = journal = Journal(size=5)
    journal.write("pin", model="a")
    async with stage.connected("GET", "/api/events") as client:
        await client.until(lambda body: b"event: pin" in body)
        for _ in range(7):  # without a wait: the stream cannot keep up
            journal.write("drain", draining=True)
        await client.until(lambda body: b"event: drain" in body)
    assert kinds(client) == ["status", "pin", "reset", *["status"] * kinds(client)[3:].count("status"), *["drain"] * 5]
    assert ids(client) == [1, 4, 5, 6, 7, 8]


async def test_the_status_comes_when_it_has_changed_and_not_else(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_events, "_HEARTBEAT", 1000.0)
    stage = Stage()
    await stage.switcher.wake("a")
    looked = 0

    def counted(gateway: Any) -> Status:
        nonlocal looked
        looked += 1
        return status_of(gateway)

    monkeypatch.setattr(_events, "status_of", counted)
    async with stage.connected("GET", "/api/events") as client:
        await client.until(lambda body: b"event: status" in body)
        with anyio.fail_after(LIMIT):
            while looked < 5:
                await anyio.lowlevel.checkpoint()
        assert kinds(client).count("status") == 1
        async with stage.switcher.lease("a"):  # no entry of the journal tells of it
            await client.until(lambda body: b'"in_flight":1' in body)
    assert kinds(client).count("status") == 2
    assert stage.admin._streams.open == set()  # so nobody looks any more


async def test_a_comment_comes_when_nothing_happens_and_the_clocks_go_on(quick: None) -> None:
    stage = Stage()
    async with stage.connected("GET", "/api/events") as client:
        await client.until(lambda body: body.count(b"\n: \n\n") > 1 and body.count(b"event: status") > 1)
    first, second, *_ = [data for _, kind, data in events_of(client.body) if kind == "status"]
    assert second["time"] > first["time"]


async def test_streams_end_with_the_gateway_and_the_next_ones_do_not() -> None:
    stage = Stage()
    with anyio.fail_after(LIMIT):
        async with stage.connected("GET", "/api/events") as client:
            await client.until(lambda body: b"event: status" in body)
            stage.admin.end_streams()
            while not client.ended:
                await client.news.wait()
    async with stage.connected("GET", "/api/events") as client:
        await client.until(lambda body: b"event: status" in body)
        assert not client.ended


async def test_streams_end_when_uvicorn_is_told_to_stop() -> None:
    class Server:
        should_exit = False

        def handle_exit(self, number: int, frame: object) -> None:
            self.should_exit = True

    stage, server = Stage(), Server()
    before = signal.signal(signal.SIGTERM, server.handle_exit)
    try:
        with anyio.fail_after(LIMIT):
            async with stage.connected("GET", "/api/events") as client:
                await client.until(lambda body: b"event: status" in body)
                assert not client.ended
                signal.raise_signal(signal.SIGTERM)
                while not client.ended:
                    await client.news.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
