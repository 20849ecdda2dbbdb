"""Takes the pictures of the dashboard for the documentation: `make screenshots`, a minute and a half.

A real gateway over three simulated servers under load, its page in light, dark and on a phone. The pictures are reduced to
256 colours by pngquant, from Debian like the browser. Text is in Inter if that is installed (Debian: fonts-inter).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser

from llmux_asgi.sim import SimOptions, start_sims
from tests.support.debian import Unavailable, program
from tests.ui.browser import chromium, opened
from tests.ui.gateways import MANAGED, Gateway, simulated, traffic

NAMES = ("qwen3-14b", "llama-3.1-8b", "mistral-small-24b")
CLIENTS = (*NAMES[:2] * 3, NAMES[2], "gemma-3-12b")
SECONDS = 62.0
"""Of traffic before the first picture: what the timeline's shortest window shows."""
LARGEST = 150_000
"""Bytes of a picture."""
DOCS = Path(__file__).resolve().parents[2] / "docs"
WIDE: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}}
VIEWS: dict[str, dict[str, Any]] = {
    "light": WIDE,
    "dark": {**WIDE, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 360, "height": 780}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True},
}


def take(browser: Browser, gateway: Gateway, name: str, context: dict[str, Any], pngquant: str) -> None:
    """Open the page anew, as an operator would, and write one picture."""
    path = DOCS / f"dashboard-{name}.png"
    with opened(browser, gateway.url, **context) as page:
        page.locator("label[for=window-60]").click()
        page.locator("#steps li").first.wait_for()
        page.wait_for_timeout(1500)
        page.screenshot(path=path, full_page=name != "phone")
    subprocess.run([pngquant, "--force", "--skip-if-larger", "--speed", "1", "--output", path, "256", path], check=False)
    size = path.stat().st_size
    if size > LARGEST:
        sys.exit(f"{path} has {size} bytes, more than {LARGEST}")
    sys.stdout.write(f"{path.relative_to(DOCS.parent)}: {size} bytes\n")


def main() -> None:
    """Run the gateway and take all pictures."""
    try:
        pngquant = program("pngquant", "pngquant")
        program("chromium", "chromium")
    except Unavailable as exc:
        sys.exit(str(exc))
    slow = {"sleep_seconds": 0.8, "wake_seconds": 1.4, "tokens_per_second": 12.0}
    with ExitStack() as stack:
        sims = stack.enter_context(start_sims(*[SimOptions(name="sim", start_asleep=1, **slow) for _ in NAMES]))  # type: ignore[arg-type]
        models = simulated({name: sim.url for name, sim in zip(NAMES, sims, strict=True)})
        models[NAMES[0]]["aliases"] = ["gpt-4o"]
        models["gemma-3-12b"] = {
            "command": [*MANAGED, "--tokens-per-second", "12", "--wake-seconds", "1"],
            "served_name": "managed",
        }
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        gateway = stack.enter_context(Gateway(folder, models, policy={"linger": 0.2}).running())
        browser = stack.enter_context(chromium())
        stack.enter_context(traffic(gateway, *CLIENTS))
        time.sleep(SECONDS)
        for name, context in VIEWS.items():
            take(browser, gateway, name, context, pngquant)


if __name__ == "__main__":
    main()
