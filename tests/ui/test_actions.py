"""The buttons do what they say, and say what they did."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.ui.browser import opened
from tests.ui.gateways import Gateway, admin, traffic

pytestmark = pytest.mark.ui


def button(page: Page, model: str, action: str) -> Locator:
    return page.locator(f"[data-model={model!r}] [data-action={action}]")


def said(page: Page, words: str) -> None:
    expect(page.get_by_role("status")).to_contain_text(words)


def state(gateway: Gateway, model: str) -> Any:
    return admin(gateway, "GET", f"models/{model}")["state"]


def test_wake_and_sleep(browser: Browser, gateway: Gateway) -> None:
    with opened(browser, gateway.url) as page:
        for model in ("meta/llama", "qwen"):
            button(page, model, "wake").click()
            said(page, f"{model} is awake. It took")
            assert state(gateway, model) == "awake"
            expect(page.locator(f"[data-model='{model}']")).to_have_attribute("data-state", "awake")
        expect(page.locator("#headline")).to_have_text("qwen is awake, nothing runs")
        assert page.title() == "qwen · llmux_asgi"
        button(page, "qwen", "wake").press("Enter")  # what makes no sense now says why
        said(page, "qwen is awake already.")
        button(page, "qwen", "sleep").click()
        said(page, "qwen is asleep. It took")
        assert state(gateway, "qwen") == "asleep"
        expect(page.locator("#mode")).to_have_text("idle")


def test_pin_and_unpin(browser: Browser, gateway: Gateway) -> None:
    with opened(browser, gateway.url) as page:
        button(page, "qwen", "pin").click()
        said(page, "qwen is pinned")
        assert admin(gateway, "GET", "status")["pinned"] == "qwen"
        assert state(gateway, "qwen") == "awake"
        expect(page.locator("[data-notice=pin]")).to_contain_text("qwen is pinned")
        page.locator("[data-notice=pin]").get_by_role("button", name="Unpin").click()
        said(page, "qwen is not pinned any more.")
        assert admin(gateway, "GET", "status")["pinned"] is None
        button(page, "qwen", "pin").click()
        button(page, "qwen", "unpin").click()
        said(page, "qwen is not pinned any more.")
        expect(page.locator("[data-notice=pin]")).to_have_count(0)


def test_what_is_refused_is_told_in_plain_words(browser: Browser, gateway: Gateway) -> None:
    admin(gateway, "POST", "models/qwen/pin")
    try:
        with opened(browser, gateway.url, troubles=True) as page:
            button(page, "meta/llama", "wake").click()
            said(page, "Waking meta/llama failed (409): ")
            expect(page.locator("#said-box")).to_have_attribute("data-kind", "bad")
            page.get_by_role("button", name="Close this message").click()
            expect(page.get_by_role("status")).to_have_text("")
    finally:
        admin(gateway, "DELETE", "models/qwen/pin")


def test_drain_asks_first_and_resume_takes_requests_again(browser: Browser, gateway: Gateway) -> None:
    with opened(browser, gateway.url) as page:
        page.get_by_role("button", name="Drain all").click()
        page.get_by_role("button", name="Cancel").click()
        assert admin(gateway, "GET", "status")["draining"] is False
        page.get_by_role("button", name="Drain all").click()
        page.get_by_role("dialog").get_by_role("button", name="Drain").click()
        said(page, "Drained: nothing runs any more.")
        assert admin(gateway, "GET", "status")["draining"] is True
        expect(page.locator("[data-notice=drain]")).to_contain_text("new requests are refused (503)")
        page.get_by_role("button", name="Resume").click()
        said(page, "Requests are taken again.")
        assert admin(gateway, "GET", "status")["draining"] is False


def test_stop_is_there_for_managed_servers_only_and_asks_first(browser: Browser, gateway: Gateway) -> None:
    with opened(browser, gateway.url) as page:
        expect(button(page, "qwen", "stop")).to_be_hidden()
        button(page, "managed", "wake").click()
        said(page, "managed is awake.")
        stop = button(page, "managed", "stop")
        stop.click()
        expect(page.get_by_role("dialog")).to_contain_text("Stop managed?")
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_be_hidden()
        expect(stop).to_be_focused()
        assert state(gateway, "managed") == "awake"
        stop.click()
        page.get_by_role("button", name="Stop it").click()
        said(page, "managed is stopped. It took")
        assert state(gateway, "managed") == "stopped"
        expect(page.locator("[data-model=managed]")).to_have_attribute("data-state", "stopped")


def test_reload_brings_a_new_model_and_a_bad_configuration_changes_nothing(browser: Browser, gateway: Gateway) -> None:
    gateway.models["later"] = {**gateway.models["qwen"], "url": "http://127.0.0.1:9"}
    gateway.write()
    try:
        with opened(browser, gateway.url, troubles=True) as page:
            reload = page.get_by_role("button", name="Reload configuration")
            reload.click()
            said(page, "The configuration was reloaded: added later.")
            expect(page.locator("[data-model=later]")).to_be_visible()
            gateway.models["later"]["url"] = "not a URL"
            gateway.write()
            reload.click()
            said(page, "Reloading the configuration failed (4")
            del gateway.models["later"]
            gateway.write()
            reload.click()
            said(page, "removed later.")
            expect(page.locator("[data-model=later]")).to_have_count(0)
    finally:
        gateway.models.pop("later", None)


def test_counts_show_what_runs_and_what_waits(browser: Browser, gateway: Gateway) -> None:
    admin(gateway, "POST", "models/qwen/pin")
    try:
        with opened(browser, gateway.url) as page, traffic(gateway, "meta/llama", "meta/llama", "qwen"):
            row = page.locator("[data-model='meta/llama'] [data-label=Waiting]")
            expect(row).to_contain_text("2")
            expect(row).to_contain_text("oldest")
            expect(page.locator("[data-tile=waiting]")).to_contain_text("2")
            expect(page.locator("[data-model=qwen] [data-label=Running]")).to_have_text("1")
            admin(gateway, "DELETE", "models/qwen/pin")
            expect(page.locator("[data-model='meta/llama']")).to_have_attribute("data-state", "awake")
    finally:
        admin(gateway, "DELETE", "models/qwen/pin")
