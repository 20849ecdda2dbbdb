"""What it costs to be watched: answers/s with the dashboard open in Chromium and `/metrics` scraped each second, and without.

Each round runs, in turn and each in a process of its own: a gateway without admin API and metrics; one with both, which nobody
looks at; the same, watched. The gateway has one core for itself; upstream, load, browser and scraper share another one.
Prints medians and ratios; the exit status is 1 if being watched costs more than 5 % of the answers.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec

from tests.benchmarks.relay.load import Result
from tests.benchmarks.relay.measure import QUICK, Running, run_loads, upstream
from tests.benchmarks.relay.processes import cores, free_port, many_files, started, wait_ready
from tests.benchmarks.relay.wire import MODEL
from tests.ui.browser import chromium, opened

__all__ = ["main"]

_ROUNDS = 5
_SECONDS = 3.0
_CONNECTIONS = 32
_KEY = "watched-by-a-benchmark"
_ALLOWED = 0.95
_WATCHED = {"admin": {"keys": {"ops": {"env": "LLMUX_ADMIN_KEY"}}}, "metrics": {}}
_VARIANTS = ("plain", "configured", "watched")


def main() -> None:
    """Measure, and print what was found."""
    many_files()
    os.environ["LLMUX_ADMIN_KEY"] = _KEY
    rates: dict[str, list[float]] = {variant: [] for variant in _VARIANTS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with upstream(QUICK, folder) as server:
            for number in range(_ROUNDS):
                for variant in _VARIANTS:
                    result = _one(variant, server, folder)
                    if result.errors:
                        raise SystemExit(f"{variant}: {result.errors}")
                    rates[variant].append(result.answers / result.seconds)
                    cpu = 1e6 * result.cpu / result.answers
                    print(f"round {number + 1}, {variant}: {rates[variant][-1]:,.0f} answers/s, {cpu:.0f} µs of CPU each")
    medians = {variant: statistics.median(found) for variant, found in rates.items()}
    for variant, rate in medians.items():
        print(f"{variant:<11} {rate:8,.0f} answers/s, {rate / medians['configured']:.3f} of configured")
    if medians["watched"] < _ALLOWED * medians["configured"]:
        sys.exit("being watched costs more than 5 %")


def _one(variant: str, server: Running, folder: Path) -> Result:
    port = free_port()
    path = folder / f"{variant}-{port}.json"
    watched = {} if variant == "plain" else _WATCHED
    path.write_bytes(msgspec.json.encode({"models": {MODEL: {"url": f"http://127.0.0.1:{server.port}"}}, **watched}))
    log = path.with_suffix(".log")
    command = [str(Path(sys.executable).with_name("llmux-asgi")), "serve", str(path), "--port", str(port)]
    size = dataclasses.replace(QUICK, seconds=_SECONDS, tries=1)
    with started(command, cores()[1], log) as pid:
        wait_ready(port, pid, log)
        target, jobs = Running(port, pid), {"x": f"plain:{_CONNECTIONS}"}
        if variant != "watched":
            return run_loads(target, server, jobs, size)["x"]
        url = f"http://127.0.0.1:{port}"
        with _beside_the_load(), chromium() as browser, opened(browser, url, key=_KEY), _scraped(url):
            return run_loads(target, server, jobs, size)["x"]


@contextmanager
def _beside_the_load() -> Iterator[None]:
    """Have what is started in here run on the core of the load."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cores()[0]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _scraped(url: str) -> Iterator[None]:
    over = threading.Event()

    def scrape() -> None:
        with httpx.Client(timeout=10) as client:
            while not over.wait(1.0):  # each second, as Prometheus would at its quickest
                client.get(f"{url}/metrics").raise_for_status()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    started_at = time.monotonic()
    main()
    print(f"{time.monotonic() - started_at:.0f} s")
