"""The page in a real Chromium: Debian's, driven by Playwright. Nothing is downloaded by Playwright itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Response, expect, sync_playwright

from tests.support.debian import program
from tests.ui.gateways import KEY

__all__ = ["chromium", "enter", "opened"]

PATIENCE = 20_000
"""Milliseconds; a busy machine takes its time."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start it. Raises `tests.support.debian.Unavailable`."""
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program("chromium", "chromium"))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Browser, url: str, *, key: str | None = KEY, troubles: bool = False, **context: Any) -> Iterator[Page]:
    """Open the dashboard of the gateway at `url`, with the key given unless it is None.

    The block fails if the console has shown an error or a warning, or a request has failed, unless `troubles` are expected.
    """
    found: list[str] = []

    def on_console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            found.append(f"console: {message.text}")

    def on_failed(request: Request) -> None:
        # Its own stream ends when the page is closed or loaded anew.
        if request.failure != "net::ERR_ABORTED" or not request.url.endswith("/api/events"):
            found.append(f"failed: {request.url} {request.failure}")

    def on_response(response: Response) -> None:
        if response.status >= 400:
            found.append(f"status {response.status}: {response.url}")

    opened_context = browser.new_context(**context)
    opened_context.set_default_timeout(PATIENCE)
    page = opened_context.new_page()
    page.on("console", on_console)
    page.on("pageerror", lambda error: found.append(f"error: {error}"))
    page.on("requestfailed", on_failed)
    page.on("response", on_response)
    try:
        page.goto(f"{url}/admin")  # without a slash, as people type it
        if key is not None:
            enter(page, key)
            expect(page.locator("#link")).to_have_attribute("data-link", "live")
        yield page
    finally:
        opened_context.close()
    assert troubles or not found, "\n".join(found)


def enter(page: Page, key: str) -> None:
    """Type the key and confirm it by the keyboard."""
    page.locator("#key").fill(key)
    page.locator("#key").press("Enter")
