"""What a switch through the gateway costs beyond the server's own sleep and wake: `make bench-switch`.

Two simulated servers whose sleep and wake take a known time. First round by round, side by side in one run:

    by hand    POST /sleep to the one, POST /wake_up to the other, and a one-token request to it
    gateway    the same request through the gateway, which has to switch for it

The difference is what the gateway adds: two proofs of state, queue, policy, spans, relay. Then with 500 mixed requests at
once from another process, in waves: what each switch took, less cooldown and drain, and less what its own `/sleep` and
`/wake_up` calls took.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import httpx
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.applications import Starlette
from starlette.routing import Mount

from llmux_asgi import LLMuxApp
from llmux_asgi.sim import SimOptions, SimProcess, start_sims
from tests.support.serve import serve

ROUNDS = 60
WAVES = 6
STEP_SECONDS = 0.05
CLIENT = """
import random, sys
import anyio, httpx

async def one(client, model, stream):
    body = {"model": model, "prompt": "x", "max_tokens": 16, "stream": stream}
    (await client.post("/completions", json=body)).raise_for_status()

async def main(url, waves):
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        for _ in range(waves):
            async with anyio.create_task_group() as tasks:
                for _ in range(500):
                    tasks.start_soon(one, client, random.choice("ab"), random.random() < 0.5)

anyio.run(main, sys.argv[1], int(sys.argv[2]))
"""


def report(name: str, values: Sequence[float], note: str = "") -> None:
    """Print median and quartiles of milliseconds."""
    low, middle, high = statistics.quantiles(values, n=4)
    print(f"{name:8} median {middle:6.1f} ms   quartiles {low:6.1f} .. {high:6.1f}   {note}")


def side_by_side(url: str, servers: Sequence[SimProcess], client: httpx.Client) -> None:
    """Switch by hand and by the gateway in turn, and print the difference."""
    by_hand: list[float] = []
    gateway: list[float] = []
    client.post(f"{url}/v1/completions", json={"model": "a", "prompt": "x", "max_tokens": 1})
    for index in range(ROUNDS):
        source, target = servers if index % 2 == 0 else servers[::-1]
        body = {"model": target.name, "prompt": "x", "max_tokens": 1}
        begun = time.perf_counter()
        client.post(f"{url}/v1/completions", json=body).raise_for_status()
        gateway.append(1000 * (time.perf_counter() - begun))
        # Back by hand, and there again by hand.
        client.post(target.url + "/sleep").raise_for_status()
        client.post(source.url + "/wake_up").raise_for_status()
        begun = time.perf_counter()
        client.post(source.url + "/sleep").raise_for_status()
        client.post(target.url + "/wake_up").raise_for_status()
        client.post(target.url + "/v1/completions", json=body).raise_for_status()
        by_hand.append(1000 * (time.perf_counter() - begun))
    report("by hand", by_hand)
    report("gateway", gateway)
    report("added", [mine - theirs for mine, theirs in zip(gateway, by_hand, strict=True)], f"({ROUNDS} switches)")


def under_load(url: str, exporter: InMemorySpanExporter) -> None:
    """Send waves of 500 requests and print what the switches took beyond their own calls."""
    exporter.clear()
    subprocess.run([sys.executable, "-c", CLIENT, f"{url}/v1", str(WAVES)], check=True)
    spans = exporter.get_finished_spans()
    added: list[float] = []
    for switch in (span for span in spans if span.name == "llmux.switch"):
        phases = {s.name: milliseconds(s) for s in spans if s.parent and s.parent.span_id == switch.context.span_id}
        if "sleep" in phases:
            waited = phases.get("cooldown", 0.0) + phases.get("drain", 0.0)
            added.append(milliseconds(switch) - waited - 2 * 1000 * STEP_SECONDS)
    report("added", added, f"({len(added)} switches under {WAVES} x 500 concurrent requests)")


def milliseconds(span: ReadableSpan) -> float:
    """How long a span took."""
    return ((span.end_time or 0) - (span.start_time or 0)) / 1e6


def main() -> None:
    """Run both parts and print medians and quartiles in milliseconds."""
    options = [
        SimOptions(name=name, sleep_seconds=STEP_SECONDS, wake_seconds=STEP_SECONDS, start_asleep=level, tokens_per_second=2000)
        for name, level in (("a", 0), ("b", 1))
    ]
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with start_sims(*options) as servers, httpx.Client(timeout=30) as client:
        models = {server.name: {"url": server.url} for server in servers}
        config = {"models": models, "policy": {"name": "fifo", "min_active_duration": 0, "request_timeout": None}}
        llm = LLMuxApp(config, tracer_provider=provider)
        with serve(Starlette(routes=[Mount("/llm", llm)], lifespan=llm.lifespan)) as url:
            side_by_side(f"{url}/llm", servers, client)
            under_load(f"{url}/llm", exporter)


if __name__ == "__main__":
    main()
