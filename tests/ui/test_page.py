"""The page itself: the key, keyboard, phone, colours, names that are markup, many models."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support.eventually import eventually
from tests.ui.browser import enter, opened
from tests.ui.gateways import KEY, Gateway, admin

pytestmark = pytest.mark.ui

PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


def test_a_wrong_key_is_told_and_a_right_one_stays_in_this_tab_only(browser: Browser, gateway: Gateway) -> None:
    with opened(browser, gateway.url, key=None, troubles=True) as page:
        expect(page.locator("#key")).to_be_focused()
        enter(page, "wrong")
        expect(page.get_by_role("alert")).to_contain_text("This key was not accepted.")
        expect(page.locator("#board")).to_be_hidden()
        assert page.evaluate("sessionStorage.length") == 0
        enter(page, KEY)
        expect(page.locator("#link-text")).to_have_text("Live")
        page.reload()
        expect(page.locator("#link-text")).to_have_text("Live")
        stored = "[document.cookie, ...Object.values(localStorage), document.documentElement.outerHTML, location.href].join()"
        assert KEY not in page.evaluate(stored)
        with page.context.expect_page() as other:
            page.evaluate("open(location.href, '_blank', 'noopener')")
        expect(other.value.locator("#gate")).to_be_visible()
        page.get_by_role("button", name="Forget key").click()
        expect(page.locator("#gate")).to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0


def focused(page: Page) -> str:
    """The button or field that has the focus, by its name; its outline must be visible."""
    name, outline = page.evaluate(
        """() => {
          const it = document.activeElement;
          const ring = it.matches(".pick input") ? it.nextElementSibling : it;
          const name = it.getAttribute("aria-label") || it.labels?.[0]?.textContent || it.textContent;
          return [name.trim(), getComputedStyle(ring).outlineStyle];
        }"""
    )
    assert outline == "solid", f"no visible focus on {name!r}"
    return str(name)


def test_everything_is_reached_and_done_by_the_keyboard(browser: Browser, gateway: Gateway) -> None:
    admin(gateway, "POST", "models/meta/llama/wake")
    with opened(browser, gateway.url, key=None) as page:
        page.keyboard.type(KEY)  # the field has the focus
        page.keyboard.press("Enter")
        expect(page.locator("#link-text")).to_have_text("Live")
        page.reload()  # the focus is where the page begins
        expect(page.locator("#link-text")).to_have_text("Live")
        order = []
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement === document.body"):
                break
            order.append(focused(page))
        expected = ["Skip to the content", "Theme: automatic", "Forget key", "Drain all", "Reload configuration"]
        expected += ["5 min", "Pause", "As a table", "Wake qwen"]
        assert [each for each in order if each in expected] == expected
        assert order.count("Drain all") == 1
        page.get_by_role("button", name="Wake qwen").focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_contain_text("qwen is awake.")
        expect(page.get_by_role("button", name="Wake qwen")).to_be_focused()
        page.locator("#window-300").focus()
        page.keyboard.press("ArrowRight")
        expect(page.locator("#window-900")).to_be_checked()
        page.get_by_role("button", name="Drain all").focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Cancel")).to_be_focused()
        page.keyboard.press("Escape")
        expect(page.get_by_role("button", name="Drain all")).to_be_focused()


def test_on_a_phone_nothing_is_cut_off_and_targets_are_large(browser: Browser, gateway: Gateway) -> None:
    with opened(browser, gateway.url, **PHONE) as page:
        page.get_by_text("As a table").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        small = page.evaluate(
            """[...document.querySelectorAll("button, .pick label, summary, input[type=search]")]
              .filter((it) => it.checkVisibility()).map((it) => [it.textContent || it.id, it.getBoundingClientRect()])
              .filter(([, box]) => box.height < 44 || box.width < 44).map(([name]) => name)"""
        )
        assert small == []
        outside = page.evaluate(
            """[...document.querySelectorAll("main *")]
              .filter((it) => it.checkVisibility() && !it.closest(".scroll, .away, thead"))
              .filter((it) => it.getBoundingClientRect().right > innerWidth + 1).map((it) => it.outerHTML.slice(0, 80))"""
        )
        assert outside == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_systems_colours_unless_told_otherwise(browser: Browser, gateway: Gateway, scheme: str) -> None:
    def bright() -> bool:
        color: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in color[color.index("(") + 1 : -1].split(",")[:3]) > 3 * 128

    with opened(browser, gateway.url, color_scheme=scheme) as page:
        assert bright() is (scheme == "light")
        page.get_by_role("button", name="Theme: automatic").click()
        assert bright() is False
        page.get_by_role("button", name="Theme: dark").click()
        assert bright() is True
        page.reload()
        expect(page.get_by_role("button", name="Theme: light")).to_be_visible()
        assert bright() is True


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Browser, gateway: Gateway, scheme: str) -> None:
    axe = (importlib.resources.files("axe_playwright_python") / "axe.min.js").read_text()

    def check() -> None:
        result: dict[str, Any] = page.evaluate("axe.run()")
        found = [(rule["id"], node["html"], node["failureSummary"]) for rule in result["violations"] for node in rule["nodes"]]
        assert found == []

    admin(gateway, "POST", "models/qwen/pin")
    try:
        with opened(browser, gateway.url, key=None, color_scheme=scheme, reduced_motion="reduce") as page:
            page.evaluate(axe)
            check()
            enter(page, KEY)
            page.get_by_text("As a table").click()
            expect(page.locator("#switches td").first).to_be_visible()
            check()
            page.get_by_role("button", name="Drain all").click()
            check()
    finally:
        admin(gateway, "DELETE", "models/qwen/pin")


def test_names_that_are_markup_are_text(browser: Browser, gateway: Gateway) -> None:
    name = next(each for each in gateway.models if each.startswith("<img"))
    with opened(browser, gateway.url) as page:
        row = page.locator("#models tr", has_text=name)
        row.get_by_role("button", name=f"Wake {name}").click()
        expect(page.get_by_role("status")).to_contain_text(f"{name} is awake.")
        page.get_by_text("As a table").click()
        expect(page.locator("#switches")).to_contain_text(name)
        row.get_by_role("button", name="Pin").click()
        expect(page.locator("[data-notice=pin]")).to_contain_text(name)
        row.get_by_role("button", name="Unpin").click()
        expect(page.locator("[data-notice=pin]")).to_have_count(0)
        assert page.locator("main img").count() == 0
        assert page.evaluate("window.xss") is None


def test_fifty_models_fit_and_can_be_filtered(browser: Browser, models: dict[str, Any], folder: Path) -> None:
    many = {f"org/model-{n:02}": {"url": f"http://127.0.0.1:{20000 + n}"} for n in range(49)}
    with Gateway(folder, {"qwen": models["qwen"], **many}).running() as gateway, opened(browser, gateway.url) as page:
        expect(page.locator("#models tr")).to_have_count(50)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.get_by_label("Filter by name").fill("MODEL-4")
        expect(page.locator("#models tr:visible")).to_have_count(9)
        page.get_by_label("Filter by name").fill("")
        page.get_by_role("checkbox", name="Only models that did something").uncheck()
        expect(page.locator("#names span")).to_have_count(50)
        page.locator("#lanes").focus()
        page.keyboard.press("End")
        eventually("the lanes scroll", lambda: page.evaluate("document.getElementById('lanes').scrollTop") > 0)


HISTORY = """async () => {
  const { History } = await import(new URL("static/history.js", document.baseURI));
  const history = new History();
  const add = (id, kind, data) => history.add(`first-${id}`, kind, data);
  const state = (id, time, model, state) => add(id, "model", { time, model, state });
  const taken = [state(1, 1, "a", "awake"), state(1, 1, "a", "asleep")];
  for (let n = 0; n < 20000; n++) {
    const time = 2 + n / 10, model = n % 2 ? "a" : "b";
    add(3 * n + 2, "phase", { time, switch: n, phase: "wake", model });
    state(3 * n + 3, time, model, n % 4 < 2 ? "awake" : "asleep");
    const more = { outcome: "completed", duration: 0.1, phases: {}, served: 1, longest_wait: 0.01 };
    add(3 * n + 4, "switched", { time, switch: n, from: null, to: model, ...more });
  }
  const row = history.row("a");
  const sizes = () => [history.switches, row.states, row.phases, row.waits].map((each) => each.length);
  const full = sizes();
  const models = [{ name: "a", state: "asleep", waiting: 0 }];
  history.observe({ time: 6000, started: 0, epoch: "first", last_event: 60001, models });
  const later = sizes();
  history.add("second-1", "model", { time: 6010, model: "a", state: "awake" });
  const young = new History();
  const waiting = (time, n) => young.observe({ time, started: 0, epoch: "e", last_event: 2,
    models: [{ name: "a", state: "asleep", waiting: n, oldest_wait: n ? time - 80 : null }] });
  waiting(90, 2);
  const switched = (id, time, served, longest_wait) => young.add(`e-${id}`, "switched",
    { time, switch: id, from: null, to: "a", outcome: "completed", duration: 3, served, longest_wait });
  switched(1, 70, 1, 9);
  waiting(95, 3);
  switched(2, 97, 4, 17);
  waiting(98, 0);
  const waits = young.waits("a").map((each) => [each.start, each.end, each.count, each.longest]);
  return { taken, waits, full, later, gaps: history.gaps, states: history.states("a").map((each) => [each.state, each.end]) };
}"""


def test_what_the_page_keeps_is_bounded_and_each_entry_counts_once(browser: Browser, gateway: Gateway) -> None:
    with opened(browser, gateway.url, key=None) as page:
        found = page.evaluate(HISTORY)
    assert found["taken"] == [True, False]
    assert max(found["full"]) <= 5500
    assert found["waits"] == [[61, 70, 1, 9], [80, 97, 4, 17]]  # an old one that is told later, and one that was seen to end
    assert found["later"] == [0, 1, 0, 0]  # an hour and more afterwards; the state goes on
    assert [(each["start"], each["end"]) for each in found["gaps"]] == [(6000, 6010)]
    assert found["states"][-1] == ["awake", None]
    assert found["states"][-2][1] == 6000  # what was open has ended when the old process was last heard of
