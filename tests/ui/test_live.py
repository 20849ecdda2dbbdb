"""What the page shows while traffic runs, wherever it is mounted, and after the connection or the gateway was away."""

from __future__ import annotations

import signal
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support.eventually import eventually
from tests.ui.browser import opened
from tests.ui.gateways import Gateway, admin, journal, proxied, traffic

pytestmark = pytest.mark.ui

WITHIN = 1.0
"""Seconds from the journal's time of a change to the page's, in the middle of all changes."""
AT_MOST = 5.0
"""The longest of them: another process of this machine may have had the processor."""

WATCH = """() => {
  window.seen = [];
  new MutationObserver((records) => {
    for (const { target } of records) {
      if (target.matches("tr")) window.seen.push([target.dataset.model, target.dataset.state, Date.now() / 1000]);
    }
  }).observe(document.getElementById("models"), { subtree: true, attributes: true, attributeFilter: ["data-state"] });
}"""


@pytest.fixture(params=["/", "/llm", "proxy"])
def mounted(request: pytest.FixtureRequest, asleep: dict[str, Any], folder: Path) -> Iterator[tuple[Gateway, str]]:
    """The gateway and the URL that the browser uses: mounted at the root, below a path, behind a proxy that strips one."""
    prefix = "/llm" if request.param == "/llm" else ""
    with ExitStack() as stack:
        gateway = stack.enter_context(Gateway(folder, asleep, prefix).running())
        url = stack.enter_context(proxied(gateway, "/gpu0/llm"))[0] if request.param == "proxy" else gateway.url
        yield gateway, url


def lags(seen: list[tuple[str, str, float]], happened: list[tuple[str, dict[str, Any]]]) -> list[float]:
    """How long after it happened the page has shown each change of a model's state."""
    found = []
    for model, state, shown in seen:
        if state == "unknown":
            continue  # before a server was looked at; the journal says what was found
        changes = [entry for kind, entry in happened if kind == "model" and (entry["model"], entry["state"]) == (model, state)]
        before = [each["time"] for each in changes if each["time"] <= shown + 0.01]  # one machine's clock, in milliseconds
        assert before, f"the page showed that {model} is {state} before it was"
        found.append(shown - before[-1])
    return found


def test_each_change_of_state_shows_within_a_second_while_traffic_runs(
    browser: Browser, mounted: tuple[Gateway, str], record_property: Any
) -> None:
    gateway, url = mounted
    with opened(browser, url) as page:
        assert page.url == f"{url}/admin/"
        page.evaluate(WATCH)
        with traffic(gateway, "qwen", "meta/llama"):
            eventually("twelve changes", lambda: page.evaluate("window.seen.length") >= 12)
        found = lags(page.evaluate("window.seen"), journal(gateway))
        record_property("lags", [round(each, 3) for each in sorted(found)])
        print(f"shown after {statistics.median(found):.3f} s, the latest after {max(found):.3f} s")  # noqa: T201
        assert statistics.median(found) < WITHIN
        assert max(found) < AT_MOST
        switches = admin(gateway, "GET", "status")["totals"]["switches"]
        expect(page.locator("[data-tile=switches] dd").first).to_have_text(str(switches))


def table(page: Page) -> list[list[str]]:
    """The switches of the window, newest first."""
    rows = "[...document.querySelectorAll('#switches tr')]"
    found: list[list[str]] = page.evaluate(f"{rows}.map((row) => [...row.cells].map((cell) => cell.textContent))")
    return found


def ended(row: list[str]) -> bool:
    return row[2:3] == ["completed"]


def test_the_timeline_is_told_in_words_and_as_a_table_too(browser: Browser, asleep: dict[str, Any], folder: Path) -> None:
    with Gateway(folder, asleep).running() as gateway, opened(browser, gateway.url) as page:
        page.get_by_text("As a table").click()
        with traffic(gateway, "qwen", "meta/llama"):
            eventually("a switch between them", lambda: any(ended(row) and "nothing" not in row[1] for row in table(page)))
            expect(page.locator("#steps li")).to_have_count(5)
        row = next(each for each in table(page) if ended(each) and "nothing" not in each[1])
        assert set(row[1].split(" → ")) == {"qwen", "meta/llama"}
        assert row[5].endswith(" s")  # sleep
        assert row[6].endswith(" s")  # wake
        assert int(row[9]) >= 1  # waited
        expect(page.locator("#timeline-text")).to_contain_text("switches in 5 min")
        page.locator("label[for=window-60]").click()
        expect(page.locator("#timeline-text")).to_contain_text("in 1 min")
        assert page.locator("#chart").get_attribute("aria-label") == "Timeline of 3 models over the last 1 min"
        page.get_by_role("button", name="Pause").click()
        expect(page.locator("#pause")).to_have_attribute("aria-pressed", "true")
        box = page.locator("#chart").bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 10)
        expect(page.locator("#tip")).to_contain_text("qwen")


def test_a_dropped_connection_is_taken_up_after_the_last_event(browser: Browser, asleep: dict[str, Any], folder: Path) -> None:
    with Gateway(folder, asleep).running() as gateway, proxied(gateway, "/x") as (url, proxy), opened(browser, url) as page:
        admin(gateway, "POST", "models/qwen/wake")
        page.get_by_text("As a table").click()
        eventually("the first switch", lambda: [ended(row) for row in table(page)] == [True])
        proxy.drop()
        admin(gateway, "POST", "models/meta/llama/wake")
        admin(gateway, "POST", "models/qwen/wake")
        eventually("all three switches", lambda: [ended(row) for row in table(page)] == [True] * 3)
        expect(page.locator("#link")).to_have_attribute("data-link", "live")
        assert len(proxy.last_event_ids) == 2
        assert proxy.last_event_ids[0] is None
        assert proxy.last_event_ids[1] is not None


def test_after_a_restart_of_the_gateway_it_connects_by_itself_and_keeps_what_was_before(
    browser: Browser, asleep: dict[str, Any], folder: Path
) -> None:
    with Gateway(folder, asleep).running() as gateway, opened(browser, gateway.url, troubles=True) as page:
        page.get_by_text("As a table").click()
        admin(gateway, "POST", "models/qwen/wake")
        eventually("the switch", lambda: [ended(row) for row in table(page)] == [True])
        gateway.stop(signal.SIGKILL)
        expect(page.locator("#link")).to_have_attribute("data-link", "waiting")
        expect(page.locator("#link-text")).to_contain_text("next try in")
        expect(page.get_by_role("button", name="Try now")).to_be_visible()
        gateway.start()
        admin(gateway, "POST", "models/meta/llama/wake")
        expect(page.locator("#link-text")).to_have_text("Live")
        eventually("both switches", lambda: [ended(row) for row in table(page)] == [True] * 2)
        assert [row[1].rpartition(" → ")[2] for row in table(page)] == ["meta/llama", "qwen"]
        expect(page.locator("[data-model='meta/llama']")).to_have_attribute("data-state", "awake")
        expect(page.locator("[data-tile=switches] dd").first).to_have_text("1")  # of the new process
